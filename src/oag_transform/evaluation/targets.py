"""Classifiers to defend: torchvision's, EfficientNet-lite, a Python callable's, and ones that are fitted here to a folder."""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

from ..targets import EFFICIENTNET_LITE_SIZES, efficientnet_lite
from .data import Listing, Preprocessing, batches, read_images
from .store import fingerprint

logger = logging.getLogger(__name__)

IMAGENET = Preprocessing(256, 224, v2.InterpolationMode.BILINEAR)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of ImageNet


class Target(NamedTuple):
    """A classifier and what it wants.

    Attributes:
        name: for tables.
        model: (N, 3, crop, crop) in [0, 1] -> logits (N, classes), normalisation included; in eval mode, without gradients of
            its parameters.
        preprocessing: resize and crop of a photograph.
        fingerprint: tells targets apart, by their code's names, their weights and what they make of one image.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    fingerprint: str


def load_target(
    model: str,
    weights: str | None = None,
    *,
    classes: Sequence[str],
    resize: int | None = None,
    crop: int | None = None,
    device: torch.device | str = "cpu",
) -> Target:
    """The classifier that a command line names.

    Args:
        model: ``"efficientnet-lite0"`` (also 1 and 2); a torchvision builder such as ``"resnet50"``; ``"module:function"``, a
            Python function that returns a module of [0, 1] images (N, 3, crop, crop); or a file of :func:`save_target`.
        weights: for a torchvision builder: ``"DEFAULT"``, the name of one of its weights, or a file with a state dict.
        classes: names of the data's classes; the classifier must have as many, and a fitted one the same.
        resize: short side in pixels, in place of the target's own.
        crop: centre crop in pixels, in place of the target's own.
        device: where the classifier goes.

    Raises:
        ValueError: no such model, weights or file, other classes, a crop larger than what is resized, or a model that fails on
            an image of that size.
    """
    path = Path(model)
    if weights is not None and (path.suffix or ":" in model or model.startswith("efficientnet-lite")):
        raise ValueError(f"weights go with a torchvision model; {model} has its own, got weights {weights!r}")
    name = model
    if path.suffix in (".pt", ".pth"):
        name, network, preprocessing = _load_fitted(path, classes)
    elif ":" in model:
        network, preprocessing = _call(model), IMAGENET
    elif model.startswith("efficientnet-lite"):
        network, preprocessing = _build_lite(model)
    else:
        name, network, preprocessing = _load_torchvision(model, weights, len(classes))
    preprocessing = preprocessing._replace(resize=resize or preprocessing.resize, crop=crop or preprocessing.crop)
    if preprocessing.resize < preprocessing.crop:
        raise ValueError(
            f"the crop must fit into what is resized, got crop {preprocessing.crop}, resize {preprocessing.resize}"
        )
    network = network.eval().requires_grad_(False).to(device)
    likeliest = _probe(model, network, preprocessing.crop, len(classes), device)
    return Target(name, network, preprocessing, f"{fingerprint(network)}-{likeliest}")


def build(backbone: str, weights: str | None, classes: int) -> tuple[nn.Sequential, Preprocessing]:
    """A backbone with a new linear layer of ``classes`` outputs in place of its last one, zero at first.

    Args:
        backbone: ``"efficientnet-lite0"`` (also 1 and 2) with its ImageNet weights, or a torchvision builder.
        weights: for torchvision: ``"DEFAULT"``, the name of weights, or None for a random start.
        classes: number of outputs.

    Raises:
        ValueError: no such backbone or weights.
    """
    if backbone.startswith("efficientnet-lite"):
        model, preprocessing = _build_lite(backbone)
    else:
        model, preprocessing = _build_torchvision(backbone, weights)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{backbone} has no linear layer to replace")
    name, last = layers[-1]
    head = nn.utils.skip_init(nn.Linear, last.in_features, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.set_submodule(name, head)
    return model, preprocessing


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
        ValueError: no such backbone or weights, or fewer than two classes.
    """
    if len(listing.classes) < 2:
        raise ValueError(f"expected two classes or more, got {len(listing.classes)}")
    if epochs < 0 or batch_size < 1 or not lr > 0:
        raise ValueError(f"expected epochs >= 0, batch_size >= 1 and lr > 0, got {epochs}, {batch_size} and {lr}")
    # torchvision's initialisation, augmentation and dropout draw from the global generator: the caller's state is put back
    with torch.random.fork_rng(devices=[] if torch.device(device).type == "cpu" else None):
        torch.manual_seed(seed)
        model, preprocessing = build(backbone, weights, len(listing.classes))
        model.to(device).eval()
        _fit_head(model, listing, preprocessing, progress)
        if epochs:
            _fit_all(model, listing, preprocessing, epochs, lr, batch_size, progress)
    return model.eval().requires_grad_(False), preprocessing


def save_target(
    path: Path, model: nn.Sequential, preprocessing: Preprocessing, *, backbone: str, classes: tuple[str, ...]
) -> None:
    """Write a fitted classifier, for :func:`load_target`."""
    content = {
        "backbone": backbone,
        "classes": list(classes),
        "preprocessing": [preprocessing.resize, preprocessing.crop, preprocessing.interpolation.value],
        "state_dict": model.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def _probe(name: str, model: nn.Module, side: int, classes: int, device: torch.device | str) -> list[int]:
    """The likeliest classes of a random image: code may differ where names and weights don't."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad():
            logits = model(image)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{name} fails on an image of shape {tuple(image.shape)}: {error}") from error
    got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        raise ValueError(
            f"{name} gives an output of {got} for one image, but the data has {classes} classes; "
            "an ImageFolder needs a folder for each class of the model, which may be empty"
        )
    return logits[0].topk(min(8, classes)).indices.tolist()


def _load_fitted(path: Path, classes: Sequence[str]) -> tuple[str, nn.Module, Preprocessing]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    content = _load_file(path)
    if not isinstance(content, dict) or not {"backbone", "classes", "preprocessing", "state_dict"} <= set(content):
        raise ValueError(f"{path} was not written by oag-transform fit-target; give a state dict as --weights of a --model")
    if content["classes"] != list(classes):
        known, given = content["classes"], list(classes)
        raise ValueError(
            f"{path} was fitted to the {len(known)} classes {known}, but the data has the {len(given)} classes {given}"
        )
    model, _ = build(content["backbone"], None, len(classes))
    model.load_state_dict(content["state_dict"])
    resize, crop, interpolation = content["preprocessing"]
    preprocessing = Preprocessing(resize, crop, v2.InterpolationMode(interpolation))
    return f"{content['backbone']}, fitted ({path.stem})", model.to(memory_format=torch.channels_last), preprocessing


def _load_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, depending on the first bytes
        raise ValueError(f"{path} can't be read as weights: {str(error).splitlines()[0]}") from error


def _call(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} can't be imported: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name}() must return a torch.nn.Module, got {type(made).__name__}")
    return made


def _build_lite(name: str) -> tuple[nn.Sequential, Preprocessing]:
    variants = {f"efficientnet-lite{variant}": variant for variant in range(len(EFFICIENTNET_LITE_SIZES))}
    if name not in variants:
        raise ValueError(f"expected one of {list(variants)}, got {name!r}")
    size = EFFICIENTNET_LITE_SIZES[variants[name]]
    return efficientnet_lite(variants[name]), Preprocessing(size + 32, size)


def _build_torchvision(name: str, weights: str | None, classes: int | None = None) -> tuple[nn.Sequential, Preprocessing]:
    _check_builder(name)
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if weights is None:
        network, preset = torchvision.models.get_model(name, weights=None, **arguments), None
    else:
        try:
            chosen = torchvision.models.get_model_weights(name)[weights.rpartition(".")[2]]
        except KeyError as error:
            names = [member.name for member in torchvision.models.get_model_weights(name)]
            raise ValueError(f"{name} has the weights {names}, got {weights!r}") from error
        network, preset = torchvision.models.get_model(name, weights=chosen), chosen.transforms()
    if preset is None:
        return nn.Sequential(v2.Normalize(mean=list(MEAN), std=list(STD)), network), IMAGENET
    preprocessing = Preprocessing(preset.resize_size[0], preset.crop_size[0], preset.interpolation)
    return nn.Sequential(v2.Normalize(mean=preset.mean, std=preset.std), network), preprocessing


def _check_builder(name: str) -> None:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"expected a torchvision classifier such as resnet50, or efficientnet-lite0, got {name!r}")


def _load_torchvision(name: str, weights: str | None, classes: int) -> tuple[str, nn.Module, Preprocessing]:
    _check_builder(name)
    path = Path(weights) if weights is not None else None
    if path is None:
        raise ValueError(f"{name} needs weights: 'DEFAULT', the name of torchvision weights, or a file with a state dict")
    if path.suffix not in (".pt", ".pth"):
        return name, *_build_torchvision(name, weights)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    model, preprocessing = _build_torchvision(name, None, classes)
    state = _load_file(path)
    try:
        model[1].load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} doesn't fit {name} with {classes} classes: {str(error).splitlines()[-1].strip()}") from error
    return f"{name} ({path.stem})", model, preprocessing


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
