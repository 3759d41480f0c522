"""``oag-transform purify``: image files in, purified image files out."""

import argparse
import contextlib
import secrets
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .jobs import FAILURES, FORMATS, Job, existing, plan

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    from . import cluster_purify, worker

HELP = "purify image files, and folders of them"
EXTRA = "cli"
RAY_EXTRA = "ray"
ENGINES = ("local", "ray")
PARQUET = "parquet"


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
    device: str | None
    batch_size: int
    jobs: int | None
    progress: bool
    engine: str
    address: str | None
    rows: int | None
    image_column: str | None
    name_column: str | None


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
        choices=["keep", *FORMATS, PARQUET],
        default="keep",
        help="keep: that of the source, png where it can't be written (default: %(default)s; jpeg and webp have quality 95); "
        "parquet, with --engine ray: files of such files, with all other columns of their source",
    )
    replace = parser.add_mutually_exclusive_group()
    replace.add_argument("--overwrite", action="store_true", help="replace results that are there; else they are refused")
    replace.add_argument("--skip-existing", action="store_true", help="leave results that are there, and make the others")
    add("--resize", type=int, metavar="N", help="short side in pixels: all that a classifier sees, and all that it costs")
    add("--paper", action="store_true", help="the paper's setting: exact, and some 470 times slower")
    add("--network-steps", type=int, metavar="N", help="T_N; more of them keep more detail, adversarial noise included")
    add("--threshold", type=float, metavar="X", help="a higher one removes more noise, and more of the picture")
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
    add("--device", help="cpu, cuda, cuda:1, ... (default: cpu; with --engine ray: cuda where the cluster has GPUs)")
    add("--batch-size", type=int, default=1, metavar="N", help="images of equal size at once, for a GPU (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="processes, which share the processors (default: 1; with --engine ray: as many as there are GPUs, or processors)",
    )
    add("--progress", action="store_true", help="a progress bar, also where the output is no terminal")
    ray = parser.add_argument_group(
        "more than a machine (extra 'ray')",
        "--engine ray also takes parquet files and WebDataset shards, and folders of them, for IMAGE. Workers that are killed "
        f"are started again. FOLDER/{FAILURES} is the table of what failed.",
    )
    ray.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="local: this machine (default: %(default)s)")
    ray.add_argument("--address", help="of a Ray cluster (default: RAY_ADDRESS, or one on this machine for this run)")
    ray.add_argument("--rows", type=int, metavar="N", help="images of a task and a parquet file of results (default: up to 64)")
    ray.add_argument("--image-column", metavar="NAME", help="of a parquet source: whole image files (default: image)")
    ray.add_argument("--name-column", metavar="NAME", help="of a parquet source (default: name, path, ...; IMAGE.path)")


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
    if options.engine == "ray":
        return _purify_by_ray(options)
    _check_local(options)
    from .. import _checks  # imports torch, as does the worker
    from . import worker

    settings = _settings(options, "cpu" if options.device is None else options.device)
    worker.check(settings)
    size = _checks.integer("batch_size", options.batch_size, at_least=1)
    processes = 1 if options.jobs is None else _checks.integer("jobs", options.jobs, at_least=1)
    jobs, problems, skipped = _plan(options)
    failed = len(problems)
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


def _check_local(options: Options) -> None:
    for name in ("address", "rows", "image_column", "name_column"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --engine ray")
    if options.format == PARQUET:
        raise ValueError("--format parquet needs --engine ray")


def _settings(options: Options, device: str) -> "worker.Settings":
    from . import worker  # imports torch

    chosen = ("network_steps", "threshold", "strength", "seed")
    return worker.Settings(
        paper=options.paper,
        chosen=tuple((name, getattr(options, name)) for name in chosen if getattr(options, name) is not None),
        device=device,
        resize=options.resize,
        token=secrets.token_hex(4),
    )


def _purify_by_ray(options: Options) -> int:
    from .. import _checks  # imports torch, as do those beside it

    try:
        from . import cluster, cluster_purify, worker
    except ModuleNotFoundError as error:
        raise ValueError(f"--engine ray needs {error.name}: pip install 'oag-transform[{RAY_EXTRA}]'") from error

    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda with --engine ray, which chooses among GPUs, got {options.device}")
    worker.check(_settings(options, "cpu"))  # its GPUs need not be here
    size = _checks.integer("batch_size", options.batch_size, at_least=1)
    workers = None if options.jobs is None else _checks.integer("jobs", options.jobs, at_least=1)
    rows = None if options.rows is None else _checks.integer("rows", options.rows, at_least=1)
    shards = cluster_purify.find_shards(options.images, options.image_column, options.name_column)
    source, problems, skipped = _source(options, shards)
    target = cluster_purify.Target(
        options.out.absolute(),
        options.format == PARQUET,
        FORMATS.get(options.format),
        not options.overwrite,
        cluster_purify.names_in(options.out, shards),
    )
    with cluster.connected(options.address, max(worker.processors(), workers or 1)) as room:
        device = options.device or ("cuda" if room.gpus else "cpu")
        if device == "cuda" and not room.gpus:
            raise ValueError("--device cuda can't be used: the cluster has no GPU")
        settings = _settings(options, device)
        reports = cluster_purify.run(source, target, settings, room=room, workers=workers, batch_size=size, rows=rows)
        failures = [(line.partition(": ")[0], line) for line in problems]
        bar = _Bar(cluster_purify.count(source), options.progress)
        done = 0
        seen: set[int] = set()
        try:
            for report in (report for part in reports for report in part):
                problem = report.error
                stream = worker.stream(report.name)
                if problem is None and stream in seen:
                    problem = f"{report.source}: the name {report.name!r} is there more than once"
                seen.add(stream)
                for note in report.notes:
                    bar.tell(f"{report.source}: {note}")
                if problem is not None:
                    bar.tell(problem)
                    failures.append((report.source, problem))
                there = report.there and (shards is not None or target.parquet)
                skipped += problem is None and there
                done += problem is None and not there  # a file that is there now was made by a worker that was killed then
                bar.advance(1)
            cluster_purify.write_failures(target.folder, failures, settings.token)
        finally:
            bar.close()
            print(f"{done} purified, {skipped} there already, {len(failures)} failed", flush=True)
    return 1 if failures else 0


def _source(
    options: Options, shards: "cluster_purify.Shards | None"
) -> "tuple[list[Job] | cluster_purify.Shards, list[str], int]":
    """What is to be read, lines about what can't be, and the number of images that are there."""
    if options.format == PARQUET and options.overwrite:
        raise ValueError("--overwrite doesn't go with --format parquet: choose another --out, or remove what is in it")
    if shards is None and (options.image_column is not None or options.name_column is not None):
        raise ValueError("--image-column and --name-column are for parquet files")
    if shards is None and options.format != PARQUET:
        return _plan(options)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is there and is no folder; choose another --out")
    if options.out.is_dir() and any(options.out.iterdir()) and not (options.skip_existing or options.overwrite):
        raise ValueError(f"{options.out} is not empty; --skip-existing makes what is missing, or choose another --out")
    if shards is not None:
        return shards, [], 0
    jobs, problems, notes = plan(options.images, options.out, None)
    for line in problems + notes:
        _tell(line)
    return jobs, problems, 0


def _plan(options: Options) -> tuple[list[Job], list[str], int]:
    """The jobs to do, a line about each input that is no image, and the number of jobs that are done already."""
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
        return [job for job in jobs if job not in there], problems, len(there)
    return jobs, problems, 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


class _Bar:
    """Count, rate and time left, where somebody looks on, or asked for them."""

    def __init__(self, total: int | None, wanted: bool) -> None:
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
