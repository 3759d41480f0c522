"""Checks of an upload before any work: type, bytes, pixels, shape. A refusal is one sentence."""

import PIL.Image

from ... import files
from .settings import MEGAPIXEL

FORMATS = ("JPEG", "PNG", "WEBP")
TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
LONGEST_TO_SHORTEST = 16
"""Largest ratio of an image's sides, since both are scaled until the short side fits the classifier."""
JPEG = b"\xff\xd8\xff"
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9  # markers of a JPEG
SCANS = 100
"""Largest number of scans in a JPEG. A scan of a few bytes can take the time of the whole image; ten are usual."""


class RefusedError(Exception):
    """An answer in place of a result.

    Attributes:
        status: HTTP status.
        sentence: the problem and its remedy.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status, sentence)
        self.status, self.sentence = status, sentence


def check_type(content_type: str | None) -> None:
    """Raise unless the Content-Type is one of :data:`TYPES`.

    Raises:
        RefusedError: 415.
    """
    named = (content_type or "").partition(";")[0].strip().lower()
    if named not in TYPES:
        got = f"got {named}" if named else "got none"
        raise RefusedError(415, f"Send the image itself as the body, with a Content-Type of {_any_of(TYPES)}; {got}.")


def decode(content: bytes, pixels: int) -> PIL.Image.Image:
    """The image in an upload, mode RGB. Its size is checked before any pixel is decoded.

    Args:
        content: the upload.
        pixels: largest number of pixels.

    Raises:
        RefusedError: 413 for too many pixels, 415 for a format other than :data:`FORMATS`, 422 for a broken image or one
            whose sides are too unequal.
    """
    if not content:
        raise RefusedError(422, "The upload is empty; send an image as the body.")
    if not content.startswith((b"\x89PNG", JPEG)) and (content[:4], content[8:12]) != (b"RIFF", b"WEBP"):
        raise RefusedError(415, f"The upload is no image of a format that is accepted: {_any_of(FORMATS)}.")
    width, height = _size(content)
    if width * height > pixels:
        raise RefusedError(
            413, f"The image has {width} x {height} pixels; at most {pixels / MEGAPIXEL:g} megapixels are accepted."
        )
    if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
        raise RefusedError(
            422, f"The image has {width} x {height} pixels; no side may be more than {LONGEST_TO_SHORTEST} times the other."
        )
    if content.startswith(JPEG) and _scans(content) > SCANS:
        raise RefusedError(422, f"The JPEG has more than {SCANS} scans, which is the most that is accepted.")
    try:
        return files.decode(content, name="the upload", formats=FORMATS).image.convert("RGB")
    except files.UnreadableImageError as error:
        raise RefusedError(422, sentence(str(error))) from error


def _size(content: bytes) -> tuple[int, int]:
    """Width and height, from the header alone."""
    try:
        return files.size(content, name="the upload", formats=FORMATS)
    except files.UnreadableImageError as error:
        if isinstance(error.__cause__, PIL.Image.DecompressionBombError):
            raise RefusedError(413, "The image has more pixels than are accepted.") from error
        raise RefusedError(422, sentence(str(error))) from error


def _scans(jpeg: bytes) -> int:
    """Number of scans in the first image of a JPEG, as libjpeg finds them. Data behind it, such as a video, has none."""
    scans, at = 0, len(JPEG) - 1
    while 0 <= (at := jpeg.find(b"\xff", at)) < len(jpeg) - 3 and scans <= SCANS:
        marker = jpeg[at + 1]
        if marker == END_OF_IMAGE:
            break
        if marker == 0xFF:  # fill
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # data of a scan, or a marker without a length
            at += 2
        else:
            scans += marker == START_OF_SCAN
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return scans


def _any_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def sentence(text: str) -> str:
    """A message as a sentence of one line."""
    line = " ".join(text.split())
    return line[:1].upper() + line[1:] + ("" if line.endswith(".") else ".")
