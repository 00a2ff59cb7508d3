"""What the untuned model answers, and what notebook 0 shows of a built world: written once, at
build time, so that the notebook needs neither the corpus nor the model."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from pandas import DataFrame
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from bpo.evaluation import hallucination
from bpo.evaluation.words import lexicon
from bpo.tiny.language import DESCRIBE, Facts, parse_caption
from bpo.tiny.model import image_prompt, pixel_values
from bpo.tiny.world import OBJECT_WORDS, PARTNER, TYPICAL, Scene

BATCH = 100
EXAMPLES = 4  # texts and pictures of each source that are shown
PICTURES = ("alignment", "preference", "counterfactual")
LONGEST_CAPTION = 40  # tokens


def overview(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
             scenes: dict[str, list[Scene]], rows: dict[str, list[list[dict]]],
             documents: list[dict]) -> dict[str, Any]:
    """statistics: source (text, alignment, preference and counterfactual images) -> `statistics`;
    samples: source -> its first `EXAMPLES`, texts as their facts, images as scenes;
    documents: one of each kind, {kind, user, assistant};
    answers: `short_answers` to the colour questions of the first counterfactual images."""
    texts = [parse_caption(d["assistant"]) for d in documents
             if d["kind"] in ("caption", "described")]
    colours = [[row for row in of_scene if row["category"] == "attribute"]
               for of_scene in rows["counterfactual"][:EXAMPLES]]
    return {
        "statistics": {"text": statistics(texts)} | {
            f"{name} images": statistics(scene.facts for scene in scenes[name])
            for name in PICTURES},
        "samples": {"text": texts[:EXAMPLES]} | {
            f"{name} images": [asdict(scene) for scene in scenes[name][:EXAMPLES]]
            for name in PICTURES},
        "documents": list({d["kind"]: d for d in reversed(documents)}.values())[::-1],
        "answers": short_answers(multimodal, processor, scenes["counterfactual"][:EXAMPLES],
                                 colours)}


def statistics(scenes: Iterable[Facts]) -> dict[str, float]:
    """The shares of objects with their typical colour, and with their partner in the scene."""
    seen = DataFrame([(colour == TYPICAL[name], PARTNER[name] in dict(map(reversed, facts)))
                      for facts in scenes for colour, name in facts],
                     columns=["typical", "partner"])
    return seen.mean().round(4).to_dict()


def base_metrics(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
                 scenes: Sequence[Scene], rows: Sequence[Sequence[dict]]) -> dict[str, float]:
    """Metrics of the untuned model on an evaluation split, named as in notebook 4; `rows[i]` belong
    to `scenes[i]`. Unlike there, p_true and p_prior also count colours that are typical, and
    prior_rate, the wrong answers that are the prior's, is out of all colour questions."""
    counts = [caption_counts(text, scene) for text, scene in
              zip(captions(multimodal, processor, scenes), scenes, strict=True)]
    for answer in short_answers(multimodal, processor, scenes, rows):
        right = (float(answer["answer"] == answer["true"]), 1)
        counts.append({f"pope_{answer['kind']}": right} if answer["kind"] else {
            "colour_accuracy": right, "p_true": (answer["p_true"], 1),
            "p_prior": (answer["p_prior"], 1),
            "prior_rate": (float(answer["answer"] in answer["prior"] and not right[0]), 1)})
    metrics = {}
    for name in dict.fromkeys(name for count in counts for name in count):
        tops, bottoms = zip(*(count[name] for count in counts if name in count), strict=True)
        metrics[name] = round(sum(tops) / max(sum(bottoms), 1), 4)
    return metrics


def caption_counts(text: str, scene: Scene) -> dict[str, tuple[float, float]]:
    """chair_i and cover of one caption, each as (counted, out of)."""
    counts = hallucination.chair(text, set(scene.names), lexicon(OBJECT_WORDS))
    return {name: counts[name] for name in ("chair_i", "cover")}


@torch.no_grad()
def captions(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
             scenes: Sequence[Scene]) -> list[str]:
    """The model's greedy description of each scene."""
    tokenizer, texts = processor.tokenizer, []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start:start + BATCH]
        inputs = tokenizer([image_prompt(DESCRIBE)] * len(batch), return_tensors="pt")
        out = multimodal.generate(**inputs, max_new_tokens=LONGEST_CAPTION,
                                  pixel_values=pixel_values(processor, batch))
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:],
                                        skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def short_answers(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
                  scenes: Sequence[Scene], rows: Sequence[Sequence[dict]]) -> list[dict[str, Any]]:
    """The likeliest word for each question of `rows[i]` about `scenes[i]` that one word answers:
    {question, kind, true, prior, answer, p_true, p_prior}.

    p_true, p_prior: the probabilities of these two as the first word; p_prior is 0.0 where the
    prior suggests nothing.
    """
    tokenizer, answers = processor.tokenizer, []
    questions = [(scene, row) for scene, of_scene in zip(scenes, rows, strict=True)
                 for row in of_scene if row["category"] != "caption"]
    for start in range(0, len(questions), BATCH):
        batch_scenes, batch = zip(*questions[start:start + BATCH], strict=True)
        inputs = tokenizer([image_prompt(row["question"]) for row in batch],
                           return_tensors="pt", padding=True)
        p = multimodal(**inputs, pixel_values=pixel_values(processor, batch_scenes),
                       logits_to_keep=1).logits[:, -1].softmax(-1)
        for row, of_words in zip(batch, p, strict=True):
            true, prior = (sum(of_words[tokenizer.convert_tokens_to_ids(words)].tolist())
                           for words in ([row["answer"]], row["prior"]))
            answers.append({"question": row["question"], "kind": row["kind"],
                            "true": row["answer"], "prior": row["prior"],
                            "answer": tokenizer.convert_ids_to_tokens(int(of_words.argmax())),
                            "p_true": round(true, 4), "p_prior": round(prior, 4)})
    return answers
