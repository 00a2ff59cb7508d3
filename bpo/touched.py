"""What was touched of a study's files, by its manifests and its reports.json, a line a stage.

A study is a table of files here, so that a folder and what an archive holds of one are compared
alike; of an archive, files that were left out and inputs are counted as not checked.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bpo import runs
from bpo.archives import DAMAGE, Member
from bpo.params import ROOT, SCHEMAS, Refusal, resolve

REPORTS = "reports.json"
PAGES = (".html", ".ipynb", ".json", ".md")  # of what lies in a study's folder itself
NAMED = 5  # names that a note gives

Known = Mapping[tuple[str, str], Mapping[str, Any]]  # (study, stage) -> manifest


@dataclass(frozen=True)
class Line:
    """What was found of one stage, or of a study's pages. files, inputs: how many were compared.
    unchecked: how many could not be.  problems: what was touched, a sentence each."""

    name: str
    files: int = 0
    inputs: int = 0
    unchecked: int = 0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A study's files by their names in its folder.

    place: the folder; None in an archive, where files may have been left out.
    bad: names that are known to be touched already.
    """

    name: str
    files: Mapping[str, Member]
    place: Path | None
    bad: frozenset[str] = frozenset()

    @property
    def stages(self) -> list[str]:
        marks = (runs.MANIFEST, runs.STARTED)
        parts = [n.split("/") for n in self.files]
        return sorted({p[0] for p in parts
                       if len(p) == 2 and p[1] in marks and ".old-" not in p[0]})

    @property
    def pages(self) -> list[str]:
        return [n for n in self.files if "/" not in n and n.endswith(PAGES) and n != REPORTS
                and not n.startswith(".")]


def inside(files: Mapping[str, Any], folder: str) -> dict[str, Any]:
    return {n.removeprefix(f"{folder}/"): m for n, m in files.items() if n.startswith(f"{folder}/")}


def lines(studies: Sequence[Study]) -> list[Line]:
    known = {}
    for study in studies:
        for stage in study.stages:
            try:
                known[study.name, stage] = _manifest(study, stage)
            except (*DAMAGE, KeyError):
                continue  # its line says so
    several = len(studies) > 1
    return [replace(line, name=f"{study.name}/{line.name}") if several else line
            for study in studies
            for line in (*(_stage(study, s, known) for s in study.stages), _pages(study))]


def _manifest(study: Study, stage: str) -> dict[str, Any]:
    """A stage's manifest; raises ValueError when it is none."""
    try:
        held = json.loads(study.files[f"{stage}/{runs.MANIFEST}"].read())
    except RecursionError:
        raise ValueError("it is no table") from None
    parts = [held.get(p, {} if p == "paths" else None) if isinstance(held, dict) else None
             for p in ("outputs", "inputs", "modules", "paths")]
    for part in parts:
        if not isinstance(part, dict) or not all(isinstance(v, str) for v in part.values()):
            raise ValueError("it is no table of hashes")
    return held


def _stage(study: Study, stage: str, known: Known) -> Line:
    again = f"run it again (python -m bpo run {study.name} --only {stage.split('_')[0]})"
    if f"{stage}/{runs.MANIFEST}" not in study.files:
        return Line(stage, notes=(f"{stage} was interrupted, so there is nothing to check: python "
                                  f"-m bpo run {study.name} goes on with it",))
    manifest = known.get((study.name, stage))
    if manifest is None:
        return Line(stage, problems=(f"{stage}/{runs.MANIFEST} cannot be read: put the original "
                                     f"back, or {again}",))
    problems, files, unchecked = [], 0, 0
    for name, sha256 in manifest["outputs"].items():
        member = study.files.get(f"{stage}/{name}")
        if member is None and study.place is None:
            unchecked += 1
        elif member is None:
            problems.append(f"{stage}/{name} is gone: put it back, or {again}")
        else:
            files += 1
            if _hash(member) != sha256:
                problems.append(f"{stage}/{name} was changed after the stage had finished: put "
                                f"the original back, or {again}")
    books = {runs.MANIFEST, runs.STARTED, runs.TIMINGS}
    problems += [f"{stage}/{n} is listed by no manifest: move it elsewhere if it is yours, else "
                 "remove it" for n in inside(study.files, stage)
                 if n not in manifest["outputs"] and n not in books and not n.endswith(".tmp")]
    touched, notes = _inputs(study, stage, known)
    return Line(stage, files, len(manifest["inputs"]) - len(notes), unchecked + len(notes),
                tuple(problems + touched), tuple(_gathered(stage, notes) + _code(stage, manifest)))


def _hash(member: Member) -> str:
    try:
        with member.open() as stream:
            return runs.stream_hash(stream, size=member.size)
    except DAMAGE:
        return "damaged"


def _inputs(study: Study, stage: str, known: Known) -> tuple[list[str], dict[str, str]]:
    """What was touched of a stage's inputs, and input -> why it could not be checked."""
    manifest = known[study.name, stage]
    problems, unknown = [], {}
    for name, sha256 in manifest["inputs"].items():
        path = manifest.get("paths", {}).get(name)
        if path is None:
            unknown[name] = "its manifest is older and does not say where they lay"
            continue
        owner, listed = _listed(study, manifest, path, known)
        if listed is not None:
            if listed != sha256:
                problems.append(
                    f"{stage} was computed from another {name} than {owner} has now ({path}): run "
                    f"{stage} again (python -m bpo run {study.name} --only {stage.split('_')[0]})")
            continue
        place = _located(study, manifest, path)
        if place is None or not place.exists():
            unknown[name] = ("they are not part of the archive" if place is None
                             else "they are no longer where they lay")
            continue
        try:
            now = runs.fingerprint(place)
        except Refusal as refusal:
            problems.append(f"input {name} of {stage}: {refusal}")
            continue
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            unknown[name] = "the manifest of the stage that wrote them cannot be read"
            continue
        if now != sha256:
            problems.append(f"input {name} of {stage} is not what it was ({path}): put the "
                            "original back, or run the study again with what is there now")
    return problems, unknown


def _listed(study: Study, manifest: Mapping[str, Any], path: str, known: Known
            ) -> tuple[str, str | None]:
    """The stage that wrote an input and the input's fingerprint by its manifest, if it is among
    those looked at. Its files are compared with that manifest in a line of their own."""
    parts = Path(path).parts
    if len(parts) < 3 or parts[0] != "outputs":
        return "", None
    owner, stage, inside = parts[1], parts[2], "/".join(parts[3:])
    key = (study.name if owner == manifest.get("study") else owner, stage)
    if key not in known or (inside and stage not in SCHEMAS):
        return stage, None
    return stage, runs.listed_digest(runs.below(known[key]["outputs"], inside))


def _located(study: Study, manifest: Mapping[str, Any], path: str) -> Path | None:
    """Where an input lies now, also when the study was copied or renamed; None in an archive."""
    parts = Path(path).parts
    if study.place is not None and parts[:2] == ("outputs", manifest.get("study")):
        return study.place.joinpath(*parts[2:])
    return None if study.place is None else resolve(path, study=study.name)


def _gathered(stage: str, unknown: Mapping[str, str]) -> list[str]:
    """One note for each reason."""
    return [f"inputs of {stage} that are not checked, since {reason}: "
            + _named([n for n, r in unknown.items() if r == reason])
            for reason in dict.fromkeys(unknown.values())]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _code(stage: str, manifest: Mapping[str, Any]) -> list[str]:
    changed = [n for n, sha256 in manifest["modules"].items() if _installed(n) != sha256]
    return [f"{stage} was computed by other code than is installed here: code of "
            f"{_named(changed)} has changed since"] if changed else []


def _installed(module: str) -> str | None:
    """The hash of a module of the kit, found by its name and never imported; None if there is
    none."""
    if not re.fullmatch(r"bpo(\.[a-z_0-9]+)+", module):
        return None
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return runs.code_hash(file) if file.is_file() else None


def _pages(study: Study) -> Line:
    """The line of a study's pages, by its reports.json."""
    again = f"write the pages again (python -m bpo report {study.name})"
    notes = _uncovered(study)
    if REPORTS not in study.files:
        lost = [f"{study.name} has no {REPORTS}, so its {len(study.pages)} pages and its manifests "
                f"are not covered: {again}"] if REPORTS not in study.bad and study.pages else []
        return Line("reports", unchecked=len(study.pages), notes=tuple(lost + notes))
    try:
        covered = json.loads(study.files[REPORTS].read())["files"]
        covered = {str(n): str(h) for n, h in covered.items()}
    except (*DAMAGE, RecursionError, LookupError, TypeError, AttributeError):
        return Line("reports", problems=(f"{REPORTS} cannot be read: look at the pages, then "
                                         f"{again}",), notes=tuple(notes))
    problems = []
    for name, sha256 in covered.items():
        member = study.files.get(name)
        back = (f"put the original back, or run the study again (python -m bpo run {study.name})"
                if name.endswith((runs.MANIFEST, ".ipynb")) else again)
        if member is None and name not in study.bad:
            problems.append(f"{name} is gone since the reports were written: {back}")
        elif member is not None and _hash(member) != sha256:
            problems.append(f"{name} was changed after the reports were written: {back}")
    lost = [n for n in study.pages if n not in covered]
    if lost:
        notes = [f"pages that are not covered by {REPORTS}: {_named(lost)}", *notes]
    return Line("reports", len(covered), 0, len(lost), tuple(problems), tuple(notes))


def _uncovered(study: Study) -> list[str]:
    """Of files of which nothing says what they should be, the folders that they are in."""
    tops = [n.split("/")[0] for n in study.files if "/" in n and not n.startswith(".")]
    lost = {t: tops.count(t) for t in dict.fromkeys(tops) if t not in study.stages}
    return [f"files of {study.name} that no manifest covers: "
            + ", ".join(f"{n} in {t}/" for t, n in lost.items())] if lost else []
