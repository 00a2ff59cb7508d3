"""The tiny language: questions, answers, plausible mistakes, and the text-only corpus.

A caption names every object in reading order: "yellow banana , red apple ."
"""

import random

from bpo.tiny import world
from bpo.tiny.world import COLOURS, OBJECTS, PARTNER, TYPICAL

DESCRIBE = "describe the image"
# The instructions that error injection sends to the text model, as a user message.
INJECTION_TEMPLATES = {
    "describe": "{question}\n{answer}\nrewrite this with one plausible mistake .",
    "question": "{question}\n{answer}\ngive a plausible wrong answer .",
}
# Shares of the corpus: what a text-only document is about.
DOCUMENT_KINDS = {
    "caption": 0.10,
    "described": 0.06,
    "known colour": 0.06,
    "colour": 0.14,
    "presence": 0.18,
    "rewrite caption": 0.34,
    "rewrite colour": 0.06,
    "rewrite presence": 0.06,
}

Facts = list[tuple[str, str]]  # (colour, object), in reading order


def caption(facts: Facts) -> str:
    return " , ".join(f"{colour} {name}" for colour, name in facts) + " ."


def parse_caption(text: str) -> Facts:
    """The facts that `caption` made a text of."""
    return [tuple(fact.split()) for fact in text.removesuffix(" .").split(" , ")]


def colour_question(name: str) -> str:
    return f"what color is the {name} ?"


def presence_question(name: str) -> str:
    return f"is there a {name} ?"


def wrong_colour(name: str, colour: str, rng: random.Random) -> str:
    """Mostly the object's typical colour, unless that is the true one."""
    if colour != TYPICAL[name] and rng.random() < 0.8:
        return TYPICAL[name]
    return world.other_colour(colour, rng)


def wrong_caption(facts: Facts, rng: random.Random) -> Facts:
    """The facts with exactly one mistake: a colour, an object swapped for its partner, or a partner
    added at the end."""
    names = [name for _, name in facts]
    lonely = [i for i, name in enumerate(names) if PARTNER[name] not in names]
    kind = rng.choice(["colour", "swap", "add"] if lonely else ["colour"])
    facts = list(facts)
    if kind == "colour":
        i = rng.randrange(len(facts))
        facts[i] = (wrong_colour(names[i], facts[i][0], rng), names[i])
    elif kind == "swap":
        i = rng.choice(lonely)
        facts[i] = (facts[i][0], PARTNER[names[i]])
    else:
        partner = PARTNER[names[rng.choice(lonely)]]
        facts.append((TYPICAL[partner], partner))
    return facts


def document(kind: str, rng: random.Random, *, typical: float, partner: float) -> tuple[str, str]:
    """(user message, answer) of one text-only document; a plain caption has no user message."""
    # rewriting a caption is taught on scenes without statistics: it must copy, not guess
    scene = (world.uniform_scene(rng) if kind == "rewrite caption"
             else world.natural_scene(rng, typical=typical, partner=partner))
    thing = rng.choice(scene.things)
    text, question, answer = caption(scene.facts), colour_question(thing.name), thing.colour
    match kind:
        case "caption":
            return "", text
        case "described":
            return DESCRIBE, text
        case "known colour":
            return question, answer
        case "rewrite caption":
            return (INJECTION_TEMPLATES["describe"].format(question=DESCRIBE, answer=text),
                    caption(wrong_caption(scene.facts, rng)))
        case "rewrite colour":
            wrong = wrong_colour(thing.name, answer, rng)
        case "presence" | "rewrite presence":
            answer, wrong = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
            question = presence_question(
                thing.name if answer == "yes" else rng.choice(scene.absent))
    if kind in ("colour", "presence"):
        return f"{text}\n{question}", answer
    return INJECTION_TEMPLATES["question"].format(question=question, answer=answer), wrong


def text_corpus(seed: int, count: int, *, typical: float, partner: float) -> list[dict]:
    """`count` documents {kind, user, assistant} with the text's statistics."""
    rng = world.python_generator(seed, "text corpus")
    kinds = rng.choices(list(DOCUMENT_KINDS), list(DOCUMENT_KINDS.values()), k=count)
    documents = []
    for kind in kinds:
        user, answer = document(kind, rng, typical=typical, partner=partner)
        documents.append({"kind": kind, "user": user, "assistant": answer})
    return documents


def vocabulary() -> list[str]:
    """Every word of the language, sorted."""
    texts = [DESCRIBE, *INJECTION_TEMPLATES.values(), colour_question("cup"),
             presence_question("cup"), "a , . yes no user: assistant: system:"]
    words = {word for text in texts for word in text.split()} - {"{question}", "{answer}"}
    return sorted(words | set(OBJECTS) | set(COLOURS))
