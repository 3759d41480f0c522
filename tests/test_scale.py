"""The page on scale says what its data say."""

import json
from pathlib import Path

import pytest

pytest.importorskip("skimage")

from benchmarks import scale


def test_the_page_is_made_from_its_data() -> None:
    text = scale.PAGE.read_text(encoding="utf-8")
    assert scale.page(text) == text, "python -m benchmarks.scale writes both anew"


def test_tables_follow_the_measured_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"command": "c", "versions": "v", "hardware": "h", "load": "0.0"}
    rates = {
        name: {"images_a_second": rate, "start": 1.5} for name, rate in zip(scale.ENGINES, (4.0, 8.0, 3.0, 6.0), strict=True)
    }
    data = {"facts": facts, "images": 9, "stages": {"decode": 0.018, "purify": 0.36}, "engines": rates}
    (tmp_path / "scale.json").write_text(json.dumps(data))
    monkeypatch.setattr(scale, "DATA", tmp_path / "scale.json")
    text = scale.page(scale.PAGE.read_text(encoding="utf-8"))
    assert "| purify | 360.0 | 95 % |" in text
    assert "| `purify --engine ray --jobs 2` | 6.00 | 1.50 | 1.5 |" in text
    assert "| purify, CPU core hours (from the measured seconds) | 0.1 | 100 | 100,000 |" in text
    assert "| all other stages, CPU core hours (from the measured seconds) | 0.005 | 5 | 5,000 |" in text
    assert "| purify, H100 hours (computed, not measured) | 0.00029 | 0.29 | 290 |" in text  # 21 GFLOP at 20.1 TFLOP/s
    assert scale.page(text) == text
