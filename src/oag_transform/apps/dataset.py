"""Large data sets with Ray Data: the transform for ``map_batches``, with readers and a writer.

    import ray
    from oag_transform.apps import dataset

    images = dataset.read_images("photos")  # or read_webdataset, or ray.data.read_parquet
    pool = ray.data.ActorPoolStrategy(size=4)
    purified = images.map_batches(dataset.Purify, fn_constructor_kwargs={"seed": 1}, num_cpus=2, compute=pool)
    dataset.write_images(purified, "purified")  # or purified.write_parquet

``oag-transform purify --engine ray`` adds resumption, a table of failures and progress. This module needs the extra ``ray``.
"""

import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch

from .. import files, streams
from . import saving, shards, sources, worker

Batch = dict[str, npt.NDArray[Any]]

logger = logging.getLogger(__name__)


class Purify:
    """A callable class for :meth:`ray.data.Dataset.map_batches` that purifies a batch of images of any sizes.

    Each actor constructs the transform once. It uses as many threads as it has CPUs (``num_cpus``), and its GPU if it has one
    (``num_gpus=1``). Random streams follow the images' names, see :func:`oag_transform.streams.index_of`. With a ``seed``,
    results therefore do not depend on blocks, batches or the number of actors: bit for bit if all actors have the same number
    of threads and process images one at a time, and up to rounding otherwise.

    Args:
        image: column of the images. They are either image files, as bytes or as the field ``bytes`` of structures (Hugging
            Face), or arrays (H, W), (H, W, 1) or (H, W, 3) of uint8, as from ``ray.data.read_images``. Results are of the same
            kind. Result files keep the metadata and, if it can hold the result, the format of their source; otherwise they are
            PNG.
        name: column of the images' names, which should be unique.
        error: new column, with files: one line for each image that is missing or could not be read or purified, which is then
            empty; otherwise an empty string. With arrays, such an image raises.
        batch_size: number of files of one size that are purified together.
        device: a PyTorch device; None: the actor's GPU, or its CPUs.
        paper: use the paper's setting instead of the default.
        settings: further arguments of :class:`oag_transform.OnlineAlternateGenerator`, such as ``seed``.

    Other columns pass through, except the ``read_error`` of :func:`read_images` and :func:`read_webdataset`, which becomes the
    error. Metadata that a result does not take from its file is logged.

    Raises:
        ValueError: bad arguments; a missing column; an existing column of the errors' name; an array that is not an image.
        TypeError: a column of another type.
    """

    def __init__(
        self,
        *,
        image: str = "image",
        name: str = "name",
        error: str = "error",
        batch_size: int = 1,
        device: str | None = None,
        paper: bool = False,
        **settings: Any,
    ) -> None:
        own = use_own_cpus()
        device = ("cuda" if own.get("GPU") else "cpu") if device is None else device
        self.image, self.name, self.error = image, name, error
        self.plan = worker.PurifyPlan(tuple(settings.items()), paper, device, batch_size=batch_size)
        self.plan.check()

    def __call__(self, batch: Batch) -> Batch:
        """The batch (``batch_format="numpy"``, Ray's default) with purified images."""
        for option, column_name in (("image", self.image), ("name", self.name)):
            if column_name not in batch:
                raise ValueError(f"there is no column {column_name!r}: give {option}=, one of {', '.join(batch)}")
        images, names = list(batch[self.image]), [shards.text(name) for name in batch[self.name]]
        if all(image is None or isinstance(image, (bytes, memoryview, Mapping)) for image in images):
            return self._files(batch, images, names)
        if not all(isinstance(image, np.ndarray) and image.dtype == np.uint8 for image in images):
            found = sorted(
                {f"array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__ for image in images}
            )
            raise TypeError(f"expected whole files or arrays of uint8 in column {self.image!r}, got {', '.join(found)}")
        purified = [self._array(image, name) for image, name in zip(images, names, strict=True)]
        return batch | {self.image: column(purified)}

    def _files(self, batch: Batch, images: list[Any], names: list[str | None]) -> Batch:
        if self.error in batch:
            raise ValueError(f"the data has a column {self.error!r} already: give error=, the name of a new one")
        problems = [shards.text(problem) for problem in batch.get(shards.READ_ERROR, [None] * len(images))]
        rows = enumerate(zip(names, images, problems, strict=True))
        jobs = [shards.job_of(name, image, Path(), None, row, problem) for row, (name, image, problem) in rows]
        size = self.plan.batch_size
        outcomes = [o for start in range(0, len(jobs), size) for o in worker.make(self.plan, jobs[start : start + size])]
        for line in (f"{files.one_line(str(o.job.source))}: {note}" for o in outcomes for note in o.notes):
            logger.info("%s", line)
        missing: dict[str, Any] | None = {} if any(isinstance(image, Mapping) for image in images) else None
        olds = [missing if image is None else image for image in images]
        contents = [shards.with_content(old, o.content or b"") for old, o in zip(olds, outcomes, strict=True)]
        kept = {key: values for key, values in batch.items() if key != shards.READ_ERROR}
        return kept | {self.image: column(contents), self.error: column([o.error or "" for o in outcomes])}

    def _array(self, image: npt.NDArray[Any], name: str | None) -> npt.NDArray[Any]:
        if name is None:
            raise ValueError(f"an image has no name in column {self.name!r}; random streams follow the names")
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
            raise ValueError(f"{name}: expected an array (H, W), (H, W, 1) or (H, W, 3), got {image.shape}")
        pixels = torch.from_numpy(image.reshape(*image.shape[:2], -1).copy()).movedim(2, 0).to(self.plan.device)
        try:
            purified = worker.transform_of(self.plan)(pixels, index=[streams.index_of(name)])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found: npt.NDArray[Any] = purified.movedim(0, 2).cpu().numpy().reshape(image.shape)
        return found


def use_own_cpus() -> dict[str, float]:
    """Give PyTorch as many threads as this Ray actor or task has CPUs; returns its resources. Empty outside Ray."""
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return {}
    own: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(own.get("CPU", 1))))
    return own


def column(values: Sequence[Any]) -> npt.NDArray[Any]:
    """A column as an array of objects: NumPy would strip zeros at the end of bytes, and stack equal images."""
    found = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        found[i] = value
    return found


def read_images(folder: str | Path) -> "ray.data.Dataset":
    """Read the image files in a folder and its subfolders: ``image`` (whole files) and ``name`` (path within the folder).

    In a local folder, linked folders are read too, and hidden files are skipped; the reason why a file can't be read is in
    ``read_error``. Elsewhere an unreadable file raises, and names with ``?`` are skipped.

    Args:
        folder: a local path, or one that :func:`ray.data.read_binary_files` knows, such as ``s3://bucket/photos``.

    Raises:
        ValueError: the folder has no image.
    """
    if "://" in str(folder):
        root = str(folder).rstrip("/")
        suffixes = sorted(suffix[1:] for suffix in sources.IMAGE_SUFFIXES)
        found = ray.data.read_binary_files(root, include_paths=True, file_extensions=suffixes, num_cpus=0)
        start = len(root.partition("://")[2]) + 1

        def named(table: pa.Table) -> pa.Table:
            return pa.table({"name": pa.array([path[start:] for path in table["path"].to_pylist()]), "image": table["bytes"]})

        return found.map_batches(named, batch_format="pyarrow", num_cpus=0)
    # Ray's own reader stops at the first file that can't be read, and cuts names at a question mark
    listed = sources.find([str(folder)], Path(os.devnull))
    for line in (*(f"{files.one_line(name)}: {reason}" for name, reason in listed.problems), *listed.notes):
        logger.warning("%s", line)
    if not listed.files:
        raise ValueError(f"no image in {files.one_line(str(folder))}")
    paths = [os.fsencode(file.path.absolute()) for file in listed.files]
    names = [file.relative.as_posix().encode(errors="backslashreplace").decode() for file in listed.files]
    tables = [
        pa.table({"path": paths[i : i + shards.BLOCK], "name": names[i : i + shards.BLOCK]})
        for i in range(0, len(paths), shards.BLOCK)
    ]
    return ray.data.from_arrow(tables).map_batches(_read, batch_format="pyarrow", num_cpus=0)


def _read(table: pa.Table) -> pa.Table:
    images: list[bytes | None] = []
    errors: list[str | None] = []
    for path in table["path"].to_pylist():
        try:
            images.append(Path(os.fsdecode(path)).read_bytes())
            errors.append(None)
        except OSError as error:
            images.append(None)
            errors.append(error.strerror or type(error).__name__)
    columns = {"name": table["name"], "image": pa.array(images, pa.binary())}
    return pa.table(columns | {shards.READ_ERROR: pa.array(errors, pa.string())})


def read_webdataset(paths: Sequence[str | Path]) -> "ray.data.Dataset":
    """WebDataset shards: ``name`` (key and suffix), ``image`` (whole files), and a column for each other part of the samples.

    ``cls`` becomes an integer; ``txt`` and ``json`` are text; all others are bytes. For a sample without an image, or with an
    invalid part, ``read_error`` has the reason. A truncated shard has an additional row with its reason.

    Args:
        paths: tar files, local or such as ``s3://bucket/0.tar``.
    """
    return ray.data.read_datasource(shards.WebDatasetSource([str(path) for path in paths]), num_cpus=0)


def write_images(
    images: "ray.data.Dataset", folder: str | Path, *, image: str = "image", name: str = "name", error: str = "error"
) -> int:
    """Write image files under their names, each completely or not at all; returns their number.

    Existing files are replaced. Rows with an ``error`` (see :class:`Purify`) are skipped. Rows without a file, or without a
    valid name within the folder, are skipped with a warning in the log, and so are files that can't be written. A file that
    several rows have is written by each of them; a warning says so.
    """
    token, out = secrets.token_hex(4), Path(folder).absolute()

    def write(table: pa.Table) -> pa.Table:
        def values(key: str) -> list[Any]:
            return table[key].to_pylist() if key in table.column_names else [None] * table.num_rows

        lines, targets = list[str](), list[str]()
        columns = zip(table[name].to_pylist(), table[image].to_pylist(), values(shards.READ_ERROR), values(error), strict=True)
        for row, (called, content, unread, wrong) in enumerate(columns):
            job = shards.job_of(shards.text(called), content, out, None, row, unread)
            if wrong:
                continue
            problem = job.problem
            if problem is None and job.content is not None:
                try:
                    saving.write(job.target, job.content, token)
                except (OSError, RecursionError) as failure:  # pathlib makes parents by recursion
                    problem = files.reason(failure)
            lines.append(f"{files.one_line(str(job.source))}: skipped, {problem}" if problem else "")
            targets.append("" if problem else files.one_line(str(job.target)))
        return pa.table({"line": pa.array(lines, pa.string()), "target": pa.array(targets, pa.string())})

    found = images.map_batches(write, batch_format="pyarrow", num_cpus=0)
    blocks: Iterator[Any] = iter(found.iter_batches(batch_format="pyarrow", batch_size=None))
    lines, written = list[str](), Counter[str]()
    for block in blocks:
        lines += block["line"].to_pylist()
        written.update(filter(None, block["target"].to_pylist()))
    for line in filter(None, lines):
        logger.warning("%s", line)
    for target, count in written.items():
        if count > 1:
            logger.warning("%s: written by %d rows, the last of which is kept", target, count)
    return len(written)
