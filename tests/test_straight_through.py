"""The identity's derivative for any defense, in every mode of differentiation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torchvision import tv_tensors

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.baselines.filters import JPEG, Randomization
from oag_transform.straight_through import straight_through
from tests.sample_images import rand

PURIFY = OnlineAlternateGenerator(network_steps=2, filters=4, seed=0, compute_dtype=torch.float32)
DEFENSES: list[Callable[..., Any]] = [PURIFY, JPEG(25), lambda x: (4 * x).round() / 4]


def target() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    model[1].weight.data = rand(4, 3 * 16 * 16, seed=5) - 0.5
    return model


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_defended_model_has_the_targets_gradient_at_what_the_defense_returns(defense: Callable[..., Any]) -> None:
    """Reverse and forward mode, with ``torch.func`` too; the loss is non-linear, so that its gradient depends on the point."""
    images, direction = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    model = DefendedModel(target(), defense, shift=0)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    purified = model.purify(images).requires_grad_()
    (expected,) = torch.autograd.grad(model.target(purified).square().sum(), purified)
    assert (purified != images).any()

    point = images.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(loss(point), point)
    assert torch.equal(reverse, expected)
    torch.testing.assert_close(torch.func.grad(loss)(images), expected)
    along = (expected * direction).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (images,), (direction,))[1], along, rtol=1e-4, atol=0)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss(forward_ad.make_dual(images, direction)))
    torch.testing.assert_close(out.tangent, along, rtol=1e-4, atol=0)


def test_the_transform_alone_has_it_too() -> None:
    purify, images, direction = DEFENSES[0], rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    value, tangent, *_ = torch.func.jvp(purify, (images,), (direction,))
    assert torch.equal(value, purify(images))
    assert torch.equal(tangent, direction)
    assert torch.equal(torch.func.grad(lambda x: (direction * purify(x)).sum())(images), direction)


def test_a_defense_of_another_size_has_the_gradient_of_a_resize() -> None:
    defense = Randomization(1.5, seed=0)
    images, weights = rand(2, 3, 16, 16).requires_grad_(), rand(2, 3, 24, 24, seed=1)
    (weights * straight_through(images, defense)).sum().backward()
    plain = images.detach().clone().requires_grad_()
    (weights * nn.functional.interpolate(plain, (24, 24), mode="bilinear")).sum().backward()
    torch.testing.assert_close(images.grad, plain.grad)
    tangent = torch.func.jvp(lambda x: straight_through(x, defense), (plain.detach(),), (plain.detach(),))[1]
    torch.testing.assert_close(tangent, nn.functional.interpolate(plain.detach(), (24, 24), mode="bilinear"))


def test_a_change_of_channels_has_no_straight_through_gradient() -> None:
    def grey(images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)

    images = rand(2, 3, 16, 16).requires_grad_()
    assert straight_through(images.detach(), grey).shape == (2, 1, 16, 16)
    for differentiate in (
        lambda: straight_through(images, grey).sum().backward(),
        lambda: torch.func.jvp(lambda x: straight_through(x, grey), (images.detach(),), (images.detach(),)),
    ):
        with pytest.raises(ValueError, match="keeps the number of channels, got 1 for 3"):
            differentiate()


def test_own_is_what_the_defense_gives() -> None:
    images = rand(1, 3, 16, 16).requires_grad_()
    square = DefendedModel(target(), lambda x: x.square(), shift=0, gradient="own")
    (actual,) = torch.autograd.grad(square(images).sum(), images)
    (expected,) = torch.autograd.grad(target()(images.square()).sum(), images)
    assert torch.equal(actual, expected)
    assert not DefendedModel(nn.Flatten(), JPEG(25), shift=0, gradient="own").purify(images).requires_grad


def test_vmap_is_refused_in_one_sentence() -> None:
    with pytest.raises(RuntimeError, match="a defense can't be vmapped: it takes batches"):
        torch.vmap(DEFENSES[0])(rand(2, 3, 16, 16))


@pytest.mark.parametrize(
    "change",
    [lambda y: y.add_(0.1), lambda y: y.clamp_(0.2, 0.8), lambda y: y.__setitem__((..., 0), 0.0), lambda y: y[0].mul_(2)],
    ids=["add_", "clamp_", "setitem", "of a view"],
)
@pytest.mark.parametrize("defense", [*DEFENSES, lambda x: x, lambda x: x[..., :], lambda x: x.flip(-1).flip(-1)[:]])
def test_the_result_can_be_changed_in_place(change: Callable[[Tensor], object], defense: Callable[..., Any]) -> None:
    """As for any layer, the output can be changed in place; images and gradients remain unchanged."""
    images, weights = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    given = images.clone().requires_grad_()
    result = straight_through(given, defense)
    change(result)
    expected = defense(images.clone()).clone().requires_grad_()
    moved = expected * 1
    change(moved)
    assert torch.equal(result, moved)
    assert torch.equal(given, images)
    (weights * result).sum().backward()
    (weights * moved).sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad, expected.grad)


def test_the_transforms_result_can_be_changed_in_place() -> None:
    for images in (rand(3, 16, 16), rand(2, 3, 16, 16), rand(2, 1, 3, 16, 16), rand(2, 3, 16, 16).half()):
        point = images.clone().requires_grad_()
        result = PURIFY(point)
        result.mul_(2).sum().backward()
        assert torch.equal(result, 2 * PURIFY(images))
        assert point.grad is not None
        assert torch.equal(point.grad, torch.full_like(images, 2))
    wrapped = PURIFY(tv_tensors.Image(rand(3, 16, 16).requires_grad_()))
    wrapped.add_(1)
    wrapped[0].add_(1)
