"""Batched decoding that can be stopped at any point and gone on with.

Work is cut into batches once, from the rows alone. A batch's records are appended in one durable
write, and a resumed run starts at the first batch that is not there whole. So the same plan gives
the same bytes, interrupted or not. Draws are seeded by row: they do not depend on the batch; logits
may differ in their last bits between batch sizes, so bytes are guaranteed for one `batch_size`.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from bpo import models
from bpo.models import Checkpoint
from bpo.noise import add_noise
from bpo.records import load_image, to_json
from bpo.seeds import torch_generator


@dataclass(frozen=True)
class Request:
    """One answer to be decoded: for a row's id, messages that end with a question, and an image.

    length: words of the annotated answer, a guess at how long the decoded one gets.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    image: Path | None
    length: int = 0


def plan(requests: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Batches of requests whose answers should end at about the same time, longest first."""
    ordered = sorted(requests, key=lambda r: (-r.length, r.id))
    return [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]


def resumable(file: Path, batches: Sequence[Sequence[Any]],
              work: Callable[[Sequence[Any]], list[dict]], *, label: str) -> list[dict]:
    """The records of all batches, one a request in the plan's order, from `file` or made now.

    work: batch -> one record a request, with the request's id under "id".
    Whatever follows the last whole batch in the file, such as half a line, is cut off.
    """
    done, size = _whole_batches(file, batches)
    with file.open("ab") as stream:
        stream.truncate(size)
        for batch in tqdm(batches[len(done):], initial=len(done), total=len(batches), desc=label,
                          unit="batch", leave=False):
            records = work(batch)
            stream.write("".join(f"{to_json(r)}\n" for r in records).encode())
            stream.flush()
            os.fsync(stream.fileno())
            done.append(records)
    return [record for batch in done for record in batch]


def _whole_batches(file: Path, batches: Sequence[Sequence[Any]]) -> tuple[list[list[dict]], int]:
    """The batches that a file holds from its start, and their size in bytes."""
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    done, size, at = [], 0, 0
    for batch in batches:
        part = lines[at:at + len(batch)]
        if len(part) < len(batch) or not part[-1].endswith(b"\n"):
            break
        try:
            records = [json.loads(line) for line in part]
        except ValueError:
            break
        if [isinstance(r, dict) and r.get("id") for r in records] != [r.id for r in batch]:
            break
        done.append(records)
        size += sum(map(len, part))
        at += len(batch)
    return done, size


def encode_batch(checkpoint: Checkpoint, requests: Sequence[Request], *, noise_step: int = 0,
                 seed: int = 0) -> dict[str, torch.Tensor]:
    """The requests' prompts as one left-padded batch, each image noised by its row's own draw."""
    rows = []
    for request in requests:
        image = load_image(request.image) if request.image else None
        text = models.prompt_text(checkpoint, request.messages, image=image is not None)
        row = models.encode(checkpoint, text, image)
        if noise_step:
            draw = torch_generator(seed, "noise", request.id, noise_step)
            row["pixel_values"] = add_noise(row["pixel_values"], noise_step, draw)
        rows.append(row)
    return models.collate(checkpoint, rows)


class SeededSampling(LogitsProcessor):
    """Exact sampling from softmax(logits / temperature) within the nucleus, a generator a row.

    Adding Gumbel noise and taking the largest is a draw from the softmax (Gumbel 1954), so greedy
    decoding behind this processor samples, and each row's draws depend on its own generator alone.
    """

    def __init__(self, generators: Sequence[torch.Generator], *, temperature: float, top_p: float):
        self.generators, self.temperature = list(generators), temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        return scores - torch.log(-torch.log(uniform.clamp_min(1e-30))).to(scores.device)


@torch.no_grad()
def decode(checkpoint: Checkpoint, batch: dict[str, torch.Tensor], *, max_new_tokens: int,
           sampling: SeededSampling | None = None) -> list[str]:
    """The answers to a batch of prompts as text, greedy unless `sampling` is given."""
    ends = checkpoint.base.generation_config.eos_token_id or checkpoint.tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends,
                              pad_token_id=checkpoint.tokenizer.pad_token_id)
    extra = {"logits_processor": LogitsProcessorList([sampling])} if sampling else {}
    tokens = checkpoint.model.generate(**batch, generation_config=config, **extra)
    answers = tokens[:, batch["input_ids"].shape[1]:]
    return [t.strip() for t in
            checkpoint.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def sample_answers(checkpoint: Checkpoint, requests: Sequence[Request], file: Path, *,
                   noise_step: int, seed: int, purpose: str, temperature: float, top_p: float,
                   max_new_tokens: int, batch_size: int) -> dict[str, str]:
    """request id -> one sampled answer, decoded from noised images, kept in `file` as it goes.

    noise_step: 0 .. 999; with an image, 900 is where the paper's release looks.
    """
    def work(batch: Sequence[Request]) -> list[dict]:
        draws = [torch_generator(seed, purpose, r.id) for r in batch]
        inputs = encode_batch(checkpoint, batch, noise_step=noise_step, seed=seed)
        texts = decode(checkpoint, inputs, max_new_tokens=max_new_tokens,
                       sampling=SeededSampling(draws, temperature=temperature, top_p=top_p))
        return [{"id": r.id, "text": t} for r, t in zip(batch, texts, strict=True)]

    records = resumable(file, plan(requests, batch_size), work, label=purpose)
    return {r["id"]: r["text"] for r in records}
