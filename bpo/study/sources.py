"""The code that shapes a stage's result: the stage's module and what it imports of the kit."""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from bpo.params import ROOT

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
