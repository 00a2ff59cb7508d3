"""Several seeds of a study, and two studies side by side: queries on their results (notebook 7)."""

import math
from collections.abc import Mapping, Sequence

import pandas
from pandas import DataFrame

from bpo.evaluation import benchmarks, claims
from bpo.params import SCHEMAS, Refusal, Replication, outputs_root
from bpo.study import results
from bpo.study import stage as stages

KEYS = ["notebook", "split_or_benchmark", "category", "method", "against", "metric"]
FEWEST = 3  # seeds: two give an interval that says nothing
TABLE = "replication.csv"
# Categories that pages over several seeds leave to the table.
ASIDE = ("kind", "reading", "calibration")


def studies(study: str, *, seed: int, count: int) -> dict[int, str]:
    """seed -> study of a replication: the study itself under its own seed, then the seeds after
    it, each in a study of its own."""
    return {s: study if s == seed else f"{study}-seed{s}" for s in range(seed, seed + count)}


def by_seed(p: Replication) -> dict[int, str]:
    """seed -> study, of the studies that were named, else of the study and its STUDY-seedN.

    Raises Refusal where one has no finished comparison, or two have one seed.
    """
    names = p.studies or [p.study, *sorted(f.name for f in outputs_root().glob(f"{p.study}-seed*"))]
    found: dict[int, str] = {}
    for name in names:
        folder = stages.stage_folder(name, claims.COMPARISON)
        if not (folder / stages.MANIFEST).is_file():
            raise Refusal(f"{folder / stages.MANIFEST}: study {name} has no finished comparison; "
                          f"python -m bpo replicate {p.study} runs what is missing")
        seed = stages.read_manifest(folder)["parameters"]["seed"]
        if seed in found:
            raise Refusal(f"studies {found[seed]} and {name} both have seed {seed}; name one study "
                          "a seed in studies")
        found[seed] = name
    return dict(sorted(found.items()))


def read(studies: Mapping[int, str]) -> DataFrame:
    """The results of all seeds, with the column `seed`."""
    return pandas.concat([results.of_study(name).assign(seed=seed)
                          for seed, name in studies.items()], ignore_index=True)


def over_seeds(frame: DataFrame) -> DataFrame:
    """One row an estimate that every seed has: {KEYS, seeds, value, low, high, more_is_better}.

    value: the mean over k seeds. low, high: mean -/+ t(0.975, k - 1) s / sqrt(k), the 95 % interval
    over seeds (s: standard deviation between them); NaN below `FEWEST` seeds. It takes seeds as
    draws from a normal distribution and says how well the mean over seeds is known, not where the
    next seed lies.
    """
    from scipy import stats  # a second to import, and only those who read several seeds need it

    count = frame["seed"].nunique()
    groups = frame.dropna(subset="value").groupby(KEYS, sort=False)
    out = groups.agg(seeds=("seed", "nunique"), value=("value", "mean"),
                     deviation=("value", "std"), more_is_better=("more_is_better", "first"))
    out = out[out["seeds"] == count].reset_index()
    half = math.nan
    if count >= FEWEST:
        half = stats.t.ppf(0.975, count - 1) * out["deviation"] / math.sqrt(count)
    out["low"], out["high"] = out["value"] - half, out["value"] + half
    return out[[*KEYS, "seeds", "value", "low", "high", "more_is_better"]]


def claims_over(tables: Mapping[int, DataFrame]) -> DataFrame:
    """A row a claim and a row a line of a claim: {claim, says, against, line, seed N: verdict,
    holds, fails}. `line` is "" for the claim itself; holds, fails: on how many seeds.

    tables: seed -> `claims.table` of its study.
    """
    every = pandas.concat([table.assign(seed=f"seed {seed}") for seed, table in tables.items()])
    keys = ["claim", "says", "against", "line", "seed"]
    verdicts = every.set_index(keys)["verdict"].unstack(sort=False).fillna("not measured")
    counts = {"holds": (verdicts == claims.HOLDS).sum(axis=1),
              "fails": (verdicts == claims.FAILS).sum(axis=1)}
    return verdicts.assign(**counts).reset_index()


def counted(verdicts: DataFrame) -> str:
    """On how many seeds each claim holds, in a line; claim 4 needs two model sizes."""
    rows = verdicts[(verdicts["line"] == "") & (verdicts["claim"] != 4)]
    return "; ".join(f"claim {r.claim} against {r.against} on {r.holds}" for r in rows.itertuples())


def seed_rows(frame: DataFrame, metric: str, *, where: str, against: str,
              method: str = claims.METHOD) -> DataFrame:
    """The estimates of one number, a row a seed and, where all have it, a last row "mean".

    against: "" for the level of the method, else its paired difference to that baseline.
    """
    rows = frame[(frame["split_or_benchmark"] == where) & (frame["method"] == method)
                 & (frame["against"] == against) & (frame["metric"] == metric)]
    mean = over_seeds(rows) if len(rows) else rows
    each = rows.assign(label="seed " + rows["seed"].astype(str))
    return pandas.concat([each, mean.assign(label="mean")])[["label", "value", "low", "high"]]


def settings_that_differ(study: str, other: str) -> DataFrame:
    """What two studies did differently: {notebook, what, name, STUDY, OTHER}, of parameters,
    inputs, the code of modules and versions, in the stages that both have finished."""
    rows = []
    for notebook in SCHEMAS:
        folders = [stages.stage_folder(s, notebook) for s in (study, other)]
        if not all((f / stages.MANIFEST).is_file() for f in folders):
            continue
        first, second = (stages.read_manifest(f) for f in folders)
        for what in ("parameters", "inputs", "modules", "versions"):
            longest = 12 if what in ("inputs", "modules") else None  # those are hashes
            for name in first[what].keys() | second[what].keys():
                values = [str(m[what].get(name, "–")) for m in (first, second)]
                if values[0] != values[1]:
                    rows.append([notebook, what, name, *(v[:longest] for v in values)])
    return DataFrame(rows, columns=["notebook", "what", "name", study, other]).sort_values(
        ["notebook", "what", "name"], ignore_index=True)


def side_by_side(study: str, other: str, *, baselines: Sequence[str]) -> tuple[DataFrame, int]:
    """What base and bpo measure in two studies, and bpo minus each baseline: {where, metric,
    method, STUDY, OTHER as text, intervals}; and of how many the 95 % intervals do not meet,
    which says more than that their difference excludes zero."""
    frames = [results.of_study(s).dropna(subset=["value", "low"]) for s in (study, other)]
    both = frames[0].merge(frames[1], on=KEYS, suffixes=("_1", "_2"))
    level = both["method"].isin(["base", claims.METHOD]) & (both["against"] == "")
    difference = (both["method"] == claims.METHOD) & both["against"].isin(baselines)
    both = both[(level | difference) & ~both["category"].isin(ASIDE)].reset_index(drop=True)
    apart = (both["low_1"] > both["high_2"]) | (both["low_2"] > both["high_1"])
    texts = [results.texts(both[["against"]].assign(
        **{name: both[f"{name}{side}"] for name in ("value", "low", "high")}))
        for side in ("_1", "_2")]
    return DataFrame({
        "where": both["split_or_benchmark"], "metric": benchmarks.labels(both),
        "method": results.names(both), study: texts[0], other: texts[1],
        "intervals": apart.map({True: "apart", False: "meet"}),
    }), int(apart.sum())


def shown(mean: DataFrame, *, method: str, against: str) -> DataFrame:
    """Rows of `over_seeds` for a page: {where, metric, seeds, difference, reading}, of numbers that
    have a better and a worse."""
    rows = mean[(mean["method"] == method) & (mean["against"] == against)
                & mean["more_is_better"].notna() & ~mean["category"].isin(ASIDE)]
    estimates = results.estimates(rows)
    return DataFrame({
        "where": rows["split_or_benchmark"], "metric": benchmarks.labels(rows),
        "seeds": rows["seeds"],
        "difference": [e.text(sign="+") for e in estimates],
        "reading": [e.reading() for e in estimates]}).reset_index(drop=True)
