"""The questions of a stage's rows, as a model or a server of it is asked them: images weakened and
encoded, batches that fit, and the image features that a server is sent.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from bpo.data.check import image_root
from bpo.data.rows import Row
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, served
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.served import Sent
from bpo.models.weakening import View
from bpo.params import PairGeneration, Refusal
from bpo.study import seeds, shards
from bpo.study.files import LineFile

MEASURED_IMAGES = 8  # an image's tokens are looked up on so many rows, and the largest one counts
SWAP_TRIES = 50
WAVES = 4  # a batch for a server has so many times the questions that are under way at once


class Questions:
    """Those of a stage's folder with rows.jsonl. Only the places of lines are held; the model is
    loaded when something needs it."""

    def __init__(self, p: PairGeneration, folder: Path):
        self.p, self.folder, self.root = p, folder, image_root(p)

    @cached_property
    def rows(self) -> LineFile:
        return LineFile(self.folder / "rows.jsonl")

    @cached_property
    def model(self) -> Checkpoint:
        """Without its language model where a server has it."""
        load = checkpoints.load_tower if self.p.decoder else checkpoints.load
        return load(self.p.path(self.p.model), precision=self.p.precision,
                    transform=self.p.image_transform)

    @cached_property
    def reader(self) -> Checkpoint:
        return encoding.reader(self.model)

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

    def encoded(self, requests: Sequence[Request], views: Sequence[View | None]
                ) -> list[dict[str, torch.Tensor]]:
        """Questions by each view, as `generate.encode_views` gives them."""
        return generate.encode_views(self.reader, requests, views, seed=self.p.seed)

    def features(self, batch: np.ndarray, requests: Sequence[Request],
                 views: Sequence[View | None]) -> list[list[Sent]]:
        """What a server is sent of a batch's questions, by view; the tower takes as many rows at
        once as fill batch_tokens."""
        prompts, answers = self.lengths
        sent: list[list[Sent]] = [[] for _ in views]
        for part in shards.by_budget(prompts[batch], answers[batch], self.p.batch_tokens):
            inputs_by_view = self.encoded([requests[n] for n in part.tolist()], views)
            for of_view, inputs in zip(sent, inputs_by_view, strict=True):
                of_view += served.features(self.model, inputs)
        return sent

    def batches(self, answers: np.ndarray, sequences: int, *, asked: int) -> list[np.ndarray]:
        """Batches of rows that fill batch_tokens, `sequences` at once of each; joined where a
        server decodes, so that it seldom waits for the tower. answers: (rows,) tokens; asked:
        questions a row to the server."""
        made = shards.by_budget(self.lengths[0], answers, self.p.batch_tokens // sequences)
        if not self.p.decoder or not made:
            return made
        joined = max(1, WAVES * self.p.endpoint_requests // (asked * len(made[0])))
        return [np.concatenate(made[n:n + joined]) for n in range(0, len(made), joined)]

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
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
