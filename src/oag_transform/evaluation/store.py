"""Results on disk, a few images at a time, so that a run that is interrupted goes on from what it has."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

Array = npt.NDArray[Any]


class Store:
    """A folder of arrays, each under everything that decides its content.

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
        self, key: Mapping[str, Any], inputs: Sequence[Tensor], compute: Callable[[range], Array], desc: str = ""
    ) -> Array:
        """``compute`` of all rows of ``inputs``, a chunk at a time, taking from disk the chunks that are there.

        A chunk is known by its position, the content of its rows of ``inputs``, and ``key``: plain values that hold everything
        else that decides the result.
        """
        text = json.dumps(key, sort_keys=True)
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        count = len(inputs[0])
        parts = []
        with tqdm(total=count, desc=desc, unit="image", leave=False, disable=not self.progress) as bar:
            for start in range(0, count, self.chunk):
                rows = range(start, min(start + self.chunk, count))
                content = "-".join(fingerprint(tensor[rows.start : rows.stop]) for tensor in inputs)
                path = folder / f"{start:06d}-{content}.npy"
                if not path.exists():
                    part = compute(rows)
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "key.json").write_text(text, encoding="utf-8")
                    partial = path.with_suffix(f".{os.getpid()}.npy")
                    np.save(partial, part)
                    partial.replace(path)
                parts.append(np.load(path))
                bar.update(len(rows))
        return np.concatenate(parts)


def fingerprint(content: nn.Module | Tensor) -> str:
    """Sixteen hexadecimal digits that tell tensors, or modules with other code or other weights, apart."""
    digest = hashlib.sha256()
    tensors = [content] if isinstance(content, Tensor) else [*content.parameters(), *content.buffers()]
    if isinstance(content, nn.Module):
        digest.update(repr(content).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{plain.dtype}{tuple(tensor.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
