"""The data of Algorithm 1: its inputs, its start, and immutable snapshots of its progress."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .. import streams
from ..images import to_model_units
from . import energy
from .energy import Parameters
from .settings import Settings


@dataclass(frozen=True)
class Inputs:
    """The inputs of Algorithm 1 for N images of one size.

    Attributes:
        pixels: (N, channels, H, W) in [0, 1].
        settings: the hyper-parameters for this size.
        strength: (N,), see :class:`.Settings`.
        seed: the seed of all random streams.
        indices: the N random streams of ``seed``, one for each image.
        tile: the number of the tile, where the pixels are tiles of larger images. The networks of all tiles of an image start
            alike; each tile has its own noise.
    """

    pixels: Tensor
    settings: Settings
    strength: Tensor
    seed: int
    indices: Sequence[int]
    tile: int = 0


class State(NamedTuple):
    """A snapshot of N images.

    Attributes:
        step: network step t, from 1 to T_N; 0 at the start.
        pair: the reference and the synthesised images as cells (2, N*D, h, w), see :mod:`.energy`.
        theta: the networks that generated the synthesised images.
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
        """The input images, (N, channels, H, W) in model units."""
        return energy.from_cells(self.pair[:1], self.stride, self.shape)

    @property
    def images(self) -> Tensor:
        """The synthesised images, (N, channels, H, W) in model units."""
        return energy.from_cells(self.pair[1:], self.stride, self.shape)

    @property
    def mode(self) -> Tensor:
        """The modes I* of the images' distributions (Eq. 9), without Langevin noise: (N, channels, H, W) in model units."""
        gates = energy.gate(energy.responses(self.pair[1:], self.theta), self.theta)
        return energy.from_cells(energy.image_gradient(gates, self.theta), self.stride, self.shape)


def begin(inputs: Inputs) -> tuple[State, list[Generator]]:
    """Lines 1 and 2 of Algorithm 1: random networks and images of zeros; and the generators of the Langevin noise.

    The caller owns the state and may change it in place.
    """
    s, device = inputs.settings, inputs.pixels.device
    reference = to_model_units(inputs.pixels, s.scale)
    generators = streams.generators(inputs.seed, inputs.indices, device)
    theta = energy.initial_parameters(
        generators,
        reference.shape,
        kernel_size=s.kernel_size,
        stride=s.stride,
        filters=s.filters,
        init=s.init,
        dtype=reference.dtype,
    )
    if inputs.tile > 0:
        generators = streams.tile_generators(inputs.seed, inputs.indices, inputs.tile, device)
    cells = energy.to_cells(reference, s.stride)
    pair = torch.cat([cells, torch.zeros_like(cells)]).contiguous(memory_format=torch.channels_last)
    return State(0, pair, theta, s.stride, tuple(reference.shape)), generators
