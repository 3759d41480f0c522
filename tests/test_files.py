import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from oag_transform.files import decode, read, read_rgb

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


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # the top is at the right: turn it clockwise
    image.save(tmp_path / "a.png", exif=exif)
    turned = read(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(turned), [[3, 0], [4, 1], [5, 2]])
    assert 0x0112 not in turned.getexif()  # or a viewer would turn it again


def test_an_image_is_rgb_or_grey_whatever_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PIL.Image.new("RGBA", (3, 2), (10, 20, 30, 128)).save(path, dpi=(300, 300))
    decoded = decode(path)
    assert (decoded.image.mode, decoded.image.getpixel((0, 0)), decoded.notes) == ("RGB", (10, 20, 30), (TRANSPARENT,))
    assert round(decoded.image.info["dpi"][0]) == 300
    PIL.Image.new("LA", (3, 2), (10, 128)).save(path)
    assert (read(path).mode, read(path).getpixel((0, 0)), read_rgb(path).getpixel((0, 0))) == ("L", 10, (10, 10, 10))
    PIL.Image.new("1", (3, 2), 1).save(path)
    assert (read(path).mode, read(path).getpixel((0, 0))) == ("L", 255)


def test_what_is_no_image_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_large_photograph_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)  # where Pillow warns, and refuses at twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path).size == (40, 40)
