"""The demo: a real classifier, a real attack, the transform, one table and one picture (extra ``demo``)."""

import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .targets import efficientnet_lite0
from .transform import OnlineAlternateGenerator

EPSILON = 6  # grey levels, as in section IV-A
NETWORK_STEPS = 84  # chosen on Gaussian-noised ImageNet photographs (III-D); finer classes than flowers need more steps
ITERATIONS = min(EPSILON + 4, math.ceil(1.25 * EPSILON))


class Outcome(NamedTuple):
    """What the demo saw, for n images that the target classifies correctly."""

    labels: Tensor
    clean: Tensor
    attacked: Tensor
    purified_clean: Tensor
    purified_attacked: Tensor
    seconds_per_image: float


def run(seed: int | None = 0, count: int = 20) -> tuple[nn.Module, Outcome]:
    """Attack foolbox's ImageNet photographs with targeted IGSM and purify them; returns the target and the images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)  # foolbox, on import
        import foolbox

    target = efficientnet_lite0()
    model = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    images, labels = foolbox.samples(model, dataset="imagenet", batchsize=count, shape=(224, 224))
    labels = labels.long()
    right = predict(target, images).argmax(1) == labels
    images, labels = images[right], labels[right]

    generator = torch.Generator().manual_seed(0)
    wrong = (labels + torch.randint(1, 1000, labels.shape, generator=generator)) % 1000
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=1 / 255, steps=ITERATIONS, random_start=False)
    criterion = foolbox.criteria.TargetedMisclassification
    parts = [
        attack(model, images[i : i + 5], criterion(wrong[i : i + 5]), epsilons=EPSILON / 255)[1]
        for i in range(0, len(images), 5)
    ]
    attacked = (255 * torch.cat(parts)).round() / 255  # as an image file would hold it

    purify = OnlineAlternateGenerator(network_steps=NETWORK_STEPS, seed=seed, progress=True)
    start = time.perf_counter()
    purified_attacked = purify(attacked)
    seconds = (time.perf_counter() - start) / len(images)
    return target, Outcome(labels, images, attacked, purify(images), purified_attacked, seconds)


def predict(target: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities, a few images at a time."""
    with torch.no_grad():
        return torch.cat([target(part) for part in images.split(5)]).softmax(1)


def table(target: nn.Module, outcome: Outcome) -> str:
    """Accuracy with and without the defense, and what it costs."""

    def right(images: Tensor) -> str:
        count = int((predict(target, images).argmax(1) == outcome.labels).sum())
        return f"{count:3d}/{len(outcome.labels)} = {count / len(outcome.labels):4.0%}"

    rows = [
        ("EfficientNet-lite0 on ImageNet photographs", "clean", f"attacked (IGSM, targeted, {EPSILON}/255)"),
        ("as it is", right(outcome.clean), right(outcome.attacked)),
        (
            f"behind OnlineAlternateGenerator(network_steps={NETWORK_STEPS})",
            right(outcome.purified_clean),
            right(outcome.purified_attacked),
        ),
    ]
    lines = [f"{name:<50}{clean:>16}{attacked:>36}" for name, clean, attacked in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(f"purified at {outcome.seconds_per_image:.2f} s an image, {torch.get_num_threads()} CPU threads")
    return "\n".join(lines)


def picture(target: nn.Module, outcome: Outcome, path: Path, rows: int = 3) -> None:
    """Write a picture in the manner of the paper's Fig. 1: images, and below them their residuals, magnified."""
    from matplotlib.figure import Figure

    kinds = [
        ("(a) original", outcome.clean),
        ("(b) attacked", outcome.attacked),
        ("(c) original, purified", outcome.purified_clean),
        ("(d) attacked, purified", outcome.purified_attacked),
    ]
    truth = torch.arange(len(outcome.labels)), outcome.labels
    probabilities = [predict(target, images)[truth] for _, images in kinds]
    # the images on which most was at stake
    chosen = (probabilities[0] - probabilities[1]).argsort(descending=True)[:rows].tolist()
    figure = Figure(figsize=(9, 5.0 * len(chosen)), layout="constrained")
    axes = figure.subplots(2 * len(chosen), 4, squeeze=False)
    for row, i in enumerate(chosen):
        for column, ((name, images), probability) in enumerate(zip(kinds, probabilities, strict=True)):
            top, bottom = axes[2 * row, column], axes[2 * row + 1, column]
            top.imshow(images[i].permute(1, 2, 0).numpy())
            top.set_title(name, fontsize=10)
            top.set_xlabel(f"right label: {probability[i]:.3f}", fontsize=9)
            residual = (images[i] - outcome.clean[i]).abs()
            gain = 1 / max(residual.flatten().quantile(0.99).item(), 1 / 255)
            bottom.imshow((gain * residual).clamp(0, 1).permute(1, 2, 0).numpy())
            bottom.set_xlabel(f"|difference to (a)| x {gain:.0f}", fontsize=9)
            for axis in (top, bottom):
                axis.set_xticks([])
                axis.set_yticks([])
        axes[2 * row + 1, 0].axis("off")
    figure.savefig(path, dpi=80)
