"""What a setting keeps of a photograph and what it lets through of noise: how the default's hyper-parameters were compared.

python -m benchmarks.detail --data flower17/train --data imagenet/train          (a few minutes on two cores)

For each setting and T_N: the PSNR of the mode I* (Eq. 9, 10; the image without its Langevin noise) to the photograph, and the
share of white noise (6 grey levels) that comes through, <I*(x + n) - I*(x), n> / <n, n>. No classifier and no attack is used.
All settings are at full strength: these photographs are clean, and the default would follow that.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oag_transform import OnlineAlternateGenerator
from oag_transform.evaluation.data import Preprocessing, batches, image_folder
from oag_transform.generator.run import alternate, choose_loop
from oag_transform.images import to_pixels

STEPS = (8, 12, 24)
NOISE = 6 / 255
DEFAULT = OnlineAlternateGenerator().settings
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no threshold": {"threshold": 0.0},
    "half the threshold": {"threshold": DEFAULT.threshold / 2},
    "twice the threshold": {"threshold": 2 * DEFAULT.threshold},
    "PyTorch's filters": {"init": "uniform"},
    "PyTorch's filters, no threshold": {"init": "uniform", "threshold": 0.0},
    "W fixed": {"conv_lr": 0.0},
    "a quarter of v's rate": {"fc_lr": DEFAULT.fc_lr / 4},
    "7 x 7 kernels": {"kernel_size": 7},
    "15 x 15 kernels": {"kernel_size": 15},
    "stride 2, 32 filters": {"stride": 2, "filters": 32},
    "half the filters": {"filters": DEFAULT.filters // 2},
    "twice the filters": {"filters": 2 * DEFAULT.filters},
    "rates of Eq. 5 as they stand": {"adaptive_lr": False},
}


def modes(image: Tensor, defense: OnlineAlternateGenerator, index: int) -> Iterator[tuple[int, Tensor]]:
    """(step, mode in [0, 1]) of an image (1, 3, H, W) at each of ``STEPS``."""
    s = defense.settings
    for state in alternate(image, s, choose_loop(s, image.device, image.dtype), 0, [index], every=1):
        if state.step in STEPS:
            yield state.step, to_pixels(state.mode, s.scale)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="a folder of folders of photographs; repeat")
    parser.add_argument("--count", type=int, default=12, help="photographs from each")
    options = parser.parse_args()
    photographs = torch.cat(
        [
            next(iter(batches(image_folder(data), Preprocessing(256, 224), options.count, 0)))[0].float() / 255
            for data in options.data
        ]
    )
    noise = NOISE * torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    print(f"{len(photographs)} photographs; PSNR in dB, and noise that comes through, at T_N = {STEPS}")
    for name, setting in SETTINGS.items():
        defense = OnlineAlternateGenerator(**{"network_steps": STEPS[-1], "strength": 1.0} | setting)
        found: dict[int, list[tuple[float, float]]] = {step: [] for step in STEPS}
        for index, (image, n) in enumerate(zip(photographs.split(1), noise.split(1), strict=True)):
            pairs = zip(modes(image, defense, index), modes(image + n, defense, index), strict=True)
            for (step, clean), (_, noisy) in pairs:
                psnr = -10 * math.log10((clean - image).square().mean().item())
                found[step].append((psnr, ((noisy - clean) * n).sum().item() / n.square().sum().item()))
        means = [torch.tensor(found[step]).mean(0).tolist() for step in STEPS]
        print(f"{name:32s}" + "   ".join(f"{psnr:5.2f}  {through:.3f}" for psnr, through in means), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
