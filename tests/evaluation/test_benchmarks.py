"""Notebook 5's stage on small official files: what is asked, what is counted, what a judge adds."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.server import completion

from bpo import params
from bpo.evaluation import benchmarks, comparison, diagnostics, official
from bpo.evaluation.hallucination import yes_or_no
from bpo.models import encoding, generate, logprobs, tuned
from bpo.models.generate import Request
from bpo.params import Benchmarks, Refusal
from bpo.reports import benchmark_tables, tables
from bpo.study import results
from bpo.study.files import read_lines, write_lines

THINGS = ("disc", "box", "cat", "dog")
METHODS = ["base", "bpo", "bpo_weaken", "sft"]


@pytest.fixture(scope="module")
def folders(data_file, tmp_path_factory):
    """CHAIR, POPE and MM-Vet about the four pictures of the small data set."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name, images in (("chair", "val2014"), ("pope", "val2014"), ("mm-vet", "images")):
        shutil.copytree(data_file.parent / "images", root / name / images)
    (root / "chair" / "annotations").mkdir()
    pictures = [{"id": f"{k}.png", "file_name": f"{k}.png"} for k in range(4)]
    (root / "chair" / "annotations" / "instances_val2014.json").write_text(json.dumps({
        "images": pictures, "categories": [{"id": k, "name": t} for k, t in enumerate(THINGS)],
        "annotations": [{"image_id": f"{k}.png", "category_id": k} for k in range(4)]}))
    (root / "chair" / "annotations" / "captions_val2014.json").write_text(json.dumps(
        {"annotations": [{"image_id": f"{k}.png", "caption": "this"} for k in range(4)]}))
    (root / "chair" / "synonyms.txt").write_text("".join(
        f"{t}, {'boxes' if t == 'box' else t + 's'}\n" for t in THINGS))
    (root / "chair" / "questions.json").write_text(json.dumps(
        [{"image": f"{k}.png", "text": "describe the picture"} for k in range(4)]))
    for kind in official.POPE_KINDS:
        asked = [(k, (k + shift) % 4) for k in range(4) for shift in (0, 1)]
        write_lines(root / "pope" / f"coco_pope_{kind}.json", (
            {"question_id": n, "image": f"{k}.png", "text": f"is there a {THINGS[t]} ?",
             "label": "yes" if k == t else "no"} for n, (k, t) in enumerate(asked, start=1)))
    (root / "mm-vet" / "mm-vet.json").write_text(json.dumps({
        f"v1_{k}": {"imagename": f"{k}.png", "question": "what colour is the box ?",
                    "answer": "red", "imagesource": "drawn",
                    "capability": ["rec", "ocr"][:k % 2 + 1]}
        for k in range(4)}))
    return {n: str(root / n) for n in ("chair", "pope", "mm-vet")}


@pytest.fixture(scope="module")
def parameters(model_folder, adapters, data_file, folders):
    return Benchmarks(study="s", model=str(model_folder), adapters=str(adapters), folders=folders,
                      max_new_tokens=5, batch_size=5, probe_data=str(data_file), probe_rows=9,
                      resamples=200)


@pytest.fixture(scope="module")
def result(parameters, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("benchmarked")))
        found = benchmarks.run(parameters)
        assert benchmarks.run(parameters).metrics == found.metrics, "read again, they differ"
    return found


def test_every_method_answers_every_question_greedily(result, checkpoint, folders):
    for name, count in (("chair", 4), ("pope", 24), ("mm-vet", 4)):
        lines = benchmarks.answers(result, name)
        assert len(lines) == count
        assert all(list(x["answers"]) == METHODS for x in lines)
    images = official.BENCHMARKS["chair"].images
    requests = [Request(x["id"], ({"role": "user", "content": x["question"]},),
                        params.Path(folders["chair"]) / images / x["image"])
                for x in benchmarks.answers(result, "chair")]
    plain = generate.decode(checkpoint, generate.encode_batch(checkpoint, requests),
                            max_new_tokens=5)
    assert [x["answers"]["base"] for x in benchmarks.answers(result, "chair")] == plain


def test_p_yes_is_the_share_of_yes_among_the_two_answers(result, checkpoint, folders):
    line = benchmarks.answers(result, "pope")[3]
    asked = Request("x", ({"role": "user", "content": line["question"]},),
                    params.Path(folders["pope"]) / "val2014" / line["image"])
    tokens = [[encoding.answer_tokens(checkpoint, asked.messages, t) for t in ("yes", "no")]]
    with torch.no_grad():
        yes, no = (math.exp(w.logprobs.sum()) for w in logprobs.weigh_unpacked(
            checkpoint, generate.encode_batch(checkpoint, [asked]), tokens)[0])
    assert line["p_yes"]["base"] == pytest.approx(yes / (yes + no), abs=2e-5)
    assert all(not x["p_yes"] for x in benchmarks.answers(result, "chair"))
    lines = benchmarks.answers(result, "pope")
    off = [(x["p_yes"]["bpo"] - (x["label"] == "yes")) ** 2 for x in lines]
    found = result.metrics["calibration"]["pope"]["values"]["bpo"]
    assert found["brier"]["value"] == pytest.approx(sum(off) / 24, abs=1e-6)
    assert sum(b["share"] * b["n"] for b in found["bins"]) == pytest.approx(12, abs=1e-3)
    assert set(result.metrics["calibration"]) == {"pope"}


def test_the_scores_are_the_sums_of_what_the_answers_count(result, folders):
    for name in ("chair", "pope"):
        loaded = official.BENCHMARKS[name].load(params.Path(folders[name]))
        asked = {q.id: q for q in loaded.questions}
        lines = benchmarks.answers(result, name)
        for method in METHODS:
            sums: dict = {}
            for x in lines:
                for n, (top, bottom) in loaded.counts(asked[x["id"]], x["answers"][method]).items():
                    old = sums.get(n, (0, 0))
                    sums[n] = (old[0] + top, old[1] + bottom)
            for n, (top, bottom) in sums.items():
                value = result.metrics["benchmarks"][name][method][n]["value"]
                assert value == (pytest.approx(top / bottom, abs=1e-6) if bottom else None), n
    different = result.metrics["differences"]["pope"]["base"]
    assert different["sft"]["accuracy"]["value"] == 0 and "base" not in different
    assert "p" in different["bpo"]["accuracy"]


def test_without_a_judge_answers_are_written_and_nothing_is_scored(result):
    assert "mm-vet" not in result.metrics["benchmarks"]
    assert "judge" not in result.metrics["settings"]["mm-vet"]
    rows = benchmark_tables.settings(Benchmarks(study="s", folders={"mm-vet": "x"}), result)
    assert rows["scored by"][0] == "not scored: no judge"
    assert rows["decoding"][0] == "greedy, up to 5 tokens"


def test_a_judge_scores_what_it_can_read_and_is_named(
        parameters, folders, endpoint, server, outputs):
    def judgement(text):
        """A mark by the prompt, which holds the answer; some prompts get none that can be read."""
        return None if len(text) % 5 == 0 else len(text) % 11 / 10 if len(text) % 11 < 10 else 0.5

    def reply(number, body):
        mark = judgement(body["messages"][-1]["content"])
        return completion("hm" if mark is None else f"Score: {mark}")

    server.reply = reply
    p = parameters.model_copy(update={
        "folders": {"mm-vet": folders["mm-vet"]}, "judge": endpoint.url, "judge_model": "j",
        "judge_key_variable": endpoint.key_variable, "judge_attempts": 1, "probe_data": ""})
    found = benchmarks.run(p)
    settings = found.metrics["settings"]["mm-vet"]["judge"]
    assert settings["judge"] == "j" and len(settings["prompt_sha256"]) == 64
    assert "unscored answers: " in benchmark_tables.settings(p, found)["scored by"][0]
    mm_vet = benchmarks.chosen(p)["mm-vet"]
    asked = {q.id: q for q in mm_vet.load(params.Path(folders["mm-vet"]))}
    for method, values in found.metrics["benchmarks"]["mm-vet"].items():
        marks = [judgement(mm_vet.prompt(asked[x["id"]], x["answers"][method])[-1]["content"])
                 for x in benchmarks.answers(found, "mm-vet")]
        read = [m for m in marks if m is not None]
        assert values["unscored"]["value"] == 1 - len(read) / 4
        assert sum(settings["unscored"][method].values()) == 4 - len(read)
        if read:
            assert values["total"]["value"] == pytest.approx(sum(read) / len(read), abs=1e-6)
            assert values["total"]["n"] == len(read)
    asked_for = len(server.seen)
    shutil.rmtree(found.folder)
    again = benchmarks.run(p)
    assert len(server.seen) == asked_for, "replies that are kept are not asked for again"
    assert again.metrics == found.metrics


def test_a_judge_s_raw_replies_are_named_with_question_and_method(result):
    judge = {"judge": "j", "prompt_sha256": "0" * 64, "temperature": 0.0, "repeats": 1,
             "unscored": {"base": {}}}
    found = SimpleNamespace(metrics={"settings": {"mm-vet": {
        **result.metrics["settings"]["mm-vet"], "judge": judge}}})
    rows = benchmark_tables.settings(Benchmarks(study="s", folders={"mm-vet": "x"}), found)
    assert "by question and method: judge_replies/replies.jsonl" in rows["scored by"][0]


def test_the_base_is_asked_again_in_other_batches(result, frame):
    again = {x["id"]: x["answers"]["base"] for x in read_lines(result.folder / "again-pope.jsonl")}
    said = {x["id"]: (x["answers"]["base"], x["question"])
            for x in benchmarks.answers(result, "pope")}
    assert again.keys() == said.keys()  # all 24 of the small set
    flips = sum(yes_or_no(again[i], q) != yes_or_no(text, q) for i, (text, q) in said.items())
    assert result.metrics["noise_floor"] == {
        "pope": {"batches of 1": {"questions": 24, "flips": flips}}}
    *_, page = benchmark_tables.yes_and_no(result, frame)
    assert f"turn round: {flips} of 24 in batches of 1." in page.plain
    assert "POPE: answers of one word are" in page.plain


def test_another_format_is_tried_where_the_model_has_room(parameters, monkeypatch):
    monkeypatch.setattr(diagnostics, "has_room", lambda model, dtype: True)
    loaded, _ = tuned.load_methods(parameters)
    line = {"id": "random-1", "image": "0.png", "question": "is there a disc ?",
            "answers": {"base": "yes"}, "p_yes": {"base": 0.5}}
    asked = []

    def ask(name, questions, stem, size):
        asked.append((name, [q.text for q in questions], stem, size, loaded.base.dtype))
        return [{**line, "answers": {"base": "Yes." if stem == "again" else "no"}}]

    found = diagnostics.noise_floor(loaded, {"pope": [line], "chair": [{"p_yes": {}}]}, ask,
                                    batch_size=5, seed=0)
    assert found == {"pope": {"batches of 1": {"questions": 1, "flips": 0},
                              "bfloat16": {"questions": 1, "flips": 1}}}
    assert asked == [("pope", ["is there a disc ?"], "again", 1, torch.float32),
                     ("pope", ["is there a disc ?"], "format", 5, torch.bfloat16)]


def test_questions_are_drawn_by_seed(parameters, outputs, folders):
    p = parameters.model_copy(update={"questions": 5, "folders": {"pope": folders["pope"]},
                                      "probe_data": ""})
    one = {x["id"] for x in benchmarks.answers(benchmarks.run(p), "pope")}
    other = benchmarks.run(p.model_copy(update={"seed": 1, "study": "t"}))
    assert len(one) == 5 != one and {x["id"] for x in benchmarks.answers(other, "pope")} != one
    assert other.metrics["image"] == {}


def test_missing_files_are_listed_in_one_sentence(parameters, outputs, folders, tmp_path):
    p = parameters.model_copy(update={"folders": {"pope": str(tmp_path)}})
    with pytest.raises(Refusal, match="coco_pope_random.json, coco_pope_popular.json, "
                                      "coco_pope_adversarial.json, val2014/"):
        benchmarks.run(p)
    assert not (outputs / "s").exists()


def test_benchmarks_that_a_stage_writes_wait_for_it(parameters, outputs):
    p = parameters.model_copy(update={
        "folders": {"pope": "outputs/s/0_tiny_world/benchmarks/pope"}})
    with pytest.raises(Refusal, match="run notebooks/0_tiny_world.ipynb first"):
        benchmarks.run(p)


def test_an_interrupted_run_goes_on_to_the_same_bytes(result, parameters, outputs, monkeypatch):
    right, calls = benchmarks._ask, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(benchmarks, "_ask", killed)
        benchmarks.run(parameters)
    again = benchmarks.run(parameters)
    assert again.manifest["outputs"] == result.manifest["outputs"]
    assert again.metrics == result.metrics


# --- what the page says -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def frame(result):
    return results.read(result.folder)


def test_differences_are_corrected_for_all_that_are_looked_at(frame):
    rows = tables.differences(frame.query("category == 'all'")).query("against == 'base'")
    assert set(rows["title"]) == {"CHAIR", "POPE"}
    assert not {"accuracy random", "F1 popular", "words an answer", "yes answers"} & set(rows.label)
    assert (rows["p_holm"] >= rows["p"]).all() and (rows["p_holm"] > rows["p"]).any()
    assert f"of {len(rows)} differences" in benchmark_tables.reading(frame, "base")
    table, figure, *_ = benchmark_tables.difference_tables(frame)
    assert len(table.plain.splitlines()) == len(rows) + 2 and "<img" in figure.html


@pytest.mark.parametrize("metric, low, high, reading", [
    ("chair_i", 0.1, 0.2, "worse in 1"), ("chair_i", -0.2, -0.1, "better in 1"),
    ("cover", 0.1, 0.2, "better in 1"), ("cover", -0.2, -0.1, "worse in 1"),
    ("cover", -0.1, 0.1, "better in 0, worse in 0")])
def test_a_difference_is_better_or_worse_by_what_is_measured(metric, low, high, reading, tmp_path):
    values = {m: {metric: {"value": 0.5}} for m in ("base", "bpo")}
    change = {"value": (low + high) / 2, "low": low, "high": high, "n": 9, "p": 0.01}
    results.write(tmp_path, results.compared("chair", values, {"base": {"bpo": {metric: change}}},
                                             benchmarks.described("chair")))
    assert reading in benchmark_tables.reading(results.read(tmp_path), "base")


def test_reading_names_what_survives_the_correction(tmp_path):
    values = {m: {n: {"value": 0.5} for n in ("chair_i", "chair_s", "cover")}
              for m in ("base", "bpo")}
    changes = {"chair_i": {"value": -0.2, "low": -0.3, "high": -0.1, "p": 0.001},
               "chair_s": {"value": -0.2, "low": -0.3, "high": -0.1, "p": 0.04},
               "cover": {"value": -0.2, "low": -0.3, "high": -0.1, "p": 0.03}}
    results.write(tmp_path, results.compared("chair", values, {"base": {"bpo": changes}},
                                             benchmarks.described("chair")))
    assert benchmark_tables.reading(results.read(tmp_path), "base") == (
        "better in 2, worse in 1 of 3 differences; corrected for all 3 (Holm, 5 %) there remain: "
        "CHAIR CHAIRi (better)")


def test_wrong_objects_are_counted_by_their_place(parameters, result, frame, tmp_path):
    texts = ["a disc and a cat", "two boxes", "nothing", "a cat , a dog and dogs"]
    write_lines(tmp_path / "answers-chair.jsonl", (
        {"id": str(k), "image": f"{k}.png", "answers": {"bpo": text}}
        for k, text in enumerate(texts)))
    moved = replace(result, folder=tmp_path)
    curve = benchmarks.by_place(parameters, moved, "chair", ["bpo"], least=1)
    # 0.png shows a disc, 1.png a box, 2.png a cat, 3.png a dog
    assert curve[["place", "value", "n"]].values.tolist() == [
        [1, pytest.approx(1 / 3, abs=1e-6), 3], [2, 0.5, 2], [3, 0.0, 1]]
    assert benchmarks.by_place(parameters, moved, "chair", ["bpo"]).empty
    figure, = benchmark_tables.by_place(parameters, result, frame)  # few captions, so no line
    assert "places with 20 captions or more" in figure.html


def test_kinds_of_questions_stand_in_a_table_of_their_own(frame):
    chair, whole, kinds = tables.level_tables(frame.query("category in ('all', 'kind')"))
    assert "POPE" in whole.plain and "POPE" in kinds.plain and "CHAIRs" in chair.plain
    head = whole.plain.splitlines()[1]
    assert "accuracy" in head and "accuracy random" not in head
    assert "accuracy random" in kinds.plain and "F1 adversarial" in kinds.plain
    assert [line.split()[0] for line in whole.plain.splitlines()[2:]] == METHODS
    assert "out of (base): accuracy 24," in whole.html
    [reading] = tables.level_tables(frame.query("category == 'reading'"))
    assert "read otherwise by the script" in reading.plain
    assert "answers of one word" in reading.plain


def test_the_figures_hold_every_method_and_token(parameters, result, frame):
    assert benchmark_tables.few(frame) == ["base", "sft", "bpo"]
    rows = frame.query("metric in ('right_object', 'swapped_stop') and against == 'base'")
    drawn = benchmark_tables.draw_image_gains(rows.assign(
        view=rows["metric"].str.partition("_")[0], kind=rows["metric"].str.partition("_")[2]))
    assert len(drawn.axes) == 3 == rows["category"].nunique()
    assert [t.get_text() for t in drawn.axes[0].get_yticklabels()] == [
        "objects", "comma, stop, end"]
    marks = [x.get_markerfacecolor() for x in drawn.axes[0].lines if len(x.get_xdata()) == 1]
    assert len(marks) == 2 * (len(METHODS) - 1) == 2 * marks.count("white")
    table, figure = benchmark_tables.calibrations(result, frame)
    assert "POPE: calibration" in table.plain and "calibration error" in table.plain
    rows = frame.query("split_or_benchmark == 'chair' and against == ''").assign(label="rate")
    drawn = benchmark_tables.draw_trade_off(rows.dropna(subset="value"), "cover", ["chair_s"])
    (panel,) = drawn.axes
    assert panel.get_title(loc="left") == "rate" and len(panel.containers) == len(METHODS)
    assert len(benchmark_tables.trade_offs(frame)) == 1
    # Few questions may hold none that asks for a description, as of AMBER's.
    undescribed = frame.query("metric not in ('cover', 'chair_i')")
    assert benchmark_tables.trade_offs(undescribed) == []


def test_changes_are_said_by_kind_of_token_with_right_and_wrong_image(result, frame):
    lines = read_lines(result.folder / benchmarks.PROBED)
    captions = [x for x in lines if x["category"] == "caption"]
    assert {k for x in lines for k in x["kinds"]} >= {"colour", "object", "stop"}
    _, *said = benchmark_tables.image_gains(frame)
    changes = {n: sum(diagnostics.gains(x, "bpo")[n][0] - diagnostics.gains(x, "base")[n][0]
                      for x in captions) / len(captions) for n in ("right", "swapped_object")}
    text = next(x.plain for x in said if x.plain.startswith("caption, bpo minus base"))
    right, wrong = text.split("; ")
    assert f"right image {changes['right']:+.2f} (" in right
    assert f"objects {changes['swapped_object']:+.2f}" in wrong
    parts = frame.query("category == 'caption' and method == 'bpo' and against == ''")
    of_right = parts[parts["metric"].isin({f"right_{k}" for k in diagnostics.KINDS})]
    total = parts.query("metric == 'right'")["value"].item()
    assert of_right["value"].sum() == pytest.approx(total, abs=1e-5)
    assert benchmark_tables.image_gains(frame.query("category == 'all'")) == []


def test_a_rival_is_scored_on_the_same_questions(parameters, folders, model_folder, result,
                                                 outputs):
    found = benchmarks.run(parameters.model_copy(update={
        "rival": str(model_folder), "folders": {"pope": folders["pope"]}, "probe_rows": 4}))
    levels = found.metrics["benchmarks"]["pope"]
    assert list(levels) == ["base", "rival", *METHODS[1:]]
    assert levels["rival"] == levels["base"] == result.metrics["benchmarks"]["pope"]["base"]
    differences = found.metrics["differences"]["pope"]
    assert differences["rival"]["bpo"] == differences["base"]["bpo"]
    calibrated = found.metrics["calibration"]["pope"]["values"]
    assert calibrated["rival"] == calibrated["base"]
    assert all("rival" not in x["values"] for x in found.metrics["image"].values())


def test_a_page_of_answers_that_nothing_scored_says_so(frame):
    nothing = frame.iloc[:0]
    assert benchmark_tables.reading(nothing, "base") == "nothing was scored"
    for shown in (tables.level_tables, benchmark_tables.difference_tables,
                  benchmark_tables.trade_offs, benchmark_tables.readings):
        assert shown(nothing) == []
