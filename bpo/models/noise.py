"""The diffusion schedule of image weakening and seeded noise on normalised pixels.

The schedule is the one that the paper's release uses (arXiv 2403.08730), after Visual Contrastive
Decoding (arXiv 2311.16922): 1000 steps, beta rising along a sigmoid.
"""

import functools

import torch

STEPS = 1000


@functools.cache
def alpha_bars() -> torch.Tensor:
    """(1000,) float64: abar_t = prod_{s <= t} (1 - beta_s), the share of signal power at step t.

    beta_t = sigmoid(linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    """
    ramp = torch.sigmoid(torch.linspace(-6, 6, STEPS, dtype=torch.float64))
    return torch.cumprod(1 - (ramp * (0.5e-2 - 1e-5) + 1e-5), dim=0)


def add_noise(pixels: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps on the processor's normalised pixels.

    pixels: any shape, the output of the image processor for one image; it is not changed.
    step: 0 .. 999; 0 returns the clean pixels themselves, so that "no noise" is exactly that.
    generator: a CPU generator; eps is drawn in float32, so it is the same on every device.
    """
    if not 0 <= step < STEPS:
        raise ValueError(f"noise step {step} is outside 0 .. {STEPS - 1}")
    if step == 0:
        return pixels
    share = float(alpha_bars()[step])
    eps = torch.randn(pixels.shape, generator=generator, dtype=torch.float32)
    return share**0.5 * pixels + (1 - share) ** 0.5 * eps.to(pixels)
