"""The figures, read back from matplotlib's artists and from the files."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from torch import Tensor

from oag_transform.baselines import catalogue
from oag_transform.evaluation.render.figures import (
    _STYLES,
    Series,
    TradeoffSeries,
    _styles,
    cost,
    iterations,
    lines,
    residuals,
    tradeoff,
)
from oag_transform.evaluation.result import Cell

DEFENSES = (
    "JPEG, quality 75",
    "JPEG, quality 25",
    "TVM, weight 0.03",
    "Total variation, weight 0.1",
    "Mean filter, size 3",
    "DIP, steps 300",
    "Auto-encoder, steps 80",
    "OAG, T_N 36",
    "Gaussian noise, grey levels 12",
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, in order."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def cell(correct: int, n: int) -> Cell:
    return Cell("1" * correct + "0" * (n - correct))


def wilson(correct: int, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def points(line: Line2D) -> Any:
    return line.get_xydata()


def label_boxes(figure: Figure) -> list[Bbox]:
    figure.draw_without_rendering()  # saving measured them at the file's resolution
    return [text.get_window_extent() for text in figure.axes[0].texts]


def shown(figure: Figure) -> list[Any]:
    """The images in the figure's axes, row by row; None where an axes is hidden."""
    return [
        next(child for child in axes.get_children() if isinstance(child, AxesImage)).get_array() if axes.get_visible() else None
        for axes in figure.axes
    ]


def test_lines_and_their_bands(tmp_path: Path, drawn: list[Figure]) -> None:
    counts = {"Undefended": [40, 12, 0], "JPEG": [38, 30, 21]}
    x = [0, 2, 6]
    lines(
        tmp_path / "fig3.svg",
        [Series(name, [(at, cell(k, 40)) for at, k in zip(x, correct, strict=True)]) for name, correct in counts.items()],
        xlabel="eps",
        mark=2,
        mark_label="chosen",
    )
    axes = drawn[0].axes[0]
    plotted = {line.get_label(): points(line) for line in axes.lines}
    for band, (name, correct) in zip(axes.collections, counts.items(), strict=True):
        np.testing.assert_allclose(plotted[name], np.array([x, [100 * k / 40 for k in correct]]).T)
        vertices = np.asarray(band.get_paths()[0].vertices)
        for at, k in zip(x, correct, strict=True):
            heights = vertices[vertices[:, 0] == at, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], 100 * np.array(wilson(k, 40)), atol=1e-9)
    vertical = [line for line in axes.lines if points(line)[:, 0].tolist() == [2, 2]]
    assert len(vertical) == 1
    assert [text.get_text() for text in axes.texts] == ["chosen"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == list(counts)


def test_tradeoff_has_every_point_and_ours_strongest(tmp_path: Path, drawn: list[Figure]) -> None:
    series = [
        TradeoffSeries("JPEG", [("75", 0.98, 0.2), ("50", 0.95, 0.4), ("25", 0.9, 0.5)]),
        TradeoffSeries("OAG", [("84", 0.95, 0.6), ("36", 0.85, 0.8)], emphasis=True),
    ]
    tradeoff(tmp_path / "tradeoff.svg", series)
    axes = drawn[0].axes[0]
    curves = {line.get_label(): line for line in axes.lines}
    for one in series:
        np.testing.assert_allclose(points(curves[one.name]), 100 * np.array([point[1:] for point in one.points]))
    assert curves[series[1].name].get_linewidth() > 2 * curves[series[0].name].get_linewidth()
    assert sorted(text.get_text() for text in axes.texts) == ["25", "36", "50", "75", "84"]


def test_labels_of_the_emphasised_curve_stay_in_a_crowd(tmp_path: Path, drawn: list[Figure]) -> None:
    crowd = [TradeoffSeries(str(k), [(f"s={i}", 0.8 + 0.001 * i, 0.5) for i in range(8)]) for k in range(9)]
    tradeoff(tmp_path / "crowd.png", [*crowd, TradeoffSeries("OAG", [("T", 0.8, 0.5)], True)])
    assert "T" in [text.get_text() for text in drawn[0].axes[0].texts]
    boxes = label_boxes(drawn[0])
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_cost_labels_do_not_overlap(tmp_path: Path, drawn: list[Figure]) -> None:
    found = [(name, 10 ** (i / 3 - 3), 0.5 + 0.03 * (i % 3)) for i, name in enumerate(DEFENSES)]
    cost(tmp_path / "cost.png", found)
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    marks = [tuple(points(line)[0]) for line in axes.lines if line.get_marker() not in ("", "None", None)]
    np.testing.assert_allclose(marks, [(seconds, 100 * accuracy) for _, seconds, accuracy in found])
    assert {text.get_text().replace("\n", ", ") for text in axes.texts} == set(DEFENSES)
    boxes = label_boxes(drawn[0])
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    dots = axes.transData.transform(marks)
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


def test_a_defense_keeps_its_color(tmp_path: Path, drawn: list[Figure]) -> None:
    colors = []
    for names in (DEFENSES, DEFENSES[::-1], ("Undefended", *DEFENSES[1:])):
        lines(tmp_path / "a.svg", [Series(name, [(1, cell(1, 2))]) for name in names], xlabel="x")
        tradeoff(tmp_path / "b.svg", [TradeoffSeries(name, [("", 0.5, 0.5)]) for name in names])
        colors += [
            dict(zip(names, (to_hex(line.get_color()) for line in figure.axes[0].lines), strict=True)) for figure in drawn[-2:]
        ]
    assert all(len(set(by_name.values())) == len(by_name) for by_name in colors)
    for name in DEFENSES[2:]:
        assert len({by_name[name] for by_name in colors}) == 1


def test_styles_are_of_defenses_that_there_are() -> None:
    labels = [catalogue.NONE, *(family.label for family in catalogue.DEFENSES)]
    assert all(any(label.lower().startswith(start) for label in labels) for start in _STYLES)
    assert len(set(_styles(["Mean filter, size 3", "Non-local means, h 4"], repeat=True))) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_residuals(tmp_path: Path, drawn: list[Figure], channels: int) -> None:
    reference = random_images(2, channels, 16, 20)
    attacked = (reference + 0.1 * random_images(2, channels, 16, 20, seed=1)).clamp(0, 1)
    residuals(
        tmp_path / "fig1.png",
        [("original", reference), ("attacked", attacked)],
        reference,
        [["p: 0.9", "p: 0.8"], ["p: 0.1", "p: 0.2"]],
    )
    images = shown(drawn[0])
    assert len(images) == 8
    for row in range(2):
        for column, kind in enumerate((reference, attacked)):
            np.testing.assert_array_equal(images[4 * row + column], kind[row].numpy().transpose(1, 2, 0).squeeze())
        assert images[4 * row + 2] is None  # no difference to itself
        difference = np.abs(attacked[row].numpy() - reference[row].numpy())
        expected = np.minimum(difference / np.quantile(difference, 0.99), 1).transpose(1, 2, 0).squeeze()
        np.testing.assert_allclose(images[4 * row + 3], expected, atol=1e-5)
    labels = [axes.get_xlabel() for axes in drawn[0].axes]
    assert labels[:2] == ["p: 0.9", "p: 0.1"]
    assert labels[4:6] == ["p: 0.8", "p: 0.2"]
    assert labels[3] == f"difference x {1 / np.quantile(np.abs(attacked[0].numpy() - reference[0].numpy()), 0.99):.0f}"


def test_iterations(tmp_path: Path, drawn: list[Figure]) -> None:
    original, attacked, early, late = (random_images(2, 3, 16, 16, seed=seed) for seed in range(4))
    iterations(tmp_path / "fig5.png", [("step 10", early), ("step 84", late)], original, attacked)
    titles = [axes.get_title().replace("\n", " ") for axes in drawn[0].axes]
    assert titles[:6] == ["original", "attacked", "step 10", "step 84", "(a)", "(b)"]
    assert not any(titles[6:])
    images = shown(drawn[0])
    for row in range(2):
        for column, kind in enumerate((original, attacked, early, late)):
            np.testing.assert_array_equal(images[6 * row + column], kind[row].numpy().transpose(1, 2, 0))
        for column, kind in ((4, attacked), (5, late)):
            difference = np.abs(kind[row].numpy() - original[row].numpy()).transpose(1, 2, 0)
            expected = np.minimum(difference / np.quantile(difference, 0.99), 1)
            np.testing.assert_allclose(images[6 * row + column], expected, atol=1e-5)


def draw_lines(path: Path) -> None:
    lines(path, [Series("a", [(1, cell(1, 2)), (2, cell(2, 2))])], xlabel="x")


def draw_tradeoff(path: Path) -> None:
    tradeoff(path, [TradeoffSeries("a", [("1", 0.1, 0.3), ("2", 0.2, 0.4)])])


def draw_cost(path: Path) -> None:
    cost(path, [("a", 1.0, 0.5), ("b", 2.0, 0.25)])


@pytest.mark.parametrize("draw", [draw_lines, draw_tradeoff, draw_cost])
def test_svg_is_readable_on_a_phone_and_deterministic(tmp_path: Path, draw: Callable[[Path], None]) -> None:
    before = dict(matplotlib.rcParams)
    draw(tmp_path / "one.svg")
    draw(tmp_path / "other.svg")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    root = ElementTree.parse(tmp_path / "one.svg").getroot()
    assert root.attrib["width"] == "360pt"
    assert 200 < float(root.attrib["height"].removesuffix("pt")) < 800


@pytest.mark.parametrize("draw", [draw_lines, draw_tradeoff, draw_cost])
def test_png(tmp_path: Path, draw: Callable[[Path], None]) -> None:
    draw(tmp_path / "one.png")
    with PIL.Image.open(tmp_path / "one.png") as image:
        assert image.format == "PNG"
        assert image.width == 1100
        assert 600 < image.height < 2500
        assert len(set(image.convert("RGB").resize((200, 200)).tobytes())) > 20  # not blank


@pytest.mark.parametrize("name", ["$x$", "a $ b", "\\frac{", "a & <b>"])
def test_names_are_taken_as_they_are(tmp_path: Path, drawn: list[Figure], name: str) -> None:
    lines(tmp_path / "a.svg", [Series(name, [(1, cell(1, 1))])], xlabel=name)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [name]
    assert not any(text.get_parse_math() for text in (*drawn[0].legends[0].get_texts(), drawn[0].axes[0].xaxis.label))


IMAGES = random_images(2, 3, 8, 8)
NOTES = [["", ""]]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda f: lines(f / "a.svg", [], xlabel=""), "at least one series, got none"),
        (lambda f: lines(f / "a.svg", [Series("one", [])], xlabel=""), "at least one point, got none: 'one'"),
        (lambda f: lines(f / "a.svg", [Series("one", [(1, Cell(""))])], xlabel=""), "got an empty one: 'one'"),
        (lambda f: lines(f / "a.pdf", [Series("one", [(1, cell(1, 2))])], xlabel=""), "got 'a.pdf'"),
        (lambda f: tradeoff(f / "a.svg", []), "at least one defense, got none"),
        (lambda f: tradeoff(f / "a.svg", [TradeoffSeries("one", [])]), "at least one point, got none: 'one'"),
        (
            lambda f: tradeoff(f / "a.svg", [TradeoffSeries("one", [("1", 50, 0.5)])]),
            r"accuracies in \[0, 1\], got \[50, 0.5\]",
        ),
        (lambda f: cost(f / "a.svg", []), "at least one point, got none"),
        (lambda f: cost(f / "a.svg", [("one", 0.0, 0.5)]), "seconds above 0 .* got 0.0: 'one'"),
        (lambda f: cost(f / "a.svg", [("one", 1.0, 61)]), r"accuracies in \[0, 1\], got \(61,\)"),
        (lambda f: residuals(f / "a.svg", [("a", IMAGES)], IMAGES, NOTES), "for images, got 'a.svg'"),
        (lambda f: residuals(f / "a.png", [("a", IMAGES[:1])], IMAGES, NOTES), r"got \(1, 3, 8, 8\): 'a'"),
        (lambda f: residuals(f / "a.png", [("a", 2 * IMAGES)], IMAGES, NOTES), r"values in \[0, 1\], got .*: 'a'"),
        (lambda f: residuals(f / "a.png", [("a", IMAGES)], IMAGES, [[""]]), r"2 notes, got columns of \[1\]"),
        (lambda f: residuals(f / "a.png", [], IMAGES, []), "got 0 of"),
        (lambda f: iterations(f / "a.png", [], IMAGES, IMAGES), "at least one moment, got none"),
        (lambda f: iterations(f / "a.png", [("s", IMAGES)], IMAGES, IMAGES / 0), "values in"),
    ],
)
def test_bad_input(tmp_path: Path, draw: Callable[[Path], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pyplot_stays_out() -> None:
    modules = "oag_transform.evaluation.render.figures, oag_transform.evaluation.render.report"
    code = f"import sys, {modules}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
