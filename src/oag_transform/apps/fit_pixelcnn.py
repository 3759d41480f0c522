"""``oag-transform fit-pixelcnn``: the model of photographs that PixelDefend needs."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from . import photographs, process

HELP = "train the PixelCNN that PixelDefend needs"
EXTRA: str | None = "eval"


@dataclass(frozen=True)
class FitPixelcnnOptions:
    """What ``oag-transform fit-pixelcnn`` is asked for; :func:`add_arguments` says what each means."""

    out: Path
    photographs: photographs.Photographs
    count: int
    resize: int
    crop: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"two images at least are needed, one to train on and one to hold out, got --count {self.count}")
        photographs.check_sides(self.resize, self.crop)

    @classmethod
    def of(cls, options: argparse.Namespace) -> "FitPixelcnnOptions":
        """Those of a command line.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        return cls(options.out, photographs.Photographs.of(options), options.count, options.resize, options.crop)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--out", type=Path, required=True, help="FILE.pt to write")
    parser.add_argument("--count", type=int, default=1000, help="images at most (default: %(default)s)")
    parser.add_argument("--resize", type=int, default=256, help="short side in pixels (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=224, help="centre crop in pixels (default: %(default)s)")
    photographs.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Train a PixelCNN and write it; returns 0.

    Raises:
        ValueError: an argument is wrong; nothing was written.
    """
    asked = FitPixelcnnOptions.of(options)
    process.log_to_stderr()
    # torch, for a command that runs
    from ..baselines.pixeldefend import bits_per_dim, fit_pixelcnn, save_pixelcnn
    from ..evaluation import data

    photographs.check_output(asked.out)
    listing = asked.photographs.listing()
    order = data.shuffled(listing, asked.photographs.seed)[: asked.count]
    images, _ = data.read_images(listing, order, data.Preprocessing(asked.resize, asked.crop))
    if len(images) < 2:
        raise ValueError(f"two images at least are needed, one to train on and one to hold out, got {len(images)}")
    held_out = max(1, len(images) // 20)
    model = fit_pixelcnn(images[held_out:], seed=asked.photographs.seed, progress=sys.stderr.isatty())
    save_pixelcnn(model, asked.out)
    bits = bits_per_dim(model, images[:held_out])
    print(f"wrote {asked.out}: {bits:.2f} bits a dimension on {held_out} images that were held out")
    return 0
