"""What the kit asks of a machine: pinned packages, Python 3.11 to 3.14, no POSIX-only modules."""

import ast
import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bpo import params

PROJECT = tomllib.loads((params.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RANGES = [Requirement(r) for r in
          PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]
LOCK = [Requirement(line) for line in
        (params.ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")]
SYSTEMS = {"Linux": ("linux", "posix"), "Darwin": ("darwin", "posix"), "Windows": ("win32", "nt")}


def locked(environment: dict | None = None) -> dict[str, str]:
    """Name -> version of the lines for this machine, or for `environment`."""
    return {r.name: str(r.specifier).removeprefix("==") for r in LOCK
            if r.marker is None or r.marker.evaluate(environment)}


def needed(environment: dict) -> set[str]:
    """Names that the dependencies and all below them need there, as installed metadata say."""
    wanted, seen = list(RANGES), set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # torch's own, where its build is for CUDA
        try:
            below = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # needed elsewhere, not here
            below = []
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            wanted += [r for r in map(Requirement, below) if r.marker is None
                       or r.marker.evaluate({**environment, "extra": extra})]
    return {name for name, _ in seen}


def test_the_lock_is_what_is_installed_and_what_the_dependencies_need():
    names = [r.name for r in LOCK]
    assert names == sorted(set(names)) == [canonicalize_name(n) for n in names]
    # A local label says how a wheel was built ("+cpu"); it is the same version.
    assert locked() == {n: metadata.version(n).split("+")[0] for n in locked()}
    assert needed({}) == locked().keys()


@pytest.mark.study  # a dozen resolutions
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_lock_lacks_nothing_on_another_python_or_system(python, system):
    sys_platform, os_name = SYSTEMS[system]
    there = {"python_version": python, "python_full_version": f"{python}.0",
             "platform_system": system, "sys_platform": sys_platform, "os_name": os_name}
    assert needed(there) <= locked(there).keys()


def test_the_ranges_admit_the_lock_and_do_not_pin():
    for requirement in RANGES:
        assert locked()[canonicalize_name(requirement.name)] in requirement.specifier, requirement
        assert "==" not in str(requirement.specifier)
    assert PROJECT["requires-python"] == ">=3.11"
    pip = (params.ROOT / "environment.yml").read_text(encoding="utf-8").partition("- pip:")[2]
    assert pip.split() == ["-", "-r", "requirements.lock", "-", "-e", "."]


def test_every_package_that_bpo_imports_is_a_dependency():
    declared = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    packages = metadata.packages_distributions()
    for file in (params.ROOT / "bpo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in {n.partition(".")[0] for n in names} - sys.stdlib_module_names - {"bpo"}:
                assert declared & set(map(canonicalize_name, packages[name])), f"{file} {name}"


POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}


def test_modules_suit_every_system_and_python_3_11():
    found = []
    for file in (params.ROOT / "bpo").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 11))
        for node in tree.body:
            names = {a.name for a in getattr(node, "names", [])} | {getattr(node, "module", None)}
            found += [f"{file}:{node.lineno} {n}" for n in names & POSIX]
        for node in ast.walk(tree):
            if (isinstance(node, ast.Constant) and str(node.value).startswith("/tmp")
                    or isinstance(node, ast.Attribute) and ast.unparse(node) == "os.path.join"):
                found.append(f"{file}:{node.lineno} {ast.unparse(node)}")
            # Text that is hashed has the same line ends on Windows: `study.files` sees to it.
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if re.search(r"\.write_text\([^()]*\)$|open\('w'(?!.*newline).*\)$", call):
                found.append(f"{file}:{node.lineno} {call}")
    assert not found


@pytest.mark.skipif(sys.platform == "win32", reason="make and shell scripts")
@pytest.mark.parametrize("start, chosen", [
    ((11, 12, 13), "python3.13"), ((11,), "python3.11"), ((), "python3")])
def test_make_takes_the_newest_python_that_starts(tmp_path, start, chosen):
    for minor in (11, 12, 13, 14):  # each is on PATH, as pyenv's shims are; not each starts
        script = tmp_path / f"python3.{minor}"
        script.write_text(f"#!/bin/sh\necho python3.{minor}\nexit 0\n" if minor in start
                          else "#!/bin/sh\nexit 127\n")
        script.chmod(0o755)
    (tmp_path / "new").mkdir()
    recipe = subprocess.run(
        ["make", "-n", "report", f"VENV={tmp_path}/new/.venv"], cwd=params.ROOT, text=True,
        check=True, capture_output=True,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
        | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}).stdout
    assert f"|| {chosen} -m venv" in recipe
