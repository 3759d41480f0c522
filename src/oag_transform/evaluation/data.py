"""Labelled images on disk: a folder for each class, Flower-17, ImageNet validation images, CIFAR-10 and CIFAR-100.

A listing names the images; they are read when they are needed, so that a listing of 50,000 costs nothing.
"""

import contextlib
import csv
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
import torchvision
from scipy.io import loadmat
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from .. import folders
from ..files import one_line, read_rgb, reason
from ..images import resize as resized

logger = logging.getLogger(__name__)

FLOWERS = (
    *("daffodil", "snowdrop", "lily of the valley", "bluebell", "crocus", "iris", "tigerlily", "tulip", "fritillary"),
    *("sunflower", "daisy", "colts' foot", "dandelion", "cowslip", "buttercup", "windflower", "pansy"),
)


KINDS = ("imagefolder", "flower17", "ilsvrc2012", "cifar10", "cifar100", "transferattack")
"""What an image set is called in ``KIND:ROOT``, see :func:`open_images`."""

IN_SPLITS = ("flower17", "cifar10", "cifar100")


class Listing(NamedTuple):
    """Labelled images.

    Attributes:
        names: ``CLASS/FILE`` of each image, or what stands for it.
        labels: their class indices.
        classes: the names of the classes.
        read: position -> the image, RGB. Raises ValueError for a file that is no image, or is broken.
        side: height and width in pixels, if all images are square and of one size; None: they differ, or are unknown.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    read: Callable[[int], PIL.Image.Image]
    side: int | None = None


class Preprocessing(NamedTuple):
    """What a classifier wants done to an image: short side to ``resize``, centre crop of ``crop``, both in pixels.

    An image whose short side is ``resize`` already is not resampled.
    """

    resize: int
    crop: int
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC


def open_images(spec: str, *, split: str | None = None, devkit: Path | None = None, training: bool = False) -> Listing:
    """The images that a command line names: ``ROOT``, a folder of folders of classes, or ``KIND:ROOT``.

    ``cifar10:ROOT`` and ``cifar100:ROOT`` are torchvision's data sets where they lie on disk; nothing is downloaded.

    Args:
        spec: see above; :data:`KINDS` are the kinds.
        split: of ``flower17``: a name in ``datasplits.mat``; of CIFAR: ``train`` or ``test``.
        devkit: of ``ilsvrc2012``, which needs it: the folder ILSVRC2012_devkit_t12.
        training: where no split is named: the first training images in place of the test images.

    Raises:
        ValueError: no such kind, file or split.
    """
    kind, rest = kind_of(spec)
    root = Path(rest)
    if kind == "imagefolder":
        return image_folder(root)
    if kind == "flower17":
        return flower17(root, split or ("trn1" if training else "tst1"))
    if kind in ("cifar10", "cifar100"):
        return cifar(root, kind, split or ("train" if training else "test"))
    if kind == "ilsvrc2012":
        if devkit is None:
            raise ValueError("ilsvrc2012 needs --devkit, the folder ILSVRC2012_devkit_t12")
        return ilsvrc2012(root, devkit)
    if kind == "transferattack":
        return transferattack(root)
    raise ValueError(f"expected a folder, or one of {', '.join(KINDS)} before a colon, got {spec!r}")


def kind_of(spec: str) -> tuple[str, str]:
    """The kind of an image set, which need not be one of :data:`KINDS`, and its root; see :func:`open_images`."""
    kind, colon, rest = spec.partition(":")
    return ("imagefolder", spec) if not colon or (kind not in KINDS and Path(spec).exists()) else (kind, rest)


def same_images(spec: str, listing: Listing, other_spec: str, other: Listing) -> bool:
    """Whether two specs (see :func:`open_images`) name the same images: those of one split of one root."""
    roots = [Path(kind_of(each)[1]).resolve() for each in (spec, other_spec)]
    return roots[0] == roots[1] and listing.names == other.names


def image_folder(root: Path) -> Listing:
    """A folder for each class, named so that sorting gives the classifier's order; a class without images is an empty folder.

    The images and their order are those of torchvision's ``ImageFolder``, but for hidden files and folders, such as
    ``.ipynb_checkpoints``, which are left out. A link to a folder that contains it is left out, too, with a line in the log.

    Raises:
        ValueError: no folder, no class in it or no image.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    parents, problems, notes = (os.path.realpath(root),), list[tuple[str, str]](), list[str]()
    _, classes = folders.entries(root, parents, problems, notes)
    _log(problems, notes)
    if not classes:
        raise ValueError(f"{root} has no folders of classes; expected {root}/CLASS/IMAGE.jpg")
    paths = [image_files(folder, parents) for folder in classes]
    if not any(paths):
        raise ValueError(f"{root} has no images ({', '.join(IMG_EXTENSIONS)}) in its {len(classes)} folders of classes")
    labels = [label for label, inside in enumerate(paths) for _ in inside]
    return _of_files([path for inside in paths for path in inside], labels, [folder.name for folder in classes], root)


def image_files(folder: Path, parents: tuple[str, ...] = ()) -> list[Path]:
    """The image files in a folder and its subfolders, by the folder's path and the file's name; see :func:`image_folder`.

    ``parents``: the real paths of folders that contain it, to which links in it are left out.
    """
    problems, notes = list[tuple[str, str]](), list[str]()
    found = [
        path
        for path in folders.walk(folder, (*parents, os.path.realpath(folder)), problems, notes)
        if path.suffix.lower() in IMG_EXTENSIONS
    ]
    _log(problems, notes)
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def cifar(root: Path, kind: str, split: str = "test") -> Listing:
    """CIFAR-10 or CIFAR-100 as torchvision reads it: 32 x 32 pixels, lossless, never downloaded.

    Args:
        root: the folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        kind: ``"cifar10"`` or ``"cifar100"``.
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: the data set isn't there or is damaged, or no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"{kind} has the splits train and test, got {split!r}")
    try:
        images = (CIFAR10 if kind == "cifar10" else CIFAR100)(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(f"{root} doesn't hold {kind} as torchvision's data set reads it, and nothing is downloaded") from error
    names = tuple(f"{images.classes[label]}/{i:05d}" for i, label in enumerate(images.targets))
    return Listing(names, tuple(images.targets), tuple(images.classes), lambda i: images[i][0], side=32)


def flower17(root: Path, split: str = "tst1") -> Listing:
    """Oxford Flower-17 as it is distributed: ``jpg/image_0001.jpg`` ..., 80 of each class in order, and ``datasplits.mat``.

    Args:
        root: the folder that holds ``jpg`` and ``datasplits.mat``.
        split: a name in that file: ``trn1``, ``val1``, ``tst1``, or those of splits 2 and 3.

    Raises:
        ValueError: no such file or split, or an image of the split is missing.
    """
    file = root / "datasplits.mat"
    if not file.is_file():
        raise ValueError(f"{file} is missing; it comes with the Flower-17 data set")
    splits = _load_mat(file)
    if split not in splits or split.startswith("__"):
        names = sorted(name for name in splits if not name.startswith("__"))
        raise ValueError(f"{file} has no split {split!r}; it has {names}")
    try:
        numbers = sorted(int(number) for number in splits[split].ravel())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {split} does not hold numbers of images") from error
    paths = [root / "jpg" / f"image_{number:04d}.jpg" for number in numbers]
    _check_files(paths)
    return _of_files(paths, [(number - 1) // 80 for number in numbers], FLOWERS)


def ilsvrc2012(root: Path, devkit: Path) -> Listing:
    """The ILSVRC-2012 validation images in one flat folder, with the labels of its development kit.

    Args:
        root: folder of ``ILSVRC2012_val_00000001.JPEG`` and so on; a part of them will do.
        devkit: the unpacked ``ILSVRC2012_devkit_t12``, which holds ``data/meta.mat`` and
            ``data/ILSVRC2012_validation_ground_truth.txt``.

    Class indices are those of torchvision's models: the synsets of the 1000 leaf classes, sorted by WordNet id.

    Raises:
        ValueError: a file of the devkit is missing, no image, or an image without a label.
    """
    meta, truth = devkit / "data" / "meta.mat", devkit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    _check_files([meta, truth])
    paths = sorted(root.glob(f"ILSVRC2012_val_{8 * '[0-9]'}.JPEG"))
    if not paths:
        raise ValueError(f"{root} has no images named ILSVRC2012_val_00000001.JPEG and so on")
    tree = _load_mat(meta, squeeze_me=True, struct_as_record=False)
    try:
        # a node of the WordNet tree with children is no class of its own
        leaves = sorted((s.WNID, int(s.ILSVRC2012_ID), s.words) for s in tree["synsets"] if int(s.num_children) == 0)
        index = {identity: position for position, (_, identity, _) in enumerate(leaves)}
        known = [index[int(line)] for line in truth.read_text(encoding="utf-8").split()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{devkit} does not hold the files of ILSVRC2012_devkit_t12: {reason(error)}") from error
    numbers = [int(path.stem.rsplit("_", 1)[1]) for path in paths]
    if missing := [number for number in numbers if not 1 <= number <= len(known)]:
        raise ValueError(f"{truth} has {len(known)} labels, none for image {missing[-1]}")
    labels = [known[number - 1] for number in numbers]
    return _of_files(paths, labels, [str(words) for _, _, words in leaves])


def transferattack(root: Path) -> Listing:
    """ImageNet images as TransferAttack takes them: ``images/FILE``, and ``labels.csv`` with ``filename`` and ``label``.

    Labels are indices of torchvision's 1000 ImageNet classes.

    Raises:
        ValueError: a file is missing, no such columns, or a label that is no index.
    """
    file = root / "labels.csv"
    _check_files([file])
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8: {error}") from error
    if not rows or not {"filename", "label"} <= rows[0].keys():
        raise ValueError(f"{file} must have the columns filename and label, and a row")
    classes = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    for number, row in enumerate(rows, 2):
        if not row["filename"]:
            raise ValueError(f"{file}, line {number}: expected a filename, got none")
        if not (row["label"] or "").strip().isdecimal() or int(row["label"]) >= len(classes):
            raise ValueError(f"{file}, line {number}: expected a label from 0 to {len(classes) - 1}, got {row['label']!r}")
    paths = [root / "images" / row["filename"] for row in rows]
    _check_files(paths)
    return _of_files(paths, [int(row["label"]) for row in rows], classes)


def shuffled(listing: Listing, seed: int) -> list[int]:
    """Positions of the listing in a random order that takes one image of each class in turn, while there are any."""
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(listing.labels), generator=generator, device="cpu").tolist()
    rank = torch.randperm(len(listing.classes), generator=generator, device="cpu").tolist()
    seen = [0] * len(listing.classes)
    turns = []
    for position in order:
        label = listing.labels[position]
        turns.append((seen[label], rank[label], position))
        seen[label] += 1
    return [position for _, _, position in sorted(turns)]


def read_images(listing: Listing, positions: Sequence[int], preprocessing: Preprocessing) -> tuple[Tensor, list[int]]:
    """Images (n, 3, crop, crop) uint8, and their n positions.

    A file that can't be read is left out, and so is an image that is too thin to be resized; each is a line in the log.
    """
    crop, images, kept = preprocessing.crop, [], []
    for position in positions:
        try:
            images.append(prepared(listing.read(position), preprocessing, one_line(listing.names[position])))
        except ValueError as error:
            logger.warning("left out: %s", error)
        else:
            kept.append(position)
    return torch.stack(images) if images else torch.empty(0, 3, crop, crop, dtype=torch.uint8), kept


def first_size(listing: Listing) -> tuple[int, int] | None:
    """Width and height of the first image that can be read, None if there is none."""
    for position in range(len(listing.names)):
        with contextlib.suppress(ValueError):  # reported when the images are read to be used
            return listing.read(position).size
    return None


def check_not_enlarged(first: tuple[int, int] | None, to: Preprocessing, why: str = "") -> None:
    """Raise where images would be enlarged and nobody asked for it.

    Args:
        first: width and height of the first image; None: there is none.
        to: what is done to images that come without a size.
        why: start of the message, on why they do.

    Raises:
        ValueError: both sides of the first image are below the crop.
    """
    if first and max(first) < to.crop:
        raise ValueError(
            f"{why}the first image has {first[0]} x {first[1]} pixels: give --resize and --crop, such as {min(first)}; "
            f"otherwise it is enlarged to {to.resize} and cropped to {to.crop}"
        )


def prepared(image: PIL.Image.Image, preprocessing: Preprocessing, name: str) -> Tensor:
    """An RGB image (3, crop, crop) uint8, resized and cropped.

    Raises:
        ValueError: it is too thin to be resized; the message begins with ``name``.
    """
    resize, crop, interpolation = preprocessing
    return tvf.pil_to_tensor(tvf.center_crop(resized(image, resize, interpolation, name), [crop, crop]))


def batches(listing: Listing, preprocessing: Preprocessing, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, 3, crop, crop) uint8 and labels (n,), 1 <= n <= ``size``, in the order of :func:`shuffled`.

    Those that :func:`read_images` leaves out are missing.

    Raises:
        ValueError: none of the images can be read.
    """
    order, found = shuffled(listing, seed), False
    for start in range(0, len(order), size):
        images, positions = read_images(listing, order[start : start + size], preprocessing)
        if positions:
            found = True
            yield images, torch.tensor([listing.labels[p] for p in positions])
    if not found:
        raise ValueError("none of the images can be read")


def _of_files(paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str], root: Path | None = None) -> Listing:
    """``root``: names are relative to it; without it they are the last folder and the file."""
    names = tuple(path.relative_to(root).as_posix() if root else "/".join(path.parts[-2:]) for path in paths)
    return Listing(names, tuple(labels), tuple(classes), lambda i: read_rgb(paths[i]))


def _log(problems: Iterable[tuple[str, str]], notes: Iterable[str]) -> None:
    for line in (*(f"left out: {one_line(name)}: {why}" for name, why in problems), *notes):
        logger.warning("%s", line)


def _load_mat(path: Path, **options: bool) -> Any:
    try:
        return loadmat(str(path), **options)
    except Exception as error:  # damaged files make SciPy raise almost any exception
        raise ValueError(f"{path} can't be read as a MATLAB file: {reason(error)}") from error


def _check_files(paths: Sequence[Path]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
