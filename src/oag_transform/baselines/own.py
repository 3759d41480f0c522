"""A defense of somebody's own, which a command line names as ``module:function``."""

import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..defended import applied


class OwnDefense(nn.Module):
    """The defense that a function makes: a module or another callable on images (N, C, H, W) in [0, 1].

    It is taken as randomised. Its repr changes with its source file, so that results of an older version aren't taken for it.

    Args:
        name: ``"module:function"``, or ``"module:Class"``. It is called with those of ``seed`` and ``std`` that it takes.
        seed: for the function.
        std: standard deviation of the noise that it is to remove, on the [0, 1] scale; None: unknown, and not given.

    Raises:
        ValueError: it can't be imported, or what it returns can't be called.
    """

    def __init__(self, name: str, seed: int = 0, *, std: float | None = None) -> None:
        super().__init__()
        module, _, function = name.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty name
            raise ValueError(f"{name} can't be imported: {error}") from error
        self.name, self.seed, self.std = name, seed, std
        known = {"seed": seed} | ({} if std is None else {"std": std})
        self.defense = make(**{key: known[key] for key in inspect.signature(make).parameters if key in known})
        if not callable(self.defense):
            raise ValueError(f"{name}() must return a callable on images, got {type(self.defense).__name__}")
        self.source = hashlib.sha256(Path(inspect.getfile(make)).read_bytes()).hexdigest()[:16]

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """What the defense makes of images (N, C, H, W) in [0, 1]; ``index`` goes to one that takes it."""
        return applied(self.defense, images, index)

    def extra_repr(self) -> str:
        """The name, and a hash of the file that has the function."""
        std = "" if self.std is None else f", std={self.std:g}"
        return f"{self.name!r}, seed={self.seed}{std}, source={self.source}"
