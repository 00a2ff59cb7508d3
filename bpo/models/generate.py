"""Decoding of many answers: clean, from weakened images, or two branches against each other.

Draws are seeded by row, so they do not depend on the batch that a row sits in. Logits may differ in
their last bits in a batch of other rows, so bytes are promised for one plan of batches (`shards`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from bpo.data.images import load
from bpo.models import encoding
from bpo.models.checkpoint import Checkpoint
from bpo.models.replies import Reply
from bpo.models.weakening import WEAKENINGS, Draw, View
from bpo.study.seeds import torch_generator


@dataclass(frozen=True)
class Request:
    """One question to be answered: for a row's id, messages that end with it, and an image.

    length: words of the annotated answer, a guess at how long the decoded one gets.
    other: another row's image, for a view that wants one.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    image: Path | None
    length: int = 0
    other: Path | None = None


def encode_batch(checkpoint: Checkpoint, requests: Sequence[Request], view: View | None = None, *,
                 seed: int = 0) -> dict[str, torch.Tensor]:
    """The requests' prompts as one left-padded batch with their images weakened, or clean (None).

    A view of two branches gives its weakened one.
    """
    return encode_views(checkpoint, requests, [view], seed=seed)[0]


def encode_views(checkpoint: Checkpoint, requests: Sequence[Request],
                 views: Sequence[View | None], *, seed: int) -> list[dict[str, torch.Tensor]]:
    """A batch a view, as `encode_batch` gives it."""
    return [encoding.collate(checkpoint, rows)
            for rows in _encoded(checkpoint, requests, views, seed=seed)]


def _encoded(checkpoint: Checkpoint, requests: Sequence[Request], views: Sequence[View | None], *,
             seed: int) -> list[list[dict[str, torch.Tensor]]]:
    """The encoded rows of each view; views that differ in the processor's pixels alone share its
    work."""
    @functools.cache
    def encoded(view: View | None) -> list[dict[str, torch.Tensor]]:
        pictures = [_picture(checkpoint.processor, r, view, seed=seed) for r in requests]
        texts = [encoding.prompt_text(checkpoint, r.messages, image=i is not None)
                 for r, i in zip(requests, pictures, strict=True)]
        return encoding.encode_all(checkpoint, texts, pictures)

    def rows(view: View | None) -> list[dict[str, torch.Tensor]]:
        if view is None or view.way.pixels is None:
            return encoded(view)
        return [row | {"pixel_values": view.way.pixels(
            row["pixel_values"], Draw(view, request.id, seed, checkpoint.processor))}
            for row, request in zip(encoded(None), requests, strict=True)]

    return [rows(view) for view in views]


def _picture(processor: Any, request: Request, view: View | None, *, seed: int
             ) -> Image.Image | None:
    """The image of a request, weakened where the view works on pictures."""
    if request.image is None:
        return None
    image = load(request.image)
    if view is None or view.way.picture is None:
        return image
    other = load(request.other) if view.way.other else None
    return view.way.picture(image, Draw(view, request.id, seed, processor, other))


def view_picture(processor: Any, request: Request, view: View, *, transform: str, seed: int
                 ) -> Image.Image:
    """What the model is shown of a request's image through a view, as a picture: as large as the
    image where the view works on pictures, else as the processor makes it."""
    picture = encoding.transformed(_picture(processor, request, view, seed=seed), transform,
                                   processor)
    if view.way.picture is not None:
        return picture
    draw = Draw(view, request.id, seed, processor)
    return encoding.weakened_picture(processor, picture, lambda x: view.way.pixels(x, draw))


class SeededSampling(LogitsProcessor):
    """Exact sampling from softmax(logits / temperature) within the nucleus, a generator a row.

    Adding Gumbel noise and taking the largest is a draw from the softmax (Gumbel 1954). That token
    alone is left, so that transformers' own draw behind it takes it whatever its seed.
    """

    def __init__(self, generators: Sequence[torch.Generator], *, temperature: float, top_p: float):
        self.generators, self.temperature = list(generators), temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        drawn = scores - torch.log(-torch.log(uniform.clamp_min(1e-30))).to(scores.device)
        token = drawn.argmax(dim=1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class Contrast(LogitsProcessor):
    """The two branches of a contrast: rows come as all clean ones and then all weakened ones.

    Both halves of the result are the same, so both branches take the same token and each goes on
    with its own cache. mode: a way of weakening that mixes the two.
    """

    def __init__(self, mode: str, *, strength: float, cutoff: float):
        self.mix, self.strength, self.cutoff = WEAKENINGS[mode].mix, strength, cutoff

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        clean, weakened = torch.log_softmax(scores.float(), dim=-1).chunk(2)
        return self.mix(clean, weakened, self.strength, self.cutoff).repeat(2, 1)


def decode(checkpoint: Checkpoint, batch: dict[str, torch.Tensor], *, max_new_tokens: int,
           sampling: SeededSampling | None = None, samples: int = 1,
           contrast: Contrast | None = None) -> list[str]:
    """The texts of `replies`."""
    return [r.text for r in replies(checkpoint, batch, max_new_tokens=max_new_tokens,
                                    samples=samples, sampling=sampling, contrast=contrast)]


@torch.no_grad()
def replies(checkpoint: Checkpoint, batch: dict[str, torch.Tensor], *, max_new_tokens: int,
            sampling: SeededSampling | None = None, samples: int = 1,
            contrast: Contrast | None = None) -> list[Reply]:
    """The answers to a batch of prompts, greedy unless `sampling` is given; one without an end has
    the finish "length".

    samples: answers a prompt, side by side in the result (needs `sampling` with a generator each);
    the image is encoded once for all of them.
    contrast: the batch holds clean prompts and then as many weakened ones; the answers come once.
    """
    listed = checkpoint.base.generation_config.eos_token_id or []
    # The tokenizer's is the end of answers in training, and a server stops at it too.
    ends = sorted({checkpoint.tokenizer.eos_token_id,
                   *(listed if isinstance(listed, list) else [listed])})
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=sampling is not None,
                              num_return_sequences=samples, eos_token_id=ends,
                              pad_token_id=checkpoint.tokenizer.pad_token_id,
                              # `sampling` alone draws; else transformers takes the checkpoint's
                              # own and warns where nothing is drawn. 50 is what it leaves unsaid.
                              temperature=1.0, top_p=1.0, top_k=0 if sampling else 50)
    steps = LogitsProcessorList([s for s in (contrast, sampling) if s is not None])
    tokens = checkpoint.model.generate(**batch, generation_config=config, logits_processor=steps)
    if contrast is not None:
        tokens = tokens[:len(tokens) // 2]
    answers = tokens[:, batch["input_ids"].shape[1]:]
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).any(1).tolist()
    texts = checkpoint.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [Reply(text.strip(), "stop" if end else "length")
            for text, end in zip(texts, ended, strict=True)]


def encode_branches(checkpoint: Checkpoint, requests: Sequence[Request], view: View | None, *,
                    seed: int) -> dict[str, torch.Tensor]:
    """What `sample_answers` decodes: the weakened prompts, behind the clean ones where the view has
    two branches."""
    both = view is not None and view.two_branches
    branches = _encoded(checkpoint, requests, [None, view] if both else [view], seed=seed)
    return encoding.collate(checkpoint, [row for rows in branches for row in rows])


def sample_replies(checkpoint: Checkpoint, requests: Sequence[Request],
                   inputs: dict[str, torch.Tensor], view: View | None, *, seed: int, purpose: str,
                   temperature: float, top_p: float, samples: int, max_new_tokens: int,
                   contrast_strength: float = 1.0, contrast_cutoff: float = 0.1
                   ) -> list[list[Reply]]:
    """For each request `samples` answers, drawn from its weakened image (None: as it is).

    inputs: `encode_branches` of the requests and the view.
    Draws are seeded by (seed, purpose, row id, number of the sample). temperature 0: the likeliest
    tokens, one answer a request.
    """
    contrast, branches = None, 1
    if view is not None and view.two_branches:
        contrast = Contrast(view.mode, strength=contrast_strength, cutoff=contrast_cutoff)
        branches = 2  # that take the same draws: the same token comes out for both
    draws = [torch_generator(seed, purpose, r.id, k)
             for _ in range(branches) for r in requests for k in range(samples)]
    sampling = SeededSampling(draws, temperature=temperature, top_p=top_p) if temperature else None
    made = replies(checkpoint, inputs, max_new_tokens=max_new_tokens, samples=samples,
                   sampling=sampling, contrast=contrast)
    return [made[i:i + samples] for i in range(0, len(made), samples)]


def sample_answers(*given: Any, **settings: Any) -> list[list[str]]:
    """The texts of `sample_replies`."""
    return [[r.text for r in of_row] for of_row in sample_replies(*given, **settings)]
