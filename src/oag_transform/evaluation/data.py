"""Labelled photographs on disk: an ImageFolder, the original Oxford Flower-17, an ILSVRC-2012 validation folder.

A listing names the files; images are read when they are needed, so that a listing of 50,000 costs nothing.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.io import loadmat
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..files import one_line, read_rgb
from ..images import resize as resized

logger = logging.getLogger(__name__)

FLOWERS = (
    *("daffodil", "snowdrop", "lily of the valley", "bluebell", "crocus", "iris", "tigerlily", "tulip", "fritillary"),
    *("sunflower", "daisy", "colts' foot", "dandelion", "cowslip", "buttercup", "windflower", "pansy"),
)


class Listing(NamedTuple):
    """Image files, their class indices and the names of the classes."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


class Preprocessing(NamedTuple):
    """What a classifier wants done to a photograph: short side to ``resize``, centre crop of ``crop``, both in pixels."""

    resize: int
    crop: int
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC


def image_folder(root: Path) -> Listing:
    """A folder for each class, named so that sorting gives the classifier's order; a class without images is an empty folder.

    Raises:
        ValueError: no folder, no class in it or no image.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    try:
        folder = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError as error:
        raise ValueError(f"{root} has no folders of classes; expected {root}/CLASS/IMAGE.jpg") from error
    if not folder.samples:
        raise ValueError(f"{root} has no images in its {len(folder.classes)} folders of classes")
    paths, labels = zip(*folder.samples, strict=True)
    return Listing(tuple(Path(path) for path in paths), tuple(labels), tuple(folder.classes))


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
    splits = loadmat(str(file))
    if split not in splits or split.startswith("__"):
        names = sorted(name for name in splits if not name.startswith("__"))
        raise ValueError(f"{file} has no split {split!r}; it has {names}")
    numbers = sorted(int(number) for number in splits[split].ravel())
    paths = tuple(root / "jpg" / f"image_{number:04d}.jpg" for number in numbers)
    _check_files(paths)
    return Listing(paths, tuple((number - 1) // 80 for number in numbers), FLOWERS)


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
    _check_files((meta, truth))
    paths = tuple(sorted(root.glob("ILSVRC2012_val_*.JPEG")))
    if not paths:
        raise ValueError(f"{root} has no images named ILSVRC2012_val_00000001.JPEG and so on")
    synsets = loadmat(str(meta), squeeze_me=True, struct_as_record=False)["synsets"]
    # a node of the WordNet tree with children is no class of its own
    leaves = sorted((s.WNID, int(s.ILSVRC2012_ID), s.words) for s in synsets if int(s.num_children) == 0)
    index = {identity: position for position, (_, identity, _) in enumerate(leaves)}
    identities = [int(line) for line in truth.read_text(encoding="utf-8").split()]
    numbers = [int(path.stem.rsplit("_", 1)[1]) for path in paths]
    if max(numbers) > len(identities):
        raise ValueError(f"{truth} has {len(identities)} labels, none for image {max(numbers)}")
    labels = tuple(index[identities[number - 1]] for number in numbers)
    return Listing(paths, labels, tuple(str(words) for _, _, words in leaves))


def shuffled(listing: Listing, seed: int) -> list[int]:
    """Positions of the listing in a random order that takes one image of each class in turn, while there are any."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(listing.labels), generator=generator).tolist()
    rank = torch.randperm(len(listing.classes), generator=generator).tolist()
    seen = [0] * len(listing.classes)
    turns = []
    for position in order:
        label = listing.labels[position]
        turns.append((seen[label], rank[label], position))
        seen[label] += 1
    return [position for _, _, position in sorted(turns)]


def read_images(listing: Listing, positions: list[int], preprocessing: Preprocessing) -> tuple[Tensor, list[int]]:
    """Images (n, 3, crop, crop) uint8, read by :func:`oag_transform.files.read_rgb`, and their n positions.

    A file that can't be read is left out, and so is an image that is too thin to be resized; each is a line in the log.
    """
    resize, crop, interpolation = preprocessing
    images, kept = [], []
    for position in positions:
        path = listing.paths[position]
        try:
            image = resized(read_rgb(path), resize, interpolation, one_line(str(path)))
        except ValueError as error:
            logger.warning("left out: %s", error)
            continue
        images.append(F.pil_to_tensor(F.center_crop(image, [crop, crop])))
        kept.append(position)
    return torch.stack(images) if images else torch.empty(0, 3, crop, crop, dtype=torch.uint8), kept


def batches(listing: Listing, preprocessing: Preprocessing, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, 3, crop, crop) uint8 and labels (n,), 1 <= n <= ``size``, in the order of :func:`shuffled`.

    Those that :func:`read_images` leaves out are missing.
    """
    order = shuffled(listing, seed)
    for start in range(0, len(order), size):
        images, positions = read_images(listing, order[start : start + size], preprocessing)
        if positions:
            yield images, torch.tensor([listing.labels[p] for p in positions])


def _check_files(paths: tuple[Path, ...]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
