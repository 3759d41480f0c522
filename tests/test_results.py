"""Tables: intervals and paired tests against closed forms, and nothing lost in JSON, CSV and Markdown."""

import csv
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oag_transform.evaluation.results import Cell, Figure, Pair, Result, Row, mcnemar, read, to_markdown, write

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


@given(st.lists(st.tuples(bits, bits), min_size=1, max_size=3))
def test_mcnemar_is_the_sign_test_of_the_discordant(columns: list[tuple[str, str]]) -> None:
    ones = [Cell(a) for a, _ in columns]
    others = [Cell(b) for _, b in columns]
    b = sum(x == "1" and y == "0" for one, other in columns for x, y in zip(one, other, strict=False))
    c = sum(x == "0" and y == "1" for one, other in columns for x, y in zip(one, other, strict=False))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    only_one, only_other, p = mcnemar(ones, others)
    assert (only_one, only_other) == (b, c)
    assert p == pytest.approx(min(1, 2 * tail))


def test_columns_that_one_lacks_are_left_out_of_the_comparison() -> None:
    assert mcnemar([Cell("11"), None], [Cell("00"), Cell("11")])[:2] == (2, 0)


def test_json_keeps_everything(tmp_path: Path) -> None:
    write(RESULT, tmp_path / "new")
    assert read(tmp_path / "new" / "table9.json") == RESULT
    assert json.loads((tmp_path / "new" / "table9.json").read_text())["rows"][0]["cells"][1]["accuracy"] == 0.25
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"table9.json", "table9.csv", "table9.md"}


def test_csv_has_a_line_for_each_cell(tmp_path: Path) -> None:
    write(RESULT, tmp_path)
    with open(tmp_path / "table9.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert (lines[1]["row"], lines[1]["column"], lines[1]["n"], lines[1]["correct"]) == ("None", "FGSM", "4", "1")
    assert float(lines[1]["low_95"]) == pytest.approx(Cell("0001").interval[0])
    assert lines[2]["seconds_per_image"] == "0.00123"
    assert (lines[3]["accuracy"], lines[5]["error"]) == ("", "ValueError: a | b")


def test_markdown_shows_accuracy_interval_seconds_and_error() -> None:
    lines = to_markdown(RESULT).splitlines()
    assert "| Defense | Clean | FGSM | s an image |" in lines
    assert "| JPEG, quality 75 | 75.0 [30, 95] |  | 0.0012 |" in lines
    assert any("failed: ValueError: a \\| b" in line for line in lines)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{"name": 1}]}')
    (tmp_path / "b.json").write_text("{")
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match="not a result"):
            read(tmp_path / name)
