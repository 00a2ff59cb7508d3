"""Files that are whole or not there, their hashes; JSON, and JSON lines read one at a time."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
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
