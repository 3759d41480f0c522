"""The list of compared defenses: OAG and the baselines, each with its settings.

Published settings are those of a defense's own paper, or the usual ones. Tuned settings are those of ``evaluate tune`` on 60
images of one half of Flower-17's training images, with a target fitted to the other half: the strongest setting whose mean
accuracy on clean and on Gaussian-noised (std 0.1) images is within five points of the defense's best. Slow defenses were not
tuned. Neither were bit depth, non-local means, wavelets and BM3D; their tuned setting is the published one. Bit depth and
non-local means follow feature squeezing. Wavelets and BM3D, which no paper proposes as a defense, are set for noise of 10 grey
levels, about that of pixel deflection. No setting was chosen on attacked images, except those of JPEG in the views of a
DefendedModel, which attacked tuning images showed strong (docs/quality.md). Data sets with finer classes need other settings:
tune on similar images. Defenses published after the paper (BaRT and below) were not tuned. Two of them use the gradient of the
target and are not portable.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # command lines are parsed with this list, without importing torch
    from torch import nn

OAG = "OAG"
OAG_KEY = "oag"
NONE = "Undefended"
VIEWS = "4 views"
IN_VIEWS = "-4-views"  # ends the key of a defense that stands in them


@dataclass(frozen=True)
class Needs:
    """Further inputs of some defenses.

    Attributes:
        pixelcnn: the model of ``oag-transform fit-pixelcnn``, which PixelDefend needs.
        target: the defended classifier, images in [0, 1] -> logits, for defenses that use its gradient.
        compute_dtype: of OAG, see :class:`~oag_transform.OnlineAlternateGenerator`.
    """

    pixelcnn: Any = None
    target: Any = None
    compute_dtype: Any = None


Make: TypeAlias = "Callable[[float, int, Needs], nn.Module]"


@dataclass(frozen=True)
class Family:
    """A family of defenses with one free setting.

    Attributes:
        key: its name on a command line.
        label: its name in tables; the paper's name, if it has one.
        knob: name of the setting; empty where there is none.
        make: (setting, seed, needs) -> transform of batches in [0, 1], called with the ``index`` of its images, or a ModuleList
            of several. It raises the errors of the defense for a bad setting, and ValueError or ModuleNotFoundError if a need
            is missing.
        published: the setting of its own paper, or the usual one.
        settings: all settings of ``tune`` and ``tradeoff``, from weak to strong.
        tuned: the second setting in tables, see the module; where none is given, it is the published one.
        slow: takes many seconds per image, and is evaluated on fewer images.
        in_views: evaluated in the four views of a :class:`~oag_transform.DefendedModel`.
    """

    key: str
    label: str
    knob: str
    make: Make
    published: float
    settings: tuple[float, ...]
    tuned: float = math.nan
    slow: bool = False
    in_views: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.tuned):
            object.__setattr__(self, "tuned", self.published)

    def describe(self, setting: float) -> str:
        """Label and setting, such as ``"JPEG, quality 75"``; the label alone where there is no setting."""
        return self.label if not self.knob else f"{self.label}, {self.knob} {setting:.4g}"


def by_key(key: str) -> Family:
    """The defense of this key.

    ``KEY-4-views`` is any defense of the list in four views. ``KEY:SETTING`` has the given setting only. ``KEY+KEY:SETTING`` is
    several defenses in one model, in four views, each at its published or at the given setting. ``module:function`` is a
    defense of one's own, see :class:`~oag_transform.baselines.own.OwnDefense`; it is imported when it is made.

    Raises:
        ValueError: there is none; the message lists the keys.
    """
    if "+" in key:
        return _together(key)
    name, given, text = key.partition(":")
    known = {defense.key: defense for defense in DEFENSES}
    alone = known.get(name.removesuffix(IN_VIEWS))
    if name not in known and alone is not None and not alone.in_views:
        known[name] = _in_views(alone)
    if name not in known and is_own(named := key.removesuffix(IN_VIEWS)):
        own = Family(named, named, "", lambda _, seed, __: own_defense(named, seed), 0, (0,))
        return _in_views(own) if key.endswith(IN_VIEWS) else own
    if name not in known:
        raise ValueError(f"no defense {name!r}; expected some of {', '.join(known)}")
    if not given:
        return known[name]
    try:
        setting = int(text) if text.isdecimal() else float(text)
    except ValueError:
        setting = math.nan
    if not math.isfinite(setting):
        raise ValueError(f"expected KEY:SETTING with a finite number for the setting, got {key!r}")
    return dataclasses.replace(known[name], key=key, published=setting, tuned=setting, settings=(setting,))


def _together(key: str) -> Family:
    """Several defenses in one :class:`~oag_transform.DefendedModel`; see :func:`by_key`."""
    families = [by_key(part) for part in key.split("+")]

    def make(_: float, seed: int, needs: Needs) -> "nn.Module":
        made = [family.make(family.published, seed, needs) for family in families]
        return importlib.import_module("torch.nn").ModuleList(made)

    label = f"{' + '.join(family.describe(family.published) for family in families)}, {VIEWS}"
    return Family(key, label, "", make, len(families), (len(families),), in_views=True)


def has_oag(key: str) -> bool:
    """Whether a key is that of OAG, at whatever setting, alone or with other defenses in one model."""
    return any(re.split("[-:]", part)[0] == OAG_KEY for part in key.split("+"))


def is_own(key: str) -> bool:
    """Whether a key has the form ``module:function`` of a defense of one's own."""
    return key.partition(":")[2].isidentifier()


@functools.cache  # it is made before a run too, so that errors come early, and it may load a network
def own_defense(key: str, seed: int, *, std: float | None = None) -> "nn.Module":
    """See :class:`~oag_transform.baselines.own.OwnDefense`."""
    return class_named(".own", "OwnDefense")(key, seed, std=std)


def chosen(keys: Iterable[str]) -> tuple[Family, ...]:
    """The defenses with these keys, each once, in the order of the keys; see :func:`by_key`."""
    return tuple(by_key(key) for key in dict.fromkeys(keys))


def class_named(module: str, name: str) -> Any:
    """A class of a module beside this one (``".filters"``), which is imported when it is asked for, as it imports torch."""
    return getattr(importlib.import_module(module, __package__), name)


def _made(module: str, name: str, parameter: str, **settings: Any) -> Make:
    """A maker of a class whose ``parameter`` is the setting, and which gets the seed if it takes one."""

    def make(setting: float, seed: int, _: Needs) -> "nn.Module":
        baseline = class_named(f".{module}", name)
        seeded = {"seed": seed} if "seed" in inspect.signature(baseline).parameters else {}
        return baseline(**{parameter: setting}, **settings, **seeded)

    return make


def _pixel_defend(epsilon: float, _: int, needs: Needs) -> "nn.Module":
    if needs.pixelcnn is None:
        raise ValueError("it needs a PixelCNN: oag-transform fit-pixelcnn, then --pixelcnn FILE")
    return class_named(".pixeldefend", "PixelDefend")(needs.pixelcnn, epsilon)


def _for_target(name: str) -> Make:
    def make(setting: float, _: int, needs: Needs) -> "nn.Module":
        if needs.target is None:
            raise ValueError("it uses the gradient of its target, and was given none or several")
        return class_named(".target_aware", name)(needs.target, setting)

    return make


def _oag(steps: float, seed: int, needs: Needs, **settings: Any) -> "nn.Module":
    make = class_named("..transform", "OnlineAlternateGenerator")
    return make(**settings | {"network_steps": steps, "seed": seed, "compute_dtype": needs.compute_dtype})


def _oag_as_published(steps: float, seed: int, needs: Needs) -> "nn.Module":
    return _oag(steps, seed, needs, **class_named("..generator.settings", "PAPER_CLOSED_FORM"))


def _in_views(defense: Family, **changes: Any) -> Family:
    """A defense in the four views of a DefendedModel; ``changes`` are further fields that differ."""
    named: dict[str, Any] = {"key": f"{defense.key}{IN_VIEWS}", "label": f"{defense.label}, {VIEWS}"}
    return dataclasses.replace(defense, **named, in_views=True, **changes)


# key, label, knob, maker, published setting, settings from weak to strong
_JPEG = Family("jpeg", "JPEG", "quality", _made("filters", "JPEG", "quality"), 75, (90, 75, 60, 50, 35, 25, 15, 10), tuned=35)
_NOISY_JPEG = dataclasses.replace(
    _JPEG,
    key="jpeg-noise",
    label="JPEG and noise of 8 grey levels",
    make=_made("filters", "NoisyJPEG", "quality", std=8),
    published=25,
    tuned=25,
)
_ADAPTED_JPEG = dataclasses.replace(
    _NOISY_JPEG,
    key="jpeg-noise-follow",
    label="JPEG and noise, by the image's noise",
    make=_made("filters", "NoisyJPEG", "quality", std=8, follow_noise=True),
)
_NOISE = Family("noise", "Gaussian noise", "grey levels", _made("filters", "GaussianNoise", "std"), 12, (6, 12, 18, 24))
_OAG = Family(OAG_KEY, OAG, "T_N", _oag, 9, (48, 36, 24, 18, 12, 9, 6))
_OAG_FULL = dataclasses.replace(
    _OAG,
    key="oag-full",
    label=f"{OAG}, full strength",
    make=lambda steps, seed, needs: _oag(steps, seed, needs, strength=1.0),
)

DEFENSES: tuple[Family, ...] = (
    Family("mean", "Mean filter", "size", _made("filters", "MeanFilter", "size"), 3, (3, 5, 7), tuned=7),
    Family("median", "Median filter", "size", _made("filters", "MedianFilter", "size"), 3, (3, 5, 7), tuned=7),
    Family("bit-depth", "Bit depth", "bits", _made("filters", "BitDepth", "bits"), 5, (6, 5, 4, 3, 2)),
    _JPEG,
    _NOISY_JPEG,
    # baselines in the same views as OAG
    _in_views(_NOISE),
    _in_views(_JPEG, published=25, tuned=15),
    _in_views(_NOISY_JPEG, published=25, tuned=15),
    _in_views(_ADAPTED_JPEG, published=25, tuned=15),
    Family(
        "tv", "Total variation", "weight", _made("denoisers", "TotalVariation", "weight"), 0.1, (0.03, 0.05, 0.1, 0.15, 0.2)
    ),
    Family("tvm", "TVM", "weight", _made("denoisers", "TVM", "weight"), 0.03, (0.01, 0.03, 0.06, 0.1)),
    Family("nlm", "Non-local means", "h", _made("denoisers", "NonLocalMeans", "h"), 4, (2, 4, 8, 12, 16)),
    Family("wavelets", "Wavelets", "grey levels", _made("denoisers", "Wavelets", "sigma"), 10, (5, 10, 20, 30, 50)),
    Family("bm3d", "BM3D", "grey levels", _made("denoisers", "BM3D", "sigma"), 10, (5, 10, 15, 20, 30), slow=True),
    Family(
        "deflection",
        "Pixel deflection",
        "sigma",
        _made("denoisers", "PixelDeflection", "sigma"),
        0.04,
        (0.02, 0.04, 0.08, 0.12, 0.2),
    ),
    Family(
        "deflection-near",  # the published window of 10 pixels is that of images of 224 and more; 3 was tuned at 32 pixels
        "Pixel deflection, near",
        "window",
        _made("denoisers", "PixelDeflection", "window"),
        3,
        (1, 2, 3, 5, 10),
    ),
    Family(
        "randomization",
        "Randomization",
        "ratio",
        _made("filters", "Randomization", "ratio", fill=0.5),
        331 / 299,
        (1.05, 331 / 299, 1.25, 1.5),
        tuned=1.25,
    ),
    _NOISE,
    Family("pixeldefend", "Pixel Defend", "epsilon", _pixel_defend, 16, (4, 8, 16, 24), slow=True),
    Family(
        "autoencoder", "Auto-encoder", "steps", _made("per_image", "OnlineAutoencoder", "steps"), 80, (160, 80, 40), slow=True
    ),
    Family("dip", "DIP", "steps", _made("per_image", "DeepImagePrior", "steps"), 300, (600, 300, 150), slow=True),
    Family("bart", "BaRT", "k", _made("barrage", "BaRT", "k"), 5, (1, 2, 3, 5, 7, 10)),
    Family(
        "tnp", "TNP", "rank", _made("tensor_network", "TensorNetworkPurification", "rank"), 10, (16, 12, 10, 8, 6), slow=True
    ),
    Family(
        "zs-n2n",
        "ZS-N2N",
        "steps",
        _made("zero_shot", "ZeroShotNoise2Noise", "steps"),
        2000,
        (500, 1000, 2000, 4000),
        slow=True,
    ),
    Family(
        "noise2fast", "Noise2Fast", "patience", _made("zero_shot", "Noise2Fast", "patience"), 100, (200, 100, 50, 25), slow=True
    ),
    Family("zeropur", "ZeroPur (not portable)", "grey levels", _for_target("ZeroPur"), 10, (2, 5, 10, 16), slow=True),
    Family(
        "anti-adversary", "Anti-adversary (not portable)", "alpha", _for_target("AntiAdversary"), 0.15, (0.02, 0.05, 0.15, 0.3)
    ),
    Family("oag-paper", f"{OAG}, paper(), closed form", "T_N", _oag_as_published, 300, (300,), slow=True),
    # OAG without the strength that follows the noise of each image
    _in_views(_OAG_FULL, settings=(24, 12, 9, 6)),
    _OAG,
    _in_views(_OAG, settings=(24, 12, 9, 6)),
)
