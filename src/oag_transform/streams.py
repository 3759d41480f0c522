"""One random stream for each image, so that a result doesn't depend on the rest of the batch; and white noise.

PyTorch's generator of the CPU takes 32 bits of a seed, so two streams are equal with a probability of 2^-32: some 0.3 pairs
among 50,000 images.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor


def seed_or_fresh(seed: int | None) -> int:
    """The seed of one call: the given one, or for None a fresh one from the operating system, not from global random state."""
    return secrets.randbits(63) if seed is None else seed


def index_of(name: str) -> int:
    """The random stream of a name, such as that of an image file: 63 bits of its hash, the same on every machine.

    Bytes of a file name that aren't UTF-8 count too; :func:`os.fsdecode` turns them into surrogates.

    Raises:
        TypeError: not a str.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    return int.from_bytes(hashlib.blake2b(name.encode(errors="backslashreplace"), digest_size=8).digest(), "little") >> 1


def generators(seed: int, indices: Iterable[int], device: torch.device) -> list[Generator]:
    """A generator for each image index. Seed and index are hashed together, so that streams of nearby seeds don't overlap."""
    return [_generator(seed, (i,), device) for i in indices]


def noise_generators(seed: int, indices: Iterable[int], device: torch.device) -> list[Generator]:
    """Generators for noise that is added to images. They are independent of those of a defense with the same seed.

    The noise of index i has the numbers of a defense's index i + 2^32.
    """
    return [_generator(seed, (i, 1), device) for i in indices]


def tile_generators(seed: int, indices: Iterable[int], tile: int, device: torch.device) -> list[Generator]:
    """Generators for the noise in tile number ``tile`` of large images. They are independent of other tiles and images."""
    return [_generator(seed, (i, 2, tile), device) for i in indices]


def fill_normal(out: Tensor, streams: Sequence[Generator]) -> Tensor:
    """Fill row i of ``out`` (N, ...) in place with N(0, 1) from stream i."""
    for row, generator in zip(out, streams, strict=True):
        row.normal_(generator=generator)
    return out


def add_normal(images: Tensor, std: float | Tensor, streams: Sequence[Generator]) -> Tensor:
    """Images (N, ...) in [0, 1] with white noise of standard deviation ``std``, row i's from stream i, clipped to [0, 1]."""
    normal = torch.empty_like(images, memory_format=torch.contiguous_format)  # the same noise in every memory layout
    return (images + std * fill_normal(normal, streams)).clamp(0, 1)


def _generator(seed: int, key: tuple[int, ...], device: torch.device) -> Generator:
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return Generator(device).manual_seed(int(state[0]) >> 1)
