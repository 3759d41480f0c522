"""Markdown tables of what ``benchmarks.adaptive`` found, for ``benchmarks.docs``."""

import json
from pathlib import Path
from typing import Any

from benchmarks.adaptive import EOT
from oag_transform.evaluation.render import figures
from oag_transform.evaluation.results import Cell


def table(paths: list[Path]) -> str:
    """A line for each row: images that the vote has right, clean and at each budget, and the accuracy of one draw.

    Runs of the same row on the same images have one line more: for each image the worst of them.
    """
    rows = [_read(path) for path in paths]
    budgets = sorted({(cell["eps"], cell["bound"]) for row in rows for cell in row["cells"]})
    names = [bound if bound == "clean" else _short(bound) for _, bound in budgets]
    lines = [
        line(["Right by vote [95%], one draw, in each draw", *names, "gradients, and s an image", "defense and target: s"])
    ]
    lines += ["|" + "---|" * (len(budgets) + 3)]
    for row in rows:
        cells = {cell["eps"]: cell for cell in row["cells"]}
        each = row["cells"][1]["each"]
        cost = sum(attack["cpu_seconds_an_image"] for attack in each.values())
        gradients = [_gradients(name, attack, row["settings"]["draws"]) for name, attack in each.items()]
        took = f"{' + '.join(gradients)}, {cost:.1f}"
        budgeted = [_cell(cells, eps) for eps, _ in budgets]
        lines.append(line([row["row"], *budgeted, took, f"{row['defense_seconds']:.2f}"]))
        same = [other for other in rows if other["row"] == row["row"]]
        if len(same) > 1 and row is same[-1]:
            left = _worst(same)
            worst = [interval(left[eps]) if eps in left else "" for eps, _ in budgets]
            lines.append(line([f"**{row['row']}: worst for each image**", *worst, "", ""]))
    attacked = [cell for row in rows for cell in row["cells"] if cell.get("each")]
    doubted = sum(bool(cell["doubts"]) for cell in attacked)
    unfinished = (
        f"In {doubted} of {len(attacked)} attacked cells an attack says itself that it had not finished, or didn't work."
    )
    return "\n".join([*lines, "", f"{_facts(rows[0])} {unfinished}"])


def _gradients(name: str, attack: dict[str, Any], draws: int) -> str:
    """An attack and how many gradients of one draw it took; of a library's that isn't known."""
    draws = EOT if name == "exact-eot" else draws
    return f"{name} {len(attack['loss']) * draws}" if "loss" in attack else name


def _worst(rows: list[Any]) -> dict[float, Cell]:
    """Images that stand in every one of some runs at the bounds of any: what is lost at one bound is lost at larger ones."""
    found = {}
    for eps in sorted({cell["eps"] for row in rows for cell in row["cells"]}):
        votes = [cell["vote"] for row in rows for cell in row["cells"] if cell["eps"] <= eps]
        found[eps] = Cell("".join(map(min, zip(*votes, strict=True))))
    return found


def draw(paths: list[Path]) -> None:
    """Images that the vote has right against the bound, a line for each row; beside the data, see :func:`figure`."""
    rows = [_read(path) for path in paths]
    in_l2 = paths[0].stem.endswith("-l2")
    scale, xlabel = (1, "L2 bound, on the [0, 1] scale") if in_l2 else (255, "L-infinity bound in grey levels (of 255)")
    series = []
    for name in dict.fromkeys(row["row"] for row in rows):
        left = _worst([row for row in rows if row["row"] == name])
        series.append(figures.Series(name, [scale * eps for eps in left], list(left.values())))
    figures.lines(figure(paths), series, xlabel=xlabel, ylabel="right by vote (%)")


def figure(paths: list[Path]) -> Path:
    """Where the figure of some rows is: the ``--name`` and the norm of the first, beside its data."""
    return paths[0].with_name(f"{_read(paths[0])['settings']['name']}-{paths[0].stem.rpartition('-')[2]}.svg")


def attacks(paths: list[Path]) -> str:
    """A line for each attack of runs that threw each at the same images: those it leaves right."""
    rows = [_read(path) for path in paths]
    lines = [line(["Defense", "bound", "attack", "right by vote [95%]", "one draw", "loss, first and last", "CPU s an image"])]
    lines.append("|" + "---|" * 7)
    for row in rows:
        for cell in row["cells"][1:]:
            for name, each in cell["each"].items():
                vote = Cell(each["vote"])
                share = sum(each["right"]) / each["draws"] / vote.n
                loss = f"{each['loss'][0]:.2f}, {each['loss'][-1]:.2f}" if each.get("loss") else ""
                took = f"{each['cpu_seconds_an_image']:.1f}"
                bound = _short(cell["bound"])
                lines.append(line([row["row"], bound, name, interval(vote), f"{share:.2f}", loss, took]))
            votes = [dict(zip(each["attacked"], each["vote"], strict=True)) for each in cell["each"].values()]
            worst = Cell("".join(min(vote.get(place, "1") for vote in votes) for place in votes[0]))
            lines.append(line([row["row"], _short(cell["bound"]), "**worst for each image**", interval(worst), "", "", ""]))
    doubts = [
        f"- {row['row']}, {_short(cell['bound'])}: {each}"
        for row in rows
        for cell in row["cells"][1:]
        for each in cell["doubts"]
    ]
    said = ["", "What the attacks doubt of themselves:", "", *doubts] if doubts else []
    return "\n".join([*lines, "", _facts(rows[0]), *said])


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _cell(cells: dict[float, Any], eps: float) -> str:
    if eps not in cells:
        lost = [at for at, cell in cells.items() if "1" not in cell["vote"] and at < eps]
        return "0, as before" if lost else ""
    cell = cells[eps]
    if cell["draws"] == 1:
        return interval(Cell(cell["vote"]))
    share = sum(cell["right"]) / cell["draws"] / len(cell["right"])
    every = sum(right == cell["draws"] for right in cell["right"])
    return f"{interval(Cell(cell['vote']))}, {share:.2f}, {every}"


def interval(cell: Cell) -> str:
    """How many are right, of how many, and the 95% interval."""
    low, high = cell.interval
    return f"{cell.correct}/{cell.n} [{low:.2f}, {high:.2f}]"


def _short(bound: str) -> str:
    norm, size = bound.rsplit(" ", 1)
    return f"{'L∞' if norm == 'L-infinity' else norm} {size}"


def _facts(row: dict[str, Any]) -> str:
    height, width = row["size"]
    return (
        f"{row['n']} photographs of {height} x {width} pixels that the bare target ({row['target']}) has right, the first in "
        f"seed 7's order; {row['hardware']}, shared with other work."
    )


def line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
