"""SHA256SUMS of a study and its zip file: what is listed, what is packed, and that each change is
named."""

import hashlib
import os
import subprocess
import zipfile

import pytest

from bpo.__main__ import main
from bpo.params import Refusal
from bpo.reports import pack
from bpo.study import verify

FILES = {"index.html": '<style></style><body><a href="1_a.html">one</a><a href="../x.html">x</a>'
                       "</body></html>", "1_a.html": '<body><h2 id="b">1</h2><a href="#b">b</a>',
         "preview.png": "png",
         "2_pair_generation.ipynb": '"endpoint_key_variable = \\"MY\\""',
         "0_tiny_world/model/model.safetensors": "weights", "0_tiny_world/images/1.png": "pixels",
         "2_pair_generation/pairs.jsonl": "{}\n", "2_pair_generation/results.csv": "value\n1\n",
         "3_dpo_training/manifest.json": "{}", "3_dpo_training/bpo/history.json": "[1]",
         "3_dpo_training/bpo/adapter/adapter_model.safetensors": "adapter",
         "merged/bpo/model.safetensors": "merged", "merged/bpo/config.json": "{}"}
UNLISTED = {".run.lock": "1", "2_pair_generation/.pairs.jsonl.tmp": "half",
            "3_dpo_training.old-1/bpo/history.json": "[0]"}
PACKED = sorted(["SHA256SUMS", "params/a.yaml"] + [
    n for n in FILES if not n.startswith("merged") and not n.startswith("0_")
    and not n.endswith("jsonl")])


@pytest.fixture
def study(outputs, tmp_path, monkeypatch):
    """A study of small files, with one parameter file."""
    for name, content in {**FILES, **UNLISTED}.items():
        (outputs / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (outputs / "s" / name).write_text(content)
    (tmp_path / "params" / "s").mkdir(parents=True)
    (tmp_path / "params" / "s" / "a.yaml").write_text("judge_key_variable: OTHER  # a name\n")
    monkeypatch.setenv("BPO_PARAMS", str(tmp_path / "params"))
    verify.write(outputs / "s", {})
    return outputs / "s"


@pytest.fixture
def verified(capsys):
    """Verifies a target by the command line: the exit code and the printed lines but the last."""
    def verified(target="s"):
        capsys.readouterr()
        code = main(["verify", str(target)])
        return code, capsys.readouterr().out.splitlines()[:-1]
    return verified


def sha256sum(folder):
    return subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
                          check=False, cwd=folder, capture_output=True, text=True)


def test_every_file_is_listed_and_each_change_is_named(study, verified):
    lines = (study / "SHA256SUMS").read_text().splitlines()
    assert [line[66:] for line in lines] == sorted(FILES)
    assert sha256sum(study).returncode == 0
    assert verified() == verified(study) == (0, [])
    for name, content in FILES.items():
        (study / name).write_text(content[:-1] + "~")
        assert verified() == (1, [f"touched: {name}"])
        assert sha256sum(study).stdout == f"{name}: FAILED\n"
        (study / name).unlink()
        assert verified() == (1, [f"missing: {name}"])
        (study / name).write_text(content)
    (study / "more\x1b.html").write_text("")
    assert verified() == (1, ["extra: more\\x1b.html"])


def test_what_a_stage_wrote_is_listed_by_its_manifest(study, verified, monkeypatch):
    """A file is read only where its manifest has hashes of samples or none."""
    listed = hashlib.sha256(b"what the stage wrote").hexdigest()
    manifests = {"2_pair_generation": {"outputs": {"pairs.jsonl": listed}}}
    verify.write(study, manifests)
    assert f"{listed}  2_pair_generation/pairs.jsonl\n" in (study / "SHA256SUMS").read_text()
    assert verified() == (1, ["touched: 2_pair_generation/pairs.jsonl"])
    monkeypatch.setattr(verify, "SAMPLED_ABOVE", 2)
    verify.write(study, manifests)
    assert verified() == (0, [])


def test_a_stage_on_another_disk_is_listed(study, tmp_path, verified):
    (study / "2_pair_generation").rename(tmp_path / "disk")
    (study / "2_pair_generation").symlink_to(tmp_path / "disk")
    assert verified() == (0, [])


def test_a_zip_holds_reports_and_adapters_and_checks_itself(study, tmp_path, verified, capsys):
    assert main(["pack", "s"]) == 0
    file = study.with_name("s.zip")
    first = file.read_bytes()
    assert hashlib.sha256(first).hexdigest() in capsys.readouterr().out
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == [f"s/{n}" for n in PACKED]
        archive.extractall(tmp_path / "unpacked")
    assert verified(file) == verified(tmp_path / "unpacked" / "s") == (0, [])
    assert sha256sum(tmp_path / "unpacked" / "s").returncode == 0
    for name in FILES:
        os.utime(study / name, (0, 0))
    assert pack.write("s").read_bytes() == first
    # all pages in one file: links lead to its articles, and nowhere out of it
    one = study.with_name("s.html").read_text()
    assert '<article id="index"><a href="#1_a">one</a><span>x</span></article>' in one
    assert '<article id="1_a"><h2 id="1_a-b">1</h2><a href="#1_a-b">b</a></article>' in one


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_was_changed(study, tmp_path, verified):
    """Each change is named; a name that leads out of the folder is only a name."""
    with zipfile.ZipFile(pack.write("s")) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    page = "s/index.html", members["s/index.html"]

    def told(members, *more):
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
            for name, content in [*members.items(), *more]:
                archive.writestr(name, content)
        return verified(tmp_path / "other.zip")

    assert told(members) == (0, [])
    assert told(members | {page[0]: b"<p>pagf"}) == (1, ["touched: index.html"])
    assert told({n: c for n, c in members.items() if n != page[0]}) == (1, ["missing: index.html"])
    assert told(members, page) == (1, ["twice: index.html"])
    assert told(members, ("index.html", page[1])) == (1, ["twice: index.html"])
    assert told(members, ("../evil", b""), ("/evil", b"")) == (
        1, ["extra: ../evil", "extra: /evil"])
    assert list(tmp_path.parent.rglob("evil")) == []


def test_a_damaged_zip(study, verified, capsys):
    """A byte inside a compressed page; then what is no zip file, and a zip without a list."""
    file = pack.write("s")
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo("s/index.html")
    content = bytearray(file.read_bytes())
    content[entry.header_offset + 30 + len("s/index.html") + entry.compress_size // 2] ^= 1
    file.write_bytes(content)
    assert verified(file) == (1, ["touched: index.html"])
    file.write_bytes(content[:-9])
    assert main(["verify", str(file)]) == 1 and "get the zip file again" in capsys.readouterr().err
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b", "")
    assert main(["verify", str(file)]) == 1 and "no SHA256SUMS" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["MY", "OTHER", "HF_TOKEN"])
@pytest.mark.parametrize("form", ['quote"and&more', 'quote\\"and&more', "quote&quot;and&amp;more",
                                  "quote%22and%26more"])
def test_a_file_with_a_key_is_not_packed(study, monkeypatch, variable, form):
    """A notebook names MY, the parameters OTHER; each form in which text, JSON, a page or an
    address writes a key is found and never printed."""
    monkeypatch.setenv(variable, 'quote"and&more')
    (study / "index.html").write_text(f"<p>{form}")
    verify.write(study, {})
    with pytest.raises(Refusal, match=f"index.html holds the value of .* {variable}") as refused:
        pack.write("s")
    assert "quote" not in str(refused.value)
    assert list(study.parent.glob("s.*")) + list(study.parent.glob(".*")) == []
    monkeypatch.setenv(variable, "page")  # too short for a key; local servers take any
    pack.write("s")


def test_what_is_not_as_listed_is_not_packed(study, capsys):
    (study / "index.html").write_text("better numbers")
    with pytest.raises(Refusal, match="index.html is not as SHA256SUMS lists it"):
        pack.write("s")
    (study / "SHA256SUMS").unlink()
    for command in (["pack", "s"], ["verify", "s"], ["pack", "none"], ["verify", "none"]):
        assert main(command) == 1
        assert command[1] in capsys.readouterr().err
