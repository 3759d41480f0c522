"""Accuracy of defenses against someone who knows them: docs/adversaries.md.

python -m benchmarks.adaptive --model flower.pt --data flower17/val --count 16 --out docs/data/adversaries

Budgets go upwards, and an image that is lost stays lost: its point lies within every larger bound. An attack is thrown at
those that stand and goes on where the one before it ended, unless two draws both have its point wrong. Then ``--judge`` fresh
draws vote on the worst point of each.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import GaussianBlur

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.baselines.compose import Compose
from oag_transform.baselines.filters import JPEG, GaussianNoise
from oag_transform.evaluation import adaptive, adaptive_checks
from oag_transform.evaluation.adaptive import APGD, PGD, Bound, Found, HopSkipJump, Square
from oag_transform.evaluation.data import image_folder
from oag_transform.evaluation.measure import Subject, choose_subject, hardware
from oag_transform.evaluation.results import Cell
from oag_transform.evaluation.store import Store
from oag_transform.evaluation.targets import Target, load_target
from oag_transform.evaluation.unrolled import unrolled

CPU = torch.device("cpu")
STD = 0.25  # of the noise that goes first, on the [0, 1] scale
EOT = 4  # draws for each exact gradient of exact-eot
QUICK = 2  # draws that tell whether another attack is worth its time
BLACK_BOX = ("square", "hopskipjump")


def after_noise(seed: int) -> nn.Module:
    """Noise, then ours set for it."""
    return Compose(GaussianNoise(255 * STD, seed=seed), OnlineAlternateGenerator.for_noise(STD, seed=seed))


@dataclass(frozen=True)
class Row:
    """A defense: ``make(seed)``, its views, and whether a draw differs from another."""

    make: Callable[[int], nn.Module]
    shift: int | None = None
    random: bool = True

    def model(self, target: nn.Module, seed: int) -> DefendedModel:
        """The target behind it."""
        return DefendedModel(target, self.make(seed), shift=self.shift)


ROWS: dict[str, Row] = {
    "none": Row(lambda _: nn.Identity(), shift=0, random=False),
    "none, four views": Row(lambda _: nn.Identity(), random=False),
    # what takes away detail and nothing else
    "blur 1, four views": Row(lambda _: GaussianBlur(9, 1.0), random=False),
    "blur 2, four views": Row(lambda _: GaussianBlur(13, 2.0), random=False),
    "noise 12, four views": Row(lambda seed: GaussianNoise(12, seed=seed)),
    "JPEG 25, four views": Row(lambda _: JPEG(25), random=False),
    "ours, four views": Row(lambda seed: OnlineAlternateGenerator(seed=seed)),
    "ours strength=1, four views": Row(lambda seed: OnlineAlternateGenerator(seed=seed, strength=1.0)),
    "noise 64": Row(lambda seed: GaussianNoise(255 * STD, seed=seed), shift=0),
    "noise 64, then ours": Row(after_noise, shift=0),
}


@dataclass(frozen=True)
class Part:
    """Some of the images: the tensors, and their places among all, which choose the random streams."""

    images: Tensor
    labels: Tensor
    places: tuple[int, ...]

    def stream(self, image: int, draw: int) -> int:
        """See :data:`~oag_transform.evaluation.adaptive.Streams`."""
        return adaptive.unknown(self.places[image], draw)


def attacks(options: argparse.Namespace, bound: Bound, row: Row, streams: adaptive.Streams) -> dict[str, Any]:
    """The attacks that are asked for: name -> what runs it on (model, images, labels, start)."""
    draws = options.draws if row.random or row.shift != 0 else 1  # of views, where nothing is random
    pgd = PGD(bound, options.steps, draws, streams=streams)
    by_margin = replace(pgd, loss=adaptive.margin)

    def through(attack: PGD, view: Callable[[DefendedModel], DefendedModel] = lambda model: model) -> Callable[..., Found]:
        turning = adaptive.in_turn if row.shift != 0 else lambda model: model
        return lambda model, *rest, **more: attack(turning(view(model)), *rest, **more)

    def fresh(attack: Any) -> Callable[..., Found]:
        return lambda model, *rest, **_: attack(model, *rest)  # these begin where they like

    every: dict[str, Any] = {
        "bare": fresh(
            lambda model, *rest: PGD(bound, options.steps, 1)(DefendedModel(model.target, nn.Identity(), shift=0), *rest)
        ),
        "noise": through(pgd, _noise_alone),
        "bpda": through(pgd),
        "margin": through(by_margin),
        "dlr": through(replace(pgd, loss=adaptive.dlr)),
        "restart": fresh(through(replace(by_margin, random_start=5))),
        "exact": through(replace(by_margin, steps=options.exact_steps), unrolled),
        "exact-eot": through(replace(by_margin, steps=options.expected_steps, draws=EOT if row.random else 1), unrolled),
        "expected": through(replace(by_margin, steps=options.expected_steps), partial(unrolled, expected=True)),
        "known": fresh(replace(pgd, draws=1, streams=adaptive.known)),
        "grey": fresh(through(replace(pgd, paint=adaptive.alike_in_channels))),
        "smooth": fresh(through(replace(pgd, paint=adaptive.Smoothly(8)))),
        "apgd": fresh(APGD(bound, options.apgd_steps, draws, streams=streams)),
        "apgd-dlr": fresh(APGD(bound, options.apgd_steps, draws, "dlr", streams=streams)),
        "apgd-t": fresh(APGD(bound, options.apgd_steps, draws, "dlr-targeted", streams=streams)),
        "square": fresh(Square(bound, options.queries, draws, streams=streams)),
        "hopskipjump": fresh(HopSkipJump(bound, 4, 40, streams=streams)),
    }
    return {name: every[name] for name in options.attacks}


def _noise_alone(model: DefendedModel) -> DefendedModel:
    """The target behind the noise alone: what its gradient finds is tried on whatever follows the noise."""
    defense = model.defense
    noise = defense.defenses[0] if isinstance(defense, Compose) else defense
    return DefendedModel(model.target, noise, shift=0, gradient="own")


class Run:
    """One row along the budgets of one norm; ``points`` are the worst images so far, ``standing`` who is not lost yet."""

    def __init__(self, options: argparse.Namespace, target: nn.Module, images: Tensor, labels: Tensor, name: str) -> None:
        self.options, self.row = options, ROWS[name]
        self.images, self.labels, self.points = images, labels, images.clone()
        self.defender, self.attacker = self.row.model(target, 1), self.row.model(target, 2)
        self.draws = options.judge if self.row.random else 1
        began = time.process_time()
        self.clean = self.judge(range(len(images)), images, self.draws, 1 << 31)
        self.seconds = (time.process_time() - began) / self.draws / len(images)
        self.rights, self.standing = self.clean.right.sum(0), self.clean.votes.clone()

    def parts(self, places: Sequence[int]) -> Iterator[Part]:
        """Images in batches that fit into memory."""
        for start in range(0, len(places), self.options.batch):
            some = list(places[start : start + self.options.batch])
            yield Part(self.images[some], self.labels[some], tuple(some))

    def judge(self, places: Sequence[int], points: Tensor, draws: int, first: int) -> adaptive_checks.Judgement:
        """Judge points (len(places), C, H, W) of the images in these places."""
        found, at = [], 0
        for part in self.parts(places):
            some = points[at : at + len(part.places)]
            found.append(adaptive_checks.judge(self.defender, some, part.labels, draws, first=first, at=part.stream))
            at += len(some)
        return adaptive_checks.Judgement(
            torch.cat([each.right for each in found], 1), torch.cat([each.votes for each in found])
        )

    def bound(self, bound: Bound) -> dict[str, Any]:
        """Attack those that stand; what is left of all."""
        options, at = self.options, self.standing.nonzero().flatten().tolist()[: self.options.most]
        rights = torch.full((len(self.images),), QUICK + 1)
        found: dict[str, Found] = {}
        each: dict[str, Any] = {}
        votes: dict[str, Cell] = {}
        for number, attack in enumerate(options.attacks):
            places = at if options.every else [place for place in at if rights[place] > 0]
            if not places:
                continue
            start = time.process_time()
            found[attack] = self.attack(bound, attack, number, places)
            seconds = (time.process_time() - start) / len(places)
            draws = (self.draws if options.every else QUICK) if self.row.random else 1
            judged = self.judge(places, found[attack].images, draws, (1 << 30) + number * 1000)
            votes[attack] = judged.majority
            each[attack] = {"attacked": places, "right": judged.right.sum(0).tolist(), "draws": draws}
            each[attack] |= {"vote": judged.majority.right, "cpu_seconds_an_image": round(seconds, 2)}
            if found[attack].losses.numel():
                each[attack]["loss"] = [round(value, 3) for value in found[attack].losses.mean(1).tolist()]
            print(f"  {bound} {attack}: {_short(judged.mean)} of {len(places)}, {seconds:.2f} s an image", flush=True)
            for i, place in enumerate(places):
                if judged.right[:, i].sum() <= rights[place]:
                    rights[place], self.points[place] = judged.right[:, i].sum(), found[attack].images[i]
        if at:  # the least of several noisy shares is too low: fresh draws for what was chosen
            final = self.judge(at, self.points[at], self.draws, 1 << 31)
            self.rights[at], self.standing[at] = final.right.sum(0), self.standing[at] & final.votes
        said = adaptive_checks.doubts(found, votes if options.every else {}, black_box=BLACK_BOX)
        return {"bound": str(bound), "eps": bound.eps} | self.left() | {"each": each, "doubts": said}

    def attack(self, bound: Bound, attack: str, number: int, places: Sequence[int]) -> Found:
        """One attack on the images in these places, from the points of a smaller bound or an earlier attack."""
        found = []
        for part in self.parts(places):
            start = self.points[list(part.places)]
            more = {} if self.options.every or start.equal(part.images) else {"start": start}

            def stream(image: int, draw: int, part: Part = part) -> int:
                return part.stream(image, draw + number * 100_000)  # no two attacks see the same draws

            carry_out = attacks(self.options, bound, self.row, stream)[attack]
            found.append(carry_out(self.attacker, part.images, part.labels, **more))
        losses, gradients = [each.losses for each in found], [each.gradients for each in found]
        return Found(torch.cat([each.images for each in found]), torch.cat(losses, 1), torch.cat(gradients))

    def left(self) -> dict[str, Any]:
        """Of all images: who stands, and how many draws of the last judgement each has right."""
        return {"vote": "".join("01"[int(each)] for each in self.standing), "right": self.rights.tolist(), "draws": self.draws}


def seed_known(options: argparse.Namespace, run: Run, bound: Bound) -> dict[str, Any]:
    """Another defender: one who draws the same numbers each time, which the attacker knows."""
    at = run.clean.votes.nonzero().flatten().tolist()[: options.most]
    rights = []
    for part in run.parts(at):
        attack = PGD(bound, options.steps, 1, streams=adaptive.known)
        found = attack(run.defender, part.images, part.labels)
        rights += adaptive_checks.judge(run.defender, found.images, part.labels, 1, at=adaptive.known).votes.tolist()
    return {"bound": str(bound), "attacked": at, "vote": "".join("01"[int(right)] for right in rights)}


def subject_of(model: str, data: Path, count: int, cache: Path) -> tuple[Target, Subject]:
    """A target, and the first photographs in seed 7's order that it has right."""
    listing = image_folder(data)
    target = load_target(model, None, classes=listing.classes, device=CPU)
    return target, choose_subject(target, listing, count, Store(cache, chunk=8, progress=False), 7, CPU)


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
    parser.add_argument("--attacks", nargs="+", default=["bpda", "margin"])
    parser.add_argument("--linf", type=float, nargs="*", default=[1, 2, 4, 6], help="in grey levels")
    parser.add_argument("--l2", type=float, nargs="*", default=[0.5, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--exact-steps", type=int, default=10)
    parser.add_argument("--expected-steps", type=int, default=10, help="of expected and exact-eot")
    parser.add_argument("--draws", type=int, default=2, help="of EOT")
    parser.add_argument("--judge", type=int, default=8, help="fresh draws that vote")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--apgd-steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=10, help="images attacked together")
    parser.add_argument(
        "--every", action="store_true", help="each attack on all that stand, from the images: to compare attacks"
    )
    parser.add_argument("--points", type=Path, help="keep the points here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target, subject = subject_of(options.model, options.data, options.count, options.out / "cache")
    images = subject.images.float() / 255
    norms = {"linf": [Bound("linf", eps / 255) for eps in options.linf], "l2": [Bound("l2", eps) for eps in options.l2]}
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "points", "data", "model", "rows")}
    facts = {"target": target.name, "size": list(images.shape[2:]), "n": len(images), "looked_at": subject.looked_at}
    facts |= {"hardware": hardware(CPU), "settings": settings}
    for name in options.rows:
        for norm, bounds in norms.items():
            if not bounds:
                continue
            run = Run(options, target.model, images, subject.labels, name)
            print(f"{name}: clean {_short(run.clean.majority)}, {run.seconds:.2f} s of CPU", flush=True)
            cells: list[Any] = [{"bound": "clean", "eps": 0.0} | run.left()]
            result = {"row": name, "code": repr(run.defender.defense), "defense_seconds": round(run.seconds, 3), "cells": cells}
            stem = f"{options.name}-{name}-{norm}".replace(", ", "-").replace(" ", "-").replace("=", "-").lower()
            for bound in bounds:
                if options.attacks == ["known"]:
                    cells.append(seed_known(options, run, bound))
                else:
                    cells.append(run.bound(bound))
                print(f"  {bound}: {cells[-1]['vote']}", *cells[-1].get("doubts", ()), sep="\n    ", flush=True)
                (options.out / f"{stem}.json").write_text(json.dumps(result | facts) + "\n")
            if options.points is not None:
                options.points.mkdir(parents=True, exist_ok=True)
                torch.save(run.points, options.points / f"{stem}.pt")


if __name__ == "__main__":
    main()
