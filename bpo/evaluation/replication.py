"""Several seeds of a study, and two studies side by side: queries on their results (notebook 7)."""

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas
from pandas import DataFrame

from bpo.evaluation import benchmarks, claims
from bpo.params import SCHEMAS, Refusal, Replication, outputs_root
from bpo.study import results
from bpo.study import stage as stages

KEYS = ["notebook", "split_or_benchmark", "category", "method", "against", "metric"]
VALUES = ["value", "low", "high", "n", "p", "more_is_better"]
FEWEST = 3  # seeds: two give an interval that says nothing
MOST = 1000  # seeds that a power is looked for in
TABLE = "replication.csv"
WORK = "flops_per_step"
CHANGES = "chosen_change", "rejected_change"  # of the answers' log-probs by training, nats
# The metrics that tables over seeds use, with the first of each benchmark that a judge scores.
STORED = {"chair_i", "cover", "colour_accuracy", "p_true", "p_prior", "prior_rate",
          "pope_adversarial", "pope_random", "words", "wins", "brier", WORK, *CHANGES,
          *(claims.deciding(n)[0] for n in benchmarks.KNOWN)}
# Categories that pages over several seeds leave to the table.
ASIDE = ("kind", "reading", "calibration", "sharpening", "noise")


def seeds(text: str, first: int) -> list[int]:
    """The seeds that `--seeds` names: a count from the study's own seed upwards ("5"), a range
    with both ends ("100-111"), or a list ("100,103,").

    Raises Refusal for another text, a seed twice, and fewer than two seeds.
    """
    if re.fullmatch(r"\d+", text):
        found = list(range(first, first + int(text)))
    elif ends := re.fullmatch(r"(\d+)-(\d+)", text):
        found = list(range(int(ends[1]), int(ends[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*,?", text):
        found = [int(s) for s in text.split(",") if s]
    else:
        raise Refusal(f"--seeds {text}: give a count (5), a range (100-111) or a list (100,103)")
    if len(set(found)) < max(2, len(found)):
        raise Refusal(f"--seeds {text}: a replication needs at least 2 seeds, each once")
    return found


def studies(study: str, seeds: Sequence[int], own: int) -> dict[int, str]:
    """seed -> study: STUDY-seedN each; the study itself under its own seed."""
    return {s: study if s == own else f"{study}-seed{s}" for s in seeds}


def by_seed(p: Replication) -> dict[int, str]:
    """seed -> study, of the studies that were named; else of those that the last `bpo replicate`
    stored, where they are here; else of the study and its STUDY-seedN.

    Raises Refusal where one has no finished comparison, or two have one seed.
    """
    names = p.studies or _stored_studies(p.study) or [
        p.study, *sorted(f.name for f in outputs_root().glob(f"{p.study}-seed*") if f.is_dir())]
    found: dict[int, str] = {}
    for name in names:
        if not _compared(name):
            raise Refusal(f"{_comparison(name) / stages.MANIFEST}: study {name} has no finished "
                          f"comparison; python -m bpo replicate {p.study} runs what is missing, or "
                          "name finished studies in studies")
        seed = stages.read_manifest(_comparison(name))["parameters"]["seed"]
        if seed in found:
            raise Refusal(f"studies {found[seed]} and {name} both have seed {seed}; name one study "
                          "a seed in studies")
        found[seed] = name
    return dict(sorted(found.items()))


def _comparison(study: str) -> Path:
    return stages.stage_folder(study, claims.COMPARISON)


def _compared(study: str) -> bool:
    return (_comparison(study) / stages.MANIFEST).is_file()


def _stored_studies(study: str) -> list[str]:
    if not stored_file(study).is_file():
        return []
    names = list(stored(study)["study"].unique())
    return names if all(map(_compared, names)) else []


def every_seed(p: Replication) -> DataFrame:
    """`read`'s frame of the stored replication, else of the seeds that are here."""
    return stored(p.study) if stored_file(p.study).is_file() else read(by_seed(p))


def read(studies: Mapping[int, str]) -> DataFrame:
    """The results of all seeds, with the columns `seed` and `study`."""
    return pandas.concat([claims.measured(name).assign(seed=seed, study=name)
                          for seed, name in studies.items()], ignore_index=True)


def stored_file(study: str) -> Path:
    return outputs_root() / "results" / f"{study}.csv.gz"


def store(study: str, frame: DataFrame) -> Path:
    """Writes what tables over seeds use of `read`'s frame, rounded to six digits, where the
    repository keeps it: levels, and differences of DPO methods and between the steps to them. The
    same frame gives the same bytes."""
    wanted = frame["metric"].isin(STORED) & ~frame["category"].isin(("reading", "noise"))
    ends = frame["split_or_benchmark"].isin(
        frame.query("notebook == @claims.PROBE and against != ''")
        [["split_or_benchmark", "against"]].to_numpy().ravel())
    wanted |= (frame["notebook"] == claims.PROBE) & ends & frame["metric"].isin(STORED)
    under_noise = (frame["category"] == "noise") & (frame["notebook"] == claims.COMPARISON)
    wanted |= under_noise & frame["metric"].str.startswith("p_")
    steps = frame["method"].str.startswith("sft") & frame["against"].isin(("base", "sft"))
    dpo = ~frame["method"].str.startswith(("base", "sft", claims.RIVAL))
    wanted &= (frame["against"] == "") | steps | dpo | (frame["notebook"] == claims.PROBE)
    return keep(stored_file(study), frame.loc[wanted, ["seed", "study", *KEYS, *VALUES]])


def keep(file: Path, frame: DataFrame) -> Path:
    """Writes a table that the repository keeps."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.tmp")
    frame.round(6).to_csv(
        half, index=False, lineterminator="\n", compression={"method": "gzip", "mtime": 0})
    half.replace(file)
    return file


def store_alone(study: str) -> None:
    """Stores a finished study as the one run that it is, unless several seeds of it are stored."""
    known = stored_file(study).is_file() and stored(study)["seed"].nunique() > 1
    if _compared(study) and not known:
        store(study, read(by_seed(Replication(study=study, studies=[study]))))


def stored(study: str) -> DataFrame:
    """What `store` wrote, as `read` gives it."""
    return kept(stored_file(study), f"bpo replicate {study}")


def kept(file: Path, command: str, read: Callable[[Path], Any] = results.frame) -> Any:
    """What a command has stored, a table that `keep` wrote by default. Raises Refusal where it has
    not."""
    if not file.is_file():
        raise Refusal(f"{file}: nothing is stored; python -m {command} writes it")
    return read(file)


def against(frame: DataFrame, method: str) -> DataFrame:
    """`read`'s levels as differences to those of a method in the same seed, which tell methods
    apart that no study compares by itself. Raises Refusal where the method is not there."""
    levels, at = frame[frame["against"] == ""], ["seed", *(k for k in KEYS if k != "method")]
    of = levels.loc[levels["method"] == method, [*at, "value"]]
    if of.empty:
        raise Refusal(f"--against {method}: no such method is stored; there is: "
                      f"{', '.join(levels['method'].unique())}")
    rows = levels[levels["method"] != method].merge(of, on=at, suffixes=("", "_of"))
    rows["value"] -= rows.pop("value_of")
    return rows.assign(against=method)


def over_seeds(frame: DataFrame) -> DataFrame:
    """One row an estimate that every seed has: {KEYS, seeds, value, low, high, p, more_is_better}.

    value: the mean over k seeds. low, high: mean -/+ t(0.975, k - 1) s / sqrt(k), the 95 % interval
    over seeds (s: standard deviation between them); NaN below `FEWEST` seeds, as is p, that of the
    t test that a difference is 0. It takes seeds as draws from a normal distribution and says how
    well the mean over seeds is known, not where the next seed lies.
    """
    from scipy import stats  # a second to import, and only those who read several seeds need it

    count = frame["seed"].nunique()
    groups = frame.dropna(subset="value").groupby(KEYS, sort=False)
    out = groups.agg(seeds=("seed", "nunique"), value=("value", "mean"),
                     deviation=("value", "std"), more_is_better=("more_is_better", "first"))
    out = out[out["seeds"] == count].reset_index()
    error = out["deviation"] / math.sqrt(count) if count >= FEWEST else math.nan
    half = stats.t.ppf(0.975, count - 1) * error
    out["low"], out["high"] = out["value"] - half, out["value"] + half
    p = 2 * stats.t.sf(out["value"].abs() / error, count - 1)
    out["p"] = numpy.where(out["against"] == "", math.nan, p)
    return out[[*KEYS, "seeds", "value", "low", "high", "p", "more_is_better"]]


def claims_over(frame: DataFrame) -> DataFrame:
    """A row a claim: {claim, says, method, against, decides, SEED: sign of its verdict, difference,
    verdict}, the last two over seeds, as `claims.decided` has them of one study.

    frame: `read`'s. Signs: + holds, o no verdict, − does not hold, · not measured.
    """
    signs = {str(seed): claims.decided(rows).set_index(claims.KEYS)["verdict"].map(claims.SIGNS)
             for seed, rows in frame.groupby("seed")}
    mean = claims.decided(over_seeds(frame)).set_index(claims.KEYS)
    table = pandas.concat({**signs, **mean[["difference", "verdict"]]}, axis=1, sort=False)
    filled = dict.fromkeys(signs, claims.SIGNS[claims.UNMEASURED])
    return table.fillna(filled | {"difference": "–", "verdict": claims.UNMEASURED}).reset_index()


def power(difference: float, deviation: float, seeds: int) -> float:
    """The chance that the two-sided paired t test at 5 % over `seeds` sees a true difference whose
    values spread by `deviation` between seeds: of the noncentral t, by its square, the noncentral
    F, which scipy computes well far out too."""
    from scipy import stats

    if deviation == 0:
        return float(difference != 0)
    edge = stats.t.ppf(0.975, seeds - 1)
    return float(stats.ncf.sf(edge**2, 1, seeds - 1, (difference / deviation) ** 2 * seeds))


def seeds_needed(difference: float, deviation: float, wanted: float = 0.8) -> int | None:
    """The fewest seeds with that power; None above `MOST`. Power grows with seeds: bisection."""
    if power(difference, deviation, MOST) < wanted:
        return None
    return bisect.bisect_left(range(2, MOST), True, key=lambda k: power(
        difference, deviation, k) >= wanted) + 2


def spread(frame: DataFrame, metric: str, *, against: str, where: str) -> dict[str, float]:
    """{seeds, mean, total, seed, image} of bpo's difference. `total`, its standard deviation
    between seeds, holds two things: total² = seed² + image², where image² is the mean squared
    standard error of the seeds' own bootstrap over n images, and falls with 1 / n.

    Raises Refusal below `FEWEST` seeds.
    """
    rows = frame[(frame["split_or_benchmark"] == where) & (frame["method"] == claims.METHOD)
                 & (frame["against"] == against) & (frame["metric"] == metric)].dropna(
                     subset=["value", "low", "high"])
    if len(rows) < FEWEST:
        raise Refusal(f"{metric}, bpo against {against}, {where}: {len(rows)} seeds have it, and a "
                      f"spread between seeds needs {FEWEST}; python -m bpo replicate runs more")
    image = ((rows["high"] - rows["low"]) / (2 * 1.96)).pow(2).mean()
    total = rows["value"].var()
    return {"seeds": len(rows), "mean": rows["value"].mean(), "total": math.sqrt(total),
            "seed": math.sqrt(max(total - image, 0.0)), "image": math.sqrt(image)}


def seed_rows(frame: DataFrame, metric: str, *, where: str, against: str,
              method: str = claims.METHOD) -> DataFrame:
    """The estimates of one number, a row a seed and, where all have it, a last row "mean".

    against: "" for the level of the method, else its paired difference to that baseline.
    """
    rows = frame[(frame["split_or_benchmark"] == where) & (frame["method"] == method)
                 & (frame["against"] == against) & (frame["metric"] == metric)]
    mean = over_seeds(rows) if len(rows) else rows
    each = rows.assign(label="seed " + rows["seed"].astype(str))
    return pandas.concat([each, mean.assign(label="mean")])[
        ["label", "value", "low", "high", "more_is_better"]]


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
    """Rows of `over_seeds` for a page: {where, metric, seeds, difference, reading}, of answers'
    numbers that have a better and a worse."""
    rows = mean[(mean["method"] == method) & (mean["against"] == against)
                & mean["more_is_better"].notna() & ~mean["category"].isin(ASIDE)
                & (mean["split_or_benchmark"] != "image")]
    estimates = results.estimates(rows)
    return DataFrame({
        "where": rows["split_or_benchmark"], "metric": benchmarks.labels(rows),
        "seeds": rows["seeds"],
        "difference": [e.text(sign="+") for e in estimates],
        "reading": [e.reading() for e in estimates]}).reset_index(drop=True)
