"""The Ray engine of ``oag-transform purify``: the workers of a cluster purify image files, parquet files or WebDataset shards.

The driver distributes parts of a few images each. A worker skips images that already have a result. It writes each result
completely or not at all before it reports. Results are therefore complete whenever a process is killed, and the same command
with ``--skip-existing`` makes the missing ones. A killed worker is restarted and processes its part again, one image at a time.
An image that ends its worker again is a failure, and the others continue.

Results are not written by Ray's ``write_parquet`` with its checkpoints. A write ends a pipeline and reports neither failures
nor notes to the driver, and a checkpoint counts a failure as done.
"""

import dataclasses
import functools
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
import torch

from .. import files, streams
from . import cluster, dataset, saving, shards, sources, worker
from .sources import Job

ROWS = 64  # largest part: a killed worker loses at most this many images, and a parquet file has at most this many
ENDED_WORKER = "its worker was killed twice, perhaps because memory ran out"


def run(
    plan: worker.PurifyPlan,
    source: Sequence[Job] | shards.Shards,
    resources: cluster.ClusterResources,
    workers: int | None,
    rows: int | None,
) -> Iterator[list[worker.PurifyOutcome]]:
    """Purify all images, and yield the outcomes of each part when it is done.

    Args:
        plan: with a CUDA device, each worker gets a GPU.
        source: image files, or shards.
        resources: the cluster's.
        workers: number of workers; None: the number of GPUs of the cluster, or of CPUs.
        rows: images per part; None: up to :data:`ROWS`, fewer if workers would otherwise get unequal shares.

    Raises:
        ValueError: the cluster has too few processors or GPUs for these workers.
        ChildProcessError: a worker can't be started again.
        OSError: a parquet file can't be read.
    """
    on_gpu = plan.device != "cpu"
    most = resources.gpus if on_gpu else resources.cpus
    if most < 1:
        raise ValueError("the cluster has no processor for a worker: one is reserved for reading, so it needs two")
    workers = most if workers is None else workers
    if workers > most:
        raise ValueError(f"--jobs must be at most {most}, the capacity of the cluster, got {workers}")
    threads = 1 if on_gpu else max(1, min(resources.cpus // workers, resources.node, torch.get_num_threads()))
    packed, jobs = (source, ()) if isinstance(source, shards.Shards) else (None, source)
    total = packed.rows if packed else len(jobs)
    if total == 0:
        return
    if rows is None:
        rows = ROWS if total is None else max(1, min(ROWS, total // (4 * workers)))
    if packed:
        parts = _read(packed).repartition(target_num_rows_per_block=rows)
    else:
        # pickled, as Arrow rejects some paths; absolute, as workers have other working directories
        pickled = [pickle.dumps(dataclasses.replace(job, source=job.source.absolute())) for job in jobs]
        parts = ray.data.from_arrow([pa.table({"job": pickled[i : i + rows]}) for i in range(0, len(pickled), rows)])
        workers = min(workers, -(-len(pickled) // rows))
    attempts = ray.remote(Attempts).options(num_cpus=0).remote()
    purified = parts.map_batches(
        PartWorker,
        fn_constructor_args=(plan, packed, shards.names_in(plan.out, packed) if plan.parquet else shards.NO_NAMES, attempts),
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=threads,
        num_gpus=1 if on_gpu else None,
    )
    try:
        for row in purified.iter_rows():
            yield pickle.loads(row["outcomes"])
    except ray.exceptions.RayActorError as error:
        raise ChildProcessError("a worker ended and could not be restarted; --skip-existing continues") from error
    except ray.exceptions.RayTaskError as error:
        raise OSError(f"{type(error.cause).__name__}: {files.reason(error.cause)}") from error
    finally:
        for job in jobs:  # left by killed workers
            saving.remove_partial(job.target, plan.token)


def _read(source: shards.Shards) -> "ray.data.Dataset":
    if source.files[0].suffix.lower() == sources.TAR:
        return dataset.read_webdataset(source.files)
    read = functools.partial(shards.parquet_rows, shards=source)
    paths = [pa.table({"path": [os.fsencode(path)]}) for path in source.files]
    return ray.data.from_arrow(paths).map_batches(read, batch_format="pyarrow", num_cpus=0)


class Attempts:
    """State of an actor: tasks that workers have begun and not ended."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, key: int) -> int:
        """The number of earlier begins of this task without an end."""
        self._begun[key] += 1
        return self._begun[key] - 1

    def end(self, key: int) -> None:
        """Record the end of this task."""
        del self._begun[key]


class PartWorker:
    """An actor that purifies and writes the images of a part, and returns their outcomes."""

    def __init__(self, plan: worker.PurifyPlan, source: shards.Shards | None, done: shards.Hashes, attempts: Any) -> None:
        dataset.use_own_cpus()
        plan.check()
        self.plan, self.source, self.done, self.attempts = plan, source, done, attempts

    def __call__(self, part: pa.Table) -> pa.Table:
        """One row: the pickled list of :class:`.worker.PurifyOutcome`."""
        jobs = self._jobs(part)
        key = streams.index_of("part\0" + "\0".join(job.name for job in jobs))  # not that of an image alone
        again = self._begin(key) > 0
        outcomes, waiting = [], []
        for job in jobs:
            if self._is_there(job):
                outcomes.append(worker.PurifyOutcome(job, there=True))
            else:
                waiting.append(job)
        for batch in worker.batches(waiting, 1 if again else self.plan.batch_size):
            alone = streams.index_of(batch[0].name)
            if again and self._begin(alone) > 0:
                outcomes.append(worker.failed(batch[0], ENDED_WORKER))
                continue
            purified = self.make(batch)
            outcomes += purified if self.plan.parquet else (worker.save(self.plan, outcome) for outcome in purified)
            if again:
                self.attempts.end.remote(alone)
        if any(outcome.content for outcome in outcomes):
            shards.write_part(part, self.source, [outcome for outcome in outcomes if outcome.content], self.plan)
        self.attempts.end.remote(key)
        reports = [
            outcome._replace(job=Job(outcome.job.source, outcome.job.target, outcome.job.name), content=None)
            for outcome in outcomes
        ]
        return pa.table({"outcomes": [pickle.dumps(reports)]})

    def make(self, batch: Sequence[Job]) -> list[worker.PurifyOutcome]:
        """See :func:`.worker.make`."""
        return worker.make(self.plan, batch)

    def _begin(self, key: int) -> int:
        before: int = ray.get(self.attempts.begin.remote(key))
        return before

    def _jobs(self, part: pa.Table) -> list[Job]:
        if self.source is None:
            return [dataclasses.replace(pickle.loads(job), row=row) for row, job in enumerate(part["job"].to_pylist())]
        return shards.jobs_in(part, self.source, self.plan.out, self.plan.suffix)

    def _is_there(self, job: Job) -> bool:
        if job.problem is not None:
            return False
        if not self.plan.parquet:
            return self.plan.keep and os.path.lexists(job.target)
        at = int(np.searchsorted(self.done, streams.index_of(job.name)))
        return at < len(self.done) and int(self.done[at]) == streams.index_of(job.name)
