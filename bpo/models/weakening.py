"""Ways of weakening an image, a registry: one entry in WEAKENINGS adds one, by its name in
`weaken_modes` and `damage`, and the method `bpo_<name>` that learns from its answers alone.
Parameters are checked against the names, so this module loads without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

from bpo.study.seeds import numpy_generator, torch_generator

if TYPE_CHECKING:
    from torch import Tensor

LAST_STEP = 999  # of noise, and of every other way that takes a step


@dataclass(frozen=True)
class Weakening:
    """One way of weakening an image: at least one of its two functions, and what it wants.

    picture: (image, draw) -> the weakened image, before the processor.
    pixels: (the processor's pixels of one image, draw) -> the weakened ones. With both, the model
        reads `pixels`, and `picture` is what people and a collator of pictures are given.
    mix: (clean, weakened, strength, cutoff) -> what the next token is drawn from. The first two are
        (B, vocabulary) log-probs of two branches. None: the weakened image alone answers.
    stepped: whether it takes a step, 0 to 999. drawn: whether two draws differ. other: whether it
    wants another row's image.
    """

    name: str
    meaning: str
    picture: "Callable[[Image.Image, Draw], Image.Image] | None" = None
    pixels: "Callable[[Tensor, Draw], Tensor] | None" = None
    mix: "Callable[[Tensor, Tensor, float, float], Tensor] | None" = None
    stepped: bool = False
    drawn: bool = True
    other: bool = False


@dataclass(frozen=True)
class View:
    """A way of weakening an image with its draw's number, for noise and fade the step, and for crop
    the share of each side that is left."""

    mode: str
    step: int = 0
    draw: int = 0
    crop_share: float = 1.0

    @property
    def way(self) -> Weakening:
        return WEAKENINGS[self.mode]

    @property
    def name(self) -> str:
        step = f"-{self.step}" if self.way.stepped else ""
        draw = f"-{self.draw}" if self.way.drawn else ""
        return self.mode + step + draw

    @property
    def two_branches(self) -> bool:
        return self.way.mix is not None


@dataclass(frozen=True)
class Draw:
    """What a way of weakening may use beside the image; row: its id, for a draw of its own."""

    view: View
    row: str
    seed: int
    processor: Any
    other: Image.Image | None = None


def noise(pixels: "Tensor", draw: Draw) -> "Tensor":
    """x_t of arXiv 2403.08730 by the row's own draw, the same for all ways that noise."""
    from bpo.models import encoding  # here: it loads torch

    generator = torch_generator(draw.seed, "noise", draw.row, draw.view.step, draw.view.draw)
    return encoding.noised(draw.processor, pixels, draw.view.step, generator)


def crop(image: Image.Image, draw: Draw) -> Image.Image:
    """A piece of the image at a random place, in the image's size."""
    rng = numpy_generator(draw.seed, "crop", draw.row, draw.view.draw)
    width, height = (max(1, round(side * draw.view.crop_share)) for side in image.size)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    piece = image.crop((left, top, left + width, top + height))
    return piece.resize(image.size, Image.Resampling.BICUBIC)


def fade(image: Image.Image, draw: Draw) -> Image.Image:
    """(1 − s) image + s blur(image), with s = step / 999. The blur's standard deviation is the
    longer side, so that at the last step no outline and no place of a colour is left."""
    blurred = image.filter(ImageFilter.GaussianBlur(max(image.size)))
    return Image.blend(image, blurred, draw.view.step / LAST_STEP)


def blank(image: Image.Image, draw: Draw) -> Image.Image:
    """The colour that the processor normalises to zero."""
    from bpo.models import encoding  # here: it loads torch

    return Image.new("RGB", image.size, encoding.mean_colour(draw.processor))


def swap(image: Image.Image, draw: Draw) -> Image.Image:
    """Another row's image in this one's size: the prompt keeps its number of image tokens."""
    return draw.other.resize(image.size)


def more_weakened(clean: "Tensor", weakened: "Tensor", strength: float, cutoff: float) -> "Tensor":
    """(1 + a) weakened - a clean, without a mask."""
    return (1 + strength) * weakened - strength * clean


def less_weakened(clean: "Tensor", weakened: "Tensor", strength: float, cutoff: float) -> "Tensor":
    """(1 + a) clean - a weakened, tokens below `cutoff` times the clean image's likeliest one
    masked: visual contrastive decoding, arXiv 2311.16922, eq. 3 and 5."""
    mixed = (1 + strength) * clean - strength * weakened
    if cutoff:
        floor = clean.amax(dim=1, keepdim=True) + float(np.log(cutoff))
        mixed = mixed.masked_fill(clean < floor, -np.inf)
    return mixed


WEAKENINGS = {way.name: way for way in (
    Weakening("noisy", "the noised image √ᾱ_t x_0 + √(1 − ᾱ_t) ε at each of weaken_steps answers "
                       "alone: the paper's way", pixels=noise, stepped=True),
    Weakening("reverse_contrast", "(1 + a) ℓ(noised) − a ℓ(clean): what the prior says more of, "
                                  "with a = contrast_strength and ℓ the next token's log-prob",
              pixels=noise, mix=more_weakened, stepped=True),
    Weakening("contrast", "(1 + a) ℓ(clean) − a ℓ(noised), unlikely tokens masked: visual "
                          "contrastive decoding, which lessens hallucination; for comparison",
              pixels=noise, mix=less_weakened, stepped=True),
    Weakening("crop", "a piece of the image at a random place, crop_share of each side",
              picture=crop),
    Weakening("fade", "the image mixed with its own blur, of which step t takes the share t / 999: "
                      "it grows faint and no false trace comes in", picture=fade, stepped=True,
              drawn=False),
    # Zeros are what `blank` gives but for the rounding to 256 levels.
    Weakening("blank", "the processor's mean colour: no image at all", picture=blank,
              pixels=lambda pixels, draw: pixels.new_zeros(pixels.shape), drawn=False),
    Weakening("swapped", "another row's image: the wrong one", picture=swap, other=True))}
