"""What adaptive attacks leave of each row, at growing bounds."""

from collections.abc import Iterator

from msgspec.structs import replace

from ..attacks.diagnostics import black_box_leads
from ..columns import Adaptive, adaptive_columns
from ..options import adaptive_entry
from ..plan import Plan, measure
from ..result import Cell, Lines, Result, RowResult, format_seconds
from ..statistics import worst
from ..subject import Row

ATTACKS = "attacks (gradients an image)"  # heading of a note of each row
XLABELS = {"linf": "L-infinity bound in grey levels (of 255)", "l2": "L2 bound, on the [0, 1] scale"}


def adaptive(plan: Plan) -> Iterator[Result]:
    """A result for each norm: every row under the attacks one after another, or each of these by itself."""
    options = plan.adaptive
    for norm, bounds in (("linf", options.linf), ("l2", options.l2)):
        if not bounds:
            continue
        rows: list[RowResult] = []
        for row in plan.rows(published=False):
            rows += _each_alone(plan, row, norm) if options.each_alone else [_measured(plan, row, norm, options.attacks)]
        columns = adaptive_columns(options, norm, ())
        drawn = tuple(i for i, row in enumerate(rows) if not row.error and None not in row.cells)
        stem = f"adaptive{'-each' * options.each_alone}{'-seed-known' * options.seed_known}-{norm}"
        lines = Lines(
            plan.file(f"{stem}.svg"), "Accuracy by vote against the bound.", (0.0, *sorted(bounds)), XLABELS[norm], drawn
        )
        yield plan.result(
            "adaptive",
            _caption(plan),
            "Defense and attack" if options.each_alone else "Defense",
            [column.label for column in columns],
            rows,
            stem=stem,
            title=", L-infinity" if norm == "linf" else ", L2",
            facts={
                name.replace("_", " "): ", ".join(value) if name == "attacks" else value
                for name, value in vars(options).items()
                if name not in ("linf", "l2")
            },
            figures=[lines] if drawn and not options.each_alone else [],
        )


def _measured(plan: Plan, row: Row, norm: str, attacks: tuple[str, ...]) -> RowResult:
    columns: list[Adaptive] = adaptive_columns(plan.adaptive, norm, attacks)
    found = measure(plan.subject, row, columns)
    return replace(found, notes=_cost(found))


def _each_alone(plan: Plan, row: Row, norm: str) -> list[RowResult]:
    """A row for each attack, and for each image the worst of them."""
    attacks = plan.adaptive.attacks
    found = [_measured(plan, row, norm, (attack,)) for attack in attacks]
    left: list[Cell | None] = []
    for column in zip(*(each.cells for each in found), strict=True):
        alone = {adaptive_entry(name): cell for name, cell in zip(attacks, column, strict=True) if cell is not None}
        least = worst(column)
        left.append(least and replace(least, diagnostics=black_box_leads(alone)))
    named = [replace(each, name=f"{row.label}: {attack}") for each, attack in zip(found, attacks, strict=True)]
    return [*named, RowResult(f"{row.label}: worst for each image", tuple(left), defense=row.defense, setting=row.setting)]


def _cost(row: RowResult) -> dict[str, str]:
    """What the attacks took at the smallest bound: gradients of a single draw, CPU seconds and losses."""
    cell = row.cells[1] if len(row.cells) > 1 else None
    if cell is None or not cell.attacks:
        return {}
    took = [each.name if each.gradients is None else f"{each.name} {each.gradients}" for each in cell.attacks]
    notes = {ATTACKS: " + ".join(took), "attack, s": format_seconds(sum(each.seconds for each in cell.attacks))}
    losses = cell.attacks[0].losses
    if len(cell.attacks) == 1 and losses:
        notes["loss, first and last"] = f"{losses[0]:.2f}, {losses[-1]:.2f}"
    return notes


def _caption(plan: Plan) -> str:
    options = plan.adaptive
    alone = "Each attack by itself, on all images." if options.each_alone else "The attacks run in sequence (column attacks)."
    if options.each_alone and options.judge > 1:
        alone += " The worst for each image is the least of several noisy counts, which is too low for a randomised defense."
    seed = " The defender's seed is fixed, and the attacker knows it." if options.seed_known else ""
    return (
        f"Accuracy in percent of images that the target classifies correctly. Untargeted. {alone}{seed} A vote of "
        f"{options.judge} fresh draws judges a randomised defense. A cell has the accuracy by vote with its 95% interval, the "
        "accuracy of a single draw, and the share of images that every draw classifies correctly. Seconds are those of the "
        "processors (wall-clock with CUDA) for defense and target, in one draw. Robust accuracies are upper bounds."
    )
