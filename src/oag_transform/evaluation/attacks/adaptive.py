"""Adaptive attacks: the attacker knows the defense and attacks through it (Athalye et al. 2018, Tramer et al. 2020).

An adaptive attack is an algorithm, of :mod:`.pgd` or :mod:`.libraries`, on the model that stands for the defended one. A
randomised defense is attacked in expectation over its draws (EOT). :mod:`.diagnostics` judges what an attack found with fresh
draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ... import _checks
from ...defended import DefendedModel, parts_of, unwrapped
from ..options import AdaptiveOptions
from .libraries import APGD, HopSkipJump, Square
from .pgd import PGD, AttackResult, Bound, OneView, Streams, dlr, margin
from .unrolled import PROBED, first_defense, has_gradient, lacks_gradient, unrolled, with_surrogates

AttackGradient = Literal["bpda", "exact", "expected", "surrogate", "noise", "target"]
"""See :class:`AdaptiveAttack`."""

STREAMS_OF_AN_ATTACK = 100_000  # draws that one attack of several may take: no two attacks see the same ones
EOT = 4  # draws for each gradient of "exact-eot"


@dataclass(frozen=True)
class AdaptiveAttack:
    """An algorithm, and what it is run on: the model that stands for the defended one.

    Attributes:
        algorithm: PGD, APGD, Square or HopSkipJump.
        gradient: ``"bpda"``: as the model is differentiated, which is the identity for the defense; ``"exact"`` and
            ``"expected"``: see :func:`.unrolled.unrolled`; ``"surrogate"``: see :func:`.unrolled.with_surrogates`;
            ``"noise"``: of the noise that comes first, with everything behind it left out; each of these is BPDA where the
            defense then has no gradient. ``"target"``: of the undefended target (transfer).
        one_view: PGD sees the views one at a time, see :class:`.pgd.OneView`.
        continues: it starts where the attack before it ended, in place of the images.
    """

    algorithm: "PGD | APGD | Square | HopSkipJump"
    gradient: AttackGradient = "bpda"
    one_view: bool = False
    continues: bool = False

    def __post_init__(self) -> None:
        _checks.choice("gradient", self.gradient, get_args(AttackGradient))

    def __call__(self, model: DefendedModel, images: Tensor, labels: Tensor, start: Tensor, streams: Streams) -> AttackResult:
        """Attacked images; ``start``: where the attack before this one ended; ``streams``: of the attacker's draws."""
        shown = self.differentiated(model, images)
        fell_back = shown is model and self.gradient != "bpda"
        if self.one_view and shown.shift != 0:
            shown = OneView.of(shown)
        algorithm = replace(self.algorithm, streams=streams)
        starts = {"start": start} if self.continues and isinstance(algorithm, PGD) and not start.equal(images) else {}
        return algorithm(shown, images, labels, **starts)._replace(fell_back=fell_back or lacks_gradient(shown))

    def differentiated(self, model: DefendedModel, images: Tensor) -> DefendedModel:
        """The model that is differentiated in place of the defended one."""
        if self.gradient == "target":
            return DefendedModel(model.target, nn.Identity(), normalize=model.normalize, shift=0)
        if self.gradient == "noise" and not isinstance(model.defense, nn.ModuleList):
            own = DefendedModel(model.target, first_defense(model), normalize=model.normalize, shift=0, gradient="own")
        elif self.gradient == "surrogate":
            own = with_surrogates(model)
        elif self.gradient in ("exact", "expected"):
            own = unrolled(model, expected=self.gradient == "expected")
        else:
            return model
        return own if has_gradient(own.defense, images[:PROBED]) else model


def make_attack(name: str, bound: Bound, options: AdaptiveOptions, *, randomised: bool, views: bool) -> AdaptiveAttack:
    """The attack of a name in :data:`~oag_transform.evaluation.options.ADAPTIVE_ATTACKS`.

    Args:
        name: see above.
        bound: see :class:`.pgd.Bound`.
        options: steps, draws and queries.
        randomised: whether one draw of the defense differs from another: else a gradient takes one, of the next view.
        views: whether the model has several.

    Raises:
        ValueError: no such attack.
    """
    draws = options.draws if randomised or views else 1
    pgd = PGD(bound, options.steps, draws, deterministic=not randomised)
    by_margin = replace(pgd, loss=margin)
    one_draw = replace(pgd, draws=1)

    def through(attack: PGD, gradient: Any = "bpda", continues: bool = True) -> AdaptiveAttack:
        return AdaptiveAttack(attack, gradient, one_view=True, continues=continues)

    makers: dict[str, Callable[[], AdaptiveAttack]] = {
        "transfer": lambda: AdaptiveAttack(one_draw, "target"),
        "noise": lambda: through(pgd, "noise"),
        "bpda": lambda: through(pgd),
        "margin": lambda: through(by_margin),
        "dlr": lambda: through(replace(pgd, loss=dlr)),
        "restart": lambda: through(replace(by_margin, random_start=5), continues=False),
        "exact": lambda: through(replace(by_margin, steps=options.exact_steps), "exact"),
        "exact-eot": lambda: through(replace(by_margin, steps=options.expected_steps, draws=EOT if randomised else 1), "exact"),
        "expected": lambda: through(replace(by_margin, steps=options.expected_steps), "expected"),
        "surrogate": lambda: through(by_margin, "surrogate"),
        "gray": lambda: through(replace(pgd, basis="gray"), continues=False),
        "smooth": lambda: through(replace(pgd, basis="smooth"), continues=False),
        "apgd": lambda: AdaptiveAttack(APGD(bound, options.apgd_steps, draws)),
        "apgd-dlr": lambda: AdaptiveAttack(APGD(bound, options.apgd_steps, draws, "dlr")),
        "apgd-targeted": lambda: AdaptiveAttack(APGD(bound, options.apgd_steps, draws, "dlr-targeted")),
        "square": lambda: AdaptiveAttack(Square(bound, options.queries, draws)),
        "hopskipjump": lambda: AdaptiveAttack(HopSkipJump(bound)),
    }
    return makers[_checks.choice("attack", name, makers)]()


def randomised(defense: Any, *, seed_known: bool = False) -> bool:
    """Whether one draw of a defense may differ from another: not of this package's and torch's modules without a seed.

    ``seed_known``: a defense with a seed draws the same numbers each time.
    """
    inner = unwrapped(defense)
    if parts := list(inner) if isinstance(inner, nn.ModuleList) else parts_of(inner):
        return any(randomised(part, seed_known=seed_known) for part in parts)
    seeded = any(hasattr(each, "seed") for each in inner.modules()) if isinstance(inner, nn.Module) else False
    if seeded:
        return not seed_known
    return type(inner).__module__.partition(".")[0] not in ("oag_transform", "torch")
