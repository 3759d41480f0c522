"""Accuracy along a number: Figures 3 and 4, the trade-off of each defense along its settings, and the tuning of those."""

import dataclasses
from collections.abc import Sequence

from ...baselines.catalogue import OAG_KEY, Defense
from ...stopping import smallest_flat_step
from ...transform import DivergenceError
from ..attacks import igsm
from ..measure import Column, GrayBox, Noised, along, clean, measure
from ..results import Curve, Lines, Result, Row, Tradeoff
from .plan import Plan, goal, with_mean

EPSILONS = (0, 1, 2, 3, 4, 5, 6, 8, 10)  # Fig. 3
TRACE_STEPS = (2, 4, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 48, 72, 96)  # Fig. 4: dense where the default is
PAPER_TRACE_STEPS = tuple(range(20, 301, 20))  # up to the paper's T_N
FLAT = 0.01  # accuracy by which Fig. 4 may still rise after the chosen T_N
TUNE_TOLERANCE = 0.05  # accuracy that a stronger setting may cost


def fig3(plan: Plan) -> Result:
    """Fig. 3: accuracy against the attack's budget."""
    targeted = plan.attack("igsm").targeted
    attacks = [igsm(eps, targeted=targeted) for eps in EPSILONS if eps]
    columns = [Column("eps 0", clean), *(Column(f"eps {attack.eps}", GrayBox(attack)) for attack in attacks)]
    fast = tuple(family for family in plan.families if not family.slow)
    rows = dataclasses.replace(plan, families=fast).rows(columns, published=False)
    lines = Lines(
        plan.file("fig3.svg"),
        "Top-1 accuracy under IGSM against its L-infinity bound.",
        EPSILONS,
        "eps (grey levels)",
        tuple(i for i, row in enumerate(rows) if not row.error),
    )
    return plan.result(
        "fig3",
        f"IGSM, {goal(attacks[0])}, with growing L-infinity bound; tuned settings, ours at {plan.setting_name}.",
        "Defense",
        [column.label for column in columns],
        rows,
        attacks=attacks,
        figures=[lines],
    )


def fig4(plan: Plan) -> Result:
    """Fig. 4: accuracy against network steps under Gaussian noise, FGSM and IGSM; the first of them chooses T_N."""
    attacks = [plan.attack("fgsm"), plan.attack("igsm")]
    columns = [_gaussian(plan), *(Column(str(attack), GrayBox(attack)) for attack in attacks)]
    steps = PAPER_TRACE_STEPS if plan.paper else TRACE_STEPS
    longest = plan.ours("", network_steps=max(steps))
    model = longest.model(plan.subject)
    rows = []
    for column in columns:
        cells = along(plan.subject, model, column.images(plan.subject, longest), steps, column.label)
        rows.append(Row(column.label, tuple(cells), defense=OAG_KEY))
    curve = [(step, cell.accuracy) for step, cell in zip(steps, rows[0].cells, strict=True) if cell is not None]
    chosen = smallest_flat_step(curve, FLAT)
    lines = Lines(
        plan.file("fig4.svg"),
        "Top-1 accuracy of images purified with more and more network steps.",
        steps,
        "network steps",
        tuple(range(len(rows))),
        chosen,
        f"T_N = {chosen}",
    )
    return plan.result(
        "fig4",
        f"T_N = {chosen} is the first step after which accuracy under Gaussian noise rises by no more than one point: it is "
        f"chosen without any attack (III-D). Everything else is at {plan.setting_name}.",
        "Noise",
        [str(step) for step in steps],
        rows,
        attacks=attacks,
        facts={"chosen T_N": chosen},
        figures=[lines],
    )


def tradeoff(plan: Plan) -> Result:
    """Clean against attacked accuracy of every defense as its setting varies; ours: T_N."""
    columns = plan.columns(plan.attacks)
    rows: list[Row] = []
    curves = []
    for family in plan.families:
        found = [with_mean(row) for row in _settings(plan, family, columns)]
        drawn = tuple(len(rows) + i for i, row in enumerate(found) if not row.error)
        rows += found
        if drawn:
            curves.append(Curve(family.label, drawn, family.key == OAG_KEY))
    caption = "Clean accuracy, and mean accuracy under the attacks, of each setting."
    return plan.result(
        "tradeoff",
        "A defense that lies above and to the right of another beats it. Slow ones are measured on fewer images. "
        f"Ours is at {plan.setting_name}, but for T_N.",
        "Defense",
        [*(column.label for column in columns), "Mean attacked"],
        rows,
        attacks=plan.attacks,
        figures=[Tradeoff(plan.file("tradeoff.svg"), caption, tuple(curves), clean=0, attacked=len(columns))] if curves else [],
    )


def tune(plan: Plan) -> Result:
    """The strongest setting of each defense that costs little on clean and Gaussian-noised images: no attack is looked at."""
    columns = [Column("Clean", clean), _gaussian(plan)]
    rows, chosen = [], {}
    for family in plan.families:
        found = [with_mean(row, of=2) for row in _settings(plan, family, columns)]
        rows += found
        means = [(setting, row.cells[-1]) for setting, row in zip(family.settings, found, strict=True)]
        known = [(setting, cell.correct, len(cell.right)) for setting, cell in means if cell is not None]
        if known:
            least = max(correct for _, correct, _ in known) - TUNE_TOLERANCE * known[0][2]
            chosen[family.key] = [setting for setting, correct, _ in known if correct >= least][-1]
    return plan.result(
        "tune",
        f"Chosen is the strongest whose mean of both columns is within {100 * TUNE_TOLERANCE:g} points of the defense's best: "
        f"{', '.join(f'{key} {setting:g}' for key, setting in chosen.items())}. No attack was looked at.",
        "Defense",
        [*(column.label for column in columns), "Mean"],
        rows,
        facts={"chosen": chosen},
    )


def _gaussian(plan: Plan) -> Column:
    return Column(f"Gaussian noise, std {plan.noise_std:g}", Noised(plan.noise_std))


def _settings(plan: Plan, family: Defense, columns: Sequence[Column]) -> list[Row]:
    """A defense at each of its settings, in their order."""
    if family.key == OAG_KEY:
        return _our_settings(plan, family, columns)
    return [measure(plan.subject, plan.candidate(family, setting), columns) for setting in family.settings]


def _our_settings(plan: Plan, family: Defense, columns: Sequence[Column]) -> list[Row]:
    # T_N steps are the first T_N of a longer run: one run gives all of them
    steps = sorted(int(setting) for setting in family.settings)
    longest = plan.ours(family.label, network_steps=steps[-1])
    rows = [Row(family.describe(n), (None,) * len(columns), defense=family.key, setting=n) for n in family.settings]
    try:
        model = longest.model(plan.subject)
        cells = [
            along(plan.subject, model, column.images(plan.subject, longest), steps, f"{family.label}: {column.label}")
            for column in columns
        ]
    except DivergenceError as error:
        return [dataclasses.replace(row, error=str(error)) for row in rows]
    found = [dict(zip(steps, column, strict=True)) for column in cells]
    return [
        dataclasses.replace(row, cells=tuple(by_step[int(n)] for by_step in found))
        for row, n in zip(rows, family.settings, strict=True)
    ]
