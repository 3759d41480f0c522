"""Defenses that use the gradient of the target: explicit steps, bounds, and the unchanged target."""

import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from oag_transform import DefendedModel
from oag_transform.baselines.target_aware import AntiAdversary, ZeroPur, perceptual_distance

from .test_filters import rand, smooth


def classifier() -> nn.Sequential:
    generator = Generator().manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return network


MAKERS: list[Any] = [AntiAdversary, ZeroPur]
both = pytest.mark.parametrize("make", MAKERS)


def test_one_step_of_the_anti_adversary_by_hand() -> None:
    target, images = classifier(), (0.3 + 0.4 * rand(4, 3, 9, 9)).requires_grad_()
    logits = target(images)
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), images)
    expected = (images - 0.02 * slope.sign()).detach()
    torch.testing.assert_close(AntiAdversary(target, 0.02, steps=1)(images).detach(), expected)


def test_the_target_becomes_surer_of_the_same_class() -> None:
    target, images = classifier(), rand(6, 3, 9, 9)
    before, after = target(images).softmax(1), target(AntiAdversary(target)(images)).softmax(1)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert (after.max(1).values > before.max(1).values).all()


def test_guided_shift_brings_the_embedding_closer_to_that_of_the_blurred_image() -> None:
    target, images = classifier(), rand(3, 3, 12, 12)
    defense = ZeroPur(target, 8, projection_steps=0)
    with torch.no_grad():
        blurred = defense._features(defense._blurred(images))[0]
        before = F.cosine_similarity(target[:6](images), blurred)
        after = F.cosine_similarity(target[:6](defense(images)), blurred)
    assert (after > before).all()


def test_projection_moves_features_along_the_shift() -> None:
    target, images = classifier(), rand(3, 3, 12, 12)
    defense = ZeroPur(target, 8, shift_steps=4, projection_steps=8, projection=1.0)
    shifted, purified = ZeroPur(target, 8, shift_steps=4, projection_steps=0)(images), defense(images)
    assert not torch.equal(shifted, purified)
    with torch.no_grad():
        start, end, now = (defense._features(each)[1] for each in (images, shifted, purified))
    assert len(start) == 2
    along = sum(((b - a) * (c - a)).sum() for a, b, c in zip(start, end, now, strict=True))
    assert along > sum((b - a).square().sum() for a, b in zip(start, end, strict=True)) / 2


def test_features_are_those_of_the_last_two_resolutions() -> None:
    target, images = classifier(), rand(2, 3, 12, 12)
    embedding, features = ZeroPur(target)._features(images)
    torch.testing.assert_close(embedding, target[:6](images))
    torch.testing.assert_close(features[0], target[:2](images))
    torch.testing.assert_close(features[1], target[:4](images))
    assert not any(module._forward_hooks for module in target.modules())


def test_hooks_are_gone_after_an_error() -> None:
    target = classifier()
    with pytest.raises(RuntimeError):
        ZeroPur(target)(rand(1, 1, 12, 12))
    assert not any(module._forward_hooks for module in target.modules())


@pytest.mark.parametrize("epsilon", [0, 3.0, 200])
def test_zeropur_stays_within_its_bound(epsilon: float) -> None:
    images = smooth(2, 3, 10, 10)
    moved = ZeroPur(classifier(), epsilon, shift_steps=3, projection_steps=3)(images)
    assert (moved - images).abs().max() <= epsilon / 255 + 1e-12
    assert ((moved >= 0) & (moved <= 1)).all()


def test_perceptual_distance_is_that_of_unit_vectors() -> None:
    a, b = rand(2, 4, 3, 3), rand(2, 4, 3, 3, seed=1)
    unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in (a, b)]
    expected = ((unit[0] - unit[1]).square().sum(1).mean((1, 2))).sqrt()
    torch.testing.assert_close(perceptual_distance([a], [b]), expected)
    torch.testing.assert_close(perceptual_distance([3 * a], [a]), torch.zeros(2, dtype=torch.float64), atol=2e-6, rtol=0)


@both
def test_the_contract(make: Any) -> None:
    target = classifier()
    before = [parameter.clone() for parameter in target.parameters()]
    defense = make(target)
    images = rand(3, 3, 11, 12).requires_grad_()
    state = torch.get_rng_state()
    result = defense(images, index=7)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert ((result >= 0) & (result <= 1)).all()
    assert torch.equal(torch.get_rng_state(), state)
    weights = rand(3, 3, 11, 12, seed=2)
    (slope,) = torch.autograd.grad((weights * result).sum(), images)
    assert torch.equal(slope, weights)  # the identity
    with torch.inference_mode():
        inferred: Tensor = defense(images.detach())
    assert torch.equal(inferred, result)
    with torch.no_grad():
        assert torch.equal(defense(images), result)
    assert all(parameter.grad is None and torch.equal(parameter, old)
               for parameter, old in zip(target.parameters(), before, strict=True))  # fmt: skip
    assert defense(images[:0]).shape == (0, 3, 11, 12)
    model = DefendedModel(target, defense, shift=1, gradient="own")
    assert model(images).shape == (3, 5)


@both
def test_bad_arguments_are_errors(make: Any) -> None:
    with pytest.raises(TypeError, match=r"target must be a torch.nn.Module, got function"):
        make(lambda images: images)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(3, 8, 8\)"):
        make(classifier())(torch.zeros(3, 8, 8))
    for value in (-1, float("nan"), "1"):
        with pytest.raises(ValueError, match=r"(alpha|epsilon) must be a finite number >= 0"):
            make(classifier(), value)
    assert "Conv2d" in repr(make(classifier(), np.float64(0.5)))


def test_zeropur_needs_a_linear_layer() -> None:
    with pytest.raises(ValueError, match="target must have a linear layer"):
        ZeroPur(nn.Conv2d(3, 3, 3))


@both
def test_a_copy_gives_the_same(make: Any) -> None:
    defense, images = make(classifier()), rand(2, 3, 11, 12)
    assert torch.equal(pickle.loads(pickle.dumps(defense))(images), defense(images))


@both
def test_a_target_may_be_in_half_precision_or_work_in_place(make: Any) -> None:
    class InPlace(nn.Module):
        def __init__(self, target: nn.Module) -> None:
            super().__init__()
            self.inner = target

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images.mul_(1))

    images = rand(2, 3, 12, 12)
    kept = images.clone()
    assert torch.equal(make(InPlace(classifier()))(images), make(classifier())(images))
    assert torch.equal(images, kept)
    half = make(classifier().bfloat16())(images.float())
    assert half.dtype == torch.float32
    assert half.isfinite().all()


def test_zeropur_needs_features_of_more_than_one_pixel() -> None:
    target = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).double()
    with pytest.raises(ValueError, match=r"features of more than one pixel"):
        ZeroPur(target)(rand(1, 3, 8, 8))


def test_zeropur_does_not_see_the_passes_of_another_thread() -> None:
    target, images = classifier(), rand(2, 3, 12, 12)
    defense, started = ZeroPur(target, shift_steps=1, projection_steps=0), threading.Event()
    expected = defense(images)

    class Meeting(nn.Module):
        """In the first pass, another thread has a pass of another image of its own."""

        def forward(self, x: Tensor) -> Tensor:
            if not started.is_set():
                started.set()
                other = threading.Thread(target=lambda: target(rand(5, 3, 20, 20, seed=9)))
                other.start()
                other.join()
            return x

    target.append(Meeting())
    assert torch.equal(defense(images), expected)
