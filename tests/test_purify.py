"""``oag-transform purify``: its results, refusals and messages, and that no image is lost or purified twice."""

import itertools
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from oag_transform import DivergenceError, OnlineAlternateGenerator, files
from oag_transform.apps import local_purify, saving, sources, worker
from oag_transform.apps.cli import main
from oag_transform.streams import index_of

FAST = ["--network-steps", "1"]
PROFILE = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
pytestmark = pytest.mark.usefixtures("choice_of_processes")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")


def picture(mode: str = "RGB", size: tuple[int, int] = (33, 28), seed: int = 0) -> PIL.Image.Image:
    values = torch.randint(0, 256, (3, size[1], size[0]), generator=torch.Generator().manual_seed(seed))
    image: PIL.Image.Image = tvf.to_pil_image(values.to(torch.uint8))
    return image.convert(mode)


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (33, 28), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(mode, size, seed).save(path)
    return path


def read(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as image:
        image.load()
        return image.copy()


def pixels(path: Path) -> bytes:
    return read(path).tobytes()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def purify(*arguments: str | Path) -> int:
    return main(["purify", *map(str, arguments), *FAST])


def exif() -> PIL.Image.Exif:
    """EXIF of a camera, for an image of 33 x 28 to be turned by 90 degrees."""
    found = PIL.Image.Exif()
    found[0x0112] = 6
    found[0x010F] = "Camera"
    found[0x8769] = {0xA002: 33, 0xA003: 28, 0x9003: "2020:01:02 03:04:05"}
    found[0x8825] = {1: "N"}
    return found


# what is written


def test_files_equal_the_transform_with_streams_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [save(tmp_path / "a.png"), save(tmp_path / "b.png", "L")]
    out = tmp_path / "new" / "folder"
    settings = ["--network-steps", "2", "--threshold", "3.5", "--strength", "0.6", "--seed", "4"]
    assert main(["purify", *map(str, sources), "--out", str(out), *settings]) == 0
    transform = OnlineAlternateGenerator(network_steps=2, threshold=3.5, strength=0.6, seed=4)
    for source, mode in zip(sources, ("RGB", "L"), strict=True):
        expected = transform(read(source), index=index_of(source.name))
        actual = read(out / source.name)
        assert actual.mode == mode
        assert actual.tobytes() == expected.tobytes()
    assert capsys.readouterr().out == "2 purified, 0 there already, 0 failed\n"


def test_the_papers_setting(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", "L")
    assert purify(source, "--out", tmp_path / "o", "--paper", "--seed", "1") == 0
    expected = OnlineAlternateGenerator.paper(network_steps=1, seed=1)(read(source), index=index_of("a.png"))
    assert pixels(tmp_path / "o" / "a.png") == expected.tobytes()


def test_a_result_depends_on_the_name_and_not_on_other_files(tmp_path: Path) -> None:
    for name in ("b.png", "sub/c.png"):
        save(tmp_path / "few" / name)
    for name in ("a.png", "b.png", "sub/0.png", "sub/c.png", "z.png"):
        save(tmp_path / "many" / name)
    assert purify(tmp_path / "few", "--out", tmp_path / "1", "--seed", "3") == 0
    assert purify(tmp_path / "many", "--out", tmp_path / "2", "--seed", "3") == 0
    assert purify(tmp_path / "many" / "b.png", "--out", tmp_path / "3", "--seed", "3", "--batch-size", "4") == 0
    few, many, single = (tree(tmp_path / name) for name in "123")
    assert {name: many[name] for name in few} == few
    assert single == {"b.png": few["b.png"]}
    assert len(set(many.values())) == 5  # one picture, five names: five draws


def test_without_a_seed_randomness_is_fresh(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png")
    for out in ("1", "2"):
        assert purify(source, "--out", tmp_path / out) == 0
    assert pixels(tmp_path / "1" / "a.png") != pixels(tmp_path / "2" / "a.png")


@pytest.mark.slow
def test_batches_and_processes_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(7):
        save(tmp_path / "in" / f"{i}.png", "L" if i == 3 else "RGB", (33, 28) if i % 3 else (20, 40), seed=i)
    (tmp_path / "in" / "bad.png").write_text("no image")
    sets = (["--jobs", "1"], ["--batch-size", "3"], ["--jobs", "2", "--batch-size", "2"])
    trees, said = [], []
    for number, extra in enumerate(sets):
        assert purify(tmp_path / "in", "--out", tmp_path / str(number), "--seed", "1", *extra) == 1
        trees.append(tree(tmp_path / str(number)))
        said.append(capsys.readouterr())
    assert len(trees[0]) == 7
    for other in trees[1:]:
        assert other.keys() == trees[0].keys()
    for name, number in itertools.product(trees[0], range(1, len(sets))):
        one, two = (np.asarray(read(tmp_path / str(n) / name)).astype(int) for n in (0, number))
        assert abs(one - two).max() <= 1  # to rounding
    assert {lines.out for lines in said} == {"7 purified, 0 there already, 1 failed\n"}
    assert all(lines.err.count("bad.png") == 1 and len(lines.err.splitlines()) == 1 for lines in said)


@given(st.lists(st.tuples(st.sampled_from([(9, 9), (9, 12), (12, 9)]), st.booleans()), max_size=12), st.integers(1, 4))
def test_batches_hold_each_job_once_and_equal_sides(sizes: list[tuple[tuple[int, int], bool]], size: int) -> None:
    every = [sources.Job(Path(f"{i}"), Path(f"o{i}"), f"{i}") for i in range(len(sizes))]
    sides = {job: side if readable else None for job, (side, readable) in zip(every, sizes, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_sides", sides.__getitem__)
        made = list(worker.batches(iter(every), size))
    assert sorted(job.name for batch in made for job in batch) == sorted(job.name for job in every)
    for batch in made:
        assert len(batch) <= size
        assert len(batch) == 1 or len({sides[job] for job in batch} - {None}) == 1
    if size > 1:  # no two batches that could have been one
        for side in {side for side in sides.values() if side}:
            assert sum(1 for batch in made if sides[batch[0]] == side and len(batch) < size) <= 1


def test_batches_are_made_as_they_are_asked_for(tmp_path: Path) -> None:
    seen = []

    def endless() -> Iterator[sources.Job]:
        while True:
            seen.append(1)
            yield sources.Job(save(tmp_path / "a.png"), tmp_path / "o.png", "a.png")

    made = worker.batches(endless(), 3)
    assert len(next(made)) == 3
    assert len(seen) == 3


def test_files_are_written_one_batch_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png")
    order: list[str] = []
    decode, write_file = files.decode, saving.write

    def noted_decode(source: Path, *, name: str) -> files.Decoded:
        order.append(f"read {source.name}")
        return decode(source, name=name)

    def noted_write(target: Path, content: bytes, token: str) -> None:
        order.append(f"write {target.name}")
        write_file(target, content, token)

    monkeypatch.setattr(files, "decode", noted_decode)
    monkeypatch.setattr(saving, "write", noted_write)
    assert purify(tmp_path / "in", "--out", tmp_path / "o") == 0
    assert order == [f"{what} {i}.png" for i in range(3) for what in ("read", "write")]


def test_resize_gives_the_classifiers_size(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", size=(60, 40))
    assert purify(source, "--out", tmp_path / "o", "--resize", "20", "--seed", "2") == 0
    small = tvf.resize(read(source), [20], interpolation=InterpolationMode.BICUBIC)
    assert small.size == (30, 20)
    expected = OnlineAlternateGenerator(network_steps=1, seed=2)(small, index=index_of("a.png"))
    assert pixels(tmp_path / "o" / "a.png") == expected.tobytes()


def test_processes_share_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker, "processors", lambda: 7)
    given: list[tuple[object, ...]] = []

    def pool(*arguments: object) -> None:
        given.append(arguments)
        raise OSError("enough")

    monkeypatch.setattr(local_purify, "ProcessPoolExecutor", pool)
    for count, threads in ((2, 3), (7, 1), (9, 1)):
        assert purify(save(tmp_path / "a.png"), "--out", tmp_path / "o", "--jobs", str(count)) == 2
        assert given[-1][0] == count
        assert given[-1][3][1] == threads  # type: ignore[index]


def test_a_process_keeps_to_its_threads() -> None:
    before = torch.get_num_threads()
    reader, writer = multiprocessing.Pipe(duplex=False)
    try:
        torch.set_num_threads(3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_purify, "_end_with", lambda _: None)
            local_purify._start(reader, 2)
            assert torch.get_num_threads() == 2
            local_purify._start(reader, 5)  # OMP_NUM_THREADS, or what else limits them, stays
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        reader.close()
        writer.close()


# where it is written


def test_folders_keep_their_tree_and_globs_are_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "sub/a.png", "sub/deep/B.PNG", ".hidden/c.png", "sub/._d.png"):
        save(photos / name)
    (photos / "labels.csv").write_text("")
    (photos / "sub" / "README").write_text("")
    assert purify(photos, "--out", tmp_path / "1") == 0
    assert sorted(tree(tmp_path / "1")) == ["a.png", "sub/a.png", "sub/deep/B.PNG"]
    assert "skipped 2 file(s) in folders without the suffix of an image: 1 .csv, 1 README" in capsys.readouterr().err
    assert purify(photos / "sub" / "**" / "*.[pP][nN][gG]", "--out", tmp_path / "2") == 0
    assert sorted(tree(tmp_path / "2")) == ["B.PNG", "a.png"]


def test_a_name_with_the_characters_of_a_glob_is_a_name(tmp_path: Path) -> None:
    save(tmp_path / "a[1].png")
    save(tmp_path / "a1.png")
    assert purify(tmp_path / "a[1].png", "--out", tmp_path / "o") == 0
    assert list(tree(tmp_path / "o")) == ["a[1].png"]


@POSIX
def test_a_name_that_is_not_unicode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        save(tmp_path / os.fsdecode(b"a\xff.png"))
    except OSError:
        pytest.skip("this file system has none")
    assert purify(tmp_path, "--out", tmp_path / "o", "--seed", "1") == 0
    assert len(tree(tmp_path / "o")) == 1


def test_results_inside_the_folder_are_not_purified_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert purify(".", "--out", "purified") == 0
    save(tmp_path / "b.png")
    assert purify(".", "--out", "purified", "--skip-existing") == 0
    assert sorted(tree(tmp_path)) == ["a.png", "b.png", "purified/a.png", "purified/b.png"]


def test_the_same_file_twice_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in" / "a.png")
    assert purify(source, tmp_path / "in", tmp_path / "in" / "*.png", "--out", tmp_path / "o") == 0
    assert capsys.readouterr().out.startswith("1 purified")


@pytest.mark.parametrize(
    ("name", "chosen", "result"),
    [
        ("a.png", "keep", ("a.png", "PNG")),
        ("a.jpg", "keep", ("a.jpg", "JPEG")),
        ("a.jpeg", "keep", ("a.jpeg", "JPEG")),
        ("A.JPG", "jpeg", ("A.JPG", "JPEG")),
        ("a.webp", "keep", ("a.webp", "WEBP")),
        ("a.tiff", "keep", ("a.tiff", "TIFF")),
        ("a.bmp", "keep", ("a.bmp", "BMP")),
        ("a.gif", "keep", ("a.png", "PNG")),
        ("a.ppm", "keep", ("a.png", "PNG")),
        ("a.jpg", "png", ("a.png", "PNG")),
        ("a.png", "jpeg", ("a.jpg", "JPEG")),
        ("a.jpg", "tiff", ("a.tif", "TIFF")),
        ("a.gif", "webp", ("a.webp", "WEBP")),
        ("a.png", "bmp", ("a.bmp", "BMP")),
    ],
)
def test_formats(name: str, chosen: str, result: tuple[str, str], tmp_path: Path) -> None:
    assert purify(save(tmp_path / name), "--out", tmp_path / "o", "--format", chosen) == 0
    (written,) = (tmp_path / "o").iterdir()
    with PIL.Image.open(written) as image:
        assert (written.name, image.format) == result
        if image.format == "JPEG":  # quality 95: the luminance table of the standard at a tenth
            assert max(image.quantization[0]) == 12  # type: ignore[attr-defined]


def test_a_file_without_a_suffix(tmp_path: Path) -> None:
    save(tmp_path / "a.png").rename(tmp_path / "a")
    assert purify(tmp_path / "a", "--out", tmp_path / "o") == 0
    assert list(tree(tmp_path / "o")) == ["a.png"]


def test_the_longest_of_names(tmp_path: Path) -> None:
    name = "a" * 251 + ".png"
    assert purify(save(tmp_path / name), "--out", tmp_path / "o") == 0
    assert list(tree(tmp_path / "o")) == [name]


def test_linked_folders_are_folders_and_loops_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "elsewhere" / "b.png")
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "one" / "c.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "one" / "itself").symlink_to(".")
    assert purify(tmp_path / "in", "--out", tmp_path / "o") == 0
    assert sorted(tree(tmp_path / "o")) == ["a.png", "linked/b.png", "one/c.png"]
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/in/{link}: skipped, a link to a folder that contains it" for link in ("linked/back", "one/itself")
    ]


@POSIX
@pytest.mark.parametrize("more", [[], ["--batch-size", "2"]])
def test_inputs_that_are_not_files_are_named_and_not_opened(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    pipe = tmp_path / "in" / "p.png"
    os.mkfifo(pipe)  # nobody writes to it: opened, it would hang
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    assert purify(tmp_path / "in", "/dev/zero", str(tmp_path / "in" / "p*.png"), "--out", tmp_path / "o", *more) == 1
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(
        [f"{path}: it is a pipe, a socket or a device, not a file" for path in ("/dev/zero", pipe, pipe)]
        + [f"{tmp_path}/in/gone.png: it is a link to a file that isn't there"]
    )
    assert list(tree(tmp_path / "o")) == ["a.png"]


@POSIX
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_pipe_given_by_name_is_read_once(jobs: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png")
    reader, writer = os.pipe()  # it has room for the file
    with open(reader, "rb"):
        with open(writer, "wb") as pipe:
            pipe.write(source.read_bytes())
        assert purify(f"/dev/fd/{reader}", "--out", tmp_path / "o", "--seed", "1", "--jobs", jobs) == 0
    made = tmp_path / "o" / f"{reader}.png"
    assert read(made).size == (33, 28)
    if jobs == "1":
        expected = OnlineAlternateGenerator(network_steps=1, seed=1)(read(source), index=index_of(str(reader)))
        assert pixels(made) == expected.tobytes()


# metadata


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("chosen", ["keep", "jpeg", "png", "tiff", "webp"])
def test_metadata_are_kept_and_the_image_is_upright(name: str, chosen: str, tmp_path: Path) -> None:
    picture().save(tmp_path / name, exif=exif().tobytes(), icc_profile=PROFILE, dpi=(300, 300))
    assert purify(tmp_path / name, "--out", tmp_path / "o", "--format", chosen) == 0
    (written,) = (tmp_path / "o").iterdir()
    with PIL.Image.open(written) as image:
        image.load()
        found = image.getexif()
        assert image.size == (28, 33)
        assert found.get(0x0112, 1) == 1
        assert found[0x010F] == "Camera"
        assert found.get_ifd(0x8769) == {0xA002: 28, 0xA003: 33, 0x9003: "2020:01:02 03:04:05"}
        assert found.get_ifd(0x8825) == {1: "N"}
        assert image.info["icc_profile"] == PROFILE
        if "webp" not in (written.suffix[1:], name[2:]):
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:rights="me"/></x:xmpmeta>'


@pytest.mark.parametrize("chosen", ["keep", "jpeg", "png", "tiff", "webp", "bmp"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_xmp_is_kept_without_its_orientation(
    name: str, chosen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    by_suffix: dict[str, Any] = {"png": {"pnginfo": info}, "tif": {"tiffinfo": {700: XMP}}}
    options = by_suffix.get(name[2:], {"xmp": XMP})
    picture().save(tmp_path / name, **options)
    assert purify(tmp_path / name, "--out", tmp_path / "o", "--format", chosen) == 0
    (written,) = (tmp_path / "o").iterdir()
    told = capsys.readouterr().err
    with PIL.Image.open(written) as image:
        assert image.size == (28, 33)
        if chosen == "bmp":
            assert told == f"{tmp_path / name}: its XMP can't be kept as bmp\n"
        else:
            assert image.info["xmp"] == XMP.replace(b'tiff:Orientation="6"', b"")
            assert image.getexif().get(0x0112, 1) == 1
            assert "XMP" not in told


def test_comments_and_texts_are_kept_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = PngInfo()
    for key, value in (("parameters", "Steps: 20"), ("Comment", "a comment"), ("Titel", "日本")):
        info.add_text(key, value)
    picture().save(tmp_path / "a.png", pnginfo=info)
    picture().save(tmp_path / "b.jpg", comment=b"a comment")
    picture().save(tmp_path / "c.gif", comment=b"a comment")
    for chosen in ("keep", "png", "jpeg", "tiff"):
        out = tmp_path / chosen
        assert purify(*(tmp_path / name for name in ("a.png", "b.jpg", "c.gif")), "--out", out, "--format", chosen) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"{tmp_path}/a.png: its text 'parameters' and text 'Titel' can't be kept as jpeg",
        f"{tmp_path}/a.png: its comment and text 'parameters' and text 'Titel' can't be kept as tiff",
        f"{tmp_path}/b.jpg: its comment can't be kept as tiff",
        f"{tmp_path}/c.gif: its comment can't be kept as tiff",
    ]
    texts = {"parameters": "Steps: 20", "Comment": "a comment", "Titel": "日本"}
    assert read(tmp_path / "keep/a.png").info == texts
    for name in ("png/b.png", "keep/c.png"):
        assert read(tmp_path / name).info == {"Comment": "a comment"}
    for name in ("keep/b.jpg", "jpeg/a.jpg", "jpeg/c.jpg"):
        assert read(tmp_path / name).info["comment"] == b"a comment"


def test_without_metadata_there_are_none(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert purify(tmp_path / "a.png", "--out", tmp_path / "o") == 0
    assert not read(tmp_path / "o" / "a.png").info


def test_omitted_metadata_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    picture("RGBA").save(folder / "rgba.png")
    picture("LA").save(folder / "la.png")
    picture("P").save(folder / "p.png", transparency=0)
    picture().save(folder / "film.gif", save_all=True, append_images=[picture(seed=1)])
    picture().save(folder / "pages.tif", save_all=True, append_images=[picture(seed=1), picture(seed=2)])
    picture().save(folder / "apng.png", save_all=True, append_images=[picture(seed=1)])
    picture("CMYK").save(folder / "cmyk.jpg", icc_profile=bytes(16) + b"CMYK" + bytes(108))
    picture().save(folder / "opaque.png")
    picture().save(folder / "sub.bmp")
    assert purify(folder, "--out", tmp_path / "o") == 0
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"{folder}/apng.png: only the first of its 2 frames is used",
        f"{folder}/cmyk.jpg: its colour profile is dropped, which isn't one for RGB",
        f"{folder}/film.gif: only the first of its 2 frames is used",
        f"{folder}/la.png: its transparency is dropped",
        f"{folder}/p.png: its transparency is dropped",
        f"{folder}/pages.tif: only the first of its 3 frames is used",
        f"{folder}/rgba.png: its transparency is dropped",
    ]
    modes = {name: read(tmp_path / "o" / name).mode for name in ("rgba.png", "la.png", "p.png", "film.png", "cmyk.jpg")}
    assert modes == {"rgba.png": "RGB", "la.png": "L", "p.png": "RGB", "film.png": "RGB", "cmyk.jpg": "RGB"}


def test_metadata_that_a_format_cannot_hold_are_told_and_the_image_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = PIL.Image.Exif()
    long[0x010E] = "x" * 70000  # JPEG has room for 65 KB
    picture().save(tmp_path / "long.png", exif=long)
    picture().save(tmp_path / "profile.png", icc_profile=PROFILE, exif=exif())
    assert purify(tmp_path / "long.png", "--out", tmp_path / "o", "--format", "jpeg") == 0
    assert "long.png: its metadata can't be kept as jpeg: EXIF data is too long" in capsys.readouterr().err
    assert purify(tmp_path / "profile.png", "--out", tmp_path / "o", "--format", "bmp") == 0
    assert "profile.png: its EXIF and colour profile can't be kept as bmp" in capsys.readouterr().err
    assert read(tmp_path / "o" / "long.jpg").size == (33, 28)


def test_greyscale_of_16_bits_is_rescaled(tmp_path: Path) -> None:
    grey = np.asarray(picture("L"))
    PIL.Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    PIL.Image.fromarray(grey).save(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.png").rename(tmp_path / name / "same.png")
        assert purify(tmp_path / name, "--out", tmp_path / f"o{name}", "--seed", "1") == 0
    assert pixels(tmp_path / "oa" / "same.png") == pixels(tmp_path / "ob" / "same.png")


# what goes wrong


def bomb() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_bad_files_are_named_in_a_line_each_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    save(folder / "a.jpg", size=(200, 200))
    save(folder / "z.png")
    (folder / "truncated.jpg").write_bytes((folder / "a.jpg").read_bytes()[:3000])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    (folder / "bomb.png").write_bytes(bomb())
    save(folder / "small.png", size=(5, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert purify(folder, tmp_path / "missing.png", tmp_path / "none*", "--out", tmp_path / "o") == 1
    said = capsys.readouterr()
    assert sorted(tree(tmp_path / "o")) == ["a.jpg", "z.png"]
    assert said.out == "2 purified, 0 there already, 7 failed\n"
    expected = {
        "truncated.jpg": "truncated",
        "empty.png": "empty",
        "text.png": "is not an image",
        "bomb.png": "megapixels",
        "small.png": "at least 2 pixels, got 1 x 5",
        "missing.png": "no such file",
        "none*": "no file matches",
    }
    lines = said.err.splitlines()
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        assert any(name in line and reason in line for line in lines), name


def test_shards_need_the_other_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.parquet", "b.TAR"):
        (tmp_path / name).touch()
        assert purify(tmp_path / name, "--out", tmp_path / "o") == 2
        assert f"{name}: parquet files and WebDataset shards need --engine ray" in capsys.readouterr().err


def test_names_of_bad_files_stay_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\nb\x1b[31m.png").write_text("no image")
    assert purify(tmp_path / "in", "--out", tmp_path / "o") == 1
    reason = "is not an image that can be read: its format is none that Pillow knows"
    assert capsys.readouterr().err == f"{tmp_path}/in/a\\nb\\x1b[31m.png {reason}\n"


def test_a_thin_image_is_not_enlarged_beyond_all_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PIL.Image.new("L", (2, 6000)).save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    assert purify(tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "o", "--resize", "256") == 1
    assert capsys.readouterr().err.startswith(
        f"{tmp_path}/a.png has 2 x 6000 pixels, too thin to be resized to a short side of 256"
    )
    assert list(tree(tmp_path / "o")) == ["b.png"]


def odd_exif() -> bytes:
    """Turned by a quarter, with a resolution that is text: what Pillow's ``exif_transpose`` raises a TypeError for."""
    entries = struct.pack("<HHLHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHL4s", 282, 2, 3, b"72\0")
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_broken_metadata_are_a_note_and_the_image_is_purified(
    jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    picture().save(tmp_path / "in" / "odd.jpg", exif=odd_exif())
    save(tmp_path / "in" / "z.png")
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--jobs", jobs) == 0
    assert capsys.readouterr().out == "2 purified, 0 there already, 0 failed\n"
    assert read(tmp_path / "o" / "odd.jpg").size == (28, 33)


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- --jobs 2 --progress 2>&-"])
def test_closed_streams_stop_nothing(closed: str, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "bad.png").touch()
    command = f'"{sys.executable}" -m oag_transform purify in --out o --network-steps 1 {closed}'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert list(tree(tmp_path / "o")) == ["a.png"]
    assert read(tmp_path / "o" / "a.png").size == (33, 28)
    assert "bad.png" not in done.stdout  # what is told to stderr goes nowhere else


@POSIX
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_ends_stops_nothing(stream: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").touch()  # unreadable, and told before the other is made
    save(tmp_path / "in" / "1.png")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "oag_transform", "purify", "in", "--out", "o", *FAST]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: writer}
    done = subprocess.run(command, cwd=tmp_path, **streams)
    os.close(writer)
    assert done.returncode == 1
    assert list(tree(tmp_path / "o")) == ["1.png"]


def test_one_that_diverges_does_not_take_its_batch_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png")
    bad, forward = index_of("1.png"), OnlineAlternateGenerator.forward

    def diverging(self: OnlineAlternateGenerator, images: torch.Tensor, *, index: list[int]) -> torch.Tensor:
        if bad in index:
            raise DivergenceError("diverged", [index.index(bad)])
        purified: torch.Tensor = forward(self, images, index=index)
        return purified

    monkeypatch.setattr(OnlineAlternateGenerator, "forward", diverging)
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--batch-size", "3") == 1
    assert sorted(tree(tmp_path / "o")) == ["0.png", "2.png"]
    assert capsys.readouterr().err == f"{tmp_path}/in/1.png: the energy network diverged for this image\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "sub/a.png", "--out", "o"], "a.png and sub/a.png would both be written to o/a.png"),
        (["a.png", "a.jpg", "--out", "o", "--format", "png"], "a.png and a.jpg would both be written to o/a.png"),
        (["a.png", "a.gif", "--out", "o"], "a.png and a.gif would both be written to o/a.png"),
        (["a.png", "--out", "."], "a.png would be overwritten, and it is one of the images"),
        (["a.png", "--out", "sub/..", "--overwrite"], "would be overwritten, and it is one of the images"),
        (["a.png", "a.gif", "--out", "o"], "to o/a.png; rename one of them, or purify them separately to two folders"),
        (["a.png", "a.jpg", "--out", "o", "--format", "png"], "to o/a.png; use --format keep, or purify them"),
        (["a.png", "sub/a.png", "--out", "o"], "to o/a.png; give the folder that holds both, or purify them"),
        (["sub/a.png", "a.png", "--out", "sub", "--overwrite"], "would both be written"),
        (["a.jpg", "a.png", "--out", ".", "--format", "png", "--overwrite"], "would both be written"),
        (["a.png", "--out", "done"], "done/a.png is there already; --skip-existing"),
        (["a.png", "b.png", "--out", "done"], "done/a.png is there already, and 1 more; --skip-existing"),
        (["a.png", "--out", "a.jpg"], "a.jpg is there and is no folder"),
        (["nothing", "--out", "o"], "no image in nothing"),
        (["a.png", "--out", "o", "--network-steps", "0"], "network_steps must be an integer >= 1, got 0"),
        (["a.png", "--out", "o", "--threshold", "-1"], "threshold must be a finite number >= 0, got -1.0"),
        (["a.png", "--out", "o", "--strength", "2"], "strength must be a finite number > 0 and <= 1, got 2.0"),
        (["a.png", "--out", "o", "--seed", "-3"], "seed must be None or an integer >= 0, got -3"),
        (["a.png", "--out", "o", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["a.png", "--out", "o", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["a.png", "--out", "o", "--resize", "1"], "resize must be an integer >= 2, got 1"),
        (["a.png", "--out", "o", "--device", "nonsense"], "device 'nonsense' can't be used here"),
        (["a.png", "--out", "o", "--device", "meta"], "device 'meta' can't be used here"),
        (["a.png", "--out", "o", "--overwrite", "--skip-existing"], "--overwrite and --skip-existing are not allowed together"),
        (["--out", "o"], "give at least one IMAGE"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.jpg", "a.gif", "b.png", "sub/a.png", "done/a.png", "done/b.png"):
        save(Path(name))
    Path("nothing").mkdir()
    before = tree(tmp_path)
    assert main(["purify", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert tree(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_device_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert purify(save(tmp_path / "a.png"), "--out", tmp_path / "o", "--device", "cuda") == 2
    assert "device 'cuda' can't be used here" in capsys.readouterr().err


def test_overwrite_and_skip_existing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        save(tmp_path / "in" / f"{name}.png")
    out = tmp_path / "o"
    out.mkdir()
    (out / "a.png").write_text("as it was")
    assert purify(tmp_path / "in", "--out", out, "--skip-existing") == 0
    assert (out / "a.png").read_text() == "as it was"
    assert capsys.readouterr().out == "1 purified, 1 there already, 0 failed\n"
    written = (out / "b.png").stat().st_mtime_ns
    assert purify(tmp_path / "in", "--out", out, "--skip-existing") == 0
    assert capsys.readouterr().out == "0 purified, 2 there already, 0 failed\n"
    assert (out / "b.png").stat().st_mtime_ns == written
    assert purify(tmp_path / "in", "--out", out, "--overwrite") == 0
    assert capsys.readouterr().out == "2 purified, 0 there already, 0 failed\n"
    assert read(out / "a.png").size == (33, 28)


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_a_file_is_unchanged_or_complete(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "a.png"
    saving.write(target, b"first", "t")
    write_bytes = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write_bytes(self, content[:3])
        raise KeyboardInterrupt

    def never(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*((Path, moment, half) if moment == "write_bytes" else (os, moment, never)))
    with pytest.raises((KeyboardInterrupt, OSError)):
        saving.write(target, b"second", "t")
    monkeypatch.undo()
    assert tree(tmp_path) == {"new/a.png": b"first"}
    saving.write(target, b"second", "t")
    assert tree(tmp_path) == {"new/a.png": b"second"}


def test_a_folder_that_cannot_be_read_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    closed = tmp_path / "in" / "closed"
    closed.mkdir()
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(closed))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert purify(tmp_path / "in", "--out", tmp_path / "o") == 1
    assert capsys.readouterr().err == f"{closed}: Permission denied\n"


def test_results_that_cannot_be_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png")
    (tmp_path / "o" / "a.png").mkdir(parents=True)  # a folder where the file is to be
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--overwrite") == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"{tmp_path}/in/a.png: ")
    assert said.out == "1 purified, 0 there already, 1 failed\n"
    assert list(tree(tmp_path / "o")) == ["b.png"]


# bars, signals and processes


def test_no_bar_in_a_pipe_and_one_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png")
    assert purify(tmp_path / "in", "--out", tmp_path / "o") == 0
    assert capsys.readouterr() == ("3 purified, 0 there already, 0 failed\n", "")
    (tmp_path / "in" / "bad.png").touch()
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--overwrite", "--progress") == 1
    said = capsys.readouterr()
    assert said.out == "3 purified, 0 there already, 1 failed\n"
    assert "4/4" in said.err
    assert "image/s" in said.err or "s/image" in said.err
    assert f"\r{tmp_path}/in/bad.png is not an image" in said.err.replace(" " * 10, "")  # a line of its own, above the bar


def test_without_tqdm_there_is_no_bar_and_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert purify(save(tmp_path / "a.png"), "--out", tmp_path / "o", "--progress") == 0
    assert capsys.readouterr().err == ""


STOPPED = """
import os, signal, sys
from oag_transform.apps import cli, local_purify
name, after, *arguments = sys.argv[1:]
run = local_purify.run

def stopped(*given):
    for number, outcomes in enumerate(run(*given)):
        yield outcomes
        if number == int(after):
            if name == "SIGINT":  # as a terminal sends it, to every process
                os.killpg(0, signal.SIGINT)
            else:  # the first process alone
                os.kill(os.getpid(), signal.SIGKILL)

local_purify.run = stopped
sys.exit(cli.main(arguments))
"""


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "signals"), [("1", ["SIGINT"]), ("2", ["SIGKILL", "SIGINT"])])
def test_interrupted_killed_and_resumed_nothing_is_lost_or_done_twice(
    jobs: str, signals: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 40
    for i in range(count):
        save(tmp_path / "in" / f"{i:02d}.png", seed=i)
    arguments = ["purify", str(tmp_path / "in"), "--out", str(tmp_path / "o"), "--seed", "1", *FAST]
    kept: dict[str, tuple[bytes, int]] = {}
    for name in signals:
        command = [sys.executable, "-c", STOPPED, name, "3", *arguments, "--skip-existing", "--jobs", jobs]
        # a shell's background jobs, such as these tests may be, ignore Ctrl-C, and so would their children
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            # it returns when every process that holds the pipes is gone
            done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        finally:
            signal.signal(signal.SIGINT, before)
        if name == "SIGINT":
            assert (done.returncode, done.stderr) == (130, "oag-transform purify: interrupted\n")
            assert done.stdout.endswith(f" purified, {len(kept)} there already, 0 failed\n")
            assert not list((tmp_path / "o").glob(".*"))
        else:
            assert done.returncode == -signal.SIGKILL
        now = written(tmp_path / "o")
        assert len(kept) + 3 < len(now) < count
        assert kept.items() <= now.items()
        kept = now
    assert main([*arguments, "--skip-existing"]) == 0
    assert capsys.readouterr().out == f"{count - len(kept)} purified, {len(kept)} there already, 0 failed\n"
    assert kept.items() <= written(tmp_path / "o").items()
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    names = [f"{i:02d}.png" for i in range(count)]
    assert tree(tmp_path / "whole") == {name: (tmp_path / "o" / name).read_bytes() for name in names}


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of each result."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("[0-9]*.png")}


@pytest.mark.slow
@POSIX
def test_a_killed_process_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        save(tmp_path / "in" / f"{i}.png")
    monkeypatch.setattr(worker, "purify_batch", dies)
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--jobs", "2") == 2
    said = capsys.readouterr().err
    assert "a process was killed, perhaps because memory ran out" in said
    assert len(said.splitlines()) == 1


def dies(*_: object) -> list[worker.PurifyOutcome]:
    """As the kernel does to one that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_a_lack_of_memory_for_a_batch_is_not_one_for_each_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png")
    stack, encode = torch.stack, saving.encode

    def little(tensors: Any, *args: Any) -> torch.Tensor:
        if len(tensors) > 1 and tensors[0].dtype == torch.uint8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return stack(tensors, *args)

    def none_left(image: Any, suffix: str, kept: saving.Metadata) -> Any:
        monkeypatch.setattr(saving, "encode", encode)
        raise MemoryError("none left")

    monkeypatch.setattr(torch, "stack", little)
    monkeypatch.setattr(saving, "encode", none_left)
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--batch-size", "3") == 1
    assert sorted(tree(tmp_path / "o")) == ["1.png", "2.png"]
    assert capsys.readouterr().err == f"{tmp_path}/in/0.png: MemoryError: none left\n"


@pytest.mark.parametrize(
    ("name", "suffix", "expected"),
    [("v1.0", None, "v1.0.png"), ("v1.1", ".webp", "v1.1.webp"), ("a/b.JPG", None, "a/b.JPG"), ("b.gif", ".png", "b.png")],
)
def test_only_the_suffix_of_an_image_is_replaced(name: str, suffix: str | None, expected: str) -> None:
    assert sources.target_in(Path("o"), Path(name), suffix) == Path("o") / expected


def test_a_folder_without_images_says_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.heic", "b.heic"):
        (tmp_path / "in" / name).touch()
    assert main(["purify", str(tmp_path / "in"), "--out", str(tmp_path / "o")]) == 2
    assert "2 .heic" in capsys.readouterr().err


def test_an_empty_argument_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["purify", str(save(tmp_path / "a.png")), "--out", ""]) == 2
    assert "an argument is empty" in capsys.readouterr().err


def test_a_failure_names_the_file_whatever_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(size=(1, 1)).save("a", "PNG")
    assert main(["purify", "a", "--out", "o"]) == 1
    assert capsys.readouterr().err.startswith("a: expected height and width of at least 2 pixels")
