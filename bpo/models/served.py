"""Answers of a vLLM server of the study's model to images that it is sent as features.

Noise lies on the processor's pixels, so a noised image cannot travel as a picture. The vision tower
runs here, on the pixels as they are, and the server decodes. It neither refuses features that are
not finite, which spoil other requests too, nor a wrong number of them: both are looked at here.
"""

import base64
import functools
import inspect
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bpo.models import endpoint as endpoints
from bpo.models.checkpoint import Checkpoint
from bpo.models.endpoint import Endpoint
from bpo.models.generate import Request
from bpo.models.replies import Reply
from bpo.params import PairGeneration, Refusal
from bpo.study import processes
from bpo.study.files import to_json, write_whole
from bpo.study.seeds import seed_for

# What vLLM takes as features, by its source: of the second with the grid of the image's patches.
TENSORS = ("llava", "llava_next", "llava_onevision", "internvl", "paligemma")
GRIDS = ("qwen2_vl", "qwen2_5_vl")
ENGINE = "decoder.json"  # beside the answers: what decoded them
# Sampling that a checkpoint's own generation settings would change unseen.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

Sent = tuple[dict[str, torch.Tensor], int]  # features (and grid) of a prompt, and its tokens


def require_family(model_type: str) -> None:
    """Raises Refusal for a family whose image features a vLLM server does not take."""
    if model_type not in TENSORS + GRIDS:
        raise Refusal(f"decoder: vLLM takes no image features of {model_type} models; it does of "
                      f"{', '.join(TENSORS + GRIDS)}. Leave decoder empty: transformers decodes")


@torch.no_grad()
def features(checkpoint: Checkpoint, inputs: Mapping[str, torch.Tensor]) -> list[Sent]:
    """What the tower and projector make of each prompt's image, (tokens, hidden) on the CPU.

    inputs: a batch of `generate.encode_batch`. Raises Refusal where features are not finite, or not
    as many as the prompt has places for.
    """
    base = checkpoint.base
    require_family(base.config.model_type)
    taken = inspect.signature(base.get_image_features).parameters
    found = base.get_image_features(
        **{n: v for n, v in inputs.items() if n in taken}, return_dict=True).pooler_output
    places = (inputs["input_ids"] == base.config.image_token_id).sum(1).tolist()
    lengths = inputs["attention_mask"].sum(1).tolist()
    grids = inputs["image_grid_thw"] if base.config.model_type in GRIDS else [None] * len(places)
    sent = []
    for image, grid, count, length in zip(found, grids, places, lengths, strict=True):
        if image.shape[0] != count:
            raise Refusal(f"decoder: the tower gives {image.shape[0]} features where the prompt "
                          f"has places for {count}; leave decoder empty: transformers decodes")
        if not image.isfinite().all():
            raise Refusal("decoder: the tower gives features that are not finite, which would "
                          "spoil other answers of the server too; set precision to float32")
        # A view would be written with all of its storage.
        parts = {"image_embeds": image.to("cpu", copy=True).contiguous()}
        sent.append((parts if grid is None else parts | {"image_grid_thw": grid.cpu()}, length))
    return sent


def messages(request: Request, parts: Mapping[str, torch.Tensor] | None) -> list[dict[str, Any]]:
    """A request as a chat with features in place of the image, in front of the first question."""
    turns: list[dict[str, Any]] = [dict(m) for m in request.messages]
    if parts:
        first = next(t for t in turns if t["role"] == "user")
        encoded = {n: _encoded(x) for n, x in parts.items()}
        first["content"] = [
            {"type": "image_embeds", "image_embeds": encoded if len(encoded) > 1 else
             encoded["image_embeds"]}, {"type": "text", "text": first["content"]}]
    return turns


def _encoded(tensor: torch.Tensor) -> str:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return base64.b64encode(stream.getvalue()).decode()


def same_engine(endpoint: Endpoint, folder: Path, p: PairGeneration) -> None:
    """Writes what the server is into a folder; raises Refusal where the answers that are there came
    from another one."""
    now = endpoint.server() | {"features": p.precision}
    file = folder / ENGINE
    if not file.is_file():
        write_whole(file, to_json(now))
    elif (before := engine(folder)["decoder"]) != now:
        raise Refusal(f"{endpoint.url}: is {now}, and the answers so far came from {before}; serve "
                      f"that again, or move {folder} away")


def engine(folder: Path) -> dict[str, Any]:
    """{decoder: what `same_engine` wrote}, or nothing where transformers decoded."""
    file = folder / ENGINE
    return {"decoder": json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}


class Asked:
    """A file of answers in the making: replies are on the disk as they come, one file a process, so
    that a run that goes on asks for no answer again."""

    def __init__(self, endpoint: Endpoint, folder: Path, name: str):
        self.endpoint, self.folder, self.name = endpoint, folder / "asked", name
        self.folder.mkdir(exist_ok=True)
        self.replies: dict[str, Reply] = {}
        for file in self.files():
            self.replies |= endpoints.kept(file)
        processes.wait()  # nobody writes before everybody has read

    def files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}.*.jsonl"))

    def answers(self, requests: Sequence[Request], sent: Sequence[Sent | None], *, seed: int,
                purpose: str, samples: int, **sampling: Any) -> list[list[Reply]]:
        """`samples` replies to each request, seeded by its row and the sample's number.

        sent: of `features`; None for a question without an image. Features are encoded when their
        request's turn comes: no more are in memory than are under way.
        """
        keys = {f"{r.id}|{k}": (r, k, x) for r, x in zip(requests, sent, strict=True)
                for k in range(samples)}
        new = {key: v for key, v in keys.items() if key not in self.replies}
        if new:
            endpoints.keep_answers(
                self.endpoint, self.folder / f"{self.name}.{processes.rank()}.jsonl", self.replies,
                {key: functools.partial(messages, r, x and x[0])
                 for key, (r, _, x) in new.items()},
                # endpoints read seeds of 31 bits
                seeds=[seed_for(seed, purpose, r.id, k) % 2**31 for r, k, _ in new.values()],
                lengths=[x[1] if x else None for *_, x in new.values()], **sampling)
        made = [self.replies[key] for key in keys]
        return [made[n:n + samples] for n in range(0, len(made), samples)]

    def done(self) -> None:
        """Forgets the replies once the file of answers is whole."""
        processes.wait()
        processes.first(lambda: [file.unlink() for file in self.files()])
