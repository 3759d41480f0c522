"""The fast loop against Algorithm 1 as plain autograd in float64, setting by setting, and the derivative of the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oag_transform import OnlineAlternateGenerator, streams
from oag_transform.evaluation.attacks.unrolled import _Expected
from oag_transform.generator import reference, with_gradient
from oag_transform.generator.settings import Settings
from oag_transform.images import to_model_units
from tests.sample_images import synthetic_image

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "full strength": {"strength": 1.0},
    "half strength": {"strength": 0.5, "threshold": 3.0},
    "exact": {"langevin": "exact", "network_steps": 4},
    "halved rates": {"fc_lr": 3.0, "kernel_size": 9, "stride": 3, "threshold": 7.5, "scale": 6.5},
    "default of large images": {"kernel_size": 9, "stride": 3, "threshold": 7.5, "scale": 6.5},
    "capped rate": {"conv_lr": 1.0},
    "fixed rates": {"adaptive_lr": False, "conv_lr": 0.003},
    "uniform": {"init": "uniform", "threshold": 0.0, "fc_lr": 0.01},
    "stride 1": {"stride": 1, "kernel_size": 7},
    "stride 2": {"stride": 2, "kernel_size": 7},
    "stride 5": {"stride": 5, "kernel_size": 16},
    "kernel as wide as the stride": {"kernel_size": 3},
    "other noise": {"step_size": 0.6, "image_steps": 3, "scale": 4.0},
    "no noise": {"step_size": 0.0},
}
PAPER: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, stride 1": {"network_steps": 7, "stride": 1, "kernel_size": 7},
    "paper, stride 5": {"network_steps": 7, "stride": 5},
    "paper, kernel 11": {"network_steps": 7, "kernel_size": 11},
}


@pytest.mark.parametrize(
    "purify",
    [OnlineAlternateGenerator(seed=3, filters=16, **case) for case in CASES.values()]
    + [OnlineAlternateGenerator.paper(seed=3, filters=16, compute_dtype=None, **case) for case in PAPER.values()],
    ids=[*CASES, *PAPER],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loop_is_the_reference(purify: OnlineAlternateGenerator, channels: int) -> None:
    image = synthetic_image(channels, 26, 31)
    expected = reference.purify(image, purify.settings_for(26, 31), seed=3, index=5)
    torch.testing.assert_close(purify(image, index=5), expected, rtol=0, atol=1e-9)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_result_resembles_its_input() -> None:
    """So that a failure shared by both loops shows."""
    image = synthetic_image(3, 60, 60)
    purified = reference.purify(image, OnlineAlternateGenerator().settings_for(60, 60), seed=0, index=0)
    assert (purified - image).square().mean() < 0.25 * (image - image.mean((1, 2), keepdim=True)).square().mean()


@pytest.mark.parametrize("case", ["default", "full strength", "exact", "halved rates", "capped rate", "uniform", "stride 2"])
def test_the_reference_is_differentiable(case: str) -> None:
    """Its derivative along a random direction, by central differences over a step that no mask changes in."""
    settings = OnlineAlternateGenerator(**{"filters": 6, "network_steps": 4, "image_steps": 12} | CASES[case]).settings_for(
        18, 21
    )
    image, direction, weights = synthetic_image(3, 18, 21), normal(3, 18, 21, seed=1), normal(3, 18, 21, seed=2)
    image = image.clamp(0.2, 0.8)

    def f(x: Tensor) -> Tensor:
        return (weights * reference.purify(x, settings, seed=0, index=1)).sum()

    point = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(point), point)
    step = 1e-9
    expected = (f(image + step * direction) - f(image - step * direction)) / (2 * step)
    assert abs(expected) > 1e-3
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("case", "step_function"),
    [(case, reference.heaviside) for case in CASES]
    + [(case, _Expected.apply) for case in CASES if case != "no noise"],  # whose mean over noise has jumps too
)
def test_the_batch_with_a_gradient_is_the_reference(case: str, channels: int, step_function: reference.StepFunction) -> None:
    """In its values and in its derivative, which the reference finds by differentiating twice."""
    changed = {"filters": 6, "network_steps": 4, "image_steps": 12} | CASES[case]
    settings = OnlineAlternateGenerator(**changed).settings_for(18, 21)
    images = torch.stack([synthetic_image(channels, 18, 21), synthetic_image(channels, 18, 21).flip(1, 2)]).requires_grad_()
    weights = normal(2, channels, 18, 21, seed=2)
    found = with_gradient.purify(images, settings, seed=3, indices=[5, 2], step_function=step_function)
    rows = zip(images, [5, 2], strict=True)
    expected = torch.stack([reference.purify(x, settings, seed=3, index=i, step_function=step_function) for x, i in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    slopes = [torch.autograd.grad((weights * each).sum(), images)[0] for each in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-6, atol=1e-9 * float(slopes[1].detach().abs().max()))


def test_images_of_each_step_are_what_the_trace_shows() -> None:
    image, purify = synthetic_image(3, 20, 22), OnlineAlternateGenerator(filters=6, network_steps=4, seed=0, strength=1.0)
    (generator,) = streams.generators(0, [2], torch.device("cpu"))
    settings = purify.settings_for(20, 22)
    images = list(reference.alternate(to_model_units(image, settings.scale), settings, generator, 1.0))
    moments = list(purify.trace(image, index=2))
    assert [moment.step for moment in moments] == [1, 2, 3, 4]
    for step_image, moment in zip(images, moments, strict=True):
        residual = settings.scale * (step_image - to_model_units(image, settings.scale)).square().mean().sqrt()
        assert moment.residual.item() == pytest.approx(residual.item(), rel=1e-9)


def test_operands_of_another_precision_are_refused() -> None:
    settings = Settings(compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"compute_dtype must be None.*got torch\.bfloat16"):
        reference.purify(synthetic_image(3, 20, 20), settings, seed=0, index=0)
    with pytest.raises(ValueError, match=r"compute_dtype must be None.*got torch\.bfloat16"):
        with_gradient.purify(synthetic_image(1, 3, 20, 20), settings, seed=0, indices=[0])
