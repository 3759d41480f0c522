"""The work behind ``oag-transform purify``: batches of image files, in this process or in several."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .. import _checks, files, images, streams
from ..transform import OnlineAlternateGenerator
from . import saving
from .jobs import Job


@dataclass(frozen=True)
class Settings:
    """How images are purified.

    Attributes:
        paper: the paper's setting, not the default.
        chosen: further arguments of the transform, by name.
        device: a PyTorch device.
        resize: short side in pixels before anything else; None: as it is.
        token: see :func:`oag_transform.apps.saving.write`.
    """

    paper: bool
    chosen: tuple[tuple[str, Any], ...]
    device: str
    resize: int | None
    token: str


class Result(NamedTuple):
    """What became of a job: ``error`` in one line, or None where its file is written; and what is to be told about it."""

    job: Job
    error: str | None
    notes: tuple[str, ...] = ()


class Made(NamedTuple):
    """What becomes of a job before anything is written: the bytes of its file, or ``error`` in one line; and its notes."""

    job: Job
    content: bytes | None
    error: str | None
    notes: tuple[str, ...] = ()


class _Read(NamedTuple):
    job: Job
    pixels: Tensor  # (1 or 3, H, W) uint8
    kept: saving.Metadata


def check(settings: Settings) -> None:
    """Raise before any work if these settings can't work.

    Raises:
        ValueError: a bad argument, or no such device here.
    """
    transform = transform_of(settings)
    if settings.resize is not None:
        _checks.integer("resize", settings.resize, at_least=transform.settings.minimum_size)
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:  # a PyTorch without CUDA asserts that
        raise ValueError(f"device {settings.device!r} can't be used here: {_first_line(error)}") from error


def batches(jobs: Iterable[Job], size: int) -> Iterator[tuple[Job, ...]]:
    """Jobs in batches of up to ``size`` images of equal sides, by their headers: nothing is decoded."""
    waiting: dict[Any, list[Job]] = {}
    for job in jobs:
        sides = _sides(job) if size > 1 else None
        if sides is None:
            yield (job,)
            continue
        waiting.setdefault(sides, []).append(job)
        if len(waiting[sides]) == size:
            yield tuple(waiting.pop(sides))
    yield from map(tuple, waiting.values())


def _sides(job: Job) -> tuple[int, int] | None:
    try:
        return files.size(job.source)
    except files.UnreadableImageError:  # told when it is its turn
        return None


def serial(settings: Settings, work: Iterable[Sequence[Job]]) -> Generator[list[Result], None, None]:
    """The results of each batch, one batch after the other."""
    for batch in work:
        yield purify_batch(settings, batch)


def parallel(settings: Settings, work: Iterator[Sequence[Job]], processes: int) -> Generator[list[Result], None, None]:
    """The results of each batch as it is done by one of several processes, which share the processors' threads.

    The processes end with the iterator, or with this process, however it ends.

    Raises:
        ChildProcessError: a process was ended from outside.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process whose threads have worked may hang
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start, (lifeline, max(1, processors() // processes)))
    running: dict[Future[list[Result]], Sequence[Job]] = {}
    try:
        while True:
            for batch in itertools.islice(work, 2 * processes - len(running)):
                with _sigint_blocked():  # a process that starts now inherits that: Ctrl-C is for this one to handle
                    running[pool.submit(purify_batch, settings, batch)] = batch
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results = future.result()
                del running[future]
                yield results
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process ended in the middle of its work, for want of memory perhaps; fewer --jobs need less, and "
            "--skip-existing goes on from here"
        ) from error
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        lifeline.close()
        for job in itertools.chain.from_iterable(running.values()):
            saving.partial_path(job.target, settings.token).unlink(missing_ok=True)


def _start(lifeline: Connection, threads: int) -> None:
    """Begin a process of :func:`parallel`."""
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()  # nothing is ever sent: it returns when the other end is closed, or its process is gone
    os._exit(0)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def purify_batch(settings: Settings, batch: Sequence[Job]) -> list[Result]:
    """Read, purify and write a batch of image files; a bad one doesn't stop the others."""
    return [write(made, settings.token) for made in make_batch(settings, batch)]


def make_batch(settings: Settings, batch: Sequence[Job], contents: Sequence[bytes] | None = None) -> list[Made]:
    """The bytes of the purified image files of a batch, in no particular order; a bad one doesn't stop the others.

    Args:
        settings: how they are purified.
        batch: the jobs; nothing is written.
        contents: the bytes of their sources; None: the files are read.
    """
    finished = []
    groups: dict[tuple[int, ...], list[_Read]] = {}
    for job, content in zip(batch, [None] * len(batch) if contents is None else contents, strict=True):
        try:
            read = _read(job, content, settings.resize)
        except ValueError as error:
            finished.append(Made(job, None, _named(job, error)))
        else:
            groups.setdefault(tuple(read.pixels.shape), []).append(read)
    for group in groups.values():
        finished += _make_group(settings, group)
    return finished


def write(made: Made, token: str) -> Result:
    """Write the file of a job, where there is one to write."""
    job, content, error, notes = made
    if content is None:
        return Result(job, error, notes)
    try:
        saving.write(job.target, content, token)
    except OSError as problem:
        return Result(job, _named(job, problem), notes)
    return Result(job, None, notes)


def _read(job: Job, content: bytes | None, resize: int | None) -> _Read:
    decoded = files.decode(job.source if content is None else content, name=str(job.source))
    if resize is not None:
        image = images.resize(decoded.image, resize, InterpolationMode.BICUBIC, files.one_line(str(job.source)))
        decoded = decoded._replace(image=image)
    return _Read(job, F.pil_to_tensor(decoded.image), saving.metadata(decoded))


def _make_group(settings: Settings, group: Sequence[_Read]) -> list[Made]:
    """Purify images of one shape."""
    images = torch.stack([read.pixels for read in group]).to(settings.device)
    try:
        purified = transform_of(settings)(images, index=[stream(read.job.name) for read in group]).cpu()
    except (RuntimeError, ValueError, MemoryError) as error:
        if len(group) == 1:
            return [Made(group[0].job, None, _named(group[0].job, error), group[0].kept.notes)]
        return [made for read in group for made in _make_group(settings, [read])]  # it may be the fault of one alone
    return [_encode(read, image) for read, image in zip(group, purified, strict=True)]


def _encode(read: _Read, pixels: Tensor) -> Made:
    try:
        content, notes = saving.encode(F.to_pil_image(pixels), read.job.target.suffix, read.kept)
    except (OSError, ValueError) as error:
        return Made(read.job, None, _named(read.job, error), read.kept.notes)
    return Made(read.job, content, None, read.kept.notes + notes)


@functools.lru_cache(maxsize=1)
def transform_of(settings: Settings) -> OnlineAlternateGenerator:
    """The transform of these settings, made once."""
    make = OnlineAlternateGenerator.paper if settings.paper else OnlineAlternateGenerator
    return make(**dict(settings.chosen))


def stream(name: str) -> int:
    """The random stream of an image's name, see :class:`oag_transform.apps.jobs.Job`."""
    return streams.index_of(name)


def _named(job: Job, error: BaseException) -> str:
    line = _first_line(error)
    return line if str(job.source) in line else f"{job.source}: {line}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
