"""Gradients of baselines, exact or of a differentiable surrogate, for adaptive attacks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..straight_through import straight_through
from . import torch_filters
from ._batches import kornia
from .barrage import BaRT
from .compose import Compose
from .denoisers import TVM, NonLocalMeans, TotalVariation
from .filters import JPEG, BitDepth, GaussianNoise, MeanFilter, MedianFilter, NoisyJPEG, Randomization
from .target_aware import AntiAdversary, ZeroPur
from .zero_shot import ZeroShotNoise2Noise

OWN = (MeanFilter, MedianFilter, GaussianNoise, Randomization, TVM, BaRT, ZeroShotNoise2Noise, AntiAdversary, ZeroPur)
"""Baselines with a gradient of their own."""


def differentiable(defense: nn.Module) -> nn.Module | None:
    """The defense with equal values and a gradient for ``DefendedModel(..., gradient="own")``; None if it has none.

    The gradient is exact for :data:`OWN` (see each class) and for total variation. It is that of a surrogate for JPEG (kornia's
    differentiable codec: Reich et al. 2024; Shin & Song 2017), non-local means (without the library's rounding of weights) and
    bit depth (the identity). A :class:`~oag_transform.baselines.compose.Compose` has a gradient if all of its parts have one.
    Wavelets, pixel deflection, BM3D, PixelDefend, Noise2Fast, TNP, DIP and the auto-encoder have the straight-through gradient
    (BPDA) of a :class:`~oag_transform.DefendedModel`. For OAG, see :func:`~oag_transform.evaluation.attacks.unrolled.unrolled`.

    Raises:
        ModuleNotFoundError: kornia is missing, for JPEG.
    """
    if isinstance(defense, (*OWN, nn.Identity)):
        return defense
    if isinstance(defense, Compose):
        parts = [differentiable(part) for part in defense.defenses]
        found = [part for part in parts if part is not None]
        return Compose(*found) if len(found) == len(parts) else None
    if isinstance(defense, TotalVariation):
        return Surrogate(defense, lambda images: torch_filters.chambolle(images, defense.weight, defense.iterations))
    if isinstance(defense, NonLocalMeans):
        arguments = (defense.h / 255, defense.patch_size, defense.patch_distance, defense.sigma / 255)
        return Surrogate(defense, lambda images: torch_filters.non_local_means(images, *arguments))
    if isinstance(defense, (JPEG, NoisyJPEG)):
        codec = kornia("enhance", "the gradient of JPEG").jpeg_codec_differentiable
        return Surrogate(defense, lambda images: _jpeg(images, codec, defense.quality))
    if isinstance(defense, BitDepth):
        return Surrogate(defense, lambda images: images)
    return None


class Surrogate(nn.Module):
    """The values of a defense with the gradient of a smooth function, zero where that function is clipped to [0, 1].

    Args:
        defense: maps images (N, C, H, W) in [0, 1] to images of the same shape.
        smooth: differentiable approximation of the defense.
    """

    def __init__(self, defense: nn.Module, smooth: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.defense = defense
        self.smooth = smooth

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """The result of the defense, with the gradient of ``smooth``."""
        with torch.no_grad():
            values = self.defense(images.detach(), index=index)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return values
        smooth = self.smooth(images if images.dtype == torch.float64 else images.float()).clamp(0, 1)
        return straight_through(smooth, lambda _: values)


def _jpeg(images: Tensor, codec: Callable[..., Tensor], quality: int) -> Tensor:
    if len(images) == 0:
        return images  # the codec rejects empty batches
    result = codec(images.expand(-1, 3, -1, -1), images.new_tensor([quality]))
    return result.mean(1, keepdim=True) if images.shape[1] == 1 else result  # grey stays grey
