"""What BPO is to change and a score cannot show: how much an answer owes to its image, whether a
method knows more or is only more certain, and how well a model's yes and no are calibrated.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from operator import ne
from typing import Any

import torch

from bpo.data.rows import Row
from bpo.evaluation import metrics, words
from bpo.evaluation.hallucination import yes_or_no
from bpo.evaluation.official import Question
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.params import Refusal
from bpo.study import results
from bpo.study.seeds import numpy_generator, seed_for

Candidates = Sequence[Sequence[str]]  # answers to a question: true ones, the prior's, others
SHARPENED = "base_sharpened"  # the base at the temperature that makes it as confident as a method
# Of colour questions, as probabilities among their candidates: a method's levels, those of the base
# as confident as the method, and the differences between the two (against SHARPENED).
AMONG: results.Metrics = {"p_true": ("P(true answer)", "sharpening", True),
                          "p_prior": ("P(prior's answer)", "sharpening", False),
                          "logp_true": ("log P(true answer)", "sharpening", True)}
SHARPENING: results.Metrics = {
    "confidence": ("P(likeliest candidate)", "sharpening", None),
    **{f"{side}_{n}": (f"{text} among candidates{of}", kind, None)
       for side, of in (("among", ""), ("matched", ", base as confident"))
       for n, (text, kind, _) in AMONG.items()}}
VIEWS = ("right", "swapped", "none", "noisy")  # of an answer's image
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
AGAIN = 64  # yes/no questions that are asked again, to see how many answers noise turns round
# A token's kind is that of the word that it is part of: a colour or an object of the truth file's
# vocabulary, an English function word of this list, or another word; else it ends something.
KINDS = {"colour": "colours", "object": "objects", "content": "other words",
         "function": "function words", "stop": "comma, stop, end"}
FUNCTION_WORDS = frozenset(
    "a an the this that these those there it its he she they his her their and or but so as at by "
    "for from in into of off on onto out over to up with without near next behind between is are "
    "was were be been being has have had do does did can could will would which who where".split())
# name: (label, whether more is better). An answer that owes more to its image does not have to be
# likelier with it: mere certainty lowers it with every other image.
GAINS = {"right": ("log-prob, right image", None),
         "over_swapped": ("right over swapped image", None),
         "over_none": ("right over no image", None),
         "over_noisy": ("right over noised image", None),
         **{f"{view}_{kind}": (f"log-prob of {text}, {view} image",
                               True if view == "right" and kind in ("colour", "object") else None)
            for view in ("right", "swapped") for kind, text in KINDS.items()}}


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
          batch: Sequence[Request], *, step: int, seed: int, vocabulary: Mapping[str, Any]
          ) -> list[dict[str, Any]]:
    """The annotated answers' log-probs under each method, token by token, with the right image,
    another row's, none, and the right one at a noise step.

    vocabulary: {objects, colours} of a truth file, or empty.
    Returns a line a request: {id, image, category, question, answer, tokens, kinds, logprobs},
    where logprobs is method -> view -> one number a token, in nats.
    """
    tokens = [[encoding.answer_tokens(checkpoint, r.messages, rows[r.id].answer)] for r in batch]
    blind = [Request(r.id, r.messages, None, r.length) for r in batch]
    inputs = {"right": generate.encode_batch(checkpoint, batch, None, seed=seed),
              "swapped": generate.encode_batch(checkpoint, batch, View("swapped"), seed=seed),
              "none": generate.encode_batch(checkpoint, blind, None, seed=seed),
              "noisy": generate.encode_batch(checkpoint, batch, View("noisy", step), seed=seed)}
    lines = [{"id": r.id, "image": rows[r.id].image_name, "category": rows[r.id].category,
              "question": rows[r.id].question, "answer": rows[r.id].answer,
              "tokens": [checkpoint.tokenizer.decode([t]) for t in ids],
              "kinds": kinds(checkpoint.tokenizer, ids, vocabulary), "logprobs": {}}
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


def kinds(tokenizer: Any, ids: Sequence[int], vocabulary: Mapping[str, Any]) -> list[str]:
    """The kind of each token of an answer (`KINDS`), whatever pieces its words are cut into."""
    ends = [len(tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in range(len(ids) + 1)]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    spans = [found.span() for found in WORD.finditer(text)]
    said = [text[a:b].casefold() for a, b in spans]
    of_word = ["colour" if w in vocabulary.get("colours", ()) else
               "function" if w in FUNCTION_WORDS else "content" for w in said]
    for _, first, last in words.lexicon(vocabulary.get("objects", {})).mentions(said):
        of_word[first:last] = ["object"] * (last - first)
    return [next((kind for kind, (a, b) in zip(of_word, spans, strict=True)
                  if a < end and start < b), "stop")
            for start, end in zip(ends, ends[1:], strict=False)]


def gains(line: Mapping[str, Any], method: str) -> dict[str, tuple[float, float]]:
    """What one answer adds to each number of `GAINS`, in nats an answer, as (counted, out of):
    log p(answer | right image), how much that lies above the one with each other image, and the
    parts that its tokens of each kind have in it, with the right and with the swapped image."""
    views = line["logprobs"][method]
    total = {view: sum(views[view]) for view in VIEWS}
    parts = {f"{view}_{kind}": (sum(x for x, k in zip(views[view], line["kinds"], strict=True)
                                    if k == kind), 1)
             for view in ("right", "swapped") for kind in KINDS}
    return {"right": (total["right"], 1),
            **{f"over_{v}": (total["right"] - total[v], 1) for v in VIEWS[1:]}, **parts}


def candidates(truth: Mapping[str, Any], row: str) -> Candidates:
    """The answers that a colour question may have: the true ones, the prior's that are not true,
    and the vocabulary's other colours. None where all of the prior's are true."""
    known = truth["rows"].get(row, {"category": ""})
    if known["category"] != "attribute":
        return ()
    priors = [a for a in known["prior"] if a not in known["true"]]
    others = [c for c in truth["vocabulary"].get("colours", ())
              if c not in known["true"] and c not in priors]
    return (known["true"], priors, others) if priors else ()


def _tokens(checkpoint: Checkpoint, asked: Sequence[Request], of_row: Mapping[str, Candidates]
            ) -> logprobs.Answers:
    """The token ids of each request's candidates; many requests ask the same of other images."""
    made: dict[tuple[str, str], list[int]] = {}
    for r in asked:
        for text in itertools.chain(*of_row[r.id]):
            if (key := (repr(r.messages), text)) not in made:
                made[key] = encoding.answer_tokens(checkpoint, r.messages, text)
    return [[made[repr(r.messages), text] for text in itertools.chain(*of_row[r.id])]
            for r in asked]


@torch.no_grad()
def scorer(checkpoint: Checkpoint, requests: Sequence[Request],
           of_row: Mapping[str, Candidates]) -> logprobs.Scorer:
    """The way to weigh candidates that is right for this model (`logprobs.choose`)."""
    sample = [r for r in requests if r.id in of_row][:4]
    if not sample:
        return logprobs.weigh
    return logprobs.choose(checkpoint, generate.encode_batch(checkpoint, sample),
                           _tokens(checkpoint, sample, of_row))


@torch.no_grad()
def weigh_candidates(checkpoint: Checkpoint, methods: Sequence[str],
                     of_row: Mapping[str, Candidates], weigh: logprobs.Scorer,
                     batch: Sequence[Request], inputs: dict[str, torch.Tensor]
                     ) -> list[dict[str, Any]]:
    """For each request {candidates, logps, p_true, p_prior, logp_true}, all but the first by
    method: log-probs of the candidates as whole answers in nats, and the probabilities of the true
    and of the prior's ones together. Empty for requests that are not in `of_row`.

    inputs: the prompts of the batch as `generate.encode_batch` gives them.
    """
    out = [{"candidates": of_row.get(r.id, ()),
            **{n: {} for n in ("logps", "p_true", "p_prior", "logp_true")}} for r in batch]
    probed = [i for i, r in enumerate(batch) if r.id in of_row]
    asked = [batch[i] for i in probed]
    if not probed:
        return out
    if len(probed) < len(batch):
        inputs = generate.encode_batch(checkpoint, asked)
    tokens = _tokens(checkpoint, asked, of_row)
    for method in methods:
        with checkpoints.using(checkpoint, method):
            weighed = weigh(checkpoint, inputs, tokens)
        for i, row in zip(probed, weighed, strict=True):
            logps = torch.stack([w.logprobs.sum() for w in row])
            true, prior, _ = logps.split([len(texts) for texts in out[i]["candidates"]])
            out[i]["logps"][method] = [round(x, 6) for x in logps.tolist()]
            out[i]["logp_true"][method] = round(true.logsumexp(0).item(), 6)
            for name, part in (("p_true", true), ("p_prior", prior)):
                out[i][name][method] = round(sum(part.exp().tolist()), 6)
    return out


def matched_temperatures(lines: Sequence[Mapping[str, Any]], methods: Sequence[str]
                         ) -> dict[str, float]:
    """method -> the temperature at which the base is as confident as the method: the mean
    probability of the likeliest candidate is the same. Empty without lines (`weigh_candidates`)."""
    logps = {m: [line["logps"][m] for line in lines] for m in methods if lines}
    return {m: metrics.temperature(logps["base"], metrics.confidence(mine))
            for m, mine in logps.items()}


def sharpen(lines: Sequence[dict[str, Any]], temperatures: Mapping[str, float], *, seed: int,
            resamples: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Adds to lines with candidates `sharpened`: method -> the numbers of `SHARPENING`.

    Returns SHARPENED -> method -> metric of `AMONG` -> paired difference of the method to the base
    that is as confident, bootstrap over images; empty without temperatures.
    """
    if not temperatures:
        return {}
    for line in lines:
        if line["logps"]:
            true, prior, _ = map(len, line["candidates"])
            line["sharpened"] = {}
            for m, logps in line["logps"].items():
                among = metrics.among(logps, true, prior)
                matched = metrics.among(line["logps"]["base"], true, prior, temperatures[m])
                line["sharpened"][m] = {
                    "confidence": among["confidence"],
                    **{f"among_{n}": among[n] for n in AMONG},
                    **{f"matched_{n}": matched[n] for n in AMONG}}

    def ratios(method: str, side: str) -> dict[str, metrics.Ratios]:
        return metrics.tabled([(line["image"], {
            n: (line["sharpened"][method][f"{side}_{n}"], 1) for n in AMONG
            if "sharpened" in line}) for line in lines], AMONG)

    weights = metrics.bootstrap_weights(len({line["image"] for line in lines}), resamples,
                                        numpy_generator(seed, "comparison interval"))
    return {SHARPENED: {
        m: metrics.differences(ratios(m, "among"), ratios(m, "matched"), weights, {})
        for m in temperatures if m != "base"}}


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


def yes_no_counts(p_yes: float, right: bool) -> dict[str, tuple[float, float]]:
    """brier: squared error of P(yes); mean_p_yes: P(yes) itself; both a question."""
    return {"brier": ((p_yes - right) ** 2, 1), "mean_p_yes": (p_yes, 1)}
