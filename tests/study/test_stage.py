"""Stages: done once, run again when something that shapes them changed, resumed, accounted for."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bpo.params import DPOTraining, PairGeneration, Refusal
from bpo.study import environment, files, launch, sources
from bpo.study import stage as stages


class Work:
    """Work that counts its calls and writes what it is told to."""

    def __init__(self, text="a line\n"):
        self.text, self.calls, self.found = text, 0, []

    def __call__(self, folder):
        self.calls += 1
        self.found = sorted(f.name for f in folder.iterdir() if f.name != stages.STARTED)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "pairs.jsonl").write_text(self.text)
        (folder / "sub" / "more.txt").write_text("more")
        return {"lines": 1}


class Killed(Exception):
    pass


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("[]")
    return file


@pytest.fixture
def run(outputs, data):
    """Runs the stage of notebook 3 with `work`; parameters by keyword."""
    def stage(work, inputs=None, **values):
        return stages.stage(DPOTraining(study="s", **values), work,
                            inputs={"data": data} if inputs is None else inputs)
    return stage


@pytest.fixture
def folder(outputs):
    return outputs / "s" / "3_dpo_training"


def asides(folder):
    return sorted(f.name for f in folder.parent.iterdir() if ".old-" in f.name)


def test_a_fresh_stage_is_computed_and_accounted_for(
        run, folder, data, capsys, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    environment.attention.add("of an earlier stage")
    work, part = Work(), torch.nn.Linear(1, 1)
    part.config = SimpleNamespace(_attn_implementation="sdpa")
    result = run(lambda folder: [work(folder), environment.noted(part)][0], beta=0.2)
    assert (work.calls, result.folder, result.metrics) == (1, folder, {"lines": 1})
    assert "no result yet" in result.done
    assert result.done in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == result.manifest
    assert manifest["parameters"]["beta"] == 0.2
    assert manifest["inputs"] == {"data": stages.file_hash(data)}
    assert manifest["modules"] == {}  # this file is none of the kit's
    assert set(manifest["outputs"]) == {"pairs.jsonl", "sub/more.txt"}
    assert result.facts()["differs from the defaults"] == "beta = 0.2"
    assert manifest["versions"].keys() >= {"torch", "transformers", "trl", "peft"}
    assert (manifest["attention"], manifest["cuda"]) == ("sdpa", torch.version.cuda)
    assert manifest["driver"] == "570.1" and result.facts()["kernels"].endswith("driver 570.1")
    assert not (folder / stages.STARTED).exists()


def test_an_up_to_date_stage_is_read_again(run, folder):
    work = Work()
    first = run(work)
    again = run(work)
    assert work.calls == 1
    assert again.done == "up to date, read again"
    assert again.manifest == first.manifest
    assert asides(folder) == []


def test_all_reasons_are_named_at_once(run, data):
    run(Work(), beta=0.1, steps=5)
    data.write_text("[1]")
    result = run(Work(), beta=0.3, steps=6)
    assert all(r in result.done for r in ("beta 0.1 -> 0.3", "steps 5 -> 6", "input data changed"))
    assert result.manifest["parameters"]["beta"] == 0.3


def test_an_input_that_is_gone_or_new_makes_a_stage_stale(run, data, tmp_path):
    truth = tmp_path / "truth.json"
    truth.write_text("{}")
    work = Work()
    run(work, inputs={"data": data})
    assert "input truth changed" in run(work, inputs={"data": data, "truth": truth}).done
    assert "found again" in run(work, inputs={"data": data}).done
    assert "input more changed" in run(work, inputs={"data": data, "more": truth}).done
    assert work.calls == 3


def test_changed_code_makes_a_stage_stale(run, monkeypatch):
    work = Work()
    run(work)
    monkeypatch.setattr(sources, "code", lambda module: {"bpo.shaping": "other"})
    assert "code of bpo.shaping changed" in run(work).done
    assert work.calls == 2


@pytest.mark.parametrize("name", ("pairs.jsonl", "sub/more.txt"))
def test_an_edited_or_deleted_result_makes_a_stage_stale(run, folder, name):
    work = Work()
    run(work)
    (folder / name).write_text("edited")
    assert f"{name} was changed after the stage had finished" in run(work).done
    (folder / name).unlink()
    assert f"{name} was changed after the stage had finished" in run(work).done
    assert work.calls == 3


def test_the_study_s_name_and_the_gallery_do_not_make_a_stage_stale(outputs, data):
    work = Work()
    stages.stage(PairGeneration(study="s"), work, inputs={"data": data})
    stages.stage(PairGeneration(study="s", gallery=9), work, inputs={"data": data})
    assert work.calls == 1
    (outputs / "s").rename(outputs / "t")
    stages.stage(PairGeneration(study="t"), work, inputs={"data": data})
    assert work.calls == 1


def test_the_old_folder_is_set_aside_and_never_deleted(run, folder):
    for number, beta in enumerate((0.1, 0.2, 0.3)):
        result = run(Work(text=f"{beta}"), beta=beta)
        assert len(asides(folder)) == number
    assert asides(folder) == ["3_dpo_training.old-1", "3_dpo_training.old-2"]
    assert "the old result is kept in 3_dpo_training.old-2" in result.done
    kept = {json.loads((folder.with_name(a) / "manifest.json").read_text())["parameters"]["beta"]:
            (folder.with_name(a) / "pairs.jsonl").read_text() for a in asides(folder)}
    assert kept == {0.1: "0.1", 0.2: "0.2"}
    assert (folder / "pairs.jsonl").read_text() == "0.3"


def interrupted(folder):
    (folder / "half.txt").write_text("half")
    raise Killed


def test_work_that_fails_leaves_no_manifest(run, folder):
    with pytest.raises(Killed):
        run(interrupted)
    assert (folder / "half.txt").exists()
    assert not (folder / "manifest.json").exists()


def test_interrupted_work_goes_on_in_its_folder(run, folder):
    with pytest.raises(Killed):
        run(interrupted, beta=0.2)
    work = Work()
    result = run(work, beta=0.2)
    assert work.found == ["half.txt"]
    assert result.done.endswith("from where it was interrupted")
    assert asides(folder) == []
    assert "half.txt" in result.manifest["outputs"]


def test_what_a_kill_left_under_a_temporary_name_is_no_part_of_the_result(run, folder, monkeypatch):
    def killed(self, target):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(folder), "unlink", lambda self, missing_ok=False: None)
        patch.setattr(type(folder), "replace", lambda self, target: killed(self, target)
                      if target.name == stages.MANIFEST else type(folder).rename(self, target))
        run(Work())
    left = folder / f".{stages.MANIFEST}.tmp"
    assert left.is_file()
    assert left.name not in run(Work()).manifest["outputs"]
    assert run(Work()).done == "up to date, read again"


def test_interrupted_work_of_other_parameters_is_set_aside(run, folder):
    with pytest.raises(Killed):
        run(interrupted, beta=0.2)
    work = Work()
    result = run(work, beta=0.3)
    assert work.found == []
    assert "an interrupted run had other parameters, inputs or code" in result.done
    assert (folder.with_name("3_dpo_training.old-1") / "half.txt").exists()


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes()
            for f in folder.rglob("*") if f.is_file()}


def test_earlier_results_are_found_again_and_nothing_is_lost(run, folder):
    before = {}
    for beta in (0.1, 0.2, 0.3):
        run(Work(f"{beta}"), beta=beta)
        before[beta] = contents(folder)
    work = Work()
    for beta in (0.1, 0.3, 0.2, 0.2, 0.1):
        again = run(work, beta=beta)
        assert contents(folder) == before[beta] and again.manifest["parameters"]["beta"] == beta
        others = {json.loads(c["manifest.json"])["parameters"]["beta"]: c for c in (
            contents(folder.with_name(a)) for a in asides(folder))}
        assert others == {b: c for b, c in before.items() if b != beta}
    assert work.calls == 0 and again.done.startswith("found again in 3_dpo_training.old-")
    assert "(what was here is kept in 3_dpo_training.old-" in again.done


def test_what_was_set_aside_comes_back_only_as_it_was_left(run, folder):
    run(Work(), beta=0.1)
    run(Work(), beta=0.2)
    (folder.with_name("3_dpo_training.old-1") / "pairs.jsonl").write_text("edited")
    work = Work()
    assert run(work, beta=0.1).done.startswith("computed, since beta 0.2 -> 0.1")
    assert work.calls == 1 and len(asides(folder)) == 2


def test_an_interrupted_rerun_is_neither_taken_for_the_old_result_nor_lost(run, folder):
    run(Work("old"), beta=0.1)
    with pytest.raises(Killed):
        run(interrupted, beta=0.2)
    again = Work()
    assert "found again" in run(again, beta=0.1).done
    assert (folder / "pairs.jsonl").read_text() == "old"
    assert run(again, beta=0.2).done.startswith("computed on from where it was interrupted")
    assert again.calls == 1 and again.found == ["half.txt"]


def test_timings_are_no_part_of_the_result(run, folder):
    def work(folder):
        (folder / stages.TIMINGS).write_text('{"bpo": 3.5}')
        return {}

    result = run(work)
    assert result.manifest["outputs"] == {}
    assert result.timings == {"bpo": 3.5}
    (folder / stages.TIMINGS).write_text('{"bpo": 4}')
    assert run(work).done == "up to date, read again"


def test_a_stage_that_is_only_read_is_not_computed(run, folder):
    work = Work()
    with stages.read_only():
        with pytest.raises(Refusal, match="3_dpo_training is not up to date: there was no result"):
            run(work)
        launch.start(DPOTraining(study="s", launch="--config_file none.yaml"))
    assert work.calls == 0 and not folder.exists()
    first = run(work, beta=0.1)
    with stages.read_only():
        assert run(work, beta=0.1).manifest == first.manifest
        with pytest.raises(Refusal, match="beta 0.1 -> 0.3"):
            run(work, beta=0.3)
    assert work.calls == 1 and asides(folder) == []


# --- inputs that other stages wrote -------------------------------------------------------------

@pytest.fixture
def earlier(outputs, data):
    """The folder of a finished notebook 2."""
    return stages.stage(PairGeneration(study="s"), Work(), inputs={"data": data}).folder


def test_a_stage_depends_on_what_an_earlier_one_wrote(run, earlier, data):
    work = Work()
    run(work, inputs={"pairs": earlier / "pairs.jsonl"})
    run(work, inputs={"pairs": earlier / "pairs.jsonl"})
    assert work.calls == 1
    stages.stage(PairGeneration(study="s", seed=5), Work("other"), inputs={"data": data})
    assert "input pairs changed" in run(work, inputs={"pairs": earlier / "pairs.jsonl"}).done
    # Back to the first pairs: both stages are found again, and none before its input is.
    assert run(work, inputs={"pairs": earlier / "pairs.jsonl"}).done.startswith("up to date")
    stages.stage(PairGeneration(study="s"), Work(), inputs={"data": data})
    assert "found again" in run(work, inputs={"pairs": earlier / "pairs.jsonl"}).done
    assert work.calls == 2


def test_an_edited_result_of_an_earlier_stage_is_refused_by_name(run, earlier):
    (earlier / "pairs.jsonl").write_text("edited")
    with pytest.raises(Refusal, match=r"pairs\.jsonl was changed after the stage that wrote it"):
        run(Work(), inputs={"pairs": earlier / "pairs.jsonl"})
    # The other file of that stage is as it was.
    assert run(Work(), inputs={"more": earlier / "sub"}).metrics == {"lines": 1}


def test_a_missing_earlier_stage_names_its_notebook(run, outputs):
    missing = outputs / "s" / "2_pair_generation" / "pairs.jsonl"
    with pytest.raises(Refusal, match=r"run notebooks/2_pair_generation\.ipynb first "
                                      r"\(python -m bpo run s --only 2\)"):
        run(Work(), inputs={"pairs": missing})


def test_an_unfinished_earlier_stage_is_no_input(run, outputs, data):
    with pytest.raises(Killed):
        stages.stage(PairGeneration(study="s"), interrupted, inputs={"data": data})
    with pytest.raises(Refusal, match="is not there yet"):
        run(Work(), inputs={"pairs": outputs / "s" / "2_pair_generation" / "half.txt"})


def test_a_file_that_the_earlier_stage_did_not_write_is_refused(run, earlier):
    with pytest.raises(Refusal, match="did not write this; it wrote pairs.jsonl, sub"):
        run(Work(), inputs={"pairs": earlier / "other.jsonl"})


def test_a_missing_input_is_refused(run, tmp_path, folder):
    with pytest.raises(Refusal, match="there is no such file or folder"):
        run(Work(), inputs={"model": tmp_path / "none"})
    assert not folder.parent.exists(), "a refusal left an empty study behind"


def test_a_folder_s_fingerprint_changes_with_names_and_contents(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    prints = [stages.fingerprint(folder)]
    (folder / "a").write_text("2")
    prints.append(stages.fingerprint(folder))
    (folder / "a").rename(folder / "b")
    prints.append(stages.fingerprint(folder))
    (folder / "c").write_text("")
    prints.append(stages.fingerprint(folder))
    assert len(set(prints)) == 4
    assert stages.fingerprint(folder) == prints[-1]


# --- what is read again -------------------------------------------------------------------------

@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are hashed, on a clock by which no file is fresh."""
    names, right = [], files.file_hash
    monkeypatch.setattr(files, "file_hash", lambda f: names.append(f.name) or right(f))
    now = time.time_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + 10**10)
    return names


@pytest.fixture
def study(outputs, data, tmp_path):
    """Runs notebook 2 on a file, then notebook 3 on its pairs, a model and two pictures."""
    for name in ("model/config.json", "model/more/weights", "images/a.png", "images/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    work = Work()

    def run():
        pairs = stages.stage(PairGeneration(study="s"), Work(), inputs={"data": data})
        return stages.stage(
            DPOTraining(study="s"), work,
            inputs={"pairs": pairs.folder / "pairs.jsonl", "model": tmp_path / "model"},
            pictures=lambda folder: {n: tmp_path / "images" / n for n in ("a.png", "b.png")})

    run.work = work
    return run


def test_a_study_is_not_read_again_while_sizes_and_times_stay(study, reads):
    study()
    assert sorted(reads) == sorted(
        ["rows.json", "config.json", "weights", "a.png", "b.png", *["pairs.jsonl", "more.txt"] * 2])
    reads.clear()
    assert study().done == "up to date, read again" and reads == []


@pytest.mark.parametrize("name", (
    "rows.json", "model/more/weights", "images/b.png", "outputs/s/2_pair_generation/pairs.jsonl",
    "outputs/s/3_dpo_training/sub/more.txt"))
def test_a_touched_file_is_read_once_and_a_changed_one_makes_its_stage_stale(
        study, reads, tmp_path, outputs, capsys, name):
    file = outputs.parent / name if name.startswith("outputs") else tmp_path / name
    first, text = study(), file.read_text()
    reads.clear()
    os.utime(file, (1, 1))
    assert study().manifest == first.manifest and reads == [file.name]
    study()
    assert study.work.calls == 1 and reads == [file.name]
    state = file.stat()
    file.write_text(text[:-1] + "~")  # as long as before, and as old
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    capsys.readouterr()
    study()
    said = capsys.readouterr().out
    assert "changed" in said and ("picture b.png changed" in said) == ("images" in name)


def test_a_copied_study_is_up_to_date_and_read_once(study, reads, outputs, tmp_path, monkeypatch):
    first = study()
    for place in ("elsewhere", "deep/below/it"):
        shutil.copytree(outputs, tmp_path / place, copy_function=shutil.copyfile)
        monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path / place))
        reads.clear()
        assert study().manifest == first.manifest
        assert sorted(reads) == ["more.txt"] * 2 + ["pairs.jsonl"] * 2
        reads.clear()
        assert study().manifest == first.manifest and reads == []
    assert study.work.calls == 1
    assert str(tmp_path) not in "".join(
        f.read_text() for f in tmp_path.glob("deep/below/it/s/**/*") if f.is_file())


@pytest.mark.parametrize("kept", (None, "", "[1]", '{"a": 3}'))
def test_without_the_list_of_hashes_all_is_read_once(study, reads, outputs, kept):
    study()
    reads.clear()
    file = outputs / "s" / stages.HASHES
    file.unlink() if kept is None else file.write_text(kept)
    assert study().done == "up to date, read again" and len(reads) == 9
    study()
    assert len(reads) == 9


def test_a_picture_that_is_gone_is_refused_by_name(study, tmp_path, outputs):
    study()
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(Refusal, match=r"images/a\.png: this picture is gone, and 3_dpo_training"):
        study()
    assert study.work.calls == 1 and asides(outputs / "s" / "3_dpo_training") == []


def test_a_file_that_has_just_changed_is_read_again(data, tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "time_ns", lambda: data.lstat().st_ctime_ns + 10**6)
    hashes = files.Hashes(tmp_path / "kept.json")
    data.write_text("[]")
    state = data.stat()
    first = hashes(data)
    data.write_text("{}")
    # as if within one tick of the file system's clock
    monkeypatch.setattr(type(data), "stat", lambda self, **_: state)
    assert hashes(data) != first and hashes.changed == set()


# --- hashes -------------------------------------------------------------------------------------

def test_a_file_s_hash_is_its_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert stages.file_hash(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_large_file_is_hashed_by_size_and_blocks(tmp_path):
    file = tmp_path / "large"
    size = 300 * 2**20
    with file.open("wb") as stream:
        stream.truncate(size)  # a sparse file: it takes no room
    empty = stages.file_hash(file)
    with file.open("r+b") as stream:
        stream.seek(size - 1)
        stream.write(b"x")
    assert stages.file_hash(file) != empty
    with file.open("r+b") as stream:
        stream.seek(size - 1)
        stream.write(b"\0")
        stream.truncate(size + 1)
    assert stages.file_hash(file) != empty


# --- two at once --------------------------------------------------------------------------------

@pytest.fixture
def impatient(monkeypatch):
    """Locks that are refused at once: the tests need not wait for what will not come."""
    monkeypatch.setattr(stages, "LOCK_PATIENCE", 0)


def test_a_second_run_of_a_study_is_refused(run, impatient):
    def work(folder):
        with pytest.raises(Refusal, match="study s is being computed by another run"):
            run(Work())
        return {"tried": True}

    assert run(work).metrics == {"tried": True}


HOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_s_lock_is_respected_and_ends_with_it(tmp_path, impatient):
    file = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Refusal, match="busy"), stages.locked(file, "busy"):
            pytest.fail("the lock was given twice")
    finally:
        holder.kill()
        holder.communicate()
    with stages.locked(file, "busy"):
        pass


def test_a_failure_frees_the_lock(run):
    with pytest.raises(Killed):
        run(interrupted)
    assert run(Work()).metrics == {"lines": 1}
