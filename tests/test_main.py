"""The command line: what it checks, what it refuses, and in which words."""

import pytest

from bpo import __main__, params, rounds, runs
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


def test_rounds_without_their_method_are_refused_before_anything_runs(capsys, outputs):
    for command in ("run", "check"):
        assert main([command, "tiny", "-p", "rounds", "2", "-p", "methods", "[sft]"]) == 1
        told = capsys.readouterr()
        assert "add bpo or set rounds to 1" in told.err and not told.out
    assert not list(outputs.iterdir())


@pytest.fixture
def ran(monkeypatch, outputs):
    """What `run` does in order, without doing it."""
    did = []

    def merge(before, after):
        before, after = (p["3_dpo_training"].study for p in (before, after))
        (outputs / after).mkdir()
        did.append(f"merge {before} for {after}")

    monkeypatch.setattr(__main__, "_execute",
                        lambda notebook, p, folder: did.append(f"{p.study} {notebook[0]}") or True)
    monkeypatch.setattr(rounds, "merge", merge)
    monkeypatch.setattr(rounds, "write",
                        lambda study, *, rounds: did.append(f"table {study} {rounds}") or [])
    return did


LATER = ["merge x for x.round-2", "x.round-2 2", "x.round-2 3", "x.round-2 4",
         "merge x.round-2 for x.round-3", "x.round-3 2", "x.round-3 3", "x.round-3 4", "table x 3"]


def test_later_rounds_follow_the_study_each_from_the_one_before(ran):
    assert main(["run", "tiny", "--as", "x", "-p", "rounds", "3"]) == 0
    assert ran == ["x 0", "x 1", "x 2", "x 3", "x 4", *LATER]


def test_from_starts_the_study_later_and_leaves_the_later_rounds_whole(ran):
    assert main(["run", "tiny", "--as", "x", "-p", "rounds", "3", "--from", "4"]) == 0
    assert ran == ["x 4", *LATER]


def test_only_runs_one_notebook_and_no_later_round(ran):
    assert main(["run", "tiny", "--as", "x", "-p", "rounds", "3", "--only", "3"]) == 0
    assert ran == ["x 3"]


def test_a_notebook_that_fails_in_a_later_round_ends_the_run(ran, monkeypatch):
    monkeypatch.setattr(__main__, "_execute", lambda notebook, p, folder: ran.append(p.study)
                        or "round-2" not in p.study)
    assert main(["run", "tiny", "--as", "x", "-p", "rounds", "3", "--from", "4"]) == 1
    assert ran == ["x", "merge x for x.round-2", "x.round-2"]


def test_check_names_the_later_rounds(capsys, outputs):
    assert main(["check", "tiny", "-p", "rounds", "3"]) == 0
    told = capsys.readouterr().out
    assert "tiny.round-2" in told and "tiny.round-3" in told and "tiny.round-4" not in told
