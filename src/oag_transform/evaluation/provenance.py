"""What made a result: versions, hardware, command, the code of a defended model, and the key that tells models apart."""

import inspect
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..defended import DefendedModel
from ..transform import OnlineAlternateGenerator
from .store import fingerprint

# what the defenses compute with: a result of other versions is not this one
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "PyWavelets", "pillow", "kornia", "bm3d")


def provenance(device: torch.device, packages: Sequence[str]) -> dict[str, str]:
    """What made a result, beside its data and settings: versions, hardware and command, as text."""
    return {
        "versions": ", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}",
        "hardware": hardware(device),
        "command": shlex.join(["oag-transform", *sys.argv[1:]]),
    }


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and the threads that are used of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def in_code(model: DefendedModel) -> str:
    """Python code that makes the model of any ``target``. It has no defaults, and no seed, as a defender draws a fresh one."""
    default = _call(model.defense) == f"{OnlineAlternateGenerator.__name__}()"
    parts = ["target"] if default else ["target", _call(model.defense)]
    given = inspect.signature(DefendedModel).parameters
    parts += [
        f"{name}={getattr(model, name)!r}" for name in ("samples", "shift") if getattr(model, name) != given[name].default
    ]
    return f"DefendedModel({', '.join(parts)})"


def model_key(model: DefendedModel, target: str, device: torch.device) -> dict[str, Any]:
    """What decides what a defended model makes of images, and its seconds: part of a key of :class:`.store.Store`."""
    return {
        "versions": versions(*LIBRARIES),
        "hardware": hardware(device),
        "defense": repr(model.defense),
        "weights": [fingerprint(part) for part in model.children() if part is not model.target],
        "views": model.extra_repr(),
        "target": target,
    }


def versions(*packages: str) -> list[str]:
    """Names and versions of packages; one that isn't there is named too."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # bm3d comes with an extra of its own
            found.append(f"no {package}")
    return found


def _call(defense: Any) -> str:
    """``Class(...)`` with the arguments of a module that differ from their defaults, which it keeps as attributes."""
    if isinstance(defense, nn.ModuleList):
        return f"[{', '.join(map(_call, defense))}]"
    if isinstance(defense, nn.Sequential):
        return f"torch.nn.Sequential({', '.join(map(_call, defense))})"
    if isinstance(defense, nn.Identity):
        return "torch.nn.Identity()"
    given = []
    for name, parameter in inspect.signature(type(defense)).parameters.items():
        value = getattr(defense, name, parameter.default)
        if name == "seed" or (parameter.default is not parameter.empty and value == parameter.default):
            continue
        text = name if isinstance(value, nn.Module) else f"{value!r}"
        given.append(text if parameter.default is parameter.empty else f"{name}={text}")
    return f"{type(defense).__name__}({', '.join(given)})"
