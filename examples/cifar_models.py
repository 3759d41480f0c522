"""CIFAR-10 classifiers that others trained, for ``oag-transform evaluate --model cifar_models:resnet20``.

Run it with ``PYTHONPATH=examples``. The checkpoints lie in the folder ``CIFAR_MODELS``, by default ``cifar10/models``:

- ``resnet20.th`` and ``resnet56.th``: the residual networks of He et al. (2016, section 4.2), as trained by
  akamaster/pytorch_resnet_cifar10;
- ``resnet2b.pth`` and ``resnet4b.pth``: small residual networks, adversarially trained by PGD at 2/255, from the verification
  competition VNN-COMP.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Normalize


class Block(nn.Module):
    """Two convolutions with batch normalization; the shortcut takes every second pixel and adds channels of zeros."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.added = (channels - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Three stages of ``blocks`` blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, 32, 32) -> logits (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class PlainBlock(nn.Module):
    """Two convolutions without batch normalization; a convolution of one pixel is the shortcut where the stride is 2."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Sequential(*([nn.Conv2d(before, channels, 1, stride)] if stride == 2 else []))

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, channels, H / stride, W / stride)."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class PlainResNet(nn.Sequential):
    """A convolution, ``stages`` stages of two plain blocks with twice its channels, and two linear layers."""

    def __init__(self, channels: int, stages: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, 2, 1)
        self.relu = nn.ReLU()
        wide = 2 * channels
        for stage in range(1, stages + 1):
            before = channels if stage == 1 else wide
            self.add_module(f"layer{stage}", nn.Sequential(PlainBlock(before, wide, 2), PlainBlock(wide, wide, 1)))
        self.flatten = nn.Flatten()
        self.linear1 = nn.Linear(wide * (16 // 2**stages) ** 2, 100)
        self.relu2 = nn.ReLU()
        self.linear2 = nn.Linear(100, 10)


def resnet20() -> nn.Module:
    """ResNet-20: images (N, 3, 32, 32) in [0, 1] -> logits (N, 10)."""
    return _imagenet_normalised(ResNet(3), "resnet20.th")


def resnet56() -> nn.Module:
    """ResNet-56: images (N, 3, 32, 32) in [0, 1] -> logits (N, 10)."""
    return _imagenet_normalised(ResNet(9), "resnet56.th")


def resnet2b() -> nn.Module:
    """ResNet-2b, adversarially trained: images (N, 3, 32, 32) in [0, 1] -> logits (N, 10)."""
    return _cifar_normalised(PlainResNet(8, stages=1), "resnet2b.pth")


def resnet4b() -> nn.Module:
    """ResNet-4b, adversarially trained: images (N, 3, 32, 32) in [0, 1] -> logits (N, 10)."""
    return _cifar_normalised(PlainResNet(16, stages=2), "resnet4b.pth")


def _imagenet_normalised(model: nn.Module, file: str) -> nn.Module:
    return nn.Sequential(Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), _loaded(model, file)).eval()


def _cifar_normalised(model: nn.Module, file: str) -> nn.Module:
    return nn.Sequential(Normalize((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)), _loaded(model, file)).eval()


def _loaded(model: nn.Module, file: str) -> nn.Module:
    path = Path(os.environ.get("CIFAR_MODELS", "cifar10/models")) / file
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model
