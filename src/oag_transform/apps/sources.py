"""The images to purify, from files, folders and globs, and the file of each result; found before any work."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import folders
from ..files import one_line


class Format(NamedTuple):
    """An output format, which holds 8 bits per channel of an RGB or greyscale image.

    Attributes:
        suffix: of its files.
        metadata: that Pillow writes into it, by the writer's arguments.
        options: other arguments of Pillow's writer.
    """

    suffix: str
    metadata: tuple[str, ...]
    options: dict[str, Any]


FORMATS = {
    "png": Format(".png", ("exif", "icc_profile", "dpi", "pnginfo"), {}),
    "jpeg": Format(".jpg", ("exif", "icc_profile", "dpi", "xmp", "comment"), {"quality": 95, "subsampling": 0}),
    "webp": Format(".webp", ("exif", "icc_profile", "xmp"), {"quality": 95}),
    # libtiff, which compresses, writes no EXIF
    "tiff": Format(".tif", ("exif", "icc_profile", "dpi"), {"compression": "raw"}),
    "bmp": Format(".bmp", ("dpi",), {}),
}

SUFFIXES = {".jpeg": "jpeg", ".jfif": "jpeg", ".tiff": "tiff"} | {each.suffix: name for name, each in FORMATS.items()}
"""Suffixes that a result can keep, and their formats."""

OTHER_SUFFIXES = (".apng", ".avif", ".dib", ".gif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
"""Further suffixes of images in a folder, whose results are PNG."""

IMAGE_SUFFIXES = frozenset({*SUFFIXES, *OTHER_SUFFIXES})
SHARDS = PARQUET, TAR = (".parquet", ".tar")
"""Suffixes of files that hold many images."""


@dataclass(frozen=True)
class Job:
    """One image to purify.

    Attributes:
        source: the file, or its name in messages.
        target: the file to write.
        name: the name that determines its random stream: the path within the given folder, or the file's name if the file
            was given.
        content: content of the file; None: it is read from ``source``.
        problem: the reason why it can't be read, if already known.
        row: its row in its part of a data set.
    """

    source: Path
    target: Path
    name: str
    content: bytes | None = None
    problem: str | None = None
    row: int = 0


class SourceFile(NamedTuple):
    """An input file; ``relative`` is its path within the given folder, or its name."""

    path: Path
    relative: Path
    content: bytes | None = None


class SourceFiles(NamedTuple):
    """The input files.

    Attributes:
        files: in the order of the inputs.
        problems: missing inputs and unreadable files and folders, each with the reason.
        notes: lines about skipped files.
    """

    files: list[SourceFile]
    problems: list[tuple[str, str]]
    notes: list[str]


def find(inputs: Iterable[str], out: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> SourceFiles:
    """Find the files among ``inputs``: files, folders and globs.

    Args:
        inputs: a folder stands for all files in it and in its subfolders, including linked ones, except hidden files and
            ``out``. A pipe that is given by name is read here, because other processes can't open it.
        out: folder of the results.
        suffixes: of image files in folders, in lower case.
    """
    wanted = frozenset(suffixes)
    found = SourceFiles([], [], [])
    others: Counter[str] = Counter()
    for given in inputs:
        paths = list(_expand(given))
        if not paths:
            reason = "no file matches" if glob.has_magic(given) else "there is no such file or folder"
            found.problems.append((given, reason))
        for path in paths:
            if not path.is_dir():
                _add(found, SourceFile(path, Path(path.name)), by_name=str(path) == str(Path(given)))
                continue
            inside = folders.walk(path, (os.path.realpath(path),), found.problems, found.notes, skip=os.path.realpath(out))
            for file in inside:
                if file.suffix.lower() in wanted:
                    _add(found, SourceFile(file, file.relative_to(path)), by_name=False)
                else:
                    others[file.suffix or file.name] += 1
    if others:
        listed = one_line(", ".join(f"{count} {name}" for name, count in others.most_common(5)))
        found.notes.append(f"skipped {others.total()} file(s) in folders without the suffix of an image: {listed}")
    return found


def _expand(given: str) -> Iterator[Path]:
    if os.path.lexists(given):  # also if its name contains characters of a pattern
        yield Path(given)
    elif glob.has_magic(given):
        yield from map(Path, sorted(glob.glob(given, recursive=True)))


def _add(found: SourceFiles, file: SourceFile, *, by_name: bool) -> None:
    try:
        mode = file.path.stat().st_mode
        if stat.S_ISFIFO(mode) and by_name:
            file = file._replace(content=file.path.read_bytes())
        elif not stat.S_ISREG(mode):
            found.problems.append((str(file.path), "it is a pipe, a socket or a device, not a file"))
            return
        elif by_name and file.path.parts[:2] == ("/", "dev"):  # such as /dev/stdin, which is another file in another process
            file = file._replace(content=file.path.read_bytes())
    except OSError as error:
        found.problems.append((str(file.path), _reason(file.path, error)))
        return
    found.files.append(file)


def _reason(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return "it is a link to a file that isn't there"
    return error.strerror or type(error).__name__


def jobs_of(files: Iterable[SourceFile], out: Path, suffix: str | None) -> list[Job]:
    """A job for each image file, without duplicates.

    Args:
        files: see :func:`find`.
        out: folder of the results.
        suffix: of the results; None: the source's suffix if its format can hold a result, otherwise ``.png``.

    Raises:
        ValueError: two images would be written to one file, or a result would overwrite an input.
    """
    by_target: dict[str, Job] = {}
    read = set()
    for file in files:
        job = Job(file.path, target_in(out, file.relative, suffix), file.relative.as_posix(), file.content)
        first = by_target.setdefault(os.path.realpath(job.target), job)
        source = os.path.realpath(job.source)
        read.add(source)
        if first is not job and os.path.realpath(first.source) != source:
            raise ValueError(
                f"{first.source} and {job.source} would both be written to {job.target}; {_remedy(first, job, suffix)}, or "
                "purify them separately to two folders"
            )
    for target, job in by_target.items():
        if target in read:
            raise ValueError(f"{job.target} would be overwritten, and it is one of the images to purify; choose another --out")
    return list(by_target.values())


def _remedy(first: Job, second: Job, suffix: str | None) -> str:
    """The command-line option or action that separates the two results."""
    if first.source.parent != second.source.parent:
        return "give the folder that holds both"
    if suffix is not None and target_in(Path(), Path(first.name), None) != target_in(Path(), Path(second.name), None):
        return "use --format keep"
    return "rename one of them"


def target_in(out: Path, relative: Path, suffix: str | None) -> Path:
    """The result's path for an image at ``relative``; see :func:`jobs_of`."""
    kept = relative.suffix if relative.suffix.lower() in SUFFIXES else ".png"
    if suffix is not None and SUFFIXES.get(relative.suffix.lower()) != SUFFIXES[suffix]:
        kept = suffix
    name = relative.stem if relative.suffix.lower() in IMAGE_SUFFIXES else relative.name  # v1.0 and v1.1 stay apart
    return out / relative.with_name(name + kept)


def existing(jobs: Sequence[Job]) -> set[Job]:
    """Jobs that already have a result."""
    return {job for job in jobs if os.path.lexists(job.target)}
