"""``oag-transform fit-pixelcnn``: the generative model of images that PixelDefend needs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from . import process
from .options import ImageOptions, check_output, check_sides, default

if TYPE_CHECKING:  # torch comes when a command runs
    from ..evaluation.data import Listing, Preprocessing

EXTRA = "eval"


@dataclass(frozen=True, kw_only=True)
class FitPixelcnn(ImageOptions):
    """Train the PixelCNN that PixelDefend needs."""

    out: Path
    """FILE.pt to write."""
    split: Annotated[str | None, default("trn1; train")] = None
    TRAINING: ClassVar[bool] = True
    count: int = 1000
    """Largest number of images; every twentieth is held out."""
    resize: Annotated[int | None, default("256; the side of CIFAR's images")] = None
    """Short side in pixels."""
    crop: Annotated[int | None, default("224; the side of CIFAR's images")] = None
    """Centre crop in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(self.resize, self.crop)
        if self.count < 2:
            raise ValueError(f"--count must be at least 2, one image to train on and one to hold out, got {self.count}")

    def run(self) -> int:
        """Train a PixelCNN and write it; returns 0.

        Raises:
            ValueError: too few images; nothing was written.
        """
        process.log_to_stderr()
        # torch, for a command that runs
        from ..baselines.pixeldefend import bits_per_dim, fit_pixelcnn, save_pixelcnn
        from ..evaluation import data

        check_output(self.out)
        listing = self.listing()
        preprocessing = self._preprocessing(listing)
        order = data.shuffled(listing, self.seed)[: self.count]
        images, _ = data.read_images(listing, order, preprocessing)
        if len(images) < 2:
            raise ValueError(f"--data must have at least two images, one to train on and one to hold out, got {len(images)}")
        held_out = max(1, len(images) // 20)
        model = fit_pixelcnn(images[held_out:], seed=self.seed, progress=sys.stderr.isatty())
        save_pixelcnn(model, self.out)
        bits = bits_per_dim(model, images[:held_out])
        print(f"wrote {self.out}: {bits:.2f} bits per dimension on {held_out} held-out images")
        return 0

    def _preprocessing(self, listing: "Listing") -> "Preprocessing":
        from ..evaluation.backbones import IMAGENET  # with torch
        from ..evaluation.data import Preprocessing, check_not_enlarged, first_size

        if listing.side is None and self.resize is None:
            check_not_enlarged(first_size(listing), IMAGENET)
        resize, crop = self.resize or listing.side or IMAGENET.resize, self.crop or listing.side or IMAGENET.crop
        check_sides(resize, crop)
        return Preprocessing(resize, crop)


COMMAND = FitPixelcnn
