"""Results as one tidy table a stage: results.csv beside the manifest, a row an estimate.

Pages, indexes, claims and replications are queries on it; pandas and R read it as it is.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.params import SCHEMAS, Refusal, outputs_root
from bpo.study.files import whole
from bpo.study.stage import MANIFEST
from bpo.study.text import number

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FILE = "results.csv"
COLUMNS = ("split_or_benchmark", "category", "method", "against", "metric", "value", "low", "high",
           "n", "p", "p_holm", "more_is_better")
BETTER, WORSE, OPEN = "better", "worse", "no difference seen"
DECIDED = (BETTER, WORSE)

# metric -> (label, category, whether more is better; None: neither is)
Metrics = Mapping[str, tuple[str, str, bool | None]]


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
        shown = [number(x, digits, sign) for x in (self.value, self.low, self.high)
                 if x is not None]
        return shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]"

    def excludes_zero(self) -> bool:
        return self.low is not None and not self.low <= 0 <= self.high

    def reading(self) -> str:
        """What the interval of a difference allows to say: better, worse, no difference seen;
        "" where neither direction is good."""
        if self.more_is_better is None or self.value is None:
            return ""
        if not self.excludes_zero():
            return OPEN
        return BETTER if (self.low > 0) == self.more_is_better else WORSE


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


def compared(split_or_benchmark: str, values: Mapping[str, Mapping[str, Mapping[str, Any]]],
             differences: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
             metrics: Metrics) -> list[Result]:
    """Levels and paired differences of methods as results, of the metrics that are named.

    values: method -> metric -> {value, low, high, n}. differences: against -> method -> the same
    with p.
    """
    return [Result(split_or_benchmark, metrics[metric][1], method, against, metric,
                   Estimate(**e, more_is_better=metrics[metric][2]))
            for against, methods in {"": values, **differences}.items()
            for method, estimates in methods.items()
            for metric, e in estimates.items() if metric in metrics]


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
    """Writes results.csv into a stage's folder, with Holm's correction: the differences of one
    method to one baseline in one category that have a better and a worse are looked at together,
    over all splits or benchmarks."""
    rows = [{**vars(r), **vars(r.estimate)} for r in results]
    families = defaultdict(list)
    for row in rows:
        if row["against"] and row["p"] is not None and row["more_is_better"] is not None:
            families[row["method"], row["against"], row["category"]].append(row)
    for family in families.values():
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = round(p, 6)
    with whole(folder / FILE) as stream:
        table = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read(folder: Path) -> "DataFrame":
    """The results of a stage: a row an estimate, empty texts for what does not apply, NaN for what
    was not measured; `more_is_better` holds True, False or None; `notebook` is the stage's.

    Raises Refusal where the stage has none, as those that older versions of the kit computed.
    """
    file = folder / FILE
    if not file.is_file():
        raise Refusal(f"{file} is not there: run notebooks/{folder.name}.ipynb of this study again")
    return frame(file).assign(notebook=folder.name)


def frame(file: Path) -> "DataFrame":
    """A csv file with columns of `COLUMNS` and others, as `read` gives it."""
    import pandas

    return pandas.read_csv(
        file, keep_default_na=False, dtype=dict.fromkeys(COLUMNS[:5], str),
        na_values={c: [""] for c in COLUMNS[5:11]},
        converters={"more_is_better": {"True": True, "False": False, "": None}.get})


def of_study(study: str) -> "DataFrame":
    """The results of all finished stages of a study; no rows where nothing has finished."""
    import pandas

    frames = [read(manifest.parent)
              for manifest in sorted((outputs_root() / study).glob(f"*/{MANIFEST}"))
              if manifest.parent.name in SCHEMAS]
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(
        columns=[*COLUMNS, "notebook"])


def estimate(row: Mapping[str, Any]) -> Estimate:
    """The estimate of a row of `read`'s frame; NaN and columns that are not there become None."""
    def number(name: str) -> float | None:
        value = row.get(name)
        return None if value is None or value != value else float(value)

    n = number("n")
    return Estimate(number("value"), number("low"), number("high"), None if n is None else int(n),
                    number("p"), number("p_holm"), row.get("more_is_better"))


def estimates(frame: "DataFrame") -> list[Estimate]:
    return [estimate(row) for row in frame.to_dict("records")]


def names(frame: "DataFrame") -> "Series":
    """Each row's method, of a difference with what it is compared with: "bpo − base"."""
    return frame["method"] + (" − " + frame["against"]).where(frame["against"] != "", "")


def texts(frame: "DataFrame") -> "Series":
    """Each row for a table: of a level "0.345 [0.312, 0.381]", two digits where it is out of fewer
    than a hundred; of a difference with its sign and what its interval allows to say, as in
    "+0.100 [+0.050, +0.150] better"."""
    import pandas

    def text(row: Mapping[str, Any]) -> str:
        e = estimate(row)
        if not row["against"]:
            return e.text(2 if e.n and e.n < 100 else 3)
        return e.text(sign="+") + (f" {e.reading()}" if e.reading() in DECIDED else "")

    return pandas.Series(map(text, frame.to_dict("records")), index=frame.index, dtype=object)
