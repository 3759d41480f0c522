"""Certified accuracy by randomized smoothing (Cohen et al. 2019) behind denoisers (Salman et al. 2020).

Images are taken whether the target gets them right or not: certified accuracy counts the wrong ones as 0. Every count is kept,
so that another ``alpha`` costs nothing, see :func:`at_alpha`.
"""

import copy
import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ... import _checks
from ...baselines.smoothing import Denoiser, denoisers
from ...defended import DefendedModel
from ...smoothed import ClassCounts, SmoothedModel, analyses_of, certified_radius
from ..columns import classify
from ..data import read_images, shuffled
from ..options import CertifyOptions
from ..plan import Plan, measure
from ..result import Cell, Certified, DrawCounts, Result, RowResult, bits, format_seconds
from ..statistics import certified, linf_radius
from ..store import Array, fingerprint, records
from ..subject import UNDEFENDED, Row, Subject
from ..targets import Target

RADII = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""L2 radii of the tables, on the [0, 1] scale, as far as a number of draws can prove them."""

ADAPTED_ON = 128
"""Images that batch normalization is adapted to a denoiser on."""

POINTS = 13  # of a curve


def check(plan: Plan) -> None:
    """Raise where :func:`certify` can't be run, before anything is counted.

    Raises:
        ValueError: a denoiser can't be made here, or batch normalization is to be adapted and the target has none.
    """
    for sigma in plan.certify.sigma:
        for denoiser in denoisers(plan.certify.denoisers):
            _made(denoiser, sigma, plan, 0)
    if plan.apart is not None and plan.unfiltered is not None:
        batch_norms(plan.unfiltered.target)


def certify(plan: Plan) -> Iterator[Result]:
    """A result for each noise: every denoiser, and each with the target's batch normalization adapted to it."""
    subject, options, apart = plan.unfiltered, plan.certify, None
    if subject is None:
        raise ValueError("certify needs images whether the target gets them right or not")
    if plan.apart is not None:
        apart = read_images(plan.apart, shuffled(plan.apart, subject.seed)[:ADAPTED_ON], subject.target.preprocessing)[0]
        if not len(apart):
            raise ValueError("none of the images for batch normalization can be read")
    clean, _ = classify(subject, UNDEFENDED.model(subject), subject.images, "undefended")
    for sigma in options.sigma:
        kinds = [None] if apart is None else [None, apart]
        rows = [_row(subject, sigma, each, plan, kind) for kind in kinds for each in denoisers(options.denoisers)]
        facts = {
            "n": len(subject.images),
            "data": f"{plan.facts['data'].rpartition(': ')[0]}: {len(subject.images)} images, right or wrong",
            "sigma": sigma,
            "n0": options.n0,
            "draws counted": options.n,
            "alpha": options.alpha,
            "analyses": len(analyses_of(options.n, options.radius)),
            "shape": list(subject.images.shape[1:]),
            "undefended, without noise": clean.right,
        }
        stem, title = f"certify-{sigma:g}", f", sigma {sigma:g}"
        figures = [Certified(plan.file(f"{stem}.svg"), f"Certified accuracy against the L2 radius, sigma {sigma:g}.", ())]
        counted = plan.result("certify", "", "Denoiser", (), rows, stem=stem, title=title, facts=facts, figures=figures)
        yield at_alpha(counted, options.alpha)


def at_alpha(result: Result, alpha: float) -> Result:
    """What the draws of a result of ``certify`` prove with another ``alpha``."""
    facts = result.facts | {"alpha": alpha}
    sigma, draws, shape = facts["sigma"], facts["draws counted"], facts["shape"]
    most = certified_radius(draws, draws, sigma, alpha / facts["analyses"])  # no more can be proven, with so many
    radii = [radius for radius in RADII if radius <= most]
    rows = []
    for row in result.rows:
        prove = partial(certified, row.certificates, sigma, alpha, facts["analyses"])
        cells = (None,) * len(radii) if row.error else tuple(prove(radius) for radius in radii)
        rows.append(replace(row, cells=cells))
    columns = tuple(
        f"L2 {radius:g} (L∞ {255 * linf_radius(radius, shape):.2f}/255)" if radius else "L2 above 0" for radius in radii
    )
    figures = [replace(each, radii=tuple(most * i / (POINTS - 1) for i in range(POINTS))) for each in result.figures]
    caption = _caption(facts, most, Cell(facts["undefended, without noise"]))
    return replace(
        result, caption=caption, columns=columns, rows=tuple(rows), facts=facts, figures=tuple(figures) if most else ()
    )


def _caption(facts: dict[str, Any], most: float, clean: Cell) -> str:
    """What a certificate is worth, which is to be said first: the L-infinity radius that it implies."""
    shape = facts["shape"]
    worth = " and ".join(
        f"{255 * linf_radius(radius, shape):.2f}/255 for {radius:.2g}" for radius in sorted({0.5, most} - {0.0})
    )
    limit = f"{most:.2g} is the most that {facts['draws counted']} draws can prove" if most else "So few draws prove nothing"
    low, high = clean.interval
    return (
        f"The certified radius is in L2 norm on the [0, 1] scale. At {shape[1]} x {shape[2]} pixels the L-infinity radius that "
        f"it implies is {1 / linf_radius(1, shape):.0f} times smaller: {worth}. {limit}. A wrong certificate has a probability "
        f"of at most {facts['alpha']:g}. {clean.n} images, right or wrong; the undefended target has "
        f"{100 * clean.accuracy:.1f}% [{100 * low:.0f}, {100 * high:.0f}] of them right without noise."
    )


def _made(denoiser: Denoiser, sigma: float, plan: Plan, seed: int) -> nn.Module:
    try:
        return denoiser.make(sigma, seed, plan.needs.compute_dtype)
    except ModuleNotFoundError as error:
        if error.name is not None:  # a package of the extra 'eval'; BM3D says in words what it needs
            raise
        raise ValueError(str(error)) from error


def _row(subject: Subject, sigma: float, denoiser: Denoiser, plan: Plan, apart: Tensor | None) -> RowResult:
    """A row, with batch normalization adapted on images apart where there are some."""
    column = _Counts(sigma, plan.certify)
    row = Row(denoiser.label, lambda seed: _made(denoiser, sigma, plan, seed), defense=denoiser.key)
    if apart is not None:
        row = dataclasses.replace(row, label=f"{row.label}, batch normalization adapted", defense=f"{row.defense}+bn")
        defense = _made(denoiser, sigma, plan, subject.seed).to(subject.device)
        adapted = adapt_batch_norm(subject.target, defense, sigma, apart, subject.store.chunk, subject.seed)
        subject = dataclasses.replace(subject, target=adapted)
    found = measure(subject, row, [column])
    if found.error:
        return found
    images = column.counts(subject, row)
    shares = [each.counted.get(each.truth, 0) / sum(each.counted.values()) for each in images]
    took = median(each.seconds / (sum(each.selection.values()) + sum(each.counted.values())) for each in images)
    notes = {"one draw": f"{100 * (sum(shares) / len(shares)):.1f}", "s a draw": format_seconds(took)}
    return replace(found, seconds=None, notes=notes, certificates=images)


@dataclasses.dataclass(frozen=True)
class _Counts:
    """The column of a noise: which images get their right class most often, with the counts that certificates come from."""

    sigma: float
    options: CertifyOptions

    @property
    def label(self) -> str:
        return f"sigma {self.sigma:g}"

    def cell(self, subject: Subject, row: Row, model: DefendedModel) -> tuple[Cell, float | None]:
        images = self.counts(subject, row)
        return Cell(bits(max(each.counted, key=each.counted.__getitem__) == each.truth for each in images)), None

    def counts(self, subject: Subject, row: Row) -> tuple[DrawCounts, ...]:
        """The counts of each image, an image at a time."""
        options, chunk = self.options, subject.store.chunk
        model = row.model(subject)
        smoothed = SmoothedModel(model, self.sigma, batch_size=chunk, seed=subject.seed).to(subject.device)
        classes = len(subject.classes)
        key = {
            "what": "counts",
            "sigma": self.sigma,
            "seed": subject.seed,  # of the noise
            "batch": chunk,
            # what was counted under one plan is no part of another's proof
            "plan": [options.n0, options.n, options.radius, None if options.radius is None else options.alpha],
        } | subject.key(model)

        def compute(rows: range) -> Array:
            counts, start = ClassCounts(), time.perf_counter()
            image = subject.batch(subject.images, rows)
            with _checks.rows_are(rows):
                smoothed.certify(
                    image, options.n0, options.n, options.alpha, radius=options.radius, index=[rows.start], counts=[counts]
                )
            seen = [
                np.zeros(classes, np.int64) if each is None else each.numpy() for each in (counts.selection, counts.counted)
            ]
            return records(selection=seen[0][None], counted=seen[1][None], seconds=[time.perf_counter() - start])

        found = subject.store.rows(key, (subject.images,), compute, f"{row.label}: {self.label}", chunk=1)
        return tuple(
            DrawCounts(name, truth, _seen(each["selection"]), _seen(each["counted"]), round(float(each["seconds"]), 3))
            for name, truth, each in zip(subject.names, subject.labels.tolist(), found, strict=True)
        )


def _seen(counts: Array) -> dict[int, int]:
    return {int(label): int(counts[label]) for label in counts.nonzero()[0]}


def adapt_batch_norm(target: Target, denoiser: nn.Module, sigma: float, images: Tensor, batch_size: int, seed: int) -> Target:
    """A target whose batch normalization has the means and variances of noisy images behind a denoiser; weights are as before.

    Args:
        target: the classifier; it is copied.
        denoiser: transform of [0, 1] batches.
        sigma: of the noise that goes first, on the [0, 1] scale.
        images: (N, C, H, W) uint8, other ones than those that are certified: statistics are fixed before these are seen.
        batch_size: images that are normalized together; each batch counts alike.
        seed: of the noise.

    Raises:
        ValueError: the target has no batch normalization with statistics.
    """
    target = target._replace(model=copy.deepcopy(target.model))
    network, layers = target.model, batch_norms(target)
    noisy = SmoothedModel(DefendedModel(network, denoiser, shift=0), sigma, samples=1, seed=seed)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:  # alone: dropout stays off
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    device = next(network.parameters()).device
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            noisy(images[start : start + batch_size].to(device).float() / 255, index=start)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    return target._replace(model=network, fingerprint=f"{fingerprint(network)}, batch norm of {target.fingerprint}")


def batch_norms(target: Target) -> list[_BatchNorm]:
    """A target's layers of batch normalization with statistics.

    Raises:
        ValueError: it has none.
    """
    layers = [layer for layer in target.model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        raise ValueError(f"expected a target with batch normalization, got {target.name}, which has none")
    return layers
