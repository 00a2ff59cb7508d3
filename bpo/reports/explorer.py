"""What notebook 1 shows of noise and of other ways of weakening, and two things to try in
JupyterLab: an image at any noise step, and questions to base and methods, with noise and without.

Each is one output with widgets and a still figure, what they show at first. Pages, and whatever
else has no widgets, show that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import numpy as np
from pandas import DataFrame

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import comparison, probe, under_noise
from bpo.models import logprobs, tuned
from bpo.models.checkpoint import Checkpoint
from bpo.models.noise import STEPS
from bpo.params import NoiseProbability, QualitativeComparison
from bpo.reports import cards, figures, page
from bpo.reports.cards import Shown
from bpo.reports.tables import score_tables
from bpo.study import stage as stages
from bpo.study.files import read_lines, to_json
from bpo.study.results import Estimate
from bpo.study.text import visible

CHOICES = 24  # rows offered, of each split
WIDE = {"width": "min(100%, 34rem)"}
_loaded: dict[str, Any] = {}  # one model at a time, also where the cell is run again

KINDS = {"true": "true answer", "prior": "prior's answer"}
MEASURES = {
    "p": ("probability of the answer", "Probability of the whole answer, mean over {images} images "
          "and, of noise, {draws} draws; bands are 95 % bootstrap intervals over images."),
    "p_first": ("probability of the first token", "The same for the answer's first token alone, "
                "the measure of the paper's figure; {images} images, 95 % bootstrap intervals.")}
COLUMNS = {"p_true": "P(true)", "p_prior": "P(prior)", "logp_true": "log P a token, true",
           "logp_prior": "log P a token, prior"}


class Explorer(widgets.VBox):
    """Controls, and below them what `show` makes of their values, anew at each change.

    The view is HTML and no Output widget: with one, a notebook that runs headless may wait for
    ever, since nbclient answers its messages on the channel on which it awaits the cell's reply.
    """

    def __init__(self, show: Callable[..., Shown], **controls: widgets.Widget):
        self.show, self.controls = show, controls
        self.still = self._shown()
        self.view = widgets.HTML(self.still._repr_html_())
        for control in controls.values():
            control.observe(self._update, "value")
        super().__init__([*controls.values(), self.view])

    def _shown(self) -> Shown:
        return self.show(**{name: c.value for name, c in self.controls.items()})

    def _update(self, _: Any) -> None:
        # The old view stays below until the new one is there: the page does not jump.
        self.view.value = page.say("One moment …")._repr_html_() + self.view.value
        try:
            shown = self._shown()
        except Exception as error:  # what a callback raises is otherwise seen by nobody
            shown = page.say("{error}", error=f"{type(error).__name__}: {error}")
        self.view.value = shown._repr_html_()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(), "text/html": self.still._repr_html_(),
                "text/plain": repr(self.still)}


def noise(p: NoiseProbability, result: stages.Result, checkpoint: Checkpoint) -> Explorer:
    """An image of notebook 1 at any noise step, with the probabilities of its candidate answers.

    Numbers at the stage's own steps are its stored ones (first noise draw); others are computed.
    """
    lines, candidates = probe.load(result)
    sampled = {x["row"] for x in lines if x["sampled"] is not None}
    rows = [probe.asked(p, r) for r in probe.listed(p)[0] if r.id in sampled]

    def show(row: Row, step: int) -> Shown:
        answers = {x["step"]: x["answers"] for x in lines if (x["row"], x["draw"]) == (row.id, 0)}
        source = "from the stored result" if step in answers else "computed just now by the model"
        if step not in answers:
            answers[step] = probe.look(
                p, checkpoint, [probe.Look(row.id, row, step, draw=0)], candidates,
                sampled=set(), score=logprobs.weigh_unpacked)[0]["answers"]
        examples, at_steps = [], sorted({0, step, p.noise_steps[-1]})
        pictures = probe.frames(p, checkpoint.processor, row, at_steps)
        for at, picture in zip(at_steps, pictures, strict=True):
            chances = [np.exp(a["logp"]) for a in answers[at]]
            examples.append({
                "image": picture,
                "lines": [f"noise step {at}",
                          *(f"{KINDS[a['kind']]} “{a['text']}”: {chance:.2f}"
                            for a, chance in zip(answers[at], chances, strict=True)),
                          f"any other answer: {max(0, 1 - sum(chances)):.2f}"]})
        steps, curves = sorted(answers), {}
        for kind, label in KINDS.items():
            mean = [sum(np.exp(a["logp"]) for a in answers[s] if a["kind"] == kind) for s in steps]
            curves[label] = {"mean": mean, "low": mean, "high": mean}
        fig = figures.noise_curves({"": curves}, steps, "probability of the answer")
        fig.axes[0].axvline(step, color=figures.QUIET, linewidth=1)
        curve = page.figure(fig, alt="Probability of the answers of one image by noise step",
                            caption=f"{row.question} At step {step}, {source}.")
        return Shown(cards.sample_gallery(examples).html + curve.html, curve.plain)

    return Explorer(show, row=_picker([(r.question, r) for r in rows[:CHOICES]]),
                    step=widgets.IntSlider(
                        p.noise_steps[len(p.noise_steps) // 2], 0, STEPS - 1, layout=WIDE,
                        description="Noise step", continuous_update=False))


def ask(p: QualitativeComparison, result: stages.Result) -> Explorer:
    """A held-out image of notebook 4 with the answers of base and methods, and what they give the
    true and the prior's answer: stored ones to its own question, or new ones to another question or
    under noise. The model is loaded at the first of these."""
    splits = {s: comparison.read_split(p, s) for s in p.splits}
    lines = {s: {x["id"]: x for x in read_lines(result.folder / f"answers-{s}.jsonl")}
             for s in p.splits}

    def show(row: tuple[str, Row], question: str, step: int) -> Shown:
        (split, chosen), question = row, question.strip() or row[1].question
        rows, truth, _ = splits[split]
        asked = next((r for r in rows if (r.image, r.question) == (chosen.image, question)), None)
        if asked == chosen and not step:
            line = lines[split][chosen.id]
            example = {"origin": "from the stored result", "image": images.load(chosen.image),
                       **score_tables.stored(line, line["answers"], truth)}
        else:
            asked = asked or replace(chosen, id=f"{chosen.id} {question}", prompt=(  # no truth
                *chosen.prompt[:-1], {"role": "user", "content": question}))
            example = _answered(p, result, asked, truth, step)
        return cards.comparison_gallery([{"question": question, **example}])

    picker = _picker([(f"{s}: {r.question}", (s, r)) for s, (rows, *_) in splits.items()
                      for r in data_rows.draw_rows(rows, CHOICES, p.seed, purpose="explorer")])
    asking = widgets.Combobox(description="Question", continuous_update=False, layout=WIDE,
                              placeholder="its own; or choose or type another one, then Enter")

    def offer(_: Any = None) -> None:  # first the image's own questions, whose truth is known
        rows, image = splits[picker.value[0]][0], picker.value[1].image
        questions = (r.question for r in sorted(rows, key=lambda r: r.image != image))
        asking.options = list(dict.fromkeys(questions))[:CHOICES]

    offer()
    picker.observe(offer, "value")
    return Explorer(show, row=picker, question=asking, step=widgets.IntSlider(
        0, 0, STEPS - 1, layout=WIDE, description="Noise step", continuous_update=False))


def _answered(p: QualitativeComparison, result: stages.Result, row: Row, truth: dict[str, Any],
              step: int) -> dict[str, Any]:
    """{image, origin, truth, usual, answers} to a question under noise. Of a question whose truth
    is not known, objects that are not in the image and wrong colours are marked, where known."""
    key = to_json([result.manifest["parameters"], result.manifest["inputs"]])
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = tuned.load_methods(p)
    image, line = under_noise.ask(p, *_loaded[key], row, truth, step)
    example = {"image": image, **score_tables.stored(line, line["answers"], truth),
               "origin": "answered just now" + (f", noise step {step}" if step else "")}
    if row.id not in truth["rows"]:
        scene = truth["images"].get(row.image_name, {"objects": ()})
        names = ", ".join(sorted(o["name"] for o in scene["objects"]))
        example["truth"] = f"in the image: {names}" if names else "not known"
        for answer in example["answers"].values():
            answer["wrong"] = score_tables.misdescribed(answer["text"], row.image_name, truth)
    return example


def _picker(choices: Sequence[tuple[str, Any]]) -> widgets.Dropdown:
    return widgets.Dropdown(description="Image", layout=WIDE, options=[
        (f"{n}. {visible(label)[:70]}", value) for n, (label, value) in enumerate(choices, 1)])


# --- notebook 1: curves, numbers, words ---------------------------------------------------------

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


def noise_curves(p: NoiseProbability, metrics: dict[str, Any], measure: str) -> Shown:
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


def sampled_shares(p: NoiseProbability, metrics: dict[str, Any]) -> Shown:
    """A row a step, three columns a way of weakening."""
    frame = DataFrame({f"{way}: {kind}": shares for way, found in ways(metrics).items()
                       for kind, shares in found["sampled"].items()}).map("{:.2f}".format)
    frame.insert(0, "step", p.noise_steps)
    return page.table(
        frame, "Share of sampled answers that are the true one, the prior's, or another",
        f"{min(p.sampled_answers, metrics['images'])} images a step")


def noise_numbers(p: NoiseProbability, metrics: dict[str, Any], way: str) -> Shown:
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


def noise_headline(p: NoiseProbability, metrics: dict[str, Any]) -> Shown:
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
