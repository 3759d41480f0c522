"""The computations of the service: classification with and without the defense, purification, gray-box attacks."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
import torchvision
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from ... import streams
from ...defended import DefendedModel
from ...evaluation.backbones import is_lite
from ...evaluation.data import prepared
from ...evaluation.options import CHECKPOINTS
from ...evaluation.targets import Target, is_checkpoint
from ...images import to_uint8
from ...transform import OnlineAlternateGenerator

CLASSIFY, PURIFY, ATTACK = "classify", "purify", "attack"
ATTACKS = ("igsm", "mifgsm")
LARGEST_EPS = 16  # grey levels
TOP = 5
FRAMES = 24
"""Largest number of steps of the synthesis that are shown."""
MAGNIFIED = 15
"""Factor by which differences are shown."""


class Work(NamedTuple):
    """A task on an image. Images of equal tasks share a batch.

    Attributes:
        kind: :data:`CLASSIFY`, :data:`PURIFY` or :data:`ATTACK`.
        shape: of the images.
        attack: one of :data:`ATTACKS`, and its bound in grey levels.
        number: makes each attack a batch of its own, so that two attacks run on two workers.
    """

    kind: str
    shape: tuple[int, ...]
    attack: tuple[str, int] | None = None
    number: int = 0


class Guess(NamedTuple):
    """A predicted class, by number and name, and its probability."""

    label: int
    name: str
    probability: float


class Classified(NamedTuple):
    """The likeliest classes of an image without and with the defense, and the purified image, (C, H, W) uint8."""

    undefended: list[Guess]
    defended: list[Guess]
    purified: Tensor


class Frame(NamedTuple):
    """A step of the synthesis.

    Attributes:
        step: network step.
        image: (C, H, W) uint8.
        residual: root-mean-square difference from the attacked image, in grey levels.
        guess: the likeliest class, averaged over the views.
    """

    step: int
    image: Tensor
    residual: float
    guess: Guess


class Attacked(NamedTuple):
    """An image, the attacked image, and its purification step by step; images are (C, H, W) uint8."""

    original: Tensor
    attacked: Tensor
    frames: list[Frame]
    undefended: list[Guess]
    undefended_attacked: list[Guess]
    defended: list[Guess]


class Engine:
    """A classifier, undefended and defended, and the names of its classes.

    Args:
        target: the classifier.
        classes: the names.
        transform: the defense.
        samples: purifications of an image whose class probabilities are averaged.
        device: the device of all computations.
    """

    def __init__(
        self, target: Target, classes: Sequence[str], transform: OnlineAlternateGenerator, samples: int, device: torch.device
    ) -> None:
        self.target, self.classes, self.transform, self.device = target, tuple(classes), transform, device
        self.defended = DefendedModel(target.model, transform, samples=samples).eval()
        self._once = DefendedModel(target.model, transform).eval()  # one purification, which is shown step by step

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """(3, crop, crop) uint8, resized and cropped as the classifier wants it.

        Raises:
            ValueError: the image is too thin, see :func:`oag_transform.images.resize`.
        """
        return prepared(image, self.target.preprocessing, "the image")

    def run(self, work: Work, images: Sequence[Tensor]) -> Sequence[Any]:
        """A :class:`Classified`, purified image (C, H, W) uint8 or :class:`Attacked` for each image (C, H, W) uint8.

        Raises:
            DivergenceError, ValueError: see :class:`~oag_transform.OnlineAlternateGenerator`.
        """
        batch = torch.stack(list(images)).to(self.device)
        index = [_stream(image) for image in images]
        if work.kind == CLASSIFY:
            return self._classify(batch, index)
        if work.kind == PURIFY:
            return list(self.transform(batch, index=index).cpu())
        if work.attack is None:
            raise ValueError("an attack has a name and a bound")
        return [self._attack(batch, index[0], *work.attack)]

    @torch.no_grad()
    def _classify(self, batch: Tensor, index: list[int]) -> list[Classified]:
        pixels = batch.float() / 255
        undefended = self._top(self.target.model(pixels))
        purified = self.defended.purify(pixels, index=index)
        defended = self._top(self.defended.classify(purified))
        return [
            Classified(*each)
            for each in zip(undefended, defended, to_uint8(purified[:: self.defended.samples]).cpu(), strict=True)
        ]

    def _attack(self, image: Tensor, index: int, name: str, eps: int) -> Attacked:
        from ...evaluation.attacks import gray_box  # foolbox takes seconds to import

        pixels = image.float() / 255
        with torch.no_grad():
            logits = self.target.model(pixels)
        label = logits.argmax(1)  # the attack is untargeted: away from the present prediction
        found = gray_box.make(name, eps, targeted=False)(self.target.model, pixels, label, classes=len(self.classes))
        every = max(1, math.ceil(self.transform.network_steps / FRAMES))
        steps = list(self.transform.trace(found, every=every, index=index))
        with torch.no_grad():
            undefended_attacked = self.target.model(found)
            guesses = [self._once.classify(step.images) for step in steps]  # one at a time, to save memory
        frames = [
            Frame(step.step, to_uint8(step.images)[0].cpu(), float(step.residual), self._top(guess)[0][0])
            for step, guess in zip(steps, guesses, strict=True)
        ]
        return Attacked(
            original=image[0].cpu(),
            attacked=to_uint8(found)[0].cpu(),
            frames=frames,
            undefended=self._top(logits)[0],
            undefended_attacked=self._top(undefended_attacked)[0],
            defended=self._top(guesses[-1])[0],
        )

    def _top(self, logits: Tensor) -> list[list[Guess]]:
        """The likeliest classes of each row."""
        found = logits.float().softmax(1).topk(min(TOP, len(self.classes)))
        rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [[Guess(i, self.classes[i], p) for i, p in zip(*row, strict=True)] for row in rows]


def class_names(model: str, weights: str | None, labels: Path | None) -> tuple[str, ...]:
    """Names of a classifier's classes: a file's lines, or those that come with the model.

    Returns no names where the model can't be loaded; :func:`~oag_transform.evaluation.targets.load_target` reports that.

    Raises:
        ValueError: the file is empty or has an empty line, or no file is given and no names come with the model.
    """
    if labels is not None:
        return _lines(labels)
    if Path(model).suffix in CHECKPOINTS:
        return _fitted(Path(model))
    if is_lite(model):  # ImageNet's, too
        return tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])
    if ":" in model or (weights is not None and is_checkpoint(weights)):
        raise ValueError(
            f"no names of classes come with {model}: give --labels FILE, a name in each line, in the model's order"
        )
    if weights is None or model not in torchvision.models.list_models(module=torchvision.models):
        return ()
    every, name = torchvision.models.get_model_weights(model), weights.rpartition(".")[2]
    return tuple(every[name].meta["categories"]) if name in every.__members__ else ()


def png(image: Tensor) -> bytes:
    """(C, H, W) uint8 as a PNG file."""
    buffer = io.BytesIO()
    tvf.to_pil_image(image).save(buffer, "PNG", compress_level=3)  # a higher level compresses noise no better
    return buffer.getvalue()


def data_url(image: Tensor) -> str:
    """(C, H, W) uint8 as a PNG in a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def difference(image: Tensor, reference: Tensor) -> Tensor:
    """:data:`MAGNIFIED` times the absolute difference of two images (C, H, W) uint8, clipped to 255."""
    return (MAGNIFIED * (image.int() - reference.int()).abs()).clamp(max=255).to(torch.uint8)


def _lines(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels {path} is no text in UTF-8") from error
    if not names or not all(names):
        raise ValueError(f"--labels {path} must have the name of a class in each line, got {names.count('')} empty ones")
    return names


def _fitted(path: Path) -> tuple[str, ...]:
    """The classes in a file that fit-target wrote; empty for any other file."""
    try:
        return tuple(torch.load(path, map_location="cpu", weights_only=True)["classes"])
    except Exception:  # torch.load raises many kinds; loading the model reports them
        return ()


def _stream(image: Tensor) -> int:
    """The random stream of an image, from its pixels: with a seed, its result is independent of other requests."""
    return streams.index_of(hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())
