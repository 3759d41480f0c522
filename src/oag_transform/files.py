"""Reading image files: the only caller of Pillow's readers. A file gives an image as viewers show it, or one error."""

import io
import logging
import re
import threading
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

# Pillow's messages would be printed otherwise, without the file's name
logging.getLogger("PIL").addHandler(logging.NullHandler())

ORIENTATION = PIL.ExifTags.Base.Orientation
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two
PNG = b"\x89PNG\r\n\x1a\n"
KEPT = (b"eXIf", b"pHYs", b"tRNS")  # orientation, resolution, transparency
GREY = ("1", "L", "LA", "La")  # modes
XMP, COMMENT, EXIF_TEXT = "XML:com.adobe.xmp", "Comment", "Raw profile type exif"  # names of texts in PNG
STALE = ("exif", EXIF_TEXT, "xmp", XMP)
"""Entries of Pillow's ``info`` that state the orientation of the file's pixels."""
_RECORDING = threading.Lock()  # catch_warnings changes the whole process
TURNED = re.compile(rb'tiff:Orientation="[0-9]"|<tiff:Orientation>[0-9]</tiff:Orientation>')  # in XMP


class UnreadableImageError(ValueError):
    """An unusable image file. The message is one line: the name of the file, then the reason."""


class Decoded(NamedTuple):
    """The first image of a file.

    Attributes:
        image: mode RGB or L, 8 bits per channel, upright; ``info`` has its ``dpi`` and ``icc_profile``.
        exif: the EXIF block with its sub-blocks; empty if it is missing or broken.
        texts: XMP (bytes), without its orientation; the comment of a JPEG or GIF file (bytes), and the texts of a PNG file,
            each by its name in PNG.
        notes: one line for each omission from ``image``, such as transparency, further frames and broken metadata.
    """

    image: PIL.Image.Image
    exif: PIL.Image.Exif
    texts: dict[str, str | bytes]
    notes: tuple[str, ...]


def read_rgb(source: Path | bytes) -> PIL.Image.Image:
    """The image in a file in mode RGB, see :func:`decode`; greyscale images get equal channels.

    Raises:
        UnreadableImageError: see :func:`decode`.
    """
    return decode(source).image.convert("RGB")


def read(source: Path | bytes) -> PIL.Image.Image:
    """The image in a file in mode RGB or L, see :func:`decode`.

    Raises:
        UnreadableImageError: see :func:`decode`.
    """
    return decode(source).image


def decode(source: Path | bytes, *, name: str | None = None, formats: tuple[str, ...] | None = None) -> Decoded:
    """The first image in a file as viewers show it: upright by its EXIF, mode RGB or L, 8 bits per channel.

    Greyscale of more bits is scaled and rounded, so that the file's white becomes 255. Two kinds of file do not state their
    white: 32-bit integers count as 8 bits if none exceeds 255 and as 16 bits otherwise, floating point as [0, 1]. Broken
    metadata or broken further frames are reported in the notes, and the intact image is returned. A truncated or damaged image
    is an error, and so is an EPS file, which is a program.

    Args:
        source: path or content of the file.
        name: name in messages; None: the path, or "the file".
        formats: Pillow's names of the formats to try, such as ``("JPEG", "PNG")``; None: all but EPS.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, damaged or not an image; or greyscale outside these
            ranges; or too large for Pillow's limit of about 179 megapixels or for the memory.
    """
    named = _name(source, name)
    notes: list[str] = []
    try:
        with _RECORDING, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with _open(source, formats, notes) as file:
                white, inverted = _white(file)  # before the pixels: tags of TIFF belong to the present frame
                _load(file, notes)
                # the only copy, of up to 179 megapixels; an open file's pixels may be mapped from the disk
                image = file.copy() if _is_deep(file) else file.convert("L" if file.mode in GREY else "RGB")
                exif, orientation = _exif(file, notes)
                texts = _texts(file, notes)
                notes += _frames(file)
                # Pillow's warnings about metadata; those about size are ignored, as images of 100 megapixels exist
                problems = [str(warning.message) for warning in warned if warning.category is UserWarning]
                notes += [f"its metadata is damaged ({one_line(problem)})" for problem in problems[:1]]
                if not (file.mode == "P" and file.palette is None) and file.has_transparency_data:  # it asserts a palette
                    notes.append("its transparency is dropped")
            if _is_deep(image):
                image = _eight_bits(named, image, white, inverted)
            return Decoded(_turned(image, orientation), exif, texts, tuple(notes))
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files make decoders raise almost any exception
        raise _unreadable(named, source, formats, error) from error


def size(source: Path | bytes, *, name: str | None = None, formats: tuple[str, ...] | None = None) -> tuple[int, int]:
    """Width and height in the header of a file, before its orientation is applied; no pixel is decoded. See :func:`decode`.

    Raises:
        UnreadableImageError: the file has no header of an image, or the header states more pixels than Pillow's limit.
    """
    try:
        with _RECORDING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(source, formats, []) as file:
                return file.size
    except Exception as error:  # as in decode
        raise _unreadable(_name(source, name), source, formats, error) from error


def one_line(text: str) -> str:
    r"""Text, such as a file's name, in one line: characters that are not printable are escaped, as ``"\\n"``."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def reason(error: BaseException) -> str:
    """An error in one line, with its type unless the text is meant for users."""
    text = one_line((str(error).splitlines() or [""])[0])
    return (
        text
        if text and isinstance(error, (OSError, SyntaxError, ValueError))
        else f"{type(error).__name__}: {text}".rstrip(": ")
    )


def _name(source: Path | bytes, name: str | None) -> str:
    return one_line(name or (str(source) if isinstance(source, Path) else "the file"))


def _open(source: Path | bytes, formats: tuple[str, ...] | None, notes: list[str]) -> PIL.Image.Image:
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise OSError("it is a folder, a pipe, a socket or a device, not a file")  # a pipe would be waited for without end
    if formats is None:
        PIL.Image.init()
        formats = tuple(name for name in PIL.Image.ID if name != "EPS")  # Pillow would run it in Ghostscript
    try:
        return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except Exception as error:  # as in decode
        reduced = _reduced_png(source)
        if reduced is None:
            raise
        try:
            file = PIL.Image.open(io.BytesIO(reduced), formats=formats)
        except Exception:  # the first error is more informative
            raise error from None
        notes.append("its metadata is damaged or too long, and omitted")
        return file


def _reduced_png(source: Path | bytes) -> bytes | None:
    """A PNG without chunks that Pillow rejects, of long text or with a wrong checksum; None: not a PNG."""
    if isinstance(source, Path):
        if not source.is_file():
            return None
        with source.open("rb") as file:
            content = file.read(len(PNG))
            content += file.read() if content == PNG else b""
    else:
        content = source
    if not content.startswith(PNG):
        return None
    kept, at = [PNG], len(PNG)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind, checksum = content[at + 4 : at + 8], int.from_bytes(content[end - 4 : end], "big")
        # in the standard, kinds with a capital are mandatory
        if kind[:1].isupper() or (kind in KEPT and zlib.crc32(content[at + 4 : end - 4]) == checksum):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def _load(file: PIL.Image.Image, notes: list[str]) -> None:
    """Decode the pixels; damage behind them in the file becomes a note."""
    finish = getattr(file, "load_end", lambda: None)

    def load_end() -> None:
        try:
            finish()
        except Exception as error:  # as in decode
            notes.append(f"what follows its pixels is damaged ({reason(error)})")

    file.load_end = load_end  # type: ignore[attr-defined]  # Pillow's hook: reads on, and still checks the decoder's status
    file.load()


def _exif(file: PIL.Image.Image, notes: list[str]) -> tuple[PIL.Image.Exif, int]:
    """The EXIF block, and the orientation in it or in XMP; 1 if none can be read."""
    orientation = 1
    try:
        exif = file.getexif()
        found = exif.get(ORIENTATION)
        orientation = found if isinstance(found, int) and 2 <= found <= 8 else 1
        for block in (PIL.ExifTags.IFD.Exif, PIL.ExifTags.IFD.GPSInfo):
            if block in exif and PIL.ExifTags.IFD.Interop in exif.get_ifd(block):
                exif.get_ifd(PIL.ExifTags.IFD.Interop)  # must be read while the file is open
        return exif, orientation
    except Exception as error:  # as in decode
        notes.append(f"its EXIF can't be read ({reason(error)})")
        return PIL.Image.Exif(), orientation


def _texts(file: PIL.Image.Image, notes: list[str]) -> dict[str, str | bytes]:
    try:
        texts: dict[str, str | bytes] = dict(getattr(file, "text", {}))
        texts.pop(EXIF_TEXT, None)
        if comment := file.info.get("comment"):
            texts[COMMENT] = comment
        if xmp := texts.pop(XMP, None) or file.info.get("xmp"):
            texts[XMP] = TURNED.sub(b"", xmp.encode() if isinstance(xmp, str) else xmp)
        return texts
    except Exception as error:  # as in decode
        notes.append(f"its texts can't be read ({reason(error)})")
        return {}


def _frames(file: PIL.Image.Image) -> list[str]:
    try:
        frames = getattr(file, "n_frames", 1)
    except Exception as error:  # as in decode
        return [f"only the first of its frames is used, the next is damaged ({reason(error)})"]
    return [f"only the first of its {frames} frames is used"] if frames > 1 else []


def _turned(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    for key in STALE:
        image.info.pop(key, None)
    if orientation == 1:
        return image
    image.getexif()[ORIENTATION] = orientation  # alone: exif_transpose would fail on some other tags
    return PIL.ImageOps.exif_transpose(image)


def _is_deep(image: PIL.Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _white(file: PIL.Image.Image) -> tuple[int | None, bool]:
    """The value of white in greyscale of more than 8 bits, None if the file does not state it; and whether it is inverted."""
    if file.format != "TIFF":  # other readers scale to 16 bits
        return (None if file.mode == "I" and file.format not in ("PNG", "PPM") else 65535), False
    tags = file.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(BITS, (1,))[0] - (tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED)
    return (2**bits - 1 if bits <= 16 else None), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _eight_bits(name: str, image: PIL.Image.Image, white: int | None, inverted: bool) -> PIL.Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    found = f"{name} is greyscale of mode {image.mode} with values from {low:g} to {high:g}"
    if image.mode == "F":
        white = 1
        if not (low >= 0 and high <= white):  # also true for NaN
            raise UnreadableImageError(f"{found}; scale them to [0, 1], or save it with 8 or 16 bits")
    else:
        white = white or (255 if high <= 255 else 65535)
        if low < 0 or high > white:
            raise UnreadableImageError(f"{found}; save it with 8 or 16 bits, 0 to 255 or 65535")
    values *= 255 / white
    grey = PIL.Image.fromarray(np.rint(255 - values if inverted else values).astype(np.uint8))
    grey.info = image.info
    return grey


def _unreadable(name: str, source: Path | bytes, formats: tuple[str, ...] | None, error: Exception) -> UnreadableImageError:
    return UnreadableImageError(f"{name} is not an image that can be read: {_why(source, formats, error)}")


def _why(source: Path | bytes, formats: tuple[str, ...] | None, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, MemoryError):
        return "there is too little memory for it"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"more than {2 * (PIL.Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels; resize it"
    if isinstance(error, PIL.UnidentifiedImageError):
        if not source if isinstance(source, bytes) else source.is_file() and source.stat().st_size == 0:
            return "the file is empty"
        return "its format is none " + ("that Pillow knows" if formats is None else f"of {', '.join(formats)}")
    return reason(error)
