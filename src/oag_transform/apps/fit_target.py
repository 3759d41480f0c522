"""``oag-transform fit-target``: a classifier of a folder of images, to evaluate defenses with."""

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ..evaluation.options import CHECKPOINTS
from . import process
from .options import DeviceOptions, ImageOptions, check_output, default, dtype_of

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    from torch import nn

    from ..evaluation.data import Listing, Preprocessing

EXTRA = "eval"

APGD_COUNT, APGD_STEPS, APGD_RESTARTS = 100, 50, 1  # some two minutes on a core


@dataclass(frozen=True, kw_only=True)
class FitTarget(DeviceOptions, ImageOptions):
    """Fit a classifier to a folder of images.

    If the backbone has weights, it is frozen, and a linear layer is fitted. Then all layers are trained for --epochs,
    adversarially with --adversarial. The accuracy on the training images is printed.
    """

    out: Path
    """FILE.pt to write."""
    split: Annotated[str | None, default("trn1; train")] = None
    TRAINING: ClassVar[bool] = True
    batch_size: int = 32
    backbone: str = "efficientnet-lite0"
    """efficientnet-lite0|1|2, or a torchvision model such as resnet18."""
    weights: Annotated[str | None, default("random initialisation, which needs --epochs")] = None
    """Weights of a torchvision backbone: DEFAULT, or their name."""
    size: Annotated[int | None, default("the backbone's own resize and crop")] = None
    """Crop in pixels, after resizing to 8/7 of it."""
    epochs: int = 0
    """Epochs of training all layers."""
    lr: float = 0.01
    """Learning rate of training all layers."""
    adversarial: Annotated[float | None, default("train on clean images")] = None
    """Train all layers on adversarial examples, L-infinity, in grey levels of 255, such as 4; needs --epochs."""
    adversarial_steps: int = 1
    """1: FGSM from a random start, which may overfit to that step; more: PGD, at proportional cost."""
    report: Annotated[str | None, default("no report")] = None
    """Other images to print the accuracy on, and with --adversarial that under APGD: a folder like --data, or a split."""
    compute_dtype: Annotated[Literal["bfloat16"] | None, default("float32")] = None
    """Mixed precision in training all layers."""

    def __post_init__(self) -> None:
        from .. import _checks  # imports torch

        ImageOptions.__post_init__(self)
        DeviceOptions.__post_init__(self)
        if self.out.suffix not in CHECKPOINTS:
            raise ValueError(f"--out must end in .pt, as --model knows such a file by it, got {self.out}")
        _checks.integer("--epochs", self.epochs)
        _checks.number("--lr", self.lr, above=0)
        if self.size is not None:
            _checks.integer("--size", self.size, at_least=1)
        if not self.epochs and (self.compute_dtype is not None or self.lr != FitTarget.lr):
            raise ValueError("--compute-dtype and --lr are for training all layers, which needs --epochs")
        if self.adversarial is not None and _checks.number("--adversarial", self.adversarial, above=0) > 255:
            raise ValueError(f"--adversarial is in grey levels, at most 255, got {self.adversarial:g}")
        if _checks.integer("--adversarial-steps", self.adversarial_steps, at_least=1) > 1 and self.adversarial is None:
            raise ValueError("--adversarial-steps needs --adversarial EPS")
        if self.adversarial is not None and self.report is not None and importlib.util.find_spec("pyautoattack") is None:
            raise ValueError("--report of an adversarially trained classifier needs pip install 'oag-transform[adaptive]'")

    def run(self) -> int:
        """Fit a classifier and write it; returns 0.

        Raises:
            ValueError: an argument is wrong; nothing was written.
        """
        process.log_to_stderr()
        # torch, for a command that runs
        from ..evaluation.fitting import AdversarialExamples, clean_accuracy, fit_target
        from ..evaluation.targets import save_target

        check_output(self.out)
        listing = self.listing()
        others = None if self.report is None else self._held_out(self.report, listing)
        if others is not None and others.classes != listing.classes:
            raise ValueError(f"--report has the classes {list(others.classes)}, but --data has {list(listing.classes)}")
        model, preprocessing = fit_target(
            listing,
            self.backbone,
            self.weights,
            size=self.size,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            adversarial=None if self.adversarial is None else AdversarialExamples(self.adversarial, self.adversarial_steps),
            compute_dtype=dtype_of(self.compute_dtype),
            seed=self.seed,
            device=self.find_device(),
            progress=sys.stderr.isatty(),
        )
        save_target(
            self.out,
            model,
            preprocessing,
            backbone=self.backbone,
            classes=listing.classes,
            adversarial_eps=self.adversarial,
        )
        right = clean_accuracy(model, listing, preprocessing)
        print(
            f"wrote {self.out}: {self.backbone} with {len(listing.classes)} classes, {preprocessing.crop} pixels, fitted to "
            f"{right.n} images, with {100 * right.accuracy:.1f}% training accuracy",
            flush=True,
        )
        if others is not None:
            _report(model, others, preprocessing, self.adversarial)
        return 0

    def _held_out(self, report: str, listing: "Listing") -> "Listing":
        """The images of ``--report``: of the same kind, and other ones than those that are trained on."""
        from ..evaluation.data import IN_SPLITS, kind_of, same_images  # with torch

        changed: dict[str, Any] = {"split": report} if kind_of(self.data)[0] in IN_SPLITS else {"data": report}
        own = dataclasses.replace(self, **changed)
        found = own.listing()
        if same_images(own.data, found, self.data, listing):
            raise ValueError(f"--report needs other images than those that are trained on, got {report} for both")
        return found


COMMAND = FitTarget


def _report(model: "nn.Module", listing: "Listing", preprocessing: "Preprocessing", eps: float | None) -> None:
    """Print the accuracy on held-out images, and that under attack at ``eps`` grey levels, with 95% intervals."""
    from ..evaluation.fitting import clean_accuracy, robust_accuracy  # with torch

    found = {"clean": clean_accuracy(model, listing, preprocessing)}
    if eps is not None:
        heading = f"under APGD-CE, L-infinity {eps:g}/255, {APGD_STEPS} steps, {APGD_RESTARTS} start"
        found[heading] = robust_accuracy(
            model, listing, preprocessing, eps, count=APGD_COUNT, steps=APGD_STEPS, restarts=APGD_RESTARTS
        )
    for how, cell in found.items():
        low, high = cell.interval
        print(f"held out, {how}: {100 * cell.accuracy:.1f}% [{100 * low:.0f}, {100 * high:.0f}] of {cell.n} images")
