"""What an experiment found: tables of accuracies that know their uncertainty, as JSON, CSV and Markdown."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from scipy.stats import binomtest

Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


class Cell(NamedTuple):
    """Which images were classified correctly.

    Attributes:
        right: ``"1"`` or ``"0"`` for each image, in the order of the images; all of them again for each further column where
            ``columns`` is more than 1.
        columns: number of columns that are pooled here.
    """

    right: str
    columns: int = 1

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.right) // self.columns

    @property
    def correct(self) -> int:
        """Number of images that were classified correctly, counted once for each column."""
        return self.right.count("1")

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return self.correct / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy, for n images: pooling columns of the same images doesn't narrow it."""
        n, p = self.n, self.accuracy
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        name: a defense and its setting, or a target.
        cells: one for each column; None where nothing was measured.
        seconds: seconds an image, of the defense alone; None where there is no defense or it was not timed.
        error: why the defense could not be measured; empty where it could.
    """

    name: str
    cells: tuple[Cell | None, ...]
    seconds: float | None = None
    error: str = ""


class Figure(NamedTuple):
    """A picture that belongs to a result: a file beside its JSON, and what it shows."""

    file: str
    caption: str


class Pair(NamedTuple):
    """A photograph along the way, for comparing before and after: files beside the JSON, and class and probability of each.

    Attributes:
        name: the photograph's true class.
        original, attacked, purified: file names of the three images.
        classes: the class that the target gives each of the three.
        probabilities: the probability that the target gives the true class in each of the three.
    """

    name: str
    original: str
    attacked: str
    purified: str
    classes: tuple[str, str, str]
    probabilities: tuple[float, float, float]


class Result(NamedTuple):
    """A table, with the figures drawn from it and the facts that are needed to repeat it.

    Attributes:
        key: the experiment's name on the command line and the stem of its files, such as ``"table1"``.
        title: one line.
        caption: how to read it, one paragraph.
        first: heading of the column of names, such as ``"Defense"``.
        columns: headings of the cells.
        rows: see :class:`Row`.
        facts: n, seed, data, target, attacks, versions, hardware and command, each as text or a number.
        figures: see :class:`Figure`.
        pairs: see :class:`Pair`.
    """

    key: str
    title: str
    caption: str
    first: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    facts: dict[str, Any]
    figures: tuple[Figure, ...] = ()
    pairs: tuple[Pair, ...] = ()


def paired(one: Sequence[Cell | None], other: Sequence[Cell | None]) -> tuple[int, int, float]:
    """Two rows compared image by image, over the columns that both have.

    Returns the number of images that ``one`` has right in more columns than ``other``, the number that it has right in fewer,
    and the two-sided p-value of the exact sign test on them. For a single column this is McNemar's exact test.
    """
    both = [(a.right, b.right) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    count = min((len(right) for pair in both for right in pair), default=0)  # fewer images are the first of more
    leads = [sum((a[i] > b[i]) - (a[i] < b[i]) for a, b in both) for i in range(count)]
    more, fewer = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    return more, fewer, float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def write(result: Result, folder: Path) -> None:
    """Write ``key.json``, ``key.csv`` and ``key.md`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{result.key}.json", json.dumps(_plain(result), indent=1, ensure_ascii=False))
    _replace(folder / f"{result.key}.md", to_markdown(result))
    with open(folder / f"{result.key}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        facts = {name: result.facts.get(name, "") for name in ("seed", "target", "data", "versions", "hardware")}
        figures = ["n", "correct", "accuracy", "low_95", "high_95", "seconds_per_image", "error"]
        writer.writerow(["row", "column", *figures, *facts])
        for row in result.rows:
            for column, cell in zip(result.columns, row.cells, strict=True):
                measured = ("",) * 5 if cell is None else (cell.n, cell.correct, cell.accuracy, *cell.interval)
                writer.writerow([row.name, column, *measured, row.seconds, row.error, *facts.values()])


def read(path: Path) -> Result:
    """The result in a ``key.json`` file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(
            Row(
                row["name"],
                tuple(None if cell is None else Cell(cell["right"], cell["columns"]) for cell in row["cells"]),
                row["seconds"],
                row["error"],
            )
            for row in plain["rows"]
        )
        figures = tuple(Figure(**figure) for figure in plain["figures"])
        pairs = tuple(
            Pair(**pair | {"classes": tuple(pair["classes"]), "probabilities": tuple(pair["probabilities"])})
            for pair in plain["pairs"]
        )
        plain |= {"columns": tuple(plain["columns"]), "rows": rows, "figures": figures, "pairs": pairs}
        return Result(**plain)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result of oag-transform evaluate") from error


def to_markdown(result: Result) -> str:
    """The result as a Markdown section: accuracies in percent, with intervals, and with n where other rows have more."""
    seconds = any(row.seconds is not None for row in result.rows)
    header = [result.first, *result.columns, *(["s an image"] if seconds else [])]
    lines = [f"## {result.title}", "", result.caption, ""]
    if result.columns:
        most = [
            max((cell.n for cell in column if cell), default=0)
            for column in zip(*(row.cells for row in result.rows), strict=True)
        ]
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for row in result.rows:
            cells = [_cell(cell, n) for cell, n in zip(row.cells, most, strict=True)]
            if row.error:
                cells[row.cells.index(None)] = f"failed: {row.error}".replace("|", "\\|").replace("\n", " ")
            if seconds:
                cells.append("" if row.seconds is None else f"{row.seconds:.2g}" if row.seconds < 10 else f"{row.seconds:.0f}")
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {value}" for name, value in result.facts.items())]
    lines += [f"\n![{figure.caption}]({figure.file})" for figure in result.figures]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell | None, most: int) -> str:
    if cell is None:
        return ""
    low, high = cell.interval
    return f"{100 * cell.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]" + (f", n = {cell.n}" if cell.n < most else "")


def _plain(result: Result) -> dict[str, Any]:
    return result._asdict() | {
        "rows": [row._asdict() | {"cells": [_plain_cell(cell) for cell in row.cells]} for row in result.rows],
        "figures": [figure._asdict() for figure in result.figures],
        "pairs": [pair._asdict() for pair in result.pairs],
    }


def _plain_cell(cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return cell._asdict() | {"n": cell.n, "correct": cell.correct, "accuracy": cell.accuracy, "interval_95": cell.interval}


def _replace(path: Path, text: str) -> None:
    # a reader, or an interruption, never meets half a file
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
