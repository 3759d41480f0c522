"""Tables of README and docs, made from the results under docs/data: no figure without its data.

python -m benchmarks.docs            (writes them anew where they differ; --check only says so, and fails)

A block begins with an HTML comment that says what it is made of, and ends with ``<!-- end -->``:

- ``<!-- table: data/x/table1.json [| no caption] -->``: a whole result, its settings folded, and the figures that say more;
- ``<!-- summary: NAME=data/x/table1.json[,data/x/adaptive-linf.json[,BOUND]] ... | KEY[:SETTING] ... -->``: clean, mean
  gray-box and adaptive accuracy of some defenses on several data sets side by side, each at its published setting unless it
  says otherwise, and the adaptive one at that setting too; ``none`` and ``none-4-views`` are no defense;
- ``<!-- board: table1=... adaptive=...[,...] linf=BOUND certify=... radius=RADIUS -->``: a row for every defense that any of
  these results has, also the worst attack, certified accuracy and time; each part may be left out;
- ``<!-- paired: data/x/table1.json | NAME [| data/x/other.json] -->``: every row of a result with a clean and a mean column
  beside the row of this name, image by image; or the rows of another result of the same images;
- ``<!-- published: TABLE data/x/table1.json -->``: the paper's figures, those of ``data/paper.json`` under this name, beside
  the rows of a result that they are about;
- ``<!-- certified: SET data/x/certify-0.25.json ... -->``: for each denoiser and radius the largest certified accuracy over the
  results, which differ in sigma, above the published figures of ``data/certified.json`` for this set;
- ``<!-- claims: data/claims.json -->``: exact sign tests behind claims. An entry of the file says what it is about and names
  a result, one of its rows, others, and columns; ``beside``: another result of the same images that has the others; ``at``:
  their column;
- ``<!-- attacks: -->``: the list of adaptive attacks;
- ``<!-- detail: data/detail.json | NAME, NAME -->``: some of the settings that ``benchmarks.detail`` compared;
- ``<!-- speed: data/speed.json -->``: what ``benchmarks.speed`` wrote;
- ``<!-- scale: data/scale.json TABLE -->``: a table of what ``benchmarks.scale`` wrote.

Paths are relative to docs. Summary and board go without results whose file isn't there.
"""

import argparse
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks import board, detail, scale, speed
from oag_transform.evaluation import result as results
from oag_transform.evaluation.options import ADAPTIVE_ATTACKS
from oag_transform.evaluation.render import tables
from oag_transform.evaluation.render.draw import draw_figures
from oag_transform.evaluation.result import Cell, Certified, Lines, Result, RowResult, Tradeoff
from oag_transform.evaluation.statistics import paired

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- (\w+):(.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
DRAWN = (Lines, Tradeoff, Certified)  # figures that are shown: the others need images, or say what the table says


def made(text: str) -> str:
    """The text with all of its blocks made anew from their data.

    Raises:
        KeyError: a block of an unknown kind.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{KINDS[found[2]](found[3].strip()).strip()}\n{found[5]}", text)


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def main() -> int:
    """Write what differs; 1 where ``--check`` finds some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--figures", action="store_true", help="draw the figures too, each beside its data")
    options = parser.parse_args()
    stale = {path: new for path in pages() if (new := made(old := path.read_text(encoding="utf-8"))) != old}
    for path, new in stale.items():
        print(f"{path.relative_to(ROOT)} {'differs from its data' if options.check else 'written'}")
        if not options.check:
            path.write_text(new, encoding="utf-8")
    if options.figures:
        for page in pages():
            for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
                if found[2] == "table":
                    file = found[3].partition("|")[0].strip()
                    draw_figures(_shown(file), (DOCS / file).parent)
    return 1 if stale and options.check else 0


def _shown(path: str) -> Result:
    """A result with the figures that are shown."""
    found = results.read(DOCS / path)
    return replace(found, figures=tuple(figure for figure in found.figures if isinstance(figure, DRAWN)))


def _table(of: str) -> str:
    """A whole result but for its heading."""
    of, _, option = (part.strip() for part in of.partition("|"))
    text = tables.to_markdown(_shown(of), folded=True).split("\n", 2)[2]
    if option == "no caption":
        text = text[text.index("\n|") :]
    elif option:
        raise ValueError(f"expected 'no caption' or nothing, got {option!r}")
    return re.sub(r"^(!\[.*\]\()(.*)(\))$", rf"\1{Path(of).parent.as_posix()}/\2\3", _unbroken(text), flags=re.MULTILINE)


def _unbroken(text: str) -> str:
    """The text without line breaks within an interval."""
    return re.sub(r"(\[\d+,) (\d+\])", "\\1\N{NO-BREAK SPACE}\\2", text)


def _paired(of: str) -> str:
    """Every row beside one of them: accuracy with its interval, and exact sign tests on clean and on attacked images."""
    file, name, *others = (part.strip() for part in of.split("|"))
    found = results.read(DOCS / file)
    one = _named(found, name)
    if one is None:
        raise ValueError(f"{file} has no row {name!r}; it has {', '.join(row.name for row in found.rows)}")
    shown_of = results.read(DOCS / others[0]) if others else found
    if (shown_of.columns, shown_of.facts["data"]) != (found.columns, found.facts["data"]):
        raise ValueError(f"{file} and {others[0]} have other columns or images")
    rows, most = [row for row in shown_of.rows if not row.error], found.facts["n"]
    headings = ("Defense", "Clean", "Mean attacked", "Clean: better, worse, p", "Attacked: better, worse, p")
    lines = []
    for row in rows:
        shown = [tables.cell_text(row.cells[0], most), tables.cell_text(row.cells[-1], most)]
        tests = [paired(one.cells[:1], row.cells[:1]), paired(one.cells[1:-1], row.cells[1:-1])]
        shown += ["" if row is one else f"{more}, {fewer}, {p:.2g}" for more, fewer, p in tests]
        lines.append([row.name, *shown])
    note = f"Images on which {name} is better and worse than the row, and the two-sided p of the exact sign test."
    note += " Attacked: right under more, and under fewer, of the attacks."
    return _unbroken("\n".join([*tables.table(headings, lines), "", note]))


def _published(of: str) -> str:
    """The paper's figures beside the rows here that they are about: of a name or of a defense, at each of its settings.

    Columns of the paper that the result doesn't have are left out.
    """
    table, file = of.split()
    published, found = _load("data/paper.json")[table], results.read(DOCS / file)
    starts: list[str] = published["columns"]
    places = {i: at for i, each in enumerate(starts) for at, name in enumerate(found.columns) if name.startswith(each)}
    lines = []
    for entry in published["rows"]:
        for row in found.rows:
            key = row.defense if "+" in row.defense else row.defense.partition(":")[0]  # one of several is not that defense
            if {row.name, key} & set(entry["rows"]) and not row.error:
                pairs = [(entry["figures"][i], tables.cell_text(row.cells[at], found.facts["n"])) for i, at in places.items()]
                lines.append([row.name, *(text for figure, shown in pairs for text in (f"{figure:.2f}", shown))])
    headings = [f"{starts[i]}, {where}" for i in places for where in ("paper", "here")]
    return _unbroken("\n".join(tables.table((found.first, *headings), lines)))


def _certified(of: str) -> str:
    """The best noise for each denoiser and radius, and below it what others published.

    A radius that no result could prove for want of draws has an empty cell.
    """
    name, *files = of.split()
    published, found = _load("data/certified.json")[name], [results.read(DOCS / file) for file in files]
    best: dict[str, dict[str, tuple[Cell, float]]] = {}  # of each denoiser and radius, with its noise; the smallest of equals
    for result in sorted(found, key=lambda each: each.facts["sigma"]):
        for row in (row for row in result.rows if not row.error):
            of_row = best.setdefault(row.name, {})
            for column, cell in zip(result.columns, row.cells, strict=True):
                radius = column.partition(" (")[0]
                if cell is not None and (radius not in of_row or cell.accuracy > of_row[radius][0].accuracy):
                    of_row[radius] = cell, result.facts["sigma"]

    def shown(cell: Cell, sigma: float) -> str:
        return f"{tables.cell_text(cell, cell.n)} (sigma {sigma:g}, n = {cell.n})"

    radii = [f"L2 {radius:g}" for radius in published["radii"]]
    lines = [[label, *(shown(*cells[each]) if each in cells else "" for each in radii)] for label, cells in best.items()]
    for row in published["rows"]:
        lines.append([row["name"], *("" if figure is None else f"{figure:g}" for figure in row["figures"])])
    return _unbroken("\n".join(tables.table(("Denoiser", *radii), lines)))


def _claims(of: str) -> str:
    """A line for each pair of rows that a claim compares, on the images that both have, and on those of ``fresh``."""
    read = functools.cache(lambda file: results.read(DOCS / file))  # most entries are about the same few results
    lines = []
    for entry in _load(of):
        file = entry["result"]
        here, there = read(file), read(entry.get("beside", file))
        for other, column in itertools.product(entry["others"], entry["columns"]):
            one, two = _cells(here, entry["row"], column), _cells(there, other, entry.get("at", column))
            n = min(cell.n for cell in (*one, *two))
            if "fresh" in entry:
                fresh = read(entry["fresh"])
                one, two = _with(one, fresh, entry["row"], column, n), _with(two, fresh, other, column, n)
                n = min(cell.n for cell in (*one, *two))
            more, fewer, p = paired(one, two)
            means = [100 * sum(cell.right[:n].count("1") for cell in cells) / (n * len(cells)) for cells in (one, two)]
            where = f"{column} against {entry['at']}" if "at" in entry else column
            numbers = [str(n), *(f"{mean:.1f}" for mean in means), f"{more}, {fewer}, {p:.2g}"]
            data = f"[{Path(file).parent.name}]({file})"
            if "beside" in entry:
                data += f", [{Path(entry['beside']).stem}]({entry['beside']})"
            if "fresh" in entry:
                data += f" and [{Path(entry['fresh']).stem}]({entry['fresh']})"
            lines.append([entry["about"], entry["row"], other, f"{data}: {where}", *numbers])
    return "\n".join(tables.table(("About", "One", "Other", "Data", "n", "One, %", "Other, %", "better, worse, p"), lines))


def _with(cells: Sequence[Cell], fresh: Result, name: str, column: str, n: int) -> list[Cell]:
    """The first n images of a row's cells, and those of its cells in a result on other images."""
    return [Cell(cell.right[:n] + more.right) for cell, more in zip(cells, _cells(fresh, name, column), strict=True)]


def _named(result: Result, name: str) -> RowResult | None:
    """The row of this name, unless it failed."""
    return next((row for row in result.rows if row.name == name and not row.error), None)


def _cells(result: Result, name: str, column: str) -> list[Cell]:
    """A row's cell in a column; for the mean over the attacks the cells of all of them.

    Raises:
        ValueError: there is no such row or column, or nothing was measured there.
    """
    row = _named(result, name)
    if row is None or column not in result.columns:
        raise ValueError(f"{result.key} has no {name!r} with {column!r}")
    at = result.columns.index(column)
    cells = [cell for cell in (row.cells[1:at] if column.startswith("Mean") else row.cells[at : at + 1]) if cell is not None]
    if not cells:
        raise ValueError(f"{name!r} has no accuracy in {column!r}")
    return cells


def _detail(of: str) -> str:
    file, _, names = of.partition("|")
    return detail.markdown(DOCS / file.strip(), [name.strip() for name in names.split(",")])


def _load(of: str) -> Any:
    return json.loads((DOCS / of).read_text(encoding="utf-8"))


def _attacks(_: str) -> str:
    rows = [(attack.key, attack.description) for attack in ADAPTIVE_ATTACKS]
    return "\n".join(tables.table(("`--adaptive.attacks`", "what it does"), rows))


KINDS: dict[str, Callable[[str], str]] = {
    "table": _table,
    "summary": lambda of: board.summary(of, DOCS),
    "board": lambda of: board.board(of, DOCS),
    "paired": _paired,
    "published": _published,
    "certified": _certified,
    "claims": _claims,
    "attacks": _attacks,
    "detail": _detail,
    "speed": lambda of: speed.markdown(_load(of)),
    "scale": lambda of: scale.table(of.split()[1], _load(of.split()[0])),
}


if __name__ == "__main__":
    sys.exit(main())
