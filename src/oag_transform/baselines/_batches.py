"""What peers share: batches, checked and in a precision to compute in; a random stream for each image; a way through NumPy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from .. import _checks, streams

CPU = torch.device("cpu")


def checked(images: Any, index: Any) -> tuple[Tensor, list[int]]:
    """Images as they came, in float64 if they are and else in float32, gradient and all; and the stream of each.

    Raises:
        TypeError, ValueError: not floating-point images (N, C, H, W) in [0, 1], C = 1 or 3, or a bad ``index``.
    """
    _checks.batch(images)
    plain = images.as_subclass(Tensor)
    return plain if plain.dtype == torch.float64 else plain.float(), _checks.indices(index, len(images))


def generators(seed: int | None, indices: Sequence[int], device: torch.device) -> list[Generator]:
    """A generator for each image; ``seed=None`` draws a fresh seed."""
    return streams.generators(streams.fresh_seed() if seed is None else seed, indices, device)


def in_numpy(batch: Tensor, function: Callable[[NDArray[Any], int], NDArray[Any]]) -> Tensor:
    """``function(image, row)`` of each image (C, H, W), held to [0, 1]; without a gradient."""
    results = torch.empty_like(batch, device=CPU)
    for row, image in enumerate(batch.detach().cpu().numpy()):
        results[row] = torch.from_numpy(function(image, row))
    return results.clamp(0, 1).to(batch.device)
