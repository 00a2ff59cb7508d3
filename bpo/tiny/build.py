"""Builds the tiny study's starting point: world, text model, multimodal model, and data sets."""

import time
from pathlib import Path
from typing import Literal

from transformers import (
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bpo.tiny import data, model, official, training
from bpo.tiny.language import INJECTION_TEMPLATES, text_corpus
from bpo.tiny.overview import base_metrics, overview
from bpo.tiny.world import Scene, counterfactual_scene, natural_scene, python_generator

TOWER_GATE = 0.95  # object accuracy per occupied cell: below it, mistakes are mostly bad sight


class Stopwatch:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round(now - self.last, 1)
        self.last = now


def build(
    folder: Path,
    *,
    seed: int,
    tower_steps: int = 1000,
    text_documents: int = 22000,
    text_steps: int = 900,
    caption_steps: int = 300,
    mixed_steps: int = 350,
    text_typical: float = 0.95,
    text_partner: float = 0.90,
    image_typical: float = 0.77,
    image_partner: float = 0.55,
    alignment_images: int = 1000,
    alignment_colours: int = 1,
    alignment_presences: int = 2,
    presence_weight: float = 2.0,
    preference_images: int = 1000,
    preference_rows: Literal["alignment", "fresh"] = "alignment",
    development_images: int = 200,
    test_images: int = 400,
    natural_images: int = 200,
    benchmark_images: int = 200,
    text_width: int = 128,
    text_layers: int = 3,
    vision_width: int = 96,
    vision_layers: int = 3,
    tower_batch: int = 48,
    caption_batch: int = 32,
    mixed_batch: int = 16,
    tower_rate: float = 1.5e-3,
    text_rate: float = 3e-3,
    caption_rate: float = 1.5e-3,
    mixed_rate: float = 1e-3,
) -> dict:
    """Write model/, language_model/, prompts/, benchmarks/, the four data sets and overview.json
    into `folder`, which is made if needed and should be empty; return metrics as plain JSON types.

    The same settings and seed give the same bytes on one machine with one thread count. A tower
    below its gate is reported in metrics["gates"], not raised.
    """
    if preference_rows == "alignment" and preference_images > alignment_images:
        raise ValueError(
            f"preference_images is {preference_images} but there are only {alignment_images} "
            "alignment images: lower it, or set preference_rows to 'fresh'.")
    folder = Path(folder)
    watch = Stopwatch()

    def natural(rng):
        return natural_scene(rng, typical=image_typical, partner=image_partner)

    def counterfactual(rng):
        return counterfactual_scene(rng, partner=image_partner)

    seen: set[str] = set()
    scenes = {name: data.draw_scenes(make, count, seed=seed, purpose=name, seen=seen)
              for name, make, count in [
                  ("alignment", natural, alignment_images),
                  ("development", counterfactual, development_images),
                  ("counterfactual", counterfactual, test_images),
                  ("natural", natural, natural_images)]}
    rows = {name: split_rows(scenes[name], name, seed) for name in scenes}
    if preference_rows == "alignment":
        scenes["preference"] = scenes["alignment"][:preference_images]
        rows["preference"] = rows["alignment"][:preference_images]
    else:
        scenes["preference"] = data.draw_scenes(natural, preference_images, seed=seed,
                                                purpose="preference", seen=seen)
        rows["preference"] = split_rows(scenes["preference"], "preference", seed)
    for name in ("preference", "development", "counterfactual", "natural"):
        data.write_split(folder / name, scenes[name], rows[name])
    official.write(folder / "benchmarks", counterfactual, benchmark_images, seed=seed, seen=seen)
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    for name, template in INJECTION_TEMPLATES.items():
        (folder / "prompts" / f"{name}.txt").write_text(template, encoding="utf-8")
    documents = text_corpus(seed, text_documents, typical=text_typical, partner=text_partner)
    watch.lap("data")

    tokenizer = model.build_tokenizer()
    processor = model.build_processor(tokenizer)
    multimodal, tower = seeing_model(
        tokenizer, processor, text_width=text_width, text_layers=text_layers,
        vision_width=vision_width, vision_layers=vision_layers, steps=tower_steps,
        batch=tower_batch, rate=tower_rate, seed=seed)
    watch.lap("tower")

    language, text = text_model(tokenizer, documents, width=text_width, layers=text_layers,
                                steps=text_steps, rate=text_rate, seed=seed)
    watch.lap("text")

    align(multimodal, processor, language, scenes["alignment"], rows["alignment"], documents,
          colours=alignment_colours, presences=alignment_presences,
          presence_weight=presence_weight, caption_steps=caption_steps,
          caption_batch=caption_batch, caption_rate=caption_rate, mixed_steps=mixed_steps,
          mixed_batch=mixed_batch, mixed_rate=mixed_rate, seed=seed)
    watch.lap("alignment")

    model.save_checkpoint(multimodal, processor, folder / "model")
    model.save_checkpoint(language, tokenizer, folder / "language_model")
    metrics = {
        "gates": {"tower": tower["object_accuracy"] >= TOWER_GATE, "tower_bound": TOWER_GATE,
                  "tower_value": tower["object_accuracy"]},
        "tower": tower,
        "text": text,
        "base": {name: base_metrics(multimodal, processor, scenes[name], rows[name])
                 for name in ("development", "natural")},
    }
    data.write_json(folder / "overview.json",
                    overview(multimodal, processor, scenes, rows, documents))
    watch.lap("measures")
    return metrics | {"seconds": watch.seconds}


def split_rows(scenes: list, name: str, seed: int) -> list[list[dict]]:
    """Each scene's rows: three for training, five for an evaluation split."""
    rng = python_generator(seed, "rows", name)
    make = data.training_rows if name in ("alignment", "preference") else data.evaluation_rows
    return [make(scene, index, rng) for index, scene in enumerate(scenes)]


def seeing_model(tokenizer: PreTrainedTokenizerFast, processor: LlavaProcessor, *, text_width: int,
                 text_layers: int, vision_width: int, vision_layers: int, steps: int, batch: int,
                 rate: float, seed: int) -> tuple[LlavaForConditionalGeneration, dict]:
    """Phase 0: a model whose tower has learnt to see and whose language model knows nothing, and
    the tower's accuracies. It depends on no statistics of the world."""
    multimodal = model.build_multimodal_model(
        tokenizer, text=model.text_config(tokenizer, width=text_width, layers=text_layers),
        vision_width=vision_width, vision_layers=vision_layers, seed=seed)
    return multimodal, training.train_tower(multimodal, processor, steps=steps, batch=batch,
                                            rate=rate, seed=seed)


def text_model(tokenizer: PreTrainedTokenizerFast, documents: list[dict], *, width: int,
               layers: int, steps: int, rate: float, seed: int) -> tuple[LlamaForCausalLM, dict]:
    """Phase A: the language model that has read the documents, and its perplexity."""
    language = model.build_language_model(tokenizer, width=width, layers=layers, seed=seed)
    return language, training.train_language_model(language, tokenizer, documents, steps=steps,
                                                   rate=rate, seed=seed)


def align(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
          language: LlamaForCausalLM, scenes: list[Scene], rows: list[list[dict]],
          documents: list[dict], *, colours: int, presences: int, presence_weight: float,
          caption_steps: int, caption_batch: int, caption_rate: float, mixed_steps: int,
          mixed_batch: int, mixed_rate: float, seed: int) -> None:
    """Phase B: `multimodal` adopts the language model's weights and learns, in place, to answer
    about the scenes; `rows[i]` belong to `scenes[i]` and get `more_rows` beside them."""
    tokenizer = processor.tokenizer
    model.adopt_language_model(multimodal, language)
    features = training.all_features(multimodal, processor, scenes)
    rng = python_generator(seed, "more alignment rows")
    asked = [own + data.more_rows(scene, rng, colours=colours, presences=presences)
             for own, scene in zip(rows, scenes)]
    training.align(multimodal, tokenizer, features, asked, [], steps=caption_steps,
                   batch=caption_batch, rate=caption_rate, weights={"caption": 1.0},
                   title="alignment: captions", seed=seed)
    training.align(multimodal, tokenizer, features, asked, documents, steps=mixed_steps,
                   batch=mixed_batch, rate=mixed_rate,
                   weights={"caption": 1.0, "attribute": 1.0, "presence": presence_weight},
                   title="alignment: all questions", seed=seed)
