"""Classifiers that are fitted here: they learn, repeat, are saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from oag_transform.evaluation.data import Listing, image_folder, read_images
from oag_transform.evaluation.fitting import fit_target
from oag_transform.evaluation.targets import load_target, save_target
from oag_transform.files import read_rgb
from tests.test_data import write_image


@pytest.fixture
def flowers(tmp_path: Path) -> Listing:
    for index, name in enumerate(("red", "green", "blue")):
        (tmp_path / name).mkdir()
        for number in range(3):
            path = write_image(tmp_path / name / f"{number}.png", size=(70, 60))
            tint = pil_to_tensor(read_rgb(path))
            tint[torch.arange(3) != index] //= 4
            to_pil_image(tint).save(path)
    return image_folder(tmp_path)


def test_a_fitted_head_learns_saves_and_loads(flowers: Listing, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    model, preprocessing = fit_target(flowers)
    assert torch.equal(torch.get_rng_state(), state)
    save_target(tmp_path / "new" / "t.pt", model, preprocessing, backbone="efficientnet-lite0", classes=flowers.classes)
    target = load_target(str(tmp_path / "new" / "t.pt"), classes=flowers.classes)
    images = read_images(flowers, list(range(9)), preprocessing).float() / 255
    with torch.no_grad():
        assert torch.equal(target.model(images).argmax(1), torch.tensor(flowers.labels))
        assert torch.allclose(target.model(images), model(images), atol=1e-4)
    assert target.preprocessing == preprocessing
    with pytest.raises(ValueError, match=r"fitted to the 3 classes \['blue', 'green', 'red'\], but the data has the 3 classes"):
        load_target(str(tmp_path / "new" / "t.pt"), classes=("red", "green", "blue"))


def test_training_all_layers_changes_them_and_repeats(flowers: Listing) -> None:
    small = Listing(flowers.paths[::2], flowers.labels[::2], flowers.classes)
    state = torch.get_rng_state()
    models = [fit_target(small, "resnet18", epochs=epochs, batch_size=2, lr=1e-3)[0] for epochs in (0, 1, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    first, trained, again = (next(iter(model.parameters())) for model in models)
    assert not torch.equal(first, trained)
    assert torch.equal(trained, again)
    assert not models[1].training


def test_one_class_is_none(flowers: Listing) -> None:
    with pytest.raises(ValueError, match="two classes or more, got 1"):
        fit_target(Listing(flowers.paths[:2], (0, 0), ("red",)))


@pytest.mark.parametrize("setting", [{"epochs": -1}, {"batch_size": 0}, {"lr": 0.0}, {"epochs": 1.5}, {"lr": float("nan")}])
def test_settings_of_training_are_checked_first(setting: dict[str, Any], flowers: Listing) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
        fit_target(flowers, **setting)
