"""Projected gradient descent in expectation over the draws of a defense, its losses, bounds and random streams.

It is written here, as no library has it with momentum, draws in sequence and a choice of basis. The model decides what is
differentiated: the identity in place of the defense with ``gradient="straight_through"`` (BPDA), the defense itself with
``gradient="own"``, and OAG's exact gradient by :mod:`.unrolled`. Nothing is rounded to 8 bits, which would undo small L2
perturbations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, streams
from ...baselines._batches import with_gradients
from ...defended import CORNERS, DefendedModel
from ..options import LEAST_BOUND
from .unrolled import check_model, settings_of

Norm = Literal["linf", "l2"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, classes), labels (N,)) -> (N,), which the attack raises."""

Streams = Callable[[int, int], int]
"""(image, number of the draw) -> the random stream of the defense in that draw."""

Basis = Literal["pixels", "gray", "smooth"]
"""Perturbations that are free, the same in all channels, or interpolated bilinearly from a grid of :data:`CELL` pixels."""

CELL = 8


@dataclass(frozen=True)
class Bound:
    """How far an attacked image may lie from the original: L-infinity or L2 norm, on the [0, 1] scale.

    Attributes:
        norm: ``"linf"`` or ``"l2"``, over all pixels and channels of an image.
        eps: at least 1e-6, in L-infinity at most 1; n grey levels are n / 255.

    Raises:
        ValueError: the norm is another, or the bound isn't finite or is out of its range.
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        _checks.choice("norm", self.norm, ("linf", "l2"))
        object.__setattr__(self, "eps", _checks.number("eps", self.eps, at_least=LEAST_BOUND))
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"eps must be at most 1 in L-infinity, on the [0, 1] scale, got {self.eps}; give 8 grey levels as 8 / 255"
            )

    def __str__(self) -> str:
        return f"L∞ {255 * self.eps:g}/255" if self.norm == "linf" else f"L2 {self.eps:g}"

    def projected(self, perturbation: Tensor) -> Tensor:
        """The perturbation (N, ...) projected onto the bound's ball."""
        if self.norm == "linf":
            return perturbation.clamp(-self.eps, self.eps)
        return perturbation * _per_image((self.eps / _length(perturbation).clamp(min=1e-30)).clamp(max=1), perturbation)

    def step(self, direction: Tensor, size: float) -> Tensor:
        """The step of length ``size`` in this norm along which a function of gradient ``direction`` (N, ...) rises most."""
        if self.norm == "linf":
            return size * direction.sign()
        return size * direction / _per_image(_length(direction).clamp(min=1e-30), direction)

    def apply(self, images: Tensor, perturbation: Tensor) -> Tensor:
        """Images (N, C, H, W) with the projected perturbation, clipped to [0, 1], which moves no value further away."""
        return (images + self.projected(perturbation)).clamp(0, 1)


class AttackResult(NamedTuple):
    """What an attack found.

    Attributes:
        images: (N, C, H, W) in [0, 1], within the bound.
        losses: (steps, N), what the attacker saw along the way; (0, N) where an attack doesn't show it.
        gradients: (N,) Euclidean length of the first gradient; empty where there is none.
        fell_back: the attack asked for another gradient than BPDA's, and the defense has none.
    """

    images: Tensor
    losses: Tensor
    gradients: Tensor
    fell_back: bool = False


def check(model: Any, images: Any, labels: Any) -> Tensor:
    """The labels as int64. Raise unless an attack can be run on these.

    Raises:
        TypeError: the model isn't a :class:`~oag_transform.DefendedModel`, or the labels aren't integers.
        ValueError: the images aren't (N, C, H, W) in [0, 1], or there isn't one label of at least 0 for each.
    """
    check_model(model)
    _checks.batch(images)
    return _checks.labels(labels, len(images))


def check_bound(bound: Any) -> None:
    """Raise unless ``bound`` is a :class:`Bound`.

    Raises:
        TypeError: it isn't.
    """
    if not isinstance(bound, Bound):
        raise TypeError(f"bound must be a Bound, such as Bound('linf', 4 / 255), got {bound!r}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the right class."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the right one (Carlini & Wagner 2017): above 0 where the image is misclassified."""
    return wrong(logits, labels).amax(1) - logits.gather(1, labels[:, None])[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020): the margin over that of the first and third class; needs 3 classes.

    It is constant where the right class comes third: the image is misclassified there.
    """
    ordered = logits.sort(1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2]).clamp(min=1e-12)


def unknown(image: int, draw: int) -> int:
    """Streams of an attacker who doesn't know the defender's: no two draws, and no two images, share one."""
    return (image + 1 << 32) + draw


def known(image: int, draw: int) -> int:
    """Streams of an attacker who knows the defender's seed and index: image i has stream i, in each draw."""
    return image


class OneView(DefendedModel):
    """A model that shows its target one view at a time, the next one in each call: a gradient costs one pass, not four.

    Over four calls the mean is that of the four views. Its logits are those of a single view: it is for gradients, not for
    accuracies.
    """

    calls = 0

    @classmethod
    def of(cls, model: DefendedModel) -> "OneView":
        """The same model, one view at a time."""
        return cls(model.target, model.defense, **settings_of(model))

    def _views(self, purified: Tensor) -> Sequence[Tensor]:
        views = super()._views(purified)
        view = views[self.calls % len(views)]
        self.calls += 1
        return [view]


def gradient(
    model: DefendedModel,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    indices: Sequence[Sequence[int]],
    *,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss (N,) and its gradient (N, C, H, W) over several draws (EOT), which are in memory one at a time.

    Over draws the cross entropy is -log of the mean probability (Salman et al. 2019). Any other loss is the mean of the draws:
    a margin of logits differs so much between them that in the former few draws would have all the weight.

    Args:
        model: what is attacked.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) the right classes.
        loss: see :data:`Loss`.
        indices: the streams (N) of the images for each draw.
        deterministic: all draws of the defense are equal, so it runs once. The passes of the target, which may differ in their
            view, are then all in memory.
    """
    if deterministic:
        point = images.detach().requires_grad_()
        with torch.enable_grad():
            purified = model.purify(point, index=list(indices[0]))
            logits = [model.classify(purified) for _ in indices]
            _checks.labels(labels, len(images), logits[0].shape[1])
            mean_loss = _over_draws(torch.stack([loss(each, labels) for each in logits]), loss)
            (slope,) = torch.autograd.grad(mean_loss.sum(), point)
        return mean_loss.detach(), slope
    losses, gradients = [], []
    for draw in indices:
        point = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(point, index=list(draw))
            _checks.labels(labels, len(images), logits.shape[1])
            each = loss(logits, labels)
            (slope,) = torch.autograd.grad(each.sum(), point)
        losses.append(each.detach())
        gradients.append(slope)
    stacked = torch.stack(losses).requires_grad_()
    with torch.enable_grad():
        mean_loss = _over_draws(stacked, loss)
        (weights,) = torch.autograd.grad(mean_loss.sum(), stacked)
    mean = torch.stack([_per_image(weight, slope) * slope for weight, slope in zip(weights, gradients, strict=True)]).sum(0)
    return mean_loss.detach(), mean


def _over_draws(losses: Tensor, loss: Loss) -> Tensor:
    """The loss (N,) of several draws (k, N), see :func:`gradient`."""
    return math.log(len(losses)) - (-losses).logsumexp(0) if loss is cross_entropy else losses.mean(0)


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent with momentum (Madry et al. 2018, Dong et al. 2018) in expectation over draws (EOT).

    With the default step it starts at 0.3 of the bound and is halved after 40% and 75% of the steps. Its result is the last
    point; of a deterministic defense, if each gradient is of all its views, the point of the highest loss.

    Attributes:
        bound: see :class:`Bound`.
        steps: number of gradients, each of ``draws`` draws.
        draws: of the defense for each gradient (k of EOT).
        deterministic: see :func:`gradient`.
        loss: see :data:`Loss`.
        streams: see :data:`Streams`; :func:`known` with ``draws=1`` for known randomness.
        random_start: a random point on the bound, of this seed; None: the images themselves, or ``start``.
        decay: of the momentum.
        step_size: of the first step, as a share of the bound.
        halvings: shares of the steps after which the step size is halved.
        basis: see :data:`Basis`.
    """

    bound: Bound
    steps: int = 40
    draws: int = 4
    deterministic: bool = False
    loss: Loss = cross_entropy
    streams: Streams = unknown
    random_start: int | None = None
    decay: float = 0.75
    step_size: float = 0.3
    halvings: tuple[float, ...] = (0.4, 0.75)
    basis: Basis = "pixels"

    def __post_init__(self) -> None:
        check_bound(self.bound)
        _checks.integer("steps", self.steps, at_least=1)
        _checks.integer("draws", self.draws, at_least=1)
        _checks.choice("basis", self.basis, get_args(Basis))
        _checks.flag("deterministic", self.deterministic)
        _checks.number("decay", self.decay, at_least=0)
        _checks.number("step_size", self.step_size, above=0)
        _checks.seed(self.random_start)
        for share in self.halvings:
            _checks.number("halvings (shares of the steps)", share, at_least=0, at_most=1)
        if not callable(self.loss):
            raise TypeError(f"loss must be a function such as pgd.margin, got {self.loss!r}")

    def __call__(self, model: DefendedModel, images: Tensor, labels: Tensor, *, start: Tensor | None = None) -> AttackResult:
        """Attacked images within the bound.

        Args:
            model: what is attacked.
            images: (N, C, H, W) floating point in [0, 1].
            labels: (N,) the right classes.
            start: points (N, C, H, W) in [0, 1] to start from; in the basis of pixels only.

        Raises:
            TypeError, ValueError: see :func:`check`; a label that the model has no class for; or a bad ``start``.
        """
        labels = check(model, images, labels)
        if start is not None:
            if self.basis != "pixels":
                raise ValueError(f"start needs the basis of pixels, got {self.basis!r}")
            if not isinstance(start, Tensor) or start.shape != images.shape:
                got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
                raise ValueError(f"start must be a tensor of the shape of the images, {tuple(images.shape)}, got {got}")
            _checks.batch(start)
            start = start.detach().to(images, copy=True)
        with with_gradients():  # also in inference mode, whose tensors have none
            return self._attack(model, images.detach().clone(), labels.clone(), start)

    def _attack(self, model: DefendedModel, images: Tensor, labels: Tensor, start: Tensor | None) -> AttackResult:
        parameters = self._zeros(images)
        if self.random_start is not None:
            own = [self.streams(i, 0) for i in range(len(images))]  # of the image, wherever it is in its batch
            streams.fill_normal(parameters, streams.generators(self.random_start, own, images.device))
            parameters = self.bound.step(parameters, self.bound.eps)
        if start is not None:
            parameters = parameters + (start - images)
        momentum, losses, lengths = torch.zeros_like(parameters), list[Tensor](), torch.zeros(0)
        best, highest = images, images.new_full((len(images),), -math.inf)
        # losses of different views can't be compared
        comparable = self.deterministic and not (isinstance(model, OneView) and self.draws % CORNERS)
        for step in range(self.steps):
            point = self.bound.apply(images, self._perturbation(parameters, images))
            indices = [[self.streams(i, step * self.draws + draw) for i in range(len(images))] for draw in range(self.draws)]
            loss, slope = gradient(model, point, labels, self.loss, indices, deterministic=self.deterministic)
            if step == 0:
                lengths = _length(slope)
            if comparable:
                best, highest = _higher(best, highest, point, loss)
            slope = self._pulled_back(slope, parameters, images)
            momentum = self.decay * momentum + slope / _per_image(slope.abs().flatten(1).mean(1), slope).clamp(min=1e-30)
            size = self.step_size / 2 ** sum(step >= share * self.steps for share in self.halvings)
            parameters = self._within(parameters + self.bound.step(momentum, self.bound.eps * size), images)
            losses.append(loss)
        found = self.bound.apply(images, self._perturbation(parameters, images))
        if comparable:
            loss, _ = gradient(model, found, labels, self.loss, indices, deterministic=True)
            found, _ = _higher(best, highest, found, loss)
        return AttackResult(found, torch.stack(losses), lengths)

    def _zeros(self, images: Tensor) -> Tensor:
        """The parameters of no perturbation."""
        if self.basis == "smooth":
            height, width = (math.ceil(side / CELL) for side in images.shape[2:])
            return images.new_zeros(*images.shape[:2], height, width)
        return torch.zeros_like(images if self.basis == "pixels" else images[:, :1])

    def _perturbation(self, parameters: Tensor, images: Tensor) -> Tensor:
        """(N, C, H, W), a linear function of the parameters that has no larger values than they have."""
        if self.basis == "smooth":
            return F.interpolate(parameters, images.shape[2:], mode="bilinear", align_corners=False)
        return parameters if self.basis == "pixels" else parameters.expand_as(images)

    def _pulled_back(self, slope: Tensor, parameters: Tensor, images: Tensor) -> Tensor:
        """The gradient (N, C, H, W) as one with respect to the parameters."""
        point = parameters.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self._perturbation(point, images), point, slope)[0]

    def _within(self, parameters: Tensor, images: Tensor) -> Tensor:
        if self.basis == "pixels":
            return self.bound.apply(images, parameters) - images  # nothing is kept beyond black and white either
        if self.bound.norm == "linf":
            return self.bound.projected(parameters)
        length = _length(self._perturbation(parameters, images))
        return parameters * _per_image((self.bound.eps / length.clamp(min=1e-30)).clamp(max=1), parameters)


def _higher(points: Tensor, losses: Tensor, others: Tensor, other_losses: Tensor) -> tuple[Tensor, Tensor]:
    """Of two points (N, C, H, W) of each image that with the higher loss (N,), and that loss."""
    better = other_losses > losses
    return torch.where(_per_image(better, points), others, points), torch.where(better, other_losses, losses)


def wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits (N, classes) with -infinity for the right class."""
    return logits.scatter(1, labels[:, None], -math.inf)


def _length(values: Tensor) -> Tensor:
    """(N,) Euclidean lengths of (N, ...)."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) values, to be multiplied with ``like`` (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
