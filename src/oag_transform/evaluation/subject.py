"""A target with the images that it is evaluated on, and rows of a table to be: defenses in front of that target."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _checks
from ..baselines.catalogue import NONE
from ..defended import DefendedModel
from .data import Listing, read_images, shuffled
from .provenance import model_key
from .store import Store
from .targets import Target, failures_named


@dataclasses.dataclass(frozen=True)
class Subject:
    """A target and the images that it is evaluated on.

    Attributes:
        target: see :class:`~oag_transform.evaluation.targets.Target`.
        images: (N, 3, crop, crop) uint8, on the CPU.
        labels: (N,) int64.
        classes: names of the classes.
        names: ``CLASS/FILE`` of each image.
        looked_at: images looked at to find these: where they are those that the target gets right, N / ``looked_at`` is about
            its own accuracy.
        store: where everything that is computed is kept.
        seed: of target classes, noise and defenses.
        device: where the target and the defenses run.
    """

    target: Target
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...]
    looked_at: int
    store: Store
    seed: int
    device: torch.device

    def first(self, count: int | None) -> "Subject":
        """The same with the first ``count`` images, or all of them where that is None."""
        return self.only(range(len(self.images) if count is None else min(count, len(self.images))))

    def only(self, positions: Any) -> "Subject":
        """The same with the images in some positions."""
        at = list(positions)
        names = tuple(self.names[i] for i in at)
        return dataclasses.replace(self, images=self.images[at], labels=self.labels[at], names=names)

    def batch(self, images: Tensor, rows: range) -> Tensor:
        """Some rows of uint8 images (N, C, H, W) as float32 in [0, 1], on the device."""
        return images[rows.start : rows.stop].to(self.device).float() / 255

    def key(self, model: DefendedModel) -> dict[str, Any]:
        """What decides what a model in front of this target makes of images."""
        return model_key(model, self.target.fingerprint, self.device)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that is still to be measured: a defense at one setting, and how it is measured.

    Attributes:
        label: name of the row.
        make: seed -> the defense, a transform of [0, 1] batches; None where there is no defense.
        in_views: seen in the four views of a :class:`~oag_transform.DefendedModel`, or as it is.
        shift: of these views in pixels; None: the model's own, by the size of the image.
        count: the first so many images only, for slow defenses; None: all of them.
        defense: key in :data:`oag_transform.baselines.catalogue.DEFENSES`; empty for none of them.
        setting: of that defense.
    """

    label: str
    make: Callable[[int], nn.Module] | None = None
    in_views: bool = False
    shift: int | None = None
    count: int | None = None
    defense: str = ""
    setting: float | None = None

    def model(self, subject: Subject, *, seed: int | None = None) -> DefendedModel:
        """The subject's target behind the defense, on its device.

        Args:
            subject: whose target.
            seed: of the defense; the subject's own where that is None. An attacker who doesn't know the defender's random
                numbers has another one.
        """
        seed = subject.seed if seed is None else seed
        defense = nn.Identity() if self.make is None else self.make(seed)
        shift = self.shift if self.in_views else 0
        return DefendedModel(subject.target.model, defense, shift=shift).to(subject.device)


UNDEFENDED = Row(NONE)


def choose_subject(
    target: Target, listing: Listing, count: int, store: Store, seed: int, device: torch.device, *, right_only: bool = True
) -> Subject:
    """The first ``count`` images, in a seeded order that takes the classes in turn, that the target classifies correctly.

    It is less meaningful to attack the others (IV-A). There are fewer where the listing has no more.

    Args:
        target: the classifier.
        listing: the images.
        count: see above.
        store: of the subject.
        seed: of the order, and of the subject.
        device: of the subject.
        right_only: False to take all images, right or wrong: certified accuracy counts the wrong ones as 0.

    Raises:
        ValueError: the target gets none of them right, or none can be read.
    """
    order = shuffled(listing, seed)
    images, found, looked_at = [], list[int](), 0
    starts = range(0, len(order), store.chunk)
    for start in tqdm(starts, desc=f"{target.name}: images", unit="batch", leave=False, disable=not store.progress):
        batch, positions = read_images(listing, order[start : start + store.chunk], target.preprocessing)
        right = list(range(len(positions)))
        if right_only and positions:
            with torch.no_grad(), failures_named(target.name, batch.shape):
                logits = _checks.logits(target.model(batch.to(device).float() / 255), len(batch))
            with _checks.rows_are(range(looked_at, looked_at + len(batch))):
                guesses = _checks.finite(logits).argmax(1).tolist()
            right = [i for i, position in enumerate(positions) if guesses[i] == listing.labels[position]]
        right = right[: count - len(found)]
        images.append(batch[right])
        found += [positions[i] for i in right]
        looked_at += len(positions) if len(found) < count else right[-1] + 1
        if len(found) == count:
            break
    if not looked_at:
        raise ValueError("none of the images can be read")
    if not found:
        raise ValueError(f"{target.name} gets none of {looked_at} images right: do its classes have the order of the data's?")
    labels = torch.tensor([listing.labels[position] for position in found])
    names = tuple(listing.names[position] for position in found)
    return Subject(target, torch.cat(images), labels, listing.classes, names, looked_at, store, seed, device)
