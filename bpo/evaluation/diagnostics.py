"""What BPO is to change and a score cannot show: how much an answer owes to its image, how well a
model's yes and no are calibrated, and which words of a caption the image carries.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import ne
from typing import Any

import numpy as np
import torch

from bpo.data.rows import Row
from bpo.evaluation.hallucination import yes_or_no
from bpo.evaluation.official import Question
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.params import Refusal
from bpo.study.seeds import seed_for

VIEWS = ("right", "swapped", "none", "noisy")  # of an answer's image
AGAIN = 64  # yes/no questions that are asked again, to see how many answers noise turns round
BINS = 10  # of probabilities, of equal width
# name: (label, whether more is better)
GAINS = {"right": ("log-prob, right image", None),
         "over_swapped": ("right over swapped image", True),
         "over_none": ("right over no image", True),
         "over_noisy": ("right over noised image", True)}


def requests(rows: Sequence[Row], *, seed: int) -> list[Request]:
    """Each row's question with its image, and beside it another row's image, drawn by seed.

    Raises Refusal where all rows have one image.
    """
    if len({r.image_name for r in rows}) < 2:
        raise Refusal("probe_data: all its rows are about one image, so none can be swapped; give "
                      "rows of two images or more, or leave probe_data empty")
    order = sorted(rows, key=lambda r: seed_for(seed, "swapped image", r.id))
    others = {}
    for place, row in enumerate(order):
        # Round the circle of shuffled rows, the next image that is another one.
        circle = order[place + 1:] + order[:place]
        others[row.id] = next(r.image for r in circle if r.image_name != row.image_name)
    return [Request(r.id, r.prompt, r.image, len(r.answer.split()), others[r.id]) for r in rows]


@torch.no_grad()
def weigh(checkpoint: Checkpoint, methods: Sequence[str], rows: Mapping[str, Row],
          batch: Sequence[Request], *, step: int, seed: int) -> list[dict[str, Any]]:
    """The annotated answers' log-probs under each method, token by token, with the right image,
    another row's, none, and the right one at a noise step.

    Returns a line a request: {id, image, category, question, answer, tokens, logprobs}, where
    logprobs is method -> view -> one number a token, in nats.
    """
    tokens = [[encoding.answer_tokens(checkpoint, r.messages, rows[r.id].answer)] for r in batch]
    blind = [Request(r.id, r.messages, None, r.length) for r in batch]
    inputs = {"right": generate.encode_batch(checkpoint, batch, None, seed=seed),
              "swapped": generate.encode_batch(checkpoint, batch, View("swapped"), seed=seed),
              "none": generate.encode_batch(checkpoint, blind, None, seed=seed),
              "noisy": generate.encode_batch(checkpoint, batch, View("noisy", step), seed=seed)}
    lines = [{"id": r.id, "image": rows[r.id].image_name, "category": rows[r.id].category,
              "question": rows[r.id].question, "answer": rows[r.id].answer,
              "tokens": [checkpoint.tokenizer.decode([t]) for t in ids], "logprobs": {}}
             for r, [ids] in zip(batch, tokens, strict=True)]
    for method in methods:
        with checkpoints.using(checkpoint, method):
            # One answer a prompt: there is nothing to share, and this way is right for all.
            weighed = {v: logprobs.weigh_unpacked(checkpoint, x, tokens) for v, x in inputs.items()}
        for k, line in enumerate(lines):
            line["logprobs"][method] = {
                view: [round(x, 4) for x in found[k][0].logprobs.tolist()]
                for view, found in weighed.items()}
    return lines


def gains(line: Mapping[str, Any], method: str) -> dict[str, tuple[float, float]]:
    """What one answer adds to each number of `GAINS`, in nats an answer, as (counted, out of):
    log p(answer | right image), and how much that lies above the one with each other image."""
    total = {view: sum(line["logprobs"][method][view]) for view in VIEWS}
    return {"right": (total["right"], 1),
            **{f"over_{v}": (total["right"] - total[v], 1) for v in VIEWS[1:]}}


def token_gaps(line: Mapping[str, Any], method: str) -> list[float]:
    """log p of each token with the clean image minus log p with the noised one, in nats: what the
    image carries of it, given the tokens before it."""
    views = line["logprobs"][method]
    return [clean - noisy for clean, noisy in zip(views["right"], views["noisy"], strict=True)]


def noise_floor(checkpoint: Checkpoint, lines: Mapping[str, Sequence[dict]],
                ask: Callable[[str, list[Question], str, int], list[dict]], *, batch_size: int,
                seed: int) -> dict[str, dict[str, dict[str, int]]]:
    """benchmark -> other decoding -> {questions, flips}: of up to `AGAIN` yes/no questions those to
    which the base says otherwise in batches of another size, and on a GPU with room for it in
    another number format, in which the model is left.

    lines: of each benchmark's answers.  ask: (benchmark, questions, name of a file, size of a
    batch) -> lines of the base's answers.
    """
    other = torch.bfloat16 if checkpoint.base.dtype == torch.float32 else torch.float32
    size = 1 if batch_size > 1 else 8
    ways = [(f"batches of {size}", "again", size)]
    if has_room(checkpoint.base, other):
        ways.append((str(other).removeprefix("torch."), "format", batch_size))
    drawn = {name: sorted((x for x in mine if x["p_yes"]),
                          key=lambda x: seed_for(seed, "again", x["id"]))[:AGAIN]
             for name, mine in lines.items()}
    out: dict[str, dict[str, dict[str, int]]] = {n: {} for n, sample in drawn.items() if sample}
    for way, stem, size in ways:
        if out and stem == "format":
            checkpoint.model.to(other)
        for name in out:
            again = ask(name, [Question(x["id"], x["image"], x["question"]) for x in drawn[name]],
                        stem, size)
            before, after = ([yes_or_no(x["answers"]["base"], x["question"]) for x in asked]
                             for asked in (drawn[name], again))
            out[name][way] = {"questions": len(again), "flips": sum(map(ne, before, after))}
    return out


def has_room(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether a model is on a GPU and can be put into a number format there."""
    weights = list(model.parameters())
    if not weights or weights[0].device.type != "cuda":
        return False
    more = sum(w.numel() * max(dtype.itemsize - w.element_size(), 0) for w in weights)
    return torch.cuda.mem_get_info(weights[0].device)[0] > more + 2**30


def yes_share(weighed: Sequence[float]) -> float:
    """P(yes) among yes and no, from the log-probs of the two answers, yes first."""
    return float(torch.tensor(list(weighed), dtype=torch.float64).softmax(0)[0])


def calibration(answers: Sequence[tuple[str, float, bool]], weights: np.ndarray) -> dict[str, Any]:
    """How P(yes) agrees with how often yes is right.

    answers: (image, P(yes) among yes and no, whether yes is right) of each question.
    weights: (resamples, images) from `metrics.bootstrap_weights`, columns in the sorted order of
    images. Returns {ece, bins}: ece is the expected calibration error (arXiv 1706.04599), the mean
    over questions of |share of yes that is right - mean P(yes)| of the bin that each lies in, with
    its bootstrap interval over images (biased upwards, as resampled errors do not cancel); bins
    are {low, high, n, p, share}.
    """
    images = {image: k for k, image in enumerate(sorted({a[0] for a in answers}))}
    place = np.array([images[a[0]] for a in answers])
    p = np.array([a[1] for a in answers])
    right = np.array([a[2] for a in answers], dtype=float)
    bin_of = np.minimum((p * BINS).astype(int), BINS - 1)
    gap, size = np.zeros((2, len(images), BINS))
    np.add.at(gap, (place, bin_of), right - p)
    np.add.at(size, (place, bin_of), 1.0)

    def error(drawn: np.ndarray) -> np.ndarray:
        return np.abs(drawn @ gap).sum(-1) / (drawn @ size).sum(-1)

    low, high = np.percentile(error(weights), [2.5, 97.5])
    bins = [{"low": k / BINS, "high": (k + 1) / BINS, "n": int((bin_of == k).sum()),
             "p": round(float(p[bin_of == k].mean()), 6),
             "share": round(float(right[bin_of == k].mean()), 6)}
            for k in range(BINS) if (bin_of == k).any()]
    return {"ece": {"value": round(float(error(np.ones(len(images)))), 6),
                    "low": round(float(low), 6), "high": round(float(high), 6),
                    "n": len(answers)}, "bins": bins}


def yes_no_counts(p_yes: float, right: bool) -> dict[str, tuple[float, float]]:
    """brier: squared error of P(yes); mean_p_yes: P(yes) itself; both a question."""
    return {"brier": ((p_yes - right) ** 2, 1), "mean_p_yes": (p_yes, 1)}
