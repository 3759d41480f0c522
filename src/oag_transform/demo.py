"""The demo: a real classifier, a real attack, the transform, one table and one picture (extra ``demo``)."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import streams
from .defended import DefendedModel
from .targets import efficientnet_lite
from .transform import OnlineAlternateGenerator

EPSILON = 6  # grey levels, as in section IV-A


class Outcome(NamedTuple):
    """What the demo saw, for n ImageNet photographs that the target classifies correctly.

    Attributes:
        labels: (n,) int64, their classes.
        clean: (n, 3, 224, 224) float32 in [0, 1], like the three after it.
        attacked: under the attack.
        purified_clean: ``clean``, purified.
        purified_attacked: ``attacked``, purified.
        seconds_per_image: of the purification.
    """

    labels: Tensor
    clean: Tensor
    attacked: Tensor
    purified_clean: Tensor
    purified_attacked: Tensor
    seconds_per_image: float


def run(seed: int | None = 0, count: int = 20) -> tuple[nn.Module, Outcome]:
    """Attack foolbox's ImageNet photographs with targeted IGSM and purify them; returns the target and the images."""
    from .evaluation.attacks import igsm  # first: it silences a warning that foolbox gives on import

    # isort: split
    import foolbox

    target = efficientnet_lite(0)
    model = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    images, labels = foolbox.samples(model, dataset="imagenet", batchsize=count, shape=(224, 224))
    labels = labels.long()
    right = predict(target, images).argmax(1) == labels
    images, labels = images[right], labels[right]
    starts = range(0, len(images), 5)
    attack = igsm(EPSILON)
    attacked = torch.cat([attack(target, images[i : i + 5], labels[i : i + 5], classes=1000, index=i) for i in starts])

    purify = OnlineAlternateGenerator(seed=seed, progress=True)
    start = time.perf_counter()
    purified_attacked = purify(attacked)
    seconds = (time.perf_counter() - start) / len(images)
    return target, Outcome(labels, images, attacked, purify(images), purified_attacked, seconds)


def predict(target: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities, a few images at a time."""
    with torch.no_grad():
        return torch.cat([target(part) for part in images.split(5)]).softmax(1)


def behind(target: nn.Module) -> DefendedModel:
    """What DefendedModel makes of images that are purified already."""
    return DefendedModel(target, nn.Identity())


def noisy(images: Tensor, level: float) -> Tensor:
    """Images with white noise of ``level`` grey levels: what a defense is worth is what it does better than that."""
    return streams.add_normal(images, level / 255, streams.generators(0, range(len(images)), images.device))


def table(target: nn.Module, outcome: Outcome) -> str:
    """Accuracy without a defense, with as much white noise as the defense changes attacked images, and with it; its cost."""
    defended = behind(target)
    change = 255 * (outcome.purified_attacked - outcome.attacked).square().mean().sqrt().item()
    pair = outcome.clean, outcome.attacked

    def right(images: Tensor, model: nn.Module = target) -> str:
        count = int((predict(model, images).argmax(1) == outcome.labels).sum())
        return f"{count:3d}/{len(outcome.labels)} = {count / len(outcome.labels):4.0%}"

    rows = [
        ("EfficientNet-lite0 on ImageNet photographs", "clean", f"attacked (IGSM, targeted, {EPSILON}/255)"),
        ("as it is", *map(right, pair)),
        (
            f"white noise of {change:.0f} grey levels, the same views",
            *(right(noisy(images, change), defended) for images in pair),
        ),
        ("in a DefendedModel", right(outcome.purified_clean, defended), right(outcome.purified_attacked, defended)),
    ]
    lines = [f"{name:<50}{clean:>16}{attacked:>36}" for name, clean, attacked in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(f"purified at {outcome.seconds_per_image:.2f} s an image, {torch.get_num_threads()} CPU threads")
    return "\n".join(lines)


def picture(target: nn.Module, outcome: Outcome, path: Path, rows: int = 3) -> None:
    """Write a picture in the manner of the paper's Fig. 1: images, and below them their residuals, magnified."""
    from .evaluation.figures import residuals

    defended = behind(target)
    kinds = [
        ("(a) original", outcome.clean, target),
        ("(b) attacked", outcome.attacked, target),
        ("(c) original, purified", outcome.purified_clean, defended),
        ("(d) attacked, purified", outcome.purified_attacked, defended),
    ]
    truth = torch.arange(len(outcome.labels)), outcome.labels
    probabilities = [predict(model, images)[truth] for _, images, model in kinds]
    # the images on which most was at stake
    chosen = (probabilities[0] - probabilities[1]).argsort(descending=True)[:rows]
    notes = [[f"right label: {value:.3f}" for value in column[chosen].tolist()] for column in probabilities]
    residuals(path, [(name, images[chosen]) for name, images, _ in kinds], outcome.clean[chosen], notes)
