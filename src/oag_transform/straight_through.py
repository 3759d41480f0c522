"""The straight-through gradient, in every mode of differentiation (BPDA, Athalye et al. 2018)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks


def straight_through(images: Tensor, defense: Callable[[Tensor], Tensor]) -> Tensor:
    """``defense(images)`` with the derivative of the identity, in reverse and forward mode and under ``torch.func``.

    If the defense returns images (N, C, H', W') of another size, the derivative is that of a bilinear resize to this size.

    Raises:
        ValueError: a derivative is asked for of a defense that changes the number of channels.
        RuntimeError: under ``torch.vmap``: a defense works on whole batches.
    """
    return _StraightThrough.apply(images, defense)


def clipped(images: Tensor) -> Tensor:
    """Images clipped to [0, 1], with the derivative of the identity everywhere.

    Raises:
        ValueError: NaN or infinity.
    """
    return straight_through(images, lambda plain: _checks.finite_pixels(plain).clamp(0, 1))


class _StraightThrough(torch.autograd.Function):
    # the defense runs in forward(), which gets plain tensors even under torch.func
    @staticmethod
    def forward(images: Tensor, defense: Callable[[Tensor], Tensor]) -> Tensor:
        result = defense(images.detach())
        shared = result.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
        return result.clone() if shared else result.detach()  # no view: the caller may change it in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.source, ctx.target, ctx.dtype = inputs[0].shape, output.shape, output.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        _check_channels(ctx)
        if ctx.source != ctx.target:
            gradient = torch.ops.aten.upsample_bilinear2d_backward(gradient, ctx.target[-2:], ctx.source, False)
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        tangent = tangents[0]
        _check_channels(ctx)
        if ctx.source != ctx.target:
            tangent = F.interpolate(tangent, ctx.target[-2:], mode="bilinear", align_corners=False)
        return tangent.to(ctx.dtype, copy=True)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(_checks.NOT_VMAPPED)


def _check_channels(ctx: Any) -> None:
    if ctx.source[1] != ctx.target[1]:
        raise ValueError(
            f"the straight-through gradient needs a defense that keeps the number of channels, got {ctx.target[1]} "
            f"for {ctx.source[1]}; use gradient='own', or change the channels in the target"
        )
