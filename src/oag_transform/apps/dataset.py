"""Data sets larger than a machine, by Ray Data: the transform for ``map_batches``, and reading and writing around it.

    import ray
    from oag_transform.apps import dataset

    images = dataset.read_images("photos")  # or read_webdataset, or ray.data.read_parquet
    purified = images.map_batches(dataset.Purify, fn_constructor_kwargs={"seed": 1}, num_cpus=2, concurrency=4)
    dataset.write_images(purified, "purified")  # or purified.write_parquet

``oag-transform purify --engine ray`` is this with resuming, a table of failures and progress. Needs the extra ``ray``.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch

from . import saving, worker
from .jobs import OTHER_SUFFIXES, SUFFIXES, Job, job_of

Batch = dict[str, npt.NDArray[Any]]

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp")
"""Parts of a WebDataset sample that are taken for its image, the first one that it has."""


class Purify:
    """A callable class for :meth:`ray.data.Dataset.map_batches`: purifies the images of a batch, whatever their sizes.

    The transform is made once an actor, which works with as many threads as it has CPUs (``num_cpus``), on its GPU where it has
    one (``num_gpus=1``). Random streams follow the images' names, :func:`oag_transform.streams.index_of`, so with a ``seed``
    results don't depend on how the data is cut into blocks and batches, or on the number of actors: bit for bit where all
    have the same number of threads and images are worked on one at a time, to rounding otherwise.

    Args:
        image: column of the images. Either whole files (bytes), which become whole files again, with their metadata, in their
            own format where it can hold the result and PNG otherwise; or arrays (H, W), (H, W, 1) or (H, W, 3) of uint8, such
            as ``ray.data.read_images`` gives, which stay so.
        name: column of their names, each of which should be there once.
        batch_size: files of one size that are worked on at once.
        device: a PyTorch device; None: the actor's GPU, or its CPUs.
        paper: the paper's setting, not the default.
        settings: further arguments of :class:`oag_transform.OnlineAlternateGenerator`, such as ``seed``.

    All other columns pass through. With files there is one more, ``error``: one line where a file could not be read or
    purified, whose image is empty then; else an empty text. With arrays such an image raises.

    Raises:
        ValueError: bad arguments; an array that is no image.
        TypeError: a column of another kind.
        KeyError: no such column.
    """

    def __init__(
        self,
        *,
        image: str = "image",
        name: str = "name",
        batch_size: int = 1,
        device: str | None = None,
        paper: bool = False,
        **settings: Any,
    ) -> None:
        own = use_own_cpus()
        device = ("cuda" if own.get("GPU") else "cpu") if device is None else device
        self.image, self.name, self.batch_size = image, name, batch_size
        self.settings = worker.Settings(paper, tuple(settings.items()), device, None, secrets.token_hex(4))
        worker.check(self.settings)

    def __call__(self, batch: Batch) -> Batch:
        """The batch (``batch_format="numpy"``, which is Ray's default) with purified images."""
        names, images = [str(name) for name in batch[self.name]], list(batch[self.image])
        if all(isinstance(image, (bytes, memoryview)) for image in images):
            made = made_of(self.settings, names, [bytes(image) for image in images], self.batch_size)
            errors = np.array([one.error or "" for one in made], dtype=object)
            return batch | {self.image: column([one.content or b"" for one in made]), "error": errors}
        if not all(isinstance(image, np.ndarray) and image.dtype == np.uint8 for image in images):
            found = sorted({getattr(image, "dtype", type(image)).__class__.__name__ for image in images})
            raise TypeError(f"expected whole files or arrays of uint8 in column {self.image!r}, got {', '.join(found)}")
        purified = [self._array(image, name) for image, name in zip(images, names, strict=True)]
        return batch | {self.image: column(purified)}

    def _array(self, image: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        pixels = torch.from_numpy(image.reshape(*image.shape[:2], -1).copy()).movedim(2, 0).to(self.settings.device)
        purified = worker.transform_of(self.settings)(pixels, index=[worker.stream(name)])
        found: npt.NDArray[Any] = purified.movedim(0, 2).cpu().numpy().reshape(image.shape)
        return found


def use_own_cpus() -> dict[str, float]:
    """Give PyTorch as many threads as this Ray actor or task has CPUs; returns what else it has. Elsewhere: nothing."""
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return {}
    own: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(own.get("CPU", 1))))
    return own


def made_of(settings: worker.Settings, names: Sequence[str], contents: Sequence[bytes], size: int) -> list[worker.Made]:
    """What becomes of whole image files, in their order; ``size`` of them are worked on at once."""
    made: list[worker.Made] = []
    for start in range(0, len(names), size):
        # a number in the path of a target tells one row from another, whatever their names
        jobs = [Job(Path(names[i]), Path(f"{i}{_suffix(names[i])}"), names[i]) for i in range(start, len(names))[:size]]
        found = {one.job.target: one for one in worker.make_batch(settings, jobs, contents[start : start + size])}
        made += [found[job.target] for job in jobs]
    return made


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    return suffix if suffix.lower() in SUFFIXES else ".png"


def column(values: Sequence[Any]) -> npt.NDArray[Any]:
    """An array of objects: NumPy's own of bytes would lose zeros at their ends, and one of equal images is no column."""
    found = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        found[i] = value
    return found


def read_images(folder: str | Path, **options: Any) -> "ray.data.Dataset":
    """The image files in a folder and the folders in it: ``image`` (whole files) and ``name`` (path within the folder).

    Args:
        folder: a local path, or one that :func:`ray.data.read_binary_files` knows, such as ``s3://bucket/photos``.
        options: for that function.
    """
    local = "://" not in str(folder)
    root = os.path.abspath(folder) if local else str(folder)
    start = len(root.partition("://")[2].rstrip("/") if not local else root) + 1
    suffixes = sorted(suffix[1:] for suffix in {*SUFFIXES, *OTHER_SUFFIXES})
    found = ray.data.read_binary_files(root, include_paths=True, file_extensions=suffixes, **{"num_cpus": 0} | options)

    def named(table: pa.Table) -> pa.Table:
        return pa.table({"name": pa.array([path[start:] for path in table["path"].to_pylist()]), "image": table["bytes"]})

    return found.map_batches(named, batch_format="pyarrow", num_cpus=0)


def read_webdataset(shards: Sequence[str | Path], **options: Any) -> "ray.data.Dataset":
    """WebDataset shards: ``name`` (key and suffix), ``image`` (whole files), and a column for each other part of the samples.

    ``cls`` becomes an integer; ``txt`` and ``json`` are text; all others are bytes.

    Args:
        shards: tar files.
        options: for :func:`ray.data.read_webdataset`.

    Raises:
        ValueError: while it is read, a sample without an image.
    """
    return ray.data.read_webdataset([str(path) for path in shards], decoder=_sample, **{"num_cpus": 0} | options)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    image = next((part for part in IMAGE_PARTS if part in sample), None)
    if image is None:
        parts = ", ".join(part for part in sample if not part.startswith("__"))
        raise ValueError(f"sample {sample['__key__']} has no image ({', '.join(IMAGE_PARTS)}), only {parts}")
    found: dict[str, Any] = {"name": f"{sample['__key__']}.{image}", "image": sample[image]}
    for part, value in sample.items():
        if part in ("cls", "cls2", "index"):
            found[part] = int(value)
        elif part in ("txt", "text", "json"):
            found[part] = value.decode()
        elif part != image and not part.startswith("__"):
            found[part] = value
    return found


def target_of(name: str, folder: Path, suffix: str | None = None) -> Job:
    """The job of an image of that name, whose file is to lie below ``folder``.

    Raises:
        ValueError: a name that leads elsewhere, or to no file.
    """
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name or Path(name).drive:
        raise ValueError(f"{name!r} is no path within a folder")
    return job_of(Path(name), Path(path), folder, suffix)


def write_images(images: "ray.data.Dataset", folder: str | Path, *, image: str = "image", name: str = "name") -> int:
    """Write whole image files under their names, each whole or not at all; returns how many.

    Rows with an ``error`` (see :class:`Purify`) are left out. Files that are there are replaced.

    Raises:
        ValueError: a name that is no path within a folder.
    """
    token, out = secrets.token_hex(4), Path(folder).absolute()

    def write(table: pa.Table) -> pa.Table:
        errors = table["error"].to_pylist() if "error" in table.column_names else [""] * table.num_rows
        written = 0
        for called, content, error in zip(table[name].to_pylist(), table[image].to_pylist(), errors, strict=True):
            if not error:
                saving.write(target_of(called, out).target, content, token)
                written += 1
        return pa.table({"written": [written]})

    found = images.map_batches(write, batch_format="pyarrow", num_cpus=0)
    blocks: Iterator[Any] = iter(found.iter_batches(batch_format="pyarrow", batch_size=None))
    return sum(sum(block["written"].to_pylist()) for block in blocks)
