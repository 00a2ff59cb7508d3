"""What each training method learns from, a registry: an entry of `PAIRS` adds a method and the SFT
on its own positives. Parameters are checked against the names: this module loads without torch.

A method whose name begins with bpo learns from pairs; sft_matched from the chosen answers of bpo's
pairs and sft_matched_X from those of bpo_X, the same rows in the same order and as often: what the
method adds to them is the contrast alone.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bpo.models.weakening import WEAKENINGS
from bpo.study.seeds import seed_for
from bpo.study.text import normalised

Line = Mapping[str, Any]  # of pairs.jsonl
# {id, image, category, prompt, chosen, rejected} with both answers as texts and None for no image,
# and "answer": the line's own entry of the rejected answer.
Pair = dict[str, Any]


def learns_pairs(method: str) -> bool:
    """Whether a method learns from pairs (DPO); the others from positives alone (SFT)."""
    return method.startswith("bpo")


def every(lines: Sequence[Line], seed: int = 0, *, among: str = "rejected", **wanted: str
          ) -> list[Pair]:
    """A pair for each rejected answer, or for each whose entry has the wanted values."""
    return [{n: line.get(n, "") for n in ("id", "image", "category", "prompt", "chosen")}
            | {"rejected": r["text"], "answer": r}
            for line in lines for r in line.get(among, ()) if wanted.items() <= r.items()]


def exchanged(lines: Sequence[Line], seed: int) -> list[Pair]:
    """Chosen and rejected answer in each other's place."""
    return [k | {"chosen": k["rejected"], "rejected": k["chosen"]} for k in every(lines)]


def blind(lines: Sequence[Line], seed: int) -> list[Pair]:
    """The pairs without their image."""
    return [k | {"image": None} for k in every(lines)]


def shuffled(lines: Sequence[Line], seed: int) -> list[Pair]:
    """Each pair with the rejected answer of the next one round a shuffled circle of its category
    that is another row's and is not the chosen answer; without one it is left out."""
    pairs, circles, given = every(lines), defaultdict(list), {}
    for number, pair in enumerate(pairs):
        circles[pair["category"]].append(number)
    for category, numbers in circles.items():
        random.Random(seed_for(seed, "shuffled", category)).shuffle(numbers)
        for place, number in enumerate(numbers):
            pair = pairs[number]
            others = (pairs[n] for n in (*numbers[place + 1:], *numbers[:place]))
            given[number] = next((k["rejected"] for k in others if k["id"] != pair["id"] and
                                  normalised(k["rejected"]) != normalised(pair["chosen"])), None)
    return [k | {"rejected": given[n]} for n, k in enumerate(pairs) if given[n] is not None]


def edited(lines: Sequence[Line], seed: int) -> list[Pair]:
    """Each pair with a random edit of its chosen answer: one word in place of another that the
    model's own answers to the row have not, of those that follow the same word in a chosen answer
    of the category, or of all chosen answers where none does."""
    follow, out = defaultdict(set), []
    for line in lines:
        words = line["chosen"].split()
        for before, word in zip(["", *words], words, strict=False):
            follow[line.get("category", ""), before].add(word)
    vocabulary = set().union(*follow.values())
    for line in lines:
        words = line["chosen"].split()
        said = {word for r in line["rejected"] for word in r["text"].split()} | set(words)

        near = [follow[line.get("category", ""), before] - said for before in ["", *words[:-1]]]
        if not any(near):
            near = [vocabulary - said] * len(words)
        texts = [" ".join([*words[:place], word, *words[place + 1:]])
                 for place, others in enumerate(near) for word in sorted(others)]
        texts = [t for t in texts if normalised(t) != normalised(line["chosen"])]
        random.Random(seed_for(seed, "edited", line["id"])).shuffle(texts)
        out += [k | {"rejected": text} for k, text in zip(every([line]), itertools.cycle(texts),
                                                          strict=False)]
    return out


def own(lines: Sequence[Line], seed: int) -> list[Pair]:
    """The model's own answer to the clean image in place of the annotated one."""
    return [k | {"chosen": line["own"]} for line in lines if "own" in line
            for k in every([line]) if normalised(k["rejected"]) != normalised(line["own"])]


def third(lines: Sequence[Line], seed: int, *, easy: bool) -> list[Pair]:
    """The third of the pairs, of each category, that the model before training tells apart best
    (easy) or worst, by the log-prob a token of chosen minus rejected."""
    categories, taken = defaultdict(list), set()
    pairs = every(lines)
    for number, pair in enumerate(pairs):
        if "margin" in pair["answer"].get("scores", {}):
            categories[pair["category"]].append(number)
    for numbers in categories.values():
        numbers.sort(key=lambda n: pairs[n]["answer"]["scores"]["margin"], reverse=easy)
        taken |= set(numbers[:len(numbers) // 3])
    return [pair for number, pair in enumerate(pairs) if number in taken]


# name -> (what it learns from, in a line; (lines, seed) -> its pairs)
PAIRS: dict[str, tuple[str, Callable[[Sequence[Line], int], list[Pair]]]] = {
    "bpo": ("every rejected answer", every),
    "bpo_weaken": ("answers to the weakened image alone", partial(every, source="weakened")),
    "bpo_inject": ("injected errors alone", partial(every, source="injected")),
    "bpo_unselected": ("as many candidates, drawn at random: what selection does",
                       partial(every, among="unselected")),
    "bpo_reversed": ("chosen and rejected in each other's place: what is measured must move the "
                     "other way", exchanged),
    "bpo_blind": ("bpo's pairs with the image left out: what contrast teaches without looking, "
                  "as mDPO asked", blind),
    "bpo_shuffled": ("rejected answers of other rows: whether they must be about this image",
                     shuffled),
    "bpo_edited": ("rejected: one word of the chosen answer exchanged at random: whether they must "
                   "be the prior's", edited),
    "bpo_own": ("chosen: the model's own answer to the clean image where it is right, or where the "
                "truth is not known: SeVa's way", own),
    "bpo_easy": ("the third of the pairs that the model tells apart best", partial(third,
                                                                                  easy=True)),
    "bpo_hard": ("the third of the pairs that it tells apart worst", partial(third, easy=False))}


def makers() -> dict[str, tuple[str, Callable[[Sequence[Line], int], list[Pair]]]]:
    """`PAIRS` and a method for each way of weakening."""
    return PAIRS | {f"bpo_{way}": (f"answers to the image weakened by {way} alone",
                                   partial(every, mode=way)) for way in WEAKENINGS}


def matched() -> dict[str, str]:
    """SFT -> the DPO method on whose chosen answers it trains."""
    return {f"sft_matched{name.removeprefix('bpo')}": name for name in makers()}


def meanings() -> dict[str, str]:
    """Every method with its line of meaning."""
    return {"sft": "SFT on every annotated answer once",
            **{sft: f"SFT on the chosen answers of {name}'s pairs, in their order and as often"
               for sft, name in matched().items()},
            "sft_compute": "sft_matched for as many steps as spend the compute of bpo",
            **{name: f"DPO on {meaning}" for name, (meaning, _) in makers().items()}}
