"""Tiny classifiers, and six dark or bright images for them."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from oag_transform.evaluation.data import image_folder
from oag_transform.evaluation.store import Store
from oag_transform.evaluation.subject import Subject, choose_subject
from oag_transform.evaluation.targets import load_target

CLASSES = ("a_dark", "b_bright")


class Brightness(nn.Module):
    """Two classes, dark and bright, by the mean of the image."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) - 0.5
        return 30 * torch.stack([-bright, bright], 1)


class LeftHalf(Brightness):
    """The same from the left half only, with a lower threshold: attacks and defenses have other results than on Brightness."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[..., : images.shape[-1] // 2] + 0.004)


class Normalized(Brightness):
    """The same after batch normalization with the statistics of the images, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.norm.running_mean, self.norm.running_var = torch.full((3,), 0.5), torch.full((3,), 0.01)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.dropout(0.5 + 0.1 * self.norm(images)))


class Broken(nn.Module):
    """A defense that fails on every batch."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("it always fails")


def broken() -> nn.Module:
    return Broken()


def normalized() -> nn.Module:
    return Normalized()


def brightness() -> nn.Module:
    return Brightness()


def left_half() -> nn.Module:
    return LeftHalf()


def write_images(root: Path) -> Path:
    """Write six images in a folder for each class, each with the mean of its class."""
    generator = torch.Generator().manual_seed(0)
    for name, level in zip(CLASSES, (0.485, 0.515), strict=True):
        (root / name).mkdir(parents=True)
        for number in range(3):
            wave = torch.sin(torch.arange(40) / (3 + number))[None, :, None] * torch.cos(torch.arange(40) / 5)[None, None, :]
            image = 0.1 * wave + 0.02 * torch.randn(3, 40, 40, generator=generator)
            to_pil_image(level + image - image.mean()).save(root / name / f"{number}.png")
    return root


def make_subject(folder: Path, cache: Path, *, model: str = "brightness", chunk: int = 8, seed: int = 0) -> Subject:
    """All six images, with one of the classifiers."""
    target = load_target(f"tests.tiny:{model}", classes=CLASSES, resize=40, crop=40)
    return choose_subject(target, image_folder(folder), 6, Store(cache, chunk=chunk), seed, torch.device("cpu"))
