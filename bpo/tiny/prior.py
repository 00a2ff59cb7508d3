"""Notebook 6's work: where the prior comes from. Worlds of every text level with every image level.

A world is a model that was taught by a text and by alignment images of the given statistics. The
worlds of a seed share their tower, which sees scenes without statistics; those of a seed and a text
level share their text model; all are asked about the same counterfactual images, by notebook 1's
code. A world is kept as one file, written whole, so that an interrupted study goes on by world.

"uniform" is a typical colour in 1 of 8 colours, and a partner as often as an average other object:
0.106. With pairs drawn with probability q (share s = 2q / (1 + q)) a scene has n objects, and an
average other one of the 9 is there with probability E[n (n - 1)] / (9 E[n])
= (4 + 18 q + 4 q^2) / (45 (1 + q)), which is s for q = 9 - sqrt(80).
"""

import copy
import functools
import inspect
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bpo.evaluation import metrics, probe
from bpo.params import NoiseProbability, PriorOrigin
from bpo.study import results, seeds
from bpo.study import stage as stages
from bpo.study.files import read_lines, to_json, write_whole
from bpo.tiny import build, data, language, model, overview, world

MEASURES = ("clean", "rise")
ALL = "all"  # averaged over the other factor's levels
CHANCE = 1 / len(world.COLOURS)


def run(p: PriorOrigin) -> stages.Result:
    """The stage of notebook 6: worlds/SEED-TEXT-IMAGES.json."""
    return stages.stage(p, lambda folder: _work(p, folder), inputs={})


def _work(p: PriorOrigin, folder: Path) -> dict[str, Any]:
    (folder / "worlds").mkdir(exist_ok=True)
    for seed in range(p.seed, p.seed + p.repeats):
        _one_seed(p, folder, seed)
    summed = summary([json.loads(_file(folder, *key).read_text(encoding="utf-8"))
                      for key in keys(p)], p)
    results.write(folder, [
        results.Result(f"text {c['text']}, images {c['images']}", "prior", f"seed {c['seed']}", "",
                       metric, results.Estimate(**e, more_is_better=more))
        for c in summed["cells"] for metric, e, more in (
            ("p_true", c["clean"]["p_true"], True), ("p_prior", c["clean"]["p_prior"], False),
            ("rise", c["rise"], False), ("chair_i", c["chair_i"], False),
            ("cover", c["cover"], True))])
    return summed


def ordered(levels: dict[str, list[float]]) -> list[str]:
    """The levels' names, from the fewest typical colours to the most."""
    return sorted(levels, key=lambda name: levels[name][0])


def keys(p: PriorOrigin) -> list[tuple[int, str, str]]:
    """(seed, text level, image level) of every world."""
    return [(seed, text, pictures) for seed in range(p.seed, p.seed + p.repeats)
            for text in ordered(p.text_levels) for pictures in ordered(p.image_levels)]


def _file(folder: Path, seed: int, text: str, pictures: str) -> Path:
    return folder / "worlds" / f"{seed}-{text}-{pictures}.json"


def corpus(p: PriorOrigin, level: str, seed: int) -> list[dict]:
    """The text of a level. Documents about rewriting are left out at every level: a plausible
    mistake is mostly the typical colour, whatever the text's statistics."""
    typical, partner = p.text_levels[level]
    documents = language.text_corpus(seed, p.text_documents, typical=typical, partner=partner)
    return [d for d in documents if not d["kind"].startswith("rewrite")]


def draw_images(p: PriorOrigin, seed: int) -> tuple[dict[str, list], list]:
    """The alignment scenes of each image level, and counterfactual ones that none of them shows."""
    seen: set[str] = set()
    aligned = {}
    for level in ordered(p.image_levels):
        typical, partner = p.image_levels[level]
        own: set[str] = set()
        aligned[level] = data.draw_scenes(
            functools.partial(world.natural_scene, typical=typical, partner=partner),
            p.alignment_images, seed=seed, purpose="alignment", seen=own)
        seen |= own
    usual = settings(p)["image_partner"]  # so many objects a scene as the tiny study's have
    return aligned, data.draw_scenes(
        functools.partial(world.counterfactual_scene, partner=usual), p.images, seed=seed,
        purpose="counterfactual", seen=seen)


def settings(p: PriorOrigin) -> dict[str, Any]:
    """All settings of `build`: the study's where it has them, else the tiny study's."""
    usual = {n: a.default for n, a in inspect.signature(build.build).parameters.items()}
    return usual | {n: v for n, v in p.shaping().items() if n in usual}


def _one_seed(p: PriorOrigin, folder: Path, seed: int) -> None:
    """Builds and probes the worlds of a seed that are not there yet."""
    waiting = [k for k in keys(p) if k[0] == seed and not _file(folder, *k).is_file()]
    if not waiting:
        return
    s = settings(p)
    aligned, scenes = draw_images(p, seed)
    tokenizer = model.build_tokenizer()
    processor = model.build_processor(tokenizer)
    seeing, tower = build.seeing_model(
        tokenizer, processor, text_width=s["text_width"], text_layers=s["text_layers"],
        vision_width=s["vision_width"], vision_layers=s["vision_layers"], steps=s["tower_steps"],
        batch=s["tower_batch"], rate=s["tower_rate"], seed=seed)
    for text in dict.fromkeys(text for _, text, _ in waiting):
        documents = corpus(p, text, seed)
        reader, read = build.text_model(
            tokenizer, documents, width=s["text_width"], layers=s["text_layers"],
            steps=s["text_steps"], rate=s["text_rate"], seed=seed)
        read["p_typical"] = text_prior(reader, tokenizer)
        for key in (k for k in waiting if k[1] == text):
            pictures = aligned[key[2]]
            multimodal = copy.deepcopy(seeing)
            build.align(
                multimodal, processor, reader, pictures,
                build.split_rows(pictures, "alignment", seed), documents,
                colours=s["alignment_colours"], presences=s["alignment_presences"],
                presence_weight=s["presence_weight"], caption_steps=s["caption_steps"],
                caption_batch=s["caption_batch"], caption_rate=s["caption_rate"],
                mixed_steps=s["mixed_steps"], mixed_batch=s["mixed_batch"],
                mixed_rate=s["mixed_rate"], seed=seed)
            found = {"seed": seed, "text": text, "images": key[2], "tower": tower,
                     "text_model": read, **_asked(p, multimodal, processor, scenes, seed)}
            write_whole(_file(folder, *key), to_json(found) + "\n")


def _asked(p: PriorOrigin, multimodal, processor, scenes: list, seed: int) -> dict[str, list]:
    """What a world answers about the counterfactual scenes.

    looks: {image, step, draw, p_true, p_prior} of the colour question; captions: {image, text,
    chair_i, cover} on the clean image.
    """
    rows = build.split_rows(scenes, "counterfactual", seed)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model.save_checkpoint(multimodal, processor, place / "model")
        data.write_split(place / "counterfactual", scenes, rows)
        (place / "probe").mkdir()
        probe.work(NoiseProbability(
            seed=seed, model=str(place / "model"), rows=0, noise_steps=p.noise_steps,
            data=str(place / "counterfactual" / "rows.json"), draws=p.draws, sampled_answers=1),
            place / "probe")
        lines = read_lines(place / "probe" / "looks.jsonl")
    captions = overview.captions(multimodal, processor, scenes)
    return {
        "looks": [{"image": x["image"], "step": x["step"], "draw": x["draw"],
                   **{f"p_{kind}": _probability(x, kind) for kind in probe.KINDS}} for x in lines],
        "captions": [{"image": data.image_name(i), "text": text,
                      **overview.caption_counts(text, scene)}
                     for i, (text, scene) in enumerate(zip(captions, scenes, strict=True))]}


@torch.no_grad()
def text_prior(reader: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """P(typical colour | object) of a text model that is asked without a scene, mean over objects.
    """
    prompts = [f"<s>user: {language.colour_question(name)}\nassistant:" for name in world.OBJECTS]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    p = reader(**inputs, logits_to_keep=1).logits[:, -1].softmax(-1)
    typical = tokenizer.convert_tokens_to_ids([world.TYPICAL[name] for name in world.OBJECTS])
    return round(float(p[range(len(typical)), typical].mean()), 4)


def _probability(look: dict, kind: str) -> float:
    return round(float(sum(np.exp(a["logp"]) for a in look["answers"] if a["kind"] == kind)), 6)


def per_image(found: dict, measure_name: str, steps: Sequence[int]) -> metrics.Ratios:
    """image -> (value, 1): "clean" is P(prior) at the first step, "rise" what it has gained at the
    last one; "p_true STEP" and "p_prior STEP" are a probability at a step; draws are averaged."""
    if measure_name == "rise":
        clean = per_image(found, f"p_prior {steps[0]}", steps)
        last = per_image(found, f"p_prior {steps[-1]}", steps)
        return {image: (last[image][0] - clean[image][0], 1) for image in clean}
    if measure_name == "clean":
        return per_image(found, f"p_prior {steps[0]}", steps)
    kind, step = measure_name.split()
    sums = metrics.by_image([(x["image"], (x[kind], 1)) for x in found["looks"]
                             if x["step"] == int(step)])
    return {image: (top / bottom, 1) for image, (top, bottom) in sums.items()}


def summary(worlds: Sequence[dict], p: PriorOrigin) -> dict[str, Any]:
    """cells: a row a world with its curves, P(true) and P(prior) clean, the rise, CHAIRi, each with
    its bootstrap interval over images; effects; gates, the tower's accuracy by seed."""
    towers = {w["seed"]: w["tower"]["object_accuracy"] for w in worlds}
    return {"noise_steps": p.noise_steps, "cells": [_cell(found, p) for found in worlds],
            "effects": effects(worlds, p),
            "gates": [{"seed": seed, "value": value, "bound": build.TOWER_GATE,
                       "passed": value >= build.TOWER_GATE} for seed, value in towers.items()]}


def _cell(found: dict, p: PriorOrigin) -> dict[str, Any]:
    weights = _weights(p, found["seed"])
    curve = {kind: [metrics.estimate(per_image(found, f"{kind} {step}", p.noise_steps), weights)
                    for step in p.noise_steps] for kind in ("p_true", "p_prior")}
    said = {n: metrics.estimate({c["image"]: c[n] for c in found["captions"]}, weights)
            for n in ("chair_i", "cover")}
    return {"text": found["text"], "images": found["images"], "seed": found["seed"],
            "clean": {kind: points[0] for kind, points in curve.items()}, "curve": curve,
            "rise": metrics.estimate(per_image(found, "rise", p.noise_steps), weights), **said,
            "text_prior": found["text_model"]["p_typical"]}


def _weights(p: PriorOrigin, seed: int) -> np.ndarray:
    return metrics.bootstrap_weights(p.images, p.resamples,
                                     seeds.numpy_generator(seed, "prior interval"))


def effects(worlds: Sequence[dict], p: PriorOrigin) -> list[dict[str, Any]]:
    """What a factor's most biased level does against its least, at each level of the other factor
    and averaged over those ("all"), on each measure.

    A row: {factor, measure, at, seeds: [{seed, value, low, high}], mean, least, most}. A seed's
    worlds share their images, so its interval is a paired bootstrap over them; `least` and `most`
    are over the seeds.
    """
    table = {(w["seed"], w["text"], w["images"]): w for w in worlds}
    levels = {"text": ordered(p.text_levels), "images": ordered(p.image_levels)}
    rows = []
    for name in MEASURES:
        for factor, other in (("text", "images"), ("images", "text")):
            for at in (*levels[other], ALL):
                where = levels[other] if at == ALL else [at]
                found = []
                for seed in dict.fromkeys(w["seed"] for w in worlds):
                    most, least = (_average([
                        per_image(table[seed, *((level, o) if factor == "text" else (o, level))],
                                  name, p.noise_steps) for o in where])
                        for level in (levels[factor][-1], levels[factor][0]))
                    change = metrics.difference(most, least, _weights(p, seed))
                    found.append({"seed": seed} | {k: change[k] for k in ("value", "low", "high")})
                values = [f["value"] for f in found]
                rows.append({"factor": factor, "measure": name, "at": at, "seeds": found,
                             "mean": round(fmean(values), 6), "least": min(values),
                             "most": max(values)})
    return rows


def _average(tables: Sequence[metrics.Ratios]) -> metrics.Ratios:
    return {image: (fmean(t[image][0] for t in tables), 1) for image in tables[0]}
