"""What the baselines have in common: checked batches in, the same dtype out, every argument in the repr."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from ._batches import checked, generators, one_by_one, with_gradients


class Baseline(nn.Module):
    """A defense with the contract of :mod:`oag_transform.baselines.filters`. It keeps each argument under its name."""

    own_gradient: ClassVar[bool] = False
    """Whether results have the derivative of their computation."""

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """Defended images; see :mod:`.filters` for shapes and errors. ``index`` has no effect where there is no ``seed``."""
        batch, indices = checked(images, index)
        with torch.autocast(batch.device.type, enabled=False):  # not the caller's
            return self._defended(batch, indices).to(images.dtype)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        """The result for checked images in float32 or float64, and the stream of each."""
        raise NotImplementedError

    def differentiable(self) -> nn.Module | None:
        """See :func:`.surrogate.differentiable`."""
        return self if self.own_gradient else None

    def extra_repr(self) -> str:
        """Every argument, but for modules, which have a repr of their own."""
        names = inspect.signature(type(self)).parameters
        arguments = {name: getattr(self, name) for name in names if hasattr(self, name)}  # a subclass may have others
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items() if not isinstance(value, nn.Module))


class Fitted(Baseline):
    """A baseline that fits something to each image alone, with random numbers of the image's own stream; no gradient."""

    seed: int | None

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        with with_gradients():
            copies = batch.detach().clone()  # a clone is trainable, even of an inference tensor
            return one_by_one(copies, self._fit, generators(self.seed, indices, batch.device))

    def _fit(self, image: Tensor, generator: Generator) -> Tensor:
        """The result for an image (1, C, H, W)."""
        raise NotImplementedError
