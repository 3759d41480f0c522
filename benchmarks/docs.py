"""Tables of README and docs, made from the results under docs/data: no figure without its data.

python -m benchmarks.docs            (writes them anew where they differ; --check only says so, and fails)

A block begins with an HTML comment that says what it is made of, and ends with ``<!-- end -->``:

- ``<!-- table: data/x/table1.json -->``: the whole table, with what is needed to repeat it;
- ``<!-- rows: NAME=data/x/table1.json NAME=data/y/table1.json | KEY [KEY ...] -->``: clean, mean and worst accuracy of some
  defenses in several results side by side, each at its published setting there.

Paths are relative to docs.
"""

import argparse
import re
import sys
from pathlib import Path

from oag_transform.evaluation import results
from oag_transform.evaluation.render import tables
from oag_transform.evaluation.results import Result, Row

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- (table|rows): (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def made(text: str) -> str:
    """The text with all of its blocks made anew from their data."""

    def block(found: re.Match[str]) -> str:
        kind, of = found.group(2), found.group(3)
        if kind == "table":
            content = tables.to_markdown(_result(of.strip())).split("\n", 2)[2]  # without its heading
        else:
            files, _, keys = of.partition("|")
            named = dict(file.split("=") for file in files.split())
            content = _rows({name: _result(file) for name, file in named.items()}, keys.split())
        return f"{found.group(1)}{_without_figures(content).strip()}\n{found.group(5)}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def main() -> int:
    """Write what differs; 1 where ``--check`` finds some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = {path: new for path in pages() if (new := made(old := path.read_text(encoding="utf-8"))) != old}
    for path, new in stale.items():
        print(f"{path.relative_to(ROOT)} {'differs from its data' if options.check else 'written'}")
        if not options.check:
            path.write_text(new, encoding="utf-8")
    return 1 if stale and options.check else 0


def _result(path: str) -> Result:
    return results.read(DOCS / path)


def _rows(found: dict[str, Result], keys: list[str]) -> str:
    """Clean, mean and worst accuracy in percent of the defenses with these keys; ``none`` is no defense."""
    heading = ["Defense"] + [f"{name}: {column}" for name in found for column in ("clean", "mean attacked", "worst attack")]
    lines = [f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
    for key in keys:
        rows = [_row(result, key) for result in found.values()]
        name = next((row.name for row in rows if row is not None), None)
        if name is None:
            raise ValueError(f"no row of {key!r} in {', '.join(result.key for result in found.values())}")
        cells = [f"{100 * value:.1f}" if row else "" for row in rows for value in (_three(row) if row else (0, 0, 0))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    n = ", ".join(f"{result.facts['n']} photographs of {name}" for name, result in found.items())
    return "\n".join([*lines, "", f"In percent of {n} that the target gets right without an attack."])


def _row(result: Result, key: str) -> Row | None:
    """The first row of a defense, at its published setting; None where it was not measured."""
    return next((row for row in result.rows if (row.name == "None" if key == "none" else row.defense == key)), None)


def _three(row: Row) -> tuple[float, float, float]:
    clean, *attacked, mean = (cell.accuracy if cell is not None else float("nan") for cell in row.cells)
    return clean, mean, min(attacked)


def _without_figures(markdown: str) -> str:
    return "\n".join(line for line in markdown.split("\n") if not line.startswith("!["))


if __name__ == "__main__":
    sys.exit(main())
