"""Langevin dynamics of the synthesised image (paper III-A, Eq. 3)."""

import math

from torch import Tensor


def step(image: Tensor, gradient: Tensor, normal: Tensor, *, step_size: float, steps: int) -> Tensor:
    """T = ``steps`` steps of Eq. 3 with a fixed dF/dI, drawn at once, in place.

    With e = ``step_size`` and rho = 1 - e^2/2, a step of Eq. 3 is I <- rho I + (e^2/2) dF/dI + e N(0, 1). While the ReLU mask
    is fixed, dF/dI is the constant mode I* (Eq. 9 and 10), and T steps have the exact law

        I <- rho^T I + (1 - rho^T) I* + sqrt(e^2 (1 - rho^(2T)) / (1 - rho^2)) N(0, 1)

    With ``steps=1`` this is Eq. 3 itself. ``gradient`` and ``normal`` have the shape of ``image``. ``normal`` is standard
    normal noise, or that noise times the square root of a temperature.
    """
    decay, std = law(step_size, steps)
    return image.mul_(decay).add_(gradient, alpha=1 - decay).add_(normal, alpha=std)


def law(step_size: float, steps: int) -> tuple[float, float]:
    """rho^T, and the standard deviation of the noise that T = ``steps`` steps add; see :func:`step`."""
    rho = 1 - step_size**2 / 2
    log = 2 * math.log1p(-(step_size**2) / 2)  # of rho^2, not rounded to 0 where step_size is small
    powers = math.expm1(steps * log) / math.expm1(log) if log else steps  # the sum of rho^(2k) for k < T
    return rho**steps, step_size * math.sqrt(powers)


def stationary_variance(step_size: float) -> float:
    """Variance of a pixel around its mode after many steps: e^2 / (1 - rho^2) = 1 / (1 - e^2/4), in model units squared."""
    return 1 / (1 - step_size**2 / 4)
