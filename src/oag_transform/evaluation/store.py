"""Results on disk, a few images at a time, so that a run that is interrupted goes on from what it has."""

import functools
import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import atomic

Array = npt.NDArray[Any]

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
NO_RESULT = ("apps", "evaluation/render")  # folders whose code shows results and makes none
# NumPy raises all of these on what it can't read
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


class Store:
    """A cache of arrays in a folder. The key of an array contains everything that determines its content.

    Args:
        folder: is made when something is stored.
        chunk: images that are worked on, and stored, together.
        progress: show a bar.
    """

    def __init__(self, folder: Path, *, chunk: int = 8, progress: bool = False) -> None:
        self.folder = folder
        self.chunk = chunk
        self.progress = progress

    def rows(
        self,
        key: Mapping[str, Any],
        inputs: Sequence[Tensor],
        compute: Callable[[range], Array],
        desc: str = "",
        *,
        chunk: int | None = None,
    ) -> Array:
        """``compute`` of all rows of ``inputs``, a chunk at a time, taking from disk the chunks that are there.

        A chunk is known by its position, the content of its rows of ``inputs``, this package's sources, and ``key``: plain
        values that hold everything else that decides the result. One whose file is damaged is computed again, with a warning.

        Args:
            key: see above.
            inputs: tensors of as many rows each.
            compute: positions of rows -> an array of as many rows; :func:`records` makes one of several arrays.
            desc: of the progress bar.
            chunk: rows that are worked on together, in place of the store's own number.

        Raises:
            ValueError: ``compute`` returned another number of rows than it was asked for.
        """
        text = json.dumps(dict(key) | {"sources": sources()}, sort_keys=True)
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        count, chunk = len(inputs[0]), self.chunk if chunk is None else chunk
        parts = []
        with tqdm(total=count, desc=desc, unit="image", leave=False, disable=not self.progress) as bar:
            for start in range(0, count, chunk):
                rows = range(start, min(start + chunk, count))
                content = "-".join(fingerprint(tensor[rows.start : rows.stop]) for tensor in inputs)
                path = folder / f"{start:06d}-{content}.npz"
                part = _load(path, len(rows))
                if part is None:
                    part = compute(rows)
                    if len(part) != len(rows):
                        raise ValueError(f"expected a result of {len(rows)} rows, got {len(part)}: {desc}")
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "key.json").write_text(text, encoding="utf-8")
                    _save(path, part)
                parts.append(part)
                bar.update(len(rows))
        return np.concatenate(parts)


def records(**fields: Any) -> Array:
    """Arrays or tensors of as many rows each as one structured array, which a store keeps and joins like any other."""
    arrays = {name: np.asarray(each) for name, each in fields.items()}
    count = len(next(iter(arrays.values())))
    found = np.empty(count, [(name, each.dtype, each.shape[1:]) for name, each in arrays.items()])
    for name, each in arrays.items():
        found[name] = each
    return found


def _load(path: Path, count: int) -> Array | None:
    """The array in a file, or None where there is no whole one."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:  # np.load leaves its own open on an error
            part: Array = file["rows"]  # a zip archive checks a sum of what it holds
    except DAMAGED as error:
        logger.warning("%s is damaged and computed again: %s", path, error)
        return None
    if part.ndim == 0 or len(part) != count:
        logger.warning("%s is damaged and computed again: expected %d rows, got shape %s", path, count, part.shape)
        return None
    return part


def _save(path: Path, part: Array) -> None:
    with atomic.replaced(path) as partial, partial.open("wb") as file:
        np.savez(file, rows=part)


@functools.cache
def sources() -> str:
    """:func:`digest` of this package, found once a process."""
    return digest(PACKAGE)


def digest(package: Path) -> str:
    """Sixteen hexadecimal digits that change with every Python source of a package that can change a result."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        name = path.relative_to(package).as_posix()
        if not name.startswith(tuple(f"{folder}/" for folder in NO_RESULT)):
            content = path.read_bytes()
            found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


def fingerprint(content: nn.Module | Tensor) -> str:
    """Sixteen hexadecimal digits that tell tensors, or modules with other code or other weights, apart."""
    found = hashlib.sha256()
    tensors = [content] if isinstance(content, Tensor) else [*content.parameters(), *content.buffers()]
    if isinstance(content, nn.Module):
        found.update(repr(content).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{plain.dtype}{tuple(tensor.shape)}".encode())
        found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
