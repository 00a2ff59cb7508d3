"""A study over seeds: means and t intervals by hand, what is counted on how many seeds, the page in
a browser, and the command, which goes on after a kill."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import LITTLE
from test_pages import VIEWS, alone, check

from bpo import __main__, claims, params, replication, replication_page, runs
from bpo.__main__ import main
from bpo.params import Refusal

METHODS = replication.METHODS
NAMES = {"chair_i": 0.3, "cover": 0.5, "p_true": 0.4, "p_prior": 0.3, "pope_adversarial": 0.6}


def estimate(value, half=0.02, **rest):
    return {"value": value, "low": value - half, "high": value + half, "n": 40, **rest}


def finished(study, notebook, metrics, **rest):
    folder = runs.stage_folder(study, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    rest["parameters"] = {"seed": 0, **rest.get("parameters", {})}
    (folder / runs.MANIFEST).write_text(json.dumps({
        "study": study, "stage": notebook, "device": "CPU", "commit": "abc", "inputs": {},
        "finished": "2026-01-01", "seconds": 1.0, "versions": {"torch": "2"}, "metrics": metrics,
        **rest}))


def seeded(study, gain, *, noise=0.2, cover=0.0, benchmark=None):
    """A study whose BPO gains `gain` in every measure against every baseline, CHAIRi and P(prior)
    falling, and loses `cover`."""
    sign = {n: -1 if n in ("chair_i", "p_prior") else 1 for n in NAMES}
    changes = {n: gain * sign[n] if n != "cover" else cover for n in NAMES}
    values = {m: {n: estimate(v + (changes[n] if m == "bpo" else 0)) for n, v in NAMES.items()}
              for m in METHODS}
    differences = {b: {"bpo": {n: estimate(v, p=0.001) for n, v in changes.items()}}
                   for b in METHODS[:-1]}
    finished(study, "4_qualitative_comparison",
             {"counterfactual": values, "natural": values,
              "differences": {"counterfactual": differences, "natural": differences}},
             parameters={"splits": {"counterfactual": "x/rows.json"}})
    finished(study, "1_noise_probability", {
        "noise_steps": [0, 500, 999], "images": 9,
        **{f"p_{k}": [0.4, 0.4, 0.4 + s * noise] for k, s in (("true", -1), ("prior", 1))},
        **{f"p_{k}_interval": [[0.3, 0.5]] * 3 for k in ("true", "prior")},
        "change_true": estimate(-noise, p=0.001), "change_prior": estimate(noise, p=0.001)},
        inputs={"truth": "x"}, parameters={"question": ""})
    if benchmark is not None:
        rates = {"chair_i": -benchmark, "cover": 0.1, "objects": 0.3}
        finished(study, "5_benchmarks", {
            "methods": METHODS, "benchmarks": {"chair": {
                m: {n: estimate(0.5 + (v if m == "bpo" else 0)) for n, v in rates.items()}
                for m in METHODS}},
            "differences": {"chair": {b: {"bpo": {n: estimate(v, p=0.001)
                                                  for n, v in rates.items()}}
                                      for b in METHODS[:-1]}}})


@pytest.fixture
def three(outputs):
    """Seeds 0 to 2: the first gains, the second gains less, the third loses."""
    for study, gain in (("mine", 0.1), ("mine-seed1", 0.05), ("mine-seed2", -0.06)):
        seeded(study, gain)
    return replication.studies("mine", seed=0, count=3)


def test_the_study_itself_is_the_first_seed():
    assert replication.studies("tiny", seed=0, count=3) == {
        0: "tiny", 1: "tiny-seed1", 2: "tiny-seed2"}
    assert replication.studies("mine", seed=7, count=2) == {7: "mine", 8: "mine-seed8"}


def test_the_interval_over_seeds_is_student_s():
    found = replication.over_seeds({s: estimate(v) for s, v in enumerate((1.0, 2.0, 4.0, 5.0))})
    # mean 3, s = sqrt((4 + 1 + 1 + 4) / 3), t(0.975, 3) = 3.1824 in any table
    half = 3.1824 * math.sqrt(10 / 3) / math.sqrt(4)
    assert found["mean"] == 3
    assert (found["low"], found["high"]) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert found["seeds"][2] == {"seed": 2, "value": 4.0, "low": 3.98, "high": 4.02}


def test_two_seeds_have_a_mean_and_no_interval():
    found = replication.over_seeds({0: estimate(1.0), 5: estimate(2.0)})
    assert (found["mean"], found["low"], found["high"]) == (1.5, None, None)
    three = replication.over_seeds({s: estimate(1.0) for s in range(3)})
    assert (three["low"], three["high"]) == (1, 1)


def rows(found, **wanted):
    return [r for r in found if all(r[k] == v for k, v in wanted.items())]


def test_levels_and_differences_are_means_of_the_seeds(three):
    levels, apart = replication.levels(three), replication.differences(three)
    assert {r["where"] for r in levels} == {"counterfactual", "natural"}
    assert [r["method"] for r in rows(levels, where="natural", name="cover")] == list(METHODS)
    bpo, = rows(levels, where="counterfactual", method="bpo", name="p_true")
    assert bpo["mean"] == pytest.approx((0.5 + 0.45 + 0.34) / 3, abs=1e-6)
    chair, = rows(apart, where="counterfactual", against="sft_matched", name="chair_i")
    assert [e["value"] for e in chair["seeds"]] == [-0.1, -0.05, 0.06]
    assert chair["mean"] == pytest.approx(-0.03) and chair["more"] is False
    assert chair["low"] < -0.1 and chair["high"] > 0.06
    # What no seed measured is no row; hallucination stands beside cover.
    assert [r["name"] for r in rows(levels, where="natural", method="sft")] == list(NAMES)


def test_a_measure_that_one_seed_lacks_is_left_out(three):
    file = runs.stage_folder("mine-seed1", "4_qualitative_comparison") / runs.MANIFEST
    held = json.loads(file.read_text())
    held["metrics"]["natural"]["bpo"]["cover"]["value"] = None
    del held["metrics"]["counterfactual"]["sft"]
    file.write_text(json.dumps(held))
    levels = replication.levels(three)
    assert not rows(levels, where="natural", method="bpo", name="cover")
    assert not rows(levels, where="counterfactual", method="sft")
    assert rows(levels, where="counterfactual", method="bpo", name="cover")


def test_noise_is_followed_on_every_seed(three):
    seeded("mine-seed2", 0.1, noise=-0.1)
    found = replication.noise(three)
    change, = rows(found, name="p_prior", step=None)
    assert [round(e["value"], 6) for e in change["seeds"]] == [0.2, 0.2, -0.1]
    assert change["mean"] == pytest.approx(0.1)
    last, = rows(found, name="p_true", step=999)
    assert last["mean"] == pytest.approx((0.2 + 0.2 + 0.5) / 3, abs=1e-6)
    assert last["seeds"][0]["low"] == 0.3
    assert {r["step"] for r in found} == {0, 500, 999, None}


def test_noise_at_other_steps_is_not_averaged(three):
    file = runs.stage_folder("mine-seed1", "1_noise_probability") / runs.MANIFEST
    held = json.loads(file.read_text())
    held["metrics"]["noise_steps"] = [0, 400, 999]
    file.write_text(json.dumps(held))
    assert replication.noise(three) == []


def test_claims_are_counted_over_seeds(three):
    over = replication.claims_over(three)
    found, looks = over["claims"], over["looks"]
    assert [(c["claim"], c["against"], c["holds"], c["fails"]) for c in found] == [
        (1, "clean image", 3, 0), (2, "base", 2, 1), (3, "sft", 0, 1), (3, "sft_matched", 0, 1),
        (3, "sft_compute", 0, 1), (4, "", 0, 0), (5, "base", 0, 0)]
    assert [v["verdict"] for v in found[1]["verdicts"]] == [claims.HOLDS, claims.HOLDS,
                                                            claims.FAILS]
    assert [k["seed"] for k in looks] == [0, 1, 2] and looks[0]["decide"] > 10
    lines = rows(over["lines"], claim=3, against="sft")
    # There is no colour accuracy among these numbers: what decides the category was not measured.
    assert [(x["name"], x["holds"], x["fails"]) for x in lines] == [
        ("counterfactual caption", 2, 1), ("counterfactual attribute", 0, 0),
        ("counterfactual presence", 2, 1)]
    assert [v["note"] for v in lines[1]["verdicts"]] == ["not measured"] * 3


def test_a_benchmark_joins_when_every_seed_has_it(three):
    seeded("mine", 0.1, benchmark=0.1)
    assert "CHAIR" not in {r["where"] for r in replication.levels(three)}
    for study, gain in (("mine-seed1", 0.3), ("mine-seed2", 0.2)):
        seeded(study, 0.1, benchmark=gain)
    chair, = rows(replication.differences(three), where="CHAIR", against="base", name="chair_i")
    assert chair["mean"] == pytest.approx(-0.2)
    assert [r["name"] for r in rows(replication.levels(three), where="CHAIR", method="base")] == [
        "chair_i", "cover", "objects"]
    file = runs.stage_folder("mine-seed1", "5_benchmarks") / runs.MANIFEST
    file.write_text(json.dumps({"metrics": {"benchmarks": {}, "differences": {}}}))
    assert not rows(replication.levels(three), where="CHAIR")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A replication that was written once, and its page as plain text."""
    root = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(root))
        for study, gain in (("mine", 0.1), ("mine-seed1", 0.2), ("mine-seed2", -0.2)):
            seeded(study, gain, benchmark=gain)
        parts = replication.write("mine", replication.studies("mine", seed=0, count=3))
    return root / "mine" / replication.PAGE, "\n".join(p.plain for p in parts)


@pytest.fixture
def copied(page, tmp_path, monkeypatch):
    """The same to change, as the root of outputs."""
    root = shutil.copytree(page[0].parents[1], tmp_path / "copied")
    monkeypatch.setenv("BPO_OUTPUTS", str(root))
    return root


def test_the_page_says_what_differs_and_shows_every_seed(page):
    file, plain = page
    text = file.read_text(encoding="utf-8")
    assert "Study mine over 3 seeds" in text
    for words in ("holds on 2 of 3, does not hold on 1 of 3", "95 % t interval",
                  "CHAIR: each seed", "P(true answer), clean", "step 999"):
        assert words in plain, words
    assert not re.search(r"objects an answer \(", plain)  # neither more nor less is better
    assert text.count("<figure>") == 1 + 4 + 1 + 1  # noise; baselines; natural; the benchmark


def test_worlds_differ_between_seeds_where_every_seed_built_its_own(copied, page):
    assert "Checkpoint and data are the same for all seeds" in page[1]
    studies = replication.studies("mine", seed=0, count=3)
    for study in ("mine", "mine-seed1"):
        finished(study, "0_tiny_world", {})
    assert not replication.own_worlds(studies)
    finished("mine-seed2", "0_tiny_world", {})
    assert replication.own_worlds(studies)
    held = replication.written("mine") | {"own_worlds": True, "noise": [], "levels": []}
    assert "world, data, model, pairs and training all differ" in (
        replication_page.parts(held)[0].plain)


def test_better_and_worse_are_counted_by_what_is_better(three):
    seeded("mine", 0.01)  # less than its interval's half
    apart = replication.differences(three)
    for name, more in (("p_true", True), ("chair_i", False)):
        row, = rows(apart, where="natural", against="sft", name=name)
        assert row["more"] is more
        assert replication_page._sides(row) == {"better": "2 (1)", "worse": "1 (1)"}


def test_two_seeds_make_a_page_without_intervals_over_seeds(three):
    parts = replication.write("mine", {0: "mine", 1: "mine-seed1"})
    plain = "\n".join(p.plain for p in parts)
    assert "no interval" in plain and "Over seeds: the mean with" not in plain


def test_without_a_truth_the_page_says_that_nothing_was_measured(outputs):
    none = {"value": None, "low": None, "high": None, "n": 0}
    for study in ("mine", "mine-seed1"):
        finished(study, "4_qualitative_comparison", {
            "own": {"base": {"changed": estimate(0)}, "bpo": {"changed": none}},
            "differences": {"own": {}}}, parameters={"splits": {"own": "x/rows.json"}})
    parts = replication.write("mine", replication.studies("mine", seed=0, count=2))
    assert "needs a truth file or a benchmark" in "\n".join(p.plain for p in parts)


def test_the_forest_shows_seeds_and_their_mean(three):
    found = rows(replication.differences(three), where="counterfactual", against="base")
    fig = replication_page.forest(found)
    panel = fig.axes[0]
    assert panel.get_title("left") == "CHAIRi" and panel.get_xlabel() == "less is better"
    assert [t.get_text() for t in panel.get_yticklabels()] == ["seed 0", "seed 1", "seed 2", "mean"]
    dots = [x for x in panel.lines if x.get_marker() == "o"]
    assert [x.get_xdata()[0] for x in dots] == [-0.1, -0.05, 0.06]
    assert all(x.get_markerfacecolor() != "white" for x in dots)
    diamond, = (x for x in panel.lines if x.get_marker() == "D")
    assert diamond.get_xdata()[0] == pytest.approx(-0.03)
    cover = [x.get_markerfacecolor() for x in fig.axes[1].lines if x.get_marker() == "o"]
    assert cover == ["white"] * 3  # its intervals hold zero


def test_the_page_opens_in_a_browser_without_a_request_or_error(page, browser):
    file, _ = page
    with alone(browser, file.as_uri()) as tab:
        assert tab.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_axe_has_nothing_serious_to_say(page, browser, width, scheme):
    check(browser, [page[0]], width, scheme)


def test_what_was_written_counts_until_a_seed_changes(copied):
    held = replication.written("mine")
    assert replication.seeds_of(held) == {0: "mine", 1: "mine-seed1", 2: "mine-seed2"}
    assert replication.headline(held).startswith("Of 3 seeds, claims hold: 1 on 3, 2 on 2, 3 "
                                                 "against sft on 0")
    seeded("mine-seed1", 0.5, benchmark=0.1)
    assert replication.written("mine") is None
    assert replication.written("other") is None


def test_a_seed_without_a_comparison_is_refused(three, outputs):
    with pytest.raises(Refusal, match="seed 3 has no finished comparison; python -m bpo replicate"):
        replication.write("mine", three | {3: "mine-seed3"})
    assert not (outputs / "mine" / replication.TABLE).exists()


# --- the command --------------------------------------------------------------------------------

@pytest.fixture
def ran(monkeypatch, outputs):
    """What `replicate` runs, without running it: each notebook leaves what `seeded` does."""
    did = []

    def execute(notebook, p, folder):
        did.append(f"{p.study} {p.seed} {notebook[0]}")
        if notebook.startswith("4"):
            seeded(p.study, 0.1)
        return True

    monkeypatch.setattr(__main__, "_execute", execute)
    return did


def test_every_seed_is_a_study_of_its_own(ran, outputs, capsys):
    assert main(["replicate", "tiny", "--seeds", "3", "-p", "beta", "0.3"]) == 0
    every = [n[0] for n in params.study_files("tiny")]
    assert ran == [f"{study} {seed} {n}" for study, seed in (("tiny", 0), ("tiny-seed1", 1),
                                                             ("tiny-seed2", 2)) for n in every]
    assert (outputs / "tiny" / replication.PAGE).is_file()
    assert replication.PAGE in (outputs / "tiny/index.html").read_text()
    told = capsys.readouterr().out
    assert "— seed 2: study tiny-seed2" in told and "holds on 3 of 3" in told


def test_a_seed_that_fails_stops_the_replication(ran, monkeypatch, outputs, capsys):
    monkeypatch.setattr(__main__, "_execute", lambda n, p, folder: ran.append(p.seed)
                        or not (p.seed == 1 and n.startswith("3")))
    assert main(["replicate", "tiny", "--seeds", "3"]) == 1
    assert 2 not in ran
    told = capsys.readouterr().err
    assert "seed 1 (study tiny-seed1) failed, so the replication stopped" in told
    assert "give the same command again" in told
    assert not (outputs / "tiny" / replication.TABLE).exists()


def test_a_seed_that_is_being_run_stops_the_replication(ran, monkeypatch, outputs, capsys):
    monkeypatch.setattr(runs, "LOCK_PATIENCE", 0.1)
    (outputs / "tiny-seed1").mkdir(parents=True)
    with runs.locked(outputs / "tiny-seed1" / ".run.lock", "unused"):
        assert main(["replicate", "tiny", "--seeds", "2"]) == 1
    told = capsys.readouterr().err
    assert "is being run by another process" in told
    assert "seed 1 (study tiny-seed1) could not run" in told


@pytest.mark.parametrize("arguments, words", [
    (["-p", "seed", "4"], "-p seed: replicate sets seed itself"),
    (["-p", "study", "x"], "-p study: replicate sets study itself"),
    (["--seeds", "1"], "needs at least 2 seeds"),
    (["-p", "bta", "1"], "no notebook of study tiny has this parameter")])
def test_what_cannot_be_replicated_is_refused(arguments, words, ran, outputs, capsys):
    assert main(["replicate", "tiny", *arguments]) == 1
    assert words in capsys.readouterr().err and not ran


def test_report_renders_the_replication_again(copied, monkeypatch):
    file = copied / "mine" / replication.PAGE
    file.write_text("old")
    monkeypatch.setattr(__main__.report, "html_page", lambda notebook: None)
    (copied / "mine" / "4_qualitative_comparison.ipynb").write_text(json.dumps(
        {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    assert main(["report", "mine"]) == 0
    assert "Study mine over 3 seeds" in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_replication_that_is_killed_goes_on(tmp_path, little_study):
    study = "tiny-selection"
    shutil.copytree(little_study / "0_tiny_world", tmp_path / study / "0_tiny_world")
    # A study without notebooks 1 and 5, which take as long and say the same about going on.
    little = {n: v for n, v in LITTLE.items() if n not in ("noise_steps", "probe_rows")} | {
        "methods": "[sft, bpo]", "steps": 2}
    overrides = [x for n, v in little.items() for x in ("-p", n, str(v))]
    command = [sys.executable, "-m", "bpo", "replicate", study, "--seeds", "2", *overrides]
    environment = {**os.environ, "BPO_OUTPUTS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    pairs = tmp_path / study / "2_pair_generation" / runs.MANIFEST
    try:
        while not pairs.is_file():
            assert process.poll() is None, "the replication ended before it could be killed"
            time.sleep(0.05)
    finally:
        # The kernel too, which ends only seconds after the process that started it.
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        process.kill()
        for pid in map(int, children.stdout.split()):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    stages = [tmp_path / s / n / runs.MANIFEST
              for s, n in ((study, "0_tiny_world"), (study, "2_pair_generation"))]
    before = {f: f.stat().st_mtime_ns for f in stages}
    assert not (tmp_path / study / replication.TABLE).exists()
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {f: f.stat().st_mtime_ns for f in stages}  # those were only read
    assert not list(tmp_path.glob("*/*.old-*"))
    held = json.loads((tmp_path / study / replication.TABLE).read_text())
    assert held["seeds"] == {"0": study, "1": f"{study}-seed1"} and held["own_worlds"]
    first, second = (json.loads((tmp_path / s / "4_qualitative_comparison" / runs.MANIFEST)
                                .read_text())["metrics"] for s in held["seeds"].values())
    cover, = rows(held["levels"], where="counterfactual", method="bpo", name="cover")
    values = [m["counterfactual"]["bpo"]["cover"]["value"] for m in (first, second)]
    assert [e["value"] for e in cover["seeds"]] == values
    assert cover["mean"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert first != second
    assert replication.PAGE in (tmp_path / study / "index.html").read_text()
