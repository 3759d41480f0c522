"""The list of defenses that are compared: the paper's and others, each with its settings, and OAG.

Published settings are those of a defense's own paper, or the usual ones. Tuned settings are those of ``evaluate tune`` on 60
images of one half of Flower-17's training images, with a target fitted to the other half: the strongest whose mean accuracy on
clean and on Gaussian-noised (std 0.1) images is within five points of the defense's best. Slow defenses were not tuned so, nor
were the later ones, whose tuned setting is the published one: bit depth and non-local means as in feature squeezing, wavelets
and BM3D, which no paper has as a defense of its own, for noise of 10 grey levels, about that of pixel deflection. Nothing was
chosen on attacked images, but for JPEG with the views of a DefendedModel, which stands at what was found strong in
docs/quality.md. Finer classes ask for other settings: run it on images like yours. Defenses since the paper (BaRT and below)
were not tuned either. Two of them use the gradient of the target and are made for it: they are not portable.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a command line is parsed with this list, before anybody waits for torch
    from torch import nn

OAG = "Online alternate generator"
OAG_KEY = "oag"
NONE = "None"
VIEWS = "4 views"
IN_VIEWS = "-4-views"  # ends the key of a defense that stands in them


@dataclass(frozen=True)
class Needs:
    """What some defenses are made with.

    Attributes:
        pixelcnn: what ``oag-transform fit-pixelcnn`` trained, which PixelDefend needs.
        target: the classifier that is defended, images in [0, 1] -> logits, for defenses that use its gradient.
        compute_dtype: of OAG, see :class:`~oag_transform.OnlineAlternateGenerator`.
    """

    pixelcnn: Any = None
    target: Any = None
    compute_dtype: Any = None


@dataclass(frozen=True)
class Defense:
    """A family of defenses, one for each setting.

    Attributes:
        key: its name on a command line.
        label: its name in tables, as in the paper's where it is there.
        knob: what the setting is called.
        make: (setting, seed, needs) -> transform of [0, 1] batches, called with ``index=`` of its images, or a ModuleList of
            several. Raises what the defense raises for a bad setting, and ValueError or ModuleNotFoundError where what it needs
            is missing.
        published: the setting of its own paper, or the usual one.
        tuned: the setting that stands in tables beside it; see the module.
        settings: from weak to strong, for ``tune`` and ``tradeoff``.
        slow: takes many seconds an image, and is measured on fewer images.
        in_views: seen in the four views of a :class:`~oag_transform.DefendedModel`.
        differentiable: has a gradient of its own, which ``DefendedModel(..., gradient="own")`` sees.
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
        """Label and setting, such as ``"JPEG, quality 75"``."""
        return f"{self.label}, {self.knob} {setting:.4g}"


def by_key(key: str) -> Defense:
    """The defense of this key.

    ``KEY-4-views`` is any defense of the list in four views. ``KEY+KEY:SETTING`` is several defenses in one model, in four
    views, each at its published or at the given setting.

    Raises:
        ValueError: there is none; the message lists the keys.
    """
    if "+" in key:
        return _together(key)
    known = {defense.key: defense for defense in DEFENSES}
    if key in known:
        return known[key]
    if key.endswith(IN_VIEWS) and key.removesuffix(IN_VIEWS) in known:
        return _in_views(known[key.removesuffix(IN_VIEWS)])
    raise ValueError(f"no defense {key!r}; expected some of {', '.join(defense.key for defense in DEFENSES)}")


def _together(key: str) -> Defense:
    """Several defenses in one :class:`~oag_transform.DefendedModel`; see :func:`by_key`."""
    parts = []
    for part in key.split("+"):
        name, given, setting = part.partition(":")
        family = by_key(name)
        try:
            parts.append((family, _number(setting) if given else family.published))
        except ValueError:
            raise ValueError(f"expected KEY:SETTING with a number for the setting, got {part!r}") from None
    return Defense(
        key=key,
        label=f"{' + '.join(family.describe(setting) for family, setting in parts)}, {VIEWS}",
        knob="defenses",
        make=lambda _, seed, needs: _module_list([family.make(setting, seed, needs) for family, setting in parts]),
        published=len(parts),
        tuned=len(parts),
        settings=(len(parts),),
        in_views=True,
    )


def _module_list(modules: "list[nn.Module]") -> "nn.Module":
    from torch.nn import ModuleList  # when a defense is made, not when the list is read

    return ModuleList(modules)


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def chosen(keys: Iterable[str]) -> tuple[Defense, ...]:
    """The defenses of these keys, in their order; see :func:`by_key`."""
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
    # exact Langevin steps take ten times as long, for the same images within 0.3 dB
    return make(network_steps=steps, langevin="closed_form", seed=seed, compute_dtype=needs.compute_dtype)


def _in_views(defense: Defense, **changes: Any) -> Defense:
    """A defense in the four views of a DefendedModel; ``changes`` are what else is different."""
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
_FOLLOWING = dataclasses.replace(
    _NOISY_JPEG,
    key="jpeg-noise-follow",
    label="JPEG and noise, as the noise asks",
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
    # what the views of a DefendedModel are worth to others
    _in_views(_NOISE),
    _in_views(_JPEG, published=25, tuned=15),
    _in_views(_NOISY_JPEG, published=25, tuned=15),
    _in_views(_FOLLOWING, published=25, tuned=15),
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
    # what it is worth to follow the noise of each image
    _in_views(_OAG_FULL, settings=(24, 12, 9, 6)),
    _OAG,
    _in_views(_OAG, settings=(24, 12, 9, 6)),
)
