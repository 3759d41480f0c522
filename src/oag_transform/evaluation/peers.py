"""Portable defenses of other papers that need no training: those of Table I (section IV) and a few controls.

Each is a module that maps images (N, C, H, W), floating point in [0, 1], C = 1 or 3, to images of the same shape, dtype and
device (:class:`Randomization` to larger ones), without a gradient. ``index`` names the random stream of the first image of the
batch: image i uses stream ``index + i`` of ``seed``; ``seed=None`` draws a fresh seed in each call. All raise ValueError for
bad hyper-parameters, and ValueError or TypeError for other images than these.
"""

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.color import rgb2ycbcr
from skimage.restoration import denoise_tv_chambolle, denoise_wavelet
from torch import Generator, Tensor, nn

from .. import noise_level, streams
from ..images import check_batch, to_batch
from ..transform import check_natural

CPU = torch.device("cpu")


class MeanFilter(nn.Module):
    """Mean over a square window (Li & Li 2017, [37] in the paper), borders by replication.

    Args:
        size: side of the window in pixels, odd.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        _require(_is_integer(size) and size > 0 and size % 2 == 1, "size", size, "an odd positive integer")
        self.size = size

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Filtered images; see the module for shapes and errors. ``index`` has no effect."""
        return F.avg_pool2d(_padded(_check(images, index), self.size), self.size, stride=1).to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"size={self.size}"


class MedianFilter(nn.Module):
    """Median over a square window of each channel (feature squeezing, Xu et al. 2018), borders by replication.

    Args:
        size: side of the window in pixels, odd.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        _require(_is_integer(size) and size > 0 and size % 2 == 1, "size", size, "an odd positive integer")
        self.size = size

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Filtered images; see the module for shapes and errors. ``index`` has no effect."""
        batch = _check(images, index)
        filtered = torch.empty_like(batch)
        for row, image in zip(filtered, _padded(batch, self.size), strict=True):  # one by one: windows are size^2 images
            windows = image.unfold(1, self.size, 1).unfold(2, self.size, 1)
            row.copy_(windows.flatten(-2).median(-1).values)
        return filtered.to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"size={self.size}"


class JPEG(nn.Module):
    """JPEG compression and decompression of the image rounded to 8 bits (Dziugaite et al. 2016, [38] in the paper).

    Args:
        quality: 1 to 100. Chroma is subsampled (4:2:0) at every quality, as libjpeg does by default.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        _require_quality(quality)
        self.quality = quality

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Decompressed images, multiples of 1/255; see the module for shapes and errors. ``index`` has no effect."""
        return _in_numpy(_check(images, index), lambda image, _: _compressed(image, self.quality)).to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"quality={self.quality}"


def _compressed(image: NDArray[Any], quality: int) -> NDArray[Any]:
    grey_levels = (255 * image).round().astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    PIL.Image.fromarray(grey_levels.squeeze(2) if len(image) == 1 else grey_levels).save(file, "JPEG", quality=quality)
    decompressed = np.asarray(PIL.Image.open(file), dtype=image.dtype) / 255
    return np.atleast_3d(decompressed).transpose(2, 0, 1)


class GaussianNoise(nn.Module):
    """White Gaussian noise, held to [0, 1] as any image is: a control for defenses that add noise (not in the paper).

    Args:
        std: standard deviation in grey levels (0 to 255), before the result is held to [0, 1].
        seed: see the module.
    """

    def __init__(self, std: float = 12.0, *, seed: int | None = None) -> None:
        super().__init__()
        _require_std(std)
        _require_seed(seed)
        self.std = std
        self.seed = seed

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Noisy images; see the module for shapes and errors."""
        batch = _check(images, index)
        generators = _streams(self.seed, index, batch, batch.device)
        return streams.add_normal(batch, self.std / 255, generators).to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"std={self.std!r}, seed={self.seed}"


class NoisyJPEG(nn.Module):
    """JPEG, then white Gaussian noise: the noise drowns what the compression leaves of a perturbation (not in the paper).

    Args:
        quality: of :class:`JPEG`.
        std: of :class:`GaussianNoise`, in grey levels.
        follow_noise: go as far as the noise of each image asks for, as our transform does by default: ``quality`` and ``std``
            are for full :func:`~oag_transform.noise_level.strength`; ``std`` goes as its square root, and the quality rises
            linearly to 90, or ``quality`` if that is higher, at the least strength.
        seed: see the module.
    """

    def __init__(self, quality: int = 25, std: float = 8.0, *, follow_noise: bool = False, seed: int | None = None) -> None:
        super().__init__()
        _require_quality(quality)
        _require_std(std)
        _require_seed(seed)
        _require(isinstance(follow_noise, bool), "follow_noise", follow_noise, "True or False")
        self.quality, self.std, self.follow_noise, self.seed = quality, std, follow_noise, seed

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Decompressed, noisy images; see the module for shapes and errors."""
        batch = _check(images, index)
        strengths = noise_level.strength(batch).tolist() if self.follow_noise else [1.0] * len(batch)
        rise = max(90 - self.quality, 0) / (1 - noise_level.LEAST)
        qualities = [round(self.quality + rise * (1 - strength)) for strength in strengths]
        std = batch.new_tensor([self.std * math.sqrt(strength) / 255 for strength in strengths])[:, None, None, None]
        compressed = _in_numpy(batch, lambda image, row: _compressed(image, qualities[row]))
        return streams.add_normal(compressed, std, _streams(self.seed, index, batch, batch.device)).to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"quality={self.quality}, std={self.std!r}, follow_noise={self.follow_noise}, seed={self.seed}"


class TotalVariation(nn.Module):
    """Total-variation denoising of each channel, by scikit-image's ``denoise_tv_chambolle`` (Rudin, Osher & Fatemi 1992).

    Minimises 1/2 |u - image|^2 + weight |grad u| by 200 iterations; on photographs they come within a grey level (RMS) of the
    minimum for a weight of 0.1. The library's own early stop is off, since it can leave several. The result, which stopping
    at all can leave outside of the range, is held to [0, 1].

    Args:
        weight: of the total variation, for values in [0, 1].
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        _require(_is_number(weight) and weight > 0, "weight", weight, "a finite number > 0")
        self.weight = weight

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Denoised images; see the module for shapes and errors. ``index`` has no effect."""
        batch = _check(images, index)

        def denoise(image: NDArray[Any], _: int) -> NDArray[Any]:
            return denoise_tv_chambolle(image, weight=self.weight, eps=0, max_num_iter=200, channel_axis=0)

        return _in_numpy(batch, denoise).to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"weight={self.weight!r}"


class TVM(nn.Module):
    """Total variance minimization (Guo et al. 2018, section 4.3; [21] in the paper).

    Drops values at random, each channel of each pixel by itself, and reconstructs the image from the others: the minimum of
    1/2 |kept (u - image)|^2 + weight |grad u|. Defaults and objective are those of the published code
    (adversarial_image_defenses; it gives 1 / weight to the data term: the same minimum), while the text of the paper leaves
    the norm unsquared. That code stops after a few split-Bregman steps; this goes on close to the minimum. A channel all of
    whose values are dropped becomes black. The result, which stopping at all can leave outside of the range, is held to
    [0, 1].

    Args:
        weight: lambda_TV, of the total variation against the squared error, for values in [0, 1].
        drop_rate: probability that a value is dropped.
        iterations: of :func:`minimize_tv`; 300 come within 0.1% of the minimal objective at the other defaults.
        seed: see the module.
    """

    def __init__(self, weight: float = 0.03, drop_rate: float = 0.5, *, iterations: int = 300, seed: int | None = None) -> None:
        super().__init__()
        _require(_is_number(weight) and weight > 0, "weight", weight, "a finite number > 0")
        _require(_is_number(drop_rate) and 0 <= drop_rate < 1, "drop_rate", drop_rate, "a number in [0, 1)")
        _require(_is_integer(iterations) and iterations > 0, "iterations", iterations, "a positive integer")
        _require_seed(seed)
        self.weight = weight
        self.drop_rate = drop_rate
        self.iterations = iterations
        self.seed = seed

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Reconstructed images; see the module for shapes and errors."""
        batch = _check(images, index)
        kept = torch.empty_like(batch, dtype=torch.bool)
        for row, generator in zip(kept, _streams(self.seed, index, batch, batch.device), strict=True):
            uniform = torch.rand(row.shape, generator=generator, dtype=torch.float32, device=batch.device)
            row.copy_(uniform >= self.drop_rate)
        return minimize_tv(batch, kept, self.weight, self.iterations).clamp(0, 1).to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"weight={self.weight!r}, drop_rate={self.drop_rate!r}, iterations={self.iterations}, seed={self.seed}"


def minimize_tv(images: Tensor, kept: Tensor, weight: float, iterations: int) -> Tensor:
    """Images u (..., H, W) that minimise 1/2 |kept (u - images)|^2 + weight sum |grad u|, grad by forward differences.

    Total variation is isotropic, and of each channel by itself. By the over-relaxed primal-dual method of Chambolle & Pock
    (2011; Condat 2013), from the mean of what is kept: nothing depends on the other values.

    Args:
        images: (..., H, W), floating point.
        kept: bool of the same shape, where the values of ``images`` count.
        weight: > 0.
        iterations: number of steps.
    """
    # tuned on photographs; it converges for any two steps whose product is at most 1 / |grad|^2, and |grad|^2 < 8
    primal_step, relaxation = 0.5, 1.9
    dual_step = 1 / (8 * primal_step)
    mean = (images * kept).sum((-2, -1), keepdim=True) / kept.sum((-2, -1), keepdim=True).clamp(min=1)
    u = torch.where(kept, images, mean)
    pull = torch.where(kept, primal_step / (1 + primal_step), 0.0).to(u)
    dual = u.new_zeros(2, *u.shape)
    for _ in range(iterations):
        step = u + primal_step * _divergence(dual)
        step += pull * (images - step)
        ascent = dual + dual_step * _gradient(2 * step - u)
        ascent /= (ascent.square().sum(0).sqrt() / weight).clamp(min=1)
        u = u + relaxation * (step - u)
        dual += relaxation * (ascent - dual)
    return u


def _gradient(u: Tensor) -> Tensor:
    gradient = u.new_zeros(2, *u.shape)
    gradient[0, ..., :-1, :] = u[..., 1:, :] - u[..., :-1, :]
    gradient[1, ..., :-1] = u[..., 1:] - u[..., :-1]
    return gradient


def _divergence(dual: Tensor) -> Tensor:
    """Minus the transpose of :func:`_gradient`, for fields that are zero where the gradient always is."""
    divergence = dual[0] + dual[1]
    divergence[..., 1:, :] -= dual[0, ..., :-1, :]
    divergence[..., 1:] -= dual[1, ..., :-1]
    return divergence


class PixelDeflection(nn.Module):
    """Pixel deflection and wavelet denoising (Prakash et al. 2018, Algorithm 1; [26] in the paper).

    Pixels are chosen uniformly over the image, as in the published code (pixel-deflection, ``disable_map``): the class
    activation map of the paper needs access to a network. Then scikit-image's ``denoise_wavelet``, by BayesShrink with soft
    thresholds, in YCbCr if there are 3 channels, held to [0, 1] where wavelets ring, as the library did at the time.

    Args:
        deflections: number of values that are replaced; see :func:`deflect`.
        window: how far a value may come from, in pixels along each axis.
        sigma: standard deviation of the noise that the thresholds assume. As in the library at the time (up to 0.15), it is
            relative to the range of the image in each channel of YCbCr; for 1 channel, to [0, 1].
        seed: see the module.
    """

    def __init__(self, deflections: int = 200, window: int = 10, sigma: float = 0.04, *, seed: int | None = None) -> None:
        super().__init__()
        _require(_is_integer(deflections) and deflections >= 0, "deflections", deflections, "an integer >= 0")
        _require(_is_integer(window) and window > 0, "window", window, "a positive integer")
        _require(_is_number(sigma) and sigma > 0, "sigma", sigma, "a finite number > 0")
        _require_seed(seed)
        self.deflections = deflections
        self.window = window
        self.sigma = sigma
        self.seed = seed

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Deflected and denoised images; see the module for shapes and errors."""
        batch = _check(images, index)
        generators = _streams(self.seed, index, batch, CPU)

        def purify(image: NDArray[Any], row: int) -> NDArray[Any]:
            return self._denoise(deflect(image, self.deflections, self.window, generators[row]))

        return _in_numpy(batch, purify).to(images.dtype)

    def _denoise(self, image: NDArray[Any]) -> NDArray[Any]:
        settings = {"method": "BayesShrink", "mode": "soft", "rescale_sigma": False}
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # images too small for the wavelet
            if len(image) == 1:
                return denoise_wavelet(image[0], self.sigma, **settings)[None]
            ranges = np.ptp(rgb2ycbcr(image, channel_axis=0), axis=(1, 2))  # which today's scikit-image divides sigma by
            return denoise_wavelet(image, list(self.sigma * ranges), convert2ycbcr=True, channel_axis=0, **settings)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"deflections={self.deflections}, window={self.window}, sigma={self.sigma!r}, seed={self.seed}"


def deflect(image: NDArray[Any], deflections: int, window: int, generator: Generator) -> NDArray[Any]:
    """Replace random values of an image (C, H, W) by values of the same channel at most ``window`` pixels away on each axis.

    Both places are uniform: the first over the image, with replacement, the second over the part of the window that is
    inside of the image. As in the published code, channels take turns, each with places of its own; as in the paper, all
    values come from the original image (the code lets a value travel on).

    Args:
        image: (C, H, W); not modified.
        deflections: number of values that are replaced.
        window: > 0.
        generator: on the CPU.
    """
    uniform = torch.rand(4, deflections, generator=generator, dtype=torch.float64).numpy()
    channel = np.arange(deflections) % len(image)
    target, source = [channel], [channel]
    for size, where, offset in zip(image.shape[1:], uniform[:2], uniform[2:], strict=True):
        place = (where * size).astype(int)
        low, high = np.maximum(place - window, 0), np.minimum(place + window, size - 1)
        target.append(place)
        source.append(low + (offset * (high - low + 1)).astype(int))
    deflected = image.copy()
    deflected[tuple(target)] = image[tuple(source)]
    return deflected


class Randomization(nn.Module):
    """Random enlargement and random padding (Xie et al. 2018, section 3; [23] in the paper).

    The longer side is resized (nearest neighbour, as in the published code) to a random length from its own, inclusive, to
    round(ratio * side), exclusive, the other side by the same factor. The result is padded to round(ratio * side) on each
    side, at a random offset. The published code pads what it has normalised to [-1, 1] with zeros, which is ``fill=0.5``.

    Args:
        ratio: largest side over the input's, >= 1. 299 pixels become 331, as in the paper. Where rounding leaves no larger
            side, images stay as they are.
        fill: value of the padding, in [0, 1].
        seed: see the module.

    Shape:
        - Output: (N, C, round(ratio * H), round(ratio * W)).
    """

    def __init__(self, ratio: float = 331 / 299, *, fill: float = 0.0, seed: int | None = None) -> None:
        super().__init__()
        _require(_is_number(ratio) and ratio >= 1, "ratio", ratio, "a finite number >= 1")
        _require(_is_number(fill) and 0 <= fill <= 1, "fill", fill, "a number in [0, 1]")
        _require_seed(seed)
        self.ratio = ratio
        self.fill = fill
        self.seed = seed

    def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
        """Resized and padded images; see the module for errors."""
        batch = _check(images, index)
        sides = batch.shape[-2:]
        limits = [round(self.ratio * side) for side in sides]
        padded = batch.new_full((*batch.shape[:2], *limits), self.fill)
        for row, image, generator in zip(padded, batch, _streams(self.seed, index, batch, CPU), strict=True):
            factor = _integer(max(sides), max(*limits, max(sides) + 1), generator) / max(sides)
            height, width = (round(factor * side) for side in sides)
            top, left = (_integer(0, limit - size + 1, generator) for limit, size in zip(limits, (height, width), strict=True))
            row[:, top : top + height, left : left + width] = F.interpolate(image[None], (height, width), mode="nearest")[0]
        return padded.to(images.dtype)

    def extra_repr(self) -> str:
        """Every argument."""
        return f"ratio={self.ratio!r}, fill={self.fill!r}, seed={self.seed}"


def _check(images: Tensor, index: int) -> Tensor:
    """The images, checked, in float32 or float64."""
    check_batch(images)
    check_natural("index", index)
    return to_batch(images)


def _padded(batch: Tensor, size: int) -> Tensor:
    return F.pad(batch, (size // 2,) * 4, mode="replicate")


def _in_numpy(batch: Tensor, function: Callable[[NDArray[Any], int], NDArray[Any]]) -> Tensor:
    """``function(image, row)`` of each image (C, H, W), held to [0, 1]."""
    results = torch.empty_like(batch, device=CPU)
    for row, image in enumerate(batch.cpu().numpy()):
        results[row] = torch.from_numpy(function(image, row))
    return results.clamp(0, 1).to(batch.device)


def _streams(seed: int | None, index: int, batch: Tensor, device: torch.device) -> list[Generator]:
    seed = streams.fresh_seed() if seed is None else seed
    return streams.generators(seed, range(index, index + len(batch)), device)


def _integer(low: int, high: int, generator: Generator) -> int:
    """Uniform in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _require(valid: bool, name: str, value: Any, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _require_quality(quality: Any) -> None:
    _require(_is_integer(quality) and 1 <= quality <= 100, "quality", quality, "an integer from 1 to 100")


def _require_std(std: Any) -> None:
    _require(_is_number(std) and std >= 0, "std", std, "a finite number >= 0")


def _require_seed(seed: Any) -> None:
    _require(seed is None or (_is_integer(seed) and seed >= 0), "seed", seed, "None or an integer >= 0")
