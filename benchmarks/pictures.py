"""The pictures of README and docs, from photographs that anybody may pass on: they come with scikit-image (extra ``eval``).

python -m benchmarks.pictures --out docs

Both are under CC0: chelsea by Stefan van der Walt, coffee by Rachel Michetti. They have no ImageNet label: the attack leads
away from the class that the target gives to the photograph itself.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import skimage.data
import torch
from torch import Tensor
from torchvision.models import EfficientNet_B0_Weights
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.evaluation.attacks.gray_box import mifgsm
from oag_transform.evaluation.backbones import efficientnet_lite
from oag_transform.evaluation.render.figures import residuals

NAMES = ("coffee", "chelsea")
CLASSES = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
MOMENTS = (1, 2, 3, 4, 6, 9)  # network steps


def photographs(names: Sequence[str], side: int = 224) -> Tensor:
    """Photographs of scikit-image, their middles, (N, 3, side, side) float32 in [0, 1]."""
    whole = [torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) for name in names]
    return torch.stack([tvf.center_crop(tvf.resize(each, [side]), [side, side]) for each in whole]) / 255


def said(probabilities: Tensor) -> list[str]:
    """The likeliest class of each image, and its probability."""
    return [f"{CLASSES[best]}: {probability:.2f}" for probability, best in zip(*probabilities.max(1), strict=True)]


def main() -> None:
    """Write demo.jpg and iterations.jpg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    target = efficientnet_lite(0)
    oag = OnlineAlternateGenerator(seed=0)
    behind = DefendedModel(target, oag)
    clean = photographs(NAMES)
    attacked = mifgsm(2)(target, clean, target(clean).argmax(1), classes=len(CLASSES))
    with torch.no_grad():
        purified = [behind.purify(images) for images in (clean, attacked)]
        notes = [said(target(images).softmax(1)) for images in (clean, attacked)]
        notes += [said(behind.classify(images).softmax(1)) for images in purified]
    headings = ("original", "attacked", "original, purified", "attacked, purified")
    columns = list(zip(headings, (clean, attacked, *purified), strict=True))
    residuals(options.out / "demo.jpg", columns, clean, notes)

    PIL.Image.open(options.out / "demo.jpg").save(options.out / "demo.jpg", quality=70, optimize=True)  # noise is what costs
    moments = [moment.images[0] for moment in oag.trace(attacked) if moment.step in MOMENTS]
    # three columns are large enough for a phone
    tvf.to_pil_image(make_grid(moments, nrow=3, padding=4, pad_value=1.0)).save(options.out / "iterations.jpg", quality=85)
    for heading, column in zip(headings, notes, strict=True):
        print(f"{heading:<20}{', '.join(column)}")


if __name__ == "__main__":
    main()
