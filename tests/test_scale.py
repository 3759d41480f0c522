"""The tables on scale agree with the measurements."""

from benchmarks import scale


def test_tables_follow_the_measured_seconds() -> None:
    facts = {"command": "c", "versions": "v", "hardware": "h", "load": "0.0"}
    speeds = zip(scale.ENGINES, (4.0, 8.0, 3.0, 6.0), strict=True)
    rates = {command: {"images_a_second": rate, "start": 1.5} for command, rate in speeds}
    data = {"facts": facts, "images": 9, "stages": {"decode": 0.018, "purify": 0.36}, "engines": rates}
    text = "\n".join(scale.table(kind, data) for kind in ("stages", "engines", "costs"))
    assert "| purify | 360.0 | 95 % |" in text
    assert "| `purify --engine ray --jobs 2 --rows 16` | 6.00 | 1.50 | 1.5 |" in text
    assert "| purify, CPU core hours (from the measured seconds) | 0.1 | 100 | 100,000 |" in text
    assert "| all other stages, CPU core hours (from the measured seconds) | 0.005 | 5 | 5,000 |" in text
