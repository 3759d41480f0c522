"""The tables and figures of the paper's section IV, and some that it lacks: each a short function of a plan.

:data:`oag_transform.evaluation.options.EXPERIMENTS` is the list of them. Nothing is drawn or written here.
"""

import importlib
from collections.abc import Iterable

from ..options import Experiment
from ..plan import Plan
from ..result import Result


def run(experiment: Experiment, plan: Plan) -> Iterable[Result]:
    """What the experiment finds: one result, or several one after another."""
    found = getattr(importlib.import_module(f".{experiment.module}", __package__), experiment.key)(plan)
    return found if isinstance(found, Iterable) else [found]
