"""The lists that the command line prints: attacks and experiments. Light to import; torch comes when something is made."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a command line is parsed with these lists, before anybody waits for torch
    from .attacks import Attack
    from .results import Result


@dataclass(frozen=True)
class AttackEntry:
    """An attack of the paper.

    Attributes:
        key: its name on a command line, and its function in :mod:`~oag_transform.evaluation.attacks`.
        label: its name in tables.
        eps: the paper's bound in grey levels, None for an attack without one.
        targeted: what the paper does.
    """

    key: str
    label: str
    eps: int | None
    targeted: bool

    def make(self, eps: int | None = None, targeted: bool | None = None) -> "Attack":
        """The attack, with the paper's bound and goal where no other is given.

        Raises:
            ValueError: ``eps`` isn't an integer from 1 to 255, or the attack has none.
        """
        chosen: dict[str, Any] = {"targeted": self.targeted if targeted is None else targeted}
        if self.eps is not None:
            chosen["eps"] = self.eps if eps is None else eps
        elif eps is not None:
            raise ValueError(f"{self.label} has no bound, got eps = {eps!r}")
        return getattr(importlib.import_module(".attacks", __package__), self.key)(**chosen)


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
        key: its name on a command line, its function, and the stem of its files.
        title: one line.
        module: the module of :mod:`~oag_transform.evaluation.experiments` that holds the function.
        needs_other: it needs a second target.
        in_all: ``all`` means this one too.
    """

    key: str
    title: str
    module: str
    needs_other: bool = False
    in_all: bool = True

    def run(self, plan: Any) -> "Result":
        """What the experiment finds, given a :class:`~oag_transform.evaluation.experiments.plan.Plan`."""
        return getattr(importlib.import_module(f".experiments.{self.module}", __package__), self.key)(plan)


ATTACKS: tuple[AttackEntry, ...] = (
    AttackEntry("fgsm", "FGSM", 6, targeted=True),
    AttackEntry("igsm", "IGSM", 6, targeted=True),
    AttackEntry("mifgsm", "MI-FGSM", 4, targeted=False),
    AttackEntry("cw", "C&W", None, targeted=False),
)

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("table1", "Table I: top-1 accuracy of defenses under gray-box attacks", "tables"),
    Experiment("table2", "Table II: transfer of attacks between two targets", "tables", needs_other=True),
    Experiment("table3", "Table III: several targets", "tables", needs_other=True),
    Experiment("table4", "Table IV: image steps", "tables"),
    Experiment("table5", "Table V: kernel size", "tables"),
    Experiment("table6", "Table VI: clean images against attacked ones", "tables"),
    Experiment("autoencoder", "IV-H: an auto-encoder updated in one step, against the alternate update", "tables"),
    Experiment("fig1", "Fig. 1: what is left of an attack", "photographs"),
    Experiment("fig3", "Fig. 3: accuracy against the strength of the attack", "curves"),
    Experiment("fig4", "Fig. 4: accuracy against network steps", "curves"),
    Experiment("fig5", "Fig. 5: images along the iterations", "photographs"),
    Experiment("tradeoff", "Clean against attacked accuracy as the setting of each defense varies", "curves"),
    Experiment("adaptive", "Under attack by someone who knows the defense", "knows", in_all=False),
    Experiment("tune", "Settings, tuned on clean and Gaussian-noised images", "curves", in_all=False),
)


def attack(key: str) -> AttackEntry:
    """The attack of this key.

    Raises:
        ValueError: there is none; the message lists the keys.
    """
    return _by_key("attack", ATTACKS, key)


def experiment(key: str) -> Experiment:
    """The experiment of this key.

    Raises:
        ValueError: there is none; the message lists the keys.
    """
    return _by_key("experiment", EXPERIMENTS, key)


def _by_key(kind: str, entries: Any, key: str) -> Any:
    for entry in entries:
        if entry.key == key:
            return entry
    raise ValueError(f"no {kind} {key!r}; expected some of {', '.join(entry.key for entry in entries)}")
