"""Every hyper-parameter of Algorithm 1, once: its default, its meaning and its bounds; and the paper's own values."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from .. import _checks

Init = Literal["gabor", "uniform"]
Langevin = Literal["closed_form", "exact"]
Backend = Literal["auto", "torch", "triton"]

PAPER: dict[str, Any] = {
    "network_steps": 300,
    "image_steps": 20,
    "kernel_size": 15,
    "init": "uniform",
    "langevin": "exact",
    "adaptive_lr": False,
    "filters": 64,
    "stride": 3,
    "step_size": 0.3,
    "scale": 8.0,
    "conv_lr": 3e-5,
    "fc_lr": 0.01,
    "momentum": 0.0,
    "threshold": 0.0,
    "strength": 1.0,
    "compute_dtype": torch.float32,
}
"""IV-A and IV-E. The paper leaves filters, stride, e_g, beta and the colour range open. The rates here were chosen on clean and
Gaussian-noised photographs (25 of each): accuracy stays within one image from step 200 to 300, and none diverges."""


def for_noise(std: float) -> dict[str, Any]:
    """Settings for images that Gaussian noise of a known standard deviation ``std``, on the [0, 1] scale, was added to.

    A contrast counts beyond 2.25 standard deviations of that noise. The Langevin noise that is left matters as much as what is
    taken away, and doesn't grow with ``std``: 14 grey levels from 0.14 on. Both were chosen on clean tuning photographs with
    noise of 0.25, and looked at for 0.12 and 0.5; see docs/certificates.md.

    Raises:
        ValueError: ``std`` is not a finite number above 0.
    """
    std = _checks.number("std", std, above=0)
    scale = min(14.0, 100 * std)
    return {"strength": 1.0, "scale": scale, "threshold": 2.25 * 255 * std / scale}


def argument(default: Any, meaning: str, check: Callable[[str, Any], Any]) -> Any:
    """A dataclass field with its default, what it means, and ``check(name, value)`` -> the value to keep, which may raise."""
    return dataclasses.field(default=default, metadata={"meaning": " ".join(meaning.split()), "check": check})


def count(name: str, value: Any) -> int:
    """An integer of at least 1."""
    return _checks.integer(name, value, at_least=1)


def rate(name: str, value: Any) -> Any:
    """A finite number of at least 0."""
    return _checks.number(name, value, at_least=0)


def one_of(literal: Any) -> Callable[[str, Any], Any]:
    """One of the values of a Literal type."""
    return lambda name, value: _checks.choice(name, value, get_args(literal))


@dataclass(frozen=True, kw_only=True)
class Common:
    """Hyper-parameters of Algorithm 1 whose default is the same for images of every size."""

    network_steps: int = argument(
        9, "T_N, updates of the network. More of them keep more detail, adversarial noise included.", count
    )
    image_steps: int = argument(
        80,
        """T_I, Langevin steps of the image for each update of the network. With ``langevin="closed_form"`` any number of them
        costs the same: 80 take the image all but 3% of the way to its mode, where the paper's 20 leave 40%.""",
        count,
    )
    step_size: float = argument(
        0.3,
        """e_g of Eq. 3: a Langevin step moves the image by e_g^2/2 of its distance to the mode and adds noise of standard
        deviation e_g, in model units. Below 1.""",
        lambda name, value: _checks.number(name, value, at_least=0, below=1),
    )
    conv_lr: float = argument(
        1.2e-3, "beta of Eq. 5 for the convolution, per position: the gradient is averaged over positions.", rate
    )
    fc_lr: float = argument(0.06, "beta of Eq. 5 for the fully connected layer.", rate)
    momentum: float = argument(
        0.3,
        """of the fully connected layer: its step is that of Eq. 5 and so much of the one before it (Polyak 1964), which reaches
        the same image in fewer steps. 0: Eq. 5 as it stands. Below 1.""",
        lambda name, value: _checks.number(name, value, at_least=0, below=1),
    )
    strength: float | None = argument(
        None,
        """temperature of the Langevin dynamics, and share of the contrast that ``threshold`` asks for, above 0 and at most 1:
        the noise goes as its square root. ``None``: what the noise of each image calls for, so that clean photographs keep
        more (:func:`oag_transform.noise_level.matching_strength`). ``1`` ignores that noise, of which a perturbation shows
        less that is smooth, lies in a small part of the image, or was resized or saved as JPEG; it was not measured in the gray
        box.""",
        _checks.share,
    )
    init: Init = argument(
        "gabor",
        """``"gabor"``: random Gabor functions, see :func:`oag_transform.generator.energy.gabor_kernels`; ``"uniform"``:
        PyTorch's initialisation.""",
        one_of(Init),
    )
    langevin: Langevin = argument(
        "closed_form",
        """``"exact"`` takes the T_I steps of Eq. 3 one by one; ``"closed_form"`` draws them at once from their law with the
        ReLU mask held (Eq. 9 and 10), at a T_I-th of the cost. ``"closed_form"`` takes that mask from the convolution of the
        last network step, so it is one update of W behind.""",
        one_of(Langevin),
    )
    adaptive_lr: bool = argument(
        True,
        """which rates are stable depends on the image. ``True`` holds ``conv_lr`` to half the inverse of the curvature that the
        image gives it (flat areas give more), and halves both rates of an image each time its residual rises by over 5%.
        ``False`` is Eq. 5 as it stands.""",
        _checks.flag,
    )
    compute_dtype: torch.dtype | None = argument(
        None,
        """precision of the convolutions' operands; the state stays in float32 (float64 for float64 images). ``None``: bfloat16
        on a CPU that was seen to be faster with it (with AMX, or an AMD with AVX512-BF16), else the state's; ``repr`` says
        which. An explicit one gives the same result on every machine, to rounding.""",
        # sums over positions overflow float16
        lambda name, value: _checks.choice(name, value, (None, torch.float32, torch.bfloat16)),
    )
    tile_size: int | None = argument(
        512,
        """larger images are worked on in tiles of at most so many pixels a side, which overlap and are faded into each other:
        memory stays bounded. Their networks begin alike and see the same strength. At least 128; ``None``: never.""",
        lambda name, value: None if value is None else _checks.integer(name, value, at_least=128),
    )
    backend: Backend = argument(
        "auto",
        """``"torch"`` runs the network step as PyTorch operators on any device; ``"triton"`` as fused CUDA kernels, which need
        an NVIDIA GPU of compute capability 8.0 or higher and triton, take no float64 images, and round float32 operands to
        TF32. ``"auto"`` is ``"torch"`` until the kernels have been measured on a GPU: so far they ran in Triton's interpreter
        only. The two draw different noise.""",
        one_of(Backend),
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["check"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # Python's own numbers for NumPy's


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """Hyper-parameters of Algorithm 1 for images of one size; those that are declared here have the default of large images.

    :class:`~oag_transform.OnlineAlternateGenerator` shows what each of them means.
    """

    kernel_size: int = argument(9, "side of the convolution's kernels in pixels.", count)
    stride: int = argument(3, "stride of the convolution in pixels.", count)
    filters: int = argument(128, "number of filters of the convolution.", count)
    threshold: float = argument(
        7.5,
        """a weight of the fully connected layer takes a step only where the bracket of Eq. 5 is more than so many times the
        standard deviation that Langevin noise of full strength alone gives it. 0: always, as in the paper. What is too weak
        for it, most white noise among it, never enters the image.""",
        rate,
    )
    scale: float = argument(
        6.5,
        """grey levels (of 255) in a model unit. At full strength the synthesised image carries noise of about this standard
        deviation.""",
        lambda name, value: _checks.number(name, value, above=0),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size < self.stride:
            raise ValueError(
                f"kernel_size must be at least stride, or pixels between kernels are never seen; "
                f"got kernel_size={self.kernel_size} and stride={self.stride}"
            )
        if self.init == "gabor" and self.kernel_size == 1:
            raise ValueError('init="gabor" needs a kernel_size of at least 2 (a cosine of one pixel is constant), got 1')


SIZED = ("kernel_size", "stride", "filters", "threshold", "scale")
"""Hyper-parameters whose default follows the size of the image."""

SMALL, LARGE = 32, 128
"""Short sides of an image, in pixels, up to and from which its default stays the same."""

AT_SMALL: dict[str, Any] = {"kernel_size": 6, "stride": 2, "filters": 192, "threshold": 10.0, "scale": 4.0}
"""The default of images of :data:`SMALL` pixels; that of large ones is in :class:`Settings`."""


def default_for(height: int, width: int) -> dict[str, Any]:
    """The default of :data:`SIZED` for an image of this size, by its short side.

    What is fine detail at 224 pixels is most of an image of 32, so images below :data:`LARGE` pixels get finer kernels.
    ``threshold`` and ``scale`` go in a straight line over the logarithm of the short side from :data:`SMALL` to :data:`LARGE`.
    No kernel is larger than the image. docs/settings.md says how this was chosen.
    """
    side = min(height, width)
    large: dict[str, Any] = {name: Settings.__dataclass_fields__[name].default for name in SIZED}
    if side >= LARGE:
        return large
    share = math.log2(max(side, SMALL) / SMALL) / math.log2(LARGE / SMALL)
    between = {name: (1 - share) * AT_SMALL[name] + share * large[name] for name in ("threshold", "scale")}
    return AT_SMALL | between | {name: min(AT_SMALL[name], side) for name in ("kernel_size", "stride")}


def shift_for(height: int, width: int) -> int:
    """Pixels by which the views of a :class:`~oag_transform.DefendedModel` are moved: 5 from 160 pixels of short side on."""
    side = min(height, width)
    return min(1 if side < 80 else 3 if side < 160 else 5, side - 1)


def _follows(name: str) -> Any:
    """A field of :class:`BySize` for a hyper-parameter of :class:`Settings`, by its name: ``None`` follows the size."""
    field = Settings.__dataclass_fields__[name]
    check = field.metadata["check"]
    return argument(
        None,
        f"{field.metadata['meaning']} ``None``: follows the image's short side, {field.default} from {LARGE} pixels on.",
        lambda name, value: None if value is None else check(name, value),
    )


@dataclass(frozen=True, kw_only=True)
class BySize(Common):
    """Hyper-parameters of Algorithm 1 for images of any size: ``None`` follows it."""

    kernel_size: int | None = _follows("kernel_size")
    stride: int | None = _follows("stride")
    filters: int | None = _follows("filters")
    threshold: float | None = _follows("threshold")
    scale: float | None = _follows("scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at(LARGE, LARGE)  # raises what Settings raises

    def at(self, height: int, width: int) -> Settings:
        """The hyper-parameters for images of this size.

        Raises:
            ValueError: what was given doesn't go with what follows the size: kernels smaller than their stride.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        found = default_for(height, width)
        return Settings(**values | {name: default for name, default in found.items() if values[name] is None})

    @property
    def minimum_size(self) -> int:
        """Pixels that an image needs at least in height and width."""
        return 2 if self.kernel_size is None else self.kernel_size


def meanings(arguments: type[Common], indent: str) -> Iterator[str]:
    """``name: meaning`` of each argument, as a docstring lists them."""
    for field in dataclasses.fields(arguments):
        text = f"{field.name}: {field.metadata['meaning']}"
        yield textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=f"{indent}    ", break_long_words=False)
