"""Options that several commands share: labelled images on disk, a classifier, and a device.

A command inherits what it needs, gives another default by declaring the field again, and calls each ``__post_init__``. The
docstring of a field is its help, on one line: tyro keeps the line breaks of longer ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    import torch

    from ..evaluation.data import Listing
    from ..evaluation.targets import Target


def default(text: str) -> Any:
    """Annotates a field of default None with what that stands for."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Labelled images on disk."""

    data: Path
    """Folder of the images."""
    layout: Literal["imagefolder", "flower17", "ilsvrc2012"] = "imagefolder"
    """CLASS/IMAGE.jpg; jpg/image_0001.jpg with datasplits.mat; or ILSVRC2012_val_00000001.JPEG."""
    split: str = "tst1"
    """Split of flower17: trn1, val1, tst1, ..."""
    devkit: Annotated[Path | None, default("none")] = None
    """Folder ILSVRC2012_devkit_t12, for ilsvrc2012."""
    seed: int = 0
    """Seed of the images' order and of all else that is random."""

    def __post_init__(self) -> None:
        from .. import _checks  # imports torch

        if self.layout == "ilsvrc2012" and self.devkit is None:
            raise ValueError("--layout ilsvrc2012 needs --devkit, the folder ILSVRC2012_devkit_t12")
        if _checks.integer("--seed", self.seed) >= 2**63:
            raise ValueError(f"--seed must be below 2^63, got {self.seed}")

    def listing(self) -> "Listing":
        """The files, their labels and classes.

        Raises:
            ValueError: what the layout needs is missing.
        """
        from ..evaluation import data  # imports torch

        if self.layout == "flower17":
            return data.flower17(self.data, self.split)
        if self.layout == "ilsvrc2012" and self.devkit is not None:
            return data.ilsvrc2012(self.data, self.devkit)
        return data.image_folder(self.data)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """The classifier, and the size of its input."""

    model: str
    """Classifier: efficientnet-lite0|1|2, a torchvision model, module:function, or FILE.pt of fit-target."""
    weights: Annotated[str | None, default("those that come with the model")] = None
    """Weights of a torchvision model, which needs them: DEFAULT, their name, or a file with a state dict."""
    resize: Annotated[int | None, default("the classifier's own; 256 for module:function")] = None
    """Short side in pixels."""
    crop: Annotated[int | None, default("the classifier's own; 224 for module:function")] = None
    """Centre crop in pixels."""

    def __post_init__(self) -> None:
        check_sides(self.resize, self.crop)

    def load(self, classes: Sequence[str], device: "torch.device") -> "Target":
        """The classifier of these classes, on a device.

        Raises:
            ValueError: see :func:`~oag_transform.evaluation.targets.load_target`.
        """
        from ..evaluation.targets import load_target  # imports torch

        return load_target(self.model, self.weights, classes=classes, device=device, resize=self.resize, crop=self.crop)


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
        import torch

        try:
            return torch.zeros(1, device=self.device).device
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
            raise ValueError(f"--device {self.device} can't be used: {str(error).splitlines()[0]}") from error


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


def check_output(path: Path) -> None:
    """Raise unless a file can be written there, whose folder is made.

    Raises:
        ValueError: it is a folder.
    """
    if path.is_dir():
        raise ValueError(f"--out must be a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
