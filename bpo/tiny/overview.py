"""What a notebook shows of a built tiny world, as plain data: it is written once, at build time, so
that the notebook needs neither the corpus nor the model."""

from bpo.tiny.data import image_name
from bpo.tiny.drawing import scene_array
from bpo.tiny.language import (
    DESCRIBE,
    INJECTION_TEMPLATES,
    injection_prompt,
    parse_caption,
    scene_facts,
)
from bpo.tiny.measure import answers, image_prompt, next_word_probabilities, text_prompt
from bpo.tiny.model import pixel_values
from bpo.tiny.world import statistics

EXAMPLES = 4  # pictures shown of each split
SPLITS = ("preference", "development", "counterfactual", "natural")


def overview(multimodal, language, processor, scenes: dict, rows: dict,
             documents: list[dict]) -> dict:
    """{statistics, documents, examples, answers, rewrites} of the world.

    statistics: where (text, alignment, natural, counterfactual) -> a list of {object,
        typical_colour, partner, count, typical_share, partner_share};
    documents: one of each kind, {kind, user, assistant};
    examples: split -> a list of {image, rows}, with image paths relative to the built folder;
    answers: what the model says to the examples of the natural and the counterfactual split;
    rewrites: what the text model makes of some annotated answers.
    """
    captions = [parse_caption(d["assistant"]) for d in documents
                if d["kind"] in ("caption", "described")]
    tables = {"text": statistics(captions)}
    for name in ("alignment", "natural", "counterfactual"):
        tables[name] = statistics([scene_facts(scene) for scene in scenes[name]])
    return {
        "statistics": tables,
        "documents": list({d["kind"]: d for d in reversed(documents)}.values())[::-1],
        "examples": {split: [{"image": f"{split}/{image_name(i)}", "rows": own}
                             for i, own in enumerate(rows[split][:EXAMPLES])]
                     for split in SPLITS},
        "answers": [answer for split in ("natural", "counterfactual")
                    for answer in example_answers(multimodal, processor, split, scenes[split],
                                                  rows[split])],
        "rewrites": example_rewrites(language, processor.tokenizer, rows["preference"][:EXAMPLES]),
    }


def example_answers(multimodal, processor, split: str, scenes: list,
                    rows: list[list[dict]]) -> list[dict]:
    """The model's greedy answers to the first pictures' rows, beside truth and prior; for one-word
    answers also the probability of the true one and, where there is one, of the prior's."""
    tokenizer = processor.tokenizer
    flat = [(i, row) for i, own in enumerate(rows[:EXAMPLES]) for row in own]
    indices, questions = [i for i, _ in flat], [row["question"] for _, row in flat]
    pixels = pixel_values(processor, scene_array(scenes[:EXAMPLES]))[indices]
    said = answers(multimodal, tokenizer, [image_prompt(q) for q in questions], pixels)
    p = next_word_probabilities(multimodal, tokenizer, pixels, questions)
    shown = []
    for k, (i, row) in enumerate(flat):
        entry = {"image": f"{split}/{image_name(i)}", "split": split,
                 "category": row["category"], "question": row["question"],
                 "answer": said[k].strip(), "true": row["answer"], "prior": row["prior"]}
        if row["question"] != DESCRIBE:
            entry["p_true"] = probability(p[k], tokenizer, row["answer"])
            entry["p_prior"] = probability(p[k], tokenizer, *row["prior"])
        shown.append(entry)
    return shown


def probability(p, tokenizer, *words: str) -> float | None:
    """The probability of the word, None without one."""
    if not words:
        return None
    return round(float(p[tokenizer.convert_tokens_to_ids(words[0])]), 4)


def example_rewrites(language, tokenizer, rows: list[list[dict]]) -> list[dict]:
    """Greedy rewrites of annotated answers, {category, question, answer, rewritten}."""
    flat = [row for own in rows for row in own]
    kinds = ["describe" if row["category"] == "caption" else "question" for row in flat]
    prompts = [text_prompt(injection_prompt(INJECTION_TEMPLATES[kind], row["question"],
                                            row["answer"])) for kind, row in zip(kinds, flat)]
    texts = answers(language, tokenizer, prompts)
    return [{"category": row["category"], "question": row["question"], "answer": row["answer"],
             "rewritten": text.strip()} for row, text in zip(flat, texts)]
