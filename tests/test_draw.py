"""Figures drawn again from a result's JSON and the images beside it only."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from oag_transform.evaluation.render import figures, render
from oag_transform.evaluation.render.draw import draw_figures
from oag_transform.evaluation.result import (
    Cell,
    Cost,
    Curve,
    ImageColumn,
    Iterations,
    Lines,
    Residuals,
    Result,
    RowResult,
    Tradeoff,
    read,
    write,
)

ROWS = (
    RowResult("Undefended", (Cell("1111"), Cell("0001"))),
    RowResult("JPEG, quality 75", (Cell("1110"), Cell("0011")), 0.002, "", "jpeg", 75),
    RowResult("JPEG, quality 7.5", (Cell("1100"), Cell("0111")), 0.003, "", "jpeg", 7.5),
    RowResult("broken", (None, None), None, "no"),
)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), np.uint8)
FILES = [tuple(f"{kind}{i}.png" for i in range(2)) for kind in ("original", "attacked", "purified")]
FIGURES = (
    Lines("a.svg", "", (0.0, 6.0), "eps", (0, 2), 6, "here"),
    Cost("b.svg", "", (1, 2), 1),
    Tradeoff("c.svg", "", (Curve("JPEG", (1, 2), True),), 0, 1),
    Residuals("d.jpg", "", tuple(ImageColumn(str(i), files, ("p", "q")) for i, files in enumerate(FILES[:2]))),
    Iterations("e.jpg", "", tuple(ImageColumn(str(i), files) for i, files in enumerate(FILES))),
)
RESULT = Result(
    *("fig9", "title", "", "Defense", ("Clean", "FGSM"), ROWS, {}, FIGURES),
    images={
        name: pixels for files, column in zip(FILES, PIXELS, strict=True) for name, pixels in zip(files, column, strict=True)
    },
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What each kind of figure was drawn from."""
    calls: dict[str, tuple[Any, ...]] = {}

    for name in ("lines", "cost", "tradeoff", "residuals", "iterations"):

        def remember(*given: Any, name: str = name, **more: Any) -> None:
            calls[name] = (*given, more)

        monkeypatch.setattr(figures, name, remember)
    return calls


def test_each_figure_is_drawn_from_the_rows_and_files_that_it_names(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    write(RESULT, tmp_path)
    draw_figures(read(tmp_path / "fig9.json"), tmp_path)
    path, series, more = drawn["lines"]
    assert path == tmp_path / "a.svg"
    assert series == [figures.Series(ROWS[i].name, list(zip((0.0, 6.0), ROWS[i].cells, strict=True))) for i in (0, 2)]  # type: ignore[arg-type]
    assert more == {"xlabel": "eps", "mark": 6, "mark_label": "here"}
    assert drawn["cost"][1] == [("JPEG, quality 75", 0.002, 0.5), ("JPEG, quality 7.5", 0.003, 0.75)]
    assert drawn["tradeoff"][1] == [figures.TradeoffSeries("JPEG", [("75", 0.75, 0.5), ("7.5", 0.5, 0.75)], True)]
    original, attacked, purified = torch.from_numpy(PIXELS).permute(0, 1, 4, 2, 3).float() / 255
    _, columns, reference, notes, _ = drawn["residuals"]
    assert [name for name, _ in columns] == ["0", "1"]
    assert torch.equal(columns[0][1], original)
    assert torch.equal(columns[1][1], attacked)
    assert torch.equal(reference, original)
    assert [tuple(column) for column in notes] == [("p", "q"), ("p", "q")]
    _, moments, first, second, _ = drawn["iterations"]
    assert torch.equal(first, original)
    assert torch.equal(second, attacked)
    assert [name for name, _ in moments] == ["2"]
    assert torch.equal(moments[0][1], purified)


def test_redrawn_figures_are_equal(tmp_path: Path) -> None:
    write(RESULT, tmp_path)
    names = [figure.file for figure in FIGURES] + ["fig9.csv", "fig9.md"]
    files = []
    for _ in range(2):
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)
        render(read(tmp_path / "fig9.json"), tmp_path)
        files.append([(tmp_path / name).read_bytes() for name in names])
    assert files[0] == files[1]


def test_a_figure_that_cannot_be_drawn_leaves_the_others(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "results"
    write(RESULT, folder)
    (folder / "attacked1.png").unlink()
    bad = (
        Cost("../out.svg", "", (1,), 0),
        Lines("gap.svg", "", (0.0, 1.0), "x", (3,)),
        Lines("row.svg", "", (0.0, 1.0), "x", (9,)),
    )
    with caplog.at_level(logging.WARNING):
        draw_figures(replace(RESULT, figures=(*bad, *FIGURES)), folder)
    assert set(drawn) == {"lines", "cost", "tradeoff"}
    for file, reason in (
        ("../out.svg", "expected the name of a file beside the result"),
        ("gap.svg", "was measured, got 'broken'"),
        ("row.svg", "out of range"),
        ("d.jpg", "attacked1.png"),
        ("e.jpg", "attacked1.png"),
    ):
        assert any(file in line and reason in line for line in caplog.text.splitlines())
    assert not list(tmp_path.glob("*.svg"))
