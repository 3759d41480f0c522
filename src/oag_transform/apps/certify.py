"""``oag-transform certify``: what can be proven of my classifier, behind our denoiser and behind others."""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from ..baselines.smoothing import DENOISERS, Denoiser, denoisers
from . import photographs, process

HELP = "prove within which radius a smoothed classifier's answer can't change"
EXTRA: str | None = "eval"


@dataclass(frozen=True)
class CertifyOptions:
    """What ``oag-transform certify`` is asked for; :func:`add_arguments` says what each means."""

    out: Path
    model: str
    weights: str | None
    photographs: photographs.Photographs
    resize: int | None
    crop: int | None
    noise_std: tuple[float, ...]
    defenses: tuple[Denoiser, ...]
    count: int
    n0: int
    n: int
    alpha: float
    radius: float | None
    batch_norm: Path | None
    compute_dtype: str | None
    progress: bool
    device: str
    batch_size: int

    def __post_init__(self) -> None:
        from .. import _checks  # with torch

        for name in ("count", "n0", "n", "batch_size"):
            _checks.integer(f"--{name.replace('_', '-')}", getattr(self, name), at_least=1)
        for std in self.noise_std:
            _checks.number("--noise-std", std, above=0)
        _checks.number("--alpha", self.alpha, above=0, below=1)
        if self.radius is not None:
            _checks.number("--radius", self.radius, above=0)
        photographs.check_sides(self.resize, self.crop)

    @classmethod
    def of(cls, options: argparse.Namespace) -> "CertifyOptions":
        """Those of a command line.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"photographs", "noise_std", "defenses"}
        return cls(
            photographs=photographs.Photographs.of(options),
            noise_std=tuple(dict.fromkeys(options.noise_std)),
            defenses=denoisers(options.defenses),
            **{name: getattr(options, name) for name in own},
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; the denoisers are those of :data:`oag_transform.baselines.smoothing.DENOISERS`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Certified accuracy against L2 radius by randomized smoothing, behind our denoiser and behind others, on\n"
        "photographs that are taken whether the target gets them right or not. An L-infinity radius that is implied is\n"
        "sqrt(3 H W) times smaller: 0.33/255 for an L2 radius of 0.5 at 224 x 224 pixels. What is counted is kept in\n"
        "OUT/cache: an interrupted run goes on from there. Writes OUT/certificates.json and .md, and a curve for each\n"
        "noise. Exit status: 0, 1 if a row failed, 2 if nothing could be run."
    )
    width = max(len(denoiser.key) for denoiser in DENOISERS)
    parser.epilog = "\n".join(
        [
            "denoisers:",
            *(
                f"  {denoiser.key:<{width}}  {denoiser.label}{'' if denoiser.by_default else ', only if asked for'}"
                for denoiser in DENOISERS
            ),
        ]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--model",
        required=True,
        help="efficientnet-lite0|1|2, a torchvision model, module:function, or FILE.pt of fit-target",
    )
    parser.add_argument("--weights", help="of a torchvision model: DEFAULT, a name, or a file with a state dict")
    photographs.add_arguments(parser, split="tst1")
    parser.add_argument("--resize", type=int, help="short side in pixels (default: the target's own; 256 for a callable)")
    parser.add_argument("--crop", type=int, help="centre crop in pixels (default: the target's own; 224 for a callable)")
    parser.add_argument(
        "--noise-std",
        nargs="+",
        type=float,
        default=[0.25],
        metavar="STD",
        help="of the smoothing noise, on the [0, 1] scale (default: 0.25)",
    )
    parser.add_argument("--defenses", nargs="+", metavar="NAME", help="some of the list below only")
    parser.add_argument("--count", type=int, default=50, help="images, right or wrong (default: %(default)s)")
    parser.add_argument("--n0", type=int, default=20, help="draws that choose the class (default: %(default)s)")
    parser.add_argument("--n", type=int, default=100, help="draws that are counted for it (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.001, help="chance of a wrong certificate (default: %(default)s)")
    parser.add_argument(
        "--radius", type=float, help="stop counting as soon as this L2 radius is proven or out of reach (default: count all)"
    )
    parser.add_argument(
        "--batch-norm",
        type=Path,
        metavar="FOLDER",
        help="also with the target's batch normalization adapted to each denoiser, on noisy photographs of this folder, which "
        "is laid out as --data and apart from it",
    )
    parser.add_argument(
        "--compute-dtype",
        choices=["float32", "bfloat16"],
        help="operands of our convolutions (default: bfloat16 on a CPU that multiplies it faster, else float32)",
    )
    parser.add_argument("--progress", action="store_true", help="progress bars, also where the output is no terminal")
    photographs.add_device(parser, 16)


def run(options: argparse.Namespace) -> int:
    """Certify, and write what was found; returns 1 if a row failed, else 0.

    Raises:
        ValueError: an argument is wrong; nothing was run.
    """
    asked = CertifyOptions.of(options)
    process.log_to_stderr()
    # torch and what draws, for a command that runs
    import torch

    from ..evaluation import certification
    from ..evaluation.render import certified
    from ..evaluation.targets import load_target

    process.look_for_modules_here()
    device = photographs.find_device(asked.device)
    listing = asked.photographs.listing()
    others = None if asked.batch_norm is None else dataclasses.replace(asked.photographs, data=asked.batch_norm).listing()
    target = load_target(
        asked.model, asked.weights, classes=listing.classes, device=device, resize=asked.resize, crop=asked.crop
    )
    plan = certification.Plan(asked.n0, asked.n, asked.alpha, asked.radius, asked.photographs.seed, asked.batch_size)
    found = certification.certify(
        target,
        listing,
        asked.photographs.data.resolve().name,
        asked.noise_std,
        asked.defenses,
        asked.count,
        plan,
        asked.out / "cache",
        others=others,
        dtype=None if asked.compute_dtype is None else getattr(torch, asked.compute_dtype),
        device=device,
        progress=sys.stderr.isatty() or asked.progress,
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    certification.write(found, asked.out / f"{certified.KEY}.json")
    certified.render(found, asked.out)
    print(certified.to_markdown(found), end="")
    print(f"wrote {asked.out / certified.KEY}.json")
    return 1 if any(row.error for row in found.rows) else 0
