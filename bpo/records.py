"""Rows that users hold, annotated answers to questions about images, their truth; JSON lines.

A row is one assistant turn of a conversation about one image. `readers` makes rows of data sets;
here are their form, the draw among them, and files that are whole or not there.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from bpo.seeds import seed_for


@dataclass(frozen=True)
class Row:
    """One annotated answer.

    prompt: messages {"role", "content": text} that end with the user's question.
    image: the image's file.  image_name: its path as the data set wrote it.
    category: what the truth file says, else "presence" for yes/no answers, "caption" for answers of
    20 words or more, "question" for the rest.
    given: rejected answers that the data set itself brings.
    """

    id: str
    image: Path
    image_name: str
    prompt: tuple[dict[str, str], ...]
    answer: str
    category: str
    given: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        return self.prompt[-1]["content"]

    def line(self) -> dict[str, Any]:
        """The row as a line of rows.jsonl; its image by name."""
        out = {"id": self.id, "image": self.image_name, "category": self.category,
               "prompt": list(self.prompt), "answer": self.answer}
        return out | {"given": list(self.given)} if self.given else out

    @classmethod
    def from_line(cls, line: dict[str, Any], root: Path) -> "Row":
        """The row of a line of rows.jsonl; root: the folder that image names start from."""
        return cls(line["id"], root / line["image"], line["image"], tuple(line["prompt"]),
                   line["answer"], line["category"], tuple(line.get("given", ())))


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: where it stands ("rows.json, row 17", counted from 1) and why."""

    id: str
    where: str
    reason: str


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


def guess_category(answer: str) -> str:
    """The category of a row that no truth file describes, from its annotated answer."""
    words = answer.lower().split()
    if words and words[0].strip(".,!") in ("yes", "no"):
        return "presence"
    return "caption" if len(words) >= 20 else "question"


def truth_file(data: Path) -> Path | None:
    """truth.json beside a data file or in a data folder, if it is there."""
    file = (data if data.is_dir() else data.parent) / "truth.json"
    return file if file.is_file() else None


def read_truth(data: Path) -> dict[str, Any]:
    """What truth.json says: {vocabulary, images, rows}; empty where there is none."""
    file = truth_file(data)
    truth = json.loads(file.read_text(encoding="utf-8")) if file else {}
    return {part: truth.get(part, {}) for part in ("vocabulary", "images", "rows")}


def draw_rows(rows: Sequence[Row], count: int, seed: int, *, purpose: str) -> list[Row]:
    """`count` of the rows in their own order, chosen by a hash of seed and id; 0 means all.

    The choice does not depend on which other rows are there or in which order.
    """
    if not count or count >= len(rows):
        return list(rows)
    chosen = sorted(rows, key=lambda r: seed_for(seed, purpose, r.id))[:count]
    keep = {r.id for r in chosen}
    return [r for r in rows if r.id in keep]


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
