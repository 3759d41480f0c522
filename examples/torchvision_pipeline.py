"""The transform as a step of a torchvision pipeline: resize, crop, purify, normalise.

python examples/torchvision_pipeline.py IMAGE [IMAGE ...]
"""

import sys

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import v2

from oag_transform import OnlineAlternateGenerator


def make_pipeline(size: int = 224, **settings: int) -> v2.Compose:
    """The pipeline. Purification comes after resizing and cropping, and before normalisation."""
    return v2.Compose(
        [
            v2.Resize(size + size // 7),
            v2.CenterCrop(size),
            OnlineAlternateGenerator(**settings),  # type: ignore[arg-type]
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )


def main(paths: list[str], **settings: int) -> Tensor:
    """A normalised batch (N, 3, H, W) of purified images."""
    pipeline = make_pipeline(**settings)
    batch = torch.stack([pipeline(PIL.Image.open(path).convert("RGB")) for path in paths])
    print(f"purified and normalised: {tuple(batch.shape)}, {batch.mean():.3f} +- {batch.std():.3f}")
    return batch


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit("usage: python examples/torchvision_pipeline.py IMAGE [IMAGE ...]")
    main(sys.argv[1:])
