"""Error injection: a text model, here or behind an endpoint, rewrites the annotated answers with
plausible mistakes. Replies are kept as they came; `answers` reads the rewritten answer out of them.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpo.data.rows import Row
from bpo.models import encoding, generate, served
from bpo.models.checkpoint import Checkpoint
from bpo.models.endpoint import Endpoint
from bpo.models.generate import Request
from bpo.models.replies import Reply, rewritten
from bpo.params import PairGeneration
from bpo.study import processes, shards
from bpo.study.files import LineFile


def fill(template: str, row: Row) -> str:
    """The template with {question} and {answer} filled in; other braces stay as they are."""
    return re.sub(r"\{(question|answer)\}", lambda place: getattr(row, place[1]), template)


def answers(line: dict[str, Any], annotated: str) -> list[dict[str, str]]:
    """{text} of the answer in each reply of a line; {text, fault} where a reply holds none: the
    reply, and why."""
    found = [rewritten(Reply(**reply), annotated) for reply in line["replies"]]
    return [{"text": text, "fault": fault} if fault else {"text": text} for text, fault in found]


def by_server(p: PairGeneration) -> bool:
    """Whether a server rewrites answers: the endpoint, or the decoder as the checkpoint's own
    language model."""
    return bool(p.endpoint or p.decoder and not p.text_model)


def endpoint(p: PairGeneration) -> Endpoint:
    return _server(p, p.endpoint, p.endpoint_model) if p.endpoint else decoder(p)


@functools.cache
def _model_of(server: Endpoint) -> str:
    return server.server()["model"]


def decoder(p: PairGeneration) -> Endpoint:
    """The server of the checkpoint, with its own name of its model; Refusal where none is there."""
    return _server(p, p.decoder, _model_of(_server(p, p.decoder, "")), **served.PLAIN)


def _server(p: PairGeneration, url: str, model: str, **extra: Any) -> Endpoint:
    return Endpoint(url=url, model=model, at_once=p.endpoint_requests,
                    key_variable=p.endpoint_key_variable, retries=p.endpoint_retries,
                    timeout=p.endpoint_timeout, extra=extra)


def sampling(p: PairGeneration) -> dict[str, Any]:
    return {"temperature": p.inject_temperature, "top_p": p.inject_top_p,
            "max_new_tokens": p.max_new_tokens}


def write(p: PairGeneration, file: Path, lines: Sequence[dict[str, Any]],
          row: Callable[[int], Row], model: Callable[[], Checkpoint]) -> None:
    """Writes {id, replies} of each row. lines: rows.jsonl's; row: a row by its number; model: loads
    the text model, unless there is an endpoint. Raises Refusal as the endpoint does, and where it
    refused every prompt: the next run asks again."""
    describe, ask = (p.path(template).read_text(encoding="utf-8").strip()
                     for template in (p.describe_prompt, p.question_prompt))

    def rewriting(number: int) -> Request:
        asked = row(number)
        prompt = fill(describe if asked.category == "caption" else ask, asked)
        return Request(asked.id, ({"role": "user", "content": prompt},), None,
                       len(asked.answer.split()))

    def plan() -> list[np.ndarray]:
        if by_server(p):
            return np.array_split(np.arange(len(lines)),
                                  -(-len(lines) // (4 * p.endpoint_requests)))
        prompts = [len(encoding.answer_ids(model(), encoding.prompt_text(
            model(), rewriting(number).messages, image=False))) for number in range(len(lines))]
        lengths = [len(encoding.answer_ids(model(), line["answer"])) + 1 for line in lines]
        return shards.by_budget(np.array(prompts), np.array(lengths),
                                p.batch_tokens // p.inject_samples)

    def work(batch: np.ndarray) -> list[dict[str, Any]]:
        requests = [rewriting(number) for number in batch.tolist()]
        if by_server(p):
            made = asked.answers(requests, [None] * len(requests), seed=p.seed, purpose="injected",
                                 samples=p.inject_samples, **sampling(p))
        else:
            inputs = generate.encode_branches(model(), requests, None, seed=p.seed)
            made = generate.sample_replies(
                model(), requests, inputs, None, seed=p.seed, purpose="injected",
                samples=p.inject_samples, **sampling(p))
        return [{"id": request.id, "replies": [vars(r) for r in replies]}
                for request, replies in zip(requests, made, strict=True)]

    asked = None
    if by_server(p) and not processes.first(file.is_file):
        asked = served.Asked(endpoint(p), file.parent, file.stem)
    shards.run(file, plan, work, label="injected")
    if asked:
        asked.done()
        processes.first(lambda: _require_one(p, file))


def _require_one(p: PairGeneration, file: Path) -> None:
    if all(r["status"] != 200 for line in LineFile(file) for r in line["replies"]):
        reply = Reply(**LineFile(file)[0]["replies"][0])
        file.unlink()
        raise endpoint(p).refuses(reply)
