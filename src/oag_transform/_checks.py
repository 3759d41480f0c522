"""The validators. Their errors name the value and what was expected, before any work is done."""

import contextlib
import importlib
import math
import numbers
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors

NOT_TRACED = "a defense can't be exported or traced: it trains a network for each image; export the target alone"
NOT_VMAPPED = "a defense can't be vmapped: it takes batches (N, C, H, W) as they are; call it on the batch"
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
GREY_LEVELS = 16  # larger than the results of normalisation and noise: a scale of 0 to 255
RANGE_TOLERANCE = 1e-4  # the rounding of a normalisation and its inverse; larger deviations are errors


class OfImages(Exception):  # noqa: N818 - a base of errors
    """An error about some images of a batch."""

    def renamed(self, images: Sequence[int]) -> "OfImages":
        """The same error about ``images[r]`` in place of image r."""
        raise NotImplementedError


class NonFiniteLogitsError(OfImages, ValueError):
    """A classifier returned logits that are NaN or infinite.

    Attributes:
        images: the positions of the images in the batch; empty where the error comes from a DataLoader's worker.
    """

    def __init__(self, images: list[int] | str) -> None:  # DataLoader makes it anew from its message
        super().__init__(images)
        self.images = [] if isinstance(images, str) else images

    def __str__(self) -> str:
        if isinstance(self.args[0], str):
            return self.args[0]
        first = ", ".join(map(str, self.images[:10])) + (", ..." if len(self.images) > 10 else "")
        return (
            f"expected finite logits, got NaN or infinity for image(s) [{first}]; a network in float16 may overflow, "
            "use float32 or bfloat16"
        )

    def renamed(self, images: Sequence[int]) -> "NonFiniteLogitsError":
        """See :class:`OfImages`."""
        if isinstance(self.args[0], str):
            return self
        return NonFiniteLogitsError(sorted({images[row] for row in self.images}))


def integer(name: str, value: Any, *, at_least: int = 0, at_most: int | None = None) -> int:
    """``value`` as an int: a Python or NumPy integer of at least ``at_least`` and at most ``at_most``.

    Raises:
        ValueError: anything else, including True and False.
    """
    if not _is_integer(value) or value < at_least or (at_most is not None and value > at_most):
        bounds = f">= {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
    return int(value)


def odd(name: str, value: Any) -> int:
    """``value`` as an int: an odd Python or NumPy integer of at least 1.

    Raises:
        ValueError: anything else.
    """
    found = integer(name, value, at_least=1)
    if found % 2 == 0:
        raise ValueError(f"{name} must be odd, got {found}")
    return found


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """``value`` as a Python number: a finite Python or NumPy number within the given bounds.

    Raises:
        ValueError: anything else.
    """
    fits = _is_number(value) and (above is None or value > above) and (at_least is None or value >= at_least)
    if not fits or (below is not None and value >= below) or (at_most is not None and value > at_most):
        given = ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
        bounds = [f"{sign} {bound:g}" for sign, bound in given if bound is not None]
        raise ValueError(f"{name} must be a finite number {' and '.join(bounds)}, got {value!r}")
    return _plain(value)


def choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """``value``, which must be one of the choices.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, (Tensor, list, dict)) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """``value``, which must be True or False.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def seed(value: Any) -> int | None:
    """A seed: None, or an integer of at least 0, as an int.

    Raises:
        ValueError: anything else.
    """
    if value is not None and (not _is_integer(value) or value < 0):
        raise ValueError(f"seed must be None or an integer >= 0, got {value!r}")
    return None if value is None else int(value)


def indices(index: Any, count: int) -> list[int]:
    """The random streams of ``count`` images: ``index``, ``index + 1``, ... for an integer, or one given for each image.

    Raises:
        ValueError: neither an integer of at least 0, nor a sequence, one-dimensional tensor or array of ``count`` such
            integers.
    """
    if _is_integer(index):
        first = integer("index", index)
        return list(range(first, first + count))
    plain = index.tolist() if hasattr(index, "tolist") else index
    if _is_integer(plain):  # a tensor or an array without dimensions
        return indices(plain, count)
    if not isinstance(plain, Sequence) or isinstance(plain, (str, bytes)):
        raise ValueError(f"index must be an integer >= 0, or one for each image, got {index!r}")
    if len(plain) != count:
        raise ValueError(f"index must be an integer, or one for each of {count} images, got {len(plain)} of them")
    return [integer("index", each) for each in plain]


def eager(value: Any) -> None:
    """Raise if ``value`` is the placeholder of a tracer.

    Raises:
        RuntimeError: under ``torch.export``, ``torch.fx`` or ``torch.jit.trace``.
    """
    exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7 on
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if isinstance(value, torch.fx.Proxy) or tracing or exporting():
        raise RuntimeError(NOT_TRACED)


def images(images: Any, *, minimum_size: int) -> None:
    """Raise unless ``images`` is an image or a batch of images that can be purified.

    Raises:
        TypeError: neither a PIL image nor a dense tensor with values, or a dtype that isn't one of :data:`DTYPES`.
        ValueError: a PIL mode other than RGB or L, a shape other than (..., 1 or 3, H, W), H or W below ``minimum_size``,
            NaN or infinity, or values outside [0, 1].
        RuntimeError: a CUDA tensor in a DataLoader worker.
    """
    if isinstance(images, PIL.Image.Image):
        if images.mode not in ("RGB", "L"):
            raise ValueError(f"expected a PIL image of mode RGB or L, got mode {images.mode}; {_remedy(images.mode)}")
        _size(images.height, images.width, minimum_size)
        return
    if not isinstance(images, Tensor) or _is_no_image(images):
        raise TypeError(f"expected a PIL image, a tensor or a tv_tensors.Image, got {type(images).__name__}")
    not_nested(images)
    if images.layout != torch.strided or images.is_meta:
        raise TypeError(f"expected a dense tensor with values, got layout {images.layout} on device {images.device}")
    if images.dtype not in DTYPES:
        raise TypeError(f"expected uint8, or floating point in [0, 1], got {images.dtype}")
    if images.ndim < 3 or images.shape[-3] not in (1, 3):
        raise ValueError(f"expected shape (..., C, H, W) with C = 1 or 3, got {tuple(images.shape)}")
    _size(images.shape[-2], images.shape[-1], minimum_size)
    if images.is_cuda and torch.utils.data.get_worker_info() is not None:
        raise RuntimeError(
            "got a CUDA tensor inside a DataLoader worker; purify on the CPU there, "
            "or after the loader, on the batch in the main process"
        )
    if images.numel() and images.is_floating_point():
        low, high = _extremes(images)
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # true for NaN, too
            raise ValueError(
                f"expected floating-point values in [0, 1], got [{low:.4g}, {high:.4g}]; {_range_remedy(low, high)}"
            )


def not_nested(tensor: Tensor) -> None:
    """Raise for a nested tensor, which has no shape.

    Raises:
        TypeError: a tensor of either nested layout.
    """
    if tensor.is_nested:
        raise TypeError("expected a dense tensor, got a nested one; give its images one by one, or as batches of one size")


def batch(value: Any) -> None:
    """Raise unless ``value`` is a floating-point tensor (N, C, H, W) that :func:`images` accepts at any size.

    Raises:
        TypeError, ValueError: see :func:`images`; or another kind, dtype or number of dimensions.
    """
    images(value, minimum_size=1)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.ndim != 4:
        raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(value.shape)}")


def purified(result: Any, images: Tensor) -> Tensor:
    """The images that a defense returned for a batch of images, in the dtype of that batch.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not of shape (N, C, H, W) of as many images, NaN or infinity, or values of 0 to 255.
    """
    count = len(images)
    if not isinstance(result, Tensor) or not result.is_floating_point():
        got = result.dtype if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"expected the defense to return a floating-point tensor, got {got}")
    if result.ndim != 4 or len(result) != count:
        raise ValueError(f"expected the defense to return {count} images (N, C, H, W), got shape {tuple(result.shape)}")
    low, high = _extremes(result)  # one pass, without a mask of every value
    if not (math.isfinite(low) and math.isfinite(high)):
        broken = (~result.detach().isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        raise ValueError(f"expected finite images from the defense, got NaN or infinity for image(s) {broken} of its batch")
    if high > GREY_LEVELS:
        raise ValueError(f"expected the defense to return images in [0, 1], got values up to {high:.4g}; divide them by 255")
    return result.to(images.dtype)


def logits_in(output: Any) -> Any:
    """A classifier's output itself if it is a tensor, else its ``.logits`` (Hugging Face); None where it has none."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def logits(output: Any, count: int) -> Tensor:
    """The logits (``count``, classes) in a classifier's output, see :func:`logits_in`.

    Raises:
        TypeError: the output is neither a tensor nor an object with ``.logits``, or its logits aren't floating point.
        ValueError: a shape other than (``count``, at least 2).
    """
    found = logits_in(output)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"expected the target to return logits (N, classes), or an object with .logits, got {type(output).__name__}"
        )
    if not found.is_floating_point():
        raise TypeError(f"expected the target to return floating-point logits, got {found.dtype}")
    if found.ndim != 2 or len(found) != count or found.shape[1] < 2:
        raise ValueError(
            f"expected the target to return logits (N, classes) of N = {count} images and at least 2 classes, got shape "
            f"{tuple(found.shape)}"
            + ("; give a binary classifier two logits, (-x, x)" if found.shape[1:] in ((), (1,)) else "")
        )
    return found


def finite_pixels(images: Tensor) -> Tensor:
    """The images themselves, if all their values are finite and not of 0 to 255: clipping can't repair these.

    Raises:
        ValueError: they aren't.
    """
    low, high = _extremes(images)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"expected finite values, got [{low:.4g}, {high:.4g}]; {_range_remedy(low, high)}")
    if high > GREY_LEVELS:
        raise ValueError(
            f"expected images in [0, 1] or slightly outside, got [{low:.4g}, {high:.4g}]; {_range_remedy(low, high)}"
        )
    return images


def finite(logits: Tensor) -> Tensor:
    """The logits (..., N, classes) themselves, if all of them are finite.

    Raises:
        NonFiniteLogitsError: NaN or infinity. The error has the rows, from 0 to N - 1; see :func:`rows_are`.
    """
    good = logits.detach().isfinite().all(-1)
    if not good.all():
        raise NonFiniteLogitsError((~good).reshape(-1, logits.shape[-2]).any(0).nonzero().flatten().tolist())
    return logits


def labels(given: Any, count: int, classes: int | None = None) -> Tensor:
    """The labels (count,) of images as int64; each must be below ``classes``.

    Raises:
        TypeError: they aren't a tensor of integers.
        ValueError: another number of them, or labels out of range.
    """
    if not isinstance(given, Tensor) or given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise TypeError(f"expected labels as a tensor of integers, got {getattr(given, 'dtype', type(given).__name__)}")
    if given.shape != (count,):
        raise ValueError(f"expected labels of shape ({count},), one for each image, got {tuple(given.shape)}")
    given = given.long()
    low, high = (int(given.min()), int(given.max())) if count else (0, 0)
    if low < 0 or (classes is not None and high >= classes):
        wanted = "of at least 0" if classes is None else f"from 0 to {classes - 1}"
        raise ValueError(f"expected labels {wanted}, got {low} to {high}")
    return given


def device(name: str, value: str) -> torch.device:
    """The device of a name such as ``"cuda:1"``.

    Raises:
        ValueError: it can't be used here.
    """
    try:
        found = torch.zeros(1, device=value)
        found.cpu()  # fails on the device "meta"
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"{name} {value!r} can't be used here: {str(error).splitlines()[0]}") from error
    return found.device


def from_extra(module: str, user: str, extra: str) -> Any:
    """A module that comes with an extra of this package, for ``user``.

    Raises:
        ModuleNotFoundError: it is missing; the message says who needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ModuleNotFoundError(f"{user} needs {package}: pip install 'oag-transform[{extra}]'") from error


@contextlib.contextmanager
def rows_are(images: Sequence[int]) -> Iterator[None]:
    """A context in which an error of class :class:`OfImages` names image ``images[r]`` for row r of a batch."""
    try:
        yield
    except OfImages as error:
        raise error.renamed(images) from error


def _is_no_image(images: Tensor) -> bool:
    """Whether torchvision says that a tensor is something else, such as boxes, key points or a mask."""
    return isinstance(images, tv_tensors.TVTensor) and not isinstance(images, (tv_tensors.Image, tv_tensors.Video))


def _size(height: int, width: int, minimum: int) -> None:
    if min(height, width) < minimum:
        raise ValueError(f"expected height and width of at least {minimum} pixels, got {height} x {width}")


def _extremes(images: Tensor) -> tuple[float, float]:
    """The least and the greatest value; 0 and 1 where there is none."""
    if not images.numel():
        return 0.0, 1.0
    try:
        low, high = torch.aminmax(images.detach())
        return float(low), float(high)
    except RuntimeError as error:
        if "vmap" in str(error):
            raise RuntimeError(NOT_VMAPPED) from error
        raise


def _range_remedy(low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "NaN and infinity are no pixels"
    if high > GREY_LEVELS:
        return "divide 0-255 images by 255"
    if low >= -0.3 and high <= 1.3:
        return (
            "use clamp(0, 1) where a resize, noise or an attack goes slightly beyond (or DefendedModel(..., clip=True)), "
            "and purify before any normalisation"
        )
    return "purify before any normalisation, or use clamp(0, 1) where noise or an attack goes beyond"


def _remedy(mode: str) -> str:
    if mode in ("F", "I") or mode.startswith("I;16"):
        return "convert('RGB') would clip it: scale its values to [0, 1] and give them as a floating-point tensor (1, H, W)"
    return "use image.convert('RGB')"


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer or a fraction beyond every float
        return False


def _plain(value: Any) -> Any:
    """The Python number for a NumPy number or a fraction, so that ``repr`` rebuilds the object; None stays None."""
    if hasattr(value, "item"):
        return value.item()
    return value if value is None or isinstance(value, (int, float)) else float(value)
