"""A target classifier behind a defense."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.models import WeightsEnum
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from . import _checks
from .generator.settings import shift_for
from .straight_through import clipped, straight_through
from .transform import OnlineAlternateGenerator, uncompiled

CORNERS = 4  # views of a shift

Defense = Callable[..., Tensor]
"""A batch transform of [0, 1] images (N, C, H, W). It may have a keyword ``index`` for the random streams of the images."""


class DefendedModel(nn.Module):
    """A classifier that purifies its input: image in [0, 1] -> defense -> four shifted views -> normalize -> target.

    The four views are test-time augmentation: they shift the purified image by a few pixels, off the grid of strides and pixels
    that a perturbation was computed for, and their class probabilities are averaged. They cost four passes of the target for
    each image. At 224 pixels under gray-box IGSM and C&W, the views alone restore the class of most images; under MI-FGSM, of
    fewer images (docs/results.md, Table I: Undefended, 4 views). At 32 pixels they restore hardly any under IGSM
    (docs/cifar10.md). docs/adversaries.md reports robust accuracy under adaptive attacks. See :func:`shifted`.

    Several defenses are given as a list. Each defense purifies every image, and the class probabilities are averaged over the
    views of all. The cost is the sum of the defenses and four passes of the target for each.

    The target's parameters, training mode and gradient flags are not changed. The target is a submodule, so that ``.to()``,
    ``.eval()`` and ``parameters()`` reach it as in any module. A checkpoint of the undefended target also loads.

    Args:
        target: any classifier (N, C, H, W) -> logits (N, classes), or -> an object with these as ``.logits``, such as the
            classifiers of Hugging Face.
        defense: a batch transform of [0, 1] images; default ``OnlineAlternateGenerator()``. A defense that takes ``index`` gets
            the random stream of each image, also inside ``torch.nn.Sequential`` and torchvision's ``Compose`` and ``Lambda``. A
            list of D modules is D defenses; they are kept as a ``torch.nn.ModuleList``, and their results for an image must
            have the same size.
        normalize: the target's preprocessing of a [0, 1] image, e.g. ``torchvision.transforms.Normalize(mean, std)``. ``None``
            if the target takes [0, 1] images.
        samples: the number k of independent purifications by each defense whose class probabilities are averaged. It costs k
            times the time. Use 1 if the defense isn't random.
        shift: pixels by which each of the four views is shifted, up or down and left or right; less than the image's sides.
            An odd number lies off the grid of every even stride. 0: the purified image itself is the only view. ``None``:
            follows the image's short side, see :func:`~oag_transform.generator.settings.shift_for`; 5 at 224 pixels.
        clip: True: images outside [0, 1] are clipped to it, with the straight-through gradient, for attacks that query slightly
            outside, such as NI-FGSM, SPSA and Gaussian noise. False: the default defense raises an error for them, so that
            images that were normalised by mistake are found. NaN and infinity are errors in both cases.
        gradient: ``"straight_through"``: the gradient of the identity in place of any defense (BPDA). ``"own"``: the defense's
            own gradient; that of OAG is straight-through too, and attackers differentiate it with
            :func:`oag_transform.evaluation.attacks.unrolled.unrolled`. Each of several defenses contributes to the gradient of
            the averaged probabilities. With ``"own"``, a defense without a gradient, such as
            ``OnlineAlternateGenerator(gradient="none")``, contributes nothing; with ``"straight_through"`` it contributes the
            identity.

    Returns (forward):
        (N, classes): the target's own logits for ``samples=1, shift=0`` and one defense; otherwise the log of the averaged
        probabilities (these are logits, too: their softmax is the average).

    Example:
        >>> import torch
        >>> from oag_transform import DefendedModel, OnlineAlternateGenerator
        >>> target = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).eval()
        >>> model = DefendedModel(target, OnlineAlternateGenerator(network_steps=3, filters=8), samples=2)
        >>> model(torch.rand(4, 3, 32, 32)).exp().sum(1).round()
        tensor([1., 1., 1., 1.], grad_fn=<RoundBackward0>)
    """

    def __init__(
        self,
        target: nn.Module,
        defense: Defense | Sequence[Defense] | None = None,
        *,
        normalize: Callable[[Tensor], Tensor] | None = None,
        samples: int = 1,
        shift: int | None = None,
        clip: bool = False,
        gradient: Literal["straight_through", "own"] = "straight_through",
    ) -> None:
        super().__init__()
        if not isinstance(target, nn.Module):
            got = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
            raise TypeError(f"target must be a torch.nn.Module, got {got}")
        if normalize is not None and not callable(normalize):
            raise TypeError(f"normalize must be callable or None, got {type(normalize).__name__}")
        self.samples = samples
        self.shift = shift
        self.clip = clip
        self.gradient = gradient
        self.target = target
        self.defense = OnlineAlternateGenerator() if defense is None else _one_or_list(defense)
        self.normalize = normalize
        self.training = target.training  # the wrapper's flag is that of the target
        self.register_load_state_dict_pre_hook(_from_undefended_target)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are checked whenever they are set: a wrong gradient would pass for robustness."""
        if name == "samples":
            value = _checks.integer(name, value, at_least=1)
        elif name == "shift":
            value = None if value is None else _checks.integer(name, value)
        elif name == "clip":
            value = _checks.flag(name, value)
        elif name == "gradient":
            value = _checks.choice(name, value, ("straight_through", "own"))
        super().__setattr__(name, value)

    @classmethod
    def from_torchvision(
        cls,
        model: str | WeightsEnum,
        defense: Defense | Sequence[Defense] | None = None,
        *,
        samples: int = 1,
        shift: int | None = None,
        clip: bool = False,
        gradient: Literal["straight_through", "own"] = "straight_through",
        progress: bool = True,
    ) -> "DefendedModel":
        """A pretrained torchvision classifier in eval mode, with the normalisation of its weights.

        The images must be resized and cropped before, e.g. to the ``crop_size`` of ``weights.transforms()``.

        Args:
            model: the name of a builder (``"resnet50"``, with its default weights), the name of weights
                (``"ResNet50_Weights.IMAGENET1K_V2"``) or a member of a weights enum.
            defense: see the class.
            samples: see the class.
            shift: see the class.
            clip: see the class.
            gradient: see the class.
            progress: show torchvision's download bar.

        Raises:
            ValueError: torchvision has no classifier of this name.
        """
        weights, builder = _classifier(model)
        preset = weights.transforms()
        target = torchvision.models.get_model(builder, weights=weights, progress=progress).eval()
        normalize = v2.Normalize(mean=preset.mean, std=preset.std)
        return cls(target, defense, normalize=normalize, samples=samples, shift=shift, clip=clip, gradient=gradient)

    @classmethod
    def from_timm(
        cls,
        model: str,
        defense: Defense | Sequence[Defense] | None = None,
        *,
        pretrained: bool = True,
        samples: int = 1,
        shift: int | None = None,
        clip: bool = False,
        gradient: Literal["straight_through", "own"] = "straight_through",
    ) -> "DefendedModel":
        """A classifier of timm (extra ``timm``) in eval mode, with the normalisation of its data config.

        The images must be resized and cropped before, to the side that ``timm.data.resolve_model_data_config`` gives.

        Args:
            model: the name in timm, such as ``"vit_small_patch16_224.augreg_in21k_ft_in1k"``.
            defense: see the class.
            pretrained: True: timm's weights; False: random weights.
            samples: see the class.
            shift: see the class.
            clip: see the class.
            gradient: see the class.

        Raises:
            ValueError: timm has no classifier of this name.
            ModuleNotFoundError: timm is missing.
        """
        timm = _checks.from_extra("timm", "from_timm", "timm")
        if not isinstance(model, str) or not in_timm(timm, model):
            raise ValueError(f"expected a model of timm such as 'resnet50', got {model!r}")
        target = timm.create_model(model, pretrained=pretrained).eval()
        config = timm.data.resolve_model_data_config(target)
        normalize = v2.Normalize(mean=list(config["mean"]), std=list(config["std"]))
        return cls(target, defense, normalize=normalize, samples=samples, shift=shift, clip=clip, gradient=gradient)

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """Logits (N, classes) for images (N, C, H, W) in [0, 1]; see the class.

        Args:
            images: floating point; the defense may have further requirements.
            index: the random stream of the first image, or a sequence with one stream for each image. Sample k of an image with
                stream i has stream ``i * samples + k`` of the defense's seed. With D defenses, defense d has stream
                ``(i * D + d) * samples + k``, so that two defenses of one seed draw different numbers. Without a seed of the
                defense, ``index`` has no effect.

        Raises:
            TypeError, ValueError: bad images, a shift that doesn't fit into them, a bad ``index``, or a target whose output
                isn't finite logits (N, classes) of at least two classes; the error names the image.
        """
        return self.classify(self.purify(images, index=index))

    @uncompiled
    def purify(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """Purified images of images (N, C, H, W): (N * samples, C, H, W), the samples of each image one after the other.

        With D defenses: (N * D * samples, C, H, W); for each image the samples of the first defense, of the second, and so on.

        Raises:
            TypeError, ValueError: see :meth:`forward`; or the defenses return images of different sizes.
        """
        self._check(images)
        defenses, first = self._defenses(), _checks.indices(index, len(images))
        images = clipped(images) if self.clip else images
        purified = []
        for d, defense in enumerate(defenses):
            indices = [(i * len(defenses) + d) * self.samples + k for i in first for k in range(self.samples)]
            with _checks.rows_are([row // self.samples for row in range(len(indices))]):
                purified.append(self._purify(defense, images.repeat_interleave(self.samples, 0), indices))
        if len(purified) == 1:
            return purified[0]
        sizes = [tuple(each.shape[1:]) for each in purified]
        if len(set(sizes)) > 1:
            raise ValueError(f"expected defenses that return images of one size (C, H, W), got {sizes}")
        return torch.stack([each.unflatten(0, (len(images), self.samples)) for each in purified], 1).flatten(0, 2)

    def _purify(self, defense: Defense, own: Tensor, indices: list[int]) -> Tensor:
        def defend(batch: Tensor) -> Tensor:
            return _checks.purified(applied(defense, batch, indices), batch)

        return straight_through(own, defend) if self.gradient == "straight_through" else defend(own)

    def _defenses(self) -> Sequence[Defense]:
        return list(self.defense) if isinstance(self.defense, nn.ModuleList) else [self.defense]

    def classify(self, purified: Tensor) -> Tensor:
        """Logits (N, classes) of the purified images of :meth:`purify`: views, normalisation, target, average."""
        # one view after the other: all four at once would need four times the target's memory
        copies = len(self._defenses()) * self.samples
        if len(purified) % copies:
            raise ValueError(f"expected {copies} purified images for each image, got {len(purified)} images")
        logits = [self._logits(view) for view in self._views(purified)]
        averaged = average(logits, copies)
        self._check_finite(torch.stack(logits), copies)  # at the end, so that the compiled part is one graph
        return averaged

    def _views(self, purified: Tensor) -> Sequence[Tensor]:
        return shifted(purified, shift_for(*purified.shape[-2:]) if self.shift is None else self.shift)

    def _logits(self, view: Tensor) -> Tensor:
        """The target's logits of a view. Views and logits are copies, because normalisation and target may work in place."""
        own = view.clone()
        if self.normalize is not None:
            own = self.normalize(own)
            if not isinstance(own, Tensor):
                raise TypeError(f"expected normalize to return a tensor, got {type(own).__name__}")
        output = self.target(own)
        return _checks.logits(output, len(view)).clone()

    @uncompiled
    def _check_finite(self, logits: Tensor, copies: int) -> None:
        with _checks.rows_are([row // copies for row in range(logits.shape[1])]):
            _checks.finite(logits)

    def _check(self, images: Any) -> None:
        _checks.eager(images)
        if isinstance(images, Tensor):
            _checks.not_nested(images)
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"expected a batch of images (N, C, H, W), got {got}")
        if not images.is_floating_point():
            raise TypeError(f"expected floating-point images in [0, 1], got {images.dtype}; use images.float() / 255 for uint8")
        if self.shift is not None and self.shift >= min(images.shape[-2:]):
            raise ValueError(f"shift must be less than the sides of the images, {tuple(images.shape[-2:])}, got {self.shift}")

    def extra_repr(self) -> str:
        """Arguments that are not submodules."""
        clip = ", clip=True" if self.clip else ""
        return f"samples={self.samples}, shift={self.shift}{clip}, gradient={self.gradient!r}"


def _one_or_list(defense: Any) -> Any:
    """The defense, or the ModuleList of several defenses."""
    if isinstance(defense, (list, tuple, nn.ModuleList)):
        kinds = [type(each).__name__ for each in defense]
        if not defense or not all(isinstance(each, nn.Module) for each in defense):
            raise TypeError(
                f"a list of defenses must have torch.nn.Modules, at least one, got {kinds}; wrap a function in "
                "torchvision.transforms.v2.Lambda"
            )
        return nn.ModuleList(defense)
    if not callable(defense):
        raise TypeError(f"defense must be callable, a list of modules or None, got {type(defense).__name__}")
    if isinstance(defense, type):
        raise TypeError(f"defense must be an object, got the class {defense.__name__}; give {defense.__name__}(...)")
    return defense


def shifted(images: Tensor, shift: int) -> Sequence[Tensor]:
    """Four views of images (N, C, H, W), of the same shape: shifted by ``shift`` pixels towards each of the four corners.

    Reflection fills the border. The views are the corner crops of torchvision's ``five_crop`` of the padded images. The centre
    crop is left out: it is the image that an attack was computed for. With ``shift=0``, the images are the only view.
    """
    if shift == 0:
        return [images]
    if shift >= min(images.shape[-2:]):
        raise ValueError(f"shift must be less than the sides of the purified images, {tuple(images.shape[-2:])}, got {shift}")
    padded = tvf.pad(images, [shift], padding_mode="reflect")
    return tvf.five_crop(padded, list(images.shape[-2:]))[:CORNERS]


def average(logits: Sequence[Tensor], samples: int) -> Tensor:
    """The log of the class probabilities averaged over views and samples, (N, classes); the logits if there is one of both.

    ``logits``: (N * samples, classes) for each view, the samples of an image one after the other.
    """
    if len(logits) == samples == 1:
        return logits[0]
    every = torch.stack(list(logits)).log_softmax(-1).unflatten(1, (len(logits[0]) // samples, samples))
    return every.logsumexp((0, 2)) - math.log(len(logits) * samples)


def applied(function: Callable[..., Tensor], images: Tensor, index: Any) -> Tensor:
    """A defense or a model on images, with ``index`` for their random streams where it takes that keyword.

    ``torch.nn.Sequential`` and torchvision's ``Compose`` have no such keyword: their parts get it, see :func:`in_sequence`.
    Hooks of the container don't run then.
    """
    if not _takes_index(function):
        return function(images)
    parts = parts_of(function)
    return in_sequence(parts, images, index) if parts else function(images, index=index)


def in_sequence(parts: Sequence[Callable[..., Tensor]], images: Tensor, index: Any) -> Tensor:
    """Defenses or models one after the other on images.

    Number d of D gets stream ``index * D + d`` of each image, so that two defenses of one seed draw different numbers.
    """
    first = _checks.indices(index, len(images))
    for d, part in enumerate(parts):
        images = applied(part, images, [i * len(parts) + d for i in first])
    return images


def parts_of(function: Any) -> Sequence[Callable[..., Tensor]]:
    """What ``torch.nn.Sequential`` and torchvision's ``Compose`` and ``Lambda`` apply in sequence; of anything else nothing."""
    inner = unwrapped(function)
    if type(inner) is nn.Sequential:
        return list(inner)
    if type(inner) is v1.Lambda or (type(inner) is v2.Lambda and inner.types == (object,)):
        return [inner.lambd]
    return list(inner.transforms) if type(inner) in (v1.Compose, v2.Compose) else ()


def in_timm(timm: Any, name: str) -> bool:
    """Whether timm has a model of this name, or is told where to find it: ``hf-hub:...``, ``local-dir:...``."""
    return ":" in name or timm.is_model(name)


def unwrapped(function: Any) -> Any:
    """What functools.partial and torch.compile wrap; their own signature is ``(*args, **kwargs)``."""
    while isinstance(function, functools.partial):
        function = function.func
    return _uncompiled(function)


def _uncompiled(function: Any) -> Any:
    """What torch.compile wraps: a module, or a function."""
    return getattr(function, "_orig_mod", getattr(function, "_torchdynamo_orig_callable", function))


def _takes_index(function: Any) -> bool:
    if parts := parts_of(function):
        return any(map(_takes_index, parts))
    function = _uncompiled(function)
    if isinstance(function, functools.partial):
        return "index" not in function.keywords and _takes_index(function.func)
    function = unwrapped(function)
    call = function.forward if isinstance(function, nn.Module) else function
    try:
        return "index" in inspect.signature(call).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _from_undefended_target(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a checkpoint without any of the target's names in this module as a checkpoint of the undefended target."""
    undefended = {f"{prefix}target.{name}": prefix + name for name in module.get_submodule("target").state_dict()}
    if sum(name in state_dict for name in undefended) < sum(old in state_dict for old in undefended.values()):
        moved = {name: state_dict.pop(old) for name, old in undefended.items() if old in state_dict}
        state_dict.update(moved)  # all at once: the target may have a target itself
        targets = {id(value): f"{prefix}target.{name}" for name, value in _values(module.get_submodule("target"))}
        for name, value in _values(module):  # a defense may share the target's
            if prefix + name not in undefended and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.get(targets.get(id(value), ""), value)


def _values(module: nn.Module) -> list[tuple[str, Any]]:
    return list(module.state_dict(keep_vars=True).items())


def _classifier(model: str | WeightsEnum) -> tuple[Any, str]:
    """The weights and the builder's name, from either of them."""
    names = torchvision.models.list_models(module=torchvision.models)
    if isinstance(model, WeightsEnum):
        builder = next((name for name in names if type(model) is torchvision.models.get_model_weights(name)), None)
        if builder is None:
            raise ValueError(f"{model} are not the weights of a torchvision classifier")
        return model, builder
    if isinstance(model, str) and "." in model:
        try:
            weights = torchvision.models.get_weight(model)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"torchvision has no weights {model!r}") from error
        return _classifier(weights)
    if model not in names:
        raise ValueError(f"expected a torchvision classifier such as 'resnet50' or its weights, got {model!r}")
    return torchvision.models.get_model_weights(model)["DEFAULT"], model
