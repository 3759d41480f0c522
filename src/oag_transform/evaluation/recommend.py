"""What to take, in words: the defenses that are level with the best, and the cheapest of them, whoever's it is."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .results import Cell, Row, paired, pooled

LEVEL = 0.05  # a row is level with the best unless the exact sign test has it worse at this p or less


class Choice(NamedTuple):
    """The row with the highest mean accuracy under attack, those that are level with it (itself too), and their cheapest."""

    best: Row
    level: tuple[Row, ...]
    cheapest: Row


def choose(rows: Sequence[Row], *, clean: int, attacked: Iterable[int]) -> Choice | None:
    """The best row, those level with it, and the cheapest of these; None where no row has all of the columns.

    Level with the best is what isn't worse than it on paired images, neither over the attacked columns nor on clean images, by
    the two-sided exact sign test at p <= .05. Rows of fewer images than others have are left out. No defense costs nothing, and
    less than no defense in several views.

    Args:
        rows: of a table; see :class:`~oag_transform.evaluation.results.Row`.
        clean: position of the clean images in their cells.
        attacked: positions of the attacked ones.
    """
    attacked = tuple(attacked)
    full = [row for row in rows if not row.error and all(row.cells[column] is not None for column in (clean, *attacked))]
    most = max((_n(row.cells[clean]) for row in full), default=0)
    full = [row for row in full if _n(row.cells[clean]) == most]
    if not full:
        return None

    def accuracy(row: Row) -> tuple[float, float, float]:
        return _accuracy([row.cells[column] for column in attacked]), _accuracy([row.cells[clean]]), -(row.seconds or 0)

    def worse(row: Row, columns: Sequence[int]) -> bool:
        more, fewer, p = paired([row.cells[column] for column in columns], [best.cells[column] for column in columns])
        return fewer > more and p <= LEVEL

    best = max(full, key=accuracy)
    level = tuple(row for row in full if not worse(row, attacked) and not worse(row, [clean]))
    return Choice(best, level, min(level, key=lambda row: row.seconds or 0))


def recommend(rows: Sequence[Row], *, clean: int, attacked: Iterable[int]) -> str:
    """:func:`choose` in words."""
    attacked = tuple(attacked)
    choice = choose(rows, clean=clean, attacked=attacked)
    if choice is None:
        return "Nothing was measured that could be recommended."
    best, level, cheapest = choice
    n = _n(best.cells[clean])
    under, without = _accuracy([best.cells[column] for column in attacked]), _accuracy([best.cells[clean]])
    others = [row.name for row in level if row is not best]
    words = [
        f"Of what was measured on all {n} images, {best.name} has the highest mean accuracy under attack: {100 * under:.1f}%, "
        f"and {100 * without:.1f}% on clean images."
    ]
    if others:
        words.append(
            f"Level with it, under attack and on clean images (exact sign test, p > {LEVEL:g} or in front), "
            f"{'are' if others[1:] else 'is'} {'; '.join(others)}."
        )
    else:
        words.append(f"No other is level with it (exact sign test, p <= {LEVEL:g} under attack or on clean images).")
    if not cheapest.defense and cheapest.seconds is None:
        words.append(f"No defense can be told from {cheapest.name!r} here: measure more images, or a stronger attack.")
    elif cheapest is best:
        words.append(f"{'It is also the cheapest of these: ' if others else 'Take '}{_price(cheapest)}.")
    else:
        words.append(f"The cheapest of these is {cheapest.name}: {_price(cheapest)}.")
    words.append("This says nothing about an attacker who knows the defense.")
    return " ".join(words)


def _price(row: Row) -> str:
    return row.code if row.seconds is None else f"{row.code}, {row.seconds:.2g} s an image"


def _n(cell: Cell | None) -> int:
    return 0 if cell is None else cell.n


def _accuracy(cells: Sequence[Cell | None]) -> float:
    cell = pooled(cells)
    return 0.0 if cell is None else cell.accuracy
