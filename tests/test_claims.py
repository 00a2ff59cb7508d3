"""The paper's claims on a study: each verdict from hand-made intervals, the family of looks, and
wins and losses counted from real answers. The numbers that others published keep their sources."""

import json

import pytest

from bpo import claims, metrics, published, runs

WORSE, UNSURE, BETTER = (-0.2, -0.1), (-0.1, 0.1), (0.1, 0.2)  # when more is claimed
LESS = {"chair_s", "chair_i", "p_prior", "prior_rate", "response", "hal", "chair"}


def interval(bounds, *, p=0.001):
    low, high = bounds
    return {"value": (low + high) / 2, "low": low, "high": high, "n": 40, "p": p}


def moved(**by_name):
    """Differences by metric; the bounds are those of a gain, so that less is turned around."""
    return {n: interval(b if n not in LESS else (-b[1], -b[0])) for n, b in by_name.items()}


def finished(study, notebook, metrics, **rest):
    folder = runs.stage_folder(study, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / runs.MANIFEST).write_text(json.dumps({"metrics": metrics, **rest}))
    return folder


def compared(study="mine", *, natural=None, **against):
    """Notebook 4 of a study: BPO's differences to each baseline on the counterfactual split."""
    values = {"base": {}, "bpo": {}}
    differences = {"counterfactual": {b: {"bpo": d} for b, d in against.items()}}
    if natural:
        differences["natural"] = {"base": {"bpo": natural}}
    finished(study, "4_qualitative_comparison",
             {**dict.fromkeys(differences, values), "differences": differences})
    return study


def probed(true, prior, *, inputs=("truth",), question="", study="mine"):
    finished(study, "1_noise_probability",
             {"noise_steps": [0, 999], "change_true": interval(true),
              "change_prior": interval(prior)},
             inputs=dict.fromkeys(inputs, "x"), parameters={"question": question})
    return study


def claim(study, number, against=None):
    found, = (c for c in claims.table(study) if c["claim"] == number
              and against in (None, c["against"]))
    return found


def test_there_are_the_five_claims_with_a_row_for_each_sft(outputs):
    rows = claims.table("nothing")
    assert [(c["claim"], c["against"]) for c in rows] == [
        (1, ""), (2, "base"), (3, "sft"), (3, "sft_matched"), (3, "sft_compute"), (4, ""),
        (5, "base")]
    assert {c["verdict"] for c in rows} == {claims.OPEN}
    assert claims.looks(rows) == dict.fromkeys(
        ("looked", "apart", "decide", "decide_apart", "survive"), 0)
    assert claims.detail(rows) == [] and len(claims.summary(rows)) == 7


@pytest.mark.parametrize("true, prior, verdict", [
    (WORSE, BETTER, claims.HOLDS), (UNSURE, BETTER, claims.OPEN), (WORSE, UNSURE, claims.OPEN),
    (BETTER, BETTER, claims.FAILS), (WORSE, WORSE, claims.FAILS), (UNSURE, UNSURE, claims.OPEN),
    ((-0.2, 0.0), BETTER, claims.OPEN)])
def test_noise_must_lower_the_true_answer_and_raise_the_prior_s(true, prior, verdict, outputs):
    assert claim(probed(true, prior), 1)["verdict"] == verdict


def test_a_prior_s_answer_that_the_model_gave_itself_shows_nothing(outputs):
    found = claim(probed(WORSE, BETTER, inputs=("model", "data")), 1)
    assert found["verdict"] == claims.OPEN and "by construction" in found["because"]
    assert claim(probed(BETTER, BETTER, inputs=()), 1)["verdict"] == claims.FAILS
    assert claim(probed(WORSE, BETTER, inputs=(), question="what ?"), 1)["verdict"] == claims.HOLDS


CAPTIONS = [
    ({"chair_i": BETTER, "cover": UNSURE}, claims.HOLDS, ""),
    ({"chair_i": BETTER, "cover": BETTER}, claims.HOLDS, ""),
    ({"chair_i": BETTER, "cover": WORSE}, claims.FAILS, "gained, but cover was lost"),
    ({"chair_i": UNSURE, "cover": WORSE}, claims.OPEN, ""),
    ({"chair_i": UNSURE, "cover": BETTER}, claims.OPEN, ""),
    ({"chair_i": WORSE, "cover": BETTER}, claims.FAILS, ""),
    ({"chair_i": BETTER}, claims.OPEN, "cover was not measured"),
    ({"chair_s": BETTER, "cover": UNSURE}, claims.OPEN, "not measured"),
]


@pytest.mark.parametrize("found, verdict, note", CAPTIONS)
def test_hallucination_is_judged_beside_cover(found, verdict, note, outputs):
    row = claim(compared(base=moved(**found)), 2)
    assert row["verdict"] == verdict
    assert note in row["lines"][0]["note"] and note in row["because"]


def test_a_gain_against_base_is_undone_by_a_loss_elsewhere(outputs):
    gain = {"chair_i": BETTER, "cover": UNSURE}
    loss = compared(base=moved(**gain, colour_accuracy=WORSE))
    assert claim(loss, 2)["verdict"] == claims.FAILS
    unsure = compared(base=moved(**gain, colour_accuracy=UNSURE, pope_adversarial=UNSURE))
    assert claim(unsure, 2)["verdict"] == claims.HOLDS
    elsewhere = compared(base=moved(**gain), natural=moved(colour_accuracy=WORSE))
    assert claim(elsewhere, 2)["verdict"] == claims.FAILS
    assert "natural attribute: does not hold" in claim(elsewhere, 2)["because"]


def test_accuracy_alone_is_no_gain_against_base(outputs):
    assert claim(compared(base=moved(colour_accuracy=BETTER)), 2)["verdict"] == claims.OPEN


@pytest.mark.parametrize("control", ["sft", "sft_matched", "sft_compute"])
def test_each_sft_is_beaten_only_in_every_category(control, outputs):
    gains = {"chair_i": BETTER, "cover": UNSURE, "colour_accuracy": BETTER,
             "pope_adversarial": BETTER}
    others = {c: moved(**dict.fromkeys(gains, WORSE)) for c in claims.SFT if c != control}
    study = compared(**others, **{control: moved(**gains)})
    assert claim(study, 3, control)["verdict"] == claims.HOLDS
    assert [claim(study, 3, c)["verdict"] for c in others] == [claims.FAILS] * 2
    study = compared(**{control: moved(**gains | {"colour_accuracy": UNSURE})})
    found = claim(study, 3, control)
    assert found["verdict"] == claims.OPEN
    assert found["because"] == ("counterfactual caption: holds; counterfactual attribute: cannot "
                                "be told; counterfactual presence: holds")


def test_against_sft_the_main_split_alone_counts(outputs):
    study = compared(sft=moved(chair_i=BETTER, cover=UNSURE))
    folder = runs.stage_folder(study, "4_qualitative_comparison")
    manifest = json.loads((folder / runs.MANIFEST).read_text())
    manifest["metrics"]["natural"] = {}
    manifest["metrics"]["differences"]["natural"] = {"sft": {"bpo": moved(chair_i=WORSE)}}
    (folder / runs.MANIFEST).write_text(json.dumps(manifest))
    assert claim(study, 3, "sft")["verdict"] == claims.HOLDS


def test_a_study_of_one_size_cannot_tell_of_another(outputs):
    row = claim(compared(base={}), 4)
    assert row["verdict"] == claims.OPEN and "one model size" in row["because"]


def test_a_measure_without_a_number_is_left_out(outputs):
    none = {"value": None, "low": None, "high": None, "n": 0, "p": None}
    row = claim(compared(base=moved(chair_i=BETTER, cover=UNSURE) | {"colour_accuracy": none}), 2)
    assert [m["name"] for line in row["lines"] for m in line["measures"]] == ["chair_i", "cover"]


def test_what_decides_stands_first_and_is_marked(outputs):
    study = compared(base=moved(chair_s=UNSURE, cover=UNSURE, chair_i=BETTER))
    rows = claims.detail(claims.table(study))
    assert [(r["measure"], r["decides"], r["side"]) for r in rows] == [
        ("CHAIRi", "holds", "right"), ("cover", "", "open"), ("CHAIRs", "", "open")]
    assert rows[0]["difference"] == "-0.150 [-0.200, -0.100]" and rows[0]["claimed"] == "less"


def test_holm_is_over_what_decides_and_not_what_is_shown_beside_it(outputs):
    study = compared(base=moved(chair_i=BETTER, cover=UNSURE), sft=moved(chair_i=BETTER))
    probed(WORSE, BETTER)
    rows = claims.table(study)
    family = claims.deciding(rows)
    assert [(m["where"], m["name"]) for m in family] == [
        ("step 999", "p_true"), ("step 999", "p_prior"), ("counterfactual", "chair_i"),
        ("counterfactual", "chair_i")]
    assert [m["holm"] for m in family] == metrics.holm([0.001] * 4)
    assert [m["holm"] for m in claims.measures(rows) if m["name"] == "cover"] == [None]
    assert claims.looks(rows) == {"looked": 5, "apart": 4, "decide": 4, "decide_apart": 4,
                                  "survive": 4}
    told = claims.told(rows)
    assert told.startswith("5 comparisons were looked at, 4 intervals exclude zero; of the 4 that "
                           "decide a verdict 4 do, and 4 survive")
    assert "step 999 P(true answer) against clean image, " in told
    assert told.endswith("counterfactual CHAIRi against sft")


def test_a_small_p_among_many_does_not_survive(outputs):
    probed(WORSE, BETTER)
    file = runs.stage_folder("mine", "1_noise_probability") / runs.MANIFEST
    held = json.loads(file.read_text())
    held["metrics"]["change_true"]["p"], held["metrics"]["change_prior"]["p"] = 0.03, 0.04
    file.write_text(json.dumps(held))
    assert claims.looks(claims.table("mine")) ["survive"] == 0


def test_manifests_without_p_values_are_told_of(outputs):
    without = {n: {k: v for k, v in d.items() if k != "p"}
               for n, d in moved(chair_i=BETTER, cover=UNSURE).items()}
    rows = claims.table(compared(base=without))
    assert claim("mine", 2)["verdict"] == claims.HOLDS
    assert claims.looks(rows)["survive"] is None and "run the study again" in claims.told(rows)


def benchmarked(name, study="mine", **found):
    finished(study, "5_benchmarks",
             {"benchmarks": {}, "differences": {name: {"base": {"bpo": moved(**found)}}}})
    return study


@pytest.mark.parametrize("name, found, verdict", [
    ("chair", {"chair_i": BETTER, "cover": UNSURE}, claims.HOLDS),
    ("chair", {"chair_i": BETTER, "cover": WORSE}, claims.FAILS),
    ("object-halbench", {"response": BETTER, "cover": UNSURE}, claims.HOLDS),
    ("object-halbench", {"response": BETTER}, claims.OPEN),
    ("amber", {"hal": BETTER, "cover": UNSURE, "chair": WORSE}, claims.HOLDS),
    ("amber", {"hal": WORSE, "cover": BETTER}, claims.FAILS),
    ("pope", {"accuracy": BETTER}, claims.OPEN),  # no hallucination of captions: not enough alone
    ("pope", {"accuracy": WORSE}, claims.FAILS),
    ("mm-vet", {"total": WORSE, "rec": BETTER}, claims.FAILS)])
def test_benchmarks_count_for_and_against_the_second_claim(name, found, verdict, outputs):
    row = claim(benchmarked(name, **found), 2)
    assert row["verdict"] == verdict
    line, = row["lines"]
    assert line["name"] == claims.benchmark(name)[0]


def test_what_decides_a_benchmark_is_one_of_its_metrics():
    for name, (decides, kept, _) in claims.BENCHMARKS.items():
        known = claims.benchmark(name)[1]
        assert known[decides][1] is not None and (kept is None or known[kept][1] is True)
    assert claims.benchmark("amber")[1]["amber_score"] == ("AMBER score", True)


TRUTH = {"rows": {f"q{i}": {"category": "attribute", "true": ["red"], "prior": [], "kind": None}
                  for i in range(6)}, "images": {}, "vocabulary": {}}


def answered(base, bpo, *, start=0):
    return [{"id": f"q{start + i}", "image": f"{start + i}.png", "p_true": {}, "p_prior": {},
             "answers": {"base": b, "bpo": t}}
            for i, (b, t) in enumerate(zip(base, bpo, strict=True))]


def test_wins_minus_losses_are_counted_a_question():
    lines = answered(["blue", "blue", "red", "red", "blue"], ["red", "red", "blue", "red", "blue"])
    found = claims.wins(lines, TRUTH, "bpo", seed=0, resamples=400)
    assert found["value"] == pytest.approx((2 - 1) / 5) and found["n"] == 5
    assert found["low"] < 0 < found["high"]
    sure = claims.wins(answered(["blue"] * 6, ["red"] * 6), TRUTH, "bpo", seed=0, resamples=400)
    assert (sure["value"], sure["low"], sure["high"]) == (1, 1, 1)


def test_wins_need_a_truth_and_the_method():
    lines = answered(["blue"], ["red"])
    assert claims.wins(lines, {"rows": {}, "images": {}, "vocabulary": {}}, "bpo", seed=0,
                       resamples=100) is None
    assert claims.wins(lines, TRUTH, "bpo_weaken", seed=0, resamples=100) is None


@pytest.mark.parametrize("base, bpo, verdict", [
    (["blue"] * 6, ["red"] * 6, claims.HOLDS), (["red"] * 6, ["blue"] * 6, claims.FAILS),
    (["red", "blue"] * 3, ["blue", "red"] * 3, claims.OPEN)])
def test_claim_five_reads_the_answers_of_notebook_4(base, bpo, verdict, outputs, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    folder = finished("mine", "4_qualitative_comparison",
                      {"own": {"base": {}, "bpo": {}}, "differences": {"own": {}}},
                      parameters={"splits": {"own": str(tmp_path / "rows.json")},
                                  "resamples": 200, "seed": 3})
    (folder / "answers-own.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in answered(base, bpo)))
    assert claim("mine", 5)["verdict"] == verdict
    (tmp_path / "truth.json").unlink()
    assert "there is no truth file" in claim("mine", 5)["because"]


def test_published_numbers_have_their_sources():
    rows = published.rows()
    assert all(r["source"] and r["model"] and 0 < r["value"] < 100 for r in rows)
    vet = {(r["what"], r["model"]): r["value"] for r in published.rows("MM-Vet")}
    assert vet["BPO", "LLaVA-1.5-7B"] == 36.8 and vet["SFT", "LLaVA-1.5-13B"] == 38.3
    assert vet["untuned", "LLaVA-1.5-7B"] == 31.7 and vet["untuned", "LLaVA-1.5-13B"] == 36.8
    assert vet["BPO, the released adapter", "LLaVA-1.5-7B"] == 33.3
    assert [r["value"] for r in published.rows("AMBER")] == [34.7, 34.5, 24.5]
    assert [r["value"] for r in published.rows("Object HalBench")] == [54.7, 49.0, 35.7]
    assert [r["value"] for r in rows if r["what"] == "SeVa"] == [70.7, 35.5, 72.2, 37.2]
    assert all("secondary" in r["note"] for r in rows
               if r["source"] == published.BPO)
