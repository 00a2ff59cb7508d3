"""Notebook 1's work: the probability of given answers while the image drowns in noise.

For each image the candidates are the true answers and those that the language prior suggests. All
candidates of an image share one pass over its prefix (`branches`); a first batch is computed both
ways, and a model for which packing is not exact is probed without it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import metrics
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.params import NoiseProbability, Refusal
from bpo.study import results, seeds, shards
from bpo.study import stage as stages
from bpo.study.files import read_lines, to_json, write_whole
from bpo.study.results import Estimate, Result

RESAMPLES = 2000
KINDS = ("true", "prior")


@dataclass(frozen=True)
class Look:
    """One image under one noise draw at one step; `length` lets `shards.by_length` order looks."""

    id: str
    row: Row
    step: int
    draw: int
    length: int


def run(p: NoiseProbability) -> stages.Result:
    """The stage of notebook 1: looks.jsonl (a line an image, step and draw), candidates.json."""
    data = p.path(p.data)
    inputs = {"model": p.path(p.model), "data": data}
    if truth := data_rows.truth_file(data):
        inputs["truth"] = truth
    return stages.stage(p, lambda folder: work(p, folder), inputs=inputs)


def work(p: NoiseProbability, folder: Path) -> dict[str, Any]:
    """Writes the looks and answers of notebook 1 into a folder, and returns its metrics."""
    rows, skipped = data_rows.list_rows(p.path(p.data), p.optional_path(p.image_folder))
    rows = [r for r in rows if not p.category or r.category == p.category]
    if p.question:
        rows = _one_question(rows, p.question)
    if not rows:
        raise Refusal(f"{p.path(p.data)}: no row has the category {p.category!r}; "
                      "set category to an empty text to use all")
    rows, bad = data_rows.open_images(
        data_rows.draw_rows(rows, p.rows, p.seed, purpose="probe rows"))
    if not rows:
        raise Refusal(f"{p.path(p.data)}: no image can be used: {data_rows.told(bad)}")
    skipped += bad
    checkpoint = checkpoints.load(p.path(p.model), precision=p.precision,
                                  transform=p.image_transform)
    candidates, unused = _candidates(p, checkpoint, rows)
    rows = [r for r in rows if r.id in candidates]
    if not rows:
        raise Refusal(f"{p.path(p.data)}: no row is left to analyse: " + ", ".join(
            f"{n} {r}" for r, n in unused.items()))
    write_whole(folder / "candidates.json", to_json(candidates, indent=1))
    score = _scorer(p, checkpoint, rows, candidates)
    looks = _looks(rows, p)
    sampled = {r.id for r in rows[:p.sampled_answers]}
    lines = shards.run_on(
        folder / "looks.jsonl", looks, p.batch_size,
        lambda batch: look(p, checkpoint, batch, candidates, score=score, sampled=sampled),
        label="noise steps")
    curves = summary(lines, p.noise_steps, seed=p.seed)
    results.write(folder, tidy(curves, images=len(rows)))
    return {**curves, "images": len(rows),
            "prefix_shared": score is logprobs.weigh,
            "rows_skipped": dict(sorted((skipped + unused).items()))}


def _one_question(rows: Sequence[Row], question: str) -> list[Row]:
    """One row an image, asking the question that the user set."""
    firsts = {r.image: r for r in reversed(rows)}
    return [replace(r, prompt=({"role": "user", "content": question},)) for r in firsts.values()]


def _candidates(p: NoiseProbability, checkpoint: Checkpoint, rows: Sequence[Row]
                ) -> tuple[dict[str, dict[str, list[str]]], Counter]:
    """row id -> {"true": answers, "prior": answers}, and why rows have none.

    They are the user's; or the truth file's; or, where nobody knows the prior's answer, the
    annotated answer against what the model itself says at the last noise step, decoded greedily.
    """
    if p.question:
        both = {"true": p.true_answers, "prior": p.prior_answers}
        return {r.id: both for r in rows}, Counter()
    truth = data_rows.read_truth(p.path(p.data))["rows"]
    known = {r.id: {k: truth[r.id][k] for k in KINDS} for r in rows
             if r.id in truth and truth[r.id]["true"] and truth[r.id]["prior"]}
    asked = [r for r in rows if r.id not in truth]
    unused = Counter({"the prior has no answer": len(rows) - len(known) - len(asked)})
    requests = [_request(r) for r in asked]
    for places in shards.by_length(requests, p.batch_size):
        batch = [requests[i] for i in places]
        inputs = generate.encode_batch(checkpoint, batch, noise_step=p.noise_steps[-1], seed=p.seed)
        blind = generate.decode(checkpoint, inputs, max_new_tokens=p.max_new_tokens)
        for request, answer in zip(batch, blind, strict=True):
            annotated = next(r.answer for r in asked if r.id == request.id)
            if not answer or metrics.normalised(answer) == metrics.normalised(annotated):
                unused["the noisy answer is the annotated one"] += 1
            else:
                known[request.id] = {"true": [annotated], "prior": [answer]}
    return {r.id: known[r.id] for r in rows if r.id in known}, +unused


def _request(row: Row) -> Request:
    return Request(row.id, row.prompt, row.image, len(row.answer.split()))


def _looks(rows: Sequence[Row], p: NoiseProbability) -> list[Look]:
    """All looks; step 0 has no noise and so a single draw. A row's looks stay together."""
    return [Look(f"{row.id}|{step}|{draw}", row, step, draw, len(rows) - number)
            for number, row in enumerate(rows) for step in p.noise_steps
            for draw in range(p.draws if step else 1)]


def _encode(p: NoiseProbability, checkpoint: Checkpoint, batch: Sequence[Look]
            ) -> dict[str, torch.Tensor]:
    """A batch of prompts with noised images. A draw uses the same eps at every step, so that a
    curve along the steps does not wander with the draw."""
    clean = {}
    for look in batch:
        if look.row.id not in clean:
            text = encoding.prompt_text(checkpoint, look.row.prompt, image=True)
            clean[look.row.id] = encoding.encode(checkpoint, text, images.load(look.row.image))
    rows = []
    for look in batch:
        draw = seeds.torch_generator(p.seed, "probe noise", look.row.id, look.draw)
        row = clean[look.row.id]
        rows.append({**row, "pixel_values": encoding.noised(
            checkpoint.processor, row["pixel_values"], look.step, draw)})
    return encoding.collate(checkpoint, rows)


def _answer_ids(checkpoint: Checkpoint, batch: Sequence[Look], candidates: dict
                ) -> list[list[list[int]]]:
    return [[encoding.answer_tokens(checkpoint, look.row.prompt, text)
             for kind in KINDS for text in candidates[look.row.id][kind]] for look in batch]


@torch.no_grad()
def _scorer(p: NoiseProbability, checkpoint: Checkpoint, rows: Sequence[Row],
            candidates: dict) -> logprobs.Scorer:
    first = _looks(rows[:2], p)[:4]
    return logprobs.choose(checkpoint, _encode(p, checkpoint, first),
                           _answer_ids(checkpoint, first, candidates))


@torch.no_grad()
def look(p: NoiseProbability, checkpoint: Checkpoint, batch: Sequence[Look], candidates: dict, *,
         score: logprobs.Scorer, sampled: set[str]) -> list[dict]:
    """A line of looks.jsonl for each look, logps in nats. sampled: ids of rows to sample for."""
    inputs = _encode(p, checkpoint, batch)
    tokens = _answer_ids(checkpoint, batch, candidates)
    weighed = score(checkpoint, inputs, tokens)
    said = _sampled(p, checkpoint, batch, sampled)
    lines = []
    for look, ids, row_weighed in zip(batch, tokens, weighed, strict=True):
        kinds = [(k, t) for k in KINDS for t in candidates[look.row.id][k]]
        lines.append({
            "id": look.id, "row": look.row.id, "image": look.row.image_name, "step": look.step,
            "draw": look.draw, "sampled": said.get(look.id),
            "answers": [{"kind": kind, "text": text, "logp": round(w.logprobs.sum().item(), 5),
                         "logp_first": round(w.logprobs[0].item(), 5), "first_token": answer[0],
                         "tokens": len(answer)}
                        for (kind, text), answer, w in zip(kinds, ids, row_weighed, strict=True)]})
    return lines


def _sampled(p: NoiseProbability, checkpoint: Checkpoint, batch: Sequence[Look],
             sampled: set[str]) -> dict[str, str]:
    """look id -> one answer drawn from the model as it is (temperature 1), for the chosen rows."""
    wanted = [i for i, look in enumerate(batch) if look.row.id in sampled and look.draw == 0]
    if not wanted:
        return {}
    looks = [batch[i] for i in wanted]
    draws = [seeds.torch_generator(p.seed, "probe answer", look.id) for look in looks]
    texts = generate.decode(
        checkpoint, _encode(p, checkpoint, looks), max_new_tokens=p.max_new_tokens,
        sampling=generate.SeededSampling(draws, temperature=1.0, top_p=1.0))
    return {look.id: t for look, t in zip(looks, texts, strict=True)}


def summary(lines: Sequence[dict], steps: Sequence[int], *, seed: int) -> dict[str, Any]:
    """The curves: mean over images (draws averaged first) with 95 % bootstrap intervals.

    p_*: probability of the whole answer with its end, candidates of a kind summed; p_*_first: of
    its first token; logp_*: log-probability a token of the likeliest candidate, for long answers.
    The answers that were sampled are counted as shares of true, prior's and other ones.
    """
    weights = None
    out: dict[str, Any] = {"noise_steps": list(steps)}
    for measure in ("p", "p_first", "logp"):
        for kind in KINDS:
            points, ratios = [], {}
            for step in steps:
                ratios[step] = metrics.by_image(
                    [(x["image"], (_value(x, measure, kind), 1)) for x in lines
                     if x["step"] == step])
                if weights is None:
                    weights = metrics.bootstrap_weights(
                        len(ratios[step]), RESAMPLES, seeds.numpy_generator(seed, "probe interval"))
                points.append(metrics.estimate(ratios[step], weights))
            name = f"{measure.split('_')[0]}_{kind}" + ("_first" if "first" in measure else "")
            out[name] = [e["value"] for e in points]
            out[f"{name}_interval"] = [[e["low"], e["high"]] for e in points]
            if measure == "p":
                out[f"change_{kind}"] = metrics.difference(
                    ratios[steps[-1]], ratios[steps[0]], weights)
    out["sampled"] = _shares(lines, steps)
    return out


def tidy(curves: Mapping[str, Any], *, images: int) -> list[Result]:
    """The curves as results, a split a noise step; and the paired change to the last step."""
    steps, out = curves["noise_steps"], []
    for metric, more in {"p_true": True, "p_prior": False, "p_true_first": True,
                         "p_prior_first": False, "logp_true": True, "logp_prior": False}.items():
        for step, value, (low, high) in zip(steps, curves[metric], curves[f"{metric}_interval"],
                                            strict=True):
            out.append(Result(f"step {step}", "noise", "base", "", metric,
                              Estimate(value, low, high, images, more_is_better=more)))
    for kind in KINDS:
        change = Estimate(**curves[f"change_{kind}"], more_is_better=kind == "true")
        out.append(Result(f"step {steps[-1]}", "noise", "base", f"step {steps[0]}", f"p_{kind}",
                          change))
    return out


def _value(line: dict, measure: str, kind: str) -> float:
    mine = [a for a in line["answers"] if a["kind"] == kind]
    if measure == "logp":
        return max(a["logp"] / a["tokens"] for a in mine)
    if measure == "p":
        return float(sum(np.exp(a["logp"]) for a in mine))
    # Candidates may begin with the same token: its probability counts once.
    return float(sum(np.exp(v) for v in
                     {a["first_token"]: a["logp_first"] for a in mine}.values()))


def _shares(lines: Sequence[dict], steps: Sequence[int]) -> dict[str, list[float]]:
    shares: dict[str, list[float]] = {"true": [], "prior": [], "other": []}
    for step in steps:
        said = [x for x in lines if x["step"] == step and x["sampled"] is not None]
        kinds = Counter(_kind(x) for x in said)
        for kind, share in shares.items():
            share.append(round(kinds[kind] / len(said), 6))
    return shares


def _kind(line: dict) -> str:
    text = metrics.normalised(line["sampled"])
    return next((a["kind"] for a in line["answers"] if metrics.normalised(a["text"]) == text),
                "other")


def load(result: stages.Result) -> tuple[list[dict], dict[str, dict[str, list[str]]]]:
    """The looks and the candidates of a finished stage."""
    return (read_lines(result.folder / "looks.jsonl"),
            json.loads((result.folder / "candidates.json").read_text(encoding="utf-8")))


def example_row(p: NoiseProbability, result: stages.Result) -> Row:
    """The first row, by its id, for which answers were sampled."""
    first = min(x["row"] for x in load(result)[0] if x["sampled"] is not None)
    rows, _ = data_rows.list_rows(p.path(p.data), p.optional_path(p.image_folder))
    row = next(r for r in rows if r.id == first)
    return _one_question([row], p.question)[0] if p.question else row


def stored(looks: Sequence[dict], row: Row, step: int, text: str) -> float:
    """The probability that the stage computed for an answer to a row, at the first draw."""
    line = next(x for x in looks if (x["row"], x["step"], x["draw"]) == (row.id, step, 0))
    return next(float(np.exp(a["logp"])) for a in line["answers"] if a["text"] == text)


def example(p: NoiseProbability, result: stages.Result) -> dict[str, Any]:
    """One analysed image for the strip: its picture at each step, what was sampled there, its
    question and its candidates."""
    lines, candidates = load(result)
    row = example_row(p, result)
    processor = checkpoints.load_processor(p.path(p.model))
    image = encoding.transformed(images.load(row.image), p.image_transform, processor)
    said = {x["step"]: x["sampled"] for x in lines if x["row"] == row.id and x["draw"] == 0}
    pictures = [encoding.noised_picture(processor, image, step, seeds.torch_generator(
        p.seed, "probe noise", row.id, 0)) for step in p.noise_steps]
    return {"images": pictures, "answers": [said[s] for s in p.noise_steps],
            "question": p.question or row.question, **candidates[row.id]}
