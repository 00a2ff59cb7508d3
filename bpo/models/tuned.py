"""A base model with the adapters of notebook 3, and a second checkpoint beside it, as the notebooks
after training ask them."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from bpo.models import checkpoint as checkpoints
from bpo.models.checkpoint import Checkpoint
from bpo.params import Refusal, Tuned
from bpo.study import stage as stages

RIVAL = "rival"  # the name under which a second, untuned checkpoint answers


def checkpoint_folders(p: Tuned) -> dict[str, Path]:
    """What a stage of `answered` reads of models, as its inputs."""
    named = {"model": p.model, "adapters": p.adapters, RIVAL: p.rival}
    return {name: p.path(folder) for name, folder in named.items() if folder}


def answered(p: Tuned, work: Callable[[Checkpoint, list[str], str], dict[str, list[dict]]]
             ) -> tuple[list[str], dict[str, list[dict]]]:
    """All methods, and lines by name with what all of them say; the rival is loaded when the base
    and its adapters are out of memory.

    work: (checkpoint, methods, stem of its files) -> name -> lines, each with dicts by method.
    """
    def first() -> tuple[list[str], dict[str, list[dict]]]:  # what it loads goes when it returns
        checkpoint, names = load_methods(p)
        return names, work(checkpoint, names, "answers")

    methods, lines = first()
    if not p.rival:
        return methods, lines
    gc.collect()
    torch.cuda.empty_cache()
    rival = checkpoints.load(p.path(p.rival), precision=p.precision, transform=p.image_transform)
    for name, more in work(rival, [RIVAL], RIVAL).items():
        lines[name] = [{n: v | other[n] if isinstance(v, dict) else v for n, v in line.items()}
                       for line, other in zip(lines[name], more, strict=True)]
    return ["base", RIVAL, *methods[1:]], lines


def load_methods(p: Tuned) -> tuple[Checkpoint, list[str]]:
    """The base model with one named adapter a method, and the names, "base" first.

    Methods come in the order in which notebook 3 trained them; raises Refusal if there is none.
    """
    adapters = p.path(p.adapters)
    names = [f.parent.parent.name for f in sorted(adapters.glob("*/adapter/adapter_config.json"))]
    if not names:
        raise Refusal(f"{adapters}: there are no adapters (METHOD/adapter/adapter_config.json); "
                      "notebook 3_dpo_training writes them")
    if (adapters / stages.MANIFEST).is_file():
        order = list(stages.read_manifest(adapters)["metrics"]["methods"])
        names.sort(key=lambda n: order.index(n) if n in order else len(order))
    base = checkpoints.load(p.path(p.model), precision=p.precision, transform=p.image_transform)
    tuned = checkpoints.load_adapters(base, {n: adapters / n / "adapter" for n in names})
    return tuned, ["base", *names]


def matched(p: Tuned) -> dict[str, str]:
    """DPO method -> the SFT on its own positives, as notebook 3 trained them; empty for adapters
    from elsewhere."""
    folder = p.path(p.adapters)
    if not (folder / stages.MANIFEST).is_file():
        return {}
    return {m: facts["matched"] for m, facts in stages.read_manifest(folder)["metrics"][
        "methods"].items() if "matched" in facts}
