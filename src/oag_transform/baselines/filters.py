"""Portable baselines that need no training: those of Table I (section IV), and a few controls.

Each is a :class:`~oag_transform.baselines.base.Baseline`: a module that maps images (N, C, H, W), floating point in [0, 1],
C = 1 or 3, to images in [0, 1] of the same shape, dtype and device (:class:`Randomization` to larger ones). float64 is computed
in float64, all else in float32. Some have a gradient of their own, the derivative of their computation, for
``DefendedModel(..., gradient="own")``, as their docstrings state. The others have none. ``index`` selects the random streams of
the images. If it is an integer, image i uses stream ``index + i`` of ``seed``; a sequence has the stream of each image.
``seed=None`` draws a fresh seed in each call; without the argument ``seed``, nothing is random and ``index`` has no effect. All
raise ValueError for bad hyper-parameters, and ValueError or TypeError for other inputs. Denoising baselines are in
:mod:`oag_transform.baselines.denoisers`.
"""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from .. import _checks, noise_level, streams
from ._batches import CPU, draw_integer, generators, in_numpy, kornia
from .base import Baseline
from .surrogate import Surrogate


class MeanFilter(Baseline):
    """Mean over a square window (Li & Li 2017, [37] in the paper), borders by replication. It has a gradient of its own.

    Args:
        size: side of the window in pixels, odd.
    """

    own_gradient = True

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = _checks.odd("size", size)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return F.avg_pool2d(_padded(batch, self.size), self.size, stride=1)


class MedianFilter(Baseline):
    """Median over a square window of each channel (feature squeezing, Xu et al. 2018), borders by replication.

    It has a gradient of its own: that of each result goes to the value that is the median of the window.

    Args:
        size: side of the window in pixels, odd.
    """

    own_gradient = True

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = _checks.odd("size", size)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        padded = _padded(batch, self.size).split(1)  # one by one: windows are size^2 images
        windows = (image.unfold(2, self.size, 1).unfold(3, self.size, 1) for image in padded)
        return torch.cat([each.flatten(-2).median(-1).values for each in windows])


class BitDepth(Baseline):
    """Fewer bits for each value (feature squeezing, Xu et al. 2018, section III-A). It has no gradient.

    Values are rounded to multiples of 1 / (2^bits - 1), as in the published code (EvadeML-Zoo), where ImageNet gets 5 bits.

    Args:
        bits: 1 to 8. With 8, multiples of 1/255 remain unchanged.
    """

    def __init__(self, bits: int = 5) -> None:
        super().__init__()
        self.bits = _checks.integer("bits", bits, at_least=1, at_most=8)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        steps = 2**self.bits - 1
        return ((steps * batch.detach()).round() / steps).clamp(0, 1)

    def differentiable(self) -> nn.Module:
        """With the gradient of the identity."""
        return Surrogate(self, nn.Identity())


class JPEG(Baseline):
    """JPEG compression and decompression of the image rounded to 8 bits (Dziugaite et al. 2016, [38] in the paper).

    It has no gradient.

    Args:
        quality: 1 to 100. Chroma is subsampled (4:2:0) at every quality, as libjpeg does by default.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        self.quality = _checks.integer("quality", quality, at_least=1, at_most=100)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return in_numpy(batch, lambda image, _: _compressed(image, self.quality))

    def differentiable(self) -> nn.Module:
        """With the gradient of kornia's codec."""
        return _with_codec(self, self.quality)


def _compressed(image: NDArray[Any], quality: int) -> NDArray[Any]:
    grey_levels = (255 * image).round().astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    PIL.Image.fromarray(grey_levels.squeeze(2) if len(image) == 1 else grey_levels).save(file, "JPEG", quality=quality)
    decompressed = np.asarray(PIL.Image.open(file), dtype=image.dtype) / 255
    return np.atleast_3d(decompressed).transpose(2, 0, 1)


def _with_codec(defense: nn.Module, quality: int) -> nn.Module:
    codec = kornia("enhance", "the gradient of JPEG").jpeg_codec_differentiable
    return Surrogate(defense, partial(_smooth_jpeg, codec=codec, quality=quality))


def _smooth_jpeg(images: Tensor, codec: Callable[[Tensor, Tensor], Tensor], quality: int) -> Tensor:
    if len(images) == 0:
        return images  # the codec rejects empty batches
    with images.device:  # the codec makes constants
        result = codec(images.expand(-1, 3, -1, -1), images.new_tensor([quality]))
    return result.mean(1, keepdim=True) if images.shape[1] == 1 else result  # grey stays grey


class GaussianNoise(Baseline):
    """White Gaussian noise, clipped to [0, 1]: a control for defenses that add noise (not in the paper).

    It has a gradient of its own: the identity, and zero where values are clipped.

    Args:
        std: standard deviation in grey levels (0 to 255), before the result is clipped to [0, 1].
        seed: see the module.
    """

    own_gradient = True

    def __init__(self, std: float = 12.0, *, seed: int | None = None) -> None:
        super().__init__()
        self.std = _checks.number("std", std, at_least=0)
        self.seed = _checks.seed(seed)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        noise = generators(self.seed, indices, batch.device)
        return streams.add_normal(batch, self.std / 255, noise)


class NoisyJPEG(Baseline):
    """JPEG, then white Gaussian noise: a control (not in the paper).

    It has no gradient.

    Args:
        quality: of :class:`JPEG`.
        std: of :class:`GaussianNoise`, in grey levels.
        follow_noise: let the strength follow the noise of each image, as OAG does by default. ``quality`` and ``std`` then
            apply at full :func:`~oag_transform.noise_level.matching_strength`. ``std`` scales with its square root. The quality
            rises linearly to 90, or to ``quality`` if that is higher, at the least strength.
        seed: see the module.
    """

    def __init__(self, quality: int = 25, std: float = 8.0, *, follow_noise: bool = False, seed: int | None = None) -> None:
        super().__init__()
        self.quality = _checks.integer("quality", quality, at_least=1, at_most=100)
        self.std = _checks.number("std", std, at_least=0)
        self.follow_noise = _checks.flag("follow_noise", follow_noise)
        self.seed = _checks.seed(seed)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        batch = batch.detach()
        strengths = noise_level.matching_strength(batch).tolist() if self.follow_noise else [1.0] * len(batch)
        rise = max(90 - self.quality, 0) / (1 - noise_level.LEAST)
        qualities = [round(self.quality + rise * (1 - strength)) for strength in strengths]
        std = batch.new_tensor([self.std * math.sqrt(strength) / 255 for strength in strengths])[:, None, None, None]
        compressed = in_numpy(batch, lambda image, row: _compressed(image, qualities[row]))
        return streams.add_normal(compressed, std, generators(self.seed, indices, batch.device))

    def differentiable(self) -> nn.Module:
        """With the gradient of kornia's codec at ``quality``."""
        return _with_codec(self, self.quality)


class Randomization(Baseline):
    """Random enlargement and random padding (Xie et al. 2018, section 3; [23] in the paper).

    The longer side is resized (nearest neighbour, as in the published code) to a random length from its own, inclusive, to
    round(ratio * side), exclusive, and the other side by the same factor. The result is padded to round(ratio * side) on each
    side, at a random offset. The published code pads images normalised to [-1, 1] with zeros, which equals ``fill=0.5``.

    It has a gradient of its own, that of the drawn enlargement.

    Args:
        ratio: largest side over the input's, >= 1. 299 pixels become 331, as in the paper. Where rounding leaves no larger
            side, images keep their size.
        fill: value of the padding, in [0, 1].
        seed: see the module.

    Shape:
        - Output: (N, C, round(ratio * H), round(ratio * W)).
    """

    own_gradient = True

    def __init__(self, ratio: float = 331 / 299, *, fill: float = 0.0, seed: int | None = None) -> None:
        super().__init__()
        self.ratio = _checks.number("ratio", ratio, at_least=1)
        self.fill = _checks.number("fill", fill, at_least=0, at_most=1)
        self.seed = _checks.seed(seed)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        limits = [round(self.ratio * side) for side in batch.shape[-2:]]
        drawn = generators(self.seed, indices, CPU)
        placed = [self._placed(image[None], limits, generator) for image, generator in zip(batch, drawn, strict=True)]
        none = batch[:0, :, :1, :1].expand(-1, -1, *limits)  # the shape, and a gradient, where there are no images
        return torch.cat([none, *placed])

    def _placed(self, image: Tensor, limits: list[int], generator: Generator) -> Tensor:
        sides = image.shape[-2:]
        factor = draw_integer(max(sides), max(*limits, max(sides) + 1), generator) / max(sides)
        height, width = (round(factor * side) for side in sides)
        top, left = (draw_integer(0, limit - size + 1, generator) for limit, size in zip(limits, (height, width), strict=True))
        margins = (left, limits[1] - left - width, top, limits[0] - top - height)
        return F.pad(F.interpolate(image, (height, width), mode="nearest"), margins, value=self.fill)


def _padded(batch: Tensor, size: int) -> Tensor:
    return F.pad(batch, (size // 2,) * 4, mode="replicate")
