"""Notebook 5's stage on small official files: what is asked, what is counted, what a judge adds."""

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pandas
import pytest
import torch
from helpers.server import completion

from bpo import params
from bpo.evaluation import benchmarks, claims, diagnostics, official
from bpo.evaluation.hallucination import yes_or_no
from bpo.models import encoding, generate, logprobs, tuned
from bpo.models.generate import Request
from bpo.params import Benchmarks, Refusal
from bpo.reports import figures
from bpo.reports.tables import benchmark_tables, score_tables
from bpo.study import results
from bpo.study.files import read_lines, write_lines
from bpo.study.text import signed

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
    page, *_ = benchmark_tables.yes_and_no(result, frame)
    assert f"turn round: {flips} of 24 in batches of 1;" in page.plain
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


def test_what_an_answer_owes_to_its_image_is_neither_better_nor_worse(frame):
    rows = frame[frame["metric"].str.startswith("over_")]
    assert len(rows) and rows["more_is_better"].isna().all()


def test_differences_are_corrected_for_all_that_are_looked_at(frame):
    rows = benchmark_tables.differences(frame.query("category == 'all'"), "base")
    assert set(rows["title"]) == {"CHAIR", "POPE"}
    assert not {"accuracy random", "words an answer", "yes answers", "F1"} & set(rows["label"])
    assert (rows["p_holm"] >= rows["p"]).all() and (rows["p_holm"] > rows["p"]).any()
    table, *_ = benchmark_tables.all_differences(frame)
    assert len(table.plain.splitlines()) == len(rows) + 2


def moved(folder, name, **changes):
    """The results of a benchmark with one interval a metric, of bpo to base and to sft."""
    values = {m: {n: {"value": 0.5} for n in changes} for m in ("base", "sft", "bpo")}
    change = {n: {"value": (low + high) / 2, "low": low, "high": high, "n": 9, "p": p}
              for n, (low, high, p) in changes.items()}
    results.write(folder, results.compared(
        name, values, {"base": {"bpo": change}, "sft": {"bpo": change}},
        benchmarks.described(name)))
    return results.read(folder)


UP, DOWN = (0.1, 0.2, 0.001), (-0.2, -0.1, 0.001)


@pytest.mark.parametrize("name, changes, reading", [
    ("chair", {"chair_i": UP}, "worse in CHAIR (CHAIRi*)"),
    ("chair", {"chair_i": DOWN}, "better in CHAIR (CHAIRi*)"),
    ("chair", {"cover": (0.1, 0.2, 0.04), "chair_i": DOWN, "chair_s": UP},
     "better in CHAIR (CHAIRi*, cover*)"),
    ("chair", {"cover": (-0.2, -0.1, 0.04), "chair_i": (-0.1, 0.2, 0.5)},
     "worse in CHAIR (cover); no difference seen in 1 of 2 measures"),
    ("pope", {"accuracy": (-0.1, 0.1, 0.9), "recall": UP, "f1": UP, "yes_ratio": UP},
     "no difference seen in 1 of 1 measures"),
    ("amber", {"recall": DOWN, "amber_score": UP}, "nothing was scored")])
def test_what_decides_a_benchmark_is_read_by_what_is_measured(name, changes, reading, tmp_path):
    frame = moved(tmp_path, name, **changes)
    assert benchmark_tables.reading(frame, "base") == reading


@pytest.mark.parametrize("name", ["pope", "amber"])
def test_what_follows_the_rate_of_yes_is_never_better_or_worse_alone(name, tmp_path):
    frame = moved(tmp_path, name, **dict.fromkeys(benchmarks.described(name), UP))
    follow = frame["metric"].str.contains("precision|recall|f1|yes_ratio|amber_score")
    assert follow.sum() > 8 and frame.loc[follow, "more_is_better"].isna().all()
    said = " ".join(results.texts(frame[follow])) + "".join(
        x.plain for x in benchmark_tables.all_differences(frame))
    assert not re.search(r"precision|recall|F1|AMBER score", said)
    assert not {"better", "worse"} & set(" ".join(results.texts(frame[follow])).split())
    counted = frame[frame["more_is_better"].notna() & (frame["against"] == "base")]
    assert {"accuracy", "unanswered"} <= set(counted["metric"])


def test_scores_stand_with_what_they_are_out_of_and_how_often_yes_is_said(result, frame):
    said, _, table = benchmark_tables.scores(frame)
    assert "bpo against base: " in said.plain and ". bpo against sft: " in said.plain
    assert "%" in table.plain and not re.search(r"\d\.\d", table.plain)  # of so few questions
    assert all(n in table.plain.splitlines()[1] for n in ("CHAIR: cover", "POPE: accuracy"))
    yes, = benchmark_tables.says_yes(result, frame)
    share = frame.query("metric == 'yes_ratio' and method == 'bpo' and against == ''")["value"]
    assert "POPE (24 questions, yes is true of 50 %)" in yes.plain
    assert f"bpo {share.item():.0%}".replace("%", " %") in yes.plain


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
    chair, whole, kinds = score_tables.level_tables(frame.query("category in ('all', 'kind')"))
    assert "POPE" in whole.plain and "POPE" in kinds.plain and "CHAIRs" in chair.plain
    head = whole.plain.splitlines()[1]
    assert "accuracy" in head and "accuracy random" not in head
    assert "accuracy random" in kinds.plain and "F1 adversarial" in kinds.plain
    assert [line.split()[0] for line in whole.plain.splitlines()[2:]] == METHODS
    assert "out of (base): accuracy 24," in whole.html
    [reading] = score_tables.level_tables(frame.query("category == 'reading'"))
    assert "read otherwise by the script" in reading.plain
    assert "answers of one word" in reading.plain


def test_bins_of_few_questions_are_not_drawn(result, frame, monkeypatch):
    assert benchmark_tables.few(frame) == ["base", "sft", "bpo"]
    table, = benchmark_tables.calibrations(result, frame)  # of 24 questions
    assert "POPE: can P(yes) be believed?" in table.plain and "calibration error" in table.plain
    monkeypatch.setattr(benchmark_tables, "LEAST", 2)
    assert "with 2 questions or more" in benchmark_tables.calibrations(result, frame)[1].html
    (panel,) = figures.reliability({"bpo": [{"p": 0.1, "share": 0.2, "n": 100}]}).axes
    assert list(panel.lines[0].get_ydata()) == [0.2]


def test_changes_are_said_by_kind_of_token_with_right_and_wrong_image(result, frame):
    lines = read_lines(result.folder / benchmarks.PROBED)
    captions = [x for x in lines if x["category"] == "caption"]
    assert {k for x in lines for k in x["kinds"]} >= {"colour", "object", "stop"}
    said, figure = benchmark_tables.image_gains(frame)
    right, wrong = said.plain.split("With a wrong image")
    change = {n: sum(diagnostics.gains(x, "bpo")[n][0] - diagnostics.gains(x, "base")[n][0]
                     for x in captions) / len(captions)
              for n in ("right_object", *(f"swapped_{k}" for k in diagnostics.KINDS))}
    assert f"objects in caption answers ({signed(change.pop('right_object'), 2)} " in right
    assert f"caption answers {signed(sum(change.values()), 1)}" in wrong
    assert "comma" not in right and "stop" not in right
    parts = frame.query("category == 'caption' and method == 'bpo' and against == ''")
    of_right = parts[parts["metric"].isin({f"right_{k}" for k in diagnostics.KINDS})]
    total = parts.query("metric == 'right'")["value"].item()
    assert of_right["value"].sum() == pytest.approx(total, abs=1e-5)
    assert benchmark_tables.image_gains(frame.query("category == 'all'")) == []


def test_right_and_wrong_image_are_panels_of_their_own(frame):
    rows = frame.query("metric in ('right_object', 'swapped_stop') and against == 'base'")
    drawn = figures.two_views(rows.assign(view=rows["metric"].str.partition("_")[0],
                                          label=rows["category"]),
                              {"right": "right image", "swapped": "wrong image"}, "nats")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["right image", "wrong image"]
    for axes, view in zip(drawn.axes, ("right", "swapped"), strict=True):
        places = [len(line.get_ydata()) for line in axes.lines if line.get_marker() != "None"]
        assert sum(places) == rows["metric"].str.startswith(view).sum()


def test_claims_stand_under_what_they_compare_with_what_they_are_out_of():
    def row(claim, says, against, decides, verdict, method="bpo"):
        return [claim, says, method, against, decides, None if verdict == "not measured" else 40,
                "−0.1", verdict, 0.5]

    verdicts = pandas.DataFrame([
        row("2", "Hallucinates less", "base", "counterfactual: CHAIRi", "holds"),
        row("2", "Hallucinates less", "base", "CHAIR: CHAIRi", "holds"),
        row("3", "Raises", "sft_matched", "counterfactual: P(true answer)", "not measured"),
        row("3", "Raises", "sft", "counterfactual: P(true answer)", "no difference seen"),
        row("3", "Raises", "sft_compute", "counterfactual: P(true answer)", "holds"),
        row("harm", "Says as much", "base", "natural: cover", "does not hold")],
        columns=claims.COLUMNS)
    said, table, folded = benchmark_tables.claimed(verdicts, "counterfactual")
    assert said.plain == ("Of 6 rows 3 hold, 1 do not; no difference seen in 1; not measured: 1. "
                          "Harm is seen in natural: cover.")
    assert re.findall('colspan="4"><bdi>(.*?)</bdi>', table.html) == [
        "2 · bpo − base, counterfactual", "3 · bpo − sft, counterfactual",
        "harm · bpo − base, natural"]
    assert "CHAIRi, n=40" in table.html and "not measured" not in table.html
    assert "sft_compute" in folded.plain and "CHAIR: CHAIRi, n=40" in folded.plain


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
    for shown in (score_tables.level_tables, benchmark_tables.all_differences):
        assert shown(nothing) == []
    assert [x.plain for x in benchmark_tables.scores(nothing)] == ["Nothing was scored."]
