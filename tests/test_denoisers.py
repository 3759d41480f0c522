"""The denoisers against independent definitions and other libraries; test_filters has their contract."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from skimage import color
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch import Generator, Tensor, nn

from oag_transform.baselines import denoisers
from oag_transform.baselines.denoisers import (
    BM3D,
    TVM,
    NonLocalMeans,
    PixelDeflection,
    TotalVariation,
    Wavelets,
    deflect,
)
from oag_transform.baselines.torch_filters import minimize_tv

from .test_filters import rand, smooth

Array = NDArray[Any]


# total variation


def objective(u: Array, image: Array, kept: Array, weight: float) -> float:
    """1/2 sum of kept squared errors + weight * isotropic total variation, pixel by pixel."""
    down, right = np.zeros_like(u), np.zeros_like(u)
    down[..., :-1, :], right[..., :, :-1] = np.diff(u, axis=-2), np.diff(u, axis=-1)
    return float((kept * (u - image) ** 2).sum() / 2 + weight * np.hypot(down, right).sum())


@pytest.mark.parametrize("weight", [0.03, 0.3])
def test_tvm_without_drops_is_total_variation_denoising(weight: float) -> None:
    image = smooth(1, 3, 12, 13)
    actual = TVM(weight, 0, iterations=2000, seed=0)(image)[0].numpy()
    expected = denoise_tv_chambolle(image[0].numpy(), weight=weight, eps=0, max_num_iter=3000, channel_axis=0)
    kept = np.ones_like(expected)
    assert objective(actual, image[0].numpy(), kept, weight) <= objective(expected, image[0].numpy(), kept, weight)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize("weight", [0.03, 0.1])
@pytest.mark.parametrize("defense", [TotalVariation, lambda weight: TVM(weight, drop_rate=0)])
def test_total_variation_brings_two_halves_closer(defense: Callable[[float], nn.Module], weight: float) -> None:
    halves = torch.full((1, 3, 8, 4), 0.2, dtype=torch.float64)
    halves[:, 1, :, 2:], halves[:, 2, :, 2:] = 0.8, 0.5  # channels by themselves: the first is flat
    expected = halves.clone()
    expected[:, 1:, :, :2] += weight / 2  # edge / area
    expected[:, 1:, :, 2:] -= weight / 2
    torch.testing.assert_close(defense(weight)(halves), expected, rtol=0, atol=1e-6)


def test_more_iterations_of_total_variation_come_closer_to_the_minimum() -> None:
    image = smooth(1, 3, 24, 24)
    minimum = TVM(0.2, drop_rate=0, iterations=3000)(image)
    errors = [(TotalVariation(0.2, iterations=count)(image) - minimum).square().mean() for count in (5, 50, 500)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    with pytest.raises(ValueError, match="iterations"):
        TotalVariation(0.2, iterations=0)


@pytest.mark.parametrize("weight", [0.03, 0.3])
@pytest.mark.parametrize("drop_rate", [0.3, 0.7])
def test_no_solver_gets_below_the_masked_minimum(weight: float, drop_rate: float) -> None:
    image = smooth(1, 1, 6, 7)[0, 0].numpy()
    kept = rand(6, 7, seed=3).numpy() >= drop_rate
    actual = minimize_tv(torch.from_numpy(image), torch.from_numpy(kept), weight, 3000).numpy()

    def smoothed(flat: Array, epsilon: float) -> tuple[float, Array]:
        u = torch.from_numpy(flat.copy()).reshape(6, 7).requires_grad_()
        down, right = F.pad(u.diff(dim=0), (0, 0, 0, 1)), F.pad(u.diff(dim=1), (0, 1))
        variation = (down.square() + right.square() + epsilon**2).sqrt().sum()
        loss = (torch.from_numpy(kept) * (u - torch.from_numpy(image)) ** 2).sum() / 2 + weight * variation
        loss.backward()
        assert u.grad is not None
        return loss.item(), u.grad.numpy().ravel()

    best, flat = np.inf, np.full(42, 0.5)
    for epsilon in (1e-1, 1e-2, 1e-3, 1e-4):
        options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-15, "gtol": 1e-10}
        flat = minimize(smoothed, flat, epsilon, jac=True, method="L-BFGS-B", options=options).x
        best = min(best, objective(flat.reshape(6, 7), image, kept, weight))
    reached = objective(actual, image, kept, weight)
    assert reached <= best
    assert best < 1.01 * reached  # the reference got there too


def test_tvm_comes_close_to_the_minimum() -> None:
    image, kept = smooth(1, 1, 64, 64), rand(1, 1, 64, 64, seed=5) >= 0.5
    reached, minimum = (
        objective(minimize_tv(image, kept, 0.03, steps).numpy(), image.numpy(), kept.numpy(), 0.03) for steps in (300, 3000)
    )
    assert minimum <= reached < minimum * (1 + 1e-3)


def test_tvm_is_independent_of_dropped_values() -> None:
    image, kept = smooth(1, 3, 8, 9), rand(1, 3, 8, 9, seed=2) >= 0.5
    other = torch.where(kept, image, rand(1, 3, 8, 9, seed=7))
    assert torch.equal(minimize_tv(image, kept, 0.03, 50), minimize_tv(other, kept, 0.03, 50))


def test_tvm_drops_each_value_at_the_drop_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []

    def spy(images: Tensor, kept: Tensor, weight: float, iterations: int) -> Tensor:
        masks.append(kept)
        return images

    monkeypatch.setattr(denoisers, "minimize_tv", spy)
    TVM(drop_rate=0.3, seed=0)(rand(2, 3, 100, 100))
    dropped = ~masks[0]
    for rate, expected in [
        (dropped, 0.3),
        (dropped[:, 0] & dropped[:, 1], 0.09),  # channels by themselves
        (dropped[0] & dropped[1], 0.09),  # and images
    ]:
        assert abs(rate.double().mean() - expected) < 5 * (expected * (1 - expected) / rate.numel()) ** 0.5


# pixel deflection


@settings(max_examples=40, deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    deflections=st.integers(0, 60),
    window=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_deflected_values_come_from_the_window(
    channels: int, height: int, width: int, deflections: int, window: int, seed: int
) -> None:
    image = np.arange(float(channels * height * width)).reshape(channels, height, width)
    deflected = deflect(image, deflections, window, Generator().manual_seed(seed))
    places = np.argwhere(deflected != image)
    assert len(places) <= deflections
    for place in places:
        source = np.unravel_index(int(deflected[tuple(place)]), image.shape)
        assert source[0] == place[0]
        assert max(abs(np.subtract(source, place)[1:])) <= window
    np.testing.assert_array_equal(image, np.arange(float(image.size)).reshape(image.shape))


def test_deflections_are_uniform_over_image_and_window() -> None:
    image, generator, trials = np.arange(12.0).reshape(1, 3, 4), Generator().manual_seed(0), 20000
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(trials):
        deflected = deflect(image, 1, 1, generator)
        seen.update((int(place), int(deflected.flat[place])) for place in np.flatnonzero(deflected != image))
    for place in range(12):
        y, x = divmod(place, 4)
        near = [4 * i + j for i in range(3) for j in range(4) if max(abs(i - y), abs(j - x)) <= 1]
        for source in set(range(12)) - {place}:
            probability = (source in near) / len(near) / 12
            assert abs(seen[place, source] - trials * probability) <= 5 * (trials * probability) ** 0.5


def bayes_shrink(channel: Array, sigma: float) -> Array:
    """One level of Haar wavelets, soft thresholds sigma^2 / (standard deviation of the signal)."""
    approximation, details = pywt.dwt2(channel, "haar")
    shrunk = []
    for detail in details:
        signal = np.sqrt(max((detail**2).mean() - sigma**2, np.finfo(float).eps))
        shrunk.append(np.sign(detail) * np.maximum(abs(detail) - sigma**2 / signal, 0))
    return pywt.idwt2((approximation, tuple(shrunk)), "haar")


def test_pixel_deflection_shrinks_wavelets_in_one_channel() -> None:
    image = smooth(1, 1, 16, 16)
    expected = bayes_shrink(image[0, 0].numpy(), 0.04).clip(0, 1)
    np.testing.assert_allclose(PixelDeflection(deflections=0)(image)[0, 0], expected, atol=1e-12)


def test_pixel_deflection_shrinks_wavelets_in_stretched_ycbcr() -> None:
    image = smooth(1, 3, 16, 16)
    planes = color.rgb2ycbcr(image[0].permute(1, 2, 0).numpy())
    low, high = planes.min((0, 1)), planes.max((0, 1))
    shrunk = np.stack([bayes_shrink(plane, 0.04) for plane in np.moveaxis((planes - low) / (high - low), -1, 0)], -1)
    expected = color.ycbcr2rgb(shrunk * (high - low) + low).clip(0, 1)
    actual = PixelDeflection(deflections=0)(image)[0].permute(1, 2, 0)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_pixel_deflection_deflects_and_then_denoises() -> None:
    image = smooth(1, 1, 16, 16)
    defense = PixelDeflection(deflections=20, window=3, sigma=1e-9, seed=4)  # a denoiser that does next to nothing
    changed = int(((defense(image) - image).abs() > 1e-6).sum())
    assert 10 <= changed <= 20


# non-local means


def non_local_means(image: Array, h: float, patch: int, distance: int) -> Array:
    """(C, H, W): each pixel is the mean of nearby pixels, weighted by the similarity of the patches around the two.

    As in scikit-image's fast mode, the first row and column of a patch don't count.
    """
    _, height, width = image.shape
    half = patch // 2
    padded = np.pad(image, [(0, 0), *2 * [(half + distance,) * 2]], mode="reflect")
    patches = np.lib.stride_tricks.sliding_window_view(padded, (patch, patch), (1, 2))
    result = np.empty_like(image)
    reach = range(-distance, distance + 1)
    for i in range(height):
        for j in range(width):
            y, x = i + distance, j + distance
            near = [(y + dy, x + dx) for dy in reach for dx in reach]
            squares = [np.square(patches[:, y, x] - patches[:, v, u])[:, 1:, 1:].sum() for v, u in near]
            apart = np.array(squares) / (len(image) * patch**2 * h**2)
            weight = np.exp(-apart) * (apart <= 5)
            values = np.array([padded[:, v + half, u + half] for v, u in near])
            result[:, i, j] = weight @ values / weight.sum()
    return result


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("h", [10.0, 40.0])
def test_non_local_means_is_the_weighted_mean_of_pixels_with_patches_alike(channels: int, h: float) -> None:
    image = smooth(1, channels, 11, 12)
    expected = non_local_means(image[0].numpy(), h / 255, 3, 3)
    actual = NonLocalMeans(h, patch_size=3, patch_distance=3)(image)[0].numpy()
    assert abs(expected - image[0].numpy()).max() > 0.02  # it does something
    np.testing.assert_allclose(actual, expected, atol=0.005)  # the library takes an exponential of few digits


def test_non_local_means_is_scikit_images() -> None:
    image = smooth(1, 3, 21, 18)
    expected = denoise_nl_means(image[0].permute(1, 2, 0).numpy(), 5, 6, 12 / 255, fast_mode=True, channel_axis=-1)
    np.testing.assert_allclose(NonLocalMeans(12)(image)[0].permute(1, 2, 0), expected, rtol=1e-12)


def test_non_local_means_takes_known_noise_off_the_differences() -> None:
    noisy = smooth(1, 3, 21, 18) + 0.1 * torch.randn(1, 3, 21, 18, generator=Generator().manual_seed(0), dtype=torch.float64)
    noisy = noisy.clamp(0, 1)
    wide = noisy[0].permute(1, 2, 0).numpy()
    expected = denoise_nl_means(wide, 5, 6, 15 / 255, fast_mode=True, sigma=0.1, channel_axis=-1)
    denoised = NonLocalMeans(15, sigma=25.5)(noisy)
    np.testing.assert_allclose(denoised[0].permute(1, 2, 0), expected, rtol=1e-12)
    assert (denoised - NonLocalMeans(15)(noisy)).abs().max() > 0.01
    with pytest.raises(ValueError, match="sigma"):
        NonLocalMeans(15, sigma=-1.0)


def test_non_local_means_removes_noise_and_keeps_edges() -> None:
    clean = torch.full((1, 3, 24, 24), 0.2, dtype=torch.float64)
    clean[..., 12:] = 0.8
    noisy = clean + 8 / 255 * torch.randn(clean.shape, generator=Generator().manual_seed(0), dtype=torch.float64)
    denoised = NonLocalMeans(8)(noisy)
    assert (denoised - clean).square().mean() < (noisy - clean).square().mean() / 8


# wavelets


def test_wavelets_shrink_one_channel() -> None:
    image = smooth(1, 1, 16, 16)
    expected = bayes_shrink(image[0, 0].numpy(), 12 / 255).clip(0, 1)
    np.testing.assert_allclose(Wavelets(12)(image)[0, 0], expected, atol=1e-12)


def test_wavelets_convert_rgb_noise_to_ycbcr() -> None:
    image, sigma = smooth(1, 3, 16, 16), 12 / 255
    planes = np.moveaxis(color.rgb2ycbcr(image[0].permute(1, 2, 0).numpy()), -1, 0)
    matrix = np.stack([color.rgb2ycbcr(unit) for unit in np.eye(3)], -1) - color.rgb2ycbcr(np.zeros(3))[:, None]
    noise = sigma * np.linalg.norm(matrix, axis=1)
    spans = np.ptp(planes, (1, 2))
    stretched = zip(planes / spans[:, None, None], noise / spans, strict=True)
    shrunk = np.stack([bayes_shrink(plane, level) for plane, level in stretched]) * spans[:, None, None]
    expected = color.ycbcr2rgb(np.moveaxis(shrunk, 0, -1)).clip(0, 1)
    np.testing.assert_allclose(Wavelets(12)(image)[0].permute(1, 2, 0), expected, atol=1e-9)


# BM3D


def test_bm3d_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm3d", None)
    with pytest.raises(ModuleNotFoundError, match=r"purposes only, needs bm3d: pip install 'oag-transform\[bm3d\]'"):
        BM3D()


def test_bm3d_is_that_of_its_authors() -> None:
    bm3d = pytest.importorskip("bm3d")
    image = smooth(1, 3, 18, 17)
    expected = bm3d.bm3d_rgb(image[0].permute(1, 2, 0).numpy(), 9 / 255).clip(0, 1)
    np.testing.assert_allclose(BM3D(9)(image)[0].permute(1, 2, 0), expected, atol=1e-5)


BM3D_CASES: dict[str, Tensor] = {
    "one pixel": rand(1, 3, 1, 1),
    "none": smooth(1, 3, 8, 8)[:0],
    "narrow": smooth(1, 1, 5, 24),
    "one block": smooth(1, 1, 8, 8),
    "nearly grey": smooth(1, 1, 16, 17) * 0.9 + 1e-5 * rand(1, 3, 16, 17),
    "flat": torch.full((1, 3, 16, 16), 0.25, dtype=torch.float64),
    "flat in brightness": 0.3 * torch.ones(1, 3, 16, 16).double() + torch.tensor([0.1, -0.1, 0]).double()[:, None, None],
}


@pytest.mark.parametrize("image", BM3D_CASES.values(), ids=BM3D_CASES.keys())
def test_bm3d_takes_images_that_the_library_does_not(image: Tensor) -> None:
    pytest.importorskip("bm3d")
    image = image.float().requires_grad_()
    result = BM3D(5)(image, index=[3] * len(image))
    assert (result.shape, result.dtype, result.requires_grad) == (image.shape, torch.float32, False)
    assert ((result >= 0) & (result <= 1)).all()
    assert ((result - image).abs() < 0.1).all()


def test_bm3d_of_grey_colours_is_that_of_one_channel() -> None:
    pytest.importorskip("bm3d")
    image = smooth(1, 1, 17, 16)
    image = (image - image.min()) / (image.max() - image.min())  # as colours are stretched
    single, colours = BM3D(9)(image), BM3D(9 * 3**0.5)(image.expand(-1, 3, -1, -1))  # the mean of three has less noise
    torch.testing.assert_close(colours, single.expand(-1, 3, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("denoiser", [Wavelets, BM3D])
def test_denoisers_remove_the_noise_they_are_for(denoiser: Callable[[float], nn.Module]) -> None:
    if denoiser is BM3D:
        pytest.importorskip("bm3d")
    ramp = torch.linspace(0.2, 0.8, 32, dtype=torch.float64).expand(1, 1, 32, 32)
    noisy = ramp + 10 / 255 * torch.randn(ramp.shape, generator=Generator().manual_seed(0), dtype=torch.float64)
    assert (denoiser(10.0)(noisy) - ramp).square().mean() < (noisy - ramp).square().mean() / 3


def test_bm3d_repr_and_bad_sigma() -> None:
    pytest.importorskip("bm3d")
    assert repr(BM3D(np.float64(2.5))) == "BM3D(sigma=2.5)"
    with pytest.raises(ValueError, match=r"sigma must be .*, got 0"):
        BM3D(0)
