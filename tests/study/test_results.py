"""The tidy table of a stage, and the estimate in it."""

import json

import pytest

from bpo.params import Refusal
from bpo.study import results
from bpo.study.results import Estimate, Result


@pytest.mark.parametrize("estimate, text, reading", (
    (Estimate(0.3451, 0.3119, 0.38), "0.345 [0.312, 0.380]", ""),
    (Estimate(0.5), "0.500", ""),
    (Estimate(None, None, None, 0), "none", ""),
    (Estimate(0.1, 0.05, 0.2, more_is_better=True), "0.100 [0.050, 0.200]", "better"),
    (Estimate(0.1, 0.05, 0.2, more_is_better=False), "0.100 [0.050, 0.200]", "worse"),
    (Estimate(-0.1, -0.2, -0.05, more_is_better=False), "−0.100 [−0.200, −0.050]", "better"),
    (Estimate(0.1, 0.0, 0.2, more_is_better=True), "0.100 [0.000, 0.200]", "no difference seen")))
def test_an_estimate_says_what_its_interval_allows(estimate, text, reading):
    assert (estimate.text(), estimate.reading()) == (text, reading)


def test_a_difference_has_its_sign():
    assert Estimate(0.1, -0.05, 0.25).text(2, "+") == "+0.10 [−0.05, +0.25]"


VALUES = {"base": {"cover": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9},
                   "words": {"value": 3.0, "low": 2.0, "high": 4.0, "n": 9}}}
DIFFERENCES = {"base": {"bpo": {
    "cover": {"value": 0.1, "low": 0.01, "high": 0.2, "n": 9, "p": 0.02},
    "chair_i": {"value": None, "low": None, "high": None, "n": 0, "p": None},
    "chair_s": {"value": -0.1, "low": -0.2, "high": 0.1, "n": 9, "p": 0.3},
    "words": {"value": 1.0, "low": 0.5, "high": 2.0, "n": 9, "p": 0.001}}}}
METRICS = {"cover": ("cover", "caption", True), "chair_i": ("CHAIRi", "caption", False),
           "chair_s": ("CHAIRs", "caption", False), "words": ("words", "caption", None)}


def test_what_is_written_is_read_again(tmp_path):
    rows = results.compared("natural", VALUES, DIFFERENCES, METRICS)
    results.write(tmp_path, rows)
    frame = results.read(tmp_path)
    assert tuple(frame.columns) == (*results.COLUMNS, "notebook")
    assert list(frame.metric) == ["cover", "words", "cover", "chair_i", "chair_s", "words"]
    assert list(frame.against) == ["", "", *["base"] * 4]
    assert set(frame.split_or_benchmark) == {"natural"}
    again = results.estimates(frame)
    # two differences have a better and a worse and were measured: 0.02 x 2, then 0.3
    assert [e.p_holm for e in again] == [None, None, 0.04, None, 0.3, None]
    assert [e.reading() for e in again[2:]] == ["better", "", "no difference seen", ""]
    assert again[2] == Estimate(0.1, 0.01, 0.2, 9, 0.02, 0.04, True)
    assert again[3] == Estimate(None, None, None, 0, None, None, False)
    assert list(results.texts(frame)) == [
        "0.50 [0.40, 0.60]", "3.00 [2.00, 4.00]", "+0.100 [+0.010, +0.200] better", "none",
        "−0.100 [−0.200, +0.100]", "+1.000 [+0.500, +2.000]"]


def test_families_are_corrected_apart(tmp_path):
    def result(method, against, category, p):
        return Result("s", category, method, against, "m",
                      Estimate(0.1, 0.0, 0.2, 5, p, more_is_better=True))

    rows = [result("bpo", "base", "caption", 0.01), result("bpo", "base", "caption", 0.04),
            result("bpo", "sft", "caption", 0.03), result("bpo", "base", "presence", 0.02),
            result("bpo", "", "caption", None)]
    results.write(tmp_path, rows)
    assert [e.p_holm for e in results.estimates(results.read(tmp_path))] == [0.02, 0.04, 0.03, 0.02,
                                                                             None]


def test_a_stage_without_results_names_its_notebook(tmp_path):
    with pytest.raises(Refusal, match=r"results\.csv is not there: run notebooks/4_x\.ipynb"):
        results.read(tmp_path / "4_x")


@pytest.mark.slow
def test_every_stage_has_its_table_and_it_says_what_the_manifest_says(little_study):
    manifests = sorted(little_study.glob("*/manifest.json"))
    assert len(manifests) == 6
    for manifest in manifests:
        assert len(results.read(manifest.parent)) > 10
        assert "results.csv" in json.loads(manifest.read_text())["outputs"]
    stage = little_study / "4_qualitative_comparison"
    metrics = json.loads((stage / "manifest.json").read_text())["metrics"]
    rows = results.read(stage).query("method == 'bpo' and against == 'base' and metric != 'wins' "
                                     "and split_or_benchmark == 'counterfactual' and category != 'noise'")
    values = dict(zip(rows.metric, rows.value, strict=True))
    expected = metrics["differences"]["counterfactual"]["base"]["bpo"]
    assert values == pytest.approx({n: e["value"] for n, e in expected.items()}, nan_ok=True)
