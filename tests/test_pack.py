"""One archive of a study: what is in it, what is not, and that any change to it is found."""

import json
import zipfile

import pytest
from test_verify import build

from bpo import pack
from bpo.__main__ import main
from bpo.params import Refusal


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
def archive(study, tmp_path, monkeypatch):
    """The packed study, elsewhere: neither the study nor its inputs are there."""
    file, _ = pack.write("s", to=tmp_path / "s.zip")
    monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path / "nothing"))
    return file


BELOW = "s.packed/"


def test_reports_manifests_and_adapters_are_in_it_and_no_image_weight_or_row(archive):
    with zipfile.ZipFile(archive) as held:
        names = {n.removeprefix(BELOW) for n in held.namelist()}
        packed = json.loads(held.read(f"{BELOW}PACKED.json"))
    assert {"PACKED.json", "s/index.html", "s/2_pair_generation.ipynb", "s/reports.json",
            "s/0_tiny_world/manifest.json", "s/3_dpo_training/bpo/history.json",
            "s/3_dpo_training/bpo/adapter/adapter_model.safetensors"} <= names
    assert not any(n.endswith((".png", "pairs.jsonl", "rows.json", "model/model.safetensors"))
                   for n in names)
    assert {k["what"]: k["files"] for k in packed["left_out"]} == {
        "images": 1, "model weights": 1, "tables of rows": 3}
    assert packed["pictures"] == 1  # the same one on every page


def test_it_is_accepted_elsewhere(archive, capsys):
    assert main(["verify", str(archive)]) == 0
    assert "sha256" in capsys.readouterr().out


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    one, _ = pack.write("s", to=tmp_path / "one.zip")
    two, _ = pack.write("s", to=tmp_path / "two.zip")
    assert one.read_bytes() == two.read_bytes()


def test_a_change_to_any_file_of_it_is_found(archive, tmp_path, capsys):
    with zipfile.ZipFile(archive) as held:
        held.extractall(tmp_path / "unpacked")
    folder = tmp_path / "unpacked" / BELOW
    assert main(["verify", str(folder)]) == 0
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        for changed in (content[:-1] + bytes([content[-1] ^ 1]), None):
            file.unlink() if changed is None else file.write_bytes(changed)
            assert main(["verify", str(folder)]) == 1, file
            file.write_bytes(content)
    (folder / "s" / "more.html").write_text("x")
    assert main(["verify", str(folder)]) == 1


def test_an_archive_that_was_written_again_is_told(archive, tmp_path, capsys):
    with zipfile.ZipFile(archive) as held:
        members = {n: held.read(n) for n in held.namelist()}
    for more in ({}, {f"{BELOW}s/more.html": b"x"}, {"../out": b"x"}):
        other = tmp_path / "other.zip"
        with zipfile.ZipFile(other, "w") as out:
            for name, content in (members | more).items():
                out.writestr(name, content)
        assert main(["verify", str(other)]) == 1


def test_a_page_that_was_edited_is_not_packed(study, tmp_path):
    (study / "index.html").write_text("better numbers")
    with pytest.raises(Refusal, match="touched"):
        pack.write("s", to=tmp_path / "s.zip")
    assert not (tmp_path / "s.zip").exists()


@pytest.mark.parametrize("held", ["the value", "the shape"])
def test_a_key_is_not_packed_and_not_printed(outputs, data, tmp_path, monkeypatch, held):
    from bpo import verify

    folder = build(outputs, data)
    key = "correct-horse-battery" if held == "the value" else "sk-" + "a1B2" * 8
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")
    page = folder / "2_pair_generation.ipynb"
    page.write_text(json.dumps({"cells": [key]}))
    verify.record(folder)
    with pytest.raises(Refusal, match="2_pair_generation.ipynb holds") as refused:
        pack.write("s", to=tmp_path / "s.zip")
    assert key not in str(refused.value)
    assert not (tmp_path / "s.zip").exists()


@pytest.mark.parametrize(("study_name", "to", "told"), [
    ("none", None, "no such study"), ("s", "missing/s.zip", "its folder is not there")])
def test_what_cannot_be_packed_is_refused(study, tmp_path, study_name, to, told):
    with pytest.raises(Refusal, match=told):
        pack.write(study_name, to=to and tmp_path / to)


def test_another_file_is_no_archive_of_this_kind(tmp_path, outputs, capsys):
    (tmp_path / "x.zip").write_bytes(b"PK nothing")
    assert main(["verify", str(tmp_path / "x.zip")]) == 1
    assert "not an archive that python -m bpo pack wrote" in capsys.readouterr().err
