"""Taking stock: data of any size becomes a checked file of rows, without being held in memory.

What is bad is written down row by row and never stops a run, unless too much of it is. `readers`
says what rows there are; here they are drawn, their images decoded, and the lot judged.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Rejected, Row
from bpo.params import Refusal
from bpo.study.files import to_json, whole
from bpo.study.seeds import seed_for

ROWS, REJECTED = "rows.jsonl", "rejected_rows.jsonl"


@dataclass(frozen=True)
class _Part:
    data: Path
    root: Path
    prefix: str  # of ids
    below: str  # of image names


@dataclass(frozen=True)
class _Seen:
    """A row on its way. reason: why it is left out. bad: because of the data, not of `keep`."""

    where: str
    row: Row | Rejected
    reason: str | None = None
    bad: bool = False


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
    Memory: as `stream`, and 8 bytes a row drawn.
    """
    parts = _parts(sources, image_folder)

    def lot(seen: _Seen) -> int:
        return seed_for(seed, purpose, seen.row.id)

    limit = None
    if count:
        wanted = (s for s in _bar(_look(parts, keep), "drawing rows") if not s.reason)
        limit = _draw(map(lot, wanted), count)
    drawn, again = itertools.tee(s for s in _look(parts, keep)
                                 if limit is None or s.reason or lot(s) <= limit)
    problems = images.problems(None if s.reason else s.row.image for s in again)
    reasons, faults, usable = Counter(), Counter(), 0
    with whole(folder / ROWS) as rows:
        with whole(folder / REJECTED) as rejected:
            for seen, problem in zip(_bar(drawn, "checking rows"), problems, strict=True):
                reason = seen.reason or problem
                if not reason:
                    rows.write(f"{to_json(seen.row.line())}\n")
                    usable += 1
                    continue
                rejected.write(to_json(
                    {"id": seen.row.id, "where": seen.where, "reason": reason}) + "\n")
                reasons[reason] += 1
                if (seen.bad or problem) and (limit is None or lot(seen) <= limit):
                    faults[reason] += 1
        _judge(usable, reasons, faults, max_bad_share=max_bad_share, listed=folder / REJECTED)
    return reasons


def _judge(usable: int, reasons: Counter, faults: Counter, *, max_bad_share: float, listed: Path
           ) -> None:
    if not usable:
        raise Refusal(f"none of the {reasons.total()} rows can be used: {data_rows.told(reasons)}; "
                      f"{listed} lists them")
    bad, drawn = faults.total(), faults.total() + usable
    if bad > max_bad_share * drawn:
        raise Refusal(f"{bad} of {drawn} rows cannot be used ({bad / drawn:.1%}, more than "
                      f"max_bad_share = {max_bad_share}): {data_rows.told(faults)}; {listed} lists "
                      "them; mend the data or raise max_bad_share")


def _draw(hashes: Iterable[int], count: int) -> int | None:
    """The `count`-th smallest hash, or None where there are no more than that."""
    heap: list[int] = []  # of negatives: the largest kept hash on top
    more = False
    for value in hashes:
        if len(heap) < count:
            heapq.heappush(heap, -value)
        else:
            heapq.heappushpop(heap, -value)
            more = True
    return -heap[0] if more else None


def _parts(sources: Mapping[Path, str], image_folder: Path | None) -> list[_Part]:
    """Where each source's names start; raises Refusal where sources cannot stand together."""
    tops = {data_rows.image_root(data, image_folder) for data in sources}
    if len(tops) != 1:
        raise Refusal("data files of several folders need image_folder, the one folder that all "
                      "their images lie below" if tops else "there is no data to read rows from")
    stems = [d.resolve().stem if d.is_file() else d.resolve().name for d in sources]
    if len(set(stems)) < len(stems):
        raise Refusal(f"two data files have the same name ({', '.join(sorted(stems))}), which ids "
                      "are to begin with; rename one")
    parts = []
    for (data, below), stem in zip(sources.items(), stems, strict=True):
        if Path(below).is_absolute() or ".." in Path(below).parts:
            raise Refusal(f"{data}: its image folder {below!r} must lie below the image folder")
        parts.append(_Part(data, data_rows.image_root(data, Path(*tops, below)),
                           f"{stem}/" if len(stems) > 1 else "",
                           f"{Path(below).as_posix()}/" if below else ""))
    return parts


def _look(parts: Sequence[_Part], keep: Callable[[Row], str | None]) -> Iterator[_Seen]:
    """All rows of the parts, with the reason of those that are bad or not wanted."""
    for part in parts:
        for where, row in data_rows.located(part.data, part.root):
            if isinstance(row, Rejected):
                yield _Seen(where, replace(row, id=part.prefix + row.id), row.reason, bad=True)
            else:
                row = replace(row, id=part.prefix + row.id, image_name=part.below + row.image_name)
                yield _Seen(where, row, keep(row))


def _bar(rows: Iterable[_Seen], label: str) -> Iterable[_Seen]:
    return tqdm(rows, desc=label, unit=" rows", leave=False)
