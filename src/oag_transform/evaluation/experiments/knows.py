"""What is left under someone who knows the defense and attacks through it."""

import dataclasses

from torch import Tensor

from ..adaptive import PGD, Bound, ThroughDefense, margin
from ..measure import NO_DEFENSE, Candidate, Column, Subject, clean
from ..results import Result
from .plan import Plan

BOUNDS = (1, 4)  # grey levels
STEPS, DRAWS = 20, 2


def adaptive(plan: Plan) -> Result:
    """Each row attacked through its own defense: BPDA, in expectation over its draws, and exact gradients."""
    small = dataclasses.replace(plan, subject=plan.subject.first(plan.slow_count))
    attacks = [PGD(Bound("linf", bound / 255), steps=STEPS, draws=DRAWS) for bound in BOUNDS]
    last = dataclasses.replace(attacks[-1], draws=1)
    exact = dataclasses.replace(last, loss=margin)
    columns = [
        Column("Clean", clean),
        *(Column(f"transfer, {attack.bound}", _OnTarget(attack)) for attack in attacks),
        *(Column(f"through it, {attack.bound}", ThroughDefense(attack)) for attack in attacks),
        Column(f"exact gradients, {exact.bound}", ThroughDefense(exact, exact=True)),
        Column(f"through it, seed known, {last.bound}", ThroughDefense(last, known=True)),
    ]
    return small.result(
        "adaptive",
        f"PGD with momentum, untargeted, {STEPS} steps of {DRAWS} draws each, on the bare target (transfer) and through each "
        "row's own defense, whose derivative is taken for the identity (BPDA). Exact gradients: of the CW margin, of one draw, "
        "ours unrolled; a defense that has no gradient meets BPDA there too. Rounded to 8 bits, classified once, with draws "
        "that the attacker doesn't know but in the last column. Longer attacks find more: these are upper bounds.",
        "Defense",
        [column.label for column in columns],
        small.rows(columns, published=False),
    )


@dataclasses.dataclass(frozen=True)
class _OnTarget:
    """The same attack on the target alone: what a row meets from one who doesn't know it."""

    attack: PGD

    def __call__(self, subject: Subject, candidate: Candidate) -> Tensor:
        return ThroughDefense(self.attack)(subject, dataclasses.replace(NO_DEFENSE, count=candidate.count))
