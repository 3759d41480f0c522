"""Algorithm 1 of the paper: train an energy network and synthesise an image, in turns."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from . import energy, langevin, noise_level, streams
from .backend import Backend, fused
from .energy import Parameters
from .images import to_model_units, to_pixels

logger = logging.getLogger(__name__)

Init = Literal["gabor", "uniform"]
Langevin = Literal["closed_form", "exact"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of Algorithm 1; :class:`~oag_transform.OnlineAlternateGenerator` documents each of them."""

    network_steps: int
    image_steps: int
    kernel_size: int
    stride: int
    filters: int
    noise: float
    conv_lr: float
    fc_lr: float
    threshold: float
    scale: float
    strength: float | None
    init: Init
    langevin: Langevin
    adaptive_lr: bool
    compute_dtype: torch.dtype | None
    backend: Backend

    def __post_init__(self) -> None:
        for name in ("network_steps", "image_steps", "kernel_size", "stride", "filters"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name in ("conv_lr", "fc_lr", "threshold", "scale", "noise"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0 or (name == "scale" and value == 0):
                raise ValueError(f"{name} must be a finite number {'> 0' if name == 'scale' else '>= 0'}, got {value!r}")
        if self.strength is not None and not (_is_number(self.strength) and 0 < self.strength <= 1):
            raise ValueError(f"strength must be None or a number above 0 and at most 1, got {self.strength!r}")
        if self.noise >= 1:
            raise ValueError(f"noise must be below 1 (Eq. 3 moves an image by noise^2/2 a step), got {self.noise!r}")
        if self.kernel_size < self.stride:
            raise ValueError(
                f"kernel_size must be at least stride, or pixels between kernels are never seen; "
                f"got kernel_size={self.kernel_size} and stride={self.stride}"
            )
        if self.compute_dtype not in (None, torch.float32, torch.bfloat16):  # sums over positions overflow float16
            raise ValueError(f"compute_dtype must be None, torch.float32 or torch.bfloat16, got {self.compute_dtype!r}")
        for name, choices in (
            ("init", ("gabor", "uniform")),
            ("langevin", ("closed_form", "exact")),
            ("backend", ("auto", "torch", "triton")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.init == "gabor" and self.kernel_size == 1:
            raise ValueError('init="gabor" needs a kernel_size of at least 2 (a cosine of one pixel is constant), got 1')


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class State(NamedTuple):
    """Where Algorithm 1 stands: the network step, (reference, synthesised) as cells, and the network that made it.

    The fused step keeps another layout, so these two are made when they are asked for.
    """

    step: int
    read_pair: Callable[[], Tensor]
    read_theta: Callable[[], Parameters]

    @property
    def pair(self) -> Tensor:
        """The reference and the synthesised images as cells (2, N*D, h, w)."""
        return self.read_pair()

    @property
    def theta(self) -> Parameters:
        """The network that made the synthesised images."""
        return self.read_theta()


def alternate(reference: Tensor, settings: Settings, generators: Sequence[Generator]) -> Iterator[State]:
    """Algorithm 1 for images of shape (N, channels, H, W) in model units; yields after each round of image updates.

    The state is updated in place between two yields. The network update after the last image is left out: nothing uses it.
    """
    s = settings
    strength = strength_of(reference, s)
    theta = energy.initial_parameters(
        generators,
        reference.shape,
        kernel_size=s.kernel_size,
        stride=s.stride,
        filters=s.filters,
        init=s.init,
        dtype=reference.dtype,
    )
    pair = torch.cat([energy.to_cells(reference, s.stride)] * 2).contiguous(memory_format=torch.channels_last)
    image = pair[1:].zero_()
    if fused(s.backend, reference.device, reference.dtype, s.stride):
        from . import triton_step  # the rest of this function, as CUDA kernels

        chunk = triton_step.Chunk(pair, theta, reference.shape, s, generators, strength)
        yield from triton_step.alternate(chunk)
        return
    normal = torch.empty_like(reference, memory_format=torch.contiguous_format)
    deviation = strength.sqrt()[:, None, None, None]  # of the noise at that temperature
    positions = theta.fc[0, 0].numel()  # the gradient of W is a sum over positions: its rate is per position
    conv_lr = reference.new_full((len(reference),), s.conv_lr)
    taps = energy.kernel_to_cells(reference.new_ones(reference.shape[1], s.kernel_size, s.kernel_size), s.stride)
    pace, best = reference.new_ones(len(reference)), reference.new_full((len(reference),), math.inf)
    # closed form: T_I steps at once with the mask held; exact: T_I times one step, each with a mask of its own
    rounds, held = (1, s.image_steps) if s.langevin == "closed_form" else (s.image_steps, 1)
    dtype = s.compute_dtype or reference.dtype
    low = theta.cast(dtype)  # operands of the products; the state keeps its precision

    a = energy.responses(image.to(dtype), low)
    for step in range(1, s.network_steps + 1):
        for _ in range(rounds):
            if s.langevin == "exact":
                a = energy.responses(image.to(dtype), low)
            mode = energy.image_gradient(energy.gate(a, low), low)
            streams.fill_normal(normal, generators).mul_(deviation)
            draw = energy.to_cells(normal, s.stride)
            langevin.step(image, mode, draw, noise=s.noise, steps=held)  # Eq. 3
        yield State(step, lambda: pair, lambda: theta)
        if step == s.network_steps:
            return
        # closed form: ``a`` is the mask of the network before its update, which saves a convolution
        gradient, a, curvature = energy.contrast(pair.to(dtype), low, s.threshold * strength if s.threshold else None)
        if s.adaptive_lr:
            pace, best = slow_down(pace, best, energy.mean_square(pair[:1] - pair[1:], len(reference)))
            conv_lr = (0.5 / curvature).clamp(max=s.conv_lr)
        conv_rate = (pace * conv_lr / positions).repeat_interleave(s.filters)
        theta.weight.addcmul_(gradient.weight, taps * conv_rate[:, None, None, None])  # Eq. 5
        theta.bias.addcmul_(gradient.bias, conv_rate)
        theta.fc.addcmul_(gradient.fc, pace.repeat_interleave(s.filters)[:, None, None], value=s.fc_lr)
        low = theta.cast(dtype)


def strength_of(reference: Tensor, settings: Settings) -> Tensor:
    """``strength`` for each image of ``reference`` (N, channels, H, W) in model units: (N,)."""
    if settings.strength is None:
        return noise_level.strength(to_pixels(reference, settings.scale))
    return reference.new_full((len(reference),), settings.strength)


def slow_down(pace: Tensor, best: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Halve the pace (N,) of images whose mean square residual rose by over 5%: a step of theirs is too long for Eq. 5.

    Returns the new pace and the residual to compare with next.
    """
    rose = residual > 1.05 * best
    return torch.where(rose, pace / 2, pace), torch.where(rose, residual, torch.minimum(best, residual))


def purify(
    images: Tensor,
    settings: Settings,
    seed: int,
    indices: Sequence[int],
    advance: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Purify images of shape (N, channels, H, W) in [0, 1]; image i uses random stream ``indices[i]`` of ``seed``.

    ``advance(n)`` is called after n more steps of one image. Returns the new images and a boolean mask (N,) of those that
    diverged, both at these rates and at a quarter of them.
    """
    reference = to_model_units(images, settings.scale)
    synthesised = _last(reference, settings, seed, indices, advance)
    failed = diverged(synthesised, reference, settings.noise)
    if failed.any():
        rows = failed.nonzero().flatten().tolist()
        again = [indices[row] for row in rows]
        logger.info("images %s diverged and are redone at a quarter of the rates", again)
        slower = dataclasses.replace(settings, conv_lr=settings.conv_lr / 4, fc_lr=settings.fc_lr / 4)
        synthesised[rows] = _last(reference[rows], slower, seed, again)
        failed = diverged(synthesised, reference, settings.noise)
    return to_pixels(synthesised, settings.scale), failed


def diverged(synthesised: Tensor, reference: Tensor, noise: float) -> Tensor:
    """Mask (N,) of images that are not finite, or further from the reference than an image without any content is."""
    residual = (synthesised - reference).square().mean((1, 2, 3))
    # the noise of full strength: less of it moves this limit by little
    limit = 2 * (reference.square().mean((1, 2, 3)) + langevin.stationary_variance(noise))
    return ~(residual <= limit)  # so that NaN counts


def image_of(state: State, settings: Settings, shape: Sequence[int]) -> Tensor:
    """The synthesised images of a state, (N, channels, H, W) in model units; a copy."""
    return energy.from_cells(state.pair[1:], settings.stride, shape)


def _last(
    reference: Tensor,
    settings: Settings,
    seed: int,
    indices: Sequence[int],
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    generators = streams.generators(seed, indices, reference.device)
    for latest in alternate(reference, settings, generators):
        state = latest
        if advance is not None:
            advance(len(reference))
    return image_of(state, settings, reference.shape)
