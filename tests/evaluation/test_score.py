"""The command that scores answers of elsewhere: files in, numbers worked out by hand out."""

import argparse
import json

import pytest

from bpo import params
from bpo.evaluation import official, score
from bpo.params import Refusal

OBJECTS = {"42": ["person", "dog"], "COCO_val2014_000000000007.jpg": ["person"], "8": ["chair"]}
MINE = [{"image_id": 42, "caption": "A man and his dog on a chair."},
        {"image_id": "COCO_val2014_000000000007.jpg", "caption": "A woman."},
        {"image_id": 1000, "caption": "of no image"}]
OTHER = [{"image": "COCO_val2014_000000000007.jpg", "answer": "A woman with a cat."},
         {"image": "42", "answer": "A dog"}, {"image": 8, "answer": "A chair"}]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "objects.json").write_text(json.dumps(OBJECTS))
    lines(tmp_path / "mine.jsonl", MINE)
    (tmp_path / "other.json").write_text(json.dumps(OTHER))
    return tmp_path


def lines(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def call(capsys, *arguments):
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    assert score.run(parser.parse_args([str(a) for a in arguments])) == 0
    return capsys.readouterr().out


def numbers(capsys, *arguments):
    return json.loads(call(capsys, *arguments, "--json"))


def chair(folder, *more, name="chair"):
    return (name, "--answers", folder / "mine.jsonl", "--truth", folder / "objects.json", *more)


def values(found):
    return {n: (e["value"], e["n"]) for n, e in found.items()}


def test_captions_are_scored_by_image_number(files, capsys):
    found = numbers(capsys, *chair(files))
    # Words: man, dog, chair (wrong), woman; of person, dog, person all are named.
    assert values(found["metrics"]) == {"chair_s": (0.5, 2), "chair_i": (0.25, 4), "cover": (1, 3),
                                        "objects": (2, 2), "words": (5, 2)}
    assert found["answers"] == {"read": 3, "scored": 2, "without_truth": 1, "truth": 3,
                                "truth_without_answer": 1, "field": "caption", "empty": 0,
                                "note": ""}


def test_object_halbench_counts_as_it_says(files, capsys):
    found = numbers(capsys, *chair(files, name="object-halbench"))
    # "A woman." has two words: it counts as without an object.
    assert values(found["metrics"]) == {
        "response": (1, 1), "mention": (0.333333, 3), "cover": (0.666667, 3), "objects": (1.5, 2),
        "words": (5, 2)}


def test_the_table_shows_per_cent_interval_and_counts(files, capsys):
    out = call(capsys, *chair(files, "--against", files / "other.json"))
    assert "CHAIR: 2 of 3 answers scored, 1 without truth, 0 empty, from the field caption" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["CHAIRi", "25.0", "%", "[0.0,", "33.3]", "4"] in rows
    assert ["words", "an", "answer", "5.0", "[2.0,", "8.0]", "2"] in rows
    assert [r[1:3] for r in rows if r[:1] == ["CHAIRi"]] == [["25.0", "%"], ["-8.3", "%"]]
    assert ["+33.3", "%"] in [r[1:3] for r in rows if r[:1] == ["cover"]]
    assert "2 answers matched, 0 here and 1 there lack a partner" in out


def test_a_difference_is_on_the_answers_that_both_have(files, capsys):
    found = numbers(capsys, *chair(files, "--against", files / "other.json"))
    assert found["against"] | {"note": ""} == {
        "read": 3, "scored": 3, "without_truth": 0, "truth": 3, "truth_without_answer": 0,
        "field": "answer", "empty": 0,
        "matched": 2, "without_partner": 0, "without_partner_against": 1, "note": ""}
    gap = found["differences"]
    # CHAIRi 1/4 against 1/3 (woman, cat, dog); cover 3/3 against 2/3; CHAIRs 1/2 both.
    assert gap["chair_i"]["value"] == pytest.approx(1 / 4 - 1 / 3, abs=1e-6)
    assert gap["cover"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert gap["chair_s"]["value"] == 0
    assert all(e["low"] <= e["value"] <= e["high"] and 0 < e["p"] <= 1 for e in gap.values())


def test_several_answers_to_an_image_are_paired_by_their_question(files, capsys):
    asked = [{"image_id": 7, "question": "What?", "answer": "I see a woman there"},
             {"image_id": 7, "question": "Who?", "answer": "I see a cat there"}]
    lines(files / "mine.jsonl", asked)
    lines(files / "other.jsonl", asked[::-1])
    found = numbers(capsys, *chair(files, "--against", files / "other.jsonl",
                                   name="object-halbench"))
    assert found["against"]["matched"] == 2
    assert found["metrics"]["response"]["value"] == 0.5
    lines(files / "other.jsonl", [{**a, "question": "Where?"} for a in asked])
    with pytest.raises(Refusal, match="none of the questions"):
        numbers(capsys, *chair(files, "--against", files / "other.jsonl"))


@pytest.mark.parametrize("captions", (True, False))
def test_coco_s_instances_are_a_truth_too(tmp_path, capsys, captions):
    truth = tmp_path / "instances_val2014.json"
    truth.write_text(json.dumps({
        "info": {}, "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "category_id": 3}], "categories": [{"id": 3,
                                                                            "name": "dog"}]}))
    if captions:
        (tmp_path / "captions_val2014.json").write_text(json.dumps(
            {"annotations": [{"image_id": 7, "caption": "a dog and a man"}]}))
    lines(tmp_path / "mine.jsonl", [{"image_id": 7, "caption": "a dog and a man"}])
    found = numbers(capsys, "chair", "--answers", tmp_path / "mine.jsonl", "--truth", truth)
    assert found["metrics"]["chair_i"]["value"] == (0 if captions else 0.5)
    assert bool(found["answers"]["note"]) != captions


def test_own_synonyms_are_used(files, capsys):
    (files / "words.txt").write_text("person, woman\ndog\nchair, man\n")
    found = numbers(capsys, *chair(files, "--synonyms", files / "words.txt"))
    assert found["metrics"]["chair_i"]["value"] == 0.5  # man and chair of man, dog, chair, woman


# --- POPE and AMBER -----------------------------------------------------------------------------

@pytest.fixture
def pope(tmp_path):
    for kind, absent in (("random", "fork"), ("popular", "car")):
        lines(tmp_path / f"coco_pope_{kind}.json", [
            {"question_id": 1, "image": "COCO_val2014_000000000042.jpg",
             "text": "Is there a dog in the image?", "label": "yes"},
            {"question_id": 2, "image": "COCO_val2014_000000000042.jpg",
             "text": f"Is there a {absent} in the image?", "label": "no"}])
    return tmp_path


def test_pope_by_question_number_and_one_file(pope, capsys):
    lines(pope / "a.jsonl", [{"question_id": 1, "text": "Yes"}, {"question_id": 2, "text": "Hm"},
                             {"question_id": 3, "text": "Yes"}])
    found = numbers(capsys, "pope", "--answers", pope / "a.jsonl", "--truth",
                    pope / "coco_pope_popular.json")
    assert values(found["metrics"]) == {
        "accuracy": (0.5, 2), "precision": (1, 1), "recall": (1, 1), "f1": (1, 2),
        "yes_ratio": (0.5, 2), "unanswered": (0.5, 2), "accuracy_popular": (0.5, 2),
        "f1_popular": (1, 2), "official_accuracy": (0.5, 2), "official_f1": (0.666667, 3),
        "official_difference": (0, 2), "read_otherwise": (0.5, 2), "bare": (1, 2)}
    assert found["answers"]["without_truth"] == 1


def test_pope_by_image_and_question_in_all_files_of_a_folder(pope, capsys):
    lines(pope / "a.jsonl", [
        {"image": 42, "question": "Is there a dog in the image?", "answer": "yes"},
        {"image": 42, "question": "is there a FORK in the image", "answer": "no"},
        {"image": 42, "question": "Is there a dog in the image?", "answer": "yes"},
        {"image": 42, "text": "Is there a car in the image?", "answer": "yes"}])
    found = numbers(capsys, "pope", "--answers", pope / "a.jsonl", "--truth", pope)
    # The dog is asked for in both files: yes, yes; fork no; car yes, which is wrong.
    assert values(found["metrics"])["accuracy"] == (0.75, 4)
    assert values(found["metrics"])["accuracy_popular"] == (0.5, 2)
    assert found["answers"]["truth_without_answer"] == 0


def test_a_number_that_two_files_have_needs_more(pope, capsys):
    lines(pope / "a.jsonl", [{"question_id": 1, "text": "Yes"}])
    with pytest.raises(Refusal, match="a.jsonl, row 1: its question number is in 2 question"):
        numbers(capsys, "pope", "--answers", pope / "a.jsonl", "--truth", pope)
    lines(pope / "a.jsonl", [{"question_id": "popular-2", "text": "No"}])
    found = numbers(capsys, "pope", "--answers", pope / "a.jsonl", "--truth", pope)
    assert values(found["metrics"])["accuracy"] == (1, 1)


def test_a_question_with_two_different_answers_is_refused(pope, capsys):
    lines(pope / "a.jsonl", [{"question_id": 1, "text": "Yes"}, {"question_id": 1, "text": "No"}])
    with pytest.raises(Refusal, match="row 2: question popular-1 has another answer already"):
        numbers(capsys, "pope", "--answers", pope / "a.jsonl", "--truth",
                pope / "coco_pope_popular.json")


@pytest.fixture
def amber(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps([
        {"id": 1, "type": "generative", "truth": ["sky", "man"], "hallu": ["dog"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "relation", "truth": "yes"}]))
    (tmp_path / "relation.json").write_text('{"sky": [], "man": [], "dog": []}')
    (tmp_path / "safe_words.txt").write_text("")
    (tmp_path / "a.json").write_text(json.dumps([
        {"id": 1, "response": "The sky, a man, a man and a dog"}, {"id": 2, "response": "No"},
        {"id": 3, "response": "No"}]))
    return tmp_path


def test_amber_with_its_score(amber, capsys):
    found = numbers(capsys, "amber", "--answers", amber / "a.json", "--truth",
                    amber / "annotations.json")
    got = values(found["metrics"])
    assert got["chair"] == (0.25, 4) and got["hal"] == (1, 1) and got["cog"] == (1, 1)
    # "no" was right once of two: precision 1/2, recall 1, F1 2/3.
    assert got["precision"] == (0.5, 2) and got["f1"] == (0.666667, 3)
    assert got["amber_score"] == (pytest.approx((0.75 + 2 / 3) / 2, abs=1e-6), 3)
    assert found["metrics"]["amber_score"]["low"] < 0.7 < found["metrics"]["amber_score"]["high"]
    assert "intervals are over questions" in found["answers"]["note"]
    out = call(capsys, "amber", "--answers", amber / "a.json", "--truth", amber)
    assert "AMBER score" in out and "70.8 %" in out


def test_amber_s_images_are_the_unit_where_its_queries_are_there(amber, capsys):
    (amber / "query").mkdir()
    (amber / "query/query_generative.json").write_text(
        '[{"id": 1, "image": "AMBER_1.jpg", "query": "?"}]')
    (amber / "query/query_discriminative.json").write_text(json.dumps(
        [{"id": n, "image": "AMBER_1.jpg", "query": "?"} for n in (2, 3)]))
    found = numbers(capsys, "amber", "--answers", amber / "a.json", "--truth", amber)
    # One image: every resample is the same.
    assert found["metrics"]["accuracy"]["low"] == found["metrics"]["accuracy"]["high"] == 0.5
    assert found["answers"]["note"] == ""


# --- whose answers ----------------------------------------------------------------------------

LABELS = ["yes", "no", "no", "no"]  # of four questions; the model says yes to all


@pytest.mark.parametrize("made", [
    {"answer": LABELS, "prediction": ["Yes"] * 4}, {"answer": LABELS, "response": ["Yes"] * 4},
    {"answer": LABELS, "Model Answer": ["Yes"] * 4}, {"answer": LABELS, "output": [["Yes"]] * 4},
    {"gt": LABELS, "answer": ["Yes"] * 4}, {"ref": LABELS, "text": ["Yes"] * 4},
    {"label": LABELS, "caption": ["Yes"] * 4}, {"ground_truth": LABELS, "pred": [True] * 4},
    {"answer": LABELS, "prediction": ["Yes"] * 4, "response": ["yes."] * 4},
    {"text": ["Is there a dog?"] * 4, "answer": ["Yes"] * 4, "label": LABELS},
    {"target": LABELS, "doc": [{"answer": x} for x in LABELS], "resps": [[["Yes"]]] * 4,
     "filtered_resps": [["Yes"]] * 4}])
def test_the_model_s_answers_are_scored_and_not_the_labels(tmp_path, capsys, made):
    lines(tmp_path / "coco_pope_random.json", [
        {"question_id": n, "image": f"COCO_val2014_{n:012d}.jpg", "text": "Is there a dog?",
         "label": label} for n, label in enumerate(LABELS)])
    rows = [{"question_id": n, **{name: of[n] for name, of in made.items()}} for n in range(4)]
    lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text("\n".join(
        ",".join(map(str, cells)) for cells in ([*rows[0]], *(r.values() for r in rows))))
    as_table = all(isinstance(v, str | int) for v in rows[0].values())
    for file in ("a.jsonl", "a.csv")[:1 + as_table]:
        found = numbers(capsys, "pope", "--answers", tmp_path / file, "--truth",
                        tmp_path / "coco_pope_random.json")
        assert values(found["metrics"])["accuracy"] == (0.25, 4)


@pytest.mark.parametrize("made, said", [
    ({"answer": LABELS}, "4 answers in answer are all the truth, word by word; its fields are"),
    ({"answer": LABELS, "llava": ["Yes"] * 4}, "fields are question_id, answer, llava: name that"),
    ({"text": ["Is there a dog?"] * 4, "label": LABELS}, "are all the benchmark's questions"),
    ({"answer": LABELS, "text": ["Yes", "no", "Yes", "Yes"]}, "may be in answer .* or text"),
    ({"answer": LABELS, "caption": ["Yes"] * 4}, "may be in caption .* or answer")])
def test_answers_that_may_be_the_truth_are_refused_until_they_are_named(tmp_path, capsys, made,
                                                                        said):
    truth = tmp_path / "coco_pope_random.json"
    lines(truth, [{"question_id": n, "image": f"{n}.jpg", "text": "Is there a dog?",
                   "label": label} for n, label in enumerate(LABELS)])
    lines(tmp_path / "a.jsonl", [{"question_id": n, **{name: of[n] for name, of in made.items()}}
                                 for n in range(4)])
    arguments = ("pope", "--answers", tmp_path / "a.jsonl", "--truth", truth)
    with pytest.raises(Refusal, match=said):
        call(capsys, *arguments)
    with pytest.raises(Refusal, match="has no field nothing, but"):
        lines(tmp_path / "b.jsonl", [{"question_id": 0, "answer": "well"}])
        call(capsys, "pope", "--answers", tmp_path / "b.jsonl", "--truth", truth, "--field",
             "nothing")
    named = numbers(capsys, *arguments, "--field", list(made)[-1])
    assert named["answers"]["field"] == list(made)[-1]


def test_a_reference_caption_beside_a_response_is_not_scored(files, capsys):
    lines(files / "mine.jsonl", [{"image_id": 7, "caption": "A woman.", "response": "A dog here."}])
    assert values(numbers(capsys, *chair(files))["metrics"])["chair_s"] == (1, 1)


@pytest.mark.parametrize("name", ["chair", "object-halbench"])
@pytest.mark.parametrize("text", ["", None, "一只狗和一只猫", "🐶", "...", " ", "Собака и кошка тут"])
def test_a_collapsed_model_s_answers_name_no_object(files, capsys, name, text):
    lines(files / "mine.jsonl", [{"image_id": 7, "caption": text}])
    found = numbers(capsys, *chair(files, name=name))
    assert values(found["metrics"])["cover"] == (0, 1)
    assert values(found["metrics"])["objects"] == (0, 1)
    assert found["answers"]["empty"] == (not (text or "").strip())


def test_a_spreadsheet_is_named(files, capsys):
    (files / "mine.xlsx").write_bytes(b"PK\3\4")
    with pytest.raises(Refusal, match="mine.xlsx: is a spreadsheet; save it as CSV"):
        call(capsys, "chair", "--answers", files / "mine.xlsx", "--truth", files / "objects.json")


# --- refusals -----------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, said", [
    ([{"image_id": 5, "caption": "x"}], "none of its 1 answers is to an image or question"),
    ([{"image_id": 7}], "fields are image_id; the answers must be in one of caption, answer, text"),
    ([MINE[0], {"image_id": 7}], "row 2: has no caption"),
    ([{"caption": "x"}], "needs one of image_id, image, .*, question_id, id"),
    ([{"image_id": 7, "caption": ["x", "y"]}], "must be a text"),
    ([{"image_id": 7, "caption": True}], "must be a text"),
    ([MINE[0], "x"], "row 2: is no JSON object"),
    ([{"image_id": 7, "caption": "a dog", "answer": "a cat"}],
     "may be in caption .'a dog' first. or answer .'a cat' first.; say which by --field"),
    ([{"image_id": 7, "output": "a dog", "prediction": "a cat"}], "in prediction .* or output"),
    ([], "empty")])
def test_answers_that_cannot_be_scored_are_refused(files, capsys, rows, said):
    lines(files / "mine.jsonl", rows)
    with pytest.raises(Refusal, match=said):
        call(capsys, *chair(files))


@pytest.mark.parametrize("change, said", [
    (("--answers", "none.jsonl"), "no such file of answers"),
    (("--truth", "none.json"), "no such truth file"),
    (("--truth", "objects.json", "objects.json"), "one truth file, 2 are given"),
    (("--synonyms", "none.txt"), "missing or no UTF-8"),
    (("--truth", "mine.jsonl"), "must be a JSON object"),
    (("--truth", "other.json"), "must be a JSON object"),
    (("--truth", "strange.json"), "no synonyms are known for 'unicorn'")])
def test_options_that_do_not_fit_are_refused(files, capsys, monkeypatch, change, said):
    monkeypatch.chdir(files)
    (files / "strange.json").write_text('{"1": ["unicorn"]}')
    with pytest.raises(Refusal, match=said):
        call(capsys, *chair(files), *change)


def test_synonyms_are_refused_where_nothing_uses_them(amber, capsys):
    with pytest.raises(Refusal, match="AMBER has no use for a synonym file"):
        call(capsys, "amber", "--answers", amber / "a.json", "--truth", amber, "--synonyms",
             amber / "safe_words.txt")


# --- a benchmark of one's own -------------------------------------------------------------------

@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A benchmark that counts the letter a, and its folder: one entry is all that it takes."""
    def load(folder):
        questions = [official.Question(q["id"], q["image"], q["text"])
                     for _, q in official.rows(folder / "q.json", "id", "image", "text")]
        return official.Loaded(tuple(questions), lambda q, text: {"a": (text.count("a"), 1)})

    entry = official.Benchmark("letters", "Letters", {"questions": "q.json"}, "images", "write it",
                               "none", {"a": official.Metric("letters", None)}, load)
    monkeypatch.setitem(official.BENCHMARKS, "letters", entry)
    (tmp_path / "q.json").write_text(json.dumps(
        [{"id": f"p{n}", "image": "42.jpg", "text": f"Question {n}?"} for n in (1, 2)]))
    return tmp_path


def test_an_entry_is_all_that_a_benchmark_takes(letters, capsys):
    lines(letters / "mine.jsonl", [{"id": "p2", "image": "42.jpg", "answer": "a dog, a cat"},
                                   {"id": "p1", "image": "42.jpg", "answer": "A DOG"},
                                   {"id": "p3", "image": "42.jpg", "answer": "aaa"}])
    found = numbers(capsys, "letters", "--answers", letters / "mine.jsonl", "--truth", letters)
    assert values(found["metrics"]) == {"a": (1.5, 2)}
    assert found["answers"]["without_truth"] == 1
    p = params.validate(params.Benchmarks, {"folders": {"letters": str(letters)}}, where="here")
    from bpo.evaluation import benchmarks

    assert list(benchmarks.chosen(p)) == ["letters"] and benchmarks.title("letters") == "Letters"


@pytest.mark.parametrize("truth, more, words", [
    ("q.json", (), "Letters needs q.json there; write it"),
    ("images", (), "Letters needs q.json there; write it"),
    (".", ("--synonyms", "w.txt"), "Letters has no use for a synonym file")])
def test_an_entry_s_truth_is_the_folder_of_its_files(letters, capsys, truth, more, words):
    (letters / "images").mkdir()
    lines(letters / "mine.jsonl", [{"id": "p1", "answer": "a"}])
    with pytest.raises(Refusal, match=words):
        numbers(capsys, "letters", "--answers", letters / "mine.jsonl", "--truth", letters / truth,
                *more)


def test_a_judge_s_benchmark_is_refused_by_name(letters, capsys):
    with pytest.raises(SystemExit):
        call(capsys, "mm-vet", "--answers", letters / "a", "--truth", letters)
    assert "mm-vet" in capsys.readouterr().err
