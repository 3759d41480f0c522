"""Functions that baselines share: checked batches, random streams, processing one image at a time, and in NumPy."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from .. import _checks, streams

CPU = torch.device("cpu")


def checked(images: Any, index: Any) -> tuple[Tensor, list[int]]:
    """The images in float64 if they are float64 and in float32 otherwise, with their gradient; and the stream of each.

    Raises:
        TypeError, ValueError: anything but floating-point images (N, C, H, W) in [0, 1] with C = 1 or 3, or a bad ``index``.
    """
    _checks.batch(images)
    plain = images.as_subclass(Tensor)
    return plain if plain.dtype == torch.float64 else plain.float(), _checks.indices(index, len(images))


def generators(seed: int | None, indices: Sequence[int], device: torch.device) -> list[Generator]:
    """A generator for each image; ``seed=None`` draws a fresh seed."""
    return streams.generators(streams.seed_or_fresh(seed), indices, device)


def draw_integer(low: int, high: int, generator: Generator) -> int:
    """A random integer, uniform in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator, device=generator.device))


def draw_uniform(low: float, high: float, generator: Generator) -> float:
    """A random number, uniform in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64, device=generator.device))


def one_by_one(batch: Tensor, defend: Callable[[Tensor, Generator], Tensor], drawn: Sequence[Generator]) -> Tensor:
    """``defend(image, generator)`` of each image (1, C, H, W): results are independent of the batch, with its shape."""
    results = [defend(image[None], generator) for image, generator in zip(batch, drawn, strict=True)]
    return torch.cat([batch[:0], *results])  # an empty batch keeps its shape and gradient


def in_numpy(batch: Tensor, function: Callable[[NDArray[Any], int], NDArray[Any]]) -> Tensor:
    """``function(image, row)`` of each image (C, H, W), clipped to [0, 1], without a gradient."""
    results = torch.empty_like(batch, device=CPU)
    for row, image in enumerate(batch.detach().cpu().numpy()):
        results[row] = torch.from_numpy(function(image, row))
    return results.clamp(0, 1).to(batch.device)


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients, whatever the caller's mode is."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def kornia(module: str, user: str) -> Any:
    """A module of kornia, such as ``"color"``, for ``user``."""
    return _checks.from_extra(f"kornia.{module}", user, "eval")
