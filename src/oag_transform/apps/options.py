"""Options that several commands share: labelled images on disk, a classifier, and a device.

A command inherits what it needs, gives another default by declaring the field again, and calls each ``__post_init__``. The
docstring of a field is its help, on one line: tyro keeps the line breaks of longer ones.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    import torch

    from ..evaluation.data import Listing
    from ..evaluation.targets import Target


def default(text: str) -> Any:
    """Annotates a field of default None with what that stands for."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def dtype_of(name: str | None) -> "torch.dtype | None":
    """What --compute-dtype names; None for its default."""
    import torch

    return None if name is None else getattr(torch, name)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Labelled images on disk."""

    data: str
    """Folder of folders of images, or KIND:ROOT of cifar10, cifar100, flower17, ilsvrc2012, transferattack."""
    split: Annotated[str | None, default("tst1; test")] = None
    """Split of flower17: trn1, val1, tst1, ...; of CIFAR: train, test."""
    devkit: Annotated[Path | None, default("none")] = None
    """Folder ILSVRC2012_devkit_t12, for ilsvrc2012."""
    seed: int = 0
    """Seed of the images' order and of all else that is random."""

    def __post_init__(self) -> None:
        from .. import _checks  # imports torch

        if _checks.integer("--seed", self.seed) >= 2**63:
            raise ValueError(f"--seed must be below 2^63, got {self.seed}")

    TRAINING: ClassVar[bool] = False
    """Whether the command takes training images where no split is named."""

    def listing(self) -> "Listing":
        """The images, their labels and classes.

        Raises:
            ValueError: what is named isn't there.
        """
        from ..evaluation.data import IN_SPLITS, kind_of, open_images  # imports torch

        kind, _ = kind_of(self.data)
        if self.split is not None and kind not in IN_SPLITS:
            raise ValueError(f"--split is for {', '.join(IN_SPLITS)}, got {self.split!r} for {self.data}")
        if self.devkit is not None and kind != "ilsvrc2012":
            raise ValueError(f"--devkit is for ilsvrc2012, got it for {self.data}")
        return open_images(self.data, split=self.split, devkit=self.devkit, training=self.TRAINING)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """The classifier, and the size of its input."""

    model: str
    """A torchvision model, efficientnet-lite0|1|2, module:function, FILE.pt, timm:NAME or robustbench:DATA/THREAT/NAME."""
    weights: Annotated[str | None, default("those that come with the model")] = None
    """Weights of a torchvision model, which needs them: DEFAULT, their name, or a file with a state dict."""
    resize: Annotated[int | None, default("the classifier's own; else that of the data, or 256")] = None
    """Short side in pixels."""
    crop: Annotated[int | None, default("the classifier's own; else that of the data, or 224")] = None
    """Centre crop in pixels."""

    def __post_init__(self) -> None:
        check_sides(self.resize, self.crop)

    def load(
        self, classes: Sequence[str], device: "torch.device", side: int | None = None, first: tuple[int, int] | None = None
    ) -> "Target":
        """The classifier of these classes, on a device.

        Args:
            classes: names of the data's classes.
            device: where it goes.
            side: of all images of the data, if they have but one.
            first: width and height of the data's first image.

        Raises:
            ValueError: see :func:`~oag_transform.evaluation.targets.load_target`.
        """
        from ..evaluation.targets import load_target  # imports torch

        return load_target(
            self.model,
            self.weights,
            classes=classes,
            side=side,
            first=first,
            device=device,
            resize=self.resize,
            crop=self.crop,
        )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where the work is done."""

    device: str = "cpu"
    """Device of the work: cpu, cuda, cuda:1, ..."""
    batch_size: int = 8
    """Images at a time."""

    def __post_init__(self) -> None:
        from .. import _checks  # imports torch

        _checks.integer("--batch-size", self.batch_size, at_least=1)

    def find_device(self) -> "torch.device":
        """The device.

        Raises:
            ValueError: it can't be used here.
        """
        from .. import _checks  # imports torch

        return _checks.device("--device", self.device)


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


def check_input(option: str, path: Path | None) -> None:
    """Raise unless the path is None or there is a file.

    Raises:
        ValueError: there isn't.
    """
    if path is not None and (path.is_dir() or not path.exists()):
        raise ValueError(f"{option} must be a file: {path} is {'a folder' if path.is_dir() else 'missing'}")


def check_output(path: Path) -> None:
    """Raise unless a file can be written there, whose folder is made, by way of another one beside it.

    Raises:
        ValueError: it is a folder, a pipe or a device.
        OSError: no file can be written there.
    """
    if path.is_dir():
        raise ValueError(f"--out must be a file, got the folder {path}")
    if path.exists() and not path.is_file():
        raise ValueError(f"--out must be a file, got a pipe or a device: {path}")
    there = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()
    with tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent):
        pass
    if not there:
        path.unlink()
