"""Command line: ``oag-transform`` ``demo``, ``purify``, ``evaluate``, ``fit-target`` and ``fit-pixelcnn``."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
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
    demo.set_defaults(run=_demo)

    purify = commands.add_parser("purify", help="purify image files")
    purify.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    purify.add_argument("--out", type=Path, required=True, help="folder for the purified images, as PNG")
    purify.add_argument("--paper", action="store_true", help="the paper's setting: exact, and some 200 times slower")
    purify.add_argument("--network-steps", type=int, help="T_N; more of them keep more detail, adversarial noise included")
    purify.add_argument("--threshold", type=float, help="a higher one removes more of an attack, and more of the picture")
    purify.add_argument(
        "--strength",
        type=float,
        help="temperature, share of the threshold, up to 1 (default: by the image's noise; paper: 1)",
    )
    purify.add_argument("--seed", type=int, help="repeat a result (default: fresh randomness)")
    purify.set_defaults(run=_purify)

    _add_evaluate(commands.add_parser("evaluate", help="which defense protects my classifier on my images? (extra 'eval')"))
    _add_fit_target(commands.add_parser("fit-target", help="fit a classifier to a folder of images (extra 'eval')"))
    _add_fit_pixelcnn(commands.add_parser("fit-pixelcnn", help="train the PixelCNN that PixelDefend needs (extra 'eval')"))

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        extra = "demo" if options.command == "demo" else "eval"
        print(f"oag-transform {options.command} needs {error.name}: pip install 'oag-transform[{extra}]'", file=sys.stderr)
        return 2
    except (DivergenceError, OSError, ValueError) as error:
        print(f"oag-transform {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"oag-transform {options.command}: interrupted", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    options.out.mkdir(parents=True, exist_ok=True)
    target, outcome = demo.run()
    print(demo.table(target, outcome))
    path = options.out / "demo.png"
    demo.picture(target, outcome, path)
    print(f"wrote {path}")
    return 0


def _purify(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("network_steps", "threshold", "strength")}
    chosen = {name: value for name, value in given.items() if value is not None}
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


def _add_data(parser: argparse.ArgumentParser, *, required: bool = True, split: str = "trn1") -> None:
    parser.add_argument("--data", type=Path, required=required, help="folder of the photographs")
    parser.add_argument(
        "--layout",
        choices=["imagefolder", "flower17", "ilsvrc2012"],
        default="imagefolder",
        help="CLASS/IMAGE.jpg; jpg/image_0001.jpg with datasplits.mat; or ILSVRC2012_val_00000001.JPEG (default: %(default)s)",
    )
    parser.add_argument("--split", default=split, help="with flower17: trn1, val1, tst1, ... (default: %(default)s)")
    parser.add_argument("--devkit", type=Path, help="with ilsvrc2012: the folder ILSVRC2012_devkit_t12")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _add_device(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="default: %(default)s")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure defenses as the paper does. What is computed is kept in OUT/cache: an interrupted run goes on from there. "
        "Each experiment writes OUT/NAME.json, .csv and .md, and OUT/report.html shows all of them."
    )
    parser.add_argument(
        "experiments",
        nargs="+",
        metavar="EXPERIMENT",
        help="table1 ... table6, autoencoder (IV-H), fig1, fig3, fig4, fig5, tradeoff, tune, report, or all",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--model", help="efficientnet-lite0|1|2, a torchvision model, module:function, or FILE.pt of fit-target"
    )
    parser.add_argument("--weights", help="of a torchvision model: DEFAULT, a name, or a file with a state dict")
    parser.add_argument(
        "--other",
        action="append",
        default=[],
        metavar="MODEL[=WEIGHTS]",
        help="a further target, for tables 2 and 3; repeatable",
    )
    _add_data(parser, required=False, split="tst1")  # a report needs none
    parser.add_argument("--resize", type=int, help="short side in pixels (default: the target's own; 256 for a callable)")
    parser.add_argument("--crop", type=int, help="centre crop in pixels (default: the target's own; 224 for a callable)")
    parser.add_argument("--count", type=int, default=150, help="images, which the target gets right (default: %(default)s)")
    parser.add_argument("--slow-count", type=int, default=20, help="images for slow defenses (default: %(default)s)")
    parser.add_argument(
        "--attacks", nargs="+", choices=["fgsm", "igsm", "mifgsm", "cw"], default=["fgsm", "igsm", "mifgsm", "cw"]
    )
    parser.add_argument(
        "--goal",
        choices=["paper", "targeted", "untargeted"],
        default="paper",
        help="paper: FGSM and IGSM towards a random class, MI-FGSM and C&W away from the right one",
    )
    parser.add_argument("--eps", type=int, default=6, help="of FGSM and IGSM, in grey levels (default: %(default)s)")
    parser.add_argument(
        "--mifgsm-eps", type=int, default=4, help="the paper: 4 on Flower-17, 2 on ImageNet (default: %(default)s)"
    )
    parser.add_argument(
        "--defenses",
        nargs="+",
        metavar="NAME",
        help="some of them only: mean-filter, median-filter, jpeg, jpeg-and-noise-of-8-grey-levels, gaussian-noise-4-views, "
        "jpeg-4-views, jpeg-and-noise-of-8-grey-levels-4-views, jpeg-and-noise-as-the-noise-asks-4-views, total-variation, "
        "tvm, pixel-deflection, randomization, gaussian-noise, pixel-defend, auto-encoder, dip, "
        "online-alternate-generator-paper-closed-form, "
        "online-alternate-generator-full-strength-4-views, online-alternate-generator, online-alternate-generator-4-views",
    )
    parser.add_argument("--tuned", type=Path, metavar="TUNE.JSON", help="strengths that the experiment tune has chosen")
    parser.add_argument("--pixelcnn", type=Path, metavar="FILE", help="of fit-pixelcnn, for PixelDefend")
    parser.add_argument(
        "--noise-std", type=float, default=0.1, help="of Gaussian noise, on the [0, 1] scale (default: %(default)s)"
    )
    parser.add_argument("--compute-dtype", choices=["bfloat16"], help="operands of our convolutions (default: float32)")
    parser.add_argument("--progress", action="store_true", help="progress bars, also where the output is no terminal")
    _add_device(parser, 8)
    parser.set_defaults(run=_evaluate)


def _add_fit_target(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fit a linear layer to a frozen backbone, and train all of it for --epochs if that is above 0."
    parser.add_argument("--out", type=Path, required=True, help="FILE.pt to write")
    parser.add_argument("--backbone", default="efficientnet-lite0", help="or resnet18, vgg11, ... (default: %(default)s)")
    parser.add_argument("--weights", help="of a torchvision backbone: DEFAULT, a name; none at all is a random start")
    parser.add_argument("--epochs", type=int, default=0, help="of training all layers (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="of training all layers (default: %(default)s)")
    _add_data(parser)
    _add_device(parser, 32)
    parser.set_defaults(run=_fit_target)


def _add_fit_pixelcnn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="FILE.pt to write")
    parser.add_argument("--count", type=int, default=1000, help="images at most (default: %(default)s)")
    parser.add_argument("--resize", type=int, default=256, help="short side in pixels (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=224, help="centre crop in pixels (default: %(default)s)")
    _add_data(parser)
    parser.set_defaults(run=_fit_pixelcnn)


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluation.command import evaluate

    return _logged(evaluate, options)


def _fit_target(options: argparse.Namespace) -> int:
    from .evaluation.command import fit_target_command

    return _logged(fit_target_command, options)


def _fit_pixelcnn(options: argparse.Namespace) -> int:
    from .evaluation.command import fit_pixelcnn_command

    return _logged(fit_pixelcnn_command, options)


def _logged(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    return command(options)
