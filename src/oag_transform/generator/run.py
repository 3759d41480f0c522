"""From pixels to purified pixels: strength, precision, the choice of the loop, tiles, and a retry for what diverges."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import noise_level, streams
from ..images import to_pixels
from . import langevin, loop
from .settings import Common, Settings
from .state import Inputs, State
from .tiles import Tile, fade, tiles

logger = logging.getLogger(__name__)

Loop = Callable[[Inputs, int], Iterator[State]]
"""Algorithm 1: (inputs, every) -> a snapshot after each ``every`` network steps, and after the last step."""

AUTO = False  # "auto" takes the kernels once benchmarks.gpu has shown that they are right and faster on a GPU
MAX_FUSED_STRIDE = 6  # the kernels hold all channels * stride^2 channels of a cell at once: up to 108, padded to 128
ROWS = 256  # rows of a large image whose noise is drawn together
TICK = 5  # network steps between two moves of a progress bar; each move takes a snapshot


def synthesise(inputs: Inputs, advance: Callable[[int], object] | None = None) -> tuple[Tensor, Tensor]:
    """Purified images of shape (N, channels, H, W) in [0, 1], and a boolean mask (N,) of those that diverged.

    An image that diverges is tried again at a quarter of the rates; the mask has those that diverged twice. ``advance(n)`` is
    called after n more steps of one tile of one image.
    """
    height, width = inputs.pixels.shape[-2:]
    places = tiles(height, width, inputs.settings.tile_size, inputs.settings.stride)
    return in_tiles(inputs, places, advance) if len(places) > 1 else with_retry(inputs, advance)


def in_tiles(inputs: Inputs, places: Sequence[Tile], advance: Callable[[int], object] | None = None) -> tuple[Tensor, Tensor]:
    """Large images tile by tile, faded into each other; see :func:`synthesise`."""
    pixels, s = inputs.pixels, inputs.settings
    height, width = pixels.shape[-2:]
    result, squared_shares = torch.zeros_like(pixels), pixels.new_zeros(height, width)
    failed = torch.zeros_like(inputs.strength, dtype=torch.bool)
    for number, place in enumerate(places):
        part, part_failed = with_retry(replace(inputs, pixels=place.of(pixels), tile=number), advance)
        share = fade(place, height, width, like=pixels)
        place.of(result).add_(part.mul_(share))
        place.of(squared_shares).add_(share.square())
        failed |= part_failed
    # where tiles fade into each other, their independent noise has less variance: the missing part is drawn anew
    std = (inputs.strength * langevin.stationary_variance(s.step_size)).sqrt()[:, None, None, None] * s.scale / 255
    generators = streams.tile_generators(inputs.seed, inputs.indices, len(places), pixels.device)
    for rows, squared in zip(result.split(ROWS, -2), squared_shares.split(ROWS, -2), strict=True):
        noise = streams.fill_normal(torch.empty_like(rows, memory_format=torch.contiguous_format), generators)
        rows.add_(noise.mul_((1 - squared).clamp_(min=0).sqrt_()).mul_(std)).clamp_(0, 1)
    return result, failed


def with_retry(inputs: Inputs, advance: Callable[[int], object] | None = None) -> tuple[Tensor, Tensor]:
    """Images that fit into one tile, and again at a quarter of the rates those that diverge; see :func:`synthesise`."""
    s, done = inputs.settings, 0
    for state in trajectory(inputs, TICK if advance else s.network_steps):
        if advance is not None:
            advance(len(inputs.pixels) * (state.step - done))
        done = state.step
    images, failed = state.images, diverged(state, s)
    if failed.any():
        rows = failed.nonzero().flatten().tolist()
        again = replace(
            inputs,
            pixels=inputs.pixels[rows],
            settings=replace(s, conv_lr=s.conv_lr / 4, fc_lr=s.fc_lr / 4),
            strength=inputs.strength[rows],
            indices=[inputs.indices[row] for row in rows],
        )
        logger.info("images %s diverged and are redone at a quarter of the rates", again.indices)
        (state,) = trajectory(again, s.network_steps)
        images[rows], failed[rows] = state.images, diverged(state, s)
    return to_pixels(images, s.scale), failed


def trajectory(inputs: Inputs, every: int) -> Iterator[State]:
    """Algorithm 1 by the loop that suits the images: snapshots after each ``every`` network steps, and after the last step."""
    return choose_loop(inputs.settings, inputs.pixels.device, inputs.pixels.dtype)(inputs, every)


def choose_loop(settings: Settings, device: torch.device, dtype: torch.dtype) -> Loop:
    """The loop for images of this device and dtype (see :func:`.images.work_type`).

    Raises:
        RuntimeError: ``backend="triton"``, and the kernels can't run there; the message says why.
    """
    obstacle = _obstacle(settings, device, dtype)
    if settings.backend == "triton" and obstacle is not None:
        raise RuntimeError(f"backend='triton' can't work on these images: {obstacle}; use backend='auto' or 'torch'")
    if settings.backend == "triton" or (settings.backend == "auto" and AUTO and obstacle is None):
        from . import fused  # it needs triton

        return fused.alternate
    return loop.alternate


def prepare(pixels: Tensor, settings: Settings, seed: int, indices: Sequence[int]) -> Inputs:
    """The inputs of Algorithm 1 for images (N, channels, H, W) in [0, 1]: strength and precision are chosen where None."""
    if operands(settings, pixels.device, pixels.dtype) == torch.bfloat16:
        settings = replace(settings, compute_dtype=torch.bfloat16)
    if settings.strength is None:
        strength = noise_level.matching_strength(pixels)
    else:
        strength = pixels.new_full((len(pixels),), settings.strength)
    return Inputs(pixels, settings, strength, seed, indices)


def operands(settings: Common, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the convolutions' operands for images of this device and dtype (see :func:`.images.work_type`)."""
    if settings.compute_dtype is not None:
        return settings.compute_dtype
    fast = device.type == "cpu" and dtype == torch.float32 and settings.backend != "triton" and _multiplies_bfloat16()
    return torch.bfloat16 if fast else dtype


def _multiplies_bfloat16() -> bool:
    """Whether this CPU is faster with operands in bfloat16: it has AMX, or is an AMD with AVX512-BF16.

    An AMD EPYC with AVX512-BF16 took 0.078 s in bfloat16 and 0.119 s in float32 for an image of 224 x 224. An Intel CPU with
    AVX512-BF16 and without AMX was slower in bfloat16.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch, which doesn't name the CPU
        return bool(torch.cpu._is_amx_tile_supported())
    found = torch.cpu.get_capabilities()  # has no keys for capabilities of other architectures
    return found.get("amx_bf16", False) or (found.get("avx512_bf16", False) and found.get("cpu_name", "").startswith("AMD"))


def diverged(state: State, settings: Settings) -> Tensor:
    """Mask (N,) of the images that are not finite, or further from the reference than an image without content."""
    residual = (state.images - state.reference).square().mean((1, 2, 3))
    # the noise of full strength; weaker noise changes this limit little
    limit = 2 * (state.reference.square().mean((1, 2, 3)) + langevin.stationary_variance(settings.step_size))
    return ~(residual <= limit)  # NaN counts as diverged


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
