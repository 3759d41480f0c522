"""Columns of a table: each makes the images that a row is asked to classify, or judges a row itself, through the store."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import _checks, streams
from ..defended import DefendedModel
from ..images import to_uint8
from ..transform import OnlineAlternateGenerator
from .attacks.adaptive import STREAMS_OF_AN_ATTACK, AdaptiveAttack, make_attack, randomised
from .attacks.diagnostics import BETWEEN, JUDGED, diagnose, verdict
from .attacks.gray_box import Attack
from .attacks.pgd import PGD, AttackResult, Bound, Streams, known, unknown
from .options import MOST_JUDGES, AdaptiveOptions
from .provenance import versions
from .result import AttackRecord, Cell, bits
from .store import Array, records
from .subject import UNDEFENDED, Row, Subject


class _Judged(NamedTuple):
    """What the judge says of a point; the smaller of two is better for the attacker."""

    kept: bool  # the vote
    right: int  # draws
    minus_margin: float  # the mean over draws


class Column(Protocol):
    """A column of a table."""

    @property
    def label(self) -> str:
        """Its heading."""

    def cell(self, subject: Subject, row: Row, model: DefendedModel) -> tuple[Cell, float | None]:
        """What the row has right, and the seconds an image that its defense takes; ``model``: the row's."""


@dataclasses.dataclass(frozen=True)
class Images:
    """A column of images that do not depend on the row, which each row classifies once.

    Attributes:
        label: its heading.
        of: the subject -> (N, C, H, W) uint8 on the CPU, in the order of its images.
    """

    label: str
    of: Callable[[Subject], Tensor]

    def cell(self, subject: Subject, row: Row, model: DefendedModel) -> tuple[Cell, float]:
        """See :class:`Column`."""
        part = subject.first(row.count)
        return classify(part, model, self.of(subject)[: len(part.images)], f"{row.label}: {self.label}")


CLEAN = Images("Clean", lambda subject: subject.images)


def given(label: str, pixels: Tensor) -> Images:
    """Images (N, 3, crop, crop) uint8, in the order of the subject's."""
    return Images(label, lambda _: pixels)


def gray_box_column(attack: Attack) -> Images:
    """Images attacked by someone who knows the target and no defense."""
    return Images(str(attack), lambda subject: attacked(subject, attack))


def noise(std: float) -> Images:
    """Images with Gaussian noise of standard deviation ``std`` on the [0, 1] scale."""
    return Images(f"Gaussian noise, std {std:g}", lambda subject: noised(subject, std))


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Each row under several adaptive attacks, one after another, judged by the majority vote of fresh draws.

    The first attack is run on the images that are still right, a later one on those that some draw of the judge has right. It
    starts from the best point so far: one whose vote is lost, of equal ones that which the fewest draws have right, and then
    that with the highest mean margin. Fresh draws judge it in the end.
    Images that were lost at a smaller bound are judged at their point too, for the accuracy of a single draw.

    Attributes:
        bound: None for clean images, which no attack is run on.
        options: steps, draws and queries of the attacks.
        attacks: names of the attacks.
        previous: the column of the next smaller bound: what is misclassified there is here, and attacks start from its points.
    """

    bound: Bound | None
    options: AdaptiveOptions
    attacks: tuple[str, ...] = ()
    previous: "Adaptive | None" = None

    @property
    def label(self) -> str:
        """The bound."""
        return "Clean" if self.bound is None else str(self.bound)

    def draws(self, model: DefendedModel) -> int:
        """Draws that judge a row: one, where another would give the same."""
        return self.options.judge if self._random(model) else 1

    def cell(self, subject: Subject, row: Row, model: DefendedModel) -> tuple[Cell, float | None]:
        """Accuracy under the attacks, and for clean images the seconds of one draw of defense and target."""
        found = self.states(subject, row)
        attacks, diagnostics = [], list[str]()
        for number, name in enumerate(self.attacks):
            at = found["attacked"][:, number].nonzero()[0]
            if not len(at):
                continue
            mine = found[at]
            losses = torch.from_numpy(mine["losses"][:, number].T.copy())
            losses = losses[~losses.isnan().any(1)]
            lengths = torch.from_numpy(mine["gradients"][:, number].copy())
            fell_back = bool(mine["fell_back"][:, number].any())
            diagnostics += diagnose(name, AttackResult(torch.empty(0), losses, lengths[~lengths.isnan()], fell_back))
            attacks.append(
                AttackRecord(
                    name,
                    tuple(at.tolist()),
                    tuple(mine["counts"][:, number].tolist()),
                    self.draws(model),
                    bits(mine["votes"][:, number]),
                    round(float(mine["seconds"][:, number].mean()), 2),
                    self._gradients(name, row, model),
                    tuple(round(each, 3) for each in losses.mean(1).tolist()),
                )
            )
        draws = self.draws(model)
        counts = tuple(found["count"].tolist()) if draws > 1 else ()
        cell = Cell(bits(found["right"]), draws=draws, counts=counts, attacks=tuple(attacks), diagnostics=tuple(diagnostics))
        return cell, float(np.median(found["time"])) if self.bound is None else None

    def states(self, subject: Subject, row: Row) -> Array:
        """For each image its ``point`` (C, H, W), if it is ``right`` by vote, the ``count`` of right draws, and the attacks."""
        part = subject.first(row.count)
        defender = row.model(part)
        attacker = defender if self.options.seed_known else row.model(part, seed=part.seed + 1)
        before = None if self.previous is None else self.previous.states(subject, row)
        points = part.images.float() / 255 if before is None else torch.from_numpy(before["point"].copy())
        still = torch.ones(len(points), dtype=torch.bool) if before is None else torch.from_numpy(before["right"].copy())
        settings = {
            name: value for name, value in vars(self.options).items() if name not in ("attacks", "linf", "l2", "each_alone")
        }
        key = {
            "what": "adaptive",
            "bound": None if self.bound is None else [self.bound.norm, self.bound.eps],
            "attacks": self.attacks,
            "settings": settings,
            "libraries": versions("foolbox", "pyautoattack"),
        } | part.key(defender)

        def compute(rows: range) -> Array:
            at = slice(rows.start, rows.stop)
            return self._attacked(part, defender, attacker, rows, points[at], still[at])

        desc = f"{row.label}: {self.label}"
        return part.store.rows(key, (part.images, part.labels, points, still), compute, desc)

    def _attacked(
        self,
        part: Subject,
        defender: DefendedModel,
        attacker: DefendedModel,
        rows: range,
        points: Tensor,
        still: Tensor,
    ) -> Array:
        """The records of some rows, from the points of the smaller bound and who is still right."""
        images, labels = part.batch(part.images, rows), part.labels[rows.start : rows.stop].to(part.device)
        points, count = points.to(part.device, copy=True), len(rows)
        shape = (count, len(self.attacks))
        longest = max(self.options.steps, self.options.exact_steps, self.options.expected_steps)
        found: dict[str, Any] = {
            "attacked": np.zeros(shape, bool),
            "counts": np.zeros(shape, np.int32),
            "votes": np.zeros(shape, bool),
            "fell_back": np.zeros(shape, bool),
            "seconds": np.zeros(shape, np.float32),
            "gradients": np.full(shape, np.nan, np.float32),
            "losses": np.full((*shape, longest), np.nan, np.float32),
        }
        at = still.nonzero().flatten().tolist() if self.bound is not None else []
        best = dict(zip(at, self._judged(defender, points[at], labels[at], rows, at, BETWEEN), strict=True)) if at else {}
        for number, name in enumerate(self.attacks):
            at = [i for i in at if best[i].right or not number]  # a lost vote may be chance: until no draw is right
            if not at or self.bound is None:
                continue
            attack = self._made(name, attacker, self.bound)
            start = _cpu_clock(part.device)
            result = attack(
                attacker, images[at], labels[at], points[at], self._streams(rows, at, number * STREAMS_OF_AN_ATTACK)
            )
            seconds = (_cpu_clock(part.device) - start) / len(at)
            first = BETWEEN + MOST_JUDGES * (number + 1)
            judged = self._judged(defender, result.images, labels[at], rows, at, first)
            for i, place in enumerate(at):
                if judged[i] < best[place]:
                    best[place], points[place] = judged[i], result.images[i]
            found["attacked"][at, number], found["seconds"][at, number] = True, seconds
            found["counts"][at, number] = [each.right for each in judged]
            found["votes"][at, number] = [each.kept for each in judged]
            found["fell_back"][at, number] = result.fell_back
            if len(result.gradients):
                found["gradients"][at, number] = result.gradients.cpu().numpy()
            if len(result.losses):
                found["losses"][at, number, : len(result.losses)] = result.losses.T.cpu().numpy()
        # the least of several noisy counts is too low: fresh draws for what was chosen
        start = _cpu_clock(part.device)
        judged = self._judged(defender, points, labels, rows, range(count), JUDGED)
        took = (_cpu_clock(part.device) - start) / count / self.draws(defender)
        kept, counts = np.array([each.kept for each in judged]), np.array([each.right for each in judged], np.int32)
        return records(point=points.cpu(), right=kept & still.numpy(), count=counts, time=np.full(count, took), **found)

    def _judged(
        self, defender: DefendedModel, points: Tensor, labels: Tensor, rows: range, at: Sequence[int], first: int
    ) -> list[_Judged]:
        """The :func:`.verdict` on the points in some places of the rows."""
        streams = self._streams(rows, at, 0)
        counts, votes, margins = verdict(defender, points, labels, self.draws(defender), first=first, streams=streams)
        return list(map(_Judged, votes.tolist(), counts.tolist(), (-margins).tolist()))

    def _streams(self, rows: range, at: Sequence[int], first: int) -> Streams:
        """Streams of the images in some places of the rows, whichever chunk they are in."""
        chosen = known if self.options.seed_known else unknown
        return lambda image, draw: chosen(rows.start + at[image], draw + first)

    def _random(self, model: DefendedModel) -> bool:
        """Whether another draw of a row gives another result: not where its seed is fixed and known."""
        return randomised(model.defense, seed_known=self.options.seed_known)

    def _made(self, name: str, model: DefendedModel, bound: Bound) -> AdaptiveAttack:
        """The attack of a name on a row."""
        return make_attack(name, bound, self.options, randomised=self._random(model), views=model.shift != 0)

    def _gradients(self, name: str, row: Row, model: DefendedModel) -> int | None:
        """Gradients of a single draw that PGD takes for an image."""
        if self.bound is None:
            return None
        algorithm = self._made(name, model, self.bound).algorithm
        return algorithm.steps * algorithm.draws if isinstance(algorithm, PGD) else None


def adaptive_columns(options: AdaptiveOptions, norm: str, attacks: tuple[str, ...]) -> list[Adaptive]:
    """Clean images, and a column for each bound of a norm, upwards."""
    bounds = [Bound("linf", eps / 255) for eps in options.linf] if norm == "linf" else [Bound("l2", eps) for eps in options.l2]
    columns = [Adaptive(None, options)]
    for bound in sorted(bounds, key=lambda bound: bound.eps):
        columns.append(Adaptive(bound, options, attacks, columns[-1]))
    return columns


def attacked(subject: Subject, attack: Attack) -> Tensor:
    """The subject's images under a gray-box attack on its target, uint8."""
    settings = {name: value for name, value in vars(attack.method).items() if isinstance(value, (int, float, str))}
    classes = len(subject.classes)  # inside, the name would make cloudpickle look into torch.classes, which it cannot
    key = {
        "what": "attack",
        "versions": versions("torch", "foolbox", "numpy"),
        "attack": [attack.name, attack.eps, attack.targeted, type(attack.method).__name__, settings],
        "target": subject.target.fingerprint,
        "classes": classes,
        "seed": subject.seed,
    }

    def compute(rows: range) -> Array:
        images = subject.batch(subject.images, rows)
        labels = subject.labels[rows.start : rows.stop].to(subject.device)
        result = attack(subject.target.model, images, labels, classes=classes, seed=subject.seed, index=rows.start)
        return to_uint8(result).cpu().numpy()

    return torch.from_numpy(
        subject.store.rows(key, (subject.images, subject.labels), compute, f"{subject.target.name}: {attack}")
    )


def noised(subject: Subject, std: float) -> Tensor:
    """The subject's images with Gaussian noise of standard deviation ``std`` on the [0, 1] scale, clipped to it, uint8."""
    generators = streams.noise_generators(subject.seed, range(len(subject.images)), torch.device("cpu"))
    noisy = torch.empty_like(subject.images)
    for row, generator in enumerate(generators):  # one at a time: floating point is four times as large
        image = subject.images[row : row + 1].float() / 255
        noisy[row] = to_uint8(streams.add_normal(image, std, [generator])[0])
    return noisy


def classify(subject: Subject, model: DefendedModel, images: Tensor, desc: str) -> tuple[Cell, float]:
    """Which uint8 ``images`` (in the subject's order) are right behind a defense, and the defense's median seconds an image."""
    key = {"what": "class"} | subject.key(model)

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
    """Which uint8 ``images`` are right after each of these network steps, of one run of OAG in a DefendedModel.

    Raises:
        TypeError: the model's defense is another one.
        DivergenceError: an image diverged.
    """
    defense = traced(model)
    key = {"what": "along", "steps": list(steps)} | subject.key(model)

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
        TypeError: it is another one than OAG.
    """
    if not isinstance(model.defense, OnlineAlternateGenerator):
        raise TypeError(f"expected an OnlineAlternateGenerator, which has a trace, got {type(model.defense).__name__}")
    return model.defense


def probabilities(subject: Subject, images: Tensor) -> Tensor:
    """(N, classes) probabilities that the undefended target gives uint8 images or [0, 1] ones."""
    model = UNDEFENDED.model(subject)
    found = []
    for part in images.to(subject.device).split(subject.store.chunk):
        with torch.no_grad():
            logits = model(part if part.is_floating_point() else part.float() / 255)
        found.append(logits.softmax(1).cpu())
    return torch.cat(found)


def _cpu_clock(device: torch.device) -> float:
    """Seconds of the processors, which other work on the machine doesn't lengthen; wall-clock seconds with CUDA."""
    return _elapsed(0, device) if device.type == "cuda" else time.process_time()


def _elapsed(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cell(classes: Any, labels: Tensor) -> Cell:
    return Cell(bits(a == b for a, b in zip(classes.tolist(), labels.tolist(), strict=True)))
