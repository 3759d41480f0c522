"""Fitting a classifier to a set of images: a linear layer on a frozen backbone, or all layers, also adversarially."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

from .. import _checks
from ..defended import DefendedModel
from ..files import reason
from .attacks.libraries import APGD
from .attacks.pgd import PGD, Bound
from .backbones import build, check_builder, is_lite
from .data import Listing, Preprocessing, batches, read_images
from .result import Cell, bits

WARM_UP = 0.1  # share of the steps of training over which the learning rate rises
BATCHNORM_MOMENTUM = 0.1  # EfficientNet-lite's own, 0.01, wants more steps than a small data set has

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdversarialExamples:
    """Images to train on: for each image the last point within ``eps`` of PGD (Madry et al. 2018).

    One step of 1.25 ``eps`` from a random start is fast adversarial training (Wong et al. 2020); more are PGD with steps of
    2.5 ``eps`` over their number. A network may learn to fool that one step alone (catastrophic overfitting, ibid.): judge
    it with :func:`robust_accuracy`.

    Attributes:
        eps: bound of the L-infinity norm in grey levels, above 0 and at most 255.
        steps: number of gradients, 1 or more.
    """

    eps: float
    steps: int = 1

    def __post_init__(self) -> None:
        _checks.number("eps (grey levels)", self.eps, above=0, at_most=255)
        _checks.integer("steps", self.steps, at_least=1)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, C, H, W) in [0, 1], none further than ``eps`` from those given, on which ``model`` has a larger loss.

        The model stays in the mode that it is in; its parameters get no gradient and its running statistics don't move.
        """
        bound = Bound("linf", self.eps / 255)
        size = 1.25 if self.steps == 1 else 2.5 / self.steps
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        start = bound.apply(images, bound.eps * (2 * noise - 1))
        attack = PGD(bound, self.steps, draws=1, decay=0, step_size=size, halvings=())
        with _statistics_kept(model):
            return attack(DefendedModel(model, nn.Identity(), shift=0), images, labels, start=start).images


def fit_target(
    listing: Listing,
    backbone: str = "efficientnet-lite0",
    weights: str | None = None,
    *,
    size: int | None = None,
    epochs: int = 0,
    lr: float = 0.01,
    batch_size: int = 32,
    adversarial: AdversarialExamples | None = None,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[nn.Sequential, Preprocessing]:
    """A classifier of the listing's classes: a linear layer on the frozen backbone, then ``epochs`` of training all of it.

    The linear layer is fitted to the features of the images as they are (L-BFGS, weight decay 1e-3 times its square), but where
    the backbone starts from random numbers: such features are of no use. Training all layers is SGD with momentum 0.9, weight
    decay 5e-4, a learning rate that rises over the first tenth and falls along a cosine, and torchvision's random resized crops
    and flips; it holds the images in memory, 0.2 MB each at 256 pixels.

    Args:
        listing: images and classes.
        backbone: see :func:`~oag_transform.evaluation.backbones.build`.
        weights: likewise.
        size: crop in pixels, of what is resized to 8/7 of it; the backbone's own of both where that is None.
        epochs: of training all layers; at least 1 for a random start and for adversarial training.
        lr: the largest learning rate.
        batch_size: images of a step; the last, smaller batch of an epoch is left out.
        adversarial: what all layers are trained on in place of the images; None: the images.
        compute_dtype: ``torch.bfloat16`` for mixed precision (autocast); None for float32.
        seed: of everything that is random.
        device: where it is trained.
        progress: whether to show bars.

    Returns the model, (N, 3, crop, crop) in [0, 1] -> logits, and its preprocessing.

    Raises:
        ValueError: no such backbone or weights, or one that fails on images of this size; fewer than two classes, no image that
            can be read, a setting out of its range, or a loss that is not finite.
    """
    if len(listing.classes) < 2:
        raise ValueError(f"expected two classes or more, got {len(listing.classes)}")
    epochs = _checks.integer("epochs", epochs)
    batch_size = _checks.integer("batch_size", batch_size, at_least=1)
    lr = _checks.number("lr", lr, above=0)
    if size is not None:
        size = _checks.integer("size", size, at_least=1)
    lite = is_lite(backbone)
    if not lite:
        check_builder(backbone)
    pretrained = lite or weights is not None
    if not epochs and not pretrained:
        raise ValueError(f"{backbone} without weights starts from random numbers: epochs must be at least 1, got 0")
    if not epochs and adversarial is not None:
        raise ValueError("adversarial training is of all layers: epochs must be at least 1, got 0")
    # torchvision's initialisation, augmentation and dropout draw from the global generator: the caller's state is put back
    with torch.random.fork_rng(devices=[] if torch.device(device).type == "cpu" else None):
        torch.manual_seed(seed)
        model, preprocessing = build(backbone, weights, len(listing.classes))
        if size is not None:
            preprocessing = preprocessing._replace(resize=round(size * 8 / 7), crop=size)
        model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if pretrained:
            _fit_head(model, listing, preprocessing, progress)
        if epochs:
            _fit_all(model, listing, preprocessing, epochs, lr, batch_size, adversarial, compute_dtype, seed, progress)
    return model.eval().requires_grad_(False), preprocessing


def clean_accuracy(model: nn.Module, listing: Listing, preprocessing: Preprocessing) -> Cell:
    """Which images the model classifies correctly as they are, in the order of :func:`~.data.shuffled` with seed 0."""
    return _right(model, listing, preprocessing, len(listing.names), lambda images, _: images)


def robust_accuracy(
    model: nn.Module,
    listing: Listing,
    preprocessing: Preprocessing,
    eps: float,
    *,
    count: int = 100,
    steps: int = 50,
    restarts: int = 1,
) -> Cell:
    """Which of the first ``count`` images the model classifies correctly under APGD on the cross-entropy (Croce & Hein 2020).

    Args:
        model: (N, 3, crop, crop) in [0, 1] -> logits, in eval mode.
        listing: images and classes.
        preprocessing: of the model.
        eps: bound of the L-infinity norm in grey levels.
        count: images, the first in the order of :func:`clean_accuracy`; all where there are fewer.
        steps: gradients for each image and restart.
        restarts: random starts.

    Raises:
        ValueError: a bad number, or none of the images can be read.
    """
    _checks.integer("count", count, at_least=1)
    attack = APGD(Bound("linf", eps / 255), steps=steps, draws=1, restarts=restarts)
    defended = DefendedModel(model, nn.Identity(), shift=0)
    return _right(model, listing, preprocessing, count, lambda images, labels: attack(defended, images, labels).images)


def _right(
    model: nn.Module,
    listing: Listing,
    preprocessing: Preprocessing,
    count: int,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Cell:
    """Which of the first images are right, those that are wrong before ``change(images, labels)`` being wrong after it."""
    device = next(model.parameters()).device
    right = ""
    for images, labels in batches(listing, preprocessing, 32, seed=0):
        left = count - len(right)
        shown, truth = images[:left].to(device).float() / 255, labels[:left].to(device)
        with torch.no_grad():
            correct = model(shown).argmax(1) == truth
        rest = correct.nonzero().flatten()
        if len(rest):
            changed = change(shown[rest], truth[rest])
            with torch.no_grad():
                correct[rest] = model(changed).argmax(1) == truth[rest]
        right += bits(correct)
        if len(right) == count:
            break
    return Cell(right)


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter has a gradient and batch normalization doesn't update its running statistics."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    momenta = [norm.momentum for norm in norms]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for norm in norms:
        norm.momentum = 0.0
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _working_on(images: Tensor) -> Iterator[None]:
    """A context in which an error of the backbone becomes one that names the shape of the images."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # many backbones take one size only, or no batch of one image
        raise ValueError(f"the backbone fails on images of shape {tuple(images.shape)}: {reason(error)}") from error


def _fit_head(model: nn.Sequential, listing: Listing, preprocessing: Preprocessing, progress: bool) -> None:
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    device = head.weight.device
    captured: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    labels = []
    with torch.no_grad(), hook, tqdm(total=len(listing.names), desc="features", disable=not progress, leave=False) as bar:
        for images, part in batches(listing, preprocessing, 8, seed=0):
            with _working_on(images):
                model(images.to(device).float() / 255)
            labels.append(part)
            bar.update(len(part))
    features, truth = torch.cat(captured), torch.cat(labels).to(device)
    head.requires_grad_(True)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(features), truth) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    right = float((head(features).argmax(1) == truth).float().mean())
    logger.info("linear layer fitted: %.1f%% of %d training images", 100 * right, len(truth))


def _rate(step: int, steps: int) -> float:
    """Share of the largest learning rate in a step: up a line, down a cosine."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def _fit_all(
    model: nn.Sequential,
    listing: Listing,
    preprocessing: Preprocessing,
    epochs: int,
    lr: float,
    batch_size: int,
    adversarial: AdversarialExamples | None,
    compute_dtype: torch.dtype | None,
    seed: int,
    progress: bool,
) -> None:
    """Train all layers; see :func:`fit_target`."""
    device = next(model.parameters()).device
    wide = preprocessing._replace(crop=preprocessing.resize)
    augment = v2.Compose([v2.RandomResizedCrop(preprocessing.crop, scale=(0.35, 1.0)), v2.RandomHorizontalFlip()])
    samples: Any = [
        (image, label)
        for position, label in enumerate(tqdm(listing.labels, desc="read", disable=not progress, leave=False))
        for image in read_images(listing, [position], wide)[0]
    ]
    if not samples:
        raise ValueError("none of the images can be read")
    loader: DataLoader[Any] = DataLoader(samples, batch_size, shuffle=True, drop_last=len(samples) > batch_size)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            norm.momentum = BATCHNORM_MOMENTUM
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator(device).manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        total, right, seen = 0.0, 0, 0
        for images, labels in tqdm(loader, desc=f"epoch {epoch + 1} of {epochs}", disable=not progress, leave=False):
            crops = torch.stack([augment(image) for image in images]).to(device).float() / 255
            crops, truth = crops.contiguous(memory_format=torch.channels_last), labels.to(device)
            mixed = torch.autocast(device.type, compute_dtype, enabled=compute_dtype is not None)
            try:
                with _working_on(crops), mixed:
                    if adversarial is not None:
                        crops = adversarial(model, crops, truth, generator)
                    logits = _checks.logits(model(crops), len(crops))
            except _checks.NonFiniteLogitsError as error:  # of the attack's model
                raise ValueError(f"the logits are not finite in epoch {epoch + 1}: lower the learning rate") from error
            value = nn.functional.cross_entropy(logits.float(), truth)
            if not value.isfinite():
                raise ValueError(
                    f"the training loss is {float(value.detach()):g} in epoch {epoch + 1}: lower the learning rate"
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += float(value.detach()) * len(truth)
            right += int((logits.argmax(1) == truth).sum())
            seen += len(truth)
        logger.info("epoch %d: training loss %.3f, %.1f%% of its images right", epoch + 1, total / seen, 100 * right / seen)
    model.eval()
