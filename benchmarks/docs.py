"""Tables of README and docs, made from the results under docs/data: no figure without its data.

python -m benchmarks.docs            (writes them anew where they differ; --check only says so, and fails)

A block begins with an HTML comment that says what it is made of, and ends with ``<!-- end -->``:

- ``<!-- table: data/x/table1.json -->``: the whole table, with what is needed to repeat it;
- ``<!-- rows: NAME=data/x/table1.json NAME=data/y/table1.json | KEY [KEY ...] -->``: clean, mean and worst accuracy of some
  defenses in several results side by side, each at its published setting there;
- ``<!-- adversaries: data/x.json ... -->`` and ``<!-- attacks: data/x.json ... -->``: what ``benchmarks.adaptive`` found;
- ``<!-- convergence: data/x.json -->``: what ``benchmarks.convergence`` found;
- ``<!-- certified: data/x.json -->``: certified accuracy at each radius, and the tests against the controls;
- ``<!-- detail: data/detail.json | NAME, NAME -->``: some of the settings that ``benchmarks.detail`` compared;
- ``<!-- speed: data/speed.json -->``: what ``benchmarks.speed`` wrote;
- ``<!-- scale: data/scale.json TABLE -->``: a table of what ``benchmarks.scale`` wrote.

Paths are relative to docs.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import adversaries, convergence, detail, scale, speed
from oag_transform.evaluation import certification, results
from oag_transform.evaluation.render import certified, tables
from oag_transform.evaluation.render.draw import draw_figures
from oag_transform.evaluation.results import Lines, Result, Row, Tradeoff

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- (\w+): (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DRAWN = (Lines, Tradeoff)  # figures that are shown: the others need photographs, or say what the table says


def made(text: str) -> str:
    """The text with all of its blocks made anew from their data.

    Raises:
        KeyError: a block of an unknown kind.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{KINDS[found[2]](found[3].strip()).strip()}\n{found[5]}", text)


def draw(text: str) -> None:
    """Draw the figures of a page's tables, each beside its data."""
    for found in BLOCK.finditer(text):
        files = [DOCS / file for file in found[3].split()]
        if found[2] == "adversaries" and len(files) > 1:
            adversaries.draw(files)
        if found[2] == "convergence":
            convergence.draw(*files)
        if found[2] == "certified":
            certificates = certification.read(*files)
            for noise_std in certificates.noises:
                certified.draw(certificates, noise_std, files[0].with_name(f"{files[0].stem}-{noise_std:g}.svg"))
        if found[2] == "table":
            result = _result(found[3].strip())
            shown = tuple(figure for figure in result.figures if isinstance(figure, DRAWN))
            draw_figures(dataclasses.replace(result, figures=shown), (DOCS / found[3].strip()).parent)


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def main() -> int:
    """Write what differs; 1 where ``--check`` finds some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--figures", action="store_true", help="draw the figures too")
    options = parser.parse_args()
    stale = {path: new for path in pages() if (new := made(old := path.read_text(encoding="utf-8"))) != old}
    for path, new in stale.items():
        print(f"{path.relative_to(ROOT)} {'differs from its data' if options.check else 'written'}")
        if not options.check:
            path.write_text(new, encoding="utf-8")
    if options.figures:
        for path in pages():
            draw(path.read_text(encoding="utf-8"))
    return 1 if stale and options.check else 0


def _result(path: str) -> Result:
    return results.read(DOCS / path)


def _table(of: str) -> str:
    """A whole result but for its heading, with the figures that are drawn."""
    shown = {figure.file for figure in _result(of).figures if isinstance(figure, DRAWN)}
    lines = tables.to_markdown(_result(of)).split("\n")[2:]
    folder = Path(of).parent.as_posix()
    found = [re.sub(r"^(!\[.*\]\()(.*)(\))$", rf"\1{folder}/\2\3", line) for line in lines]
    return "\n".join(line for line in found if not line.startswith("![") or line.rpartition("/")[2].rstrip(")") in shown)


def _adversaries(of: str) -> str:
    """Rows side by side, with their figure where there are several."""
    paths = [DOCS / file for file in of.split()]
    if len(paths) == 1:
        return adversaries.table(paths)
    file = adversaries.figure(paths).relative_to(DOCS).as_posix()
    return f"{adversaries.table(paths)}\n\n![Right by vote against the bound]({file})"


def _certified(of: str) -> str:
    found = certified.to_markdown(certification.read(DOCS / of)).replace("## Certified", "**Certified")
    found = re.sub(r"^(\*\*Certified.*)$", r"\1**", found, flags=re.MULTILINE)  # no heading of the page
    return found.replace("](certified-", f"]({of.removesuffix('.json')}-")  # where draw() puts them


def _some_rows(of: str) -> str:
    files, _, keys = of.partition("|")
    named = dict(file.split("=") for file in files.split())
    return _rows({name: _result(file) for name, file in named.items()}, keys.split())


def _detail(of: str) -> str:
    file, _, names = of.partition("|")
    return detail.markdown(DOCS / file.strip(), [name.strip() for name in names.split(",")])


def _load(of: str) -> Any:
    return json.loads((DOCS / of).read_text(encoding="utf-8"))


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


KINDS: dict[str, Callable[[str], str]] = {
    "table": _table,
    "rows": _some_rows,
    "adversaries": _adversaries,
    "attacks": lambda of: adversaries.attacks([DOCS / file for file in of.split()]),
    "convergence": lambda of: convergence.table(DOCS / of),
    "certified": _certified,
    "detail": _detail,
    "speed": lambda of: speed.markdown(_load(of)),
    "scale": lambda of: scale.table(of.split()[1], _load(of.split()[0])),
}


if __name__ == "__main__":
    sys.exit(main())
