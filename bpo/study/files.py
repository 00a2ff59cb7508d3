"""Files that are whole or not there, their hashes; JSON, and JSON lines read one at a time."""

import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

SAMPLED_ABOVE = 256 * 2**20  # bytes; `file_hash` reads blocks of a file that is larger


class LineFile(Sequence):
    """The lines of a JSON-lines file by number, read one at a time.

    Holds 8 bytes a line and no open file, so it can be shared by threads and processes; the file
    must not change meanwhile. Iteration streams.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._starts = array("Q", [0])
        with self.path.open("rb") as stream:
            for line in stream:
                self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> dict:
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.path} has {len(self)} lines, not a line {number}")
        number %= len(self)
        with self.path.open("rb") as stream:
            stream.seek(self._starts[number])
            return json.loads(stream.read(self._starts[number + 1] - self._starts[number]))

    def __iter__(self) -> Iterator[dict]:
        with self.path.open("rb") as stream:
            for line in stream:
                yield json.loads(line)


@contextmanager
def whole(file: Path) -> Iterator[TextIO]:
    """A file to write text to that takes its name only when all is written and on the disk: a
    reader sees the old file or the whole new one. Lines end with \\n on Windows too: the bytes are
    hashed, and `sha256sum` reads no other."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(file: Path, text: str) -> None:
    with whole(file) as stream:
        stream.write(text)


def write_lines(file: Path, records: Iterable[dict]) -> None:
    with whole(file) as stream:
        stream.writelines(f"{to_json(r)}\n" for r in records)


def read_lines(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def to_json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)


def file_hash(file: Path) -> str:
    """sha256 of a file; above 256 MB of its size and 64 blocks of 1 MB spread evenly over it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= SAMPLED_ABOVE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(64):
            stream.seek((size - 2**20) * block // 63)
            digest.update(stream.read(2**20))
    return digest.hexdigest()


class Hashes:
    """Hashes of files, of which those are read again whose size or times of change differ from when
    they were read last.

    file: where they are kept, beside what it is about and no part of it: names are hashed too, so
    that it holds none, and those below its folder are relative, so that they move with it. Without
    it every file is read once.  read: a file's hash.
    changed: files whose hash was another one before.
    A file that changed just before it was read is not kept: a later change may bear the same times.
    """

    def __init__(self, file: Path, read: Callable[[Path], str] | None = None):
        self.file, self.read, self.changed = file, read or file_hash, set()
        try:
            self._kept = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            self._kept = {}
        self._new = False

    def __call__(self, file: Path) -> str:
        state = file.stat()
        seen = f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        name = file.absolute()
        name = name.relative_to(self.file.parent) if name.is_relative_to(self.file.parent) else name
        key = hashlib.sha256(os.fsencode(name.as_posix())).hexdigest()[:24]
        before, sha256 = self._kept.get(key, ("", ""))
        if before == seen:
            return sha256
        found = self.read(file)
        if sha256 not in ("", found):
            self.changed.add(file)
        # Only POSIX's time of change cannot be set, and lie ahead.
        moment = state.st_ctime_ns if os.name == "posix" else state.st_mtime_ns
        # The clock of a file system ticks every few milliseconds, of some in whole seconds.
        if time.time_ns() - moment > (5e7 if moment % 10**9 else 2e9):
            self._kept[key], self._new = (seen, found), True
        return found

    def __enter__(self) -> "Hashes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._new:
            write_whole(self.file, to_json(self._kept))
