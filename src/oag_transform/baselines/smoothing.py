"""The list of denoisers for randomized smoothing: OAG and its controls, each set by the known noise.

docs/certificates.md describes the choice of their settings: on noisy images, without attacks, and on none of the images of its
tables. This module imports no torch, like :mod:`oag_transform.baselines.catalogue`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .catalogue import NONE, OAG, OAG_KEY, class_named, is_own, own_defense

if TYPE_CHECKING:  # command lines are parsed with this list, without importing torch
    from torch import nn


@dataclass(frozen=True)
class Denoiser:
    """A denoiser for Gaussian noise of a known standard deviation.

    Attributes:
        key: its name on a command line.
        label: its name in tables.
        make: (std on the [0, 1] scale, seed, dtype of the convolutions of OAG or None) -> transform of [0, 1] batches. Raises
            ModuleNotFoundError if a package is missing.
        by_default: whether it is compared if no denoiser is named.
    """

    key: str
    label: str
    make: "Callable[[float, int, Any], nn.Module]"
    by_default: bool = True


def denoisers(keys: Iterable[str] | None = None) -> tuple[Denoiser, ...]:
    """The denoisers with these keys, in the order of :data:`DENOISERS`; None for the default ones.

    ``module:function`` is one of somebody's own, see :class:`~oag_transform.baselines.own.OwnDefense`. It comes after the
    others, and is imported when it is made.

    Raises:
        ValueError: unknown key; the message lists the known ones.
    """
    if keys is None:
        return tuple(denoiser for denoiser in DENOISERS if denoiser.by_default)
    known, asked = [denoiser.key for denoiser in DENOISERS], list(keys)
    own = [key for key in dict.fromkeys(asked) if key not in known]
    for key in own:
        if not is_own(key):
            raise ValueError(f"no denoiser {key!r}; expected some of {', '.join(known)}, or module:function")
    return (*(denoiser for denoiser in DENOISERS if denoiser.key in asked), *map(_own, own))


def _own(key: str) -> Denoiser:
    return Denoiser(key, key, lambda std, seed, _: own_defense(key, seed, std=std))


def _oag(std: float, seed: int, dtype: Any) -> "nn.Module":
    return class_named("..transform", "OnlineAlternateGenerator").for_noise(std, seed=seed, compute_dtype=dtype)


def _none(*_: Any) -> "nn.Module":
    return class_named("torch.nn", "Identity")()


def _non_local_means(std: float, h: float) -> "nn.Module":
    return class_named(".denoisers", "NonLocalMeans")(h * 255 * std, sigma=255 * std)


DENOISERS: tuple[Denoiser, ...] = (
    Denoiser(OAG_KEY, OAG, _oag),
    Denoiser("none", NONE, _none),
    # 50 iterations come within 2.5 grey levels (RMS) of the minimum, closer than the library's own early stop
    Denoiser("tv", "Total variation", lambda std, *_: class_named(".denoisers", "TotalVariation")(0.8 * std, iterations=50)),
    Denoiser("nlm", "Non-local means", lambda std, *_: _non_local_means(std, 0.6)),
    Denoiser("wavelets", "Wavelets", lambda std, *_: class_named(".denoisers", "Wavelets")(255 * std)),
    # for 32 x 32 pixels, where it is better from a std of 0.25
    Denoiser("nlm-weak", "Non-local means, h of 0.4 std", lambda std, *_: _non_local_means(std, 0.4), by_default=False),
    Denoiser("median", "Median filter, size 3", lambda *_: class_named(".filters", "MedianFilter")(3), by_default=False),
    # takes seconds per draw
    Denoiser("bm3d", "BM3D", lambda std, *_: class_named(".denoisers", "BM3D")(255 * std), by_default=False),
)
