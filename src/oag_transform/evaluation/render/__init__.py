"""How results are shown: figures, CSV, Markdown and a report, all from what a result's JSON and its images hold."""

from pathlib import Path

from ..result import Result, put
from .draw import draw_figures
from .tables import to_csv, to_markdown


def render(result: Result, folder: Path) -> None:
    """Draw a result's figures and write ``key.csv`` and ``key.md``, beside its JSON and images in ``folder``."""
    draw_figures(result, folder)
    put(folder / f"{result.key}.csv", to_csv(result))
    put(folder / f"{result.key}.md", to_markdown(result))
