"""Command line: ``oag-transform demo`` and ``oag-transform purify``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from .transform import DivergenceError, OnlineAlternateGenerator


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="oag-transform", description="Purify images for a pretrained classifier.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="fool a real ImageNet classifier and set it right (extra 'demo')")
    demo.add_argument("--out", type=Path, default=Path("oag-demo"), help="folder for the picture (default: %(default)s)")

    purify = commands.add_parser("purify", help="purify image files")
    purify.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    purify.add_argument("--out", type=Path, required=True, help="folder for the purified images, as PNG")
    purify.add_argument("--paper", action="store_true", help="the paper's setting: exact, and some 80 times slower")
    purify.add_argument("--network-steps", type=int, help="T_N; more of them keep more detail, adversarial noise included")
    purify.add_argument("--seed", type=int, help="repeat a result (default: fresh randomness)")

    options = parser.parse_args(arguments)
    try:
        return _demo(options) if options.command == "demo" else _purify(options)
    except (DivergenceError, OSError, ValueError) as error:
        print(f"oag-transform {options.command}: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace) -> int:
    try:
        from . import demo

        options.out.mkdir(parents=True, exist_ok=True)
        target, outcome = demo.run()
        print(demo.table(target, outcome))
        path = options.out / "demo.png"
        demo.picture(target, outcome, path)
    except ModuleNotFoundError as error:
        print(f"oag-transform demo needs {error.name}: pip install 'oag-transform[demo]'", file=sys.stderr)
        return 2
    print(f"wrote {path}")
    return 0


def _purify(options: argparse.Namespace) -> int:
    chosen = {} if options.network_steps is None else {"network_steps": options.network_steps}
    make = OnlineAlternateGenerator.paper if options.paper else OnlineAlternateGenerator
    transform = make(seed=options.seed, progress=sys.stderr.isatty(), **chosen)
    jobs = [(path, options.out / f"{path.stem}.png") for path in options.images]
    targets = [target.resolve() for _, target in jobs]
    for path, target in jobs:
        if targets.count(target.resolve()) > 1:
            raise ValueError(f"two images would both be written to {target}")
        if target.resolve() == path.resolve():
            raise ValueError(f"{path} would be overwritten; choose another --out")
    images = [_read(path, transform.settings.kernel_size) for path in options.images]
    options.out.mkdir(parents=True, exist_ok=True)
    for index, (image, (_, target)) in enumerate(zip(images, jobs, strict=True)):
        transform(image, index=index).save(target)
        print(f"wrote {target}")
    return 0


def _read(path: Path, minimum_size: int) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as file:
            image = PIL.ImageOps.exif_transpose(file)
            if image.mode not in ("RGB", "L"):
                if image.has_transparency_data:
                    print(f"{path}: transparency is dropped", file=sys.stderr)
                image = image.convert("RGB")
            image.load()
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that can be read") from error
    if min(image.size) < minimum_size:
        raise ValueError(f"{path} is {image.width} x {image.height}; at least {minimum_size} x {minimum_size} is needed")
    return image
