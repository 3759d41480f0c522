"""``oag-transform fit-target``: a classifier of a folder of photographs, to evaluate defenses with."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from . import photographs, process

HELP = "fit a classifier to a folder of images"
EXTRA: str | None = "eval"


@dataclass(frozen=True)
class FitTargetOptions:
    """What ``oag-transform fit-target`` is asked for; :func:`add_arguments` says what each means."""

    out: Path
    photographs: photographs.Photographs
    backbone: str
    weights: str | None
    epochs: int
    lr: float
    device: str
    batch_size: int

    def __post_init__(self) -> None:
        from .. import _checks  # with torch

        if self.out.suffix not in (".pt", ".pth"):
            raise ValueError(f"--out must end in .pt, as --model knows such a file by it, got {self.out}")
        _checks.integer("--epochs", self.epochs)
        _checks.integer("--batch-size", self.batch_size, at_least=1)
        _checks.number("--lr", self.lr, above=0)

    @classmethod
    def of(cls, options: argparse.Namespace) -> "FitTargetOptions":
        """Those of a command line.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        names = ("out", "backbone", "weights", "epochs", "lr", "device", "batch_size")
        found = photographs.Photographs.of(options)
        return cls(photographs=found, **{name: getattr(options, name) for name in names})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = "Fit a linear layer to a frozen backbone, and train all of it for --epochs if that is above 0."
    parser.add_argument("--out", type=Path, required=True, help="FILE.pt to write")
    parser.add_argument("--backbone", default="efficientnet-lite0", help="or resnet18, vgg11, ... (default: %(default)s)")
    parser.add_argument("--weights", help="of a torchvision backbone: DEFAULT, a name; none at all is a random start")
    parser.add_argument("--epochs", type=int, default=0, help="of training all layers (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="of training all layers (default: %(default)s)")
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
    from ..evaluation.fitting import fit_target
    from ..evaluation.targets import save_target

    photographs.check_output(asked.out)
    listing = asked.photographs.listing()
    model, preprocessing = fit_target(
        listing,
        asked.backbone,
        asked.weights,
        epochs=asked.epochs,
        lr=asked.lr,
        batch_size=asked.batch_size,
        seed=asked.photographs.seed,
        device=photographs.find_device(asked.device),
        progress=sys.stderr.isatty(),
    )
    save_target(asked.out, model.cpu(), preprocessing, backbone=asked.backbone, classes=listing.classes)
    print(f"wrote {asked.out}: {asked.backbone} with {len(listing.classes)} classes, fitted to {len(listing.paths)} images")
    return 0
