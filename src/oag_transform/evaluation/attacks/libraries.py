"""Attacks of libraries on each image alone: APGD and Square of pyautoattack (extra ``adaptive``), HopSkipJump of foolbox."""

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ... import _checks
from ...defended import DefendedModel
from .pgd import AttackResult, Bound, Streams, check, check_bound, unknown, wrong

APGDLoss = Literal["ce", "dlr", "dlr-targeted"]


@dataclass(frozen=True)
class _LibraryAttack:
    """An attack of a library, on each image alone."""

    bound: Bound
    streams: Streams = field(default=unknown, kw_only=True)

    COUNTS: ClassVar[tuple[str, ...]] = ()
    """Attributes of at least 1."""

    def __post_init__(self) -> None:
        check_bound(self.bound)
        for name in self.COUNTS:
            _checks.integer(name, getattr(self, name), at_least=1)

    def __call__(self, model: DefendedModel, images: Tensor, labels: Tensor) -> AttackResult:
        """See :class:`.pgd.PGD`."""
        labels = check(model, images, labels)
        if not len(images):
            return AttackResult(images.clone(), torch.empty(0, 0), torch.zeros(0))
        device = images.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # libraries seed PyTorch's global generators
            rows = enumerate(zip(images.split(1), labels.split(1), strict=True))
            found = torch.cat([self._one(model, image, label, row) for row, (image, label) in rows])
        return AttackResult(self.bound.apply(images, found - images), torch.empty(0, len(images)), torch.zeros(0))

    def _one(self, model: DefendedModel, image: Tensor, label: Tensor, row: int) -> Tensor:
        """The attacked image (1, C, H, W) in this row of a batch; a library is imported here, where it is used."""
        raise NotImplementedError


@dataclass(frozen=True)
class APGD(_LibraryAttack):
    """Auto-PGD (Croce & Hein 2020) of pyautoattack, image by image, on the mean over draws.

    Attributes:
        bound: see :class:`.pgd.Bound`.
        steps: number of gradients.
        draws: of the defense for each gradient; they are all in memory at once.
        loss: ``"ce"``, ``"dlr"``, or ``"dlr-targeted"`` towards each of the ``targets`` likeliest wrong classes in turn.
        restarts: random starts, the first one among them.
        targets: see ``loss``; all wrong classes where there are fewer.
        seed: of the random starts.
        streams: see :data:`.pgd.Streams`.
    """

    steps: int = 100
    draws: int = 4
    loss: APGDLoss = "ce"
    restarts: int = 1
    targets: int = 3
    seed: int = 0

    COUNTS = ("steps", "draws", "restarts", "targets")

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.choice("loss", self.loss, get_args(APGDLoss))

    def _one(self, model: DefendedModel, image: Tensor, label: Tensor, row: int) -> Tensor:
        library = importlib.import_module("pyautoattack.autopgd_base")
        mean = averaged(model, row, self.draws, self.streams, label)
        norm = "Linf" if self.bound.norm == "linf" else "L2"
        settings: dict[str, Any] = {"norm": norm, "n_iter": self.steps, "eps": self.bound.eps, "device": image.device}
        if self.loss != "dlr-targeted":
            attack = library.APGDAttack(mean, loss=self.loss, n_restarts=self.restarts, seed=self.seed, **settings)
            return attack.perturb(image, label, best_loss=True)
        attack = library.APGDAttack_targeted(mean, seed=self.seed, **settings)
        attack.init_hyperparam(image)
        torch.manual_seed(self.seed)
        best, highest = image, -math.inf
        with torch.no_grad():
            others = wrong(mean(image), label)
        likeliest = others.topk(min(self.targets, others.shape[1] - 1)).indices[0]
        for target, _ in itertools.product(likeliest, range(self.restarts)):
            attack.y_target = target[None]
            # its perturb() stops at the first misclassified draw, and a randomised defense has some
            point, _, loss, _ = attack.attack_single_run(image, label)
            if float(loss) > highest:
                best, highest = point.detach(), float(loss)
        return best


@dataclass(frozen=True)
class Square(_LibraryAttack):
    """Square attack (Andriushchenko et al. 2020) of pyautoattack: black box, on the mean over draws.

    Attributes:
        bound: see :class:`.pgd.Bound`.
        queries: each of ``draws`` draws.
        draws: see :class:`.pgd.PGD`.
        seed: of its squares.
        streams: see :data:`.pgd.Streams`.
    """

    queries: int = 5000
    draws: int = 1
    seed: int = 0

    COUNTS = ("queries", "draws")

    def _one(self, model: DefendedModel, image: Tensor, label: Tensor, row: int) -> Tensor:
        library = importlib.import_module("pyautoattack.square")
        norm = "Linf" if self.bound.norm == "linf" else "L2"
        mean = averaged(model, row, self.draws, self.streams, label)
        attack = library.SquareAttack(mean, norm=norm, n_queries=self.queries, eps=self.bound.eps, seed=self.seed)
        attack.init_hyperparam(image)
        margin_and_loss = attack.margin_and_loss

        def never_stop(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            """A margin that doesn't end the search: a randomised defense misclassifies a draw now and then."""
            found, loss = margin_and_loss(images, labels)
            return torch.ones_like(found), loss

        attack.margin_and_loss = never_stop
        torch.manual_seed(self.seed)
        with torch.no_grad():  # its perturb() returns the image itself unless its one last draw is misclassified
            return attack.attack_single_run(image, label)[1]


@dataclass(frozen=True)
class HopSkipJump(_LibraryAttack):
    """HopSkipJump (Chen et al. 2020) of foolbox: it sees decisions alone, those of one fixed draw.

    It expects the same answer to the same image, so it is shown the defense at one random stream an image. An image without a
    start stays as it is.

    Attributes:
        bound: see :class:`.pgd.Bound`; the smallest perturbation that it finds is projected onto it.
        steps: each of about 100 queries, more in later ones.
        queries: for the first step's gradient.
        streams: see :data:`.pgd.Streams`.
    """

    steps: int = 4
    queries: int = 40

    COUNTS = ("steps", "queries")

    def _one(self, model: DefendedModel, image: Tensor, label: Tensor, row: int) -> Tensor:
        foolbox = importlib.import_module("foolbox")
        stream = self.streams(row, 0)
        fixed = _FixedDraw(model, stream).eval()
        logits = fixed(image)
        _checks.labels(label, 1, logits.shape[1])
        if int(logits.argmax(1)) != int(label):
            return image
        torch.manual_seed(stream)  # the image's own, wherever it is in its batch
        attack = foolbox.attacks.HopSkipJumpAttack(
            steps=self.steps, initial_gradient_eval_steps=self.queries, constraint=self.bound.norm
        )
        shown = foolbox.PyTorchModel(fixed, bounds=(0, 1), device=image.device)
        try:
            return attack.run(shown, image, foolbox.criteria.Misclassification(label))
        except ValueError:  # no start
            return image


def averaged(model: DefendedModel, row: int, draws: int, chosen: Streams, label: Tensor) -> Callable[[Tensor], Tensor]:
    """Image ``row``'s model as a library wants it: (n, C, H, W) -> log of the mean probabilities of fresh draws.

    It raises ValueError where the model has no class ``label``.
    """
    counter: Iterator[int] = itertools.count()

    def mean(images: Tensor) -> Tensor:
        found = [model(images, index=[chosen(row, next(counter))] * len(images)).log_softmax(1) for _ in range(draws)]
        _checks.labels(label, 1, found[0].shape[1])
        return torch.stack(found).logsumexp(0) - math.log(draws)

    return mean


class _FixedDraw(nn.Module):
    """The model at one random stream, whichever image it is given."""

    def __init__(self, model: DefendedModel, stream: int) -> None:
        super().__init__()
        self.model, self.stream = model, stream

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(image, index=self.stream) for image in images.split(1)])
