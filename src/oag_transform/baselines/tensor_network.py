"""Tensor network purification (TNP; Lin et al., arXiv 2502.17972).

The contract is that of :mod:`oag_transform.baselines.filters`; images are worked on one by one.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import _checks
from ._batches import CPU, generators, one_by_one, with_gradients
from .base import Baseline


class TensorNetworkPurification(Baseline):
    """TNP (section 4): a quantized tensor train of low rank, fitted to the image from coarse to fine, replaces it.

    An image of side 2^D is a tensor train with a core per bit of its coordinates, coarsest first, and one for the channels.
    Average pooling makes perturbations smaller and closer to Gaussian (4.1), so the train is first fitted to pooled images, by
    squared error. Each finer scale starts from the coarser result, enlarged bilinearly and truncated to the rank. At full scale
    the objective is adversarial. The error is the maximum over all auxiliary perturbations delta within eta,
    ``max (x + delta - y)^2 = (|x - y| + eta)^2``, and a squared error pulls the pooled y towards the coarser result.

    This implementation follows the paper's description. No code of the authors was found, and their objective may differ in
    form. eta is the paper's. The rank was chosen for a clean accuracy like the paper's on CIFAR-10, steps and learning rate for
    speed. Trains start as truncated singular value decompositions, so nothing is random. Sides that are not a power of two are
    padded by repeating the border.

    It has no gradient.

    Args:
        rank: of the tensor train for an image of 32 pixels; it grows in proportion to the side. A lower rank keeps less detail.
        eta: largest auxiliary perturbation, for values in [0, 1]; 0 for plain squared error.
        scales: number of coarser scales.
        steps: updates of the cores by Adam at each scale.
        lr: learning rate.
    """

    def __init__(self, rank: int = 10, *, eta: float = 0.1, scales: int = 1, steps: int = 100, lr: float = 0.01) -> None:
        super().__init__()
        self.rank = _checks.integer("rank", rank, at_least=1)
        self.eta = _checks.number("eta", eta, at_least=0)
        self.scales = _checks.integer("scales", scales)
        self.steps = _checks.integer("steps", steps)
        self.lr = _checks.number("lr", lr, above=0)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        with with_gradients():
            return one_by_one(batch.detach().clone(), self._purified, generators(0, indices, CPU))

    def _purified(self, image: Tensor, _: Generator) -> Tensor:
        height, width = image.shape[-2:]
        bits = max(math.ceil(math.log2(max(height, width))), 1)
        rank = max(self.rank * 2**bits // 32, 1)
        square = F.pad(image, (0, 2**bits - width, 0, 2**bits - height), mode="replicate")
        coarser = min(self.scales, bits - 1)
        pyramid = [F.avg_pool2d(square, 2**scale) for scale in range(coarser, -1, -1)]
        found = pyramid[0]
        for target in pyramid[:-1]:
            found = self._fit(_as_large(found, target), target, rank)
        found = self._fit(_as_large(found, square), square, rank, found if coarser else None, eta=self.eta)
        return found[..., :height, :width].clamp(0, 1)

    def _fit(self, start: Tensor, target: Tensor, rank: int, coarse: Tensor | None = None, *, eta: float = 0.0) -> Tensor:
        cores = [core.requires_grad_() for core in tensor_train(start, rank)]
        optimizer = torch.optim.Adam(cores, lr=self.lr)
        for _ in range(self.steps):
            found = dense(cores)
            loss = ((found - target).abs() + eta).square().mean()
            if coarse is not None:
                loss = loss + F.mse_loss(F.avg_pool2d(found, 2), coarse)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return dense(cores).detach()


def tensor_train(image: Tensor, rank: int) -> list[Tensor]:
    """Cores (r, 4, r') of each bit of the coordinates, and (r, C) of the channels, by truncated SVDs (Oseledets 2011).

    Args:
        image: (1, C, 2^D, 2^D).
        rank: largest rank.
    """
    bits, channels = image.shape[-1].bit_length() - 1, image.shape[1]
    order = [axis for bit in range(bits) for axis in (1 + bit, 1 + bits + bit)]  # row and column bits in turn
    rest = image.reshape(channels, *[2] * (2 * bits)).permute(*order, 0).reshape(1, -1)
    cores = []
    for _ in range(bits):
        left, singular, right = torch.linalg.svd(rest.reshape(4 * len(rest), -1), full_matrices=False)
        kept = min(rank, len(singular))
        cores.append(left[:, :kept].reshape(len(rest), 4, kept).contiguous())
        rest = singular[:kept, None] * right[:kept]
    return [*cores, rest.contiguous()]


def dense(cores: Sequence[Tensor]) -> Tensor:
    """The image (1, C, 2^D, 2^D) of a tensor train; see :func:`tensor_train`."""
    *spatial, last = cores
    product = last.new_ones(1, 1)
    for core in spatial:
        product = (product @ core.flatten(1)).reshape(-1, core.shape[-1])
    bits = len(spatial)
    order = [0, *range(1, 2 * bits, 2), *range(2, 2 * bits + 1, 2)]
    image = (product @ last).T.reshape(last.shape[1], *[2] * (2 * bits)).permute(order)
    return image.reshape(1, last.shape[1], 2**bits, 2**bits)


def _as_large(image: Tensor, target: Tensor) -> Tensor:
    size = target.shape[-2:]
    return image if image.shape[-2:] == size else F.interpolate(image, size, mode="bilinear", align_corners=False)
