"""Image files as viewers show them: depths, broken metadata and frames, and files damaged at random."""

import io
import math
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from oag_transform import files
from oag_transform.apps import saving
from oag_transform.files import UnreadableImageError, decode, read, read_rgb

from .mutations import corpus, exif, mutations, picture

WIDE = np.array([[0, 128, 257], [1000, 32768, 65535]], np.uint16)
TRANSPARENT = "its transparency is dropped"
NARROW = np.array([[0, 0, 1], [4, 128, 255]], np.uint8)  # WIDE * 255 / 65535, rounded: 128 / 257 = 0.498, 1000 / 257 = 3.89


def saved(path: Path, values: np.ndarray) -> Path:
    PIL.Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    image = read_rgb(saved(tmp_path / f"wide{suffix}", WIDE))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.repeat(NARROW[..., None], 3, -1))


def test_big_endian_sixteen_bits_are_read_too(tmp_path: Path) -> None:
    # an uncompressed TIFF by hand: Pillow writes no such file
    shape, kind_of = [(256, 3, 3), (257, 3, 2)], [(258, 3, 16), (259, 3, 1), (262, 3, 1)]
    entries = [*shape, *kind_of, (273, 4, 8), (277, 3, 1), (278, 3, 2), (279, 4, 12)]
    pixels = WIDE.astype(">u2").tobytes()
    directory = len(entries).to_bytes(2, "big")
    for tag, kind, value in entries:
        field = value.to_bytes(2, "big") + bytes(2) if kind == 3 else value.to_bytes(4, "big")
        directory += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + field
    (tmp_path / "big.tif").write_bytes(b"MM\x00*" + (8 + len(pixels)).to_bytes(4, "big") + pixels + directory + bytes(4))
    with PIL.Image.open(tmp_path / "big.tif") as file:
        assert file.mode == "I;16B"
    np.testing.assert_array_equal(np.asarray(read(tmp_path / "big.tif")), NARROW)


def test_integers_are_eight_bits_until_one_is_above_255(tmp_path: Path) -> None:
    np.testing.assert_array_equal(np.asarray(read(saved(tmp_path / "a.tiff", NARROW.astype(np.int32)))), NARROW)
    np.testing.assert_array_equal(np.asarray(read(saved(tmp_path / "b.tiff", WIDE.astype(np.int32)))), NARROW)


LARGEST = 100_000  # pixels
RAMP = np.linspace(0, 1, 48)[None].repeat(2, 0)
GREY = np.rint(255 * RAMP).astype(np.uint8)


def tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF of one channel with values (H, W) packed in ``bits`` bits, of which Pillow writes few."""
    rows = [
        int("".join(f"{int(value) % 2**bits:0{bits}b}" for value in row), 2).to_bytes(bits * len(row) // 8, "big")
        for row in values
    ]
    pixels = b"".join(rows)
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    order = "<"
    if bits > 12:  # whole bytes are in the file's order, parts of bytes are not
        pixels = np.frombuffer(pixels, f">i{bits // 8}").astype(f"<i{bits // 8}").tobytes()
    entries = b"".join(
        struct.pack(order + "HHLL", tag, 4, 1, value) for tag, value in sorted((tags | {339: sample_format}).items())
    )
    return b"II*\0" + struct.pack("<L", 8 + len(pixels)) + pixels + struct.pack("<H", 10) + entries + bytes(4)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(np.rint(4095 * RAMP), 12), GREY),
        (tiff(np.rint(65535 * RAMP), 16), GREY),
        (tiff(np.rint(65535 * RAMP), 16, photometric=0), 255 - GREY),
        (tiff(np.rint(32767 * RAMP), 16, sample_format=2), GREY),
        (tiff(np.rint(255 * RAMP), 16), np.rint(RAMP)),
        (tiff(np.rint(255 * RAMP), 16, sample_format=2), np.rint(255 * np.rint(255 * RAMP) / 32767)),
        (tiff(np.rint(65535 * RAMP), 32), GREY),
        (tiff(np.rint(255 * RAMP), 8, photometric=0), 255 - GREY),
        (b"P5 48 2 65535\n" + np.rint(65535 * RAMP).astype(">u2").tobytes(), GREY),
        (b"P5 48 2 65535\n" + np.rint(255 * RAMP).astype(">u2").tobytes(), np.rint(RAMP)),
        (b"P5 48 2 4095\n" + np.rint(4095 * RAMP).astype(">u2").tobytes(), GREY),
        (b"P5 48 2 300\n" + np.rint(255 * RAMP).astype(">u2").tobytes(), np.rint(255 * np.rint(255 * RAMP) / 300)),
    ],
    ids=[
        *("tiff12", "tiff16", "tiff16-white-is-zero", "tiff16-signed", "tiff16-dark", "tiff16-signed-dark", "tiff32"),
        *("tiff8-white-is-zero", "pgm16", "pgm16-dark", "pgm12", "pgm300"),
    ],
)
def test_white_is_that_of_the_file(content: bytes, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(read(content)), expected)


def test_a_negative_value_is_refused() -> None:
    with pytest.raises(UnreadableImageError, match=r"the file is greyscale of mode I with values from -5 to 9; save"):
        read(tiff(np.array([[-5, 9]]), 16, sample_format=2))


def test_floating_point_is_taken_as_zero_to_one(tmp_path: Path) -> None:
    image = read(saved(tmp_path / "a.tiff", np.array([[0, 0.5, 1]], np.float32)))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 65536]], np.int32),
        np.array([[-1, 5]], np.int32),
        np.array([[0, 255]], np.float32),
        np.array([[-0.1, 1]], np.float32),
        np.array([[np.nan, 1]], np.float32),
    ],
)
def test_other_ranges_are_refused_with_a_remedy(tmp_path: Path, values: np.ndarray) -> None:
    path = saved(tmp_path / "a.tiff", values)
    with pytest.raises(ValueError, match=r"a\.tiff is greyscale of mode [IF] with values from .*; (scale|save)"):
        read(path)


def test_an_image_is_turned_by_its_exif(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # the top is at the right: turn it clockwise
    image.save(tmp_path / "a.png", exif=exif)
    turned = read(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(turned), [[3, 0], [4, 1], [5, 2]])
    assert 0x0112 not in turned.getexif()  # or a viewer would turn it again


def test_an_image_of_any_mode_becomes_rgb_or_grey(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PIL.Image.new("RGBA", (3, 2), (10, 20, 30, 128)).save(path, dpi=(300, 300))
    decoded = decode(path)
    assert (decoded.image.mode, decoded.image.getpixel((0, 0)), decoded.notes) == ("RGB", (10, 20, 30), (TRANSPARENT,))
    assert round(decoded.image.info["dpi"][0]) == 300
    PIL.Image.new("LA", (3, 2), (10, 128)).save(path)
    assert (read(path).mode, read(path).getpixel((0, 0)), read_rgb(path).getpixel((0, 0))) == ("L", 10, (10, 10, 10))
    PIL.Image.new("1", (3, 2), 1).save(path)
    assert (read(path).mode, read(path).getpixel((0, 0))) == ("L", 255)


def test_errors_of_unreadable_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).read_bytes()
    jpeg = tmp_path / "whole.jpg"
    PIL.Image.open(tmp_path / "whole.png").save(jpeg)
    for name, content, reason in (
        ("cut.png", whole[: len(whole) // 2], "[Tt]runcated|broken"),
        ("cut.jpg", jpeg.read_bytes()[:500], "[Tt]runcated|broken"),
        ("empty.png", b"", "the file is empty"),
        ("text.png", b"no image", "its format is none that Pillow knows"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not an image that can be read: .*({reason})") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no such file"):
        read(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="is not an image"):
        read(tmp_path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 700)  # 1600 are more than twice that
    with pytest.raises(ValueError, match="more than 0 megapixels; resize it"):
        read(tmp_path / "whole.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes")
@pytest.mark.parametrize("reader", [read, files.size])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, reader: Any) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # nobody writes to it: opened, it would hang
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(UnreadableImageError, match=f"{path.name} is .*: it is a folder, a pipe, a socket or"):
            reader(path)


def jpeg_with(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """A JPEG whose EXIF has a clockwise rotation and one more tag."""
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", quality=95)
    tags = sorted([(0x0112, 3, 1, b"\6\0\0\0"), (tag, kind, count, value.ljust(4, b"\0"))])
    block = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + b"".join(struct.pack("<HHL", *t[:3]) + t[3] for t in tags) + bytes(4)
    content = buffer.getvalue()
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]


@pytest.mark.parametrize(
    ("tag", "told"),
    [
        ((282, 2, 3, b"72"), True),  # a resolution as text, as editors write it
        ((254, 1, 1, b"\1"), False),  # about the file's layout, which no result takes over
    ],
    ids=["resolution", "layout"],
)
def test_a_whole_image_with_a_tag_of_another_type_is_used(tag: Any, told: bool) -> None:
    content = jpeg_with(*tag)
    with PIL.Image.open(io.BytesIO(content)) as file:
        expected = np.rot90(np.asarray(file), -1)
    decoded = decode(content)
    np.testing.assert_array_equal(np.asarray(decoded.image), expected)
    notes = saving.metadata(decoded).notes
    assert len(notes) == told
    assert all("EXIF can't be kept" in note for note in notes)


def test_an_exif_block_that_cannot_be_read_is_a_note() -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", exif=b"Exif\0\0no TIFF at all")
    decoded = decode(buffer.getvalue())
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(picture()))
    assert len(decoded.exif) == 0
    assert [note.partition(" (")[0] for note in decoded.notes] == ["its EXIF can't be read"]
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", exif=exif().tobytes()[:60])
    assert [note.partition(" (")[0] for note in decode(buffer.getvalue()).notes] == ["its metadata is damaged"]


@pytest.mark.parametrize("name", ["PNG", "GIF", "TIFF"])
def test_the_first_image_is_used_where_the_next_is_damaged(name: str) -> None:
    buffer = io.BytesIO()
    image = picture("P" if name == "GIF" else "RGB")
    image.save(buffer, name, save_all=True, append_images=[image.rotate(180), image])
    content, first = bytearray(buffer.getvalue()), image.convert("RGB")
    np.testing.assert_array_equal(np.asarray(read_rgb(bytes(content))), np.asarray(first))
    assert decode(bytes(content)).notes == ("only the first of its 3 frames is used",)
    alone = io.BytesIO()
    image.save(alone, name)
    start = len(alone.getvalue()) + 60  # behind the first frame, and what an animation says of it
    for damaged in (
        content[:start],
        content[:start] + bytes(20) + content[start + 20 :],
        content[:start] + content[start + 9 :],
    ):
        decoded = decode(bytes(damaged))
        np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(first))


def test_a_missing_palette_does_not_affect_an_opaque_image() -> None:
    buffer = io.BytesIO()
    picture("P").save(buffer, "PNG")
    start = buffer.getvalue().index(b"PLTE") - 4
    content = buffer.getvalue()[:start] + buffer.getvalue()[buffer.getvalue().index(b"IDAT") - 4 :]
    assert (decode(content).image.size, decode(content).notes) == ((28, 20), ())


def test_a_png_is_used_without_the_parts_that_keep_pillow_from_opening_it() -> None:
    buffer, text = io.BytesIO(), PngInfo()
    text.add_text("parameters", "steps 20")
    picture().save(buffer, "PNG", pnginfo=text, exif=exif(), dpi=(300, 300))
    content = buffer.getvalue().replace(b"steps 20", b"steps 21")  # the checksum is wrong now
    packed = b"comment\0\0" + zlib.compress(bytes(2**21))  # more than Pillow unpacks
    chunk = struct.pack(">L", len(packed)) + b"zTXt" + packed + struct.pack(">L", zlib.crc32(b"zTXt" + packed))
    plain = io.BytesIO()
    picture().save(plain, "PNG", exif=exif(), dpi=(300, 300))
    for damaged in (content, plain.getvalue()[:33] + chunk + plain.getvalue()[33:]):
        with pytest.raises((PIL.UnidentifiedImageError, ValueError)):
            PIL.Image.open(io.BytesIO(damaged))
        decoded = decode(damaged)
        np.testing.assert_array_equal(np.asarray(decoded.image), np.rot90(np.asarray(picture()), -1))
        assert decoded.notes == ("its metadata is damaged or too long, and omitted",)
        assert round(decoded.image.info["dpi"][0]) == 300
        assert files.size(damaged) == (28, 20)
    with pytest.raises(UnreadableImageError, match="is not an image"):
        decode(content[:60])


def test_any_error_of_a_decoder_names_the_file_and_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a\nb\x1b[31m\udcff.png"
    path.write_bytes(b"no image")
    with pytest.raises(
        UnreadableImageError, match=r"a\\nb\\x1b\[31m\\udcff\.png is not an image that can be read: its format"
    ) as caught:
        read(path)
    assert str(caught.value).isprintable()
    saved(path, NARROW)
    for error, reason in (
        (MemoryError(), "there is too little memory for it"),
        (KeyError("tag"), "KeyError: 'tag'"),
        (AssertionError(), "AssertionError"),
        (RecursionError("deep"), "RecursionError: deep"),
        (OSError("first\nsecond"), "first"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PIL.Image, "open", lambda *_, error=error, **__: raising(error))
            for call in (read, files.size):
                with pytest.raises(UnreadableImageError) as caught:
                    call(path)
                assert str(caught.value).endswith(f".png is not an image that can be read: {reason}")
    monkeypatch.setattr(PIL.Image, "open", lambda *_, **__: raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        read(path)


def raising(error: BaseException) -> None:
    raise error


def test_a_program_is_not_run(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png", "EPS")
    with pytest.raises(UnreadableImageError, match="its format is none"):
        read(tmp_path / "a.png")


def look_at_mutations(count: int, seed: int) -> Counter[str]:
    """Decode damaged files and write the results; counts the outcomes."""
    seen: Counter[str] = Counter()
    for was, content in mutations(count, seed):
        seen[look_at(was, content)] += 1
    return seen


def look_at(was: str, content: bytes) -> str:
    try:
        decoded = decode(content, name="a\nb.img")
    except UnreadableImageError as error:
        message = str(error)
    else:
        assert decoded.image.mode in ("RGB", "L"), was
        kept = saving.metadata(decoded)
        for suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"):
            written, notes = saving.encode(decoded.image.crop((0, 0, 32, 32)), suffix, kept)
            assert read(written).size == (32, 32), was
            assert "".join(kept.notes + notes).isprintable(), was
        assert math.prod(files.size(content)) <= 2 * LARGEST, was
        return "image"
    assert re.fullmatch(r"a\\nb\.img is (not an image that can be read: .+|greyscale of mode .+)", message), was
    assert message.isprintable(), was
    return "unreadable"


def printed(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of both streams, without those of libtiff, which name Pillow's placeholder for the file."""
    out, err = capfd.readouterr()
    return [line for line in (out + err).splitlines() if not line.startswith("tempfile.tif: ")]


@pytest.fixture
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged headers that state millions of pixels are rejected, so that the test needs little memory."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", LARGEST)


@pytest.mark.usefixtures("_small_limit")
def test_damaged_files_give_an_image_or_an_error_that_names_them(capfd: pytest.CaptureFixture[str]) -> None:
    assert {name.split()[0] for name in corpus()} >= {"BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
    seen = look_at_mutations(2 * len(corpus()), seed=0)
    assert min(seen.values()) > len(corpus()) / 8  # neither all nor none are broken
    assert not printed(capfd)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_limit")
@pytest.mark.parametrize("seed", range(1, 6))
def test_thousands_of_damaged_files_too(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert look_at_mutations(4000, seed)["image"] > 400
    assert not printed(capfd)


def test_a_large_image_is_not_refused_as_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)  # where Pillow warns, and refuses at twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path).size == (40, 40)


def test_threads_that_read_leave_warnings_as_they_are(tmp_path: Path) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(file, "PNG")
    before, shown = list(warnings.filters), warnings.showwarning
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            list(pool.map(lambda _: (files.decode(file.getvalue()), files.size(file.getvalue())), range(16)))
    assert warnings.filters == before
    assert warnings.showwarning is shown
    with pytest.warns(UserWarning, match="still shown"):
        warnings.warn("still shown", stacklevel=1)
