"""The examples run, quickly and roughly."""

from pathlib import Path

import torch

from examples import choose_network_steps, defended_model, torchvision_pipeline
from tests.test_cli import write_image


def test_torchvision_pipeline(tmp_path: Path) -> None:
    paths = [str(write_image(tmp_path / f"{i}.png", size=(80, 70))) for i in range(2)]
    batch = torchvision_pipeline.main(paths, network_steps=2, filters=4)
    assert batch.shape == (2, 3, 224, 224)
    assert torch.isfinite(batch).all()
    assert batch.min() < 0 < batch.max()  # normalised


def test_defended_model() -> None:
    figures = defended_model.main(count=2, steps=2, eot=2, network_steps=2, filters=4)
    assert len(figures) == 5
    assert all(0 <= value <= 1 for value in figures.values())


def test_choose_network_steps() -> None:
    chosen = choose_network_steps.main(count=2, longest=4, every=2)
    assert [step for step, _ in chosen.curve] == [2, 4]
    assert chosen.steps in (2, 4)
