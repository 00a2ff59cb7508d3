"""The rows of annotated data: each one usable, or rejected with the reason.

Rows are streamed from any layout and kind of file that `layouts` and `files` know; one bad row
never stops a run. Lists are for held-out sets; data of any size goes through `check`.
"""

import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bpo.data import files, images, layouts, turns
from bpo.params import Refusal
from bpo.study.seeds import seed_for
from bpo.study.text import pieces, words

_PEEK = 100  # entries in which a layout must show itself: the first ones may be bad rows
_NAMED = 12  # fields of an unknown layout that a message names


@dataclass(frozen=True)
class Row:
    """One annotated answer.

    prompt: messages {"role", "content": text} that end with the user's question.
    image: the image's file.  image_name: its path as the data set wrote it.
    category: what the truth file says, else "presence" for yes/no answers, "caption" for answers of
    20 words or more, "question" for the rest.
    given: rejected answers that the data set itself brings.  where: as in Rejected.
    named: whether the id is the data set's own.
    """

    id: str
    image: Path
    image_name: str
    prompt: tuple[dict[str, str], ...]
    answer: str
    category: str
    given: tuple[str, ...] = ()
    where: str = field(default="", compare=False)
    named: bool = field(default=True, compare=False)

    @property
    def question(self) -> str:
        return self.prompt[-1]["content"]

    def line(self) -> dict[str, Any]:
        """The row as a line of rows.jsonl; its image by name."""
        line = {"id": self.id, "image": self.image_name, "category": self.category,
                "prompt": list(self.prompt), "answer": self.answer}
        return line | ({"given": list(self.given)} if self.given else {})

    @classmethod
    def from_line(cls, line: dict[str, Any], root: Path) -> "Row":
        """The row of a line of rows.jsonl; root: the folder that image names start from."""
        return cls(line["id"], root / line["image"], line["image"], tuple(line["prompt"]),
                   line["answer"], line["category"], tuple(line.get("given", ())))


REPEATED = "repeated row"


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: where it stands ("rows.json, row 17", counted from 1) and why.

    detail: what is wrong with this one, such as the path that was tried; may be empty.
    """

    id: str
    where: str
    reason: str
    detail: str = field(default="", compare=False)

    def line(self, root: Path) -> dict[str, str]:
        """The row as a line of rejected_rows.jsonl; a path that was tried by its name in `root`."""
        detail = self.detail.removeprefix(f"{root}/")
        return {"id": self.id, "where": self.where, "reason": self.reason} | (
            {"detail": detail} if detail else {})


class Reasons(Counter):
    """How many rows are left out for which reason, and the first of each."""

    def __init__(self, rejected: Iterable[Rejected] = ()):
        super().__init__()
        self.first: dict[str, str] = {}
        for row in rejected:
            self.add(row)

    def add(self, row: Rejected) -> None:
        self[row.reason] += 1
        self.first.setdefault(row.reason, ": ".join(filter(None, (row.where, row.detail))))

    def __add__(self, other: Counter) -> "Reasons":
        out = Reasons()
        out.update(super().__add__(other))
        out.first = {**getattr(other, "first", {}), **self.first}
        return out

    def __str__(self) -> str:
        return ", ".join(f"{n} {r}" + f" (first: {self.first[r]})" * (r in self.first)
                         for r, n in self.most_common())


def guess_category(answer: str) -> str:
    """The category of a row that no truth file describes, from its annotated answer."""
    if words(answer)[:1] in (["yes"], ["no"]):
        return "presence"
    return "caption" if len(pieces(answer)) >= 20 else "question"


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
    drawn = heapq.nsmallest(count or len(rows), rows, key=lambda r: seed_for(seed, purpose, r.id))
    ids = {r.id for r in drawn}
    return [r for r in rows if r.id in ids]


def layout(data: Path) -> str:
    """The name of the data's layout, by its first entries; Refusal with what was seen in them."""
    first = [e for _, e in itertools.islice(files.read(data, files.home(data)), _PEEK)]
    if name := next(filter(None, map(layouts.detect, first)), None):
        return name
    names = files.columns(data) or next((list(e) for e in first if isinstance(e, Mapping)), [])
    if len(names) > _NAMED:
        names = [*names[:_NAMED], "..."]
    broken = next((e.reason for e in first if isinstance(e, layouts.Broken)), "")
    seen = f"its entries have the fields {', '.join(names)}" if names else (
        broken or "its entries have no named fields" if first else "it holds no entry")
    advice = next((f"; {text}" for field, text in layouts.ADVICE.items() if field in names), "")
    raise Refusal(f"{data}: {seen}{advice}; what can be read is " + "; ".join(
        f"{n} {{{x.shape}}}" for n, x in layouts.LAYOUTS.items()))


def image_root(data: Path, image_folder: Path | None) -> Path:
    """The folder that image names start from: `image_folder`, else the data's own, resolved."""
    if not data.exists():
        raise Refusal(f"{data}: there is no such data file")
    root = image_folder.resolve() if image_folder else files.home(data)
    if not root.is_dir():
        raise Refusal(f"{root}: there is no such folder of images")
    return root


def stream(data: Path, image_folder: Path | None = None, *, special: re.Pattern | None = None
           ) -> Iterator[Row | Rejected]:
    """The rows of a data file or folder in their order, and those that cannot be used.

    Images are looked up, not opened. special: the checkpoint's own tokens (`encoding.special`); a
    row whose text holds one is rejected. A repeated row is, too, whatever its id, unless truth.json
    tells of that id (POPE asks one thing in several parts). An id that other rows have already gets
    ~2, ~3, ... behind it: published sets give several questions about an image its one id. Rows
    without ids that follow one another and differ in the rejected answer alone are one row, as
    exports write a line a pair.
    Memory: two hashes of 63 bits a row, about 150 bytes, to know the ids and rows seen; of a
    million rows, two different ones are taken for the same with a chance of about 1 in 10^7.
    Raises Refusal when the data is missing, of no known layout, or breaks off.
    """
    last = None
    for row in _stream(data, image_folder, special):
        if isinstance(last, Row) and isinstance(row, Row) and not row.named and not last.named and (
                row.image, row.prompt, row.answer) == (last.image, last.prompt, last.answer):
            last = replace(last, given=tuple(dict.fromkeys(last.given + row.given)))
            continue
        if last:
            yield last
        last = row
    if last:
        yield last


def _stream(data: Path, image_folder: Path | None, special: re.Pattern | None
            ) -> Iterator[Row | Rejected]:
    root = image_root(data, image_folder)
    form, truth = layouts.LAYOUTS[layout(data)], read_truth(data)["rows"]
    seen: set[int] = set()

    def is_new(*text: object) -> bool:
        before = len(seen)
        seen.add(seed_for(0, *text))
        return len(seen) > before

    for number, (where, entry) in enumerate(files.read(data, root)):
        base = layouts.entry_id(entry, number)
        try:
            entry = layouts.plain(entry)
            base, named = layouts.entry_id(entry, number), not turns.missing(entry.get("id"))
            name, answers = layouts.image_name(entry), form.read(entry, base)
            file = images.place(root, name)
            if file is None:
                raise turns.Unusable("image path leaves the image folder", name)
            if not images.exists(file):
                raise turns.Unusable("image file is missing", str(file))
        except turns.Unusable as reason:
            yield Rejected(base, where, str(reason), reason.detail)
            continue
        for row_id, prompt, answer, given in answers:
            texts = (*(m["content"] for m in prompt), answer)
            if not answer:
                yield Rejected(row_id, where, "empty answer")
            elif reason := next(filter(None, (turns.strange(t, special) for t in texts)), None):
                yield Rejected(row_id, where, reason)
            elif not is_new("row", row_id if row_id in truth else "", name, prompt, answer, given):
                yield Rejected(row_id, where, REPEATED)
            else:
                category = truth.get(row_id, {}).get("category") or guess_category(answer)
                ids = itertools.chain([row_id], (f"{row_id}~{n}" for n in itertools.count(2)))
                yield Row(next(i for i in ids if is_new("id", i)), file, name, prompt, answer,
                          category, given, where, named)


def list_rows(data: Path, image_folder: Path | None = None, *, special: re.Pattern | None = None
              ) -> tuple[list[Row], Reasons]:
    """The rows of a data set that fits in memory, images not opened yet, and why others were
    skipped; raises Refusal when none can be used."""
    rows, skipped = [], Reasons()
    for row in stream(data, image_folder, special=special):
        if isinstance(row, Row):
            rows.append(row)
        else:
            skipped.add(row)
    return _some(data, rows, skipped)


def open_images(rows: Sequence[Row]) -> tuple[list[Row], Reasons]:
    """The rows whose image can be used, and why others cannot."""
    problems = list(images.problems(row.image for row in rows))
    return ([row for row, problem in zip(rows, problems, strict=True) if not problem],
            Reasons(Rejected(row.id, row.where, problem, str(row.image))
                    for row, problem in zip(rows, problems, strict=True) if problem))


def read_rows(data: Path, image_folder: Path | None = None, *, count: int = 0, seed: int = 0,
              purpose: str = "", special: re.Pattern | None = None) -> tuple[list[Row], Reasons]:
    """`count` rows as `draw_rows` draws them (0: all), and why others were skipped.

    Only the images of drawn rows are opened; a bad one makes the rows fewer. Raises Refusal when
    no row can be used.
    """
    rows, skipped = list_rows(data, image_folder, special=special)
    rows, bad = open_images(draw_rows(rows, count, seed, purpose=purpose))
    return _some(data, rows, skipped + bad)


def _some(data: Path, rows: list[Row], skipped: Reasons) -> tuple[list[Row], Reasons]:
    if not rows:
        raise Refusal(f"{data}: none of its {skipped.total()} rows can be used: {skipped}"
                      f"{hint(skipped)}")
    return rows, skipped


def hint(reasons: Mapping[str, int], option: str = "set image_folder to") -> str:
    """What to do about images that were not found; "" where others are the reasons."""
    return f"; {option} the folder that image names start from" * any(
        r in reasons for r in ("image file is missing", "image path leaves the image folder"))
