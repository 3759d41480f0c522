"""What an experiment found, as plain data: accuracies that know their uncertainty, and what its figures are drawn from."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
from scipy.stats import binomtest

Pixels = npt.NDArray[np.uint8]

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


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: a defense and its setting, or a target.
        cells: one for each column; None where nothing was measured.
        seconds: seconds an image, of the defense alone; None where there is no defense or it was not timed.
        error: why the defense could not be measured; empty where it could.
        defense: key of the defense in :data:`oag_transform.baselines.catalogue.DEFENSES`; empty for none of them.
        setting: of that defense.
        code: Python that makes the model that was measured, such as ``"DefendedModel(target, JPEG(25))"``.
    """

    name: str
    cells: tuple[Cell | None, ...]
    seconds: float | None = None
    error: str = ""
    defense: str = ""
    setting: float | None = None
    code: str = ""


@dataclass(frozen=True)
class Lines:
    """Accuracy along a number: a line for each of some rows, whose cells lie at ``x`` (Fig. 3, Fig. 4).

    Attributes:
        file: the .svg file beside the JSON.
        caption: what it shows.
        x: a number for each cell.
        xlabel: what the number is.
        rows: positions in the result's rows.
        mark: where to draw a vertical line, such as the chosen T_N.
        mark_label: text beside that line.
    """

    file: str
    caption: str
    x: tuple[float, ...]
    xlabel: str
    rows: tuple[int, ...]
    mark: float | None = None
    mark_label: str = ""


@dataclass(frozen=True)
class Cost:
    """Accuracy against the seconds that a defense takes: a point for each of some rows.

    Attributes:
        file: the .svg file beside the JSON.
        caption: what it shows.
        rows: positions in the result's rows.
        column: position of the accuracy in their cells.
    """

    file: str
    caption: str
    rows: tuple[int, ...]
    column: int


class Curve(NamedTuple):
    """A defense in a :class:`Tradeoff`: its name, the positions of its rows in the result, and whether to draw it strongest."""

    name: str
    rows: tuple[int, ...]
    emphasis: bool = False


@dataclass(frozen=True)
class Tradeoff:
    """Attacked against clean accuracy: a curve for each defense along its settings.

    Attributes:
        file: the .svg file beside the JSON.
        caption: what it shows.
        curves: see :class:`Curve`; each point is labelled with its row's setting.
        clean, attacked: positions of the two accuracies in the cells.
    """

    file: str
    caption: str
    curves: tuple[Curve, ...]
    clean: int
    attacked: int


class Photographs(NamedTuple):
    """A column of a figure: its heading, and a file beside the JSON and a note for each photograph."""

    heading: str
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Residuals:
    """Photographs, and below each its difference to that of the first column, magnified (Fig. 1).

    Attributes:
        file: the .jpg file beside the JSON.
        caption: what it shows.
        columns: see :class:`Photographs`.
    """

    file: str
    caption: str
    columns: tuple[Photographs, ...]


@dataclass(frozen=True)
class Iterations:
    """Photographs along the iterations (Fig. 5): the original, the attacked one, and what it became.

    Attributes:
        file: the .jpg file beside the JSON.
        caption: what it shows.
        columns: see :class:`Photographs`; the original, the attacked, and one for each moment.
    """

    file: str
    caption: str
    columns: tuple[Photographs, ...]


Figure = Lines | Cost | Tradeoff | Residuals | Iterations
FIGURES = {kind.__name__.lower(): kind for kind in (Lines, Cost, Tradeoff, Residuals, Iterations)}  # as JSON names them


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


@dataclass(frozen=True)
class Result:
    """A table, what figures are drawn from, and the facts that are needed to repeat it.

    Attributes:
        key: the experiment's name on the command line and the stem of its files, such as ``"table1"``.
        title: one line.
        caption: how to read it, one paragraph.
        first: heading of the column of names, such as ``"Defense"``.
        columns: headings of the cells.
        rows: see :class:`Row`.
        facts: n, seed, data, target, attacks, versions, hardware and command, each as text or a number.
        figures: see :class:`Lines`, :class:`Cost`, :class:`Tradeoff`, :class:`Residuals` and :class:`Iterations`.
        pairs: see :class:`Pair`.
        photographs: (H, W, 3) pixels of the .png files that figures and pairs name, until :func:`write` puts them beside the
            JSON; not part of it.
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
    photographs: Mapping[str, Pixels] = field(default_factory=dict, compare=False, repr=False)


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


def write(result: Result, folder: Path) -> None:
    """Write ``key.json`` into ``folder``, and the photographs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in result.photographs.items():
        PIL.Image.fromarray(pixels).save(folder / name)
    put(folder / f"{result.key}.json", json.dumps(_plain(result), indent=1, ensure_ascii=False))


def read(path: Path) -> Result:
    """The result in a ``key.json`` file, without its photographs.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Result(
            **plain
            | {
                "columns": tuple(plain["columns"]),
                "rows": tuple(_row(row) for row in plain["rows"]),
                "figures": tuple(_figure(figure) for figure in plain["figures"]),
                "pairs": tuple(Pair(**{name: _tuples(value) for name, value in pair.items()}) for pair in plain["pairs"]),
            }
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result of oag-transform evaluate") from error


def put(path: Path, text: str) -> None:
    """Write a text file that no reader, and no interruption, meets half of."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _plain(result: Result) -> dict[str, Any]:
    """What :func:`read` takes back, and the numbers of each cell for whoever reads the file without this package."""
    plain = {name: getattr(result, name) for name in ("key", "title", "caption", "first", "columns", "facts")}
    plain["rows"] = [vars(row) | {"cells": [_plain_cell(cell) for cell in row.cells]} for row in result.rows]
    plain["figures"] = [{"kind": type(figure).__name__.lower()} | _plain_figure(figure) for figure in result.figures]
    plain["pairs"] = [pair._asdict() for pair in result.pairs]
    return plain


def _plain_cell(cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return cell._asdict() | {"n": cell.n, "correct": cell.correct, "accuracy": cell.accuracy, "interval_95": cell.interval}


def _plain_figure(figure: Figure) -> dict[str, Any]:
    parts = {each.name: getattr(figure, each.name) for each in dataclasses.fields(figure)}
    return {
        name: [part._asdict() for part in value] if name in ("curves", "columns") else value for name, value in parts.items()
    }


def _row(plain: dict[str, Any]) -> Row:
    cells = tuple(None if cell is None else Cell(cell["right"], cell["columns"]) for cell in plain["cells"])
    return Row(**plain | {"cells": cells})


def _figure(plain: dict[str, Any]) -> Figure:
    parts = {name: _tuples(value) for name, value in plain.items() if name != "kind"}
    for name, kind in (("curves", Curve), ("columns", Photographs)):
        if isinstance(parts.get(name), tuple):
            parts[name] = tuple(kind(**{key: _tuples(value) for key, value in part.items()}) for part in parts[name])
    return FIGURES[plain["kind"]](**parts)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
