"""Candidate rejected answers of every annotated row: made in three ways, and weighed by the model.

weakened: the same model answers while its image is weakened. injected: a text model rewrites the
annotated answer with plausible mistakes. given: the data set has them. Each kind is one file in the
order of rows.jsonl, made through `shards`; `scores` weighs them, and which become rejected is
`selection`'s.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from bpo.data import turns
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, served
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.replies import Reply
from bpo.models.weakening import WEAKENINGS, View
from bpo.pairs import injection, scores
from bpo.pairs.questions import Questions
from bpo.params import PairGeneration
from bpo.study import processes, progress, shards
from bpo.study.files import LineFile


def views(p: PairGeneration) -> list[View]:
    """Every way of weakening that the parameters ask for."""
    return [View(mode, step, draw, p.crop_share) for mode in p.weaken_modes
            for step in (p.weaken_steps if WEAKENINGS[mode].stepped else [0])
            for draw in range(p.weaken_draws if WEAKENINGS[mode].drawn else 1)]


class Candidates(Questions, Sequence):
    """The candidates of each row of a stage's folder: `make` writes them, an index reads them."""

    @cached_property
    def special(self) -> re.Pattern:
        """The tokens that no text may hold: those of the checkpoint and of the text model."""
        p = self.p
        readers = [checkpoints.load_without_weights(p.path(p.model)).processor]
        if "injected" in p.sources and p.text_model and not p.endpoint:
            readers.append(checkpoints.load_tokenizer(p.path(p.text_model)))
        return encoding.special(*readers)

    @cached_property
    def text_model(self) -> Checkpoint:
        if not self.p.text_model:
            return self.model
        return checkpoints.load_text_model(self.p.path(self.p.text_model),
                                           precision=self.p.precision)

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
            scores.write(self, views(p)[0], self._unscored)

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

        self._ask(name, view, work, asked=samples)
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
             sequences: int = 1, asked: int = 1) -> None:
        """Writes NAME.jsonl: what `work` makes of each batch of questions, requests and inputs, in
        place of which the decoder is sent features.

        sequences: decoded at once for each row; asked: of the server, a row.
        """
        def prepare(batch: np.ndarray) -> tuple[list[Request], Any]:
            requests = [self.request(number, view) for number in batch.tolist()]
            if self.p.decoder:
                return requests, self.features(batch, requests, [view])[0]
            return requests, generate.encode_branches(self.reader, requests, view, seed=self.p.seed)

        shards.run(self.folder / f"{name}.jsonl",
                   lambda: self.batches(self.lengths[1], sequences, asked=asked), work,
                   prepare=prepare, label=f"answers, {name}")

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
