"""Accuracy of a target behind a defense: which images, attacked how, classified as what. Everything goes through a store.

A table is columns by candidates: a :class:`Candidate` is a row to be, and asks each :class:`Column` for its images.
"""

import dataclasses
import inspect
import logging
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _checks, streams
from ..defended import DefendedModel
from ..transform import OnlineAlternateGenerator
from .attacks import Attack
from .data import Listing, batches
from .results import Cell, Row
from .store import Array, Store, fingerprint
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

    def first(self, count: int | None) -> "Subject":
        """The same with the first ``count`` images, or all of them where that is None."""
        return self if count is None else dataclasses.replace(self, images=self.images[:count], labels=self.labels[:count])

    def batch(self, images: Tensor, rows: range) -> Tensor:
        """Some rows of uint8 images (N, C, H, W) as float32 in [0, 1], on the device."""
        return images[rows.start : rows.stop].to(self.device).float() / 255


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row to be: a defense at one setting, and how it is measured.

    Attributes:
        label: name of the row.
        make: seed -> the defense, a transform of [0, 1] batches; None where there is no defense.
        in_views: seen in the four views of a :class:`~oag_transform.DefendedModel`, or as it is.
        count: the first so many images only, for slow defenses; None: all of them.
        defense: key in :data:`oag_transform.baselines.catalogue.DEFENSES`; empty for none of them.
        setting: of that defense.
    """

    label: str
    make: Callable[[int], nn.Module] | None = None
    in_views: bool = False
    count: int | None = None
    defense: str = ""
    setting: float | None = None

    def model(self, subject: Subject, *, seed: int | None = None, **settings: Any) -> DefendedModel:
        """The subject's target behind the defense, on its device.

        Args:
            subject: whose target.
            seed: of the defense; the subject's own where that is None. An attacker who doesn't know the defender's random
                numbers has another one.
            settings: further arguments of :class:`~oag_transform.DefendedModel`, such as ``gradient``.
        """
        seed = subject.seed if seed is None else seed
        defense = nn.Identity() if self.make is None else self.make(seed)
        if not self.in_views:
            settings["shift"] = 0
        return DefendedModel(subject.target.model, defense, **settings).to(subject.device)


NO_DEFENSE = Candidate("None")

Threat = Callable[[Subject, Candidate], Tensor]
"""Who chooses the images that a candidate meets: (subject, candidate) -> (n, C, H, W) uint8 on the CPU, the subject's images in
their order, at least the first ``candidate.count`` of them. One that adapts attacks ``candidate.model(subject)``."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and the threat whose images each row is asked to classify."""

    label: str
    threat: Threat

    def images(self, subject: Subject, candidate: Candidate) -> Tensor:
        """(n, C, H, W) uint8: the images that this candidate meets, of all or of the first ``candidate.count``."""
        return self.threat(subject, candidate)[: len(subject.first(candidate.count).images)]


def clean(subject: Subject, candidate: Candidate) -> Tensor:
    """No threat: the photographs as they are."""
    return subject.images


@dataclasses.dataclass(frozen=True)
class GrayBox:
    """Someone who knows the target and no defense: the same images for every candidate."""

    attack: Attack

    def __call__(self, subject: Subject, candidate: Candidate) -> Tensor:
        """See :func:`attacked`."""
        return attacked(subject, self.attack)


@dataclasses.dataclass(frozen=True)
class Noised:
    """Gaussian noise of standard deviation ``std`` on the [0, 1] scale: no attacker, but what an attack may look like."""

    std: float

    def __call__(self, subject: Subject, candidate: Candidate) -> Tensor:
        """See :func:`noised`."""
        return noised(subject, self.std)


def choose_subject(target: Target, listing: Listing, count: int, store: Store, seed: int, device: torch.device) -> Subject:
    """The first ``count`` images, in a seeded order that takes the classes in turn, that the target classifies correctly.

    It is less meaningful to attack the others (IV-A). There are fewer where the listing has no more.

    Raises:
        ValueError: the target gets none of them right, or none can be read.
    """
    images, labels, found, looked_at = [], [], 0, 0
    parts = batches(listing, target.preprocessing, store.chunk, seed)
    for batch, truth in tqdm(parts, desc=f"{target.name}: images", unit="batch", leave=False, disable=not store.progress):
        with torch.no_grad(), _checks.rows_are(range(looked_at, looked_at + len(batch))):
            guesses = _checks.finite(target.model(batch.to(device).float() / 255)).argmax(1).cpu()
        right = (guesses == truth).nonzero().flatten()[: count - found]
        images.append(batch[right])
        labels.append(truth[right])
        found += len(right)
        looked_at += len(truth) if found < count else int(right[-1]) + 1
        if found == count:
            break
    if not looked_at:
        raise ValueError("none of the images can be read")
    if not found:
        raise ValueError(f"{target.name} gets none of {looked_at} images right: do its classes have the order of the data's?")
    return Subject(target, torch.cat(images), torch.cat(labels), listing.classes, looked_at, store, seed, device)


def attacked(subject: Subject, attack: Attack) -> Tensor:
    """The subject's images under a gray-box attack on its target, uint8."""
    settings = {name: value for name, value in vars(attack.method).items() if isinstance(value, (int, float, str))}
    key = {
        "what": "attack",
        "versions": _versions("torch", "foolbox", "numpy"),
        "attack": [attack.name, attack.eps, attack.targeted, type(attack.method).__name__, settings],
        "target": subject.target.fingerprint,
        "classes": len(subject.classes),
        "seed": subject.seed,
    }
    classes = len(subject.classes)  # inside, the name would make cloudpickle look into torch.classes, which it cannot

    def compute(rows: range) -> Array:
        images = subject.batch(subject.images, rows)
        labels = subject.labels[rows.start : rows.stop].to(subject.device)
        result = attack(subject.target.model, images, labels, classes=classes, seed=subject.seed, index=rows.start)
        return (255 * result).round().to(torch.uint8).cpu().numpy()

    return torch.from_numpy(
        subject.store.rows(key, (subject.images, subject.labels), compute, f"{subject.target.name}: {attack}")
    )


def noised(subject: Subject, std: float) -> Tensor:
    """The subject's images with Gaussian noise of standard deviation ``std`` on the [0, 1] scale, held to it, uint8."""
    generators = streams.noise_generators(subject.seed, range(len(subject.images)), torch.device("cpu"))
    noisy = torch.empty_like(subject.images)
    for row, generator in enumerate(generators):  # one at a time: floating point is four times as large
        image = subject.images[row : row + 1].float() / 255
        noisy[row] = (255 * streams.add_normal(image, std, [generator])[0]).round().to(torch.uint8)
    return noisy


def classify(subject: Subject, model: DefendedModel, images: Tensor, desc: str) -> tuple[Cell, float]:
    """Which uint8 ``images`` (in the subject's order) are right behind a defense, and the defense's median seconds an image."""
    key = {"what": "class"} | model_key(subject, model)

    def compute(rows: range) -> Array:
        batch = subject.batch(images, rows)
        with torch.no_grad(), _checks.rows_are(rows):
            start = time.perf_counter()
            purified = model.purify(batch, index=rows)
            seconds = _elapsed(start, subject.device)
            classes = model.classify(purified).argmax(1).cpu().numpy()
        return np.stack([classes, np.full(len(rows), seconds / len(rows))], 1)

    found = subject.store.rows(key, (images,), compute, desc)
    return _cell(found[:, 0], subject.labels), float(np.median(found[:, 1]))


def along(subject: Subject, model: DefendedModel, images: Tensor, steps: Sequence[int], desc: str) -> list[Cell]:
    """Which uint8 ``images`` are right after each of these network steps, of one run of our transform in a DefendedModel.

    Raises:
        TypeError: the model's defense is another one.
        DivergenceError: an image diverged.
    """
    defense = traced(model)
    key = {"what": "along", "steps": list(steps)} | model_key(subject, model)

    def compute(rows: range) -> Array:
        moments = defense.trace(subject.batch(images, rows), every=math.gcd(*steps), index=rows)
        classes = []
        for moment in moments:
            if moment.step in steps:
                with torch.no_grad(), _checks.rows_are(rows):
                    classes.append(model.classify(moment.images).argmax(1).cpu().numpy())
        return np.stack(classes, 1)

    found = subject.store.rows(key, (images,), compute, desc)
    return [_cell(column, subject.labels) for column in found.T]


def traced(model: DefendedModel) -> OnlineAlternateGenerator:
    """The model's defense, which has a trace.

    Raises:
        TypeError: it is another one than our transform.
    """
    if not isinstance(model.defense, OnlineAlternateGenerator):
        raise TypeError(f"expected an OnlineAlternateGenerator, which has a trace, got {type(model.defense).__name__}")
    return model.defense


def measure(subject: Subject, candidate: Candidate, columns: Sequence[Column]) -> Row:
    """A line of a table: the candidate on what each column holds for it.

    A defense that fails gives a line that says why, and the run goes on.
    """
    row = Row(candidate.label, (None,) * len(columns), defense=candidate.defense, setting=candidate.setting)
    try:
        model = candidate.model(subject)
        row = dataclasses.replace(row, code=in_code(model))
        part = subject.first(candidate.count)
        measured = [
            classify(part, model, column.images(subject, candidate), f"{candidate.label}: {column.label}") for column in columns
        ]
    except Exception as error:  # whatever a defense raises is its own result
        logger.warning("%s failed: %s", candidate.label, error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return dataclasses.replace(row, error=f"{type(error).__name__}: {error}")
    seconds = None if candidate.make is None else float(np.mean([seconds for _, seconds in measured]))
    return dataclasses.replace(row, cells=tuple(cell for cell, _ in measured), seconds=seconds)


def probabilities(subject: Subject, images: Tensor) -> Tensor:
    """(N, classes) probabilities that the bare target gives uint8 images or [0, 1] ones."""
    model = NO_DEFENSE.model(subject)
    found = []
    for part in images.to(subject.device).split(subject.store.chunk):
        with torch.no_grad():
            found.append(model(part if part.is_floating_point() else part.float() / 255).softmax(1).cpu())
    return torch.cat(found)


def in_code(model: DefendedModel) -> str:
    """Python that makes the model of any ``target``: what isn't a default, and no seed, as a defender draws a fresh one."""
    default = _call(model.defense) == f"{OnlineAlternateGenerator.__name__}()"
    parts = ["target"] if default else ["target", _call(model.defense)]
    given = inspect.signature(DefendedModel).parameters
    parts += [
        f"{name}={getattr(model, name)!r}" for name in ("samples", "shift") if getattr(model, name) != given[name].default
    ]
    return f"DefendedModel({', '.join(parts)})"


def _call(defense: Any) -> str:
    """``Class(...)`` with the arguments of a module that differ from their defaults, which it keeps as attributes."""
    if isinstance(defense, nn.ModuleList):
        return f"[{', '.join(map(_call, defense))}]"
    if isinstance(defense, nn.Identity):
        return "torch.nn.Identity()"
    given = []
    for name, parameter in inspect.signature(type(defense)).parameters.items():
        value = getattr(defense, name, parameter.default)
        if name == "seed" or (parameter.default is not parameter.empty and value == parameter.default):
            continue
        text = name if isinstance(value, nn.Module) else f"{value!r}"
        given.append(text if parameter.default is parameter.empty else f"{name}={text}")
    return f"{type(defense).__name__}({', '.join(given)})"


def model_key(subject: Subject, model: DefendedModel) -> dict[str, Any]:
    """What decides what a defended model makes of images, and its seconds: part of a key of :class:`.store.Store`."""
    return {
        "versions": _versions("torch", "torchvision", "numpy", "scipy", "scikit-image", "PyWavelets", "pillow", "bm3d"),
        "hardware": hardware(subject.device),
        "defense": repr(model.defense),
        "weights": [fingerprint(part) for part in model.children() if part is not model.target],
        "views": model.extra_repr(),
        "target": subject.target.fingerprint,
    }


def _versions(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # bm3d comes with an extra of its own
            found.append(f"no {package}")
    return found


def provenance(device: torch.device, packages: Sequence[str]) -> dict[str, str]:
    """What made a result, beside its data and settings: versions, hardware and command, as text."""
    return {
        "versions": ", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}",
        "hardware": hardware(device),
        "command": shlex.join(["oag-transform", *sys.argv[1:]]),
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


def _elapsed(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cell(classes: Any, labels: Tensor) -> Cell:
    return Cell("".join("1" if a == b else "0" for a, b in zip(classes.tolist(), labels.tolist(), strict=True)))
