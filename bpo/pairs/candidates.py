"""Candidate rejected answers of every annotated row: made in three ways, and weighed by the model.

weakened: the same model answers while its image is weakened. injected: a text model rewrites the
annotated answer with plausible mistakes. given: the data set has them. Each kind is one file in the
order of rows.jsonl, made through `shards`; which candidates become rejected is `selection`'s.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bpo.data import turns
from bpo.data.check import image_root
from bpo.data.rows import Row
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs, served
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.replies import Reply
from bpo.models.weakening import WEAKENINGS, View
from bpo.pairs import injection, selection
from bpo.params import PairGeneration, Refusal
from bpo.study import processes, progress, seeds, shards
from bpo.study.files import LineFile

MEASURED_IMAGES = 8  # an image's tokens are looked up on so many rows, and the largest one counts
SWAP_TRIES = 50


def views(p: PairGeneration) -> list[View]:
    """Every way of weakening that the parameters ask for."""
    return [View(mode, step, draw, p.crop_share) for mode in p.weaken_modes
            for step in (p.weaken_steps if WEAKENINGS[mode].stepped else [0])
            for draw in range(p.weaken_draws if WEAKENINGS[mode].drawn else 1)]


def _useful(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates of a line that could be used."""
    return [c for c in line["candidates"]
            if "fault" not in c and not selection.useless(c["text"], line["chosen"])]


class Candidates(Sequence):
    """The candidates of each row of a stage's folder: `make` writes them, an index reads them.

    Only the places of lines are held; the model is loaded when something needs it.
    """

    def __init__(self, p: PairGeneration, folder: Path):
        self.p, self.folder, self.root = p, folder, image_root(p)

    @cached_property
    def rows(self) -> LineFile:
        return LineFile(self.folder / "rows.jsonl")

    @cached_property
    def special(self) -> re.Pattern:
        """The tokens that no text may hold: those of the checkpoint and of the text model."""
        p = self.p
        readers = [checkpoints.load_without_weights(p.path(p.model)).processor]
        if "injected" in p.sources and p.text_model and not p.endpoint:
            readers.append(checkpoints.load_tokenizer(p.path(p.text_model)))
        return encoding.special(*readers)

    @cached_property
    def model(self) -> Checkpoint:
        """Without its language model where a server has it."""
        load = checkpoints.load_tower if self.p.decoder else checkpoints.load
        return load(self.p.path(self.p.model), precision=self.p.precision,
                    transform=self.p.image_transform)

    @cached_property
    def text_model(self) -> Checkpoint:
        if not self.p.text_model:
            return self.model
        return checkpoints.load_text_model(self.p.path(self.p.text_model),
                                           precision=self.p.precision)

    @cached_property
    def _reader(self) -> Checkpoint:
        return encoding.reader(self.model)

    def make(self) -> None:
        """Writes weakened-<view>.jsonl, {id, texts} a row, injected.jsonl, {id, replies} as they
        came, and scores.jsonl, {id, scores} with one entry a candidate, into the folder. What is
        there is not made again."""
        p = self.p
        if p.decoder:
            served.require_family(checkpoints.family(p.path(p.model)))
            processes.first(lambda: served.same_engine(injection.decoder(p), self.folder, p))
        if "injected" in p.sources and injection.by_server(p) and not processes.first(
                (self.folder / "injected.jsonl").is_file):
            # now, and not after hours of weakening
            processes.first(lambda: injection.endpoint(p).check(**injection.sampling(p)))
        weakened = views(p) if "weakened" in p.sources else []
        progress.announce([*((f"answers, weakened-{v.name}", 1) for v in weakened),
                           ("injected", "injected" in p.sources), ("weighed", p.score_candidates)])
        for view in weakened:
            self._weaken(view)
        if "injected" in p.sources:
            injection.write(p, self.folder / "injected.jsonl", self.rows, self.row,
                            lambda: self.text_model)
        if p.clean_answers:
            self._answer_clean()
        if p.score_candidates:
            self._score()

    def row(self, number: int) -> Row:
        return Row.from_line(self.rows[number], self.root)

    def request(self, number: int, view: View | None) -> Request:
        """A row's question with its image, and another row's image where the view wants one."""
        row, other = self.row(number), None
        if view is not None and view.way.other:
            rng = seeds.numpy_generator(self.p.seed, "swap", row.id, view.draw)
            drawn = (self.root / self.rows[int(rng.integers(len(self.rows)))]["image"]
                     for _ in range(SWAP_TRIES))
            other = next((image for image in drawn if image != row.image), None)
            if other is None:
                raise Refusal(f"weaken_modes: {view.mode} needs rows with different images, and "
                              f"here {SWAP_TRIES} draws gave row {row.id} its own; use another "
                              "mode")
        return Request(row.id, row.prompt, row.image, len(row.answer.split()), other)

    def answers(self, checkpoint: Checkpoint, requests: Sequence[Request],
                inputs: dict[str, torch.Tensor], view: View) -> list[dict[str, Any]]:
        """{id, texts} of each request: what the stage samples from a view's weakened images.
        inputs: `generate.encode_branches` of both."""
        p = self.p
        texts = generate.sample_answers(
            checkpoint, requests, inputs, view, seed=p.seed, purpose=f"weakened {view.name}",
            samples=p.weaken_samples, temperature=p.weaken_temperature, top_p=p.weaken_top_p,
            max_new_tokens=p.max_new_tokens, contrast_strength=p.contrast_strength,
            contrast_cutoff=p.contrast_cutoff)
        return [{"id": r.id, "texts": t} for r, t in zip(requests, texts, strict=True)]

    def _weaken(self, view: View) -> None:
        name, p = f"weakened-{view.name}", self.p
        if p.decoder:
            self._serve(name, view, lambda of_row: {"texts": [r.text for r in of_row]},
                        samples=p.weaken_samples, temperature=p.weaken_temperature,
                        top_p=p.weaken_top_p)
        else:
            self._ask(name, view, lambda prepared: self.answers(self.model, *prepared, view),
                      sequences=p.weaken_samples * (1 + view.two_branches))

    def _serve(self, name: str, view: View | None, line: Callable[[list[Reply]], dict[str, Any]], *,
               samples: int = 1, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Writes NAME.jsonl as `_ask` does, decoded by the server."""
        if processes.first((self.folder / f"{name}.jsonl").is_file):
            return
        p, asked = self.p, served.Asked(injection.decoder(self.p), self.folder, name)

        def work(prepared: tuple) -> list[dict[str, Any]]:
            replies = asked.answers(
                *prepared, seed=p.seed, purpose=name, samples=samples, temperature=temperature,
                top_p=top_p, max_new_tokens=p.max_new_tokens)
            if refused := next((r for x in replies for r in x if r.status != 200), None):
                raise asked.endpoint.refuses(refused)
            return [{"id": r.id} | line(x) for r, x in zip(prepared[0], replies, strict=True)]

        self._ask(name, view, work)
        asked.done()

    def _answer_clean(self) -> None:
        """Writes clean.jsonl: {id, text} a row, the likeliest answer to its clean image."""
        if self.p.decoder:
            return self._serve("clean", None, lambda of_row: {"text": of_row[0].text})

        def work(prepared: tuple) -> list[dict[str, Any]]:
            requests, inputs = prepared
            texts = generate.decode(self.model, inputs, max_new_tokens=self.p.max_new_tokens)
            return [{"id": r.id, "text": t} for r, t in zip(requests, texts, strict=True)]

        self._ask("clean", None, work)

    def _ask(self, name: str, view: View | None, work: Callable[[tuple], list[dict[str, Any]]], *,
             sequences: int = 1) -> None:
        """Writes NAME.jsonl: what `work` makes of each batch of questions, requests and inputs, in
        place of which the decoder is sent features.

        sequences: decoded at once for each row.
        """
        def prepare(batch: np.ndarray) -> tuple[list[Request], dict[str, torch.Tensor]]:
            requests = [self.request(number, view) for number in batch.tolist()]
            inputs = generate.encode_branches(self._reader, requests, view, seed=self.p.seed)
            return requests, served.features(self.model, inputs) if self.p.decoder else inputs

        shards.run(self.folder / f"{name}.jsonl",
                   lambda: shards.by_budget(*self._lengths, self.p.batch_tokens // sequences), work,
                   prepare=prepare, label=f"answers, {name}")

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) tokens of every prompt with its image, and of every annotated answer with its
        end. Images are not opened for this: each counts as the largest one of a few rows, spread
        over the file."""
        prompts, answers = np.zeros((2, len(self.rows)), dtype=np.int32)
        for number, line in enumerate(self.rows):
            text = encoding.prompt_text(self.model, line["prompt"], image=True)
            prompts[number] = len(encoding.answer_ids(self.model, text))
            answers[number] = len(encoding.answer_ids(self.model, line["answer"])) + 1
        spread = np.linspace(0, len(self.rows) - 1, MEASURED_IMAGES).astype(int)
        image = max(generate.encode_batch(self.model, [self.request(number, None)])
                    ["input_ids"].shape[1] - prompts[number] for number in set(spread.tolist()))
        return prompts + max(image, 0), answers

    def _score(self) -> None:
        """Writes scores.jsonl: a list a row with, for every candidate that could be used, its mean
        log-prob a token under the clean image and under the first way of weakening, in nats, how
        far the annotation's lies above it (margin), and its CHES against the annotation, both
        under the clean one (None for the others)."""
        view = views(self.p)[0]

        def prepare(batch: Sequence[int], reader: Checkpoint) -> tuple:
            lines = [self._unscored(number) for number in batch]
            requests = [self.request(number, view) for number in batch]
            tokens = [[encoding.answer_tokens(reader, request.messages, text)
                       for text in (line["chosen"], *(c["text"] for c in _useful(line)))]
                      for line, request in zip(lines, requests, strict=True)]
            return lines, tokens, generate.encode_views(reader, requests, [None, view],
                                                        seed=self.p.seed)

        @cache
        def scorer() -> logprobs.Scorer:
            _, tokens, (clean, _) = prepare(range(min(len(self.rows), 4)), self.model)
            return logprobs.choose(self.model, clean, tokens)

        @torch.no_grad()
        def work(prepared: tuple) -> list[dict[str, Any]]:
            lines, tokens, batches = prepared
            clean, weakened = (scorer()(self.model, batch, tokens) for batch in batches)
            out = []
            for line, sharp, dull in zip(lines, clean, weakened, strict=True):
                for candidate, a, b in zip(_useful(line), sharp[1:], dull[1:], strict=True):
                    candidate["scores"] = {
                        "logp_clean": round(a.logprobs.mean().item(), 5),
                        "logp_noisy": round(b.logprobs.mean().item(), 5),
                        "margin": round((sharp[0].logprobs.mean() - a.logprobs.mean()).item(), 5),
                        "ches": round(selection.ches(sharp[0].state, a.state), 5)}
                out.append({"id": line["id"],
                            "scores": [c.get("scores") for c in line["candidates"]]})
            return out

        def plan() -> list[np.ndarray]:
            prompts, answers = self._lengths
            texts = 1 + len(self._unscored(0)["candidates"])
            return shards.by_budget(prompts, texts * answers, self.p.batch_tokens)

        shards.run(self.folder / "scores.jsonl", plan, work, label="weighed",
                   prepare=lambda batch: prepare(batch.tolist(), self._reader))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """{id, image, category, prompt, chosen, candidates: [{source, mode, ..., text, scores}]},
        and with clean_answers the model's `own` answer."""
        line = self._unscored(number)
        if self.p.clean_answers:
            line["own"] = self._clean[number]["text"]
        if self.p.score_candidates:
            for candidate, scores in zip(line["candidates"], self._scores[number]["scores"],
                                         strict=True):
                candidate |= {"scores": scores} if scores else {}
        return line

    @cached_property
    def _clean(self) -> LineFile:
        return LineFile(self.folder / "clean.jsonl")

    @cached_property
    def _scores(self) -> LineFile:
        return LineFile(self.folder / "scores.jsonl")

    @cached_property
    def _made(self) -> list[tuple[dict[str, Any], LineFile]]:
        """What is known of all candidates of a file, and the file."""
        p, made = self.p, []
        for view in views(p) if "weakened" in p.sources else ():
            step = {"step": view.step} if view.way.stepped else {}
            made.append(({"source": "weakened", "mode": view.mode, **step, "draw": view.draw},
                         LineFile(self.folder / f"weakened-{view.name}.jsonl")))
        if "injected" in p.sources:
            mode = "endpoint" if injection.by_server(p) else "language_model"
            made.append(({"source": "injected", "mode": mode},
                         LineFile(self.folder / "injected.jsonl")))
        return made

    def _unscored(self, number: int) -> dict[str, Any]:
        row, kinds = self.rows[number], []
        for kind, file in self._made:
            line = file[number]
            kinds.append((kind, [{"text": t} for t in line["texts"]] if "texts" in line else
                          injection.answers(line, row["answer"])))
        if "given" in self.p.sources:
            kinds.append(({"source": "given", "mode": "given"},
                          [{"text": t} for t in row.get("given", [])]))
        made = [{**kind, "sample": k, **answer} for kind, answers in kinds
                for k, answer in enumerate(answers)]
        for candidate in made:  # a model may spell a token out: its tokenizer would read one
            if reason := turns.strange(candidate["text"], self.special):
                candidate.setdefault("fault", reason)
        return {"id": row["id"], "image": row["image"], "category": row["category"],
                "prompt": row["prompt"], "chosen": row["answer"], "candidates": made}
