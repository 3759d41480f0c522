"""Algorithm 1 made fast, in PyTorch operators on any device: closed-form gradients, on cells, in place."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from .. import streams
from . import energy, langevin
from .settings import Settings
from .state import State


def alternate(
    start: State, settings: Settings, generators: Sequence[Generator], strength: Tensor, *, every: int
) -> Iterator[State]:
    """Algorithm 1 from ``start``: a snapshot after each ``every`` rounds of image updates, and after the last.

    The network update after the last image is left out: nothing uses it.

    Args:
        start: of :func:`.state.begin`; it is left alone.
        settings: the hyper-parameters.
        generators: the random stream of each image.
        strength: (N,), see :class:`.Settings`.
        every: network steps between two snapshots.
    """
    s = settings
    pair, theta = start.pair.clone(), start.theta.copy()
    reference, image = pair[:1], pair[1:]
    count = len(strength)
    normal = image.new_empty(count, *image.shape[-2:], image.shape[1] // count)  # drawn as cells lie in memory
    deviation = strength.sqrt()[:, None, None, None]  # of the noise at that temperature
    positions = theta.fc[0, 0].numel()  # the gradient of W is a sum over positions: its rate is per position
    conv_lr = pair.new_full((count,), s.conv_lr)
    taps = energy.kernel_to_cells(pair.new_ones(start.shape[1], s.kernel_size, s.kernel_size), s.stride)
    pace, best = pair.new_ones(count), pair.new_full((count,), math.inf)
    # closed form: T_I steps at once with the mask held; exact: T_I times one step, each with a mask of its own
    rounds, held = (1, s.image_steps) if s.langevin == "closed_form" else (s.image_steps, 1)
    dtype = s.compute_dtype or pair.dtype
    low = theta.cast(dtype)  # operands of the products; the state keeps its precision
    velocity, buffers = torch.zeros_like(low.fc), energy.Buffers.of(low)
    wide = velocity if dtype == pair.dtype else torch.empty_like(theta.fc)  # the velocity in the precision of the state

    a = energy.responses(image.to(dtype), low)
    for step in range(1, s.network_steps + 1):
        for _ in range(rounds):
            if s.langevin == "exact":
                a = energy.responses(image.to(dtype), low)
            mode = energy.image_gradient(energy.gate(a, low, buffers.gates[:1]), low)
            streams.fill_normal(normal, generators).mul_(deviation)
            langevin.step(image, mode, energy.beside(normal), step_size=s.step_size, steps=held)  # Eq. 3
        if step % every == 0 or step == s.network_steps:
            yield start._replace(step=step, pair=pair.clone(), theta=theta.copy())
        if step == s.network_steps:
            return
        del a  # so that its memory serves again
        # closed form: ``a`` is the mask of the network before its update, which saves a convolution
        least = s.threshold * strength if s.threshold else None
        gradient, a, curvature = energy.contrast(pair.to(dtype), low, least, buffers)  # noqa: RUF059 - the next round's
        if s.adaptive_lr:
            pace, best = energy.slow_down(pace, best, energy.mean_square(reference - image, count))
            conv_lr = (energy.STABLE / curvature).clamp(max=s.conv_lr)
        conv_rate = (pace * conv_lr / positions).repeat_interleave(s.filters)
        theta.weight.addcmul_(gradient.weight, taps * conv_rate[:, None, None, None])  # Eq. 5
        theta.bias.addcmul_(gradient.bias, conv_rate)
        torch.add(gradient.fc, velocity, alpha=s.momentum, out=velocity)
        theta.fc.addcmul_(wide.copy_(velocity), pace.repeat_interleave(s.filters)[:, None, None], value=s.fc_lr)
        low.follow(theta)
