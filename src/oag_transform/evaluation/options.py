"""What a command line prints and asks for: the lists of experiments and attacks, and the settings of some experiments.

Light to import: a command line is parsed with these lists, before anybody waits for torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EPS, MIFGSM_EPS = 6, 4  # the paper's bounds of FGSM and IGSM, and of MI-FGSM on Flower-17, in grey levels


@dataclass(frozen=True)
class GrayBoxEntry:
    """An attack of the paper, on the target alone; :func:`~oag_transform.evaluation.attacks.gray_box.make` makes it.

    Attributes:
        key: its name on a command line, and its function in :mod:`~oag_transform.evaluation.attacks.gray_box`.
        label: its name in tables.
        eps: the paper's bound in grey levels, None for an attack without one.
        targeted: what the paper does.
    """

    key: str
    label: str
    eps: int | None
    targeted: bool


GRAY_BOX: tuple[GrayBoxEntry, ...] = (
    GrayBoxEntry("fgsm", "FGSM", EPS, targeted=True),
    GrayBoxEntry("igsm", "IGSM", EPS, targeted=True),
    GrayBoxEntry("mifgsm", "MI-FGSM", MIFGSM_EPS, targeted=False),
    GrayBoxEntry("cw", "C&W", None, targeted=False),
)


@dataclass(frozen=True)
class AdaptiveEntry:
    """An adaptive attack; :func:`~oag_transform.evaluation.attacks.adaptive.make_attack` makes it.

    Attributes:
        key: its name on a command line.
        description: what it does, in one line.
        classes: least number of classes: some losses compare more logits than two.
        black_box: it uses no gradient.
    """

    key: str
    description: str
    classes: int = 2
    black_box: bool = False


ADAPTIVE_ATTACKS: tuple[AdaptiveEntry, ...] = (
    AdaptiveEntry("transfer", "PGD on the undefended target; the result is given to the defense"),
    AdaptiveEntry(
        "noise",
        "PGD through the noise that comes first, with the rest of the defense left out; BPDA if that has no gradient",
    ),
    AdaptiveEntry("bpda", "PGD + EOT on the cross entropy, with the identity as the defense's derivative"),
    AdaptiveEntry("margin", "PGD + EOT on the CW margin, with the identity as the defense's derivative"),
    AdaptiveEntry(
        "dlr",
        "PGD + EOT on the difference of logits ratio, with the identity as the defense's derivative",
        classes=3,
    ),
    AdaptiveEntry("restart", "margin, from a random start"),
    AdaptiveEntry(
        "exact", "CW margin by the gradient that fits: OAG through every network step, a baseline as in surrogate; else BPDA"
    ),
    AdaptiveEntry("exact-eot", "exact, with four draws for each gradient"),
    AdaptiveEntry(
        "expected",
        "exact, where thresholds and ReLU masks have the derivative of their mean over the Langevin noise",
    ),
    AdaptiveEntry(
        "surrogate",
        "CW margin by the gradient of a baseline or of its differentiable surrogate, such as JPEG's codec; else BPDA",
    ),
    AdaptiveEntry("gray", "BPDA with perturbations that are the same in all channels"),
    AdaptiveEntry("smooth", "BPDA with perturbations interpolated from a coarse grid"),
    AdaptiveEntry("apgd", "APGD of pyautoattack on the mean over draws, cross entropy"),
    AdaptiveEntry("apgd-dlr", "APGD of pyautoattack on the mean over draws, difference of logits ratio", classes=3),
    AdaptiveEntry(
        "apgd-targeted",
        "APGD of pyautoattack on the mean over draws, targeted DLR towards the three likeliest wrong classes",
        classes=4,
    ),
    AdaptiveEntry("square", "Square attack of pyautoattack on the mean over draws: black box", black_box=True),
    AdaptiveEntry("hopskipjump", "HopSkipJump of foolbox on one fixed draw: decisions only", black_box=True),
)

MOST_JUDGES = 1000
"""Largest number of draws that judge what an attack found: each judgement has draws of its own."""

LEAST_BOUND = 1e-6
"""Smallest bound, on the [0, 1] scale: a smaller one is lost in the rounding of float32 pixels, which lie up to 6e-8 apart."""
LEAST_LINF = 255 * LEAST_BOUND  # in grey levels

CHECKPOINTS = (".pt", ".pth")
"""Endings of files of torch.save, by which they are told from names of models and weights."""


@dataclass(frozen=True)
class AdaptiveOptions:
    """How adaptive attacks are run and judged."""

    attacks: tuple[str, ...] = ("bpda", "exact")
    """One after another on the images that some draw has right, each from where the one before it ended; see the list."""
    each_alone: bool = False
    """A row for each attack by itself, on all images: to compare attacks."""
    linf: tuple[float, ...] = (1, 2, 4)
    """L-infinity bounds in grey levels; an image that is misclassified at one bound stays so at larger ones."""
    l2: tuple[float, ...] = ()
    """L2 bounds on the [0, 1] scale."""
    steps: int = 20
    """Gradients of each attack, except those with an option of their own."""
    draws: int = 1
    """Draws of the defense for each gradient (k of EOT)."""
    exact_steps: int = 10
    """Gradients of exact."""
    expected_steps: int = 10
    """Gradients of exact-eot and expected."""
    apgd_steps: int = 50
    """Gradients of APGD."""
    queries: int = 300
    """Queries of Square."""
    judge: int = 5
    """Fresh draws that judge what was found, by majority vote."""
    seed_known: bool = False
    """The defender's seed is fixed and known to the attacker."""

    def check(self) -> None:
        """Raise ValueError for what is out of its range."""
        from .. import _checks  # with torch

        for name in ("steps", "draws", "exact_steps", "expected_steps", "apgd_steps", "queries", "judge"):
            most = MOST_JUDGES if name == "judge" else None
            _checks.integer(f"--adaptive.{name.replace('_', '-')}", getattr(self, name), at_least=1, at_most=most)
        for bound in self.linf:
            _checks.number("--adaptive.linf", bound, at_least=LEAST_LINF, at_most=255)
        for bound in self.l2:
            _checks.number("--adaptive.l2", bound, at_least=LEAST_BOUND)
        if not (self.linf or self.l2):
            raise ValueError("--adaptive.linf and --adaptive.l2 are both empty; give a bound")
        not_empty("--adaptive.attacks", self.attacks)
        for attack in self.attacks:
            _checks.choice("--adaptive.attacks", attack, [entry.key for entry in ADAPTIVE_ATTACKS])


@dataclass(frozen=True)
class ConvergenceOptions:
    """Steps and draws at which convergence of PGD on the margin (BPDA) is measured. Each attack starts from the images."""

    linf: float = 1.0
    """L-infinity bound in grey levels."""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Gradients, each of one draw."""
    draws: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Draws for each gradient (k of EOT)."""
    eot_steps: int = 20
    """Gradients along the draws."""

    def check(self) -> None:
        """Raise ValueError for what is out of its range."""
        from .. import _checks  # with torch

        _checks.number("--convergence.linf", self.linf, at_least=LEAST_LINF, at_most=255)
        for name in ("steps", "draws"):
            not_empty(f"--convergence.{name}", getattr(self, name))
            for value in getattr(self, name):
                _checks.integer(f"--convergence.{name}", value, at_least=1)
        _checks.integer("--convergence.eot-steps", self.eot_steps, at_least=1)


@dataclass(frozen=True)
class CertifyOptions:
    """What is to be proven by randomized smoothing, fixed before an image is seen."""

    sigma: tuple[float, ...] = (0.25,)
    """Standard deviations of the smoothing noise, on the [0, 1] scale; a result for each."""
    n0: int = 20
    """Draws that choose the class."""
    n: int = 100
    """Other draws, which are counted for it."""
    alpha: float = 0.001
    """Probability that a certificate is wrong."""
    radius: float | None = None
    """Stop counting as soon as this L2 radius is proven or out of reach. Without it all draws are counted."""
    denoisers: tuple[str, ...] | None = None
    """Only these denoisers of the list above. Without it all but the slow ones."""
    batch_norm: str | None = None
    """A second row for each denoiser: batch normalization adapted to it on other images, named like --data (training split)."""

    def check(self) -> None:
        """Raise ValueError for what is out of its range."""
        from .. import _checks  # with torch
        from ..baselines.smoothing import denoisers

        for name in ("n0", "n"):
            _checks.integer(f"--certify.{name}", getattr(self, name), at_least=1)
        not_empty("--certify.sigma", self.sigma)
        for sigma in self.sigma:
            _checks.number("--certify.sigma", sigma, above=0)
        _checks.number("--certify.alpha", self.alpha, above=0, below=1)
        if self.radius is not None:
            _checks.number("--certify.radius", self.radius, above=0)
        denoisers(self.denoisers)


@dataclass(frozen=True)
class Experiment:
    """A table or figure; :func:`oag_transform.evaluation.experiments.run` runs it.

    Attributes:
        key: its name on a command line, its function, and the stem of its files.
        title: one line.
        module: the module of :mod:`~oag_transform.evaluation.experiments` that holds the function.
        needs_other: it needs a second target.
        in_all: ``all`` means this one too.
        of_defenses: it measures the defenses of ``--defenses``.
    """

    key: str
    title: str
    module: str
    needs_other: bool = False
    in_all: bool = True
    of_defenses: bool = True


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("table1", "Table I: top-1 accuracy of defenses under gray-box attacks", "tables"),
    Experiment("table2", "Table II: transfer of attacks between two targets", "tables", needs_other=True, of_defenses=False),
    Experiment("table3", "Table III: several targets", "tables", needs_other=True),
    Experiment("table4", "Table IV: image steps", "tables", of_defenses=False),
    Experiment("table5", "Table V: kernel size", "tables", of_defenses=False),
    Experiment("table6", "Table VI: clean images against attacked ones", "tables"),
    Experiment(
        "autoencoder", "IV-H: an auto-encoder updated in one step, against the alternate update", "tables", of_defenses=False
    ),
    Experiment("fig1", "Fig. 1: what is left of an attack", "figures"),
    Experiment("fig3", "Fig. 3: accuracy against the strength of the attack", "figures"),
    Experiment("fig4", "Fig. 4: accuracy against network steps", "figures", of_defenses=False),
    Experiment("fig5", "Fig. 5: images along the iterations", "figures", of_defenses=False),
    Experiment("tradeoff", "Clean against attacked accuracy as the setting of each defense varies", "figures"),
    Experiment("adaptive", "Robust accuracy under adaptive attacks", "adaptive", in_all=False),
    Experiment("convergence", "Whether an adaptive attack has converged", "convergence", in_all=False),
    Experiment("certify", "Certified accuracy by randomized smoothing", "certify", in_all=False, of_defenses=False),
    Experiment("transfer", "Accuracy on images attacked by another tool", "transfer", in_all=False),
    Experiment("tune", "Settings, tuned on clean and Gaussian-noised images", "figures", in_all=False),
)


def not_empty(option: str, values: Sequence[Any]) -> None:
    """Raise ValueError for an empty list of an option, which a shell makes of an unset variable."""
    if not values:
        raise ValueError(f"{option} is empty; give at least one value, or leave the option out")


def gray_box_entry(key: str) -> GrayBoxEntry:
    """The gray-box attack of this key.

    Raises:
        ValueError: there is none; the message lists the keys.
    """
    return _by_key("attack", GRAY_BOX, key)


def adaptive_entry(key: str) -> AdaptiveEntry:
    """The adaptive attack of this key.

    Raises:
        ValueError: there is none; the message lists the keys.
    """
    return _by_key("attack", ADAPTIVE_ATTACKS, key)


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
