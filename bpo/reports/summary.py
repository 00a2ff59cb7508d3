"""Several seeds of a study, and two studies: figures and tables of notebook 7, and result tables in
Markdown, the sections of outputs/README.md that commands rewrite.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from pandas import DataFrame

from bpo.evaluation import benchmarks, claims, comparison, replication
from bpo.params import Replication, outputs_root
from bpo.reports import figures
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.study import results
from bpo.study.files import write_whole


def seeds(by_seed: Mapping[int, str]) -> Shown:
    return report.say("**{n} seeds**: {s}.", n=len(by_seed),
                      s=", ".join(f"{seed} ({name})" for seed, name in by_seed.items()))


def forests(frame: DataFrame, p: Replication) -> list[Shown]:
    """A figure a baseline: bpo minus it by seed and over seeds, of `p.metrics` on the main split.
    """
    where, shown = comparison.main_split(frame), []
    for baseline in p.baselines:
        panels = {benchmarks.label(where, metric): replication.seed_rows(
            frame, metric, where=where, against=baseline) for metric in p.metrics}
        shown.append(report.figure(
            figures.differences(panels), alt=f"bpo minus {baseline} by seed, with the mean",
            caption=f"bpo minus {baseline}, {where} images; a row a seed, then the mean over seeds."
        ))
    return shown


def two_studies(p: Replication) -> list[Shown]:
    """What the study and the other did differently and what came out, where another was named."""
    if not p.other:
        return [report.say("No second study was named: set other, or run python -m bpo compare {s} "
                           "OTHER.", s=p.study)]
    shared, apart = replication.side_by_side(p.study, p.other, baselines=p.baselines)
    return [report.table(replication.settings_that_differ(p.study, p.other),
                         f"What {p.study} and {p.other} did differently"),
            report.table(shared, "Base and bpo in both studies",
                         f"the intervals of {apart} of {len(shared)} numbers do not meet")]


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
    counted = verdicts.query("line == ''").assign(
        open=lambda x: len(studies) - x["holds"] - x["fails"])[
        ["says", "against", "holds", "fails", "open"]].rename(columns={
            "says": "claim", "fails": "does not hold", "open": "cannot be told"})
    return write_section(f"results {p.study}", f"""\
### `bpo replicate {p.study}`: seeds {', '.join(map(str, studies))}

On how many of {len(studies)} seeds each claim holds:

{markdown(counted.to_dict("records"))}

Mean over seeds with its 95 % t interval over seeds, then the difference on each seed; \\* marks a
difference whose own 95 % interval (bootstrap over images) excludes zero.

{markdown(numbers(replication.read(studies), p).to_dict("records"))}""")


def numbers(frame: DataFrame, p: Replication) -> DataFrame:
    """A row a metric of `p.metrics` on the main split, and of what decides each benchmark: {metric,
    base, bpo, and for each baseline the mean difference and that of each seed}. "–" stands for what
    a seed lacks."""
    main, keys = comparison.main_split(frame), ["split_or_benchmark", "metric"]
    shown = [(main, metric) for metric in p.metrics] + [
        (name, metric) for name in frame["split_or_benchmark"].unique()
        if name in claims.BENCHMARKS for metric in claims.BENCHMARKS[name][:2] if metric]
    frame = DataFrame(shown, columns=keys).merge(frame.dropna(subset="value"), on=keys)
    mean = replication.over_seeds(frame).drop(columns="more_is_better")
    mean = mean.assign(column=results.names(mean), text=results.texts(mean))
    each = frame[(frame["method"] == claims.METHOD) & (frame["against"] != "")]
    each = each.assign(column="each seed, " + each["against"], text=[
        f"{e.value:+.3f}" + ("\\*" if e.excludes_zero() else "") for e in results.estimates(each)])
    each = each.groupby([*keys, "column"])["text"].agg(" / ".join).reset_index()
    columns = ["base", claims.METHOD]
    for baseline in p.baselines:
        columns += [f"{claims.METHOD} − {baseline}", f"each seed, {baseline}"]
    table = pandas.concat([mean, each]).set_index([*keys, "column"])["text"].unstack().reindex(
        index=shown, columns=columns).fillna("–")
    table.insert(0, "metric", [f"{benchmarks.title(where)}: {benchmarks.label(where, metric)}"
                               for where, metric in shown])
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the first row's keys are the columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(r.values() for r in rows)] if rows else []
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
