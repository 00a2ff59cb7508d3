"""The figures of notebooks 5 and 7, in the look of `figures`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from bpo.reports import figures
from bpo.reports.figures import COLOURS, QUIET, WIDTH
from bpo.study.text import signed, visible

if TYPE_CHECKING:
    import pandas


def trade_off(points: Sequence[Mapping[str, Any]], *, across: str, up: Sequence[str]) -> Figure:
    """A panel a measure of hallucination, against how much is said: a cross of two intervals a
    method. Down and to the right is better.

    points: {"method", "metric", "x", "y"}, the last two {value, low, high}; up: the metrics.
    """
    figures.theme()
    fig = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = fig.subplots(1, len(up), squeeze=False)[0]
    methods = list(dict.fromkeys(p["method"] for p in points))
    looks = dict(zip(methods, figures.line_styles(), strict=False))
    for panel, metric in zip(panels, up, strict=True):
        for point in (p for p in points if p["metric"] == metric):
            look, x, y = looks[point["method"]], point["x"], point["y"]
            panel.errorbar(
                x["value"], y["value"], color=look["color"], marker=look["marker"], markersize=7,
                elinewidth=1.1, linestyle="", label=visible(point["method"]),
                xerr=[[x["value"] - x["low"]], [x["high"] - x["value"]]],
                yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]])
        panel.set(title=metric, xlabel=across)
    figures.legend_above(fig, panels[0])
    return fig


def by_place(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """A line a method: the share of wrong ones among the objects that are named first, second, ...

    curves: method -> {"place", "value", "low", "high"} a place.
    """
    figures.theme()
    fig = Figure(figsize=(WIDTH * 0.85, 3.8), layout="constrained")
    axes = fig.subplots()
    for (method, curve), style in zip(curves.items(), figures.line_styles(), strict=False):
        places = [c["place"] for c in curve]
        axes.plot(places, [c["value"] for c in curve], label=visible(method), **style)
        axes.fill_between(places, [c["low"] for c in curve], [c["high"] for c in curve],
                          color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="place of the object in its caption",
             ylabel="share that is not in the image")
    axes.locator_params(axis="x", integer=True)
    figures.legend_above(fig, axes)
    return fig


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """How often yes is right against P(yes), a line a method, and how the questions spread over it.

    bins: method -> {"p", "share", "n"}, as `diagnostics.calibration` gives them.
    """
    figures.theme()
    fig = Figure(figsize=(WIDTH * 0.85, 4.6), layout="constrained")
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (2, 2)))
    for (method, mine), style in zip(bins.items(), figures.line_styles(), strict=False):
        upper.plot([b["p"] for b in mine], [b["share"] for b in mine], label=visible(method),
                   **style)
        lower.plot([b["p"] for b in mine], [b["n"] for b in mine], **style)
    upper.set(ylabel="share where yes is right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    lower.set(xlabel="P(yes) among yes and no", ylabel="questions")
    figures.legend_above(fig, upper)
    return fig


def image_gains(table: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel a category of question: what the right image adds to an answer's log-probability over
    another, none and a noised one, a row a method.

    table: {"category", "over", "method", "value", "low", "high"}, in nats an answer.
    """
    figures.theme()
    categories = list(dict.fromkeys(r["category"] for r in table))
    methods = list(dict.fromkeys(r["method"] for r in table))
    overs = list(dict.fromkeys(r["over"] for r in table))
    fig = Figure(figsize=(WIDTH, 1.4 + 0.5 * len(methods)), layout="constrained")
    panels = fig.subplots(1, len(categories), squeeze=False)[0]
    for column, (panel, category) in enumerate(zip(panels, categories, strict=True)):
        for number, (over, look) in enumerate(zip(overs, figures.line_styles(), strict=False)):
            mine = [r for r in table if r["category"] == category and r["over"] == over]
            places = [methods.index(r["method"]) + 0.22 * (number - (len(overs) - 1) / 2)
                      for r in mine]
            panel.hlines(places, [r["low"] for r in mine], [r["high"] for r in mine],
                         color=look["color"], linewidth=1.6)
            panel.plot([r["value"] for r in mine], places, look["marker"], color=look["color"],
                       markersize=5.5, label=over)
        figures.rows_of(panel, [visible(m) for m in methods])
        panel.tick_params(axis="y", labelleft=column == 0)
        panel.axvline(0, color="#303030", linewidth=1)
        panel.set(title=category, xlabel="nats an answer")
    figures.legend_above(fig, panels[0])
    return fig


def token_gaps(gaps: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """A bar a token of one answer, a group a method: what the clean image adds to its
    log-probability over the noised one.

    gaps: method -> (token, nats) a token, the same tokens for all methods.
    """
    figures.theme()
    tokens = [token for token, _ in next(iter(gaps.values()))]
    rows = math.ceil(len(tokens) / 16)
    columns = math.ceil(len(tokens) / rows)
    fig = Figure(figsize=(WIDTH, 1.1 + 2.0 * rows), layout="constrained")
    panels = fig.subplots(rows, 1, squeeze=False, sharey=True)[:, 0]
    width = 0.8 / len(gaps)
    for row, panel in enumerate(panels):
        span = range(row * columns, min((row + 1) * columns, len(tokens)))
        for number, (method, mine) in enumerate(gaps.items()):
            shift = width * (number - (len(gaps) - 1) / 2)
            panel.bar([k - span.start + shift for k in span], [mine[k][1] for k in span], width,
                      color=COLOURS[number % len(COLOURS)], hatch=["", "///", "..."][number % 3],
                      edgecolor="white", label=visible(method))
        panel.axhline(0, color="#303030", linewidth=1)
        panel.set_xticks(range(len(span)), [visible(tokens[k]) for k in span],
                         rotation=0 if columns <= 12 else 35)
        panel.set(ylabel="nats", xlim=(-0.6, columns - 0.4))
        panel.grid(visible=False, axis="x")
    figures.legend_above(fig, panels[0])
    return fig


def forest(panels: dict[str, "pandas.DataFrame"]) -> Figure:
    """A panel a metric around a zero line: a row a seed and, as a diamond, the mean over seeds.

    panels: title -> frame {label, value, low, high}, the last row is the mean; its interval may be
    missing (NaN). A marker is filled where the interval leaves zero out.
    """
    seeds = max(map(len, panels.values()))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = figures.grid(rows, columns, width=min(WIDTH, 2.6 + 2.4 * columns),
                             height=rows * (0.95 + 0.32 * seeds))
    for panel, (title, frame) in itertools.zip_longest(axes, panels.items(), fillvalue=("", None)):
        if frame is None:
            panel.set_axis_off()
            continue
        panel.set_title(figures.wrapped(title, columns=32))
        figures.rows_of(panel, list(frame["label"]))
        panel.axvline(0, color="#303030", linewidth=1)
        panel.margins(x=0.12)
        panel.locator_params(axis="x", nbins=4)
        for place, row in enumerate(frame.to_dict("records")):
            mean = place == len(frame) - 1
            colour = COLOURS[1] if mean else COLOURS[0]
            style = {"color": colour, "marker": "D" if mean else "o",
                     "fill": colour if figures.excludes_zero(row) else "white"}
            figures.interval(panel, row, place, style, number=signed(row["value"]))
    return fig
