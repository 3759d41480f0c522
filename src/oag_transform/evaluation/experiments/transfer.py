"""What each row has right on images attacked by another tool."""

from collections.abc import Sequence

from msgspec.structs import replace

from ...baselines.catalogue import IN_VIEWS, NONE, VIEWS
from ..columns import CLEAN
from ..plan import Plan
from ..result import Result, RowResult
from ..statistics import paired

CONTROL = f"noise{IN_VIEWS}"  # white noise in the same views, at any setting


def transfer(plan: Plan) -> Result:
    """Clean images, and those of each folder of attacked ones.

    Raises:
        ValueError: the plan has no such folder.
    """
    if plan.transfer is None:
        raise ValueError("transfer needs images that somebody attacked: --adversarial FOLDER")
    columns = [CLEAN, *plan.transfer.columns]
    rows = plan.measured(columns, subject=plan.transfer.subject)
    count = len(plan.transfer.subject.images)
    return plan.result(
        "transfer",
        "Images that the target classifies correctly, clean and attacked by another tool, which need not know this target. "
        "Against a control, over all folders: images that the row has right more often, less often, and p of the two-sided "
        "exact sign test.",
        "Defense",
        [column.label for column in columns],
        _with_controls(rows),
        count=count,
        facts={
            "attacks": "another tool's",
            "data": f"{plan.facts['data'].rpartition(': ')[0]}: {count} images that the target classifies correctly and "
            f"every folder has, of {plan.transfer.subject.looked_at} looked at",
            **plan.transfer.facts,
        },
    )


def _with_controls(rows: Sequence[RowResult]) -> list[RowResult]:
    """The rows with notes on how each compares with the controls, paired."""
    names = (NONE, f"{NONE}, {VIEWS}")
    controls = [row for row in rows if not row.error and (row.name in names or row.defense.partition(":")[0] == CONTROL)]
    found = []
    for row in rows:
        notes = {}
        for control in controls:
            if control is not row and not row.error:
                more, fewer, p = paired(row.cells[1:], control.cells[1:])
                notes[f"against {control.name}"] = f"{more}, {fewer} (p = {p:.2g})"
        found.append(replace(row, notes=notes))
    return found
