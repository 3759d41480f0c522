"""``oag-transform demo``: five attacks on a real classifier, five ways to meet them, one table and one picture."""

import argparse
from pathlib import Path

HELP = "attack a real ImageNet classifier in the gray box, and in one column through each defense"
EXTRA: str | None = "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", type=Path, default=Path("oag-demo"), help="folder for the picture (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Print the table and write the picture."""
    from . import demonstration  # imports torch, and the extra

    options.out.mkdir(parents=True, exist_ok=True)
    outcome = demonstration.measure()
    print(demonstration.table(outcome))
    path = options.out / "demo.png"
    demonstration.picture(outcome, path)
    print(f"wrote {path}")
    return 0
