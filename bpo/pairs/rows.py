"""Pairs as lines of pairs.jsonl, and as the rows that trainers take."""

from collections.abc import Sequence
from pathlib import Path

from bpo.pairs.methods import Line, learns_pairs, makers, matched
from bpo.params import Refusal
from bpo.study.files import LineFile


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


def to_preferences(lines: Sequence[Line], image_folder: Path, *, method: str = "bpo", seed: int = 0,
                   noise_step: int | None = None) -> list[dict]:
    """TRL's conversational preference rows {id, images, prompt, chosen, rejected}, one a pair that
    the method learns from; images are paths, to be opened when a batch is made. A column `weight`
    is there where a pair's is not 1. noise_step: of answers to noised images those at this step
    alone."""
    pairs = [k for k in makers()[method][1](lines, seed)
             if noise_step in (None, k["answer"].get("step", noise_step))]
    weighted = any(k["answer"].get("weight", 1.0) != 1.0 for k in pairs)
    return [{"id": k["id"],
             "images": [] if k["image"] is None else [str(image_folder / k["image"])],
             "prompt": k["prompt"], "chosen": [{"role": "assistant", "content": k["chosen"]}],
             "rejected": [{"role": "assistant", "content": k["rejected"]}],
             **({"weight": k["answer"].get("weight", 1.0)} if weighted else {})} for k in pairs]


def to_completions(rows: Sequence[dict]) -> list[dict]:
    """The positives of preference rows for SFT, in the same order and as often."""
    return [{"id": r["id"], "images": r["images"], "prompt": r["prompt"], "completion": r["chosen"]}
            for r in rows]


def training_rows(method: str, lines: Sequence[Line], image_folder: Path, *, seed: int,
                  noise_step: int | None = None) -> list[dict]:
    """The rows that a method trains on, in TRL's layout. sft: every positive once."""
    if method == "sft":
        return [{"id": k["id"], "images": [str(image_folder / k["image"])], "prompt": k["prompt"],
                 "completion": [{"role": "assistant", "content": k["chosen"]}]} for k in lines]
    learnt = matched().get(method, "bpo" if method == "sft_compute" else method)
    rows = to_preferences(lines, image_folder, method=learnt, seed=seed, noise_step=noise_step)
    return rows if learns_pairs(method) else to_completions(rows)
