"""What commands on photographs ask alike: where these are, how large, and which device."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    import torch

    from ..evaluation.data import Listing

LAYOUTS = ("imagefolder", "flower17", "ilsvrc2012")


@dataclass(frozen=True)
class Photographs:
    """Labelled photographs on disk, in one of three layouts.

    Attributes:
        data: their folder.
        layout: one of :data:`LAYOUTS`.
        split: with ``"flower17"``, such as ``"tst1"``.
        devkit: with ``"ilsvrc2012"``, the folder of its development kit.
        seed: of their order.
    """

    data: Path
    layout: str
    split: str
    devkit: Path | None
    seed: int

    def __post_init__(self) -> None:
        from .. import _checks  # with torch

        _checks.choice("--layout", self.layout, LAYOUTS)
        if self.layout == "ilsvrc2012" and self.devkit is None:
            raise ValueError("--layout ilsvrc2012 needs --devkit, the folder ILSVRC2012_devkit_t12")
        if _checks.integer("--seed", self.seed) >= 2**63:
            raise ValueError(f"--seed must be below 2^63, got {self.seed}")

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Photographs":
        """Those that a command line names."""
        return cls(options.data, options.layout, options.split, options.devkit, options.seed)

    def listing(self) -> "Listing":
        """The files, their labels and classes.

        Raises:
            ValueError: what the layout needs is missing.
        """
        from ..evaluation import data  # with torch

        if self.layout == "flower17":
            return data.flower17(self.data, self.split)
        if self.layout == "ilsvrc2012" and self.devkit is not None:
            return data.ilsvrc2012(self.data, self.devkit)
        return data.image_folder(self.data)


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True, split: str = "trn1") -> None:
    """``--data``, ``--layout``, ``--split``, ``--devkit`` and ``--seed``."""
    parser.add_argument("--data", type=Path, required=required, help="folder of the photographs")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="CLASS/IMAGE.jpg; jpg/image_0001.jpg with datasplits.mat; or ILSVRC2012_val_00000001.JPEG (default: %(default)s)",
    )
    parser.add_argument("--split", default=split, help="with flower17: trn1, val1, tst1, ... (default: %(default)s)")
    parser.add_argument("--devkit", type=Path, help="with ilsvrc2012: the folder ILSVRC2012_devkit_t12")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def add_device(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """``--device`` and ``--batch-size``."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="default: %(default)s")


def find_device(name: str) -> "torch.device":
    """The device of this name.

    Raises:
        ValueError: it can't be used here.
    """
    import torch  # for a command that runs, not for one that is parsed

    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from error


def check_sides(resize: int | None, crop: int | None) -> None:
    """Raise unless the sides are None, or at least 1 and the crop fits.

    Raises:
        ValueError: they aren't.
    """
    from .. import _checks  # with torch

    for name, side in (("--resize", resize), ("--crop", crop)):
        if side is not None:
            _checks.integer(name, side, at_least=1)
    if resize is not None and crop is not None and resize < crop:
        raise ValueError(f"--resize must be at least --crop, got {resize} and {crop}")
