"""The report: everything that was measured as one HTML file, which needs nothing beside it."""

import base64
import json
import logging
import mimetypes
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from .. import result as results
from ..options import EXPERIMENTS
from ..result import Cell, Result, format_seconds
from .tables import diagnostics, headings, most_images, note_headings

logger = logging.getLogger(__name__)

_FIRST = ("table1", "tradeoff")  # what a reader looks for, then the order of the experiments
_SUMMARY = {"target": "Target", "data": "Images", "n": "Number of images", "hardware": "Hardware"}


class _Section(NamedTuple):
    """A result, and what its table needs: the largest number of images of each column, and the accuracy that is bold there."""

    anchor: str
    result: Result
    headings: list[str]
    notes: list[str]
    most: list[int]
    best: list[float | None]
    recommendation: str
    diagnostics: list[str]
    facts: list[tuple[str, str]]


def find_results(folder: Path) -> list[Result]:
    """Every result that :func:`oag_transform.evaluation.result.write` left in a folder, in the order of the report.

    JSON files that hold no result are passed over. A broken one is left out, with a warning in the log.

    Raises:
        ValueError: no result in the folder.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            if _claims_to_be_a_result(path):
                found.append(results.read(path))
        except ValueError as error:  # the report shows the others
            logger.warning("left out of the report: %s", error)
    if not found:
        raise ValueError(f"expected results of oag-transform evaluate (such as table1.json) in {folder}, found none")
    return sorted(found, key=lambda result: (_place(result.key), result.key))


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into ``folder``, over every result that is there.

    Figures and images are embedded; one whose file is missing is named in its place. Text is shown as it is, never as
    HTML.

    Args:
        folder: holds ``key.json`` files, and the figures that they name.

    Raises:
        ValueError: see :func:`find_results`.
    """
    found = find_results(folder)

    def embedded(file: str) -> str:
        return _data_uri(folder, file)

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"seconds": format_seconds, "embedded": embedded}
    path = folder / "report.html"
    html = page.from_string(_packaged("report.html.jinja")).render(
        style=Markup(_packaged("report.css")),
        script=Markup(_packaged("report.js")),
        summary=_summary(found),
        sections=[_section(result) for result in found],
        embedded=embedded,
    )
    results.put(path, html.lstrip())
    return path


def _packaged(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _claims_to_be_a_result(path: Path) -> bool:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON") from error
    return isinstance(plain, dict) and {"rows", "columns"} <= plain.keys()


def _place(key: str) -> int:
    order = dict.fromkeys([*_FIRST, *(experiment.key for experiment in EXPERIMENTS)])
    return next((i for i, start in enumerate(order) if re.match(rf"{start}(?!\d)", key)), len(order))


def _section(result: Result) -> _Section:
    anchor = "result-" + re.sub(r"[^A-Za-z0-9_-]", "-", result.key)
    facts = [(name, _text(value)) for name, value in result.facts.items() if name != "recommendation"]
    recommendation = _text(result.facts.get("recommendation", ""))
    said = [f"{row.name}, {column}: {each}" for row, column, each in diagnostics(result)]
    measured = [row for row in result.rows if not row.error]
    most = most_images(measured, len(result.columns))
    best = [_best([row.cells[i] for row in measured], n) for i, n in enumerate(most)]
    return _Section(anchor, result, headings(result), note_headings(result), most, best, recommendation, said, facts)


def _summary(found: Sequence[Result]) -> list[tuple[str, str]]:
    items = []
    for name, heading in _SUMMARY.items():
        values = dict.fromkeys(_text(result.facts[name]) for result in found if name in result.facts)
        if values:
            items.append((heading, "; ".join(values)))
    return items


def _best(column: Sequence[Cell | None], n: int) -> float | None:
    """The highest accuracy of those measured on all images; None where there is nothing to compare."""
    full = [cell.accuracy for cell in column if cell is not None and cell.n == n]
    return max(full) if len(full) > 1 else None


def _data_uri(folder: Path, file: str) -> str:
    """An image beside the results as a data URI; empty where it isn't one, or lies elsewhere."""
    path = (folder / file).resolve()
    media = mimetypes.guess_type(path.name)[0] or ""
    if not (path.is_relative_to(folder.resolve()) and path.is_file() and media.startswith("image/")):
        return ""
    return f"data:{media};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part) for part in value)
    return str(value)
