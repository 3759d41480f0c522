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
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # command lines are parsed with this list, without importing torch
    from torch import nn

OAG = "Online alternate generator"
OAG_KEY = "oag"
NONE = "None"
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


@dataclass(frozen=True)
class Defense:
    """A family of defenses with one free setting.

    Attributes:
        key: its name on a command line.
        label: its name in tables; the paper's name, if it has one.
        knob: name of the setting; empty where there is none.
        make: (setting, seed, needs) -> transform of batches in [0, 1], called with the ``index`` of its images, or a ModuleList
            of several. It raises the errors of the defense for a bad setting, and ValueError or ModuleNotFoundError if a need
            is missing.
        published: the setting of its own paper, or the usual one.
        tuned: the second setting in tables; see the module.
        settings: all settings of ``tune`` and ``tradeoff``, from weak to strong.
        slow: takes many seconds per image, and is evaluated on fewer images.
        in_views: evaluated in the four views of a :class:`~oag_transform.DefendedModel`.
        differentiable: has a gradient of its own, for ``DefendedModel(..., gradient="own")``.
    """

    key: str
    label: str
    knob: str
    make: "Callable[[float, int, Needs], nn.Module]"
    published: float
    tuned: float
    settings: tuple[float, ...]
    slow: bool = False
    in_views: bool = False
    differentiable: bool = False

    def describe(self, setting: float) -> str:
        """Label and setting, such as ``"JPEG, quality 75"``; the label alone where there is no setting."""
        return self.label if not self.knob else f"{self.label}, {self.knob} {setting:.4g}"


def by_key(key: str) -> Defense:
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
    if name not in known and text.removesuffix(IN_VIEWS).isidentifier():
        own = _own(key.removesuffix(IN_VIEWS))
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


def _together(key: str) -> Defense:
    """Several defenses in one :class:`~oag_transform.DefendedModel`; see :func:`by_key`."""
    families = [by_key(part) for part in key.split("+")]

    def make(_: float, seed: int, needs: Needs) -> "nn.Module":
        return importlib.import_module("torch.nn").ModuleList(
            [family.make(family.published, seed, needs) for family in families]
        )

    return Defense(
        key=key,
        label=f"{' + '.join(family.describe(family.published) for family in families)}, {VIEWS}",
        knob="defenses",
        make=make,
        published=len(families),
        tuned=len(families),
        settings=(len(families),),
        in_views=True,
    )


def _own(key: str) -> Defense:
    return Defense(
        key=key,
        label=key,
        knob="",
        make=lambda _, seed, __: _class(".own", "OwnDefense")(key, seed),
        published=0,
        tuned=0,
        settings=(0,),
    )


def chosen(keys: Iterable[str]) -> tuple[Defense, ...]:
    """The defenses with these keys, in the order of the keys; see :func:`by_key`."""
    return tuple(by_key(key) for key in keys)


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module, __package__), name)


def _filter(name: str) -> Any:
    return _class(".filters", name)


def _denoiser(name: str) -> Any:
    return _class(".denoisers", name)


def _pixel_defend(epsilon: float, _: int, needs: Needs) -> "nn.Module":
    if needs.pixelcnn is None:
        raise ValueError("it needs a PixelCNN: oag-transform fit-pixelcnn, then --pixelcnn FILE")
    return _class(".pixeldefend", "PixelDefend")(needs.pixelcnn, epsilon)


def _for_target(name: str, setting: float, needs: Needs) -> "nn.Module":
    if needs.target is None:
        raise ValueError("it uses the gradient of the target, and was given none")
    return _class(".target_aware", name)(needs.target, setting)


def _oag(steps: float, seed: int, needs: Needs, **settings: Any) -> "nn.Module":
    make = _class("..transform", "OnlineAlternateGenerator")
    return make(network_steps=steps, seed=seed, compute_dtype=needs.compute_dtype, **settings)


def _oag_as_published(steps: float, seed: int, needs: Needs) -> "nn.Module":
    make = _class("..transform", "OnlineAlternateGenerator").paper
    # exact Langevin steps give the same images within 0.3 dB, in ten times the time
    return make(network_steps=steps, langevin="closed_form", seed=seed, compute_dtype=needs.compute_dtype)


def _in_views(defense: Defense, **changes: Any) -> Defense:
    """A defense in the four views of a DefendedModel; ``changes`` are further fields that differ."""
    named: dict[str, Any] = {"key": f"{defense.key}{IN_VIEWS}", "label": f"{defense.label}, {VIEWS}"}
    return dataclasses.replace(defense, **named, in_views=True, **changes)


_JPEG = Defense(
    key="jpeg",
    label="JPEG",
    knob="quality",
    make=lambda quality, *_: _filter("JPEG")(quality),
    published=75,
    tuned=35,
    settings=(90, 75, 60, 50, 35, 25, 15, 10),
)
_NOISY_JPEG = Defense(
    key="jpeg-noise",
    label="JPEG and noise of 8 grey levels",
    knob="quality",
    make=lambda quality, seed, _: _filter("NoisyJPEG")(quality, 8, seed=seed),
    published=25,
    tuned=25,
    settings=_JPEG.settings,
)
_ADAPTED_JPEG = dataclasses.replace(
    _NOISY_JPEG,
    key="jpeg-noise-follow",
    label="JPEG and noise, by the image's noise",
    make=lambda quality, seed, _: _filter("NoisyJPEG")(quality, 8, follow_noise=True, seed=seed),
)
_NOISE = Defense(
    key="noise",
    label="Gaussian noise",
    knob="grey levels",
    make=lambda std, seed, _: _filter("GaussianNoise")(std, seed=seed),
    published=12,
    tuned=12,
    settings=(6, 12, 18, 24),
    differentiable=True,
)
_OAG = Defense(key="oag", label=OAG, knob="T_N", make=_oag, published=9, tuned=9, settings=(48, 36, 24, 18, 12, 9, 6))
_OAG_FULL = dataclasses.replace(
    _OAG,
    key="oag-full",
    label=f"{OAG}, full strength",
    make=lambda steps, seed, needs: _oag(steps, seed, needs, strength=1.0),
)

DEFENSES: tuple[Defense, ...] = (
    Defense(
        key="mean",
        label="Mean filter",
        knob="size",
        make=lambda size, *_: _filter("MeanFilter")(size),
        published=3,
        tuned=7,
        settings=(3, 5, 7),
        differentiable=True,
    ),
    Defense(
        key="median",
        label="Median filter",
        knob="size",
        make=lambda size, *_: _filter("MedianFilter")(size),
        published=3,
        tuned=7,
        settings=(3, 5, 7),
        differentiable=True,
    ),
    Defense(
        key="bit-depth",
        label="Bit depth",
        knob="bits",
        make=lambda bits, *_: _filter("BitDepth")(bits),
        published=5,
        tuned=5,
        settings=(6, 5, 4, 3, 2),
    ),
    _JPEG,
    _NOISY_JPEG,
    # baselines in the same views as OAG
    _in_views(_NOISE),
    _in_views(_JPEG, published=25, tuned=15),
    _in_views(_NOISY_JPEG, published=25, tuned=15),
    _in_views(_ADAPTED_JPEG, published=25, tuned=15),
    Defense(
        key="tv",
        label="Total variation",
        knob="weight",
        make=lambda weight, *_: _denoiser("TotalVariation")(weight),
        published=0.1,
        tuned=0.1,
        settings=(0.03, 0.05, 0.1, 0.15, 0.2),
    ),
    Defense(
        key="tvm",
        label="TVM",
        knob="weight",
        make=lambda weight, seed, _: _denoiser("TVM")(weight, seed=seed),
        published=0.03,
        tuned=0.03,
        settings=(0.01, 0.03, 0.06, 0.1),
        differentiable=True,
    ),
    Defense(
        key="nlm",
        label="Non-local means",
        knob="h",
        make=lambda h, *_: _denoiser("NonLocalMeans")(h),
        published=4,
        tuned=4,
        settings=(2, 4, 8, 12, 16),
    ),
    Defense(
        key="wavelets",
        label="Wavelets",
        knob="grey levels",
        make=lambda sigma, *_: _denoiser("Wavelets")(sigma),
        published=10,
        tuned=10,
        settings=(5, 10, 20, 30, 50),
    ),
    Defense(
        key="bm3d",
        label="BM3D",
        knob="grey levels",
        make=lambda sigma, *_: _denoiser("BM3D")(sigma),
        published=10,
        tuned=10,
        settings=(5, 10, 15, 20, 30),
        slow=True,
    ),
    Defense(
        key="deflection",
        label="Pixel deflection",
        knob="sigma",
        make=lambda sigma, seed, _: _denoiser("PixelDeflection")(sigma=sigma, seed=seed),
        published=0.04,
        tuned=0.04,
        settings=(0.02, 0.04, 0.08, 0.12, 0.2),
    ),
    Defense(
        key="randomization",
        label="Randomization",
        knob="ratio",
        make=lambda ratio, seed, _: _filter("Randomization")(ratio, fill=0.5, seed=seed),
        published=331 / 299,
        tuned=1.25,
        settings=(1.05, 331 / 299, 1.25, 1.5),
        differentiable=True,
    ),
    _NOISE,
    Defense(
        key="pixeldefend",
        label="Pixel Defend",
        knob="epsilon",
        make=_pixel_defend,
        published=16,
        tuned=16,
        settings=(4, 8, 16, 24),
        slow=True,
    ),
    Defense(
        key="autoencoder",
        label="Auto-encoder",
        knob="steps",
        make=lambda steps, seed, _: _class(".per_image", "OnlineAutoencoder")(steps=steps, seed=seed),
        published=80,
        tuned=80,
        settings=(160, 80, 40),
        slow=True,
    ),
    Defense(
        key="dip",
        label="DIP",
        knob="steps",
        make=lambda steps, seed, _: _class(".per_image", "DeepImagePrior")(steps=steps, seed=seed),
        published=300,
        tuned=300,
        settings=(600, 300, 150),
        slow=True,
    ),
    Defense(
        key="bart",
        label="BaRT",
        knob="k",
        make=lambda k, seed, _: _class(".barrage", "BaRT")(k, seed=seed),
        published=5,
        tuned=5,
        settings=(1, 2, 3, 5, 7, 10),
        differentiable=True,
    ),
    Defense(
        key="tnp",
        label="TNP",
        knob="rank",
        make=lambda rank, *_: _class(".tensor_network", "TensorNetworkPurification")(rank),
        published=10,
        tuned=10,
        settings=(16, 12, 10, 8, 6),
        slow=True,
    ),
    Defense(
        key="zs-n2n",
        label="ZS-N2N",
        knob="steps",
        make=lambda steps, seed, _: _class(".zero_shot", "ZeroShotNoise2Noise")(steps=steps, seed=seed),
        published=2000,
        tuned=2000,
        settings=(500, 1000, 2000, 4000),
        slow=True,
        differentiable=True,
    ),
    Defense(
        key="noise2fast",
        label="Noise2Fast",
        knob="patience",
        make=lambda patience, seed, _: _class(".zero_shot", "Noise2Fast")(patience=patience, seed=seed),
        published=100,
        tuned=100,
        settings=(200, 100, 50, 25),
        slow=True,
    ),
    Defense(
        key="zeropur",
        label="ZeroPur (not portable)",
        knob="grey levels",
        make=lambda epsilon, _, needs: _for_target("ZeroPur", epsilon, needs),
        published=10,
        tuned=10,
        settings=(2, 5, 10, 16),
        slow=True,
        differentiable=True,
    ),
    Defense(
        key="anti-adversary",
        label="Anti-adversary (not portable)",
        knob="alpha",
        make=lambda alpha, _, needs: _for_target("AntiAdversary", alpha, needs),
        published=0.15,
        tuned=0.15,
        settings=(0.02, 0.05, 0.15, 0.3),
        differentiable=True,
    ),
    Defense(
        key="oag-paper",
        label=f"{OAG}, paper(), closed form",
        knob="T_N",
        make=_oag_as_published,
        published=300,
        tuned=300,
        settings=(300,),
        slow=True,
    ),
    # OAG without the strength that follows the noise of each image
    _in_views(_OAG_FULL, settings=(24, 12, 9, 6)),
    _OAG,
    _in_views(_OAG, settings=(24, 12, 9, 6)),
)
