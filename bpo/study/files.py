"""Files that are whole or not there; JSON, and JSON lines read one at a time."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


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
    reader sees the old file or the whole new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
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
