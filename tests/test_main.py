"""The command line: what it checks, what it refuses, and in which words."""

import pytest

from bpo import params, runs
from bpo.__main__ import main


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(runs, "LOCK_PATIENCE", 0.1)
    return tmp_path


def test_check_of_the_tiny_study_finds_everything(capsys):
    assert main(["check", "tiny"]) == 0
    told = capsys.readouterr().out
    for notebook in params.SCHEMAS:
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


def test_a_real_study_without_its_files_is_refused_before_anything_runs(capsys, outputs):
    assert main(["run", "llava-1.5-7b", *NOT_THERE]) == 1
    told = capsys.readouterr().err
    assert "missing, so nothing was run" in told and "data/not-there/rows.json" in told
    assert not list(outputs.iterdir())


@pytest.mark.parametrize("arguments, words", [
    (["run", "tinny"], "no such study"),
    (["run", "tiny", "--only", "9"], "has no such notebook"),
    (["report", "tiny"], "no notebook was executed here yet"),
    (["run", "tiny", "--as", "../elsewhere"], "study"),
])
def test_refusals_are_sentences(arguments, words, capsys):
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


def test_two_runs_of_one_study_at_once_are_refused(capsys, outputs):
    (outputs / "tiny").mkdir()
    with runs.locked(outputs / "tiny" / ".run.lock", "unused"):
        assert main(["run", "tiny", "--only", "0"]) == 1
    assert "is being run by another process" in capsys.readouterr().err
