"""Choosing T_N from Gaussian-noised images (paper III-D and IV-E, Fig. 4)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, streams
from .transform import OnlineAlternateGenerator

ROUNDING = 1e-9  # of shares of images: .83 - .82 is more than .01


class NetworkSteps(NamedTuple):
    """The chosen number of network steps, and the accuracy along the trajectory as (step, accuracy) pairs."""

    steps: int
    curve: list[tuple[int, float]]


def choose_network_steps(
    target: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    noise_std: float = 0.25,
    *,
    defense: OnlineAlternateGenerator | None = None,
    every: int = 5,
    tolerance: float = 0.01,
    seed: int = 0,
) -> NetworkSteps:
    """The smallest T_N after which the accuracy on purified Gaussian-noised images is flat. The choice needs no attack.

    The function adds ``N(0, noise_std^2)`` to the images, purifies them, and classifies the purified images along the way.

    Args:
        target: classifier of [0, 1] images (N, C, H, W) -> logits (N, classes), normalisation included.
        images: (N, C, H, W), floating point in [0, 1]. The resolution of the accuracy is 1/N.
        labels: (N,) integer classes.
        noise_std: standard deviation of the noise, on the [0, 1] scale; noised images are clipped to [0, 1].
        defense: the transform; its ``network_steps`` is the length of the curve. Default
            ``OnlineAlternateGenerator(network_steps=120)``.
        every: network steps between two points of the curve.
        tolerance: the curve is flat where no later point is higher by more than this accuracy.
        seed: the seed of the noise.

    Returns:
        The chosen T_N and the curve. If T_N is the last step of the curve, the curve was still rising: use more network steps.

    Raises:
        ValueError, TypeError: bad images or labels, a negative ``noise_std`` or ``tolerance``, or logits that are not finite.
    """
    if not callable(target):
        raise TypeError(f"target must be callable, got {type(target).__name__}")
    defense = OnlineAlternateGenerator(network_steps=120) if defense is None else defense
    if not isinstance(defense, OnlineAlternateGenerator):
        raise TypeError(f"defense must be an OnlineAlternateGenerator or None, got {type(defense).__name__}")
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a floating-point tensor (N, C, H, W) with N >= 1, got {got}")
    labels = _checks.labels(labels, len(images))
    noise_std = _checks.number("noise_std", noise_std, at_least=0)
    tolerance = _checks.number("tolerance", tolerance, at_least=0)
    every, seed = _checks.integer("every", every, at_least=1), _checks.integer("seed", seed)
    # clipping the noised images must not hide a wrong range
    _checks.images(images, minimum_size=defense.settings.minimum_size)

    correct: dict[int, int] = {}
    for rows in defense.chunks(images):
        noised = streams.add_normal(images[rows], noise_std, streams.noise_generators(seed, rows, images.device))
        with _checks.rows_are(rows):
            for moment in defense.trace(noised, every=every, index=rows.start):
                with torch.no_grad():
                    logits = _checks.finite(_checks.logits(target(moment.images), len(rows)))
                _checks.labels(labels, len(images), logits.shape[1])
                right = logits.argmax(-1) == labels[rows]
                correct[moment.step] = correct.get(moment.step, 0) + int(right.sum())
    curve = [(step, count / len(images)) for step, count in correct.items()]
    return NetworkSteps(smallest_flat_step(curve, tolerance), curve)


def smallest_flat_step(curve: list[tuple[int, float]], tolerance: float) -> int:
    """The first step of a curve after which no point is higher by more than ``tolerance``."""
    best_after = -1.0
    chosen = curve[-1][0]
    for step, accuracy in reversed(curve):
        best_after = max(best_after, accuracy)
        if accuracy >= best_after - tolerance - ROUNDING:
            chosen = step
    return chosen
