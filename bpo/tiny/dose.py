"""Notebook 8's work: what each method does against the dose, the share of typical colours among
the preference rows. One world a seed; on its preference rows of each dose notebooks 2 to 4 run as
studies of their own, so that whatever is interrupted goes on where it was.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.figure import Figure
from pandas import DataFrame

from bpo.evaluation import benchmarks, comparison, replication
from bpo.pairs import stage as pairs
from bpo.params import (
    SOURCES,
    DoseResponse,
    DPOTraining,
    PairGeneration,
    QualitativeComparison,
    TinyWorld,
)
from bpo.reports import figures, page, readme
from bpo.reports.cards import Shown
from bpo.study import progress, results
from bpo.study import stage as stages
from bpo.study.results import Result
from bpo.study.text import visible
from bpo.tiny import data
from bpo.tiny import stage as tiny
from bpo.training import stage as training

# of a stage on a dose, about, for the time left
SECONDS = (("2_pair_generation", 40), ("3_dpo_training", 80), ("4_qualitative_comparison", 80))
SLOPES = ("p_prior", "p_true", "chair_i", "cover")
DOSE_PANELS = {  # (split, metric) -> title
    ("counterfactual", "p_prior"): "P(prior's answer): lower is better\ncounterfactual images",
    ("counterfactual", "chair_i"): "CHAIRi: lower is better\ncounterfactual images",
    ("counterfactual", "cover"): "Cover: higher is better\ncounterfactual images",
    ("natural", "colour_accuracy"): "Colour accuracy: higher is better\nnatural images",
    ("natural", "chair_i"): "CHAIRi: lower is better\nnatural images",
    ("kept", "is_prior"): "Share with the prior's answer\nrejected answers kept"}


def dose_curves(frame: DataFrame, *, own_share: float) -> Figure:
    """A panel each of `DOSE_PANELS` that was measured: methods against the dose, every seed thin,
    their mean thick. The base has no dose: a line at its mean, a band over its seeds.

    frame: {seed, dose: share of typical colours among the preference rows, method, split, metric,
    value}. own_share: the alignment's, a vertical line.
    """
    styles = figures.styles(frame["method"].unique())
    measured = {where: rows for where, rows in frame.groupby(["split", "metric"], sort=False)}
    titles = {where: title for where, title in DOSE_PANELS.items() if where in measured}
    lines = math.ceil(len(titles) / 2)
    fig, panels = figures.grid(lines, 2, width=figures.WIDTH, height=0.6 + 2.7 * lines)
    for panel, (where, title) in zip(panels, titles.items(), strict=False):
        for method, rows in measured[where].groupby("method", sort=False):
            style, label = styles[method], visible(method)
            if method == "base":
                seeds = rows.groupby("seed")["value"].mean()
                panel.axhspan(seeds.min(), seeds.max(), color=style["color"], alpha=0.12, lw=0)
                panel.axhline(seeds.mean(), color=style["color"], linewidth=1.4, label=label)
                continue
            values = rows.pivot(index="dose", columns="seed", values="value").sort_index()
            panel.plot(values, color=style["color"], linewidth=0.8, alpha=0.5)
            panel.plot(values.mean(axis=1, skipna=False), **style | {"linewidth": 2.4}, label=label)
        panel.axvline(own_share, color=figures.QUIET, linewidth=1.2, linestyle=(0, (2, 2)),
                      label="the alignment's own share")
        panel.set(title=title, xlabel="share of typical colours")
        if where[0] == "kept":  # sources of rejected answers, which no other panel has
            sources = set(measured[where]["method"])
            panel.legend(handles=[x for x in panel.lines if x.get_label() in sources],
                         frameon=False, fontsize=8)
        panel.set_xticks(sorted(frame["dose"].unique()))
    figures.hide(panels[len(titles):])
    figures.legend_above(fig, panels[0])
    return fig


def run(p: DoseResponse) -> stages.Result:
    """The stage of notebook 8: results.csv, from the studies STUDY-worldSEED and
    STUDY-worldSEED-DOSE beside it."""
    return stages.stage(p, lambda folder: _work(p, folder), inputs={})


def _work(p: DoseResponse, folder: Path) -> dict[str, Any]:
    worlds = [f"{p.study}-world{seed}" for seed in range(p.seed, p.seed + p.repeats)]
    progress.announce(part for world in worlds for part in (
        (f"{world}/0_tiny_world", 260), *((f"{world}-{dose:g}/{notebook}", seconds)
                                          for dose in p.doses for notebook, seconds in SECONDS)))
    frames = []
    for seed in range(p.seed, p.seed + p.repeats):
        world = f"{p.study}-world{seed}"
        tiny.run(p.of(TinyWorld, study=world, seed=seed, preference_doses=p.doses))
        frames += [_one_dose(p, world, seed, dose).assign(seed=seed, dose=dose)
                   for dose in p.doses]
    measured = pandas.concat(frames, ignore_index=True)
    results.write(folder, [
        Result(f"{r['split_or_benchmark']}, dose {r['dose']:g}", f"seed {r['seed']}", r["method"],
               r["against"], r["metric"], results.estimate(r))
        for r in measured.to_dict("records")] + slopes(measured))
    return {"seeds": p.repeats, "doses": p.doses}


def _one_dose(p: DoseResponse, world: str, seed: int, dose: float) -> DataFrame:
    """The results of notebooks 2 to 4 on a world's preference rows of a dose."""
    study, place = f"{world}-{dose:g}", f"outputs/{world}/0_tiny_world"
    rows = f"{place}/{data.dosed(dose)}"
    shared = {"study": study, "seed": seed, "model": f"{place}/model"}
    pairs.run(p.of(PairGeneration, **shared, data=f"{rows}/rows.json", score_candidates=False,
                   text_model=f"{place}/language_model",
                   describe_prompt=f"{place}/prompts/describe.txt",
                   question_prompt=f"{place}/prompts/question.txt"))
    training.run(p.of(DPOTraining, **shared, image_folder=rows, variants={}))
    comparison.run(p.of(
        QualitativeComparison, **shared,
        splits={s: f"{place}/{s}/rows.json" for s in ("counterfactual", "natural")},
        calibration_data=f"{place}/development/rows.json"))
    frame = results.of_study(study)
    of_prior = frame["metric"].eq("is_prior") & frame["category"].eq("audit")
    return frame[frame["notebook"].eq(QualitativeComparison.notebook)
                 | of_prior & frame["method"].isin(SOURCES)].dropna(subset="value")


def slopes(measured: DataFrame) -> list[Result]:
    """Of every number in `SLOPES`, level or difference, its change from dose 0 to dose 1: the mean
    over seeds of each seed's least-squares slope, with the 95 % t interval over seeds."""
    keys = ["seed", *replication.KEYS]
    rows = measured[measured["metric"].isin(SLOPES) & (measured["method"] != "base")]
    each = rows.groupby(keys, sort=False).apply(
        lambda g: np.polyfit(g["dose"], g["value"], 1)[0], include_groups=False)
    each = each.rename("value").reset_index().assign(category="slope", more_is_better=None)
    return [Result(r["split_or_benchmark"], "slope", r["method"], r["against"], r["metric"],
                   results.estimate(r)) for r in replication.over_seeds(each).to_dict("records")]


def levels(table: DataFrame) -> DataFrame:
    """{seed, dose, split, method, metric, value} of every level, from results.csv."""
    rows = table.query("against == '' and category != 'slope'")
    split = rows["split_or_benchmark"].str.rsplit(", dose ", n=1, expand=True)
    return rows.assign(split=split[0], dose=split[1].astype(float),
                       seed=rows["category"].str.removeprefix("seed ").astype(int))


def curves(p: DoseResponse, table: DataFrame) -> Shown:
    """The figure of `dose_curves`."""
    measured = levels(table)
    return page.figure(
        dose_curves(measured, own_share=TinyWorld().image_typical),
        alt="Each method's P(prior), CHAIRi and cover on counterfactual images, colour accuracy "
        "and CHAIRi on natural ones, against the share of typical colours in preference rows; and "
        "the share of rejected answers that are the prior's",
        caption=f"Thin: {p.repeats} seeds; thick: their mean; the base's line has a band over its "
        f"seeds. {p.test_images} counterfactual and {p.natural_images} natural images a seed. "
        "Dashed: the share in the alignment images. Left of it the preference rows contradict the "
        "habit, right of it they teach it.")


def slope_rows(table: DataFrame) -> DataFrame:
    """{method, number, change from dose 0 to dose 1}, counterfactual images."""
    rows = table.query("category == 'slope' and split_or_benchmark == 'counterfactual'")
    rows = rows[rows["against"].eq("") | rows["against"].str.startswith("sft_matched")]
    return DataFrame({
        "method": results.names(rows), "number": benchmarks.labels(rows),
        "change from dose 0 to 1": [e.text(sign="+") for e in results.estimates(rows)]}
    ).reset_index(drop=True)


def by_dose(table: DataFrame, split: str, metric: str) -> DataFrame:
    """A row a dose, a column a method: the mean over seeds."""
    rows = levels(table).query("split == @split and metric == @metric")
    means = rows.groupby(["dose", "method"], sort=False)["value"].mean().unstack(sort=False)
    return means.sort_index().map("{:.3f}".format).rename_axis(columns=None).reset_index()


def finding(table: DataFrame) -> str:
    """What the dose does to P(prior) of the DPO methods, and up to where they lie below the base.
    """
    measured, said = levels(table), []
    rows = table.query("category == 'slope' and split_or_benchmark == 'counterfactual' and "
                       "metric == 'p_prior' and against == ''")
    for method, e in zip(rows["method"], results.estimates(rows), strict=True):
        if method.startswith("bpo"):
            said.append(f"{method} {e.text(2, '+')}")
    mean = measured.query("split == 'counterfactual' and metric == 'p_prior'").groupby(
        ["method", "dose"], sort=False)["value"].mean()
    doses = sorted(measured["dose"].unique())
    below = [f"{m} up to {max(b):g}" for m in mean.index.unique("method")
             if (b := [d for d in doses if mean[m, d] < mean["base", d]])]
    return (f"From dose 0 to 1, P(prior's answer) changes by {'; '.join(said)} (mean over "
            f"{measured['seed'].nunique()} seeds, 95 % t interval). Its mean lies below the base's "
            f"for: {', '.join(below) or 'no method'}.")


def write_results(study: str) -> Path:
    """Stores the results of a finished study where the repository keeps them, and writes the
    section `results STUDY` of outputs/README.md from what is stored."""
    folder = stages.stage_folder(study, DoseResponse.notebook)
    # Not beside the replications: whoever finds one there reads seeds and claims from it.
    file = replication.stored_file(study)
    file = file.parent / "doses" / file.name
    if (folder / stages.MANIFEST).is_file():
        replication.keep(file, results.read(folder)[list(results.COLUMNS)])
    table = replication.kept(file, f"bpo run {study}")
    return readme.write_section(f"results {study}", "\n\n".join([
        finding(table), "Slopes on counterfactual images; a difference is to the SFT on the "
        "method's own positives:", readme.markdown(slope_rows(table)),
        "P(prior's answer) on counterfactual images, mean over seeds:",
        readme.markdown(by_dose(table, "counterfactual", "p_prior")),
        "CHAIRi on counterfactual images:",
        readme.markdown(by_dose(table, "counterfactual", "chair_i")),
        "Colour accuracy on natural images:",
        readme.markdown(by_dose(table, "natural", "colour_accuracy")),
        "Share of the rejected answers kept that are the prior's answer, by source:",
        readme.markdown(by_dose(table, "kept", "is_prior"))]))
