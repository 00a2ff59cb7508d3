"""The house: rooms import downwards, stay small, and have no module too long to read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpo.params import ROOT

ROOMS = ("study", "data", "models", "evaluation", "pairs", "training", "reports", "tiny")
LONGEST = 310
# Those that are still longer, to be split; none may grow.
LONGER: dict[str, int] = {}
MODULES = sorted(f.relative_to(ROOT) for f in (ROOT / "bpo").rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """The rooms that a module imports from."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bpo."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "bpo":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_imports_go_down_the_list_of_rooms(file):
    room = file.parts[1]
    below = ROOMS[:ROOMS.index(room) + 1] if room in ROOMS else ROOMS[:-1]
    allowed = {*below, "params"} | ({"new", "check"} if room not in ROOMS else set())
    assert set(imported(file)) <= allowed


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_at_most_thirteen_modules(room):
    inside = {m.parts[2] for m in MODULES if m.parts[1] == room} - {"__init__.py"}
    assert len(inside) <= 13, inside


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_no_module_is_longer_than_can_be_read_at_once(file):
    most = LONGER.get(file.relative_to("bpo").as_posix(), LONGEST)
    assert file.name == "params.py" or len((ROOT / file).read_text().splitlines()) <= most
