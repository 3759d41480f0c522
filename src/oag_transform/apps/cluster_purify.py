"""``oag-transform purify --engine ray``: images of files, parquet or WebDataset shards, purified by the workers of a cluster.

The driver hands out parts of some images each. A worker leaves out of a part what is there already, and writes each result
whole or not at all before it tells: so whatever is killed at whatever moment, what is there is whole, and the rest is made by
the same command with ``--skip-existing``. Workers that are killed are started again, and get their part again, an image at a
time: one that takes its worker along then too is a failure, and the others go on.
"""

import contextlib
import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions
import torch

from . import cluster, dataset, saving, worker
from .jobs import FAILURES, Job

ROWS = 64  # of a part, at most: what is lost where a worker is killed, and what a file of parquet holds
TOOK_WORKER = "its worker ended in the middle of its work, and so did the next one, for want of memory perhaps"
NAME_COLUMNS = ("name", "path", "file_name", "filename", "__key__")

Hashes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shards:
    """Images that lie in files of many.

    Attributes:
        files: all parquet, or all tar (WebDataset).
        image: column of the whole image files, or of structures with such a field ``bytes`` (Hugging Face).
        name: column of their names; a dot leads into a structure.
    """

    files: tuple[Path, ...]
    image: str
    name: str


@dataclass(frozen=True)
class Target:
    """Where results go.

    Attributes:
        folder: absolute.
        parquet: into parquet files, or image files under their names.
        suffix: of image files; None: the source's own.
        keep: leave the image files that are there.
        done: hashes of the names that parquet files hold already, in ascending order.
    """

    folder: Path
    parquet: bool
    suffix: str | None
    keep: bool
    done: Hashes


class Report(NamedTuple):
    """What became of an image: ``error`` in one line, or None; ``there``: it was made before."""

    source: str
    name: str
    error: str | None
    notes: tuple[str, ...]
    there: bool


def find_shards(inputs: Sequence[str], image: str | None, name: str | None) -> Shards | None:
    """The parquet or WebDataset files among the inputs, which are files or folders; None where there is none.

    Raises:
        ValueError: other files beside them, both kinds, or no column of that name.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        inside = [path for path in sorted(given.rglob("*")) if path.is_file()] if given.is_dir() else [given]
        files += [path for path in inside if not any(part.startswith((".", "_")) for part in path.relative_to(given).parts)]
    kinds = {path.suffix.lower() for path in files}
    if not kinds & {".parquet", ".tar"}:
        return None
    if len(kinds) > 1:
        raise ValueError(f"expected image files, or parquet files, or WebDataset shards (.tar), got {', '.join(sorted(kinds))}")
    if kinds == {".tar"}:
        if image is not None or name is not None:
            raise ValueError("--image-column and --name-column are for parquet: a WebDataset sample has its key and its image")
        return Shards(tuple(path.absolute() for path in files), "image", "name")
    schema = pq.read_schema(files[0])
    image = image or "image"
    if image not in schema.names:
        raise ValueError(f"{files[0]} has no column {image!r}: give --image-column, one of {', '.join(schema.names)}")
    return Shards(tuple(path.absolute() for path in files), image, name or _name_column(files[0], schema, image))


def _name_column(file: Path, schema: pa.Schema, image: str) -> str:
    found = next((column for column in NAME_COLUMNS if column in schema.names), None)
    if found is not None:
        return found
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return f"{image}.path"
    raise ValueError(
        f"{file} has no column of names ({', '.join(NAME_COLUMNS)}): give --name-column, one of {', '.join(schema.names)}; "
        "random streams follow the names"
    )


def names_in(folder: Path, shards: Shards | None) -> Hashes:
    """Hashes of the names in the parquet files that an earlier run has written."""
    column = "name" if shards is None else shards.name
    found: list[int] = []
    for path in sorted(folder.glob("part-*.parquet")):
        found += map(worker.stream, _values(pq.read_table(path, columns=[column]), column))
    return np.sort(np.array(found, dtype=np.int64))


def count(source: Sequence[Job] | Shards) -> int | None:
    """Images of a source, in parquet files by their footers; None for WebDataset, which would have to be read."""
    if not isinstance(source, Shards):
        return len(source)
    if source.files[0].suffix.lower() == ".tar":
        return None
    return sum(pq.read_metadata(path).num_rows for path in source.files)


def run(
    source: Sequence[Job] | Shards,
    target: Target,
    settings: worker.Settings,
    *,
    room: cluster.Room,
    workers: int | None,
    batch_size: int,
    rows: int | None,
) -> Iterator[list[Report]]:
    """Purify everything, and say what became of each part as it is done.

    Args:
        source: image files, or shards.
        target: where results go.
        settings: how they are purified; a device of CUDA's gives each worker a GPU.
        room: the cluster's.
        workers: None: as many as the cluster has GPUs, or CPUs.
        batch_size: images of one size that a worker purifies at once.
        rows: images of a part; None: up to :data:`ROWS`, fewer where each worker would get too few parts to share evenly.

    Raises:
        ValueError: the cluster has too little for these workers.
        ChildProcessError: a worker can't be started again.
        OSError: a shard can't be read.
    """
    on_gpu = settings.device != "cpu"
    most = room.gpus if on_gpu else room.cpus
    workers = most if workers is None else workers
    if workers > most:
        raise ValueError(f"--jobs must be at most {most}, which the cluster has room for, got {workers}")
    threads = 1 if on_gpu else max(1, min(room.cpus // workers, room.node, torch.get_num_threads()))
    total = count(source)
    if rows is None:
        rows = ROWS if total is None else max(1, min(ROWS, total // (4 * workers)))
    if isinstance(source, Shards):
        parts = _read(source).repartition(target_num_rows_per_block=rows)
    else:
        parts = ray.data.from_arrow([_table(source[start : start + rows]) for start in range(0, len(source), rows)])
        workers = max(1, min(workers, -(-len(source) // rows)))
    made = parts.map_batches(
        Worker,
        fn_constructor_args=(
            settings,
            source if isinstance(source, Shards) else None,
            target,
            batch_size,
            ray.remote(Attempts).options(num_cpus=0).remote(),
        ),
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=threads,
        num_gpus=1 if on_gpu else None,
    )
    try:
        blocks: Iterator[Any] = iter(made.iter_batches(batch_size=None, batch_format="pyarrow"))
        for block in blocks:
            yield [Report(**{**row, "notes": tuple(row["notes"])}) for row in block.to_pylist()]
    except ray.exceptions.RayActorError as error:
        raise ChildProcessError("a worker ended and could not be started again; --skip-existing goes on from here") from error
    except ray.exceptions.RayTaskError as error:
        raise OSError(f"{type(error.cause).__name__}: {str(error.cause).splitlines()[0]}") from error
    finally:
        if not isinstance(source, Shards):  # of workers that were killed
            for job in source:
                saving.partial_path(job.target, settings.token).unlink(missing_ok=True)


def _read(shards: Shards) -> "ray.data.Dataset":
    if shards.files[0].suffix.lower() == ".tar":
        return dataset.read_webdataset(shards.files)
    return ray.data.read_parquet([str(path) for path in shards.files], num_cpus=0)


def _table(jobs: Sequence[Job]) -> pa.Table:
    # paths are bytes, as they may be no UTF-8; they are read by the workers, so that one bad file fails alone
    columns = {"source": [job.source.absolute() for job in jobs], "target": [job.target.absolute() for job in jobs]}
    encoded = {key: [os.fsencode(path) for path in paths] for key, paths in columns.items()}
    return pa.table(encoded | {"name": [os.fsencode(job.name) for job in jobs]})


class Attempts:
    """For an actor: knows what workers have begun and not ended."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, key: int) -> int:
        """How often this has been begun before, and not ended."""
        self._begun[key] += 1
        return self._begun[key] - 1

    def end(self, key: int) -> None:
        """It is ended."""
        del self._begun[key]


class Worker:
    """An actor: purifies and writes the images of a part, and returns what became of them."""

    def __init__(
        self, settings: worker.Settings, shards: Shards | None, target: Target, batch_size: int, attempts: Any
    ) -> None:
        dataset.use_own_cpus()
        worker.check(settings)
        self.settings, self.shards, self.target = settings, shards, target
        self.batch_size, self.attempts = batch_size, attempts

    def __call__(self, part: pa.Table) -> pa.Table:
        """A table of :class:`Report`."""
        jobs, reports = self._jobs(part)
        key = worker.stream("\0".join(job.name for job in jobs.values()))
        again = self._begin(key) > 0
        contents = None if self.shards is None else _contents(part, self.shards.image)
        kept: dict[int, bytes] = {}
        waiting: list[int] = []
        for row, job in jobs.items():
            if self._is_there(job):
                reports[row] = _report(job, there=True)
            else:
                waiting.append(row)
        for rows in self._batches(jobs, waiting, 1 if again else self.batch_size):
            alone = worker.stream(jobs[rows[0]].name)
            if again and self._begin(alone) > 0:
                reports[rows[0]] = _report(jobs[rows[0]], f"{jobs[rows[0]].source}: {TOOK_WORKER}")
                continue
            for row, made in zip(rows, self.make(rows, jobs, contents), strict=True):
                if self.target.parquet and made.content is not None:
                    kept[row] = made.content
                    reports[row] = _report(made.job, notes=made.notes)
                else:
                    written = worker.write(made, self.settings.token)
                    reports[row] = _report(made.job, written.error, written.notes)
            if again:
                self.attempts.end.remote(alone)
        if kept:
            self._write_part(part, jobs, kept)
        self.attempts.end.remote(key)
        return pa.Table.from_pylist([reports[row]._asdict() for row in sorted(reports)], schema=REPORTS)

    def make(self, rows: Sequence[int], jobs: dict[int, Job], contents: list[bytes | None] | None) -> list[worker.Made]:
        """What becomes of these rows, in their order."""
        batch = [jobs[row] for row in rows]
        made = worker.make_batch(self.settings, batch, None if contents is None else [contents[row] or b"" for row in rows])
        by_job = {id(one.job): one for one in made}
        return [by_job[id(job)] for job in batch]

    def _begin(self, key: int) -> int:
        before: int = ray.get(self.attempts.begin.remote(key))
        return before

    def _jobs(self, part: pa.Table) -> tuple[dict[int, Job], dict[int, Report]]:
        """The job of each row, or what is wrong with its name."""
        if self.shards is None:
            paths = {key: [os.fsdecode(value) for value in part[key].to_pylist()] for key in part.column_names}
            found = zip(paths["source"], paths["target"], paths["name"], strict=True)
            return {row: Job(Path(s), Path(t), name) for row, (s, t, name) in enumerate(found)}, {}
        jobs: dict[int, Job] = {}
        reports: dict[int, Report] = {}
        for row, name in enumerate(_values(part, self.shards.name)):
            try:
                if name in ("", "None"):
                    raise ValueError(f"a row of {self.shards.name!r} has no name")
                jobs[row] = dataset.target_of(name, self.target.folder, self.target.suffix)
            except ValueError as error:
                reports[row] = Report(name, name, str(error), (), False)
        return jobs, reports

    def _is_there(self, job: Job) -> bool:
        if not self.target.parquet:
            return self.target.keep and os.path.lexists(job.target)
        at = int(np.searchsorted(self.target.done, worker.stream(job.name)))
        return at < len(self.target.done) and int(self.target.done[at]) == worker.stream(job.name)

    def _batches(self, jobs: dict[int, Job], rows: list[int], size: int) -> Iterator[list[int]]:
        if self.shards is not None:
            return (rows[start : start + size] for start in range(0, len(rows), size))
        row_of = {id(jobs[row]): row for row in rows}
        return ([row_of[id(job)] for job in batch] for batch in worker.batches((jobs[row] for row in rows), size))

    def _write_part(self, part: pa.Table, jobs: dict[int, Job], kept: dict[int, bytes]) -> None:
        """The purified rows as one file, whose name follows theirs: made again, it is replaced."""
        rows = sorted(kept)
        names = [jobs[row].name.encode(errors="backslashreplace") for row in rows]
        images: list[Any] = [kept[row] for row in rows]
        if self.shards is None:
            table = pa.table({"name": [name.decode() for name in names], "image": images})
        else:
            table, place = part.take(rows), part.schema.get_field_index(self.shards.image)
            kind = part.schema.field(place).type
            if pa.types.is_struct(kind):
                images = [old | {"bytes": new} for old, new in zip(table[place].to_pylist(), images, strict=True)]
            table = table.set_column(place, part.schema.field(place), pa.array(images, type=kind))
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        digest = hashlib.blake2b(b"\0".join(names), digest_size=8).hexdigest()
        saving.write(self.target.folder / f"part-{digest}.parquet", buffer.getvalue(), self.settings.token)


REPORTS = pa.schema(
    [
        ("source", pa.string()),
        ("name", pa.string()),
        ("error", pa.string()),
        ("notes", pa.list_(pa.string())),
        ("there", pa.bool_()),
    ]
)


def _contents(part: pa.Table, column: str) -> list[bytes | None]:
    return [value["bytes"] if isinstance(value, dict) else value for value in part[column].to_pylist()]


def _report(job: Job, error: str | None = None, notes: Sequence[str] = (), *, there: bool = False) -> Report:
    texts = (str(job.source), job.name, error or "", *notes)
    source, name, line, *others = (text.encode(errors="backslashreplace").decode() for text in texts)
    return Report(source, name, line or None, tuple(others), there)


def _values(table: pa.Table, column: str) -> list[str]:
    """A column as text; a dot leads into a structure where there is no column of that very name."""
    if column in table.column_names:
        return [str(value) for value in table[column].to_pylist()]
    first, _, inner = column.partition(".")
    return [str((value or {}).get(inner)) for value in table[first].to_pylist()]


def write_failures(folder: Path, failures: Sequence[tuple[str, str]], token: str) -> None:
    """The table (file, error) of a run's failures; where there is none, that of an earlier run goes."""
    path = folder / FAILURES
    if not failures:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("file", "error"), *failures])
    saving.write(path, text.getvalue().encode(errors="backslashreplace"), token)
