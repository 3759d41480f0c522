"""Attacks that know the defense: bounds, gradients, what they find, and when they say that they can't be trusted."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import adaptive as benchmark
from benchmarks import adversaries, convergence
from oag_transform import DefendedModel, OnlineAlternateGenerator, streams
from oag_transform.baselines.compose import Compose
from oag_transform.baselines.filters import JPEG, BitDepth, GaussianNoise
from oag_transform.evaluation import adaptive, adaptive_checks
from oag_transform.evaluation import unrolled as unrolled_module
from oag_transform.evaluation.adaptive import APGD, PGD, Bound, Found, HopSkipJump, Square
from oag_transform.evaluation.data import Preprocessing
from oag_transform.evaluation.measure import Candidate, Column, Subject
from oag_transform.evaluation.results import Cell
from oag_transform.evaluation.store import Store
from oag_transform.evaluation.targets import Target
from oag_transform.evaluation.unrolled import Unrolled, differentiable, unrolled

from .photographs import picture

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


def bare(target: nn.Module | None = None) -> DefendedModel:
    return DefendedModel(target or Linear(), nn.Identity(), shift=0)


def examples(count: int = 3) -> tuple[Tensor, Tensor]:
    """Pictures well inside of [0, 1], and the classes that the target gives them."""
    images = 0.3 + 0.4 * picture(count, 3, SIDE, SIDE).float()
    return images, Linear()(images).argmax(1)


ATTACKS: dict[str, Callable[[Bound], Any]] = {
    "PGD": lambda bound: PGD(bound, 6, 1),
    "PGD, random start": lambda bound: PGD(bound, 3, 2, loss=adaptive.margin, random_start=3),
    "PGD, alike in channels": lambda bound: PGD(bound, 4, 1, paint=adaptive.alike_in_channels),
    "PGD, smooth": lambda bound: PGD(bound, 4, 1, paint=adaptive.Smoothly(8)),
    "APGD": lambda bound: APGD(bound, 5, 1),
    "APGD, DLR": lambda bound: APGD(bound, 5, 1, "dlr"),
    "APGD, targeted DLR": lambda bound: APGD(bound, 5, 1, "dlr-targeted"),
    "Square": lambda bound: Square(bound, 30, 1),
    "HopSkipJump": lambda bound: HopSkipJump(bound, 2, 10),
}
needs_pyautoattack = {"APGD", "APGD, DLR", "APGD, targeted DLR", "Square"}


def made(name: str, bound: Bound) -> Any:
    if name in needs_pyautoattack:
        pytest.importorskip("pyautoattack")
    return ATTACKS[name](bound)


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
    found = made(name, bound)(bare(), images, labels)
    assert found.images.shape == images.shape
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert (length(found.images - images, bound) <= bound.eps + 1e-6).all()
    assert images.equal(before)


@pytest.mark.parametrize("bound", [LINF, L2], ids=str)
@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "HopSkipJump"])
def test_the_loss_rises(name: str, bound: Bound) -> None:
    images, labels = examples()
    found = made(name, bound)(bare(), images, labels)
    assert (adaptive.margin(Linear()(found.images), labels) > adaptive.margin(Linear()(images), labels)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_two_linear_classes_pgd_finds_the_best_perturbation(norm: adaptive.Norm) -> None:
    target = Linear()
    target.weight = target.weight[:2]
    images, bound = examples()[0], Bound(norm, 0.02 if norm == "linf" else 0.5)
    labels = target(images).argmax(1)
    found = PGD(bound, 10, 1, loss=adaptive.margin)(bare(target), images, labels)
    slope = (target.weight[0] - target.weight[1]).double()
    most = bound.eps * (slope.abs().sum() if norm == "linf" else slope.norm())
    gained = adaptive.margin(target(found.images), labels) - adaptive.margin(target(images), labels)
    torch.testing.assert_close(gained.double(), most.expand(3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["APGD", "Square", "HopSkipJump"])
def test_libraries_leave_the_global_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    made(name, LINF)(bare(), *examples(1))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ["PGD", "APGD", "Square"])
def test_a_defense_that_does_nothing_falls_as_the_bare_target_does(name: str) -> None:
    class Nothing(nn.Module):
        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            return images

    attack, (images, labels) = made(name, LINF), examples()
    behind = DefendedModel(Linear(), Nothing(), shift=0)
    assert attack(behind, images, labels).images.equal(attack(bare(), images, labels).images)


def test_who_knows_the_seed_beats_who_does_not() -> None:
    class Dropped(nn.Module):
        """Nine pixels of ten are hidden, other ones in each stream."""

        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            masks = [torch.rand(image.shape, generator=g) for image, g in zip(images, _generators(images, index), strict=True)]
            return images * (torch.stack(masks) < 0.1)

    images, labels = examples()
    model = DefendedModel(Linear(), Dropped(), shift=0, gradient="own")

    def gained(which: adaptive.Streams) -> Tensor:
        found = PGD(LINF, 10, 1, loss=adaptive.margin, streams=which)(model, images, labels)
        return adaptive.margin(model(found.images), labels) - adaptive.margin(model(images), labels)

    assert (gained(adaptive.known) > 1.5 * gained(adaptive.unknown)).all()


def _generators(images: Tensor, index: Any) -> list[torch.Generator]:
    at = range(index, index + len(images)) if isinstance(index, int) else index
    return streams.generators(5, at, images.device)


def small(**changes: Any) -> OnlineAlternateGenerator:
    made: dict[str, Any] = {"network_steps": 4, "filters": 8, "kernel_size": 5, "strength": 1.0, "threshold": 1.0, "seed": 0}
    return OnlineAlternateGenerator(**made | changes)


def test_unrolled_purifies_as_the_transform_does() -> None:
    images = picture(2, 3, SIDE, SIDE)
    torch.testing.assert_close(Unrolled(small())(images, index=[4, 9]), small()(images, index=[4, 9]))


@pytest.mark.parametrize("strength", [1.0, None])
def test_the_exact_gradient_is_what_finite_differences_say(strength: float | None) -> None:
    # without a threshold what is drawn is piecewise smooth, and a small difference crosses no border
    model = unrolled(DefendedModel(Linear().double(), small(threshold=0.0, strength=strength), shift=0))
    model.target.weight = model.target.weight.double()
    image, label = 0.3 + 0.4 * picture(1, 3, SIDE, SIDE), torch.tensor([1])
    _, slope = adaptive.gradient(model, image, label, adaptive.cross_entropy, [[3]])
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        return adaptive.cross_entropy(model(at, index=[3]), label)

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


def test_expected_gradients_are_of_the_same_values_and_of_what_jumps_too() -> None:
    images = picture(1, 3, SIDE, SIDE)
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
    assert differentiable(defense, picture(1, 3, SIDE, SIDE).float()) is expected


def test_a_column_of_exact_gradients_takes_bpda_where_there_are_none(tmp_path: Path) -> None:
    images, _ = examples(2)
    pixels = (255 * images).round().to(torch.uint8)
    target = Target("linear", Linear(), Preprocessing(SIDE, SIDE), "fingerprint")
    labels = Linear()(pixels / 255).argmax(1)
    subject = Subject(target, pixels, labels, ("a", "b", "c", "d"), 2, Store(tmp_path, chunk=2), 3, torch.device("cpu"))
    attack = PGD(LINF, 4, 1, loss=adaptive.margin)

    def found(make: Callable[[int], nn.Module]) -> tuple[Tensor, Tensor]:
        row = Candidate("row", make)
        exact, bpda = (
            Column("PGD", adaptive.ThroughDefense(attack, exact=each)).images(subject, row) for each in (True, False)
        )
        return exact, bpda

    exact, bpda = found(lambda _: JPEG(50))
    assert exact.equal(bpda)
    exact, bpda = found(lambda seed: small(seed=seed))
    assert not exact.equal(bpda)


def test_unrolled_reaches_into_defenses_in_turn() -> None:
    purify = small(compute_dtype=torch.float32)  # unrolled has the images' own precision
    model = DefendedModel(Linear(), Compose(GaussianNoise(8, seed=0), purify), shift=0, samples=2)
    exact = unrolled(model)
    images = picture(2, 3, SIDE, SIDE).float().requires_grad_()
    torch.testing.assert_close(exact(images, index=[3, 5]), model(images, index=[3, 5]), rtol=1e-3, atol=1e-3)
    (through,) = torch.autograd.grad(exact(images).sum(), images)
    (identity,) = torch.autograd.grad(model(images).sum(), images)
    assert not torch.allclose(through, identity, rtol=0.1)


def test_the_gradient_over_draws_is_that_of_the_mean_probability() -> None:
    model = DefendedModel(Linear(), GaussianNoise(20, seed=0), shift=0, gradient="own")
    images, labels = examples()
    indices = [[7, 8, 9], [17, 18, 19], [27, 28, 29]]
    loss, slope = adaptive.gradient(model, images, labels, adaptive.cross_entropy, indices)
    point = images.clone().requires_grad_()
    mean = torch.stack([model(point, index=draw).softmax(1) for draw in indices]).mean(0)
    expected = -mean.log().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), point)[0])


def test_four_calls_of_views_in_turn_are_the_four_views() -> None:
    model = DefendedModel(Linear(), nn.Identity(), shift=3)
    images, _ = examples()
    turns = adaptive.in_turn(model)
    mean = torch.stack([turns(images).softmax(1) for _ in range(4)]).mean(0)
    torch.testing.assert_close(mean, model(images).softmax(1))


bounds = st.one_of(
    st.builds(Bound, st.just("linf"), st.floats(adaptive.LEAST_BOUND, 1)),
    st.builds(Bound, st.just("l2"), st.floats(adaptive.LEAST_BOUND, 100)),
)


@settings(max_examples=50)
@given(bounds, st.integers(0, 100))
def test_held_is_within_the_bound_and_leaves_what_is(bound: Bound, seed: int) -> None:
    values = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    held = bound.held(values)
    assert (length(held, bound) <= bound.eps * (1 + 1e-12)).all()
    torch.testing.assert_close(bound.held(held), held)


def test_losses_in_closed_form() -> None:
    logits, labels = torch.tensor([[3.0, 1.0, 0.0, -1.0]]), torch.tensor([1])
    assert adaptive.margin(logits, labels).tolist() == [2.0]
    assert adaptive.dlr(logits, labels).tolist() == pytest.approx([2 / 3])
    assert adaptive.cross_entropy(logits, labels).item() == pytest.approx(math.log(sum(math.exp(v) for v in (3, 1, 0, -1))) - 1)


def test_paints_make_what_they_say() -> None:
    images, labels = examples()
    grey = PGD(LINF, 3, 1, paint=adaptive.alike_in_channels)(bare(), images, labels).images - images
    torch.testing.assert_close(grey[:, :1].expand_as(grey), grey)
    smooth = PGD(LINF, 3, 1, paint=adaptive.Smoothly(8))(bare(), images, labels).images - images
    assert (smooth[..., 1:] - smooth[..., :-1]).abs().max() < LINF.eps / 3  # two neighbours are an eighth of a cell apart


class Coin(nn.Module):
    """Says class 0 or class 1 by the stream's first number."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        drawn = [torch.rand((), generator=generator) < self.share for generator in _generators(images, index)]
        return torch.stack(drawn).float()[:, None, None, None].expand_as(images)


class Brightness(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_judgement_of_a_coin() -> None:
    images, labels = torch.rand(40, 3, 4, 4), torch.ones(40, dtype=torch.long)
    judged = adaptive_checks.judge(DefendedModel(Brightness(), Coin(0.7), shift=0), images, labels, 41)
    assert judged.mean.accuracy == pytest.approx(0.7, abs=0.05)
    assert judged.mean.n == 40
    assert judged.majority.accuracy > 0.95
    assert judged.worst.accuracy == 0
    assert judged.shares.mean() == pytest.approx(judged.mean.accuracy)


def test_a_tie_is_lost() -> None:
    class InStreams(nn.Module):
        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            return torch.stack([image * 0 + i % 2 for image, i in zip(images, index, strict=True)])

    model = DefendedModel(Brightness(), InStreams(), shift=0)
    assert adaptive_checks.judge(model, torch.rand(1, 3, 4, 4), torch.tensor([1]), 4).majority.right == "0"


def test_worst_points_are_each_images_own() -> None:
    dark, bright = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    points = {"first": torch.stack([dark[0], bright[0]]), "second": torch.stack([bright[1], dark[1]])}
    chosen, names = adaptive_checks.worst_points(bare(Brightness()), points, torch.tensor([1, 1]), 1)
    assert names == ("first", "second")
    assert chosen.equal(dark)


class Rounded(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (4 * images).round() / 4


def test_zero_gradients_are_said() -> None:
    images, labels = examples()
    found = PGD(LINF, 4, 1)(DefendedModel(Linear(), Rounded(), shift=0, gradient="own"), images, labels)
    said = adaptive_checks.doubts({"PGD": found}, {"PGD": Cell("111")})
    assert any("the gradient of 3 of 3 images is zero" in each for each in said)
    assert any("doesn't rise" in each for each in said)


def test_no_doubts_about_an_attack_that_works() -> None:
    images, labels = examples()
    found = PGD(Bound("linf", 0.01), 40, 1, loss=adaptive.margin)(bare(), images, labels)
    assert (
        adaptive_checks.doubts(
            {"PGD": found, "Square": found}, {"PGD": Cell("000"), "Square": Cell("010")}, black_box=("Square",)
        )
        == ()
    )


def test_a_black_box_that_wins_is_said() -> None:
    nothing = Found(torch.zeros(0), torch.zeros(0, 3), torch.zeros(0))
    said = adaptive_checks.doubts(
        {"PGD": nothing, "Square": nothing}, {"PGD": Cell("1" * 9 + "0"), "Square": Cell("0" * 10)}, black_box=["Square"]
    )
    assert said == ("Square leaves 0.00, less than attacks with gradients (0.90)",)


def test_a_loss_that_still_rises_is_said() -> None:
    rising = Found(torch.zeros(0), torch.arange(20.0)[:, None], torch.ones(1))
    assert "take more steps" in adaptive_checks.doubts({"PGD": rising}, {"PGD": Cell("1")})[0]


def test_draws_that_say_nothing_together_are_said() -> None:
    images, labels = examples()

    class Signs(nn.Module):
        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            drawn = [torch.randn(image.shape, generator=g) for image, g in zip(images, _generators(images, index), strict=True)]
            return images * torch.stack(drawn)

    noisy = DefendedModel(Linear(), Signs(), shift=0, gradient="own")
    few = adaptive_checks.agreement(noisy, images, labels, adaptive.margin, 1)
    assert any("agree" in each for each in adaptive_checks.doubts({}, {}, agreements={"PGD": few}))
    same = adaptive_checks.agreement(bare(), images, labels, adaptive.margin, 1)
    torch.testing.assert_close(same, torch.ones(3))


def test_bpda_passes_a_defense_without_a_gradient() -> None:
    images, labels = examples()
    with pytest.raises(RuntimeError):
        PGD(LINF, 1, 1)(unrolled(DefendedModel(Linear(), JPEG(50), shift=0)), images, labels)
    found = PGD(LINF, 8, 1)(DefendedModel(Linear(), JPEG(50), shift=0), images, labels)
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
def test_a_column_attacks_each_row_through_its_own_defense(known: bool, tmp_path: Path) -> None:
    images, _ = examples(5)
    pixels = (255 * images).round().to(torch.uint8)
    labels = Linear()(pixels / 255).argmax(1)
    target = Target("linear", Linear(), Preprocessing(SIDE, SIDE), "fingerprint")
    subject = Subject(target, pixels, labels, ("a", "b", "c", "d"), 5, Store(tmp_path, chunk=2), 3, torch.device("cpu"))
    row = Candidate("noise", lambda seed: GaussianNoise(12, seed=seed), count=3)
    column = Column("PGD", adaptive.ThroughDefense(PGD(LINF, 10, 1, loss=adaptive.margin), known=known))
    attacked = column.images(subject, row)
    assert attacked.dtype == torch.uint8
    assert attacked.shape == (3, 3, SIDE, SIDE)
    assert (attacked.int() - pixels[:3].int()).abs().max() == 8
    assert attacked.equal(column.images(subject, row))
    model = row.model(subject, seed=3 if known else 4)
    streams_of_second_chunk = (lambda image, _: 2 + image) if known else adaptive.unknown
    alone = PGD(LINF, 10, 1, loss=adaptive.margin, streams=streams_of_second_chunk)(model, pixels[2:3] / 255, labels[2:3])
    assert attacked[2:].equal((255 * alone.images).round().to(torch.uint8))


def test_a_start_for_a_perturbation_of_a_kind_raises() -> None:
    images, labels = examples()
    with pytest.raises(ValueError, match="start"):
        PGD(LINF, 1, 1, paint=adaptive.alike_in_channels)(bare(), images, labels, start=images)


def test_a_second_attack_goes_on_from_the_first() -> None:
    images, labels = examples()
    first = PGD(LINF, 2, 1, loss=adaptive.margin)(bare(), images, labels)
    second = PGD(LINF, 2, 1, loss=adaptive.margin)(bare(), images, labels, start=first.images)
    assert (second.losses[0] > first.losses[0]).all()


def asked(**settings: Any) -> argparse.Namespace:
    """Options of the benchmark."""
    defaults = {
        "attacks": ["bpda", "margin"],
        "steps": 10,
        "exact_steps": 2,
        "expected_steps": 2,
        "apgd_steps": 2,
        "queries": 10,
        "draws": 1,
    }
    return argparse.Namespace(**defaults | {"judge": 3, "most": 1000, "batch": 2, "every": False} | settings)


@pytest.mark.parametrize("every", [False, True])
def test_the_benchmark_loses_the_images_that_can_be_lost(every: bool) -> None:
    target = Linear()
    target.weight = target.weight[:2]
    images = torch.cat([examples()[0], 0.5 + 0.02 * torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))])
    labels = target(images).argmax(1)
    labels[2] = 1 - labels[2]  # the target has it wrong to begin with
    slope = (target.weight[0] - target.weight[1]).abs().sum()
    reach = (-adaptive.margin(target(images), labels) / slope).tolist()  # largest bound at which an image stands
    run = benchmark.Run(asked(every=every), target, images, labels, "none")
    order = sorted(each for each in reach if each > 0)
    for eps in (0.99 * order[0], order[2] + 1e-4, 1.01 * order[-1]):
        cell = run.bound(Bound("linf", eps))
        assert cell["vote"] == "".join("01"[each > eps] for each in reach)
        assert (run.points - images).abs().max() <= eps + 1e-6
        assert 2 not in cell["each"].get("bpda", {"attacked": []})["attacked"]
    assert "1" not in cell["vote"]


def test_a_table_says_what_was_lost_before_and_what_was_not_run(tmp_path: Path) -> None:
    each: dict[str, Any] = {
        "bpda": {"cpu_seconds_an_image": 1.5, "vote": "1010", "right": [2, 0, 1, 0], "draws": 2, "loss": [0.1, 0.5]}
    }
    each["bpda"]["attacked"] = [0, 1, 2, 3]
    each["square"] = {"cpu_seconds_an_image": 2, "vote": "01", "right": [0, 2], "draws": 2, "attacked": [0, 2]}
    cells: list[Any] = [{"bound": "clean", "eps": 0.0, "vote": "1111", "right": [2, 2, 2, 1], "draws": 2}]
    cells += [{"bound": "L-infinity 1/255", "eps": 1 / 255, "vote": "0000", "right": [0, 0, 0, 1], "draws": 2, "each": each}]
    cells[1]["doubts"] = ["bpda: the loss doesn't rise (0.1 to 0.0)"]
    settings = {"steps": 20, "draws": 2, "attacks": ["bpda"]}
    facts = {
        "row": "ours",
        "defense_seconds": 0.1,
        "size": [8, 9],
        "n": 4,
        "target": "t",
        "hardware": "h",
        "settings": settings,
    }
    more = [*cells, cells[1] | {"bound": "L-infinity 2/255", "eps": 2 / 255}]
    for name, some in (("a", cells), ("b", more)):
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | {"cells": some}))
    table = adversaries.table([tmp_path / "a.json", tmp_path / "b.json"]).splitlines()
    assert table[2].startswith(
        "| ours | 4/4 [0.51, 1.00], 0.88, 3 | 0/4 [0.00, 0.49], 0.12, 0 | 0, as before | bpda 4 + square, 3.5 |"
    )
    assert "0/4" in table[3].split("|")[4]
    assert table[4].startswith("| **ours: worst for each image** | 4/4 [0.51, 1.00] | 0/4 [0.00, 0.49] | 0/4 [0.00, 0.49] |")
    assert table[-1].endswith("In 3 of 3 attacked cells an attack says itself that it had not finished, or didn't work.")
    assert "- ours, L∞ 1/255: bpda: the loss doesn't rise (0.1 to 0.0)" in adversaries.attacks([tmp_path / "a.json"])
    assert "| ours | L∞ 1/255 | bpda | 2/4 [0.15, 0.85] | 0.38 | 0.10, 0.50 | 1.5 |" in adversaries.attacks(
        [tmp_path / "a.json"]
    )


def test_convergence_measures_what_is_left_of_fresh_draws() -> None:
    target = Linear()
    target.weight = target.weight[:2]
    images, bound = examples()[0], Bound("linf", 0.02)
    labels = target(images).argmax(1)
    found = convergence.measure(bare(target), bare(target), PGD(bound, 10, 1, loss=adaptive.margin), images, labels, 2)
    gained = bound.eps * float((target.weight[0] - target.weight[1]).abs().sum())  # the best there is
    best = adaptive.margin(target(images), labels) + gained
    assert found["margin"] == pytest.approx(float(best.mean()), abs=2e-3)
    assert found["vote"] == "".join("01"[int(each < 0)] for each in best)
    assert found["agreement"] == pytest.approx(1)


def test_convergence_is_a_table_and_two_figures(tmp_path: Path) -> None:
    point = {"vote": "1010", "one_draw": 0.5, "margin": -1.25, "agreement": 0.3, "cpu_seconds_an_image": 2}
    run = {"row": "ours", "bound": "L-infinity 1/255", "target": "t", "size": [8, 9], "n": 4, "judge": 5, "hardware": "h"}
    run |= {"steps": [point | {"steps": steps, "draws": 1} for steps in (5, 10)], "draws": [point | {"steps": 5, "draws": 2}]}
    (tmp_path / "curve.json").write_text(json.dumps(run))
    rows = convergence.table(tmp_path / "curve.json").splitlines()[2:5]
    assert rows[2] == "| 5 | 2 | 2/4 [0.15, 0.85] | 0.50 | -1.25 | 0.30 | 2.0 |"
    pytest.importorskip("matplotlib")
    convergence.draw(tmp_path / "curve.json")
    assert {path.name for path in tmp_path.glob("*.svg")} == {"curve-steps.svg", "curve-draws.svg"}
