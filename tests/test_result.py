"""Results: intervals and paired tests against closed forms, and lossless JSON."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from oag_transform.evaluation.result import (
    Cell,
    Cost,
    Curve,
    ImageColumn,
    Iterations,
    Lines,
    Pair,
    Residuals,
    Result,
    RowResult,
    Tradeoff,
    read,
    write,
)
from oag_transform.evaluation.statistics import paired, pooled

bits = st.text(alphabet="01", min_size=1, max_size=60)

RESULT = Result(
    "table9",
    "A | title",
    "A caption.",
    "Defense",
    ("Clean", "FGSM"),
    (
        RowResult("Undefended", (Cell("1111"), Cell("0001"))),
        RowResult("JPEG, quality 75", (Cell("1110"), None), 0.00123, "", "jpeg", 75, "DefendedModel(target, JPEG())"),
        RowResult("slow", (Cell("10"), Cell("11")), 123.4),
        RowResult("broken", (None, None), None, "ValueError: a | b"),
    ),
    {"seed": 3, "target": "t", "chosen": {"JPEG": 25}},
    (
        Lines("a.svg", "what", (0, 2.5), "eps", (0,), 2.5, "here"),
        Cost("b.svg", "what", (1, 2), 0),
        Tradeoff("c.svg", "what", (Curve("JPEG", (1,)), Curve("OAG", (0, 2), True)), 0, 1),
        Residuals("d.jpg", "what", (ImageColumn("original", ("a.png",), ("0.9",)),)),
        Iterations("e.jpg", "what", (ImageColumn("original", ("a.png",)), ImageColumn("step 1", ("b.png",)))),
    ),
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
    assert json.loads((tmp_path / "new" / "table9.json").read_text())["rows"][0]["cells"][1] == {"right": "0001"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table9.json"]


def test_a_name_that_is_not_utf8_does_not_lose_the_result(tmp_path: Path) -> None:
    result = replace(RESULT, facts={"command": "--data caf\udce9"})
    write(result, tmp_path)
    assert read(tmp_path / f"{result.key}.json").facts["command"] == "--data caf\ufffd"
    assert not list(tmp_path.glob("*.partial"))


def test_images_lie_beside_the_json_and_not_in_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    write(replace(RESULT, images={"a.png": pixels}), tmp_path)
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "a.png")), pixels)
    assert read(tmp_path / "table9.json") == RESULT
    assert not read(tmp_path / "table9.json").images


def test_pooling_needs_every_column() -> None:
    assert pooled([Cell("10"), Cell("01")]) == Cell("1001", 2)
    assert pooled([Cell("10"), None]) is None
    assert pooled([]) is None


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{"name": 1}]}')
    (tmp_path / "b.json").write_text("{")
    write(RESULT, tmp_path)
    plain = json.loads((tmp_path / "table9.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(plain | {"figures": [{"kind": "pie"}]}))
    (tmp_path / "d.json").write_text(json.dumps(plain | {"more": 1}))
    for name in ("a.json", "b.json", "c.json", "d.json"):
        with pytest.raises(ValueError, match="not a result"):
            read(tmp_path / name)
