"""``oag-transform purify``: image files in, purified image files out."""

import contextlib
import csv
import dataclasses
import io
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .. import files
from . import process, saving, sources
from .options import default, dtype_of

if TYPE_CHECKING:  # torch comes when the command runs, not when its arguments are parsed
    from . import worker

EXTRA = "cli"
RAY_EXTRA = "ray"
FAILURES = "_failures.csv"  # readers of folders of parquet files skip names with an underscore
THERE = tyro.conf.create_mutex_group(required=False, title="existing results")


@dataclass(frozen=True, kw_only=True)
class PurifyFiles:
    """Purify image files, and folders of them.

    Unreadable files are reported, the others are purified, and the exit status is 1. Results keep the structure of a given
    folder, and the files' names, formats, EXIF, XMP, colour profiles, resolutions, comments and texts of PNG. Each file is
    written completely or not at all. After an interruption, --skip-existing continues.

    --engine ray (extra 'ray') uses a cluster, or this machine. It also takes parquet files and WebDataset shards, and folders
    of them, as IMAGE. Killed workers are restarted. The table OUT/_failures.csv lists all failures.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")]
    """Files, folders (including subfolders) and globs such as 'a/*.png'. A file named or matched keeps only its name."""
    out: Path
    """Folder for the purified images."""
    format: Literal["keep", "png", "jpeg", "webp", "tiff", "bmp", "parquet"] = "keep"
    """keep: the format of the source, or png if it can't be written; jpeg, webp: quality 95; parquet: many images in a file."""
    overwrite: Annotated[bool, THERE] = False
    """Replace existing results."""
    skip_existing: Annotated[bool, THERE] = False
    """Keep existing results, and make the others."""
    resize: Annotated[int | None, default("none")] = None
    """Resize the short side to this number of pixels first. Time is proportional to pixels."""
    paper: bool = False
    """The paper's setting: exact, and some 380 times slower."""
    network_steps: Annotated[int | None, default("the transform's")] = None
    """T_N. More steps keep more detail, including adversarial noise."""
    threshold: Annotated[float | None, default("the transform's")] = None
    """A higher threshold removes more noise, and more of the image."""
    strength: Annotated[float | None, default("by the image's noise; --paper: 1")] = None
    """Strength of the purification, above 0 and at most 1."""
    seed: Annotated[int | None, default("fresh randomness")] = None
    """Random seed, for reproducible results. Random streams follow the file's path within the given folder."""
    compute_dtype: Annotated[Literal["float32", "bfloat16"] | None, default("the faster one on each machine")] = None
    """Operands of convolutions. float32 gives equal results on different processors, up to rounding."""
    device: Annotated[str | None, default("cpu; --engine ray: cuda if the cluster has GPUs")] = None
    """cpu, cuda, cuda:1, ..."""
    batch_size: int = 1
    """Images of equal size that are purified together, for a GPU."""
    jobs: Annotated[int | None, default("1; --engine ray: the number of GPUs, or of processors")] = None
    """Number of processes, which share the processors."""
    progress: bool = False
    """Show a progress bar even if the output is not a terminal."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: a cluster."""
    address: Annotated[str | None, default("RAY_ADDRESS, or a cluster on this machine for this run")] = None
    """With --engine ray: address of the cluster."""
    rows: Annotated[int | None, default("up to 64")] = None
    """With --engine ray: images per task, and per parquet file of results."""
    image_column: Annotated[str | None, default("image")] = None
    """Column of image files in parquet files."""
    name_column: Annotated[str | None, default("name, path, ... or IMAGE.path")] = None
    """Column of the images' names in parquet files."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("give at least one IMAGE: a file, a folder or a glob")
        for name in ("batch_size", "jobs", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.engine == "ray":
            if self.device not in (None, "cpu", "cuda"):
                raise ValueError(f"--device must be cpu or cuda with --engine ray, which chooses among GPUs, got {self.device}")
            if self.overwrite and self.format == "parquet":
                raise ValueError("--overwrite doesn't go with --format parquet: choose another --out, or remove what is in it")
            return
        for name in ("address", "rows", "image_column", "name_column"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --engine ray")
        if self.format == "parquet":
            raise ValueError("--format parquet needs --engine ray")

    def run(self) -> int:
        """Purify the images; returns 1 if some of them failed.

        Raises:
            ValueError: bad arguments, before any work.
            OSError: results can't be written.
            KeyboardInterrupt: Ctrl-C; all files are complete.
        """
        from . import worker

        chosen = {name: getattr(self, name) for name in ("network_steps", "threshold", "strength", "seed")}
        chosen["compute_dtype"] = dtype_of(self.compute_dtype)
        plan = worker.PurifyPlan(
            arguments=tuple((name, value) for name, value in chosen.items() if value is not None),
            paper=self.paper,
            device="cpu" if self.device is None or self.engine == "ray" else self.device,  # the cluster's GPUs need not be here
            resize=self.resize,
            batch_size=self.batch_size,
            out=self.out.absolute() if self.engine == "ray" else self.out,
            suffix=sources.FORMATS[self.format].suffix if self.format in sources.FORMATS else None,
            parquet=self.format == "parquet",
            keep=not self.overwrite,
        )
        plan.check()
        if os.path.lexists(self.out) and not self.out.is_dir():
            raise ValueError(f"{self.out} is there and is no folder; choose another --out")
        return self._purify_by_ray(plan) if self.engine == "ray" else self._purify_here(plan)

    def _purify_here(self, plan: "worker.PurifyPlan") -> int:
        from . import local_purify

        found = sources.find(self.images, self.out)
        if shards := [file.path for file in found.files if file.path.suffix.lower() in sources.SHARDS]:
            raise ValueError(f"{files.one_line(str(shards[0]))}: parquet files and WebDataset shards need --engine ray")
        jobs, there = self._missing(found, plan)
        if jobs:
            self.out.mkdir(parents=True, exist_ok=True)  # before any work
        outcomes = local_purify.run(plan, jobs, 1 if self.jobs is None else self.jobs)
        summary = PurifySummary(self.progress, len(jobs), there)
        with summary, contextlib.closing(outcomes):  # ends the processes, also after Ctrl-C
            summary.tell(found)
            summary.take(outcomes)
        return 1 if summary.failures else 0

    def _purify_by_ray(self, plan: "worker.PurifyPlan") -> int:
        try:
            from . import cluster, cluster_purify, shards, worker
        except ModuleNotFoundError as error:
            raise ValueError(f"--engine ray needs {error.name}: pip install 'oag-transform[{RAY_EXTRA}]'") from error

        found = sources.find(self.images, self.out, {*sources.IMAGE_SUFFIXES, *sources.SHARDS})
        source: Sequence[sources.Job] | shards.Shards | None = shards.among(found, self.image_column, self.name_column)
        there = 0
        if source is None:
            if self.image_column is not None or self.name_column is not None:
                raise ValueError("--image-column and --name-column are for parquet files")
            source, there = self._missing(found, plan)
        in_parts = isinstance(source, shards.Shards) or plan.parquet  # existing results are found part by part
        if in_parts and self.out.is_dir() and any(self.out.iterdir()) and not (self.skip_existing or self.overwrite):
            raise ValueError(f"{self.out} is not empty; --skip-existing makes what is missing, or choose another --out")
        with cluster.connected(self.address, max(worker.processors(), self.jobs or 1)) as resources:
            plan = dataclasses.replace(plan, device=self.device or ("cuda" if resources.gpus else "cpu"))
            if plan.device == "cuda" and not resources.gpus:
                raise ValueError("--device cuda can't be used: the cluster has no GPU")
            outcomes = cluster_purify.run(plan, source, resources, self.jobs, self.rows)
            total = source.rows if isinstance(source, shards.Shards) else len(source)
            summary = PurifySummary(self.progress, total, there)
            with summary:
                summary.tell(found)
                summary.take(outcomes, count_there=in_parts, in_files=not plan.parquet)
                write_failures(plan, summary.failures)
        return 1 if summary.failures else 0

    def _missing(self, found: sources.SourceFiles, plan: "worker.PurifyPlan") -> tuple[list[sources.Job], int]:
        """The images to purify, and the number of images that already have a result."""
        jobs = sources.jobs_of(found.files, plan.out, plan.suffix)
        if not jobs and not found.problems:
            raise ValueError("; ".join([f"no image in {', '.join(self.images)}", *found.notes]))
        if plan.parquet:
            return jobs, 0
        there = sources.existing(jobs)
        if there and plan.keep and not self.skip_existing:
            first = next(job.target for job in jobs if job in there)
            more = f", and {len(there) - 1} more" if len(there) > 1 else ""
            raise ValueError(f"{first} is there already{more}; --skip-existing makes the others, --overwrite replaces them")
        if plan.keep:
            return [job for job in jobs if job not in there], len(there)
        return jobs, 0


COMMAND = PurifyFiles


class PurifySummary:
    """Reports progress: a line for each failure and note, an optional progress bar, and totals at the end.

    Attributes:
        failures: (file, error) of each failed image.
    """

    def __init__(self, progress: bool, total: int | None, there: int) -> None:
        self.failures: list[tuple[str, str]] = []
        self._done, self._there = 0, there
        self._bar: Any = None
        if progress or sys.stderr.isatty():
            with contextlib.suppress(ImportError):  # without a bar
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="image", file=sys.stderr)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        with process.reader_may_end(sys.stdout):
            print(f"{self._done} purified, {self._there} there already, {len(self.failures)} failed", flush=True)

    def tell(self, found: sources.SourceFiles) -> None:
        """Report problems with the inputs."""
        for name, reason in found.problems:
            self.failures.append((name, f"{files.one_line(name) or repr(name)}: {reason}"))
            self._print(self.failures[-1][1])
        for line in found.notes:
            self._print(line)

    def take(
        self, outcomes: "Iterable[list[worker.PurifyOutcome]]", *, count_there: bool = False, in_files: bool = False
    ) -> None:
        """Report outcomes.

        Args:
            outcomes: of each part.
            count_there: existing results have not been counted yet.
            in_files: each result has a file of its own.
        """
        from .. import streams  # imports torch
        from . import worker

        names, targets = set[int](), set[int]()  # hashes, as there may be millions
        for outcome in (outcome for part in outcomes for outcome in part):
            job, error = outcome.job, outcome.error
            name, target = streams.index_of(job.name), streams.index_of(str(job.target))
            if error is None and name in names:
                error = worker.failed(job, f"the name {job.name!r} is there more than once").error
            elif error is None and in_files and target in targets:
                error = worker.failed(job, f"another image has the same result file {job.target}; rename one of them").error
            names.add(name)
            if outcome.error is None:
                targets.add(target)
            for note in outcome.notes:
                self._print(f"{files.one_line(str(job.source))}: {note}")
            if error is not None:
                self._print(error)
                self.failures.append((str(job.source), error))
            there = outcome.there and count_there  # otherwise a worker made it, and was killed before it reported
            self._there += error is None and there
            self._done += error is None and not there
            if self._bar is not None:
                with process.reader_may_end(sys.stderr):
                    self._bar.update(1)

    def _print(self, line: str) -> None:
        """Print a line to standard error, above the bar."""
        with process.reader_may_end(sys.stderr):
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)


def write_failures(plan: "worker.PurifyPlan", failures: Sequence[tuple[str, str]]) -> None:
    """Write the table (file, error) of a run's failures; without failures, remove that of an earlier run."""
    path = plan.out / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file", "error"), *failures])
    saving.write(path, text.getvalue().encode(errors="backslashreplace"), plan.token)
