"""What the demo shows: photographs under the paper's attacks, and what a classifier makes of them behind each defense."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import streams
from ..baselines.filters import JPEG
from ..defended import DefendedModel
from ..evaluation.attacks import cw, paper_attacks
from ..evaluation.backbones import efficientnet_lite
from ..evaluation.render.figures import residuals
from ..transform import OnlineAlternateGenerator

EPSILON = 6  # grey levels, of the attack through the defense; the paper's for FGSM and IGSM
STEPS = 5  # of that attack, of 2 grey levels each
THROUGH = 8  # photographs that are attacked through the defense
CW_STEPS = 10  # of Adam, in one search: as many succeed as with 30 in two
QUALITY = 75
NONE, VIEWS, COMPRESSED, NOISE, OAG = "as it is", "four views alone", f"JPEG {QUALITY}", "white noise as strong", "ours"
CLEAN, ADAPTIVE = "clean", "through it"


@dataclass(frozen=True)
class Outcome:
    """What the demo saw, for n ImageNet photographs that the target classifies correctly.

    Attributes:
        target: the classifier.
        labels: (n,) int64, their classes.
        images: clean and under each attack, by the name of the column: (n, 3, 224, 224) float32 in [0, 1].
        purified: by ours, likewise.
        right: whether each photograph is classified correctly, by the names of row and column: (n,) bool; in the column
            :data:`ADAPTIVE` (THROUGH,).
        changes: root-mean-square change that ours makes to each photograph, by column: (n,), in [0, 1].
        seconds_per_image: of the purification.
    """

    target: nn.Module
    labels: Tensor
    images: dict[str, Tensor]
    purified: dict[str, Tensor]
    right: dict[str, dict[str, Tensor]]
    changes: dict[str, Tensor]
    seconds_per_image: float


def measure(seed: int = 0, count: int = 20, ours: Callable[..., Tensor] | None = None) -> Outcome:
    """Attack foolbox's ImageNet photographs, and meet the attacks in five ways.

    Args:
        seed: of all that is random.
        count: photographs, at most 20; those that the target gets right are kept.
        ours: the defense; None: ``OnlineAlternateGenerator(seed=seed)``.
    """
    target = efficientnet_lite(0)
    clean, labels = _photographs(target, count)
    models = {
        NONE: DefendedModel(target, _nothing, shift=0),
        VIEWS: DefendedModel(target, _nothing),
        COMPRESSED: DefendedModel(target, JPEG(QUALITY)),
        OAG: DefendedModel(target, OnlineAlternateGenerator(seed=seed) if ours is None else ours),
    }
    images = {CLEAN: clean}
    _say("attacks")
    for attack in (*paper_attacks(mifgsm_eps=2)[:3], cw(steps=CW_STEPS, searches=1)):
        parts = [attack(target, x, y, classes=1000, index=i) for i, x, y in _parts(clean, labels)]
        images[str(attack)] = torch.cat(parts)

    _say("purification")
    start = time.perf_counter()
    with torch.no_grad():
        purified = {name: models[OAG].purify(x) for name, x in images.items()}
    seconds = (time.perf_counter() - start) / (len(labels) * len(images))
    changes = {name: (purified[name] - x).square().mean((1, 2, 3)).sqrt() for name, x in images.items()}

    def noisy(x: Tensor, name: str) -> DefendedModel:
        """White noise of the strength that ours has changed each photograph of a column by, in the same views."""
        return DefendedModel(target, WhiteNoise(changes[name][: len(x)], seed))

    _say("classification")
    with torch.no_grad():
        right = {
            **{row: {name: _behind(models[row], x, labels) for name, x in images.items()} for row in (NONE, VIEWS, COMPRESSED)},
            NOISE: {name: _behind(noisy(x, name), x, labels) for name, x in images.items()},
            OAG: {name: _right(models[OAG], purified[name], labels) for name in images},
        }
    models[NOISE] = noisy(clean[:THROUGH], CLEAN)
    _say("attacks through the defenses")
    for name, by_column in right.items():
        attacked = attack_through(models[name], clean[:THROUGH], labels[:THROUGH])
        with torch.no_grad():
            by_column[ADAPTIVE] = _behind(models[name], attacked, labels[:THROUGH])
    return Outcome(target, labels, images, purified, right, changes, seconds)


class WhiteNoise(nn.Module):
    """The control: what a defense is worth is what it does better than noise. Image i gets standard deviation ``std[i]``."""

    def __init__(self, std: Tensor, seed: int) -> None:
        super().__init__()
        self.std = std
        self.seed = seed

    def forward(self, images: Tensor, *, index: Sequence[int]) -> Tensor:
        """Noisy images (N, C, H, W) of as many as there are standard deviations, held to [0, 1]."""
        generators = streams.noise_generators(self.seed, index, images.device)
        return streams.add_normal(images, self.std[:, None, None, None], generators)


def attack_through(model: DefendedModel, images: Tensor, labels: Tensor) -> Tensor:
    """IGSM away from the right class, by one who knows the defense: it is the identity to the gradient (BPDA).

    Images (N, C, H, W) in [0, 1], none of them moved by more than :data:`EPSILON` grey levels, rounded to 8 bits. Each step
    draws fresh noise, and none that :func:`measure` judges by: the attacker doesn't know what is to come.
    """
    attacked, eps = images, EPSILON / 255
    for step in range(1, STEPS + 1):
        attacked = attacked.detach().requires_grad_()
        loss = F.cross_entropy(model(attacked, index=1000 * step), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        moved = attacked.detach() + 2 / 255 * gradient.sign()
        attacked = moved.clamp(images - eps, images + eps).clamp(0, 1)
    return (255 * attacked).round() / 255


def table(outcome: Outcome) -> str:
    """The photographs that are classified correctly, of each column behind each defense, and what to know about them."""
    columns = [*outcome.images, ADAPTIVE]
    cells = [["", *columns]]
    for row, by_column in outcome.right.items():
        cells.append([row, *(f"{int(by_column[name].sum())}/{len(by_column[name])}" for name in columns)])
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        f"{row:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths, strict=True))
        for row, *rest in cells
    ]
    lines = ["ImageNet photographs that EfficientNet-lite0 gets right", lines[0], "-" * len(lines[0]), *lines[1:]]
    levels = ", ".join(f"{255 * outcome.changes[name].mean():.0f}" for name in outcome.images)
    lines += [
        "",
        f"FGSM and IGSM are targeted; C&W takes {CW_STEPS} steps, which is enough here. All but the first row: in four views.",
        f"White noise: as strong as what ours changes in each photograph, {levels} grey levels on average.",
        f"Through it: the attacker knows the row's defense. IGSM {EPSILON}/255 away from the right class, {STEPS} steps,",
        "the gradient of the defense taken for the identity (BPDA), with fresh noise in each step.",
        f"Ours: {outcome.seconds_per_image:.2f} s an image with {torch.get_num_threads()} CPU threads.",
    ]
    return "\n".join(lines)


def picture(outcome: Outcome, path: Path, rows: int = 3, attack: str = "IGSM 6/255") -> None:
    """Write a picture in the manner of the paper's Fig. 1: images, and below them their residuals, magnified."""
    behind = DefendedModel(outcome.target)
    clean, attacked = outcome.images[CLEAN], outcome.images[attack]
    kinds: list[tuple[str, Tensor, Callable[[Tensor], Tensor]]] = [
        ("(a) original", clean, outcome.target),
        ("(b) attacked", attacked, outcome.target),
        ("(c) original, purified", outcome.purified[CLEAN], behind.classify),
        ("(d) attacked, purified", outcome.purified[attack], behind.classify),
    ]
    truth = torch.arange(len(outcome.labels)), outcome.labels
    probabilities = [_logits(classify, images).softmax(1)[truth] for _, images, classify in kinds]
    # the images on which most was at stake
    chosen = (probabilities[0] - probabilities[1]).argsort(descending=True)[:rows]
    notes = [[f"right label: {value:.3f}" for value in column[chosen].tolist()] for column in probabilities]
    residuals(path, [(name, images[chosen]) for name, images, _ in kinds], clean[chosen], notes)


def _photographs(target: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The ImageNet photographs of foolbox that the target gets right, and their classes."""
    import foolbox  # attacks, above, silences a warning that it gives on import

    model = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    images, labels = foolbox.samples(model, dataset="imagenet", batchsize=count, shape=(224, 224))
    right = _logits(target, images).argmax(1) == labels.long()
    return images[right], labels[right].long()


def _nothing(images: Tensor) -> Tensor:
    return images


def _parts(images: Tensor, labels: Tensor, size: int = 5) -> Iterable[tuple[int, Tensor, Tensor]]:
    return ((i, images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size))


def _logits(classify: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A few images at a time."""
    with torch.no_grad():
        return torch.cat([classify(part) for part in images.split(5)])


def _right(model: DefendedModel, purified: Tensor, labels: Tensor) -> Tensor:
    return _logits(model.classify, purified).argmax(1) == labels


def _behind(model: DefendedModel, images: Tensor, labels: Tensor) -> Tensor:
    return _right(model, model.purify(images), labels)


def _say(step: str) -> None:
    """What is being done, where somebody looks on."""
    if sys.stderr.isatty():
        print(f"{step} ...", file=sys.stderr, flush=True)
