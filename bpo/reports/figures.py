"""Every figure of the notebooks, in one look: colours, markers and line styles tell things apart,
so that they stay apart in grey and for colour-blind readers; a method has one look on every page.
Each function returns a Figure.

Method names and model answers are drawn as plain text: `$` starts no formula.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bpo.reports.look import COLOURS, QUIET, styles, theme
from bpo.reports.look import colour as colour
from bpo.study.text import joined, signed, visible

if TYPE_CHECKING:
    import pandas
    from PIL import Image

WIDTH = 6.4  # inches: letters stay readable where a phone shows it at half its size


def noise_strip(images: list["Image.Image"], steps: list[int | str],
                answers: list[str]) -> Figure:
    """The same picture at each noise step, or by another name, the model's answer under each."""
    rows = math.ceil(len(images) / 6)
    columns = math.ceil(len(images) / rows)
    width = WIDTH * min(1, columns / 5)
    said = [wrapped(answer, columns=20) for answer in answers]
    lines = max(text.count("\n") + 1 for text in said)
    tall = max(min(2, image.height / image.width) for image in images)  # of its width
    fig, panels = grid(rows, columns, width=width,
                       height=rows * (width / columns * 0.92 * tall + 0.45 + 0.16 * lines))
    for panel, image, step, answer in itertools.zip_longest(panels, images, steps, said):
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set(visible=image is not None, color="#d5d8da")
        if image is not None:
            # a large picture would make the file megabytes; noise does not compress
            if image.width > 180:
                image = image.resize((180, max(1, round(180 * image.height / image.width))))
            panel.imshow(image.convert("RGB"), interpolation="nearest")
            panel.set_title(step if isinstance(step, str) else f"step {step}", loc="center")
            panel.set_xlabel(answer, fontsize=8.5, color="#202428")
    return fig


def wrapped(text: str, *, columns: int) -> str:
    text = visible(joined(" ".join(text.split())))
    return "\n".join(textwrap.wrap(text, columns, max_lines=4, placeholder=" …"))


def noise_curves(ways: Mapping[str, Mapping[str, Mapping[str, list[float]]]], steps: list[int],
                 ylabel: str) -> Figure:
    """A panel a way of weakening, in it a line with its band for each name, against the step.
    ways: title -> name -> {"mean", "low", "high"}, each as long as `steps`."""
    return bands({title: {name: (steps, c["mean"], c["low"], c["high"])
                          for name, c in curves.items()} for title, curves in ways.items()},
                 xlabel="step (0 is the clean image)", ylabel=ylabel)


def bands(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], *, xlabel: str,
          ylabel: str) -> Figure:
    """A panel a title, in it a line with its interval as a band for each name.
    panels: title -> name -> x, mean, low, high."""
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    fig, axes = grid(rows, columns, width=WIDTH, height=3.4 * rows, sharey=True)
    for place, (panel, (title, lines)) in enumerate(zip(axes, panels.items(), strict=False)):
        looks = styles(lines)
        for name, (where, mean, low, high) in lines.items():
            panel.plot(where, mean, label=visible(name), **looks[name])
            panel.fill_between(where, low, high, color=looks[name]["color"], alpha=0.16,
                               linewidth=0)
        panel.set(title=visible(title), xlabel=xlabel)
        if place % columns == 0:
            panel.set_ylabel(ylabel)
    hide(axes[len(panels):])
    legend_above(fig, axes[0])
    return fig


def training_curves(histories: dict[str, list[dict[str, float]]]) -> Figure:
    """Loss, reward margin, reward accuracy and the change of chosen and rejected log-probabilities.

    histories: method -> records {"step", "loss", "rewards/margins", "rewards/accuracies", "chosen",
    "rejected"}, the last two as log-ratios to the reference; a method may lack any but "step".
    """
    fig, panels = grid(2, 2, width=WIDTH, height=6.0)
    loss, margin, accuracy, change = panels
    curves = [(loss, "loss", {}), (margin, "rewards/margins", {}),
              (accuracy, "rewards/accuracies", {}), (change, "chosen", {"linestyle": "-"}),
              (change, "rejected", {"linestyle": ":", "markerfacecolor": "white"})]
    looks = styles(histories)
    for method, history in histories.items():
        for panel, key, look in curves:
            _curve(panel, history, key, **looks[method] | look, label=visible(method))
    for panel, title, unit in ((loss, "Loss", "nats"), (margin, "Reward margin", "nats"),
                               (accuracy, "Reward accuracy", "share of pairs"),
                               (change, "Log-probability of answers", "nats, change")):
        panel.set(title=title, ylabel=unit, xlabel="training step")
        if not panel.lines:
            panel.annotate("not logged by these methods", (0.5, 0.5), ha="center", color=QUIET,
                           xycoords="axes fraction")
    accuracy.axhline(0.5, color=QUIET, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    accuracy.annotate("chance", (1, 0.5), xycoords=accuracy.get_yaxis_transform(), fontsize=8,
                      color=QUIET, ha="right", va="bottom")
    if change.lines:
        change.legend(handles=[
            Line2D([], [], color="#303030", marker="o", linestyle="-", label="chosen"),
            Line2D([], [], color="#303030", marker="o", linestyle=":", label="rejected",
                   markerfacecolor="white")])
    legend_above(fig, loss)
    return fig


def _curve(axes: Axes, history: list[dict[str, float]], key: str, **style: Any) -> None:
    """Every step thin, and over it the mean of the steps around, which is what can be read."""
    points = [(record["step"], record[key]) for record in history if key in record]
    if points:
        steps, values = zip(*points, strict=True)
        half = len(values) // 20
        near = [values[max(0, k - half):k + half + 1] for k in range(len(values))]
        axes.plot(steps, [sum(n) / len(n) for n in near],
                  **style | {"markevery": max(1, len(points) // 8)})
        if half:
            axes.plot(steps, values, color=style["color"], linewidth=0.7, alpha=0.35, zorder=1)


def differences(panels: Mapping[str, "pandas.DataFrame"], *, columns: int = 2) -> Figure:
    """Differences with intervals around a zero line, a panel a title, a row each; the mean of
    several is a diamond. Better lies right: where less is better, a row is mirrored.

    panels: title -> {label, value, low, high, perhaps more_is_better}; an interval may be missing
    (NaN). A marker is filled where the interval leaves zero out.
    """
    fig, axes = _panels(panels, columns)
    for panel, rows in zip(axes, panels.values(), strict=False):
        panel.axvline(0, color="#303030", linewidth=1)
        panel.set_xlabel("difference")
        if any(more in (True, False) for more in rows.get("more_is_better", ())):
            panel.set_xlabel("worse  ←   →  better")
            panel.xaxis.set_major_formatter(lambda x, _: f"{abs(x):.3g}")
        for place, row in enumerate(rows.to_dict("records")):
            number = signed(row["value"])
            if row.get("more_is_better") is False:
                row |= {"value": -row["value"], "low": -row["high"], "high": -row["low"]}
            apart = row["low"] > 0 or row["high"] < 0
            mean = row["label"] == "mean"
            style = {"color": COLOURS[mean], "marker": "D" if mean else "o"}
            _interval(panel, row, place, style, number=number,
                      fill=style["color"] if apart else "white")
    return fig


def made_and_kept(panels: Mapping[str, "pandas.DataFrame"]) -> Figure:
    """A panel a title, a row a label: the interval of the candidates (hollow) above that of the
    kept ones (filled). panels: title -> {label, side, value, low, high}."""
    fig, axes = _panels({t: rows.drop_duplicates("label") for t, rows in panels.items()})
    sides = {"candidates": ("as made", -0.2, "white"), "kept": ("as kept", 0.2, COLOURS[0])}
    style = {"color": COLOURS[0], "marker": "o"}
    for panel, rows in zip(axes, panels.values(), strict=False):
        places = {label: place for place, label in enumerate(rows["label"].unique())}
        for row in rows.to_dict("records"):
            _, above, fill = sides[row["side"]]
            _interval(panel, row, places[row["label"]] + above, style, number="", fill=fill)
        if rows["low"].min() >= 0:
            most = rows["high"].max() or 1
            panel.set_xlim(-0.06 * most, 1.1 * most)
    fig.legend(handles=[Line2D([], [], **style, markerfacecolor=fill, label=label)
                        for label, _, fill in sides.values()], loc="outside upper left", ncols=2)
    return fig


def _panels(frames: Mapping[str, "pandas.DataFrame"], columns: int = 2
            ) -> tuple[Figure, list[Axes]]:
    """A panel a frame under its title, a row for each of its labels; labels that repeat those of
    the panel at the left are not drawn."""
    alone = len(frames) == 1
    labels = [[wrapped(label, columns=34 if alone else 23) for label in frame["label"]]
              for frame in frames.values()]
    a_row = 0.36 if columns < 3 else 0.27  # inches
    columns = min(len(frames), columns)
    rows = math.ceil(len(frames) / columns)
    fig, axes = grid(rows, columns, width=WIDTH,
                     height=rows * (0.95 + a_row * max(map(len, labels))))
    for place, (panel, title) in enumerate(zip(axes, frames, strict=False)):
        rows_of(panel, labels[place])
        first = place - place % columns
        panel.tick_params(axis="y", labelleft=place == first or labels[place] != labels[first])
        panel.margins(x=0.12)
        panel.set_title(wrapped(title, columns=60 if alone else 32))
        if not alone:
            panel.locator_params(axis="x", nbins=4)
    hide(axes[len(frames):])
    return fig, axes


def hide(panels: Iterable[Axes]) -> None:
    for panel in panels:
        panel.set_axis_off()


def rows_of(panel: Axes, labels: list[str]) -> None:
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.4, -0.7)
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    panel.spines["left"].set_visible(False)


def _interval(axes: Axes, row: Mapping[str, Any], place: int, style: Mapping[str, Any], *,
              number: str, fill: str) -> None:
    axes.plot([row["low"], row["high"]], [place, place], color=style["color"], linewidth=1.8)
    axes.plot(row["value"], place, style["marker"], color=style["color"], markersize=6.5,
              markerfacecolor=fill, markeredgewidth=1.5)
    axes.annotate(number, (row["value"], place), xytext=(0, 6), ha="center",
                  textcoords="offset points", fontsize=8, color="#3c4147")


def histograms(values: dict[str, list[int]], *, xlabel: str, ylabel: str) -> Figure:
    """A panel a name with the counts of its whole numbers, on one axis; zero is marked."""
    fig, panels = grid(1, max(len(values), 1), width=WIDTH, height=3.0)
    low, high = (find((x for xs in values.values() for x in xs), default=0) for find in (min, max))
    wide = math.ceil((high - low + 1) / 40)  # of a bar: 40 bars at most
    edges = [low - 0.5 + wide * n for n in range((high - low) // wide + 2)]
    for panel, (name, numbers), tone in zip(panels, values.items(), COLOURS, strict=False):
        panel.hist(numbers, edges, color=tone, edgecolor="white", linewidth=0.6)
        panel.axvline(0, color="#303030", linewidth=1, linestyle=(0, (2, 2)))
        panel.set(title=visible(name), xlabel=xlabel, xlim=(edges[0] - wide, edges[-1] + wide))
        panel.locator_params(axis="x", integer=True)
    panels[0].set_ylabel(ylabel)
    return fig


def grid(rows: int, columns: int, *, width: float, height: float, **rest: Any
         ) -> tuple[Figure, list[Axes]]:
    theme()
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    return fig, list(fig.subplots(rows, columns, squeeze=False, **rest).flat)


def legend_above(fig: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        fig.legend(handles, labels, loc="outside upper left", ncols=min(3, len(labels)))


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """How often yes is right against P(yes), a line a method with binomial 95 % intervals.
    bins: method -> {"p", "share", "n"}."""
    lines = {m: [(b["p"], b["share"], 1.96 * math.sqrt(b["share"] * (1 - b["share"]) / b["n"]))
                 for b in mine] for m, mine in bins.items()}
    fig = bands({"": {m: [[p for p, _, _ in mine], [x for _, x, _ in mine],
                          [x - half for _, x, half in mine], [x + half for _, x, half in mine]]
                      for m, mine in lines.items()}},
                xlabel="P(yes) among yes and no", ylabel="share where yes is right")
    fig.axes[0].plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (2, 2)))
    fig.axes[0].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return fig


def two_views(frame: "pandas.DataFrame", views: Mapping[str, str], xlabel: str) -> Figure:
    """A panel a view with an axis of its own, a row a label: intervals, a colour a method.
    frame: {label, view, method, value, low, high}; views: view -> the panel's title."""
    order, looks = list(frame["label"].unique()), styles(frame["method"].unique())
    fig, panels = grid(1, len(views), width=WIDTH, height=1.2 + 0.36 * len(order))
    for panel, (view, title) in zip(panels, views.items(), strict=True):
        for number, (method, style) in enumerate(looks.items()):
            rows = frame[(frame["view"] == view) & (frame["method"] == method)]
            places = [order.index(x) + 0.24 * (number - (len(looks) - 1) / 2)
                      for x in rows["label"]]
            panel.hlines(places, rows["low"], rows["high"], color=style["color"], linewidth=1.6)
            panel.plot(rows["value"], places, style["marker"], color=style["color"], markersize=5.5,
                       label=visible(method))
        rows_of(panel, order)
        panel.tick_params(axis="y", labelleft=panel is panels[0])
        panel.axvline(0, color="#303030", linewidth=1)
        panel.set(title=title, xlabel=xlabel)
    legend_above(fig, panels[0])
    return fig
