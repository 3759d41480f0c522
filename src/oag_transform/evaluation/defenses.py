"""The defenses that are compared: the paper's, each at its published strength and over a range of strengths, and ours."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..defended import SHIFT
from ..transform import OnlineAlternateGenerator
from .online import DeepImagePrior, OnlineAutoencoder
from .peers import (
    JPEG,
    TVM,
    GaussianNoise,
    MeanFilter,
    MedianFilter,
    NoisyJPEG,
    PixelDeflection,
    Randomization,
    TotalVariation,
)
from .pixeldefend import PixelCNN, PixelDefend

OURS = "Online alternate generator"
VIEWS = "4 views"


class Defense(NamedTuple):
    """A family of defenses, one for each strength.

    Attributes:
        name: as in the paper's tables where it is there.
        knob: what its strength is called.
        make: (strength, seed) -> transform of [0, 1] batches, called with ``index=`` of the first image.
        published: the strength of its own paper, or the usual one.
        tuned: the strength that ``evaluate tune`` chose, on clean and Gaussian-noised images.
        strengths: from weak to strong, for ``tune`` and ``tradeoff``.
        slow: takes many seconds an image, and is measured on fewer images.
        shift: pixels by which the four views of what the defense returns are moved, see :class:`~oag_transform.DefendedModel`;
            0: one view, unmoved.
    """

    name: str
    knob: str
    make: Callable[[Any, int], nn.Module]
    published: float
    tuned: float
    strengths: tuple[float, ...]
    slow: bool = False
    shift: int = 0

    def label(self, strength: float) -> str:
        """Name and strength, such as ``"JPEG, quality 75"``."""
        return f"{self.name}, {self.knob} {strength:.4g}"


def defenses(pixelcnn: PixelCNN | None = None, compute_dtype: torch.dtype | None = None) -> tuple[Defense, ...]:
    """Every defense, ours last.

    The tuned strengths are those of ``evaluate tune`` on 60 images of one half of Flower-17's training images, with a target
    fitted to the other half: the strongest whose mean accuracy on clean and on Gaussian-noised (std 0.1) images is within five
    points of the defense's best. Slow defenses were not tuned so. Nothing was chosen on attacked images, but for JPEG with the
    views of a DefendedModel, which stands at what was found strong in docs/quality.md. Finer classes ask for other strengths:
    run it on images like yours.

    Args:
        pixelcnn: what ``oag-transform fit-pixelcnn`` trained, which PixelDefend needs.
        compute_dtype: of our transform, see :class:`~oag_transform.OnlineAlternateGenerator`.
    """

    def pixel_defend(epsilon: int, _: int) -> nn.Module:
        if pixelcnn is None:
            raise ValueError("it needs a PixelCNN: oag-transform fit-pixelcnn, then --pixelcnn FILE")
        return PixelDefend(pixelcnn, epsilon)

    def ours(steps: int, seed: int, strength: float | None = None) -> nn.Module:
        return OnlineAlternateGenerator(network_steps=steps, strength=strength, seed=seed, compute_dtype=compute_dtype)

    def ours_as_published(steps: int, seed: int) -> nn.Module:
        # exact Langevin steps take ten times as long, for the same images within 0.3 dB
        return OnlineAlternateGenerator.paper(
            network_steps=steps, langevin="closed_form", seed=seed, compute_dtype=compute_dtype
        )

    jpeg = Defense("JPEG", "quality", lambda quality, _: JPEG(quality), 75, 35, (75, 50, 35, 25, 15, 10))
    noisy_jpeg = Defense(
        *("JPEG and noise of 8 grey levels", "quality", lambda quality, seed: NoisyJPEG(quality, 8, seed=seed)),
        *(25, 25, jpeg.strengths),
    )
    noise = Defense("Gaussian noise", "grey levels", lambda std, seed: GaussianNoise(std, seed=seed), 12, 12, (6, 12, 18, 24))
    following = noisy_jpeg._replace(
        name="JPEG and noise, as the noise asks", make=lambda quality, seed: NoisyJPEG(quality, 8, follow_noise=True, seed=seed)
    )
    alone = Defense(OURS, "T_N", ours, 12, 12, (48, 36, 24, 18, 12, 9, 6))
    full = alone._replace(name=f"{OURS}, full strength", make=functools.partial(ours, strength=1.0))
    return (
        Defense("Mean filter", "size", lambda size, _: MeanFilter(size), 3, 7, (3, 5, 7)),
        Defense("Median filter", "size", lambda size, _: MedianFilter(size), 3, 7, (3, 5, 7)),
        jpeg,
        noisy_jpeg,
        # what the views of a DefendedModel are worth to others
        _in_views(noise),
        _in_views(jpeg, published=25, tuned=15),
        _in_views(noisy_jpeg, published=25, tuned=15),
        _in_views(following, published=25, tuned=15),
        Defense("Total variation", "weight", lambda weight, _: TotalVariation(weight), 0.1, 0.1, (0.03, 0.06, 0.1, 0.15, 0.2)),
        Defense("TVM", "weight", lambda weight, seed: TVM(weight, seed=seed), 0.03, 0.03, (0.01, 0.03, 0.06, 0.1)),
        Defense(
            *("Pixel deflection", "sigma", lambda sigma, seed: PixelDeflection(sigma=sigma, seed=seed)),
            *(0.04, 0.04, (0.02, 0.04, 0.08, 0.12, 0.2)),
        ),
        Defense(
            *("Randomization", "ratio", lambda ratio, seed: Randomization(ratio, fill=0.5, seed=seed)),
            *(331 / 299, 1.25, (1.05, 331 / 299, 1.25, 1.5)),
        ),
        noise,
        Defense("Pixel Defend", "epsilon", pixel_defend, 16, 16, (4, 8, 16, 24), slow=True),
        Defense(
            *("Auto-encoder", "steps", lambda steps, seed: OnlineAutoencoder(steps=steps, seed=seed)),
            *(80, 80, (160, 80, 40)),
            slow=True,
        ),
        Defense(
            *("DIP", "steps", lambda steps, seed: DeepImagePrior(steps=steps, seed=seed)),
            *(300, 300, (600, 300, 150)),
            slow=True,
        ),
        Defense(f"{OURS}, paper(), closed form", "T_N", ours_as_published, 300, 300, (300,), slow=True),
        # what it is worth to follow the noise of each image
        _in_views(full, strengths=(24, 12, 6)),
        alone,
        _in_views(alone, strengths=(24, 12, 6)),
    )


def _in_views(family: Defense, **changes: Any) -> Defense:
    """A defense in the four views of a DefendedModel; ``changes`` are what else is different."""
    return family._replace(name=f"{family.name}, {VIEWS}", shift=SHIFT, **changes)
