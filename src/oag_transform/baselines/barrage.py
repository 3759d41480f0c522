"""Barrage of random transforms (BaRT; Raff, Sylvester, Forsyth & McLean, CVPR 2019).

The contract is that of :mod:`oag_transform.baselines.filters`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage.exposure import equalize_adapthist, equalize_hist
from torch import Generator, Tensor

from .. import _checks
from ..straight_through import straight_through
from . import torch_filters
from ._batches import CPU, draw_integer, draw_uniform, generators, in_numpy, kornia, one_by_one
from .base import Baseline
from .denoisers import NonLocalMeans, Wavelets
from .filters import JPEG, MeanFilter, MedianFilter

_SIDE = 256  # pixels: the paper's distances are for this side


class BaRT(Baseline):
    """Barrage of random transforms (Raff et al. 2019): k of ten groups of transforms in random order.

    Groups, their order and the parameters of the transforms are drawn for each image. A group of several transforms takes one
    of them. Groups: 1 colour precision, 2 JPEG, 3 swirl, 4 noise, 5 Fourier coefficients, 6 zoom, 7 colour spaces, 8 contrast,
    9 mixing with grey, 10 denoising. Images of one channel have no groups 7 and 9. Ranges are those of a public port
    of the paper's appendix (DefenseBarrageNetwork). Distances, given for 256 pixels, scale with the shorter side. Differences
    from the port: no seam carving, no random mask of Fourier coefficients (it has no effect there), 50 iterations of total
    variation, mean and median over squares instead of discs, a bilateral filter instead of a mean of similar pixels, wavelets
    with soft thresholds in YCbCr, adaptive histograms of each channel, and one sigma of the blur for all channels.

    The paper fine-tunes the classifier on its transforms. A target that is not fine-tuned loses much of its clean accuracy.

    It has a gradient of its own, that of the drawn transforms, which EOT averages. Rounding, JPEG, histograms, wavelets and
    non-local means have the straight-through gradient (BPDA).

    Args:
        k: number of transforms, 0 to 10; the paper's choice for ImageNet is 5.
        seed: see :mod:`.filters`.

    Raises:
        ModuleNotFoundError: kornia is missing.
    """

    own_gradient = True

    def __init__(self, k: int = 5, *, seed: int | None = None) -> None:
        super().__init__()
        self.k = _checks.integer("k", k, at_most=len(_GROUPS))
        self.seed = _checks.seed(seed)
        kornia("color", "BaRT")

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return one_by_one(batch, self._transformed, generators(self.seed, indices, CPU))

    def _transformed(self, image: Tensor, draw: Generator) -> Tensor:
        groups = _GROUPS if image.shape[1] == 3 else [group for group in _GROUPS if group not in (_color_space, _grey_mix)]
        for chosen in torch.randperm(len(groups), generator=draw, device=CPU)[: self.k].tolist():
            image = groups[chosen](image, draw).clamp(0, 1)
        return image


def _color_precision(image: Tensor, draw: Generator) -> Tensor:
    steps = _of_each_channel(image, draw, lambda: draw_integer(8, 201, draw))
    return straight_through(image, lambda x: (x * steps).round() / steps)


def _jpeg(image: Tensor, draw: Generator) -> Tensor:
    return straight_through(image, JPEG(draw_integer(55, 96, draw)))


def _swirl(image: Tensor, draw: Generator) -> Tensor:
    height, width = image.shape[-2:]
    center = (draw_integer(0, width, draw), draw_integer(0, height, draw))
    return torch_filters.swirl(image, center, draw_uniform(0.01, 3, draw), _pixels(image, draw_uniform(10, 200, draw)))


def _noise(image: Tensor, draw: Generator) -> Tensor:
    """The noises of scikit-image's ``random_noise`` at its defaults, drawn on the CPU like all random numbers here."""
    kind = draw_integer(0, 6, draw)
    if kind in (0, 1):  # Gaussian, and speckle
        noise = 0.1 * torch.randn(image.shape, generator=draw, dtype=image.dtype, device=CPU).to(image.device)
        return image + noise * (image if kind else 1)
    if kind == 2:  # Poisson: the number of photons is that of distinct values, rounded up to a power of two
        values = 2 ** math.ceil(math.log2(max(len(image.unique()), 2)))
        return straight_through(image, lambda x: torch.poisson((values * x).to(CPU), generator=draw).to(x) / values)
    changed = torch.rand(image.shape, generator=draw, device=CPU).to(image.device) < 0.05
    white = torch.rand(image.shape, generator=draw, device=CPU).to(image.device) < {3: 1.0, 4: 0.0, 5: 0.5}[kind]
    return torch.where(changed, white.to(image), image)  # salt, pepper, or both


def _fourier(image: Tensor, draw: Generator) -> Tensor:
    spectrum = torch.fft.fft2(image)
    keep = [draw_uniform(0, 0.95, draw) for _ in range(image.shape[1])]
    mask = torch.ones(image.shape, dtype=image.dtype, device=CPU)
    for channel, share in enumerate(keep):  # a share above one half keeps everything
        for axis, side in enumerate(image.shape[-2:]):
            start, end = int(side * share), int(side * (1 - share))
            mask[0, channel].narrow(axis, start, max(end - start, 0)).zero_()
    factor = 0.98 + 0.04 * torch.rand(image.shape[-2:], generator=draw, dtype=image.dtype, device=CPU)
    return torch.fft.ifft2(spectrum * (mask * factor).to(image.device)).real


def _zoom(image: Tensor, draw: Generator) -> Tensor:
    top, bottom, left, right = (round(_pixels(image, draw_uniform(10, 50, draw))) for _ in range(4))
    height, width = image.shape[-2:]
    cropped = image[..., top : max(height - bottom, top + 1), left : max(width - right, left + 1)]
    return F.interpolate(cropped, (height, width), mode="bilinear", align_corners=False)


_COLOR_SPACES = (  # name, largest change of each channel, lowest and highest values
    ("hsv", (0.1 * math.pi, 0.25, 0.25), (0, 0, 0), (2 * math.pi, 1, 1)),
    ("xyz", (0.05, 0.05, 0.05), (0, 0, 0), (1, 1, 1)),
    ("lab", (5, 2, 2), (0, -math.inf, -math.inf), (100, math.inf, math.inf)),
    ("yuv", (0.05, 0.02, 0.02), (0, -math.inf, -math.inf), (1, math.inf, math.inf)),
)


def _color_space(image: Tensor, draw: Generator) -> Tensor:
    color, (name, most, low, high) = kornia("color", "BaRT"), _COLOR_SPACES[draw_integer(0, 4, draw)]
    change, least, greatest = (
        image.new_tensor(values)[:, None, None] for values in ([draw_uniform(-each, each, draw) for each in most], low, high)
    )
    # the roots in these conversions have no finite gradient at black
    moved = getattr(color, f"rgb_to_{name}")(image.clamp(1e-4, 1)) + change
    return getattr(color, f"{name}_to_rgb")(torch.minimum(torch.maximum(moved, least), greatest))


def _contrast(image: Tensor, draw: Generator) -> Tensor:
    kind = draw_integer(0, 3, draw)
    if kind == 0:
        bins = draw_integer(40, 257, draw)
        # in float64: a nearly uniform channel has fewer float32 values than bins
        return straight_through(
            image, lambda x: in_numpy(x, lambda y, _: _by_channel(lambda z: equalize_hist(z.astype(float), bins), y))
        )
    if kind == 1:
        side = min(image.shape[-2:])
        kernel = [max(round(draw_uniform(side / 10, side / 6, draw)), 1) for _ in range(2)]
        limit = draw_uniform(0.01, 0.04, draw)
        return straight_through(
            image, lambda x: in_numpy(x, lambda y, _: _by_channel(lambda z: equalize_adapthist(z, kernel, limit), y))
        )
    together = draw_integer(0, 2, draw) == 0
    values = image.flatten(1)[:, None] if together else image.flatten(2)
    shares = image.new_tensor([draw_uniform(0.01, 0.04, draw), draw_uniform(0.96, 0.99, draw)])
    low, high = torch.quantile(values, shares, dim=-1)[..., None, None]
    return (image - low) / (high - low).clamp(min=1e-3)


def _grey_mix(image: Tensor, draw: Generator) -> Tensor:
    """Replace all channels by grey, mix all partly, replace two, or mix one partly."""
    kind, own = draw_integer(0, 4, draw), torch.eye(3, dtype=torch.float64, device=CPU)
    odd = draw_integer(0, 3, draw)
    ratios = torch.tensor([draw_uniform(0, 1, draw) + 1e-9 for _ in range(3)], dtype=torch.float64, device=CPU)
    if kind > 1:
        ratios[odd] = 0
    grey = (ratios / ratios.sum()).expand(3, 3)
    if kind == 0:
        kept = torch.zeros(3, dtype=torch.float64, device=CPU)
    elif kind == 1:
        kept = torch.tensor([max(draw_uniform(0, 1, draw), 0.2) for _ in range(3)], dtype=torch.float64, device=CPU)
    elif kind == 2:
        kept = own[odd]
    else:
        kept = 1 - own[odd] * draw_uniform(0.1, 0.9, draw)
    mixing = kept[:, None] * own + (1 - kept[:, None]) * grey
    return torch.einsum("oc,nchw->nohw", mixing.to(image), image)


def _denoise(image: Tensor, draw: Generator) -> Tensor:
    kind, filters = draw_integer(0, 7, draw), kornia("filters", "BaRT")
    if kind == 0:
        sigma = draw_uniform(0.1, 2, draw)
        size = 2 * math.ceil(4 * sigma) + 1
        return filters.gaussian_blur2d(image, (size, size), image.new_full((1, 2), sigma), border_type="replicate")
    if kind in (1, 2):
        return (MedianFilter, MeanFilter)[kind - 1](2 * draw_integer(2, 4, draw) + 1)(image)
    if kind == 3:
        size = 2 * max(round(_pixels(image, draw_uniform(2, 30, draw))), 1) + 1
        return filters.bilateral_blur(image, (size, size), draw_uniform(5, 30, draw) / 255, (size / 2, size / 2), "replicate")
    if kind == 4:
        return torch_filters.chambolle(image, draw_uniform(0.05, 0.3, draw), 50)
    strength = 255 * float(_noise_level(image.detach()))
    if kind == 5:
        return straight_through(image, Wavelets(max(strength, 0.1)))
    arguments = {"patch_size": 2 * draw_integer(2, 4, draw) + 1, "patch_distance": draw_integer(6, 12, draw)}
    return straight_through(image, NonLocalMeans(max(draw_uniform(0.6, 1.15, draw) * strength, 0.1), **arguments))


_GROUPS: tuple[Callable[[Tensor, Generator], Tensor], ...] = (
    _color_precision, _jpeg, _swirl, _noise, _fourier, _zoom, _color_space, _contrast, _grey_mix, _denoise,
)  # fmt: skip


def _noise_level(image: Tensor) -> Tensor:
    """Standard deviation of the noise: the median of the finest diagonal Haar coefficients (Donoho & Johnstone 1994)."""
    even = F.pad(image, (0, image.shape[-1] % 2, 0, image.shape[-2] % 2), mode="replicate")
    blocks = F.pixel_unshuffle(even, 2).unflatten(1, (-1, 4))
    return ((blocks[:, :, 0] - blocks[:, :, 1] - blocks[:, :, 2] + blocks[:, :, 3]) / 2).abs().median() / 0.6745


def _pixels(image: Tensor, of_256: float) -> float:
    return of_256 * min(image.shape[-2:]) / _SIDE


def _of_each_channel(image: Tensor, draw: Generator, drawn: Callable[[], float]) -> Tensor:
    """One number for all channels or, with probability 1/2, one for each: (C, 1, 1)."""
    count = image.shape[1]
    values = [drawn() for _ in range(count)] if draw_integer(0, 2, draw) else [drawn()] * count
    return image.new_tensor(values)[:, None, None]


def _by_channel(function: Callable[[Any], Any], image: Any) -> Any:
    return np.stack([function(channel) for channel in image])
