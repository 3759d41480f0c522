"""A result as Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence

from ..results import Cell, Result, Row

_FACTS = ("seed", "target", "data", "versions", "hardware")
_MEASURED = ("n", "correct", "accuracy", "low_95", "high_95")


def to_markdown(result: Result) -> str:
    """The result as a Markdown section: accuracies in percent, with intervals, and with n where other rows have more."""
    timed = any(row.seconds is not None for row in result.rows)
    header = [result.first, *result.columns, *(["s an image"] if timed else [])]
    lines = [f"## {result.title}", "", result.caption, ""]
    if result.columns:
        most = most_images(result.rows, len(result.columns))
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for row in result.rows:
            cells = [_cell(cell, n) for cell, n in zip(row.cells, most, strict=True)]
            if row.error:
                at = row.cells.index(None) if None in row.cells else 0
                cells[at] = f"failed: {row.error}".replace("|", "\\|").replace("\n", " ")
            if timed:
                cells.append("" if row.seconds is None else seconds(row.seconds))
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {value}" for name, value in result.facts.items())]
    lines += [f"\n![{figure.caption}]({figure.file})" for figure in result.figures]
    return "\n".join(lines) + "\n"


def to_csv(result: Result) -> str:
    """The result as CSV: a line for each cell, with the facts that tell results apart."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    facts = [result.facts.get(name, "") for name in _FACTS]
    writer.writerow(["row", "column", *_MEASURED, "seconds_per_image", "error", "defense", "setting", *_FACTS])
    for row in result.rows:
        for column, cell in zip(result.columns, row.cells, strict=True):
            measured = ("",) * len(_MEASURED) if cell is None else (cell.n, cell.correct, cell.accuracy, *cell.interval)
            writer.writerow([row.name, column, *measured, row.seconds, row.error, row.defense, row.setting, *facts])
    return file.getvalue()


def most_images(rows: Sequence[Row], columns: int) -> list[int]:
    """The largest number of images in each of so many columns."""
    return [max((cell.n for row in rows if (cell := row.cells[i]) is not None), default=0) for i in range(columns)]


def seconds(value: float) -> str:
    """Seconds with two digits that count."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _cell(cell: Cell | None, most: int) -> str:
    if cell is None:
        return ""
    low, high = cell.interval
    return f"{100 * cell.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]" + (f", n = {cell.n}" if cell.n < most else "")
