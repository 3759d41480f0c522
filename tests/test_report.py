"""The report, read back with an HTML parser."""

import base64
import math
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torchvision.utils import save_image

from oag_transform.evaluation.render.report import write_report
from oag_transform.evaluation.result import Cell, Cost, Pair, Result, RowResult, write

VOID = {"meta", "img", "br", "input", "link", "hr"}
HOSTILE = """<script>alert("1")</script><img src=x onerror='alert(2)'> & "quoted" {braces}"""
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'

ROWS = (
    RowResult("Undefended", (Cell("1" * 40), Cell("0" * 40))),
    RowResult("JPEG", (Cell("1" * 36 + "0" * 4), Cell("1" * 30 + "0" * 10)), 0.00123),
    RowResult("TVM", (Cell("1" * 35 + "0" * 5), Cell("0" * 10 + "1" * 30)), 123.4),
    RowResult("slow", (Cell("1" * 8), Cell("1" * 8)), 31.0),
    RowResult("partial", (None, Cell("10" * 20))),
    RowResult("broken", (None, None), None, "ValueError: no"),
)
FACTS = {
    "n": 40,
    "seed": 0,
    "target": "a net",
    "data": "flowers",
    "hardware": "a CPU",
    "command": "oag-transform evaluate table1",
}
RESULT = Result("table1", "Table I", "How to read it.", "Defense", ("Clean", "FGSM"), ROWS, FACTS)


class Page(HTMLParser):
    """Tags with their attributes, the text of each, and whether they are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += ("|" if "small" in self.stack else "") + ("*" if "strong" in self.stack else "") + data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


def report(folder: Path, *found: Result) -> Page:
    for result in found:
        write(result, folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path)


def write_triple(folder: Path) -> tuple[str, str, str]:
    names = ("original.png", "attacked.png", "purified.png")
    for i, name in enumerate(names):
        save_image(torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(i)), folder / name)
    return names


def expected(cell: Cell | None, *, best: bool = False, note: str = "") -> str:
    assert cell is not None
    z, n = 1.959963984540054, len(cell.right)
    p = cell.right.count("1") / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    interval = f"{100 * (middle - half):.0f}\N{EN DASH}{100 * (middle + half):.0f}"
    return f"{'*' if best else ''}{100 * p:.1f}|{interval}{note}"


def test_every_number_is_there_and_the_best_are_bold(tmp_path: Path) -> None:
    page = report(tmp_path, RESULT)
    absent = "\N{EN DASH}"
    assert page.rows[0] == ["Defense", "Clean", "FGSM", "s an image"]
    cells = [row.cells for row in ROWS]
    (none, none_attacked), (jpeg, jpeg_attacked), (tvm, tvm_attacked), (slow, slow_attacked), (_, partial) = cells[:5]
    assert page.rows[1:] == [
        ["Undefended", expected(none, best=True), expected(none_attacked), absent],
        ["JPEG", expected(jpeg), expected(jpeg_attacked, best=True), "0.0012"],
        ["TVM", expected(tvm), expected(tvm_attacked, best=True), "123"],
        ["slow", expected(slow, note="|n = 8"), expected(slow_attacked, note="|n = 8"), "31"],
        ["partial", absent, expected(partial), absent],
        ["broken", "failed: ValueError: no"],
    ]
    assert page.all("td", colspan="3")
    for value in (*FACTS.values(), "How to read it."):
        assert str(value) in page.text
    assert page.all("code")


def test_the_recommendation_is_above_the_table(tmp_path: Path) -> None:
    facts = {**FACTS, "recommendation": "Take <this> & no other."}
    page = report(tmp_path, replace(RESULT, facts=facts))
    assert [text.strip() for text in page.text].count("Take <this> & no other.") == 1


def test_it_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    names = write_triple(tmp_path)
    (tmp_path / "cost.svg").write_bytes(SVG)
    pair = Pair("cat", *names, ("cat", "dog", "cat"), (0.9, 0.1, 0.8))
    page = report(tmp_path, replace(RESULT, figures=(Cost("cost.svg", "What it costs.", (), 0),), pairs=(pair,)))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.tags:
        assert "srcset" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert {(attributes["href"] or "")[1:] for attributes in page.all("a")} <= set(ids)
    assert not page.all("link")
    assert page.all("html", lang="en")
    assert page.all("meta", name="viewport")
    embedded = [attributes["src"] or "" for attributes in page.all("img")]
    files = ["cost.svg", *names]
    kinds = ["svg+xml", "png", "png", "png"]
    for source, file, kind in zip(embedded, files, kinds, strict=True):
        head, data = source.split(",")
        assert head == f"data:image/{kind};base64"
        assert base64.b64decode(data, validate=True) == (tmp_path / file).read_bytes()


def test_pairs_have_a_slider_and_the_predictions(tmp_path: Path) -> None:
    names = write_triple(tmp_path)
    pairs = tuple(Pair(f"cat {i}", *names, (f"cat {i}", "dog", "cat 1"), (0.9, 0.125, 0.75)) for i in range(2))
    page = report(tmp_path, replace(RESULT, columns=(), rows=(), pairs=pairs))
    assert len(page.all("input", type="range")) == len(page.all("input", type="checkbox")) == 2
    assert all("cat" in (attributes["aria-label"] or "") for attributes in page.all("input", type="range"))
    assert len(page.all("img")) == 6
    assert page.rows[1:4] == [["original", "cat 0", "0.90"], ["attacked", "dog", "0.12"], ["purified", "cat 1", "0.75"]]
    marks = [attributes["class"] for attributes in page.all("td") if "class" in attributes]
    assert marks == ["right", "wrong", "wrong", "right", "wrong", "right"]


def test_text_stays_text(tmp_path: Path) -> None:
    result = Result(
        "table1",
        HOSTILE,
        HOSTILE,
        HOSTILE,
        (HOSTILE,),
        (RowResult(HOSTILE, (Cell("1"),)), RowResult("b", (None,), None, HOSTILE)),
        {HOSTILE: HOSTILE, "target": HOSTILE, "command": HOSTILE},
        (Cost(HOSTILE + ".png", HOSTILE, (), 0),),
        (Pair(HOSTILE, *write_triple(tmp_path), (HOSTILE,) * 3, (0.1, 0.2, 0.3)),),
    )
    page = report(tmp_path, result)
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == 3
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(HOSTILE) >= 13  # contents, heading, caption, two headers, row, facts, card and its classes
    assert f"failed: {HOSTILE}" in page.text
    assert f"missing: {HOSTILE}.png" in page.text


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=4, max_size=4))
def test_any_text_is_read_back(texts: list[str]) -> None:
    title, caption, first, name = texts
    with tempfile.TemporaryDirectory() as folder:
        rows = (RowResult(name, (Cell("1"),)),)
        page = report(Path(folder), Result("x", title, caption, first, (name,), rows, {"command": name}))
    assert page.rows[0] == [first, name]
    assert page.rows[1][0] == name
    assert {title, caption} <= set(page.text)


@pytest.mark.parametrize("file", ["gone.svg", "../secret.png", "table1.json", ""])
def test_a_figure_that_cannot_be_shown_is_named(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "results"
    save_image(torch.zeros(3, 2, 2), tmp_path / "secret.png")
    pair = Pair("cat", file, file, file, ("cat", "dog", "cat"), (0.9, 0.1, 0.8))
    page = report(folder, replace(RESULT, figures=(Cost(file, "A figure.", (), 0),), pairs=(pair,)))
    assert page.text.count(f"missing: {file}") == 4
    assert "A figure." in page.text
    assert not page.all("img")


def test_order_and_skipped_images(tmp_path: Path) -> None:
    keys = ["zoo", "fig10", "fig4", "table6", "autoencoder", "apple", "fig1", "table2", "tradeoff", "table1"]
    (tmp_path / "settings.json").write_text('{"seed": 0}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "table3.json").write_text("{")
    page = report(tmp_path, *(replace(RESULT, key=key) for key in keys))
    ordered = ["table1", "tradeoff", "table2", "table6", "autoencoder", "fig1", "fig4", "apple", "fig10", "zoo"]
    assert [attributes["href"] for attributes in page.all("a")] == [f"#result-{key}" for key in ordered]
    assert [attributes["id"] for attributes in page.all("section")] == [f"result-{key}" for key in ordered]


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"rows": [], "columns": []}', "a result"), ('{"rows": 1, "columns": 2}', "a result"), ('{"rows": [', "JSON")],
)
def test_a_broken_result_is_left_out_of_the_report(
    text: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "table2.json").write_text(text)
    with pytest.raises(ValueError, match="found none"):
        write_report(tmp_path)
    page = report(tmp_path, RESULT)
    assert [attributes["href"] for attributes in page.all("a")] == [f"#result-{RESULT.key}"]
    assert f"table2.json is not {why}" in caplog.text


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected results .* found none"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
