"""Classifiers to defend, as a command line names them, and the files of those that were fitted here."""

import contextlib
import importlib
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from .. import _checks, atomic, files
from ..baselines.own import imported
from .backbones import IMAGENET, build, build_lite, build_timm, build_torchvision, check_builder, for_inference, is_lite
from .data import Preprocessing, check_not_enlarged
from .options import CHECKPOINTS
from .store import fingerprint

FITTED = {"backbone", "classes", "preprocessing", "state_dict"}  # entries of a file of save_target


class Target(NamedTuple):
    """A classifier and what it wants.

    Attributes:
        name: for tables.
        model: (N, 3, crop, crop) in [0, 1] -> logits (N, classes), normalisation included; in eval mode, without gradients of
            its parameters.
        preprocessing: resize and crop of an image.
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
    side: int | None = None,
    first: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> Target:
    """The classifier that a command line names.

    Args:
        model: ``"efficientnet-lite0"`` (also 1 and 2); a torchvision builder such as ``"resnet50"``; ``"timm:NAME"``;
            ``"robustbench:DATASET/THREAT/NAME"`` such as ``"robustbench:cifar10/Linf/Wong2020Fast"``; ``"module:function"``, a
            Python function that returns a module of [0, 1] images (N, 3, crop, crop); or a file of :func:`save_target`.
        weights: for a torchvision builder: ``"DEFAULT"``, the name of one of its weights, or a file with a state dict; for
            timm: None for its pretrained ones, or such a file.
        classes: names of the data's classes; the classifier must have as many, and a fitted one the same.
        resize: short side in pixels, in place of the target's own.
        crop: centre crop in pixels, in place of the target's own.
        side: of the data's images, where all have the same, see :class:`~.data.Listing`. It is resize and crop of classifiers
            that don't say their size: those of functions, of RobustBench and of state dicts. They have 256 and 224 where it is
            None.
        first: width and height of the data's first image, if known. Where such a classifier would get it enlarged, since both
            are below 224, ``resize`` must be given.
        device: where the classifier goes.

    Raises:
        ValueError: no such model, weights or file, other classes, a crop larger than what is resized, a model of unknown size
            for images smaller than 224 pixels, or one that fails on an image of its size.
    """
    path, source_hash = Path(model), ""
    source, _, own_name = model.partition(":")
    if weights is not None and source != "timm" and (path.suffix or ":" in model or is_lite(model)):
        raise ValueError(f"weights go with a torchvision or timm model; {model} has its own, got weights {weights!r}")
    name, preprocessing = model, None  # the latter stays None where the classifier doesn't say
    if path.suffix in CHECKPOINTS:
        name, network, preprocessing = _load_fitted(path, classes)
    elif source == "timm":
        network, preprocessing = build_timm(own_name, weights, len(classes))
    elif source == "robustbench":
        network = _load_robustbench(own_name)
    elif ":" in model:
        network, source_hash = _call(model)
    elif is_lite(model):
        network, preprocessing = build_lite(model)
    else:
        name, network, preprocessing = _load_torchvision(model, weights, len(classes))
    if preprocessing is None:
        preprocessing = IMAGENET if side is None else Preprocessing(side, side)
        if side is None and resize is None:
            check_not_enlarged(first, preprocessing, f"{name} doesn't say which size it takes, and ")
    preprocessing = preprocessing._replace(resize=resize or preprocessing.resize, crop=crop or preprocessing.crop)
    if preprocessing.resize < preprocessing.crop:
        raise ValueError(
            f"the crop must fit into what is resized, got crop {preprocessing.crop}, resize {preprocessing.resize}"
        )
    network = network.eval().requires_grad_(False).to(device)
    likeliest = _probe(model, network, preprocessing.crop, len(classes), device)
    return Target(name, network, preprocessing, f"{fingerprint(network)}-{likeliest}{source_hash}")


def save_target(
    path: Path,
    model: nn.Sequential,
    preprocessing: Preprocessing,
    *,
    backbone: str,
    classes: tuple[str, ...],
    adversarial_eps: float | None = None,
) -> None:
    """Write a fitted classifier, for :func:`load_target`; ``adversarial_eps``, in grey levels, if it was trained against it."""
    content = {
        "backbone": backbone,
        "classes": list(classes),
        "preprocessing": [preprocessing.resize, preprocessing.crop, preprocessing.interpolation.value],
        "state_dict": model.state_dict(),
        "adversarial_eps": adversarial_eps,
    }
    atomic.save_checkpoint(content, path)


def _probe(name: str, model: nn.Module, side: int, classes: int, device: torch.device | str) -> list[int]:
    """The likeliest classes of a random image: code may differ where names and weights don't."""
    if classes < 2:
        raise ValueError(f"{name} needs at least two classes, but there are {classes}")
    shape = (1, 3, side, side)
    with torch.no_grad(), failures_named(name, shape):
        logits = model(torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device))
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = f"a tensor of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{name} must return logits, a floating-point tensor (N, classes), or an object with .logits, got {got}"
        )
    if logits.shape != (1, classes):
        raise ValueError(
            f"{name} gives an output of shape {tuple(logits.shape)} for one image, but there are {classes} classes; the data "
            "needs a folder for each class of the model, which may be empty, and --labels a line"
        )
    if not logits.isfinite().all():
        raise ValueError(f"{name} gives logits that are not finite for a random image: are its weights broken?")
    return logits[0].topk(min(8, classes)).indices.tolist()


@contextlib.contextmanager
def failures_named(name: str, shape: Sequence[int]) -> Iterator[None]:
    """A context in which whatever a classifier raises, which may be somebody's own code, is a ValueError that names it."""
    try:
        yield
    except Exception as error:
        kind = "an image" if shape[0] == 1 else "a batch"
        raise ValueError(f"{name} fails on {kind} of shape {tuple(shape)}: {files.reason(error)}") from error


def _load_fitted(path: Path, classes: Sequence[str]) -> tuple[str, nn.Module, Preprocessing]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    content = _load_file(path)
    if not isinstance(content, dict) or not set(content) >= FITTED or not isinstance(content["classes"], list):
        raise ValueError(f"{path} was not written by oag-transform fit-target; give a state dict as --weights of a --model")
    known, given = content["classes"], list(classes)
    if known != given:
        raise ValueError(
            f"{path} was fitted to the {len(known)} classes {known}, but the data has the {len(given)} classes {given}"
        )
    model, _ = build(content["backbone"], None, len(classes))
    try:
        model.load_state_dict(for_inference(content["state_dict"], model))
        resize, crop, interpolation = content["preprocessing"]
        preprocessing = Preprocessing(resize, crop, v2.InterpolationMode(interpolation))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {files.reason(error)}") from error
    eps = content.get("adversarial_eps")  # files of an earlier release have none
    how = "fitted" if eps is None else f"adversarially trained at {eps:g}/255"
    return f"{content['backbone']}, {how} ({path.stem})", model.to(memory_format=torch.channels_last), preprocessing


def _load_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, depending on the first bytes
        why = files.reason(error)
        if isinstance(error, pickle.UnpicklingError):  # torch explains at length how to run the code in a file
            why = "it is no state dict, which torch.save(model.state_dict(), FILE) writes"
        raise ValueError(f"{path} can't be read as weights: {why}") from error


def _call(name: str) -> tuple[nn.Module, str]:
    """The classifier that a function makes, and a hash of the function's source file."""
    make, source = imported(name)
    try:
        made = make()
    except (Exception, SystemExit) as error:  # somebody's own code
        raise ValueError(f"{name}() failed: {files.reason(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name}() must return a torch.nn.Module, got {type(made).__name__}")
    return _OfLogits(made), source


class _OfLogits(nn.Module):
    """A classifier that may return an object with ``.logits``, as those of Hugging Face do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Any:
        """The logits; an output without any as it is."""
        output = self.model(images)
        found = _checks.logits_in(output)
        return output if found is None else found


def _load_robustbench(name: str) -> nn.Module:
    parts = name.split("/")
    if len(parts) != 3:
        raise ValueError(
            f"expected robustbench:DATASET/THREAT/NAME, such as robustbench:cifar10/Linf/Wong2020Fast, got {name!r}"
        )
    try:
        library = importlib.import_module("robustbench.utils")
    except ModuleNotFoundError as error:
        own = (error.name or "").partition(".")[0] == "robustbench"
        remedy = ": pip install robustbench" if own else ", which RobustBench imports"
        raise ValueError(f"robustbench:{name} needs {error.name}{remedy}") from error
    data, threat, model = parts
    try:
        return library.load_model(model_name=model, dataset=data, threat_model=threat)
    except (KeyError, ValueError) as error:
        raise ValueError(f"RobustBench has no model {name!r}: {error}") from error


def is_checkpoint(weights: str) -> bool:
    """Whether these weights are a file with a state dict, or the name of torchvision's."""
    return Path(weights).suffix in CHECKPOINTS or Path(weights).is_file()


def _load_torchvision(name: str, weights: str | None, classes: int) -> tuple[str, nn.Module, Preprocessing | None]:
    """Its name, the classifier, and its preprocessing, of which a state dict says nothing."""
    check_builder(name)
    if weights is None:
        raise ValueError(f"{name} needs weights: 'DEFAULT', the name of torchvision weights, or a file with a state dict")
    if not is_checkpoint(weights):
        return name, *build_torchvision(name, weights)
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    model, _ = build_torchvision(name, None, classes)
    state = _load_file(path)
    try:
        model[1].load_state_dict(for_inference(state, model[1]))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} doesn't fit {name} with {classes} classes: {str(error).splitlines()[-1].strip()}") from error
    return f"{name} ({path.stem})", model, None
