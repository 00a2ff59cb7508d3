"""Every hash of a study again: what was touched is named, and what was not is not."""

import importlib
import json
import subprocess
import sys

import pytest

from bpo import rounds, runs, verify
from bpo.__main__ import main
from bpo.params import DPOTraining, PairGeneration, Refusal, TinyWorld

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
PICTURE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB"


def written(files):
    """Work that writes files by name, bytes or text."""
    def work(folder):
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"files": len(files)}
    return work


def build(outputs, data, name="s"):
    """A study of three small stages with pages, as a run leaves it; its folder."""
    folder, modules = outputs / name, [importlib.import_module("bpo.noise")]
    runs.stage(TinyWorld(study=name), written({
        "model/config.json": "{}", "model/model.safetensors": b"weights",
        "counterfactual/images/1.png": PNG, "counterfactual/rows.json": "[1]"}),
        inputs={}, modules=modules)
    world = folder / "0_tiny_world"
    runs.stage(PairGeneration(study=name), written({"pairs.jsonl": '{"a": 1}\n'}), inputs={
        "data": data, "model": world / "model", "rows": world / "counterfactual" / "rows.json"},
        modules=modules)
    runs.stage(DPOTraining(study=name), written({
        "bpo/adapter/adapter_model.safetensors": b"\x00\x01adapter", "bpo/history.json": "[]",
        "bpo/adapter/README.md": "a card", "bpo/compute.json": "{}"}),
        inputs={"pairs": folder / "2_pair_generation" / "pairs.jsonl"}, modules=modules)
    (folder / "3_dpo_training" / runs.TIMINGS).write_text('{"bpo": 1}')
    for page in ("0_tiny_world.html", "2_pair_generation.html", "index.html"):
        (folder / page).write_text(f'<p>{page}<img src="{PICTURE}">')
    (folder / "2_pair_generation.ipynb").write_text(json.dumps({"cells": [PICTURE]}))
    verify.record(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "mine" / "rows.json"
    file.parent.mkdir()
    file.write_text("[]")
    return file


@pytest.fixture
def study(outputs, data):
    return build(outputs, data)


@pytest.fixture
def told(capsys):
    """Verifies a target by the command line: exit code and what was printed."""
    def tell(target="s"):
        capsys.readouterr()
        code = main(["verify", str(target)])
        return code, "".join(capsys.readouterr())
    return tell


def by_name(folder):
    return {line.name: line for line in verify.of_study(folder)}


def problems(folder):
    return [p for line in verify.of_study(folder) for p in line.problems]


def test_a_study_that_nobody_touched(study, told):
    code, text = told()
    assert code == 0
    assert "nothing was touched" in text
    lines = by_name(study)
    assert [*lines] == ["0_tiny_world", "2_pair_generation", "3_dpo_training", "reports"]
    assert [line.files for line in lines.values()] == [4, 1, 4, 7]
    assert [line.inputs for line in lines.values()] == [0, 3, 1, 0]
    assert not any(line.problems or line.notes or line.unchecked for line in lines.values())


@pytest.mark.parametrize("target", ["s", "outputs/s", "folder"])
def test_a_study_by_its_name_or_folder(study, target, told):
    assert told(study if target == "folder" else target)[0] == 0


def every_file(folder):
    return sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))


def test_every_byte_counts(study):
    """Each file of the study but the times that are no result, changed, then gone."""
    for file in every_file(study):
        if file.name == runs.TIMINGS:
            continue
        was = file.read_bytes()
        name = file.relative_to(study).as_posix()
        file.write_bytes(was[:-2] + bytes([was[-2] ^ 1]) + was[-1:])
        found = problems(study)
        assert found and any(name in p for p in found), name
        file.unlink()
        if name == verify.REPORTS:
            assert "not covered" in by_name(study)["reports"].notes[0]
        else:
            assert any(f"{name} is gone" in p for p in problems(study)), name
        file.write_bytes(was)
    assert problems(study) == []


def test_a_touched_file_is_one_problem_that_says_what_to_do(study, told):
    (study / "0_tiny_world" / "model" / "config.json").write_text("{ }")
    code, text = told()
    assert code == 1
    assert ("0_tiny_world/model/config.json was changed after the stage had finished: put the "
            "original back, or run it again (python -m bpo run s --only 0)") in text
    assert text.rstrip().endswith(f"1 touched: {study}")


def test_a_file_that_no_manifest_lists(study):
    (study / "0_tiny_world" / "model" / "more.json").write_text("{}")
    found = problems(study)
    assert len(found) == 1
    assert found[0].startswith("0_tiny_world/model/more.json is listed by no manifest")


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"outputs": 1}', "[" * 100_000])
def test_a_manifest_that_cannot_be_read(study, broken):
    (study / "2_pair_generation" / runs.MANIFEST).write_text(broken)
    assert any(p.startswith("2_pair_generation/manifest.json cannot be read")
               for p in by_name(study)["2_pair_generation"].problems)


def edit_manifest(folder, change):
    file = folder / runs.MANIFEST
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


def test_a_number_edited_in_a_manifest(study):
    edit_manifest(study / "2_pair_generation", lambda m: m["metrics"].update(files=9))
    assert ["manifest.json was changed after the reports" in p for p in problems(study)] == [True]


def test_an_input_elsewhere_that_was_changed_or_is_gone(study, data, told):
    data.write_text("[1]")
    found = problems(study)
    assert len(found) == 1 and found[0].startswith("input data of 2_pair_generation is not what")
    data.unlink()
    line = by_name(study)["2_pair_generation"]
    assert (line.inputs, line.unchecked, line.problems) == (2, 1, ())
    assert "no longer where they lay: data" in line.notes[0]
    assert told()[0] == 0


def test_older_manifests_do_not_say_where_inputs_lay(study):
    edit_manifest(study / "2_pair_generation", lambda m: m.pop("paths"))
    verify.record(study)
    line = by_name(study)["2_pair_generation"]
    assert (line.inputs, line.unchecked, line.problems) == (0, 3, ())
    assert "does not say where they lay: data, model, rows" in line.notes[0]


def test_stages_that_do_not_fit_together(study, data):
    runs.stage(PairGeneration(study="s", seed=5), written({"pairs.jsonl": "other"}),
               inputs={"data": data}, modules=[])
    verify.record(study)
    found = problems(study)
    assert found == ["3_dpo_training was computed from another pairs than 2_pair_generation has "
                     "now (outputs/s/2_pair_generation/pairs.jsonl): run 3_dpo_training again "
                     "(python -m bpo run s --only 3)"]
    assert any("2_pair_generation.old-1/" in n for n in by_name(study)["reports"].notes)


def test_an_input_that_another_study_wrote(outputs, data):
    world = build(outputs, data, "first") / "0_tiny_world"
    runs.stage(PairGeneration(study="second"), written({"pairs.jsonl": "x"}),
               inputs={"model": world / "model"}, modules=[])
    assert by_name(outputs / "second")["2_pair_generation"].inputs == 1
    (world / "model" / "config.json").write_text("edited")
    assert "config.json was changed after the stage" in problems(outputs / "second")[0]


def test_other_code_is_a_note(study, told):
    edit_manifest(study / "0_tiny_world", lambda m: m["modules"].update({"bpo.noise": "0" * 64}))
    edit_manifest(study / "2_pair_generation", lambda m: m["modules"].update({"os.path": "0"}))
    verify.record(study)
    code, text = told()
    assert code == 0
    assert "code of bpo.noise has changed since" in text
    assert "code of os.path has changed since" in text


def test_a_study_that_was_copied_and_renamed(study, tmp_path):
    copy = tmp_path / "elsewhere" / "t"
    copy.parent.mkdir()
    study.rename(copy)
    lines = by_name(copy)
    assert lines["3_dpo_training"].inputs == 1
    assert not any(line.problems for line in lines.values())


def test_later_rounds_are_looked_at_with_their_study(study, outputs, data):
    later = build(outputs, data, rounds.study_of("s", 2))
    assert "s.round-2/3_dpo_training" in by_name(study)
    (later / "3_dpo_training" / "bpo" / "history.json").write_text("[0]")
    assert len(problems(study)) == 1


def test_pages_without_a_record(study, told):
    (study / "more.html").write_text("new")
    assert by_name(study)["reports"].notes[0] == "pages that are not covered by reports.json: " \
                                                 "more.html"
    (study / verify.REPORTS).unlink()
    code, text = told()
    assert code == 0
    assert "s has no reports.json, so its 5 pages and its manifests are not covered" in text


def test_the_record_is_whole(study):
    held = json.loads((study / verify.REPORTS).read_text())["files"]
    assert held["index.html"] == runs.file_hash(study / "index.html")
    assert set(held) == {"0_tiny_world.html", "2_pair_generation.html", "2_pair_generation.ipynb",
                         "index.html", "0_tiny_world/manifest.json",
                         "2_pair_generation/manifest.json", "3_dpo_training/manifest.json"}
    assert not list(study.glob(".*.tmp"))


def test_an_interrupted_stage_is_told_and_not_failed(study, told):
    begun = study / "4_qualitative_comparison"
    begun.mkdir()
    (begun / runs.STARTED).write_text("{}")
    (begun / "half.jsonl").write_text("x")
    code, text = told()
    assert code == 0
    assert "4_qualitative_comparison was interrupted" in text


def test_many_problems_are_counted_and_some_told(study, told):
    for number in range(verify.SHOWN + 7):
        (study / "0_tiny_world" / f"{number}.txt").write_text("")
    text = told()[1]
    assert "and 7 more like these" in text
    assert f"{verify.SHOWN + 7} touched" in text


def test_a_stage_on_another_disk(study, tmp_path):
    (study / "0_tiny_world").rename(tmp_path / "disk")
    (study / "0_tiny_world").symlink_to(tmp_path / "disk")
    assert problems(study) == []
    (tmp_path / "disk" / "model" / "config.json").write_text("edited")
    assert len(problems(study)) == 1


HOLDER = """
import fcntl, sys
stream = open(sys.argv[1], "w")
fcntl.flock(stream, fcntl.LOCK_EX)
stream.write("4711")
stream.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("lock", [".run.lock", ".stage.lock"])
def test_a_study_that_is_being_run_is_not_judged(study, lock, told):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(study / lock)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (study / "index.html").write_text("half")
        code, text = told()
        assert code == 1
        assert "is being run now (process 4711)" in text
        assert "touched" not in text
    finally:
        holder.kill()
        holder.communicate()
    assert "index.html was changed" in told()[1]


def test_a_run_in_between_makes_what_was_found_worthless(study):
    with pytest.raises(Refusal, match="was run while it was being read"), verify.at_rest([study]):
        (study / ".run.lock").write_text("1")


def test_what_is_no_study_is_refused(outputs, study, told):
    (outputs / "empty").mkdir()
    code, text = told("empty")
    assert code == 1 and "no stage of a study is complete here" in text
    code, text = told("none")
    assert code == 1 and "none: no such study, folder or archive. There are studies: empty, s" in (
        text)
