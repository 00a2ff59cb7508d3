"""What the worlds of notebook 6 allow to say: tables, the figure, and sentences.

Everything here is read from the metrics of `prior`; nothing is computed anew.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bpo.params import PriorOrigin
from bpo.reports import figures
from bpo.reports.figures import QUIET, WIDTH
from bpo.study.results import Estimate
from bpo.study.text import visible
from bpo.tiny import prior

FACTORS = {"text": "text", "images": "alignment images"}
MEASURES = {"clean": "P(prior), clean", "rise": "its rise"}


def effect(found: dict[str, Any], factor: str, measure_name: str, at: str = prior.ALL
           ) -> dict[str, Any]:
    return next(e for e in found["effects"]
                if (e["factor"], e["measure"], e["at"]) == (factor, measure_name, at))


def verdict(change: dict[str, Any]) -> str:
    """What the seeds allow to say: every one's interval leaves zero out on the same side, or
    nothing can be told."""
    if all(s["low"] > 0 for s in change["seeds"]):
        return "raises"
    if all(s["high"] < 0 for s in change["seeds"]):
        return "lowers"
    return "cannot be told to move"


def larger(found: dict[str, Any], measure_name: str) -> str:
    """The factor whose effect is the larger one, in size, on every seed."""
    text, pictures = (effect(found, f, measure_name)["seeds"] for f in FACTORS)
    more = {abs(t["value"]) > abs(i["value"]) for t, i in zip(text, pictures, strict=True)}
    if len(more) > 1:
        return "which moves it more cannot be told: the seeds disagree"
    mover = "the text moves" if more.pop() else "the alignment images move"
    return f"{mover} it more{', on every seed' if len(text) > 1 else ''}"


def told(change: dict[str, Any]) -> str:
    """The mean over seeds with each seed's own value: "+0.301 (+0.288, +0.310, +0.305)"; of one
    seed its value with its interval."""
    if len(change["seeds"]) == 1:
        only = change["seeds"][0]
        return Estimate(only["value"], only["low"], only["high"]).text(sign="+")
    each = ", ".join(f"{s['value']:+.3f}" for s in change["seeds"])
    return f"{change['mean']:+.3f} ({each})"


def effect_rows(found: dict[str, Any], p: PriorOrigin, factor: str) -> list[dict[str, str]]:
    """The table of a factor's effects: a row a measure and level of the other factor."""
    other, beside = (("images", p.image_levels) if factor == "text" else ("text", p.text_levels))
    rows = []
    for name, label in MEASURES.items():
        for at in (*prior.ordered(beside), prior.ALL):
            change = effect(found, factor, name, at)
            rows.append({"of": label, other: at, "mean": f"{change['mean']:+.3f}"} | {
                f"seed {s['seed']}": Estimate(s["value"], s["low"], s["high"]).text(2, "+")
                for s in change["seeds"]} | {f"biased {factor}": verdict(change)})
    return rows


def level_rows(p: PriorOrigin) -> list[dict[str, str]]:
    """The levels of both factors with their shares, for the notebook."""
    return [{"factor": FACTORS[factor], "level": name,
             "typical colour": f"{levels[name][0]:.1%}",
             "partner present": f"{levels[name][1]:.1%}"}
            for factor, levels in (("text", p.text_levels), ("images", p.image_levels))
            for name in prior.ordered(levels)]


def points(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What `prior_worlds` draws: each world's P(prior) curve, clean value and rise."""
    return [{"text": c["text"], "images": c["images"], "seed": c["seed"],
             "curve": [e["value"] for e in c["curve"]["p_prior"]],
             "clean": c["clean"]["p_prior"]["value"], "rise": c["rise"]["value"]}
            for c in found["cells"]]


def cell_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each pair of levels: mean, lowest and highest over seeds."""
    measured = {"no image": lambda c: c["text_prior"],
                "P(true)": lambda c: c["clean"]["p_true"]["value"],
                "P(prior)": lambda c: c["clean"]["p_prior"]["value"],
                "rise": lambda c: c["rise"]["value"], "CHAIRi": lambda c: c["chair_i"]["value"],
                "cover": lambda c: c["cover"]["value"]}
    rows = []
    for text, pictures in dict.fromkeys((c["text"], c["images"]) for c in found["cells"]):
        own = [c for c in found["cells"] if (c["text"], c["images"]) == (text, pictures)]
        rows.append({"text": text, "images": pictures} | {
            label: _spread([value(c) for c in own]) for label, value in measured.items()})
    return rows


def _spread(values: Sequence[float | None]) -> str:
    """Mean [lowest, highest]; "–" where a world has no such number."""
    if None in values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def gates_told(found: dict[str, Any]) -> str:
    return "; ".join(f"seed {g['seed']} names {g['value']:.1%} of the objects it sees ("
                     f"{'at least' if g['passed'] else 'BELOW'} the bound of {g['bound']:.0%})"
                     for g in found["gates"])


def together(found: dict[str, Any], p: PriorOrigin) -> dict[str, str]:
    """Each factor's effect beside the least and the most biased level of the other: "clean_low" and
    "clean_high" of the images, "rise_low" and "rise_high" of the text."""
    said = {}
    for name, factor, beside in (("clean", "images", p.text_levels),
                                 ("rise", "text", p.image_levels)):
        names = prior.ordered(beside)
        said |= {f"{name}_low": told(effect(found, factor, name, names[0])),
                 f"{name}_high": told(effect(found, factor, name, names[-1]))}
    return said


def headline(found: dict[str, Any]) -> dict[str, str]:
    """What the headline is made of: verdict and numbers of each factor on each measure."""
    said = {"seeds": f"{len(found['gates'])} seed{'s' if len(found['gates']) > 1 else ''}"}
    for name, letter in (("clean", "c"), ("rise", "r")):
        for factor in FACTORS:
            change = effect(found, factor, name)
            said |= {factor[0] + letter: verdict(change), f"{factor[0]}{letter}n": told(change)}
        said[f"more{letter}"] = larger(found, name)
    return said


def prior_worlds(cells: list[dict[str, Any]], steps: list[int], chance: float) -> Figure:
    """Above, a panel a text level: P(prior) against the noise step, a line an image level. Below,
    its value on clean images and its rise to the last step. Every seed is thin or small.

    cells: rows {"text", "images", "seed", "curve", "clean", "rise"}, the curve as long as `steps`.
    """
    figures.theme()
    texts, pictures = (list(dict.fromkeys(c[k] for c in cells)) for k in ("text", "images"))
    fig = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.09)
    grid = fig.add_gridspec(2, 2 * len(texts))
    panels: list[Axes] = []
    for number in range(len(texts)):
        panels.append(fig.add_subplot(grid[0, 2 * number:2 * number + 2],
                                      sharey=panels[0] if panels else None))
        panels[-1].tick_params(labelleft=number == 0)
    below = [fig.add_subplot(grid[1, :len(texts)]), fig.add_subplot(grid[1, len(texts):])]
    for text, panel in zip(texts, panels, strict=True):
        panel.set(title=visible(f"text: {text}"), xlabel="noise step (0 is the clean image)",
                  xmargin=0.02)
        for level, style in zip(pictures, figures.line_styles(), strict=False):
            mine = [c["curve"] for c in cells if (c["text"], c["images"]) == (text, level)]
            for curve in mine:
                panel.plot(steps, curve, color=style["color"], linewidth=0.8, alpha=0.55)
            panel.plot(steps, [sum(values) / len(values) for values in zip(*mine, strict=True)],
                       label=visible(f"alignment images: {level}"), **{**style, "linewidth": 2.2})
        panel.axhline(chance, color=QUIET, linewidth=1, linestyle=(0, (2, 2)), label="chance")
    panels[0].set_ylabel("P(prior's answer)")
    titles = {"clean": "P(prior) on clean images", "rise": "Rise to the last step"}
    for (key, title), panel in zip(titles.items(), below, strict=True):
        for place, text in enumerate(texts):
            styled = zip(pictures, figures.line_styles(), strict=False)
            for number, (level, style) in enumerate(styled):
                at = place + (number - (len(pictures) - 1) / 2) * 0.22
                values = [c[key] for c in cells if (c["text"], c["images"]) == (text, level)]
                panel.plot([at] * len(values), values, style["marker"], color=style["color"],
                           markersize=4.5, markerfacecolor="white")
                mean = sum(values) / len(values)
                panel.plot([at - 0.08, at + 0.08], [mean, mean], color=style["color"],
                           linewidth=2.2, solid_capstyle="butt")
        panel.axhline(0, color="#303030", linewidth=0.8)
        panel.set_xticks(range(len(texts)), [visible(f"text: {text}") for text in texts])
        panel.set(title=title, xlim=(-0.5, len(texts) - 0.5))
        panel.grid(visible=False, axis="x")
    figures.legend_above(fig, panels[0])
    return fig
