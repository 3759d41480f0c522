"""Results as Markdown and as CSV."""

import csv
import io

import pytest
from msgspec.structs import replace

from oag_transform.evaluation.render.tables import to_csv, to_markdown
from oag_transform.evaluation.result import Cell
from tests.test_result import RESULT


def test_csv_has_a_line_for_each_cell() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(RESULT), newline="")))
    assert len(lines) == 8
    assert (lines[1]["row"], lines[1]["column"], lines[1]["n"], lines[1]["correct"]) == ("Undefended", "FGSM", "4", "1")
    assert float(lines[1]["low_95"]) == pytest.approx(Cell("0001").interval[0])
    assert lines[2]["seconds_per_image"] == "0.00123"
    assert (lines[2]["defense"], lines[2]["setting"], lines[0]["defense"]) == ("jpeg", "75", "")
    assert (lines[3]["accuracy"], lines[7]["error"]) == ("", "ValueError: a | b")


def test_markdown_shows_accuracy_interval_seconds_and_error() -> None:
    lines = to_markdown(RESULT).splitlines()
    assert "| Defense | Clean | FGSM | s an image |" in lines
    assert "| JPEG, quality 75 | 75.0 [30, 95] |  | 0.0012 |" in lines
    assert "| slow | 50.0 [9, 91], n = 2 | 100.0 [34, 100], n = 2 | 123 |" in lines
    assert any("failed: ValueError: a \\| b" in line for line in lines)


def test_settings_are_folded_and_what_was_found_is_not() -> None:
    facts = {"n": 4, "command": "oag-transform evaluate table1 --out o", "recommendation": "Take JPEG."}
    lines = to_markdown(replace(RESULT, facts=facts), folded=True).splitlines()
    fold = lines.index("<details><summary>Settings of this run (n = 4)</summary>")
    assert lines[fold + 1 :] == ["", "- n: 4", "- command: `oag-transform evaluate table1 --out o`", "", "</details>"]
    assert "- recommendation: Take JPEG." in lines[:fold]
    assert "details" not in to_markdown(RESULT)
