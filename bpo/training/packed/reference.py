"""Log-probs of answers under the untouched model, computed once and kept in files.

A file holds those of some answers under one model. What was kept under another model, or for other
tokens, pixels or image preparation, has another key and is not found.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

SUFFIX = ".safetensors"


def model_key(model: torch.nn.Module) -> str:
    """sha256 over names, types and values of all weights that no training moves.

    Adapters that train are left out: the reference is the model with them off.
    """
    digest = hashlib.sha256()
    adapted = hasattr(model, "peft_config")
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        if adapted and weight.requires_grad:
            continue
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Cache:
    """Answer's key -> log p of each of its tokens, under the model with `key`, below `folder`."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.answers: dict[str, torch.Tensor] = {}
        self.new: dict[str, torch.Tensor] = {}
        self.others = 0  # answers found that are another model's
        self._seen: set[Path] = set()

    def read(self, folders: Iterable[Path] = ()) -> None:
        """Takes in what the folder holds, and further ones that are only read."""
        for file in [f for folder in (self.folder, *folders)
                     for f in sorted(folder.glob(f"*{SUFFIX}")) if f not in self._seen]:
            self._seen.add(file)
            with safe_open(file, "pt") as stored:
                if (stored.metadata() or {}).get("model") == self.key:
                    self.answers |= {n: stored.get_tensor(n) for n in stored.keys()}
                else:
                    self.others += len(stored.keys())

    def add(self, answers: Mapping[str, torch.Tensor]) -> None:
        """Takes in answers just computed; one that is known stays as it is."""
        new = {n: v for n, v in answers.items() if n not in self.answers}
        self.new |= new
        self.answers |= new

    def write(self) -> None:
        """Keeps what was added since, in a file of its own, whole or not at all."""
        if not self.new:
            return
        name = hashlib.sha256("".join([self.key, *self.new]).encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two processes may have come to the same answers.
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        file = self.folder / f"{name}{SUFFIX}"
        save_file(self.new, temporary, metadata={"model": self.key})
        temporary.replace(file)
        self._seen.add(file)
        self.new = {}


class Keeper(TrainerCallback):
    """Writes what each process computed, before a checkpoint counts on it, and shares it."""

    def __init__(self, cache: Cache, accelerator: Accelerator):
        self.cache, self.accelerator = cache, accelerator

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.cache.write()

    on_train_end = on_save

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.cache.write()
        self.accelerator.wait_for_everyone()
        self.cache.read()
