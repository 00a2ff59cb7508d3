"""Data of any size becomes a checked file of rows, without being held in memory.

What is bad is written down row by row and never stops a run, unless too much of it is. `rows` says
what rows there are; here they are drawn, their images decoded, and bad ones counted.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Rejected, Row
from bpo.params import Refusal
from bpo.study.files import to_json, whole
from bpo.study.seeds import seed_for

ROWS, REJECTED = "rows.jsonl", "rejected_rows.jsonl"


class Unwanted(Rejected):
    """A row that could be used but is not wanted."""


def take_stock(sources: Mapping[Path, str], image_folder: Path | None, folder: Path, *,
               keep: Callable[[Row], str | None], count: int, seed: int, purpose: str,
               max_bad_share: float) -> Counter:
    """Writes rows.jsonl, the usable rows in the sources' order, and rejected_rows.jsonl (id, where,
    reason) into `folder`; returns how many rows were rejected for which reason.

    sources: data -> the folder below `image_folder` that its image names start from, "" for
    `image_folder` itself; where that is None, the data's own folder. With several sources an id
    becomes "<name of the data file>/<id>". Image names in rows.jsonl start from `image_folder`.
    keep: says why a row is not wanted, or None.
    count: rows with the smallest hashes of (seed, purpose, id) among those wanted; 0 means all. The
    draw comes before images are opened, so that bad ones make the rows fewer. rejected_rows.jsonl
    tells of all rows that were read, but for images only of those drawn.
    max_bad_share: of the rows that the draw falls on, bad ones included, the share that may be bad;
    what `keep` turns away is not bad. Above it, and where no row is left, Refusal is raised and
    rejected_rows.jsonl stays to be read.
    Memory: as `rows.stream`, and the hashes of the rows drawn.
    """
    _refuse_mixed(sources, image_folder)

    def rows(label: str) -> Iterator[Row | Rejected]:
        return tqdm(_rows(sources, image_folder, keep), desc=label, unit=" rows", leave=False)

    def lot(row: Row | Rejected) -> int:
        return seed_for(seed, purpose, row.id)

    limit = math.inf
    if count:
        lots = heapq.nsmallest(count + 1, (lot(r) for r in rows("drawing rows")
                                           if isinstance(r, Row)))
        limit = lots[count - 1] if len(lots) > count else math.inf
    drawn, ahead = itertools.tee(r for r in rows("checking rows")
                                 if isinstance(r, Rejected) or lot(r) <= limit)
    problems = images.problems(r.image for r in ahead if isinstance(r, Row))
    reasons, faults, usable = Counter(), Counter(), 0
    with whole(folder / ROWS) as good:
        with whole(folder / REJECTED) as rejected:
            for row in drawn:
                if isinstance(row, Row):
                    problem = next(problems)
                    if not problem:
                        good.write(f"{to_json(row.line())}\n")
                        usable += 1
                        continue
                    row = Rejected(row.id, row.where, problem)
                rejected.write(f"{to_json(asdict(row))}\n")
                reasons[row.reason] += 1
                if not isinstance(row, Unwanted) and lot(row) <= limit:
                    faults[row.reason] += 1
        listed = f"{folder / REJECTED} lists them"
        if not usable:
            raise Refusal(f"none of the {reasons.total()} rows can be used: "
                          f"{data_rows.told(reasons)}; {listed}")
        bad, all_drawn = faults.total(), faults.total() + usable
        if bad > max_bad_share * all_drawn:
            raise Refusal(f"{bad} of {all_drawn} rows cannot be used ({bad / all_drawn:.1%}, more "
                          f"than max_bad_share = {max_bad_share}): {data_rows.told(faults)}; "
                          f"{listed}; mend the data or raise max_bad_share")
    return reasons


def _refuse_mixed(sources: Mapping[Path, str], image_folder: Path | None) -> None:
    """Raises Refusal where sources cannot stand together."""
    roots = {data_rows.image_root(data, image_folder) for data in sources}
    if len(roots) != 1:
        raise Refusal("data files of several folders need image_folder, the one folder that all "
                      "their images lie below" if roots else "there is no data to read rows from")
    names = sorted(map(_name, sources))
    if len(set(names)) < len(names):
        raise Refusal(f"two data files have the same name ({', '.join(names)}), which ids are to "
                      "begin with; rename one")
    for data, below in sources.items():
        if Path(below).is_absolute() or ".." in Path(below).parts:
            raise Refusal(f"{data}: its image folder {below!r} must lie below the image folder")


def _name(data: Path) -> str:
    return data.resolve().stem if data.is_file() else data.resolve().name


def _rows(sources: Mapping[Path, str], image_folder: Path | None,
          keep: Callable[[Row], str | None]) -> Iterator[Row | Rejected]:
    """All rows of the sources, those that `keep` turns away as Unwanted."""
    for data, below in sources.items():
        prefix = f"{_name(data)}/" if len(sources) > 1 else ""
        folder = f"{Path(below).as_posix()}/" if below else ""
        for row in data_rows.stream(data, data_rows.image_root(data, image_folder) / below):
            row = replace(row, id=prefix + row.id)
            if isinstance(row, Row):
                row = replace(row, image_name=folder + row.image_name)
                if reason := keep(row):
                    row = Unwanted(row.id, row.where, reason)
            yield row
