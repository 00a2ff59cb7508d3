"""The figures of several worlds: the dose of the preference rows, and notebook 6's."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from bpo.reports import figures
from bpo.study.text import visible
from bpo.tiny import prior

DOSE_PANELS = {  # (split, metric) -> title
    ("counterfactual", "p_prior"): "P(prior's answer): lower is better\ncounterfactual images",
    ("counterfactual", "chair_i"): "CHAIRi: lower is better\ncounterfactual images",
    ("counterfactual", "cover"): "Cover: higher is better\ncounterfactual images",
    ("natural", "colour_accuracy"): "Colour accuracy: higher is better\nnatural images",
    ("natural", "chair_i"): "CHAIRi: lower is better\nnatural images"}


def dose_curves(frame: DataFrame, *, own_share: float) -> Figure:
    """A panel each of `DOSE_PANELS` that was measured: methods against the dose, every seed thin,
    their mean thick. The base has no dose: a line at its mean, a band over its seeds.

    frame: {seed, dose: share of typical colours among the preference rows, method, split, metric,
    value}. own_share: the alignment's, a vertical line.
    """
    styles = dict(zip(frame["method"].unique(), figures.line_styles(), strict=False))
    measured = {where: rows for where, rows in frame.groupby(["split", "metric"], sort=False)}
    titles = {where: title for where, title in DOSE_PANELS.items() if where in measured}
    lines = math.ceil(len(titles) / 3)
    fig, panels = figures.grid(lines, 3, width=figures.WIDTH, height=0.6 + 2.7 * lines)
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
        panel.set_xticks(sorted(frame["dose"].unique()))
    for panel in panels[len(titles):]:
        panel.set_axis_off()
    figures.legend_above(fig, panels[0])
    return fig


def prior_worlds(frame: DataFrame, steps: Sequence[int]) -> Figure:
    """Above, a panel a text level: P(prior) against the noise step, a line an image level. Below,
    its value on clean images and its rise to the last step. Every seed is thin or small."""
    figures.theme()
    texts = list(frame["text"].unique())
    styles = dict(zip(frame["images"].unique(), figures.line_styles(), strict=False))
    fig = Figure(figsize=(figures.WIDTH, 6.6), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.09)
    panels = fig.subplot_mosaic([[number // 2 for number in range(2 * len(texts))],
                                 ["P(prior)"] * len(texts) + ["rise"] * len(texts)])
    for number, text in enumerate(texts):
        panels[number].sharey(panels[0])
        panels[number].tick_params(labelleft=number == 0)
        panels[number].set(title=visible(f"text: {text}"), xmargin=0.02,
                           xlabel="noise step (0 is the clean image)")
        for level, style in styles.items():
            same = (frame["text"] == text) & (frame["images"] == level)
            curves = np.array(frame.loc[same, "curve"].tolist())  # (seeds, steps)
            panels[number].plot(steps, curves.T, color=style["color"], linewidth=0.8, alpha=0.55)
            panels[number].plot(steps, curves.mean(0), **style | {"linewidth": 2.2},
                                label=visible(f"alignment images: {level}"))
        panels[number].axhline(prior.CHANCE, color=figures.QUIET, linewidth=1,
                               linestyle=(0, (2, 2)), label="chance")
    panels[0].set_ylabel("P(prior's answer)")
    for column, title in (("P(prior)", "P(prior) on clean images"),
                          ("rise", "Rise to the last step")):
        panel = panels[column]
        for number, (level, style) in enumerate(styles.items()):
            of_level = frame[frame["images"] == level]
            places = np.arange(len(texts)) + (number - (len(styles) - 1) / 2) * 0.22
            panel.plot(places[of_level["text"].map(texts.index)], of_level[column], style["marker"],
                       color=style["color"], markersize=4.5, markerfacecolor="white")
            means = of_level.groupby("text", sort=False)[column].mean().loc[texts]
            panel.hlines(means, places - 0.08, places + 0.08, color=style["color"], linewidth=2.2)
        panel.axhline(0, color="#303030", linewidth=0.8)
        panel.set_xticks(range(len(texts)), [visible(f"text: {text}") for text in texts])
        panel.set(title=title, xlim=(-0.5, len(texts) - 0.5))
        panel.grid(visible=False, axis="x")
    figures.legend_above(fig, panels[0])
    return fig
