"""Small image files of every format that Pillow writes, and the same files damaged at random."""

import functools
import io
import random
import warnings
from collections.abc import Iterator

import numpy as np
import PIL.Image
from PIL.ExifTags import IFD, Base

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F")
UNUSED = ("EPS", "PDF")
"""Formats that Pillow writes and that aren't read: programs and documents."""
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xff\xff")


def picture(mode: str = "RGB") -> PIL.Image.Image:
    """28 x 20 pixels, no two rows or columns alike."""
    y, x = np.mgrid[:20, :28].astype(np.uint8)
    if mode == "I;16":
        return PIL.Image.fromarray(x.astype(np.uint16) * 2000)
    if mode == "I":
        return PIL.Image.fromarray(x.astype(np.int32) * 2000)
    if mode == "F":
        return PIL.Image.fromarray(x.astype(np.float32) / 27)
    return PIL.Image.fromarray(np.stack([x * 9, y * 12, (x + y) * 5], -1)).convert(mode)


def exif(orientation: int = 6) -> PIL.Image.Exif:
    """A block with sub-blocks and tags of several types."""
    block = PIL.Image.Exif()
    block[Base.Orientation], block[Base.Make], block[Base.XResolution] = orientation, "maker", 72.0
    block[IFD.GPSInfo] = {1: "N", 2: (50.0, 30.0, 1.0)}
    block[IFD.Exif] = {Base.DateTimeOriginal: "2020:01:01 00:00:00", Base.ExifImageWidth: 28, Base.ExifImageHeight: 20}
    return block


@functools.cache
def corpus() -> dict[str, bytes]:
    """The files, each under its format, mode and kind: plain, with metadata, with two further frames."""
    PIL.Image.init()
    found = {}
    for name in sorted(set(PIL.Image.SAVE) - set(UNUSED)):
        for mode in MODES:
            image = picture(mode)
            kinds: dict[str, dict[str, object]] = {"plain": {}, "metadata": {"exif": exif(), "dpi": (300, 300)}}
            if name in PIL.Image.SAVE_ALL:
                kinds["frames"] = {"save_all": True, "append_images": [image.rotate(180), image]}
            for kind, options in kinds.items():
                buffer = io.BytesIO()
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)  # formats that Pillow is about to drop
                        image.save(buffer, name, **options)
                except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not of this format
                    continue
                found[f"{name} {mode} {kind}"] = buffer.getvalue()
    return found


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged files and what they were, the files in turn: bits, bytes, cuts, insertions, deletions, swaps, parts of others."""
    draw = random.Random(seed)
    files = corpus()
    names = sorted(files)
    draw.shuffle(names)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray(files[name])
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            _damage(content, draw, files[draw.choice(names)])
        yield name, bytes(content)


def _damage(content: bytearray, draw: random.Random, other: bytes) -> None:
    """Change a file in one place, half of the time near its beginning, where its structure is."""
    size = len(content)
    if size < 8:
        return
    at = draw.randrange(size) if draw.random() < 0.5 else min(size - 1, int(draw.expovariate(1 / 80)))
    length, kind = draw.randrange(1, 24), draw.randrange(8)
    if kind == 0:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        content[at] = draw.choice((0, 1, 127, 128, 255))
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        content[at:at] = draw.randbytes(length)
    elif kind == 4:
        del content[at : at + length]
    elif kind == 5:
        to = draw.randrange(size)
        content[at : at + length], content[to : to + length] = content[to : to + length], content[at : at + length]
    elif kind == 6:
        content[at : at + 4] = draw.choice(EXTREMES)
    else:
        start = draw.randrange(len(other))
        content[at : at + length] = other[start : start + length]
