"""How noisy an image is, and how strong a purification that calls for: clean photographs need little of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.35  # strength for an image without any noise: the strongest that costs next to nothing on clean photographs
FULL = 2.6  # noise level in grey levels from which on the strength is 1: what FGSM 4/255 leaves, the usual bound on ImageNet
BLOCK = 16  # side in pixels of the areas among which smooth ones are looked for
TEXTURE = 3.0  # photographs have about so many times the fine structure in brightness that they have in hue


def estimate(images: Tensor) -> Tensor:
    """Estimate the standard deviation of the noise in images, without a clean one to compare with.

    Immerkaer's mask (1996) takes the picture away and leaves noise of the same standard deviation. Photographs have next to no
    fine structure in hue, where noise and gradient-sign perturbations are as strong as in brightness, so the median over the
    two directions of hue is the estimate; or, if that is more, a third of the noise in brightness where the image is
    smoothest (the tenth percentile of blocks of 16 x 16 pixels), for noise that is the same in all channels, and greyscale.

    Args:
        images: (N, C, H, W) floating point in [0, 1], C = 1 or 3, of any size.

    Returns:
        (N,) estimates in grey levels (0 to 255), of the images' dtype. About 0.5 for most photographs, 3.9 after FGSM 6/255.
    """
    mask = images.new_tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
    one, channels = images.new_ones(images.shape[1]), images.shape[1]
    axes = [one] if channels == 1 else [one, images.new_tensor([1, -1, 0]), images.new_tensor([1, 1, -2])]
    axis = torch.stack([a / torch.linalg.vector_norm(a) for a in axes])
    colours = torch.einsum("ac,nchw->nahw", axis, 255 * images)
    padded = F.pad(colours, (1, 1, 1, 1), mode="replicate")
    fine = F.conv2d(padded, mask.expand(len(axis), 1, 3, 3), groups=len(axis))
    blocks = F.avg_pool2d(fine[:, :1].square(), [min(BLOCK, side) for side in images.shape[-2:]])
    brightness = blocks.flatten(1).quantile(0.1, dim=1).sqrt() / TEXTURE
    if channels == 1:
        return brightness
    hue = fine[:, 1:].abs().flatten(2).median(2).values.mean(1) / 0.6745  # median of |N(0, 1)|
    return torch.maximum(hue, brightness)


def strength(images: Tensor) -> Tensor:
    """Strength (N,) of the purification, from ``LEAST`` to 1: in proportion to the :func:`estimate` of the images."""
    return (estimate(images) / FULL).clamp(LEAST, 1)
