"""What the model says of candidates: log-probs under the clean and under the weakened image."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from bpo.models import encoding, logprobs, served
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.pairs import injection, selection
from bpo.pairs.questions import Questions
from bpo.study import processes, shards


def useful(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates of a line that could be used."""
    return [c for c in line["candidates"]
            if "fault" not in c and not selection.useless(c["text"], line["chosen"])]


def write(asking: Questions, view: View, line: Callable[[int], dict[str, Any]]) -> None:
    """Writes scores.jsonl: a list a row with, for every candidate that could be used, its mean
    log-prob a token under the clean image and under a way of weakening, in nats, how far the
    annotation's lies above it (margin), and its CHES against the annotation, both under the clean
    one (None for the others). A server gives no hidden states, and so no CHES.

    line: a row's candidates, by its number.
    """
    p, file = asking.p, asking.folder / "scores.jsonl"
    by_server = p.decoder and not processes.first(file.is_file)
    asked = [served.Asked(injection.decoder(p), asking.folder, f"scores-{n}")
             for n in ("clean", "weakened")] if by_server else []

    def texts(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
        return [[li["chosen"], *(c["text"] for c in useful(li))] for li in lines]

    def read(batch: Sequence[int]) -> tuple[list[dict[str, Any]], list[Request]]:
        return [line(n) for n in batch], [asking.request(n, view) for n in batch]

    def tokens(lines: Sequence[dict[str, Any]], requests: Sequence[Request]) -> logprobs.Answers:
        return [[encoding.answer_tokens(asking.reader, request.messages, text) for text in of_row]
                for request, of_row in zip(requests, texts(lines), strict=True)]

    def prepare(batch: np.ndarray) -> tuple:
        lines, requests = read(batch.tolist())
        if asked:
            return lines, requests, asking.features(batch, requests, [None, view])
        return lines, tokens(lines, requests), asking.encoded(requests, [None, view])

    @cache
    def scorer() -> logprobs.Scorer:
        lines, requests = read(range(min(len(asking.rows), 4)))
        [clean] = asking.encoded(requests, [None])
        return logprobs.choose(asking.model, clean, tokens(lines, requests))

    @torch.no_grad()
    def work(prepared: tuple) -> list[dict[str, Any]]:
        lines, answers, batches = prepared
        if asked:
            end = asking.model.tokenizer.eos_token
            ended = [[text + end for text in of_row] for of_row in texts(lines)]
            clean, weakened = ([[logprobs.Weighed(x) for x in of_row] for of_row in
                                a.weigh(answers, sent, ended)]
                               for a, sent in zip(asked, batches, strict=True))
        else:
            clean, weakened = (scorer()(asking.model, batch, answers) for batch in batches)
        return [{"id": li["id"], "scores": _scores(li, sharp, dull)}
                for li, sharp, dull in zip(lines, clean, weakened, strict=True)]

    def plan() -> list[np.ndarray]:
        if not asked:
            scorer()  # here, since `prepare` uses the same tokenizer in a thread
        each = 1 + len(line(0)["candidates"])
        return asking.batches(each * asking.lengths[1], 1, asked=2 * each)

    shards.run(file, plan, work, label="weighed", prepare=prepare)
    for a in asked:
        a.done()


def _scores(line: dict[str, Any], clean: Sequence[logprobs.Weighed],
            weakened: Sequence[logprobs.Weighed]) -> list[dict[str, float] | None]:
    """clean, weakened: of the annotation, then of the candidates that could be used."""
    for candidate, a, b in zip(useful(line), clean[1:], weakened[1:], strict=True):
        candidate["scores"] = {
            "logp_clean": round(a.logprobs.mean().item(), 5),
            "logp_noisy": round(b.logprobs.mean().item(), 5),
            "margin": round((clean[0].logprobs.mean() - a.logprobs.mean()).item(), 5)}
        if a.state is not None:
            candidate["scores"]["ches"] = round(selection.ches(clean[0].state, a.state), 5)
    return [c.get("scores") for c in line["candidates"]]
