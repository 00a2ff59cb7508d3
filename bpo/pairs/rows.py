"""Pairs as lines of pairs.jsonl, and as the rows that trainers take."""

import re
from collections.abc import Sequence
from pathlib import Path

from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.models.weakening import WEAKENINGS
from bpo.params import PairGeneration, Refusal
from bpo.study.files import LineFile


def special(p: PairGeneration) -> re.Pattern:
    """The tokens that no text may hold: those of the checkpoint and of the text model."""
    readers = [checkpoints.load_without_weights(p.path(p.model)).processor]
    if "injected" in p.sources and p.text_model and not p.endpoint:
        readers.append(checkpoints.load_tokenizer(p.path(p.text_model)))
    return encoding.special(*readers)


def read_pairs(file: Path) -> list[dict]:
    """The lines of a pairs.jsonl; raises Refusal when the file is missing or holds none."""
    if not file.is_file():
        raise Refusal(f"{file}: there is no such file of pairs; notebooks/2_pair_generation.ipynb "
                      "writes it")
    lines: list[dict] = []
    try:
        lines.extend(LineFile(file))
    except ValueError:
        raise Refusal(f"{file}: line {len(lines) + 1} is not JSON") from None
    usable = all(isinstance(line, dict) and {"id", "image", "prompt", "chosen",
                                             "rejected"} <= line.keys() for line in lines)
    if not lines or not usable:
        raise Refusal(f"{file}: must hold lines with id, image, prompt, chosen and rejected")
    return lines


def rejected_for(pair: dict, method: str) -> list[dict]:
    """The rejected answers of a positive that a method learns from, by the method's name.

    bpo: all. bpo_weaken, bpo_inject: of one source. bpo_<mode>: of one way of weakening.
    bpo_unselected: as many as were selected, drawn at random from the same candidates.
    """
    if method == "bpo_unselected":
        return pair.get("unselected", [])
    source = {"bpo_weaken": "weakened", "bpo_inject": "injected"}.get(method)
    mode = method.removeprefix("bpo_")
    return [r for r in pair["rejected"] if source in (None, r["source"])
            and (mode not in WEAKENINGS or r.get("mode") == mode)]


def to_preferences(pairs: Sequence[dict], image_folder: Path, *, method: str = "bpo") -> list[dict]:
    """TRL's conversational preference rows {id, images, prompt, chosen, rejected}, one a rejected
    answer that the method learns from; images are paths, to be opened when a batch is made."""
    return [{"id": k["id"], "images": [str(image_folder / k["image"])], "prompt": k["prompt"],
             "chosen": [{"role": "assistant", "content": k["chosen"]}],
             "rejected": [{"role": "assistant", "content": r["text"]}]}
            for k in pairs for r in rejected_for(k, method)]


def to_completions(rows: Sequence[dict]) -> list[dict]:
    """The positives of preference rows for SFT, in the same order and as often."""
    return [{"id": r["id"], "images": r["images"], "prompt": r["prompt"], "completion": r["chosen"]}
            for r in rows]
