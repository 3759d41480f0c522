"""Fitting a classifier to a folder of photographs: a linear layer on a frozen backbone, or all of its layers."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

from .. import _checks
from .backbones import build
from .data import Listing, Preprocessing, batches, read_images

logger = logging.getLogger(__name__)


def fit_target(
    listing: Listing,
    backbone: str = "efficientnet-lite0",
    weights: str | None = None,
    *,
    epochs: int = 0,
    lr: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[nn.Sequential, Preprocessing]:
    """A classifier of the listing's classes: a linear layer on the frozen backbone, then ``epochs`` of training all of it.

    The linear layer is fitted to the features of the images as they are (L-BFGS, weight decay 1e-3 times its square). Training
    all layers is SGD with momentum 0.9, a cosine schedule and torchvision's random resized crops and flips; it holds the images
    in memory, 0.2 MB each.

    Returns the model, (N, 3, crop, crop) in [0, 1] -> logits, and its preprocessing.

    Raises:
        ValueError: no such backbone or weights, fewer than two classes, or a setting out of its range.
    """
    if len(listing.classes) < 2:
        raise ValueError(f"expected two classes or more, got {len(listing.classes)}")
    epochs = _checks.integer("epochs", epochs)
    batch_size = _checks.integer("batch_size", batch_size, at_least=1)
    lr = _checks.number("lr", lr, above=0)
    # torchvision's initialisation, augmentation and dropout draw from the global generator: the caller's state is put back
    with torch.random.fork_rng(devices=[] if torch.device(device).type == "cpu" else None):
        torch.manual_seed(seed)
        model, preprocessing = build(backbone, weights, len(listing.classes))
        model.to(device).eval()
        _fit_head(model, listing, preprocessing, progress)
        if epochs:
            _fit_all(model, listing, preprocessing, epochs, lr, batch_size, progress)
    return model.eval().requires_grad_(False), preprocessing


def _fit_head(model: nn.Sequential, listing: Listing, preprocessing: Preprocessing, progress: bool) -> None:
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    device = head.weight.device
    captured: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    labels = []
    with torch.no_grad(), hook, tqdm(total=len(listing.paths), desc="features", disable=not progress, leave=False) as bar:
        for images, part in batches(listing, preprocessing, 8, seed=0):
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


def _fit_all(
    model: nn.Sequential,
    listing: Listing,
    preprocessing: Preprocessing,
    epochs: int,
    lr: float,
    batch_size: int,
    progress: bool,
) -> None:
    device = next(model.parameters()).device
    wide = Preprocessing(preprocessing.resize, preprocessing.resize, preprocessing.interpolation)
    augment = v2.Compose([v2.RandomResizedCrop(preprocessing.crop, scale=(0.35, 1.0)), v2.RandomHorizontalFlip()])
    samples: Any = [
        (image, label)
        for position, label in enumerate(tqdm(listing.labels, desc="read", disable=not progress, leave=False))
        for image in read_images(listing, [position], wide)
    ]
    loader: DataLoader[Any] = DataLoader(samples, batch_size, shuffle=True, drop_last=len(samples) > batch_size)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for images, labels in tqdm(loader, desc=f"epoch {epoch + 1} of {epochs}", disable=not progress, leave=False):
            crops = torch.stack([augment(image) for image in images]).to(device).float() / 255
            value = nn.functional.cross_entropy(model(crops), labels.to(device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        logger.info("epoch %d: training loss %.3f", epoch + 1, total / len(loader))
    model.eval()
