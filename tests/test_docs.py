"""README and docs say what their data say."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import docs
from oag_transform.evaluation import result as results
from oag_transform.evaluation.result import Cell, Result, RowResult


@pytest.mark.parametrize("page", docs.pages(), ids=lambda path: path.name)
def test_tables_are_made_from_their_data(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert docs.made(text) == text, "python -m benchmarks.docs writes it anew"


def test_every_result_is_shown_somewhere() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in docs.pages())
    for path in docs.DOCS.glob("data/*/*.json"):
        assert path.relative_to(docs.DOCS).as_posix() in shown


def test_a_block_is_written_from_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = (Cell("1111"), Cell("1100"), Cell("1000"), Cell("11001000", 2))
    rows = (RowResult("None", cells), RowResult("JPEG, quality 25", cells[::-1], defense="jpeg"))
    facts = {"n": 4, "data": "flowers: 4 of 5"}
    result = Result("table1", "Table I", "A caption.", "Defense", ("Clean", "A", "B", "Mean"), rows, facts)
    results.write(result, tmp_path)
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    rows_block = "<!-- rows: flowers=table1.json | none -->\nstale 12.3\n<!-- end -->"
    page = f"before\n{rows_block}\nafter <!-- table: table1.json -->\n<!-- end -->"
    text = docs.made(page)
    assert docs.made(text) == text
    assert "stale" not in text
    assert "| None | 100.0 | 37.5 | 25.0 |" in text
    assert "A caption." in text
    assert (
        text.index("JPEG, quality 25")
        < text.index("<details>")
        < text.index("- data: flowers: 4 of 5")
        < text.index("</details>")
    )
    assert re.search(r"\| JPEG, quality 25 \| 37\.5", text)
    assert docs.made(text) == text
    assert json.loads((tmp_path / "table1.json").read_text())["key"] == "table1"
    with pytest.raises(ValueError, match="no row of 'tvm' in table1"):
        docs.made(page.replace("none", "tvm"))
