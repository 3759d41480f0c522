"""Tables: intervals and paired tests against closed forms, and nothing lost in JSON, CSV and Markdown."""

import csv
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oag_transform.evaluation.results import Cell, Figure, Pair, Result, Row, paired, read, to_markdown, write

bits = st.text(alphabet="01", min_size=1, max_size=60)

RESULT = Result(
    "table9",
    "A | title",
    "A caption.",
    "Defense",
    ("Clean", "FGSM"),
    (
        Row("None", (Cell("1111"), Cell("0001"))),
        Row("JPEG, quality 75", (Cell("1110"), None), 0.00123),
        Row("slow", (Cell("10"), Cell("11")), 123.4),
        Row("broken", (None, None), None, "ValueError: a | b"),
    ),
    {"seed": 3, "target": "t", "chosen": {"JPEG": 25}},
    (Figure("a.svg", "what"),),
    (Pair("cat", "a.png", "b.png", "c.png", ("cat", "dog", "cat"), (0.9, 0.1, 0.8)),),
)


@given(bits)
def test_interval_is_wilsons(right: str) -> None:
    cell = Cell(right)
    z, n, p = 1.959963984540054, len(right), right.count("1") / len(right)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert cell.accuracy == p
    assert cell.interval == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-12)


@given(bits, st.integers(1, 4))
def test_pooling_columns_of_the_same_images_does_not_narrow_the_interval(right: str, columns: int) -> None:
    one, more = Cell(right), Cell(right * columns, columns)
    assert (more.n, more.accuracy, more.interval) == (one.n, one.accuracy, one.interval)


@given(bits, bits)
def test_for_one_column_it_is_mcnemars_test(one: str, other: str) -> None:
    b = sum(x == "1" and y == "0" for x, y in zip(one, other, strict=False))
    c = sum(x == "0" and y == "1" for x, y in zip(one, other, strict=False))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    more, fewer, p = paired([Cell(one)], [Cell(other)])
    assert (more, fewer) == (b, c)
    assert p == pytest.approx(min(1, 2 * tail))


def test_with_several_columns_an_image_counts_once() -> None:
    one = [Cell("1101"), Cell("1100"), None]
    other = [Cell("0011"), Cell("0010"), Cell("1111")]
    assert paired(one, other) == (2, 1, 1.0)  # images 1 and 2 for one, 3 for the other, the last is a tie
    assert paired([None], [Cell("1")]) == (0, 0, 1.0)


def test_json_keeps_everything(tmp_path: Path) -> None:
    write(RESULT, tmp_path / "new")
    assert read(tmp_path / "new" / "table9.json") == RESULT
    assert json.loads((tmp_path / "new" / "table9.json").read_text())["rows"][0]["cells"][1]["accuracy"] == 0.25
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"table9.json", "table9.csv", "table9.md"}


def test_csv_has_a_line_for_each_cell(tmp_path: Path) -> None:
    write(RESULT, tmp_path)
    with open(tmp_path / "table9.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    assert (lines[1]["row"], lines[1]["column"], lines[1]["n"], lines[1]["correct"]) == ("None", "FGSM", "4", "1")
    assert float(lines[1]["low_95"]) == pytest.approx(Cell("0001").interval[0])
    assert lines[2]["seconds_per_image"] == "0.00123"
    assert (lines[3]["accuracy"], lines[7]["error"]) == ("", "ValueError: a | b")


def test_markdown_shows_accuracy_interval_seconds_and_error() -> None:
    lines = to_markdown(RESULT).splitlines()
    assert "| Defense | Clean | FGSM | s an image |" in lines
    assert "| JPEG, quality 75 | 75.0 [30, 95] |  | 0.0012 |" in lines
    assert "| slow | 50.0 [9, 91], n = 2 | 100.0 [34, 100], n = 2 | 123 |" in lines
    assert any("failed: ValueError: a \\| b" in line for line in lines)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{"name": 1}]}')
    (tmp_path / "b.json").write_text("{")
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match="not a result"):
            read(tmp_path / name)
