"""Dose and response: the studies that notebook 8 runs, what it makes of them, going on after a
stop."""

import json
import shutil
import subprocess

import pandas
import pytest
from helpers import warm
from helpers.study import LITTLE, environment

from bpo import params
from bpo.__main__ import main
from bpo.params import DoseResponse, Refusal, validate
from bpo.reports import page as report
from bpo.reports.index import index
from bpo.study import results
from bpo.study import stage as stages
from bpo.tiny import dose

pytestmark = pytest.mark.study

SMALL = {n: v for n, v in LITTLE.items() if n in DoseResponse.model_fields} | {
    "text_documents": 700, "tower_steps": 10, "steps": 2, "preference_images": 24,
    "natural_images": 6, "test_images": 8, "doses": [0.0, 1.0], "repeats": 1,
    "methods": ["sft_matched", "bpo"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(outputs))
        yield DoseResponse(**SMALL), dose.run(DoseResponse(**SMALL)), outputs


def test_each_dose_is_a_study_on_one_world(done):
    p, result, outputs = done
    assert {f.name for f in outputs.iterdir() if f.is_dir()} >= {
        "tiny-dose", "tiny-dose-world0", "tiny-dose-world0-0", "tiny-dose-world0-1"}
    ran = stages.read_manifest(outputs / "tiny-dose-world0-1/3_dpo_training")["parameters"]
    assert (ran["batch_pairs"], ran["device_batch"], ran["share"]) == (16, 16, "prompt")
    frame = dose.levels(results.read(result.folder))
    assert set(frame["dose"]) == {0, 1} and set(frame["seed"]) == {0}
    assert {"base", "sft_matched", "bpo"} <= set(frame["method"])
    base = frame.query("method == 'base' and metric == 'chair_i' and split == 'counterfactual'")
    assert base["value"].nunique() == 1  # one model, one set of questions
    stored = results.of_study("tiny-dose-world0-1").query(
        "method == 'bpo' and against == 'sft_matched' and metric == 'cover'")
    assert not stored.empty


def test_its_page_and_its_section_say_the_dose_and_its_slopes(done):
    p, result, outputs = done
    table = results.read(result.folder)
    assert "bpo − sft_matched" in set(dose.slope_rows(table)["method"])
    assert dose.curves(p, table).plain
    assert list(dose.by_dose(table, "kept", "is_prior")["dose"]) == [0, 1]
    assert main(["results", "tiny-dose"]) == 0
    first = (outputs / "README.md").read_text(encoding="utf-8")
    assert dose.finding(table).replace("-", "−")[:40] in first.replace("-", "−")
    page = index(outputs / "tiny-dose").read_text()
    assert "tiny-dose" in page and "Does BPO make" not in page  # a slope is no difference to base
    assert main(["power", "tiny-dose"]) == 1  # its doses are no replication
    shutil.rmtree(outputs / "tiny-dose")  # what is stored is enough
    assert main(["results", "tiny-dose"]) == 0
    assert (outputs / "README.md").read_text(encoding="utf-8") == first


def test_a_run_that_was_cut_off_goes_on_with_what_its_studies_hold(done, monkeypatch):
    p, result, outputs = done
    shutil.rmtree(outputs / "tiny-dose", ignore_errors=True)
    for module in (dose.pairs, dose.training, dose.comparison, dose.tiny):
        def run(settings, inner=module.run):
            with stages.read_only():  # which refuses to compute
                return inner(settings)

        monkeypatch.setattr(module, "run", run)
    assert dose.run(p).metrics == result.metrics


def test_a_slope_is_the_mean_of_each_seed_s_straight_line():
    rows = [{"notebook": "n", "split_or_benchmark": "natural", "category": "attribute",
             "method": "bpo", "against": "", "metric": "p_prior", "seed": seed, "dose": x,
             "value": 0.1 * seed + (0.2 + 0.1 * seed) * x} for seed in range(3)
            for x in (0.0, 0.5, 1.0)]
    [slope] = dose.slopes(pandas.DataFrame(rows))
    assert (slope.method, slope.category) == ("bpo", "slope")
    assert slope.estimate.value == pytest.approx(0.3)  # the mean of .2, .3, .4; t(2) = 4.303
    assert slope.estimate.low == pytest.approx(0.3 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)


def test_a_method_that_wants_other_settings_is_refused():
    with pytest.raises(Refusal, match="bpo_own needs settings that this notebook has not"):
        validate(DoseResponse, {"methods": ["bpo_own"]}, where="here")
    with pytest.raises(Refusal, match=r"batch_pairs \(32\) must be a multiple of device_batch"):
        validate(DoseResponse, {"device_batch": 20}, where="here")  # before a world is built
    read = params.read_study("tiny-dose")[DoseResponse.notebook]  # as the stored results had it
    assert (read.batch_pairs, read.device_batch, read.share) == (32, 32, "prompt")


@pytest.mark.slow
def test_the_notebook_runs_headless(done, tmp_path):
    shutil.copytree(done[2], tmp_path, dirs_exist_ok=True)  # its first world is there already
    given = json.dumps(SMALL | {"repeats": 2})
    ran = subprocess.run(
        [warm.python(), "-m", "papermill", "--no-progress-bar",
         str(params.ROOT / "notebooks" / f"{DoseResponse.notebook}.ipynb"),
         str(tmp_path / "out.ipynb"), "-y", given], cwd=tmp_path, text=True, capture_output=True,
        env=environment(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert report.failure_message(tmp_path / "out.ipynb") is None
    assert "mean over 2 seeds" in report.headline(tmp_path / "out.ipynb")
