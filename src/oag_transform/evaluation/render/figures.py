"""The figures of an evaluation, drawn without pyplot and readable on a phone: a figure is 5 inches, or 360 points, wide."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from ..result import Cell

_WIDTH = 5.0
_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#777777",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # names are taken as they are
    "svg.hashsalt": "oag-transform",
    "svg.fonttype": "path",
}
_OAG = ("#D55E00", "o")
# colors of Okabe & Ito, then of Tol's muted scheme; a defense keeps its own in every figure, found by how its name begins
_STYLES = {
    "oag, paper()": ("#8A3C00", "*"),
    "oag": _OAG,
    "mean filter": ("#0072B2", "s"),
    "jpeg": ("#E69F00", "^"),
    "tvm": ("#009E73", "D"),
    "total variation": ("#44AA99", "H"),
    "pixel deflection": ("#CC79A7", "v"),
    "randomization": ("#56B4E9", "P"),
    "pixel defend": ("#882255", "<"),
    "dip": ("#999933", ">"),
    "auto-encoder": ("#332288", "h"),
    "gaussian noise": ("#117733", "X"),
    "median filter": ("#AA4499", "p"),
    "undefended": ("#555555", "d"),
    "non-local means": ("#CC6677", "*"),
}


class Series(NamedTuple):
    """Accuracies along a number.

    Attributes:
        name: what the legend calls it.
        points: the numbers, in the order in which they are joined, and what was measured at each.
    """

    name: str
    points: Sequence[tuple[float, Cell]]


class TradeoffSeries(NamedTuple):
    """A defense at several strengths.

    Attributes:
        name: what the legend calls it.
        points: a short label such as ``"q=50"``, empty for none, and accuracy on clean and on attacked images in [0, 1].
        emphasis: draw it strongest.
    """

    name: str
    points: Sequence[tuple[str, float, float]]
    emphasis: bool = False


def lines(
    path: Path,
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str = "top-1 accuracy (%)",
    mark: float | None = None,
    mark_label: str = "",
) -> None:
    """Accuracy against a number, with its 95% Wilson interval as a band (Fig. 3, Fig. 4).

    Args:
        path: an .svg, .png or .jpg file to write.
        series: one line each.
        xlabel: what the number is.
        ylabel: what the accuracy is.
        mark: where to draw a vertical line, such as the chosen T_N.
        mark_label: text beside that line.

    Raises:
        ValueError: no series, a series without points, a cell of no images, or another suffix.
    """
    if not series:
        raise ValueError("expected at least one series, got none")
    for one in series:
        if not one.points:
            raise ValueError(f"expected at least one point, got none: {one.name!r}")
        if not all(cell.n for _, cell in one.points):
            raise ValueError(f"expected cells of at least one image, got an empty one: {one.name!r}")
    names, columns, below = _legend([one.name for one in series])
    with _figure(path, 3.2 + below) as figure:
        axes = figure.subplots()
        for one, name, (color, marker) in zip(series, names, _styles([one.name for one in series]), strict=True):
            x, cells = zip(*one.points, strict=True)
            low, high = zip(*(cell.interval for cell in cells), strict=True)
            axes.fill_between(x, [100 * y for y in low], [100 * y for y in high], color=color, alpha=0.14, linewidth=0)
            axes.plot(x, [100 * cell.accuracy for cell in cells], color=color, marker=marker, label=name)
        axes.set(ylim=(0, 101), xlabel=xlabel, ylabel=ylabel)
        if mark is not None:
            axes.axvline(mark, color="#444444", linewidth=1, linestyle="--", zorder=1)
            left, right = axes.get_xlim()
            beyond = mark > (left + right) / 2
            offset, align = (-4, "right") if beyond else (4, "left")
            axes.annotate(mark_label, (mark, 3), (offset, 0), textcoords="offset points", ha=align, color="#444444")
        if len(series) > 1 or series[0].name:
            figure.legend(loc="outside lower center", ncols=columns)


def tradeoff(path: Path, series: Sequence[TradeoffSeries]) -> None:
    """Accuracy on attacked images against accuracy on clean ones, a curve for each defense along its strengths.

    Each point is labelled with its strength; where there is no room, only those of the emphasised curve are.

    Args:
        path: an .svg, .png or .jpg file to write.
        series: one curve each.

    Raises:
        ValueError: no series, a series without points, accuracies outside [0, 1], or another suffix.
    """
    if not series:
        raise ValueError("expected at least one defense, got none")
    for one in series:
        if not one.points:
            raise ValueError(f"expected at least one point, got none: {one.name!r}")
        _check_fractions(one.name, [accuracy for _, *accuracies in one.points for accuracy in accuracies])
    names, columns, below = _legend([one.name for one in series])
    with _figure(path, 4.6 + below) as figure:
        axes = figure.subplots()
        labels, obstacles = [], []
        for one, name, (color, marker) in zip(series, names, _styles([one.name for one in series]), strict=True):
            x, y = [100 * clean for _, clean, _ in one.points], [100 * attacked for _, _, attacked in one.points]
            strong = one.emphasis
            axes.plot(
                x,
                y,
                color=color,
                marker=marker,
                label=name,
                linewidth=2.6 if strong else 1,
                markersize=7 if strong else 4.5,
                zorder=4 if strong else 3,
            )
            labels += [_Label(100 * a, 100 * b, text, color, strong) for text, a, b in one.points if text]
            obstacles += _along(x, y)
        axes.margins(0.08)
        axes.set(xlabel="accuracy on clean images (%)", ylabel="mean accuracy on attacked images (%)")
        figure.legend(loc="outside lower center", ncols=columns)
        _place(figure, axes, labels, obstacles, size=7.5, required=False)


def cost(path: Path, points: Sequence[tuple[str, float, float]]) -> None:
    """Mean accuracy on attacked images against the time that a defense takes.

    Args:
        path: an .svg, .png or .jpg file to write.
        points: name, seconds an image and mean accuracy on attacked images, in [0, 1], of each defense.

    Raises:
        ValueError: no points, seconds that are not above 0, accuracies outside [0, 1], or another suffix.
    """
    if not points:
        raise ValueError("expected at least one point, got none")
    for name, seconds, accuracy in points:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"expected seconds above 0 for a logarithmic axis, got {seconds}: {name!r}")
        _check_fractions(name, (accuracy,))
    with _figure(path, 3.4 + 0.08 * len(points)) as figure:
        axes = figure.subplots()
        labels = []
        styles = _styles([name for name, _, _ in points], repeat=True)
        for (name, seconds, accuracy), (color, marker) in zip(points, styles, strict=True):
            axes.plot(seconds, 100 * accuracy, color=color, marker=marker, markersize=7, linestyle="none")
            labels.append(_Label(seconds, 100 * accuracy, name.replace(", ", "\n", 1), color, (color, marker) == _OAG))
        axes.set(xscale="log", xlabel="seconds an image", ylabel="mean accuracy on attacked images (%)")
        axes.margins(0.15)
        axes.xaxis.set_major_locator(LogLocator(numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _place(figure, axes, labels, [(label.x, label.y) for label in labels], size=8.5, required=True)


def residuals(path: Path, columns: Sequence[tuple[str, Tensor]], reference: Tensor, notes: Sequence[Sequence[str]]) -> None:
    """Images, and below each its absolute difference to the reference, magnified (Fig. 1).

    Args:
        path: a .png or .jpg file to write.
        columns: heading and images, (N, C, H, W) with C = 1 or 3 in [0, 1], of each column.
        reference: (N, C, H, W) in [0, 1].
        notes: ``notes[column][row]`` is printed under that image.

    Raises:
        ValueError: no column, no images, images of another shape than the reference, values outside [0, 1], another number of
            notes than of images, or another suffix.
    """
    _check_images(path, [("reference", reference), *columns])
    if [len(column) for column in notes] != [len(reference)] * len(columns):
        counts = [len(column) for column in notes]
        raise ValueError(f"expected {len(columns)} columns of {len(reference)} notes, got columns of {counts}")
    side = _WIDTH / len(columns)
    height, width = reference.shape[2:]
    wrap = max(6, int(72 * side / 4.6))  # characters of 8 points that fit
    with _figure(path, 2 * len(reference) * (side * height / width + 0.17) + 0.3) as figure:
        grid = figure.subplots(2 * len(reference), len(columns), squeeze=False)
        for column, ((name, images), texts) in enumerate(zip(columns, notes, strict=True)):
            grid[0, column].set_title(textwrap.fill(name, wrap), fontsize=8)
            for row in range(len(reference)):
                top, bottom = grid[2 * row, column], grid[2 * row + 1, column]
                _show(top, images[row], textwrap.fill(texts[row], wrap))
                residual, gain = _residual(images[row], reference[row])
                _show(bottom, residual, f"difference x {gain:.0f}")
                if torch.equal(images[row], reference[row]):
                    bottom.set_visible(False)
        figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02, hspace=0.02, wspace=0.02)


def iterations(path: Path, moments: Sequence[tuple[str, Tensor]], original: Tensor, attacked: Tensor) -> None:
    """The image along its generation, one image a row (Fig. 5).

    The columns are the original, the attacked image, the images at the moments, and the residual maps (a) |attacked - original|
    and (b) |last moment - original|, each normalised.

    Args:
        path: a .png or .jpg file to write.
        moments: heading, such as ``"step 50"``, and images, (N, C, H, W) with C = 1 or 3 in [0, 1].
        original: (N, C, H, W) in [0, 1].
        attacked: (N, C, H, W) in [0, 1].

    Raises:
        ValueError: no moment, no images, images of different shapes, values outside [0, 1], or another suffix.
    """
    if not moments:
        raise ValueError("expected at least one moment, got none")
    shown = [("original", original), ("attacked", attacked), *moments]
    _check_images(path, shown)
    side = _WIDTH / (len(shown) + 2)
    height, width = original.shape[2:]
    wrap = max(4, int(72 * side / 4.4))
    with _figure(path, len(original) * (side * height / width + 0.04) + 0.3) as figure:
        grid = figure.subplots(len(original), len(shown) + 2, squeeze=False)
        for column, name in enumerate([*(name for name, _ in shown), "(a)", "(b)"]):
            grid[0, column].set_title(textwrap.fill(name, wrap), fontsize=7.5, pad=3)
        for row in range(len(original)):
            for column, (_, images) in enumerate(shown):
                _show(grid[row, column], images[row])
            for column, images in ((-2, attacked), (-1, moments[-1][1])):
                _show(grid[row, column], _residual(images[row], original[row])[0])
        figure.set_layout_engine("constrained", h_pad=0.01, w_pad=0.01, hspace=0.01, wspace=0.01)


@contextmanager
def _figure(path: Path, height: float) -> Iterator[Figure]:
    if path.suffix not in (".svg", ".png", ".jpg"):
        raise ValueError(f"expected an .svg, .png or .jpg file, got {path.name!r}")
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=220, metadata={"Date": None} if path.suffix == ".svg" else None)


def _styles(names: Sequence[str], *, repeat: bool = False) -> list[tuple[str, str]]:
    known = {
        name: style
        for name in names
        for start, style in reversed(_STYLES.items())  # the first that fits stays
        if name.lower().startswith(start)
    }
    every = list(_STYLES.values())  # OAG's first: not for others
    styles: list[tuple[str, str]] = []
    for name in names:
        free = [style for style in every[2:] if style not in styles and style not in known.values()]
        if name in known and (repeat or known[name] not in styles):
            styles.append(known[name])
        else:
            styles.append(free[0] if free else every[len(styles) % len(every)])  # more names than styles: they come again
    return styles


def _legend(names: Sequence[str]) -> tuple[list[str], int, float]:
    # names in lines, columns that fit, and the height in inches
    texts = [textwrap.fill(name, 30) for name in names]
    longest = 42 + 4.6 * max(len(line) for text in texts for line in text.split("\n"))
    columns = max(1, min(3, int(72 * _WIDTH / longest)))
    return texts, columns, 0.17 * math.ceil(sum(text.count("\n") + 1 for text in texts) / columns)


class _Label(NamedTuple):
    x: float
    y: float
    text: str
    color: str
    strong: bool


def _along(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    parts = [i / 8 for i in range(8)]
    segments = zip(x, x[1:], y, y[1:], strict=False)
    return [(x[-1], y[-1]), *((a + t * (b - a), c + t * (d - c)) for a, b, c, d in segments for t in parts)]


def _place(
    figure: Figure,
    axes: Axes,
    labels: Sequence[_Label],
    obstacles: Sequence[tuple[float, float]],
    *,
    size: float,
    required: bool,
) -> None:
    # the hardest label first, each where it covers least: other labels, then the frame's edge, then points and curves
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    point = figure.dpi / 72
    frame = np.array([axes.get_window_extent().extents])
    dots = axes.transData.transform(np.array(obstacles))
    dots = np.hstack([dots - 4 * point, dots + 4 * point])
    taken = np.empty((0, 4))
    for label in sorted(labels, key=lambda label: (not label.strong, -len(label.text))):
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            (0, 0),
            textcoords="offset points",
            fontsize=size,
            color=_dark(label.color),
            fontweight="bold" if label.strong else "normal",
            va="bottom",
            ha="left",
            zorder=5,
            linespacing=1.0,
        )
        at = axes.transData.transform((label.x, label.y))
        extent = text.get_window_extent()
        extra = np.array([extent.width, extent.height])
        low = at + _OFFSETS[:, :1] * _OFFSETS[:, 1:] * point + (_OFFSETS[:, 1:] - 1) / 2 * extra
        boxes = np.hstack([low, low + extra])
        covered = _overlaps(boxes, taken)
        outside = extent.width * extent.height - _overlaps(boxes, frame)
        best = int(np.argmin(20 * covered + 10 * outside + 4 * _overlaps(boxes, dots) + 4 * point * _OFFSETS[:, 0]))
        if covered[best] and not (label.strong or required):
            text.remove()
            continue
        box = boxes[best]
        taken = np.vstack([taken, box])
        distance, right, _ = _OFFSETS[best]
        text.set_multialignment("right" if right < 0 else "left")
        text.set_position(tuple((box[:2] - at) / point))
        if distance > 9:  # a thin line to its point
            ends = axes.transData.inverted().transform([at, at.clip(box[:2], box[2:])])
            axes.plot(*ends.T, color=label.color, linewidth=0.5, zorder=2, scalex=False, scaley=False)


# distance in points, and direction: -1 is left of and below the point, 1 right of and above it
_OFFSETS = np.array(
    [
        (distance, right, up)
        for distance in (5, 9, 14, 20, 28, 38)
        for right in (-1, -0.5, 0, 0.5, 1)
        for up in (-1, -0.5, 0, 0.5, 1)
        if max(abs(right), abs(up)) == 1  # elsewhere the label covers its own point
    ]
)


def _overlaps(boxes: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """(N, 4) and (M, 4), left, bottom, right and top -> (N,): the area of each box that the others cover."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(min=0).prod(2).sum(1)


def _dark(color: str) -> tuple[float, float, float]:
    red, green, blue = to_rgb(color)  # small text needs more contrast than a marker
    return 0.7 * red, 0.7 * green, 0.7 * blue


def _show(axes: Axes, image: Tensor, note: str = "") -> None:
    axes.imshow(image.detach().cpu().permute(1, 2, 0).squeeze(2).float().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xlabel(note, fontsize=8, labelpad=2)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.5)


def _residual(image: Tensor, reference: Tensor) -> tuple[Tensor, float]:
    # the largest hundredth may saturate; a difference below one grey level is not blown up further
    residual = (image - reference).abs().float()
    gain = 1 / max(residual.flatten().quantile(0.99).item(), 1 / 255)
    return (gain * residual).clamp(0, 1), gain


def _check_fractions(name: str, accuracies: Sequence[float]) -> None:
    if not all(0 <= accuracy <= 1 for accuracy in accuracies):
        raise ValueError(f"expected accuracies in [0, 1], got {accuracies}: {name!r}")


def _check_images(path: Path, named: Sequence[tuple[str, Tensor]]) -> None:
    if path.suffix not in (".png", ".jpg"):
        raise ValueError(f"expected a .png or .jpg file for images, got {path.name!r}")
    shape = named[0][1].shape
    if len(named) < 2 or len(shape) != 4 or shape[1] not in (1, 3) or not all(shape):
        raise ValueError(f"expected columns of images (N, C, H, W) with C = 1 or 3, got {len(named) - 1} of {tuple(shape)}")
    for name, images in named:
        if images.shape != shape:
            raise ValueError(f"expected images of shape {tuple(shape)}, got {tuple(images.shape)}: {name!r}")
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"expected values in [0, 1], got [{images.min():.4g}, {images.max():.4g}]: {name!r}")
