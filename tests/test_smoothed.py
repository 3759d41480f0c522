"""Randomized smoothing: against a classifier of known margin, the binomial distribution, and its own rules."""

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn

from oag_transform import ABSTAIN, DefendedModel, DivergenceError, OnlineAlternateGenerator, SmoothedModel
from oag_transform.smoothed import COUNTING, INTERIM_SHARES, SELECTION, ClassCounts, certificate, lower_bound
from tests.sample_images import QUIET, rand

SIDE = 6


class Halfspace(nn.Module):
    """Class 1 where w . (x - 1/2) is above an offset: the true radius of an image is its distance to that plane."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(nn.functional.normalize(torch.randn(3 * SIDE * SIDE, generator=generator), dim=0))
        self.offset = offset

    def forward(self, images: Tensor) -> Tensor:
        score = (images.flatten(1) - 0.5) @ self.w - self.offset
        return torch.stack([-score, score], 1)


class Coin(nn.Module):
    """Class 0 with a probability that doesn't depend on the image, by randomness of its own; it records what it was asked."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.asked: list[int] = []

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        self.asked += index
        draws = torch.tensor([torch.rand((), generator=torch.Generator().manual_seed(i % 2**60)) for i in index])
        first = (draws < self.probability).float()
        return torch.stack([first, 1 - first, torch.full_like(first, -1.0)], 1)


def grey(count: int = 1) -> Tensor:
    return torch.full((count, 3, SIDE, SIDE), 0.5)


@pytest.mark.parametrize("margin", [0.02, 0.06])
def test_the_radius_never_exceeds_the_true_one_and_comes_closer_with_n(margin: float) -> None:
    model = SmoothedModel(Halfspace(-margin), 0.05, seed=0, batch_size=500)
    radii = [model.certify(grey(), n=n)[0].radius for n in (100, 1000, 20_000)]
    assert all(radius <= margin for radius in radii)
    assert radii[-1] > 0.93 * margin
    assert radii == sorted(radii)


@pytest.mark.slow
def test_a_thousand_certificates_exceed_the_true_radius_no_more_often_than_alpha() -> None:
    alpha, margin = 0.05, 0.03
    model = SmoothedModel(Halfspace(-margin), 0.05, seed=1, batch_size=4000)
    found = model.certify(grey(1000), n0=10, n=60, alpha=alpha)
    wrong = sum(c.radius > margin or c.label == 0 for c in found)
    assert wrong <= binom.ppf(0.999, 1000, alpha)
    assert wrong > 0  # the bound is not loose either


@settings(deadline=None, max_examples=30)
@given(p=st.floats(0.5, 0.999), n=st.integers(1, 200), alpha=st.sampled_from([0.001, 0.05]))
def test_the_bound_covers(p: float, n: int, alpha: float) -> None:
    """By the binomial distribution itself: the counts whose bound exceeds p have less than alpha between them."""
    exceeding = sum(float(binom.pmf(k, n, p)) for k in range(n + 1) if lower_bound(k, n, alpha) > p)
    assert exceeding <= alpha + 1e-12


def test_a_constant_classifier_and_a_coin() -> None:
    (certain,) = SmoothedModel(Coin(1.0), 0.25, seed=0).certify(grey(), n=200, alpha=0.001)
    assert (certain.label, certain.count, certain.n) == (0, 200, 200)
    assert certain.radius == pytest.approx(0.25 * _quantile(0.001 ** (1 / 200)))
    coin = SmoothedModel(Coin(0.5), 0.25, seed=0)
    assert [c.label for c in coin.certify(grey(5), n=200)] == [ABSTAIN] * 5
    assert coin.predict(grey(5), n=200).tolist() == [ABSTAIN] * 5
    assert SmoothedModel(Coin(0.9), 0.25, seed=0).predict(grey(3), n=200).tolist() == [0, 0, 0]


class InTurn(nn.Module):
    """Six classes: draw k of an image is of class ``classes[k]``."""

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        drawn = torch.tensor([self.classes[stream % 2**40] for stream in index])  # the number of the draw
        return nn.functional.one_hot(drawn, 6).float()


@pytest.mark.parametrize(
    ("counts", "alpha", "expected"),
    [
        ([50, 10, 10, 10, 10, 10], 0.001, 0),  # half of all draws, and five times the second
        ([60, 40], 0.05, ABSTAIN),  # two-sided p = 0.057
        ([61, 39], 0.05, 0),  # p = 0.035
        ([61, 39], 0.03, ABSTAIN),
        ([39, 61], 0.05, 1),
    ],
)
def test_predict_is_cohens_test(counts: list[int], alpha: float, expected: int) -> None:
    """The two-sided binomial test of the first class against the second, on the draws of both."""
    classes = [label for label, count in enumerate(counts) for _ in range(count)]
    model = SmoothedModel(InTurn(classes), 0.25, seed=0)
    assert model.predict(grey(), n=len(classes), alpha=alpha).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_is_drawn_before_any_rounding(dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1)[:, :2]

    image = torch.full((1, 3, 8, 8), 0.5)
    for each in (image, image.to(dtype)):
        SmoothedModel(Spy(), 0.25, samples=1, seed=0)(each)
    assert seen[1].dtype == dtype
    assert torch.equal(seen[1], seen[0].to(dtype))


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    model = SmoothedModel(Halfspace(0.0), 0.1)
    for call in (model.predict, model.certify):
        with pytest.raises(ModuleNotFoundError, match=r"SmoothedModel needs scipy: pip install 'oag-transform\[certify\]'"):
            call(grey())


def _quantile(p: float) -> float:
    return math.sqrt(2) * torch.special.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)).item()


def test_every_draw_has_streams_of_its_own() -> None:
    """No stream is used twice: not between draws, images, choosing and counting, nor by forward."""
    coin = Coin(0.9)
    model = SmoothedModel(coin, 0.25, seed=0, samples=5, batch_size=7)
    model.certify(grey(3), n0=20, n=50)
    model(grey(3))
    assert len(coin.asked) == 3 * (20 + 50 + 5)
    assert len(set(coin.asked)) == len(coin.asked)


def test_noise_is_fresh_in_each_draw_and_of_the_standard_deviation_asked_for() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return images.new_zeros(len(images), 2)

    SmoothedModel(Spy(), 0.1, seed=0).certify(grey(2), n0=20, n=40)
    noise = torch.cat(seen).flatten(1) - 0.5
    assert noise.std().item() == pytest.approx(0.1, rel=5 / (2 * noise.numel()) ** 0.5)
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 6 / noise.shape[1] ** 0.5


def test_an_images_result_does_not_depend_on_its_batch() -> None:
    model = SmoothedModel(Halfspace(-0.02), 0.05, seed=3, batch_size=11)
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    together = model.certify(images, n0=20, n=100, index=[5, 9, 2])
    for image, index, expected in zip(images, (5, 9, 2), together, strict=True):
        assert SmoothedModel(Halfspace(-0.02), 0.05, seed=3).certify(image[None], n0=20, n=100, index=index) == [expected]


def test_a_purifiers_randomness_is_fresh_even_where_it_has_a_seed() -> None:
    target = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4))
    seen: list[Tensor] = []
    target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    purify = OnlineAlternateGenerator(network_steps=1, filters=4, fc_lr=0.0, strength=1.0, seed=0)  # nothing but its noise
    SmoothedModel(DefendedModel(target, purify, shift=0), 0.25, seed=0).certify(torch.full((1, 3, 12, 12), 0.5), n0=3, n=5)
    noise = torch.cat(seen).flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == 8


def test_an_interrupted_certification_goes_on() -> None:
    images = grey(2)
    whole = SmoothedModel(Halfspace(-0.02), 0.05, seed=3).certify(images, n0=30, n=300)

    class Interrupted(Halfspace):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 7:
                raise KeyboardInterrupt
            return super().forward(images)

    counts = [ClassCounts(), ClassCounts()]
    model = SmoothedModel(Interrupted(-0.02), 0.05, seed=3)
    with pytest.raises(KeyboardInterrupt):
        model.certify(images, n0=30, n=300, counts=counts)
    assert 0 < counts[0].draws(SELECTION) + counts[0].draws(COUNTING) < 330
    found = model.certify(images, n0=30, n=300, counts=counts)
    assert found == whole
    model.certify(images, n0=30, n=400, counts=counts)
    assert [each.at(0.001) for each in found] == whole  # later draws are not an earlier certificate's
    with pytest.raises(ValueError, match="class counts for each of 2 images, got 1"):
        model.certify(images, counts=counts[:1])


def test_counts_give_other_alphas_for_nothing() -> None:
    (loose,) = SmoothedModel(Halfspace(-0.02), 0.05, seed=3).certify(grey(), n=300, alpha=0.1)
    (strict,) = SmoothedModel(Halfspace(-0.02), 0.05, seed=3).certify(grey(), n=300, alpha=0.001)
    assert loose.at(0.001) == strict
    assert strict.radius < loose.radius
    with pytest.raises(ValueError, match="alpha must be a finite number > 0 and < 1, got 2"):
        loose.at(2)


def test_it_stops_when_the_wanted_radius_is_proven_or_out_of_reach_and_pays_for_interim_analyses() -> None:
    easy, hopeless, near = (
        SmoothedModel(Coin(p), 0.25, seed=0).certify(grey(), n=2000, radius=0.1)[0] for p in (0.999, 0.5, 0.66)
    )
    assert easy.radius >= 0.1
    assert easy.n == round(INTERIM_SHARES[0] * 2000)
    assert (hopeless.label, hopeless.radius) == (ABSTAIN, 0)
    assert hopeless.n < 2000
    assert near.n == 2000
    assert easy.analyses == len(INTERIM_SHARES)
    assert easy.radius == pytest.approx(0.25 * _quantile(lower_bound(easy.count, easy.n, 0.001 / len(INTERIM_SHARES))))
    assert easy == certificate(easy.counts, 0.25, 0.001, len(INTERIM_SHARES))


def test_an_interrupted_certification_is_analysed_where_it_would_have_been() -> None:
    """Counts that stopped between two analyses, with all draws right, go on to the next one before anything is decided."""
    counts = ClassCounts(torch.tensor([30, 0, 0]), torch.tensor([25, 0, 0]))
    (found,) = SmoothedModel(Coin(1.0), 0.25, seed=0).certify(grey(), n0=30, n=2000, radius=0.1, counts=[counts])
    assert found.n == round(INTERIM_SHARES[0] * 2000)


def test_forward_averages_probabilities_and_has_their_gradient() -> None:
    target = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3)).double()
    model = SmoothedModel(target, 0.05, samples=4, seed=0)
    images = torch.full((2, 3, SIDE, SIDE), 0.5, dtype=torch.float64, requires_grad=True)
    log_probabilities = model(images)
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    torch.autograd.gradcheck(lambda x: model(x).square().sum(), images, fast_mode=True)
    assert not torch.equal(log_probabilities[0], log_probabilities[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0}, r"sigma must be a finite number > 0, got 0"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"model": Halfspace(0.0), "sigma": 0.1}
    with pytest.raises(ValueError, match=message):
        SmoothedModel(**good | arguments)


def test_bad_calls() -> None:
    model = SmoothedModel(Halfspace(0.0), 0.1)
    for call, message in (
        (lambda: model.certify(grey() * 3), r"values in \[0, 1\]"),
        (lambda: model.certify(grey(), alpha=1.0), r"alpha must be a finite number > 0 and < 1"),
        (lambda: model.certify(grey(), n=0), "n must be an integer >= 1"),
        (lambda: model.certify(grey(), radius=-1), "radius must be"),
        (lambda: model.predict(grey(), n=0), "n must be"),
        (lambda: certificate(ClassCounts(), 0.1, 0.01), "expected class counts with draws"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        model.predict(grey().byte())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        SmoothedModel(len, 0.1)  # type: ignore[arg-type]


class SometimesNaN(nn.Module):
    """NaN for bright images; a class can be read from it all the same, which proves nothing."""

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3))
        return torch.stack([level, 1 - level], 1).where(level[:, None] < 0.8, torch.nan)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: DefendedModel(x, nn.Identity(), shift=2, samples=2)], ids=["undefended", "defended"]
)
def test_nothing_is_proven_by_logits_that_are_not_finite(wrap: Any) -> None:
    model = SmoothedModel(wrap(SometimesNaN()), 0.1, seed=0, samples=2, batch_size=7)
    images = torch.cat([grey(3), torch.ones(1, 3, SIDE, SIDE)])
    for call in (model.predict, model.certify, model):
        with pytest.raises(ValueError, match=r"expected finite logits, got NaN or infinity for image\(s\) \[3\]"):
            call(images)
    assert model.certify(grey(2), n0=5, n=20)[0].n == 20


def test_another_model_after_construction_gets_the_streams_too() -> None:
    model = SmoothedModel(Halfspace(0.0), 0.25, seed=0)
    model.model = coin = Coin(0.9)
    model.predict(grey(2), n=5)
    assert len(set(coin.asked)) == 10


def test_a_model_that_works_in_place_and_keeps_its_outputs_memory() -> None:
    class Same(Halfspace):
        buffer = torch.zeros(1, 2)

        def forward(self, images: Tensor) -> Tensor:
            self.buffer = self.buffer if self.buffer.shape == (len(images), 2) else torch.zeros(len(images), 2)
            return self.buffer.copy_(super().forward(images.mul_(1)))

    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    given = images.clone()
    with torch.no_grad():
        found, expected = (SmoothedModel(model, 0.2, seed=0, samples=5)(given) for model in (Same(0.0), Halfspace(0.0)))
    torch.testing.assert_close(found, expected)
    assert torch.equal(given, images)


def test_one_object_of_counts_for_several_images_is_refused() -> None:
    model = SmoothedModel(Halfspace(0.0), sigma=0.25)
    images = rand(2, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="of its own for each image"):
        model.certify(images, 4, 4, counts=[ClassCounts()] * 2)
    with pytest.raises(TypeError, match="counts must be ClassCounts, one for each image, got dict"):
        model.certify(images, 4, 4, counts=[ClassCounts(), {}])  # type: ignore[list-item]
    seen = ClassCounts(selection=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="expected counts of 3 classes, as before, got 2"):
        model.certify(images[:1], 10, 4, counts=[seen])


@pytest.mark.parametrize("tracked", [True, False])
def test_batch_normalization_with_statistics_of_the_batch_is_refused(tracked: bool) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=tracked), Halfspace(0.0))
    images = rand(2, 3, SIDE, SIDE)
    model = SmoothedModel(network, sigma=0.25)
    for ask in (model.predict, model.certify):
        with pytest.raises(ValueError, match=r"independent draws, but the batch normalization '0'"):
            ask(images, 4)
    model.eval()
    if tracked:
        assert len(model.predict(images, 4)) == len(model.certify(images, 4, 4)) == 2


def test_a_diverging_image_has_its_place_in_the_batch() -> None:
    defense = OnlineAlternateGenerator(
        conv_lr=100, fc_lr=100, filters=4, network_steps=4, adaptive_lr=False, seed=0, compute_dtype=torch.float32
    )
    target = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 2))
    images = torch.stack([QUIET, torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))])
    model = SmoothedModel(DefendedModel(target, defense), 1e-4, batch_size=5, seed=0)  # the noise leaves the quiet one quiet
    with pytest.raises(DivergenceError) as raised:
        model.certify(images, n0=5, n=5)
    assert raised.value.indices == [1]  # at places 1 and 3 of the draws


@pytest.mark.parametrize(
    ("counted", "error", "told"),
    [
        ([1, 0], TypeError, r"counted must be None or an int64 tensor \(classes,\), got list"),
        (torch.ones(2), TypeError, r"got torch\.float32 \(2,\)"),
        (torch.tensor([3, -1]), ValueError, r"counted must have counts of at least 0, got \[3, -1\]"),
    ],
)
def test_counts_are_checked(counted: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        ClassCounts(None, counted)
