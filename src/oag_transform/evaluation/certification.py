"""Certified accuracy: which photographs a smoothed classifier is proven to get right within a radius, behind each denoiser.

Photographs are taken whether the target gets them right or not: certified accuracy counts the wrong ones as 0. Every draw that
was counted is kept, so that another ``alpha`` costs nothing (:meth:`Certification.at`), and an interrupted run goes on.
"""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _checks
from ..defended import DefendedModel
from ..baselines.catalogue import OAG_KEY
from ..baselines.smoothing import Denoiser
from ..generator.run import operands
from ..generator.settings import Settings
from ..smoothed import COUNTING, LOOKS, SELECTION, Certificate, SmoothedModel, Tally, certificate, lower_bound
from .batch_norm import adapted, batch_norms
from .data import Listing, read_images, shuffled
from .measure import Subject, in_code, model_key, provenance
from .results import Cell, paired, put
from .store import DAMAGED, Store, fingerprint, sources
from .targets import Target

logger = logging.getLogger(__name__)

RADII = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""L2 radii of the tables, on the [0, 1] scale, as far as a number of draws can prove them."""

ADAPTED_ON = 128
"""Photographs that batch normalization is adapted to a denoiser on."""

KEPT_EVERY = 4  # batches of draws after which a tally is written


@dataclass(frozen=True)
class Plan:
    """What is to be proven, fixed before an image is seen.

    Attributes:
        n0: draws that choose the class.
        n: draws that are counted for it.
        alpha: probability that a certificate is wrong.
        radius: see :meth:`~oag_transform.SmoothedModel.certify`; None to count all ``n``.
        seed: of the order of the photographs, the noise and the denoisers.
        batch_size: draws that are classified together.
    """

    n0: int
    n: int
    alpha: float
    radius: float | None
    seed: int
    batch_size: int

    @property
    def looks(self) -> int:
        """How many times counting may stop."""
        return 1 if self.radius is None else len({max(1, round(share * self.n)) for share in LOOKS})


@dataclass(frozen=True)
class Counted:
    """A photograph, and the classes that were seen in its draws.

    Attributes:
        name: ``CLASS/FILE``.
        truth: its class.
        tally: see :class:`~oag_transform.smoothed.Tally`.
        seconds: that all its draws took.
    """

    name: str
    truth: int
    tally: Tally
    seconds: float

    @property
    def draws(self) -> int:
        """Draws of both kinds."""
        return self.tally.draws(SELECTION) + self.tally.draws(COUNTING)

    @property
    def share(self) -> float:
        """Share of the counted draws that are right: the accuracy of a single draw."""
        counted = self.tally.counted
        return 0.0 if counted is None else int(counted[self.truth]) / int(counted.sum())


@dataclass(frozen=True)
class CertifiedRow:
    """A denoiser at one noise.

    Attributes:
        denoiser: its key; with ``+bn`` where the target's batch normalization was adapted to it.
        name: its label.
        noise_std: of the smoothing noise, on the [0, 1] scale.
        code: Python that makes the classifier that was smoothed.
        photographs: in the order in which all rows have them.
        error: why it could not be measured; empty where it could.
    """

    denoiser: str
    name: str
    noise_std: float
    code: str
    photographs: tuple[Counted, ...]
    error: str = ""

    @property
    def one_draw(self) -> float:
        """Accuracy of a single draw, in [0, 1]."""
        return sum(each.share for each in self.photographs) / len(self.photographs)

    @property
    def seconds(self) -> float:
        """Median over the photographs of the seconds that a draw takes, denoiser and target."""
        return median(each.seconds / each.draws for each in self.photographs)


@dataclass(frozen=True)
class Certification:
    """All rows, and what is needed to repeat them.

    Attributes:
        rows: for each noise, ours and its controls.
        alpha: probability that a certificate is wrong.
        n0, n, looks: see :class:`Plan`.
        clean: which of the photographs the bare target has right without noise.
        shape: (C, H, W) of the photographs.
        facts: data, target, seed, versions, hardware and command.
    """

    rows: tuple[CertifiedRow, ...]
    alpha: float
    n0: int
    n: int
    looks: int
    clean: Cell
    shape: tuple[int, int, int]
    facts: dict[str, Any]

    def at(self, alpha: float) -> "Certification":
        """What the same draws prove with another ``alpha``."""
        return dataclasses.replace(self, alpha=alpha)

    def certificates(self, row: CertifiedRow) -> list[Certificate]:
        """Of each photograph of a row."""
        return [certificate(each.tally, row.noise_std, self.alpha, self.looks) for each in row.photographs]

    def certified(self, row: CertifiedRow, radius: float) -> Cell:
        """Which photographs are proven to be right within an L2 radius; for 0, within some radius above 0."""
        pairs = zip(self.certificates(row), row.photographs, strict=True)
        return Cell("".join("01"[int(found.label == each.truth and found.radius >= radius)] for found, each in pairs))

    def attainable(self, noise_std: float) -> float:
        """The radius that is proven where every draw is of one class: no more can be, with so many."""
        p = lower_bound(self.n, self.n, self.alpha / self.looks)
        return noise_std * NormalDist().inv_cdf(p) if p > 0.5 else 0.0

    def radii(self, noise_std: float) -> list[float]:
        """Those of :data:`RADII` that can be proven."""
        return [radius for radius in RADII if radius <= self.attainable(noise_std)]

    def against(self, row: CertifiedRow, radius: float) -> tuple[int, int, float]:
        """Ours against a control of the same noise, photograph by photograph.

        Returns how many are certified right with ours alone and with the control alone, and the two-sided p-value of the exact
        sign test.

        Raises:
            ValueError: ours was not measured at this noise.
        """
        ours = self.ours(row.noise_std)
        if ours is None:
            raise ValueError(f"expected a row of ours with noise of {row.noise_std:g}, got none")
        return paired([self.certified(ours, radius)], [self.certified(row, radius)])

    def ours(self, noise_std: float) -> CertifiedRow | None:
        """Our row at this noise, where there is one that could be measured."""
        found = [row for row in self.at_noise(noise_std) if row.denoiser == OAG_KEY and not row.error]
        return found[0] if found else None

    def at_noise(self, noise_std: float) -> list[CertifiedRow]:
        """The rows of one noise."""
        return [row for row in self.rows if row.noise_std == noise_std]

    @property
    def noises(self) -> list[float]:
        """Standard deviations, in the order in which they were asked for."""
        return list(dict.fromkeys(row.noise_std for row in self.rows))

    @property
    def smaller(self) -> float:
        """How many times smaller than an L2 radius the L-infinity radius is that it implies: sqrt(C H W)."""
        return math.sqrt(math.prod(self.shape))


def grey_levels(radius: float, smaller: float) -> float:
    """The L-infinity radius that an L2 radius implies, in grey levels (0 to 255); ``smaller``: see :class:`Certification`."""
    return 255 * radius / smaller


def certify(
    target: Target,
    listing: Listing,
    data: str,
    noises: Sequence[float],
    denoisers: Sequence[Denoiser],
    count: int,
    plan: Plan,
    cache: Path,
    *,
    others: Listing | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Certification:
    """Certify the first ``count`` photographs, in a seeded order that takes the classes in turn, behind every denoiser.

    Args:
        target: the classifier.
        listing: the photographs.
        data: their name.
        noises: standard deviations of the smoothing noise, on the [0, 1] scale.
        denoisers: see :data:`oag_transform.baselines.smoothing.DENOISERS`.
        count: of photographs, right or wrong.
        plan: see :class:`Plan`.
        cache: folder of tallies, one file for each photograph and row. What is in it is taken from there.
        others: photographs apart from those; every denoiser then has a second row, with the target's batch normalization
            :func:`~.batch_norm.adapted` to it on the first :data:`ADAPTED_ON` of these.
        dtype: of our convolutions; None for float32.
        device: where the target and the denoisers run.
        progress: show a bar.

    Raises:
        ValueError: a denoiser can't be made here, no photograph can be read, or ``others`` with a target without batch
            normalization. Nothing was counted.
    """
    device = torch.device(device)
    models = [
        (noise_std, denoiser, _smoothed(target.model, _made(denoiser, noise_std, plan, dtype), noise_std, plan).to(device))
        for noise_std in noises
        for denoiser in denoisers
    ]
    apart: list[Tensor | None] = [None]
    if others is not None:
        batch_norms(target)
        apart.append(read_images(others, shuffled(others, plan.seed)[:ADAPTED_ON], target.preprocessing)[0])
    images, positions = read_images(listing, shuffled(listing, plan.seed)[:count], target.preprocessing)
    if not positions:
        raise ValueError(f"none of the {count} images can be read")
    labels = torch.tensor([listing.labels[position] for position in positions])
    store = Store(cache, chunk=plan.batch_size)
    subject = Subject(target, images, labels, listing.classes, len(images), store, plan.seed, device)
    names = ["/".join(listing.paths[position].parts[-2:]) for position in positions]
    rows = tuple(_row(subject, names, *each, plan, cache, progress, photographs) for photographs in apart for each in models)
    packages = ("oag-transform", "torch", "torchvision", "scipy", "scikit-image", "PyWavelets", "numpy")
    facts = {
        "seed": plan.seed,
        "data": f"{data}: {len(images)} images, right or wrong",
        "target": target.name,
        "compute_dtype": str(operands(Settings(compute_dtype=dtype), torch.device(device), torch.float32)),
    } | provenance(device, packages)
    channels, height, width = images.shape[1:]
    return Certification(rows, plan.alpha, plan.n0, plan.n, plan.looks, _clean(subject), (channels, height, width), facts)


def _made(denoiser: Denoiser, noise_std: float, plan: Plan, dtype: torch.dtype | None) -> nn.Module:
    try:
        return denoiser.make(noise_std, plan.seed, dtype)
    except ModuleNotFoundError as error:
        if error.name is not None:  # a package of the extra 'eval'; BM3D says in words what it needs
            raise
        raise ValueError(str(error)) from error


def _smoothed(target: nn.Module, defense: nn.Module, noise_std: float, plan: Plan) -> SmoothedModel:
    model = DefendedModel(target, defense, shift=0)
    return SmoothedModel(model, noise_std, batch_size=plan.batch_size, seed=plan.seed)


def _clean(subject: Subject) -> Cell:
    guesses = []
    for start in range(0, len(subject.images), subject.store.chunk):
        rows = range(start, start + subject.store.chunk)
        with torch.no_grad(), _checks.rows_are(rows):
            batch = subject.batch(subject.images, rows)
            guesses.append(_checks.finite(subject.target.model(batch)).argmax(1).cpu())
    return Cell("".join("01"[int(right)] for right in torch.cat(guesses) == subject.labels))


def _row(
    subject: Subject,
    names: Sequence[str],
    noise_std: float,
    denoiser: Denoiser,
    model: SmoothedModel,
    plan: Plan,
    cache: Path,
    progress: bool,
    apart: Tensor | None,
) -> CertifiedRow:
    """A row, with batch normalization adapted on photographs apart where there are some.

    A denoiser that fails gives one that says why, and the run goes on.
    """
    defended: Any = model.model
    row = CertifiedRow(denoiser.key, denoiser.label, noise_std, in_code(defended), ())
    try:
        if apart is not None:
            row = dataclasses.replace(row, denoiser=f"{row.denoiser}+bn", name=f"{row.name}, batch normalization adapted")
            own = adapted(subject.target, defended.defense, noise_std, apart, plan.batch_size, plan.seed)
            subject = dataclasses.replace(subject, target=own)
            model = _smoothed(own.model, defended.defense, noise_std, plan)
        found = _photographs(subject, names, noise_std, model, plan, cache, progress, row.name)
        return dataclasses.replace(row, photographs=found)
    except Exception as error:  # whatever a denoiser raises is its own result
        logger.warning("%s failed: %s", row.name, error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return dataclasses.replace(row, error=f"{type(error).__name__}: {error}")


def _photographs(
    subject: Subject,
    names: Sequence[str],
    noise_std: float,
    model: SmoothedModel,
    plan: Plan,
    cache: Path,
    progress: bool,
    label: str,
) -> tuple[Counted, ...]:
    key = {
        "what": "tally",
        "sources": sources(),
        "model": model_key(subject, cast(DefendedModel, model.model)),
        "noise_std": noise_std,
        # what was counted under one plan is no part of another's proof
        "plan": dataclasses.asdict(plan) | {"alpha": None if plan.radius is None else plan.alpha},
    }
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    found = []
    for i in tqdm(range(len(names)), desc=f"{label}, {noise_std:g}", unit="image", leave=False, disable=not progress):
        path = folder / f"{i:06d}-{fingerprint(subject.images[i])}.json"
        with _checks.rows_are([i]):
            tally, seconds = _counted(model, subject.batch(subject.images, range(i, i + 1)), i, plan, path)
        found.append(Counted(names[i], int(subject.labels[i]), tally, seconds))
    return tuple(found)


def _counted(model: SmoothedModel, image: Tensor, index: int, plan: Plan, path: Path) -> tuple[Tally, float]:
    """All draws of one photograph, taking from disk what is there; and the seconds that they took."""
    tally, seconds, done = _load(path)
    if done:
        return tally, seconds
    every = KEPT_EVERY * plan.batch_size
    # with a radius counting stops by what it sees at fixed times, and a part that was kept would be one time more
    parts = [plan.n] if plan.radius is not None else [*range(every, plan.n, every), plan.n]
    for part in parts:
        start = time.perf_counter()
        model.certify(image, plan.n0, part, plan.alpha, radius=plan.radius, index=[index], tallies=[tally])
        seconds += time.perf_counter() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, json.dumps(plain_tally(tally) | {"seconds": seconds, "done": part == plan.n}))
    return tally, seconds


def _load(path: Path) -> tuple[Tally, float, bool]:
    if not path.exists():
        return Tally(), 0.0, False
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return read_tally(plain), float(plain["seconds"]), bool(plain["done"])
    except DAMAGED as error:
        logger.warning("%s is damaged and counted again: %s", path, error)
        return Tally(), 0.0, False


def plain_tally(tally: Tally) -> dict[str, Any]:
    """A tally as JSON: the classes that were seen and how often."""
    kinds = {"selection": tally.selection, "counted": tally.counted}
    plain: dict[str, Any] = {
        kind: {str(i): int(seen[i]) for i in seen.nonzero().flatten().tolist()}
        for kind, seen in kinds.items()
        if seen is not None
    }
    return plain | {"classes": max(len(seen) for seen in kinds.values() if seen is not None)}


def read_tally(plain: dict[str, Any]) -> Tally:
    """The tally of :func:`plain_tally`."""
    seen = {}
    for kind in ("selection", "counted"):
        if kind in plain:
            seen[kind] = torch.zeros(plain["classes"], dtype=torch.int64)
            for label, count in plain[kind].items():
                seen[kind][int(label)] = count
    return Tally(**seen)


def write(certification: Certification, path: Path) -> None:
    """Write everything as JSON; label, count, n and radius of each photograph are there for whoever reads it without this."""
    plain = {name: getattr(certification, name) for name in ("alpha", "n0", "n", "looks", "shape", "facts")}
    plain |= {"clean": certification.clean.right, "l2_over_linf": certification.smaller}
    plain["rows"] = [
        {name: getattr(row, name) for name in ("denoiser", "name", "noise_std", "code", "error")}
        | {
            "photographs": [
                {"name": each.name, "truth": each.truth}
                | {name: getattr(found, name) for name in ("label", "count", "n", "radius")}
                | plain_tally(each.tally)
                | {"seconds": round(each.seconds, 3)}
                for each, found in zip(row.photographs, certification.certificates(row), strict=True)
            ]
        }
        for row in certification.rows
    ]
    put(path, _in_lines(plain))


def _in_lines(plain: dict[str, Any]) -> str:
    """JSON with a line for each photograph."""

    def opened(content: dict[str, Any], inner: str, parts: Sequence[str]) -> str:
        head = json.dumps({name: value for name, value in content.items() if name != inner}, ensure_ascii=False)
        return f'{head[:-1]}, "{inner}": [\n' + ",\n".join(parts) + "\n]}"

    def row(content: dict[str, Any]) -> str:
        return opened(content, "photographs", [json.dumps(each, ensure_ascii=False) for each in content["photographs"]])

    return opened(plain, "rows", [row(each) for each in plain["rows"]]) + "\n"


def read(path: Path) -> Certification:
    """What :func:`write` has written.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(
            CertifiedRow(
                **{name: row[name] for name in ("denoiser", "name", "noise_std", "code", "error")},
                photographs=tuple(
                    Counted(each["name"], each["truth"], read_tally(each), each["seconds"]) for each in row["photographs"]
                ),
            )
            for row in plain["rows"]
        )
        channels, height, width = plain["shape"]
        same = {name: plain[name] for name in ("alpha", "n0", "n", "looks", "facts")}
        return Certification(rows=rows, clean=Cell(plain["clean"]), shape=(channels, height, width), **same)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a result of oag-transform certify") from error
