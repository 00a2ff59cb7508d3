"""The page of a replication: tables and figures of what `replication` found, over seeds and for
each. Nothing here computes a result.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bpo import report
from bpo.galleries import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Mapping[str, Any]
WORLDS = ("One parameter, seed, seeds everything: world, data, model, pairs and training all "
          "differ between seeds.")
SHARED = ("Checkpoint and data are the same for all seeds; the draws of rows, noise and answers, "
          "and the training, differ.")
OVER = ("Over seeds: the mean with its 95 % t interval, which tells how well the mean is known and "
        "not where the next seed lies. It takes seeds for draws from a normal distribution; of few "
        "seeds it is wide, and can leave the range that a rate has.")
FEW = "Over so few seeds there is a mean, and no interval."


def parts(held: Mapping[str, Any]) -> list[Shown]:
    """held: what replication.json holds."""
    from pandas import DataFrame

    seeds = [int(s) for s in held["seeds"]]
    few = all(s["low"] is None for s in held["levels"])
    shown = [
        report.say("**{n} seeds** ({seeds}). " + (WORLDS if held["own_worlds"] else SHARED)
                   + " Nothing is chosen by seed: each that was run is shown.",
                   n=len(seeds), seeds=", ".join(map(str, seeds))),
        report.say(FEW if few else OVER),
        report.table(DataFrame(_verdicts(held["claims"], "says")), "The paper's claims over seeds",
                     f"?: cannot be told. {held['rule']}"),
        report.table(DataFrame(_verdicts(held["lines"], "name")), "What each claim hangs on",
                     "Claim 2 needs less hallucination on the first split and the benchmarks of "
                     "hallucination, and no loss on its other lines.")
        if held["lines"] else report.say("No seed measured what a claim hangs on: that needs a "
                                         "truth file or a benchmark."),
        report.table(DataFrame(_looks(held["looks"])), "Looks behind the verdicts of each seed",
                     "Verdicts are not corrected for the number of looks. Holm's correction, at "
                     "0.05, is over those that decide a verdict; a p value is at least "
                     "1 / (1 + resamples), so few resamples among many looks cannot survive.")]
    if held["noise"]:
        shown += _noise(held["noise"], len(seeds))
    for number, where in enumerate(dict.fromkeys(r["where"] for r in held["levels"])):
        mine = [r for r in held["levels"] if r["where"] == where]
        # Where neither more nor less is good, the levels say it all.
        apart = [r for r in held["differences"] if r["where"] == where and r["more"] is not None]
        shown += _place(where, mine, apart, all_baselines=number == 0)
    return shown


def _verdicts(rows: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """One row a claim or line, one column a seed."""
    short = {"holds": "holds", "does not hold": "no", "cannot be told": "?"}
    return [{"claim": r["claim"], name: r[name], "against": r["against"] or None,
             **{f"seed {v['seed']}": short[v["verdict"]] for v in r["verdicts"]},
             "over seeds": _over(r)} for r in rows]


def _over(row: Mapping[str, Any]) -> str:
    count = len(row["verdicts"])
    parts = [f"{word} on {row[kind]} of {count}" for kind, word in
             (("holds", "holds"), ("fails", "does not hold")) if row[kind]]
    return ", ".join(parts) or "cannot be told"


def _looks(looks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"seed": str(k["seed"]), "comparisons": k["looked"], "exclude zero": k["apart"],
             "decide a verdict": k["decide"], "of these exclude zero": k["decide_apart"],
             "survive Holm's correction": k["survive"]} for k in looks]


def _noise(rows: Sequence[Series], count: int) -> list[Shown]:
    from pandas import DataFrame

    from bpo import figures

    steps = list(dict.fromkeys(r["step"] for r in rows if r["step"] is not None))
    curves = {}
    for metric in dict.fromkeys(r["metric"] for r in rows):
        points = [r for r in rows if r["metric"] == metric and r["step"] is not None]
        curves[metric] = {"mean": [r["mean"] for r in points], **{
            side: [r["mean"] if r[side] is None else r[side] for r in points]
            for side in ("low", "high")}}
    ends = {steps[0]: "clean", steps[-1]: f"step {steps[-1]}", None: "change"}
    lines: dict[Any, dict[str, Any]] = {}
    for r in (r for r in rows if r["step"] in ends):
        column = f"{r['metric']}, {ends[r['step']]}"
        for e in r["seeds"]:
            lines.setdefault(e["seed"], {"seed": str(e["seed"])})[column] = _own(
                e, signed=r["step"] is None)
        lines.setdefault("mean", {"seed": "mean"})[column] = _mean(r, signed=r["step"] is None)
    order = [k for k in lines if k != "mean"] + ["mean"]
    return [
        report.say("**Noise**"),
        report.figure(figures.noise_curves(curves, steps, "probability"),
                      f"P(true answer) and P(prior's answer) against noise, mean of {count} seeds",
                      f"Mean of {count} seeds; the band is the 95 % t interval over seeds, where "
                      "there are enough of them."),
        report.table(DataFrame([lines[k] for k in order]), "Noise: each seed",
                     "Seeds: 95 % bootstrap intervals over images; change: paired.")]


def _place(where: str, levels: Sequence[Series], apart: Sequence[Series], *, all_baselines: bool
           ) -> list[Shown]:
    """One split or benchmark: levels, differences, and BPO against its baselines as figures."""
    from pandas import DataFrame

    methods = list(dict.fromkeys(r["method"] for r in levels))
    baselines = list(dict.fromkeys(r["against"] for r in apart))
    means = [{"method": m} | {r["metric"]: _mean(r) for r in levels if r["method"] == m}
             for m in methods]
    each = [{"method": m, "seed": str(seed)}
            | {r["metric"]: _own(e) for r in levels if r["method"] == m
               for e in r["seeds"] if e["seed"] == seed}
            for m in methods for seed in (e["seed"] for e in levels[0]["seeds"])]
    changes = [{"metric": f"{r['metric']}{_better(r)}", "BPO minus": r["against"],
                "over seeds": _mean(r, signed=True), **_sides(r)} for name in
               dict.fromkeys(r["name"] for r in apart) for r in apart if r["name"] == name]
    shown = [report.say("**{where}**", where=where[:1].upper() + where[1:]),
             report.table(DataFrame(means), f"{where}: mean over seeds")]
    if changes:
        shown.append(report.table(
            DataFrame(changes), f"{where}: BPO minus each baseline, over seeds",
            "Better, worse: on how many seeds, and in brackets on how many of these for sure: the "
            "seed's own 95 % interval excludes zero."))
    shown += [report.figure(
        forest([r for r in apart if r["against"] == b]),
        f"{where}: BPO minus {b}, a dot and interval for each seed and their mean",
        f"{where}: BPO minus {b}. Dots: seeds with 95 % bootstrap intervals of paired differences "
        "over images, filled where zero is excluded. Diamond: mean over seeds, with its 95 % t "
        "interval where there are enough seeds.")
        for b in (baselines if all_baselines else baselines[:1])]
    return [*shown, report.table(DataFrame(each), f"{where}: each seed",
                                 "95 % bootstrap intervals over images.")]


def _own(e: Mapping[str, Any], *, signed: bool = False) -> str:
    return report.estimate(e["value"], e["low"], e["high"], sign="+" if signed else "")


def _mean(r: Series, *, signed: bool = False) -> str:
    if r["low"] is None:
        return f"{r['mean']:{'+' if signed else ''}.3f}"
    return _own({"value": r["mean"], "low": r["low"], "high": r["high"]}, signed=signed)


def _better(r: Series) -> str:
    return " (more is better)" if r["more"] else " (less is better)"


def _sides(r: Series) -> dict[str, str]:
    """On how many seeds BPO is better and worse, and on how many of these for sure."""
    above = [e["low"] > 0 for e in r["seeds"] if e["value"] > 0]
    below = [e["high"] < 0 for e in r["seeds"] if e["value"] < 0]
    better, worse = (above, below) if r["more"] else (below, above)
    return {"better": f"{len(better)} ({sum(better)})", "worse": f"{len(worse)} ({sum(worse)})"}


def forest(rows: Sequence[Series]) -> "Figure":
    """A panel a metric: a dot with its interval for each seed, filled where that excludes zero, and
    a diamond for their mean. rows: differences with one baseline."""
    from matplotlib.figure import Figure

    from bpo import figures

    figures.theme()
    down = math.ceil(len(rows) / 3)
    across = math.ceil(len(rows) / down)
    seeds = [e["seed"] for e in rows[0]["seeds"]]
    fig = Figure(figsize=(min(figures.WIDTH, 2.6 + 2.4 * across), down * (1.3 + 0.26 * len(seeds))),
                 layout="constrained")
    fig.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    panels = list(fig.subplots(down, across, squeeze=False).flat)
    for place, panel in enumerate(panels):
        if place >= len(rows):
            panel.set_axis_off()
            continue
        names = [f"seed {s}" for s in seeds] + ["mean"]
        panel.set_yticks(range(len(names)), names)
        panel.set(ylim=(len(seeds) + 0.95, -0.6), title=f"{rows[place]['metric']}",
                  xlabel=_better(rows[place]).strip(" ()"))
        panel.tick_params(axis="y", length=0, labelleft=place % across == 0)
        panel.grid(visible=False, axis="y")
        panel.spines["left"].set_visible(False)
        panel.locator_params(axis="x", nbins=4)
        panel.margins(x=0.12)
        panel.axvline(0, color="#303030", linewidth=1)
        panel.axhline(len(seeds) - 0.5, color="#d5d8da", linewidth=0.8)
        _dots(panel, rows[place])
    return fig


def _dots(axes: "Axes", row: Series) -> None:
    from bpo.figures import COLOURS

    for place, e in enumerate(row["seeds"]):
        sure = e["low"] > 0 or e["high"] < 0
        axes.plot([e["low"], e["high"]], [place, place], color=COLOURS[0], linewidth=1.6)
        axes.plot(e["value"], place, "o", color=COLOURS[0], markersize=6, markeredgewidth=1.5,
                  markerfacecolor=COLOURS[0] if sure else "white")
    mean = len(row["seeds"])
    if row["low"] is not None:
        axes.plot([row["low"], row["high"]], [mean, mean], color=COLOURS[1], linewidth=2.2)
    axes.plot(row["mean"], mean, "D", color=COLOURS[1], markersize=7)
    axes.annotate(f"{row['mean']:+.3f}", (row["mean"], mean), xytext=(0, -7), ha="center", va="top",
                  textcoords="offset points", fontsize=8, color="#3c4147",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
