"""Every hyper-parameter of Algorithm 1: its default, its meaning and its bounds; and the values of the paper."""

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
"""Sections IV-A and IV-E. The paper doesn't state filters, stride, e_g, beta and the colour range. The rates were chosen on 25
clean and 25 Gaussian-noised images: accuracy varies by at most one image from step 200 to 300, and no image diverges."""

PAPER_CLOSED_FORM = PAPER | {"langevin": "closed_form"}
"""The same images within 0.3 dB, in a tenth of the time: what ``evaluate`` measures as the paper's setting, in its
own ``--compute-dtype``."""


def argument(default: Any, meaning: str, check: Callable[[str, Any], Any]) -> Any:
    """A dataclass field: its default, its meaning, and ``check(name, value)``, which returns the value to keep or raises."""
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
        9, "T_N, updates of the network. More updates keep more detail, adversarial noise included.", count
    )
    image_steps: int = argument(
        80,
        """T_I, Langevin steps of the image for each update of the network. With ``langevin="closed_form"`` any number of steps
        has the same cost. 80 steps leave 3% of the image's distance to its mode, the paper's 20 leave 40%.""",
        count,
    )
    step_size: float = argument(
        0.3,
        """e_g of Eq. 3. A Langevin step moves the image by e_g^2/2 of its distance to the mode and adds noise of standard
        deviation e_g, in model units. Below 1.""",
        lambda name, value: _checks.number(name, value, at_least=0, below=1),
    )
    conv_lr: float = argument(1.2e-3, "beta of Eq. 5 for the convolution. The gradient is averaged over positions.", rate)
    fc_lr: float = argument(0.06, "beta of Eq. 5 for the fully connected layer.", rate)
    momentum: float = argument(
        0.3,
        """heavy-ball momentum (Polyak 1964) of the fully connected layer: its step is that of Eq. 5 plus ``momentum`` times the
        step before. It reaches the same image in fewer steps. 0: plain Eq. 5. Below 1.""",
        lambda name, value: _checks.number(name, value, at_least=0, below=1),
    )
    strength: float | None = argument(
        None,
        """temperature of the Langevin dynamics, and factor on ``threshold``, above 0 and at most 1. The standard deviation of
        the Langevin noise is proportional to its square root. ``None``: follows the estimated noise of each image, so that
        clean images keep more detail (:func:`oag_transform.noise_level.matching_strength`). ``1`` ignores the estimate, which
        is too low for a perturbation that is smooth, lies in a small part of the image, or was resized or saved as JPEG. It
        lowers clean accuracy and hardly changes that under gray-box attack (docs/cifar10.md, docs/results.md).""",
        lambda name, value: None if value is None else _checks.number(name, value, above=0, at_most=1),
    )
    init: Init = argument(
        "gabor",
        """``"gabor"``: random Gabor functions, see :func:`oag_transform.generator.energy.gabor_kernels`; ``"uniform"``:
        PyTorch's initialisation.""",
        one_of(Init),
    )
    langevin: Langevin = argument(
        "closed_form",
        """``"exact"`` takes the T_I steps of Eq. 3 one by one. ``"closed_form"`` draws their result at once, from its exact law
        for a fixed ReLU mask (Eq. 9 and 10), at 1 / T_I of the cost. Its mask is that of the last network step, one update of
        W behind.""",
        one_of(Langevin),
    )
    adaptive_lr: bool = argument(
        True,
        """the stable rates depend on the image. ``True`` limits ``conv_lr`` to half the inverse of its curvature for the image
        (flat areas have more curvature), and halves both rates of an image each time its residual rises by over 5%. ``False``:
        plain Eq. 5.""",
        _checks.flag,
    )
    compute_dtype: torch.dtype | None = argument(
        None,
        """precision of the convolutions' operands; the state stays in float32 (float64 for float64 images). ``None``: bfloat16
        on CPUs that are faster with it (with AMX, or AMD CPUs with AVX512-BF16), else the precision of the state; ``repr``
        shows the choice. An explicit dtype gives the same result on every machine, up to rounding.""",
        # sums over positions overflow float16
        lambda name, value: _checks.choice(name, value, (None, torch.float32, torch.bfloat16)),
    )
    tile_size: int | None = argument(
        512,
        """larger images are purified in tiles of about this many pixels a side, which overlap and fade into each other, so
        that memory stays bounded. The tiles of an image have the same initial network and the same strength. At least 128;
        ``None``: no tiles.""",
        lambda name, value: None if value is None else _checks.integer(name, value, at_least=128),
    )
    backend: Backend = argument(
        "auto",
        """``"torch"``: PyTorch operators on any device. ``"triton"``: fused CUDA kernels, which need triton and an NVIDIA GPU
        of compute capability 8.0 or higher, take no float64 images, and round float32 operands to TF32. ``"auto"`` is
        ``"torch"`` until the kernels have been measured on a GPU; so far they ran in Triton's interpreter only. The backends
        draw different noise.""",
        one_of(Backend),
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["check"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # Python numbers in place of NumPy's


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """Hyper-parameters of Algorithm 1 for images of one size. The defaults that are declared here are those of large images.

    :class:`~oag_transform.OnlineAlternateGenerator` documents each of them.
    """

    kernel_size: int = argument(9, "side of the convolution's kernels in pixels.", count)
    stride: int = argument(3, "stride of the convolution in pixels.", count)
    filters: int = argument(128, "number of filters of the convolution.", count)
    threshold: float = argument(
        7.5,
        """a weight of the fully connected layer takes a step only where the bracket of Eq. 5 is larger than ``threshold``
        standard deviations of the bracket under Langevin noise of full strength. Weaker structure, such as most white noise,
        never enters the image. 0: every weight takes every step, as in the paper.""",
        rate,
    )
    scale: float = argument(
        6.5,
        """grey levels (of 255) in a model unit. At full strength the synthesised image has noise of about this standard
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

    @property
    def image_updates(self) -> tuple[int, int]:
        """How often a network step updates the image, each time with a mask of its own, and by how many steps of Eq. 3.

        Closed form: one update of T_I steps with a fixed mask. Exact: T_I updates of one step.
        """
        return (1, self.image_steps) if self.langevin == "closed_form" else (self.image_steps, 1)


SIZED = ("kernel_size", "stride", "filters", "threshold", "scale")
"""Hyper-parameters whose default follows the size of the image."""

SMALL, LARGE = 32, 128
"""Short sides of an image in pixels: the default is constant up to the first and from the second."""

AT_SMALL: dict[str, Any] = {"kernel_size": 6, "stride": 2, "filters": 192, "threshold": 10.0, "scale": 4.0}
"""The default for images of :data:`SMALL` pixels. :class:`Settings` has the default for large images."""


def default_for(height: int, width: int) -> dict[str, Any]:
    """The default of :data:`SIZED` for an image of this size, by its short side.

    The fine detail of an image of 224 pixels is most of the content at 32 pixels, so images below :data:`LARGE` pixels get
    finer kernels. ``threshold`` and ``scale`` are linear in the logarithm of the short side from :data:`SMALL` to
    :data:`LARGE`. No kernel is larger than the image. docs/settings.md reports how the default was chosen.
    """
    side = min(height, width)
    large: dict[str, Any] = {name: Settings.__dataclass_fields__[name].default for name in SIZED}
    if side >= LARGE:
        return large
    between = {name: _between(AT_SMALL[name], large[name], side) for name in ("threshold", "scale")}
    return AT_SMALL | between | {name: min(AT_SMALL[name], side) for name in ("kernel_size", "stride")}


def for_noise(std: float, height: int, width: int, scale: float | None = None) -> dict[str, Any]:
    """What replaces the default in images of this size with added Gaussian noise of standard deviation ``std``, on [0, 1].

    The threshold is 2.25 standard deviations of this noise, also at a given ``scale``. The remaining Langevin noise matters as
    much as the removed noise and doesn't grow with ``std``: at most 3 grey levels up to a short side of :data:`SMALL` pixels,
    at most 14 from :data:`LARGE` pixels, linear in the logarithm of the side in between. The values were chosen on clean
    training images with noise of 0.25, and at :data:`SMALL` pixels of 0.12 and 0.25; see docs/certificates.md.
    """
    scale = min(_between(3.0, 14.0, min(height, width)), 100 * std) if scale is None else scale
    return {"strength": 1.0, "scale": scale, "threshold": 2.25 * 255 * std / scale}


def shift_for(height: int, width: int) -> int:
    """Shift in pixels of the views of a :class:`~oag_transform.DefendedModel`, by the short side: 5 from 160 pixels on."""
    side = min(height, width)
    return min(1 if side < 80 else 3 if side < 160 else 5, side - 1)


def _between(small: float, large: float, side: int) -> float:
    """The value for a short side: linear in its logarithm, constant up to :data:`SMALL` and from :data:`LARGE`."""
    share = math.log2(min(max(side, SMALL), LARGE) / SMALL) / math.log2(LARGE / SMALL)
    return (1 - share) * small + share * large


def _follows(name: str) -> Any:
    """The field of :class:`BySize` for a hyper-parameter of :class:`Settings`: ``None`` follows the size."""
    field = Settings.__dataclass_fields__[name]
    check = field.metadata["check"]
    return argument(
        None,
        f"{field.metadata['meaning']} ``None``: follows the image's short side, {field.default} from {LARGE} pixels on.",
        lambda name, value: None if value is None else check(name, value),
    )


@dataclass(frozen=True, kw_only=True)
class BySize(Common):
    """Hyper-parameters of Algorithm 1 for images of any size; ``None`` follows the size."""

    kernel_size: int | None = _follows("kernel_size")
    stride: int | None = _follows("stride")
    filters: int | None = _follows("filters")
    threshold: float | None = _follows("threshold")
    scale: float | None = _follows("scale")
    noise_std: float | None = argument(
        None,
        """standard deviation of Gaussian noise that was added to the images, on the [0, 1] scale, from 1e-4 to 1. It
        sets ``strength``, ``threshold`` and ``scale``, see
        :func:`oag_transform.generator.settings.for_noise`. ``None``: the images have no noise of known strength.""",
        lambda name, value: None if value is None else _checks.number(name, value, at_least=1e-4, at_most=1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_std is not None and None not in (self.threshold, self.scale, self.strength):
            raise ValueError(
                "noise_std sets threshold, scale and strength, and all three are given, as paper() does; leave it out"
            )
        sides = (LARGE, LARGE), (SMALL, SMALL)  # with the largest default of kernel_size, and the smallest of stride
        self._check_fit(*sides)
        self.at(*max(sides, key=self._fits))  # raises what Settings raises

    def at(self, height: int, width: int) -> Settings:
        """The hyper-parameters for images of this size.

        Raises:
            ValueError: the given values conflict with the default for this size: kernels smaller than their stride.
        """
        self._check_fit((height, width))
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        defaults = default_for(height, width)
        if self.noise_std is not None:
            defaults |= for_noise(self.noise_std, height, width, self.scale)
        return Settings(**given | {name: value for name, value in defaults.items() if given[name] is None})

    def _fits(self, size: tuple[int, int]) -> bool:
        own = default_for(*size)
        return (self.kernel_size or own["kernel_size"]) >= (self.stride or own["stride"])

    def _check_fit(self, *sizes: tuple[int, int]) -> None:
        """Raise if one of kernel_size and stride is given, and fits the default of the other at none of these sizes."""
        if (self.kernel_size is None) == (self.stride is None) or any(map(self._fits, sizes)):
            return
        given, other, change = ("stride", "kernel_size", "smaller") if self.stride else ("kernel_size", "stride", "larger")
        defaults = " and ".join(f"{default_for(*size)[other]} for {size[0]} x {size[1]} pixels" for size in sizes)
        raise ValueError(
            f"kernel_size must be at least stride, or pixels between kernels are never seen; got {given}="
            f"{getattr(self, given)}, and the default of {other} is {defaults}; give {other} too, or a {change} {given}"
        )

    @property
    def minimum_size(self) -> int:
        """The smallest height and width of an image in pixels."""
        return 2 if self.kernel_size is None else max(2, self.kernel_size)


def meanings(arguments: type[Common], indent: str) -> Iterator[str]:
    """``name: meaning`` of each argument, formatted for a docstring."""
    for field in dataclasses.fields(arguments):
        text = f"{field.name}: {field.metadata['meaning']}"
        yield textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=f"{indent}    ", break_long_words=False)
