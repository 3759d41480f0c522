"""Images for tests: synthetic ones, and two that come with scikit-image."""

import numpy as np
import torch
from skimage import data
from torch import Tensor

from oag_transform.images import IMAGENET_MEAN

QUIET = torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1).expand(3, 20, 20) / 255  # zero in model units: nothing is to be learned


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform random numbers of a shape, in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def synthetic_image(*shape: int, seed: int = 0) -> Tensor:
    """A smooth random image in [0, 1] with some fine noise, float64."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:-2], 4, 4, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse.reshape(1, -1, 4, 4), size=shape[-2:], mode="bicubic").reshape(shape)
    return (smooth + 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def sample_images() -> Tensor:
    """Crops (2, 3, 224, 224) float32 in [0, 1] of the astronaut and of the cat that come with scikit-image."""
    crops = [data.astronaut()[:224, 100:324], data.chelsea()[40:264, 120:344]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous() / 255
