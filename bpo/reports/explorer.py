"""Two things to try in JupyterLab: an image at any noise step, and a question of one's own.

What is shown at first comes from the stored result of a stage; the model is loaded at the first
move that needs it. One output holds the widgets and a still figure, for a page and for whatever
shows no widgets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import torch
from PIL import Image

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import comparison, metrics, probe
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.noise import STEPS
from bpo.params import NoiseProbability, QualitativeComparison, Refusal
from bpo.reports import explorer_cards, tables
from bpo.reports.cards import Shown, mark_words
from bpo.study import seeds
from bpo.study import stage as stages
from bpo.study.files import read_lines, to_json
from bpo.study.text import as_text, visible

CHOICES = 24  # rows offered
_held: dict[str, Any] = {}


class Explorer:
    """Widgets and the still figure that stands for them, as one output."""

    def __init__(self, view: widgets.Widget, still: Shown):
        self.view = view
        self.still = still

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {**self.view._repr_mimebundle_(), "text/html": self.still._repr_html_(),
                "text/plain": repr(self.still)}


def noise(p: NoiseProbability, result: stages.Result) -> Explorer:
    """An image of notebook 1 at any noise step, with the probabilities of its candidate answers.

    Numbers of the stage's own steps are its stored ones (first noise draw); others are computed.
    """
    lines, candidates = probe.load(result)
    stored = {(x["row"], x["step"]): x["answers"] for x in lines if x["draw"] == 0}
    rows = analysed(p, lines)
    processor = checkpoints.load_processor(p.path(p.model))
    image = _picker(rows)
    step = widgets.IntSlider(
        p.noise_steps[len(p.noise_steps) // 2], 0, STEPS - 1, description="Noise step",
        tooltip="Noise step, 0 is the clean image", layout=_wide("20rem"))
    card, status = widgets.HTML(), _status()

    def picture(row: Row, at: int) -> Image.Image:
        clean = encoding.transformed(images.load(row.image), p.image_transform, processor)
        return encoding.noised_picture(processor, clean, at, _draw(p, row))

    def show(_: Any = None) -> None:
        row, at = rows[image.value], step.value
        with _told(status):
            answers = stored.get((row.id, at))
            said = f"Step {at}: from the stored result."
            if answers is None:
                checkpoint = _loaded(result, status, "the model", lambda: checkpoints.load(
                    p.path(p.model), precision=p.precision, transform=p.image_transform))
                status.value = _line("Computing …")
                answers = look(p, checkpoint, row, at, candidates[row.id])
                said = f"Step {at}: computed just now by the model."
            curve = [(s, stored[row.id, s]) for s in p.noise_steps]
            card.value = explorer_cards.at_step(picture(row, at), row.question, at, answers,
                                                curve).html
            status.value = _line(said)

    for control in (image, step):
        control.observe(show, "value")
    show()
    first, steps = rows[0], sorted({p.noise_steps[0], step.value, p.noise_steps[-1]})
    still = explorer_cards.side_by_side(
        [explorer_cards.still_at_step(picture(first, s), s, stored[first.id, s]) for s in steps],
        f"{first.question} One image at {len(steps)} noise steps with the probabilities of whole "
        "answers. Run this cell in JupyterLab to choose the image and the step.")
    return Explorer(widgets.VBox([_row(image, step), card, status]), still)


def analysed(p: NoiseProbability, lines: Sequence[dict]) -> list[Row]:
    """The first rows that notebook 1 sampled answers for, asking what it asked.

    lines: of looks.jsonl.
    """
    known = {x["row"] for x in lines if x["sampled"] is not None}
    rows, _ = data_rows.list_rows(p.path(p.data), p.optional_path(p.image_folder))
    rows = [r for r in rows if r.id in known][:CHOICES]
    return [asking(r, p.question) for r in rows] if p.question else rows


@torch.no_grad()
def look(p: NoiseProbability, checkpoint: Checkpoint, row: Row, step: int,
         candidates: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The candidate answers of a row at a noise step: [{kind, text, logp, tokens}].

    The noise is the stage's first draw, so at its steps these are the numbers of looks.jsonl.
    """
    text = encoding.prompt_text(checkpoint, row.prompt, image=True)
    encoded = encoding.encode(checkpoint, text, images.load(row.image))
    pixels = encoding.noised(checkpoint.processor, encoded["pixel_values"], step, _draw(p, row))
    batch = encoding.collate(checkpoint, [{**encoded, "pixel_values": pixels}])
    answers = [(kind, text) for kind in probe.KINDS for text in candidates[kind]]
    tokens = [encoding.answer_tokens(checkpoint, row.prompt, text) for _, text in answers]
    weighed = logprobs.weigh_unpacked(checkpoint, batch, [tokens])[0]
    return [{"kind": kind, "text": text, "logp": round(w.logprobs.sum().item(), 5),
             "tokens": len(w.logprobs)} for (kind, text), w in zip(answers, weighed, strict=True)]


def _draw(p: NoiseProbability, row: Row) -> torch.Generator:
    return seeds.torch_generator(p.seed, "probe noise", row.id, 0)


def ask(p: QualitativeComparison, result: stages.Result) -> Explorer:
    """A held-out image of notebook 4 and a question of one's own, answered by base and methods."""
    asked = {s: read_lines(result.folder / f"answers-{s}.jsonl") for s in p.splits}
    truths = {s: data_rows.read_truth(p.path(p.splits[s])) for s in p.splits}
    rows = {s: offered(p, s, asked[s]) for s in p.splits}
    main = tables.main_split(result.metrics)
    split = widgets.Dropdown(options=list(p.splits), value=main, description="Split",
                             layout=_wide("13rem"))
    image = _picker(rows[main])
    question = widgets.Text(description="Question", layout=_wide("26rem"),
                            placeholder="a question about the image")
    button = widgets.Button(description="Ask", button_style="primary",
                            tooltip="Ask the base model and every method", layout=_wide("6rem"))
    card, status = widgets.HTML(), _status()

    def draw(row: Row, said: str, answers: dict[str, str]) -> None:
        told = marked(row, said, answers, lines=asked[split.value], truth=truths[split.value])
        card.value = explorer_cards.answered(images.load(row.image), said, told).html

    def choose_split(_: Any) -> None:
        image.value = None
        image.options = _options(rows[split.value])
        image.value = 0

    def choose_image(_: Any = None) -> None:
        if image.value is None:
            return
        with _told(status):
            row = rows[split.value][image.value]
            question.value = row.question
            draw(row, row.question, next(x["answers"] for x in asked[split.value]
                                         if x["id"] == row.id))
            status.value = _line("From the stored result.")

    def put(_: Any) -> None:
        row, text = rows[split.value][image.value], question.value.strip()
        button.disabled = True
        try:
            with _told(status):
                if not text:
                    raise Refusal("There is no question: type one, then press Ask.")
                checkpoint, methods = _loaded(result, status, "the model and its adapters",
                                              lambda: comparison.load_methods(p))
                answers: dict[str, str] = {}
                status.value = _line("Answering …")
                for method, answer in greedy(p, checkpoint, methods, asking(row, text)):
                    answers[method] = answer
                    draw(row, text, answers)
                    status.value = _line(f"Answering … {len(answers)} of {len(methods)}")
                status.value = _line("Answered just now by the model and its adapters, greedily.")
        finally:
            button.disabled = False

    split.observe(choose_split, "value")
    image.observe(choose_image, "value")
    button.on_click(put)
    choose_image()
    first = rows[main][0]
    stored = next(x["answers"] for x in asked[main] if x["id"] == first.id)
    still = explorer_cards.answered(
        images.load(first.image), first.question,
        marked(first, first.question, stored, lines=asked[main], truth=truths[main]),
        note="What each method answered. Run this cell in JupyterLab to choose another image and "
             "to ask questions of your own.")
    above = [split, image] if len(p.splits) > 1 else [image]
    return Explorer(widgets.VBox([_row(*above), _row(question, button), card, status]), still)


def offered(p: QualitativeComparison, split: str, lines: Sequence[dict]) -> list[Row]:
    """Rows of a split to choose among, drawn by seed from those that were asked."""
    drawn = sorted((x["id"] for x in lines),
                   key=lambda name: seeds.seed_for(p.seed, "explorer", name))[:CHOICES]
    rows, _ = data_rows.list_rows(p.path(p.splits[split]), p.optional_path(p.image_folder))
    found = {r.id: r for r in rows}
    return [found[name] for name in drawn]


@torch.no_grad()
def greedy(p: QualitativeComparison, checkpoint: Checkpoint, methods: Sequence[str], row: Row
           ) -> Iterator[tuple[str, str]]:
    """(method, its answer to the row's question), decoded as notebook 4 does, one by one."""
    request = Request(row.id, row.prompt, row.image)
    inputs = generate.encode_batch(checkpoint, [request])
    for method in methods:
        with checkpoints.using(checkpoint, method):
            yield method, generate.decode(checkpoint, inputs, max_new_tokens=p.max_new_tokens)[0]


def asking(row: Row, question: str) -> Row:
    """The row with another question at the end of its prompt."""
    return replace(row, prompt=(*row.prompt[:-1], {"role": "user", "content": question}))


def wrong_words(row: Row, question: str, answers: dict[str, str], *, lines: Sequence[dict],
                truth: dict[str, Any]) -> dict[str, set[str]]:
    """method -> words of its answer that are known to be wrong.

    As in the gallery where the question is one of the image's own; to other questions, the words
    for objects that are not in the image; none without a truth file.
    """
    own = _own(row, question, lines)
    if own:
        line = {**own, "answers": {"base": "", **answers}, "p_true": {}, "p_prior": {}}
        return {m: tables.wrong_words(line, m, truth) for m in answers}
    known = truth["images"].get(row.image_name)
    if known is None:
        return {m: set() for m in answers}
    present = {o["name"] for o in known["objects"]}
    return {m: metrics.wrong_object_words(text, truth["vocabulary"]["objects"], present)
            for m, text in answers.items()}


def marked(row: Row, question: str, answers: dict[str, str], *, lines: Sequence[dict],
           truth: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, text) of what is known of the image, then of every answer with its wrong words marked.

    lines, truth: of the image's split.
    """
    wrong = wrong_words(row, question, answers, lines=lines, truth=truth)
    own, known = _own(row, question, lines), truth["images"].get(row.image_name)
    told: list[tuple[str, Any]] = []
    if own:
        told = [("truth", own["annotated"])]
    elif known is not None:
        told = [("in the image", ", ".join(o["name"] for o in known["objects"]))]
    return told + [(m, mark_words(text, wrong[m])) for m, text in answers.items()]


def _own(row: Row, question: str, lines: Sequence[dict]) -> dict | None:
    """The line of the split that asks this of the same image, if there is one."""
    return next((x for x in lines if x["image"] == row.image_name
                 and metrics.normalised(x["question"]) == metrics.normalised(question)), None)


def _loaded(result: stages.Result, status: widgets.HTML, what: str, load: Callable[[], Any]) -> Any:
    """What `load` gives for a stage's result: loaded once, one at a time in memory."""
    m = result.manifest
    key = to_json([m["stage"], m["parameters"], m["inputs"]])
    if key not in _held:
        status.value = _line(f"Loading {what} …")
        _held.clear()
        _held[key] = load()
    return _held[key]


@contextmanager
def _told(status: widgets.HTML) -> Iterator[None]:
    """Says an error of a callback in the widget: a front end would hide it in a log."""
    try:
        yield
    except Refusal as refused:
        status.value = _line(refused)
    except Exception as error:  # whatever it is, the reader must see it
        first = next(iter(str(error).splitlines()), "")
        status.value = _line(f"This did not work: {type(error).__name__}: {first}")


def _status() -> widgets.HTML:
    return widgets.HTML(layout=widgets.Layout(margin="0 0 .5em"))


def _line(text: object) -> str:
    return (f'<div class="bpo mathjax_ignore" role="status" style="margin:0;font-size:.875em;'
            f'color:{explorer_cards.QUIET.format(76)}">{as_text(text)}</div>')


def _wide(basis: str) -> widgets.Layout:
    return widgets.Layout(flex=f"1 1 {basis}", max_width="34rem", min_width="0")


def _row(*controls: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(controls, layout=widgets.Layout(flex_flow="row wrap", grid_gap="0 .5em"))


def _picker(rows: Sequence[Row]) -> widgets.Dropdown:
    return widgets.Dropdown(options=_options(rows), description="Image", layout=_wide("20rem"))


def _options(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Labels in plain text, each once, and the numbers of the rows."""
    return [(f"{n}. {visible(r.question)[:60]} ({visible(r.image_name)[-40:]})", n - 1)
            for n, r in enumerate(rows, start=1)]
