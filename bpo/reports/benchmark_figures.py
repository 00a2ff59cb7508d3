"""The figures of notebook 5, in the look of `figures`."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from bpo.reports import figures
from bpo.reports.figures import COLOURS, QUIET, WIDTH
from bpo.study.text import visible

if TYPE_CHECKING:
    from pandas import DataFrame


def trade_off(frame: "DataFrame", across: str, up: Sequence[str]) -> Figure:
    """A panel a measure of hallucination, against how much is said: a cross of two intervals a
    method. Down and to the right is better.

    frame: {method, metric, label, value, low, high}; across, up: the metrics.
    """
    fig, panels = figures.grid(1, len(up), width=WIDTH, height=3.9)
    styles = dict(zip(frame["method"].unique(), figures.line_styles(), strict=False))
    for panel, metric in zip(panels, up, strict=True):
        rows = frame[frame["metric"] == metric]
        panel.set(title=rows["label"].iloc[0], xlabel=across)
        both = rows.merge(frame[frame["metric"] == across], on="method", suffixes=("", "_across"))
        for row in both.itertuples():
            style = styles[row.method]
            panel.errorbar(
                row.value_across, row.value, color=style["color"], marker=style["marker"],
                markersize=7, elinewidth=1.1, linestyle="", label=visible(row.method),
                xerr=[[row.value_across - row.low_across], [row.high_across - row.value_across]],
                yerr=[[row.value - row.low], [row.high - row.value]])
    figures.legend_above(fig, panels[0])
    return fig


def by_place(frame: "DataFrame") -> Figure:
    """A line a method: the share of wrong ones among the objects that are named first, second, ...

    frame: {method, place, value, low, high}, a row a method and place.
    """
    lines = {method: (c["place"], c["value"], c["low"], c["high"])
             for method, c in frame.groupby("method", sort=False)}
    fig = figures.bands(lines, xlabel="place of the object in its caption",
                        ylabel="share that is not in the image")
    fig.axes[0].locator_params(axis="x", integer=True)
    return fig


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """How often yes is right against P(yes), a line a method, and how the questions spread over it.

    bins: method -> {"p", "share", "n"}, as `diagnostics.calibration` gives them.
    """
    fig, [upper, lower] = figures.grid(2, 1, width=WIDTH * 0.85, height=4.6, sharex=True,
                                       height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (2, 2)))
    for (method, mine), style in zip(bins.items(), figures.line_styles(), strict=False):
        p = [b["p"] for b in mine]
        upper.plot(p, [b["share"] for b in mine], label=visible(method), **style)
        lower.plot(p, [b["n"] for b in mine], **style)
    upper.set(ylabel="share where yes is right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    lower.set(xlabel="P(yes) among yes and no", ylabel="questions")
    figures.legend_above(fig, upper)
    return fig


def image_gains(frame: "DataFrame") -> Figure:
    """A panel a category of question: what the right image adds to an answer's log-probability over
    another, none and a noised one, a row a method.

    frame: {category, label, method, value, low, high}, in nats an answer; label: over what.
    """
    methods, overs = frame["method"].unique().tolist(), frame["label"].unique()
    categories = frame["category"].unique()
    fig, panels = figures.grid(1, len(categories), width=WIDTH, height=1.4 + 0.5 * len(methods))
    for column, (panel, category) in enumerate(zip(panels, categories, strict=True)):
        for number, (over, style) in enumerate(zip(overs, figures.line_styles(), strict=False)):
            rows = frame[(frame["category"] == category) & (frame["label"] == over)]
            places = [methods.index(m) + 0.22 * (number - (len(overs) - 1) / 2)
                      for m in rows["method"]]
            panel.hlines(places, rows["low"], rows["high"], color=style["color"], linewidth=1.6)
            panel.plot(rows["value"], places, style["marker"], color=style["color"],
                       markersize=5.5, label=over)
        figures.rows_of(panel, [visible(m) for m in methods])
        panel.tick_params(axis="y", labelleft=column == 0)
        panel.axvline(0, color="#303030", linewidth=1)
        panel.set(title=category, xlabel="nats an answer")
    figures.legend_above(fig, panels[0])
    return fig


def token_gaps(frame: "DataFrame") -> Figure:
    """A bar a token of one answer, a group a method: what the clean image adds to its
    log-probability over the noised one, in nats.

    frame: a row a token, in its order, a column a method; the index holds the tokens.
    """
    rows = math.ceil(len(frame) / 16)
    columns = math.ceil(len(frame) / rows)
    fig, panels = figures.grid(rows, 1, width=WIDTH, height=1.1 + 2.0 * rows, sharey=True)
    for row, panel in enumerate(panels):
        part = frame.iloc[row * columns:(row + 1) * columns].rename(
            index=visible, columns=visible)
        part.plot.bar(ax=panel, width=0.8, color=COLOURS, edgecolor="white", legend=False,
                      rot=0 if columns <= 12 else 35)
        figures.hatched(panel)
        panel.axhline(0, color="#303030", linewidth=1)
        panel.set(xlabel="", ylabel="nats", xlim=(-0.6, columns - 0.4))
        panel.grid(visible=False, axis="x")
    figures.legend_above(fig, panels[0])
    return fig
