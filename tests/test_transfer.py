"""``evaluate transfer``: images that somebody else attacked, found by their names, measured, and judged by every row."""

import csv
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Generator
from torchvision.transforms.v2 import InterpolationMode

from oag_transform.apps.cli import main
from oag_transform.evaluation.adversarial import common, l2, linf, match
from oag_transform.evaluation.data import Listing, image_folder, open_images
from oag_transform.evaluation.result import read
from oag_transform.images import resize
from tests.tiny import CLASSES, write_images

NAMES = tuple(f"{name}/{number}.png" for name in CLASSES for number in range(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path).convert("RGB")).astype(int)


def attack(folder: Path, to: Path, by: int, *, suffix: str = ".png") -> Path:
    """Dark images brighter by so many grey levels, and bright ones darker."""
    for name in NAMES:
        file = (to / name).with_suffix(suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        sign = 1 if name.startswith(CLASSES[0]) else -1
        PIL.Image.fromarray((pixels(folder / name) + sign * by).clip(0, 255).astype(np.uint8)).save(file)
    return to


def transfer(folder: Path, out: Path, *more: str) -> int:
    here = ["--model", "tests.tiny:brightness", "--data", str(folder), "--out", str(out), "--resize", "40", "--crop", "40"]
    return main(["evaluate", "transfer", *here, "--count", "6", "--defenses", "mean", "noise-4-views:9", *more])


def test_every_row_judges_the_images_of_each_folder(folder: Path, tmp_path: Path) -> None:
    weak, strong = attack(folder, tmp_path / "weak", 1), attack(folder, tmp_path / "strong", 8)
    (strong / NAMES[0]).unlink()
    (strong / "b_bright" / "other.png").write_bytes((strong / NAMES[1]).read_bytes())
    assert transfer(folder, tmp_path, "--adversarial", str(weak), str(strong)) == 0
    result = read(tmp_path / "transfer.json")
    assert result.columns == ("Clean", "weak", "strong")
    rows = {row.name: row for row in result.rows}
    assert not any(row.error for row in result.rows)
    assert [cell.right for cell in rows["Undefended"].cells if cell] == ["11111", "11111", "00000"]
    assert [cell.right for cell in rows["Undefended, 4 views"].cells if cell] == ["11111", "11111", "00000"]
    assert rows["Undefended"].notes.keys() == {f"against {name}" for name in rows if name.endswith("views") or "noise" in name}
    assert rows["Mean filter, size 7"].notes["against Undefended"] == "0, 0 (p = 1)"
    assert result.facts["n"] == 5
    assert result.facts["perturbations, weak"].startswith("L-infinity 1, 1, 1 of 255; L2 0.272, 0.272, 0.272 on")
    assert "L-infinity 8, 8, 8 of 255" in result.facts["perturbations, strong"]
    assert result.facts["attacked images, weak"] == "6 by the names of the clean ones; 8 bits a channel, so rounded"
    assert result.facts["attacked images, strong"] == (
        "5 by the names of the clean ones; 8 bits a channel, so rounded; 1 clean images without one (a_dark/0.png); "
        "1 without a clean image (b_bright/other.png)"
    )


def test_a_control_is_compared_image_by_image(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bring_back(_: object, images: torch.Tensor, **__: object) -> torch.Tensor:
        return images - 0.031 * (images.mean((1, 2, 3), keepdim=True) - 0.5).sign()  # undoes 8 grey levels

    monkeypatch.setattr("oag_transform.baselines.filters.MeanFilter.forward", bring_back)
    assert transfer(folder, tmp_path, "--adversarial", str(attack(folder, tmp_path / "strong", 8))) == 0
    result = read(tmp_path / "transfer.json")
    rows = {row.name: row for row in result.rows}
    assert rows["Mean filter, size 3"].notes["against Undefended"] == "6, 0 (p = 0.031)"
    assert rows["Undefended"].notes["against Undefended, 4 views"] == "0, 0 (p = 1)"
    assert "against Gaussian noise, 4 views, grey levels 9" in rows["Mean filter, size 3"].notes


def test_jpeg_other_sizes_and_unreadable_files_are_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attacked = attack(folder, tmp_path / "attacked", 8, suffix=".jpg")
    (attacked / "a_dark" / "0.jpg").write_bytes(b"no image")
    PIL.Image.open(attacked / "a_dark" / "1.jpg").resize((80, 80)).save(attacked / "a_dark" / "1.jpg")
    assert transfer(folder, tmp_path, "--adversarial", str(attacked)) == 0
    result = read(tmp_path / "transfer.json")
    said = result.facts["attacked images, attacked"]
    assert "5 of 5 in JPEG or WebP, which change the perturbation" in said
    assert "1 of 5 of another size than the clean file; 1 unreadable" in said
    assert result.facts["n"] == 5
    assert any("left out" in line and "a_dark/0.jpg" in line for line in caplog.text.splitlines())
    assert any("1.jpg has 80 x 80 pixels, the clean image 40 x 40" in line for line in caplog.text.splitlines())
    for path in attacked.rglob("*.jpg"):
        path.write_bytes(b"no image")
    assert transfer(folder, tmp_path, "--adversarial", str(attacked)) == 2


def test_images_attacked_after_resizing_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    for name in NAMES:
        (large / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.open(folder / name).resize((80, 80), PIL.Image.Resampling.NEAREST).save(large / name)
        (tmp_path / "cropped" / name).parent.mkdir(parents=True, exist_ok=True)
        image = resize(PIL.Image.open(large / name), 50, InterpolationMode.BILINEAR, name)
        image.crop((5, 5, 45, 45)).save(tmp_path / "cropped" / name)
    here = ["--model", "tests.tiny:brightness", "--data", str(large), "--out", str(tmp_path), "--resize", "50", "--crop", "40"]
    run = ["evaluate", "transfer", *here, "--defenses", "mean", "--adversarial", str(tmp_path / "cropped")]
    assert main(run) == 0
    result = read(tmp_path / "transfer.json")
    assert "equal to the clean image" in result.facts["perturbations, cropped"]
    assert "L-infinity 0, 0, 0 of 255" in result.facts["perturbations, cropped"]


def test_a_flat_folder_is_matched_by_file_names(tmp_path: Path) -> None:
    names = ("dog/1.jpg", "cat/2.jpg", "cat/3", "cat/4.png", "cow/4.png")
    listing = Listing(names, (0, 1, 1, 1, 2), ("dog", "cat", "cow"), lambda _: PIL.Image.new("RGB", (8, 8)))
    for name in ("1.png", "2.jpg", "2.png", "3.png", "4.png", "labels.csv", "deeper/dog/1.png"):
        (tmp_path / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / name).write_bytes(b"")
    found = match(tmp_path / "flat", listing)
    assert {position: path.relative_to(tmp_path / "flat").as_posix() for position, path in found.files.items()} == {
        0: "deeper/dog/1.png",
        1: "2.jpg",
        2: "3.png",
    }
    assert found.ambiguous == ("cat/4.png", "cow/4.png")
    assert found.missing == ()
    assert found.surplus == ("1.png", "2.png")


def test_classes_with_equal_folders_inside_are_told_apart(tmp_path: Path) -> None:
    names = ("a/s/0.png", "b/s/0.png")
    listing = Listing(names, (0, 1), ("a", "b"), lambda _: PIL.Image.new("RGB", (8, 8)))
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    found = match(tmp_path, listing)
    assert {position: path.relative_to(tmp_path).as_posix() for position, path in found.files.items()} == dict(enumerate(names))


def test_a_whole_name_comes_before_a_part_of_another(tmp_path: Path) -> None:
    names = ("a/0.png", "a/a/0.png")
    listing = Listing(names, (0, 0), ("a",), lambda _: PIL.Image.new("RGB", (8, 8)))
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = match(tmp_path, listing)
    assert {position: path.relative_to(tmp_path).as_posix() for position, path in found.files.items()} == dict(enumerate(names))


def test_folders_without_a_common_name_are_errors(folder: Path, tmp_path: Path) -> None:
    listing = image_folder(folder)
    for name in ("one/a_dark/0.png", "two/a_dark/1.png", "other/x.png", "flat/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / NAMES[0], tmp_path / name)
    with pytest.raises(
        ValueError, match=r"no image with the name of a clean one: it has x\.png; clean images are named a_dark/0"
    ):
        match(tmp_path / "other", listing)
    with pytest.raises(ValueError, match="no image that belongs to one clean image alone: it has 0"):
        match(tmp_path / "flat", listing)
    with pytest.raises(ValueError, match="no image has a file in each of"):
        common([match(tmp_path / name, listing) for name in ("one", "two")], listing)


def test_norms_are_those_of_the_definition() -> None:
    a, b = (torch.randint(0, 256, (4, 3, 7, 5), generator=Generator().manual_seed(k), dtype=torch.uint8) for k in range(2))
    difference = a.numpy().astype(float) - b.numpy()
    assert linf(a, b).tolist() == np.abs(difference).max((1, 2, 3)).tolist()
    np.testing.assert_allclose(l2(a, b), np.sqrt(((difference / 255) ** 2).sum((1, 2, 3))), rtol=1e-12)


def test_the_data_of_transferattack(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(folder / NAMES[0], tmp_path / "images" / "x.png")

    def labelled(label: str) -> Listing:
        with (tmp_path / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["filename", "label", "targeted_label"], ["x.png", label, "3"]])
        return open_images(f"transferattack:{tmp_path}")

    listing = labelled("208")
    assert listing.names == ("images/x.png",)
    assert (listing.classes[listing.labels[0]], len(listing.classes)) == ("Labrador retriever", 1000)
    assert listing.read(0).size == (40, 40)
    with pytest.raises(ValueError, match="line 2: expected a label from 0 to 999, got '1000'"):
        labelled("1000")
    (tmp_path / "labels.csv").write_bytes("filename,label\nü.png,1\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"labels\.csv is not a CSV file in UTF-8"):
        open_images(f"transferattack:{tmp_path}")
    (tmp_path / "labels.csv").write_text("name,label\nx.png,1\n")
    with pytest.raises(ValueError, match="must have the columns filename and label"):
        open_images(f"transferattack:{tmp_path}")
    (tmp_path / "labels.csv").write_text("label,filename\n3\n")
    with pytest.raises(ValueError, match=r"labels\.csv, line 2: expected a filename, got none"):
        open_images(f"transferattack:{tmp_path}")
    (tmp_path / "labels.csv").write_text("filename,label\ny.png,1\n")
    with pytest.raises(ValueError, match=r"y\.png is missing"):
        open_images(f"transferattack:{tmp_path}")
