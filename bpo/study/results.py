"""Results as one tidy table a stage: results.csv beside the manifest, a row an estimate.

Pages, indexes, claims and replications are queries on it; pandas and R read it as it is.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.params import SCHEMAS, Refusal, outputs_root
from bpo.study.files import whole
from bpo.study.stage import MANIFEST

if TYPE_CHECKING:
    import pandas

FILE = "results.csv"
COLUMNS = ("split_or_benchmark", "category", "method", "against", "metric", "value", "low", "high",
           "n", "p", "p_holm", "more_is_better")
BETTER, WORSE, OPEN = "better", "worse", "cannot be told"
DECIDED = (BETTER, WORSE)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; of a difference, also its two-sided p.

    n: what it is out of. more_is_better: None where neither more nor less is good.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    p: float | None = None
    p_holm: float | None = None
    more_is_better: bool | None = None

    def text(self, digits: int = 3, sign: str = "") -> str:
        """"0.345 [0.312, 0.381]", without an interval where there is none; sign "+" for a
        difference; "none" where nothing was measured."""
        if self.value is None:
            return "none"
        shown = [f"{x:{sign}.{digits}f}" for x in (self.value, self.low, self.high)
                 if x is not None]
        return shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]"

    def excludes_zero(self) -> bool:
        return self.low is not None and not self.low <= 0 <= self.high

    def reading(self) -> str:
        """What the interval of a difference allows to say: better, worse, cannot be told; ""
        where neither direction is good."""
        if self.more_is_better is None or self.value is None:
            return ""
        if not self.excludes_zero():
            return OPEN
        return BETTER if (self.low > 0) == self.more_is_better else WORSE


def behind(reading: str) -> str:
    """What stands behind a difference in a table: " better", " worse" or nothing."""
    return f" {reading}" if reading in DECIDED else ""


@dataclass(frozen=True)
class Result:
    """One row of results.csv. method: what was measured; against: what it is compared with, ""
    for a level; then the estimate is that of the paired difference."""

    split_or_benchmark: str
    category: str
    method: str
    against: str
    metric: str
    estimate: Estimate

    def row(self) -> dict[str, Any]:
        return {name: getattr(self if name in COLUMNS[:5] else self.estimate, name)
                for name in COLUMNS}


def compared(split_or_benchmark: str, values: Mapping[str, Mapping[str, Mapping[str, Any]]],
             differences: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
             directions: Mapping[str, tuple[str, bool | None]]) -> list[Result]:
    """Levels and paired differences of methods as results.

    values: method -> metric -> {value, low, high, n}. differences: against -> method -> the same
    with p. directions: metric -> (category, whether more is better).
    """
    def result(method: str, against: str, metric: str, e: Mapping[str, Any]) -> Result:
        category, more = directions[metric]
        return Result(split_or_benchmark, category, method, against, metric,
                      Estimate(**e, more_is_better=more))

    levels = [result(method, "", metric, e) for method, estimates in values.items()
              for metric, e in estimates.items() if metric in directions]
    return levels + [result(method, against, metric, e)
                     for against, methods in differences.items()
                     for method, estimates in methods.items()
                     for metric, e in estimates.items() if metric in directions]


def corrected(results: Sequence[Result]) -> list[Result]:
    """The results with Holm's correction: the differences of one method to one baseline in one
    category that have a better and a worse are looked at together, over all splits or benchmarks.
    """
    out = list(results)
    families: dict[tuple[str, str, str], list[int]] = {}
    for i, r in enumerate(results):
        if r.against and r.estimate.p is not None and r.estimate.more_is_better is not None:
            families.setdefault((r.method, r.against, r.category), []).append(i)
    for family in families.values():
        for i, p in zip(family, holm([results[i].estimate.p for i in family]), strict=True):
            out[i] = replace(results[i], estimate=replace(results[i].estimate,
                                                          p_holm=round(p, 6)))
    return out


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The p values adjusted for being looked at together (Holm 1979), in their own order.

    The k-th smallest of m is multiplied by m - k + 1, is no smaller than the one before it, and at
    most 1. None stays None and is not among the m.
    """
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i])
    adjusted: list[float | None] = [None] * len(ps)
    least = 0.0
    for before, i in enumerate(order):
        least = max(least, min(ps[i] * (len(order) - before), 1.0))
        adjusted[i] = least
    return adjusted


def write(folder: Path, results: Iterable[Result]) -> None:
    """Writes results.csv into a stage's folder; differences are corrected for their number."""
    with whole(folder / FILE) as stream:
        table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(r.row() for r in corrected(list(results)))


def read(folder: Path) -> "pandas.DataFrame":
    """The results of a stage: a row an estimate, empty texts for what does not apply, NaN for what
    was not measured; `more_is_better` holds True, False or None.

    Raises Refusal where the stage has none, as those that older versions of the kit computed.
    """
    import pandas

    file = folder / FILE
    if not file.is_file():
        raise Refusal(f"{file} is not there: run notebooks/{folder.name}.ipynb of this study again")
    return pandas.read_csv(
        file, keep_default_na=False, dtype=dict.fromkeys(COLUMNS[:5], str),
        na_values={c: [""] for c in COLUMNS[5:11]},
        converters={"more_is_better": {"True": True, "False": False, "": None}.get})


def estimate(row: Mapping[str, Any]) -> Estimate:
    """The estimate of a row of `read`'s frame; NaN and columns that are not there become None."""
    def number(name: str) -> float | None:
        value = row.get(name)
        return None if value is None or value != value else float(value)

    n = number("n")
    return Estimate(number("value"), number("low"), number("high"), None if n is None else int(n),
                    number("p"), number("p_holm"), row.get("more_is_better"))


def of_study(study: str) -> "pandas.DataFrame":
    """The results of all finished stages of a study, with the column `notebook`; no rows where
    nothing has finished."""
    import pandas

    frames = [read(manifest.parent).assign(notebook=manifest.parent.name)
              for manifest in sorted((outputs_root() / study).glob(f"*/{MANIFEST}"))
              if manifest.parent.name in SCHEMAS]
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(
        columns=[*COLUMNS, "notebook"])
