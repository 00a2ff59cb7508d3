"""The noise schedule, seeded noise on pixels, and seeds by name."""

import numpy as np
import pytest
import torch

from bpo.models import noise
from bpo.study import seeds

# sqrt(abar_t), the share of the picture's amplitude that is left, to three decimals.
AMPLITUDES = {300: 0.981, 500: 0.863, 600: 0.734, 700: 0.593, 800: 0.467, 900: 0.365, 999: 0.285}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_schedule_falls_strictly_by_the_known_amplitudes():
    shares = noise.alpha_bars()
    assert shares.shape == (noise.STEPS,)
    assert shares[0] > 0.9999
    assert (shares[1:] < shares[:-1]).all()
    assert {step: round(float(shares[step]) ** 0.5, 3) for step in AMPLITUDES} == AMPLITUDES


def test_the_clean_image_has_no_noise_at_all():
    pixels = torch.rand(1, 3, 8, 8)
    assert noise.add_noise(pixels, 0, generator()) is pixels


def test_noise_mixes_signal_and_a_standard_normal_draw():
    pixels = torch.rand(1, 3, 8, 8, generator=generator(5))
    share = float(noise.alpha_bars()[600])
    eps = torch.randn(pixels.shape, generator=generator(1))
    wanted = share**0.5 * pixels + (1 - share) ** 0.5 * eps
    assert torch.allclose(noise.add_noise(pixels, 600, generator(1)), wanted, atol=1e-6)


def test_the_same_generator_gives_the_same_noise_and_another_gives_another():
    pixels = torch.rand(3, 8, 8)
    before = pixels.clone()
    first = noise.add_noise(pixels, 500, generator(1))
    assert torch.equal(first, noise.add_noise(pixels, 500, generator(1)))
    assert not torch.allclose(first, noise.add_noise(pixels, 500, generator(2)))
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("step", (100, 600, 999))
def test_pixels_of_unit_variance_keep_it(step):
    pixels = torch.randn(200_000, generator=generator(7))
    noised = noise.add_noise(pixels, step, generator(8))
    assert abs(noised.var().item() - 1) < 0.02
    left = float(noise.alpha_bars()[step]) ** 0.5
    assert abs(torch.corrcoef(torch.stack([pixels, noised]))[0, 1].item() - left) < 0.01


def test_the_number_format_of_the_pixels_is_kept():
    pixels = torch.rand(3, 4, 4)
    full = noise.add_noise(pixels, 600, generator(3))
    half = noise.add_noise(pixels.bfloat16(), 600, generator(3))
    assert full.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.allclose(full, half.float(), atol=0.05)


@pytest.mark.parametrize("step", (-1, 1000))
def test_steps_outside_the_schedule_are_refused(step):
    with pytest.raises(ValueError, match=f"noise step {step} is outside"):
        noise.add_noise(torch.zeros(1), step, generator())


def test_a_name_always_gives_the_same_seed():
    # Written down: draws must not change from one release of the kit to the next.
    assert seeds.seed_for(0, "noise", "row", 600) == 5113236905594666348
    assert 0 <= seeds.seed_for(0, "noise", "row", 600) < 2**63


def test_seed_purpose_and_parts_all_count():
    named = [seeds.seed_for(0, "a"), seeds.seed_for(1, "a"), seeds.seed_for(0, "b"),
             seeds.seed_for(0, "a", 1), seeds.seed_for(0, "a", 11), seeds.seed_for(0, "a", 1, 1),
             seeds.seed_for(0, "a1"), seeds.seed_for(0)]
    assert len(set(named)) == len(named)


def test_draws_do_not_depend_on_the_order_they_are_made_in():
    rows = ["a", "b", "c"]

    def draw(row):
        return torch.rand(4, generator=seeds.torch_generator(3, "weakened", row))

    forward = {r: draw(r) for r in rows}
    backward = {r: draw(r) for r in reversed(rows)}
    assert all(torch.equal(forward[r], backward[r]) for r in rows)
    assert not torch.equal(forward["a"], forward["b"])


def test_generators_are_reproducible_and_leave_the_global_state_alone():
    torch.manual_seed(1)
    undisturbed = torch.rand(2)
    torch.manual_seed(1)
    seeds.torch_generator(0, "x")
    assert torch.equal(torch.rand(2), undisturbed)
    first, again, other = (seeds.numpy_generator(s, "x").random(3) for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
