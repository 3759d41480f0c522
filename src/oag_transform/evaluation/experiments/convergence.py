"""Whether an adaptive attack has converged: what it leaves along its steps, and along the draws of each gradient (EOT)."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from ..attacks.diagnostics import JUDGED, agreement
from ..attacks.pgd import Bound, OneView, margin, unknown
from ..columns import Adaptive
from ..plan import Plan, measure
from ..provenance import in_code
from ..result import Lines, Result, RowResult
from ..store import Array, records
from ..subject import Row, Subject

LABELS = {"steps": "gradients, of one draw each", "draws": "draws for each gradient (k of EOT)"}


def convergence(plan: Plan) -> Iterator[Result]:
    """A result for each curve and row: BPDA on the CW margin, an attack of its own from the images for each point."""
    options = plan.convergence
    curves = {
        "steps": [(steps, 1) for steps in options.steps],
        "draws": [(options.eot_steps, draws) for draws in options.draws],
    }
    bound = Bound("linf", options.linf / 255)
    for row in plan.rows(published=False):
        if row.make is None:
            continue
        for curve, points in curves.items():
            x = options.steps if curve == "steps" else options.draws
            rows = [_point(plan, row, bound, steps, draws) for steps, draws in points]
            stem = f"convergence-{curve}-{row.defense}"
            caption = f"Accuracy of {row.label} by vote, {bound}."
            drawn = not any(each.error for each in rows)
            lines = Lines(plan.file(f"{stem}.svg"), caption, x, LABELS[curve], tuple(range(len(rows))), column=0)
            yield plan.result(
                "convergence",
                f"{row.label}, {bound}: PGD on the CW margin through the defense (BPDA), from the images. The margin is the "
                "mean over images and fresh draws of log p of the likeliest wrong class minus that of the right one: the "
                "attacker raises it. Agreement is the cosine of the gradients of two sets of as many draws, where the attack "
                "ended.",
                "Gradients, draws each",
                [str(bound)],
                rows,
                stem=stem,
                title=f": {LABELS[curve]}",
                facts={"defense": in_code(row.model(plan.subject)), "judge": plan.adaptive.judge},
                figures=[lines] if drawn else [],
            )


def _point(plan: Plan, row: Row, bound: Bound, steps: int, draws: int) -> RowResult:
    options = dataclasses.replace(plan.adaptive, attacks=("margin",), steps=steps, draws=draws)
    column = Adaptive(bound, options, ("margin",), Adaptive(None, options))
    found = replace(measure(plan.subject, row, [column]), name=f"{steps}, {draws}")
    if found.error:
        return found
    cell = found.cells[0]
    margins, cosines = _margins(plan.subject, row, column, draws)
    notes = {"mean margin": f"{margins:.2f}", "agreement": f"{cosines:.2f}"}
    if cell is not None and cell.attacks:
        notes["attack, s"] = f"{cell.attacks[0].seconds:.1f}"
    return replace(found, notes=notes)


def _margins(subject: Subject, row: Row, column: Adaptive, draws: int) -> tuple[float, float]:
    """Mean margin of fresh draws at the points that an attack found, and mean agreement of gradients there."""
    part = subject.first(row.count)
    defender, attacker = row.model(part), row.model(part, seed=part.seed + 1)
    points = torch.from_numpy(column.states(subject, row)["point"].copy())
    judges = column.draws(defender)

    def compute(rows: range) -> Array:
        images, labels = points[rows.start : rows.stop].to(part.device), part.labels[rows.start : rows.stop].to(part.device)
        found: Sequence[Tensor] = []
        with torch.no_grad():
            streams = [[unknown(i, JUDGED + draw) for i in rows] for draw in range(judges)]
            found = [margin(defender(images, index=draw).log_softmax(1), labels) for draw in streams]
        seen = OneView.of(attacker)  # as the attack sees it
        cosines = agreement(seen, images, labels, margin, draws, streams=lambda i, draw: unknown(rows.start + i, draw))
        return records(margin=torch.stack(found).mean(0).cpu(), agreement=cosines.cpu())

    key = {"what": "margin and agreement", "draws": [draws, judges]} | part.key(defender)
    values = part.store.rows(key, (points, part.labels), compute, f"{row.label}: margins")
    return float(values["margin"].mean()), float(values["agreement"].mean())
