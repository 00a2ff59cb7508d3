"""What makes a stage stale: the code that its module imports."""

import importlib

import pytest

from bpo import __main__
from bpo.study import sources

SOURCE = '''"""A module."""

# a comment
def f(x, y):
    """Adds."""
    return x + y


class C:
    """A class."""

    z = 1
'''


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """Writes modules below bpo/ of an empty project: name -> source."""
    def write(**modules):
        root = tmp_path / f"project{len(list(tmp_path.iterdir()))}"
        for name, source in modules.items():
            file = root / "bpo" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        monkeypatch.setattr(sources, "ROOT", root)
    return write


def hashed(kit, source):
    kit(mine=source)
    return sources.code("bpo.mine")["bpo.mine"]


@pytest.mark.parametrize("old, new", [
    ("# a comment", "# another\n# comment"), ("Adds.", "Adds two numbers."),
    ("A module.", "Another."), ("A class.", "Another."), ("f(x, y)", "f(x,\n      y)"),
    ('    """Adds."""\n', ""), ("x + y", "(x + y)  # brackets")])
def test_comments_docstrings_and_layout_are_not_code(kit, old, new):
    assert old in SOURCE
    assert hashed(kit, SOURCE) == hashed(kit, SOURCE.replace(old, new))


@pytest.mark.parametrize("old, new", [("x + y", "x - y"), ("z = 1", "z = 2"), ("f(x", "g(x")])
def test_a_change_of_what_is_computed_is_a_change_of_code(kit, old, new):
    assert hashed(kit, SOURCE) != hashed(kit, SOURCE.replace(old, new))


def test_imports_are_followed_wherever_they_stand(kit):
    kit(mine="import os\nfrom bpo import a\nfrom bpo.room.b import f, g",
        a="def f():\n    import bpo.c", c="from bpo import mine, params",
        room__b="from bpo.room import d", room__d="", params="", aside="")
    followed = ["bpo.a", "bpo.c", "bpo.mine", "bpo.room.b", "bpo.room.d"]
    assert list(sources.code("bpo.mine")) == followed


@pytest.mark.parametrize("number, shaping", (
    (1, "models.noise study.seeds models.logprobs evaluation.metrics data.rows"),
    (2, "models.noise models.generate pairs.selection pairs.audit models.endpoint"),
    (3, "models.noise models.generate training.objectives training.packed.forward"),
    (4, "models.noise evaluation.hallucination models.prefix study.shards"),
    (5, "models.noise models.prefix evaluation.official evaluation.diagnostics")))
def test_stages_depend_on_what_shapes_them_and_on_no_page(number, shaping):
    module = importlib.import_module(f"bpo.{__main__.STAGES[number]}")
    code = sources.code(module.__name__)
    assert {f"bpo.{name}" for name in shaping.split()} <= code.keys()
    assert not {"bpo.params", "bpo.study.stage", "bpo.reports.page"} & code.keys()
