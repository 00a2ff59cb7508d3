"""Seeds by name: every random draw of a study comes from (seed, what it is for).

A draw that is named by its row and its purpose does not depend on the order or the batch in which
rows are processed, so a resumed or a sharded run equals an uninterrupted one.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *purpose: object) -> int:
    """A 63-bit seed for the draw named by `purpose` (texts, numbers) under a study's `seed`."""
    text = "\x1f".join([str(int(seed)), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *purpose: object) -> "torch.Generator":
    """A CPU generator: draws are made on the CPU so that they are the same on every device."""
    import torch  # here: the ways of weakening are named without it

    return torch.Generator("cpu").manual_seed(seed_for(seed, *purpose))


def numpy_generator(seed: int, *purpose: object) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, *purpose))
