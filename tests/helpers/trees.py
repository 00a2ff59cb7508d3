"""Preference rows that share images, prompts and turns, and layouts of trees with a fault each."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from helpers.data import picture, said

WORDS = "red green blue yellow no yes a big small hot box cat dog disc mat".split()
ASKED = "what colour is the disc ? describe the picture and answer the question".split()


def questions(counts: Sequence[int], *, number: int = 0, turns: bool = False, pictures: int = 1
              ) -> list[dict[str, Any]]:
    """So many rejected answers to each of several questions about one image (or several images of
    different shapes); turns: each question follows the last one and its chosen answer."""
    draw, rows, before = random.Random(number), [], []
    images = [picture("disc", "red", 9 * number + n, (32 + 8 * number, 32 + 16 * n))
              for n in range(pictures)]
    for n, count in enumerate(counts):
        prompt = [*before, *said("user", " ".join(draw.choices(ASKED, k=3 + n)))]
        chosen, *rejected = (said("assistant", " ".join(
            [first, *draw.choices(WORDS, k=draw.randint(1, 6))])) for first in WORDS[:count + 1])
        rows += [{"images": images, "prompt": prompt, "chosen": chosen, "rejected": r}
                 for r in rejected]
        before = [*prompt, *chosen] if turns else []
    return rows


def alike() -> list[dict[str, Any]]:
    """Answers of which one begins as another does, or is the whole begin of it."""
    return [{**row, "chosen": said("assistant", "a red box on the mat"),
             "rejected": said("assistant", text)}
            for row, text in zip(questions((2, 2)), ("a red box", "a red hot box", "a", "a red"),
                                 strict=True)]


SHAPES = {
    "three questions, one rejected": questions((1, 1, 1)),
    "three questions, two rejected": questions((2, 2, 2)),
    "ragged": questions((3, 1, 2)),
    "three images": [r for n in range(3) for r in questions((2, 2, 2), number=n)],
    "four turns": questions((2, 2, 2, 2), turns=True),
    "turns of two images": [r for n in range(2) for r in questions((1, 3, 2), number=n,
                                                                   turns=True)],
    "answers that begin alike": alike(),
    "two images a row": questions((2, 1), pictures=2),
}


# Layouts with a fault


def siblings_seen(placed: dict[str, Any]) -> dict[str, Any]:
    table, begin = [], 0
    for row, first, last, *above in placed["table"]:
        begin = begin if above else first
        table.append((row, first, last, *([begin, first] if above else [])))
    return {**placed, "table": table}


def neighbour_seen(placed: dict[str, Any]) -> dict[str, Any]:
    """One token of the branch before, where that is not its own path."""
    return {**placed, "table": [
        (row, first, last, *above, *([first - 1, first] if above and above[-1] != first else []))
        for row, first, last, *above in placed["table"]]}


def running_on(placed: dict[str, Any]) -> dict[str, Any]:
    """Positions are the places in the row."""
    begins = torch.zeros_like(placed["step"])
    for row, first, _, *above in placed["table"]:
        if not above:
            begins[row, first:] = first
    return {**placed, "anchor": placed["source"].gather(1, begins),
            "step": torch.arange(begins.shape[1]) - begins}


def too_early(placed: dict[str, Any]) -> dict[str, Any]:
    step = placed["step"].clone()
    for row, first, last, *above in placed["table"]:
        step[row, first:last] -= int(bool(above))
    return {**placed, "step": step}


def ancestor_forgotten(placed: dict[str, Any]) -> dict[str, Any]:
    """A branch on a branch does not see that."""
    return {**placed, "table": [b[:-2] if len(b) > 5 else b for b in placed["table"]]}


FAULTS = {f.__name__: f for f in (siblings_seen, neighbour_seen, running_on, too_early)}
