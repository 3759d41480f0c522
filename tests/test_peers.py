"""The peers against their definitions, in other words and by other libraries, and the contract that all of them keep."""

import inspect
import io
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from scipy.optimize import minimize
from skimage import color
from skimage.restoration import denoise_tv_chambolle
from torch import Generator, Tensor, nn

from oag_transform import noise_level
from oag_transform.evaluation import peers
from oag_transform.evaluation.peers import (
    JPEG,
    TVM,
    GaussianNoise,
    MeanFilter,
    MedianFilter,
    NoisyJPEG,
    PixelDeflection,
    Randomization,
    TotalVariation,
    deflect,
    minimize_tv,
)

Array = NDArray[Any]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Blobs and a little noise, as in a photograph."""
    blobs = F.interpolate(rand(*shape[:2], 3, 3, seed=seed), shape[2:], mode="bicubic")
    return (0.8 * blobs + 0.1 + 0.1 * rand(*shape, seed=seed + 1)).clamp(0, 1)


# filters


def windows(image: Array, size: int) -> Array:
    """(H, W) -> (H, W, size^2), the nearest pixel standing in for those outside."""
    height, width = image.shape
    reach = range(-(size // 2), size // 2 + 1)
    near = [(y, x) for y in reach for x in reach]
    return np.array(
        [
            [[image[min(max(i + y, 0), height - 1), min(max(j + x, 0), width - 1)] for y, x in near] for j in range(width)]
            for i in range(height)
        ]
    )


filters = given(size=st.sampled_from([1, 3, 5]), height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 99))


@settings(max_examples=20, deadline=None)
@filters
def test_filters_are_means_and_medians_of_windows(size: int, height: int, width: int, seed: int) -> None:
    image = rand(1, 1, height, width, seed=seed)
    around = windows(image[0, 0].numpy(), size)
    np.testing.assert_allclose(MeanFilter(size)(image)[0, 0], around.mean(-1), rtol=1e-12)
    np.testing.assert_array_equal(MedianFilter(size)(image)[0, 0], np.median(around, -1))


def test_mean_filter_is_a_convolution_inside() -> None:
    images = rand(2, 3, 9, 8)
    kernel = torch.full((3, 1, 5, 5), 1 / 25, dtype=torch.float64)
    torch.testing.assert_close(MeanFilter(5)(images)[..., 2:-2, 2:-2], F.conv2d(images, kernel, groups=3))


@pytest.mark.parametrize("quality", [5, 75, 100])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_pillows(quality: int, mode: str) -> None:
    image = (255 * smooth(1, 3, 37, 50)[0]).permute(1, 2, 0).round().to(torch.uint8).numpy()
    original = PIL.Image.fromarray(image).convert(mode)
    buffer = io.BytesIO()
    original.save(buffer, "JPEG", quality=quality)
    expected = np.atleast_3d(np.asarray(PIL.Image.open(buffer)))
    batch = torch.from_numpy(np.atleast_3d(np.asarray(original)).copy()).permute(2, 0, 1)[None].double() / 255
    actual = 255 * JPEG(quality)(batch)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_noisy_jpeg_is_jpeg_then_noise() -> None:
    """Of pixels away from 0 and 1 the noise has the standard deviation that was asked for, and none goes through the JPEG."""
    images = 0.25 + 0.5 * smooth(4, 3, 64, 64)
    added = 255 * (NoisyJPEG(25, 8, seed=0)(images) - JPEG(25)(images))
    assert abs(added.std().item() - 8) < 4 * 8 / math.sqrt(2 * added.numel())
    neighbours = (added[..., 1:] * added[..., :-1]).mean().item() / 64
    assert abs(neighbours) < 4 / math.sqrt(added.numel())


def test_noisy_jpeg_follows_the_noise() -> None:
    """The clean one of two images is saved at quality 90 with the least noise, the noisy one as if nothing were followed."""
    images = torch.linspace(0.25, 0.75, 64).expand(2, 3, 64, 64).clone()
    images[1] += torch.randn(images[1].shape, generator=torch.Generator().manual_seed(0)) * 10 / 255
    strengths = noise_level.strength(images)
    assert strengths.tolist() == pytest.approx([noise_level.LEAST, 1])  # the premise
    following = NoisyJPEG(25, 8, follow_noise=True, seed=0)(images)
    clean = 255 * (following[0] - JPEG(90)(images)[0])
    least = 8 * math.sqrt(noise_level.LEAST)
    assert abs(clean.std().item() - least) < 4 * least / math.sqrt(2 * clean.numel())
    assert torch.equal(following[1], NoisyJPEG(25, 8, seed=0)(images)[1])
    between = images[:1] + (images[1:] - images[:1]) * 0.2
    share = noise_level.strength(between).item()
    assert 0.5 < share < 0.9
    quality = round(90 - 65 * (share - 0.25) / 0.75)
    added = 255 * (NoisyJPEG(25, 8, follow_noise=True, seed=0)(between) - JPEG(quality)(between))
    level = 8 * math.sqrt(share)
    assert abs(added.std().item() - level) < 4 * level / math.sqrt(2 * added.numel())
    assert torch.equal(NoisyJPEG(95, 0.0, follow_noise=True)(images[:1]), JPEG(95)(images[:1]))  # never lower


# the luminance table of the JPEG standard (T.81, Annex K.1), which is that of quality 50
LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


def test_jpeg_rounds_cosine_transforms_of_blocks() -> None:
    image = (255 * smooth(1, 1, 24, 40)).round() / 255
    blocks = 255 * image[0, 0].numpy().reshape(3, 8, 5, 8).swapaxes(1, 2) - 128
    rounded = (dctn(blocks, axes=(2, 3), norm="ortho") / LUMINANCE).round() * LUMINANCE
    expected = (idctn(rounded, axes=(2, 3), norm="ortho") + 128).clip(0, 255).swapaxes(1, 2).reshape(24, 40)
    np.testing.assert_allclose(255 * JPEG(50)(image)[0, 0].numpy(), expected, atol=1)


def test_jpeg_rounds_to_8_to_8_bits_first() -> None:
    images = (255 * smooth(1, 3, 16, 16)).round() / 255
    nudged = (images + 0.4 / 255 * (2 * rand(1, 3, 16, 16) - 1)).clamp(0, 1)
    assert torch.equal(JPEG(90)(nudged), JPEG(90)(images))


def test_noise_is_white_and_normal() -> None:
    noise = 255 * (GaussianNoise(12, seed=1)(torch.full((3, 3, 600, 600), 0.5, dtype=torch.float64)) - 0.5) / 12
    for sample, expected, variance in [
        (noise, 0, 1),
        (noise.square(), 1, 2),
        (noise**4, 3, 96),
        (noise[..., 1:] * noise[..., :-1], 0, 1),
        (noise[:, 1:] * noise[:, :-1], 0, 1),
    ]:
        assert abs(sample.mean() - expected) < 5 * (variance / sample.numel()) ** 0.5


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


def test_tvm_comes_as_close_as_it_says() -> None:
    image, kept = smooth(1, 1, 64, 64), rand(1, 1, 64, 64, seed=5) >= 0.5
    reached, minimum = (
        objective(minimize_tv(image, kept, 0.03, steps).numpy(), image.numpy(), kept.numpy(), 0.03) for steps in (300, 3000)
    )
    assert minimum <= reached < minimum * (1 + 1e-3)


def test_tvm_sees_nothing_of_what_it_drops() -> None:
    image, kept = smooth(1, 3, 8, 9), rand(1, 3, 8, 9, seed=2) >= 0.5
    other = torch.where(kept, image, rand(1, 3, 8, 9, seed=7))
    assert torch.equal(minimize_tv(image, kept, 0.03, 50), minimize_tv(other, kept, 0.03, 50))


def test_tvm_drops_each_value_at_the_drop_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []

    def spy(images: Tensor, kept: Tensor, weight: float, iterations: int) -> Tensor:
        masks.append(kept)
        return images

    monkeypatch.setattr(peers, "minimize_tv", spy)
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


# randomization


def found(result: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is not zero."""
    rows, columns = result.any(0).any(1).nonzero(), result.any(0).any(0).nonzero()
    top, left = int(rows[0]), int(columns[0])
    return top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1


@pytest.mark.parametrize(("height", "width", "ratio"), [(20, 20, 331 / 299), (31, 17, 1.2), (5, 23, 1.5), (7, 7, 1.0)])
def test_randomization_places_the_resized_image_on_zeros(height: int, width: int, ratio: float) -> None:
    images = (0.1 + 0.9 * rand(1, 3, height, width)).expand(300, -1, -1, -1)
    results = Randomization(ratio, seed=0)(images)
    limits = round(ratio * height), round(ratio * width)
    assert results.shape == (300, 3, *limits)
    lengths, slack = set(), set()
    for result in results:
        top, left, tall, wide = found(result)
        rows = [i * height // tall for i in range(tall)]
        columns = [j * width // wide for j in range(wide)]
        assert torch.equal(result[:, top : top + tall, left : left + wide], images[0][:, rows][:, :, columns])
        length, side = max((tall, height), (wide, width), key=lambda pair: pair[1])
        assert (tall, wide) == (round(height * length / side), round(width * length / side))
        lengths.add(length)
        slack.add((top, limits[0] - top - tall) if tall < limits[0] else (0, 0))
    longest = max(height, width)
    assert lengths == set(range(longest, max(*limits, longest + 1)))
    assert ratio == 1 or {0} < {above for above, _ in slack} == {below for _, below in slack}  # both ends of the offset


def test_randomization_fills_with_what_it_is_told() -> None:
    results = Randomization(1.5, fill=0.5, seed=0)(torch.ones(8, 1, 10, 10))
    assert set(results.unique().tolist()) == {0.5, 1.0}


# the contract

SEEDED: dict[str, Callable[[int | None], nn.Module]] = {
    "noise": lambda seed: GaussianNoise(20.5, seed=seed),
    "noisy jpeg": lambda seed: NoisyJPEG(50, 4.5, seed=seed),
    "jpeg that follows the noise": lambda seed: NoisyJPEG(50, 4.5, follow_noise=True, seed=seed),
    "tvm": lambda seed: TVM(0.05, 0.4, iterations=20, seed=seed),
    "deflection": lambda seed: PixelDeflection(40, 4, 0.05, seed=seed),
    "randomization": lambda seed: Randomization(2.5, fill=0.25, seed=seed),
}
DEFENSES: dict[str, Callable[[int | None], nn.Module]] = SEEDED | {
    "mean": lambda seed: MeanFilter(5),
    "median": lambda seed: MedianFilter(5),
    "jpeg": lambda seed: JPEG(50),
    "tv": lambda seed: TotalVariation(0.2),
}
every = pytest.mark.parametrize("make", DEFENSES.values(), ids=DEFENSES.keys())


@every
@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(0, 3),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    kind=st.sampled_from(["random", "binary", "flat", "smooth"]),
    channels_last=st.booleans(),
)
def test_images_in_images_out(
    make: Callable[[int | None], nn.Module],
    count: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    kind: str,
    channels_last: bool,
) -> None:
    shape = (count, channels, height, width)
    images = rand(*shape)
    images = {"random": images, "binary": images.round(), "flat": torch.full(shape, 0.3), "smooth": images / 9}[kind].to(dtype)
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    before, state = images.clone(), (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
    defense = make(3)
    result = defense(images.requires_grad_(), index=7)
    larger = (round(2.5 * height), round(2.5 * width)) if isinstance(defense, Randomization) else (height, width)
    assert (result.shape, result.dtype, result.requires_grad) == ((count, channels, *larger), dtype, False)
    assert ((result >= 0) & (result <= 1)).all()
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_equal(np.random.get_state(), state[1])  # noqa: NPY002
    assert random.getstate() == state[2]
    assert torch.equal(defense(images, index=7), result)
    for row in range(count):
        assert torch.equal(defense(images[row : row + 1], index=7 + row)[0], result[row])


@pytest.mark.parametrize("make", SEEDED.values(), ids=SEEDED.keys())
def test_random_unless_seeded(make: Callable[[int | None], nn.Module]) -> None:
    images = smooth(1, 3, 19, 17).expand(3, -1, -1, -1)
    assert not torch.equal(make(None)(images), make(None)(images))
    assert not torch.equal(make(1)(images), make(2)(images))
    first, second, _ = make(1)(images)
    assert not torch.equal(first, second)


@every
@pytest.mark.parametrize("seed", [None, 5])
def test_repr_rebuilds_the_defense(make: Callable[[int | None], nn.Module], seed: int | None) -> None:
    defense = make(seed)
    for name in inspect.signature(type(defense)).parameters:
        assert f"{name}={getattr(defense, name)!r}" in repr(defense)
    assert repr(eval(repr(defense), vars(peers))) == repr(defense)


@every
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 9, 9, dtype=torch.uint8), TypeError, "floating-point tensor, got torch.uint8"),
        (PIL.Image.new("RGB", (9, 9)), TypeError, "floating-point tensor, got Image"),
        (torch.zeros(3, 9, 9), ValueError, r"\(N, C, H, W\), got \(3, 9, 9\)"),
        (torch.zeros(1, 2, 9, 9), ValueError, "C = 1 or 3"),
        (torch.full((1, 3, 9, 9), 255.0), ValueError, r"in \[0, 1\], got \[255, 255\]"),
        (torch.full((1, 3, 9, 9), torch.nan), ValueError, r"in \[0, 1\]"),
    ],
    ids=["uint8", "pil", "3d", "channels", "range", "nan"],
)
def test_other_input_is_an_error(
    make: Callable[[int | None], nn.Module], images: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(0)(images)


@every
def test_bad_index_is_an_error(make: Callable[[int | None], nn.Module]) -> None:
    with pytest.raises(ValueError, match="index must be an integer >= 0, got -1"):
        make(0)(rand(1, 3, 9, 9), index=-1)


@pytest.mark.parametrize(
    ("defense", "arguments"),
    [
        *((kind, {"size": size}) for kind in (MeanFilter, MedianFilter) for size in (0, -1, 2, 3.0, True)),
        *((JPEG, {"quality": quality}) for quality in (0, 101, 75.0, "75")),
        *((GaussianNoise, {"std": std}) for std in (-1.0, float("nan"), float("inf"), "1")),
        *((kind, {"weight": weight}) for kind in (TotalVariation, TVM) for weight in (0, -0.1, float("nan"), None)),
        *((TVM, {"drop_rate": rate}) for rate in (-0.1, 1.0, float("nan"))),
        *((TVM, {"iterations": iterations}) for iterations in (0, 1.5)),
        *((PixelDeflection, {"deflections": deflections}) for deflections in (-1, 0.5)),
        *((PixelDeflection, {"window": window}) for window in (0, 2.5)),
        *((PixelDeflection, {"sigma": sigma}) for sigma in (0.0, -1.0, float("nan"))),
        *((Randomization, {"ratio": ratio}) for ratio in (0.9, float("nan"), float("inf"))),
        *((Randomization, {"fill": fill}) for fill in (-0.1, 1.1)),
        *((kind, {"seed": seed}) for kind in (GaussianNoise, TVM, PixelDeflection, Randomization) for seed in (-1, 0.5, True)),
    ],
)
def test_bad_hyper_parameters_are_errors(defense: type[nn.Module], arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be .*, got {arguments[name]!r}"):
        defense(**arguments)
