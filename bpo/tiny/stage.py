"""Notebook 0's work as a stage: the world's data sets, its text model, its multimodal model."""

import functools
import itertools
import time
from pathlib import Path
from typing import Any

from bpo.params import TinyWorld
from bpo.study import progress, results
from bpo.study import stage as stages
from bpo.study.files import write_whole
from bpo.tiny import data, language, model, official, overview, training, world

TOWER_GATE = 0.95  # object accuracy per occupied cell: below it, mistakes are mostly bad sight


def run(p: TinyWorld) -> stages.Result:
    """The stage of notebook 0: model/, language_model/, prompts/, benchmarks/, overview.json and a
    folder for each data set."""
    return stages.stage(p, lambda folder: build(folder, p), inputs={})


def build(folder: Path, p: TinyWorld) -> dict[str, Any]:
    """Writes the stage's files into `folder`; returns its metrics as plain JSON types.

    The same settings and seed give the same bytes on one machine with one thread count. A tower
    below its gate is reported in metrics["gates"], not raised.
    """
    times = {"begin": time.monotonic()}
    progress.announce(training.parts(p).items())
    scenes, rows = write_data(folder, p)
    documents = language.text_corpus(p.seed, p.text_documents, typical=p.text_typical,
                                     partner=p.text_partner)
    times["data"] = time.monotonic()
    processor = model.build_processor()
    multimodal, tower = training.seeing_model(processor, p)
    times["tower"] = time.monotonic()
    reader, text = training.text_model(processor.tokenizer, documents, p)
    times["text"] = time.monotonic()
    training.align(multimodal, processor, reader, scenes["alignment"], documents, p)
    times["alignment"] = time.monotonic()
    model.save_checkpoint(multimodal, processor, folder / "model")
    model.save_checkpoint(reader, processor.tokenizer, folder / "language_model")
    base = {name: overview.base_metrics(multimodal, processor, scenes[name], rows[name])
            for name in ("development", "natural")}
    results.write(folder, [
        results.Result(split, "base model", "base", "", metric, results.Estimate(value))
        for split, metrics in base.items() for metric, value in metrics.items()])
    data.write_json(folder / "overview.json",
                    overview.overview(multimodal, processor, scenes, rows, documents))
    times["measures"] = time.monotonic()
    data.write_json(folder / stages.TIMINGS, {
        name: round(times[name] - times[before], 1) for before, name in itertools.pairwise(times)})
    sight = tower["object_accuracy"]
    return {"gates": {"tower": sight >= TOWER_GATE, "tower_bound": TOWER_GATE,
                      "tower_value": sight}, "tower": tower, "text": text, "base": base}


def write_data(folder: Path, p: TinyWorld
               ) -> tuple[dict[str, list[world.Scene]], dict[str, list[list[dict]]]]:
    """Writes data sets, benchmarks and prompts. Returns each split's scenes, and the rows of each
    scene; those of the alignment too, which are not written."""
    def natural(typical: float, partner: float) -> functools.partial:
        return functools.partial(world.natural_scene, typical=typical, partner=partner)

    alike = natural(p.image_typical, p.image_partner)
    counterfactual = functools.partial(world.counterfactual_scene, partner=p.image_partner)
    splits = {"alignment": (alike, p.alignment_images),
              "development": (counterfactual, p.development_images),
              "counterfactual": (counterfactual, p.test_images),
              "natural": (alike, p.natural_images)}
    if p.preference_rows == "fresh":
        splits["preference"] = (natural(p.preference_typical, p.preference_partner),
                                p.preference_images)
    doses = {data.dosed(dose): natural(dose, min(p.image_partner * dose / p.image_typical, 1.0))
             for dose in p.preference_doses}
    splits |= {name: (make, p.preference_images) for name, make in doses.items()}
    seen: set[str] = set()
    scenes = {name: data.draw_scenes(make, count, seed=p.seed, purpose=name, seen=seen)
              for name, (make, count) in splits.items()}
    rows = {name: data.split_rows(scenes[name], name, p.seed) for name in scenes}
    if p.preference_rows == "alignment":
        for of_split in (scenes, rows):
            of_split["preference"] = of_split["alignment"][:p.preference_images]
    if not p.preference_presence:
        rows |= {name: data.without_presence(rows[name]) for name in ("preference", *doses)}
    for name in ("preference", "development", "counterfactual", "natural", *doses):
        data.write_split(folder / name, scenes[name], rows[name])
    official.write(folder / "benchmarks", counterfactual, p.benchmark_images, seed=p.seed,
                   seen=seen)
    (folder / "prompts").mkdir(exist_ok=True)
    for name, template in language.INJECTION_TEMPLATES.items():
        write_whole(folder / "prompts" / f"{name}.txt", template)
    return scenes, rows
