"""Notebook 2's data, of any size, becomes a checked file of rows, without being held in memory.

What is bad is written down row by row and never stops a run, unless too much of it is. `rows` says
what rows there are; here they are drawn, their images decoded, and bad ones counted.
"""

import heapq
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import REPEATED, Reasons, Rejected, Row
from bpo.params import PairGeneration, Refusal
from bpo.study import progress
from bpo.study.files import to_json, whole
from bpo.study.seeds import seed_for
from bpo.study.text import pieces

ROWS, REJECTED = "rows.jsonl", "rejected_rows.jsonl"


class TooLong(Rejected):
    """A row that could be used, but for the length of its answer."""


def data_files(p: PairGeneration) -> dict[Path, str]:
    """The annotated files or folders, and the folder below image_folder that each starts from."""
    data = {p.data: ""} if isinstance(p.data, str) else p.data
    return {p.path(file): below for file, below in data.items()}


def image_root(p: PairGeneration) -> Path:
    """The folder that the image names of rows.jsonl and pairs.jsonl start from."""
    first = next(iter(data_files(p)))
    return p.optional_path(p.image_folder) or (first if first.is_dir() else first.parent)


def take_stock(p: PairGeneration, folder: Path, *, special: re.Pattern | None = None) -> None:
    """Writes rows.jsonl, the usable rows in the order of the data files, and rejected_rows.jsonl
    (id, where, reason, detail) into `folder`. special: as in `rows.stream`.

    With several data files an id becomes "<name of the data file>/<id>". Where `p.rows` is not 0,
    those with the smallest hashes of (seed, id) are drawn among the rows that are not too long, and
    before images are opened, so that bad images make the rows fewer. rejected_rows.jsonl tells of
    all rows that were read, but for images only of those drawn.
    Raises Refusal where data files cannot stand together, where no row is left, and where more than
    `p.max_bad_share` of the rows that the draw falls on are bad, not counting those too long;
    rejected_rows.jsonl then stays to be read. Memory: as `rows.stream`, and the draw's hashes.
    """
    def draw(row: Row | Rejected) -> int:
        return seed_for(p.seed, "pair rows", row.id)

    root, limit = image_root(p).resolve(), math.inf
    if p.rows:
        draws = (draw(row) for row in _rows(p, special, "drawing rows") if isinstance(row, Row))
        smallest = heapq.nsmallest(p.rows + 1, draws)
        limit = smallest[p.rows - 1] if len(smallest) > p.rows else math.inf
    drawn, ahead = itertools.tee(row for row in _rows(p, special, "checking rows")
                                 if isinstance(row, Rejected) or draw(row) <= limit)
    problems = images.problems(row.image for row in ahead if isinstance(row, Row))
    reasons, faults, usable = Reasons(), Reasons(), 0
    with whole(folder / ROWS) as good:
        with whole(folder / REJECTED) as rejected:
            for row in drawn:
                if isinstance(row, Row):
                    problem = next(problems)
                    if not problem:
                        good.write(f"{to_json(row.line())}\n")
                        usable += 1
                        continue
                    row = Rejected(row.id, row.where, problem, str(row.image))
                rejected.write(f"{to_json(row.line(root))}\n")
                reasons.add(row)
                # Nothing is wrong with a long row, or with one that is there already.
                if not (isinstance(row, TooLong) or row.reason == REPEATED) and draw(row) <= limit:
                    faults.add(row)
        bad, count = faults.total(), faults.total() + usable
        if not usable:
            raise Refusal(f"none of the {reasons.total()} rows can be used: "
                          f"{reasons}{data_rows.hint(reasons)}; {folder / REJECTED} lists them")
        if bad > p.max_bad_share * count:
            raise Refusal(f"{bad} of {count} rows cannot be used ({bad / count:.1%}, more than "
                          f"max_bad_share = {p.max_bad_share}): {faults}; "
                          f"{folder / REJECTED} lists them; mend the data or raise max_bad_share")


def _rows(p: PairGeneration, special: re.Pattern | None, label: str
          ) -> Iterator[Row | Rejected]:
    """All rows of the data files, with a bar."""
    files = data_files(p)
    names = [f.resolve().stem if f.is_file() else f.resolve().name for f in files]
    if len(set(names)) < len(names):
        raise Refusal(f"two data files have the same name ({', '.join(sorted(names))}), which ids "
                      "are to begin with; rename one")
    for data, below in files.items():
        if Path(below).is_absolute() or ".." in Path(below).parts:
            raise Refusal(f"{data}: its image folder {below!r} must lie below the image folder")
    with progress.part(label, unit="rows") as advance:
        for (data, below), name in zip(files.items(), names, strict=True):
            prefix = f"{name}/" if len(files) > 1 else ""
            inside = f"{Path(below).as_posix()}/" if below else ""
            for row in data_rows.stream(data, image_root(p) / below, special=special):
                advance()
                row = replace(row, id=prefix + row.id)
                if isinstance(row, Row):
                    row = replace(row, image_name=inside + row.image_name)
                    if len(pieces(row.answer)) > p.max_words:
                        reason = f"answer longer than {p.max_words} words"
                        row = TooLong(row.id, row.where, reason)
                yield row
