"""Algorithm 1 in its plainest form: one image, a convolution, a linear layer, autograd and loops.

It has two uses. The tests compare the fast loops with it, and :mod:`.with_gradient` with its derivative. It is the baseline of
``benchmarks/speed.py``. It shares the Gabor functions and the order of the random numbers with the fast loops, and nothing
else.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import noise_level, streams
from ..images import to_model_units, to_pixels
from .energy import gabor_kernels
from .settings import Settings


class Network(NamedTuple):
    """theta of the paper for one image: W (C, channels, K, K), b (C,) and v (C, h, w)."""

    weight: Tensor
    bias: Tensor
    fc: Tensor


StepFunction = Callable[[Tensor, Tensor], Tensor]
"""(x, standard deviation of the Langevin noise in x) -> 1 where x is above 0, else 0."""


def heaviside(x: Tensor, _: Tensor) -> Tensor:
    """1 where x is above 0, else 0: the masks of the ReLU and of the threshold. It has no derivative."""
    return (x > 0).to(x.dtype)


def purify(image: Tensor, settings: Settings, *, seed: int, index: int, step_function: StepFunction = heaviside) -> Tensor:
    """Purify one image (channels, H, W) in [0, 1] with random stream ``index`` of ``seed``, differentiably.

    The result is that of :class:`~oag_transform.OnlineAlternateGenerator` in the image's own precision, without the retry at
    smaller rates. ``step_function``: see :func:`alternate`.
    """
    (generator,) = streams.generators(seed, [index], image.device)
    strength = noise_level.matching_strength(image[None])[0] if settings.strength is None else settings.strength
    for latest in alternate(to_model_units(image, settings.scale), settings, generator, strength, step_function):
        synthesised = latest
    return to_pixels(synthesised, settings.scale)


def alternate(
    reference: Tensor,
    settings: Settings,
    generator: Generator,
    strength: Tensor | float,
    step_function: StepFunction = heaviside,
) -> Iterator[Tensor]:
    """Algorithm 1 for one reference (channels, H, W) in model units: the synthesised image at each network step.

    The images are differentiable where ``reference`` requires a gradient. The ReLU masks, the threshold and the halving of the
    rates are piecewise constant and have no derivative. An adaptive attack can give masks and threshold a surrogate derivative
    with a ``step_function`` of the same values.

    Raises:
        ValueError: a ``compute_dtype`` other than that of ``reference``.
    """
    s = settings
    if s.compute_dtype not in (None, reference.dtype):
        raise ValueError(f"compute_dtype must be None: this loop works in the image's own dtype, got {s.compute_dtype}")
    keep = reference.requires_grad and torch.is_grad_enabled()
    height, width = reference.shape[1:]
    rows, columns = math.ceil(height / s.stride), math.ceil(width / s.stride)
    padding = (0, columns * s.stride - width, 0, rows * s.stride - height)
    reference = F.pad(reference, padding)  # with the mean colour, to whole strides
    before = math.ceil((s.kernel_size - s.stride) / 2)  # kernels are centred on their stride
    after = s.kernel_size - s.stride - before
    cell_taps = (2 * math.ceil(before / s.stride) + 1) ** 2 if before > 0 else 1  # strides within the reach of a kernel

    def responses(image: Tensor, theta: Network) -> Tensor:
        return F.conv2d(F.pad(image, (before, after, before, after))[None], theta.weight, theta.bias, s.stride)[0]

    def f(image: Tensor, theta: Network) -> Tensor:
        return (theta.fc * responses(image, theta).relu()).sum()

    def f_of_mask(image: Tensor, theta: Network, mask: Tensor) -> Tensor:
        return (theta.fc * mask * responses(image, theta)).sum()  # F with a fixed ReLU mask: Eq. 7

    def noise_std(theta: Network) -> Tensor:  # of the Langevin noise in a response
        return closed_form_std * strength**0.5 * theta.weight.flatten(1).norm(dim=1)[:, None, None]

    theta = random_network(reference, s, (rows, columns), generator)
    image = torch.zeros_like(reference)
    rho = 1 - s.step_size**2 / 2
    closed_form_std = math.sqrt(sum(s.step_size**2 * rho ** (2 * k) for k in range(s.image_steps)))  # noise of T_I steps
    lr_factor, best, velocity = 1.0, math.inf, torch.zeros_like(theta.fc)
    mask = step_function(responses(image, theta), noise_std(theta))
    for step in range(1, s.network_steps + 1):
        for _ in range(s.image_steps if s.langevin == "exact" else 1):
            normal = image.new_empty(rows, columns, len(image) * s.stride**2)  # drawn in the order of the fast loop
            normal.normal_(generator=generator)
            noise = torch.as_tensor(strength, dtype=image.dtype, device=image.device).sqrt() * F.pixel_shuffle(
                normal.permute(2, 0, 1), s.stride
            )
            if s.langevin == "exact":
                (gradient,) = _gradients(lambda x, theta=theta: f(x, theta), [image], keep)
                image = image - s.step_size**2 / 2 * (image - gradient) + s.step_size * noise  # Eq. 3
            else:
                (mode,) = _gradients(lambda x, theta=theta, mask=mask: f_of_mask(x, theta, mask), [image], keep)  # Eq. 9
                image = rho**s.image_steps * image + (1 - rho**s.image_steps) * mode + closed_form_std * noise
        yield image[:, :height, :width]
        if step == s.network_steps:
            return

        def contrast(*theta: Tensor, image: Tensor = image) -> Tensor:
            return f(reference, Network(*theta)) - f(image, Network(*theta))

        weight, bias, fc = _gradients(contrast, theta, keep)
        if s.threshold:
            threshold = strength * s.threshold * theta.weight.flatten(1).norm(dim=1)[:, None, None]
            fc = fc * step_function(fc.abs() - threshold, noise_std(theta))
        conv_lr = torch.as_tensor(s.conv_lr, dtype=image.dtype, device=image.device)
        if s.adaptive_lr:
            residual = float((reference - image).detach().square().mean())
            rose = residual > 1.05 * best
            lr_factor, best = (lr_factor / 2, residual) if rose else (lr_factor, min(best, residual))
            gates = theta.fc * (responses(reference, theta) > 0)
            conv_lr = (0.5 / (cell_taps * gates.mean((1, 2)).square().sum())).clamp(max=s.conv_lr)
        rate = lr_factor * conv_lr / (rows * columns)  # the gradient is a sum over positions
        mask = step_function(responses(image, theta), noise_std(theta))
        velocity = fc + s.momentum * velocity
        theta = Network(
            theta.weight + rate * weight, theta.bias + rate * bias, theta.fc + lr_factor * s.fc_lr * velocity
        )  # Eq. 5


def random_network(reference: Tensor, s: Settings, grid: tuple[int, int], generator: Generator) -> Network:
    """theta_1 for a reference (channels, H, W) and a grid of positions (h, w): Algorithm 1, line 1."""
    channels = len(reference)

    def uniform(*shape: int, fan_in: int) -> Tensor:  # PyTorch's initialisation
        return reference.new_empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)

    taps = channels * s.kernel_size**2
    if s.init == "gabor":
        weight = gabor_kernels([generator], s.filters, channels, s.kernel_size, reference.dtype)[0] / math.sqrt(3)
    else:
        weight = uniform(s.filters, channels, s.kernel_size, s.kernel_size, fan_in=taps)
    return Network(weight, uniform(s.filters, fan_in=taps), uniform(s.filters, *grid, fan_in=s.filters * grid[0] * grid[1]))


def _gradients(function: Callable[..., Tensor], at: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
    """Partial derivatives of a scalar function at several tensors; with ``keep`` they are differentiable themselves."""
    with torch.enable_grad():
        # clones, because other values that the function uses may depend on the tensors too
        points = [x.clone() if x.requires_grad else x.detach().requires_grad_() for x in at]
        return torch.autograd.grad(function(*points), points, create_graph=keep)
