"""``oag-transform purify``: image files in, purified image files out."""

import argparse
import contextlib
import secrets
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .jobs import FORMATS, Job, existing, plan

HELP = "purify image files, and folders of them"
EXTRA: str | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of the command; see :func:`add_arguments`."""

    images: list[str]
    out: Path
    format: str
    overwrite: bool
    skip_existing: bool
    resize: int | None
    paper: bool
    network_steps: int | None
    threshold: float | None
    strength: float | None
    seed: int | None
    device: str
    batch_size: int
    jobs: int
    progress: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Purify image files. A file that can't be read is named, the others go on, and the exit status is 1. The results keep "
        "the folders' tree, and the files' names, formats, EXIF, colour profiles and resolutions. Files are written whole or "
        "not at all: after an interruption, --skip-existing goes on."
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, folders (with the folders in them) and globs such as 'a/**/*.png'")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the purified images")
    add(
        "--format",
        choices=["keep", *FORMATS],
        default="keep",
        help="keep: that of the source, png where it can't be written (default: %(default)s; jpeg and webp have quality 95)",
    )
    replace = parser.add_mutually_exclusive_group()
    replace.add_argument("--overwrite", action="store_true", help="replace results that are there; else they are refused")
    replace.add_argument("--skip-existing", action="store_true", help="leave results that are there, and make the others")
    add("--resize", type=int, metavar="N", help="short side in pixels: all that a classifier sees, and all that it costs")
    add("--paper", action="store_true", help="the paper's setting: exact, and some 200 times slower")
    add("--network-steps", type=int, metavar="N", help="T_N; more of them keep more detail, adversarial noise included")
    add("--threshold", type=float, metavar="X", help="a higher one removes more of an attack, and more of the picture")
    add(
        "--strength",
        type=float,
        metavar="X",
        help="temperature, share of the threshold, up to 1 (default: by the image's noise; paper: 1)",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="repeat a result, which follows the file's name within the folder that is given (default: fresh randomness)",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--batch-size", type=int, default=1, metavar="N", help="images of equal size at once, for a GPU (default: %(default)s)")
    add("--jobs", type=int, default=1, metavar="N", help="processes, which share the processors (default: %(default)s)")
    add("--progress", action="store_true", help="a progress bar, also where the output is no terminal")


def run(options: argparse.Namespace) -> int:
    """Purify the images; 1 where some of them failed."""
    return purify(Options(**{field.name: getattr(options, field.name) for field in fields(Options)}))


def purify(options: Options) -> int:
    """See :func:`run`.

    Raises:
        ValueError: arguments that can't work, found before any work.
        OSError: nothing can be written.
        KeyboardInterrupt: by Ctrl-C; all files are whole.
    """
    from .. import _checks  # imports torch, as does the worker
    from . import worker

    chosen = ("network_steps", "threshold", "strength", "seed")
    settings = worker.Settings(
        paper=options.paper,
        chosen=tuple((name, getattr(options, name)) for name in chosen if getattr(options, name) is not None),
        device=options.device,
        resize=options.resize,
        token=secrets.token_hex(4),
    )
    worker.check(settings)
    size = _checks.integer("batch_size", options.batch_size, at_least=1)
    processes = _checks.integer("jobs", options.jobs, at_least=1)
    jobs, failed, skipped = _plan(options)
    work = worker.batches(jobs, size)
    bar = _Bar(len(jobs), options.progress)
    done = 0
    runs = worker.serial(settings, work) if processes == 1 else worker.parallel(settings, work, processes)
    try:
        with contextlib.closing(runs):  # ends its processes, also after Ctrl-C
            for results in runs:
                for job, error, notes in results:
                    for note in notes:
                        bar.tell(f"{job.source}: {note}")
                    if error is not None:
                        bar.tell(error)
                    failed += error is not None
                    done += error is None
                bar.advance(len(results))
    finally:
        bar.close()
        print(f"{done} purified, {skipped} there already, {failed} failed", flush=True)
    return 1 if failed else 0


def _plan(options: Options) -> tuple[list[Job], int, int]:
    """The jobs to do, the number of inputs that are no images, and of jobs that are done already."""
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is there and is no folder; choose another --out")
    jobs, problems, notes = plan(options.images, options.out, FORMATS.get(options.format))
    if not jobs and not problems:
        raise ValueError(f"no image in {', '.join(options.images)}")
    there = existing(jobs)
    if there and not (options.overwrite or options.skip_existing):
        first = next(job.target for job in jobs if job in there)
        more = f", and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(f"{first} is there already{more}; --skip-existing makes the others, --overwrite replaces them")
    for line in problems + notes:
        _tell(line)
    if options.skip_existing:
        return [job for job in jobs if job not in there], len(problems), len(there)
    return jobs, len(problems), 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


class _Bar:
    """Count, rate and time left, where somebody looks on, or asked for them."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar: Any = None
        if wanted or sys.stderr.isatty():
            with contextlib.suppress(ImportError):  # no bar then
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="image", file=sys.stderr)

    def tell(self, line: str) -> None:
        """Print a line to standard error, above the bar."""
        if self._bar is None:
            _tell(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
