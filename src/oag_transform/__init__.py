"""Online Alternate Generator: purify images for a classifier that is already trained, without touching it."""

from .defended import DefendedModel
from .stopping import NetworkSteps, choose_network_steps
from .transform import DivergenceError, OnlineAlternateGenerator, TraceStep

__all__ = [
    "DefendedModel",
    "DivergenceError",
    "NetworkSteps",
    "OnlineAlternateGenerator",
    "TraceStep",
    "choose_network_steps",
]
