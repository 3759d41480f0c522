"""Which image files are purified, where each result goes, and what is refused before any work."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif", "bmp": ".bmp"}
"""Formats that are written, each with its suffix: those that hold 8 bits a channel of an RGB or greyscale image."""

SUFFIXES = {".jpeg": "jpeg", ".jfif": "jpeg", ".tiff": "tiff"} | {suffix: name for name, suffix in FORMATS.items()}
"""Suffixes that a result may keep, each with its format."""

OTHER_SUFFIXES = (".apng", ".avif", ".dib", ".gif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
"""Suffixes of further files that are taken for images in a folder; their results are PNG."""

FAILURES = "_failures.csv"
"""Table of failures in the results' folder; readers of folders of parquet files leave out what begins like that."""


@dataclass(frozen=True)
class Job:
    """One image file to purify.

    Attributes:
        source: the file.
        target: the file to write.
        name: what its random stream follows: its path within the folder that was given, or its own name where it was given
            directly.
    """

    source: Path
    target: Path
    name: str


class Plan(NamedTuple):
    """What is to be done.

    Attributes:
        jobs: one for each image, in the order of the inputs.
        problems: a line about each input that is none, and about each folder that can't be read.
        notes: a line about files that are left out.
    """

    jobs: list[Job]
    problems: list[str]
    notes: list[str]


def plan(inputs: Iterable[str], out: Path, suffix: str | None) -> Plan:
    """A job for each image of ``inputs``: files, folders and globs.

    Args:
        inputs: a folder stands for the images in it and in the folders in it, whose tree is kept; hidden files are left out,
            and ``out`` where it lies inside.
        out: folder of the results.
        suffix: of the results; None: the source's own where its format can hold a result, else ``.png``.

    Raises:
        ValueError: two images would be written to one file, or a result over an image that is to be read.
    """
    jobs: list[Job] = []
    problems: list[str] = []
    others: Counter[str] = Counter()
    for given in inputs:
        found = list(_expand(given))
        if not found:
            problems.append(f"{given}: {'no file matches' if glob.has_magic(given) else 'there is no such file or folder'}")
        for path in found:
            if not path.is_dir():
                jobs.append(job_of(path, Path(path.name), out, suffix))
                continue
            for file in _walk(path, out, problems):
                if file.suffix.lower() in SUFFIXES or file.suffix.lower() in OTHER_SUFFIXES:
                    jobs.append(job_of(file, file.relative_to(path), out, suffix))
                else:
                    others[file.suffix or file.name] += 1
    listed = ", ".join(f"{count} {name}" for name, count in others.most_common(5))
    notes = [f"left out {others.total()} file(s) in folders that are no images by their suffix: {listed}"] if others else []
    return Plan(_distinct(jobs), problems, notes)


def existing(jobs: Sequence[Job]) -> set[Job]:
    """Those whose result is there already."""
    return {job for job in jobs if os.path.lexists(job.target)}


def _expand(given: str) -> Iterator[Path]:
    if os.path.lexists(given):  # also where its name has the characters of a pattern
        yield Path(given)
    elif glob.has_magic(given):
        yield from map(Path, sorted(glob.glob(given, recursive=True)))


def _walk(folder: Path, out: Path, problems: list[str]) -> Iterator[Path]:
    results = os.path.realpath(out)

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(root, name)) != results
        )
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def job_of(source: Path, relative: Path, out: Path, suffix: str | None) -> Job:
    """The job of an image whose path within what was given is ``relative``; ``out`` and ``suffix`` as in :func:`plan`."""
    kept = relative.suffix if relative.suffix.lower() in SUFFIXES else ".png"
    if suffix is not None and SUFFIXES.get(relative.suffix.lower()) != SUFFIXES[suffix]:
        kept = suffix
    return Job(source, out / relative.with_suffix(kept), relative.as_posix())


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    """The jobs, each once, though its file may have been given twice."""
    by_target: dict[str, Job] = {}
    sources = set()
    for job in jobs:
        first = by_target.setdefault(os.path.realpath(job.target), job)
        source = os.path.realpath(job.source)
        sources.add(source)
        if first is not job and os.path.realpath(first.source) != source:
            raise ValueError(
                f"{first.source} and {job.source} would both be written to {job.target}; give the folder that holds both, or "
                "another --format, or purify them one after the other to two folders"
            )
    for target, job in by_target.items():
        if target in sources:
            raise ValueError(f"{job.target} would be overwritten, and it is one of the images to purify; choose another --out")
    return list(by_target.values())
