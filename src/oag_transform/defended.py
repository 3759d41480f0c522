"""A target classifier behind the transform."""

import math
from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.transforms.v2 import Normalize

from .transform import OnlineAlternateGenerator


class DefendedModel(nn.Module):
    """A classifier that purifies its input: image in [0, 1] -> defense -> normalize -> target.

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

    Returns (forward):
        (N, classes): the target's own logits for ``samples=1``; for more, the logarithm of the averaged probabilities
        (they are logits too: their softmax is the average).

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
    ) -> None:
        super().__init__()
        if not isinstance(target, nn.Module):
            raise TypeError(f"target must be a torch.nn.Module, got {type(target).__name__}")
        for name, value in (("defense", defense), ("normalize", normalize)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable or None, got {type(value).__name__}")
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ValueError(f"samples must be an integer >= 1, got {samples!r}")
        self.target = target
        self.defense = OnlineAlternateGenerator() if defense is None else defense
        self.normalize = normalize
        self.samples = samples
        self.training = target.training  # callers look at the wrapper: say what is true of the target

    @classmethod
    def from_torchvision(
        cls,
        model: str | WeightsEnum,
        defense: Callable[[Tensor], Tensor] | None = None,
        *,
        samples: int = 1,
        progress: bool = True,
    ) -> "DefendedModel":
        """A pretrained torchvision classifier, in eval mode, with the normalisation its weights ask for.

        The images are to be resized and cropped before, e.g. to the ``crop_size`` of ``weights.transforms()``.

        Args:
            model: a builder's name (``"resnet50"``, with its default weights), the name of weights
                (``"ResNet50_Weights.IMAGENET1K_V2"``) or a member of a weights enum.
            defense: see the class.
            samples: see the class.
            progress: show torchvision's download bar.

        Raises:
            ValueError: no classifier of that name in torchvision.
        """
        weights, builder = _classifier(model)
        preset = weights.transforms()
        target = torchvision.models.get_model(builder, weights=weights, progress=progress).eval()
        return cls(target, defense, normalize=Normalize(mean=preset.mean, std=preset.std), samples=samples)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) for images (N, C, H, W) in [0, 1]; see the class."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"expected a batch of images (N, C, H, W), got {got}")
        # interleaved, so that the random stream of an image's k-th sample doesn't depend on the batch
        purified = self.defense(images.repeat_interleave(self.samples, 0) if self.samples > 1 else images)
        logits: Tensor = self.target(purified if self.normalize is None else self.normalize(purified))
        return average(logits, self.samples)

    def extra_repr(self) -> str:
        """Arguments that are not submodules."""
        return f"samples={self.samples}"


def average(logits: Tensor, samples: int) -> Tensor:
    """Log of the class probabilities averaged over each ``samples`` rows of logits (N * samples, classes); 1: the logits."""
    if samples == 1:
        return logits
    return logits.log_softmax(-1).unflatten(0, (len(logits) // samples, samples)).logsumexp(1) - math.log(samples)


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
