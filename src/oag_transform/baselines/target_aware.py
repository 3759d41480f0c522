"""Defenses that use the gradient of the target. They are not portable: each is made for one classifier.

The anti-adversary layer is a known negative example. The contract is that of :mod:`oag_transform.baselines.filters`. Nothing is
random, and a result depends on its batch by rounding only. Both defenses take steps along the sign of a gradient. The sign has
derivative zero, so their own gradient is the identity, also where values are clipped.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..straight_through import straight_through
from ._batches import kornia, with_gradients
from .base import Baseline


class AntiAdversary(Baseline):
    """The anti-adversary layer (Alfarra et al., AAAI 2022): steps that raise the target's confidence in its prediction.

    A known negative example. A misclassified adversarial image is misclassified with more confidence. Attacks computed on the
    undefended target, or with the straight-through gradient, succeed as often as without the layer (Croce et al., ICML 2022).

    Defaults are those of the authors' code for CIFAR-10 with a classifier without normalisation. That code leaves values
    outside [0, 1]; here the result is clipped.

    Args:
        target: classifier of images in [0, 1], (N, C, H, W) -> logits (N, classes), normalisation included.
        alpha: size of a step, for values in [0, 1].
        steps: number of steps.
    """

    own_gradient = True

    def __init__(self, target: nn.Module, alpha: float = 0.15, *, steps: int = 2) -> None:
        super().__init__()
        self.target = _target(target)
        self.alpha = _checks.number("alpha", alpha, at_least=0)
        self.steps = _checks.integer("steps", steps)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return straight_through(batch, self._moved) if len(batch) else batch

    def _moved(self, images: Tensor) -> Tensor:
        with with_gradients():
            moved = images.clone()
            labels = self._logits(images).argmax(1)
            for _ in range(self.steps):
                moved = moved.detach().requires_grad_()
                loss = F.cross_entropy(self._logits(moved), labels, reduction="sum")
                moved = moved - self.alpha * torch.autograd.grad(loss, moved)[0].sign()
            return moved.detach().clamp(0, 1)

    def _logits(self, images: Tensor) -> Tensor:
        return _wide(_checks.logits(_shown(self.target, images), len(images)))


class ZeroPur(Baseline):
    """ZeroPur (Liu et al., arXiv 2406.03143): a shift of the image guided by the target's features of its blurred copy.

    Guided shift: steps with momentum decrease the angle between the embeddings of the image and of its blurred copy. The
    embedding is the input of the target's last linear layer. Adaptive projection: starting from the input again, steps increase
    the inner product of the change of intermediate features with that of the guided shift, against a perceptual distance to the
    input. As in the authors' code (erhul/ZeroPur), whose settings are the defaults, these are the features of the target's last
    two stages, here the last two resolutions. The distance is that of these features, normalised over channels; the code uses
    more stages for it. Steps follow the sign of the gradient, and are clipped to ``epsilon`` around the input.

    Args:
        target: classifier of images in [0, 1], (N, C, H, W) -> logits (N, classes), normalisation included. It needs a
            linear layer and features of more than one pixel.
        epsilon: largest change of a value, in grey levels (0 to 255).
        sigma: standard deviation of the Gaussian blur in pixels.
        shift_steps: steps of the guided shift.
        projection_steps: steps of the adaptive projection.
        projection: weight of the inner product (lambda_1) against the perceptual distance, whose weight is 1.

    Raises:
        ModuleNotFoundError: kornia is missing.
    """

    own_gradient = True

    def __init__(
        self,
        target: nn.Module,
        epsilon: float = 10.0,
        *,
        sigma: float = 1.8,
        shift_steps: int = 10,
        projection_steps: int = 50,
        projection: float = 1e-4,
    ) -> None:
        super().__init__()
        self.target = _target(target)
        if not any(isinstance(module, nn.Linear) for module in target.modules()):
            raise ValueError("target must have a linear layer, whose input is the embedding; it has none")
        self.epsilon = _checks.number("epsilon", epsilon, at_least=0)
        self.sigma = _checks.number("sigma", sigma, above=0)
        self.shift_steps = _checks.integer("shift_steps", shift_steps, at_least=1)
        self.projection_steps = _checks.integer("projection_steps", projection_steps)
        self.projection = _checks.number("projection", projection, at_least=0)
        kornia("filters", "ZeroPur")  # errors come before any work

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return straight_through(batch, self._purified) if len(batch) else batch

    def _purified(self, images: Tensor) -> Tensor:
        with with_gradients():
            images = images.clone()
            shifted = self._shifted(images)
            return self._projected(images, shifted) if self.projection_steps else shifted

    def _shifted(self, images: Tensor) -> Tensor:
        moved, momentum = images, torch.zeros_like(images)
        for _ in range(self.shift_steps):
            moved = moved.detach().requires_grad_()
            with torch.no_grad():
                blurred = self._features(self._blurred(moved))[0]
            loss = -F.cosine_similarity(self._features(moved)[0], blurred).sum()
            (slope,) = torch.autograd.grad(loss, moved)
            momentum = momentum + slope / slope.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-30)
            moved = self._step(images, moved, momentum, self.shift_steps)
        return moved

    def _projected(self, images: Tensor, shifted: Tensor) -> Tensor:
        with torch.no_grad():
            start, end = self._features(images)[1], self._features(shifted)[1]
        moved = images
        for _ in range(self.projection_steps):
            moved = moved.detach().requires_grad_()
            now = self._features(moved)[1]
            along = sum(((b - a) * (c - a)).sum() for a, b, c in zip(start, end, now, strict=True))
            loss = perceptual_distance(now, start).sum() - self.projection * along
            moved = self._step(images, moved, torch.autograd.grad(loss, moved)[0], self.projection_steps)
        return moved

    def _step(self, images: Tensor, moved: Tensor, slope: Tensor, steps: int) -> Tensor:
        reach = self.epsilon / 255
        down = moved.detach() - reach / steps * slope.sign()
        return torch.minimum(torch.maximum(down, images - reach), images + reach).clamp(0, 1)

    def _blurred(self, images: Tensor) -> Tensor:
        size = 2 * int(4 * self.sigma + 0.5) + 1
        filters = kornia("filters", "ZeroPur")
        return filters.gaussian_blur2d(images, (size, size), images.new_full((1, 2), self.sigma), border_type="replicate")

    def _features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The input of the last linear layer, and the features at the last two resolutions."""
        maps: dict[torch.Size, Tensor] = {}
        embedding, own = images, threading.get_ident()

        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal embedding
            if threading.get_ident() != own:  # the target serves another thread too
                return
            if isinstance(module, nn.Linear):
                embedding = inputs[0].flatten(1)
            elif isinstance(output, Tensor) and output.ndim == 4 and output.shape[-2:].numel() > 1:
                maps[output.shape[-2:]] = output  # the last module at this resolution counts

        hooks = [module.register_forward_hook(see) for module in self.target.modules()]
        try:
            _shown(self.target, images)
        finally:
            for hook in hooks:
                hook.remove()
        if not maps:
            raise ValueError("target must have features of more than one pixel (N, C, H, W); it has none")
        return _wide(embedding), [_wide(each) for each in maps.values()][-2:]


def perceptual_distance(features: list[Tensor], others: list[Tensor]) -> Tensor:
    """LPIPS without learned weights (Zhang et al. 2018; Laidlaw et al. 2021): (N,) from lists of features (N, C, H, W)."""
    differences = [
        ((F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)) / a.shape[-2:].numel() ** 0.5).flatten(1)
        for a, b in zip(features, others, strict=True)
    ]
    # the root has no finite slope at 0, where the first step starts
    return (torch.cat(differences, 1).square().sum(1) + 1e-12).sqrt()


def _shown(target: nn.Module, images: Tensor) -> Any:
    """What a target returns for a copy of the images in its own precision: it may work in place."""
    parameter = next(target.parameters(), images)
    return target(images.to(parameter.dtype if parameter.is_floating_point() else images.dtype, copy=True))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _target(target: Any) -> nn.Module:
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module, got {type(target).__name__}")
    return target
