"""The paper's gray-box attacks (II-A, IV-A), from foolbox: FGSM, IGSM, MI-FGSM and C&W, targeted and untargeted.

Budgets are in grey levels, 0 to 255, as in the paper: ``fgsm(6)`` moves no pixel by more than 6/255.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import _checks, streams
from ..options import EPS, MIFGSM_EPS, gray_box_entry

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)  # foolbox, on import
    import foolbox


@dataclass(frozen=True)
class Attack:
    """An attack on a classifier, made by :func:`fgsm`, :func:`igsm`, :func:`mifgsm` or :func:`cw`.

    Attributes:
        name: name in the literature.
        method: the foolbox attack.
        eps: bound of the perturbation's L-infinity norm in grey levels; None for an attack without one.
        targeted: towards a wrong class drawn for each image, or away from the right one.
    """

    name: str
    method: Any
    eps: int | None
    targeted: bool

    def __str__(self) -> str:
        bound = "" if self.eps is None else f" {self.eps}/255"
        return f"{self.name}{bound}"

    def __call__(
        self, target: nn.Module, images: Tensor, labels: Tensor, *, classes: int, seed: int = 0, index: int = 0
    ) -> Tensor:
        """Attacked images of the same shape, rounded to 8 bits as an image file would hold them.

        Args:
            target: classifier of [0, 1] images (N, C, H, W) -> logits (N, classes), in eval mode.
            images: (N, C, H, W) floating point in [0, 1]; those of 8-bit images keep to ``eps`` exactly.
            labels: (N,) their right classes, which the target should give them: it is meaningless to attack the others.
            classes: number of classes to draw a target class from.
            seed: image i draws its target class from random stream ``index + i`` of it.
            index: random stream of the first image.

        Raises:
            TypeError, ValueError: bad images, labels outside of 0 to ``classes`` - 1, or fewer than two classes.
        """
        _checks.batch(images)
        labels = _checks.labels(labels, len(images), _checks.integer("classes", classes, at_least=2))
        _checks.integer("seed", seed)
        if not len(images):
            return images.clone()
        model = foolbox.PyTorchModel(target, bounds=(0, 1), device=images.device)
        criterion = (
            foolbox.criteria.TargetedMisclassification(wrong_classes(labels, classes, seed, index))
            if self.targeted
            else foolbox.criteria.Misclassification(labels)
        )
        eps = None if self.eps is None else self.eps / 255
        with _gradients_kept(target):
            attacked = self.method(model, images, criterion, epsilons=eps)[1].detach()
        return (255 * attacked).round() / 255


@contextlib.contextmanager
def _gradients_kept(target: nn.Module) -> Iterator[None]:
    """The parameters' ``.grad`` as it was before: foolbox differentiates by ``backward()``, which adds to it."""
    before = [(parameter, parameter.grad) for parameter in target.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def iterations(eps: int) -> int:
    """Number of steps of the iterative attacks, min(eps + 4, ceil(1.25 eps)), after Kurakin et al. (IV-A)."""
    return min(eps + 4, math.ceil(1.25 * eps))


def wrong_classes(labels: Tensor, classes: int, seed: int, index: int = 0) -> Tensor:
    """A class other than its label for each image, uniform over the others, from the image's own random stream."""
    rows = range(index, index + len(labels))
    cpu = torch.device("cpu")
    drawn = [int(torch.randint(1, classes, (1,), generator=g, device=cpu)) for g in streams.generators(seed, rows, cpu)]
    return (labels + torch.tensor(drawn, device=labels.device, dtype=labels.dtype)) % classes


def fgsm(eps: int = EPS, *, targeted: bool = True) -> Attack:
    """Fast gradient sign method (Goodfellow et al. 2015): one step of length ``eps``."""
    # foolbox's own FGSM has no targeted form; one step of the whole length is the same
    return _linf("FGSM", foolbox.attacks.LinfBasicIterativeAttack, eps, targeted, once=True)


def igsm(eps: int = EPS, *, targeted: bool = True) -> Attack:
    """Iterative gradient sign method (Kurakin et al. 2017, Eq. 1): :func:`iterations` steps of length 1, no random start."""
    return _linf("IGSM", foolbox.attacks.LinfBasicIterativeAttack, eps, targeted)


class MomentumIterativeMethod(foolbox.attacks.LinfMomentumIterativeFastGradientMethod):
    """foolbox's MI-FGSM, but summing gradients over their L1 norm (Dong et al. 2018, Eq. 6): foolbox 3.3.4 sums their signs."""

    def normalize(self, gradients: Any, *, x: Any, bounds: Any) -> Any:
        """Each image's gradient over its mean absolute value: the scale of the sum doesn't matter, its sign is taken."""
        return gradients / gradients.abs().mean((1, 2, 3), keepdims=True).maximum(1e-30)


def mifgsm(eps: int = MIFGSM_EPS, *, targeted: bool = False) -> Attack:
    """Momentum iterative FGSM (Dong et al. 2018): :func:`iterations` steps of length 1, decay 1."""
    return _linf("MI-FGSM", MomentumIterativeMethod, eps, targeted)


def cw(*, targeted: bool = False, confidence: float = 2, steps: int = 30, searches: int = 2, lr: float = 0.01) -> Attack:
    """Carlini and Wagner's attack (2017): the smallest L2 perturbation, ``searches`` searches of ``steps`` steps of Adam.

    ``confidence`` is the margin of the wrong class's logit; 2 survives the rounding to 8 bits.
    """
    method = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=searches,
        steps=steps,
        stepsize=lr,
        confidence=confidence,
        initial_const=10,
        abort_early=False,  # it looks at the loss of the whole batch: an image's result would depend on the others
    )
    return Attack("C&W", method, None, targeted)


def make(key: str, eps: int | None = None, targeted: bool | None = None) -> Attack:
    """An attack of :data:`~oag_transform.evaluation.options.GRAY_BOX`, with the paper's bound and goal where no other is given.

    Raises:
        ValueError: no such attack, ``eps`` isn't an integer from 1 to 255, or the attack has none.
    """
    entry = gray_box_entry(key)
    if entry.eps is None and eps is not None:
        raise ValueError(f"{entry.label} has no bound, got eps = {eps!r}")
    bound = {} if entry.eps is None else {"eps": entry.eps if eps is None else eps}
    function: Any = {"fgsm": fgsm, "igsm": igsm, "mifgsm": mifgsm, "cw": cw}[key]
    return function(**bound, targeted=entry.targeted if targeted is None else targeted)


def _linf(name: str, method: Any, eps: Any, targeted: bool, *, once: bool = False) -> Attack:
    """An attack by steps of length 1 without a random start, or by one step of the whole length."""
    eps = _checks.integer("eps (grey levels)", eps, at_least=1, at_most=255)
    size, count = (eps, 1) if once else (1, iterations(eps))
    return Attack(name, method(abs_stepsize=size / 255, steps=count, random_start=False), eps, targeted)
