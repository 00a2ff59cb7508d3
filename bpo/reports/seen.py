"""Saw, or thought that it saw: one picture under more and more noise, and methods' answers as
shares of what is there, what is usual and something else.

Queries on notebooks 1 and 4, for a study's index, its preview and the README beside the results.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame
from PIL import Image

from bpo.evaluation import claims, comparison, probe
from bpo.models import checkpoint as checkpoints
from bpo.params import NoiseProbability, Refusal, TinyWorld, validate
from bpo.reports import cards, figures
from bpo.reports.cards import Shown
from bpo.study import stage as stages
from bpo.study.text import as_text, shortened

FRAMES = 4
SHORT = 12  # characters of an answer that is written under each frame
KINDS = {"true": "what is there", "prior": "what is usual", "other": "something else"}
# Where nobody knows the usual answer, notebook 1 takes what the model says at the last step.
BLIND = {"true": "annotated answer", "prior": "its answer to the last noise"}
NAMES = {"base": "untuned model", "bpo": "BPO", "bpo_weaken": "BPO, weakened pairs alone",
         "sft_matched": "SFT on BPO's positives",
         "sft_matched_weaken": "SFT on the weakened pairs' positives"}
Shares = Mapping[str, Mapping[str, float]]  # label -> kind of `KINDS` -> share of 1


@dataclass(frozen=True)
class Example:
    """One picture of notebook 1 at a few noise steps.

    answers: kind -> text. frames: (step, what the model is shown, kind -> probability). courses:
    from what to what the pictures' answers go under the noise -> how many. known: whether the
    usual answer is known; else probabilities are those a token, of the model's own answer.
    """

    question: str
    answers: Mapping[str, str]
    frames: Sequence[tuple[int, Image.Image, Mapping[str, float]]]
    courses: Mapping[tuple[str, str], int]
    known: bool

    @property
    def names(self) -> Mapping[str, str]:
        return KINDS if self.known else BLIND


def example(study: str) -> Example | None:
    """The picture that stands for notebook 1 of a study; None where it has not run, or its model
    or pictures are elsewhere now."""
    folder = stages.stage_folder(study, NoiseProbability.notebook)
    if not (folder / stages.MANIFEST).is_file():
        return None
    manifest = stages.read_manifest(folder)
    result = stages.Result(folder, manifest, "read")
    try:
        p = validate(NoiseProbability, {**manifest["parameters"], "study": study}, where=study)
        lines, candidates = probe.load(result)
        known = probe.knows_prior(manifest)
        chosen, courses = typical(lines, known=known)
        row = probe.asked(p, next(r for r in probe.listed(p)[0] if r.id == chosen))
        steps = [p.noise_steps[i] for i in np.unique(
            np.linspace(0, len(p.noise_steps) - 1, FRAMES).round().astype(int))]
        pictures = probe.frames(p, checkpoints.load_processor(p.path(p.model)), row, steps)
    except (Refusal, OSError, StopIteration):
        return None
    chances = _chances([x for x in lines if x["row"] == chosen], known=known)
    answers = {kind: " or ".join(candidates[chosen][kind]) for kind in probe.KINDS}
    return Example(row.question, answers, [
        (step, picture, chances[chosen][step])
        for step, picture in zip(steps, pictures, strict=True)], courses, known)


def typical(lines: Sequence[Mapping[str, Any]], *, known: bool
            ) -> tuple[str, Counter[tuple[str, str]]]:
    """The row of looks.jsonl that stands for all, and the courses of all rows' answers.

    Of the rows whose answer goes from the true to the prior's one, the median of by how much
    P(prior's) − P(true) rises from the first step to the last; of all rows where none goes.
    """
    ends, rises = {}, {}
    for row, by_step in _chances(lines, known=known).items():
        first, last = (by_step[step] for step in (min(by_step), max(by_step)))
        ends[row] = cards.leading(first), cards.leading(last)
        rises[row] = sum(sign * (chances["prior"] - chances["true"])
                         for sign, chances in ((-1, first), (1, last)))
    going = [row for row, course in ends.items() if course == ("true", "prior")] or list(ends)
    ordered = sorted(going, key=lambda row: (rises[row], row))
    return ordered[(len(ordered) - 1) // 2], Counter(ends.values())


def _chances(lines: Sequence[Mapping[str, Any]], *, known: bool
             ) -> dict[str, dict[int, dict[str, float]]]:
    """row -> step -> kind -> probability, mean over draws: of the whole answer, candidates of a
    kind summed, and of all others; not known: a token's, of the likeliest candidate."""
    drawn: dict[str, dict[int, list[list[float]]]] = {}
    for x in lines:
        by_kind = [[a for a in x["answers"] if a["kind"] == kind] for kind in probe.KINDS]
        drawn.setdefault(x["row"], {}).setdefault(x["step"], []).append(
            [sum(np.exp(a["logp"]) for a in found) if known
             else np.exp(max(a["logp"] / a["tokens"] for a in found)) for found in by_kind])
    out: dict[str, dict[int, dict[str, float]]] = {}
    for row, by_step in drawn.items():
        out[row] = {step: cards.by_kind(np.mean(values, axis=0).tolist(), known=known)
                    for step, values in by_step.items()}
    return out


def strip(found: Example) -> Shown:
    """The picture's frames, under each the probabilities and what they come to; then what became
    of all pictures' answers."""
    keys = " ".join(f'<span class="key {kind}">{as_text(name)}: '
                    f"{as_text(shortened(found.answers[kind], 80))}</span>"
                    for kind, name in list(found.names.items())[:2])
    words = {kind: text if len(text) <= SHORT else "" for kind, text in found.answers.items()}
    frames, plain = "", []
    for step, picture, chances in found.frames:
        at, kind = f"noise step {step}" if step else "clean picture", cards.leading(chances)
        numbers = "".join(
            f"<span>{as_text(words[k])} {chances[k]:.2f}</span>{cards.bar({k: chances[k]})}"
            for k in probe.KINDS)
        frames += (f'<figure><img alt="{at}" src="{cards.image_uri(picture, 192)}">'
                   f'<figcaption><span class="step">{at}</span>{numbers}'
                   f'<b class="says {kind}">{cards.SAYS[kind]}</b></figcaption></figure>')
        plain.append(f"{at}: {cards.SAYS[kind]}")
    return Shown(
        f'<p class="asked-of">“{as_text(shortened(found.question, 200))}” One picture, more and '
        f'more noise, the untuned model.</p><p class="keys">{keys}</p>'
        f'<div class="frames">{frames}</div><p class="note">{as_text(fate(found))}</p>',
        plain="\n".join(plain), kind="saw")


def fates(courses: Mapping[tuple[str, str], int]) -> tuple[int, int, int, int]:
    """How many rows' answers go from the true to the prior's one, begin with the prior's, stay with
    the true one, and do otherwise. courses: as `typical` gives them."""
    first = sum(k for (clean, _), k in courses.items() if clean == "prior")
    go, stay = (courses.get(("true", last), 0) for last in ("prior", "true"))
    return go, first, stay, sum(courses.values()) - go - first - stay


def fate(found: Example) -> str:
    """How many pictures' answers go which way, and which of them is shown."""
    go, first, stay, other = fates(found.courses)
    true, prior = found.names["true"], found.names["prior"]
    text = (f"Of {sum(found.courses.values())} pictures {go} go from {true} to {prior}; {first} "
            f"begin with {prior}, {stay} stay with {true}, {other} do otherwise. Shown is the "
            "median of "
            f"{'those that go' if go else 'all'}. ")
    return text + ("Probabilities are means over noise draws." if found.known else
                   "Probabilities are those a token; nobody knows the usual answer here, and the "
                   "model's own to the last noise rises by construction.")


def eye(study: str) -> float | None:
    """The share of colours that the vision tower of a study's tiny world gets right by itself."""
    folder = stages.stage_folder(study, TinyWorld.notebook)
    if not (folder / stages.MANIFEST).is_file():
        return None
    return stages.read_manifest(folder)["metrics"].get("tower", {}).get("colour_accuracy")


def shares(frame: DataFrame, eye: float | None = None) -> dict[str, dict[str, float]]:
    """The shares of the answers to the main split's colour questions, of the base, of BPO and of
    the SFT on its positives; none without a truth file. eye: the share of colours that the vision
    tower alone gets right, where that was measured. frame: of one study or `over_seeds`'s."""
    rows = _answered(frame)
    # Questions without a usual answer would count in one of the two alone.
    if "n" in rows and rows["n"].nunique() > 1:
        return {}
    found = rows.pivot(index="method", columns="metric", values="value").dropna()
    if found.shape[1] < 2 or found.empty:
        return {}
    out = {"its eye alone": {"true": eye, "other": 1 - eye}} if eye is not None else {}
    order = ["base", *(m for own in (claims.METHOD, claims.WEAKENED)
                       for m in (claims.matched(own), own))]
    chosen = [m for m in order if m in found.index]
    for method in chosen if len(chosen) > 1 else found.index:
        true, prior = found.loc[method, ["colour_accuracy", "prior_rate"]]
        out[NAMES.get(method, method)] = {"true": true, "prior": prior, "other": 1 - true - prior}
    return out


def _answered(frame: DataFrame) -> DataFrame:
    return frame[(frame["split_or_benchmark"] == comparison.main_split(frame))
                 & (frame["against"] == "")
                 & frame["metric"].isin(("colour_accuracy", "prior_rate"))]


def population(frame: DataFrame) -> str:
    """What `shares` are of."""
    main, rows = comparison.main_split(frame), _answered(frame)
    count = f"{rows['n'].iloc[0]:.0f} " if "n" in rows else ""
    wrong = " (what is usual is always wrong)" if main == "counterfactual" else ""
    return f"{count}colour questions on {main} pictures{wrong}"


def bars(rows: Shares, population: str) -> Shown:
    """A track a row with its shares in per cent."""
    keys = " ".join(f'<span class="key {kind}">{name}</span>' for kind, name in KINDS.items())
    inner = "".join(
        f"<dt>{as_text(label)}</dt><dd>{cards.bar(parts)}<span>"
        + " · ".join(f"{100 * parts[k]:.0f}" if k in parts else "–" for k in KINDS)
        + "</span></dd>"
        for label, parts in rows.items())
    return Shown(f'<p class="asked-of">Answers in per cent, {as_text(population)}</p>'
                 f'<p class="keys">{keys}</p><dl class="shares">{inner}</dl>', kind="saw",
                 plain="\n".join(f"{label}: " + ", ".join(
                     f"{KINDS[k]} {100 * v:.0f} %" for k, v in parts.items())
                     for label, parts in rows.items()))


def drawing(rows: Shares, *, title: str = "", words: str = "", found: Example | None = None
            ) -> Figure:
    """The bars alone, for a README; with a title 1200 by 630 pixels, which is what previews of
    links show, with the words, and the picture's frames beside the bars."""
    figures.theme()
    if not title:
        fig = Figure(figsize=(figures.WIDTH, 0.9 + 0.38 * len(rows)))
        _draw_bars(fig, rows, (0.3, 0.06, 0.68, 0.72), size=9.5)
        return fig
    fig = Figure(figsize=(12, 6.3))
    fig.text(0.04, 0.93, title, fontsize=27, fontweight="bold", va="top", color="#202428")
    fig.text(0.04, 0.82, figures.wrapped(words, columns=104), fontsize=14.5, va="top",
             linespacing=1.45, color="#3c4147")
    for place, (step, picture, chances) in enumerate(found.frames if found else ()):
        left = 0.04 + 0.118 * place
        panel = fig.add_axes((left, 0.27, 0.11, 0.11 * 12 / 6.3))
        panel.imshow(picture.convert("RGB"), interpolation="nearest")
        panel.set_axis_off()
        panel.set_title(f"noise {step}" if step else "clean", fontsize=12, loc="left")
        kind = cards.leading(chances)
        fig.text(left, 0.24, figures.wrapped(cards.SAYS[kind], columns=12), fontsize=13, va="top",
                 fontweight="bold", color=_PARTS[kind][0])
    if rows:
        _draw_bars(fig, rows, (0.53, 0.06, 0.43, 0.46), size=12.5, above=True)
    return fig


_PARTS = {"true": ("#0b5596", "white"), "prior": ("#d98200", "#202428"),
          "other": ("#8b9197", "#202428")}  # kind -> colours of a part and of the number in it


def _draw_bars(fig: Figure, rows: Shares, box: Sequence[float], *, size: float,
               above: bool = False) -> None:
    """above: labels stand above their bars and not at the left."""
    axes = fig.add_axes(box)
    for place, (label, parts) in enumerate(rows.items()):
        left = 0.0
        for kind, share in parts.items():
            axes.barh(place, share, left=left, color=_PARTS[kind][0], height=0.42 if above else 0.7)
            if share >= 0.05:
                axes.text(left + 0.012, place, f"{100 * share:.0f}", fontsize=size,
                          va="center_baseline", color=_PARTS[kind][1])
            left += share
        axes.text(0 if above else -0.015, place - (0.26 if above else 0), label, fontsize=size,
                  ha="left" if above else "right", va="bottom" if above else "center")
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.75))
    axes.set_axis_off()
    for kind, name, x in zip(KINDS, KINDS.values(), (0, 0.34, 0.68), strict=True):
        axes.text(x, 1.02, f"■ {name}", color=_PARTS[kind][0], fontsize=size, fontweight="bold",
                  transform=axes.transAxes)


def saved(fig: Figure, kind: str) -> bytes:
    """The figure as "png" or "svg", in the same bytes each time."""
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "bpo"}):
        fig.savefig(out, format=kind, dpi=100, metadata={"png": {"Software": None}}.get(
            kind, {"Date": None, "Creator": None}))
    return out.getvalue()
