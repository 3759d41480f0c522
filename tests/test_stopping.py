"""The choice of T_N."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oag_transform import DivergenceError, OnlineAlternateGenerator, choose_network_steps, streams
from oag_transform.stopping import smallest_flat_step
from tests.sample_images import QUIET, rand


def defense(**overrides: Any) -> OnlineAlternateGenerator:
    return OnlineAlternateGenerator(**({"network_steps": 6, "filters": 4, "kernel_size": 9, "seed": 0} | overrides))


@pytest.mark.parametrize(
    ("accuracies", "tolerance", "expected"),
    [
        ([0.1, 0.5, 0.9, 0.9, 0.9], 0.0, 3),
        ([0.1, 0.5, 0.89, 0.9, 0.895], 0.02, 3),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0.0, 5),  # still rising
        ([0.1, 0.9, 0.5, 0.4, 0.3], 0.0, 2),  # falls once noise is fitted
        ([0.9, 0.1, 0.9, 0.9, 0.9], 0.0, 1),
        ([0.7], 0.0, 1),
    ],
)
def test_smallest_flat_step(accuracies: list[float], tolerance: float, expected: int) -> None:
    assert smallest_flat_step(list(enumerate(accuracies, start=1)), tolerance) == expected


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(0, 5))
def test_smallest_flat_step_by_its_definition(counts: list[int], slack: int) -> None:
    flat = [i for i, count in enumerate(counts) if all(later <= count + slack for later in counts[i:])]
    assert smallest_flat_step([(i, float(count)) for i, count in enumerate(counts)], float(slack)) == flat[0]


def test_curve_is_the_accuracy_of_the_target_on_the_trace() -> None:
    """A target whose logit is the distance from the mean: the curve equals forward at each number of steps."""
    images = torch.rand(8, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    noised = streams.add_normal(images, 0.1, streams.noise_generators(4, range(8), images.device))
    after = {steps: defense(network_steps=steps)(noised).std((1, 2, 3)) for steps in (2, 4, 6)}
    middle = torch.cat(list(after.values())).median()
    labels = (after[4] > middle).long()  # right at step 4, and not everywhere before and after

    def target(batch: Tensor) -> Tensor:
        score = batch.std((1, 2, 3)) - middle
        return torch.stack([-score, score], 1)

    chosen = choose_network_steps(target, images, labels, 0.1, defense=defense(), every=2, seed=4)
    expected = [(steps, float(((spread > middle).long() == labels).float().mean())) for steps, spread in after.items()]
    assert chosen.curve == expected
    assert len({accuracy for _, accuracy in expected}) > 1


def test_a_target_without_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        choose_network_steps(lambda x: x.mean((1, 2, 3)), IMAGES, LABELS, defense=defense(chunk_size=2))


def test_noise_has_the_standard_deviation_asked_for_and_repeats() -> None:
    images, labels = torch.full((4, 3, 64, 64), 0.5), torch.zeros(4, dtype=torch.int64)
    seen: list[Tensor] = []

    class Spy(OnlineAlternateGenerator):
        def trace(self, images: Any, **kwargs: Any) -> Any:
            seen.append(images)
            return super().trace(images, **kwargs)

    spy = Spy(network_steps=1, filters=4, seed=0)
    for _ in range(2):
        choose_network_steps(lambda x: x.mean((2, 3)), images, labels, 0.1, defense=spy)
    first, second = torch.cat(seen).split(4)
    assert torch.equal(first, second)
    assert (first - 0.5).std().item() == pytest.approx(0.1, rel=0.02)  # 49,152 draws: s.e. 0.3%
    assert abs((first - 0.5).mean().item()) < 5 * 0.1 / 49_152**0.5
    assert not torch.equal(first[0], first[1])
    assert torch.equal(images, torch.full((4, 3, 64, 64), 0.5))


IMAGES, LABELS = rand(2, 3, 20, 20), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": IMAGES[0]}, r"images must be .* got torch.float32 \(3, 20, 20\)"),
        ({"images": IMAGES[:0]}, r"N >= 1, got torch.float32 \(0, 3"),
        ({"images": [1]}, "got list"),
        ({"labels": LABELS[:1]}, r"expected labels of shape \(2,\), one for each image, got \(1,\)"),
        ({"labels": LABELS + 3}, "expected labels from 0 to 2, got 3 to 3"),
        ({"labels": LABELS - 1}, "expected labels of at least 0, got -1 to -1"),
        ({"noise_std": -0.1}, "noise_std must be a finite number >= 0, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number >= 0, got nan"),
        ({"every": 0}, "every must be"),
        ({"images": IMAGES * 255}, r"values in \[0, 1\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"target": lambda x: x.mean((2, 3)), "images": IMAGES, "labels": LABELS, "defense": defense()}
    with pytest.raises(ValueError, match=message):
        choose_network_steps(**(good | arguments))


def test_labels_are_integers() -> None:
    with pytest.raises(TypeError, match=r"expected labels as a tensor of integers, got torch\.float32"):
        choose_network_steps(lambda x: x.mean((2, 3)), IMAGES, LABELS.float(), defense=defense())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "resnet50"}, "target must be callable, got str"),
        ({"defense": torch.nn.Identity()}, "defense must be an OnlineAlternateGenerator or None, got Identity"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        choose_network_steps(**{"target": len, "images": IMAGES, "labels": LABELS, **arguments})


def test_logits_that_are_not_finite_are_an_error_that_names_the_image() -> None:
    calls: list[int] = []

    def target(batch: Tensor) -> Tensor:  # asked twice of each chunk: after step 5 and after step 6
        calls.append(len(batch))
        logits = batch.mean((2, 3))
        logits[1, 2] = torch.inf if len(calls) == 3 else 0.0
        return logits

    with pytest.raises(ValueError, match=r"got NaN or infinity for image\(s\) \[3\]"):
        choose_network_steps(target, rand_images(4), torch.zeros(4, dtype=torch.int64), defense=defense(chunk_size=2))


def test_a_target_that_works_in_place_changes_nothing() -> None:
    images, labels = rand_images(6), torch.arange(6) % 3
    expected = choose_network_steps(lambda x: (x - 0.5).mean((2, 3)), images, labels, 0.1, defense=defense(), every=1)
    found = choose_network_steps(lambda x: x.sub_(0.5).mean((2, 3)), images, labels, 0.1, defense=defense(), every=1)
    assert found == expected


def rand_images(count: int) -> Tensor:
    return torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_a_rise_of_exactly_the_tolerance_is_flat() -> None:
    """Of 100 images 1 more is .01 more, whatever the rounding of their shares."""
    assert [smallest_flat_step([(1, n / 100), (2, (n + 1) / 100)], 0.01) for n in range(100)] == [1] * 100
    assert [smallest_flat_step([(1, n / 100), (2, (n + 2) / 100)], 0.01) for n in range(99)] == [2] * 99


def test_a_diverging_image_has_its_place_among_all_images() -> None:
    images = torch.stack([QUIET, QUIET, torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))])
    unstable = defense(chunk_size=1, conv_lr=100, fc_lr=100, adaptive_lr=False, compute_dtype=torch.float32)
    with pytest.raises(DivergenceError) as raised:
        choose_network_steps(lambda x: x.flatten(1)[:, :2], images, torch.zeros(3).long(), 0.0, defense=unstable)
    assert raised.value.indices == [2]
