"""The work of ``oag-transform purify`` on images, for both engines: decode, purify, encode, write.

A bad image does not stop the others. Its error is part of its :class:`PurifyOutcome`.
"""

import functools
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from .. import _checks, files, images, streams
from ..transform import DivergenceError, OnlineAlternateGenerator
from . import saving
from .sources import Job


@dataclass(frozen=True)
class PurifyPlan:
    """Settings that workers receive: how to purify, and where results go.

    Attributes:
        arguments: arguments of the transform, by name.
        paper: the paper's setting, not the default.
        device: a PyTorch device.
        resize: short side in pixels to which images are resized first; None: not resized.
        batch_size: images of one size that are purified together.
        out: folder of results.
        suffix: of results; None: that of the source.
        parquet: results are rows of parquet files, not image files.
        keep: existing results are kept.
        token: see :func:`oag_transform.apps.saving.write`.
    """

    arguments: tuple[tuple[str, Any], ...] = ()
    paper: bool = False
    device: str = "cpu"
    resize: int | None = None
    batch_size: int = 1
    out: Path = Path()
    suffix: str | None = None
    parquet: bool = False
    keep: bool = True
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    def check(self) -> None:
        """Raise before any work if the plan can't be carried out here.

        Raises:
            ValueError: a bad argument, or no such device.
        """
        _checks.integer("batch_size", self.batch_size, at_least=1)
        _checks.flag("paper", self.paper)
        transform = transform_of(self)
        if self.resize is not None:
            _checks.integer("resize", self.resize, at_least=transform.settings.minimum_size)
        _checks.device("device", self.device)


class PurifyOutcome(NamedTuple):
    """The outcome of an image.

    Attributes:
        job: the image.
        content: the purified file, until it is written.
        error: one line that names the image and the error; None: no error.
        notes: messages about the image, one line each.
        there: the result existed before.
    """

    job: Job
    content: bytes | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
    there: bool = False


class _Decoded(NamedTuple):
    row: int  # in the batch
    pixels: Tensor  # (1 or 3, H, W) uint8
    kept: saving.Metadata


@functools.lru_cache(maxsize=1)
def transform_of(plan: PurifyPlan) -> OnlineAlternateGenerator:
    """The transform of a plan, constructed once."""
    make = OnlineAlternateGenerator.paper if plan.paper else OnlineAlternateGenerator
    return make(**dict(plan.arguments))


def make(plan: PurifyPlan, batch: Sequence[Job]) -> list[PurifyOutcome]:
    """Decode, purify and encode the images of a batch. Outcomes are in the order of the batch; nothing is written."""
    outcomes: dict[int, PurifyOutcome] = {}
    groups: dict[tuple[int, ...], list[_Decoded]] = {}
    for row, job in enumerate(batch):
        try:
            decoded = _decode(row, job, plan.resize)
        except (OSError, ValueError, MemoryError) as error:
            outcomes[row] = failed(job, error)
        else:
            groups.setdefault(tuple(decoded.pixels.shape), []).append(decoded)
    for group in groups.values():
        outcomes |= _make_group(plan, batch, group)
    return [outcomes[row] for row in range(len(batch))]


def save(plan: PurifyPlan, outcome: PurifyOutcome) -> PurifyOutcome:
    """Write the file of an image, if the outcome has one."""
    if outcome.content is None:
        return outcome
    try:
        saving.write(outcome.job.target, outcome.content, plan.token)
    except (OSError, RecursionError) as error:  # pathlib makes parents by recursion
        return failed(outcome.job, error, outcome.notes)
    return outcome._replace(content=None)


def purify_batch(plan: PurifyPlan, batch: Sequence[Job]) -> list[PurifyOutcome]:
    """Purify the images of a batch and write their files."""
    return [save(plan, outcome) for outcome in make(plan, batch)]


def batches(jobs: Iterable[Job], size: int) -> Iterator[tuple[Job, ...]]:
    """Jobs in batches of up to ``size`` images of equal size, according to their headers; nothing is decoded."""
    waiting: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        sides = _sides(job) if size > 1 else None
        if sides is None:
            yield (job,)
            continue
        waiting.setdefault(sides, []).append(job)
        if len(waiting[sides]) == size:
            yield tuple(waiting.pop(sides))
    yield from map(tuple, waiting.values())


def failed(job: Job, error: BaseException | str, notes: tuple[str, ...] = ()) -> PurifyOutcome:
    """The outcome of a failed image."""
    if isinstance(error, DivergenceError):  # its remedy is for callers of the transform
        error = "the energy network diverged for this image"
    line = files.reason(ValueError(error) if isinstance(error, (str, RuntimeError)) else error)
    named = files.one_line(str(job.source))
    return PurifyOutcome(job, None, line if line.startswith((f"{named}:", f"{named} ")) else f"{named}: {line}", notes)


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sides(job: Job) -> tuple[int, int] | None:
    try:
        return None if job.problem else files.size(job.source if job.content is None else job.content)
    except ValueError:  # reported when the image is decoded
        return None


def _decode(row: int, job: Job, resize: int | None) -> _Decoded:
    if job.problem is not None:
        raise ValueError(job.problem)
    decoded = files.decode(job.source if job.content is None else job.content, name=str(job.source))
    if resize is not None:
        resized = images.resize(decoded.image, resize, InterpolationMode.BICUBIC, files.one_line(str(job.source)))
        decoded = decoded._replace(image=resized)
    return _Decoded(row, tvf.pil_to_tensor(decoded.image), saving.metadata(decoded))


def _make_group(plan: PurifyPlan, batch: Sequence[Job], group: Sequence[_Decoded]) -> dict[int, PurifyOutcome]:
    """Purify images of one shape; outcomes by their rows in the batch."""
    index = [streams.index_of(batch[decoded.row].name) for decoded in group]
    try:
        pixels = torch.stack([decoded.pixels for decoded in group]).to(plan.device)
        purified = transform_of(plan)(pixels, index=index).cpu()
    except (RuntimeError, ValueError, MemoryError) as error:
        if len(group) == 1:
            (decoded,) = group
            return {decoded.row: failed(batch[decoded.row], error, decoded.kept.notes)}
        alone = (_make_group(plan, batch, [decoded]) for decoded in group)  # it may be the fault of one of them
        return {row: outcome for found in alone for row, outcome in found.items()}
    return {
        decoded.row: _encode(batch[decoded.row], image, decoded.kept) for decoded, image in zip(group, purified, strict=True)
    }


def _encode(job: Job, pixels: Tensor, kept: saving.Metadata) -> PurifyOutcome:
    try:
        content, notes = saving.encode(tvf.to_pil_image(pixels), job.target.suffix, kept)
    except (OSError, ValueError, MemoryError) as error:
        return failed(job, error, kept.notes)
    return PurifyOutcome(job, content, None, kept.notes + notes)
