"""Gradients of baselines: the PyTorch filters against scikit-image's and finite differences, and the choice among them."""

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.enhance import jpeg_codec_differentiable
from skimage.transform import swirl
from torch import nn

from oag_transform import DefendedModel
from oag_transform.baselines import denoisers, torch_filters
from oag_transform.baselines.barrage import BaRT
from oag_transform.baselines.denoisers import TVM, NonLocalMeans, PixelDeflection, TotalVariation, Wavelets
from oag_transform.baselines.filters import JPEG, BitDepth, GaussianNoise, MeanFilter, MedianFilter, NoisyJPEG, Randomization
from oag_transform.baselines.per_image import DeepImagePrior
from oag_transform.baselines.surrogate import differentiable
from oag_transform.baselines.tensor_network import TensorNetworkPurification

from .test_filters import rand, smooth

sides = given(height=st.integers(1, 12), width=st.integers(1, 12), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))


@settings(max_examples=15, deadline=None)
@sides
@pytest.mark.parametrize("weight", [0.03, 0.5])
def test_chambolle_is_scikit_images(weight: float, height: int, width: int, channels: int, seed: int) -> None:
    images = rand(2, channels, height, width, seed=seed)
    for iterations in (1, 2, 40):
        expected = TotalVariation(weight, iterations=iterations)(images)
        torch.testing.assert_close(torch_filters.chambolle(images, weight, iterations).clamp(0, 1), expected)


@settings(max_examples=15, deadline=None)
@sides
@pytest.mark.parametrize("sigma", [0.0, 12.0])
def test_non_local_means_is_scikit_images(sigma: float, height: int, width: int, channels: int, seed: int) -> None:
    images = rand(1, channels, height, width, seed=seed)
    expected = NonLocalMeans(60, patch_size=3, patch_distance=4, sigma=sigma)(images)
    actual = torch_filters.non_local_means(images, 60 / 255, 3, 4, sigma / 255)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.01)  # the library takes an exponential of few digits


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@pytest.mark.parametrize("sigma", [3.0, 40.0])
def test_wavelets_are_scikit_images(sigma: float, height: int, width: int, channels: int, seed: int) -> None:
    images = 0.2 + 0.6 * rand(2, channels, height, width, seed=seed)
    actual = denoisers._smooth_shrink(images, sigma / 255, rescale=True).clamp(0, 1)
    torch.testing.assert_close(actual, Wavelets(sigma)(images), rtol=0, atol=1e-6)
    actual = denoisers._smooth_shrink(images, sigma / 255, rescale=False).clamp(0, 1)
    torch.testing.assert_close(actual, PixelDeflection(0, sigma=sigma / 255, seed=0)(images), rtol=0, atol=1e-6)


def test_the_gradient_of_pixel_deflection_is_that_of_its_draw() -> None:
    defense = PixelDeflection(60, window=4, sigma=0.03, seed=3)
    images, nudge = 0.3 + 0.4 * rand(2, 3, 16, 16).requires_grad_(), rand(2, 3, 16, 16, seed=1)
    result = differentiable(defense)(images, index=[4, 9])  # type: ignore[misc]
    weights = rand(2, 3, 16, 16, seed=2)
    (slope,) = torch.autograd.grad((weights * result).sum(), images)
    step = 1e-7 * nudge
    change = (weights * (defense(images.detach() + step, index=[4, 9]) - defense(images.detach() - step, index=[4, 9]))).sum()
    torch.testing.assert_close((2 * slope * step).sum(), change, rtol=1e-3, atol=0)


def test_swirl_is_scikit_images() -> None:
    image = rand(1, 3, 20, 17)
    expected = swirl(image[0].permute(1, 2, 0).numpy(), center=(11, 6), strength=2.5, radius=14)
    np.testing.assert_allclose(torch_filters.swirl(image, (11, 6), 2.5, 14)[0].permute(1, 2, 0), expected, atol=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch_filters.chambolle(x, 0.1, 10),
        lambda x: torch_filters.non_local_means(x, 0.3, 3, 2, 0.02),
        lambda x: torch_filters.minimize_tv(x, torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) > 0.4, 0.05, 8),
        lambda x: torch_filters.swirl(x, (2, 1), 2.0, 5.0),
        lambda x: torch_filters.bayes_shrink(x, torch.full((1, 1, 1, 1), 0.05, dtype=torch.float64)),
    ],
)
def test_gradients_are_those_of_finite_differences(function: Any) -> None:
    assert torch.autograd.gradcheck(function, rand(1, 1, 5, 4).requires_grad_())


@pytest.mark.parametrize("function", [torch_filters.chambolle, lambda x, w, n: torch_filters.minimize_tv(x, x > -1, w, n)])
def test_flat_images_have_finite_gradients(function: Any) -> None:
    flat = torch.full((1, 1, 6, 6), 0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(flat, 0.1, 20).sum(), flat)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope.sum(), torch.tensor(36.0, dtype=torch.float64))  # brightness goes through


EXACT: dict[str, nn.Module] = {
    "mean": MeanFilter(3),
    "median": MedianFilter(3),
    "noise": GaussianNoise(4, seed=2),
    "randomization": Randomization(1.5, seed=2),
    "tvm": TVM(0.05, iterations=20, seed=2),
    "bart": BaRT(3, seed=2),
}
SURROGATES: dict[str, nn.Module] = {
    "tv": TotalVariation(0.1, iterations=30),
    "nlm": NonLocalMeans(20, patch_size=3, patch_distance=3),
    "jpeg": JPEG(40),
    "noisy jpeg": NoisyJPEG(40, 4, seed=2),
    "bit depth": BitDepth(3),
    "wavelets": Wavelets(5),
    "deflection": PixelDeflection(20, seed=2),
}
NONE: list[nn.Module] = [DeepImagePrior(), TensorNetworkPurification()]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("defense", (EXACT | SURROGATES).values(), ids=(EXACT | SURROGATES).keys())
def test_values_are_the_defenses_and_the_gradient_is_there(defense: nn.Module, channels: int) -> None:
    made = differentiable(defense)
    assert made is not None
    for images in (rand(2, channels, 16, 18, dtype=torch.float32), rand(0, channels, 16, 18), rand(1, channels, 9, 7)):
        images.requires_grad_()
        result = made(images, index=5)
        assert torch.equal(result, defense(images, index=5))
        (slope,) = torch.autograd.grad(result.sum(), images)
        assert slope.isfinite().all()
        assert len(images) == 0 or slope.abs().sum() > 0
        with torch.no_grad():
            assert torch.equal(made(images, index=5), result)
            assert torch.equal(pickle.loads(pickle.dumps(made))(images, index=5), result)


@pytest.mark.parametrize("defense", NONE, ids=lambda defense: type(defense).__name__)
def test_others_have_none(defense: nn.Module) -> None:
    assert differentiable(defense) is None


def test_those_with_a_gradient_of_their_own_stay_as_they_are() -> None:
    assert all(differentiable(defense) is defense for defense in EXACT.values())
    identity = nn.Identity()
    assert differentiable(identity) is identity


@pytest.mark.parametrize("key", ["tv", "nlm"])
def test_the_surrogate_says_more_of_a_small_change_than_the_identity(key: str) -> None:
    """The surrogate's derivative predicts changes along random directions better than the identity (BPDA)."""
    defense, image = SURROGATES[key], smooth(1, 3, 32, 32)
    made = differentiable(defense)
    assert made is not None
    errors = {"surrogate": 0.0, "identity": 0.0}
    for seed in range(8):
        weights = rand(1, 3, 32, 32, seed=seed) - 0.5
        change = 0.05 * (rand(1, 3, 32, 32, seed=seed + 50) - 0.5)
        x = image.clone().requires_grad_()
        (slope,) = torch.autograd.grad((made(x) * weights).sum(), x)
        actual = ((defense((image + change).clamp(0, 1)) - defense(image)) * weights).sum()
        errors["surrogate"] += float(((slope * change).sum() - actual) ** 2)
        errors["identity"] += float(((weights * change).sum() - actual) ** 2)
    assert errors["surrogate"] < errors["identity"] / 2


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_the_codec_is_pillows_to_a_few_grey_levels(quality: int) -> None:
    images = smooth(2, 3, 40, 32)
    expected = JPEG(quality)(images)
    soft = jpeg_codec_differentiable(images, torch.tensor([quality], dtype=images.dtype))
    assert (soft - expected).square().mean() < (images - expected).square().mean() / 4


def test_the_gradient_of_jpeg_leaves_out_what_jpeg_removes() -> None:
    """Removes a chessboard of two grey levels and keeps brightness."""
    image = smooth(1, 3, 32, 32)
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    made = differentiable(JPEG(30))
    assert made is not None
    assert (JPEG(30)((image + 2 / 255 * board).clamp(0, 1)) - JPEG(30)(image)).abs().mean() < 0.5 / 255
    x = image.clone().requires_grad_()
    (slope,) = torch.autograd.grad((made(x) * board).sum(), x)
    assert abs((slope * board).sum()) < 0.05 * board.numel() * 3
    (slope,) = torch.autograd.grad(made(x).sum(), x)
    assert slope.mean() > 0.1


def test_a_defended_model_goes_through_it() -> None:
    target = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).double()
    made = differentiable(JPEG(30))
    images = smooth(2, 3, 16, 16).requires_grad_()
    slopes = []
    for gradient in ("own", "straight_through"):
        model = DefendedModel(target, made, shift=0, gradient=gradient)
        torch.testing.assert_close(model(images), DefendedModel(target, JPEG(30), shift=0)(images))
        slopes.append(torch.autograd.grad(model(images)[:, 0].sum(), images)[0])
    assert not torch.allclose(slopes[0], slopes[1])


def test_what_jpeg_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    with pytest.raises(ModuleNotFoundError, match=r"the gradient of JPEG needs kornia"):
        differentiable(JPEG(50))


@pytest.mark.parametrize("key", ["wavelets", "deflection", "nlm", "tv", "jpeg"])
def test_the_callers_autocast_and_default_device_have_no_say(key: str) -> None:
    made = differentiable(SURROGATES[key])
    assert made is not None
    images = rand(2, 3, 16, 16, dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(made(images, index=0).square().sum(), images)
    with torch.autocast("cpu", torch.bfloat16):
        result = made(images, index=0)
    (slope,) = torch.autograd.grad(result.square().sum(), images)
    assert torch.equal(slope, expected)
    if key == "jpeg":
        torch.set_default_device("meta")
        try:
            (slope,) = torch.autograd.grad(made(images, index=0).square().sum(), images)
        finally:
            torch.set_default_device("cpu")
        assert torch.equal(slope, expected)


@pytest.mark.parametrize("key", ["wavelets", "deflection", "bit depth", "jpeg"])
def test_forward_mode_has_the_derivative_of_reverse_mode(key: str) -> None:
    made = differentiable(SURROGATES[key])
    assert made is not None
    images, direction, weights = smooth(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1), rand(1, 3, 16, 16, seed=2)
    with torch.autograd.forward_ad.dual_level():
        dual = made(torch.autograd.forward_ad.make_dual(images, direction), index=0)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    images.requires_grad_()
    (slope,) = torch.autograd.grad((made(images, index=0) * weights).sum(), images)
    torch.testing.assert_close((tangent * weights).sum(), (slope * direction).sum())
