"""Algorithm 1 in PyTorch operators on any device: closed-form gradients, on cells, in place."""

import math
from collections.abc import Iterator

import torch

from .. import streams
from . import energy, langevin
from .state import Inputs, State, begin


def alternate(inputs: Inputs, every: int) -> Iterator[State]:
    """Algorithm 1: a snapshot after each ``every`` network steps, and after the last step.

    The network update after the last image is left out because nothing uses it.
    """
    s, strength, count = inputs.settings, inputs.strength, len(inputs.pixels)
    start, generators = begin(inputs)  # lines 1 and 2
    pair, theta = start.pair, start.theta
    reference, image = pair[:1], pair[1:]
    normal = image.new_empty(count, *image.shape[-2:], image.shape[1] // count)  # drawn in the memory order of cells
    noise_std = strength.sqrt()[:, None, None, None]  # strength is the temperature
    positions = theta.fc[0, 0].numel()  # the gradient of W is a sum over positions; its rate is per position
    conv_lr = pair.new_full((count,), s.conv_lr)
    taps = energy.kernel_to_cells(pair.new_ones(start.shape[1], s.kernel_size, s.kernel_size), s.stride)
    lr_factor, best = pair.new_ones(count), pair.new_full((count,), math.inf)
    updates, steps_per_update = s.image_updates
    dtype = s.compute_dtype or pair.dtype
    network = theta.cast(dtype)  # operands of the products; theta keeps the precision of the state
    velocity, buffers = torch.zeros_like(network.fc), energy.Buffers.of(network)
    fc_step = velocity if dtype == pair.dtype else torch.empty_like(theta.fc)  # the velocity in the precision of theta

    a = energy.responses(image.to(dtype), network)
    for step in range(1, s.network_steps + 1):
        for _ in range(updates):
            if s.langevin == "exact":
                a = energy.responses(image.to(dtype), network)
            mode = energy.image_gradient(energy.gate(a, network, buffers.gates[:1]), network)
            streams.fill_normal(normal, generators).mul_(noise_std)
            langevin.step(image, mode, energy.beside(normal), step_size=s.step_size, steps=steps_per_update)  # Eq. 3
        if step % every == 0 or step == s.network_steps:
            yield start._replace(step=step, pair=pair.clone(), theta=theta.copy())
        if step == s.network_steps:
            return
        del a  # frees its memory for the next products
        threshold = s.threshold * strength if s.threshold else None
        # closed form: ``a`` becomes the mask of the network before its update, which saves a convolution
        gradient, a, curvature = energy.contrast(pair.to(dtype), network, threshold, buffers)  # noqa: RUF059 - the next update's
        if s.adaptive_lr:
            lr_factor, best = energy.slow_down(lr_factor, best, energy.mean_square(reference - image, count))
            conv_lr = (energy.STABLE / curvature).clamp(max=s.conv_lr)
        conv_rate = (lr_factor * conv_lr / positions).repeat_interleave(s.filters)
        theta.weight.addcmul_(gradient.weight, taps * conv_rate[:, None, None, None])  # Eq. 5
        theta.bias.addcmul_(gradient.bias, conv_rate)
        torch.add(gradient.fc, velocity, alpha=s.momentum, out=velocity)
        theta.fc.addcmul_(fc_step.copy_(velocity), lr_factor.repeat_interleave(s.filters)[:, None, None], value=s.fc_lr)
        network.follow(theta)
