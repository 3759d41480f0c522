"""Accuracy of defenses against someone who knows them: docs/adversaries.md.

python -m benchmarks.adaptive --model flower.pt --data flower17/val --count 16 --out docs/data/adversaries

Budgets go upwards, and an image that is lost stays lost: its point lies within every larger bound. Each attack is thrown at
those that stand, and an image stands where a vote of ``--judge`` fresh draws has it right at the points of all attacks.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.defended import SHIFT
from oag_transform.defenses.filters import JPEG, GaussianNoise
from oag_transform.evaluation import adaptive, adaptive_checks
from oag_transform.evaluation.adaptive import APGD, PGD, Bound, Found, HopSkipJump, InTurn, Square
from oag_transform.evaluation.data import image_folder
from oag_transform.evaluation.measure import choose_subject, hardware
from oag_transform.evaluation.results import Cell
from oag_transform.evaluation.store import Store
from oag_transform.evaluation.targets import load_target

CPU = torch.device("cpu")
STD = 0.25  # of the noise that goes first, on the [0, 1] scale


def ours(seed: int, **settings: Any) -> nn.Module:
    """Our transform, in bfloat16."""
    return OnlineAlternateGenerator(seed=seed, compute_dtype=torch.bfloat16, **settings)


def after_noise(seed: int, scale: float) -> nn.Module:
    """Noise, then ours set for it: the threshold is two standard deviations of the noise."""
    return InTurn(GaussianNoise(255 * STD, seed=seed), ours(seed, strength=1.0, scale=scale, threshold=2 * 255 * STD / scale))


@dataclass(frozen=True)
class Row:
    """A defense: ``make(seed, scale)``, its views, and whether a draw differs from another."""

    make: Callable[[int, float], nn.Module]
    shift: int = SHIFT
    random: bool = True

    def model(self, target: nn.Module, seed: int, scale: float) -> DefendedModel:
        """The target behind it."""
        return DefendedModel(target, self.make(seed, scale), shift=self.shift)


ROWS: dict[str, Row] = {
    "none": Row(lambda *_: nn.Identity(), shift=0, random=False),
    "none, four views": Row(lambda *_: nn.Identity(), random=False),
    "noise 12, four views": Row(lambda seed, _: GaussianNoise(12, seed=seed)),
    "JPEG 25, four views": Row(lambda *_: JPEG(25), random=False),
    "ours, four views": Row(lambda seed, _: ours(seed)),
    "ours strength=1, four views": Row(lambda seed, _: ours(seed, strength=1.0)),
    "noise 64": Row(lambda seed, _: GaussianNoise(255 * STD, seed=seed), shift=0),
    "noise 64, then ours": Row(after_noise, shift=0),
}


def attacks(options: argparse.Namespace, bound: Bound, row: Row) -> dict[str, Any]:
    """The attacks that are asked for: name -> what runs it on (model, images, labels, start)."""
    draws = options.draws if row.random or row.shift else 1  # of views, where nothing is random
    pgd = PGD(bound, options.steps, draws)

    def through_views(attack: PGD) -> Callable[..., Found]:
        return lambda model, *rest, **more: attack(adaptive.in_turn(model), *rest, **more)

    known = PGD(bound, options.steps, 1, streams=adaptive.known)
    every: dict[str, Any] = {
        "bare": lambda model, *rest, **more: PGD(bound, options.steps, 1)(
            DefendedModel(model.target, nn.Identity(), shift=0), *rest
        ),
        "noise": lambda model, *rest, **more: PGD(bound, options.steps, draws)(_noise_alone(model), *rest),
        "bpda": through_views(pgd) if row.shift else pgd,
        "exact": lambda model, *rest, **more: PGD(bound, options.exact_steps, draws)(adaptive.unrolled(model), *rest, **more),
        "margin": lambda model, *rest, **more: PGD(bound, options.steps, draws, loss=adaptive.margin)(model, *rest, **more),
        "known": lambda model, *rest, **more: known(model, *rest),
        "grey": lambda model, *rest, **more: PGD(bound, options.steps, draws, paint=adaptive.alike_in_channels)(model, *rest),
        "smooth": lambda model, *rest, **more: PGD(bound, options.steps, draws, paint=adaptive.Smoothly(8))(model, *rest),
        "apgd": lambda model, *rest, **more: APGD(bound, options.steps, draws)(model, *rest),
        "apgd-t": lambda model, *rest, **more: APGD(bound, options.steps, draws, "dlr-targeted")(model, *rest),
        "square": lambda model, *rest, **more: Square(bound, options.queries, draws)(model, *rest),
        "hopskipjump": lambda model, *rest, **more: HopSkipJump(bound, 4, 40)(model, *rest),
    }
    return {name: every[name] for name in options.attacks}


def _noise_alone(model: DefendedModel) -> DefendedModel:
    """The target behind the noise alone: what its gradient finds is tried on whatever follows the noise."""
    defense = model.defense
    noise = defense.defenses[0] if isinstance(defense, InTurn) else defense
    return DefendedModel(model.target, noise, shift=0, gradient="own")


def run(options: argparse.Namespace, target: nn.Module, images: Tensor, labels: Tensor, name: str, bounds: list[Bound]) -> Any:
    """One row along the budgets of one norm."""
    row = ROWS[name]
    defender, attacker = row.model(target, 1, options.scale), row.model(target, 2, options.scale)
    draws = options.judge if row.random else 1
    began = time.process_time()
    clean = adaptive_checks.judge(defender, images, labels, draws)
    seconds = (time.process_time() - began) / draws / len(images)
    shares, standing = clean.shares.clone(), clean.votes.clone()
    latest = images.clone()
    cells: list[Any] = [{"bound": "clean"} | _plain(clean)]
    print(f"{name}: clean {_short(clean.mean)} one draw, {_short(clean.majority)} vote, {seconds:.2f} s", flush=True)
    for bound in bounds:
        at = standing.nonzero().flatten()
        at = at[: options.most]
        found: dict[str, Found] = {}
        votes: dict[str, Cell] = {}
        costs: dict[str, float] = {}
        doubts: tuple[str, ...] = ()
        if len(at):
            for attack, carry_out in attacks(options, bound, row).items():
                start = time.process_time()
                better = {} if torch.equal(latest[at], images[at]) else {"start": latest[at]}
                fixed = attack == "known"  # then the defender is another: one who draws the same numbers each time
                found[attack] = carry_out(defender if fixed else attacker, images[at], labels[at], **better)
                judged = (
                    adaptive_checks.judge(defender, found[attack].images, labels[at], 1, at=adaptive.known)
                    if fixed
                    else adaptive_checks.judge(defender, found[attack].images, labels[at], draws, first=1 << 30)
                )
                votes[attack] = judged.majority
                costs[attack] = round((time.process_time() - start) / len(at), 2)
                loss = found[attack].losses.mean(1).tolist()
                print(
                    f"  {bound} {attack}: {_short(judged.mean)} | {_short(judged.majority)}  loss {loss[:1]} {loss[-1:]}",
                    flush=True,
                )
                if fixed:
                    continue
                standing[at] &= judged.votes
                fewer = judged.shares < shares[at]
                latest[at[fewer]] = found[attack].images[fewer]
                shares[at] = torch.minimum(shares[at], judged.shares)
            doubts = adaptive_checks.doubts(found, votes, black_box=("square", "hopskipjump"))
            # the least of several noisy shares is too low: fresh draws for what was chosen
            final = adaptive_checks.judge(defender, latest[at], labels[at], draws)
            shares[at], standing[at] = final.shares, standing[at] & final.votes
        vote = Cell("".join("01"[int(each)] for each in standing))
        cell = {
            "bound": str(bound),
            "attacked": at.tolist(),
            "vote": vote.right,
            "mean": round(float(shares.mean()), 3),
            "worst": "".join("01"[int(each == 1)] for each in shares),
            "each": {attack: votes[attack].right for attack in votes},
            "cpu_seconds_an_image": costs,
            "loss": {
                attack: [round(v, 3) for v in each.losses.mean(1).tolist()]
                for attack, each in found.items()
                if each.losses.numel()
            },
            "doubts": doubts,
        }
        cells.append(cell)
        print(f"  {bound}: mean {cell['mean']}, vote {_short(vote)}", *doubts, sep="\n    ", flush=True)
    return {"row": name, "code": repr(defender.defense), "defense_seconds": round(seconds, 3), "cells": cells}, latest


def _plain(judged: adaptive_checks.Judgement) -> dict[str, Any]:
    return {"vote": judged.majority.right, "mean": round(judged.mean.accuracy, 3), "worst": judged.worst.right}


def _short(cell: Cell) -> str:
    low, high = cell.interval
    return f"{cell.accuracy:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Run rows and write a JSON file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as of oag-transform evaluate")
    parser.add_argument("--data", type=Path, required=True, help="a folder of folders of photographs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True, help="stem of the JSON files")
    parser.add_argument("--count", type=int, default=32, help="photographs that the target gets right")
    parser.add_argument("--most", type=int, default=1000, help="attack so many of those that stand")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--attacks", nargs="+", default=["bare", "bpda"])
    parser.add_argument("--linf", type=float, nargs="*", default=[1, 2, 4, 6], help="in grey levels")
    parser.add_argument("--l2", type=float, nargs="*", default=[0.5, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--exact-steps", type=int, default=10)
    parser.add_argument("--draws", type=int, default=2, help="of EOT")
    parser.add_argument("--judge", type=int, default=8, help="fresh draws that vote")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--scale", type=float, default=6.5, help="of ours after noise")
    parser.add_argument("--points", type=Path, help="keep the points here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    listing = image_folder(options.data)
    target = load_target(options.model, None, classes=listing.classes, device=CPU)
    subject = choose_subject(target, listing, options.count, Store(options.out / "cache", chunk=8, progress=False), 7, CPU)
    images = subject.images.float() / 255
    norms = {"linf": [Bound("linf", eps / 255) for eps in options.linf], "l2": [Bound("l2", eps) for eps in options.l2]}
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "points", "data", "model", "rows")}
    for name in options.rows:
        for norm, bounds in norms.items():
            if not bounds:
                continue
            result, points = run(options, target.model, images, subject.labels, name, bounds)
            stem = f"{options.name}-{name}-{norm}".replace(", ", "-").replace(" ", "-").replace("=", "-").lower()
            facts = {"n": len(images), "looked_at": subject.looked_at, "hardware": hardware(CPU), "settings": settings}
            (options.out / f"{stem}.json").write_text(json.dumps(result | facts, indent=1) + "\n")
            if options.points is not None:
                options.points.mkdir(parents=True, exist_ok=True)
                torch.save(points, options.points / f"{stem}.pt")


if __name__ == "__main__":
    main()
