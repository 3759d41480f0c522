"""An estimate of the noise in an image, and the strength of the purification that matches it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks

LEAST = 0.25  # strength for an image without noise; docs/quality.md compares alternatives
FULL = 2.6  # estimate, in grey levels, from which the strength is 1: that of FGSM 4/255, the usual bound on ImageNet
BLOCK = 16  # side in pixels of the blocks among which the smoothest are selected
TEXTURE = 3.0  # ratio of the fine structure in brightness to that in hue, in photographs
BAND = 2**18  # pixels that are processed together, so that memory stays bounded
FLAT = 0.01  # grey levels; less is rounding: letterboxes and clipped areas carry no information about noise


def estimate(images: Tensor) -> Tensor:
    """Estimate the noise of images without clean references.

    Immerkaer's mask (1996) removes the image content and leaves noise of the same standard deviation. Photographs have almost
    no fine structure in hue, while noise and gradient-sign perturbations are as strong in hue as in brightness. The estimate is
    therefore that of the two directions of hue, from medians, at full or at half resolution, whichever is larger: a
    perturbation that was resized or saved as JPEG remains at the coarser resolution. For greyscale images and for noise that is
    equal in all channels there is a second estimate: a third of the noise in brightness in the smoothest areas (the tenth
    percentile of blocks of 16 x 16 pixels). The larger estimate counts.

    Args:
        images: (N, C, H, W) floating point in [0, 1], C = 1 or 3, of any size.

    Returns:
        (N,) in grey levels (0 to 255), in the images' dtype: the standard deviation of white noise in colour images. The median
        over photographs is about 0.6; after FGSM 6/255 it is 3.9. A greyscale image counts as three equal channels.

    Raises:
        TypeError, ValueError: bad images.
    """
    _checks.batch(images)
    wide = images if images.dtype == torch.float64 else images.float()
    with torch.autocast(images.device.type, enabled=False):  # not the caller's
        return _estimated(wide).to(images.dtype)


def matching_strength(images: Tensor) -> Tensor:
    """The strength (N,) of the purification, from 0.25 to 1: the :func:`estimate` of the images divided by 2.6, clipped.

    Arguments and errors are those of :func:`estimate`.
    """
    return (estimate(images) / FULL).clamp(LEAST, 1)


def _estimated(images: Tensor) -> Tensor:
    full, half, blocks = [], [], []
    for first, last in _bands(*images.shape[-2:]):
        top = max(first - 2, 0)  # what the masks reach into, at half resolution too
        colours = _opponent(images[..., top : last + 2, :])
        fine = _without_picture(colours)[..., first - top : last - top, :]
        blocks.append(_blocks(fine[:, :1]))
        if images.shape[1] == 3:
            full.append(_hues(fine))
        if images.shape[1] == 3 and min(images.shape[-2:]) > 1:
            coarse = _without_picture(F.avg_pool2d(colours, 2))
            half.append(_hues(coarse[..., (first - top) // 2 : (last - top) // 2, :]))
    energy = torch.cat(blocks, 1)
    found = [_at(energy, energy < FLAT**2, 0.1).sqrt() / TEXTURE]
    found += [_hue(hues) for hues in (full, half) if hues]
    return torch.stack(found).amax(0)


def _opponent(images: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] -> brightness and, of three channels, two directions of hue, in grey levels: (N, 1 or 3, H, W)."""
    if images.shape[1] == 1:
        return 3**0.5 * 255 * images
    axes = images.new_tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]])
    return torch.einsum("ac,nchw->nahw", axes / torch.linalg.vector_norm(axes, dim=1, keepdim=True), 255 * images)


def _without_picture(colours: Tensor) -> Tensor:
    mask = colours.new_tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
    count = colours.shape[1]
    return F.conv2d(F.pad(colours, (1, 1, 1, 1), mode="replicate"), mask.expand(count, 1, 3, 3), groups=count)


def _bands(height: int, width: int) -> list[tuple[int, int]]:
    """Ranges of rows (first, end) that are processed together, in whole blocks."""
    rows = max(BAND // width // BLOCK, 1) * BLOCK
    firsts = [first for first in range(0, height, rows) if first == 0 or height - first >= BLOCK]
    return list(zip(firsts, [*firsts[1:], height], strict=True))


def _hues(fine: Tensor) -> Tensor:
    """The residual in the two directions of hue, NaN where the image is flat: (N, 2, P)."""
    left = fine.abs()
    return left[:, 1:].masked_fill(left.amax(1, keepdim=True) < FLAT, torch.nan).flatten(2)


def _hue(bands: Sequence[Tensor]) -> Tensor:
    axes = (torch.cat([left[:, axis] for left in bands], 1) for axis in (0, 1))
    return torch.stack([_at(values, values.isnan(), 0.5) for values in axes]).mean(0) / 0.6745  # of |N(0, 1)|


def _blocks(fine: Tensor) -> Tensor:
    """The mean square of each block: (N, blocks)."""
    return F.avg_pool2d(fine.square(), [min(BLOCK, side) for side in fine.shape[-2:]]).flatten(1)


def _at(values: Tensor, skipped: Tensor, share: float) -> Tensor:
    """The quantile (N,) at ``share`` of the values (N, K) that are not skipped; 0 where all are skipped."""
    values.masked_fill_(skipped, torch.inf)
    count = (~skipped).sum(1)
    place = ((count - 1).clamp(min=0) * share).long()
    if values.device.type == "cpu":  # a fifth of a sort's time
        found = values.new_empty(len(values))
        for i, k in enumerate(place.tolist()):
            found[i] = values[i].kthvalue(k + 1).values
    else:  # kthvalue isn't deterministic on CUDA, and torch.quantile has a limit of its size
        found = values.sort(1).values.gather(1, place[:, None])[:, 0]
    return torch.where(count > 0, found, 0.0)
