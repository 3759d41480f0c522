"""Adaptive attacks: bounds, gradients, results, and warnings about unreliable attacks."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.transforms import v2

from oag_transform import DefendedModel, OnlineAlternateGenerator, streams
from oag_transform.baselines.filters import JPEG, BitDepth, GaussianNoise
from oag_transform.baselines.own import OwnDefense
from oag_transform.baselines.per_image import DeepImagePrior
from oag_transform.defended import applied
from oag_transform.evaluation.attacks import adaptive, diagnostics, pgd
from oag_transform.evaluation.attacks import unrolled as unrolled_module
from oag_transform.evaluation.attacks.adaptive import AdaptiveAttack, make_attack
from oag_transform.evaluation.attacks.diagnostics import BETWEEN
from oag_transform.evaluation.attacks.libraries import APGD, HopSkipJump, Square
from oag_transform.evaluation.attacks.pgd import PGD, AttackResult, Bound
from oag_transform.evaluation.attacks.unrolled import Unrolled, has_gradient, unrolled
from oag_transform.evaluation.columns import Adaptive, adaptive_columns
from oag_transform.evaluation.data import Preprocessing
from oag_transform.evaluation.options import ADAPTIVE_ATTACKS, LEAST_BOUND, MOST_JUDGES, AdaptiveOptions, adaptive_entry
from oag_transform.evaluation.result import Cell
from oag_transform.evaluation.store import Store
from oag_transform.evaluation.subject import Row, Subject
from oag_transform.evaluation.targets import Target

from .sample_images import rand, synthetic_image

SIDE = 25
LINF, L2 = Bound("linf", 8 / 255), Bound("l2", 0.6)


class Linear(nn.Module):
    """Four classes by random directions: the best perturbation of the margin between two of them is known in closed form."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(4, 3 * SIDE * SIDE, generator=generator) / SIDE

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def undefended(target: nn.Module | None = None) -> DefendedModel:
    return DefendedModel(target or Linear(), nn.Identity(), shift=0)


def examples(count: int = 3) -> tuple[Tensor, Tensor]:
    """Pictures well inside of [0, 1], and the classes that the target gives them."""
    images = 0.3 + 0.4 * synthetic_image(count, 3, SIDE, SIDE).float()
    return images, Linear()(images).argmax(1)


ATTACKS: dict[str, Callable[[Bound], Any]] = {
    "PGD": lambda bound: PGD(bound, 6, 1),
    "PGD, random start": lambda bound: PGD(bound, 3, 2, loss=pgd.margin, random_start=3),
    "PGD, gray": lambda bound: PGD(bound, 4, 1, basis="gray"),
    "PGD, smooth": lambda bound: PGD(bound, 4, 1, basis="smooth"),
    "APGD": lambda bound: APGD(bound, 5, 1),
    "APGD, DLR": lambda bound: APGD(bound, 5, 1, "dlr"),
    "APGD, targeted DLR": lambda bound: APGD(bound, 5, 1, "dlr-targeted"),
    "Square": lambda bound: Square(bound, 30, 1),
    "HopSkipJump": lambda bound: HopSkipJump(bound, 2, 10),
}


def length(perturbation: Tensor, bound: Bound) -> Tensor:
    flat = perturbation.double().flatten(1)
    return flat.abs().amax(1) if bound.norm == "linf" else torch.linalg.vector_norm(flat, dim=1)


# DLR is constant where the right class comes third, as it may at a random start that far away; pyautoattack says so
@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")
@pytest.mark.parametrize("bound", [LINF, L2, Bound("linf", 1.0), Bound("l2", 60.0)], ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_points_are_images_within_the_bound(name: str, bound: Bound) -> None:
    images, labels = examples()
    before = images.clone()
    found = ATTACKS[name](bound)(undefended(), images, labels)
    assert found.images.shape == images.shape
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert (length(found.images - images, bound) <= bound.eps + 1e-6).all()
    assert images.equal(before)


@pytest.mark.parametrize("bound", [LINF, L2], ids=str)
@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "HopSkipJump"])
def test_the_loss_rises(name: str, bound: Bound) -> None:
    images, labels = examples()
    found = ATTACKS[name](bound)(undefended(), images, labels)
    assert (pgd.margin(Linear()(found.images), labels) > pgd.margin(Linear()(images), labels)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_two_linear_classes_pgd_finds_the_best_perturbation(norm: pgd.Norm) -> None:
    target = Linear()
    target.weight = target.weight[:2]
    images, bound = examples()[0], Bound(norm, 0.02 if norm == "linf" else 0.5)
    labels = target(images).argmax(1)
    found = PGD(bound, 10, 1, loss=pgd.margin)(undefended(target), images, labels)
    slope = (target.weight[0] - target.weight[1]).double()
    most = bound.eps * (slope.abs().sum() if norm == "linf" else slope.norm())
    gained = pgd.margin(target(found.images), labels) - pgd.margin(target(images), labels)
    torch.testing.assert_close(gained.double(), most.expand(3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["APGD", "Square", "HopSkipJump"])
def test_libraries_leave_the_global_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    ATTACKS[name](LINF)(undefended(), *examples(1))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ["PGD", "APGD", "Square"])
def test_a_defense_that_does_nothing_falls_as_the_undefended_target_does(name: str) -> None:
    class Nothing(nn.Module):
        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            return images

    attack, (images, labels) = ATTACKS[name](LINF), examples()
    behind = DefendedModel(Linear(), Nothing(), shift=0)
    assert attack(behind, images, labels).images.equal(attack(undefended(), images, labels).images)


def test_an_attacker_who_has_the_seed_is_stronger() -> None:
    class Dropped(nn.Module):
        """Nine pixels of ten are hidden, other ones in each stream."""

        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            masks = [torch.rand(image.shape, generator=g) for image, g in zip(images, _generators(images, index), strict=True)]
            return images * (torch.stack(masks) < 0.1)

    images, labels = examples()
    model = DefendedModel(Linear(), Dropped(), shift=0, gradient="own")

    def gained(which: pgd.Streams) -> Tensor:
        found = PGD(LINF, 10, 1, loss=pgd.margin, streams=which)(model, images, labels)
        return pgd.margin(model(found.images), labels) - pgd.margin(model(images), labels)

    assert (gained(pgd.known) > 1.5 * gained(pgd.unknown)).all()


def _generators(images: Tensor, index: Any) -> list[torch.Generator]:
    at = range(index, index + len(images)) if isinstance(index, int) else index
    return streams.generators(5, at, images.device)


def small(**changes: Any) -> OnlineAlternateGenerator:
    made: dict[str, Any] = {"network_steps": 4, "filters": 8, "kernel_size": 5, "strength": 1.0, "threshold": 1.0, "seed": 0}
    return OnlineAlternateGenerator(**{"compute_dtype": torch.float32} | made | changes)


def test_unrolled_purifies_as_the_transform_does() -> None:
    images = synthetic_image(2, 3, SIDE, SIDE)
    torch.testing.assert_close(Unrolled(small())(images, index=[4, 9]), small()(images, index=[4, 9]))


@pytest.mark.parametrize("strength", [1.0, None])
def test_the_exact_gradient_agrees_with_finite_differences(strength: float | None) -> None:
    # without a threshold what is drawn is piecewise smooth, and a small difference crosses no border
    model = unrolled(DefendedModel(Linear().double(), small(threshold=0.0, strength=strength), shift=0))
    model.target.weight = model.target.weight.double()
    image, label = 0.3 + 0.4 * synthetic_image(1, 3, SIDE, SIDE), torch.tensor([1])
    _, slope = pgd.gradient(model, image, label, pgd.cross_entropy, [[3]])
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        return pgd.cross_entropy(model(at, index=[3]), label)

    step = 1e-7
    difference = (loss(image + step * direction) - loss(image - step * direction)) / (2 * step)
    torch.testing.assert_close((slope * direction).sum()[None], difference, rtol=1e-4, atol=1e-8)


def test_an_expected_gradient_is_that_of_the_mean_over_noise() -> None:
    x, deviation = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    jumped = unrolled_module._Expected.apply(x, deviation)
    assert jumped.equal((x > 0).double())
    (slope,) = torch.autograd.grad(jumped.sum(), x)
    step = 1e-6  # of P(x + noise > 0) = ndtr(x / deviation)
    mean = [torch.special.ndtr((x.detach() + sign * step) / deviation) for sign in (1, -1)]
    torch.testing.assert_close(slope, (mean[0] - mean[1]) / (2 * step), rtol=1e-6, atol=1e-9)


def test_expected_gradients_keep_the_values_and_include_jumps() -> None:
    images = synthetic_image(1, 3, SIDE, SIDE)
    points = [images.clone().requires_grad_() for _ in range(2)]
    made = [Unrolled(small(), expected=expected)(point, index=4) for point, expected in zip(points, (False, True), strict=True)]
    assert made[0].equal(made[1])
    exact, expected = (torch.autograd.grad(x.square().sum(), point)[0] for x, point in zip(made, points, strict=True))
    assert (exact - expected).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        (nn.Identity(), True),
        (GaussianNoise(8, seed=0), True),
        (Unrolled(small()), True),
        (BitDepth(3), False),  # of rounding autograd says 0
        (JPEG(50), False),
        (small(), True),  # straight through
    ],
    ids=lambda value: type(value).__name__,
)
def test_whether_a_defense_has_a_gradient(defense: nn.Module, expected: bool) -> None:
    assert has_gradient(defense, synthetic_image(1, 3, SIDE, SIDE).float()) is expected


class Starving(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory for the graph")


def test_a_defense_whose_sum_is_constant_has_a_gradient() -> None:
    assert has_gradient(lambda images: images - images.mean((1, 2, 3), keepdim=True) + 0.5, rand(2, 3, 8, 8))


def test_a_defense_in_numpy_has_no_gradient() -> None:
    assert not has_gradient(lambda images: torch.from_numpy(images.numpy()), torch.full((2, 3, 8, 8), 0.5))


def test_a_defense_that_fails_under_attack_is_no_defense_without_a_gradient() -> None:
    images, labels = examples(2)
    attack = make_attack("surrogate", LINF, AdaptiveOptions(), randomised=True, views=False)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the graph"):
        attack(DefendedModel(Linear(), Starving(), shift=0), images, labels, images, pgd.unknown)


def subject_of(images: Tensor, folder: Path, chunk: int = 2) -> Subject:
    """Images and the classes that the linear target gives them."""
    pixels = (255 * images).round().to(torch.uint8)
    target = Target("linear", Linear(), Preprocessing(SIDE, SIDE), "fingerprint")
    names = tuple(map(str, range(len(images))))
    labels = Linear()(pixels / 255).argmax(1)
    classes = ("a", "b", "c", "d")
    return Subject(target, pixels, labels, classes, names, len(images), Store(folder, chunk=chunk), 3, torch.device("cpu"))


class Rounding(nn.Module):
    """A defense of somebody's own, without a gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.detach() * 8).round() / 8


def test_exact_gradients_are_bpda_where_there_are_none() -> None:
    options, (images, labels) = AdaptiveOptions(exact_steps=4, steps=4), examples(2)

    def found(defense: nn.Module) -> tuple[Tensor, Tensor]:
        model = DefendedModel(Linear(), defense, shift=0)
        attacks = [make_attack(name, LINF, options, randomised=True, views=False) for name in ("exact", "margin")]
        exact, bpda = (attack(model, images, labels, images, pgd.unknown).images for attack in attacks)
        return exact, bpda

    exact, bpda = found(Rounding())
    assert exact.equal(bpda)
    for defense in (small(), JPEG(50)):
        exact, bpda = found(defense)
        assert not exact.equal(bpda)


def test_a_surrogate_has_the_defenses_values_and_another_gradient() -> None:
    images, labels = examples(2)
    model = DefendedModel(Linear(), JPEG(50), shift=0)
    attack = make_attack("surrogate", LINF, AdaptiveOptions(steps=4), randomised=False, views=False)
    shown = attack.differentiated(model, images)
    torch.testing.assert_close(shown(images), model(images))
    slopes = [pgd.gradient(each, images, labels, pgd.margin, [[0, 1]])[1] for each in (shown, model)]
    assert not torch.allclose(slopes[0], slopes[1], rtol=0.1)
    oag = DefendedModel(Linear(), small(), shift=0)
    slopes = [pgd.gradient(each, images, labels, pgd.margin, [[0, 1]])[1] for each in (attack.differentiated(oag, images), oag)]
    assert torch.equal(slopes[0], slopes[1])  # BPDA


def noise_and_jpeg() -> nn.Module:
    return nn.Sequential(GaussianNoise(8, seed=0), JPEG(20))


WRAPS = [nn.Sequential, lambda *parts: v2.Compose(parts), lambda *_: OwnDefense(f"{__name__}:noise_and_jpeg")]


@pytest.mark.parametrize("wrap", WRAPS, ids=["Sequential", "v2.Compose", "OwnDefense"])
def test_noise_and_surrogate_see_what_comes_in_sequence(wrap: Callable[..., Any]) -> None:
    images, labels = examples(2)

    def slope(name: str, defense: Any) -> Tensor:
        model = DefendedModel(Linear(), defense, shift=0)
        attack = make_attack(name, LINF, AdaptiveOptions(), randomised=True, views=False)
        return pgd.gradient(attack.differentiated(model, images), images, labels, pgd.margin, [[0, 1]])[1]

    defense = wrap(GaussianNoise(8, seed=0), JPEG(20))
    assert torch.equal(slope("noise", defense), slope("noise", GaussianNoise(8, seed=0)))
    surrogate, bpda = slope("surrogate", defense), slope("margin", defense)
    assert not torch.allclose(surrogate, bpda, rtol=0.1)
    assert torch.equal(slope("surrogate", defense), slope("exact", defense))


def test_noise_is_bpda_for_several_defenses_in_one_model() -> None:
    images, _ = examples(2)
    model = DefendedModel(Linear(), [JPEG(20), GaussianNoise(8, seed=0)], shift=0)
    attack = make_attack("noise", LINF, AdaptiveOptions(), randomised=True, views=False)
    assert attack.differentiated(model, images) is model


def test_a_defense_that_requires_index_has_its_own_gradient() -> None:
    class Scaled(nn.Module):
        def forward(self, images: Tensor, *, index: Any) -> Tensor:
            return 0.5 * images

    images, labels = examples(2)
    attack = make_attack("exact", LINF, AdaptiveOptions(exact_steps=1), randomised=True, views=False)
    model = attack.differentiated(DefendedModel(Linear(), Scaled(), shift=0), images)
    assert model.gradient == "own"
    assert attack(model, images, labels, images, pgd.unknown).images.shape == images.shape


# of a randomised defense with 11 steps, 3 draws, 12 exact steps, 13 expected ones, 14 of APGD and 15 queries
MADE: dict[str, AdaptiveAttack] = {
    "transfer": AdaptiveAttack(PGD(LINF, 11, 1), "target"),
    "noise": AdaptiveAttack(PGD(LINF, 11, 3), "noise", one_view=True, continues=True),
    "bpda": AdaptiveAttack(PGD(LINF, 11, 3), "bpda", one_view=True, continues=True),
    "margin": AdaptiveAttack(PGD(LINF, 11, 3, loss=pgd.margin), "bpda", one_view=True, continues=True),
    "dlr": AdaptiveAttack(PGD(LINF, 11, 3, loss=pgd.dlr), "bpda", one_view=True, continues=True),
    "restart": AdaptiveAttack(PGD(LINF, 11, 3, loss=pgd.margin, random_start=5), "bpda", one_view=True),
    "exact": AdaptiveAttack(PGD(LINF, 12, 3, loss=pgd.margin), "exact", one_view=True, continues=True),
    "exact-eot": AdaptiveAttack(PGD(LINF, 13, 4, loss=pgd.margin), "exact", one_view=True, continues=True),
    "expected": AdaptiveAttack(PGD(LINF, 13, 3, loss=pgd.margin), "expected", one_view=True, continues=True),
    "surrogate": AdaptiveAttack(PGD(LINF, 11, 3, loss=pgd.margin), "surrogate", one_view=True, continues=True),
    "gray": AdaptiveAttack(PGD(LINF, 11, 3, basis="gray"), "bpda", one_view=True),
    "smooth": AdaptiveAttack(PGD(LINF, 11, 3, basis="smooth"), "bpda", one_view=True),
    "apgd": AdaptiveAttack(APGD(LINF, 14, 3, "ce")),
    "apgd-dlr": AdaptiveAttack(APGD(LINF, 14, 3, "dlr")),
    "apgd-targeted": AdaptiveAttack(APGD(LINF, 14, 3, "dlr-targeted")),
    "square": AdaptiveAttack(Square(LINF, 15, 3)),
    "hopskipjump": AdaptiveAttack(HopSkipJump(LINF, 4, 40)),
}


@pytest.mark.parametrize(("randomised", "views"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", [attack.key for attack in ADAPTIVE_ATTACKS])
def test_every_attack_of_the_list_is_what_it_says(name: str, randomised: bool, views: bool) -> None:
    options = AdaptiveOptions(steps=11, draws=3, exact_steps=12, expected_steps=13, apgd_steps=14, queries=15)
    expected = MADE[name]
    algorithm: Any = expected.algorithm
    if isinstance(algorithm, PGD):
        algorithm = dataclasses.replace(algorithm, deterministic=not randomised)
    alike = not randomised and (not views or name == "exact-eot")  # another draw would give the same
    if alike and name != "hopskipjump":
        algorithm = dataclasses.replace(algorithm, draws=1)
    expected = dataclasses.replace(expected, algorithm=algorithm)
    assert make_attack(name, LINF, options, randomised=randomised, views=views) == expected


def test_an_attack_that_is_not_in_the_list_raises() -> None:
    with pytest.raises(ValueError, match=r"attack must be one of .+transfer"):
        make_attack("pgd", LINF, AdaptiveOptions(), randomised=True, views=True)


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        (nn.Identity(), False),
        (JPEG(50), False),
        (nn.Sequential(JPEG(50), GaussianNoise(8)), True),
        (nn.Sequential(JPEG(50), nn.Identity()), False),
        (v2.GaussianNoise(), True),
        (GaussianNoise(8, seed=0), True),
        (OnlineAlternateGenerator(), True),
        (lambda images: images, True),  # nobody knows
    ],
)
def test_whether_draws_differ(defense: Any, expected: bool) -> None:
    assert adaptive.randomised(defense) is expected


def test_unrolled_reaches_into_defenses_in_turn() -> None:
    purify = small(compute_dtype=torch.float32)  # unrolled has the images' own precision
    model = DefendedModel(Linear(), nn.Sequential(GaussianNoise(8, seed=0), purify), shift=0, samples=2)
    exact = unrolled(model)
    images = synthetic_image(2, 3, SIDE, SIDE).float().requires_grad_()
    torch.testing.assert_close(exact(images, index=[3, 5]), model(images, index=[3, 5]), rtol=1e-3, atol=1e-3)
    (through,) = torch.autograd.grad(exact(images).sum(), images)
    (identity,) = torch.autograd.grad(model(images).sum(), images)
    assert not torch.allclose(through, identity, rtol=0.1)


def test_among_several_defenses_a_baseline_has_its_surrogates_gradient() -> None:
    model = DefendedModel(Linear(), [JPEG(20), GaussianNoise(8, seed=0)], shift=0)
    images = synthetic_image(2, 3, SIDE, SIDE).float().requires_grad_()
    exact = unrolled(model)
    torch.testing.assert_close(exact(images, index=3), model(images, index=3))
    slopes = [torch.autograd.grad(each(images, index=3)[:, 0].sum(), images)[0] for each in (exact, model)]
    assert not torch.allclose(slopes[0], slopes[1], rtol=0.1)  # the identity's


def test_the_gradient_over_draws_is_that_of_the_mean_probability() -> None:
    model = DefendedModel(Linear(), GaussianNoise(20, seed=0), shift=0, gradient="own")
    images, labels = examples()
    indices = [[7, 8, 9], [17, 18, 19], [27, 28, 29]]
    loss, slope = pgd.gradient(model, images, labels, pgd.cross_entropy, indices)
    point = images.clone().requires_grad_()
    mean = torch.stack([model(point, index=draw).softmax(1) for draw in indices]).mean(0)
    expected = -mean.log().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), point)[0])


def test_a_deterministic_defense_runs_once_for_the_gradients_of_all_views() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return images.square()

    model = DefendedModel(Linear(), Counted(), shift=3, gradient="own")
    images, labels = examples()
    turns, indices = pgd.OneView.of(model), [[0, 1, 2]] * 4
    loss, slope = pgd.gradient(turns, images, labels, pgd.cross_entropy, indices, deterministic=True)
    assert calls == [3]
    point = images.clone().requires_grad_()
    expected = pgd.cross_entropy(model(point), labels)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), point)[0])
    one_by_one = pgd.gradient(turns, images, labels, pgd.margin, indices)
    at_once = pgd.gradient(turns, images, labels, pgd.margin, indices, deterministic=True)
    torch.testing.assert_close(at_once, one_by_one)


def test_four_calls_of_one_view_are_the_four_views() -> None:
    model = DefendedModel(Linear(), nn.Identity(), shift=3)
    images, _ = examples()
    turns = pgd.OneView.of(model)
    mean = torch.stack([turns(images).softmax(1) for _ in range(4)]).mean(0)
    torch.testing.assert_close(mean, model(images).softmax(1))


bounds = st.one_of(
    st.builds(Bound, st.just("linf"), st.floats(LEAST_BOUND, 1)),
    st.builds(Bound, st.just("l2"), st.floats(LEAST_BOUND, 100)),
)


@settings(max_examples=50)
@given(bounds, st.integers(0, 100))
def test_projection_is_within_the_bound_and_idempotent(bound: Bound, seed: int) -> None:
    values = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projected = bound.projected(values)
    assert (length(projected, bound) <= bound.eps * (1 + 1e-12)).all()
    torch.testing.assert_close(bound.projected(projected), projected)


def test_losses_in_closed_form() -> None:
    logits, labels = torch.tensor([[3.0, 1.0, 0.0, -1.0]]), torch.tensor([1])
    assert pgd.margin(logits, labels).tolist() == [2.0]
    assert pgd.dlr(logits, labels).tolist() == pytest.approx([2 / 3])
    assert pgd.cross_entropy(logits, labels).item() == pytest.approx(math.log(sum(math.exp(v) for v in (3, 1, 0, -1))) - 1)


def test_a_basis_constrains_the_perturbation() -> None:
    images, labels = examples()
    grey = PGD(LINF, 3, 1, basis="gray")(undefended(), images, labels).images - images
    torch.testing.assert_close(grey[:, :1].expand_as(grey), grey)
    smooth = PGD(LINF, 3, 1, basis="smooth")(undefended(), images, labels).images - images
    assert (smooth[..., 1:] - smooth[..., :-1]).abs().max() < LINF.eps / 3  # two neighbours are an eighth of a cell apart


class Coin(nn.Module):
    """Says class 0 or class 1 by the stream's first number."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        drawn = [torch.rand((), generator=generator) < self.share for generator in _generators(images, index)]
        return torch.stack(drawn).float()[:, None, None, None].expand_as(images)


class Dimming(Coin):
    """As a coin that says class 1 always for bright images, every second time for images below 0.65, and never below 0.58."""

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        mean = images.mean((1, 2, 3), keepdim=True)
        return torch.where(mean > 0.65, 1, torch.where(mean > 0.58, super().forward(images, index=index), 0)).expand_as(images)


class Brightness(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_a_coin_is_judged_by_its_draws() -> None:
    images, labels = rand(40, 3, 4, 4), torch.ones(40, dtype=torch.long)
    judged = diagnostics.judge(DefendedModel(Brightness(), Coin(0.7), shift=0), images, labels, 41)
    assert judged.single_draw == pytest.approx(0.7, abs=0.05)
    assert (judged.n, judged.draws) == (40, 41)
    assert judged.accuracy > 0.95
    assert judged.every_draw == 0
    once = diagnostics.judge(DefendedModel(Brightness(), Coin(0.7), shift=0), images, labels, 1)
    assert once.counts == ()
    assert once.single_draw == once.every_draw == once.accuracy


def test_a_tie_is_not_a_correct_vote() -> None:
    class InStreams(nn.Module):
        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            return torch.stack([image * 0 + i % 2 for image, i in zip(images, index, strict=True)])

    model = DefendedModel(Brightness(), InStreams(), shift=0)
    judged = diagnostics.judge(model, rand(1, 3, 4, 4), torch.tensor([1]), 4)
    assert (judged.right, judged.counts) == ("0", (2,))


class Rounded(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (4 * images).round() / 4


def test_zero_gradients_are_said() -> None:
    images, labels = examples()
    found = PGD(LINF, 4, 1)(DefendedModel(Linear(), Rounded(), shift=0, gradient="own"), images, labels)
    said = diagnostics.diagnose("PGD", found)
    assert any("the gradient of 3 of 3 images is zero" in each for each in said)
    assert any("doesn't rise" in each for each in said)


def test_nothing_is_said_of_an_attack_that_works() -> None:
    images, labels = examples()
    found = PGD(Bound("linf", 0.01), 40, 1, loss=pgd.margin)(undefended(), images, labels)
    assert diagnostics.diagnose("PGD", found) == ()
    assert diagnostics.black_box_leads({adaptive_entry("bpda"): Cell("000"), adaptive_entry("square"): Cell("010")}) == ()


def test_a_black_box_that_wins_is_said() -> None:
    said = diagnostics.black_box_leads({adaptive_entry("bpda"): Cell("1" * 9 + "0"), adaptive_entry("square"): Cell("0" * 10)})
    assert said == ("square leaves 0.0%, less than attacks with gradients (90.0%)",)


def test_a_loss_that_still_rises_is_said() -> None:
    rising = AttackResult(torch.zeros(0), torch.arange(20.0)[:, None], torch.ones(1))
    assert "take more steps" in diagnostics.diagnose("PGD", rising)[0]


def test_gradients_of_two_sets_of_draws_agree_where_draws_say_something() -> None:
    images, labels = examples()

    class Signs(nn.Module):
        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            drawn = [torch.randn(image.shape, generator=g) for image, g in zip(images, _generators(images, index), strict=True)]
            return images * torch.stack(drawn)

    def of(first: int) -> pgd.Streams:
        return lambda i, draw: pgd.unknown(first + i, draw)

    noisy = DefendedModel(Linear(), Signs(), shift=0, gradient="own")
    few = diagnostics.agreement(noisy, images, labels, pgd.margin, 1)
    assert float(few.mean()) < 0.1
    alone = [diagnostics.agreement(noisy, images[i : i + 1], labels[i : i + 1], pgd.margin, 1, streams=of(i)) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), few)
    same = diagnostics.agreement(undefended(), images, labels, pgd.margin, 1)
    torch.testing.assert_close(same, torch.ones(3))


def test_bpda_passes_a_defense_without_a_gradient() -> None:
    images, labels = examples()
    with pytest.raises(RuntimeError):
        PGD(LINF, 1, 1)(unrolled(DefendedModel(Linear(), Rounding(), shift=0)), images, labels)
    found = PGD(LINF, 8, 1)(DefendedModel(Linear(), Rounding(), shift=0), images, labels)
    assert found.losses[-1].mean() > found.losses[0].mean()


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("l1", 1.0, "norm must be one of"),
        ("linf", 8.0, "eps must be at most 1 in L-infinity, .* got 8.0; give 8 grey levels as 8 / 255"),
        *((norm, eps, "eps must be a finite number >= 1e-06, got") for norm in ("linf", "l2") for eps in (-0.1, 0.0, 2e-158)),
        *((norm, eps, "eps must be a finite number >= 1e-06, got") for norm in ("linf", "l2") for eps in (math.inf, math.nan)),
    ],
)
def test_bad_bounds_raise(norm: Any, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bound(norm, eps)


@pytest.mark.parametrize("known", [False, True])
def test_a_column_attacks_each_row_with_its_own_defense(known: bool, tmp_path: Path) -> None:
    subject = subject_of(examples(5)[0], tmp_path)
    row = Row("noise", lambda seed: GaussianNoise(12, seed=seed), count=3)
    options = AdaptiveOptions(linf=(8,), steps=10, draws=1, judge=3, seed_known=known)
    clean, column = adaptive_columns(options, "linf", ("margin",))
    found = column.states(subject, row)
    images = subject.images[:3].float() / 255
    points = torch.from_numpy(found["point"].copy())
    assert points.shape == (3, 3, SIDE, SIDE)
    assert (points - images).abs().max() == pytest.approx(8 / 255)
    # the second chunk is what the attack finds on its image alone, in the streams of its place
    attacker = row.model(subject, seed=3 if known else 4)
    streams_of_third = (lambda image, draw: 2) if known else (lambda image, draw: pgd.unknown(2, draw))
    alone = PGD(LINF, 10, 1, loss=pgd.margin, streams=streams_of_third)(attacker, images[2:], subject.labels[2:3])
    torch.testing.assert_close(points[2:], alone.images)
    cell, _ = column.cell(subject, row, row.model(subject))
    defender = row.model(subject, seed=3)
    judged = diagnostics.judge(
        defender, points, subject.labels[:3], 1 if known else 3, streams=pgd.known if known else pgd.unknown
    )
    before, _ = clean.cell(subject, row, row.model(subject))
    assert cell.right == "".join(map(min, zip(judged.right, before.right, strict=True)))
    assert cell.draws == (1 if known else 3)


class Recording(nn.Module):
    """Changes nothing, and records the seed and the random stream of each image that it was given."""

    def __init__(self, seed: int, asked: list[tuple[int, int]]) -> None:
        super().__init__()
        self.seed, self.asked = seed, asked

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        self.asked += [(self.seed, stream) for stream in index]
        return images


def test_attacker_judge_and_comparison_draw_apart(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    subject, row = subject_of(examples(2)[0], tmp_path), Row("row", lambda seed: Recording(seed, asked))
    options = AdaptiveOptions(linf=(0.01,), steps=3, draws=2, judge=3)  # too small a bound: every attack is run on both images
    _, column = adaptive_columns(options, "linf", ("bpda", "margin"))
    column.states(subject, row)
    attacker = [stream for seed, stream in asked if seed == subject.seed + 1]
    judge = {stream for seed, stream in asked if seed == subject.seed}
    assert len(asked) == len(attacker) + 2 * 3 * 5  # clean images, before attacks, after each, and in the end
    assert len(attacker) == len(set(attacker)) == 2 * 2 * 3 * 2  # images, attacks, steps and draws
    asked.clear()
    model = row.model(subject, seed=subject.seed + 1)
    diagnostics.agreement(model, subject.images / 255, subject.labels, pgd.margin, 2)
    compared = {stream for _, stream in asked}
    assert len(compared) == len(asked) == 2 * 2 * 2  # images, sets and draws
    assert len(judge) == 2 * 3 * 4  # those of clean images are those in the end
    assert judge.isdisjoint(attacker)
    assert compared.isdisjoint(judge | set(attacker))


@pytest.mark.parametrize("name", ["APGD", "APGD, DLR", "APGD, targeted DLR", "Square", "HopSkipJump"])
def test_libraries_see_fresh_draws_of_an_image_or_one_fixed_draw(name: str) -> None:
    asked: list[tuple[int, int]] = []
    attack = dataclasses.replace(ATTACKS[name](LINF), streams=lambda image, draw: pgd.unknown(image + 7, draw))
    attack(DefendedModel(Linear(), Recording(0, asked), shift=0), *examples(2))
    counts = [sum(stream >> 32 == image + 8 for _, stream in asked) for image in range(2)]
    assert min(counts) > 1
    draws = [[0] * count if name == "HopSkipJump" else range(count) for count in counts]
    assert asked == [(0, pgd.unknown(image + 7, draw)) for image in range(2) for draw in draws[image]]


@pytest.mark.parametrize("attacks", [("bpda", "margin"), ("margin",)])
def test_images_that_can_be_lost_are_lost_at_their_bound_and_after_it(attacks: tuple[str, ...], tmp_path: Path) -> None:
    target = Linear()
    target.weight = target.weight[:2]
    images = torch.cat([examples()[0], 0.5 + 0.02 * torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))])
    subject = subject_of(images, tmp_path, chunk=3)
    pixels = subject.images / 255
    labels = target(pixels).argmax(1)
    labels[2] = 1 - labels[2]  # the target has it wrong to begin with
    subject = dataclasses.replace(subject, target=subject.target._replace(model=target), labels=labels)
    slope = (target.weight[0] - target.weight[1]).abs().sum()
    reach = (-pgd.margin(target(pixels), labels) / slope).tolist()  # largest bound at which an image is right
    order = sorted(each for each in reach if each > 0)
    bounds = (0.99 * order[0], order[2] + 1e-4, 1.01 * order[-1])
    options = AdaptiveOptions(linf=tuple(255 * eps for eps in bounds), steps=10)
    clean, *columns = adaptive_columns(options, "linf", attacks)
    row = Row("Undefended")
    assert clean.cell(subject, row, row.model(subject))[0].right == "".join("01"[each > 0] for each in reach)
    for eps, column in zip(bounds, columns, strict=True):
        cell, _ = column.cell(subject, row, row.model(subject))
        assert cell.right == "".join("01"[each > eps] for each in reach)
        assert abs(torch.from_numpy(column.states(subject, row)["point"].copy()) - pixels).max() <= eps + 1e-6
        assert all(2 not in attack.images for attack in cell.attacks)
    assert "1" not in cell.right


def test_a_larger_bound_computes_nothing_of_the_smaller_ones_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, row = subject_of(examples(4)[0], tmp_path), Row("Undefended")
    options = AdaptiveOptions(linf=(1, 2), steps=2)
    before = adaptive_columns(options, "linf", ("bpda",))[-1].cell(subject, row, row.model(subject))[0]
    ran: list[str] = []
    attacked = Adaptive._attacked

    def counted(self: Adaptive, *rest: Any) -> Any:
        ran.append(self.label)
        return attacked(self, *rest)

    monkeypatch.setattr(Adaptive, "_attacked", counted)
    *_, same, larger = adaptive_columns(dataclasses.replace(options, linf=(1, 2, 4)), "linf", ("bpda",))
    assert same.cell(subject, row, row.model(subject))[0] == before
    assert ran == []
    larger.cell(subject, row, row.model(subject))
    assert ran == ["L∞ 4/255"] * 2  # chunks


def test_a_start_in_another_basis_raises() -> None:
    images, labels = examples()
    with pytest.raises(ValueError, match="start"):
        PGD(LINF, 1, 1, basis="gray")(undefended(), images, labels, start=images)


def test_a_second_attack_goes_on_from_the_first() -> None:
    images, labels = examples()
    first = PGD(LINF, 2, 1, loss=pgd.margin)(undefended(), images, labels)
    second = PGD(LINF, 2, 1, loss=pgd.margin)(undefended(), images, labels, start=first.images)
    assert (second.losses[0] > first.losses[0]).all()


@pytest.mark.parametrize("name", ["transfer", "noise"])
def test_attacks_that_leave_the_defense_out_keep_the_normalization(name: str) -> None:
    normalize = v2.Normalize([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    squashed = nn.Sequential(nn.Tanh(), Linear())  # its gradient depends on the point
    models = [undefended(nn.Sequential(normalize, squashed)), undefended(squashed)]
    models[1].normalize = normalize
    attack = make_attack(name, LINF, AdaptiveOptions(steps=3), randomised=False, views=False)
    images, _ = examples()
    labels = models[0](images).argmax(1)
    found = [attack(model, images, labels, images, pgd.unknown).images for model in models]
    assert not found[0].equal(images)
    assert torch.equal(*found)


def test_noise_takes_bpda_where_the_first_defense_has_no_gradient() -> None:
    images, labels = examples()
    model = DefendedModel(Linear(), JPEG(50), shift=0)
    attacks = [make_attack(name, LINF, AdaptiveOptions(steps=3), randomised=False, views=False) for name in ("noise", "bpda")]
    found, expected = (attack(model, images, labels, images, pgd.unknown).images for attack in attacks)
    assert torch.equal(found, expected)


def test_a_random_start_is_that_of_the_image_wherever_it_is_in_its_batch() -> None:
    images, labels = examples()
    attack = PGD(LINF, 1, 1, random_start=5)
    whole = attack(undefended(), images, labels).images
    later = dataclasses.replace(attack, streams=lambda image, draw: pgd.unknown(image + 1, draw))
    assert torch.equal(later(undefended(), images[1:], labels[1:]).images, whole[1:])


def test_unrolled_is_independent_of_autocast() -> None:
    images, _ = examples(1)
    model = Unrolled(OnlineAlternateGenerator(network_steps=2, filters=4, seed=0))
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images), expected)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "partial": functools.partial,
    "compile": functools.partial(torch.compile, backend="eager"),
    "Sequential": nn.Sequential,
    "v2.Compose": lambda defense: v2.Compose([defense]),
    "list": lambda defense: [nn.Sequential(defense)],
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_oag_is_unrolled(wrap: Callable[[nn.Module], Any]) -> None:
    images, labels = examples(1)

    def slope(defense: Any) -> Tensor:
        model = unrolled(DefendedModel(Linear(), defense, shift=0))
        return pgd.gradient(model, images, labels, pgd.margin, [[0]])[1]

    oag = OnlineAlternateGenerator(network_steps=2, filters=4, seed=0, compute_dtype=torch.float32)
    assert torch.equal(slope(wrap(oag)), slope(oag))


def test_an_oag_that_is_out_of_reach_is_a_warning() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = OnlineAlternateGenerator(network_steps=2, filters=4)

        def forward(self, images: Tensor) -> Tensor:
            purified: Tensor = self.inner(images)
            return purified

    with pytest.warns(UserWarning, match="the OnlineAlternateGenerator in Mine keeps its straight-through gradient"):
        unrolled(DefendedModel(Linear(), Mine()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: PGD(LINF, 0), "steps must be an integer >= 1"),
        (lambda: PGD(LINF, draws=0), "draws must be an integer >= 1"),
        (lambda: PGD(LINF, basis="Smooth"), "basis must be one of"),  # type: ignore[arg-type]
        (lambda: adaptive.AdaptiveAttack(PGD(LINF), "Exact"), "gradient must be one of"),  # type: ignore[arg-type]
    ],
)
def test_bad_attacks_are_errors(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_no_images_are_unrolled_to_none() -> None:
    model = Unrolled(OnlineAlternateGenerator(network_steps=2, filters=4))
    assert model(torch.zeros(0, 3, 16, 16)).shape == (0, 3, 16, 16)


def test_composed_noises_of_one_seed_are_independent() -> None:
    grey = torch.full((1, 3, 64, 64), 0.5)
    once, twice = (
        (applied(nn.Sequential(*[GaussianNoise(5, seed=0)] * count), grey, 0) - grey).std().item() for count in (1, 2)
    )
    assert twice / once == pytest.approx(math.sqrt(2), rel=0.03)


def test_a_margin_over_draws_is_their_mean() -> None:
    """Against autograd of the mean: no draw has more weight than another."""
    images, labels = examples()
    model = DefendedModel(Linear(), GaussianNoise(60, seed=0), shift=0)
    indices = [[pgd.unknown(i, draw) for i in range(3)] for draw in range(4)]
    for loss in (pgd.margin, pgd.dlr):
        found, slope = pgd.gradient(model, images, labels, loss, indices)
        point = images.clone().requires_grad_()
        mean = torch.stack([loss(model(point, index=each), labels) for each in indices]).mean(0)
        torch.testing.assert_close(found, mean.detach())
        torch.testing.assert_close(slope, torch.autograd.grad(mean.sum(), point)[0])


def test_pgd_keeps_the_best_point_of_a_deterministic_defense() -> None:
    class Ridge(nn.Module):
        """The margin is highest where the mean is 0.52: steps that are too long pass it."""

        def forward(self, images: Tensor) -> Tensor:
            away = -(images.mean((1, 2, 3)) - 0.52).abs()
            return torch.stack([torch.zeros_like(away), away], 1)

    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    attack = PGD(Bound("linf", 0.1), 5, 1, loss=pgd.margin, decay=0, step_size=0.5, halvings=())
    last, best = (
        dataclasses.replace(attack, deterministic=each)(undefended(Ridge()), images, labels).images for each in (False, True)
    )
    margins = [pgd.margin(Ridge()(each), labels) for each in (images, last, best)]
    assert (margins[1] < margins[0]).all()
    assert (margins[2] >= margins[0]).all()


class Found:
    """Attacks that are known by heart: the brightness that each leaves."""

    def __init__(self, **levels: float) -> None:
        self.levels = levels

    def __call__(self, name: str, *_: Any, **__: Any) -> Any:
        def attack(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, streams: Any) -> AttackResult:
            return AttackResult(torch.full_like(images, self.levels[name]), torch.empty(0, len(images)), torch.zeros(0))

        return attack


def judged_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defense: nn.Module, attacks: Found, linf: tuple[float, ...]
) -> Any:
    monkeypatch.setattr("oag_transform.evaluation.columns.make_attack", attacks)
    monkeypatch.setattr(Adaptive, "_gradients", lambda *_: None)
    subject = subject_of(torch.full((8, 3, SIDE, SIDE), 0.7), tmp_path)
    subject = dataclasses.replace(
        subject, target=subject.target._replace(model=Brightness()), labels=torch.ones(8, dtype=torch.long)
    )
    column = adaptive_columns(AdaptiveOptions(linf=linf, judge=9), "linf", tuple(attacks.levels))[-1]
    row = Row("row", lambda seed: defense)
    return column.states(subject, row), column.cell(subject, row, row.model(subject))[0]


def test_a_weaker_attack_does_not_replace_the_point_of_a_stronger_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = Found(bpda=0.52, margin=0.6, dlr=0.51, restart=0.8)  # all are right: the margin tells them apart
    states, cell = judged_after(tmp_path, monkeypatch, nn.Identity(), attacks, (8,))
    assert cell.right == "1" * 8
    assert states["point"] == pytest.approx(0.51)


def test_an_image_is_attacked_until_no_draw_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = judged_after(tmp_path, monkeypatch, Dimming(0.15), Found(bpda=0.6, margin=0.55), (8,))
    right = states["counts"][:, 0] > 0
    assert right.any()
    assert not right.all()
    assert np.array_equal(states["attacked"][:, 1], right)


def test_a_weak_attack_before_a_strong_one_does_not_protect_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote that is lost by chance is no end: half of the images would keep the point of the weak attack."""
    states, _ = judged_after(tmp_path, monkeypatch, Dimming(0.5), Found(bpda=0.6, exact=0.55), (8,))
    assert not states["votes"][:, 0].all()
    assert states["attacked"][:, 1].all()
    assert not states["right"].any()
    assert states["point"] == pytest.approx(0.55)


def test_a_lost_vote_is_taken_at_a_lower_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two points the one whose vote is lost is better, whatever their margins."""
    after = [BETWEEN + MOST_JUDGES * attack for attack in range(3)]  # none, the first, the second
    said = {after[0]: (9, True, 0.0), after[1]: (3, True, 5.0), after[2]: (3, False, 1.0)}

    def verdict(model: nn.Module, images: Tensor, *_: Any, first: int, **__: Any) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([value] * len(images)) for value in said.get(first, (9, True, 0.0)))

    monkeypatch.setattr("oag_transform.evaluation.columns.verdict", verdict)
    states, _ = judged_after(tmp_path, monkeypatch, Coin(0.5), Found(bpda=0.6, exact=0.55), (8,))
    assert states["point"] == pytest.approx(0.55)


def test_images_that_were_lost_at_a_smaller_bound_are_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cell = judged_after(tmp_path, monkeypatch, Coin(0.4), Found(bpda=0.6), (4, 8))
    assert cell.accuracy < 0.5
    assert cell.single_draw == pytest.approx(0.4, abs=0.2)


def test_losses_of_different_views_choose_no_point() -> None:
    images, labels = examples(2)
    model = pgd.OneView.of(DefendedModel(Linear(), nn.Identity(), shift=3))
    attack = PGD(LINF, 5, 1, loss=pgd.margin, deterministic=True)
    last = dataclasses.replace(attack, deterministic=False)
    assert torch.equal(attack(model, images, labels).images, last(pgd.OneView.of(model), images, labels).images)


@pytest.mark.parametrize("attack", [PGD(LINF, 2, 1), Square(LINF, 2)], ids=["PGD", "Square"])
def test_attacks_refuse_what_they_cannot_attack(attack: Any) -> None:
    images, labels = examples(2)
    model = undefended()
    with pytest.raises(ValueError, match="divide 0-255 images by 255"):
        attack(model, 255 * images, labels)
    with pytest.raises(ValueError, match="purify before any normalisation"):
        attack(model, (images - 0.45) / 0.22, labels)
    with pytest.raises(TypeError, match=r"expected a DefendedModel, got Linear; the undefended target is"):
        attack(Linear(), images, labels)
    with pytest.raises(ValueError, match=r"expected labels of at least 0, got -100 to 0"):
        attack(model, images, torch.tensor([0, -100]))
    with pytest.raises(TypeError, match=r"expected labels as a tensor of integers, got torch\.float32"):
        attack(model, images, labels.float())


def test_attacks_are_refused_with_what_is_no_bound_or_loss() -> None:
    with pytest.raises(TypeError, match="bound must be a Bound, such as"):
        PGD(4 / 255)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bound must be a Bound, such as"):
        Square(4 / 255)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss must be a function such as pgd\.margin, got 'margin'"):
        PGD(LINF, loss="margin")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a DefendedModel, got Sequential"):
        unrolled(nn.Sequential(Linear()))  # type: ignore[arg-type]
    images, labels = examples(2)
    with pytest.raises(ValueError, match="draws must be an integer >= 1, got 0"):
        diagnostics.judge(undefended(), images, labels, 0)


def test_pgd_in_inference_mode_and_with_any_integers() -> None:
    images, labels = examples(2)
    attack, model = PGD(LINF, 3, 1), undefended()
    expected = attack(model, images, labels).images
    with torch.inference_mode():
        found = attack(model, images.clone(), labels.int()).images
    assert torch.equal(found, expected)


def test_labels_that_the_model_has_no_class_for_are_named() -> None:
    images, _ = examples(2)
    with pytest.raises(ValueError, match=r"expected labels from 0 to \d+, got 0 to 99"):
        PGD(LINF, 1, 1)(undefended(), images, torch.tensor([0, 99]))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: APGD(LINF, steps=0), "steps must be an integer >= 1"),
        (lambda: APGD(LINF, draws=0), "draws must be an integer >= 1"),
        (lambda: APGD(LINF, restarts=0), "restarts must be an integer >= 1"),
        (lambda: APGD(LINF, targets=0), "targets must be an integer >= 1"),
        (lambda: APGD(LINF, loss="DLR"), "loss must be one of"),  # type: ignore[arg-type]
        (lambda: Square(LINF, queries=0), "queries must be an integer >= 1"),
        (lambda: HopSkipJump(LINF, steps=0), "steps must be an integer >= 1"),
        (lambda: PGD(LINF, decay=-1), "decay must be a finite number >= 0"),
        (lambda: PGD(LINF, step_size=0), "step_size must be a finite number > 0"),
        (lambda: PGD(LINF, halvings=(3,)), r"halvings \(shares of the steps\) must be a finite number"),
    ],
)
def test_arguments_that_would_pass_for_robustness_are_errors(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_an_attack_without_the_gradient_that_it_is_named_for_says_so() -> None:
    images, labels = examples(2)
    attack = make_attack("exact", LINF, AdaptiveOptions(exact_steps=1), randomised=False, views=False)
    found = {
        name: attack(DefendedModel(Linear(), defense, shift=0), images, labels, images, pgd.unknown)
        for name, defense in {"none": DeepImagePrior(steps=1), "own": nn.Identity()}.items()
    }
    assert diagnostics.diagnose("exact", found["none"]) == (
        "exact: no gradient through the defense was found; BPDA took its place",
    )
    assert not found["own"].fell_back


def in_place(images: Tensor) -> Tensor:
    changed = images.sigmoid()
    changed *= 0.5  # autograd needs the values of the sigmoid
    return changed


def in_numpy(images: Tensor) -> Tensor:
    return torch.from_numpy(0.5 * images.numpy())


@pytest.mark.parametrize("defense", [in_place, in_numpy], ids=["in place", "in NumPy"])
def test_a_defense_that_works_without_a_gradient_alone_is_attacked_by_bpda(defense: Callable[[Tensor], Tensor]) -> None:
    images, labels = examples(2)
    attack = make_attack("exact", LINF, AdaptiveOptions(exact_steps=1), randomised=False, views=False)
    found = attack(DefendedModel(Linear(), defense, shift=0), images, labels, images, pgd.unknown)
    assert found.fell_back
    assert not found.images.equal(images)


def test_one_of_several_defenses_without_a_gradient_has_the_identitys_and_it_is_said() -> None:
    images, labels = examples(2)
    attack = make_attack("exact", LINF, AdaptiveOptions(exact_steps=1), randomised=False, views=False)
    for several, expected in (([small(), v2.Lambda(in_numpy)], True), ([small(), JPEG(50)], False)):
        found = attack(DefendedModel(Linear(), several, shift=0), images, labels, images, pgd.unknown)
        assert found.fell_back is expected
        assert not found.images.equal(images)


def test_bound_arguments_of_a_partial_stay_under_attack() -> None:
    images, _ = examples(2)
    model = DefendedModel(Linear(), functools.partial(small(), index=[8, 8]), shift=0)
    torch.testing.assert_close(unrolled(model)(images, index=[1, 2]), model(images, index=[1, 2]))


def test_the_result_of_pgd_has_no_graph() -> None:
    images, labels = examples(2)
    assert not PGD(LINF, 2, 1)(undefended(), images.clone().requires_grad_(), labels).images.requires_grad


@pytest.mark.parametrize("attack", [PGD(LINF, 1, 1, deterministic=True), APGD(LINF, 1), Square(LINF, 1), HopSkipJump(LINF)])
def test_every_attack_names_labels_of_no_class(attack: Any) -> None:
    images, _ = examples(2)
    with pytest.raises(ValueError, match=r"expected labels from 0 to \d+, got (0|99) to 99"):
        attack(undefended(), images, torch.tensor([0, 99]))


@pytest.mark.parametrize(
    "attack", [APGD(LINF, 2), Square(LINF, 2), HopSkipJump(LINF, 1, 2)], ids=lambda attack: type(attack).__name__
)
def test_attacks_of_libraries_take_any_integers_and_no_images(attack: Any) -> None:
    images, labels = examples(1)
    assert torch.equal(attack(undefended(), images, labels.int()).images, attack(undefended(), images, labels).images)
    assert attack(undefended(), images[:0], labels[:0]).images.shape == images[:0].shape


def test_hopskipjump_is_the_same_alone_and_in_a_batch() -> None:
    images, labels = examples(3)
    together = HopSkipJump(LINF, 1, 4)(undefended(), images, labels).images
    alone = HopSkipJump(LINF, 1, 4, streams=lambda image, draw: pgd.unknown(2, draw))(
        undefended(), images[2:], labels[2:]
    ).images
    assert torch.equal(alone, together[2:])


@pytest.mark.parametrize("start", [torch.zeros(1, 3, 4, 4), "images"])
def test_a_start_that_is_none_is_named(start: Any) -> None:
    images, labels = examples(2)
    with pytest.raises(ValueError, match="start must be a tensor of the shape of the images"):
        PGD(LINF, 1, 1)(undefended(), images, labels, start=start)


def test_a_known_seed_makes_the_draws_of_a_seeded_defense_equal_and_no_others() -> None:
    assert not adaptive.randomised(GaussianNoise(8, seed=0), seed_known=True)
    assert adaptive.randomised(v2.GaussianNoise(), seed_known=True)
    assert adaptive.randomised(torch.compile(nn.Sequential(GaussianNoise(8)), backend="eager"))
    assert adaptive.randomised(Unrolled(small()))
