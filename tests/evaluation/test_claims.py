"""The paper's claims on a study: each verdict from hand-made intervals, and the family of looks."""

import json

import pytest

from bpo.evaluation import benchmarks, claims, comparison
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.results import OPEN, Estimate, Result

WORSE, UNSURE, BETTER = (-0.2, -0.1), (-0.1, 0.1), (0.1, 0.2)  # when more is claimed


def gain(bounds, more, p=0.001):
    """The bounds are those of a gain, so that a metric of which less is better is turned around."""
    low, high = bounds if more else (-bounds[1], -bounds[0])
    return Estimate((low + high) / 2, low, high, 40, p, more_is_better=more)


def finished(study, notebook, rows, **manifest):
    folder = stages.stage_folder(study, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / stages.MANIFEST).write_text(json.dumps(manifest))
    before = results.read(folder).to_dict("records") if (folder / results.FILE).is_file() else []
    results.write(folder, [Result(*(row[c] for c in results.COLUMNS[:5]), results.estimate(row))
                           for row in before] + rows)
    return study


def compared(split="counterfactual", study="mine", against="base", **gains):
    """Notebook 4 of a study: BPO's differences to a baseline, by metric."""
    rows = [Result(split, comparison.METRICS[n][1], "bpo", against, n,
                   gain(bounds, comparison.METRICS[n][2])) for n, bounds in gains.items()]
    return finished(study, claims.COMPARISON, rows)


def benchmarked(name, **gains):
    known = benchmarks.described(name)
    return finished("mine", claims.BENCHMARK, [
        Result(name, "all", "bpo", "base", n, gain(b, known[n][2])) for n, b in gains.items()])


def probed(true, prior, *, inputs=("truth",), question="", p=0.001):
    rows = [Result("step 999", "noise", "base", "step 0", n, gain(b, True, p))
            for n, b in (("p_true", true), ("p_prior", prior))]
    file = stages.stage_folder("mine", "1_noise_probability") / results.FILE
    file.unlink(missing_ok=True)
    return finished("mine", "1_noise_probability", rows, inputs=dict.fromkeys(inputs, "x"),
                    parameters={"question": question})


def claim(number, against=None):
    only, = (c for c in claims.table("mine").itertuples() if c.claim == number and not c.line
             and against in (None, c.against))
    return only


def line(number):
    only, = (c for c in claims.table("mine").itertuples() if c.claim == number and c.line)
    return only


def test_there_are_the_five_claims_with_a_row_for_each_sft(outputs):
    rows = claims.table("nothing")
    assert list(zip(rows["claim"], rows["against"], strict=True)) == [
        (1, "–"), (2, "base"), (3, "sft"), (3, "sft_matched"), (3, "sft_compute"), (4, "–"),
        (5, "base")]
    assert set(rows["verdict"]) == {OPEN}
    assert claims.looks(rows) == (
        "0 comparisons were looked at, 0 intervals exclude zero; of the 0 that decide a verdict 0 "
        "do, and 0 survive Holm's correction at 0.05")


@pytest.mark.parametrize("true, prior, verdict", [
    (WORSE, BETTER, claims.HOLDS), (UNSURE, BETTER, OPEN), (WORSE, UNSURE, OPEN),
    (BETTER, BETTER, claims.FAILS), (WORSE, WORSE, claims.FAILS), (UNSURE, UNSURE, OPEN),
    ((-0.2, 0.0), BETTER, OPEN)])
def test_noise_must_lower_the_true_answer_and_raise_the_prior_s(true, prior, verdict, outputs):
    probed(true, prior)
    assert claim(1).verdict == verdict


def test_a_prior_s_answer_that_the_model_gave_itself_shows_nothing(outputs):
    probed(WORSE, BETTER, inputs=("model", "data"))
    assert claim(1).verdict == OPEN and "by construction" in claim(1).because
    probed(BETTER, BETTER, inputs=())
    assert claim(1).verdict == claims.FAILS
    probed(WORSE, BETTER, inputs=(), question="what ?")
    assert claim(1).verdict == claims.HOLDS


@pytest.mark.parametrize("gains, verdict, note", [
    ({"chair_i": BETTER, "cover": UNSURE}, claims.HOLDS, ""),
    ({"chair_i": BETTER, "cover": BETTER}, claims.HOLDS, ""),
    ({"chair_i": BETTER, "cover": WORSE}, claims.FAILS, "gained, but cover was lost"),
    ({"chair_i": UNSURE, "cover": WORSE}, OPEN, ""),
    ({"chair_i": WORSE, "cover": BETTER}, claims.FAILS, ""),
    ({"chair_i": BETTER}, OPEN, "cover was not measured"),
    ({"chair_s": BETTER, "cover": UNSURE}, OPEN, "not measured")])
def test_hallucination_is_judged_beside_cover(gains, verdict, note, outputs):
    compared(**gains)
    assert claim(2).verdict == verdict
    assert note in line(2).because and note in claim(2).because


@pytest.mark.parametrize("elsewhere, verdict", [
    ({"colour_accuracy": WORSE}, claims.FAILS), ({"colour_accuracy": UNSURE}, claims.HOLDS)])
def test_a_gain_against_base_is_undone_by_a_loss_elsewhere(elsewhere, verdict, outputs):
    compared(chair_i=BETTER, cover=UNSURE)
    compared("natural", **elsewhere)
    assert claim(2).verdict == verdict
    assert ("natural attribute: does not hold" in claim(2).because) == (verdict == claims.FAILS)


def test_accuracy_alone_is_no_gain_against_base(outputs):
    compared(colour_accuracy=BETTER)
    assert claim(2).verdict == OPEN


@pytest.mark.parametrize("control", claims.SFT)
def test_each_sft_is_beaten_only_in_every_category_of_the_main_split(control, outputs):
    gains = {"chair_i": BETTER, "cover": UNSURE, "pope_adversarial": BETTER}
    compared(against=control, **gains, colour_accuracy=BETTER)
    compared("natural", against=control, chair_i=WORSE)
    others = [c for c in claims.SFT if c != control]
    for other in others:
        compared(against=other, **dict.fromkeys(gains, WORSE))
    assert claim(3, control).verdict == claims.HOLDS
    assert [claim(3, c).verdict for c in others] == [claims.FAILS] * 2


def test_a_category_that_cannot_be_told_leaves_the_claim_open(outputs):
    compared(against="sft", chair_i=BETTER, cover=UNSURE, colour_accuracy=UNSURE)
    assert claim(3, "sft").verdict == OPEN
    assert claim(3, "sft").because == ("counterfactual caption: holds; counterfactual attribute: "
                                       "cannot be told")


def test_a_study_of_one_size_cannot_tell_of_another(outputs):
    assert claim(4).verdict == OPEN
    assert "one model size" in claim(4).because


def test_holm_is_over_what_decides_and_not_what_is_shown_beside_it(outputs):
    compared(chair_i=BETTER, cover=UNSURE)
    compared(against="sft", chair_i=BETTER)
    probed(WORSE, BETTER)
    text = claims.looks(claims.table("mine"))
    assert text.startswith("5 comparisons were looked at, 4 intervals exclude zero; of the 4 that "
                           "decide a verdict 4 do, and 4 survive")
    assert text.endswith("counterfactual caption against sft")


def test_a_small_p_among_many_does_not_survive(outputs):
    probed(WORSE, BETTER, p=0.03)
    assert claims.looks(claims.table("mine")).endswith("0 survive Holm's correction at 0.05")


@pytest.mark.parametrize("name, gains, verdict", [
    ("chair", {"chair_i": BETTER, "cover": UNSURE}, claims.HOLDS),
    ("chair", {"chair_i": BETTER, "cover": WORSE}, claims.FAILS),
    ("object-halbench", {"response": BETTER, "cover": UNSURE}, claims.HOLDS),
    ("object-halbench", {"response": BETTER}, OPEN),
    ("amber", {"hal": BETTER, "cover": UNSURE, "chair": WORSE}, claims.HOLDS),
    ("amber", {"hal": WORSE, "cover": BETTER}, claims.FAILS),
    ("pope", {"accuracy": BETTER}, OPEN),  # no hallucination of captions: not enough alone
    ("pope", {"accuracy": WORSE}, claims.FAILS),
    ("mm-vet", {"total": WORSE, "rec": BETTER}, claims.FAILS)])
def test_benchmarks_count_for_and_against_the_second_claim(name, gains, verdict, outputs):
    benchmarked(name, **gains)
    assert (claim(2).verdict, line(2).line) == (verdict, benchmarks.title(name))


def test_what_decides_a_benchmark_is_one_of_its_metrics():
    for name, (decides, kept, _) in claims.BENCHMARKS.items():
        known = benchmarks.described(name)
        assert known[decides][2] is not None and (kept is None or known[kept][2] is True)
    assert benchmarks.label("amber", "amber_score") == "AMBER score"
    assert benchmarks.label("counterfactual", "chair_i") == "CHAIRi"


@pytest.mark.parametrize("bounds, verdict", [
    (BETTER, claims.HOLDS), (WORSE, claims.FAILS), (UNSURE, OPEN)])
def test_claim_five_is_wins_minus_losses(bounds, verdict, outputs):
    finished("mine", claims.COMPARISON, [
        Result("counterfactual", "any", "bpo", "base", "wins", gain(bounds, True))])
    assert claim(5).verdict == verdict


def test_claim_five_needs_a_truth_file(outputs):
    assert "notebook 4 has not run" in claim(5).because
    compared(cover=BETTER)
    assert "there is no truth file" in claim(5).because


TRUTH = {"rows": {f"q{i}": {"category": "attribute", "true": ["red"], "prior": [], "kind": None}
                  for i in range(6)}, "images": {}, "vocabulary": {}}


def won(base, bpo, truth=TRUTH):
    lines = [{"id": f"q{i}", "image": f"{i}.png", "p_true": {}, "p_prior": {},
              "answers": {"base": b, "bpo": t}}
             for i, (b, t) in enumerate(zip(base, bpo, strict=True))]
    return comparison.wins(lines, truth, ["bpo"], seed=0, resamples=400)


def test_wins_minus_losses_are_counted_a_question():
    difference = won(["blue", "blue", "red", "red", "blue"], ["red", "red", "blue", "red", "blue"])
    assert difference["bpo"]["value"] == pytest.approx((2 - 1) / 5)
    assert difference["bpo"]["n"] == 5
    assert difference["bpo"]["low"] < 0 < difference["bpo"]["high"]
    sure = won(["blue"] * 6, ["red"] * 6)["bpo"]
    assert (sure["value"], sure["low"], sure["high"]) == (1, 1, 1)
    assert won(["blue"], ["red"], {"rows": {}, "images": {}, "vocabulary": {}}) == {}
