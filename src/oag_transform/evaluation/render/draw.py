"""The figures of a result, drawn from its data alone: the JSON, and the images beside it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ...files import read_rgb
from ..result import Cell, Certified, Cost, Figure, ImageColumn, Iterations, Lines, Residuals, Result, RowResult, Tradeoff
from ..statistics import certified
from . import figures

logger = logging.getLogger(__name__)


def draw_figures(result: Result, folder: Path) -> None:
    """Draw every figure of a result into the folder that holds its images.

    One that can't be drawn, such as for want of an image, is told in a warning, and the others are drawn.
    """
    for figure in result.figures:
        try:
            _draw(figure, result, folder)
        except (ValueError, IndexError, OSError) as error:
            logger.warning("%s of %s can't be drawn: %s", figure.file, result.key, error)


def _draw(figure: Figure, result: Result, folder: Path) -> None:
    path, rows = _beside(folder, figure.file), result.rows
    if isinstance(figure, Lines):
        if figure.column is None:
            series = [_along(rows[i], figure.x) for i in figure.rows]
        else:
            cells = [_whole(rows[i])[figure.column] for i in figure.rows]
            series = [figures.Series("", list(zip(figure.x, cells, strict=True)))]
        figures.lines(path, series, xlabel=figure.xlabel, mark=figure.mark, mark_label=figure.mark_label)
    elif isinstance(figure, Certified):
        sigma, alpha, analyses = (result.facts[name] for name in ("sigma", "alpha", "analyses"))
        series = [
            figures.Series(
                row.name, [(radius, certified(row.certificates, sigma, alpha, analyses, radius)) for radius in figure.radii]
            )
            for row in rows
            if not row.error
        ]
        figures.lines(path, series, xlabel="L2 radius, on the [0, 1] scale", ylabel="certified accuracy (%)")
    elif isinstance(figure, Cost):
        points = [(rows[i].name, rows[i].seconds or 0.0, _whole(rows[i])[figure.column].accuracy) for i in figure.rows]
        figures.cost(path, points)
    elif isinstance(figure, Tradeoff):
        figures.tradeoff(
            path, [_curve(figure, curve.name, [rows[i] for i in curve.rows], curve.emphasis) for curve in figure.curves]
        )
    elif isinstance(figure, Residuals):
        columns = [(column.heading, _read(folder, column)) for column in figure.columns]
        figures.residuals(path, columns, columns[0][1], [column.notes for column in figure.columns])
    elif isinstance(figure, Iterations):
        original, attacked, *moments = ((column.heading, _read(folder, column)) for column in figure.columns)
        figures.iterations(path, moments, original[1], attacked[1])


def _along(row: RowResult, x: Sequence[float]) -> figures.Series:
    """The cells of a row that were measured, which a line joins."""
    if len(row.cells) != len(x):
        raise ValueError(f"expected {len(x)} cells, got {len(row.cells)}: {row.name!r}")
    if not any(row.cells):
        raise ValueError(f"expected a row that was measured, got {row.name!r}")
    return figures.Series(row.name, [(at, cell) for at, cell in zip(x, row.cells, strict=True) if cell is not None])


def _curve(figure: Tradeoff, name: str, rows: Sequence[RowResult], emphasis: bool) -> figures.TradeoffSeries:
    settings = ["" if row.setting is None else f"{row.setting:.4g}" for row in rows]
    clean, attacked = ([_whole(row)[column].accuracy for row in rows] for column in (figure.clean, figure.attacked))
    return figures.TradeoffSeries(name, list(zip(settings, clean, attacked, strict=True)), emphasis)


def _whole(row: RowResult) -> list[Cell]:
    cells = [cell for cell in row.cells if cell is not None]
    if len(cells) < len(row.cells):
        raise ValueError(f"expected a row without gaps, got {row.name!r}")
    return cells


def _read(folder: Path, column: ImageColumn) -> Tensor:
    return torch.stack([pil_to_tensor(read_rgb(_beside(folder, file))) for file in column.files]).float() / 255


def _beside(folder: Path, file: str) -> Path:
    if Path(file).name != file:
        raise ValueError(f"expected the name of a file beside the result, got {file!r}")
    return folder / file
