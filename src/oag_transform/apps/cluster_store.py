"""``oag-transform evaluate --engine ray``: what the store lacks is computed by the workers of a cluster.

A task is one chunk of images of an attack, or of a row's cell. All else is as without Ray: the evaluation asks the store, the
store keeps what comes back, chunk after chunk, and an interrupted run goes on from what it has.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
import torch
from torch import Tensor

from ..evaluation.store import Array, Store
from . import cluster, worker


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster that has room for a task, see :func:`.cluster.connected`.

    Raises:
        ValueError: it has none, and would let every task wait forever.
        ConnectionError: there is no cluster at the address.
    """
    with cluster.connected(address, worker.processors()) as resources:
        threads = torch.get_num_threads()
        if threads > resources.largest:
            raise ValueError(
                f"a task has as many CPUs of one node as this process has threads, {threads}, and the largest node of the "
                f"cluster has {resources.largest}; set OMP_NUM_THREADS={resources.largest}"
            )
        if torch.cuda.is_initialized() and not resources.gpus:
            raise ValueError("the targets are on a GPU, and the cluster has none; give --device cpu")
        yield


class ClusterStore(Store):
    """A store whose missing chunks are computed side by side: as many as the cluster has room for.

    A task reserves as many CPUs as this process has threads, and works with as many: they decide a result's last bits and
    its seconds; with CUDA it reserves a GPU. A worker needs neither the store's folder nor the images' files.
    """

    def rows(
        self,
        key: Mapping[str, Any],
        inputs: Sequence[Tensor],
        compute: Callable[[range], Array],
        desc: str = "",
        *,
        chunk: int | None = None,
    ) -> Array:
        """See :meth:`.Store.rows`.

        Raises:
            Exception: what ``compute`` raised, as it was.
        """
        begun: dict[int, ray.ObjectRef[Array]] = {}

        def collect(rows: range) -> Array:
            if rows.start not in begun:  # later chunks are rarely there, as they are kept in order
                begun.update(self._begin(compute, rows.start, len(inputs[0]), chunk or self.chunk))
            try:
                part: Array = ray.get(begun.pop(rows.start))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            return part

        try:
            return super().rows(key, inputs, collect, desc, chunk=chunk)
        finally:
            for reference in begun.values():  # of a run that failed
                ray.cancel(reference)

    def _begin(
        self, compute: Callable[[range], Array], first: int, count: int, chunk: int
    ) -> "dict[int, ray.ObjectRef[Array]]":
        threads = torch.get_num_threads()
        task = _compute.options(num_cpus=threads, num_gpus=1 if torch.cuda.is_initialized() else 0)
        shared = ray.put(compute)  # once, with the target and the images
        starts = range(first, count, chunk)
        return {start: task.remote(shared, range(start, min(start + chunk, count)), threads) for start in starts}


@ray.remote
def _compute(compute: Callable[[range], Array], rows: range, threads: int) -> Array:
    torch.set_num_threads(threads)
    return compute(rows)
