"""What is purified: the image files among files, folders and globs, and the file that each becomes; all before any work."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..files import one_line

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif", "bmp": ".bmp"}
"""Formats that are written, each with its suffix: those that hold 8 bits a channel of an RGB or greyscale image."""

SUFFIXES = {".jpeg": "jpeg", ".jfif": "jpeg", ".tiff": "tiff"} | {suffix: name for name, suffix in FORMATS.items()}
"""Suffixes that a result may keep, each with its format."""

OTHER_SUFFIXES = (".apng", ".avif", ".dib", ".gif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
"""Suffixes of further files that are taken for images in a folder; their results are PNG."""

IMAGE_SUFFIXES = frozenset({*SUFFIXES, *OTHER_SUFFIXES})


@dataclass(frozen=True)
class Job:
    """One image to purify.

    Attributes:
        source: its file, or what messages call it.
        target: the file to write.
        name: what its random stream follows: its path within the folder that was given, or its own name where it was given
            directly.
        content: the whole file; None: it is read from ``source``.
        problem: why it can't be read, where that is known beforehand.
        row: its row in the part of a data set that it is from.
    """

    source: Path
    target: Path
    name: str
    content: bytes | None = None
    problem: str | None = None
    row: int = 0


class SourceFile(NamedTuple):
    """A file among the inputs: ``relative`` is its path within the folder that was given, or its own name."""

    path: Path
    relative: Path
    content: bytes | None = None


class SourceFiles(NamedTuple):
    """The files among the inputs.

    Attributes:
        files: in the order of the inputs.
        problems: each input that is none, and each file or folder that can't be read, with the reason.
        notes: a line about files that are left out.
    """

    files: list[SourceFile]
    problems: list[tuple[str, str]]
    notes: list[str]


def find(inputs: Iterable[str], out: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> SourceFiles:
    """The files among ``inputs``: files, folders and globs.

    Args:
        inputs: a folder stands for the files in it and in the folders in it, linked ones included; hidden files are left out,
            and ``out`` where it lies inside. A pipe that is given by its name is read here, once, as no other process has it.
        out: folder of the results.
        suffixes: of the files that are taken from folders, in lower case.
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
            for file in _walk(path, (os.path.realpath(out), os.path.realpath(path)), found):
                if file.suffix.lower() in wanted:
                    _add(found, SourceFile(file, file.relative_to(path)), by_name=False)
                else:
                    others[file.suffix or file.name] += 1
    if others:
        listed = one_line(", ".join(f"{count} {name}" for name, count in others.most_common(5)))
        found.notes.append(f"left out {others.total()} file(s) in folders that are no images by their suffix: {listed}")
    return found


def _expand(given: str) -> Iterator[Path]:
    if os.path.lexists(given):  # also where its name has the characters of a pattern
        yield Path(given)
    elif glob.has_magic(given):
        yield from map(Path, sorted(glob.glob(given, recursive=True)))


def _walk(folder: Path, closed: tuple[str, ...], found: SourceFiles) -> Iterator[Path]:
    """Files below a folder; ``closed``: the real paths of the results' folder, and of all that lead here."""
    try:
        paths = [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        found.problems.append((str(folder), str(error.strerror)))
        return
    yield from (path for path in paths if not path.is_dir())
    for path in filter(Path.is_dir, paths):
        real = os.path.realpath(path)
        if real not in closed:
            yield from _walk(path, (*closed, real), found)
        elif real != closed[0]:
            found.notes.append(f"{one_line(str(path))}: left out, a link to a folder that it lies in")


def _add(found: SourceFiles, file: SourceFile, *, by_name: bool) -> None:
    try:
        mode = file.path.stat().st_mode
        if stat.S_ISFIFO(mode) and by_name:
            file = file._replace(content=file.path.read_bytes())
        elif not stat.S_ISREG(mode):
            found.problems.append((str(file.path), "it is a pipe, a socket or a device, not a file"))
            return
        elif by_name and file.path.parts[:2] == ("/", "dev"):  # /dev/stdin, whose file is another one elsewhere
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
    """A job for each of the image files, each file once, though it may have been given twice.

    Args:
        files: see :func:`find`.
        out: folder of the results.
        suffix: of the results; None: the source's own where its format can hold a result, else ``.png``.

    Raises:
        ValueError: two images would be written to one file, or a result over an image that is to be read.
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
                "purify them one after the other to two folders"
            )
    for target, job in by_target.items():
        if target in read:
            raise ValueError(f"{job.target} would be overwritten, and it is one of the images to purify; choose another --out")
    return list(by_target.values())


def _remedy(first: Job, second: Job, suffix: str | None) -> str:
    """What makes two targets of one, in the words of the command line."""
    if first.source.parent != second.source.parent:
        return "give the folder that holds both"
    if suffix is not None and target_in(Path(), Path(first.name), None) != target_in(Path(), Path(second.name), None):
        return "use --format keep"
    return "rename one of them"


def target_in(out: Path, relative: Path, suffix: str | None) -> Path:
    """The file of the result of an image at ``relative``; see :func:`jobs_of`."""
    kept = relative.suffix if relative.suffix.lower() in SUFFIXES else ".png"
    if suffix is not None and SUFFIXES.get(relative.suffix.lower()) != SUFFIXES[suffix]:
        kept = suffix
    return out / relative.with_suffix(kept)


def existing(jobs: Sequence[Job]) -> set[Job]:
    """Those whose result is there already."""
    return {job for job in jobs if os.path.lexists(job.target)}
