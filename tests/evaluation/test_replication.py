"""A study over seeds: means and t intervals by hand, claims by seed, the notebook, and the command,
which goes on after a kill."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pandas
import pytest
from helpers import warm
from helpers.study import FEW_ROWS, LITTLE

from bpo import __main__, params
from bpo.__main__ import main
from bpo.evaluation import claims, comparison, replication
from bpo.params import Refusal, Replication
from bpo.reports import readme
from bpo.reports.tables import summary
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.results import OPEN, Estimate, Result


def level(value, half=0.02, **rest):
    return Estimate(value, value - half, value + half, 40, **rest)


def seeded(study, gain, *, seed=0, metrics=("chair_i", "cover", "p_true")):
    """A study whose bpo gains `gain` in every metric against base and sft_matched."""
    for notebook in ("1_noise_probability", claims.COMPARISON):
        folder = stages.stage_folder(study, notebook)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stages.MANIFEST).write_text(json.dumps({
            "study": study, "stage": notebook, "device": "CPU", "commit": "abc", "seconds": 1.0,
            "finished": "2026-01-01", "inputs": {"truth": f"{seed}" * 64}, "outputs": {},
            "modules": {"bpo.models.noise": f"{gain}"}, "versions": {"torch": "2"}, "metrics": {},
            "parameters": {"seed": seed, "question": ""}}))
    results.write(stages.stage_folder(study, "1_noise_probability"), [
        Result("step 999", "noise", "base", "step 0", f"p_{n}", level(v, p=0.001,
                                                                      more_is_better=v < 0))
        for n, v in (("true", -0.2), ("prior", 0.2))] + [  # of which no claim speaks
        Result("step 999", "fade", "base", "step 0", f"p_{n}", level(-v, p=0.001,
                                                                     more_is_better=v < 0))
        for n, v in (("true", -0.2), ("prior", 0.2))])
    rows = []
    for metric in metrics:
        _, category, more = comparison.METRICS[metric]
        change = gain if more else -gain
        for against in ("", "base", "sft_matched"):
            estimate = level(0.5 + change) if not against else level(change, p=0.001)
            rows.append(Result("counterfactual", category, "bpo", against, metric, Estimate(
                *(getattr(estimate, n) for n in ("value", "low", "high", "n", "p")),
                more_is_better=more)))
    results.write(stages.stage_folder(study, claims.COMPARISON), rows)


@pytest.fixture
def three(outputs):
    """Seeds 0 to 2: the first gains, the second gains less, the third loses."""
    for seed, gain in enumerate((0.1, 0.05, -0.06)):
        seeded("mine" if not seed else f"mine-seed{seed}", gain, seed=seed)
    return replication.by_seed(Replication(study="mine"))


def only(frame, **wanted):
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    row, = frame.to_dict("records")
    return row


@pytest.mark.parametrize("text, found", [
    ("3", [7, 8, 9]), ("100-102", [100, 101, 102]), ("100,103", [100, 103]), ("5,7,", [5, 7])])
def test_seeds_are_a_count_a_range_or_a_list(text, found):
    assert replication.seeds(text, 7) == found


def test_each_seed_is_a_study_and_the_study_s_own_seed_the_study_itself():
    assert replication.studies("tiny", [0, 1, 100], 0) == {
        0: "tiny", 1: "tiny-seed1", 100: "tiny-seed100"}


def test_the_seeds_are_those_named_else_those_stored_else_all_that_are_there(three):
    assert three == {0: "mine", 1: "mine-seed1", 2: "mine-seed2"}
    two = replication.by_seed(Replication(study="mine", studies=["mine-seed2", "mine-seed1"]))
    assert list(two) == [1, 2]
    replication.store("mine", replication.read(two))
    assert replication.by_seed(Replication(study="mine")) == two
    shutil.rmtree(stages.stage_folder("mine-seed2", claims.COMPARISON))
    shutil.rmtree(stages.stage_folder("mine-seed2", "1_noise_probability").parent)
    assert list(replication.by_seed(Replication(study="mine"))) == [0, 1]


def test_the_interval_over_seeds_is_student_s(outputs):
    for seed, gain in enumerate((1.0, 2.0, 4.0, 5.0)):
        seeded(f"s{seed}", gain, seed=seed)
    frame = replication.read({s: f"s{s}" for s in range(4)})
    row = only(replication.over_seeds(frame), metric="cover", against="base")
    # mean 3, s = sqrt((4 + 1 + 1 + 4) / 3), t(0.975, 3) = 3.1824 in any table
    half = 3.1824 * math.sqrt(10 / 3) / math.sqrt(4)
    assert row["value"] == 3 and row["seeds"] == 4
    assert (row["low"], row["high"]) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    # t = 3 / sqrt(10 / 3 / 4) = 3.286 of 3 degrees: between .05 (3.182) and .04 (3.482)
    assert 0.04 < row["p"] < 0.05


def test_two_seeds_have_a_mean_and_no_interval(three):
    frame = replication.read({s: three[s] for s in (0, 1)})
    row = only(replication.over_seeds(frame), metric="cover", against="base")
    assert row["value"] == pytest.approx(0.075) and math.isnan(row["low"])


def test_a_measure_that_one_seed_lacks_is_left_out(three):
    seeded("mine-seed1", 0.05, seed=1, metrics=("cover",))
    over = replication.over_seeds(replication.read(three))
    assert set(over.loc[over["against"] == "base", "metric"]) == {"cover"}


def test_rows_of_the_forest_are_the_seeds_and_their_mean(three):
    rows = replication.seed_rows(replication.read(three), "chair_i", where="counterfactual",
                                 against="base")
    assert list(rows["label"]) == ["seed 0", "seed 1", "seed 2", "mean"]
    assert list(rows["value"]) == pytest.approx([-0.1, -0.05, 0.06, -0.03])
    assert list(rows["low"])[:3] == pytest.approx([-0.12, -0.07, 0.04])


def test_claims_by_seeds_are_a_matrix_of_signs(three):
    verdicts = replication.claims_over(replication.read(three))
    row = only(verdicts, claim="2", decides="counterfactual: CHAIRi")
    assert [row[str(s)] for s in three] == ["+", "+", "−"]
    # mean of .1, .05, -.06 with s = .0819, t(.975, 2) = 4.303
    assert (row["difference"], row["verdict"]) == ("−0.030 [−0.233, +0.173]", OPEN)
    assert only(verdicts, claim="1", decides="step 999: P(true answer)")["verdict"] == "holds"
    assert only(verdicts, claim="4")["verdict"] == claims.UNMEASURED


# --- power --------------------------------------------------------------------------------------

@pytest.mark.parametrize("seeds, power", [(5, 0.37), (12, 0.85)])
def test_power_is_that_of_the_paired_t_test(seeds, power):
    assert replication.power(0.01, 0.0105, seeds) == pytest.approx(power, abs=0.005)


def test_the_seeds_needed_are_the_fewest_with_power(outputs):
    needed = replication.seeds_needed(0.01, 0.0105)
    assert replication.power(0.01, 0.0105, needed - 1) < 0.8 <= replication.power(
        0.01, 0.0105, needed)
    assert replication.seeds_needed(0.01, 0.0) == 2
    assert replication.seeds_needed(0.0001, 0.0105) is None


def test_spread_between_seeds_is_parted_from_that_of_images(three):
    s = replication.spread(replication.read(three), "cover", against="base",
                           where="counterfactual")
    # of .1, .05, -.06: s² = .0067; each interval is .04 wide: image² = (.04 / 3.92)²
    assert s["total"] ** 2 == pytest.approx(0.0067)
    assert s["image"] == pytest.approx(0.04 / 3.92)
    assert s["seed"] ** 2 == pytest.approx(0.0067 - (0.04 / 3.92) ** 2)


def test_more_images_help_only_where_images_are_what_spreads(outputs):
    for seed, gain in enumerate((0.01, 0.011, 0.009)):
        seeded(f"s{seed}", gain, seed=seed)
    frame = replication.read({s: f"s{s}" for s in range(3)})
    row = summary.power(frame, Replication(study="s", metrics=["cover"])).iloc[0]
    # seeds spread by .001, less than the .0102 of images: all of it falls with images
    assert [row[f"seeds, images × {k}"] for k in (1, 2, 4)] == [
        replication.seeds_needed(0.01, 0.04 / 3.92 / k**0.5) for k in (1, 2, 4)]


def test_power_of_two_seeds_is_refused(three, capsys):
    shutil.rmtree(stages.stage_folder("mine-seed2", claims.COMPARISON).parent)
    assert main(["power", "mine", "--metric", "cover", "--difference", "0.02"]) == 1
    assert "2 seeds have it, and a spread between seeds needs 3" in capsys.readouterr().err
    assert main(["power", "mine", "--metric", "hal"]) == 1
    assert "no seed of mine compares hal with base, sft_matched" in capsys.readouterr().err


def test_power_is_a_command(three, capsys):
    assert main(["power", "mine", "--metric", "cover", "--difference", "0.1"]) == 0
    told = capsys.readouterr().out
    assert "sft_matched" in told and "true difference 0.1" in told


def test_what_two_studies_did_differently_is_listed(three):
    rows = replication.settings_that_differ("mine", "mine-seed1")
    named = {(r.what, r.name) for r in rows.itertuples()}
    assert named == {("parameters", "seed"), ("inputs", "truth"), ("modules", "bpo.models.noise")}
    shared, apart = replication.side_by_side("mine", "mine-seed2", baselines=["base"])
    assert set(shared["method"]) == {"bpo", "bpo − base"} and apart == len(shared) == 6
    assert only(shared, metric="CHAIRi", method="bpo − base")["mine"] == "−0.100 [−0.120, −0.080]"


def test_a_seed_without_a_comparison_and_a_seed_twice_are_refused(three, outputs):
    with pytest.raises(Refusal, match="study other has no finished comparison; python -m bpo repl"):
        replication.by_seed(Replication(study="mine", studies=["mine", "other"]))
    seeded("mine-seed2", 0.1, seed=1)
    with pytest.raises(Refusal, match="mine-seed1 and mine-seed2 both have seed 1"):
        replication.by_seed(Replication(study="mine"))


def test_a_section_is_replaced_where_it_stands_and_the_rest_is_left(outputs):
    outputs.mkdir()
    file = readme.write_section("speed", "first")
    assert file == outputs / "README.md"
    assert file.read_text() == "# Results\n\n<!-- speed -->\nfirst\n<!-- /speed -->\n"
    file.write_text(f"# Mine\n\nbefore\n{file.read_text()[11:]}\nafter\n", encoding="utf-8")
    readme.write_section("speed", r"| \* | − |")
    assert file.read_text(encoding="utf-8") == (
        "# Mine\n\nbefore\n<!-- speed -->\n| \\* | − |\n<!-- /speed -->\n\nafter\n")
    readme.write_section("results other", "second")
    assert file.read_text().endswith("after\n\n<!-- results other -->\nsecond\n"
                                     "<!-- /results other -->\n")


def test_what_is_stored_makes_the_readmes_tables(three, outputs):
    (outputs.parent / "README.md").write_text(
        "# Kit\n\n<!-- results mine -->\n<!-- /results mine -->\n\nrest\n", encoding="utf-8")
    stored = replication.store("mine", replication.read(three))
    before = stored.read_bytes()
    assert replication.store("mine", replication.read(three)).read_bytes() == before
    for study in three.values():  # the tables need no study, only what is stored
        shutil.rmtree(outputs / study)
    assert main(["results", "mine"]) == 0
    text = (outputs / "README.md").read_text(encoding="utf-8")
    assert "### `bpo replicate mine`: 3 seeds, 0 to 2" in text
    assert ("| 2 | Says as much | bpo − base | counterfactual: cover | ++− | "
            f"+0.030 [−0.173, +0.233] | {OPEN} |") in text
    assert "| counterfactual: cover | 0.530 |" in text
    assert "**Does BPO make the model look at the picture? No difference seen.**" in text
    # the list beside it: words by the intervals over seeds
    text = (outputs.parent / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Kit") and text.endswith("\nrest\n")
    assert "P(true answer) falls (−0.200 [−0.200, −0.200])" in text
    assert "**bpo − base**: no difference seen in CHAIRi (−0.030 [−0.233, +0.173])" in text
    assert main(["results", "other"]) == 1


def test_one_run_is_stored_and_told_with_its_own_intervals(outputs):
    seeded("mine", 0.1, seed=7)
    assert main(["results", "mine"]) == 0
    text = (outputs / "README.md").read_text(encoding="utf-8")
    assert "### `bpo run mine`: one run, seed 7\n" in text
    assert ("| 2 | Says as much | bpo − base | counterfactual: cover, n=40 | "
            "+0.100 [+0.080, +0.120] | holds |") in text
    seeded("mine", -0.1, seed=7)  # it ran again
    assert main(["results", "mine"]) == 0
    assert "−0.100 [−0.120, −0.080] | does not hold |" in (outputs / "README.md").read_text()
    seeded("mine-seed8", 0.1, seed=8)
    replication.store("mine", replication.read({7: "mine", 8: "mine-seed8"}))
    assert main(["results", "mine"]) == 0  # a run leaves what several seeds stored
    text = (outputs / "README.md").read_text(encoding="utf-8")
    assert "### `bpo replicate mine`: 2 seeds, 7 to 8" in text
    assert "a spread between seeds needs 3" in text and "| contrast: bpo | 0.500 |" in text


def test_methods_are_compared_with_any_other_one(three, outputs):
    frame = replication.read(three)
    levels = frame[(frame["method"] == "bpo") & (frame["against"] == "")]
    other = levels.assign(method="bpo_other", value=levels["value"] - (levels["seed"] + 1) / 10)
    base = levels.assign(method="base")
    work = [levels.drop_duplicates("seed").assign(
        notebook="3_dpo_training", split_or_benchmark="training", category="", method=method,
        metric=replication.WORK, value=value)
        for method, value in (("bpo", 4e9), ("bpo_other", 1e9))]
    replication.store("mine", pandas.concat([frame, base, other, *work]))
    assert main(["results", "mine", "--against", "bpo"]) == 0
    text = (outputs / "README.md").read_text(encoding="utf-8")
    assert "<!-- results mine --against bpo -->\n| metric | bpo_other |\n" in text
    assert "| *mine, 3 seeds, 0 to 2: bpo CHAIRi 0.470, cover 0.530, " in text
    assert "| work of a step / that of bpo | 0.25 |" in text
    # -.1, -.2, -.3: s = .1, t(0.975, 2) = 4.3027, so +- .248
    assert "| counterfactual: cover | −0.200 [−0.448, +0.048] |" in text
    assert main(["results", "mine", "--against", "bpo_third"]) == 1


def test_words_follow_the_intervals(outputs):
    for seed, gain in enumerate((0.1, 0.11, 0.12)):
        seeded(f"s{seed}", gain, seed=seed)
    mean = replication.over_seeds(replication.read({s: f"s{s}" for s in range(3)}))
    text = readme.found(mean, "3 seeds")
    assert "2. **bpo − base**: CHAIRi falls (−0.110 [−0.135, −0.085]); cover rises (+0.110" in text
    assert "bpo_weaken" not in text and "Harm" not in text  # which nobody measured
    assert summary.headline(mean, 3).plain == (
        "Over 3 seeds, bpo − base: CHAIRi falls (−0.110 [−0.135, −0.085]); cover rises (+0.110 "
        "[+0.085, +0.135]); P(true answer) rises (+0.110 [+0.085, +0.135]). bpo − sft_matched: "
        "CHAIRi falls (−0.110 [−0.135, −0.085]); cover rises (+0.110 [+0.085, +0.135]); P(true "
        "answer) rises (+0.110 [+0.085, +0.135]).")
    two = replication.over_seeds(replication.read({s: f"s{s}" for s in range(2)}))
    assert readme.found(two, "2 seeds") == "2 seeds: too few for an interval."
    assert "2 seeds are too few" in summary.headline(two, 2).plain


def test_the_steps_from_base_to_method(outputs):
    rows = [Result("counterfactual", "attribute", method, against, metric, level(value))
            for metric in summary.STEPS for method, against, value in (
                ("base", "", 0.4), ("sft", "", 0.42), ("sft", "base", 0.02),
                ("sft_matched", "", 0.45), ("sft_matched", "sft", 0.03), ("bpo", "", 0.46),
                ("bpo", "sft_matched", 0.01), ("bpo_weaken", "", 0.5))]
    folder = stages.stage_folder("mine", claims.COMPARISON)
    folder.mkdir(parents=True)
    (folder / stages.MANIFEST).write_text("{}")
    results.write(folder, rows)
    table = summary.steps(results.of_study("mine"))
    # bpo_weaken has no matched SFT here
    assert list(table["step"]) == ["base", "fresh positives: sft", "its own rows: sft_matched",
                                   "contrast: bpo"]
    assert list(table["CHAIRi, change"]) == [
        "–", "+0.020 [0.000, +0.040]", "+0.030 [+0.010, +0.050]", "+0.010 [−0.010, +0.030]"]
    assert "above the base as certain" not in table
    results.write(folder, [*rows, Result("counterfactual", "sharpening", "bpo", claims.SHARPENED,
                                         "p_true", level(0.04))])
    assert list(summary.steps(results.of_study("mine"))["above the base as certain"]) == [
        "–", "–", "–", "+0.040 [+0.020, +0.060]"]


def test_every_dpo_method_is_set_beside_the_base_and_its_own_sft(outputs):
    rows = [{"split_or_benchmark": "counterfactual", "notebook": claims.COMPARISON, "category": "x",
             "method": m, "against": against, "metric": "p_true", "value": value,
             "low": value - 0.01, "high": value + 0.01, "more_is_better": True}
            for m, against, value in (
                ("bpo", "", 0.5), ("bpo", "base", 0.1), ("bpo", "sft", 0.3),
                ("bpo", "sft_matched", 0.02), ("bpo_noise_9", "base", 0.2),
                ("bpo_noise_9", "sft_noise_9", -0.03), ("bpo_noise_9", claims.SHARPENED, 0.4),
                ("sft_matched", "base", 0.08))]
    table = {
        "method": ["bpo", "bpo_noise_9"],
        "P(true answer), − base": ["+0.100 [+0.090, +0.110] better",
                                   "+0.200 [+0.190, +0.210] better"],
        "P(true answer), − own SFT": ["+0.020 [+0.010, +0.030] better",
                                      "−0.030 [−0.040, −0.020] worse"]}
    assert readme.by_method(pandas.DataFrame(rows)).to_dict("list") == table
    # by how much training widened the gap between chosen and rejected, where that is stored
    rows += [{"split_or_benchmark": "training", "notebook": "3_dpo_training", "category": "",
              "method": "bpo", "against": "", "metric": metric, "value": value}
             for metric, value in (("chosen_change", 0.5), ("rejected_change", -6.25))]
    assert readme.by_method(pandas.DataFrame(rows)).to_dict("list") == table | {
        "margin growth, nats": ["6.8", "–"]}


# --- the commands -------------------------------------------------------------------------------

@pytest.mark.slow
def test_compare_writes_a_page_of_two_studies(three, outputs, capsys, warm_launches):
    assert main(["compare", "mine", "mine-seed1"]) == 0
    text = (outputs / "mine" / "against-mine-seed1.html").read_text(encoding="utf-8")
    assert "What mine and mine-seed1 did differently" in text and "bpo.models.noise" in text
    assert "against-mine-seed1.html" in (outputs / "mine" / "index.html").read_text()
    assert main(["compare", "mine", "nothing"]) == 1
    assert "outputs/nothing: nothing has finished there" in capsys.readouterr().err


@pytest.fixture
def ran(monkeypatch, outputs):
    """What `replicate` runs, without running it: each notebook leaves what `seeded` does."""
    did = []

    def execute(notebook, p, folder, *, name=""):
        did.append(f"{p.study} {p.seed} {notebook[0]}")
        if notebook.startswith("4"):
            seeded(p.study, 0.1, seed=p.seed)
        return True

    monkeypatch.setattr(__main__, "_execute", execute)
    return did


def test_every_seed_is_a_study_of_its_own_then_notebook_7_reads_them(ran, outputs, capsys):
    assert main(["replicate", "tiny", "--seeds", "3", "-p", "beta", "0.3"]) == 0
    every = [n[0] for n in params.study_files("tiny")]
    assert ran == [f"{study} {seed} {n}" for study, seed in (
        ("tiny", 0), ("tiny-seed1", 1), ("tiny-seed2", 2)) for n in every] + ["tiny 0 7"]
    assert "— seed 2: study tiny-seed2" in capsys.readouterr().out
    assert set(replication.stored("tiny")["seed"]) == {0, 1, 2}


def test_a_range_of_seeds_leaves_the_study_itself_out(ran, outputs, monkeypatch):
    seeded("tiny", 0.1)
    seeded("tiny-seed3", 0.1, seed=3)
    assert main(["replicate", "tiny", "--seeds", "100-101"]) == 0
    assert {x.split()[0] for x in ran} == {"tiny-seed100", "tiny-seed101", "tiny"}
    assert [x for x in ran if x.startswith("tiny ")] == ["tiny 0 7"]
    assert list(replication.by_seed(Replication(study="tiny"))) == [100, 101]


def test_two_jobs_are_two_processes_with_a_log_each(ran, outputs, monkeypatch):
    """Each process leaves what the run that follows then finds."""
    commands = []

    def process(command, *, stdout, stderr):
        commands.append(command[3:])
        stdout.write(b"did it")

    monkeypatch.setattr(subprocess, "run", process)
    assert main(["replicate", "tiny", "--seeds", "7,9", "--jobs", "2", "-p", "beta", "0.3"]) == 0
    assert sorted(commands) == [
        ["run", "tiny", "--as", f"tiny-seed{s}", "-p", "beta", "0.3", "-p", "seed", f"{s}"]
        for s in (7, 9)]
    assert (outputs / "tiny-seed9.log").read_text() == "did it"


def test_a_seed_that_fails_stops_the_replication(ran, monkeypatch, outputs, capsys):
    monkeypatch.setattr(__main__, "_execute", lambda n, p, folder: ran.append(p.seed)
                        or not (p.seed == 1 and n.startswith("3")))
    assert main(["replicate", "tiny", "--seeds", "3"]) == 1
    assert 2 not in ran
    text = capsys.readouterr().err
    assert "seed 1 (study tiny-seed1) failed, so the replication stopped" in text
    assert "give the same command again" in text


@pytest.mark.parametrize("arguments, words", [
    (["-p", "seed", "4"], "-p seed: replicate sets seed itself"),
    (["-p", "study", "x"], "-p study: replicate sets study itself"),
    (["--seeds", "1"], "needs at least 2 seeds"),
    (["--seeds", "4,4"], "needs at least 2 seeds, each once"),
    (["--seeds", "7-5"], "needs at least 2 seeds"),
    (["--seeds", "ten"], "give a count (5), a range (100-111) or a list (100,103)"),
    (["-p", "bta", "1"], "no notebook of study tiny has this parameter")])
def test_what_cannot_be_replicated_is_refused(arguments, words, ran, outputs, capsys):
    assert main(["replicate", "tiny", *arguments]) == 1
    assert words in capsys.readouterr().err and not ran


# `bpo replicate` with stages in the process itself: kernels are `test_notebooks`'s to kill.
REPLICATE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from helpers.study import without_a_kernel
from bpo import __main__
execute = __main__._execute
__main__._execute = lambda notebook, *rest, **named: (
    execute if notebook.startswith("7_") else without_a_kernel)(notebook, *rest, **named)
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_replication_that_is_killed_goes_on(tmp_path, little_study):
    study = "tiny-selection"
    shutil.copytree(little_study / "0_tiny_world", tmp_path / study / "0_tiny_world")
    # A study without notebooks 1 and 5, which take as long and say the same about going on.
    little = {n: v for n, v in LITTLE.items() if n not in ("noise_steps", "probe_rows")} | {
        "methods": "[sft, bpo]", "steps": 2} | FEW_ROWS
    overrides = [x for n, v in little.items() for x in ("-p", n, str(v))]
    command = ["-c", REPLICATE, str(Path(helpers.__file__).parents[1]),
               "replicate", study, "--seeds", "2", *overrides]
    environment = {**os.environ, "BPO_OUTPUTS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, *command], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pairs = tmp_path / study / "2_pair_generation" / stages.MANIFEST
    try:
        while not pairs.is_file():
            assert process.poll() is None, "the replication ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    finished = [tmp_path / s / n / stages.MANIFEST
                for s, n in ((study, "0_tiny_world"), (study, "2_pair_generation"))]
    before = {f: f.stat().st_mtime_ns for f in finished}
    done = subprocess.run([warm.python(), *command], env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {f: f.stat().st_mtime_ns for f in finished}  # those were only read
    assert not list(tmp_path.glob("*/*.old-*"))
    table = pandas.read_csv(tmp_path / study / replication.TABLE, keep_default_na=False)
    cover = table.query("split_or_benchmark == 'counterfactual' and method == 'bpo' and "
                        "against == '' and metric == 'cover'").iloc[0]
    values = [json.loads((tmp_path / s / claims.COMPARISON / stages.MANIFEST).read_text())
              ["metrics"]["counterfactual"]["bpo"]["cover"]["value"]
              for s in (study, f"{study}-seed1")]
    assert cover["value"] == pytest.approx(sum(values) / 2, abs=1e-6) and cover["seeds"] == 2
    index = (tmp_path / study / "index.html").read_text()
    assert "7_replication.html" in index and "2 seeds are too few for an interval" in index
