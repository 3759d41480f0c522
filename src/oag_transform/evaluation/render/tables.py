"""A result as Markdown and as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence

from ...baselines.catalogue import OAG_KEY
from ..result import Cell, Result, RowResult, format_seconds
from ..statistics import paired

_FACTS = ("seed", "target", "data", "versions", "hardware")
_MEASURED = ("n", "correct", "accuracy", "low_95", "high_95", "single_draw", "every_draw")


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (heading, *rows))
    return [first, f"|{'---|' * len(heading)}", *others]


def headings(result: Result) -> list[str]:
    """All headings of a result's table."""
    timed = any(row.seconds is not None for row in result.rows)
    return [result.first, *result.columns, *note_headings(result), *(["s an image"] if timed else [])]


def note_headings(result: Result) -> list[str]:
    """Headings of the further columns that any row has."""
    return list(dict.fromkeys(heading for row in result.rows for heading in row.notes))


def to_markdown(result: Result, *, folded: bool = False) -> str:
    """The result as a Markdown section: accuracies in percent, with intervals, and with n where other rows have more.

    Args:
        result: any result.
        folded: the settings of the run are in a ``<details>``, which code hosts and Sphinx show.
    """
    lines = [f"## {result.title}", "", result.caption, ""]
    if result.columns:
        lines += table(headings(result), [_row(result, row) for row in result.rows]) + _tests(result)
    facts = dict(result.facts)
    found = [f"- recommendation: {facts.pop('recommendation')}"] if "recommendation" in facts else []
    attacked = [cell for row in result.rows for cell in row.cells if cell is not None and cell.attacks]
    if attacked:
        doubted = sum(bool(cell.diagnostics) for cell in attacked)
        found.append(
            f"- diagnostics: {doubted} of {len(attacked)} attacked cells warn that an attack has not converged, has failed "
            "or had no gradient of its own"
        )
    settings = [f"- {name}: {f'`{value}`' if name.startswith('command') else value}" for name, value in facts.items()]
    if folded and settings:
        n = f" (n = {facts['n']})" if "n" in facts else ""
        settings = [f"<details><summary>Settings of this run{n}</summary>", "", *settings, "", "</details>"]
    figures = [[f"![{figure.caption}]({figure.file})"] for figure in result.figures]
    return "\n\n".join("\n".join(block).strip() for block in (lines, found, *figures, settings) if block) + "\n"


def diagnostics(result: Result) -> list[tuple[RowResult, str, str]]:
    """What speaks against trusting the attacks of any cell: row, heading of the column, and a warning."""
    cells = [(row, column, cell) for row in result.rows for column, cell in zip(result.columns, row.cells, strict=True) if cell]
    return [(row, column, each) for row, column, cell in cells for each in cell.diagnostics]


def to_csv(result: Result) -> str:
    """The result as CSV: a line for each cell, with the facts that tell results apart."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    facts = [result.facts.get(name, "") for name in _FACTS]
    writer.writerow(["row", "column", *_MEASURED, "seconds_per_image", "error", "defense", "setting", *_FACTS])
    for row in result.rows:
        for column, cell in zip(result.columns, row.cells, strict=True):
            measured: Sequence[object] = ("",) * len(_MEASURED)
            if cell is not None:
                measured = (cell.n, cell.correct, cell.accuracy, *cell.interval, cell.single_draw, cell.every_draw)
            writer.writerow([row.name, column, *measured, row.seconds, row.error, row.defense, row.setting, *facts])
    return file.getvalue()


def most_images(rows: Sequence[RowResult], columns: int) -> list[int]:
    """The largest number of images in each of so many columns."""
    return [max((cell.n for row in rows if (cell := row.cells[i]) is not None), default=0) for i in range(columns)]


def _row(result: Result, row: RowResult) -> list[str]:
    most = most_images(result.rows, len(result.columns))
    cells = [cell_text(cell, n) for cell, n in zip(row.cells, most, strict=True)]
    if row.error:
        at = row.cells.index(None) if None in row.cells else 0
        cells[at] = f"failed: {row.error}".replace("|", "\\|").replace("\n", " ")
    cells += [row.notes.get(heading, "") for heading in note_headings(result)]
    if any(each.seconds is not None for each in result.rows):
        cells.append("" if row.seconds is None else format_seconds(row.seconds))
    return [row.name, *cells]


def _tests(result: Result) -> list[str]:
    """OAG against each control where certificates were counted: images that one alone is certified for."""
    measured = [row for row in result.rows if row.certificates and not row.error]
    oag = next((row for row in measured if row.defense == OAG_KEY), None)
    others = [row for row in measured if row is not oag]
    if oag is None or not others:
        return []
    rows = []
    for row in others:
        pairs = [paired([one], [other]) for one, other in zip(oag.cells, row.cells, strict=True)]
        rows.append([row.name, *(f"{more}, {fewer} (p = {p:.2g})" for more, fewer, p in pairs)])
    note = "Images certified with OAG alone, with the other alone, and p of the two-sided exact sign test:"
    return ["", note, "", *table([f"{oag.name}, against", *result.columns], rows)]


def cell_text(cell: Cell | None, most: int) -> str:
    """Accuracy in percent, its interval, the accuracies of draws, and n where it is below ``most``."""
    if cell is None:
        return ""
    low, high = cell.interval
    of_draws = f", {100 * cell.single_draw:.1f}, {100 * cell.every_draw:.1f}" if cell.counts else ""
    return f"{100 * cell.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]{of_draws}" + (
        f", n = {cell.n}" if cell.n < most else ""
    )
