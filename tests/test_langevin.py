"""Eq. 3: a step with fixed mask against its law, and the exact inner loop against the closed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import data
from torch import Tensor

from oag_transform import OnlineAlternateGenerator
from oag_transform.generator import langevin


@given(step_size=st.floats(0.01, 0.99), steps=st.integers(1, 60), start=st.floats(-50, 50), mode=st.floats(-50, 50))
def test_mean_and_variance_of_the_law(step_size: float, steps: int, start: float, mode: float) -> None:
    """The recursions of Eq. 3 for the mean and the variance, step by step, against the closed form."""
    mean, variance = start, 0.0
    for _ in range(steps):
        mean = mean - step_size**2 / 2 * (mean - mode)
        variance = (1 - step_size**2 / 2) ** 2 * variance + step_size**2

    def draw(normal: float) -> Tensor:
        state = torch.tensor([[start], [mode], [normal]], dtype=torch.float64)
        return langevin.step(*state, step_size=step_size, steps=steps)

    assert draw(0).item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert (draw(1) - draw(0)).item() == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-9)


def test_one_step_is_equation_3() -> None:
    generator = torch.Generator().manual_seed(0)
    image, gradient, normal = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    e = 0.3
    expected = image - e**2 / 2 * (image - gradient) + e * normal
    actual = langevin.step(image.clone(), gradient, normal, step_size=e, steps=1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_many_single_steps_have_the_moments_of_one_long_step() -> None:
    """Monte Carlo over 200,000 pixels: 5 standard errors of a mean and of a variance."""
    n, steps, e = 200_000, 20, 0.3
    generator = torch.Generator().manual_seed(1)
    mode = torch.full((n,), 3.0, dtype=torch.float64)
    single, long = (torch.full((n,), -2.0, dtype=torch.float64) for _ in range(2))
    for _ in range(steps):
        langevin.step(single, mode, torch.empty_like(mode).normal_(generator=generator), step_size=e, steps=1)
    langevin.step(long, mode, torch.empty_like(mode).normal_(generator=generator), step_size=e, steps=steps)
    std = single.std().item()
    assert abs(single.mean().item() - long.mean().item()) < 5 * std * math.sqrt(2 / n)
    assert abs(single.var().item() - long.var().item()) < 5 * std**2 * math.sqrt(4 / n)


def test_any_number_of_steps_costs_the_same() -> None:
    """A sum over as many terms would not end."""
    steps = 10**15
    decay, std = langevin.law(0.3, steps)
    assert decay == 0
    assert std == pytest.approx(math.sqrt(langevin.stationary_variance(0.3)), rel=1e-12)
    assert langevin.law(0.0, steps) == (1, 0)
    assert langevin.law(1e-12, steps)[1] == pytest.approx(1e-12 * math.sqrt(steps), rel=1e-8)  # next to no decay


def test_stationary_variance_is_the_fixed_point() -> None:
    e = 0.3
    variance = langevin.stationary_variance(e)
    assert (1 - e**2 / 2) ** 2 * variance + e**2 == pytest.approx(variance, rel=1e-12)


def test_exact_and_closed_form_make_the_same_image() -> None:
    """The PSNR to the input, which differs by the fixed mask and by the draw, agrees to 0.3 dB."""
    image = torch.from_numpy(np.ascontiguousarray(data.astronaut()[:224, 100:324])).permute(2, 0, 1) / 255

    def psnr(purified: Tensor) -> float:
        return -10 * math.log10((purified - image).square().mean().item())

    closed, exact = (
        psnr(OnlineAlternateGenerator(langevin=kind, network_steps=30, image_steps=20, momentum=0, filters=32, seed=0)(image))
        for kind in ("closed_form", "exact")
    )
    assert closed > 20  # a picture, not a failure shared by both
    assert abs(closed - exact) < 0.3
