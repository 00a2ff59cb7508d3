"""What was touched of a study, or of an archive of one, since it was computed: every hash again.

In a study's folder a stage's files are compared with its manifest, its inputs with what lies at
their paths now, stages with one another, and pages and manifests with reports.json, which `record`
writes with the index. An archive, or the folder it was unpacked to, is compared with its
PACKED.json and with the manifests and reports.json inside; the study need not be there.

What this does not prove: that nobody meant to. Whoever can write the folder or the archive can
write its hashes too, so that all fits again. What cannot be rewritten is a hash that was published
elsewhere: `pack` and `verify` print the sha256 of an archive and of its PACKED.json for that. Nor
does it prove that results are right, or that they came from the inputs as they are named. Of files
above 256 MB a stage's manifest covers 64 blocks; PACKED.json covers all of every file.
"""

import argparse
import fcntl
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpo import archives, records, rounds, runs, touched
from bpo.archives import DAMAGE, PACKED, Member
from bpo.galleries import visible
from bpo.params import SCHEMAS, Refusal, outputs_root, resolve, short
from bpo.touched import REPORTS, Line, Study

LOCKS = (".run.lock", ".stage.lock")
SHOWN = 20  # problems that are told one by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="STUDY|ARCHIVE", help="a study's name or folder, an "
                        "archive that pack wrote, or the folder it was unpacked to")


def run(options: argparse.Namespace) -> int:
    place = find(options.target)
    packed = place.is_file() or (place / PACKED).is_file()
    lines, hashes = of_archive(place) if packed else (of_study(place), {})
    problems = [p for line in lines for p in line.problems]
    told = [*_table(lines), *(f"sha256 of {n}: {sha256}" for n, sha256 in hashes.items()),
            *problems[:SHOWN]]
    if len(problems) > SHOWN:
        told.append(f"and {len(problems) - SHOWN} more like these")
    told += [f"note: {note}" for line in lines for note in line.notes]
    told.append(f"{len(problems)} touched: {short(place)}" if problems
                else f"nothing was touched: {short(place)}")
    # An archive comes from elsewhere, and what it names may hold what steers a terminal.
    print(*map(visible, told), sep="\n")
    return int(bool(problems))


def find(target: str) -> Path:
    """The file or folder that a user means: a study by its name, or a path."""
    named = outputs_root() / target
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", target) and named.is_dir():
        return named
    paths = [Path(target).expanduser().absolute(), resolve(target, study=""), named]
    if Path(target).parts[:1] == ("outputs",):
        paths.reverse()
    for path in paths:
        if path.exists():
            return path
    known = sorted(f.name for f in outputs_root().glob("*") if f.is_dir())
    raise Refusal(f"{target}: no such study, folder or archive. There are studies: "
                  f"{', '.join(known) or 'none'}")


def record(folder: Path) -> Path:
    """Writes reports.json, whole: the sha256 of a study's pages and of its manifests as they are
    now. Whoever calls this says that they are good, so only who has just written the pages does."""
    files = archives.files_below(folder)
    study = Study(folder.name, files, folder)
    covered = study.pages + [f"{s}/{runs.MANIFEST}" for s in study.stages
                             if f"{s}/{runs.MANIFEST}" in files]
    held = {"files": {n: runs.file_hash(folder / n) for n in covered}}
    records.write_whole(folder / REPORTS, records.to_json(held, indent=1) + "\n")
    return folder / REPORTS


@contextmanager
def at_rest(folders: Sequence[Path]) -> Iterator[None]:
    """For the block's length nothing computes in these studies; raises Refusal where it does. The
    locks are only looked at, so that a run may start, and what was found then counts for nothing.
    """
    before = _marks(folders)
    yield
    if _marks(folders) != before:
        raise Refusal(f"{short(folders[0])} was run while it was being read, so what was found "
                      "says nothing; give the command again")


def _marks(folders: Sequence[Path]) -> list[int]:
    """When each lock was last taken; raises Refusal when one is held."""
    marks = []
    for file in (folder / name for folder in folders for name in LOCKS):
        if not file.is_file():
            marks.append(0)
            continue
        with file.open() as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refusal(f"{short(file.parent)} is being run now (process "
                              f"{stream.read().strip() or 'unknown'}), so its files change: wait "
                              "for it to end, then give the command again") from None
        marks.append(file.stat().st_mtime_ns)
    return marks


def with_rounds(folder: Path) -> list[Path]:
    """A study's folder and those of its later rounds, which stand beside it."""
    found = [folder]
    while (after := folder.with_name(rounds.study_of(folder.name, len(found) + 1))).is_dir():
        found.append(after)
    return found


def of_study(folder: Path) -> list[Line]:
    """Raises Refusal when no stage is complete there or the study is being run now."""
    folder = folder.resolve()
    if not folder.is_dir() or not any((folder / s / runs.MANIFEST).is_file()
                                      for s in (*SCHEMAS, rounds.MergedModel.notebook)):
        raise Refusal(f"{short(folder)}: no stage of a study is complete here; run one first "
                      f"(python -m bpo run {folder.name})")
    folders = with_rounds(folder)
    with at_rest(folders):
        return touched.lines([Study(f.name, archives.files_below(f), f) for f in folders])


def of_archive(place: Path) -> tuple[list[Line], dict[str, str]]:
    """The lines, and the hashes to compare with published ones, by file name. Raises Refusal when
    this is no archive of a study."""
    with archives.opened(place) as archive:
        if PACKED not in archive.members:
            return [Line(PACKED, problems=archive.problems)], {}
        own = archive.members[PACKED]
        problems, bad = list(archive.problems), {}
        try:
            held = archives.listed(own)
            hashes = {PACKED: own.sha256()}
        except DAMAGE as damage:
            return [Line(PACKED, problems=(*problems, f"{PACKED} is not whole: {damage}; get the "
                                                      "archive again"))], {}
        if archive.sha256:
            hashes = {place.name: archive.sha256} | hashes
        files = held["files"]
        for name, known in files.items():
            if trouble := _trouble(archive.members.get(name), known):
                problems.append(f"{name} {trouble}: get the original archive")
                bad[name] = trouble
        extra = sorted(archive.members.keys() - files.keys() - {PACKED})
        problems += [f"{n!r} was added after packing, {PACKED} does not list it: get the original "
                     "archive" for n in extra]
        good = {n: archive.members[n] for n in files if n not in bad}
        studies = [Study(s, touched.inside(good, s), None, frozenset(touched.inside(bad, s)))
                   for s in held["studies"]]
        left = sum(kind["files"] for kind in held["left_out"])
        first = Line(PACKED, files=len(files), problems=tuple(problems), notes=(
            (f"{left} files were left out when it was packed: "
             + ", ".join(f"{k['files']} {k['what']}" for k in held["left_out"]),) if left else ()))
        return [first, *touched.lines(studies)], hashes


def _trouble(member: Member | None, known: Mapping[str, Any]) -> str:
    if member is None:
        return "is gone from the archive"
    try:
        same = member.size == known["bytes"] and member.sha256() == known["sha256"]
    except DAMAGE:
        return "is damaged"
    return "" if same else "was changed after packing"


def _table(lines: Sequence[Line]) -> Iterator[str]:
    wide = max(len(line.name) for line in lines) + 2
    yield f"{'':{wide}}{'files':>7}{'inputs':>8}{'not checked':>13}{'touched':>9}"
    for line in lines:
        yield (f"{line.name:{wide}}{line.files:7}{line.inputs:8}{line.unchecked:13}"
               f"{len(line.problems):9}")
