"""Notebook 5's stage on small official files: what is asked, what is counted, what a judge adds."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.server import completion

from bpo import params
from bpo.evaluation import benchmarks, official
from bpo.models import encoding, generate, logprobs
from bpo.models.generate import Request
from bpo.params import Benchmarks, Refusal
from bpo.reports import benchmark_figures, benchmark_tables
from bpo.study.files import write_lines

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
                      resamples=200, gallery=2)


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
    rows = benchmark_tables.settings_table(
        Benchmarks(study="s", folders={"mm-vet": "x"}), result.metrics)
    assert rows[0]["scored by"] == "not scored: no judge"
    assert rows[0]["decoding"] == "greedy, up to 5 tokens"


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
    mm_vet = benchmarks.chosen(p)["mm-vet"]
    asked = {q.id: q for q in mm_vet.load(params.Path(folders["mm-vet"]))}
    for method, values in found.metrics["benchmarks"]["mm-vet"].items():
        marks = [judgement(mm_vet.prompt(asked[x["id"]], x["answers"][method])[-1]["content"])
                 for x in benchmarks.answers(found, "mm-vet")]
        read = [m for m in marks if m is not None]
        assert values["unscored"]["value"] == 1 - len(read) / 4
        if read:
            assert values["total"]["value"] == pytest.approx(sum(read) / len(read), abs=1e-6)
            assert values["total"]["n"] == len(read)
    asked_for = len(server.seen)
    shutil.rmtree(found.folder)
    again = benchmarks.run(p)
    assert len(server.seen) == asked_for, "replies that are kept are not asked for again"
    assert again.metrics == found.metrics


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

def test_differences_are_corrected_for_all_that_are_looked_at(parameters, result):
    rows = benchmark_tables.differences(parameters, result.metrics, "bpo", "base")
    assert {r["benchmark"] for r in rows} == {"CHAIR", "POPE"}
    assert not {"accuracy random", "F1 popular"} & {r["metric"] for r in rows}
    assert all(r["holm"] >= r["p"] for r in rows) and any(r["holm"] > r["p"] for r in rows)
    assert not {"words an answer", "yes answers"} & {r["metric"] for r in rows}
    assert f"of {len(rows)} differences" in benchmark_tables.reading(rows)
    assert len(benchmark_tables.difference_table(rows)) == len(rows)


@pytest.mark.parametrize("metric, low, high, reading", [
    ("chair_i", 0.1, 0.2, "worse"), ("chair_i", -0.2, -0.1, "better"),
    ("cover", 0.1, 0.2, "better"),
    ("cover", -0.2, -0.1, "worse"), ("cover", -0.1, 0.1, "cannot be told")])
def test_a_difference_is_better_or_worse_by_what_is_measured(metric, low, high, reading):
    change = {"value": (low + high) / 2, "low": low, "high": high, "n": 9, "p": 0.01}
    found = {"benchmarks": {"chair": {"base": {metric: {"value": 0.5}}}},
             "differences": {"chair": {"base": {"bpo": {metric: change}}}}}
    row, = benchmark_tables.differences(Benchmarks(study="s"), found, "bpo", "base")
    assert row["reading"] == reading


def test_reading_names_what_survives_the_correction():
    row = {"benchmark": "CHAIR", "metric": "CHAIRi", "holm": 0.01, "reading": "better"}
    text = benchmark_tables.reading([row, row | {"holm": 0.2, "metric": "CHAIRs"},
                                     row | {"reading": "worse", "holm": 0.9}])
    assert text == ("better in 2, worse in 1 of 3 differences; corrected for all 3 (Holm, 5 %) "
                    "there remain: CHAIR CHAIRi (better)")


def test_wrong_objects_are_counted_by_their_place(parameters, result, tmp_path):
    said = ["a disc and a cat", "two boxes", "nothing", "a cat , a dog and dogs"]
    write_lines(tmp_path / "answers-chair.jsonl", (
        {"id": str(k), "image": f"{k}.png", "answers": {"bpo": text}}
        for k, text in enumerate(said)))
    mine = replace(result, folder=tmp_path)
    curve = benchmark_tables.by_place(parameters, mine, "chair", ["bpo"], least=1)["bpo"]
    # 0.png shows a disc, 1.png a box, 2.png a cat, 3.png a dog
    assert [(c["place"], c["value"], c["n"]) for c in curve] == [
        (1, pytest.approx(1 / 3, abs=1e-6), 3), (2, 0.5, 2), (3, 0.0, 1)]
    assert benchmark_tables.by_place(parameters, mine, "chair", ["bpo"]) == {"bpo": []}


def test_kinds_of_questions_stand_in_a_table_of_their_own(result):
    pope, values = official.BENCHMARKS["pope"], result.metrics["benchmarks"]["pope"]
    apart = benchmark_tables.of_kinds(pope, values)
    assert {"accuracy_random", "f1_adversarial"} <= set(apart)
    whole = benchmark_tables.whole(pope, values)
    assert "accuracy" in whole and not set(whole) & set(apart)
    rows = benchmark_tables.score_table(pope, values, ["accuracy"])
    assert [r["method"] for r in rows] == METHODS and "[" in rows[0]["accuracy"]
    assert benchmark_tables.counts_note(pope, values, ["accuracy"]).endswith("accuracy 24")


def test_the_figures_hold_every_method_and_token(parameters, result):
    found = result.metrics
    assert benchmark_tables.few(found) == ["base", "sft", "bpo"]
    gains = benchmark_figures.image_gains(benchmark_tables.gain_rows(found))
    assert [t.get_text() for t in gains.axes[0].get_yticklabels()] == METHODS
    line = benchmark_tables.drawn_captions(parameters, result)[0]
    assert line["category"] == "caption"
    drawn = benchmark_figures.token_gaps(benchmark_tables.token_gaps(line, ["base", "bpo"]))
    labels = [t.get_text() for a in drawn.axes for t in a.get_xticklabels()]
    assert labels == line["tokens"]
    bins = benchmark_tables.reliability(found, "pope")
    assert sum(b["n"] for b in bins["base"]) == 24
    assert len(benchmark_figures.reliability(bins).axes) == 2
    points = benchmark_tables.trade_off(found, "chair")
    values = found["benchmarks"]["chair"]
    assert {(x["method"], x["metric"]) for x in points} == {
        (m, label) for m in METHODS for n, label in (("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"))
        if values[m][n]["value"] is not None}  # who names nothing has no CHAIRi
    assert ("base", "CHAIRs") in {(x["method"], x["metric"]) for x in points}
    # Few questions may hold none that asks for a description, as of AMBER's.
    undescribed = {m: {n: e for n, e in mine.items() if n not in ("cover", "chair_i")}
                   for m, mine in values.items()}
    assert benchmark_tables.trade_off({"benchmarks": {"chair": undescribed}}, "chair") == []


def test_gains_are_read_with_their_intervals(result):
    text = benchmark_tables.gain_reading(result.metrics, "sft", "base")
    assert "caption +0.00 [+0.00, +0.00], cannot be told from none" in text
    assert benchmark_tables.gain_reading({"image": {}}, "bpo", "base") == "nothing was weighed"
