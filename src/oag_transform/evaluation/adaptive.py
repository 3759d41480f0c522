"""Attacks by someone who knows the defense and attacks through it (Athalye et al. 2018, Tramer et al. 2020).

A defense that draws random numbers is attacked in expectation (EOT): each gradient is that of several draws. What is
differentiated in its place is a matter of the model: the identity where it has ``gradient="straight_through"`` (BPDA), the
defense itself with ``gradient="own"``, which :mod:`~oag_transform.evaluation.unrolled` makes of ours. Points that are found
here are judged again with fresh draws, see :mod:`~oag_transform.evaluation.adaptive_checks`; nothing is rounded to 8 bits,
which would undo small L2 perturbations.

PGD is ours, as no library has it with momentum, draws that are held one at a time in memory, and perturbations of a given kind.
APGD and Square are those of pyautoattack (extra ``adaptive``), HopSkipJump is foolbox's.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, streams
from ..defended import DefendedModel
from .measure import Candidate, Subject, model_key
from .store import Array
from .unrolled import differentiable, settings_of, unrolled

Norm = Literal["linf", "l2"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, classes), labels (N,)) -> (N,), which the attacker wants large."""

Streams = Callable[[int, int], int]
"""(image, number of the draw) -> the random stream of the defense that an attacker reckons with."""

Paint = Callable[[Tensor], Tensor]
"""A linear map from parameters to perturbations (N, C, H, W) that makes no value larger than the largest parameter."""


LEAST_BOUND = 1e-6
"""Smallest bound, on the [0, 1] scale: a smaller one is lost in the rounding of float32 pixels, which lie up to 6e-8 apart."""


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
        _checks.number("eps", self.eps, at_least=LEAST_BOUND)
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"eps must be at most 1 in L-infinity, on the [0, 1] scale, got {self.eps}; give 8 grey levels as 8 / 255"
            )

    def __str__(self) -> str:
        return f"L-infinity {255 * self.eps:g}/255" if self.norm == "linf" else f"L2 {self.eps:g}"

    def held(self, perturbation: Tensor) -> Tensor:
        """The perturbation (N, ...) brought within the bound."""
        if self.norm == "linf":
            return perturbation.clamp(-self.eps, self.eps)
        length = _each(torch.linalg.vector_norm(perturbation.flatten(1), dim=1), perturbation)
        return perturbation * (self.eps / length.clamp(min=1e-12)).clamp(max=1)

    def step(self, direction: Tensor, size: float) -> Tensor:
        """The step of length ``size`` in this norm along which a function of slope ``direction`` (N, ...) rises most."""
        if self.norm == "linf":
            return size * direction.sign()
        return size * direction / _each(torch.linalg.vector_norm(direction.flatten(1), dim=1), direction).clamp(min=1e-30)

    def apply(self, images: Tensor, perturbation: Tensor) -> Tensor:
        """Images (N, C, H, W) with the perturbation brought within the bound, held to [0, 1], which brings no value further."""
        return (images + self.held(perturbation)).clamp(0, 1)


class Found(NamedTuple):
    """What an attack found.

    Attributes:
        images: (N, C, H, W) in [0, 1], within the bound.
        losses: (steps, N), what the attacker saw along the way; empty where an attack doesn't show it.
        gradients: (N,) Euclidean length of the first gradient; empty where there is none.
    """

    images: Tensor
    losses: Tensor
    gradients: Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the right class."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the right one (Carlini & Wagner 2017): above 0 where the image is lost."""
    return _wrong(logits, labels).amax(1) - _right(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020): the margin over that of the first and third class; needs 3 classes.

    It is constant where the right class comes third: the image is lost there.
    """
    ordered = logits.sort(1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2]).clamp(min=1e-12)


def unknown(image: int, draw: int) -> int:
    """Streams of someone who doesn't know the defender's: no two draws, and no two images, share one."""
    return (image + 1 << 32) + draw


def known(image: int, draw: int) -> int:
    """Streams of someone who knows the defender's seed and index: image i has stream i, in each draw."""
    return image


class ViewsInTurn(DefendedModel):
    """A model that shows its target one view at a time, the next one in each call: its gradients cost a pass, not four.

    Over four calls the mean is that of the four views. For attackers: what it answers is not what the model would.
    """

    calls = 0

    def _views(self, purified: Tensor) -> Sequence[Tensor]:
        views = super()._views(purified)
        view = views[self.calls % len(views)]
        self.calls += 1
        return [view]


def in_turn(model: DefendedModel) -> DefendedModel:
    """The same model, :class:`ViewsInTurn`."""
    return ViewsInTurn(model.target, model.defense, **settings_of(model))


def gradient(
    model: DefendedModel, images: Tensor, labels: Tensor, loss: Loss, indices: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The loss (N,) and its gradient (N, C, H, W) over some draws, which are held in memory one at a time.

    The loss is ``-log(mean(exp(-loss)))`` over draws. Of the cross entropy that is -log of the mean probability (Salman et al.
    2019), and of any loss one in which draws count that still get the image right.

    Args:
        model: what is attacked.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) the right classes.
        loss: see :data:`Loss`.
        indices: the streams (N) of the images for each draw.
    """
    losses, gradients = [], []
    for draw in indices:
        point = images.detach().requires_grad_()
        with torch.enable_grad():
            each = loss(model(point, index=list(draw)), labels)
            (slope,) = torch.autograd.grad(each.sum(), point)
        losses.append(each.detach())
        gradients.append(slope)
    every = torch.stack(losses)
    weights = (-every).softmax(0)
    mean = torch.stack([_each(weight, slope) * slope for weight, slope in zip(weights, gradients, strict=True)]).sum(0)
    return math.log(len(every)) - (-every).logsumexp(0), mean


Painter = Callable[[Tensor], tuple[Tensor, Paint]]
"""Images -> parameters of no perturbation, and their :data:`Paint`."""


def freely(images: Tensor) -> tuple[Tensor, Paint]:
    """Any perturbation."""
    return torch.zeros_like(images), lambda parameters: parameters


def alike_in_channels(images: Tensor) -> tuple[Tensor, Paint]:
    """Perturbations that are the same in all channels: none of it is in hue, where the noise of an image is looked for."""
    return torch.zeros_like(images[:, :1]), lambda parameters: parameters.expand_as(images)


@dataclass(frozen=True)
class Smoothly:
    """Perturbations that are interpolated bilinearly from a grid of ``cell`` pixels: next to none of it looks like noise."""

    cell: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Paint]:
        """See :data:`Painter`."""
        count, channels, height, width = images.shape
        grid = images.new_zeros(count, channels, math.ceil(height / self.cell), math.ceil(width / self.cell))
        return grid, lambda parameters: F.interpolate(parameters, (height, width), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent with momentum (Madry et al. 2018, Dong et al. 2018) in expectation over draws (EOT).

    Steps start at ``reach`` of the bound and are halved after 40% and 75% of them. Its point is the last one.

    Attributes:
        bound: see :class:`Bound`.
        steps: number of gradients, each of ``draws`` draws.
        draws: of the defense for each gradient (k of EOT).
        loss: see :data:`Loss`.
        streams: see :data:`Streams`; :func:`known` with ``draws=1`` for known randomness.
        random_start: of this seed; None: from the images themselves, or from ``start``.
        decay: of the momentum.
        reach: first step, as a share of the bound.
        paint: what kind of perturbation: :func:`freely`, :func:`alike_in_channels` or :class:`Smoothly`.
    """

    bound: Bound
    steps: int = 40
    draws: int = 4
    loss: Loss = cross_entropy
    streams: Streams = unknown
    random_start: int | None = None
    decay: float = 0.75
    reach: float = 0.3
    paint: Painter = freely

    def __call__(self, model: DefendedModel, images: Tensor, labels: Tensor, *, start: Tensor | None = None) -> Found:
        """Attacked images within the bound.

        Args:
            model: what is attacked.
            images: (N, C, H, W) floating point in [0, 1].
            labels: (N,) the right classes.
            start: points (N, C, H, W) to start from, where the perturbation is free.

        Raises:
            ValueError: ``start`` where it is not.
        """
        parameters, paint = self.paint(images)
        if self.random_start is not None:
            streams.fill_normal(parameters, streams.generators(self.random_start, range(len(images)), images.device))
            parameters = self.bound.step(parameters, self.bound.eps)
        if start is not None:
            if parameters.shape != images.shape:
                raise ValueError(f"start is for free perturbations, got {self.paint!r}")
            parameters = parameters + (start - images)
        momentum, losses, lengths = torch.zeros_like(parameters), [], torch.zeros(0)
        for step in range(self.steps):
            point = self.bound.apply(images, paint(parameters))
            indices = [[self.streams(i, step * self.draws + draw) for i in range(len(images))] for draw in range(self.draws)]
            loss, slope = gradient(model, point, labels, self.loss, indices)
            if step == 0:
                lengths = torch.linalg.vector_norm(slope.flatten(1), dim=1)
            slope = _through(paint, parameters, slope)
            momentum = self.decay * momentum + slope / _each(slope.abs().flatten(1).mean(1), slope).clamp(min=1e-30)
            parameters = self._within(parameters + self.bound.step(momentum, self.bound.eps * self._size(step)), images, paint)
            losses.append(loss)
        return Found(self.bound.apply(images, paint(parameters)), torch.stack(losses), lengths)

    def _size(self, step: int) -> float:
        return self.reach / (1 if step < 0.4 * self.steps else 2 if step < 0.75 * self.steps else 4)

    def _within(self, parameters: Tensor, images: Tensor, paint: Paint) -> Tensor:
        if parameters.shape == images.shape:
            return self.bound.apply(images, parameters) - images  # nothing is kept beyond black and white either
        if self.bound.norm == "linf":
            return self.bound.held(parameters)
        length = torch.linalg.vector_norm(paint(parameters).flatten(1), dim=1)
        return parameters * _each((self.bound.eps / length.clamp(min=1e-12)).clamp(max=1), parameters)


@dataclass(frozen=True)
class APGD:
    """Auto-PGD (Croce & Hein 2020) of pyautoattack, image by image, on the mean over draws.

    Attributes:
        bound: see :class:`Bound`.
        steps: number of gradients.
        draws: of the defense for each gradient; they are all in memory at once.
        loss: ``"ce"``, ``"dlr"``, or ``"dlr-targeted"`` towards each of the ``targets`` likeliest wrong classes in turn.
        restarts: random starts, the first one among them.
        targets: see ``loss``.
        seed: of the random starts.
        streams: see :data:`Streams`.
    """

    bound: Bound
    steps: int = 100
    draws: int = 4
    loss: Literal["ce", "dlr", "dlr-targeted"] = "ce"
    restarts: int = 1
    targets: int = 3
    seed: int = 0
    streams: Streams = unknown

    def __call__(self, model: DefendedModel, images: Tensor, labels: Tensor) -> Found:
        """See :class:`PGD`."""
        found = [self._one(model, images[i : i + 1], labels[i : i + 1], i) for i in range(len(images))]
        return Found(self.bound.apply(images, torch.cat(found) - images), torch.empty(0, len(images)), torch.zeros(0))

    def _one(self, model: DefendedModel, image: Tensor, label: Tensor, row: int) -> Tensor:
        library = importlib.import_module("pyautoattack.autopgd_base")  # an extra of its own
        mean = averaged(model, row, self.draws, self.streams)
        norm = "Linf" if self.bound.norm == "linf" else "L2"
        settings: dict[str, Any] = {"norm": norm, "n_iter": self.steps, "eps": self.bound.eps, "device": image.device}
        with _kept_random_state(image.device):
            if self.loss != "dlr-targeted":
                attack = library.APGDAttack(mean, loss=self.loss, n_restarts=self.restarts, seed=self.seed, **settings)
                return attack.perturb(image, label, best_loss=True)
            attack = library.APGDAttack_targeted(mean, seed=self.seed, **settings)
            attack.init_hyperparam(image)
            torch.manual_seed(self.seed)
            best, highest = image, -math.inf
            with torch.no_grad():
                likeliest = _wrong(mean(image), label).topk(self.targets).indices[0]
            for target, _ in itertools.product(likeliest, range(self.restarts)):
                attack.y_target = target[None]
                # its perturb() stops at the first draw that is lost, and a random defense loses some
                point, _, loss, _ = attack.attack_single_run(image, label)
                if float(loss) > highest:
                    best, highest = point.detach(), float(loss)
            return best


@dataclass(frozen=True)
class Square:
    """Square attack (Andriushchenko et al. 2020) of pyautoattack: black box, on the mean over draws.

    Attributes:
        bound: see :class:`Bound`.
        queries: each of ``draws`` draws.
        draws: see :class:`PGD`.
        seed: of its squares.
        streams: see :data:`Streams`.
    """

    bound: Bound
    queries: int = 5000
    draws: int = 1
    seed: int = 0
    streams: Streams = unknown

    def __call__(self, model: DefendedModel, images: Tensor, labels: Tensor) -> Found:
        """See :class:`PGD`."""
        library = importlib.import_module("pyautoattack.square")  # an extra of its own
        norm = "Linf" if self.bound.norm == "linf" else "L2"
        found = []
        for row, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
            mean = averaged(model, row, self.draws, self.streams)
            attack = library.SquareAttack(mean, norm=norm, n_queries=self.queries, eps=self.bound.eps, seed=self.seed)
            attack.init_hyperparam(image)
            attack.margin_and_loss = _never_lost(attack.margin_and_loss)
            with _kept_random_state(image.device), torch.no_grad():
                torch.manual_seed(self.seed)
                # its perturb() gives the image itself back unless its one last draw is lost
                found.append(attack.attack_single_run(image, label)[1])
        return Found(self.bound.apply(images, torch.cat(found) - images), torch.empty(0, len(images)), torch.zeros(0))


@dataclass(frozen=True)
class HopSkipJump:
    """HopSkipJump (Chen et al. 2020) of foolbox: it sees decisions alone, those for one draw that doesn't change.

    It asks that what was lost stays lost, so it is shown the defense at one random stream an image.

    Attributes:
        bound: see :class:`Bound`; the smallest perturbation that it finds is brought within.
        steps: each of about 100 queries, more in later ones.
        queries: for the first step's gradient.
        streams: see :data:`Streams`.
    """

    bound: Bound
    steps: int = 10
    queries: int = 50
    streams: Streams = unknown

    def __call__(self, model: DefendedModel, images: Tensor, labels: Tensor) -> Found:
        """See :class:`PGD`. An image for which it finds no start stays as it is."""
        foolbox = importlib.import_module("foolbox")  # noisy to import
        attack = foolbox.attacks.HopSkipJumpAttack(
            steps=self.steps, initial_gradient_eval_steps=self.queries, constraint=self.bound.norm
        )
        found = []
        for row, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
            held = _Held(model, self.streams(row, 0))
            shown = foolbox.PyTorchModel(held.eval(), bounds=(0, 1), device=image.device)
            with _kept_random_state(image.device):
                torch.manual_seed(row)
                if int(held(image).argmax(1)) != int(label):
                    found.append(image)
                    continue
                try:
                    found.append(attack.run(shown, image, foolbox.criteria.Misclassification(label)))
                except ValueError:  # no start
                    found.append(image)
        return Found(self.bound.apply(images, torch.cat(found) - images), torch.empty(0, len(images)), torch.zeros(0))


@dataclass(frozen=True)
class ThroughDefense:
    """A threat of :class:`~oag_transform.evaluation.measure.Column`: each row is attacked through its own defense.

    Images are rounded to 8 bits, as files hold them: a bound of whole grey levels is kept, and small L2 perturbations are
    lost. A column asks the defense once; :mod:`~oag_transform.evaluation.adaptive_checks` asks it more often.

    Attributes:
        attack: :class:`PGD`, :class:`APGD`, :class:`Square` or :class:`HopSkipJump`.
        exact: through :func:`~oag_transform.evaluation.unrolled.unrolled`, where the defense then has a gradient; else as the
            row's model is differentiated, which is BPDA.
        known: the attacker knows the defender's seed and index; else another seed is attacked.
    """

    attack: "PGD | APGD | Square | HopSkipJump"
    exact: bool = False
    known: bool = False

    def __call__(self, subject: Subject, candidate: Candidate) -> Tensor:
        """(n, C, H, W) uint8: see :data:`~oag_transform.evaluation.measure.Threat`."""
        part = subject.first(candidate.count)
        model = candidate.model(part, seed=subject.seed if self.known else subject.seed + 1)
        if self.exact:
            own = unrolled(model)
            model = own if differentiable(own.defense, part.batch(part.images, range(1))) else model
        key = {
            "what": "through",
            "attack": [type(self.attack).__name__, self.known, *map(_name, vars(self.attack).values())],
        } | model_key(part, model)

        def compute(rows: range) -> Array:
            attack = replace(self.attack, streams=lambda image, _: rows[image]) if self.known else self.attack
            labels = part.labels[rows.start : rows.stop].to(subject.device)
            found = attack(model, part.batch(part.images, rows), labels)
            return (255 * found.images).round().to(torch.uint8).cpu().numpy()

        return torch.from_numpy(part.store.rows(key, (part.images, part.labels), compute, f"{candidate.label}: adaptive"))


def averaged(model: DefendedModel, row: int, draws: int, chosen: Streams) -> Callable[[Tensor], Tensor]:
    """Image ``row``'s model as a library wants it: (n, C, H, W) -> log of the mean probabilities of fresh draws."""
    counter: Iterator[int] = itertools.count()

    def mean(images: Tensor) -> Tensor:
        found = [model(images, index=[chosen(row, next(counter))] * len(images)).log_softmax(1) for _ in range(draws)]
        return torch.stack(found).logsumexp(0) - math.log(draws)

    return mean


def _never_lost(seen: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Square's loss, with a margin that doesn't end the search: a random defense loses a draw now and then."""

    def margin_and_loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        lost, loss = seen(images, labels)
        return torch.ones_like(lost), loss

    return margin_and_loss


class _Held(nn.Module):
    """The model at one random stream, whichever image it is given."""

    def __init__(self, model: DefendedModel, stream: int) -> None:
        super().__init__()
        self.model, self.stream = model, stream

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(image, index=self.stream) for image in images.split(1)])


def _name(value: Any) -> str:
    """What a store can tell a setting by: functions have an address in their repr."""
    return getattr(value, "__qualname__", repr(value))


def _through(paint: Paint, parameters: Tensor, slope: Tensor) -> Tensor:
    """The slope (N, C, H, W) as one of the parameters."""
    point = parameters.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(paint(point), point, slope)[0]


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0]


def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -math.inf)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(N,) values, to be multiplied with ``like`` (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _kept_random_state(device: torch.device) -> Any:
    """Libraries seed PyTorch's global generators: what the caller had is put back."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
