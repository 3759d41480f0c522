"""Rows compared image by image, pooled columns, what certificates prove, and which defense to take."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy.stats import binomtest

from ..smoothed import certified_radius
from .result import Cell, DrawCounts, RowResult, bits

SIGNIFICANCE = 0.05  # a row is distinguishable from the best where the exact sign test has it worse at this p or less


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


def pooled(cells: Sequence[Cell | None]) -> Cell | None:
    """All columns as one; None where one is missing."""
    present = [cell for cell in cells if cell is not None]
    return Cell("".join(cell.right for cell in present), len(present)) if present and len(present) == len(cells) else None


def worst(cells: Sequence[Cell | None]) -> Cell | None:
    """Images that are right in every one of some cells; None where there is none."""
    present = [cell.right for cell in cells if cell is not None]
    return Cell("".join(map(min, zip(*present, strict=True)))) if present else None


def certified(images: Sequence[DrawCounts], sigma: float, alpha: float, analyses: int, radius: float) -> Cell:
    """Which images are proven to be right within an L2 radius; for 0, within some radius above 0.

    Args:
        images: what was counted, see :class:`~oag_transform.SmoothedModel`.
        sigma: of the smoothing noise, on the [0, 1] scale.
        alpha: probability that a certificate is wrong.
        analyses: how many times counting was allowed to stop; alpha is split over them.
        radius: on the [0, 1] scale.
    """
    proven = [(max(each.selection, key=lambda c: (each.selection[c], -c)), each) for each in images]  # ties: the first class
    radii = [
        certified_radius(each.counted.get(chosen, 0), sum(each.counted.values()), sigma, alpha / analyses)
        for chosen, each in proven
    ]
    right = [chosen == each.truth and 0 < found >= radius for (chosen, each), found in zip(proven, radii, strict=True)]
    return Cell(bits(right))


def linf_radius(radius: float, shape: Sequence[int]) -> float:
    """The L-infinity radius that an L2 radius implies for images of a shape (C, H, W): sqrt(C H W) times smaller."""
    return radius / math.sqrt(math.prod(shape))


class Choice(NamedTuple):
    """The best row under attack, those that are statistically indistinguishable from it (itself too), and their cheapest."""

    best: RowResult
    indistinguishable: tuple[RowResult, ...]
    cheapest: RowResult


def choose(rows: Sequence[RowResult], *, clean: int, attacked: Iterable[int]) -> Choice | None:
    """The best row, those that can't be told from it, and the cheapest of these; None where no row has all of the columns.

    A row is indistinguishable from the best unless it is worse on paired images, over the attacked columns or on clean images,
    by the two-sided exact sign test at p <= .05. Rows of fewer images than others have are left out. No defense costs nothing,
    and less than no defense in several views.

    Args:
        rows: of a table.
        clean: position of the clean images in their cells.
        attacked: positions of the attacked ones.
    """
    attacked = tuple(attacked)
    full = [row for row in rows if not row.error and all(row.cells[column] is not None for column in (clean, *attacked))]
    most = max((_n(row.cells[clean]) for row in full), default=0)
    full = [row for row in full if _n(row.cells[clean]) == most]
    if not full:
        return None

    def rank(row: RowResult) -> tuple[float, float, float]:
        return _accuracy([row.cells[column] for column in attacked]), _accuracy([row.cells[clean]]), -(row.seconds or 0)

    def worse(row: RowResult, columns: Sequence[int]) -> bool:
        more, fewer, p = paired([row.cells[column] for column in columns], [best.cells[column] for column in columns])
        return fewer > more and p <= SIGNIFICANCE

    best = max(full, key=rank)
    alike = tuple(row for row in full if not worse(row, attacked) and not worse(row, [clean]))
    return Choice(best, alike, min(alike, key=lambda row: row.seconds or 0))


def recommend(rows: Sequence[RowResult], *, clean: int, attacked: Iterable[int]) -> str:
    """:func:`choose` in words."""
    attacked = tuple(attacked)
    choice = choose(rows, clean=clean, attacked=attacked)
    if choice is None:
        return "Nothing was measured that could be recommended."
    best, alike, cheapest = choice
    under, without = _accuracy([best.cells[column] for column in attacked]), _accuracy([best.cells[clean]])
    others = [row.name for row in alike if row is not best]
    words = [
        f"Of the defenses measured on all {_n(best.cells[clean])} images, {best.name} has the highest mean accuracy under "
        f"attack: {100 * under:.1f}%, and {100 * without:.1f}% on clean images."
    ]
    if others:
        words.append(
            "Statistically indistinguishable from it, under attack and on clean images (exact sign test, p > "
            f"{SIGNIFICANCE:g} or better), {'are' if others[1:] else 'is'} {'; '.join(others)}."
        )
    else:
        words.append(f"Every other is worse (exact sign test, p <= {SIGNIFICANCE:g} under attack or on clean images).")
    if not cheapest.defense and cheapest.seconds is None:
        words.append(f"No defense can be told from {cheapest.name!r} here: measure more images, or a stronger attack.")
    elif cheapest is best:
        words.append(f"{'It is also the cheapest of these: ' if others else 'Take '}{_price(cheapest)}.")
    else:
        words.append(f"The cheapest of these is {cheapest.name}: {_price(cheapest)}.")
    words.append("This says nothing about adaptive attacks.")
    return " ".join(words)


def _price(row: RowResult) -> str:
    return row.code if row.seconds is None else f"{row.code}, {row.seconds:.2g} s an image"


def _n(cell: Cell | None) -> int:
    return 0 if cell is None else cell.n


def _accuracy(cells: Sequence[Cell | None]) -> float:
    cell = pooled(cells)
    return 0.0 if cell is None else cell.accuracy
