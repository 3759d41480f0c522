"""Image files: the one reader, which shows a photograph as a viewer would and never clips what has more than 8 bits."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, PIL.Image.DecompressionBombError)  # Pillow raises all


def read_rgb(path: Path) -> PIL.Image.Image:
    """The photograph in a file as an RGB image: what :func:`read` gives, without transparency; greyscale has equal channels.

    Raises:
        ValueError: see :func:`read`.
    """
    return read(path).convert("RGB")


def read(path: Path) -> PIL.Image.Image:
    """The photograph in a file, turned as its EXIF says, with 8 bits a channel.

    Greyscale of more bits becomes mode L with rounding: 16 bits are divided by 257, 32-bit integers too unless none is above
    255, floating point is taken as [0, 1]. All other modes (RGB, L, RGBA, P, CMYK, ...) and the metadata stay as they are; of
    several frames it is the first.

    Raises:
        ValueError: a file that is missing, empty, cut short, no image, or too large to be one (Pillow's limit, some 179
            megapixels), or greyscale outside of these ranges. One line that names the file, and what to do where there is a
            remedy.
    """
    return _read(path, str(path), None)


def read_bytes(content: bytes, *, name: str = "the file", formats: tuple[str, ...] | None = None) -> PIL.Image.Image:
    """The photograph in the bytes of a file, as :func:`read` gives it.

    Args:
        content: the whole file.
        name: what messages call it.
        formats: Pillow's names of those to try, such as ``("JPEG", "PNG")``; None: every one that it knows.

    Raises:
        ValueError: see :func:`read`.
    """
    return _read(content, name, formats)


def _read(source: Path | bytes, name: str, formats: tuple[str, ...] | None) -> PIL.Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # photographs of 100 megapixels are real
            with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as file:
                file.load()
                image = PIL.ImageOps.exif_transpose(file)
    except UNREADABLE as error:
        raise ValueError(f"{name} is not an image that can be read: {_reason(source, formats, error)}") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return PIL.Image.fromarray(_eight_bits(name, image), "L")
    return image


def _eight_bits(name: str, image: PIL.Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    found = f"{name} is greyscale of mode {image.mode} with values from {low:g} to {high:g}"
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise ValueError(f"{found}; scale them to [0, 1], or save it with 8 or 16 bits")
        values = 255 * values
    elif low < 0 or high > 65535:
        raise ValueError(f"{found}; save it with 8 or 16 bits, 0 to 255 or 65535")
    elif image.mode != "I" or high > 255:
        values = values / 257
    return np.rint(values).astype(np.uint8)


def _reason(source: Path | bytes, formats: tuple[str, ...] | None, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PIL.UnidentifiedImageError):
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            return "the file is empty"
        return "its format is none " + ("that Pillow knows" if formats is None else f"of {', '.join(formats)}")
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"more than {2 * (PIL.Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels; resize it"
    return (str(error).splitlines() or [type(error).__name__])[0]
