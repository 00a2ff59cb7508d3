"""The command line: what it checks, what it refuses, and in which words."""

import re
import shutil

import papermill
import pytest

from bpo import __main__, check, params
from bpo.__main__ import main
from bpo.params import Refusal
from bpo.reports import page as report
from bpo.study import stage as stages
from bpo.tiny import prior


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(stages, "LOCK_PATIENCE", 0.1)
    return tmp_path


def test_check_of_the_tiny_study_finds_everything(capsys):
    assert main(["check", "tiny"]) == 0
    told = capsys.readouterr().out
    for notebook in params.study_files("tiny"):
        assert f"params/tiny/{notebook}.yaml" in told
    assert "written by 0_tiny_world" in told


NOT_THERE = ["-p", "model", "data/not-there", "-p", "data", "data/not-there/rows.json"]


def test_check_names_what_a_real_study_lacks(capsys):
    assert main(["check", "llava-1.5-7b", *NOT_THERE]) == 1
    told = capsys.readouterr()
    assert "MISSING" in told.out and "data/not-there/rows.json" in told.out
    assert "get them, or set the parameters" in told.err


def test_check_reads_overrides_and_refuses_bad_ones(capsys):
    assert main(["check", "tiny", "-p", "beta", "-1"]) == 1
    assert "beta: must be greater than 0, is -1" in capsys.readouterr().err
    assert main(["check", "tiny", "-p", "batch_pair", "8"]) == 1
    assert "no notebook of study tiny has this parameter" in capsys.readouterr().err


def test_check_finds_the_probe_rows_and_each_benchmark_of_notebook_5(capsys):
    assert main(["check", "tiny"]) == 0
    told = capsys.readouterr().out
    for name in ("chair", "object-halbench", "pope", "amber"):
        assert re.search(rf"folders\.{name} .*/benchmarks/{name}  written by 0_tiny_world", told)
    assert re.search(r"probe_data .*counterfactual/rows.json  written by 0_tiny_world", told)
    assert "probe_data" not in dict(check.paths(
        params.Benchmarks(probe_data=""))).keys()


def test_files_that_a_benchmark_lacks_are_named_before_anything_runs(tmp_path, outputs, capsys):
    folder = tmp_path / "pope"
    folder.mkdir()
    (folder / "coco_pope_random.json").write_text("")
    mine = ["-p", "folders", f"{{pope: {folder}}}"]
    for command in ("check", "run"):
        assert main([command, "tiny", *mine]) == 1
        told = "".join(capsys.readouterr())
        assert "lacks coco_pope_popular.json, coco_pope_adversarial.json, val2014/" in told
        assert "get the question files of POPE" in told
    assert not (outputs / "tiny").exists()


def test_half_a_benchmark_that_a_notebook_of_the_study_writes_stops_nothing(outputs, capsys):
    (outputs / "tiny" / "0_tiny_world" / "benchmarks" / "pope").mkdir(parents=True)
    assert main(["check", "tiny"]) == 0
    assert "lacks" not in capsys.readouterr().out


def test_a_real_study_without_its_files_is_refused_before_anything_runs(capsys, outputs):
    assert main(["run", "llava-1.5-7b", *NOT_THERE]) == 1
    told = capsys.readouterr().err
    assert "missing, so nothing was run" in told and "data/not-there/rows.json" in told
    assert not list(outputs.iterdir())


@pytest.mark.parametrize("arguments, words", [
    (["run", "tinny"], "no such study"),
    (["run", "tiny", "--only", "9"], "has no such notebook"),
    (["report", "tiny"], "no notebook was executed here yet"),
    (["stage", "tiny-prior", "6"], "no stage 6 for this command; it has none: run its notebooks"),
    (["stage", "tiny", "0"], "it has 1_noise_probability, 2_pair_generation, 3_dpo_training, "
                             "4_qualitative_comparison, 5_benchmarks"),
    (["stage", "tiny", "5"], "0_tiny_world"),
    (["replicate", "tiny-prior"], "study tiny-prior has no 4_qualitative_comparison.yaml"),
    (["score", "chair", "--answers", "x.json", "--truth", "y.json"], "y.json: there is no such"),
    (["run", "tiny-round-2"], "MISSING: python -m bpo merge tiny --method bpo"),
    (["run", "tiny-round-2"], "MISSING: python -m bpo run tiny --only 0"),
    (["stage", "tiny-round-2", "2"], "is not there yet: python -m bpo merge tiny --method bpo"),
    (["run", "tiny", "--as", "../elsewhere"], "study"),
])
def test_refusals_are_sentences(arguments, words, capsys):
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


def test_two_runs_of_one_study_at_once_are_refused(capsys, outputs):
    (outputs / "tiny").mkdir()
    with stages.locked(outputs / "tiny" / ".run.lock", "unused"):
        assert main(["run", "tiny", "--only", "0"]) == 1
    assert "is being run by another process" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, did", [
    ([], "012345"), (["--from", "4"], "45"), (["--only", "3"], "3")])
def test_run_takes_the_chosen_notebooks_in_order(arguments, did, monkeypatch):
    ran = []
    monkeypatch.setattr(__main__, "_execute", lambda n, *_: ran.append(n[0]) or True)
    assert main(["run", "tiny", *arguments]) == 0 and "".join(ran) == did


def test_a_notebook_that_fails_ends_the_run(monkeypatch, outputs):
    ran = []
    monkeypatch.setattr(__main__, "_execute", lambda n, *_: ran.append(n[0]) or n[0] != "1")
    assert main(["run", "tiny"]) == 1 and ran == ["0", "1"]
    assert (outputs / "tiny" / "index.html").is_file()


def test_a_notebook_is_left_as_it_was_only_while_its_stage_is_up_to_date(outputs, monkeypatch,
                                                                         capsys):
    def execute(source, executed, **_):
        shutil.copy(source, executed)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(report, "bears_stamp", lambda *_: True)
    name, page = "6_where_the_prior_comes_from", outputs / "tiny-prior" / "index.html"
    for done, as_it_was in ((None, False), (Refusal("stale"), False), ("fresh", True)):
        def stage(p, done=done):
            if isinstance(done, Refusal):
                raise done

        monkeypatch.setattr(prior, "run", stage)
        assert main(["run", "tiny-prior"]) == 0
        assert (f"— {name}: as it was" in capsys.readouterr().out) == as_it_was
        assert page.with_name(f"{name}.html").is_file() and page.is_file()


def test_score_has_its_own_options(capsys):
    with pytest.raises(SystemExit) as left:
        main(["score", "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "--answers" in told and "--truth" in told and "pope" in told


def test_every_stage_and_every_command_of_another_module_has_that_module():
    for module, _ in __main__.MODULES.values():
        assert (params.ROOT / "bpo" / f"{module.replace('.', '/')}.py").is_file()
    for number, module in __main__.STAGES.items():
        assert (params.ROOT / "bpo" / f"{module.replace('.', '/')}.py").is_file()
        assert any(n.startswith(f"{number}_") for n in params.SCHEMAS)
