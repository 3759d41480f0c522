"""Whether an attack has converged: what it leaves of a defense along its steps, and along the draws of each gradient (EOT).

python -m benchmarks.convergence --model flower.pt --data flower17/val --row "ours, four views" --linf 1 --out FILE.json

Each point of a curve is an attack of its own, from the images: PGD on the CW margin with the identity for the defense's
derivative. Fresh draws judge what it found. Beside it stands the agreement of the gradients of two sets of so many draws.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adaptive import CPU, ROWS, subject_of
from benchmarks.adversaries import interval, line
from oag_transform import DefendedModel
from oag_transform.evaluation import adaptive, adaptive_checks
from oag_transform.evaluation.adaptive import PGD, Bound
from oag_transform.evaluation.measure import hardware
from oag_transform.evaluation.render import figures
from oag_transform.evaluation.results import Cell

STEPS = (5, 10, 20, 50, 100)  # of one draw each
DRAWS = (1, 2, 4, 8, 16, 32)  # for each gradient
CURVES = {"steps": "gradients, of one draw each", "draws": "draws for each gradient (k of EOT)"}


def measure(
    attacker: DefendedModel, defender: DefendedModel, attack: PGD, images: Tensor, labels: Tensor, judges: int
) -> dict[str, Any]:
    """What an attack leaves: who is right by vote, of how many draws, and the mean margin, which the attacker wants above 0."""
    start = time.process_time()
    found = attack(adaptive.in_turn(attacker), images, labels)
    seconds = (time.process_time() - start) / len(images)
    judged = adaptive_checks.judge(defender, found.images, labels, judges)
    margins = []
    for draw in range(judges):
        with torch.no_grad():
            streams = [adaptive.unknown(i, (1 << 31) + draw) for i in range(len(images))]
            margins.append(adaptive.margin(defender(found.images, index=streams).log_softmax(1), labels))
    agreed = adaptive_checks.agreement(attacker, found.images, labels, adaptive.margin, attack.draws)
    return {
        "steps": attack.steps,
        "draws": attack.draws,
        "vote": judged.majority.right,
        "one_draw": round(judged.mean.accuracy, 4),
        "margin": round(float(torch.stack(margins).mean()), 3),
        "agreement": round(float(agreed.mean()), 3),
        "cpu_seconds_an_image": round(seconds, 2),
    }


def table(path: Path) -> str:
    """Both curves of a run as a Markdown table."""
    run = json.loads(path.read_text(encoding="utf-8"))
    header = ["Gradients", "draws each", "right by vote [95%]", "one draw", "mean margin", "agreement", "CPU s an image"]
    lines = [line(header), "|" + "---|" * len(header)]
    for curve in CURVES:
        for point in run[curve]:
            numbers = [f"{point['one_draw']:.2f}", f"{point['margin']:.2f}", f"{point['agreement']:.2f}"]
            took = f"{point['cpu_seconds_an_image']:.1f}"
            lines.append(line([str(point["steps"]), str(point["draws"]), interval(Cell(point["vote"])), *numbers, took]))
    height, width = run["size"]
    about = (
        f"{run['row']}, {run['bound']}: {run['n']} photographs of {height} x {width} pixels that the bare target "
        f"({run['target']}) has right, the first in seed 7's order; a vote of {run['judge']}; {run['hardware']}, shared with "
        "other work."
    )
    return "\n".join([*lines, "", about])


def draw(path: Path) -> None:
    """A figure for each curve, beside the data: STEM-steps.svg and STEM-draws.svg."""
    run = json.loads(path.read_text(encoding="utf-8"))
    for curve, label in CURVES.items():
        cells = [Cell(point["vote"]) for point in run[curve]]
        series = figures.Series(run["row"], [point[curve] for point in run[curve]], cells)
        figures.lines(path.with_name(f"{path.stem}-{curve}.svg"), [series], xlabel=label, ylabel="right by vote (%)")


def main() -> None:
    """Attack along steps and draws, and write the JSON after each point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as of oag-transform evaluate")
    parser.add_argument("--data", type=Path, required=True, help="a folder of folders of photographs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--row", default="ours, four views", choices=list(ROWS))
    parser.add_argument("--linf", type=float, default=1.0, help="bound, in grey levels")
    parser.add_argument("--count", type=int, default=12, help="photographs that the target gets right")
    parser.add_argument("--eot-steps", type=int, default=20, help="gradients along the draws")
    parser.add_argument("--judge", type=int, default=5, help="fresh draws that vote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target, subject = subject_of(options.model, options.data, options.count, options.out.parent / "cache")
    images, row, bound = subject.images.float() / 255, ROWS[options.row], Bound("linf", options.linf / 255)
    run: dict[str, Any] = {"row": options.row, "bound": str(bound), "target": target.name, "size": list(images.shape[2:])}
    run |= {"n": len(images), "judge": options.judge, "hardware": hardware(CPU), "steps": [], "draws": []}
    plan = [("steps", steps, 1) for steps in STEPS] + [("draws", options.eot_steps, draws) for draws in DRAWS]
    attacker, defender = row.model(target.model, 2), row.model(target.model, 1)
    for curve, steps, draws in plan:
        attack = PGD(bound, steps, draws, loss=adaptive.margin)
        run[curve].append(measure(attacker, defender, attack, images, subject.labels, options.judge))
        print(curve, run[curve][-1], flush=True)
        options.out.write_text(json.dumps(run) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
