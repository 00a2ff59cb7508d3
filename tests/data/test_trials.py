"""Data as people really have it: each input gives so many rows and counted reasons, or a refusal
that names the file, the row and the remedy. Rows of four pictures, 0.png to 3.png, in `set`."""

import codecs
import gzip
import json
import tarfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import picture

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.params import Refusal

PNG = [f"{n}.png" for n in range(4)]
ANSWERS = ["a red disc", "a green disc", "a blue disc", "a yellow disc"]
Q, BAD = "what is this ?", "a cup"
NOT_TEXT = "not a text: numbers and truth values must be written as one"
OPEN = "a quote that is not closed"
MISSING = "image file is missing"


def each(**changes):
    """Four rows {image, question, answer}; changes: a field's values for the first rows, or one
    function of a row's number."""
    rows = [{"image": i, "question": Q, "answer": a} for i, a in zip(PNG, ANSWERS, strict=True)]
    for name, values in changes.items():
        for n, row in enumerate(rows):
            if callable(values):
                row[name] = values(n)
            elif n < len(values):
                row[name] = values[n]
    return rows


def pairs(rejected=lambda n: BAD, **changes):
    rows = each(rejected=rejected, **changes)
    return [{"chosen" if k == "answer" else k: v for k, v in r.items()} for r in rows]


def talks(*turns, answers=ANSWERS, keys=("from", "value"), **more):
    """A conversation a picture: the turns (role, text), then gpt's answer."""
    return [{"id": n, "image": PNG[n], "conversations": [
        dict(zip(keys, t, strict=True)) for t in (*turns, ("gpt", a))], **more}
        for n, a in enumerate(answers)]


def named(rows, **names):
    """The rows with fields under other names; a name that is None takes a field away."""
    return [{names.get(k, k): v for k, v in r.items() if names.get(k, k)} for r in rows]


def only(**fields):
    return [fields | {"image": i} for i in PNG]


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


def csv(*rows, header="image,question,answer", end="\n"):
    return end.join((header, *rows)) + end


LINES = [f'{i},{Q},{a}' for i, a in zip(PNG, ANSWERS, strict=True)]
HUMAN = ("human", f"<image>\n{Q}")
USER = message(Q, "user")
GT = [{"type": "gt", "score": 1, "response": "a red disc"}]


def rated(*ratings):
    return [{"model": str(n), "response": f"{BAD} {n}", "annotations": {
        "Helpfulness": {"Rating": str(r)}, "Visual Faithfulness": {"Rating": str(r)}}}
        for n, r in enumerate(ratings)]


TRIALS = {  # name -> (file's name, its text, entries or bytes, rows used, reasons or key words)
    # turns
    "system": ("a.json", talks(("system", "be brief"), HUMAN), 4, {}),
    "system field": ("a.json", talks(HUMAN, system="be brief"), 4, {}),
    "user, assistant": ("a.json", talks(("user", Q)), 4, {}),
    "role, content": ("a.json", talks(("USER", Q), keys=("role", "content"), answers=ANSWERS), 4,
                      {}),
    "gpt first": ("a.json", talks(("gpt", "hello"), HUMAN), 0, {"the assistant speaks first": 4}),
    "gpt twice": ("a.json", talks(HUMAN, ("gpt", "well")), 0, {"turns do not alternate": 4}),
    "system late": ("a.json", talks(HUMAN, ("system", "x")), 0, {"turns do not alternate": 4}),
    "other role": ("a.json", talks(("tool", "x"), HUMAN), 0, {"a turn of an unknown role": 4}),
    "empty question": ("a.json", talks(("human", "<image>")), 0, {"empty question": 4}),
    "empty answer between": ("a.json", talks(HUMAN, ("gpt", " "), ("human", Q)), 0,
                             {"empty answer": 4}),
    "last turn unanswered": ("a.json", [
        {**r, "conversations": [*r["conversations"], {"from": "human", "value": "and ?"}]}
        for r in talks(HUMAN)], 4, {}),
    "marks": ("a.json", talks(("human", f"<image> <image> {Q}")), 0,
              {"<image> more often than there are images": 4}),
    "mark between": ("a.json", talks(("human", f"see <image> , {Q}")), 0, {"<image> in a text": 4}),
    "mark behind": ("a.json", talks(("human", f"{Q}\n<image>")), 4, {}),
    "mark in a later turn": ("a.json", talks(("human", "hi"), ("gpt", "hi"), HUMAN), 0,
                             {"<image> in a text": 4}),
    "strange answers": ("a.json", talks(HUMAN, answers=[
        "<think>hm</think>red", "red</s>", "red<|im_end|>", "<image> red"]), 0,
        {"<think> in a text": 1, "</s> in a text": 1, "<|im_end|> in a text": 1,
         "<image> more often than there are images": 1}),
    "a text of HTML": ("a.jsonl", each(answer=["<s>old</s2> <img src='a.png'> a < b > c"]), 4, {}),
    "placeholders": ("a.jsonl", each(question=["see <image 1>", "<ImageHere> ?", "<img>", Q]), 1,
                     {"<image 1> in a text": 1, "<ImageHere> in a text": 1, "<img> in a text": 1}),
    "videos": ("a.json", [*talks(HUMAN)[:3], {"video": "v.mp4", **talks(HUMAN)[3]}], 3,
               {"a video": 1}),
    "video in a text": ("a.json", talks(("human", f"<video>\n{Q}")), 0, {"<video> in a text": 4}),
    "turns as JSON in a cell": ("a.csv", csv(*(
        f"{i},\"{json.dumps(t['conversations']).replace(chr(34), chr(34) * 2)}\"" for i, t in zip(
            PNG, talks(HUMAN), strict=True)), header="image,conversations"), 4, {}),
    "labelled as bad": ("a.json", [{**t, "label": n > 1} for n, t in enumerate(talks(HUMAN))], 2,
                        {"an answer that is labelled as bad": 2}),
    # preference layouts
    "LLaMA-Factory": ("a.json", [
        {"conversations": [{"from": "human", "value": f"<image>{Q}"}], "images": [i],
         "chosen": {"from": "gpt", "value": a}, "rejected": {"from": "gpt", "value": BAD}}
        for i, a in zip(PNG, ANSWERS, strict=True)], 4, {}),
    "LLaMA-Factory, alpaca": ("a.json", named(pairs(input=lambda n: "in a word"),
                                              question="instruction"), 4, {}),
    "ms-swift": ("a.jsonl", [
        {"messages": [*USER, *message(a)], "rejected_response": BAD, "images": [i]}
        for i, a in zip(PNG, ANSWERS, strict=True)], 4, {}),
    "ms-swift, older": ("a.jsonl", named(pairs(history=lambda n: [["hi", "hello"]]),
                                         question="query", chosen="response",
                                         rejected="rejected_response"), 4, {}),
    "TRL, implicit": ("a.json", [
        {"images": [i], "chosen": [*USER, *message(a)], "rejected": [*USER, *message(BAD)]}
        for i, a in zip(PNG, ANSWERS, strict=True)], 4, {}),
    "TRL, whole beside the prompt": ("a.json", named(pairs(
        rejected=lambda n: [*USER, *message(BAD)],
        answer=lambda n: [*USER, *message(ANSWERS[n])]), question="prompt"), 4, {}),
    "TRL, image in the message": ("a.json", [
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": i},
                                                 {"type": "text", "text": Q}]}],
         "chosen": message(a), "rejected": message(BAD)}
        for i, a in zip(PNG, ANSWERS, strict=True)], 4, {}),
    "POVID": ("a.json", [{**t, "rejected_conversations": [t["conversations"][0], {
        "from": "gpt", "value": BAD if n else t["conversations"][1]["value"]}]}
        for n, t in enumerate(talks(HUMAN))], 3, {"the rejected answer equals the chosen one": 1}),
    "VLFeedback": ("a.json", [{"id": "a", "image": PNG[0], "prompt": Q, "completions": rated(2, 5)},
                              {"id": "b", "image": PNG[1], "prompt": Q, "completions": rated(3, 3)},
                              {"id": "c", "image": PNG[2], "prompt": Q,
                               "completions": rated("N/A", 4)}], 1, {"no annotated answer": 2}),
    "Sequence of datasets": ("a.json", only(prompt=Q, completions={
        "type": ["gt", "llm-hal"], "response": ["a red disc", BAD], "score": [1, 0]}), 4, {}),
    "MMPR": ("a.jsonl", pairs(image=[[PNG[0], PNG[1]]], question=lambda n: f"<image>\n{Q}"), 3,
             {"more than one image": 1}),
    "rejected answers": ("a.jsonl", pairs(rejected=[ANSWERS[0], "", None, 3]), 0,
                         {"the rejected answer equals the chosen one": 1, NOT_TEXT: 1,
                          "empty rejected answer": 2}),
    "several rejected": ("a.jsonl", pairs(rejected=lambda n: [BAD, f"{BAD} {n}"]), 4, {}),
    "Chinese": ("a.jsonl", pairs(question=lambda n: "图中有什么？", answer=lambda n: f"{n}把刀。",
                                 rejected=lambda n: f"{n}片叶子。"), 4, {}),
    # missing values
    "NaN": ("a.jsonl", each(answer=[float("nan")], image=["0.png", float("nan")],
                            question=[Q, Q, float("nan")]), 1,
            {"empty answer": 1, "no image": 1, "empty question": 1}),
    "NaN in a list": ("a.json", each(answer=[float("nan"), None, " ", "nan"]), 0,
                      {"empty answer": 4}),
    "no texts": ("a.json", each(answer=[True, 1.0, 3, {"text": "red"}]), 0, {NOT_TEXT: 4}),
    "NaN in a CSV": ("a.csv", csv(*LINES[:2], f"2.png,{Q},", f"3.png,,{ANSWERS[3]}"), 2,
                     {"empty answer": 1, "empty question": 1}),
    "NaN in parquet": ("a.parquet", each(answer=[None], question=[Q, None]), 2,
                       {"empty answer": 1, "empty question": 1}),
    "numbers in parquet": ("a.parquet", each(answer=lambda n: float(n)), 0, {NOT_TEXT: 4}),
    # repeats
    "repeated without ids": ("a.jsonl", each() * 5, 4, {"repeated row": 16}),
    "repeated under other ids": ("a.json", [{**t, "id": f"{t['id']}-{n}"} for n in range(5)
                                            for t in talks(HUMAN)], 4, {"repeated row": 16}),
    "a line a pair": ("a.jsonl", pairs() + pairs(rejected=lambda n: "a box"), 8, {}),
    "a line a pair, neighbours": ("a.jsonl", [r for two in zip(pairs(), pairs(
        rejected=lambda n: "a box"), strict=True) for r in two], 4, {}),
    # CSV
    "header": ("a.csv", csv(*LINES, header=" Image , Question,ANSWER"), 4, {}),
    "file_name": ("a.csv", csv(*(f"{i},{a}" for i, a in zip(PNG, ANSWERS, strict=True)),
                               header="file_name,text"), 4, {}),
    "index": ("a.csv", csv(*(f"{n},{line}" for n, line in enumerate(LINES)),
                           header=",image,question,answer"), 4, {}),
    "sep=": ("a.csv", "sep=;\n" + csv(*LINES).replace(",", ";"), 4, {}),
    "quotes": ("a.csv", csv(*(f'"{i}","what ""is"" this ,\nplease ?","{a},\nred, a, b"'
                              for i, a in zip(PNG, ANSWERS, strict=True)), end="\r\n"), 4, {}),
    "blanks behind commas": ("a.csv", csv(f'0.png, {Q}, "red, green"'), 1, {}),
    "stray quote": ("a.csv", csv(LINES[0], f'1.png,{Q},"12 inch', *LINES[2:]), 3, {OPEN: 1}),
    "two stray quotes": ("a.csv", csv(f'0.png,{Q},"12 inch', *LINES[1:3], f'3.png,{Q},9 inch"'), 3,
                         {OPEN: 1}),
    "stray before quoted": ("a.csv", csv(f'0.png,{Q},"open', *(
        f'{i},{Q},"{a}"' for i, a in zip(PNG[1:], ANSWERS[1:], strict=True))), 3, {OPEN: 1}),
    "short row": ("a.csv", csv(*LINES[:3], "3.png,red"), 3,
                  {"more or fewer cells than the header": 1}),
    "Latin-1": ("a.csv", csv(*LINES, f"0.png,{Q},café").encode("latin-1"), None,
                "a.csv: .*after row .*0xe9.*Latin-1.*iconv"),
    "base64": ("a.tsv", csv(f"0\t{'iVBORw0KGgo' * 400}\t{Q}\tred",
                            header="index\timage\tquestion\tanswer"), 0,
               {"image is base64 text: write it to a file and name that": 1}),
    # JSON
    "BOM and CRLF": ("a.json", codecs.BOM_UTF8 + json.dumps(talks(HUMAN), indent=1).replace(
        "\n", "\r\n").encode(), 4, {}),
    "UTF-16": ("a.json", json.dumps(talks(HUMAN), indent=1).encode("utf-16"), 4, {}),
    "UTF-16 lines": ("a.jsonl", "".join(f"{json.dumps(r)}\r\n" for r in each()).encode("utf-16"), 4,
                     {}),
    "Latin-1 lines": ("a.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in each(
        answer=["café"])).encode("latin-1"), 3, {"not UTF-8 text: save the file as UTF-8": 1}),
    "Latin-1 list": ("a.json", json.dumps(each(answer=["café"]), ensure_ascii=False).encode(
        "latin-1"), None, "a.json: .*Latin-1"),
    "data": ("a.json", json.dumps({"version": 1, "data": each()}), 4, {}),
    "by id": ("a.json", json.dumps({f"x{n}": r for n, r in enumerate(each())}), 4, {}),
    "columns": ("a.json", json.dumps({"image": dict(enumerate(PNG)),
                                      "answer": dict(enumerate(ANSWERS))}),
                                      None, "orient='records'"),
    "one behind the other": ("a.json", "\n".join(json.dumps(r, indent=1) for r in each()), 4, {}),
    "one row": ("a.json", json.dumps(each()[0], indent=1), 1, {}),
    "two lists": ("a.json", json.dumps({"train": each(), "val": each()}), None, "train, val.*own"),
    "cut list": ("a.json", json.dumps(each())[:-9], None, "breaks off .*after row 3.*whole file"),
    "cut lines": ("a.jsonl", "\n".join(map(json.dumps, each()))[:-9], None,
                  "breaks off .*after row 3.*whole file"),
    "cut lines with an end": ("a.jsonl", "\n".join(map(json.dumps, each()))[:-9] + "\n", None,
                              "breaks off .*after row 3"),
    "bad line": ("a.jsonl", "\n".join(["{oops}", *map(json.dumps, each())]), 4, {"not a row": 1}),
    "two lists in one file": ("a.json", json.dumps(each()) * 2, None, "wrong after row 4"),
    "gzip": ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, each())).encode()), 4, {}),
    "cut gzip": ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, each())).encode())[:-12],
                 None, "gzip file is cut"),
    # other sets
    "COCO": ("a.json", json.dumps({
        "info": {}, "annotations": [{"image_id": n, "id": 9 + n, "caption": a}
                                    for n, a in enumerate(ANSWERS)],
        "images": [{"id": n, "file_name": i} for n, i in enumerate(PNG)],
        "licenses": [{}]}), 4, {}),
    "VQAv2": ("a.json", json.dumps({"annotations": [
        {"image_id": 1, "question_id": 10, "multiple_choice_answer": "yes", "answers": []}]}), None,
        "multiple_choice_answer.*question_id"),
    "VQA results": ("a.json", [{"image_id": 1, "question_id": 10, "answer": "yes"}], None,
                    "fields image_id, question_id, answer"),
    "POPE": ("a.jsonl", named(each(question_id=lambda n: n), question="text", answer="label"), None,
             "fields image, text, label, question_id"),
    "GQA": ("a.json", json.dumps({"07": {"imageId": "7", "question": Q, "answer": "red",
                                         "fullAnswer": "It is red."}}), 1, {}),
    "several captions": ("a.jsonl", named(each(answer=lambda n: [ANSWERS[n], "a disc"]),
                                          question=None, answer="caption"), 8, {}),
    "Visual Genome": ("a.json", [{"id": 1, "qas": [{"question": Q, "answer": "red"}]}], None,
                      "Visual Genome"),
    "img_path": ("a.jsonl", named(each(), image="img_path"), 4, {}),
    "URL": ("a.jsonl", each(image=lambda n: f"https://a.b/{n}.png"), 0,
            {"image is a URL: download it": 4}),
    "lists of images": ("a.json", each(image=[[PNG[0]], [PNG[0], PNG[1]], []]), 2,
                        {"more than one image": 1, "no image": 1}),
    "missing images": ("a.json", each(image=["none.png", "../0.png"]), 2,
                       {MISSING: 1, "image path leaves the image folder": 1}),
    "LFS pointer": ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None,
                    "Git LFS; .*git lfs pull"),
    "Excel": ("a.xlsx", b"PK\x03\x04" + bytes(40), None, "zip or Excel"),
    # pictures inside parquet
    "jpg column": ("p.parquet", named(each(), image="jpg", answer="txt", question=None), 4, {}),
    "picture column": ("p.parquet", named(each(), image="picture"), 4, {}),
    "paths in parquet": ("path.parquet", each(), 4, {}),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for name, colour in zip((*PNG, "7.jpg"), ("red", "green", "blue", "yellow", "red"),
                            strict=True):
        picture("disc", colour, 0).save(tmp_path / "set" / name)
    picture("disc", "red", 0).save(tmp_path / "0.png")
    return tmp_path / "set"


def written(folder, name, content):
    file = folder / name
    if name.endswith("parquet"):
        column = next((c for c in ("jpg", "picture") if c in content[0]), "image")
        for row in content if name != "a.parquet" else ():
            data = (folder / row[column]).read_bytes()
            row[column] = (data if column == "jpg" else {
                "bytes": data if column == "picture" else None, "path": row[column]})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    elif isinstance(content, list):
        file.write_text(json.dumps(content) if name.endswith("json") else
                        "".join(f"{json.dumps(r)}\n" for r in content), encoding="utf-8")
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize("trial", TRIALS)
def test_each_input_gives_its_rows_and_reasons(folder, trial):
    name, content, used, reasons = TRIALS[trial]
    data = written(folder, name, json.loads(json.dumps(content)) if isinstance(content, list)
                   else content)
    if not isinstance(reasons, dict):
        with pytest.raises(Refusal, match=reasons) as caught:
            list(data_rows.stream(data))
        assert str(data) in str(caught.value)
        return
    read = list(data_rows.stream(data))
    rows = [r for r in read if isinstance(r, Row)]
    assert data_rows.Reasons(r for r in read if not isinstance(r, Row)) == reasons
    assert len(rows) == used
    assert not any(images.problem(r.image) for r in rows)
    assert all(r.answer and r.question and "nan" not in (r.answer, r.question) for r in rows)


def texts(folder, trial):
    """The first row of a trial: roles and texts of its prompt, answer, rejected answers."""
    name, content, *_ = TRIALS[trial]
    row = next(r for r in data_rows.stream(written(folder, name, content)) if isinstance(r, Row))
    return [(m["role"], m["content"]) for m in row.prompt], row.answer, row.given


@pytest.mark.parametrize("trial, prompt, answer, given", [
    ("system", [("system", "be brief"), ("user", Q)], ANSWERS[0], ()),
    ("system field", [("system", "be brief"), ("user", Q)], ANSWERS[0], ()),
    ("LLaMA-Factory", [("user", Q)], ANSWERS[0], (BAD,)),
    ("LLaMA-Factory, alpaca", [("user", f"{Q}\nin a word")], ANSWERS[0], (BAD,)),
    ("ms-swift", [("user", Q)], ANSWERS[0], (BAD,)),
    ("ms-swift, older", [("user", "hi"), ("assistant", "hello"), ("user", Q)], ANSWERS[0], (BAD,)),
    ("TRL, implicit", [("user", Q)], ANSWERS[0], (BAD,)),
    ("TRL, whole beside the prompt", [("user", Q)], ANSWERS[0], (BAD,)),
    ("POVID", [("user", Q)], ANSWERS[1], (BAD,)),
    ("VLFeedback", [("user", Q)], f"{BAD} 1", (f"{BAD} 0",)),
    ("several rejected", [("user", Q)], ANSWERS[0], (BAD, f"{BAD} 0")),
    ("a line a pair, neighbours", [("user", Q)], ANSWERS[0], (BAD, "a box")),
    ("GQA", [("user", Q)], "red", ()),
    ("mark behind", [("user", Q)], ANSWERS[0], ())])
def test_texts_are_read_as_they_are_meant(folder, trial, prompt, answer, given):
    assert texts(folder, trial) == (prompt, answer, given)


def test_a_folder_of_images_with_its_metadata_is_read(folder):
    written(folder, "metadata.jsonl", [{"file_name": i, "text": a}
                                       for i, a in zip(PNG, ANSWERS, strict=True)])
    assert [(r.image_name, r.answer) for r in data_rows.stream(folder)] == list(
        zip(PNG, ANSWERS, strict=True))


def test_an_unpacked_webdataset_is_named_and_read_once_converted(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for n, answer in enumerate(ANSWERS):
            (folder / f"{n}.txt").write_text(answer)
            tar.add(folder / f"{n}.png", f"{n}.png")
            tar.add(folder / f"{n}.txt", f"{n}.txt")
    with pytest.raises(Refusal, match="tar file; unpack it, or .*to_parquet"):
        data_rows.layout(folder / "a.tar")
    datasets.load_dataset("webdataset", data_files=str(folder / "a.tar"), split="train",
                          cache_dir=str(folder / "cache")).to_parquet(folder / "train.parquet")
    rows = list(data_rows.stream(folder / "train.parquet"))
    assert [r.answer for r in rows] == ANSWERS
    assert not any(images.problem(r.image) for r in rows)


def test_rows_that_the_truth_file_names_are_no_repeats(folder):
    data = written(folder, "a.json", talks(HUMAN)[:1] + [{**talks(HUMAN)[0], "id": "b"}])
    assert [getattr(r, "reason", "") for r in data_rows.stream(data)] == ["", "repeated row"]
    (folder / "truth.json").write_text(json.dumps({"rows": {"0": {}, "b": {}}}))
    assert [r.id for r in data_rows.stream(data)] == ["0", "b"]


def test_what_was_tried_and_what_to_do_are_said(folder):
    with pytest.raises(Refusal) as caught:
        data_rows.list_rows(written(folder, "a.json", each(image=lambda n: f"no/{n}.png")))
    assert f"4 {MISSING} (first: a.json, row 1: {folder}/no/0.png); set image_folder" in str(
        caught.value)
    with pytest.raises(Refusal) as caught:
        data_rows.list_rows(written(folder, "a.json", each(answer=lambda n: None)))
    assert "4 empty answer (first: a.json, row 1)" in str(caught.value)
    assert "image_folder" not in str(caught.value)
