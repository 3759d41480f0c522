"""A target classifier behind the transform."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.transforms.v2 import Normalize
from torchvision.transforms.v2 import functional as tvf

from .transform import OnlineAlternateGenerator, check_natural

SHIFT = 5
"""Default shift of the views: of 3, 5 and 7 pixels the largest that cost nothing on clean and noisy 224 x 224 photographs."""


class DefendedModel(nn.Module):
    """A classifier that purifies its input: image in [0, 1] -> defense -> four shifted views -> normalize -> target.

    The views move the purified image by a few pixels, off the grid of strides and pixels that a perturbation was computed for;
    their class probabilities are averaged. A gray-box attack loses much of what is left of it that way, at the cost of four
    passes of the target for each image; one that was computed over the same views loses nothing. See :func:`shifted`.

    The target's parameters, training mode and gradient flags are left as they are; it is a submodule, so that ``.to()``,
    ``.eval()`` and ``parameters()`` reach it as in any module. With the default defense, gradients pass straight through
    the purification to the images (BPDA).

    Args:
        target: any classifier (N, C, H, W) -> logits (N, classes).
        defense: a batch transform on [0, 1] images; default ``OnlineAlternateGenerator()``.
        normalize: what the target wants done to a [0, 1] image, e.g. ``torchvision.transforms.Normalize(mean, std)``.
            ``None`` where the target takes [0, 1] images.
        samples: number k of independent purifications whose class probabilities are averaged: k times the cost, for a
            point of accuracy at most with the default defense. 1 where the defense isn't random.
        shift: pixels by which each of the four views is moved, up or down and left or right; less than the image's sides.
            An odd number lies off the grid of every even stride. 0: the purified image itself is the only view. The default
            is meant for images of about 224 pixels.

    Returns (forward):
        (N, classes): the target's own logits for ``samples=1, shift=0``; for more, the logarithm of the averaged
        probabilities (they are logits too: their softmax is the average).

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
        defense: Callable[[Tensor], Tensor] | None = None,
        *,
        normalize: Callable[[Tensor], Tensor] | None = None,
        samples: int = 1,
        shift: int = SHIFT,
    ) -> None:
        super().__init__()
        if not isinstance(target, nn.Module):
            raise TypeError(f"target must be a torch.nn.Module, got {type(target).__name__}")
        for name, value in (("defense", defense), ("normalize", normalize)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable or None, got {type(value).__name__}")
        check_natural("samples", samples, minimum=1)
        check_natural("shift", shift)
        self.target = target
        self.defense = OnlineAlternateGenerator() if defense is None else defense
        self.normalize = normalize
        self.samples = samples
        self.shift = shift
        self.training = target.training  # callers look at the wrapper: say what is true of the target

    @classmethod
    def from_torchvision(
        cls,
        model: str | WeightsEnum,
        defense: Callable[[Tensor], Tensor] | None = None,
        *,
        samples: int = 1,
        shift: int = SHIFT,
        progress: bool = True,
    ) -> "DefendedModel":
        """A pretrained torchvision classifier, in eval mode, with the normalisation its weights ask for.

        The images are to be resized and cropped before, e.g. to the ``crop_size`` of ``weights.transforms()``.

        Args:
            model: a builder's name (``"resnet50"``, with its default weights), the name of weights
                (``"ResNet50_Weights.IMAGENET1K_V2"``) or a member of a weights enum.
            defense: see the class.
            samples: see the class.
            shift: see the class.
            progress: show torchvision's download bar.

        Raises:
            ValueError: no classifier of that name in torchvision.
        """
        weights, builder = _classifier(model)
        preset = weights.transforms()
        target = torchvision.models.get_model(builder, weights=weights, progress=progress).eval()
        return cls(target, defense, normalize=Normalize(mean=preset.mean, std=preset.std), samples=samples, shift=shift)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) for images (N, C, H, W) in [0, 1]; see the class."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"expected a batch of images (N, C, H, W), got {got}")
        if self.shift >= min(images.shape[-2:]):
            raise ValueError(f"shift must be less than the sides of the images, {tuple(images.shape[-2:])}, got {self.shift}")
        # interleaved, so that the random stream of an image's k-th sample doesn't depend on the batch
        purified = self.defense(images.repeat_interleave(self.samples, 0) if self.samples > 1 else images)
        views = shifted(purified, self.shift)
        # one view after the other: four times the batch at once would be four times the target's memory
        logits = [self.target(view if self.normalize is None else self.normalize(view)) for view in views]
        return average(logits, self.samples)

    def extra_repr(self) -> str:
        """Arguments that are not submodules."""
        return f"samples={self.samples}, shift={self.shift}"


def shifted(images: Tensor, shift: int) -> Sequence[Tensor]:
    """Views of images (N, C, H, W), of the same shape: moved by ``shift`` pixels towards each of the four corners.

    What is missing at the border is filled by reflection: these are torchvision's ``five_crop`` of the padded images, but for
    the centre, which is the images themselves and what an attack was computed for. 0: the images are their only view.
    """
    if shift == 0:
        return [images]
    padded = tvf.pad(images, [shift], padding_mode="reflect")
    return tvf.five_crop(padded, list(images.shape[-2:]))[:4]


def average(logits: Sequence[Tensor], samples: int) -> Tensor:
    """Log of the class probabilities averaged over views and samples, (N, classes); the logits where there is one of both.

    ``logits``: (N * samples, classes) for each view, the samples of an image one after the other.
    """
    if len(logits) == samples == 1:
        return logits[0]
    every = torch.stack(list(logits)).log_softmax(-1).unflatten(1, (len(logits[0]) // samples, samples))
    return every.logsumexp((0, 2)) - math.log(len(logits) * samples)


def _classifier(model: str | WeightsEnum) -> tuple[Any, str]:
    """Weights and builder's name from either of them."""
    names = torchvision.models.list_models(module=torchvision.models)
    if isinstance(model, WeightsEnum):
        builder = next((name for name in names if type(model) is torchvision.models.get_model_weights(name)), None)
        if builder is None:
            raise ValueError(f"{model} are not the weights of a torchvision classifier")
        return model, builder
    if isinstance(model, str) and "." in model:
        return _classifier(torchvision.models.get_weight(model))
    if model not in names:
        raise ValueError(f"expected a torchvision classifier such as 'resnet50' or its weights, got {model!r}")
    return torchvision.models.get_model_weights(model)["DEFAULT"], model
