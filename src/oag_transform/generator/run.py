"""From pixels to pixels: strength, model units, one choice of loop, and a second try for what diverges."""

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

from .. import noise_level, streams
from ..images import to_model_units, to_pixels
from . import langevin, loop
from .settings import Common, Settings
from .state import State, begin
from .tiles import fade, tiles

logger = logging.getLogger(__name__)

AUTO = False  # "auto" takes the kernels once benchmarks.gpu has shown them right, and faster, on a GPU
MAX_FUSED_STRIDE = 6  # the kernels hold all channels * stride^2 channels of a cell at once: up to 108, padded to 128
ROWS = 256  # of a large image whose noise is drawn together
TICK = 5  # network steps between two moves of a progress bar, each of which takes a snapshot


class Loop(Protocol):
    """Algorithm 1 from a start to its last snapshot: see :func:`.loop.alternate`."""

    def __call__(
        self, start: State, settings: Settings, generators: Sequence[Generator], strength: Tensor, *, every: int
    ) -> Iterator[State]:
        """Snapshots after each ``every`` network steps, and after the last."""


def choose_loop(settings: Settings, device: torch.device, dtype: torch.dtype) -> Loop:
    """The loop for images of this device and dtype (as they are worked on): PyTorch operators, or the fused CUDA kernels.

    Raises:
        RuntimeError: ``backend="triton"``, and the kernels can't run there; the message says why.
    """
    reason = _obstacle(settings, device, dtype)
    if reason is not None and settings.backend == "triton":
        raise RuntimeError(f"backend='triton' can't work on these images: {reason}; use backend='auto' or 'torch'")
    if reason is not None or settings.backend == "torch" or (settings.backend == "auto" and not AUTO):
        return loop.alternate
    from . import fused  # it needs triton

    return fused.alternate


def operands(settings: Common, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Precision of the convolutions' operands for images of this device and dtype (as they are worked on)."""
    if settings.compute_dtype is not None:
        return settings.compute_dtype
    fast = device.type == "cpu" and dtype == torch.float32 and settings.backend != "triton" and _multiplies_bfloat16()
    return torch.bfloat16 if fast else dtype


def _multiplies_bfloat16() -> bool:
    """Whether this CPU is faster with operands in bfloat16: it has AMX, or is an AMD with AVX512-BF16.

    An image of 224 x 224 took an AMD EPYC with AVX512-BF16 0.078 s in bfloat16 and 0.119 s in float32; an Intel with
    AVX512-BF16 and without AMX was slower in bfloat16.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch, which doesn't say whose CPU it is
        return bool(torch.cpu._is_amx_tile_supported())
    found = torch.cpu.get_capabilities()  # what isn't there on an architecture isn't named
    return found.get("amx_bf16", False) or (found.get("avx512_bf16", False) and found.get("cpu_name", "").startswith("AMD"))


def alternate(
    pixels: Tensor,
    settings: Settings,
    chosen: Loop,
    seed: int,
    indices: Sequence[int],
    *,
    every: int,
    strength: Tensor | None = None,
    tile: int = 0,
) -> Iterator[State]:
    """Algorithm 1 for images (N, channels, H, W) in [0, 1], image i by random stream ``indices[i]`` of ``seed``.

    ``strength`` (N,) and ``tile``: of larger images, where these pixels are tile number ``tile`` of each.
    """
    if operands(settings, pixels.device, pixels.dtype) == torch.bfloat16:
        settings = dataclasses.replace(settings, compute_dtype=torch.bfloat16)
    strength = strength_of(pixels, settings) if strength is None else strength
    generators = streams.generators(seed, indices, pixels.device)
    start = begin(to_model_units(pixels, settings.scale), settings, generators)
    if tile > 0:  # the networks of all tiles begin alike; noise is each tile's own
        generators = streams.tile_generators(seed, indices, tile, pixels.device)
    return chosen(start, settings, generators, strength, every=every)


def purify(
    pixels: Tensor,
    settings: Settings,
    chosen: Loop,
    seed: int,
    indices: Sequence[int],
    advance: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Purify images of shape (N, channels, H, W) in [0, 1]; image i uses random stream ``indices[i]`` of ``seed``.

    ``advance(n)`` is called after n more steps of one tile of one image. Returns the new images and a boolean mask (N,) of
    those that diverged, both at these rates and at a quarter of them.
    """
    strength = strength_of(pixels, settings)
    height, width = pixels.shape[-2:]
    places = tiles(height, width, settings.tile_size, settings.stride)
    if len(places) == 1:
        return _purify(pixels, strength, settings, chosen, seed, indices, 0, advance)
    made, kept = torch.zeros_like(pixels), pixels.new_zeros(height, width)
    failed = torch.zeros_like(strength, dtype=torch.bool)
    for number, place in enumerate(places):
        part, bad = _purify(place.of(pixels), strength, settings, chosen, seed, indices, number, advance)
        share = fade(place, height, width, like=pixels)
        place.of(made).add_(part.mul_(share))
        place.of(kept).add_(share.square())
        failed |= bad
    # where tiles fade into each other, independent noise has less of its variance: what is missing is drawn anew
    deviation = (strength * langevin.stationary_variance(settings.step_size)).sqrt()[:, None, None, None] * settings.scale / 255
    generators = streams.tile_generators(seed, indices, len(places), pixels.device)
    for rows, share in zip(made.split(ROWS, -2), kept.split(ROWS, -2), strict=True):
        noise = streams.fill_normal(torch.empty_like(rows, memory_format=torch.contiguous_format), generators)
        rows.add_(noise.mul_((1 - share).clamp_(min=0).sqrt_()).mul_(deviation)).clamp_(0, 1)
    return made, failed


def _purify(
    pixels: Tensor,
    strength: Tensor,
    settings: Settings,
    chosen: Loop,
    seed: int,
    indices: Sequence[int],
    tile: int,
    advance: Callable[[int], object] | None,
) -> tuple[Tensor, Tensor]:
    """One tile of images, which may be all of them; see :func:`purify`."""
    done, every = 0, TICK if advance else settings.network_steps
    for state in alternate(pixels, settings, chosen, seed, indices, every=every, strength=strength, tile=tile):
        if advance is not None:
            advance(len(pixels) * (state.step - done))
        done = state.step
    images, failed = state.images, diverged(state, settings)
    if failed.any():
        rows = failed.nonzero().flatten().tolist()
        again = [indices[row] for row in rows]
        logger.info("images %s diverged and are redone at a quarter of the rates", again)
        slower = dataclasses.replace(settings, conv_lr=settings.conv_lr / 4, fc_lr=settings.fc_lr / 4)
        every = settings.network_steps
        (state,) = alternate(pixels[rows], slower, chosen, seed, again, every=every, strength=strength[rows], tile=tile)
        images[rows], failed[rows] = state.images, diverged(state, settings)
    return to_pixels(images, settings.scale), failed


def strength_of(pixels: Tensor, settings: Settings) -> Tensor:
    """``strength`` for each image of ``pixels`` (N, channels, H, W) in [0, 1]: (N,)."""
    if settings.strength is None:
        return noise_level.matching_strength(pixels)
    return pixels.new_full((len(pixels),), settings.strength)


def diverged(state: State, settings: Settings) -> Tensor:
    """Mask (N,) of images that are not finite, or further from the reference than an image without any content is."""
    residual = (state.images - state.reference).square().mean((1, 2, 3))
    # the noise of full strength: less of it moves this limit by little
    limit = 2 * (state.reference.square().mean((1, 2, 3)) + langevin.stationary_variance(settings.step_size))
    return ~(residual <= limit)  # so that NaN counts


def _obstacle(settings: Settings, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"its state is float32, got {str(dtype).removeprefix('torch.')}"
    if settings.stride > MAX_FUSED_STRIDE:
        return f"it supports strides up to {MAX_FUSED_STRIDE}, got {settings.stride}"
    interpreted = settings.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests
    if not interpreted:
        if device.type != "cuda" or torch.version.cuda is None:
            return f"it needs an NVIDIA GPU, got a tensor on {device}{' (ROCm)' if device.type == 'cuda' else ''}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with PyTorch for CUDA on Linux)"
    return None
