"""What each defense keeps, side by side: the board of the docs and README's summary, made from results of ``evaluate``.

A file that isn't there yet leaves its cells empty, so that a page can name results that are still to come.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from oag_transform.baselines.catalogue import NONE, VIEWS
from oag_transform.evaluation import result as results
from oag_transform.evaluation.experiments.adaptive import ATTACKS
from oag_transform.evaluation.render import tables
from oag_transform.evaluation.result import Cell, Result, RowResult
from oag_transform.evaluation.statistics import worst

WITHOUT_VIEWS = {"none": NONE, "none-4-views": f"{NONE}, {VIEWS}"}  # rows without a defense have no key


class Adaptive(NamedTuple):
    """The lowest accuracy of a defense among the rows of an adaptive result, clean accuracy there, and the attacks on it."""

    cell: Cell
    clean: Cell | None
    attacks: str


def summary(of: str, docs: Path) -> str:
    """Clean, mean gray-box and adaptive accuracy of some defenses on several data sets; see :mod:`benchmarks.docs`.

    Raises:
        ValueError: a defense that no file has, though all of them are there; or a bound that was not measured.
    """
    sets, _, keys = of.partition("|")
    parsed = [(name, *files.split(",")) for name, _, files in (each.partition("=") for each in sets.split())]
    shown = [(name, table, more) for name, file, *more in parsed if (table := _read(docs / file)) is not None]
    adaptive = [_adaptive_file(docs, *more) for _, _, more in shown]
    heading = ["Defense"]
    for (name, _, _), (_, column) in zip(shown, adaptive, strict=True):
        heading += [f"{name}: clean", "gray-box mean", *([f"adaptive, {column}"] if column else [])]
    lines = []
    for key in keys.split():
        rows = [_row(table, key) for _, table, _ in shown]
        named = next((row for row in rows if row is not None), None)
        if named is None:
            if len(shown) == len(parsed):
                raise ValueError(f"no row of {key!r} in {sets.strip()}")
            continue  # it may be in a file that is still to come
        cells = []
        for row, (attacked, column) in zip(rows, adaptive, strict=True):
            cells += ["", ""] if row is None else [_percent(row.cells[0]), _percent(row.cells[-1])]
            least = None if row is None or attacked is None else _least(attacked, row, column)
            cells += ([_percent(least.cell) if least else ""]) if column else []
        lines.append([named.name, *cells])
    counts = [f"{name}: {_count(table, *attacked)}" for (name, table, _), attacked in zip(shown, adaptive, strict=True)]
    note = f"Accuracy in percent of images that the undefended target classifies correctly. {'; '.join(counts)}."
    return "\n".join([*tables.table(heading, lines), "", note])


def board(of: str, docs: Path) -> str:
    """Every row of a data set's results: gray-box, adaptive and certified accuracy, and time; see :mod:`benchmarks.docs`.

    Raises:
        ValueError: a bound or a radius that was not measured.
    """
    given = dict(part.split("=", 1) for part in of.split())
    table = _read(docs / given["table1"]) if "table1" in given else None
    files = [file for file in given.get("adaptive", "").split(",") if file]
    adaptive = [(file, result) for file in files if (result := _read(docs / file)) is not None]
    certified = _read(docs / given["certify"]) if "certify" in given else None
    if table is None and not adaptive and certified is None:
        return "Nothing has been measured here yet."
    at = [(file, result, _column(result, given.get("linf"))) for file, result in adaptive]
    bound = at[0][2] if at else f"L∞ {given['linf']}/255" if "linf" in given else ""
    proven = None if certified is None else _column(certified, given.get("radius"))
    heading = [
        "Defense",
        "Clean",
        "Gray-box mean",
        "Gray-box, worst for each image",
        f"Adaptive{bound and f', {bound}'}",
        "Adaptive attacks, n",
        "Certified" if certified is None else f"Certified, sigma {certified.facts['sigma']:g}, {proven}",
        "ms an image",
    ]
    lines = []
    certificates = [] if certified is None else list(certified.rows)
    for row in _union(table, [result for _, result in adaptive], certificates):
        measured = None if table is None else next((each for each in table.rows if _same(each, row)), None)
        gray = ["", "", ""] if measured is None else _gray(measured)
        gray = [_link(each, given["table1"], docs) for each in gray] if any(gray) else gray
        found = [(file, least) for file, result, column in at if (least := _least(result, row, column)) is not None]
        if found and not any(gray):
            file, least = found[0]
            gray[0] = _link(_percent(least.clean), file, docs)
        attacked = ["", ""]
        if found:
            file, least = min(found, key=lambda each: each[1].cell.accuracy)
            attacked = [_link(_percent(least.cell), file, docs), f"{least.attacks}, n = {least.cell.n}".lstrip(", ")]
        proof = next((each for each in certificates if _denoises(each, row)), None)
        shown = None if proof is None or certified is None else proof.cells[certified.columns.index(str(proven))]
        share = _percent(shown)
        few = f" (n = {shown.n})" if shown is not None and certified is not None and shown.n < certified.facts["n"] else ""
        time = "" if measured is None or measured.seconds is None else results.format_seconds(1000 * measured.seconds)
        lines.append(
            [row.name + _fewer(table, measured), *gray, *attacked, _link(share, given.get("certify", ""), docs) + few, time]
        )
    return "\n".join([*tables.table(heading, lines), "", *_below(table, [result for _, result in adaptive], certified)])


def _read(path: Path) -> Result | None:
    return results.read(path) if path.exists() else None


def _adaptive_file(docs: Path, file: str = "", bound: str | None = None) -> tuple[Result | None, str]:
    """An adaptive result and the heading of its column at a bound; None and "" where there is none."""
    found = _read(docs / file) if file else None
    return found, "" if found is None else _column(found, bound)


def _column(result: Result, bound: str | None) -> str:
    """Heading of the column of a bound or radius; without one: of the first after the clean images."""
    if bound is None:
        return result.columns[1]
    names = (f"L∞ {bound}/255", f"L2 {bound}")
    found = next((column for column in result.columns if column in names or column.startswith(f"{names[1]} (")), None)
    if found is None:
        raise ValueError(f"expected a bound that {result.key} has, {', '.join(result.columns[1:])}; got {bound}")
    return found


def _row(result: Result, key: str) -> RowResult | None:
    """The first row of ``KEY`` or ``KEY:SETTING``: it stands at the published setting; ``none`` is no defense."""
    if key in WITHOUT_VIEWS:
        return next((row for row in result.rows if row.name == WITHOUT_VIEWS[key]), None)
    name, _, setting = key.rpartition(":")
    exact = next((row for row in result.rows if row.defense == key), None)
    named = (row for row in result.rows if row.setting is not None and row.defense == name)
    return exact or next((row for row in named if f"{row.setting:g}" == setting), None)


def _same(one: RowResult, other: RowResult) -> bool:
    """Whether two rows are of one defense at one setting."""
    return _identity(one) == _identity(other)


def _identity(row: RowResult) -> tuple[str, float | None]:
    """Key and setting, also where the key holds the setting; the name of a row without a defense."""
    return row.defense.removesuffix(f":{row.setting:g}") if row.setting is not None else row.defense or row.name, row.setting


def _denoises(certificate: RowResult, row: RowResult) -> bool:
    """Whether a certified denoiser is the one of a row, which has a setting of its own."""
    return certificate is row or (certificate.defense == "none" and row.name == NONE) or certificate.defense == row.defense


def _union(table: Result | None, adaptive: Iterable[Result], certificates: Sequence[RowResult]) -> list[RowResult]:
    """A row for each defense and setting of any of the results, in the order in which they first come."""
    found: list[RowResult] = []
    for row in [*(() if table is None else table.rows), *(row for result in adaptive for row in result.rows)]:
        if not row.error and not any(_same(row, each) for each in found):
            found.append(row)
    return found + [each for each in certificates if not any(_denoises(each, row) for row in found)]


def _least(result: Result, row: RowResult, column: str) -> Adaptive | None:
    """What the strongest of the attacks on a defense leaves of it; None where the result has none."""
    at = result.columns.index(column)
    found = [(cell, each) for each in result.rows if _same(each, row) and (cell := each.cells[at]) is not None]
    if not found:
        return None
    cell, least = min(found, key=lambda each: each[0].accuracy)
    attacks = " + ".join(attack.name for attack in cell.attacks) or least.name.partition(": ")[2]
    return Adaptive(cell, least.cells[0], least.notes.get(ATTACKS, attacks))


def _gray(row: RowResult) -> list[str]:
    clean, *attacked, mean = row.cells
    return [_percent(clean), _percent(mean), _percent(worst(attacked))]


def _fewer(table: Result | None, row: RowResult | None) -> str:
    """The number of images of a row that was measured on fewer than its table says."""
    if table is None or row is None or row.cells[0] is None or row.cells[0].n == table.facts["n"]:
        return ""
    return f" (n = {row.cells[0].n})"


def _percent(cell: Cell | None) -> str:
    return "" if cell is None else f"{100 * cell.accuracy:.1f}"


def _count(table: Result, attacked: Result | None, _: str) -> str:
    under_attack = "" if attacked is None else f", under adaptive attack {attacked.facts['n']} (randomised defenses by vote)"
    return f"n = {table.facts['n']}{under_attack}"


def _below(table: Result | None, adaptive: Sequence[Result], certified: Result | None) -> list[str]:
    """What the figures are of."""
    lines = []
    if table is not None:
        lines.append(
            f"Clean and gray-box: {table.facts['target']}; {table.facts['data']}; attacks: {', '.join(table.columns[1:-1])}. "
            "Milliseconds are those of the defense alone."
        )
    lines += dict.fromkeys(f"Adaptive: {each.facts['target']}; {each.facts['data']}." for each in adaptive)
    if certified is not None:
        lines.append(
            f"Certified: n = {certified.facts['n']} images, right or wrong; {certified.facts['draws counted']} draws. The row "
            "is the denoiser of that name in one view, at its setting for that noise."
        )
    return ["\n".join(f"- {line}" for line in lines)]


def _link(text: str, file: str, docs: Path) -> str:
    """Text, linked to the page that shows a result in full."""
    if not text:
        return ""
    page = next((page for page in sorted(docs.glob("*.md")) if f"<!-- table: {file} " in page.read_text("utf-8")), None)
    return text if page is None else f"[{text}]({page.name})"
