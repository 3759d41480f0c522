"""Images attacked by another tool: found by the names of the clean ones, read as these are, and measured.

Tools such as TransferAttack write one folder of PNG files with the names of the clean images. So do others, into a folder for
each class.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..files import decode, one_line
from .columns import Images, given
from .data import Listing, Preprocessing, image_files, prepared
from .store import Store
from .subject import Subject, choose_subject
from .targets import Target

logger = logging.getLogger(__name__)

NAMED = 3  # names that a message gives of many
LOSSY = (".jpg", ".jpeg", ".webp")


class Matched(NamedTuple):
    """The files of a folder that have the names of clean images.

    Attributes:
        folder: of the attacked images.
        files: position in the listing of clean images -> file.
        missing: names of the clean images that have none.
        surplus: names of the files that no clean image has.
        ambiguous: names of the clean images that more than one file, or a file of more than one image, could belong to.
    """

    folder: Path
    files: Mapping[int, Path]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    ambiguous: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Clean images that a target gets right, and the attacked ones of some folders.

    Attributes:
        subject: the target and the clean images that every folder has, readable.
        columns: one for each folder.
        facts: what was found in each folder, and the norms of its perturbations.
    """

    subject: Subject
    columns: tuple[Images, ...]
    facts: dict[str, str]


def match(folder: Path, listing: Listing) -> Matched:
    """The images in a folder, and in folders in it, by the names of the clean ones.

    A file belongs to the clean image of the same path in its folder, else to that of the same ``CLASS/FILE``. A file that lies
    in the folder itself belongs to the clean image of the same file name. Each time a file with another suffix comes next.

    Raises:
        ValueError: no such folder, or no image in it has the name of a clean one.
    """
    if not folder.is_dir():
        raise ValueError(f"--adversarial {folder} is not a folder")
    files = sorted(filter(Path.is_file, image_files(folder)))
    whole, known = dict[str, list[Path]](), dict[str, list[Path]]()  # by the whole name, by its last two parts
    for path in files:
        inside = PurePosixPath(path.relative_to(folder))
        for among, each in ((whole, inside), (known, PurePosixPath(*inside.parts[-2:]))):
            for name in (str(each), str(each.with_suffix(""))):
                among.setdefault(name, []).append(path)
    found: dict[int, Path] = {}
    missing, ambiguous = [], []
    for position, name in enumerate(listing.names):
        inside = PurePosixPath(name)
        tried = ((whole, inside), (known, PurePosixPath(*inside.parts[-2:])), (known, PurePosixPath(inside.name)))
        steps = [(among, str(each)) for among, part in tried for each in (part, _stem(part))]
        candidates = next((among[each] for among, each in steps if each in among), [])
        if not candidates:
            missing.append(name)
        elif len(candidates) > 1:
            ambiguous.append(name)
        else:
            found[position] = candidates[0]
    claims = Counter(found.values())
    ambiguous += [listing.names[position] for position, path in found.items() if claims[path] > 1]
    found = {position: path for position, path in found.items() if claims[path] == 1}
    if not found:
        names = ", ".join(one_line(str(path.relative_to(folder))) for path in files[:NAMED]) or "no images"
        reason = "that belongs to one clean image alone" if ambiguous else "with the name of a clean one"
        raise ValueError(
            f"--adversarial {folder} has no image {reason}: it has {names}; clean images are named "
            f"{', '.join(map(one_line, listing.names[:NAMED]))}"
        )
    surplus = tuple(str(path.relative_to(folder)) for path in files if path not in claims)
    return Matched(folder, found, tuple(missing), surplus, tuple(ambiguous))


def common(matches: Sequence[Matched], listing: Listing) -> tuple[Listing, list[int]]:
    """The clean images that every folder has, and their positions in the listing.

    Raises:
        ValueError: there is none.
    """
    kept = [position for position in range(len(listing.names)) if all(position in each.files for each in matches)]
    if not kept:
        raise ValueError(f"--adversarial: no image has a file in each of {', '.join(str(each.folder) for each in matches)}")
    names, labels = tuple(listing.names[position] for position in kept), tuple(listing.labels[position] for position in kept)
    return Listing(names, labels, listing.classes, lambda i: listing.read(kept[i]), listing.side), kept


def choose_transfer(
    matches: Sequence[Matched], target: Target, listing: Listing, count: int, store: Store, seed: int, device: torch.device
) -> Transfer:
    """The first ``count`` images that every folder has and the target gets right, clean and attacked.

    An attacked image that can't be read is left out with a line in the log, and its clean one with it.

    Raises:
        ValueError: none is left; see :func:`~oag_transform.evaluation.subject.choose_subject`.
    """
    shared, kept = common(matches, listing)
    subject = choose_subject(target, shared, count, store, seed, device)
    position = {name: kept[i] for i, name in enumerate(shared.names)}
    chosen = [position[name] for name in subject.names]
    found = [[_read(each.files[at], listing, at, target.preprocessing) for at in chosen] for each in matches]
    whole = [i for i in range(len(chosen)) if all(column[i] is not None for column in found)]
    if not whole:
        raise ValueError(f"--adversarial: none of {len(chosen)} attacked images can be read")
    subject = subject.only(whole)
    labels = _labels([each.folder for each in matches])
    columns, facts = [], {}
    for matched, label, column in zip(matches, labels, found, strict=True):
        read = [image for i in whole if (image := column[i]) is not None]
        pixels = torch.stack([image.pixels for image in read])
        columns.append(given(label, pixels))
        facts[f"attacked images, {label}"] = _fact(matched, read, len(chosen) - sum(each is not None for each in column))
        logger.info("%s: %s", label, facts[f"attacked images, {label}"])
        facts[f"perturbations, {label}"] = _norms(pixels, subject.images)
    return Transfer(subject, tuple(columns), facts)


def linf(attacked: Tensor, clean: Tensor) -> Tensor:
    """(N,) L-infinity norms in grey levels of the differences of uint8 images (N, C, H, W)."""
    return torch.stack([(a.int() - b.int()).abs().max() for a, b in zip(attacked, clean, strict=True)])


def l2(attacked: Tensor, clean: Tensor) -> Tensor:
    """(N,) L2 norms on the [0, 1] scale of the differences of uint8 images (N, C, H, W)."""
    return torch.stack([(a.double() - b.double()).norm() / 255 for a, b in zip(attacked, clean, strict=True)])


class _Image(NamedTuple):
    pixels: Tensor
    lossy: bool
    other_size: bool  # than the clean file


def _read(path: Path, listing: Listing, position: int, preprocessing: Preprocessing) -> _Image | None:
    """An attacked image as its clean one is prepared; None, with a line in the log, where it can't be read.

    One of the side that the target crops, where the clean file has another size, was attacked after resizing: it is taken as
    it is.
    """
    try:
        decoded = decode(path)
        image = decoded.image.convert("RGB")
        size: tuple[int, int] = listing.read(position).size
        if image.size not in (size, (preprocessing.crop,) * 2):
            logger.warning("%s has %d x %d pixels, the clean image %d x %d", one_line(str(path)), *image.size, *size)
        if size != image.size == (preprocessing.crop,) * 2:
            preprocessing = preprocessing._replace(resize=preprocessing.crop)
        pixels = prepared(image, preprocessing, one_line(str(path)))
    except ValueError as error:
        logger.warning("left out: %s", error)
        return None
    return _Image(pixels, path.suffix.lower() in LOSSY, image.size != size)


def _stem(name: PurePosixPath) -> PurePosixPath:
    return name.with_suffix("") if name.suffix.lower() in IMG_EXTENSIONS else name


def _labels(folders: Sequence[Path]) -> list[str]:
    """What folders are called in a table: their last parts, or all where these are the same."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def _fact(matched: Matched, read: Sequence[_Image], unreadable: int) -> str:
    parts = [f"{len(matched.files)} by the names of the clean ones", "8 bits a channel, so rounded"]
    if lossy := sum(image.lossy for image in read):
        parts.append(f"{lossy} of {len(read)} in JPEG or WebP, which change the perturbation")
    if other := sum(image.other_size for image in read):
        parts.append(f"{other} of {len(read)} of another size than the clean file")
    if unreadable:
        parts.append(f"{unreadable} unreadable")
    for what, names in (
        ("clean images without one", matched.missing),
        ("without a clean image", matched.surplus),
        ("ambiguous", matched.ambiguous),
    ):
        if names:
            parts.append(f"{len(names)} {what} ({', '.join(map(one_line, names[:NAMED]))}{', ...' if names[NAMED:] else ''})")
    return "; ".join(parts)


def _norms(attacked: Tensor, clean: Tensor) -> str:
    """Smallest, median and largest norm, after the preprocessing that both get."""
    grey, length = linf(attacked, clean), l2(attacked, clean)
    same = int((grey == 0).sum())
    return (
        f"L-infinity {_three(grey.double())} of 255; L2 {_three(length)} on the [0, 1] scale; minimum, median, maximum, after "
        "the preprocessing" + (f"; {same} equal to the clean image" if same else "")
    )


def _three(values: Tensor) -> str:
    return ", ".join(f"{float(each):.3g}" for each in (values.min(), values.quantile(0.5), values.max()))
