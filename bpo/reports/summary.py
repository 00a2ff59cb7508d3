"""Result tables in Markdown: the sections of outputs/README.md that commands rewrite."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from bpo.evaluation import claims, replication
from bpo.params import Replication, outputs_root
from bpo.study import results
from bpo.study.files import write_whole


def write_section(name: str, text: str) -> Path:
    """Puts `text` between <!-- NAME --> and <!-- /NAME --> in outputs/README.md, at its end where
    the marks are not there yet; everything else stays as it is. Returns the file."""
    file = outputs_root() / "README.md"
    before = file.read_text(encoding="utf-8") if file.is_file() else "# Results\n"
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{first}\n{text.strip()}\n{last}"
    marked = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    after, count = marked.subn(lambda _: section, before, count=1)
    write_whole(file, after if count else f"{before.rstrip()}\n\n{section}\n")
    return file


def write_results(p: Replication) -> Path:
    """The section `results STUDY`: verdicts on the claims, and numbers with an interval over seeds
    and each seed's difference."""
    studies = replication.by_seed(p)
    verdicts = replication.claims_over({s: claims.table(name) for s, name in studies.items()})
    count = len(studies)
    counted = [{"claim": r.says, "against": r.against, "holds": r.holds, "does not hold": r.fails,
                "cannot be told": count - r.holds - r.fails}
               for r in verdicts[verdicts["line"] == ""].itertuples()]
    return write_section(f"results {p.study}", f"""\
### `bpo replicate {p.study}`: seeds {', '.join(map(str, studies))}

On how many of {count} seeds each claim holds:

{markdown(counted)}

Mean over seeds with its 95 % t interval over seeds, then the difference on each seed; \\* marks a
difference whose own 95 % interval (bootstrap over images) excludes zero.

{markdown(numbers(replication.read(studies), p))}""")


def numbers(frame: DataFrame, p: Replication) -> list[dict[str, str]]:
    """A row a metric of `p.metrics` on the main split, and of what decides each benchmark: {metric,
    base, bpo, and for each baseline the mean difference and that of each seed}. "–" stands for what
    a seed lacks."""
    frame = frame[~frame["category"].isin(replication.ASIDE)].dropna(subset="value")
    main, method = claims.main_split(frame), claims.METHOD
    shown = [(main, m, main) for m in p.metrics] + [
        (b, m, claims.benchmark(b)[0]) for b in frame["split_or_benchmark"].unique()
        if b in claims.BENCHMARKS for m in claims.BENCHMARKS[b][:2] if m]
    rows = []
    for where, metric, title in shown:
        row = {"metric": f"{title}: {claims.label(where, metric)}"}
        for name, against in (("base", ""), (method, ""), *((method, b) for b in p.baselines)):
            *each, mean = [
                results.estimate(row) for row in replication.seed_rows(
                    frame, metric, where=where, against=against, method=name).to_dict("records")
            ] or [None]
            complete = len(each) == frame["seed"].nunique()
            row[f"{name} − {against}" if against else name] = (
                mean.text(sign="+" if against else "") if complete else "–")
            if against:
                row[f"each seed, {against}"] = " / ".join(
                    f"{e.value:+.3f}" + "\\*" * e.excludes_zero() for e in each) or "–"
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the first row's keys are the columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(r.values() for r in rows)] if rows else []
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
