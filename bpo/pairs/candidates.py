"""Candidate rejected answers of every annotated row: made in three ways, and weighed by the model.

weakened: the same model answers while its image is weakened. injected: a text model rewrites the
annotated answer with plausible mistakes. given: the data set has them. Each kind is one file in the
order of rows.jsonl, made through `shards`; which candidates become rejected is `selection`'s.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bpo.data.rows import Row
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.endpoint import Endpoint
from bpo.models.generate import Request
from bpo.models.weakening import WEAKENINGS, View
from bpo.pairs import selection
from bpo.params import PairGeneration, Refusal
from bpo.study import processes, seeds, shards
from bpo.study.files import LineFile

MEASURED_IMAGES = 8  # an image's tokens are looked up on so many rows, and the largest one counts
SWAP_TRIES = 50

_Asked = tuple[Request, list[str], list[bool]]  # what to weigh for a row: see _to_weigh
_Prepared = tuple[list[_Asked], list[list[list[int]]], list[dict[str, torch.Tensor]]]


def views(p: PairGeneration) -> list[View]:
    """Every way of weakening that the parameters ask for."""
    out = []
    for mode in p.weaken_modes:
        way = WEAKENINGS[mode]
        steps = p.weaken_steps if way.stepped else [0]
        draws = p.weaken_draws if way.drawn else 1
        out += [View(mode, step, draw, p.crop_share) for step in steps for draw in range(draws)]
    return out


def make(p: PairGeneration, rows: LineFile, root: Path, folder: Path) -> None:
    """Writes weakened-<view>.jsonl and injected.jsonl into the folder, {id, texts} a row, and
    scores.jsonl, {id, scores} with one entry a candidate. What is there is not made again."""
    vision = functools.cache(lambda: checkpoints.load(
        p.path(p.model), precision=p.precision, transform=p.image_transform))
    # Measured when the first file that needs it is made: rows do not change between the files.
    lengths = functools.cache(lambda: _lengths(vision(), rows, root))
    if "injected" in p.sources and p.endpoint and not processes.first(
            (folder / "injected.jsonl").is_file):
        processes.first(_endpoint(p).check)  # now, and not after hours of weakening
    if "weakened" in p.sources:
        for view in views(p):
            _weaken(p, view, rows, root, folder, vision=vision, lengths=lengths)
    if "injected" in p.sources:
        _inject(p, rows, root, folder, vision=vision)
    if p.score_candidates:
        _score(p, rows, root, folder, vision=vision, lengths=lengths)


def _weaken(p: PairGeneration, view: View, rows: LineFile, root: Path, folder: Path, *,
            vision: Callable[[], Checkpoint], lengths: Callable[[], Any]) -> None:
    reader = functools.cache(lambda: encoding.reader(vision()))

    def prepare(batch: np.ndarray) -> tuple[list[Request], dict[str, torch.Tensor]]:
        requests = [request(p, rows, root, i, view) for i in batch.tolist()]
        return requests, generate.encode_branches(reader(), requests, view, seed=p.seed)

    def work(prepared: tuple[list[Request], dict[str, torch.Tensor]]) -> list[dict]:
        requests, inputs = prepared
        texts = generate.sample_answers(
            vision(), requests, inputs, view, seed=p.seed, purpose=f"weakened {view.name}",
            temperature=p.weaken_temperature, top_p=p.weaken_top_p, samples=p.weaken_samples,
            max_new_tokens=p.max_new_tokens, contrast_strength=p.contrast_strength,
            contrast_cutoff=p.contrast_cutoff)
        return [{"id": r.id, "texts": t} for r, t in zip(requests, texts, strict=True)]

    shards.run(folder / f"weakened-{view.name}.jsonl", lambda: shards.by_budget(
        *lengths(), p.batch_tokens // (p.weaken_samples * (1 + view.two_branches))), work,
        prepare=prepare, label=f"weakened, {view.name}")


def request(p: PairGeneration, rows: LineFile, root: Path, number: int, view: View | None
            ) -> Request:
    """A row's question with its image, and another row's image where the view wants one."""
    row = Row.from_line(rows[number], root)
    other = None
    if view is not None and view.way.other:
        rng = seeds.numpy_generator(p.seed, "swap", row.id, view.draw)
        for _ in range(SWAP_TRIES):
            other = root / rows[int(rng.integers(len(rows)))]["image"]
            if other != row.image:
                break
        else:
            raise Refusal(f"weaken_modes: {view.mode} needs rows with different images, and here "
                          f"{SWAP_TRIES} draws gave row {row.id} its own; use another mode")
    return Request(row.id, row.prompt, row.image, len(row.answer.split()), other)


def _inject(p: PairGeneration, rows: LineFile, root: Path, folder: Path, *,
            vision: Callable[[], Checkpoint]) -> None:
    templates = {kind: p.path(file).read_text(encoding="utf-8").strip() for kind, file in
                 (("caption", p.describe_prompt), ("other", p.question_prompt))}

    def rewriting(number: int) -> Request:
        row = Row.from_line(rows[number], root)
        template = templates["caption" if row.category == "caption" else "other"]
        return Request(row.id, ({"role": "user", "content": fill(template, row)},), None,
                       len(row.answer.split()))

    file = folder / "injected.jsonl"
    if p.endpoint:
        client = _endpoint(p)
        shards.run(file, lambda: np.array_split(np.arange(len(rows)), -(-len(rows) // (
            4 * p.endpoint_requests))), lambda batch: _asked(p, client, rewriting, batch),
            label="injected")
        return
    text = vision if not p.text_model else functools.cache(
        lambda: checkpoints.load_text_model(p.path(p.text_model), precision=p.precision))

    def work(batch: np.ndarray) -> list[dict]:
        requests = [rewriting(i) for i in batch.tolist()]
        inputs = generate.encode_branches(text(), requests, None, seed=p.seed)
        texts = generate.sample_answers(
            text(), requests, inputs, None, seed=p.seed, purpose="injected",
            temperature=p.inject_temperature, top_p=p.inject_top_p, samples=p.inject_samples,
            max_new_tokens=p.max_new_tokens)
        return [{"id": r.id, "texts": t} for r, t in zip(requests, texts, strict=True)]

    def plan() -> list[np.ndarray]:
        prompts = np.array([len(encoding.answer_ids(text(), encoding.prompt_text(
            text(), rewriting(i).messages, image=False))) for i in range(len(rows))])
        answers = np.array([len(encoding.answer_ids(text(), line["answer"])) + 1 for line in rows])
        return shards.by_budget(prompts, answers, p.batch_tokens // p.inject_samples)

    shards.run(file, plan, work, label="injected")


def _endpoint(p: PairGeneration) -> Endpoint:
    return Endpoint(url=p.endpoint, model=p.endpoint_model, key_variable=p.endpoint_key_variable,
                    at_once=p.endpoint_requests, retries=p.endpoint_retries,
                    timeout=p.endpoint_timeout)


def _asked(p: PairGeneration, client: Endpoint, rewriting: Callable[[int], Request],
           batch: np.ndarray) -> list[dict]:
    """A batch of rewritings by the endpoint, all samples of all rows under way together."""
    requests = [rewriting(i) for i in batch.tolist()]
    each = [(r, k) for r in requests for k in range(p.inject_samples)]
    texts = client.answers([r.messages for r, _ in each], temperature=p.inject_temperature,
                           top_p=p.inject_top_p, max_new_tokens=p.max_new_tokens,
                           # endpoints read 31 bits
                           seeds=[seeds.seed_for(p.seed, "injected", r.id, k) % 2**31
                                  for r, k in each])
    return [{"id": r.id, "texts": texts[i:i + p.inject_samples]}
            for r, i in zip(requests, range(0, len(texts), p.inject_samples), strict=True)]


def fill(template: str, row: Row) -> str:
    """The template with {question} and {answer} filled in; other braces stay as they are."""
    return re.sub(r"\{(question|answer)\}", lambda place: getattr(row, place[1]), template)


def _lengths(checkpoint: Checkpoint, rows: LineFile, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) tokens of every prompt with its image, and of every annotated answer with its end.

    Texts are counted one by one. Images are not opened for this: each counts as the largest one of
    a few rows, spread over the file.
    """
    prompts, answers = np.zeros((2, len(rows)), dtype=np.int32)
    for number, line in enumerate(rows):
        text = encoding.prompt_text(checkpoint, line["prompt"], image=True)
        prompts[number] = len(encoding.answer_ids(checkpoint, text))
        answers[number] = len(encoding.answer_ids(checkpoint, line["answer"])) + 1
    largest = 0
    for number in np.unique(np.linspace(0, len(rows) - 1, MEASURED_IMAGES).astype(int)).tolist():
        row = Row.from_line(rows[number], root)
        whole = generate.encode_batch(
            checkpoint, [Request(row.id, row.prompt, row.image)])["input_ids"].shape[1]
        largest = max(largest, whole - int(prompts[number]))
    return prompts + largest, answers


class Candidates:
    """Random access to the candidates of a row; only the places of lines are held."""

    def __init__(self, p: PairGeneration, rows: LineFile, folder: Path):
        self._p, self._rows = p, rows
        self._views = [(v, LineFile(folder / f"weakened-{v.name}.jsonl"))
                       for v in views(p) if "weakened" in p.sources]
        self._injected = (LineFile(folder / "injected.jsonl") if "injected" in p.sources else None)
        scores = folder / "scores.jsonl"
        self._scores = LineFile(scores) if scores.is_file() else None

    def __getitem__(self, number: int) -> dict[str, Any]:
        """{id, image, category, prompt, chosen, candidates: [{source, mode, ..., text}]}"""
        row = self._rows[number]
        out: list[dict[str, Any]] = []
        for view, file in self._views:
            out += [{"source": "weakened", "mode": view.mode,
                     **({"step": view.step} if view.way.stepped else {}),
                     "draw": view.draw, "sample": k, "text": text}
                    for k, text in enumerate(file[number]["texts"])]
        if self._injected is not None:
            mode = "endpoint" if self._p.endpoint else "language_model"
            out += [{"source": "injected", "mode": mode, "sample": k, "text": text}
                    for k, text in enumerate(self._injected[number]["texts"])]
        if "given" in self._p.sources:
            out += [{"source": "given", "mode": "given", "sample": k, "text": text}
                    for k, text in enumerate(row.get("given", []))]
        if self._scores is not None:
            for candidate, scores in zip(out, self._scores[number]["scores"], strict=True):
                if scores is not None:
                    candidate["scores"] = scores
        return {"id": row["id"], "image": row["image"], "category": row["category"],
                "prompt": row["prompt"], "chosen": row["answer"], "candidates": out}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self._rows)))


def _score(p: PairGeneration, rows: LineFile, root: Path, folder: Path, *,
           vision: Callable[[], Checkpoint], lengths: Callable[[], Any]) -> None:
    """Writes scores.jsonl: a list a row with, for every candidate that could be used, its mean
    log-prob a token under the clean image and under the first way of weakening, in nats, and its
    CHES against the annotation under the clean one (None for the others)."""
    made, view = Candidates(p, rows, folder), views(p)[0]
    scorer = functools.cache(lambda: _scorer(vision(), [
        _to_weigh(p, rows, root, made, i, view) for i in range(min(len(rows), 4))]))
    reader = functools.cache(lambda: encoding.reader(vision()))

    def prepare(batch: np.ndarray) -> _Prepared:
        asked = [_to_weigh(p, rows, root, made, i, view) for i in batch.tolist()]
        return asked, _ids(reader(), asked), generate.encode_views(
            reader(), [r for r, _, _ in asked], [None, view], seed=p.seed)

    def plan() -> list[np.ndarray]:
        prompts, answers = lengths()
        texts = 1 + len(made[0]["candidates"])
        return shards.by_budget(prompts, texts * answers, p.batch_tokens)

    shards.run(folder / "scores.jsonl", plan,
               lambda prepared: _weighed(vision(), scorer(), *prepared), prepare=prepare,
               label="weighed")


def _to_weigh(p: PairGeneration, rows: LineFile, root: Path, made: Candidates, number: int,
              view: View) -> _Asked:
    """A row's request, the texts to weigh (the annotation first), and which candidates they are."""
    line = made[number]
    usable = [selection.useless(c["text"], line["chosen"]) is None for c in line["candidates"]]
    texts = [c["text"] for c, use in zip(line["candidates"], usable, strict=True) if use]
    return request(p, rows, root, number, view), [line["chosen"], *texts], usable


def _ids(checkpoint: Checkpoint, asked: Sequence[_Asked]) -> list[list[list[int]]]:
    return [[encoding.answer_tokens(checkpoint, r.messages, text) for text in texts]
            for r, texts, _ in asked]


@torch.no_grad()
def _scorer(checkpoint: Checkpoint, asked: Sequence[_Asked]) -> logprobs.Scorer:
    inputs = generate.encode_batch(checkpoint, [r for r, _, _ in asked])
    return logprobs.choose(checkpoint, inputs, _ids(checkpoint, asked))


@torch.no_grad()
def _weighed(checkpoint: Checkpoint, weigh: logprobs.Scorer, asked: Sequence[_Asked],
             ids: list[list[list[int]]], views: list[dict[str, torch.Tensor]]) -> list[dict]:
    clean, weakened = (weigh(checkpoint, batch, ids) for batch in views)
    out = []
    for (request, _, usable), sharp, dull in zip(asked, clean, weakened, strict=True):
        found = iter([{"logp_clean": round(a.logprobs.mean().item(), 5),
                       "logp_noisy": round(b.logprobs.mean().item(), 5),
                       "ches": round(selection.ches(sharp[0].state, a.state), 5)}
                      for a, b in zip(sharp[1:], dull[1:], strict=True)])
        out.append({"id": request.id, "scores": [next(found) if use else None for use in usable]})
    return out
