"""Image kinds: check what came in, bring it to one layout, and give the same kind back."""

from typing import Any, TypeVar

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

ImageLike = TypeVar("ImageLike", PIL.Image.Image, Tensor)

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # grey levels; torchvision's (0.485, 0.456, 0.406)
IMAGENET_MEAN_GREY = 117.0  # luminance of IMAGENET_MEAN
RANGE_TOLERANCE = 1e-4  # rounding of a normalisation undone; anything more is an error


def check(images: Any, *, minimum_size: int) -> None:
    """Raise unless ``images`` is an image or a batch of images that can be purified.

    Raises:
        TypeError: not a PIL image or tensor, or a dtype that is neither uint8 nor floating point.
        ValueError: a PIL mode other than RGB or L, a shape other than (..., 1 or 3, H, W), H or W below ``minimum_size``,
            NaN or infinity, or values outside [0, 1].
        RuntimeError: a CUDA tensor in a DataLoader worker.
    """
    if isinstance(images, PIL.Image.Image):
        if images.mode not in ("RGB", "L"):
            raise ValueError(f"expected a PIL image of mode RGB or L, got mode {images.mode}; use image.convert('RGB')")
        _check_size(images.height, images.width, minimum_size)
        return
    if not isinstance(images, Tensor) or isinstance(images, (tv_tensors.Mask, tv_tensors.BoundingBoxes)):
        raise TypeError(f"expected a PIL image, a tensor or a tv_tensors.Image, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"expected uint8, or floating point in [0, 1], got {images.dtype}")
    if images.ndim < 3 or images.shape[-3] not in (1, 3):
        raise ValueError(f"expected shape (..., C, H, W) with C = 1 or 3, got {tuple(images.shape)}")
    _check_size(images.shape[-2], images.shape[-1], minimum_size)
    if images.is_cuda and torch.utils.data.get_worker_info() is not None:
        raise RuntimeError(
            "got a CUDA tensor inside a DataLoader worker; purify on the CPU there, "
            "or after the loader, on the batch in the main process"
        )
    if images.numel() and images.is_floating_point():
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # also true for NaN
            raise ValueError(
                f"expected floating-point values in [0, 1], got [{low:.4g}, {high:.4g}]; purify before any normalisation, "
                "and divide 0-255 images by 255"
            )


def check_batch(images: Any) -> None:
    """Raise unless ``images`` is a floating-point tensor of shape (N, C, H, W) that :func:`check` lets through at any size.

    Raises:
        TypeError, ValueError: see :func:`check`; another kind or dtype, or another number of dimensions.
    """
    check(images, minimum_size=1)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4:
        raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(images.shape)}")


def _check_size(height: int, width: int, minimum: int) -> None:
    if min(height, width) < minimum:
        raise ValueError(f"expected height and width of at least kernel_size = {minimum} pixels, got {height} x {width}")


def to_batch(images: PIL.Image.Image | Tensor) -> Tensor:
    """An image or a batch of any checked kind -> (N, C, H, W), float32 (float64 stays), in [0, 1], detached, plain."""
    tensor = F.pil_to_tensor(images) if isinstance(images, PIL.Image.Image) else images.detach().as_subclass(Tensor)
    tensor = tensor.reshape(-1, *tensor.shape[-3:]) if tensor.numel() else tensor.new_empty(0, *tensor.shape[-3:])
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def like(batch: Tensor, original: ImageLike) -> ImageLike:
    """(N, C, H, W) in [0, 1] -> the kind, shape and dtype of ``original``; uint8 and PIL are rounded to 1/255."""
    if isinstance(original, PIL.Image.Image):
        return F.to_pil_image(_to_uint8(batch[0]))
    converted = _to_uint8(batch) if original.dtype == torch.uint8 else batch.to(original.dtype)
    converted = converted.reshape(original.shape)
    return tv_tensors.wrap(converted, like=original) if isinstance(original, tv_tensors.TVTensor) else converted


def _to_uint8(batch: Tensor) -> Tensor:
    return (255 * batch).round().to(torch.uint8)


def to_model_units(batch: Tensor, scale: float) -> Tensor:
    """Pixels in [0, 1] -> model units, I = (255 x - mean) / scale: zero is the mean colour, a unit is ``scale`` grey levels."""
    return (255 * batch - _mean(batch)) / scale


def to_pixels(images: Tensor, scale: float) -> Tensor:
    """Model units -> pixels, held to [0, 1] as any image is."""
    return ((scale * images + _mean(images)) / 255).clamp(0, 1)


def _mean(images: Tensor) -> Tensor:
    mean = IMAGENET_MEAN if images.shape[-3] == 3 else (IMAGENET_MEAN_GREY,)
    return images.new_tensor(mean)[:, None, None]
