"""Where Algorithm 1 stands: an immutable snapshot, and the one that it starts from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from . import energy
from .energy import Parameters
from .settings import Settings


class State(NamedTuple):
    """A snapshot of N images; nothing changes it later.

    Attributes:
        step: network step t, from 1 to T_N; 0 at the start.
        pair: the reference and the synthesised images as cells (2, N*D, h, w), see :mod:`.energy`.
        theta: the networks that made the synthesised images.
        stride: of the cells.
        shape: (N, channels, H, W) of the images.
    """

    step: int
    pair: Tensor
    theta: Parameters
    stride: int
    shape: tuple[int, ...]

    @property
    def reference(self) -> Tensor:
        """The images to follow, (N, channels, H, W) in model units."""
        return energy.from_cells(self.pair[:1], self.stride, self.shape)

    @property
    def images(self) -> Tensor:
        """The synthesised images, (N, channels, H, W) in model units."""
        return energy.from_cells(self.pair[1:], self.stride, self.shape)

    @property
    def mode(self) -> Tensor:
        """The modes I* of the images' distributions (Eq. 9), which have none of the Langevin noise: (N, channels, H, W)."""
        gates = energy.gate(energy.responses(self.pair[1:], self.theta), self.theta)
        return energy.from_cells(energy.image_gradient(gates, self.theta), self.stride, self.shape)


def begin(reference: Tensor, settings: Settings, generators: Sequence[Generator]) -> State:
    """Lines 1 and 2 of Algorithm 1 for a reference (N, channels, H, W) in model units: random networks, and images of zeros."""
    s = settings
    theta = energy.initial_parameters(
        generators,
        reference.shape,
        kernel_size=s.kernel_size,
        stride=s.stride,
        filters=s.filters,
        init=s.init,
        dtype=reference.dtype,
    )
    cells = energy.to_cells(reference, s.stride)
    pair = torch.cat([cells, torch.zeros_like(cells)]).contiguous(memory_format=torch.channels_last)
    return State(0, pair, theta, s.stride, tuple(reference.shape))
