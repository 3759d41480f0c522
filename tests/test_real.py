"""The main job: a real classifier, a real attack, the default transform. Skipped only without the ``demo`` extra.

Bounds, for the photographs that the classifier gets right (17 of foolbox's 20): the attack leaves at most two of them, and at
least 40% of the purified images are right (10 of 17 were, clean and attacked, when this was written). A defense that returns
its input fails this, noise of the same strength is shown to do worse, and so does any slip in the loop that costs content or
lets the perturbation through.
"""

import importlib.util
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from oag_transform import demo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("foolbox") is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None,
    reason="needs the demo extra",
)


@pytest.fixture(scope="module")
def seen() -> tuple[nn.Module, demo.Outcome]:
    return demo.run(seed=0)


def accuracy(target: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((demo.predict(target, images).argmax(1) == labels).float().mean())


def test_fooled_by_the_attack_and_set_right_by_the_transform(seen: tuple[nn.Module, demo.Outcome]) -> None:
    target, outcome = seen
    assert len(outcome.labels) >= 15
    difference = 255 * (outcome.attacked - outcome.clean)
    assert difference.abs().max() <= demo.EPSILON + 1e-3
    assert accuracy(target, outcome.clean, outcome.labels) == 1
    assert accuracy(target, outcome.attacked, outcome.labels) <= 2 / 15
    assert accuracy(target, outcome.purified_attacked, outcome.labels) >= 0.4
    assert accuracy(target, outcome.purified_clean, outcome.labels) >= 0.4


def test_noise_of_the_same_strength_does_worse(seen: tuple[nn.Module, demo.Outcome]) -> None:
    """The bound above means something: as far from the image, white noise sets less of it right."""
    target, outcome = seen
    residual = (outcome.purified_attacked - outcome.attacked).square().mean().sqrt()
    noise = torch.randn(outcome.attacked.shape, generator=torch.Generator().manual_seed(0))
    noised = (outcome.attacked + residual * noise).clamp(0, 1)
    ours = accuracy(target, outcome.purified_attacked, outcome.labels)
    assert accuracy(target, noised, outcome.labels) < ours


def test_table_and_picture(seen: tuple[nn.Module, demo.Outcome], tmp_path: Path) -> None:
    target, outcome = seen
    table = demo.table(target, outcome)
    count = len(outcome.labels)
    assert f"{count}/{count} = 100%" in table
    assert "s an image" in table
    demo.picture(target, outcome, tmp_path / "demo.png")
    with PIL.Image.open(tmp_path / "demo.png") as image:
        assert min(image.size) > 500
