"""Accuracy behind the default setting on photographs: clean, and under the paper's four attacks.

python -m benchmarks.quality --train DIR --val DIR      (two ImageFolders, such as Oxford Flower-17; extra ``eval``)

The target is a linear layer fitted on ``--train`` to the features of EfficientNet-lite0. Images are the first ``--count`` of a
shuffled ``--val`` that it classifies correctly. Attacks know the target and not the defense (gray box, paper II-B), with the
settings of section IV-A: FGSM and IGSM targeted at a random class, eps 6/255; MI-FGSM untargeted, ``--mifgsm-eps``; C&W
untargeted, L2. Attacked images are rounded to 8 bits.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox
import torch
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from oag_transform import OnlineAlternateGenerator, choose_network_steps
from oag_transform.targets import efficientnet_lite0


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of an ImageFolder, (N, 3, 224, 224) in [0, 1], and their labels."""
    preprocess = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    samples = list(tqdm(ImageFolder(folder, preprocess), desc=f"load {folder.name}", leave=False))
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def in_parts(function: Callable[[Tensor], Tensor], images: Tensor, desc: str | None = None) -> Tensor:
    """Apply ``function`` to five images at a time."""
    parts = images.split(5)
    with torch.no_grad():
        return torch.cat([function(part) for part in tqdm(parts, desc=desc, leave=False, disable=desc is None)])


def fit_target(images: Tensor, labels: Tensor) -> nn.Sequential:
    """EfficientNet-lite0 with a linear layer for these classes, fitted with everything else frozen."""
    target = efficientnet_lite0()
    network = target[1]
    network._fc = nn.Identity()
    features = in_parts(target, images, "features")
    head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(features), labels) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    network._fc = head.requires_grad_(False)
    return target


def attack_all(target: nn.Module, images: Tensor, labels: Tensor, classes: int, mifgsm_eps: int) -> dict[str, Tensor]:
    """The paper's four attacks, rounded to 8 bits."""
    model = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    generator = torch.Generator().manual_seed(1)
    wrong = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    attacks = foolbox.attacks

    def iterations(eps: int) -> int:
        return min(eps + 4, math.ceil(1.25 * eps))

    def igsm(eps: int, steps: int, step_size: float) -> foolbox.Attack:
        return attacks.LinfBasicIterativeAttack(abs_stepsize=step_size / 255, steps=steps, random_start=False)

    momentum = attacks.LinfMomentumIterativeFastGradientMethod(
        abs_stepsize=1 / 255, steps=iterations(mifgsm_eps), random_start=False
    )
    cw = attacks.L2CarliniWagnerAttack(binary_search_steps=2, steps=30, stepsize=0.01, confidence=2, initial_const=10)
    chosen: dict[str, tuple[foolbox.Attack, float | None, bool]] = {
        "fgsm": (igsm(6, 1, 6), 6 / 255, True),  # one step of the whole length is FGSM, with a target
        "igsm": (igsm(6, iterations(6), 1), 6 / 255, True),
        "mifgsm": (momentum, mifgsm_eps / 255, False),
        "cw": (cw, None, False),
    }
    results = {}
    for name, (attack, eps, targeted) in chosen.items():
        parts = []
        for i in tqdm(range(0, len(images), 5), desc=name, leave=False):
            rows = slice(i, i + 5)
            criterion = (
                foolbox.criteria.TargetedMisclassification(wrong[rows])
                if targeted
                else foolbox.criteria.Misclassification(labels[rows])
            )
            parts.append(attack(model, images[rows], criterion, epsilons=eps)[1])
        results[name] = (255 * torch.cat(parts)).round() / 255
    return results


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    """JPEG compression and decompression of [0, 1] images."""
    compress = v2.JPEG(quality)
    return lambda images: torch.stack([compress(image) for image in (255 * images).round().to(torch.uint8)]) / 255


def total_variation(weight: float) -> Callable[[Tensor], Tensor]:
    """scikit-image's Chambolle total-variation denoising of [0, 1] images."""

    def denoise(image: Tensor) -> Tensor:
        return torch.from_numpy(denoise_tv_chambolle(image.numpy(), weight=weight, channel_axis=0)).float()

    return lambda images: torch.stack([denoise(image) for image in images])


def choose(options: argparse.Namespace) -> None:
    """Print the curve of section III-D on half of the training images, with a target fitted on the other half."""
    images, labels = load(options.train)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fitted, held_out = order[: len(order) // 2], order[len(order) // 2 :]
    target = fit_target(images[fitted], labels[fitted])
    images, labels = keep_right(target, images[held_out], labels[held_out], options.count)
    longest = 400 if options.paper else 80
    chosen = choose_network_steps(
        target, images, labels, options.noise_std, defense=make(options, network_steps=longest), every=longest // 20
    )
    print(f"{len(images)} images of {options.train.name}, Gaussian noise {options.noise_std}: T_N = {chosen.steps}")
    print("\n".join(f"  {step:4d}  {accuracy:.3f}" for step, accuracy in chosen.curve))


def compare(options: argparse.Namespace) -> None:
    """Print accuracy, clean and attacked, of the transform and of three defenses to measure it by."""
    images, labels = load(options.train)
    classes = int(labels.max()) + 1
    target = fit_target(images, labels)
    images, labels = keep_right(target, *load(options.val), options.count)
    columns = {"clean": images} | attack_all(target, images, labels, classes, options.mifgsm_eps)
    defenses: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda images: images,
        "JPEG, quality 75": jpeg(75),
        "JPEG, quality 25": jpeg(25),
        "total variation 0.1": total_variation(0.1),
        "oag-transform": make(options),
    }
    print(f"{len(labels)} images; {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(defenses["oag-transform"])
    print(f"{'':<22}" + "".join(f"{name:>8}" for name in columns) + f"{'attacked':>10}{'s/image':>9}")
    figures = {}
    for name, defense in defenses.items():
        start = time.perf_counter()
        purified = {column: in_parts(defense, batch, f"{name}, {column}") for column, batch in columns.items()}
        each = (time.perf_counter() - start) / len(columns) / len(labels)
        accuracies = {column: accuracy(target, batch, labels) for column, batch in purified.items()}
        attacked = sum(value for column, value in accuracies.items() if column != "clean") / (len(columns) - 1)
        figures[name] = accuracies | {"attacked": attacked, "seconds": each}
        print(f"{name:<22}" + "".join(f"{v:>8.2f}" for v in accuracies.values()) + f"{attacked:>10.3f}{each:>9.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"n": len(labels), "seed": options.seed, "figures": figures}, indent=2))


def make(options: argparse.Namespace, **overrides: Any) -> OnlineAlternateGenerator:
    """The transform that is measured."""
    if options.paper:
        return OnlineAlternateGenerator.paper(seed=options.seed, langevin="closed_form", **overrides)
    return OnlineAlternateGenerator(seed=options.seed, **overrides)


def keep_right(target: nn.Module, images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images, in an order shuffled with a seed, that the target classifies correctly."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    right = in_parts(target, images, "classify").argmax(1) == labels
    print(f"the target alone: {right.float().mean():.3f} of {len(right)} images")
    return images[right][:count], labels[right][:count]


def accuracy(target: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy."""
    return float((in_parts(target, images).argmax(1) == labels).float().mean())


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--count", type=int, default=100, help="images (default: %(default)s)")
    parser.add_argument("--mifgsm-eps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="seed of the purification")
    parser.add_argument("--paper", action="store_true", help="the paper's setting, with the closed form in its inner loop")
    parser.add_argument("--choose-steps", action="store_true", help="choose T_N on Gaussian-noised images of --train instead")
    parser.add_argument("--noise-std", type=float, default=0.1, help="with --choose-steps, on the [0, 1] scale")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if not options.choose_steps and options.val is None:
        parser.error("--val is needed")
    if options.choose_steps:
        choose(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
