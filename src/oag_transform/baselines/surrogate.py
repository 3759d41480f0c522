"""Gradients of baselines, exact or of a differentiable surrogate, for adaptive attacks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..defended import applied
from ..images import work_type
from ..straight_through import straight_through
from .base import Baseline


def differentiable(defense: nn.Module) -> nn.Module | None:
    """The defense with equal values and a gradient for ``DefendedModel(..., gradient="own")``; None if it has none.

    The gradient is exact for baselines with a gradient of their own (see each class), for total variation, wavelets and pixel
    deflection. It is that of a surrogate for JPEG (kornia's differentiable codec: Reich et al. 2024; Shin & Song 2017),
    non-local means (without the library's rounding of weights) and bit depth (the identity). BM3D, PixelDefend, Noise2Fast,
    TNP, DIP and the auto-encoder have the straight-through gradient (BPDA) of a :class:`~oag_transform.DefendedModel`. For OAG
    and for defenses in sequence, see :func:`~oag_transform.evaluation.attacks.unrolled.unrolled`.

    Raises:
        ModuleNotFoundError: kornia is missing, for JPEG.
    """
    if isinstance(defense, nn.Identity):
        return defense
    return defense.differentiable() if isinstance(defense, Baseline) else None


class Surrogate(nn.Module):
    """The values of a defense with the gradient of a smooth function, zero where that function is clipped to [0, 1].

    Args:
        defense: maps images (N, C, H, W) in [0, 1] to images of the same shape.
        smooth: differentiable approximation of the defense; it may have a keyword ``index``, as defenses do.
    """

    def __init__(self, defense: nn.Module, smooth: Callable[..., Tensor]) -> None:
        super().__init__()
        self.defense = defense
        self.smooth = smooth

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """The result of the defense, with the gradient of ``smooth``."""
        with torch.no_grad():
            values = self.defense(images.detach(), index=index)
        forward_mode = torch.autograd.forward_ad.unpack_dual(images).tangent is not None
        if not ((torch.is_grad_enabled() and images.requires_grad) or forward_mode):
            return values
        device, wide = work_type(images)
        with torch.autocast(device.type, enabled=False):  # not the caller's
            return straight_through(applied(self.smooth, images.to(wide), index).clamp(0, 1), lambda _: values)
