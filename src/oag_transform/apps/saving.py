"""Writing image files, completely or not at all, with the metadata of their source."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from .. import atomic, files
from .sources import FORMATS, SUFFIXES

NAMES = {"exif": "EXIF", "icc_profile": "colour profile", "dpi": "resolution", "xmp": "XMP", "comment": "comment"}
XMP_TAG = 700
LAYOUT_TAGS = {
    *(*range(254, 269), 273, 274, *range(277, 282), 284, *range(288, 294), 297, 301, 317, *range(320, 333), *range(336, 348)),
    *(*range(512, 522), *range(529, 533), XMP_TAG, 33723, 34377, 34675),
}
"""Tags of the layout or orientation of a TIFF or JPEG file, which no longer apply to the result."""


class Metadata(NamedTuple):
    """Metadata that a result takes from its source.

    Attributes:
        exif: the EXIF block as Pillow writes it, without :data:`LAYOUT_TAGS`; empty if there is none.
        icc: the colour profile, if it is for the result's mode.
        dpi: resolution.
        texts: see :class:`~oag_transform.files.Decoded`.
        notes: one line for each omission.
    """

    exif: bytes
    icc: bytes | None
    dpi: tuple[float, float] | None
    texts: dict[str, str | bytes]
    notes: tuple[str, ...]


def metadata(decoded: files.Decoded) -> Metadata:
    """Metadata for a result with the size and mode of ``decoded.image``; changes ``decoded.exif``."""
    notes, info, mode = list(decoded.notes), decoded.image.info, decoded.image.mode
    icc = info.get("icc_profile") or None
    if icc is not None and icc[16:20] != {"RGB": b"RGB ", "L": b"GRAY"}[mode]:
        notes.append(f"its colour profile is dropped, which isn't one for {mode}")
        icc = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reported in decoding
            exif = _exif(decoded.exif, decoded.image.size)
    except Exception as error:  # malformed tags make Pillow raise almost any exception
        notes.append(f"its EXIF can't be kept ({files.reason(error)})")
        exif = b""
    return Metadata(exif, icc, info.get("dpi"), decoded.texts, tuple(notes))


def _exif(exif: PIL.Image.Exif, size: tuple[int, int]) -> bytes:
    details = exif.get_ifd(IFD.Exif) if IFD.Exif in exif else {}
    for tag, side in zip((Base.ExifImageWidth, Base.ExifImageHeight), size, strict=True):
        if tag in details:
            details[tag] = side
    for layout in LAYOUT_TAGS & exif.keys():
        del exif[layout]
    return exif.tobytes() if len(exif) else b""


def encode(image: PIL.Image.Image, suffix: str, kept: Metadata) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of a file of this suffix, and one line for each omission.

    Raises:
        OSError, ValueError: the format can't hold the image.
    """
    name, texts = SUFFIXES[suffix.lower()], dict(kept.texts)
    known: dict[str, Any] = {"exif": kept.exif, "icc_profile": kept.icc, "dpi": kept.dpi}
    if name == "png":
        known["pnginfo"], texts = _png_texts(texts), {}
    if name == "tiff" and files.XMP in texts:
        known["exif"] = _with_xmp(kept.exif, texts.pop(files.XMP))
    known |= {"xmp": texts.pop(files.XMP, None), "comment": texts.pop(files.COMMENT, None)}
    found = {key: value for key, value in known.items() if value and key in FORMATS[name].metadata}
    lost = [NAMES[key] for key, value in known.items() if value and key not in found]
    lost += [files.one_line(f"text {key!r}") for key in texts]
    notes = (f"its {' and '.join(lost)} can't be kept as {name}",) if lost else ()
    try:
        return _encode(image, name, found), notes
    except Exception as error:  # malformed tags, or more than the format can hold
        return _encode(image, name, {}), (f"its metadata can't be kept as {name}: {files.reason(error)}",)


def _with_xmp(exif: bytes, xmp: str | bytes) -> bytes:
    """The EXIF block of a TIFF file, whose tags are those of the file."""
    block = PIL.Image.Exif()
    block.load(exif)
    block[XMP_TAG] = xmp
    return block.tobytes()


def _png_texts(texts: dict[str, str | bytes]) -> PngInfo | None:
    info = PngInfo()
    for key, value in texts.items():
        (info.add_itxt if key == files.XMP else info.add_text)(key, value)
    return info if texts else None


def _encode(image: PIL.Image.Image, name: str, extra: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reported in decoding
        image.save(buffer, name.upper(), **FORMATS[name].options, **extra)
    return buffer.getvalue()


def write(target: Path, content: bytes, token: str) -> None:
    """Write a file atomically: at any moment it has its old or its complete new content. Folders are created."""
    with atomic.replaced(target, token) as partial:
        partial.write_bytes(content)


def remove_partial(target: Path, token: str) -> None:
    """Remove what a killed process has left of a file. What can't be removed stays: it must not hide the end of a run."""
    with contextlib.suppress(OSError):
        atomic.partial_path(target, token).unlink(missing_ok=True)
