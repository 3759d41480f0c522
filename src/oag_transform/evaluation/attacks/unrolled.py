"""The gradient that fits a defense, for attackers: OAG's through every network step, a baseline's exact or of a surrogate."""

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from ... import _checks, streams
from ...baselines import surrogate
from ...baselines._batches import with_gradients
from ...baselines.own import OwnDefense
from ...defended import DefendedModel, applied, parts_of, unwrapped
from ...generator import reference, with_gradient
from ...straight_through import straight_through
from ...transform import OnlineAlternateGenerator

PROBED = 4  # images that show whether a defense has a gradient: of a single one it may be clipped away

OfOAG = Callable[[OnlineAlternateGenerator], nn.Module]
"""What stands for OAG in an attack."""


class Unrolled(nn.Module):
    """OAG by :func:`oag_transform.generator.with_gradient.purify`.

    It works in the image's own precision and on the whole image: ``compute_dtype``, tiles and the second try at smaller rates
    are left out. Memory is about 0.4 GB for each image of a batch at 224 x 224.

    Args:
        transform: what is unrolled.
        expected: what :func:`unrolled` says.
    """

    def __init__(self, transform: OnlineAlternateGenerator, *, expected: bool = False) -> None:
        super().__init__()
        self.settings = replace(transform.settings, compute_dtype=None)
        self.expected = expected
        self.seed = transform.settings.seed

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """Purified images (N, C, H, W) in [0, 1], differentiably; ``index``: random stream of the first, or one for each."""
        if not len(images):
            return images
        seed = streams.seed_or_fresh(self.settings.seed)
        step_function = _Expected.apply if self.expected else reference.heaviside
        settings, indices = self.settings.at(*images.shape[-2:]), _checks.indices(index, len(images))
        with torch.autocast(images.device.type, enabled=False):
            return with_gradient.purify(images, settings, seed=seed, indices=indices, step_function=step_function)

    def extra_repr(self) -> str:
        """Every hyper-parameter."""
        return f"{self.settings!r}, expected={self.expected}"


def unrolled(model: DefendedModel, *, expected: bool = False) -> DefendedModel:
    """The same model, with gradients through its defense.

    OAG is unrolled. A baseline has the gradient of :func:`~oag_transform.baselines.surrogate.differentiable`, and any other
    defense its own. A defense without a gradient raises RuntimeError when it is attacked. Of several defenses in one model such
    a one has the identity's gradient (BPDA): left out, it would hide its part of the model from the attack.

    Args:
        model: what is attacked.
        expected: the exact gradient treats the thresholds of weight updates and the masks of the ReLU as constant. True: they
            have the derivative of their mean over the Langevin noise, which is smooth: a jump at 0 of a value with noise of
            standard deviation s has the normal density of s. Values are the same.

    Raises:
        ModuleNotFoundError: kornia is missing, for JPEG.
    """
    return _with_gradients(model, partial(Unrolled, expected=expected))


def with_surrogates(model: DefendedModel) -> DefendedModel:
    """As :func:`unrolled`, but OAG keeps its own gradient, which is the identity's (BPDA) by default."""
    return _with_gradients(model, lambda transform: transform)


def first_defense(model: DefendedModel) -> Any:
    """What comes first in a model's defense, which may be a single one; several in one model have no first one."""
    first = model.defense
    while parts := parts_of(_opened(first)):
        first = parts[0]
    return first


def has_gradient(defense: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    """Whether autograd finds a gradient through a defense at images (N, C, H, W) in [0, 1], which isn't zero everywhere.

    Raises:
        RuntimeError: the defense fails without a gradient, too, or for want of memory.
    """
    if isinstance(defense, nn.ModuleList):  # of a model with several
        return any(has_gradient(each, images) for each in defense)
    if isinstance(defense, _OwnOrIdentity):  # one of the two is there
        return True
    streams_of_images = list(range(len(images)))
    try:
        with with_gradients():
            point = images.detach().clone().requires_grad_()
            found = applied(defense, point, streams_of_images)
            if not found.requires_grad:
                return False
            weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)).to(found)  # a sum may be constant
            (slope,) = torch.autograd.grad((found * weights).sum(), point, allow_unused=True)
    except RuntimeError as error:
        starved = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)  # of a GPU, of a CPU
        if starved or isinstance(error, _checks.OfImages):
            raise
        with torch.no_grad():
            applied(defense, images.clone(), streams_of_images)  # it fails here too unless it is its gradient that fails
        return False
    return slope is not None and bool(slope.any())


def lacks_gradient(model: DefendedModel) -> bool:
    """Whether one of several defenses in a model of :func:`unrolled`, which was attacked, had none but the identity's."""
    several = model.defense if isinstance(model.defense, nn.ModuleList) else ()
    return any(isinstance(each, _OwnOrIdentity) and each.own is False for each in several)


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a :class:`~oag_transform.DefendedModel`.

    Raises:
        TypeError: it isn't.
    """
    if not isinstance(model, DefendedModel):
        raise TypeError(
            f"expected a DefendedModel, got {type(model).__name__}; the undefended target is "
            "DefendedModel(target, torch.nn.Identity(), shift=0)"
        )


def settings_of(model: DefendedModel) -> dict[str, Any]:
    """All keyword arguments of a model."""
    names = [name for name in inspect.signature(DefendedModel).parameters if name not in ("target", "defense")]
    return {name: getattr(model, name) for name in names}


def _with_gradients(model: DefendedModel, of_oag: OfOAG) -> DefendedModel:
    check_model(model)
    if isinstance(model.defense, nn.ModuleList):
        defense: Any = [_OwnOrIdentity(_with_gradient(each, of_oag)) for each in model.defense]
    else:
        defense = _with_gradient(model.defense, of_oag)
    return DefendedModel(model.target, defense, **settings_of(model) | {"gradient": "own"})


class _Expected(torch.autograd.Function):
    """:data:`~oag_transform.generator.reference.StepFunction` with the derivative of its mean over noise in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviation: Tensor) -> Tensor:
        ctx.save_for_backward(x, deviation)
        return reference.heaviside(x, deviation)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        x, deviation = ctx.saved_tensors
        return slopes[0] * (-(x / deviation).square() / 2).exp() / (math.sqrt(2 * math.pi) * deviation), None


class _OwnOrIdentity(nn.Module):
    """A defense with the gradient of its own, or with the identity's where it has none, which the first images tell."""

    def __init__(self, defense: Any) -> None:
        super().__init__()
        self.defense = defense
        self.own: bool | None = None

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        if self.own is None and images.requires_grad:
            self.own = has_gradient(self.defense, images[:PROBED])
        if self.own or not images.requires_grad:
            return applied(self.defense, images, index)
        return straight_through(images, lambda plain: applied(self.defense, plain, index))


def _with_gradient(defense: Any, of_oag: OfOAG) -> Any:
    if isinstance(defense, partial):  # its arguments stay
        return partial(_with_gradient(defense.func, of_oag), *defense.args, **defense.keywords)
    inner = _opened(defense)
    if isinstance(inner, OnlineAlternateGenerator):
        return of_oag(inner)
    if parts := parts_of(inner):
        return v2.Compose([_with_gradient(each, of_oag) for each in parts])
    if isinstance(inner, nn.Module) and any(isinstance(each, OnlineAlternateGenerator) for each in inner.modules()):
        warnings.warn(
            f"the OnlineAlternateGenerator in {type(inner).__name__} keeps its straight-through gradient: attacks see into "
            "nn.Sequential, torchvision's Compose and Lambda, functools.partial and torch.compile only",
            stacklevel=4,
        )
    return surrogate.differentiable(inner) or defense


def _opened(defense: Any) -> Any:
    """What functools.partial, torch.compile and the command line wrap."""
    inner = unwrapped(defense)
    return _opened(inner.defense) if isinstance(inner, OwnDefense) else inner
