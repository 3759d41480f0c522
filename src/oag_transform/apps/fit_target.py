"""``oag-transform fit-target``: a classifier of a folder of photographs, to evaluate defenses with."""

import argparse
import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import photographs, process

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    from torch import nn

    from ..evaluation.data import Listing, Preprocessing

HELP = "fit a classifier to a folder of images"
EXTRA: str | None = "eval"

APGD_COUNT, APGD_STEPS, APGD_RESTARTS = 100, 50, 1  # some two minutes on a core


@dataclass(frozen=True)
class FitTargetOptions:
    """What ``oag-transform fit-target`` is asked for; :func:`add_arguments` says what each means."""

    out: Path
    photographs: photographs.Photographs
    backbone: str
    weights: str | None
    size: int | None
    epochs: int
    lr: float
    adversarial: float | None
    adversarial_steps: int
    report: str | None
    compute_dtype: str | None
    device: str
    batch_size: int

    def __post_init__(self) -> None:
        from .. import _checks  # with torch

        if self.out.suffix not in (".pt", ".pth"):
            raise ValueError(f"--out must end in .pt, as --model knows such a file by it, got {self.out}")
        _checks.integer("--epochs", self.epochs)
        _checks.integer("--batch-size", self.batch_size, at_least=1)
        _checks.number("--lr", self.lr, above=0)
        if self.size is not None:
            _checks.integer("--size", self.size, at_least=1)
        if self.adversarial is not None and _checks.number("--adversarial", self.adversarial, above=0) > 255:
            raise ValueError(f"--adversarial is in grey levels, at most 255, got {self.adversarial:g}")
        if _checks.integer("--adversarial-steps", self.adversarial_steps, at_least=1) > 1 and self.adversarial is None:
            raise ValueError("--adversarial-steps needs --adversarial EPS")
        if self.adversarial is not None and self.report is not None and importlib.util.find_spec("pyautoattack") is None:
            raise ValueError("--report of an adversarially trained classifier needs pip install 'oag-transform[adaptive]'")

    @classmethod
    def of(cls, options: argparse.Namespace) -> "FitTargetOptions":
        """Those of a command line.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"photographs"}
        found = photographs.Photographs.of(options)
        return cls(photographs=found, **{name: getattr(options, name) for name in names})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Fit a linear layer to a frozen backbone where that has weights, and train all of it for --epochs if that is above 0; "
        "adversarially with --adversarial. Prints the accuracy on the images that it was fitted to."
    )
    parser.add_argument("--out", type=Path, required=True, help="FILE.pt to write")
    parser.add_argument("--backbone", default="efficientnet-lite0", help="or resnet18, vgg11, ... (default: %(default)s)")
    parser.add_argument(
        "--weights", help="of a torchvision backbone: DEFAULT, a name; none at all is a random start, which needs --epochs"
    )
    parser.add_argument(
        "--size", type=int, help="crop in pixels, of what is resized to 8/7 of it (default: the backbone's own of both)"
    )
    parser.add_argument("--epochs", type=int, default=0, help="of training all layers (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="of training all layers (default: %(default)s)")
    parser.add_argument(
        "--adversarial",
        type=float,
        metavar="EPS",
        help="train all layers on adversarial examples, L-infinity, in grey levels of 255, such as 4; needs --epochs",
    )
    parser.add_argument(
        "--adversarial-steps",
        type=int,
        default=1,
        metavar="N",
        help="1: FGSM from a random start (fast adversarial training), which may fool that step alone; more: PGD, which takes "
        "more time in proportion (default: %(default)s)",
    )
    parser.add_argument(
        "--report",
        metavar="HELD_OUT",
        help="also print the accuracy on other photographs, a folder like --data or with flower17 a split such as tst1; "
        "with --adversarial that under APGD, too",
    )
    parser.add_argument(
        "--compute-dtype", choices=["bfloat16"], help="mixed precision in training all layers (default: float32)"
    )
    photographs.add_arguments(parser)
    photographs.add_device(parser, 32)


def run(options: argparse.Namespace) -> int:
    """Fit a classifier and write it; returns 0.

    Raises:
        ValueError: an argument is wrong; nothing was written.
    """
    asked = FitTargetOptions.of(options)
    process.log_to_stderr()
    # torch, for a command that runs
    import torch

    from ..evaluation.fitting import AdversarialExamples, clean_accuracy, fit_target
    from ..evaluation.targets import save_target

    photographs.check_output(asked.out)
    listing = asked.photographs.listing()
    others = None if asked.report is None else _held_out(asked.photographs, asked.report).listing()
    if others is not None and others.classes != listing.classes:
        raise ValueError(f"--report has the classes {list(others.classes)}, but --data has {list(listing.classes)}")
    model, preprocessing = fit_target(
        listing,
        asked.backbone,
        asked.weights,
        size=asked.size,
        epochs=asked.epochs,
        lr=asked.lr,
        batch_size=asked.batch_size,
        adversarial=None if asked.adversarial is None else AdversarialExamples(asked.adversarial, asked.adversarial_steps),
        compute_dtype=None if asked.compute_dtype is None else getattr(torch, asked.compute_dtype),
        seed=asked.photographs.seed,
        device=photographs.find_device(asked.device),
        progress=sys.stderr.isatty(),
    )
    save_target(
        asked.out,
        model,
        preprocessing,
        backbone=asked.backbone,
        classes=listing.classes,
        adversarial_eps=asked.adversarial,
    )
    right = clean_accuracy(model, listing, preprocessing)
    print(
        f"wrote {asked.out}: {asked.backbone} with {len(listing.classes)} classes, {preprocessing.crop} pixels, fitted to "
        f"{right.n} images, of which it gets {100 * right.accuracy:.1f}% right",
        flush=True,
    )
    if others is not None:
        _report(model, others, preprocessing, asked.adversarial)
    return 0


def _held_out(given: photographs.Photographs, report: str) -> photographs.Photographs:
    """The photographs of ``--report``: of the same layout."""
    if given.layout == "flower17":
        return dataclasses.replace(given, split=report)
    return dataclasses.replace(given, data=Path(report))


def _report(model: "nn.Module", listing: "Listing", preprocessing: "Preprocessing", eps: float | None) -> None:
    """Print the accuracy on held-out photographs, and that under attack at ``eps`` grey levels, with 95% intervals."""
    from ..evaluation.fitting import clean_accuracy, robust_accuracy  # with torch

    found = {"as they are": clean_accuracy(model, listing, preprocessing)}
    if eps is not None:
        heading = f"under APGD-CE, L-infinity {eps:g}/255, {APGD_STEPS} steps, {APGD_RESTARTS} start"
        found[heading] = robust_accuracy(
            model, listing, preprocessing, eps, count=APGD_COUNT, steps=APGD_STEPS, restarts=APGD_RESTARTS
        )
    for how, cell in found.items():
        low, high = cell.interval
        print(f"held out, {how}: {100 * cell.accuracy:.1f}% [{100 * low:.0f}, {100 * high:.0f}] of {cell.n} images")
