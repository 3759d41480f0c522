"""Portable defenses that denoise: total variation, wavelets, and methods based on similar patches.

The contract is that of :mod:`oag_transform.baselines.filters`. Only :class:`TVM` has a gradient; all others work on the CPU.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import rgb2ycbcr
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet
from torch import Generator, Tensor, nn

from .. import _checks
from ._batches import CPU, generators, in_numpy
from .base import Baseline
from .surrogate import Surrogate
from .torch_filters import bayes_shrink, chambolle, minimize_tv, non_local_means

_BM3D_LEAST_SIDE = 16  # pixels; the library crashes on an image of one block


class TotalVariation(Baseline):
    """Total-variation denoising of each channel, by scikit-image's ``denoise_tv_chambolle`` (Rudin, Osher & Fatemi 1992).

    It minimises ``1/2 |u - image|^2 + weight |grad u|``. With a weight of 0.1, 200 iterations come within one grey level (RMS)
    of the minimum on images of 224 pixels. The library's early stop is off, since it can be several levels away. The result
    is clipped to [0, 1].

    Args:
        weight: of the total variation, for values in [0, 1].
        iterations: of the library's method.
    """

    def __init__(self, weight: float = 0.1, *, iterations: int = 200) -> None:
        super().__init__()
        self.weight = _checks.number("weight", weight, above=0)
        self.iterations = _checks.integer("iterations", iterations, at_least=1)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        def denoise(image: NDArray[Any], _: int) -> NDArray[Any]:
            return denoise_tv_chambolle(image, weight=self.weight, eps=0, max_num_iter=self.iterations, channel_axis=0)

        return in_numpy(batch, denoise)

    def differentiable(self) -> nn.Module:
        """With its exact gradient."""
        return Surrogate(self, partial(chambolle, weight=self.weight, iterations=self.iterations))


class TVM(Baseline):
    """Total variance minimization (Guo et al. 2018, section 4.3; [21] in the paper).

    It drops values at random, independently for each channel and pixel, and reconstructs the image from the others as the
    minimum of ``1/2 |kept (u - image)|^2 + weight |grad u|``. Defaults and objective are those of the published code
    (adversarial_image_defenses, whose weight of 1 / weight on the data term gives the same minimum). The text of the paper
    leaves the norm unsquared. That code stops after a few split-Bregman steps; this implementation comes close to the minimum.
    A channel all of whose values are dropped becomes black. The result is clipped to [0, 1].

    It has a gradient of its own, through all iterations.

    Args:
        weight: lambda_TV, of the total variation against the squared error, for values in [0, 1].
        drop_rate: probability that a value is dropped.
        iterations: of :func:`minimize_tv`; 300 come within 0.1% of the minimal objective at the other defaults.
        seed: see :mod:`.filters`.
    """

    own_gradient = True

    def __init__(self, weight: float = 0.03, drop_rate: float = 0.5, *, iterations: int = 300, seed: int | None = None) -> None:
        super().__init__()
        self.weight = _checks.number("weight", weight, above=0)
        self.drop_rate = _checks.number("drop_rate", drop_rate, at_least=0, below=1)
        self.iterations = _checks.integer("iterations", iterations, at_least=1)
        self.seed = _checks.seed(seed)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        kept = torch.empty_like(batch, dtype=torch.bool)
        for row, generator in zip(kept, generators(self.seed, indices, batch.device), strict=True):
            uniform = torch.rand(row.shape, generator=generator, dtype=torch.float32, device=batch.device)
            row.copy_(uniform >= self.drop_rate)
        return minimize_tv(batch, kept, self.weight, self.iterations).clamp(0, 1)


class NonLocalMeans(Baseline):
    """Non-local means (Buades et al. 2005; a squeezer of Xu et al. 2018), by scikit-image's ``denoise_nl_means``, fast mode.

    A pixel becomes the mean of the pixels around it, weighted by exp(-d / h^2), where d is the mean squared difference of the
    patches around the two pixels. The library omits the first row and column of the patches from d, and all weights below
    exp(-5). Feature squeezing uses ``NonLocalMeans(4, patch_size=3, patch_distance=5)`` on ImageNet (11-3-4, there by OpenCV,
    in brightness and hue).

    Args:
        h: scale of the difference of patches, in grey levels (0 to 255).
        patch_size: side of a patch in pixels, odd.
        patch_distance: largest distance of a pixel along each axis, in pixels.
        sigma: standard deviation of known noise, in grey levels: 2 sigma^2 is subtracted from each d that exceeds it.
    """

    def __init__(self, h: float = 4.0, *, patch_size: int = 5, patch_distance: int = 6, sigma: float = 0.0) -> None:
        super().__init__()
        self.h = _checks.number("h", h, above=0)
        self.patch_size = _checks.odd("patch_size", patch_size)
        self.patch_distance = _checks.integer("patch_distance", patch_distance, at_least=1)
        self.sigma = _checks.number("sigma", sigma, at_least=0)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        def denoise(image: NDArray[Any], _: int) -> NDArray[Any]:
            wide = image.transpose(1, 2, 0).astype(np.float64)  # sums over areas lose digits in float32
            arguments = (self.patch_size, self.patch_distance, self.h / 255)
            denoised = denoise_nl_means(wide, *arguments, fast_mode=True, sigma=self.sigma / 255, channel_axis=-1)
            return denoised.reshape(wide.shape).transpose(2, 0, 1)  # the library drops a single channel

        return in_numpy(batch, denoise)

    def differentiable(self) -> nn.Module:
        """With the gradient of weights that are not rounded."""
        smooth = partial(
            non_local_means,
            h=self.h / 255,
            patch_size=self.patch_size,
            patch_distance=self.patch_distance,
            sigma=self.sigma / 255,
        )
        return Surrogate(self, smooth)


class Wavelets(Baseline):
    """Wavelet denoising by BayesShrink (Chang et al. 2000), by scikit-image: a control for defenses that denoise.

    Haar wavelets with soft thresholds, in YCbCr if there are 3 channels. The result is clipped to [0, 1].

    Args:
        sigma: standard deviation of the noise that the thresholds assume in each channel, in grey levels (0 to 255).
    """

    def __init__(self, sigma: float = 10.0) -> None:
        super().__init__()
        self.sigma = _checks.number("sigma", sigma, above=0)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return in_numpy(batch, lambda image, _: _shrink(image, self.sigma / 255, rescale=True))

    def differentiable(self) -> nn.Module:
        """With its exact gradient."""
        return Surrogate(self, partial(_smooth_shrink, sigma=self.sigma / 255, rescale=True))


def _shrink(image: NDArray[Any], sigma: Any, *, rescale: bool) -> NDArray[Any]:
    """BayesShrink of an image (C, H, W); ``rescale``: sigma is that of R, G and B, not of each stretched channel of YCbCr."""
    settings = {"method": "BayesShrink", "mode": "soft", "rescale_sigma": rescale}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # images too small for the wavelet
        if len(image) == 1:
            return denoise_wavelet(image[0], sigma, **settings)[None]
        return denoise_wavelet(image, sigma, convert2ycbcr=True, channel_axis=0, **settings)


def _smooth_shrink(images: Tensor, sigma: float, *, rescale: bool) -> Tensor:
    """:func:`_shrink` of images (N, C, H, W), differentiably; without ``rescale`` sigma is relative to each channel's range."""
    if len(images) == 0:
        return images
    if images.shape[1] == 1:
        return bayes_shrink(images, images.new_full((1, 1, 1, 1), sigma))
    colours = images.new_tensor(_YCBCR)
    planes = torch.einsum("nchw,cd->ndhw", images, colours)
    ranges = planes.amax((2, 3), keepdim=True) - planes.amin((2, 3), keepdim=True)
    scale = colours.norm(dim=0)[None, :, None, None] if rescale else ranges
    return torch.einsum("ndhw,dc->nchw", bayes_shrink(planes, sigma * scale), torch.linalg.inv(colours))


_YCBCR = rgb2ycbcr(np.eye(3)) - rgb2ycbcr(np.zeros((1, 3)))  # of R, G and B: offsets change no wavelet


class BM3D(Baseline):
    """BM3D (Dabov et al. 2007; Makinen et al. 2020), by its authors' package ``bm3d``: a control for defenses that denoise.

    The licence of that package allows non-commercial use only. Install it with ``pip install 'oag-transform[bm3d]'``. Colours
    are denoised as in its ``bm3d_rgb``, in stretched opponent colours; a flat channel remains unstretched. Sides below 16
    pixels are padded by reflection, and an image whose brightness varies by less than a grey level remains unchanged, because
    the library fails on these. Results are clipped to [0, 1]. They are reproducible up to rounding, not bit for bit, because
    the library adds numbers in several threads.

    Args:
        sigma: standard deviation of the noise to remove, in grey levels (0 to 255).

    Raises:
        ModuleNotFoundError: the package is not installed.
    """

    def __init__(self, sigma: float = 10.0) -> None:
        super().__init__()
        self.sigma = _checks.number("sigma", sigma, above=0)
        _bm3d()

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return in_numpy(batch, lambda image, _: self._denoise(image.astype(np.float64)))

    def _denoise(self, image: NDArray[Any]) -> NDArray[Any]:
        height, width = image.shape[1:]
        missing = [(0, max(0, _BM3D_LEAST_SIDE - side)) for side in (height, width)]
        padded = np.pad(image, [(0, 0), *missing], mode="symmetric")
        sigma, flat = self.sigma / 255, 1 / 255
        if np.ptp(padded.mean(0)) < flat:
            return image
        if len(image) == 1:
            return _bm3d().bm3d(padded[0], sigma)[None, :height, :width]
        opponent = np.einsum("oc,chw->hwo", _OPPONENT, padded)
        low, span = opponent.min((0, 1)), np.ptp(opponent, (0, 1))
        span[span < flat] = 1  # the library would divide by zero
        stretched = sigma * np.linalg.norm(_OPPONENT, axis=1) / span
        denoised = _bm3d().bm3d((opponent - low) / span, stretched) * span + low
        return np.einsum("co,hwo->chw", np.linalg.inv(_OPPONENT), denoised)[:, :height, :width]


_OPPONENT = np.array([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, -1 / 2], [1 / 4, -1 / 2, 1 / 4]])  # the "opp" of bm3d_rgb


def _bm3d() -> Any:
    return _checks.from_extra("bm3d", "BM3D, whose library may be used for non-commercial purposes only,", "bm3d")


class PixelDeflection(Baseline):
    """Pixel deflection and wavelet denoising (Prakash et al. 2018, Algorithm 1; [26] in the paper).

    Pixels are chosen uniformly over the image, as in the published code (pixel-deflection, ``disable_map``), because the class
    activation map of the paper needs access to a network. Then scikit-image's ``denoise_wavelet`` denoises by BayesShrink with
    soft thresholds, in YCbCr if there are 3 channels. The result is clipped to [0, 1], as in the library at the time.

    Args:
        deflections: number of values that are replaced; see :func:`deflect`.
        window: largest distance of a replacement along each axis, in pixels.
        sigma: standard deviation of the noise that the thresholds assume. As in the library at the time (up to 0.15), it is
            relative to the range of the image in each channel of YCbCr; for 1 channel, to [0, 1].
        seed: see :mod:`.filters`.
    """

    def __init__(self, deflections: int = 200, window: int = 10, sigma: float = 0.04, *, seed: int | None = None) -> None:
        super().__init__()
        self.deflections = _checks.integer("deflections", deflections)
        self.window = _checks.integer("window", window, at_least=1)
        self.sigma = _checks.number("sigma", sigma, above=0)
        self.seed = _checks.seed(seed)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        places = generators(self.seed, indices, CPU)

        def purify(image: NDArray[Any], row: int) -> NDArray[Any]:
            deflected = deflect(image, self.deflections, self.window, places[row])
            if len(image) == 1:
                return _shrink(deflected, self.sigma, rescale=False)
            ranges = np.ptp(rgb2ycbcr(deflected, channel_axis=0), axis=(1, 2))  # by which today's scikit-image divides sigma
            return _shrink(deflected, list(self.sigma * ranges), rescale=False)

        return in_numpy(batch, purify)

    def differentiable(self) -> nn.Module:
        """With its exact gradient; without a seed, with that of other replacements."""
        return Surrogate(self, self._smooth)

    def _smooth(self, images: Tensor, *, index: Any) -> Tensor:
        places = generators(self.seed, _checks.indices(index, len(images)), CPU)
        order = np.arange(images.shape[1:].numel()).reshape(images.shape[1:])
        moved = [torch.from_numpy(deflect(order, self.deflections, self.window, place)) for place in places]
        replaced = [image.flatten()[each] for image, each in zip(images, moved, strict=True)]
        return _smooth_shrink(torch.stack(replaced) if replaced else images, self.sigma, rescale=False)


def deflect(image: NDArray[Any], deflections: int, window: int, generator: Generator) -> NDArray[Any]:
    """Replace random values of an image (C, H, W) by values of the same channel at most ``window`` pixels away on each axis.

    Both places are uniform: the first over the image, with replacement, and the second over the part of the window inside the
    image. As in the published code, channels alternate, each with its own places. As in the paper, all values come from the
    original image; in the code a replaced value can be copied again.

    Args:
        image: (C, H, W); not modified.
        deflections: number of values that are replaced.
        window: > 0.
        generator: on the CPU.
    """
    uniform = torch.rand(4, deflections, generator=generator, dtype=torch.float64, device=generator.device).numpy()
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
