"""README and docs agree with their data."""

import json
import re
from pathlib import Path

import pytest
from scipy.stats import binomtest

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


def write(folder: Path, key: str, columns: tuple[str, ...], *rows: RowResult, **facts: object) -> None:
    known = {"n": 4, "data": "flowers: 4 of 5", "target": "a target"}
    results.write(Result(key, "A title", "A caption.", "Defense", columns, rows, known | facts), folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three results of a data set, and the page that shows one of them."""
    cells = (Cell("1111"), Cell("1100"), Cell("1000"), Cell("11001000", 2))
    strong = (Cell("1110"), Cell("1110"), Cell("1100"), Cell("11101100", 2))
    write(
        tmp_path,
        "table1",
        ("Clean", "A", "B", "Mean"),
        RowResult("Undefended", cells),
        RowResult("JPEG, 4 views, quality 25", strong, seconds=0.0012, defense="jpeg-4-views", setting=25),
        RowResult("JPEG, 4 views, quality 15", cells[::-1], defense="jpeg-4-views", setting=15),
        RowResult("slow", (None,) * 4, error="ValueError: no luck", defense="bm3d", setting=10),
        RowResult("Two of them", strong, defense="jpeg:25+noise:12", setting=2),
    )
    by = {"attacks (gradients an image)": "bpda 10"}
    write(
        tmp_path,
        "adaptive-linf",
        ("Clean", "L∞ 1/255", "L∞ 2/255"),
        RowResult("Undefended", (Cell("1111"), Cell("1000"), Cell("0000"))),
        RowResult("JPEG: bpda", (Cell("1111"), Cell("1111"), Cell("1110")), notes=by, defense="jpeg-4-views", setting=15),
        RowResult("JPEG: margin", (Cell("1111"), Cell("1100"), None), defense="jpeg-4-views", setting=15),
        RowResult("OAG alone", (Cell("1111"), None, Cell("1100")), notes=by, defense="oag", setting=9),
    )
    write(
        tmp_path,
        "certify",
        ("L2 above 0", "L2 0.25 (L∞ 0.16/255)"),
        RowResult("Undefended", (Cell("1100"), Cell("1000")), defense="none"),
        RowResult("Wavelets", (Cell("1100"), Cell("1100")), defense="wavelets"),
        **{"sigma": 0.25, "draws counted": 100},
    )
    (tmp_path / "page.md").write_text("<!-- table: adaptive-linf.json -->\n<!-- end -->\n")
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    return tmp_path


def remade(block: str) -> list[str]:
    """The lines of a block that is made anew, which making it once more leaves as they are."""
    text = docs.made(f"<!-- {block} -->\nstale\n<!-- end -->")
    assert docs.made(text) == text
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in text.splitlines()[1:-1]]


def test_a_result_is_written_from_its_file(folder: Path) -> None:
    text = docs.made("before\n<!-- table: table1.json -->\nstale 12.3\n<!-- end -->\nafter")
    assert docs.made(text) == text
    assert "stale" not in text
    assert "A caption." in text
    assert re.search(r"\| JPEG, 4 views, quality 15 \| 37\.5", text)
    assert text.index("<details>") < text.index("- data: flowers: 4 of 5") < text.index("</details>")
    assert text.startswith("before\n")
    assert text.endswith("\nafter")


def test_a_summary_has_each_defense_at_one_setting(folder: Path) -> None:
    sets = "Flowers=table1.json,adaptive-linf.json,1 Frogs=frogs/table1.json,frogs/adaptive-linf.json,1"
    keys = "none jpeg-4-views jpeg-4-views:15 jpeg:25+noise:12 of-frogs-alone"
    text = docs.made(f"<!-- summary: {sets} | {keys} -->\nstale\n<!-- end -->")
    assert docs.made(text) == text
    assert text.splitlines()[1:-1] == [
        "| Defense | Flowers: clean | gray-box mean | adaptive, L∞ 1/255 |",
        "|---|---|---|---|",
        "| Undefended | 100.0 | 37.5 | 25.0 |",
        "| JPEG, 4 views, quality 25 | 75.0 | 62.5 |  |",
        "| JPEG, 4 views, quality 15 | 37.5 | 100.0 | 50.0 |",
        "| Two of them | 75.0 | 62.5 |  |",
        "",
        "Accuracy in percent of images that the undefended target classifies correctly. "
        "Flowers: n = 4, under adaptive attack 4 (randomised defenses by vote).",
    ]
    alone = docs.made("<!-- summary: Flowers=table1.json Toads=table1.json | none -->\n<!-- end -->")
    assert "| Defense | Flowers: clean | gray-box mean | Toads: clean | gray-box mean |" in alone
    with pytest.raises(ValueError, match=r"no row of 'tvm' in Flowers=table1\.json"):
        docs.made("<!-- summary: Flowers=table1.json | tvm -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"a bound that adaptive-linf has, L∞ 1/255, L∞ 2/255; got 3"):
        docs.made("<!-- summary: Flowers=table1.json,adaptive-linf.json,3 | none -->\n<!-- end -->")


def test_rows_are_paired_with_one_of_them_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    one = RowResult("One", (Cell("11111111"), Cell("11111110"), Cell("11111110")))
    weak = RowResult("Weak", (Cell("11111111"), Cell("00000001"), Cell("00000001")))
    write(tmp_path, "table1", ("Clean", "A", "Mean"), one, weak)
    write(tmp_path, "shifted", ("Clean", "A", "Mean"), weak, one)
    write(tmp_path, "other", ("Clean", "B", "Mean"), weak)
    p = binomtest(1, 8).pvalue
    assert f"{p:.2g}" == "0.07"

    def rows(block: str) -> list[list[str]]:
        text = docs.made(f"<!-- paired: {block} -->\n<!-- end -->")
        assert docs.made(text) == text
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[3:5]]

    assert [[row[0], *row[3:]] for row in rows("table1.json | One")] == [["One", "", ""], ["Weak", "0, 0, 1", "7, 1, 0.07"]]
    both = [["Weak", "0, 0, 1", "7, 1, 0.07"], ["One", "0, 0, 1", "0, 0, 1"]]
    assert [[row[0], *row[3:]] for row in rows("table1.json | One | shifted.json")] == both
    with pytest.raises(ValueError, match=r"table1\.json has no row 'Two'; it has One, Weak"):
        rows("table1.json | Two")
    with pytest.raises(ValueError, match=r"table1\.json and other\.json have other columns or images"):
        rows("table1.json | One | other.json")


def test_published_figures_stand_beside_the_rows_that_they_are_about(folder: Path) -> None:
    (folder / "data").mkdir()
    table = {
        "columns": ["B", "not measured", "Clean"],
        "rows": [
            {"rows": ["Undefended"], "figures": [7.35, 3, 97]},
            {"rows": ["jpeg-4-views", "jpeg"], "figures": [50.5, 3, 90.25]},
            {"rows": ["not measured", "bm3d"], "figures": [1, 3, 2]},
        ],
    }
    (folder / "data" / "paper.json").write_text(json.dumps({"table": table}))
    assert remade("published: table table1.json") == [
        "| Defense | B, paper | B, here | Clean, paper | Clean, here |",
        "|---|---|---|---|---|",
        "| Undefended | 7.35 | 25.0 [5, 70] | 97.00 | 100.0 [51, 100] |",
        "| JPEG, 4 views, quality 25 | 50.50 | 50.0 [15, 85] | 90.25 | 75.0 [30, 95] |",
        "| JPEG, 4 views, quality 15 | 50.50 | 50.0 [15, 85] | 90.25 | 37.5 [9, 78] |",
    ]


def test_certified_accuracy_at_the_best_noise_stands_above_published_figures(folder: Path) -> None:
    (folder / "data").mkdir()
    published = {"radii": [0.25, 1.0], "rows": [{"name": "Of others", "figures": [79.3, None]}]}
    (folder / "data" / "certified.json").write_text(json.dumps({"toads": published}))
    columns = ("L2 above 0", "L2 0.25 (L∞ 0.16/255)", "L2 1 (L∞ 0.66/255)")
    strong = (Cell("1110"), Cell("1110"), Cell("0001"))
    slow = RowResult("slow", (None,) * 3, error="ValueError: no luck", defense="bm3d")
    rows = (RowResult("Undefended", strong, defense="none"), slow)
    write(folder, "certify-more", columns, *rows, sigma=0.5)
    assert remade("certified: toads certify.json certify-more.json") == [
        "| Denoiser | L2 0.25 | L2 1 |",
        "|---|---|---|",
        "| Undefended | 75.0 [30, 95] (sigma 0.5, n = 4) | 25.0 [5, 70] (sigma 0.5, n = 4) |",
        "| Wavelets | 50.0 [15, 85] (sigma 0.25, n = 4) |  |",
        "| Of others | 79.3 |  |",
    ]


def test_the_tests_behind_claims_are_made_from_the_results(folder: Path) -> None:
    one = RowResult("One", (Cell("11111111"), Cell("11111110"), Cell("11111111"), Cell("1111111011111111", 2)))
    weak = RowResult("Weak", (Cell("11111110"), Cell("00000001"), Cell("10000000"), Cell("0000000110000000", 2)))
    few = RowResult("Few", (Cell("1111"), Cell("0000"), Cell("0000"), Cell("00000000", 2)))
    columns = ("Clean", "A", "B", "Mean attacked")
    write(folder / "flowers", "all", columns, one, weak)
    write(folder / "flowers", "few", columns, few)

    def lines(**entry: object) -> list[list[str]]:
        entry = {"about": "Claim 2", "result": "flowers/all.json", "row": "One"} | entry
        (folder / "claims.json").write_text(json.dumps([entry]))
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in remade("claims: claims.json")[2:]]

    p = f"{binomtest(7, 7).pvalue:.2g}"
    assert lines(others=["Weak"], columns=["Clean", "Mean attacked"]) == [
        ["Claim 2", "One", "Weak", "[flowers](flowers/all.json): Clean", "8", "100.0", "87.5", "1, 0, 1"],
        ["Claim 2", "One", "Weak", "[flowers](flowers/all.json): Mean attacked", "8", "93.8", "12.5", f"7, 0, {p}"],
    ]
    assert lines(others=["One"], columns=["B"], at="A")[0][3:] == [
        "[flowers](flowers/all.json): B against A", "8", "100.0", "87.5", "1, 0, 1"
    ]  # fmt: skip
    assert lines(others=["Few"], columns=["A"], beside="flowers/few.json")[0][4:] == ["4", "100.0", "0.0", "4, 0, 0.12"]
    write(folder / "flowers", "fresh", columns, one, weak)
    assert lines(others=["Weak"], columns=["A"], fresh="flowers/fresh.json")[0][3:] == [
        "[flowers](flowers/all.json) and [fresh](flowers/fresh.json): A", "16", "87.5", "12.5", "14, 2, 0.0042"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="all has no 'Two' with 'A'"):
        lines(others=["Two"], columns=["A"])


def test_the_board_has_a_row_for_each_defense_of_any_result(folder: Path) -> None:
    block = "<!-- board: table1=table1.json adaptive=adaptive-linf.json linf=1 certify=certify.json radius=0.25 -->\n"
    text = docs.made(f"{block}stale\n<!-- end -->")
    assert docs.made(text) == text
    lines = text.splitlines()
    assert lines[1] == (
        "| Defense | Clean | Gray-box mean | Gray-box, worst for each image | Adaptive, L∞ 1/255 | Adaptive attacks, n "
        "| Certified, sigma 0.25, L2 0.25 (L∞ 0.16/255) | ms an image |"
    )
    assert lines[3:10] == [
        "| Undefended | 100.0 | 37.5 | 25.0 | [25.0](page.md) | n = 4 | 25.0 |  |",
        "| JPEG, 4 views, quality 25 | 75.0 | 62.5 | 50.0 |  |  |  | 1.2 |",
        "| JPEG, 4 views, quality 15 | 37.5 | 100.0 | 25.0 | [50.0](page.md) | margin, n = 4 |  |  |",
        "| Two of them | 75.0 | 62.5 | 50.0 |  |  |  |  |",
        "| OAG alone |  |  |  |  |  |  |  |",
        "| Wavelets |  |  |  |  |  | 50.0 |  |",
        "",
    ]
    assert "n = 4 images, right or wrong; 100 draws" in text
    part = docs.made("<!-- board: table1=toads.json adaptive=adaptive-linf.json,toads.json linf=2 -->\n<!-- end -->")
    assert "| OAG alone | [100.0](page.md) |  |  | [50.0](page.md) | bpda 10, n = 4 |  |  |" in part
    few = RowResult("Few", (Cell("11"), Cell("10"), Cell("10")), defense="bm3d", setting=10)
    write(folder, "slow", ("Clean", "A 2/255", "Mean"), RowResult("All", (Cell("1111"), Cell("1100"), Cell("1100"))), few)
    slow = docs.made("<!-- board: table1=slow.json -->\n<!-- end -->")
    assert "| All | 100.0 | 50.0 | 50.0 |" in slow
    assert "| Few (n = 2) | 100.0 | 50.0 | 50.0 |" in slow
    nothing = docs.made("<!-- board: table1=toads.json adaptive=toads.json linf=2 -->\n<!-- end -->")
    assert "Nothing has been measured here yet." in nothing
