"""Connection to a Ray cluster, or a temporary cluster on this machine."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

# read when Ray starts: no usage reports, only fatal log messages, and no warning about its next release
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import fsspec.implementations.http  # noqa: F401 - once, before threads of Ray import it concurrently
import ray
import ray.data
import ray.exceptions


class ClusterResources(NamedTuple):
    """Resources of a cluster for workers.

    Attributes:
        cpus: CPUs for workers; one CPU of the cluster is reserved for reading.
        node: CPUs of its smallest node.
        largest: CPUs of its largest node.
        gpus: of the cluster.
    """

    cpus: int
    node: int
    largest: int
    gpus: int


@contextlib.contextmanager
def connected(address: str | None, workers: int) -> Iterator[ClusterResources]:
    """Connect to a cluster and yield its resources. An existing connection of this process is used, and left open.

    Args:
        address: of a cluster, as for ``ray.init``: ``"auto"``, ``"ray://HOST:10001"``, ``"HOST:6379"``; None: that of
            RAY_ADDRESS, or else a cluster on this machine, which ends with the block or with this process in any case.
        workers: least number of CPUs of a cluster on this machine.

    Raises:
        ConnectionError: there is no cluster at the address.
    """
    own = not ray.is_initialized()
    if own:
        _connect(address, workers)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        found = ray.cluster_resources()
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        smallest = min((count for count in nodes if count), default=1)
        yield ClusterResources(int(found.get("CPU", 0)) - 1, smallest, max(nodes, default=0), int(found.get("GPU", 0)))
    finally:
        if own:
            ray.shutdown()


def _connect(address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = address or os.environ.get("RAY_ADDRESS") or None  # an empty variable is none
    try:
        if address is None:
            ray.init(address="local", num_cpus=workers + 1, include_dashboard=False, **quiet)  # one more, for reading
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ray.exceptions.RaySystemError) as error:
        raise ConnectionError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
