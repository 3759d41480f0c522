"""The barrage of random transforms: each group against its definition or scikit-image, the draws, the gradient."""

import math
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from skimage import color
from torch import Generator, Tensor

from oag_transform.baselines import barrage
from oag_transform.baselines.barrage import BaRT

from .test_filters import rand, smooth

GROUPS: Any = barrage._GROUPS
every = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)


def draw(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def test_there_are_ten_groups_and_zero_groups_change_nothing() -> None:
    image = rand(1, 3, 12, 12)
    assert len(GROUPS) == 10
    assert torch.equal(BaRT(0, seed=1)(image), image)


def test_an_image_gets_k_different_groups_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups append digits to a number, which shows the selected groups and their order."""
    monkeypatch.setattr(barrage, "_GROUPS", tuple((lambda i, _, n=n: i / 16 + n / 16) for n in range(10)))
    orders = []
    for value in BaRT(4, seed=0)(torch.zeros(200, 3, 1, 1, dtype=torch.float64))[:, 0, 0, 0].tolist():
        digits = round(value * 16**4)
        orders.append([digits >> 4 * place & 15 for place in range(4)])
    assert all(len(set(order)) == 4 for order in orders)
    for place in range(4):  # each of the ten groups stands at each place in a tenth of the images
        counts = Counter(order[place] for order in orders)
        assert set(counts) == set(range(10))
        assert max(counts.values()) < 20 + 5 * math.sqrt(200 * 0.1 * 0.9)


def test_grey_images_have_no_groups_of_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def counted(image: Tensor, _: Generator) -> Tensor:
        called.append(len(image))
        return image

    for name in ("_color_space", "_grey_mix"):
        monkeypatch.setattr(barrage, name, lambda image, draw, _=name: counted(image, draw))
    monkeypatch.setattr(barrage, "_GROUPS", (barrage._color_space, barrage._grey_mix, lambda image, _: 1 - image))
    grey = rand(5, 1, 4, 4)
    torch.testing.assert_close(BaRT(3, seed=0)(grey), 1 - grey)
    assert not called
    BaRT(3, seed=0)(rand(1, 3, 4, 4))
    assert len(called) == 2


@every
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(1, 1), (2, 7), (32, 32)])
def test_each_group_keeps_the_shape_and_has_a_finite_gradient(group: Any, channels: int, sides: tuple[int, int]) -> None:
    if channels == 1 and group.__name__ in ("_color_space", "_grey_mix"):
        pytest.skip("no colours")
    for seed in range(12):
        for image in (rand(1, channels, *sides, seed=seed), torch.full((1, channels, *sides), 0.25, dtype=torch.float64)):
            image.requires_grad_()
            result = group(image, draw(seed))
            assert (result.shape, result.dtype) == (image.shape, image.dtype)
            assert result.isfinite().all()
            (slope,) = torch.autograd.grad(result.sum(), image)
            assert slope.isfinite().all()


def test_color_precision_leaves_few_levels() -> None:
    image = rand(1, 3, 64, 64)
    for seed in range(20):
        result = barrage._color_precision(image, draw(seed))
        assert all(8 < len(channel.unique()) <= 201 for channel in result[0])
        assert (result - image).abs().max() <= 0.5 / 8


def test_zoom_shows_a_part_of_the_image() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 256), torch.linspace(0, 1, 256), indexing="ij")
    for seed in range(10):
        ((down, right),) = barrage._zoom(torch.stack([y, x])[None], draw(seed))
        for axis in (down[:, 128], right[128]):
            first, last = 255 * axis[0].item(), 255 * (1 - axis[-1].item())
            assert 9.5 <= first <= 50.5
            assert 9.5 <= last <= 50.5


def test_fourier_keeps_the_mean_within_two_percent() -> None:
    image = rand(1, 3, 32, 32)
    for seed in range(10):
        mean = barrage._fourier(image, draw(seed)).mean((2, 3)) / image.mean((2, 3))
        kept = mean[mean > 0.5]  # a share so small that not even the mean is kept gives nothing
        assert ((kept - 1).abs() <= 0.02 + 1e-9).all()


@pytest.mark.parametrize("index", range(4))
def test_colour_spaces_are_scikit_images(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All changes are at half of their range; XYZ differs between libraries and is not compared."""
    name, most, _, _ = barrage._COLOR_SPACES[index]
    if name == "xyz":
        pytest.skip("another convention")
    image = 0.3 + 0.4 * rand(1, 3, 6, 6)
    monkeypatch.setattr(barrage, "draw_integer", lambda *_: index)
    monkeypatch.setattr(barrage, "draw_uniform", lambda low, high, _: high / 2)
    there, back = getattr(color, f"rgb2{name}"), getattr(color, f"{name}2rgb")
    change = np.array(most) / 2 / ([2 * math.pi, 1, 1] if name == "hsv" else 1)  # hue is a share of the circle there
    changed = there(image[0].permute(1, 2, 0).numpy()) + change
    expected = back(changed.clip(0, 1) if name == "hsv" else changed).clip(0, 1)
    actual = barrage._color_space(image, draw(0)).clamp(0, 1)[0].permute(1, 2, 0)
    np.testing.assert_allclose(actual, expected, atol=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_grey_mixtures_leave_grey_as_it_is(seed: int) -> None:
    grey = rand(1, 1, 5, 5).expand(1, 3, 5, 5)
    torch.testing.assert_close(barrage._grey_mix(grey, draw(seed)), grey)
    coloured = rand(1, 3, 5, 5)
    assert not torch.equal(barrage._grey_mix(coloured, draw(seed)), coloured)


def test_contrast_stretches_to_the_full_range() -> None:
    flat = 0.4 + 0.2 * rand(1, 3, 32, 32)
    for seed in range(12):
        result = barrage._contrast(flat, draw(seed)).clamp(0, 1)
        assert result.std() > 1.3 * flat.std()


def test_noise_has_the_sizes_of_random_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.full((1, 3, 100, 100), 0.5, dtype=torch.float64)
    expected = {0: 0.1, 1: 0.05, 2: None, 3: 0.5 * math.sqrt(0.05), 4: 0.5 * math.sqrt(0.05), 5: 0.5 * math.sqrt(0.05)}
    for kind, rms in expected.items():
        monkeypatch.setattr(barrage, "draw_integer", lambda *_, kind=kind: kind)
        found = (barrage._noise(image, draw(kind)) - 0.5).square().mean().sqrt().item()
        assert rms is None or abs(found - rms) < 0.05 * rms
    monkeypatch.setattr(barrage, "draw_integer", lambda *_: 2)
    levels = smooth(1, 3, 64, 64)
    photons = 2 ** math.ceil(math.log2(len(levels.unique())))
    variance = (barrage._noise(levels, draw(1)) - levels).square().mean()
    assert abs(variance * photons / levels.mean() - 1) < 0.05


def test_noise_is_estimated() -> None:
    noisy = 0.5 + 0.05 * torch.randn(1, 1, 200, 200, generator=draw(0), dtype=torch.float64)
    assert abs(barrage._noise_level(noisy).item() - 0.05) < 0.003


def test_its_own_gradient_averages_over_draws() -> None:
    """A step along the mean gradient of many draws changes the expected loss as predicted (EOT)."""
    image, direction = smooth(1, 3, 16, 16), rand(1, 3, 16, 16, seed=5) - 0.5

    def loss(x: Tensor, first: int) -> Tensor:
        return (BaRT(3, seed=2)(x.expand(64, -1, -1, -1), index=first) * direction).sum((1, 2, 3)).mean()

    image.requires_grad_()
    (slope,) = torch.autograd.grad(loss(image, 0), image)
    moved = (image - 0.1 * slope.sign()).clamp(0, 1).detach()
    assert loss(moved, 1000) < loss(image.detach(), 1000) - 1


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.color", None)
    with pytest.raises(ModuleNotFoundError, match=r"BaRT needs kornia: pip install 'oag-transform\[eval\]'"):
        BaRT()


@pytest.mark.parametrize("k", [-1, 11, 2.5, True])
def test_bad_numbers_of_transforms_are_errors(k: Any) -> None:
    with pytest.raises(ValueError, match="k must be "):
        BaRT(k)


def test_nearly_uniform_channels_can_be_equalized() -> None:
    for change in (0, 1e-7, 1e-5, 1e-3):
        image = torch.ones(1, 3, 32, 32)
        image[..., 0, 0] -= change
        for seed in range(12):
            assert barrage._contrast(image, draw(seed)).isfinite().all()


def test_the_callers_autocast_changes_nothing() -> None:
    images = rand(6, 3, 16, 16).float()
    expected = BaRT(10, seed=0)(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(BaRT(10, seed=0)(images), expected)
