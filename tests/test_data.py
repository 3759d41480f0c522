"""Image sets of each layout on tiny files, and the messages about broken ones."""

import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

from oag_transform.evaluation.data import (
    FLOWERS,
    Listing,
    Preprocessing,
    batches,
    flower17,
    ilsvrc2012,
    image_folder,
    open_images,
    read_images,
    shuffled,
)
from oag_transform.images import resize

SMALL = Preprocessing(24, 20)


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (33, 28)) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(values).convert(mode).save(path)
    return path


def test_image_folder_keeps_the_place_of_a_class_without_images(tmp_path: Path) -> None:
    for name in ("ape", "bee", "cat"):
        (tmp_path / name).mkdir()
    for name in ("ape/1.png", "cat/2.jpg", "cat/1.png"):
        write_image(tmp_path / name)
    listing = image_folder(tmp_path)
    assert listing.classes == ("ape", "bee", "cat")
    assert [(Path(name).name, label) for name, label in zip(listing.names, listing.labels, strict=True)] == [
        ("1.png", 0),
        ("1.png", 2),
        ("2.jpg", 2),
    ]


def test_image_folder_has_the_order_of_torchvisions_without_hidden_files_and_folders(tmp_path: Path) -> None:
    for name in ("ape/b/1.png", "ape/a b/2.png", "ape/10.png", "ape/9.PNG", "bee/a.jpg", "ape/b/c/0.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / name)
    (tmp_path / "ape/notes.txt").write_text("no image")
    (tmp_path / "readme.png").write_text("in no class")
    samples = ImageFolder(str(tmp_path)).samples
    for name in (".ipynb_checkpoints/1-checkpoint.png", "bee/.ipynb_checkpoints/a-checkpoint.jpg", "bee/._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name)
    listing = image_folder(tmp_path)
    assert listing.classes == ("ape", "bee")
    assert listing.names == tuple(Path(path).relative_to(tmp_path).as_posix() for path, _ in samples)
    assert listing.labels == tuple(label for _, label in samples)


def test_links_are_followed_and_loops_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    for name in ("elsewhere", "data/ape/inner"):
        (tmp_path / name).mkdir(parents=True)
    write_image(data / "ape/1.png")
    write_image(tmp_path / "elsewhere/2.png")
    (data / "bee").symlink_to(tmp_path / "elsewhere")
    for link, to in (("ape/inner/loop", data / "ape"), ("ape/whole", data), ("itself", data), ("ape/endless", "endless")):
        (data / link).symlink_to(to)
    listing = image_folder(data)
    assert listing.classes == ("ape", "bee")
    assert listing.names == ("ape/1.png", "bee/2.png")
    assert listing.read(1).size == (33, 28)
    assert [record.getMessage() for record in caplog.records] == [
        f"{data / link}: skipped, a link to a folder that contains it" for link in ("itself", "ape/whole", "ape/inner/loop")
    ]


def test_image_folder_names_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folders of classes"):
        image_folder(tmp_path)
    (tmp_path / "ape").mkdir()
    with pytest.raises(ValueError, match=r"no images \(\.jpg, .*\) in its 1 folders"):
        image_folder(tmp_path)


def flower_folder(root: Path, numbers: list[int]) -> None:
    (root / "jpg").mkdir()
    for number in numbers:
        write_image(root / "jpg" / f"image_{number:04d}.jpg")
    savemat(root / "datasplits.mat", {"tst1": np.array([numbers], np.uint16), "trn1": np.array([[1, 2000]], np.uint16)})


def test_flower17_has_80_of_each_class_in_order(tmp_path: Path) -> None:
    flower_folder(tmp_path, [1, 80, 81, 1360])
    listing = flower17(tmp_path)
    assert [Path(name).name for name in listing.names] == [f"image_{n:04d}.jpg" for n in (1, 80, 81, 1360)]
    assert [FLOWERS[label] for label in listing.labels] == ["daffodil", "daffodil", "snowdrop", "pansy"]
    assert len(listing.classes) == 17


def test_flower17_names_missing_parts(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "datasplits.mat").write_text("x")
    with pytest.raises(ValueError, match=r"datasplits\.mat can't be read as a MATLAB file: "):
        flower17(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"datasplits\.mat is missing"):
        flower17(tmp_path)
    flower_folder(tmp_path, [1])
    with pytest.raises(ValueError, match=r"no split 'val1'; it has \['trn1', 'tst1'\]"):
        flower17(tmp_path, "val1")
    with pytest.raises(ValueError, match=r"image_0001\.jpg|image_2000\.jpg is missing"):
        flower17(tmp_path, "trn1")
    savemat(tmp_path / "datasplits.mat", {"tst1": np.array(["one"])})
    with pytest.raises(ValueError, match=r"datasplits\.mat: tst1 does not hold numbers of images"):
        flower17(tmp_path)


def devkit(root: Path) -> Path:
    """A kit of three leaves and a node above two of them; ids in another order than the WordNet names."""
    (root / "data").mkdir(parents=True)
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    nodes = [(1, "n03", "cat", 0), (2, "n01", "ape", 0), (3, "n02", "bee", 0), (4, "n00", "animal", 2)]
    savemat(root / "data" / "meta.mat", {"synsets": np.array(nodes, dtype=fields)[:, None]})
    (root / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n2\n")
    return root


def test_ilsvrc2012_has_the_class_order_of_torchvision(tmp_path: Path) -> None:
    kit = devkit(tmp_path / "kit")
    for number in (1, 2, 4):
        write_image(tmp_path / f"ILSVRC2012_val_{number:08d}.JPEG")
    listing = ilsvrc2012(tmp_path, kit)
    assert listing.classes == ("ape", "bee", "cat")
    assert [listing.classes[label] for label in listing.labels] == ["cat", "ape", "ape"]


def test_ilsvrc2012_names_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"meta\.mat is missing, and 1 more"):
        ilsvrc2012(tmp_path, tmp_path / "kit")
    kit = devkit(tmp_path / "kit")
    with pytest.raises(ValueError, match="no images named ILSVRC2012_val"):
        ilsvrc2012(tmp_path, kit)
    write_image(tmp_path / "ILSVRC2012_val_00000005.JPEG")
    with pytest.raises(ValueError, match="4 labels, none for image 5"):
        ilsvrc2012(tmp_path, kit)
    (tmp_path / "ILSVRC2012_val_00000005.JPEG").rename(tmp_path / "ILSVRC2012_val_00000000.JPEG")
    with pytest.raises(ValueError, match="4 labels, none for image 0"):
        ilsvrc2012(tmp_path, kit)
    (tmp_path / "ILSVRC2012_val_00000000.JPEG").rename(tmp_path / "ILSVRC2012_val_x.JPEG")
    with pytest.raises(ValueError, match="no images named ILSVRC2012_val"):
        ilsvrc2012(tmp_path, kit)
    write_image(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    truth = kit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    for content in ("one\n", "4\n", "1 \xff"):
        truth.write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=r"kit does not hold the files of ILSVRC2012_devkit_t12"):
            ilsvrc2012(tmp_path, kit)
    savemat(kit / "data" / "meta.mat", {"others": 1})
    with pytest.raises(ValueError, match=r"kit does not hold the files of ILSVRC2012_devkit_t12: KeyError"):
        ilsvrc2012(tmp_path, kit)


def test_the_order_takes_the_classes_in_turn() -> None:
    labels = (0,) * 5 + (1,) * 3 + (2,) * 4
    listing = Listing(tuple(map(str, range(12))), labels, ("a", "b", "c"), lambda _: PIL.Image.new("RGB", (1, 1)))
    order = shuffled(listing, 0)
    assert sorted(order) == list(range(12))
    assert Counter(labels[position] for position in order[:9]) == {0: 3, 1: 3, 2: 3}
    assert order != shuffled(listing, 1)
    state = torch.get_rng_state()
    assert order == shuffled(listing, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_images_are_those_of_torchvisions_own_pipeline(tmp_path: Path) -> None:
    (tmp_path / "ape").mkdir()
    paths = [
        write_image(tmp_path / "ape" / "1.png", size=(60, 40)),
        write_image(tmp_path / "ape" / "2.png", "L", size=(30, 50)),
    ]
    listing = image_folder(tmp_path)
    images, _ = read_images(listing, [0, 1], SMALL)
    bicubic = v2.InterpolationMode.BICUBIC
    pipeline = v2.Compose([v2.RGB(), v2.Resize(24, interpolation=bicubic), v2.CenterCrop(20), v2.PILToTensor()])
    for image, path in zip(images, paths, strict=True):
        with PIL.Image.open(path) as file:
            assert torch.equal(image, pipeline(file))
    sizes = [(len(part), labels.tolist()) for part, labels in batches(listing, SMALL, 1, seed=0)]
    assert sizes == [(1, [0]), (1, [0])]


def test_16_bit_and_rotated_images_are_read_as_viewers_show_them(tmp_path: Path) -> None:
    (tmp_path / "ape").mkdir()
    wide = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    PIL.Image.fromarray(wide).save(tmp_path / "ape" / "1.png")
    stripes = PIL.Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1)))
    exif = stripes.getexif()
    exif[0x0112] = 6
    stripes.save(tmp_path / "ape" / "2.png", exif=exif)
    sixteen, turned = read_images(image_folder(tmp_path), [0, 1], SMALL)[0][:, 0]
    assert torch.equal(sixteen, torch.from_numpy(np.rint(wide / 257)[2:22, 2:22].astype(np.uint8)))
    assert torch.equal(turned[:, 0], torch.arange(20, 220, 10, dtype=torch.uint8))  # what ran to the right runs down
    assert torch.equal(turned, turned[:, :1].expand(20, 20))


def test_an_image_that_cannot_be_used_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
    whole = write_image(tmp_path / "ape" / "1.png").read_bytes()
    (tmp_path / "ape" / "2.png").write_text("no image")
    (tmp_path / "ape" / "3.png").write_bytes(whole[: len(whole) // 2])
    write_image(tmp_path / "bee" / "4.png", size=(2, 3000))
    write_image(tmp_path / "bee" / "5.png")
    listing = image_folder(tmp_path)
    images, positions = read_images(listing, [4, 3, 2, 1, 0], SMALL)
    assert positions == [4, 0]
    assert torch.equal(images, read_images(listing, [4, 0], SMALL)[0])
    reasons = (r"4\.png has 2 x 3000 pixels, too thin", r"3\.png is not an image that can be read", r"2\.png is not an image")
    assert [bool(re.search(reason, line)) for reason, line in zip(reasons, caplog.messages, strict=True)] == [True] * 3
    assert [labels.tolist() for _, labels in batches(listing, SMALL, 5, seed=0)] in ([[0, 1]], [[1, 0]])
    assert sum(len(labels) for _, labels in batches(listing, SMALL, 1, seed=0)) == 2
    (tmp_path / "ape" / "1.png").write_text("no image")
    (tmp_path / "bee" / "5.png").unlink()
    with pytest.raises(ValueError, match="none of the images can be read"):
        list(batches(listing, SMALL, 2, seed=0))
    nothing, none = read_images(listing, [1, 2], SMALL)
    assert (tuple(nothing.shape), none) == ((0, 3, 20, 20), [])


def test_resizing_is_torchvisions_and_refuses_extreme_enlargement() -> None:
    bicubic = v2.InterpolationMode.BICUBIC
    for size in ((30, 50), (50, 30), (3, 60), (600, 40000)):  # the last one is thin, but gets smaller
        image = PIL.Image.new("RGB", size, (10, 20, 30))
        assert resize(image, 32, bicubic, "it").size == v2.functional.resize(image, [32], interpolation=bicubic).size
    with pytest.raises(
        ValueError, match=r"thin\.png has 2 x 6000 pixels, too thin .* side of 256: .* would have 768000; crop it"
    ):
        resize(PIL.Image.new("L", (2, 6000)), 256, bicubic, "thin.png")
    with pytest.raises(ValueError, match=r"small\.png has 5 x 4 pixels; .* it would have 12500 megapixels, more than"):
        resize(PIL.Image.new("L", (5, 4)), 100_000, bicubic, "small.png")


def test_images_of_the_right_size_are_not_resampled(tmp_path: Path) -> None:
    (tmp_path / "ape").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "ape" / "1.png")
    images, kept = read_images(image_folder(tmp_path), [0], Preprocessing(32, 32))
    assert kept == [0]
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), pixels)


def write_cifar10(root: Path) -> np.ndarray[Any, Any]:
    """Twenty images of CIFAR-10's test batch in the files that torchvision reads; their pixels (20, 32, 32, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8)
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    batch = {"data": pixels.reshape(20, -1), "labels": [i % 10 for i in range(20)]}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    return pixels.transpose(0, 2, 3, 1)


def test_cifar10_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar10(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _: True)  # these are not the real files
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    listing = open_images(f"cifar10:{tmp_path}")
    assert (len(listing.names), listing.side, listing.classes[3], listing.names[13]) == (20, 32, "class3", "class3/00013")
    images, _ = read_images(listing, [0, 13], Preprocessing(32, 32))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[[0, 13]])
    assert len(open_images(f"cifar10:{tmp_path}", training=True).names) == 100
    with pytest.raises(ValueError, match="splits train and test, got 'tst1'"):
        open_images(f"cifar10:{tmp_path}", split="tst1")


def test_a_missing_data_set_is_not_downloaded(tmp_path: Path) -> None:
    for kind in ("cifar10", "cifar100"):
        with pytest.raises(ValueError, match=f"doesn't hold {kind} .* nothing is downloaded"):
            open_images(f"{kind}:{tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_folder_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a:b" / "ape").mkdir(parents=True)
    write_image(tmp_path / "a:b" / "ape" / "1.png")
    for spec in (tmp_path / "a:b", f"imagefolder:{tmp_path / 'a:b'}"):
        assert open_images(str(spec)).names == ("ape/1.png",)
    with pytest.raises(ValueError, match="expected a folder, or one of imagefolder, flower17"):
        open_images("svhn:here")
