"""What a result is made of: the kit's code, folders of earlier stages, and other inputs."""

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bpo.params import ROOT, SCHEMAS, Refusal, outputs_root
from bpo.study import hub
from bpo.study.files import file_hash

MANIFEST = "manifest.json"
STARTED = "started.json"
TIMINGS = "timings.json"  # seconds differ from run to run, so they are no part of the result
MERGED = "merged"  # the folder in a study's for merged checkpoints, one below it for each method
# What reads parameters, runs stages or shows results shapes no result. Of the room `study` the
# draws and the make-up of batches do.
NEUTRAL = ("bpo.params.", "bpo.study.", "bpo.reports.")
SHAPING = ("bpo.study.seeds", "bpo.study.shards", "bpo.study.results")


def code(module: str) -> dict[str, str]:
    """Dotted name -> hash of the syntax tree, of a module of the kit and of all modules of the kit
    that it imports, at its top or in a function, directly or through others."""
    hashes, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        neutral = f"{name}.".startswith(NEUTRAL) and name not in SHAPING
        if name not in hashes and not neutral and (file := _file(name)):
            hashes[name], imported = _read(file)
            waiting += imported
    return dict(sorted(hashes.items()))


def _file(name: str) -> Path | None:
    """A module's file; None for a package, whose __init__ is empty, and for a name in a module."""
    file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return file if file.is_file() else None


@functools.cache
def _read(file: Path) -> tuple[str, tuple[str, ...]]:
    """The hash of a file's syntax tree, which comments, docstrings and line breaks do not change,
    and the names in the kit that it imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = tuple(_imported(tree))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported


def _imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names below bpo; `from bpo.a import b` gives bpo.a and bpo.a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("bpo."))
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("bpo."):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stage_folder(study: str, notebook: str) -> Path:
    return outputs_root() / study / notebook


def fingerprint(path: Path, hashed: Callable[[Path], str] = file_hash) -> str:
    """sha256 of what lies at a path; raises Refusal if nothing does or a stage's file was edited.

    Below an earlier stage's folder the hashes come from its manifest, after the files were
    compared with it. Elsewhere: a file's content, or names, sizes and contents of a folder's
    files, where of a file above 256 MB only 64 blocks spread over it are read. What the hub's
    cache holds is told by its commit.
    """
    owner = require(path)
    if owner is None:
        if commit := hub.revision(path):
            return commit
        if path.is_file():
            return hashed(path)
        return digest(f"{f.relative_to(path).as_posix()} {hashed(f)}" for f in files_of(path))
    outputs = read_manifest(owner)["outputs"]
    hashes = {n: h for n, h in outputs.items() if (owner / n).is_relative_to(path)}
    if not hashes:
        wrote = ", ".join(sorted({n.split("/")[0] for n in outputs}))
        raise Refusal(f"{path}: the stage {owner.name} did not write this; it wrote {wrote}")
    if name := touched(owner, hashes, hashed):
        raise Refusal(f"{owner / name} was changed after the stage that wrote it had finished: "
                      f"put the original back, or run notebooks/{owner.name}.ipynb again")
    return digest(f"{n} {h}" for n, h in hashes.items())


def require(path: Path) -> Path | None:
    """The stage folder that an input lies in, if it lies in one; raises Refusal where nothing is
    there yet."""
    owner = owning_stage(path)
    if owner is None and not path.exists():
        command = written_by(path)
        raise Refusal(f"{path} is not there yet: {command}" if command
                      else f"{path}: there is no such file or folder")
    if owner is not None and not (owner / MANIFEST).is_file():
        raise Refusal(f"{path} is not there yet: run notebooks/{owner.name}.ipynb first "
                      f"({written_by(path)})")
    return owner


def _below_outputs(path: Path) -> tuple[str, ...]:
    root = outputs_root()
    return path.relative_to(root).parts if path.is_relative_to(root) else ()


def owning_stage(path: Path) -> Path | None:
    """The stage folder that a path lies in, if it lies below outputs/<study>/<notebook>."""
    parts = _below_outputs(path)
    return stage_folder(*parts[:2]) if len(parts) > 1 and parts[1] in SCHEMAS else None


def written_by(path: Path) -> str:
    """The command that writes what lies at a path below outputs/<study>/<notebook> or
    outputs/<study>/merged/<method>; "" for other paths."""
    parts = _below_outputs(path)
    if owning_stage(path):
        return f"python -m bpo run {parts[0]} --only {parts[1].split('_')[0]}"
    if len(parts) > 2 and parts[1] == MERGED:
        return f"python -m bpo merge {parts[0]} --method {parts[2]}"
    return ""


def touched(folder: Path, hashes: Mapping[str, str], hashed: Callable[[Path], str]) -> str | None:
    """The first of a stage's files that is gone or has another hash."""
    return next((n for n, sha256 in hashes.items()
                 if not (folder / n).is_file() or hashed(folder / n) != sha256), None)


def files_of(folder: Path) -> list[Path]:
    """The files of a result; what a kill left under a temporary name is none."""
    return sorted(f for f in folder.rglob("*") if f.is_file()
                  and f.relative_to(folder).parts not in ((MANIFEST,), (STARTED,), (TIMINGS,))
                  and not (f.name.startswith(".") and f.name.endswith(".tmp")))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
