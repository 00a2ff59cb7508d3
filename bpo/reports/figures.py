"""Every figure of the notebooks, in one look: colours, markers and line styles tell things apart,
so that they stay apart in grey and for colour-blind readers; a method has one look on every page.
Each function returns a Figure.

Method names and model answers are drawn as plain text: `$` starts no formula.
"""

import hashlib
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bpo.study.text import signed, visible

if TYPE_CHECKING:
    import pandas
    from PIL import Image

# seaborn's "colorblind" palette, without the two that are too faint on white
COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#949494", "#56b4e9", "#ca9161"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X", "<", "h", ">", "p", "*"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2))]
# name -> its places in the three lists; names that are not here get theirs by their hash
LOOKS = {"base": (5, 0, 0), "sft": (2, 6, 3), "sft_matched": (1, 1, 1),
         "sft_matched_weaken": (7, 3, 4), "sft_compute": (6, 5, 6), "bpo": (0, 2, 0),
         "bpo_weaken": (3, 4, 2), "bpo_dpo_alone": (4, 8, 5),
         "true answer": (0, 0, 0), "prior's answer": (1, 1, 1)}
QUIET = "#6b7178"
WIDTH = 9.0  # inches; a wide page shows it as 864 pixels


def theme() -> None:
    """Set the look of every figure drawn from here on."""
    import seaborn  # takes seconds to import, so it is not done where this module is

    seaborn.set_theme(style="ticks", palette=COLOURS, rc={
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10,
        "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": QUIET, "axes.linewidth": 0.8, "xtick.color": "#3c4147",
        "ytick.color": "#3c4147", "xtick.major.width": 0.8, "ytick.major.width": 0.8,
        "xtick.major.size": 3.5, "ytick.major.size": 3.5, "axes.grid": True,
        "grid.color": "#e6e7e8", "grid.linewidth": 0.8, "axes.axisbelow": True,
        "lines.linewidth": 1.8, "lines.markersize": 5, "hatch.linewidth": 0.8,
        "text.parse_math": False, "figure.facecolor": "white",
    })


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
    lines = textwrap.wrap(visible(" ".join(text.split())), columns, max_lines=4, placeholder=" …")
    return "\n".join(lines)


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
    fig, axes = grid(1, len(panels), width=WIDTH * (0.85 if len(panels) == 1 else 1), height=4.0,
                     sharey=True)
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        looks = styles(lines)
        for name, (where, mean, low, high) in lines.items():
            panel.plot(where, mean, label=visible(name), **looks[name])
            panel.fill_between(where, low, high, color=looks[name]["color"], alpha=0.16,
                               linewidth=0)
        panel.set(title=visible(title), xlabel=xlabel, xmargin=0.02)
    axes[0].set_ylabel(ylabel)
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


def metric_bars(frame: "pandas.DataFrame") -> Figure:
    """A panel a metric: a dot with its interval for each method.

    frame: {method, label, value, low, high}; label: the metric's.
    """
    looks = styles(frame["method"].unique())
    panels = {metric: rows.assign(label=rows["method"])
              for metric, rows in frame.groupby("label", sort=False)}
    fig, axes = _panels(panels)
    for panel, rows in zip(axes, panels.values(), strict=False):
        for place, row in enumerate(rows.to_dict("records")):
            style = looks[row["method"]]
            _interval(panel, row, place, style, number=f"{row['value']:.3f}", fill=style["color"])
    return fig


def differences(panels: Mapping[str, "pandas.DataFrame"]) -> Figure:
    """Differences with intervals around a zero line, a panel a title, a row each; the mean of
    several is a diamond. Better lies right: where less is better, a row is mirrored.

    panels: title -> {label, value, low, high, perhaps more_is_better}; an interval may be missing
    (NaN). A marker is filled where the interval leaves zero out.
    """
    fig, axes = _panels(panels)
    for panel, rows in zip(axes, panels.values(), strict=False):
        panel.axvline(0, color="#303030", linewidth=1)
        panel.set_xlabel("difference")
        if any(more in (True, False) for more in rows.get("more_is_better", ())):
            panel.set_xlabel("worse  ←  difference  →  better")
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


def _panels(frames: Mapping[str, "pandas.DataFrame"]) -> tuple[Figure, list[Axes]]:
    """A panel a frame under its title, a row for each of its labels; labels that repeat those of
    the panel at the left are not drawn."""
    alone = len(frames) == 1
    labels = [[wrapped(label, columns=34 if alone else 26) for label in frame["label"]]
              for frame in frames.values()]
    rows = math.ceil(len(frames) / 3)
    columns = math.ceil(len(frames) / rows)
    width = WIDTH * 0.85 if alone else min(WIDTH, 2.6 + 2.4 * columns)
    fig, axes = grid(rows, columns, width=width,
                     height=rows * (0.95 + 0.36 * max(map(len, labels))))
    for place, (panel, title) in enumerate(zip(axes, frames, strict=False)):
        rows_of(panel, labels[place])
        first = place - place % columns
        panel.tick_params(axis="y", labelleft=place == first or labels[place] != labels[first])
        panel.margins(x=0.12)
        panel.set_title(wrapped(title, columns=60 if alone else 32))
        if not alone:
            panel.locator_params(axis="x", nbins=4)
    for panel in axes[len(frames):]:
        panel.set_axis_off()
    return fig, axes


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
    for panel, (name, numbers), colour in zip(panels, values.items(), COLOURS, strict=False):
        panel.hist(numbers, edges, color=colour, edgecolor="white", linewidth=0.6)
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


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """name -> {"color", "marker", "linestyle"}: of its name alone, unless two unnamed in `LOOKS`
    would look alike, of which the later takes the next free look."""
    sizes, taken = (len(COLOURS), len(MARKERS), len(LINES)), set(LOOKS.values())
    looks = {}
    for name in names:
        if not (look := LOOKS.get(name)):
            start = int(hashlib.sha1(name.encode("utf-8", "surrogatepass")).hexdigest(), 16)
            free = (tuple((start + n) // math.prod(sizes[:k]) % sizes[k] for k in range(3))
                    for n in range(math.prod(sizes)))
            look = next((x for x in free if x not in taken), (0, 0, 0))
            taken.add(look)
        looks[name] = {kind: values[place] for kind, values, place in zip(
            ("color", "marker", "linestyle"), (COLOURS, MARKERS, LINES), look, strict=True)}
    return looks


def colour(method: str) -> str:
    """The colour of a method on every page."""
    return styles([method])[method]["color"]


def legend_above(fig: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        fig.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)))
