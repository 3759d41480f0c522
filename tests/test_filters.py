"""The filters against independent definitions and other libraries, and the contract of all baselines."""

import inspect
import io
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from torch import Generator, Tensor, nn

from oag_transform import DefendedModel, noise_level
from oag_transform.baselines import barrage, denoisers, filters, tensor_network, zero_shot
from oag_transform.baselines.barrage import BaRT
from oag_transform.baselines.denoisers import TVM, NonLocalMeans, PixelDeflection, TotalVariation, Wavelets
from oag_transform.baselines.filters import (
    JPEG,
    BitDepth,
    GaussianNoise,
    MeanFilter,
    MedianFilter,
    NoisyJPEG,
    Randomization,
)
from oag_transform.baselines.tensor_network import TensorNetworkPurification
from oag_transform.baselines.zero_shot import Noise2Fast, ZeroShotNoise2Noise

Array = NDArray[Any]
MODULES = (filters, denoisers, barrage, tensor_network, zero_shot)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Smooth blobs with weak noise, as in a natural image."""
    blobs = F.interpolate(rand(*shape[:2], 3, 3, seed=seed), shape[2:], mode="bicubic")
    return (0.8 * blobs + 0.1 + 0.1 * rand(*shape, seed=seed + 1)).clamp(0, 1)


# filters


def windows(image: Array, size: int) -> Array:
    """(H, W) -> (H, W, size^2), with the nearest pixel for positions outside."""
    height, width = image.shape
    reach = range(-(size // 2), size // 2 + 1)
    near = [(y, x) for y in reach for x in reach]
    return np.array(
        [
            [[image[min(max(i + y, 0), height - 1), min(max(j + x, 0), width - 1)] for y, x in near] for j in range(width)]
            for i in range(height)
        ]
    )


window_cases = given(
    size=st.sampled_from([1, 3, 5]), height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 99)
)


@settings(max_examples=20, deadline=None)
@window_cases
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
    """At pixels away from 0 and 1 the noise has the requested standard deviation; it is added after the JPEG."""
    images = 0.25 + 0.5 * smooth(4, 3, 64, 64)
    added = 255 * (NoisyJPEG(25, 8, seed=0)(images) - JPEG(25)(images))
    assert abs(added.std().item() - 8) < 4 * 8 / math.sqrt(2 * added.numel())
    neighbours = (added[..., 1:] * added[..., :-1]).mean().item() / 64
    assert abs(neighbours) < 4 / math.sqrt(added.numel())


def test_noisy_jpeg_follows_the_noise() -> None:
    """A clean image gets quality 90 and the least noise, a noisy one the full setting."""
    images = torch.linspace(0.25, 0.75, 64).expand(2, 3, 64, 64).clone()
    images[1] += torch.randn(images[1].shape, generator=torch.Generator().manual_seed(0)) * 10 / 255
    strengths = noise_level.matching_strength(images)
    assert strengths.tolist() == pytest.approx([noise_level.LEAST, 1])  # the premise
    following = NoisyJPEG(25, 8, follow_noise=True, seed=0)(images)
    clean = 255 * (following[0] - JPEG(90)(images)[0])
    least = 8 * math.sqrt(noise_level.LEAST)
    assert abs(clean.std().item() - least) < 4 * least / math.sqrt(2 * clean.numel())
    assert torch.equal(following[1], NoisyJPEG(25, 8, seed=0)(images)[1])
    between = images[:1] + (images[1:] - images[:1]) * 0.2
    share = noise_level.matching_strength(between).item()
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


# randomization


def found(result: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of the non-zero part."""
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


def test_randomization_pads_with_the_given_value() -> None:
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
    "bart": lambda seed: BaRT(4, seed=seed),
    "zs-n2n": lambda seed: ZeroShotNoise2Noise(steps=2, channels=3, seed=seed),
    "noise2fast": lambda seed: Noise2Fast(patience=2, steps=3, channels=3, seed=seed),
}
DEFENSES: dict[str, Callable[[int | None], nn.Module]] = SEEDED | {
    "mean": lambda seed: MeanFilter(5),
    "median": lambda seed: MedianFilter(5),
    "jpeg": lambda seed: JPEG(50),
    "bit depth": lambda seed: BitDepth(3),
    "tv": lambda seed: TotalVariation(0.2),
    "nlm": lambda seed: NonLocalMeans(9.5, patch_size=3, patch_distance=4),
    "wavelets": lambda seed: Wavelets(20.5),
    "tnp": lambda seed: TensorNetworkPurification(3, steps=2),
}
NAMES = {name: value for module in MODULES for name, value in vars(module).items()}
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
    assert (result.shape, result.dtype) == ((count, channels, *larger), dtype)
    assert result.requires_grad == defense.own_gradient
    assert ((result >= 0) & (result <= 1)).all()
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_equal(np.random.get_state(), state[1])  # noqa: NPY002
    assert random.getstate() == state[2]
    assert torch.equal(defense(images, index=7), result)
    for row in range(count):
        assert torch.equal(defense(images[row : row + 1], index=7 + row)[0], result[row])
    streams = list(range(7, 7 + count))
    assert torch.equal(defense(images.flip(0), index=streams[::-1]).flip(0), result)
    with torch.inference_mode():
        assert torch.equal(defense(images, index=streams), result)


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
    assert repr(eval(repr(defense), NAMES)) == repr(defense)


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
    with pytest.raises(ValueError, match="one for each of 1 images, got 2"):
        make(0)(rand(1, 3, 9, 9), index=[1, 2])


@pytest.mark.parametrize(
    ("defense", "arguments"),
    [
        *((kind, {"size": size}) for kind in (MeanFilter, MedianFilter) for size in (0, -1, 2, 3.0, True)),
        *((BitDepth, {"bits": bits}) for bits in (0, 9, 4.0)),
        *((JPEG, {"quality": quality}) for quality in (0, 101, 75.0, "75")),
        *((NoisyJPEG, {"follow_noise": flag}) for flag in (1, None)),
        *((GaussianNoise, {"std": std}) for std in (-1.0, float("nan"), float("inf"), "1")),
        *((kind, {"weight": weight}) for kind in (TotalVariation, TVM) for weight in (0, -0.1, float("nan"), None)),
        *((TVM, {"drop_rate": rate}) for rate in (-0.1, 1.0, float("nan"))),
        *((TVM, {"iterations": iterations}) for iterations in (0, 1.5)),
        *((PixelDeflection, {"deflections": deflections}) for deflections in (-1, 0.5)),
        *((PixelDeflection, {"window": window}) for window in (0, 2.5)),
        *((PixelDeflection, {"sigma": sigma}) for sigma in (0.0, -1.0, float("nan"))),
        *((NonLocalMeans, {"h": h}) for h in (0, -1.0, float("nan"))),
        *((NonLocalMeans, {"patch_size": size}) for size in (0, 2, 3.0)),
        *((NonLocalMeans, {"patch_distance": distance}) for distance in (0, 1.5)),
        *((Wavelets, {"sigma": sigma}) for sigma in (0, -1.0, float("nan"))),
        *((Randomization, {"ratio": ratio}) for ratio in (0.9, float("nan"), float("inf"))),
        *((Randomization, {"fill": fill}) for fill in (-0.1, 1.1)),
        *((kind, {"seed": seed}) for kind in (GaussianNoise, TVM, PixelDeflection, Randomization) for seed in (-1, 0.5, True)),
    ],
)
def test_bad_hyper_parameters_are_errors(defense: type[nn.Module], arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be .*, got {arguments[name]!r}"):
        defense(**arguments)


@pytest.mark.parametrize(
    ("defense", "arguments"),
    [
        (MeanFilter, {"size": np.int64(5)}),
        (MedianFilter, {"size": np.uint8(5)}),
        (BitDepth, {"bits": np.uint8(4)}),
        (JPEG, {"quality": np.int16(40)}),
        (GaussianNoise, {"std": np.float32(2.5), "seed": np.int64(3)}),
        (NoisyJPEG, {"quality": np.int32(30), "std": np.float64(2.5), "seed": np.int64(3)}),
        (TotalVariation, {"weight": np.float64(0.5)}),
        (TVM, {"weight": np.float64(0.5), "drop_rate": np.float64(0.25), "iterations": np.int16(2)}),
        (NonLocalMeans, {"h": np.float64(2.5), "patch_size": np.int64(3), "patch_distance": np.int64(2)}),
        (Wavelets, {"sigma": np.float64(2.5)}),
        (PixelDeflection, {"deflections": np.int64(4), "window": np.int64(2), "sigma": np.float64(0.5)}),
        (Randomization, {"ratio": np.float64(1.5), "fill": np.float64(0.5), "seed": np.uint64(3)}),
    ],
)
def test_numpys_numbers_are_numbers(defense: type[nn.Module], arguments: dict[str, Any]) -> None:
    made = defense(**arguments)
    assert repr(made) == repr(defense(**{name: value.item() for name, value in arguments.items()}))
    assert made(smooth(1, 3, 9, 8), index=np.int64(2)).shape[0] == 1


# bit depth


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_bit_depth_gives_the_nearest_of_its_levels(bits: int) -> None:
    images = rand(2, 3, 7, 8)
    levels = np.linspace(0, 1, 2**bits)
    nearest = levels[abs(images.numpy()[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(BitDepth(bits)(images), nearest, rtol=1e-12)


def test_eight_bits_are_those_of_an_image() -> None:
    images = torch.arange(256, dtype=torch.float64).reshape(1, 1, 16, 16) / 255
    assert torch.equal(BitDepth(8)(images), images)


# gradients


gradients = pytest.mark.parametrize(
    "defense",
    [
        MeanFilter(3),
        MedianFilter(3),
        GaussianNoise(2, seed=1),
        Randomization(1.5, fill=0.25, seed=1),
    ],
    ids=lambda defense: type(defense).__name__,
)


def apart(*shape: int) -> Tensor:
    """Values in (0.1, 0.9) that differ by more than a finite difference, so that medians are smooth and nothing is clipped."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=Generator().manual_seed(0)).double()
    return (0.1 + 0.8 * order / count).reshape(shape)


@gradients
def test_own_gradient_is_that_of_finite_differences(defense: nn.Module) -> None:
    images = apart(2, 1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: defense(x, index=3), images)


@gradients
def test_a_defended_model_sees_the_own_gradient(defense: nn.Module) -> None:
    weight = rand(4, 5)

    class Target(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            pooled = F.adaptive_avg_pool2d(images.pow(3), 2)[:, 0].flatten(1)  # Randomization has larger ones
            return pooled @ weight

    model = DefendedModel(Target(), defense, gradient="own", shift=1)
    images = apart(2, 1, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, index=3), images)


def test_clipped_noise_has_no_gradient() -> None:
    images = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).repeat(40, 1)[None, None].requires_grad_()
    noisy = GaussianNoise(20, seed=0)(images)
    noisy.sum().backward()
    clipped = (noisy == 0) | (noisy == 1)
    assert clipped.any()
    assert images.grad is not None
    assert torch.equal(images.grad, (~clipped).double())


def test_a_subclass_may_have_other_arguments() -> None:
    class Mine(JPEG):
        def __init__(self, q: int = 10, **others: Any) -> None:
            super().__init__(quality=q, **others)

    assert repr(Mine()) == "Mine()"
    assert repr(JPEG(10)) == "JPEG(quality=10)"
