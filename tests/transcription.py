"""Algorithm 1 transcribed as plainly as can be: one image, nn.Conv2d, nn.Linear, autograd and loops.

The reference for the package's own loop, and the baseline of ``benchmarks/speed.py``. It shares nothing with the package but
the order in which random numbers are drawn.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


def plain_algorithm_1(
    reference: Tensor,
    generator: Generator,
    *,
    network_steps: int,
    image_steps: int,
    kernel_size: int,
    stride: int,
    filters: int,
    noise: float,
    conv_lr: float,
    fc_lr: float,
    threshold: float,
    strength: float,
) -> Tensor:
    """Synthesise an image for one reference of shape (channels, H, W) in model units, with PyTorch's initialisation."""
    channels, height, width = reference.shape
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    reference = F.pad(reference, (0, columns * stride - width, 0, rows * stride - height))[None]

    def random_uniform(parameter: nn.Parameter, fan_in: int) -> None:
        bound = 1 / math.sqrt(fan_in)
        parameter.data = parameter.data.uniform_(-bound, bound, generator=generator)

    kind: dict[str, Any] = {"dtype": reference.dtype, "device": reference.device}
    conv = nn.utils.skip_init(nn.Conv2d, channels, filters, kernel_size, stride, **kind)
    linear = nn.utils.skip_init(nn.Linear, filters * rows * columns, 1, bias=False, **kind)
    random_uniform(conv.weight, channels * kernel_size**2)
    random_uniform(conv.bias, channels * kernel_size**2)
    random_uniform(linear.weight, filters * rows * columns)

    def f(image: Tensor) -> Tensor:
        before = math.ceil((kernel_size - stride) / 2)
        after = kernel_size - stride - before
        return linear(conv(F.pad(image, (before, after, before, after))).relu().flatten(1)).sum()

    image = torch.zeros_like(reference)
    for _ in range(network_steps):
        for _ in range(image_steps):
            image.requires_grad_(True)
            (gradient,) = torch.autograd.grad(f(image), image)
            normal = torch.empty(channels, height, width, **kind).normal_(generator=generator)
            normal = F.pad(normal, (0, columns * stride - width, 0, rows * stride - height))
            image = image.detach() - noise**2 / 2 * (image.detach() - gradient) + noise * math.sqrt(strength) * normal  # Eq. 3
        weight, bias, fc = torch.autograd.grad(f(reference) - f(image), [conv.weight, conv.bias, linear.weight])
        with torch.no_grad():  # Eq. 5
            for c, part in enumerate(fc.view(filters, -1)):  # a view: weak contrasts are set to zero in fc
                part[part.abs() <= strength * threshold * conv.weight[c].norm()] = 0
            conv.weight += conv_lr / (rows * columns) * weight
            conv.bias += conv_lr / (rows * columns) * bias
            linear.weight += fc_lr * fc
    return image[0, :, :height, :width]
