"""Folders of files: linked folders are followed, hidden files and folders are left out."""

import os
from collections.abc import Iterator
from pathlib import Path

from .files import one_line


def entries(
    folder: Path, parents: tuple[str, ...], problems: list[tuple[str, str]], notes: list[str], skip: str = ""
) -> tuple[list[Path], list[Path]]:
    """The files and the folders in a folder, each by name.

    Args:
        folder: where to look.
        parents: the real paths of this folder and of all folders above it that were entered.
        problems: gets the path and the reason, if the folder can't be read.
        notes: gets a line for each link to one of ``parents``, which is left out.
        skip: the real path of a folder that is left out without a note.
    """
    try:
        paths = [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        problems.append((str(folder), str(error.strerror)))
        return [], []
    files, folders = [], []
    for path in paths:
        if not os.path.isdir(path):  # unlike Path.is_dir, it is no error where the path can't be looked at
            files.append(path)
        elif (real := os.path.realpath(path)) in parents:
            notes.append(f"{one_line(str(path))}: skipped, a link to a folder that contains it")
        elif real != skip:
            folders.append(path)
    return files, folders


def walk(
    folder: Path, parents: tuple[str, ...], problems: list[tuple[str, str]], notes: list[str], skip: str = ""
) -> Iterator[Path]:
    """Files in a folder, then those in its subfolders, depth first; see :func:`entries`."""
    waiting = [(folder, parents)]  # no recursion: a path may have more parts than Python's stack frames
    while waiting:
        here, above = waiting.pop()
        files, folders = entries(here, above, problems, notes, skip)
        yield from files
        waiting += [(path, (*above, os.path.realpath(path))) for path in reversed(folders)]
