"""How noisy an image is, and how strong a purification that calls for: clean photographs need little of it."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks

LEAST = 0.25  # strength for an image without noise; docs/quality.md has the alternatives
FULL = 2.6  # noise level in grey levels from which on the strength is 1: what FGSM 4/255 leaves, the usual bound on ImageNet
BLOCK = 16  # side in pixels of the areas among which smooth ones are looked for
TEXTURE = 3.0  # photographs have about so many times the fine structure in brightness that they have in hue
BAND = 2**18  # pixels that are looked at together, so that memory stays bounded
FLAT = 0.01  # grey levels; less is rounding: letterboxes and clipped areas say nothing about noise


def estimate(images: Tensor) -> Tensor:
    """Estimate how noisy images are, without clean ones to compare with.

    Immerkaer's mask (1996) takes the picture away and leaves noise of the same standard deviation. Photographs have next to no
    fine structure in hue, where noise and gradient-sign perturbations are as strong as in brightness, so the estimate is that
    of the two directions of hue, from medians, at full or at half resolution, whichever has more: a perturbation that was
    resized or saved as JPEG is left at the coarser one. Or, if that is more, a third of the noise in brightness where the image
    is smoothest (the tenth percentile of blocks of 16 x 16 pixels), for noise that is the same in all channels, and greyscale.

    Args:
        images: (N, C, H, W) floating point in [0, 1], C = 1 or 3, of any size.

    Returns:
        (N,) in grey levels (0 to 255), of the images' dtype: the standard deviation of white noise in colour images. The median
        of photographs is about 0.6, and 3.9 after FGSM 6/255. Greyscale is read as if it had three equal channels.

    Raises:
        TypeError, ValueError: not such images.
    """
    _checks.batch(images)
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


def matching_strength(images: Tensor) -> Tensor:
    """Strength (N,) of the purification, from 0.25 to 1: in proportion to the :func:`estimate` of the images, full from 2.6.

    Takes and raises what that does.
    """
    return (estimate(images) / FULL).clamp(LEAST, 1)


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


def _bands(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows that are looked at together, from the first to the one after the last: whole blocks."""
    rows = max(BAND // width // BLOCK, 1) * BLOCK
    firsts = [first for first in range(0, height, rows) if first == 0 or height - first >= BLOCK]
    yield from zip(firsts, [*firsts[1:], height], strict=True)


def _hues(fine: Tensor) -> Tensor:
    """What is left of the two directions of hue, NaN where it is flat: (N, 2, P)."""
    left = fine.abs()
    return left[:, 1:].masked_fill(left.amax(1, keepdim=True) < FLAT, torch.nan).flatten(2)


def _hue(bands: Sequence[Tensor]) -> Tensor:
    axes = (torch.cat([left[:, axis] for left in bands], 1) for axis in (0, 1))
    return torch.stack([_at(values, values.isnan(), 0.5) for values in axes]).mean(0) / 0.6745  # of |N(0, 1)|


def _blocks(fine: Tensor) -> Tensor:
    """Mean square of each block: (N, blocks)."""
    return F.avg_pool2d(fine.square(), [min(BLOCK, side) for side in fine.shape[-2:]]).flatten(1)


def _at(values: Tensor, skipped: Tensor, share: float) -> Tensor:
    """The value (N,) below which a share of values (N, K) lies, but for the skipped ones; 0 where all are."""
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
