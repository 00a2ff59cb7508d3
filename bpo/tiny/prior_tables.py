"""What the worlds of notebook 6 allow to say: tables, points for the figure, and sentences.

Everything here is read from the metrics of `prior`; nothing is computed anew.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bpo.params import PriorOrigin
from bpo.study import text as texts
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
        return texts.estimate(only["value"], only["low"], only["high"], sign="+")
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
                f"seed {s['seed']}": texts.estimate(s["value"], s["low"], s["high"], 2, "+")
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
    """What `figures.prior_worlds` draws: each world's P(prior) curve, clean value and rise."""
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
