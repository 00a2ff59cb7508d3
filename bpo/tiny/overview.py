"""What a notebook shows of a built tiny world, as plain data: it is written once, at build time, so
that the notebook needs neither the corpus nor the model."""

from collections.abc import Sequence

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from bpo.evaluation import hallucination
from bpo.evaluation.words import lexicon
from bpo.tiny.data import image_name, vocabulary_truth
from bpo.tiny.drawing import scene_array
from bpo.tiny.language import DESCRIBE, parse_caption, scene_facts
from bpo.tiny.model import image_prompt, pixel_values
from bpo.tiny.world import Scene, statistics

BATCH = 100
EXAMPLES = 4  # pictures shown of each split
LONGEST_CAPTION = 40  # tokens
SHOWN_SPLITS = ("preference", "counterfactual")


def overview(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
             scenes: dict[str, list[Scene]], rows: dict[str, list[list[dict]]],
             documents: list[dict]) -> dict:
    """{statistics, documents, examples, answers} of the world.

    statistics: where (text, alignment, counterfactual) -> a list of {object, typical_colour,
        partner, count, typical_share, partner_share};
    documents: one of each kind, {kind, user, assistant};
    examples: split -> a list of {image, rows}, with image paths relative to the built folder;
    answers: `short_answers` to the colour questions of the counterfactual examples.
    """
    captions = [parse_caption(d["assistant"]) for d in documents
                if d["kind"] in ("caption", "described")]
    tables = {"text": statistics(captions)}
    for name in ("alignment", "counterfactual"):
        tables[name] = statistics([scene_facts(scene) for scene in scenes[name]])
    asked = [[row for row in of_scene if row["category"] == "attribute"]
             for of_scene in rows["counterfactual"][:EXAMPLES]]
    return {
        "statistics": tables,
        "documents": list({d["kind"]: d for d in reversed(documents)}.values())[::-1],
        "examples": {split: [{"image": f"{split}/{image_name(i)}", "rows": of_scene}
                             for i, of_scene in enumerate(rows[split][:EXAMPLES])]
                     for split in SHOWN_SPLITS},
        "answers": short_answers(multimodal, processor, scenes["counterfactual"][:EXAMPLES], asked),
    }


def base_metrics(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
                 scenes: Sequence[Scene], rows: Sequence[Sequence[dict]]) -> dict[str, float]:
    """Metrics of the untuned model on an evaluation split, named as in notebook 4; `rows[i]` belong
    to `scenes[i]`. Unlike there, p_true and p_prior also count colours that are typical."""
    counted = [caption_counts(text, scene) for text, scene in
               zip(captions(multimodal, processor, scenes), scenes, strict=True)]
    for answer in short_answers(multimodal, processor, scenes, rows):
        right = float(answer["answer"] == answer["true"])
        counted.append({"colour_accuracy": (right, 1), "p_true": (answer["p_true"], 1),
                        "p_prior": (answer["p_prior"], 1)} if answer["kind"] is None
                       else {f"pope_{answer['kind']}": (right, 1)})
    sums: dict[str, list[float]] = {}
    for counts in counted:
        for name, (top, bottom) in counts.items():
            total = sums.setdefault(name, [0, 0])
            total[0], total[1] = total[0] + top, total[1] + bottom
    return {name: round(top / max(bottom, 1), 4) for name, (top, bottom) in sums.items()}


def caption_counts(text: str, scene: Scene) -> dict[str, tuple[float, float]]:
    """chair_i and cover of one caption, each as (counted, out of)."""
    found = hallucination.chair(text, set(scene.names), lexicon(vocabulary_truth()["objects"]))
    return {name: found[name] for name in ("chair_i", "cover")}


@torch.no_grad()
def captions(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
             scenes: Sequence[Scene]) -> list[str]:
    """The model's greedy description of each scene."""
    tokenizer, texts = processor.tokenizer, []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start:start + BATCH]
        inputs = tokenizer([image_prompt(DESCRIBE)] * len(batch), return_tensors="pt")
        out = multimodal.generate(**inputs, max_new_tokens=LONGEST_CAPTION,
                                  pixel_values=pixel_values(processor, scene_array(batch)))
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:],
                                        skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def short_answers(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
                  scenes: Sequence[Scene], rows: Sequence[Sequence[dict]]) -> list[dict]:
    """The likeliest word for each question of `rows[i]` about `scenes[i]` that one word answers:
    {question, kind, true, prior, answer, p_true, p_prior}.

    p_true, p_prior: the probabilities of these two as the first word; p_prior is 0.0 where the
    prior suggests nothing.
    """
    tokenizer, answers = processor.tokenizer, []
    asked = [(i, row) for i, of_scene in enumerate(rows) for row in of_scene
             if row["category"] != "caption"]
    pixels = pixel_values(processor, scene_array(scenes))
    for start in range(0, len(asked), BATCH):
        batch = asked[start:start + BATCH]
        inputs = tokenizer([image_prompt(row["question"]) for _, row in batch],
                           return_tensors="pt", padding=True)
        p = multimodal(**inputs, pixel_values=pixels[[i for i, _ in batch]],
                       logits_to_keep=1).logits[:, -1].softmax(-1)
        for (_, row), of_words in zip(batch, p, strict=True):
            true, prior = (sum(float(of_words[tokenizer.convert_tokens_to_ids(word)])
                               for word in words) for words in ([row["answer"]], row["prior"]))
            answers.append({"question": row["question"], "kind": row["kind"],
                            "true": row["answer"], "prior": row["prior"],
                            "answer": tokenizer.convert_ids_to_tokens(int(of_words.argmax())),
                            "p_true": round(true, 4), "p_prior": round(prior, 4)})
    return answers
