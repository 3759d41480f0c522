"""Detail that a setting keeps, and noise that it transmits: the comparison behind the default's hyper-parameters.

python -m benchmarks.detail --data flower17/train --data imagenet-even --count 6 --out docs/data/detail.json    (15 minutes)

For each setting and T_N, this measures the PSNR of the mode I* (Eq. 9, 10; the result without its Langevin noise) to the
image, and the transmitted share of white noise n (6 grey levels), <I*(x + n) - I*(x), n> / <n, n>. It needs no classifier and
no attack. All settings have full strength, because the default strength would follow the clean images. All but one have float32
operands, so that the table is the same on every machine. ``--out`` writes JSON, from which ``benchmarks.docs`` makes tables.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from oag_transform import OnlineAlternateGenerator
from oag_transform.evaluation.data import Preprocessing, batches, image_folder
from oag_transform.evaluation.provenance import provenance
from oag_transform.generator.run import prepare, trajectory
from oag_transform.generator.settings import Settings
from oag_transform.images import to_pixels

STEPS = (6, 9, 12, 18)
NOISE = 6  # grey levels
SEED = 0
BASE = Settings(network_steps=STEPS[-1], strength=1.0, compute_dtype=torch.float32)
SETTINGS: dict[str, dict[str, Any]] = {  # no commas in the names: a page lists those that it shows
    "default": {},
    "no momentum": {"momentum": 0.0},
    "T_I 20": {"image_steps": 20},
    "T_I 20 without momentum": {"image_steps": 20, "momentum": 0.0},
    "momentum 0.5": {"momentum": 0.5},
    "1.5 times v's rate": {"fc_lr": 1.5 * BASE.fc_lr},
    "a quarter of v's rate": {"fc_lr": BASE.fc_lr / 4},
    "W fixed": {"conv_lr": 0.0},
    "rates of Eq. 5 as they stand": {"adaptive_lr": False},
    "bfloat16 operands": {"compute_dtype": torch.bfloat16},
    "no threshold": {"threshold": 0.0},
    "half the threshold": {"threshold": BASE.threshold / 2},
    "twice the threshold": {"threshold": 2 * BASE.threshold},
    "PyTorch's filters": {"init": "uniform"},
    "PyTorch's filters without threshold": {"init": "uniform", "threshold": 0.0},
    "7 x 7 kernels": {"kernel_size": 7},
    "15 x 15 kernels": {"kernel_size": 15},
    "stride 2 and 32 filters": {"stride": 2, "filters": 32},
    "half the filters": {"filters": BASE.filters // 2},
    "twice the filters": {"filters": 2 * BASE.filters},
}


def modes(image: Tensor, defense: OnlineAlternateGenerator, index: int) -> Iterator[Tensor]:
    """Modes in [0, 1] of an image (1, 3, H, W), one at each of ``STEPS``."""
    s = defense.settings_for(*image.shape[-2:])
    for state in trajectory(prepare(image, s, SEED, [index]), every=1):
        if state.step in STEPS:
            yield to_pixels(state.mode, s.scale)


def measured(defense: OnlineAlternateGenerator, images: Tensor, noise: Tensor) -> dict[str, Any]:
    """For each of ``STEPS``, by its number as text: ``psnr`` in dB and ``share`` of noise, means over the images.

    None in place of both where an image has diverged.
    """
    found: dict[str, list[tuple[float, float]]] = {str(step): [] for step in STEPS}
    for index, (image, n) in enumerate(zip(images.split(1), noise.split(1), strict=True)):
        for step, clean, noisy in zip(STEPS, modes(image, defense, index), modes(image + n, defense, index), strict=True):
            psnr = -10 * math.log10((clean - image).square().mean().item())
            found[str(step)].append((psnr, (((noisy - clean) * n).sum() / n.square().sum()).item()))
    means = {step: [fmean(values) for values in zip(*each, strict=True)] for step, each in found.items()}
    return {
        step: {"psnr": round(psnr, 3), "share": round(share, 5)} if math.isfinite(psnr + share) else None
        for step, (psnr, share) in means.items()
    }


def markdown(path: Path, names: Sequence[str] = ()) -> str:
    """The table of these settings, of all where none is named, from the JSON that ``--out`` has written.

    Raises:
        ValueError: a name that is not among the measured settings.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    rows, steps = found["rows"], found["steps"]
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise ValueError(f"no setting {unknown[0]!r} in {path.name}; it has {', '.join(rows)}")
    heads = [head for step in steps for head in (f"T_N {step}: PSNR", "noise")]
    lines = [f"| | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for name in names or rows:
        cells = [text for step in steps for text in _cells(rows[name]["at"][str(step)])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = " and ".join(f"{count} of {data}" for data, count in found["counts"].items())
    facts = (
        f"PSNR of the mode in dB, and the share of white noise of {found['noise']} grey levels that passes; means over "
        f"{found['n']} images ({counts}), at full strength. `{found['command']}`"
    )
    return "\n".join([*lines, "", facts])


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="a folder of folders of images; repeat")
    parser.add_argument("--count", type=int, default=12, help="images from each")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    parts = {
        data.as_posix(): next(iter(batches(image_folder(data), Preprocessing(256, 224), options.count, SEED)))[0].float() / 255
        for data in options.data
    }
    images = torch.cat([*parts.values()])
    noise = NOISE / 255 * torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
    facts = provenance(images.device, ("oag-transform", "torch", "torchvision"))
    rows: dict[str, Any] = {}
    found = {
        "n": len(images),
        "counts": {data: len(images) for data, images in parts.items()},
        "steps": STEPS,
        "noise": NOISE,
        **facts,
        "command": shlex.join(["python", "-m", "benchmarks.detail", *sys.argv[1:]]),
        "settings": _plain(dataclasses.asdict(BASE)),
        "rows": rows,
    }
    print(f"{len(images)} images; PSNR in dB, and noise that passes, at T_N = {STEPS}")
    for name, changed in SETTINGS.items():
        defense = OnlineAlternateGenerator(**dataclasses.asdict(BASE) | {"seed": SEED} | changed)
        rows[name] = {"settings": _plain(changed), "at": measured(defense, images, noise)}
        print(f"{name:38s}" + "   ".join("  ".join(_cells(at)) for at in rows[name]["at"].values()), flush=True)
        if options.out is not None:  # each time: a run that is stopped leaves what it has
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _cells(at: dict[str, float] | None) -> tuple[str, str]:
    return ("diverged", "") if at is None else (f"{at['psnr']:.2f}", f"{at['share']:.3f}")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON takes them: a dtype by its name."""
    return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in settings.items()}


if __name__ == "__main__":
    with torch.no_grad():
        main()
