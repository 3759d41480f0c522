"""The main job: a real classifier, a real attack, the default transform. Skipped only without the ``demo`` extra.

Bounds, for the photographs that the classifier gets right (17 of foolbox's 20): the attack leaves at most two of them, and at
least 60% of the purified images are right (16 of 17 were, clean and attacked, when this was written). A defense that returns
its input fails this, and so does any slip in the loop that costs content or lets the perturbation through.
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
    assert accuracy(target, outcome.purified_attacked, outcome.labels) >= 0.6
    assert accuracy(target, outcome.purified_clean, outcome.labels) >= 0.6


def test_table_and_picture(seen: tuple[nn.Module, demo.Outcome], tmp_path: Path) -> None:
    target, outcome = seen
    table = demo.table(target, outcome)
    count = len(outcome.labels)
    assert f"{count}/{count} = 100%" in table
    change = 255 * (outcome.purified_attacked - outcome.attacked).square().mean().sqrt()
    assert f"white noise of {change:.0f} grey levels" in table
    assert "s an image" in table
    demo.picture(target, outcome, tmp_path / "demo.png")
    with PIL.Image.open(tmp_path / "demo.png") as image:
        assert min(image.size) > 500


def test_the_control_is_white_noise_of_that_level() -> None:
    """The same for an image whoever else is there, held to [0, 1]."""
    images = torch.full((3, 3, 64, 64), 0.5)
    added = 255 * (demo.noisy(images, 11) - images)
    assert abs(added.std().item() - 11) < 4 * 11 / (2 * added.numel()) ** 0.5
    assert abs((added[..., 1:] * added[..., :-1]).mean().item()) < 4 * 11**2 / added.numel() ** 0.5
    torch.testing.assert_close(demo.noisy(images[:2], 11), (images + added / 255)[:2])
    assert demo.noisy(torch.ones(1, 3, 64, 64), 11).amax() == 1
