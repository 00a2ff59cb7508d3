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
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bpo.evaluation import metrics, probe
from bpo.params import NoiseProbability, PriorOrigin, TinyWorld
from bpo.study import progress, results, seeds
from bpo.study import stage as stages
from bpo.study.files import read_lines, to_json, write_whole
from bpo.tiny import data, language, model, overview, training, world
from bpo.tiny.stage import TOWER_GATE

MEASURES = ("clean", "rise")
ALL = "all"  # averaged over the other factor's levels
CHANCE = 1 / len(world.COLOURS)


def run(p: PriorOrigin) -> stages.Result:
    """The stage of notebook 6: worlds/SEED-TEXT-IMAGES.json."""
    return stages.stage(p, lambda folder: _work(p, folder), inputs={})


def _work(p: PriorOrigin, folder: Path) -> dict[str, Any]:
    (folder / "worlds").mkdir(exist_ok=True)
    progress.announce(_parts(p, folder))
    for seed in range(p.seed, p.seed + p.repeats):
        _one_seed(p, folder, seed)
    files = [_file(folder, *key) for key in keys(p)]
    summed = summary([json.loads(file.read_text(encoding="utf-8")) for file in files], p)
    results.write(folder, [
        results.Result(f"text {c['text']}, images {c['images']}", "prior", f"seed {c['seed']}", "",
                       metric, results.Estimate(**e, more_is_better=more))
        for c in summed["cells"] for metric, e, more in (
            ("p_true", c["clean"]["p_true"], True), ("p_prior", c["clean"]["p_prior"], False),
            ("rise", c["rise"], False), ("chair_i", c["chair_i"], False),
            ("cover", c["cover"], True))])
    return summed


def _parts(p: PriorOrigin, folder: Path) -> list[tuple[str, float]]:
    """What is left to do, each with about its seconds."""
    waiting = [key for key in keys(p) if not _file(folder, *key).is_file()]
    tower, text, *alignment = training.parts(p.of(TinyWorld)).items()
    return ([tower] * len({seed for seed, *_ in waiting})
            + [text] * len({of_text[:2] for of_text in waiting})
            + [*alignment, ("probe", 20.0)] * len(waiting))


def ordered(levels: dict[str, list[float]]) -> list[str]:
    """The levels' names, from the fewest typical colours to the most."""
    return sorted(levels, key=lambda name: levels[name][0])


def keys(p: PriorOrigin) -> list[tuple[int, str, str]]:
    """(seed, text level, image level) of every world."""
    return list(itertools.product(range(p.seed, p.seed + p.repeats), ordered(p.text_levels),
                                  ordered(p.image_levels)))


def _file(folder: Path, seed: int, text: str, pictures: str) -> Path:
    return folder / "worlds" / f"{seed}-{text}-{pictures}.json"


def corpus(p: PriorOrigin, level: str, seed: int) -> list[dict]:
    """The text of a level. Documents about rewriting are left out at every level: a plausible
    mistake is mostly the typical colour, whatever the text's statistics."""
    typical, partner = p.text_levels[level]
    documents = language.text_corpus(seed, p.text_documents, typical=typical, partner=partner)
    return [d for d in documents if not d["kind"].startswith("rewrite")]


def draw_images(p: PriorOrigin, seed: int
                ) -> tuple[dict[str, list[world.Scene]], list[world.Scene]]:
    """The alignment scenes of each image level, and counterfactual ones that none of them shows."""
    seen: set[str] = set()
    aligned = {}
    for level in ordered(p.image_levels):
        typical, partner = p.image_levels[level]
        seen_here: set[str] = set()
        aligned[level] = data.draw_scenes(
            functools.partial(world.natural_scene, typical=typical, partner=partner),
            p.alignment_images, seed=seed, purpose="alignment", seen=seen_here)
        seen |= seen_here
    counterfactual = functools.partial(world.counterfactual_scene,
                                       partner=TinyWorld().image_partner)
    return aligned, data.draw_scenes(counterfactual, p.images, seed=seed,
                                     purpose="counterfactual", seen=seen)


def _one_seed(p: PriorOrigin, folder: Path, seed: int) -> None:
    """Builds and probes the worlds of a seed that are not there yet."""
    waiting = [k for k in keys(p) if k[0] == seed and not _file(folder, *k).is_file()]
    if not waiting:
        return
    tiny = p.of(TinyWorld, seed=seed)
    aligned, scenes = draw_images(p, seed)
    processor = model.build_processor()
    seeing, tower = training.seeing_model(processor, tiny)
    for text, of_text in itertools.groupby(waiting, key=lambda key: key[1]):
        documents = corpus(p, text, seed)
        reader, read = training.text_model(processor.tokenizer, documents, tiny)
        read["p_typical"] = text_prior(reader, processor.tokenizer)
        for key in of_text:
            multimodal = copy.deepcopy(seeing)
            training.align(multimodal, processor, reader, aligned[key[2]], documents, tiny)
            built = {"seed": seed, "text": text, "images": key[2], "tower": tower,
                     "text_model": read, **answers(p, multimodal, processor, scenes, seed)}
            write_whole(_file(folder, *key), to_json(built) + "\n")


def answers(p: PriorOrigin, multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
            scenes: list[world.Scene], seed: int) -> dict[str, list[dict[str, Any]]]:
    """What a world answers about the counterfactual scenes.

    looks: {image, step, draw, p_true, p_prior} of the colour question; captions: {image, text,
    chair_i, cover} on the clean image.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model.save_checkpoint(multimodal, processor, place / "model")
        data.write_split(place / "counterfactual", scenes,
                         data.split_rows(scenes, "counterfactual", seed))
        with progress.part("probe"):
            probe.work(NoiseProbability(
                seed=seed, model=str(place / "model"), rows=0, noise_steps=p.noise_steps,
                data=str(place / "counterfactual" / "rows.json"), draws=p.draws, sampled_answers=1,
                other_ways=[]), place)
        looks = read_lines(place / "looks.jsonl")
    captions = overview.captions(multimodal, processor, scenes)
    return {
        "looks": [{"image": x["image"], "step": x["step"], "draw": x["draw"],
                   **{f"p_{kind}": _probability(x, kind) for kind in probe.KINDS}} for x in looks],
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
    typical = tokenizer.convert_tokens_to_ids(list(world.TYPICAL.values()))
    return round(float(p[range(len(typical)), typical].mean()), 4)


def _probability(look: dict, kind: str) -> float:
    return round(float(sum(np.exp(a["logp"]) for a in look["answers"] if a["kind"] == kind)), 6)


def measures(built: dict, steps: Sequence[int]) -> dict[str, metrics.Ratios]:
    """Measure -> image -> (value, 1), averaged over draws: "p_true STEP" and "p_prior STEP" of
    every step, "clean" (P(prior) at the first step) and "rise" (what it has gained at the last)."""
    found = {}
    for kind, step in itertools.product(("p_true", "p_prior"), steps):
        sums = metrics.by_image([(x["image"], (x[kind], 1)) for x in built["looks"]
                                 if x["step"] == step])
        found[f"{kind} {step}"] = {image: (top / n, 1) for image, (top, n) in sums.items()}
    clean, last = (found[f"p_prior {step}"] for step in (steps[0], steps[-1]))
    rise = {image: (last[image][0] - value, 1) for image, (value, _) in clean.items()}
    return found | {"clean": clean, "rise": rise}


def summary(worlds: Sequence[dict], p: PriorOrigin) -> dict[str, Any]:
    """cells: a row a world with its curves, P(true) and P(prior) clean, the rise, CHAIRi, each with
    its bootstrap interval over images; effects; gates, the tower's accuracy by seed."""
    towers = {w["seed"]: w["tower"]["object_accuracy"] for w in worlds}
    return {"noise_steps": p.noise_steps, "cells": [_cell(built, p) for built in worlds],
            "effects": effects(worlds, p),
            "gates": [{"seed": seed, "value": value, "bound": TOWER_GATE,
                       "passed": value >= TOWER_GATE} for seed, value in towers.items()]}


def _cell(built: dict, p: PriorOrigin) -> dict[str, Any]:
    weights = _weights(p, built["seed"])
    ratios = measures(built, p.noise_steps) | {
        name: {c["image"]: c[name] for c in built["captions"]} for name in ("chair_i", "cover")}
    estimates = {name: metrics.estimate(of_image, weights) for name, of_image in ratios.items()}
    curve = {kind: [estimates[f"{kind} {step}"] for step in p.noise_steps]
             for kind in ("p_true", "p_prior")}
    return {"text": built["text"], "images": built["images"], "seed": built["seed"],
            "clean": {kind: points[0] for kind, points in curve.items()}, "curve": curve,
            **{name: estimates[name] for name in ("rise", "chair_i", "cover")},
            "text_prior": built["text_model"]["p_typical"]}


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
    ratios = {(w["seed"], w["text"], w["images"]): measures(w, p.noise_steps) for w in worlds}
    levels = {"text": ordered(p.text_levels), "images": ordered(p.image_levels)}

    def change(name: str, factor: str, beside: Sequence[str], seed: int) -> dict[str, Any]:
        def at_level(level: str) -> metrics.Ratios:
            """The measure at a level of the factor, averaged over levels of the other."""
            tables = [ratios[(seed, level, o) if factor == "text" else (seed, o, level)][name]
                      for o in beside]
            return {image: (fmean(t[image][0] for t in tables), 1) for image in tables[0]}

        difference = metrics.difference(at_level(levels[factor][-1]), at_level(levels[factor][0]),
                                        _weights(p, seed))
        return {"seed": seed} | {n: difference[n] for n in ("value", "low", "high")}

    rows = []
    for name, (factor, other) in itertools.product(
            MEASURES, (("text", "images"), ("images", "text"))):
        for at in (*levels[other], ALL):
            changes = [change(name, factor, levels[other] if at == ALL else [at], seed)
                       for seed in dict.fromkeys(w["seed"] for w in worlds)]
            values = [c["value"] for c in changes]
            rows.append({"factor": factor, "measure": name, "at": at, "seeds": changes,
                         "mean": round(fmean(values), 6), "least": min(values),
                         "most": max(values)})
    return rows
