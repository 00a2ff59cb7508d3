"""Archives of a study: one zip file whose bytes depend on its members alone, read back with every
byte accounted for; or the folder that it was unpacked to.

Members are stored, not compressed: the same members give the same bytes whatever the compression
library, and none can swell when it is read. They lie below one folder, STUDY.packed/, sorted, with
one fixed time, beside PACKED.json, which lists them and ends with a seal over the rest of itself.
"""

import functools
import hashlib
import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bpo.params import Refusal
from bpo.records import to_json

PACKED = "PACKED.json"
FORMAT = 1
WHEN = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold
LARGEST_TABLE = 256 * 2**20  # bytes of a JSON file that is read whole
ENTRY = ("date_time", "compress_type", "comment", "extra", "create_system", "create_version",
         "extract_version", "reserved", "flag_bits", "volume", "internal_attr", "external_attr",
         "compress_size")
# What reading a damaged zip file raises.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, struct.error,
          NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Member:
    """A file of a study, wherever it lies. size: bytes."""

    size: int
    open: Callable[[], AbstractContextManager[BinaryIO]]

    def read(self) -> bytes:
        """All of it; raises ValueError where it is too large to be a table or a page's record."""
        if self.size > LARGEST_TABLE:
            raise ValueError(f"{self.size:,} bytes are too many for a JSON file")
        with self.open() as stream:
            return stream.read()

    def sha256(self) -> str:
        with self.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Archive:
    """What an archive holds. members: by their names below its folder.  problems: of the archive
    itself, as sentences.  sha256: of the zip file; "" of an unpacked folder."""

    members: Mapping[str, Member]
    problems: tuple[str, ...]
    sha256: str


def files_below(folder: Path) -> dict[str, Member]:
    """The files below a folder by name, sorted. Links are followed: a stage may lie on another
    disk."""
    found = {}
    for root, _, names in os.walk(folder, followlinks=True):
        for file in (Path(root, n) for n in names):
            if file.is_file():
                found[file.relative_to(folder).as_posix()] = Member(
                    file.stat().st_size, functools.partial(file.open, "rb"))
    return dict(sorted(found.items()))


def _links_below(folder: Path) -> list[str]:
    return sorted(os.path.relpath(os.path.join(root, n), folder)
                  for root, folders, names in os.walk(folder) for n in (*folders, *names)
                  if os.path.islink(os.path.join(root, n)))


def text(held: Mapping[str, Any]) -> str:
    """PACKED.json of what it holds: with a seal, so that an edit of it shows as any other does."""
    body = {n: v for n, v in held.items() if n != "seal"}
    seal = hashlib.sha256(to_json(body, indent=1).encode()).hexdigest()
    return to_json(body | {"seal": seal}, indent=1) + "\n"


def listed(packed: Member) -> dict[str, Any]:
    """What PACKED.json holds; raises ValueError when it is not as it was written."""
    written = packed.read()
    try:
        held = json.loads(written)
    except (ValueError, RecursionError):
        raise ValueError("it cannot be read") from None
    if not isinstance(held, dict) or text(held).encode() != written:
        raise ValueError("it was changed after it was written")
    if held.get("format") != FORMAT:
        raise ValueError(f"its format {held.get('format')} is not one that this kit knows")
    try:
        whole = all(isinstance(f["sha256"], str) and isinstance(f["bytes"], int)
                    for f in held["files"].values())
        whole &= all(isinstance(s, str) for s in held["studies"])
        whole &= all(isinstance(kind["files"], int) and isinstance(kind["what"], str)
                     for kind in held["left_out"])
    except (LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError("it does not list files, studies and what was left out")
    return held


def write(file: Path, members: Mapping[str, Member], *, below: str) -> None:
    """The archive, whole or not at all. below: the folder that all members lie in."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as raw:
            with zipfile.ZipFile(raw, "w") as archive:
                for name in sorted(members):
                    _add(archive, f"{below}/{name}", members[name])
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def in_memory(content: bytes) -> Member:
    return Member(len(content), lambda: io.BytesIO(content))


def _add(archive: zipfile.ZipFile, name: str, member: Member) -> None:
    info = _info(name, size=member.size)
    with member.open() as source, archive.open(info, "w", force_zip64=_large(info)) as target:
        while block := source.read(2**20):
            target.write(block)


def _info(name: str, *, size: int) -> zipfile.ZipInfo:
    """A member's entry, in which nothing depends on the machine or the day."""
    info = zipfile.ZipInfo(name, date_time=WHEN)
    info.create_system, info.external_attr = 3, 0o100644 << 16
    info.file_size = info.compress_size = size
    return info


def _large(info: zipfile.ZipInfo) -> bool:
    return info.file_size > zipfile.ZIP64_LIMIT // 2


@contextmanager
def opened(place: Path) -> Iterator[Archive]:
    """An archive, or the folder that one was unpacked to, for reading.

    Raises Refusal when it is no archive that `pack` wrote, or is too damaged to list its members.
    """
    if place.is_dir():
        if not (place / PACKED).is_file():
            raise Refusal(f"{place}: there is no {PACKED} here, so this is no unpacked archive of "
                          "a study; name the folder that holds it")
        links = _links_below(place)
        yield Archive({} if links else files_below(place), tuple(
            f"{link} is a link, which no archive of a study holds: unpack the archive again"
            for link in links), "")
        return
    with place.open("rb") as raw:
        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
        try:
            archive = zipfile.ZipFile(raw)
        except DAMAGE:
            raise Refusal(f"{place}: this is not an archive that python -m bpo pack wrote, or it "
                          "is damaged; get it again") from None
        with archive:
            entries = archive.infolist()
            roots = {n.split("/")[0] for n in archive.namelist()
                     if n.count("/") == 1 and n.endswith(f"/{PACKED}")}
            if len(roots) != 1:
                raise Refusal(f"{place}: there is no {PACKED} in this archive, so it is not one "
                              "that python -m bpo pack wrote, or it is damaged; get it again")
            root = f"{roots.pop()}/"
            problems = _of_names(entries, root) + _of_bytes(archive, raw)
            members = {e.filename.removeprefix(root): Member(
                e.file_size, functools.partial(archive.open, e)) for e in entries}
            yield Archive(members, tuple(problems), sha256)


def _of_names(entries: list[zipfile.ZipInfo], root: str) -> list[str]:
    names = [e.orig_filename for e in entries]
    out = [f"the archive holds {n} {names.count(n)} times: get the original"
           for n in sorted(set(names)) if names.count(n) > 1]
    for entry in entries:
        name = entry.orig_filename
        unsafe = name != os.path.normpath(name) or re.search(r"[\\\0-\x1f]|^\w:", name)
        if unsafe or not name.startswith(root) or name.startswith("/"):
            out.append(f"the name {name!r} leads out of the archive's folder or is no plain name: "
                       "do not unpack this archive")
        elif entry.external_attr >> 28 not in (0, 0o10):
            out.append(f"{name} is a link or no plain file: do not unpack this archive")
    return out


def _of_bytes(archive: zipfile.ZipFile, raw: BinaryIO) -> list[str]:
    """Whether each byte that is not a member's content is the one that `write` puts there."""
    again = ("it was written again by another program or is damaged; get the original, or unpack "
             "it and verify the folder")
    place, entries = 0, archive.infolist()
    for entry in entries:
        own = _info(entry.filename, size=entry.file_size)
        own.CRC, own.flag_bits = entry.CRC, 0 if entry.filename.isascii() else 0x800
        header = own.FileHeader(_large(own))
        if max(entry.file_size, place) > zipfile.ZIP64_LIMIT:  # then size or place stand in there
            own.extra, own.create_version, own.extract_version = entry.extra, 45, 45
        raw.seek(entry.header_offset)
        if (entry.header_offset != place or raw.read(len(header)) != header
                or any(getattr(entry, n) != getattr(own, n) for n in ENTRY)):
            return [f"the archive's entry of {entry.filename} is not as pack writes it: {again}"]
        place += len(header) + entry.compress_size
    names = [e.filename for e in entries]
    records = sum(46 + len(e.filename.encode()) + len(e.extra) for e in entries)
    # Of an archive of gigabytes the end is longer by what 64 bits take.
    end = 22 if place <= zipfile.ZIP64_LIMIT and len(entries) <= zipfile.ZIP_FILECOUNT_LIMIT else 98
    if (names != sorted(names) or archive.comment
            or raw.seek(0, os.SEEK_END) != place + records + end):
        return [f"the archive holds bytes that belong to no file, or another order: {again}"]
    return []
