"""One archive of a study: what is in it, what is not, and that any change to it is found."""

import json
import os
import zipfile

import pytest
from test_verify import build

from bpo import archives, pack, verify
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


def rewritten(archive, to, change):
    """The archive as `pack` writes it, of members that were changed: one whose own bytes are good.
    change: takes and gives members by name, below the archive's folder."""
    with zipfile.ZipFile(archive) as held:
        members = {n.removeprefix(BELOW): held.read(n) for n in held.namelist()}
    archives.write(to, {n: archives.in_memory(c) for n, c in change(members).items()},
                   below=BELOW.rstrip("/"))
    return to


def told(place):
    lines, _ = verify.of_archive(place)
    return [p for line in lines for p in line.problems]


def test_a_member_changed_gone_or_added_is_found_in_an_archive_that_was_packed_anew(archive,
                                                                                    tmp_path):
    other = tmp_path / "other.zip"
    assert rewritten(archive, other, dict).read_bytes() == archive.read_bytes()
    with zipfile.ZipFile(archive) as held:
        names = [n.removeprefix(BELOW) for n in held.namelist()]
    for name in names:
        for byte in (0, -1):
            def flipped(members, name=name, byte=byte):
                content = bytearray(members[name])
                content[byte] ^= 1
                return members | {name: bytes(content)}

            found = told(rewritten(archive, other, flipped))
            assert len(found) == 1 and name in found[0], name
        if name != archives.PACKED:
            found = told(rewritten(
                archive, other, lambda m, name=name: {n: c for n, c in m.items() if n != name}))
            assert found == [f"{name} is gone from the archive: get the original archive"]
    found = told(rewritten(archive, other, lambda m: m | {"s/0_tiny_world/more.json": b""}))
    assert len(found) == 1 and "'s/0_tiny_world/more.json' was added after packing" in found[0]


def relisted(members, name, content):
    """Members with one changed, whose hash in PACKED.json was changed with it."""
    members = members | {name: content}
    held = json.loads(members[archives.PACKED])
    member = archives.in_memory(content)
    held["files"][name] = {"sha256": member.sha256(), "bytes": member.size}
    return members | {archives.PACKED: archives.text(held).encode()}


@pytest.mark.parametrize("name, says", [
    ("s/0_tiny_world/manifest.json", "0_tiny_world/manifest.json was changed after the reports"),
    ("s/index.html", "index.html was changed after the reports were written"),
    ("s/3_dpo_training/bpo/history.json", "history.json was changed after the stage had finished"),
    ("s/3_dpo_training/bpo/adapter/more.bin", "more.bin is listed by no manifest")])
def test_the_hashes_inside_hold_where_the_list_was_changed_too(archive, tmp_path, name, says):
    def change(members):
        old = members.get(name, b"")
        new = old.replace(b'"files": 4', b'"files": 5') if name.endswith("manifest.json") else (
            old + b" ")
        assert new != old
        return relisted(members, name, new)

    found = told(rewritten(archive, tmp_path / "other.zip", change))
    assert len(found) == 1 and says in found[0]


def test_stages_must_fit_together_in_an_archive(archive, tmp_path):
    """The fingerprint of pairs by one manifest is the input of the other."""
    def change(members):
        name = "s/2_pair_generation/manifest.json"
        held = json.loads(members[name])
        held["outputs"]["pairs.jsonl"] = "0" * 64
        return relisted(members, name, json.dumps(held).encode())

    found = told(rewritten(archive, tmp_path / "other.zip", change))
    assert any("3_dpo_training was computed from another pairs than" in p for p in found)


@pytest.mark.parametrize("name", ["../out", "/etc/x", f"{BELOW}../../x", "C:\\x", f"{BELOW}a//b",
                                  f"{BELOW}a\\..\\b"])
def test_a_name_that_leads_elsewhere_is_a_problem(archive, name):
    with zipfile.ZipFile(archive, "a") as held:
        held.writestr(zipfile.ZipInfo(name, archives.WHEN), b"x")
    assert any("leads out of the archive's folder" in p for p in told(archive))


def test_a_link_is_a_problem_packed_or_unpacked(archive, tmp_path):
    with zipfile.ZipFile(archive) as held:
        held.extractall(tmp_path / "unpacked")
    folder = tmp_path / "unpacked" / BELOW
    (folder / "s" / "index.html").unlink()
    (folder / "s" / "index.html").symlink_to("/etc/hostname")
    assert told(folder) == ["s/index.html is a link, which no archive of a study holds: unpack the "
                            "archive again"]
    info = zipfile.ZipInfo(f"{BELOW}s/link", archives.WHEN)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as held:
        held.writestr(info, "/etc/hostname")
    assert any("s/link is a link or no plain file" in p for p in told(archive))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_a_problem(archive):
    with zipfile.ZipFile(archive, "a") as held:
        held.writestr(f"{BELOW}s/index.html", "other")
    assert any("index.html 2 times" in p for p in told(archive))


def test_bytes_that_belong_to_no_member_are_a_problem(archive):
    content = archive.read_bytes()
    for hidden in (b"x" + content, content + b"x"):
        archive.write_bytes(hidden)
        assert main(["verify", str(archive)]) == 1
    archive.write_bytes(content)
    assert told(archive) == []


def test_members_of_gigabytes_are_accounted_for_alike(study, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2000)  # what is 2 GB elsewhere
    archive, _ = pack.write("s", to=tmp_path / "s.zip")
    assert told(archive) == []
    content = archive.read_bytes()
    archive.write_bytes(content[:-23] + bytes([content[-23] ^ 1]) + content[-22:])
    assert main(["verify", str(archive)]) == 1


def test_files_that_were_left_out_are_counted_as_not_checked(archive):
    lines, hashes = verify.of_archive(archive)
    found = {line.name: line for line in lines}
    assert (found["0_tiny_world"].files, found["0_tiny_world"].unchecked) == (0, 4)
    # Of its three inputs the two that stage 0 wrote are known by stage 0's manifest.
    assert (found["2_pair_generation"].inputs, found["2_pair_generation"].unchecked) == (2, 2)
    assert found["3_dpo_training"].files == 4
    assert list(hashes) == ["s.zip", archives.PACKED]


def test_a_terminal_is_not_steered_by_what_an_archive_names(archive, tmp_path, capsys):
    other = rewritten(archive, tmp_path / "other.zip", lambda m: m | {"s/\x1b[2Jx": b""})
    assert main(["verify", str(other)]) == 1
    assert "\x1b" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("form", ["plain", "as JSON writes it", "as a page writes it"])
@pytest.mark.parametrize("variable", ["SOME_TOKEN", "OPENAI_API_KEY", "named by a parameter"])
def test_the_value_of_a_key_is_found_in_every_form(study, tmp_path, monkeypatch, form, variable):
    key = 'quote"and&more-x'
    if variable == "named by a parameter":
        variable = "MY_SECRET"
        file = study / "2_pair_generation" / "manifest.json"
        held = json.loads(file.read_text())
        held["parameters"]["endpoint_key_variable"] = variable
        file.write_text(json.dumps(held))
    monkeypatch.setenv(variable, key)
    (study / "index.html").write_text("<p>" + {
        "plain": key, "as JSON writes it": key.replace('"', '\\"'),
        "as a page writes it": key.replace("&", "&amp;").replace('"', "&quot;")}[form])
    verify.record(study)
    with pytest.raises(Refusal, match=f"s/index.html holds the value of .*{variable}") as refused:
        pack.write("s", to=tmp_path / "s.zip")
    assert "quote" not in str(refused.value)


def test_a_key_at_the_border_of_what_is_read_at_once_is_found(study, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "BLOCK", 1000)
    (study / "index.html").write_text("." * 990 + " hf_" + "aB3" * 10)
    verify.record(study)
    with pytest.raises(Refusal, match="s/index.html holds something that is shaped like a key"):
        pack.write("s", to=tmp_path / "s.zip")


@pytest.mark.parametrize("text, key", [
    ("sk-proj-" + "a1B2" * 6, True), ("AKIA" + "ABCD1234" * 2, True), ("ghp_" + "a1B2" * 9, True),
    ("-----BEGIN RSA PRIVATE KEY-----", True), ("hf_" + "aB3" * 9, True),
    ("task-aware-instruction-tuning-2", False), ("hf_device_map", False), ("sk-learn", False),
    ("iVBORw0KAKIA" + "ABCD1234" * 2, False), ("AKIA" + "ABCD1234" * 3, False)])
def test_what_is_shaped_like_a_key(text, key):
    assert bool(pack.SHAPES.search(f'{{"x": "{text}"}}'.encode())) == key


def test_what_local_servers_take_for_a_key_is_none(study, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "index")  # it stands in every page
    pack.write("s", to=tmp_path / "s.zip")


def test_what_the_packer_should_look_at_is_told(study, tmp_path, capsys):
    (study / "index.html").write_text("<p>/home/ada/pictures")
    verify.record(study)
    assert main(["pack", "s", "--to", str(tmp_path / "s.zip")]) == 0
    text = capsys.readouterr().out
    assert "the reports show 1 pictures" in text
    assert "left out: 1 images" in text
    _, held = pack.write("s", to=tmp_path / "s.zip")
    assert "s/index.html" in held["folders_named"]
    assert "s/0_tiny_world.html" not in held["folders_named"]
    for line in text.splitlines():
        if line.startswith("sha256 of PACKED.json"):
            lines, hashes = verify.of_archive(tmp_path / "s.zip")
            assert line.endswith(hashes[archives.PACKED])


def test_a_pack_that_is_killed_leaves_the_older_archive(study, tmp_path, monkeypatch):
    archive, _ = pack.write("s", to=tmp_path / "s.zip")
    was = archive.read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", full)
        pack.write("s", to=archive)
    assert archive.read_bytes() == was
    assert [f.name for f in tmp_path.iterdir() if f.name.endswith(".tmp")] == []


def test_a_study_without_a_complete_stage_is_refused(outputs, tmp_path):
    (outputs / "begun" / "0_tiny_world").mkdir(parents=True)
    (outputs / "begun" / "0_tiny_world" / "started.json").write_text("{}")
    with pytest.raises(Refusal, match="no stage of this study is complete"):
        pack.write("begun", to=tmp_path / "s.zip")


def test_a_zip_of_something_else_is_no_archive_of_a_study(tmp_path, outputs, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as held:
        held.writestr("a/b", "c")
    assert main(["verify", str(tmp_path / "x.zip")]) == 1
    assert "there is no PACKED.json in this archive" in capsys.readouterr().err
