"""A finished study names no folder of the machine that made it: moved or copied to another place it
keeps its bytes, and every stage of it is up to date there."""

import importlib
import shutil
from pathlib import Path

from bpo.__main__ import STAGES, TINY_STAGES, main
from bpo.pairs.export import LAYOUTS
from bpo.params import ROOT, SCHEMAS
from bpo.study import stage as stages


def contents(root: Path) -> dict[str, bytes]:
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in sorted(root.rglob("*"))
            if f.is_file() and not f.name.startswith(".")}


def open_all(study: Path) -> None:
    """Opens every stage of a study as its notebooks do; raises Refusal where one is stale."""
    for file in sorted(study.glob(f"*/{stages.MANIFEST}")):
        manifest = stages.read_manifest(file.parent)
        p = SCHEMAS[manifest["stage"]](study=study.name, **manifest["parameters"])
        with stages.read_only():
            module = (STAGES | TINY_STAGES)[int(p.notebook[0])]
            assert importlib.import_module(f"bpo.{module}").run(p).folder == file.parent


def test_a_copied_and_a_moved_study_are_up_to_date_and_name_no_old_place(
        little_study, tmp_path, monkeypatch):
    copied, moved = tmp_path / "copied", tmp_path / "moved" / "further" / "down"
    shutil.copytree(little_study, copied / "little", copy_function=shutil.copyfile)
    before = contents(copied)
    monkeypatch.setenv("BPO_OUTPUTS", str(copied))
    open_all(copied / "little")
    for layout in LAYOUTS:
        assert main(["export", "little", "--to", layout]) == 0
    assert main(["merge", "little", "--method", "bpo"]) == 0
    assert main(["report", "little"]) == 0
    moved.parent.mkdir(parents=True)
    copied.rename(moved)
    monkeypatch.setenv("BPO_OUTPUTS", str(moved))
    open_all(moved / "little")
    after = contents(moved)
    assert {n: c for n, c in before.items() if after[n] != c and "index.html" not in n
            and "SHA256SUMS" not in n and not n.endswith(".html")} == {}
    for place in (little_study.parent, copied, ROOT):
        assert [n for n, c in after.items() if str(place).encode() in c] == []
    hidden = (f for f in moved.rglob(".*") if f.is_file())
    assert not any(str(copied).encode() in f.read_bytes() for f in hidden)
