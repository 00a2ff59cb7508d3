"""What the build reports about the tiny model: sight, prior, captions, and rewritten answers.

A quick look at the starting point, on purpose independent of the kit's own evaluation.
"""

import re

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from bpo.seeds import seed_for
from bpo.tiny.data import KINDS
from bpo.tiny.drawing import scene_array
from bpo.tiny.language import (
    COLOURS,
    DESCRIBE,
    INJECTION_TEMPLATES,
    OBJECTS,
    colour_question,
    count_mistakes,
    injection_prompt,
    parse_caption,
)
from bpo.tiny.model import IMAGE_TOKEN, IMAGE_TOKENS, pixel_values
from bpo.tiny.world import TYPICAL, Scene

BATCH = 100
LONGEST_ANSWER = 40  # tokens


def text_prompt(user: str) -> str:
    return f"<s>user: {user}\nassistant:"


def image_prompt(question: str) -> str:
    return f"<s>user: {IMAGE_TOKEN * IMAGE_TOKENS}\n{question}\nassistant:"


def mean(values: list) -> float | None:
    """Rounded to four digits; None of nothing."""
    return round(float(sum(values)) / len(values), 4) if values else None


@torch.no_grad()
def next_word_probabilities(model: LlavaForConditionalGeneration, tokenizer, pixels: Tensor,
                            questions: list[str]) -> Tensor:
    """Probabilities of the answer's first word, (n, vocabulary); one question a picture."""
    parts = []
    for start in range(0, len(questions), BATCH):
        texts = [image_prompt(question) for question in questions[start:start + BATCH]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        logits = model(**inputs, pixel_values=pixels[start:start + BATCH],
                       logits_to_keep=1).logits[:, -1]
        parts.append(logits.softmax(-1))
    return torch.cat(parts)


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], pixels: Tensor | None = None,
            **sampling) -> list[str]:
    """Generated answers to rendered prompts, greedy unless `sampling` says otherwise."""
    texts = []
    for start in range(0, len(prompts), BATCH):
        inputs = tokenizer(prompts[start:start + BATCH], return_tensors="pt", padding=True)
        if pixels is not None:
            inputs["pixel_values"] = pixels[start:start + BATCH]
        out = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, **sampling)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:],
                                        skip_special_tokens=True)
    return texts


def caption_scores(captions: list[str], scenes: list[Scene]) -> dict:
    """CHAIR_i (wrong objects of all mentioned, repeats counted), recall of the objects, and the
    mean number of words."""
    wrong = mentioned = found = present = 0
    for text, scene in zip(captions, scenes):
        names = [word for word in re.findall(r"\w+", text) if word in OBJECTS]
        mentioned += len(names)
        wrong += sum(name not in scene.names for name in names)
        found += len(set(names) & set(scene.names))
        present += len(scene.names)
    return {"chair_i": round(wrong / max(mentioned, 1), 4), "recall": round(found / present, 4),
            "words": mean([len(text.split()) for text in captions]),
            "well_formed": mean([parse_caption(text) is not None for text in captions])}


def judge_model(model: LlavaForConditionalGeneration, processor, scenes: list[Scene],
                rows: list[list[dict]], pixels: Tensor | None = None) -> dict:
    """Colours, presence and captions on one evaluation split.

    `rows[i]` belong to `scenes[i]`; `pixels` (n, 3, 64, 64) replace the scenes' clean pictures.
    """
    tokenizer = processor.tokenizer
    if pixels is None:
        pixels = pixel_values(processor, scene_array(scenes))
    flat = [(index, row) for index, own in enumerate(rows) for row in own]
    scores = {}
    colour = [(index, row) for index, row in flat if row["category"] == "attribute"]
    p = next_word_probabilities(model, tokenizer, pixels[[i for i, _ in colour]],
                                [row["question"] for _, row in colour])
    true = tokenizer.convert_tokens_to_ids([row["answer"] for _, row in colour])
    prior = tokenizer.convert_tokens_to_ids([row["prior"][0] for _, row in colour])
    line, best = torch.arange(len(colour)), p.argmax(-1)
    scores["colour_accuracy"] = mean((best == torch.tensor(true)).tolist())
    scores["prior_answers"] = mean((best == torch.tensor(prior)).tolist())
    scores["p_true"] = mean(p[line, true].tolist())
    scores["p_prior"] = mean(p[line, prior].tolist())
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    for kind in KINDS:
        asked = [(index, row) for index, row in flat if row["kind"] == kind]
        p = next_word_probabilities(model, tokenizer, pixels[[i for i, _ in asked]],
                                    [row["question"] for _, row in asked])
        said = (p[:, yes] > p[:, no]).tolist()
        scores[f"presence_{kind}"] = mean([s == (row["answer"] == "yes")
                                           for s, (_, row) in zip(said, asked)])
        scores[f"yes_{kind}"] = mean(said)
    captions = answers(model, tokenizer, [image_prompt(DESCRIBE)] * len(scenes), pixels)
    return scores | caption_scores(captions, scenes)


@torch.no_grad()
def text_priors(language: LlamaForCausalLM, tokenizer) -> dict:
    """P(typical colour | object) of the text model, asked without a scene."""
    prompts = tokenizer([text_prompt(colour_question(name)) for name in OBJECTS],
                        return_tensors="pt", padding=True)
    p = language(**prompts).logits[:, -1].softmax(-1)
    typical = tokenizer.convert_tokens_to_ids([TYPICAL[name] for name in OBJECTS])
    return {name: round(float(p[i, typical[i]]), 4) for i, name in enumerate(OBJECTS)}


def judge_rewrites(language: LlamaForCausalLM, tokenizer, rows: list[dict], *, seed: int) -> dict:
    """How good the text model's mistakes are, by category of row: shares of rewrites that differ
    from the answer, that are well formed, and that change exactly one fact."""
    prompts = []
    for row in rows:
        kind = "describe" if row["category"] == "caption" else "question"
        prompts.append(text_prompt(injection_prompt(INJECTION_TEMPLATES[kind], row["question"],
                                                    row["answer"])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "rewrites"))
        texts = answers(language, tokenizer, prompts, do_sample=True, temperature=0.8, top_p=0.95)
    scores = {}
    for category in ("caption", "attribute", "presence"):
        own = [(row["answer"], text.strip()) for row, text in zip(rows, texts)
               if row["category"] == category]
        if category == "caption":
            parsed = [(parse_caption(old), parse_caption(new)) for old, new in own]
            formed = [new is not None for _, new in parsed]
            single = [new is not None and count_mistakes(old, new) == 1 for old, new in parsed]
        else:
            allowed = COLOURS if category == "attribute" else ["yes", "no"]
            formed = [new in allowed for _, new in own]
            single = [old != new and good for (old, new), good in zip(own, formed)]
        scores[category] = {"differs": mean([old != new for old, new in own]),
                            "well_formed": mean(formed), "one_mistake": mean(single)}
    return scores
