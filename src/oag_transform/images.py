"""Kinds of images: conversion to one layout and back to the same kind."""

import math
from typing import TypeVar

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

ImageLike = TypeVar("ImageLike", PIL.Image.Image, Tensor)

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # grey levels; torchvision's (0.485, 0.456, 0.406)
IMAGENET_MEAN_GREY = 117.0  # luminance of IMAGENET_MEAN
THIN = 64
"""The largest aspect ratio up to which :func:`resize` enlarges an image."""


def to_batch(images: PIL.Image.Image | Tensor) -> Tensor:
    """An image or a batch of any checked kind -> a plain, detached tensor (N, C, H, W) in [0, 1], float32 (float64 stays)."""
    if isinstance(images, PIL.Image.Image):
        with torch.device("cpu"):  # whatever torch.set_default_device says
            tensor = tvf.pil_to_tensor(images)
    else:
        tensor = images.detach().as_subclass(Tensor)
    tensor = tensor.reshape(-1, *tensor.shape[-3:]) if tensor.numel() else tensor.new_empty(0, *tensor.shape[-3:])
    if tensor.dtype == torch.uint8:
        return tensor.float().div_(255)
    return tensor.to(work_type(images)[1])


def resize(image: PIL.Image.Image, side: int, interpolation: InterpolationMode, name: str) -> PIL.Image.Image:
    """Resize an image to a short side of ``side`` pixels, with its aspect ratio, by torchvision's ``resize``.

    Raises:
        ValueError: the result would have more pixels than the image, and more than Pillow's limit for files of about 179
            megapixels; or, of a thin image, more than :data:`THIN` times ``side`` x ``side``. A small file would need an
            unbounded amount of memory. The message calls the image ``name``.
    """
    (width, height), short = image.size, min(image.size)
    long = max(width, height) * side // short
    if side * long > max(width * height, THIN * side * side):
        raise ValueError(
            f"{name} has {width} x {height} pixels, too thin to be resized to a short side of {side}: the long side would have "
            f"{long}; crop it"
        )
    limit = 2 * (PIL.Image.MAX_IMAGE_PIXELS or math.inf)  # that of Pillow for files
    if side * long > max(width * height, limit):
        raise ValueError(
            f"{name} has {width} x {height} pixels; resized to a short side of {side}, it would have {side * long / 1e6:.0f} "
            f"megapixels, more than {limit / 1e6:.0f}"
        )
    return tvf.resize(image, [side], interpolation=interpolation)


def work_type(images: PIL.Image.Image | Tensor) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the result of :func:`to_batch`."""
    if isinstance(images, PIL.Image.Image):
        return torch.device("cpu"), torch.float32
    return images.device, torch.float64 if images.dtype == torch.float64 else torch.float32


def like(batch: Tensor, original: ImageLike) -> ImageLike:
    """(N, C, H, W) in [0, 1] -> the kind, shape and dtype of ``original``; uint8 and PIL are rounded to 1/255."""
    if isinstance(original, PIL.Image.Image):
        image = tvf.to_pil_image(to_uint8(batch[0]))
        image.info = dict(original.info)
        return image
    converted = to_uint8(batch) if original.dtype == torch.uint8 else batch.to(original.dtype)
    converted = converted.reshape(original.shape)
    return tv_tensors.wrap(converted, like=original) if isinstance(original, tv_tensors.TVTensor) else converted


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> uint8, rounded to the nearest of 255 levels."""
    return (255 * pixels).round_().to(torch.uint8)


def to_model_units(batch: Tensor, scale: float) -> Tensor:
    """Pixels in [0, 1] -> model units I = (255 x - mean) / scale: zero is the mean colour, a unit is ``scale`` grey levels."""
    return (255 * batch - _mean(batch)) / scale


def to_pixels(images: Tensor, scale: float) -> Tensor:
    """Model units -> pixels, clipped to [0, 1]."""
    return ((scale * images + _mean(images)) / 255).clamp(0, 1)


def _mean(images: Tensor) -> Tensor:
    mean = IMAGENET_MEAN if images.shape[-3] == 3 else (IMAGENET_MEAN_GREY,)
    return images.new_tensor(mean)[:, None, None]
