"""Answers one by one: side by side (notebook 4), and two things to try in JupyterLab, an image at
any noise step and a question of one's own.

What is to be tried is one output with widgets and a still figure. The still figure is what the
widgets show at first; pages, and whatever else has no widgets, show it in their place.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from pandas import DataFrame

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import comparison, metrics, probe
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.noise import STEPS
from bpo.params import NoiseProbability, QualitativeComparison
from bpo.reports import cards, figures, page, tables
from bpo.reports.cards import Shown
from bpo.study import seeds
from bpo.study import stage as stages
from bpo.study.files import read_lines, to_json
from bpo.study.text import visible, words

AGAINST, DRAWN = "picture against habit", "drawn by seed"
CHOICES = 24  # rows offered, of each split
WIDE = {"width": "min(100%, 34rem)"}
_loaded: dict[str, Any] = {}  # one model at a time, also where the cell is run again


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
    rows, _ = probe.listed(p)
    rows = [probe.asked(p, r) for r in rows if r.id in sampled]

    def show(row: Row, step: int) -> Shown:
        answers = {x["step"]: x["answers"] for x in lines if (x["row"], x["draw"]) == (row.id, 0)}
        source = "from the stored result" if step in answers else "computed just now by the model"
        if step not in answers:
            answers[step] = probe.look(
                p, checkpoint, [probe.Look(row.id, row, step, draw=0)], candidates, sampled=set(),
                score=logprobs.weigh_unpacked)[0]["answers"]
        clean = encoding.transformed(images.load(row.image), p.image_transform,
                                     checkpoint.processor)
        examples = []
        for at in sorted({0, step, p.noise_steps[-1]}):
            draw = seeds.torch_generator(p.seed, "probe noise", row.id, 0)
            chances = [np.exp(a["logp"]) for a in answers[at]]
            examples.append({
                "image": encoding.noised_picture(checkpoint.processor, clean, at, draw),
                "lines": [f"noise step {at}",
                          *(f"{tables.KINDS[a['kind']]} “{a['text']}”: {chance:.3g}"
                            for a, chance in zip(answers[at], chances, strict=True)),
                          f"any other answer: {max(0, 1 - sum(chances)):.3g}"]})
        steps, curves = sorted(answers), {}
        for kind, label in tables.KINDS.items():
            mean = [sum(np.exp(a["logp"]) for a in answers[s] if a["kind"] == kind) for s in steps]
            curves[label] = {"mean": mean, "low": mean, "high": mean}
        fig = figures.noise_curves(curves, steps, "probability of the answer")
        fig.axes[0].axvline(step, color=figures.QUIET, linewidth=1)
        curve = page.figure(fig, alt="Probability of the answers of one image by noise step",
                            caption=f"{row.question} At step {step}, {source}.")
        return Shown(cards.sample_gallery(examples).html + curve.html, curve.plain)

    return Explorer(show, row=_picker([(r.question, r) for r in rows[:CHOICES]]),
                    step=widgets.IntSlider(
                        p.noise_steps[len(p.noise_steps) // 2], 0, STEPS - 1, layout=WIDE,
                        description="Noise step", continuous_update=False))


def side_by_side(p: QualitativeComparison, result: stages.Result, frame: DataFrame) -> list[Shown]:
    """How often base, the page's method and its control follow the habit, and `p.gallery` cards.

    Half of the cards are drawn by seed among the colour questions to which the base gives the
    prior's answer, which is wrong there; the others from each category of question in turn.
    """
    split, method = comparison.main_split(frame), tables.main_method(frame)
    control = comparison.matched(p).get(method, tables.control(frame))
    methods = list(dict.fromkeys(("base", control, method)))
    rows, truth, _ = comparison.read_split(p, split)
    files = {r.id: r.image for r in rows}
    lines = sorted(read_lines(result.folder / f"answers-{split}.jsonl"),
                   key=lambda x: seeds.seed_for(p.seed, "comparison gallery", x["id"]))
    usual = [x for x in lines if x["p_true"] and said(x, "base", truth) == "prior"]
    against = usual[:(p.gallery + 1) // 2]
    turns = zip_longest(*([x for x in lines if x["category"] == category and x not in against]
                          for category in dict.fromkeys(x["category"] for x in lines)))
    others = list(filter(None, chain.from_iterable(turns)))[:p.gallery - len(against)]
    gallery = cards.comparison_gallery([
        {"image": images.load(files[x["id"]]), "question": x["question"],
         "origin": origin, **stored(x, methods, truth)}
        for origin, drawn in ((AGAINST, against), (DRAWN, others)) for x in drawn])
    return [habit(lines, methods, truth, split), gallery]


def habit(lines: Sequence[dict], methods: Sequence[str], truth: dict[str, Any], split: str
          ) -> Shown:
    """How many answers of the base the methods mended and lost, where its habit is wrong."""
    kinds = [{m: said(x, m, truth) for m in methods} for x in lines if x["p_true"]]
    if not kinds:
        changed = sum(x["answers"][methods[-1]] != x["answers"]["base"] for x in lines)
        return page.say(
            "No truth file tells of a usual answer to the {n} {s} questions: those below are drawn "
            "by seed. {m} answers {c} of {n} otherwise than base.", n=len(lines), s=split,
            m=methods[-1], c=changed)
    usual, true = ([k for k in kinds if k["base"] == kind] for kind in ("prior", "true"))
    tuned = "; ".join(
        f"{m} now answers {sum(k[m] == 'true' for k in usual)} of those {len(usual)} truly and has "
        f"lost {sum(k[m] != 'true' for k in true)} of those {len(true)}" for m in methods[:0:-1])
    return page.say(
        "Of **{n}** colour questions on {s} images to which the usual answer is wrong, base gives "
        "the usual one to **{u}** and the true one to **{t}**; {tuned}.", n=len(kinds), s=split,
        u=len(usual), t=len(true), tuned=tuned)


def said(line: dict, method: str, truth: dict[str, Any]) -> str:
    """Whether an answer to a colour question is the "true" one, the "prior"'s, or an "other"."""
    counts = comparison.counts(line, method, truth)
    return ("true" if counts["colour_accuracy"][0] else "prior" if counts["prior_rate"][0]
            else "other")


def stored(line: dict, methods: Sequence[str], truth: dict[str, Any]) -> dict[str, Any]:
    """{truth, usual, answers} of a stored line, for a card."""
    out = {"truth": line["annotated"], "answers": {
        m: {"text": line["answers"][m], "wrong": wrong_words(line, m, truth)} for m in methods}}
    if line["p_true"]:
        known = truth["rows"][line["id"]]
        out["truth"] = " or ".join(known["true"])
        out["usual"] = " or ".join(a for a in known["prior"] if a not in known["true"])
        for m, answer in out["answers"].items():
            answer |= {"kind": said(line, m, truth),
                       "chances": (line["p_true"][m], line["p_prior"][m])}
    return out


def wrong_words(line: dict, method: str, truth: dict[str, Any]) -> cards.Wrong:
    """What to mark in an answer: wrong objects and colours of a caption, a wrong answer whole."""
    known, text = truth["rows"].get(line["id"]), line["answers"][method]
    if known is None:
        return set()
    if known["category"] == "caption":
        return _misdescribed(text, line["image"], truth)
    return set() if comparison.quality(line, method, truth) else set(words(text))


def _misdescribed(text: str, image: str, truth: dict[str, Any]) -> cards.Wrong:
    if image not in truth["images"]:
        return set()
    vocabulary, objects = truth["vocabulary"], truth["images"][image]["objects"]
    present = {o["name"] for o in objects}
    return metrics.wrong_object_words(text, vocabulary["objects"], present) | metrics.wrong_colours(
        text, vocabulary["objects"], vocabulary.get("colours", ()), objects)


def ask(p: QualitativeComparison, result: stages.Result) -> Explorer:
    """A held-out image of notebook 4 with the answers of base and methods: the stored ones to its
    own question, or new ones to a question that is typed; the model is loaded at the first."""
    splits = {s: comparison.read_split(p, s) for s in p.splits}
    lines = {s: {x["id"]: x for x in read_lines(result.folder / f"answers-{s}.jsonl")}
             for s in p.splits}
    choices = [(f"{s}: {r.question}", (s, r)) for s, (rows, *_) in splits.items()
               for r in data_rows.draw_rows(rows, CHOICES, p.seed, purpose="explorer")]

    def show(row: tuple[str, Row], question: str) -> Shown:
        (split, chosen), question = row, question.strip()
        truth = splits[split][1]
        if question:
            asked = (*chosen.prompt[:-1], {"role": "user", "content": question})
            example = _answered(p, result, replace(chosen, prompt=asked), truth)
        else:
            line = lines[split][chosen.id]
            example = {"origin": "from the stored result", **stored(line, line["answers"], truth)}
        return cards.comparison_gallery([{"image": images.load(chosen.image),
                                          "question": question or chosen.question, **example}])

    return Explorer(show, row=_picker(choices), question=widgets.Text(
        description="Question", continuous_update=False, layout=WIDE,
        placeholder="a question of your own, then Enter"))


@torch.no_grad()
def _answered(p: QualitativeComparison, result: stages.Result, row: Row, truth: dict[str, Any]
              ) -> dict[str, Any]:
    """{origin, truth, answers} to a new question, decoded as notebook 4 does. Objects that are not
    in the image are marked, and wrong colours, where the truth file says what is in it."""
    key = to_json([result.manifest["parameters"], result.manifest["inputs"]])
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = comparison.load_methods(p)
    checkpoint, methods = _loaded[key]
    known = truth["images"].get(row.image_name)
    present = {o["name"] for o in known["objects"]} if known else set()
    inputs = generate.encode_batch(checkpoint, [Request(row.id, row.prompt, row.image)])
    answers = {}
    for method in methods:
        with checkpoints.using(checkpoint, method):
            text = generate.decode(checkpoint, inputs, max_new_tokens=p.max_new_tokens)[0]
        answers[method] = {"text": text, "wrong": _misdescribed(text, row.image_name, truth)}
    return {"origin": "answered just now", "answers": answers,
            "truth": f"in the image: {', '.join(sorted(present))}" if known else "not known"}


def _picker(choices: Sequence[tuple[str, Any]]) -> widgets.Dropdown:
    return widgets.Dropdown(description="Image", layout=WIDE, options=[
        (f"{n}. {visible(label)[:70]}", value) for n, (label, value) in enumerate(choices, 1)])
