"""The paper's claims on a study: each verdict from hand-made intervals, and the family of looks."""

import json

import pytest

from bpo.evaluation import benchmarks, claims, comparison
from bpo.params import Worlds
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


def compared(split="counterfactual", study="mine", against="base", method="bpo", **gains):
    """Notebook 4 of a study: a method's differences to a baseline, by metric."""
    rows = [Result(split, "wins" if n == "wins" else comparison.METRICS[n][1], method, against, n,
                   gain(bounds, n == "wins" or comparison.METRICS[n][2] is not False))
            for n, bounds in gains.items()]
    return finished(study, claims.COMPARISON, rows)


def benchmarked(name, against="base", **gains):
    known = {**benchmarks.described(name), **benchmarks.CALIBRATION}
    return finished("mine", claims.BENCHMARK, [
        Result(name, "all", "bpo", against, n, gain(b, known[n][2])) for n, b in gains.items()])


def probed(true, prior, *, inputs=("truth",), question="", p=0.001):
    rows = [Result("step 999", "noise", "base", "step 0", n, gain(b, True, p))
            for n, b in (("p_true", true), ("p_prior", prior))]
    return finished("mine", claims.PROBE, rows, inputs=dict.fromkeys(inputs, "x"),
                    parameters={"question": question})


def verdicts(study="mine", **wanted):
    """verdict by what decides, of the rows that are as wanted and were measured."""
    rows = claims.table(study)
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    rows = rows[rows["verdict"] != claims.UNMEASURED]
    return dict(zip(rows["decides"], rows["verdict"], strict=True))


def test_every_claim_has_its_rows_before_anything_has_run(outputs):
    rows = claims.table("nothing")
    assert set(rows["verdict"]) == {claims.UNMEASURED}
    found = rows.groupby(["claim", "method", "against"], sort=False).size().to_dict()
    assert found == {
        ("1", "base", "–"): 2, ("2", "bpo", "base"): 4, ("2", "bpo", "base_sharpened"): 1,
        ("3", "bpo", "sft_matched"): 3, ("3", "bpo", "sft"): 3, ("3", "bpo", "sft_compute"): 3,
        ("3", "bpo_weaken", "sft_matched_weaken"): 3, ("4", "bpo", "rival"): 1,
        ("5", "bpo", "base"): 1, (claims.HARM, "bpo", "base"): 4}
    assert claims.looks(rows) == ("0 differences decide a row, 0 of their intervals exclude zero, "
                                  "and 0 survive Holm's correction at 0.05")


@pytest.mark.parametrize("bounds, more, verdict", [
    ((0.1, 0.2), True, claims.HOLDS), ((-0.2, -0.1), True, claims.FAILS),
    ((-0.1, 0.2), True, OPEN), ((-0.2, 0.0), False, OPEN), ((-0.2, -0.1), False, claims.HOLDS),
    ((0.1, 0.2), False, claims.FAILS), ((-0.1, 0.1), None, OPEN), ((0.1, 0.2), None, claims.FAILS),
    ((-0.2, -0.1), None, claims.FAILS), ((None, None), True, OPEN)])
def test_a_verdict_is_where_the_interval_lies(bounds, more, verdict):
    assert claims.verdict(Estimate(sum(filter(None, bounds)), *bounds), more) == verdict


def test_what_was_not_measured_has_no_verdict():
    assert claims.verdict(None, True) == claims.UNMEASURED


def test_noise_has_a_row_for_each_answer(outputs):
    probed(WORSE, UNSURE)
    assert verdicts(claim="1", against="step 0") == {
        "step 999: P(true answer)": claims.HOLDS, "step 999: P(prior's answer)": OPEN}


@pytest.mark.parametrize("inputs, question, counts", [
    (("model", "data"), "", False), ((), "what ?", True), (("truth",), "", True)])
def test_a_prior_s_answer_that_the_model_gave_itself_shows_nothing(inputs, question, counts,
                                                                  outputs):
    probed(WORSE, BETTER, inputs=inputs, question=question)
    assert ("step 999: P(prior's answer)" in verdicts(claim="1")) == counts


def test_no_row_decides_another(outputs):
    """Hallucinating less stays, though cover and yes/no scores fall beside it."""
    compared(chair_i=BETTER, cover=WORSE, p_true=UNSURE, pope_adversarial=WORSE, words=WORSE)
    compared("natural", chair_i=UNSURE, cover=BETTER, colour_accuracy=WORSE)
    compared(against="base_sharpened", p_true=WORSE)
    assert verdicts(claim="2", against="base") == {
        "counterfactual: CHAIRi": claims.HOLDS, "counterfactual: cover": claims.FAILS,
        "counterfactual: P(true answer)": OPEN}
    assert verdicts(against="base_sharpened") == {"counterfactual: P(true answer)": claims.FAILS}
    assert verdicts(claim=claims.HARM) == {
        "counterfactual: POPE adversarial": claims.FAILS, "natural: CHAIRi": OPEN,
        "natural: cover": claims.HOLDS, "natural: colour accuracy": claims.FAILS,
        "counterfactual: length in words": claims.FAILS}


@pytest.mark.parametrize("method, control", [
    *(("bpo", c) for c in claims.CONTROLS), ("bpo_weaken", "sft_matched_weaken")])
def test_each_sft_has_rows_of_its_own(method, control, outputs):
    compared(against=control, method=method, chair_i=UNSURE, p_true=BETTER, p_prior=WORSE)
    compared("natural", against=control, method=method, chair_i=WORSE)
    assert verdicts(claim="3") == verdicts(claim="3", method=method, against=control) == {
        "counterfactual: CHAIRi": OPEN, "counterfactual: P(true answer)": claims.HOLDS,
        "counterfactual: P(prior's answer)": claims.FAILS}


def test_without_a_truth_file_a_benchmark_tells_of_hallucination(outputs):
    compared("held_out", against="sft", answer_words=UNSURE)
    benchmarked("chair", chair_i=BETTER, cover=UNSURE)
    benchmarked("chair", against="sft", chair_i=WORSE)
    benchmarked("pope", accuracy=WORSE, brier=BETTER)
    benchmarked("mm-vet", total=WORSE, rec=BETTER)
    assert verdicts(claim="2") == {"CHAIR: CHAIRi": claims.HOLDS, "CHAIR: cover": OPEN}
    assert verdicts(claim="3") == {"CHAIR: CHAIRi": claims.FAILS}
    assert verdicts(claim=claims.HARM) == {
        "POPE: accuracy": claims.FAILS, "POPE: Brier score": claims.HOLDS,
        "MM-Vet: MM-Vet": claims.FAILS}


@pytest.mark.parametrize("gains, verdict", [
    ({"chair_i": BETTER, "colour_accuracy": BETTER, "pope_adversarial": WORSE}, claims.HOLDS),
    ({"chair_i": BETTER, "colour_accuracy": WORSE}, claims.FAILS),
    ({"chair_i": BETTER, "colour_accuracy": UNSURE}, OPEN),
    ({"p_true": BETTER}, claims.UNMEASURED)])
def test_the_rival_is_passed_on_more_than_half_of_the_tasks(gains, verdict, outputs):
    compared(against="rival", **gains)
    row, = claims.table("mine").query("claim == '4'").itertuples()
    assert row.verdict == verdict


def test_benchmarks_count_among_the_tasks(outputs):
    compared(against="rival", chair_i=UNSURE, pope_adversarial=BETTER)
    benchmarked("amber", against="rival", hal=BETTER, cover=WORSE)
    row, = claims.table("mine").query("claim == '4'").itertuples()
    assert (row.difference, row.verdict) == ("better on 2, worse on 0 of 3 tasks", claims.HOLDS)


def test_claim_five_is_wins_minus_losses(outputs):
    compared(wins=BETTER)
    assert verdicts(claim="5") == {"counterfactual: wins − losses": claims.HOLDS}


def test_holm_is_over_what_decides(outputs):
    compared(chair_i=BETTER, chair_s=BETTER)
    probed(WORSE, BETTER, p=0.03)
    text = claims.looks(claims.table("mine"))
    # .001, .03, .03 of three that decide: 3 x .001 survives, 2 x .03 does not; CHAIRs decides none
    assert text == ("3 differences decide a row, 3 of their intervals exclude zero, and 1 survive "
                    "Holm's correction at 0.05: counterfactual: CHAIRi of bpo against base")


def test_what_decides_a_benchmark_is_one_of_its_metrics():
    for name, (decides, beside, _) in claims.BENCHMARKS.items():
        known = benchmarks.described(name)
        assert known[decides][2] is not None and (beside is None or known[beside][2] is True)
    assert benchmarks.label("amber", "amber_score") == "AMBER score"


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


@pytest.mark.parametrize("given, said", [
    ({"chair_i": WORSE, "p_true": WORSE}, "moves the measures the other way (CHAIRi +0.150"),
    ({"chair_i": WORSE, "p_true": UNSURE},
     "may be too blunt, so read no \"no difference seen\" as")])
def test_swapped_sides_tell_whether_the_measures_can_show_anything(given, said, outputs):
    assert claims.ruler(claims.measured(compared(study="other", chair_i=BETTER))) == ""
    assert said in claims.ruler(claims.measured(compared(method="bpo_reversed", **given)))


@pytest.mark.parametrize("schema", Worlds.__subclasses__())
def test_what_is_over_several_worlds_decides_no_claim(schema, outputs):
    finished("mine", schema.notebook, [Result("counterfactual", "caption", "bpo", "base",
                                              "chair_i", gain(WORSE, False))])
    assert set(claims.table("mine")["verdict"]) == {claims.UNMEASURED}
