"""Differentiable filters in PyTorch, for attacks on the baselines.

Total-variation denoising, non-local means, BayesShrink and the swirl equal the filters of scikit-image up to rounding, except
where noted. The baselines themselves use scikit-image.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chambolle(images: Tensor, weight: float, iterations: int) -> Tensor:
    """Total-variation denoising of each channel: scikit-image's ``denoise_tv_chambolle`` without its early stop.

    Args:
        images: (N, C, H, W).
        weight: of the total variation, > 0.
        iterations: > 0.
    """

    def step(dual: Tensor) -> tuple[Tensor]:
        slope = differences(images - divergence(dual))
        return ((dual - 0.25 * slope) / (1 + 0.25 / weight * length(slope)),)

    (dual,) = repeated(step, (images.new_zeros(2, *images.shape),), iterations - 1, images)
    return images - divergence(dual)


def minimize_tv(images: Tensor, kept: Tensor, weight: float, iterations: int) -> Tensor:
    """Images u (..., H, W) that minimise ``1/2 |kept (u - images)|^2 + weight sum |grad u|``, grad by forward differences.

    Total variation is isotropic, and separate for each channel. The method is the over-relaxed primal-dual one of Chambolle &
    Pock (2011; Condat 2013). It starts from the mean of the kept values, and the result is independent of the other values.

    Args:
        images: (..., H, W), floating point.
        kept: bool of the same shape, true for the values of ``images`` that count.
        weight: > 0.
        iterations: number of steps.
    """
    # tuned on images of 224 pixels; it converges for any two steps whose product is at most 1 / |grad|^2, and |grad|^2 < 8
    primal_step, relaxation = 0.5, 1.9
    dual_step = 1 / (8 * primal_step)
    mean = (images * kept).sum((-2, -1), keepdim=True) / kept.sum((-2, -1), keepdim=True).clamp(min=1)
    start = torch.where(kept, images, mean)
    pull = kept.to(start) * (primal_step / (1 + primal_step))

    def step(u: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        descent = u + primal_step * divergence(dual)
        descent = descent + pull * (images - descent)
        ascent = dual + dual_step * differences(2 * descent - u)
        ascent = ascent / (length(ascent) / weight).clamp(min=1)
        return u + relaxation * (descent - u), dual + relaxation * (ascent - dual)

    return repeated(step, (start, start.new_zeros(2, *start.shape)), iterations, images)[0]


def length(field: Tensor) -> Tensor:
    """Lengths (..., H, W) of vectors (2, ..., H, W); its gradient at 0, where the root has none, is 0."""
    squared = field.square().sum(0)
    return torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)


def repeated(step: Callable[..., Any], state: tuple[Tensor, ...], times: int, source: Tensor) -> tuple[Tensor, ...]:
    """Apply ``state = step(*state)`` ``times`` times. With a gradient, memory grows with the root of ``times``.

    ``source`` is the tensor whose gradient is needed; ``step`` may use it.
    """

    def advance(count: int, *now: Tensor) -> tuple[Tensor, ...]:
        for _ in range(count):
            now = step(*now)
        return now

    block = max(math.isqrt(times), 1)
    for done in range(0, times, block):
        state = checkpointed(functools.partial(advance, min(block, times - done)), source, *state)
    return state


def checkpointed(function: Callable[..., Any], source: Tensor, *inputs: Tensor) -> Any:
    """``function(*inputs)``, recomputed in the backward pass if ``source``, which it may use, needs a gradient."""
    if not (torch.is_grad_enabled() and source.requires_grad):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def differences(images: Tensor) -> Tensor:
    """Forward differences (2, ..., H, W) along both axes, zero at the end."""
    return torch.stack([F.pad(images.diff(dim=-2), (0, 0, 0, 1)), F.pad(images.diff(dim=-1), (0, 1))])


def divergence(dual: Tensor) -> Tensor:
    """Minus the transpose of :func:`differences`, (2, ..., H, W) -> (..., H, W), for fields that end in zeros."""
    down, right = dual
    return down + right - F.pad(down[..., :-1, :], (0, 0, 1, 0)) - F.pad(right[..., :-1], (1, 0))


def non_local_means(images: Tensor, h: float, patch_size: int, patch_distance: int, sigma: float) -> Tensor:
    """Non-local means: scikit-image's ``denoise_nl_means`` in fast mode, except for the precision of its exponential.

    Args:
        images: (N, C, H, W).
        h: scale of the difference of patches, on the scale of the images.
        patch_size: side of a patch in pixels, odd.
        patch_distance: largest distance of a pixel along each axis, in pixels.
        sigma: standard deviation of known noise, on the scale of the images.
    """
    height, width = images.shape[-2:]
    half, reach = patch_size // 2, range(-patch_distance, patch_distance + 1)
    margin = half + patch_distance
    # PyTorch's reflection rejects margins wider than the image
    rows, columns = (torch.from_numpy(np.pad(np.arange(side), margin, mode="reflect")) for side in (height, width))
    padded = images[..., rows.to(images.device), :][..., columns.to(images.device)]
    scale = 1 / (images.shape[-3] * patch_size**2 * h**2)

    def moved(down: int, right: int, border: int) -> Tensor:
        top, left = margin + down - border, margin + right - border
        return padded[..., top : top + height + 2 * border, left : left + width + 2 * border]

    def row(down: int, total: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        for right in reach:
            squares = ((moved(0, 0, half) - moved(down, right, half)).square() - 2 * sigma**2).sum(-3, keepdim=True)
            # the library leaves out the first row and column of the patches
            sums = F.avg_pool2d(squares[..., 1:, 1:], 2 * half, 1, divisor_override=1) if half else 0 * squares
            apart = (scale * sums).clamp(min=0)
            weight = torch.where(apart <= 5, (-apart).exp(), 0)
            total, weights = total + weight * moved(down, right, 0), weights + weight
        return total, weights

    total, weights = torch.zeros_like(images), torch.zeros_like(images[..., :1, :, :])
    for down in reach:
        total, weights = checkpointed(functools.partial(row, down), images, total, weights)
    return total / weights


def bayes_shrink(planes: Tensor, sigma: Tensor) -> Tensor:
    """Wavelet denoising of each plane by itself: scikit-image's ``denoise_wavelet`` with Haar wavelets and soft thresholds.

    Args:
        planes: (N, C, H, W).
        sigma: (N or 1, C, 1, 1), the standard deviation that the thresholds assume, on the scale of the planes.
    """
    levels = max(int(math.log2(min(planes.shape[-2:]))) - 3, 1)  # the library leaves out the coarsest ones
    return _shrunk(planes, sigma.square()[..., None], levels)


def _shrunk(planes: Tensor, variance: Tensor, levels: int) -> Tensor:
    if levels == 0:
        return planes
    height, width = planes.shape[-2:]
    even = F.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    haar = planes.new_tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # its own inverse
    bands = torch.einsum("bk,nckhw->ncbhw", haar, F.pixel_unshuffle(even, 2).unflatten(1, (-1, 4)))
    coarse, details = bands[:, :, 0], bands[:, :, 1:]
    signal = details.square().mean((-2, -1), keepdim=True) - variance
    # a band of noise alone is removed
    threshold = torch.where(signal > 0, variance / signal.clamp(min=torch.finfo(signal.dtype).eps).sqrt(), math.inf)
    details = details.sign() * (details.abs() - threshold).relu()
    bands = torch.cat([_shrunk(coarse, variance, levels - 1)[:, :, None], details], 2)
    return F.pixel_shuffle(torch.einsum("bk,ncbhw->nckhw", haar, bands).flatten(1, 2), 2)[..., :height, :width]


def swirl(images: Tensor, center: tuple[float, float], strength: float, radius: float) -> Tensor:
    """Scikit-image's ``swirl`` around (x, y) = ``center`` in pixels; the image is reflected at its borders.

    Args:
        images: (N, C, H, W).
        center: of the whirl.
        strength: angle at the centre in radians.
        radius: in pixels; the swirl has almost no effect beyond it.
    """
    height, width = images.shape[-2:]
    axes = [torch.arange(side, dtype=images.dtype, device=images.device) for side in (height, width)]
    down, right = (axis - start for axis, start in zip(axes, reversed(center), strict=True))
    distance = torch.hypot(*torch.broadcast_tensors(down[:, None], right))
    angle = strength * torch.exp(-distance * 5 / (radius * math.log(2)))
    x = center[0] + right * angle.cos() - down[:, None] * angle.sin()
    y = center[1] + right * angle.sin() + down[:, None] * angle.cos()
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), padding_mode="reflection", align_corners=True)
