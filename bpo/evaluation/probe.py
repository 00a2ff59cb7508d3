"""Notebook 1's work: the probability of given answers while the image drowns in noise, and while
it is weakened in other ways at the same steps.

For each image the candidates are the true answers and those that the language prior suggests. All
candidates of an image share one pass over its prompt (`logprobs`), where that is exact.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bpo.data import files, images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import metrics
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.weakening import WEAKENINGS, View
from bpo.params import NoiseProbability, Refusal
from bpo.study import progress, results, seeds, shards
from bpo.study import stage as stages
from bpo.study.files import read_lines, to_json, write_whole
from bpo.study.results import Estimate, Result

LOOKS = "looks.jsonl"
CANDIDATES = "candidates.json"
RESAMPLES = 2000
KINDS = ("true", "prior")
BLIND = "answers at the last step"  # the part that makes the prior's where nobody knows it
NOISE = "noisy"  # the way of weakening that notebook 1 is about
MEASURES = ("p_{}", "p_{}_first", "logp_{}")  # of the answers of a kind, see `summary`


@dataclass(frozen=True)
class Look:
    """One image weakened in one way by one draw at one step; `length` lets `shards.by_length` order
    looks."""

    id: str
    row: Row
    step: int
    draw: int
    length: int = 0
    way: str = NOISE


def run(p: NoiseProbability) -> stages.Result:
    """The stage of notebook 1: looks.jsonl (a line an image, step and draw), the same of each
    further way of weakening in looks-WAY.jsonl, candidates.json."""
    data = p.path(p.data)
    inputs = {"model": p.path(p.model), "data": data}
    if truth := data_rows.truth_file(data):
        inputs["truth"] = truth
    root = p.optional_path(p.image_folder) or files.home(data)
    return stages.stage(p, lambda folder: work(p, folder), inputs=inputs,
                        pictures=lambda folder: images.named({folder / LOOKS: root}))


def work(p: NoiseProbability, folder: Path) -> dict[str, Any]:
    """Writes the looks and answers of notebook 1 into a folder, and returns its metrics."""
    data = p.path(p.data)
    rows, left_out = to_look_at(p)
    if not rows:
        raise Refusal(f"{data}: no row of the category {p.category!r} can be used ({left_out}); "
                      "set category to an empty text to use all")
    checkpoint = checkpoints.load(p.path(p.model), precision=p.precision,
                                  transform=p.image_transform)
    candidates, unused = candidate_answers(p, checkpoint, rows)
    rows = [r for r in rows if r.id in candidates]
    if not rows:
        raise Refusal(f"{data}: no row is left to analyse: {data_rows.Reasons() + unused}")
    write_whole(folder / CANDIDATES, to_json(candidates, indent=1))
    looks = {way: looks_at(p, rows, way) for way in (NOISE, *p.other_ways)}
    progress.announce((f"steps, {way}", len(looks[way])) for way in looks)
    with torch.no_grad():
        score = logprobs.choose(checkpoint, encode(p, checkpoint, looks[NOISE][:4]),
                                answer_ids(checkpoint, looks[NOISE][:4], candidates))
    sampled = {r.id for r in rows[:p.sampled_answers]}

    def seen(file: str, way: str) -> list[dict]:
        return shards.run_on(folder / file, looks[way], p.batch_size, lambda batch: look(
            p, checkpoint, batch, candidates, score=score, sampled=sampled), label=f"steps, {way}")

    lines = seen(LOOKS, NOISE)
    curves = summary(lines, p.noise_steps, seed=p.seed)
    clean = [x for x in lines if x["step"] == 0]  # the same image whatever weakens it later
    others = {way: summary(clean + seen(f"looks-{way}.jsonl", way), p.noise_steps, seed=p.seed)
              for way in p.other_ways}
    results.write(folder, [*tidy(curves, images=len(rows)),
                           *(r for way, found in others.items()
                             for r in tidy(found, images=len(rows), way=way))])
    return {**curves, "other_ways": others, "images": len(rows),
            "prefix_shared": score is logprobs.weigh,
            "rows_skipped": dict(sorted((left_out + unused).items()))}


def to_look_at(p: NoiseProbability) -> tuple[list[Row], data_rows.Reasons]:
    """The rows to analyse, drawn by seed, and why others are left out."""
    rows, skipped = listed(p)
    rows = [r for r in rows if not p.category or r.category == p.category]
    if p.question:
        rows = [asked(p, r) for r in {r.image: r for r in reversed(rows)}.values()]
    rows, bad = data_rows.open_images(
        data_rows.draw_rows(rows, p.rows, p.seed, purpose="probe rows"))
    return rows, skipped + bad


def looks_at(p: NoiseProbability, rows: Sequence[Row], way: str) -> list[Look]:
    """A row's looks stay together. The clean image, step 0, is looked at once, with the noise."""
    draws = p.draws if WEAKENINGS[way].drawn else 1
    steps = p.noise_steps if way == NOISE else p.noise_steps[1:]
    return [Look(f"{row.id}|{step}|{draw}", row, step, draw, len(rows) - number, way)
            for number, row in enumerate(rows) for step in steps
            for draw in range(draws if step else 1)]


def listed(p: NoiseProbability) -> tuple[list[Row], data_rows.Reasons]:
    """The rows of the data whose texts the checkpoint can read, and why others are left out."""
    return data_rows.list_rows(p.path(p.data), p.optional_path(p.image_folder),
                               special=encoding.special_in(p.path(p.model)))


def asked(p: NoiseProbability, row: Row) -> Row:
    """The row with the question that the user set, where there is one."""
    prompt = ({"role": "user", "content": p.question},)
    return replace(row, prompt=prompt) if p.question else row


def candidate_answers(p: NoiseProbability, checkpoint: Checkpoint, rows: Sequence[Row]
                      ) -> tuple[dict[str, dict[str, list[str]]], Counter]:
    """row id -> {"true": answers, "prior": answers}, and why rows have none.

    They are the user's; or the truth file's; or, where nobody knows the prior's answer, the
    annotated answer against what the model itself says at the last noise step, decoded greedily.
    """
    if p.question:
        return {r.id: {"true": p.true_answers, "prior": p.prior_answers} for r in rows}, Counter()
    truth = data_rows.read_truth(p.path(p.data))["rows"]
    candidates = {r.id: {k: truth[r.id][k] for k in KINDS} for r in rows
                  if r.id in truth and truth[r.id]["true"] and truth[r.id]["prior"]}
    unknown = [r for r in rows if r.id not in truth]
    unused = Counter(["the prior has no answer"] * (len(rows) - len(candidates) - len(unknown)))
    requests = [Request(r.id, r.prompt, r.image, len(r.answer.split())) for r in unknown]
    with progress.part(BLIND, len(requests), unit="rows") as advance:
        for places in shards.by_length(requests, p.batch_size):
            inputs = generate.encode_batch(checkpoint, [requests[i] for i in places],
                                           View("noisy", p.noise_steps[-1]), seed=p.seed)
            blind = generate.decode(checkpoint, inputs, max_new_tokens=p.max_new_tokens)
            advance(len(places))
            for row, answer in zip([unknown[i] for i in places], blind, strict=True):
                if not answer or metrics.normalised(answer) == metrics.normalised(row.answer):
                    unused["the noisy answer is the annotated one"] += 1
                else:
                    candidates[row.id] = {"true": [row.answer], "prior": [answer]}
    return {r.id: candidates[r.id] for r in rows if r.id in candidates}, unused


def encode(p: NoiseProbability, checkpoint: Checkpoint, batch: Sequence[Look]
           ) -> dict[str, torch.Tensor]:
    """A batch of prompts with weakened images. A draw uses the same eps at every step, so that a
    curve along the steps does not wander with the draw."""
    if batch[0].way != NOISE:
        return encoding.collate(checkpoint, [generate.encode_batch(
            checkpoint, [Request(x.row.id, x.row.prompt, x.row.image)],
            View(x.way, x.step, x.draw), seed=p.seed) for x in batch])
    clean = {}
    for row in {x.row.id: x.row for x in batch}.values():
        text = encoding.prompt_text(checkpoint, row.prompt, image=True)
        clean[row.id] = encoding.encode(checkpoint, text, images.load(row.image))
    return encoding.collate(checkpoint, [clean[x.row.id] | {"pixel_values": encoding.noised(
        checkpoint.processor, clean[x.row.id]["pixel_values"], x.step,
        seeds.torch_generator(p.seed, "probe noise", x.row.id, x.draw))} for x in batch])


def answer_ids(checkpoint: Checkpoint, batch: Sequence[Look], candidates: dict
               ) -> list[list[list[int]]]:
    """The tokens of each look's candidates, the true ones first."""
    return [[encoding.answer_tokens(checkpoint, x.row.prompt, text)
             for kind in KINDS for text in candidates[x.row.id][kind]] for x in batch]


@torch.no_grad()
def look(p: NoiseProbability, checkpoint: Checkpoint, batch: Sequence[Look], candidates: dict, *,
         score: logprobs.Scorer, sampled: set[str]) -> list[dict]:
    """A line of looks.jsonl for each look, logps in nats. sampled: ids of the rows for whose first
    draw an answer is sampled, from the model as it is (temperature 1)."""
    ids = answer_ids(checkpoint, batch, candidates)
    weighed = score(checkpoint, encode(p, checkpoint, batch), ids)
    spoken = [x for x in batch if x.row.id in sampled and x.draw == 0]
    texts = generate.decode(
        checkpoint, encode(p, checkpoint, spoken), max_new_tokens=p.max_new_tokens,
        sampling=generate.SeededSampling(
            [seeds.torch_generator(p.seed, "probe answer", x.id) for x in spoken],
            temperature=1.0, top_p=1.0)) if spoken else []
    said = {x.id: text for x, text in zip(spoken, texts, strict=True)}
    lines = []
    for x, row_ids, row_weighed in zip(batch, ids, weighed, strict=True):
        answers = [(kind, text) for kind in KINDS for text in candidates[x.row.id][kind]]
        lines.append({
            "id": x.id, "row": x.row.id, "image": x.row.image_name, "step": x.step,
            "draw": x.draw, "sampled": said.get(x.id),
            "answers": [{"kind": kind, "text": text, "logp": round(w.logprobs.sum().item(), 5),
                         "logp_first": round(w.logprobs[0].item(), 5), "first_token": tokens[0],
                         "tokens": len(tokens)}
                        for (kind, text), tokens, w in zip(answers, row_ids, row_weighed,
                                                           strict=True)]})
    return lines


def summary(lines: Sequence[dict], steps: Sequence[int], *, seed: int) -> dict[str, Any]:
    """The curves: mean over images (draws averaged first) with 95 % bootstrap intervals.

    p_*: probability of the whole answer with its end, candidates of a kind summed; p_*_first: of
    its first token; logp_*: log-probability a token of the likeliest candidate, for long answers.
    change_*: of p_* from the first to the last step, paired by image. sampled: the shares of
    sampled answers that are true, the prior's and other ones.
    """
    weights = metrics.bootstrap_weights(len({x["image"] for x in lines}), RESAMPLES,
                                        seeds.numpy_generator(seed, "probe interval"))
    out: dict[str, Any] = {"noise_steps": list(steps)}
    for measure in MEASURES:
        for kind in KINDS:
            ratios = [metrics.by_image([(x["image"], (value(x, measure, kind), 1))
                                        for x in lines if x["step"] == step]) for step in steps]
            points = [metrics.estimate(r, weights) for r in ratios]
            name = measure.format(kind)
            out[name] = [e["value"] for e in points]
            out[f"{name}_interval"] = [[e["low"], e["high"]] for e in points]
            if measure == "p_{}":
                out[f"change_{kind}"] = metrics.difference(ratios[-1], ratios[0], weights)
    shares: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "other")}
    for step in steps:
        kinds = Counter(_kind(x) for x in lines if x["step"] == step and x["sampled"] is not None)
        for kind, share in shares.items():
            share.append(round(kinds[kind] / kinds.total(), 6))
    return {**out, "sampled": shares}


def value(line: dict, measure: str, kind: str) -> float:
    """One of `MEASURES` of a look's answers of a kind, as `summary` says."""
    answers = [a for a in line["answers"] if a["kind"] == kind]
    if measure == "logp_{}":
        return max(a["logp"] / a["tokens"] for a in answers)
    if measure == "p_{}":
        return float(sum(np.exp(a["logp"]) for a in answers))
    # Candidates may begin with the same token: its probability counts once.
    firsts = {a["first_token"]: a["logp_first"] for a in answers}
    return float(sum(np.exp(logp) for logp in firsts.values()))


def _kind(line: dict) -> str:
    """Of which candidates a sampled answer is."""
    text = metrics.normalised(line["sampled"])
    return next((a["kind"] for a in line["answers"] if metrics.normalised(a["text"]) == text),
                "other")


def tidy(curves: Mapping[str, Any], *, images: int, way: str = "noise") -> list[Result]:
    """The curves as results, a split a step, a category the noise or another way of weakening; and
    the paired change to the last step."""
    steps = curves["noise_steps"]
    out = [Result(f"step {step}", way, "base", "", name,
                  Estimate(value, *interval, images, more_is_better=kind == "true"))
           for measure in MEASURES for kind in KINDS for name in [measure.format(kind)]
           for step, value, interval in zip(steps, curves[name], curves[f"{name}_interval"],
                                            strict=True)]
    return out + [Result(f"step {steps[-1]}", way, "base", f"step {steps[0]}", f"p_{kind}",
                         Estimate(**curves[f"change_{kind}"], more_is_better=kind == "true"))
                  for kind in KINDS]


def load(result: stages.Result) -> tuple[list[dict], dict[str, dict[str, list[str]]]]:
    """The looks and the candidates of a finished stage."""
    return (read_lines(result.folder / "looks.jsonl"),
            json.loads((result.folder / CANDIDATES).read_text(encoding="utf-8")))


def frames(p: NoiseProbability, processor: Any, row: Row, steps: Sequence[int]
           ) -> list[Image.Image]:
    """A row's image as the model is shown it at steps of the noise, by the first draw."""
    clean = encoding.transformed(images.load(row.image), p.image_transform, processor)
    return [encoding.noised_picture(processor, clean, step, seeds.torch_generator(
        p.seed, "probe noise", row.id, 0)) for step in steps]


def knows_prior(manifest: Mapping[str, Any]) -> bool:
    """Whether a truth file or the user told a stage the prior's answers; else they are those that
    the model itself gave at the last step."""
    return "truth" in manifest["inputs"] or bool(manifest["parameters"]["question"])
