"""What notebook 1 shows: the curves of noise and of other ways of weakening, drawn, in numbers and
in words."""

from typing import Any

import numpy as np
from pandas import DataFrame

from bpo.params import NoiseProbability
from bpo.reports import figures, page
from bpo.reports.cards import Shown
from bpo.study.results import Estimate

KINDS = {"true": "true answer", "prior": "prior's answer"}
MEASURES = {
    "p": ("probability of the answer", "Probability of the whole answer, mean over {images} images "
          "and, of noise, {draws} draws; bands are 95 % bootstrap intervals over images."),
    "p_first": ("probability of the first token", "The same for the answer's first token alone, "
                "the measure of the paper's figure; {images} images, 95 % bootstrap intervals.")}
COLUMNS = {"p_true": "P(true)", "p_prior": "P(prior)", "logp_true": "log P a token, true",
           "logp_prior": "log P a token, prior"}


def ways(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """way of weakening -> the metrics of its curves, noise first."""
    return {"noise": metrics, **metrics["other_ways"]}


def curves(metrics: dict[str, Any], measure: str) -> dict[str, dict[str, list[float]]]:
    """The true and the prior's curve of a measure ("p", "p_first", "logp") for the figure."""
    stem, _, first = measure.partition("_")
    out = {}
    for kind, label in KINDS.items():
        name = f"{stem}_{kind}" + (f"_{first}" if first else "")
        low, high = zip(*metrics[f"{name}_interval"], strict=True)
        out[label] = {"mean": metrics[name], "low": list(low), "high": list(high)}
    return out


def figure(p: NoiseProbability, metrics: dict[str, Any], measure: str) -> Shown:
    """The figure of a measure against the step, a panel a way of weakening."""
    if measure == "p_first" and all(np.allclose(found[f"p_{kind}"], found[f"p_{kind}_first"],
                                                atol=1e-3)
                                    for found in ways(metrics).values() for kind in KINDS):
        return page.say("The probability of the first token, the measure of the paper's figure, is "
                        "the same here: it decides the answer.")
    title, caption = MEASURES[measure]
    return page.figure(
        figures.noise_curves({way: curves(found, measure) for way, found in ways(metrics).items()},
                             p.noise_steps, title),
        alt=f"The {title} against the step of {' and of '.join(ways(metrics))}, of the true answer "
            "and the prior's",
        caption=caption.format(images=metrics["images"], draws=p.draws))


def strip(p: NoiseProbability, example: dict[str, Any], way: str = "") -> Shown:
    """An image at each step of the noise, or of another way, with one sampled answer under each."""
    shown = example["other_ways"][way] if way else example | {"steps": p.noise_steps}
    return page.figure(
        figures.noise_strip(shown["images"], shown["steps"], shown["answers"]),
        alt=f"One image at each step of {way or 'noise'} with the model's sampled answer under it",
        caption=f"One image as the model is shown it, from step {shown['steps'][0]} of "
                f"{way or 'noise'} to the last, with one sampled answer (temperature 1) at each.")


def sampled_shares(p: NoiseProbability, metrics: dict[str, Any]) -> Shown:
    """A row a step, three columns a way of weakening."""
    frame = DataFrame({f"{way}: {kind}": shares for way, found in ways(metrics).items()
                       for kind, shares in found["sampled"].items()}).map("{:.2f}".format)
    frame.insert(0, "step", p.noise_steps)
    return page.table(
        frame, "Share of sampled answers that are the true one, the prior's, or another",
        f"{min(p.sampled_answers, metrics['images'])} images a step")


def numbers(p: NoiseProbability, metrics: dict[str, Any], way: str) -> Shown:
    """A row a step: each curve's mean with its interval."""
    found = ways(metrics)[way]
    frame = DataFrame({"step": p.noise_steps} | {
        label: [Estimate(value, *interval).text() for value, interval in zip(
            found[name], found[f"{name}_interval"], strict=True)]
        for name, label in COLUMNS.items()})
    return page.table(frame, f"The curves of {way} in numbers",
                      f"{metrics['images']} images, mean with its 95 % interval over images; the "
                      "log-probability a token is of the likeliest candidate, for answers of many "
                      "tokens")


def direction(change: Estimate) -> str:
    """What an interval allows to say of a change between clean image and last step."""
    if not change.excludes_zero():
        return "does not clearly move"
    return "rises" if change.low > 0 else "falls"


def headline(p: NoiseProbability, metrics: dict[str, Any]) -> Shown:
    """Where both probabilities go, from the clean image to the last step, in each way; and in which
    of them the prior's answer comes out: the true one falls and that one rises."""
    values: dict[str, object] = {"last": p.noise_steps[-1], "n": metrics["images"]}
    parts, out = [], []
    for number, (way, found) in enumerate(ways(metrics).items()):
        changes = {kind: Estimate(**found[f"change_{kind}"]) for kind in KINDS}
        words = {kind: direction(change) for kind, change in changes.items()}
        if words == {"true": "falls", "prior": "rises"}:
            out.append(way)
        parts.append(f"under {{w{number}}} P(true answer) **{{true{number}}}** ({{dt{number}}}) "
                     f"and P(prior's answer) **{{prior{number}}}** ({{dp{number}}})")
        values |= {f"w{number}": way, f"dt{number}": changes["true"].text(sign="+"),
                   f"dp{number}": changes["prior"].text(sign="+"),
                   **{f"{kind}{number}": text for kind, text in words.items()}}
    return page.say(
        "The prior's answer takes the true one's place under **{out}**. From the clean image to "
        "step {last}: " + "; ".join(parts) + "; {n} images.",
        out=" and ".join(out) or "nothing that was tried", **values)
