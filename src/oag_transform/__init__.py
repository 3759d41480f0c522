"""Online Alternate Generator (OAG): image purification for classifiers that are already trained and stay unchanged."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .defended import DefendedModel
    from .smoothed import ABSTAIN, Certificate, ClassCounts, SmoothedModel
    from .stopping import NetworkSteps, choose_network_steps
    from .transform import DivergenceError, OnlineAlternateGenerator, TraceStep

__all__ = [
    "ABSTAIN",
    "Certificate",
    "ClassCounts",
    "DefendedModel",
    "DivergenceError",
    "NetworkSteps",
    "OnlineAlternateGenerator",
    "SmoothedModel",
    "TraceStep",
    "choose_network_steps",
]

__version__ = version("oag-transform")


def __getattr__(name: str) -> Any:
    # imported on first use, so that --help and --version don't wait for torch
    if name in __all__:
        for home in ("transform", "defended", "smoothed", "stopping"):
            module = importlib.import_module(f".{home}", __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
