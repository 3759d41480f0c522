"""Accuracy of a target behind a defense: which images, attacked how, classified as what. Everything goes through a store."""

import dataclasses
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import streams
from ..defended import DefendedModel
from ..transform import OnlineAlternateGenerator
from .attacks import Attack
from .data import Listing, batches
from .results import Cell, Row
from .store import Store
from .targets import Target

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A target and the photographs that it gets right.

    Attributes:
        target: see :class:`~oag_transform.evaluation.targets.Target`.
        images: (N, 3, crop, crop) uint8, on the CPU.
        labels: (N,) int64.
        classes: names of the classes.
        looked_at: photographs looked at to find these: N / ``looked_at`` is about the target's own accuracy.
        store: where everything that is computed is kept.
        seed: of target classes, noise and defenses.
        device: where the target and the defenses run.
    """

    target: Target
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    looked_at: int
    store: Store
    seed: int
    device: torch.device

    def first(self, count: int) -> "Subject":
        """The same with the first ``count`` images."""
        return dataclasses.replace(self, images=self.images[:count], labels=self.labels[:count])


def choose_subject(target: Target, listing: Listing, count: int, store: Store, seed: int, device: torch.device) -> Subject:
    """The first ``count`` images, in a seeded order that takes the classes in turn, that the target classifies correctly.

    It is less meaningful to attack the others (IV-A). There are fewer where the listing has no more.

    Raises:
        ValueError: the target gets none of them right, or a file can't be read.
    """
    images, labels, found, looked_at = [], [], 0, 0
    parts = batches(listing, target.preprocessing, store.chunk, seed)
    for batch, truth in tqdm(parts, desc=f"{target.name}: images", unit="batch", leave=False, disable=not store.progress):
        right = (_logits(target.model, batch, device).argmax(1) == truth).nonzero().flatten()[: count - found]
        images.append(batch[right])
        labels.append(truth[right])
        found += len(right)
        looked_at += len(truth) if found < count else int(right[-1]) + 1
        if found == count:
            break
    if not found:
        raise ValueError(f"{target.name} gets none of {looked_at} images right: do its classes have the order of the data's?")
    return Subject(target, torch.cat(images), torch.cat(labels), listing.classes, looked_at, store, seed, device)


def attacked(subject: Subject, attack: Attack) -> Tensor:
    """The subject's images under a gray-box attack on its target, uint8."""
    target = subject.target.model
    settings = {name: value for name, value in vars(attack.method).items() if isinstance(value, (int, float, str))}
    key = {
        "what": "attack",
        "versions": [version(name) for name in ("oag-transform", "torch", "foolbox")],
        "attack": [attack.name, attack.eps, attack.targeted, type(attack.method).__name__, settings],
        "target": subject.target.fingerprint,
        "classes": len(subject.classes),
        "seed": subject.seed,
    }

    def compute(rows: range) -> Any:
        images, labels = _rows(subject, rows)
        result = attack(target, images, labels, classes=len(subject.classes), seed=subject.seed, index=rows.start)
        return (255 * result).round().to(torch.uint8).cpu().numpy()

    return torch.from_numpy(
        subject.store.rows(key, (subject.images, subject.labels), compute, f"{subject.target.name}: {attack}")
    )


def noised(subject: Subject, std: float) -> Tensor:
    """The subject's images with Gaussian noise of standard deviation ``std`` on the [0, 1] scale, held to it, uint8."""
    noisy = torch.empty_like(subject.images)
    for row, generator in enumerate(streams.noise_generators(subject.seed, range(len(noisy)), torch.device("cpu"))):
        noise = torch.randn(subject.images[row].shape, generator=generator)
        noisy[row] = (subject.images[row] + 255 * std * noise).round().clamp(0, 255).to(torch.uint8)
    return noisy


def classify(subject: Subject, defense: nn.Module | None, images: Tensor, desc: str, *, shift: int = 0) -> tuple[Cell, float]:
    """Which uint8 ``images`` (in the subject's order) are right behind a defense, and the defense's median seconds an image.

    ``shift``: as of :class:`~oag_transform.DefendedModel`.
    """
    views = DefendedModel(subject.target.model, nn.Identity(), shift=shift)  # what it is given is purified already
    key = {"what": "class", "shift": shift} | _common(subject, defense)

    def compute(rows: range) -> Any:
        batch = images[rows.start : rows.stop].to(subject.device).float() / 255
        start = time.perf_counter()
        purified = batch if defense is None else defense(batch, index=rows.start)
        seconds = _elapsed(start, subject.device)
        classes = _logits(views, purified, subject.device).argmax(1).numpy()
        return np.stack([classes, np.full(len(rows), seconds / len(rows))], 1)

    found = subject.store.rows(key, (images,), compute, desc)
    return _cell(found[:, 0], subject.labels), float(np.median(found[:, 1]))


def along(subject: Subject, defense: OnlineAlternateGenerator, images: Tensor, steps: Sequence[int], desc: str) -> list[Cell]:
    """Which uint8 ``images`` are right after each of these network steps, of one run of ``max(steps)``."""
    target = subject.target.model
    key = {"what": "along", "steps": list(steps)} | _common(subject, defense)

    def compute(rows: range) -> Any:
        batch = images[rows.start : rows.stop].to(subject.device).float() / 255
        moments = defense.trace(batch, every=math.gcd(*steps), index=rows.start)
        classes = [
            _logits(target, moment.images, subject.device).argmax(1).numpy() for moment in moments if moment.step in steps
        ]
        return np.stack(classes, 1)

    found = subject.store.rows(key, (images,), compute, desc)
    return [_cell(column, subject.labels) for column in found.T]


def row(
    subject: Subject,
    name: str,
    make: Callable[[], nn.Module] | None,
    columns: Sequence[tuple[str, Tensor]],
    count: int | None = None,
    shift: int = 0,
) -> Row:
    """A line of a table: a defense on each column of images, on the first ``count`` of them; ``shift``: see classify.

    A defense that fails gives a line that says why, and the run goes on.
    """
    try:
        defense = make().to(subject.device) if make is not None else None
        part = subject if count is None else subject.first(count)
        measured = [
            classify(part, defense, images[: len(part.images)], f"{name}: {column}", shift=shift) for column, images in columns
        ]
    except Exception as error:  # whatever a defense raises is its own result
        logger.warning("%s failed: %s", name, error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return Row(name, (None,) * len(columns), None, f"{type(error).__name__}: {error}")
    seconds = None if defense is None else float(np.mean([seconds for _, seconds in measured]))
    return Row(name, tuple(cell for cell, _ in measured), seconds)


def probabilities(subject: Subject, images: Tensor) -> Tensor:
    """(N, classes) probabilities that the target gives uint8 images or [0, 1] ones."""
    return torch.cat(
        [_logits(subject.target.model, part, subject.device).softmax(1) for part in images.split(subject.store.chunk)]
    )


def pooled(cells: Sequence[Cell | None]) -> Cell | None:
    """All columns as one; None where one is missing."""
    present = [cell for cell in cells if cell is not None]
    return Cell("".join(cell.right for cell in present), len(present)) if present and len(present) == len(cells) else None


def _common(subject: Subject, defense: nn.Module | None) -> dict[str, Any]:
    """What decides the outcome and the seconds of a defense."""
    return {
        "versions": [version(name) for name in ("oag-transform", "torch", "torchvision", "scikit-image")],
        "hardware": hardware(subject.device),
        "defense": repr(defense),
        "target": subject.target.fingerprint,
    }


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and the threads that are used of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _rows(subject: Subject, rows: range) -> tuple[Tensor, Tensor]:
    part = slice(rows.start, rows.stop)
    return subject.images[part].to(subject.device).float() / 255, subject.labels[part].to(subject.device)


def _logits(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    with torch.no_grad():
        return model(images.to(device) if images.is_floating_point() else images.to(device).float() / 255).cpu()


def _elapsed(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cell(classes: Any, labels: Tensor) -> Cell:
    return Cell("".join("1" if a == b else "0" for a, b in zip(classes.tolist(), labels.tolist(), strict=True)))
