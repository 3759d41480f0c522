"""Large images in tiles, so that memory stays bounded: the positions of the tiles, and how they are combined without a seam."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

OVERLAP = 32
"""Pixels that two neighbouring tiles share: the reach of a kernel on both sides of the fade from one to the other."""


class Tile(NamedTuple):
    """A range of rows and a range of columns of an image; ``bottom`` and ``right`` are exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, images: Tensor) -> Tensor:
        """This part of images (..., H, W) as a view."""
        return images[..., self.top : self.bottom, self.left : self.right]


def tiles(height: int, width: int, size: int | None, stride: int) -> list[Tile]:
    """Overlapping tiles of at most about ``size`` pixels a side that cover an image; one tile where the image fits into it.

    Tiles begin at multiples of the stride, so that their grid of cells is that of the whole image.
    """
    spans = [_spans(side, size, stride) for side in (height, width)]
    return [Tile(*rows, *columns) for rows, columns in itertools.product(*spans)]


def fade(tile: Tile, height: int, width: int, like: Tensor) -> Tensor:
    """The share (h, w) of a tile in each of its pixels. It falls linearly where a neighbour overlaps; shares add up to 1."""
    rows, columns = (
        _ramp(first, last, side, like)
        for first, last, side in ((tile.top, tile.bottom, height), (tile.left, tile.right, width))
    )
    return rows[:, None] * columns


def _spans(side: int, size: int | None, stride: int) -> list[tuple[int, int]]:
    if size is None or side <= size:
        return [(0, side)]
    count = math.ceil((side - OVERLAP) / (size - OVERLAP))
    step = math.ceil((side - OVERLAP) / count / stride) * stride
    firsts = range(0, step * count, step)
    return [(first, min(first + step + OVERLAP, side)) for first in firsts if first == 0 or first + OVERLAP < side]


def _ramp(first: int, last: int, side: int, like: Tensor) -> Tensor:
    place = torch.arange(first, last, dtype=like.dtype, device=like.device) + 0.5
    share = torch.ones_like(place)
    if first > 0:
        share = torch.minimum(share, (place - first) / OVERLAP)
    if last < side:
        share = torch.minimum(share, (last - place) / OVERLAP)
    return share
