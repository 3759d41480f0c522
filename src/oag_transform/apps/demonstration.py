"""The demo: images under gray-box and adaptive attacks, and their classification behind each defense."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import streams
from ..baselines.filters import JPEG
from ..defended import DefendedModel
from ..evaluation.attacks.gray_box import cw, fgsm, igsm, mifgsm
from ..evaluation.attacks.pgd import PGD, Bound
from ..evaluation.backbones import efficientnet_lite
from ..evaluation.render.figures import residuals
from ..transform import OnlineAlternateGenerator

EPSILON = 6  # grey levels, of the adaptive attack; the paper's bound for FGSM and IGSM
STEPS = 5  # of the adaptive attack, of 2 grey levels each
ADAPTIVE_COUNT = 8  # images under the adaptive attack
CW_STEPS = 10  # of Adam, in one search: as many succeed as with 30 in two
QUALITY = 75
NONE, VIEWS, COMPRESSED, NOISE, OAG = "no defense", "four views alone", f"JPEG {QUALITY}", "noise of equal size", "OAG"
CLEAN, ADAPTIVE = "clean", "adaptive"


@dataclass(frozen=True)
class Outcome:
    """What the demo measured, on n ImageNet images that the target classifies correctly.

    Attributes:
        target: the classifier.
        labels: (n,) int64, their classes.
        images: clean and under each attack, by the name of the column: (n, 3, 224, 224) float32 in [0, 1].
        purified: the same images, purified by OAG.
        right: whether each image is classified correctly, by the names of row and column: (n,) bool; in the column
            :data:`ADAPTIVE` (ADAPTIVE_COUNT,).
        changes: root-mean-square change that OAG makes to each image, by column: (n,), in [0, 1].
        seconds_per_image: of the purification.
    """

    target: nn.Module
    labels: Tensor
    images: dict[str, Tensor]
    purified: dict[str, Tensor]
    right: dict[str, dict[str, Tensor]]
    changes: dict[str, Tensor]
    seconds_per_image: float


def measure(seed: int = 0, count: int = 20, defense: Callable[..., Tensor] | None = None) -> Outcome:
    """Attack foolbox's ImageNet images, and classify them behind five defenses.

    Args:
        seed: seed of all random numbers.
        count: number of images, at most 20; those that the target classifies correctly are kept.
        defense: replaces ``OnlineAlternateGenerator(seed=seed)``.
    """
    target = efficientnet_lite(0)
    clean, labels = _images(target, count)
    models = {
        NONE: DefendedModel(target, nn.Identity(), shift=0),
        VIEWS: DefendedModel(target, nn.Identity()),
        COMPRESSED: DefendedModel(target, JPEG(QUALITY)),
        OAG: DefendedModel(target, OnlineAlternateGenerator(seed=seed) if defense is None else defense),
    }
    images = {CLEAN: clean}
    _say("attacks")
    for attack in (fgsm(), igsm(), mifgsm(eps=2), cw(steps=CW_STEPS, searches=1)):
        parts = [attack(target, x, y, classes=1000, seed=seed, index=i) for i, x, y in _parts(clean, labels)]
        images[str(attack)] = torch.cat(parts)

    _say("purification")
    start = time.perf_counter()
    with torch.no_grad():
        purified = {name: models[OAG].purify(x) for name, x in images.items()}
    seconds = (time.perf_counter() - start) / (len(labels) * len(images))
    changes = {name: (purified[name] - x).square().mean((1, 2, 3)).sqrt() for name, x in images.items()}

    def noisy(x: Tensor, name: str) -> DefendedModel:
        """White noise of the size of the change that OAG made to each image of a column, in the same views."""
        return DefendedModel(target, WhiteNoise(changes[name][: len(x)], seed))

    _say("classification")
    with torch.no_grad():
        right = {
            **{row: {name: _behind(models[row], x, labels) for name, x in images.items()} for row in (NONE, VIEWS, COMPRESSED)},
            NOISE: {name: _behind(noisy(x, name), x, labels) for name, x in images.items()},
            OAG: {name: _right(models[OAG], purified[name], labels) for name in images},
        }
    models[NOISE] = noisy(clean[:ADAPTIVE_COUNT], CLEAN)
    _say("adaptive attacks")
    for name, by_column in right.items():
        attacked = adaptive_attack(models[name], clean[:ADAPTIVE_COUNT], labels[:ADAPTIVE_COUNT])
        with torch.no_grad():
            by_column[ADAPTIVE] = _behind(models[name], attacked, labels[:ADAPTIVE_COUNT])
    return Outcome(target, labels, images, purified, right, changes, seconds)


class WhiteNoise(nn.Module):
    """A control: white noise of the same size as a defense's change. Image i gets standard deviation ``std[i]``."""

    def __init__(self, std: Tensor, seed: int) -> None:
        super().__init__()
        self.std = std
        self.seed = seed

    def forward(self, images: Tensor, *, index: Sequence[int]) -> Tensor:
        """Noisy images (N, C, H, W) for N standard deviations, clipped to [0, 1]."""
        generators = streams.noise_generators(self.seed, index, images.device)
        return streams.add_normal(images, self.std[:, None, None, None], generators)


def adaptive_attack(model: DefendedModel, images: Tensor, labels: Tensor) -> Tensor:
    """Adversarial images of an untargeted adaptive IGSM with the straight-through gradient of the defense (BPDA).

    They are (N, C, H, W) in [0, 1], within :data:`EPSILON` grey levels of ``images``, rounded to 8 bits. Each step draws fresh
    noise, independent of that of :func:`measure`: the attacker does not know the draws of the evaluation.
    """
    attack = PGD(
        Bound("linf", EPSILON / 255),
        STEPS,
        draws=1,
        streams=lambda image, draw: 1000 * (draw + 1) + image,
        decay=0,
        step_size=2 / EPSILON,
        halvings=(),
    )
    return (255 * attack(model, images, labels).images).round() / 255


def table(outcome: Outcome) -> str:
    """Correctly classified images of each column behind each defense, with notes on how they were measured."""
    columns = [*outcome.images, ADAPTIVE]
    cells = [["", *columns]]
    for row, by_column in outcome.right.items():
        cells.append([row, *(f"{int(by_column[name].sum())}/{len(by_column[name])}" for name in columns)])
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        f"{row:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths, strict=True))
        for row, *rest in cells
    ]
    lines = ["ImageNet images that EfficientNet-lite0 classifies correctly", lines[0], "-" * len(lines[0]), *lines[1:]]
    levels = ", ".join(f"{255 * outcome.changes[name].mean():.0f}" for name in outcome.images)
    lines += [
        "",
        f"Gray-box attacks: FGSM and IGSM (targeted), MI-FGSM, C&W ({CW_STEPS} steps). All rows but the first use four views.",
        f"Noise has the size of OAG's change to each image, on average {levels} grey levels.",
        f"Adaptive attack on each row's defense: untargeted IGSM, {EPSILON}/255, {STEPS} steps, BPDA, fresh draws.",
        f"OAG takes {outcome.seconds_per_image:.2f} s per image; CPU threads: {torch.get_num_threads()}.",
    ]
    return "\n".join(lines)


def picture(outcome: Outcome, path: Path, rows: int = 3, attack: str = "IGSM 6/255") -> None:
    """Write a picture like the paper's Fig. 1: images, and below them their magnified residuals."""
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
    # the images whose correct class lost most probability
    chosen = (probabilities[0] - probabilities[1]).argsort(descending=True)[:rows]
    notes = [[f"correct class: {value:.3f}" for value in column[chosen].tolist()] for column in probabilities]
    residuals(path, [(name, images[chosen]) for name, images, _ in kinds], clean[chosen], notes)


def _images(target: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The ImageNet images of foolbox that the target classifies correctly, and their classes."""
    import foolbox  # late: .attacks, imported above, silences a warning of foolbox

    model = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    images, labels = foolbox.samples(model, dataset="imagenet", batchsize=count, shape=(224, 224))
    right = _logits(target, images).argmax(1) == labels.long()
    return images[right], labels[right].long()


def _parts(images: Tensor, labels: Tensor, size: int = 5) -> Iterable[tuple[int, Tensor, Tensor]]:
    return ((i, images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size))


def _logits(classify: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits, of a few images at a time."""
    with torch.no_grad():
        return torch.cat([classify(part) for part in images.split(5)])


def _right(model: DefendedModel, purified: Tensor, labels: Tensor) -> Tensor:
    return _logits(model.classify, purified).argmax(1) == labels


def _behind(model: DefendedModel, images: Tensor, labels: Tensor) -> Tensor:
    return _right(model, model.purify(images), labels)


def _say(step: str) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        print(f"{step} ...", file=sys.stderr, flush=True)
