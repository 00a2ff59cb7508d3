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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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
# Given text is weighed as a prompt that ends amid the assistant's turn.
GIVEN = {"prompt_logprobs": 0, "add_generation_prompt": False, "continue_final_message": True}
# Sampling that a checkpoint's own generation settings would change unseen.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

# Of a prompt: features (and grid) of its image, and its token ids.
Sent = tuple[dict[str, torch.Tensor], list[int]]


def require_family(family: str) -> None:
    """Raises Refusal for a family (`checkpoint.family`) whose image features a vLLM server does not
    take."""
    if family not in TENSORS + GRIDS:
        raise Refusal(f"decoder: vLLM takes no image features of {family} models; it does of "
                      f"{', '.join(TENSORS + GRIDS)}. Leave decoder empty: transformers decodes")


@torch.no_grad()
def features(checkpoint: Checkpoint, inputs: Mapping[str, torch.Tensor]) -> list[Sent]:
    """What the tower and projector make of each prompt's image, (tokens, hidden) on the CPU.

    inputs: a batch of `generate.encode_batch`. Raises Refusal where features are not finite, not as
    wide as the language model, or not as many as the prompt has places for and its grid says.
    """
    base = checkpoint.base
    taken = inspect.signature(base.get_image_features).parameters
    found = base.get_image_features(
        **{n: v for n, v in inputs.items() if n in taken}, return_dict=True).pooler_output
    ids = [row[seen.bool()].tolist() for row, seen in zip(
        inputs["input_ids"], inputs["attention_mask"], strict=True)]
    width = base.config.get_text_config().hidden_size
    gridded = base.config.model_type in GRIDS
    grids = inputs["image_grid_thw"].cpu() if gridded else [None] * len(ids)
    sent = []
    for image, grid, prompt in zip(found, grids, ids, strict=True):
        shape = (prompt.count(base.config.image_token_id), width)
        if tuple(image.shape) != shape or gridded and (
                grid.prod() != shape[0] * base.config.vision_config.spatial_merge_size ** 2):
            raise Refusal(f"decoder: the tower gives {' x '.join(map(str, image.shape))} features "
                          f"where the prompt has places for {shape[0]} x {shape[1]}"
                          f"{f', grid {grid.tolist()}' if gridded else ''}; leave decoder empty: "
                          "transformers decodes")
        if not image.isfinite().all():
            raise Refusal("decoder: the tower gives features that are not finite, which would "
                          "spoil other answers of the server too; set precision to float32")
        # A view would be written with all of its storage.
        parts = {"image_embeds": image.to("cpu", checkpoint.base.dtype, copy=True).contiguous()}
        sent.append((parts if grid is None else parts | {"image_grid_thw": grid}, prompt))
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


def server(endpoint: Endpoint, p: PairGeneration) -> dict[str, Any]:
    """What decodes: `Endpoint.server`, and the format of features; Refusal where the server says
    that it computes in another one."""
    said = endpoint.server()
    if (dtype := said.get("dtype", "").removeprefix("torch.")) not in ("", p.precision):
        raise Refusal(f"{endpoint.url}: computes in {dtype}, and precision is {p.precision}; serve "
                      f"with --dtype {p.precision}, or change precision")
    return said | {"features": p.precision}


def same_engine(endpoint: Endpoint, folder: Path, p: PairGeneration) -> None:
    """Writes what the server is into a folder; raises Refusal where the answers that are there came
    from another one."""
    now = server(endpoint, p)
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


class Question(NamedTuple):
    """prompt: makes the messages.  read: what a completion, with the reply in it, counts as."""

    prompt: Callable[[], list[dict[str, Any]]]
    read: Callable[[Any, Reply], Reply]
    seed: int


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

        sent: of `features`; None for a question without an image.
        """
        def read(prompt: list[int], whole: Any, reply: Reply) -> Reply:
            if whole.usage and whole.usage.prompt_tokens != len(prompt):
                raise self._another(f"{whole.usage.prompt_tokens} tokens", prompt)
            return reply

        return self._ask(self.endpoint, {
            r.id: [Question(functools.partial(messages, r, x and x[0]),
                            functools.partial(read, x[1]) if x else lambda _, reply: reply,
                            seed_for(seed, purpose, r.id, k) % 2**31)  # they read 31 bits
                   for k in range(samples)] for r, x in zip(requests, sent, strict=True)}, sampling)

    def weigh(self, requests: Sequence[Request], sent: Sequence[Sent],
              texts: Sequence[Sequence[str]]) -> list[list[torch.Tensor]]:
        """(tokens,) log-probs of texts given as answers to each request, in nats, in the tokens
        that the server reads. texts: with their end token."""
        def read(prompt: list[int], whole: Any, reply: Reply) -> Reply:
            tokens = [next(iter(entry.items())) for entry in whole.prompt_logprobs[1:]]
            if [int(token) for token, _ in tokens[:len(prompt) - 1]] != prompt[1:]:
                raise self._another("other tokens", prompt)
            return Reply(to_json([entry["logprob"] for _, entry in tokens[len(prompt) - 1:]]))

        def given(request: Request, text: str) -> Request:
            return replace(request, messages=(*request.messages,
                                              {"role": "assistant", "content": text}))

        asking = replace(self.endpoint, extra=dict(self.endpoint.extra) | GIVEN)
        replies = self._ask(asking, {
            r.id: [Question(functools.partial(messages, given(r, text), parts),
                            functools.partial(read, prompt), 0) for text in of_row]
            for r, (parts, prompt), of_row in zip(requests, sent, texts, strict=True)},
            {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 1})
        if refused := next((r for of_row in replies for r in of_row if r.status != 200), None):
            raise asking.refuses(refused)
        return [[torch.tensor(json.loads(r.text)) for r in of_row] for of_row in replies]

    def _ask(self, endpoint: Endpoint, questions: Mapping[str, Sequence[Question]],
             sampling: Mapping[str, Any]) -> list[list[Reply]]:
        """The replies to the questions of each row, by its id. Features are encoded when their
        question's turn comes: no more are in memory than are under way."""
        asked = {f"{row}|{k}": q for row, of_row in questions.items() for k, q in enumerate(of_row)}
        new = {key: q for key, q in asked.items() if key not in self.replies}
        if new:
            endpoints.keep_answers(
                endpoint, self.folder / f"{self.name}.{processes.rank()}.jsonl", self.replies,
                {key: q.prompt for key, q in new.items()}, seeds=[q.seed for q in new.values()],
                reads=[q.read for q in new.values()], **sampling)
        return [[self.replies[f"{row}|{k}"] for k in range(len(of_row))]
                for row, of_row in questions.items()]

    def _another(self, reads: str, prompt: list[int]) -> Refusal:
        return Refusal(f"{self.endpoint.url}, model {self.endpoint.model}: reads {reads} where the "
                       f"study's prompt has {len(prompt)}: serve the study's own checkpoint, with "
                       "its chat template")

    def done(self) -> None:
        """Forgets the replies once the file of answers is whole."""
        processes.wait()
        processes.first(lambda: [file.unlink() for file in self.files()])
