"""One random stream per image, so that a result never depends on who else is in the batch; and white noise from them."""

import hashlib
import secrets
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor


def fresh_seed() -> int:
    """A seed from the operating system; global random state is neither read nor written."""
    return secrets.randbits(63)


def index_of(name: str) -> int:
    """The random stream of a name, such as an image file's: 63 bits of its hash, the same on every machine.

    Bytes of a file's name that aren't UTF-8, which :func:`os.fsdecode` makes surrogates, count too.

    Raises:
        TypeError: not a str.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    return int.from_bytes(hashlib.blake2b(name.encode(errors="backslashreplace"), digest_size=8).digest(), "little") >> 1


def generators(seed: int, indices: Iterable[int], device: torch.device) -> list[Generator]:
    """A generator for each image index; seeds and indices are hashed together, so streams of nearby seeds don't overlap."""
    return [_generator(seed, (i,), device) for i in indices]


def noise_generators(seed: int, indices: Iterable[int], device: torch.device) -> list[Generator]:
    """For noise that is added to images: streams that a defense of the same seed doesn't draw from."""
    return [_generator(seed, (i, 1), device) for i in indices]


def tile_generators(seed: int, indices: Iterable[int], tile: int, device: torch.device) -> list[Generator]:
    """For the noise in tile number ``tile`` of a large image: streams that no other tile or image draws from."""
    return [_generator(seed, (i, 2, tile), device) for i in indices]


def fill_normal(out: Tensor, streams: Sequence[Generator]) -> Tensor:
    """Fill row i of ``out`` (N, ...) with N(0, 1) drawn from stream i, in place."""
    for row, generator in zip(out, streams, strict=True):
        row.normal_(generator=generator)
    return out


def add_normal(images: Tensor, std: float | Tensor, streams: Sequence[Generator]) -> Tensor:
    """Images (N, ...) with white noise of standard deviation ``std``, on their scale; row i's from stream i; held to [0, 1]."""
    normal = torch.empty_like(images, memory_format=torch.contiguous_format)  # the same noise in whatever layout images are
    return (images + std * fill_normal(normal, streams)).clamp(0, 1)


def _generator(seed: int, key: tuple[int, ...], device: torch.device) -> Generator:
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return Generator(device).manual_seed(int(state[0]) >> 1)
