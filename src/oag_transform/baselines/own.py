"""A defense of somebody's own, which a command line names as ``module:function``."""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import _checks, files
from ..defended import applied

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def imported(name: str) -> tuple[Callable[..., Any], str]:
    """What ``"module:function"`` names, and a hash of its source file, which tells its versions apart.

    Raises:
        ValueError: it can't be imported.
    """
    module, _, function = name.partition(":")
    try:
        found = importlib.import_module(module)
        make = getattr(found, function)
    except (Exception, SystemExit) as error:  # somebody's own code
        told = error if isinstance(error, (ImportError, AttributeError)) else files.reason(error)
        raise ValueError(f"{name} can't be imported: {told}") from error
    try:
        source = inspect.getfile(make)
    except TypeError:  # an object, such as functools.partial
        source = getattr(found, "__file__", None) or ""  # none: a module that is compiled into Python
    return make, hashlib.sha256(Path(source).read_bytes() if Path(source).is_file() else b"").hexdigest()[:16]


class OwnDefense(nn.Module):
    """The defense that a function makes: a module or another callable on images (N, C, H, W) in [0, 1].

    A module is put in eval mode. The defense is taken as randomised. Its repr changes with its source file, so that results of
    an older version aren't taken for it.

    Args:
        name: ``"module:function"``, or ``"module:Class"``. It is called with those of ``seed`` and ``std`` that it takes.
        seed: for the function.
        std: standard deviation of the noise that it is to remove, on the [0, 1] scale; None: unknown, and not given.

    Raises:
        ValueError: it can't be imported, or what it returns can't be called.
    """

    def __init__(self, name: str, seed: int = 0, *, std: float | None = None) -> None:
        super().__init__()
        make, self.source = imported(name)
        self.name, self.seed, self.std = name, seed, std
        known = {"seed": seed} | ({} if std is None else {"std": std})
        parameters = inspect.signature(make).parameters.values()
        required = (each.name for each in parameters if each.default is each.empty and each.kind not in VARIADIC)
        if unknown := [name for name in required if name not in known]:
            raise ValueError(
                f"{name} must return the defense, and is called with seed and std at most; it is a function of "
                f"{', '.join(unknown)}"
            )
        self.defense = make(**{each.name: known[each.name] for each in parameters if each.name in known})
        if not callable(self.defense):
            raise ValueError(f"{name}() must return a callable on images, got {type(self.defense).__name__}")
        self.eval()

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """What the defense makes of images (N, C, H, W) in [0, 1]; ``index`` goes to one that takes it."""
        result = _checks.purified(applied(self.defense, images, index), images)
        low, high = result.aminmax() if result.numel() else (0, 1)
        if low < -_checks.RANGE_TOLERANCE or high > 1 + _checks.RANGE_TOLERANCE:
            raise ValueError(f"{self.name} must return images in [0, 1], got values from {low:.4g} to {high:.4g}")
        return result

    def extra_repr(self) -> str:
        """The name, and a hash of the file that has the function."""
        std = "" if self.std is None else f", std={self.std:g}"
        return f"{self.name!r}, seed={self.seed}{std}, source={self.source}"
