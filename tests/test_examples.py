"""The examples run, with few images and steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import to_pil_image

from examples import choose_network_steps, cifar_models, defended_model, torchvision_pipeline
from oag_transform import OnlineAlternateGenerator
from oag_transform.streams import index_of
from tests.sample_images import sample_images


def test_torchvision_pipeline(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, image in zip(paths, sample_images(), strict=True):
        to_pil_image(image).save(path)
    batch = torchvision_pipeline.main(paths)
    assert batch.shape == (2, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = batch * std + mean
    assert -1e-5 < pixels.min() < pixels.max() < 1 + 1e-5
    cropped = functional.center_crop(functional.resize(sample_images(), [256]), [224, 224])
    assert (pixels - cropped).abs().mean() < 0.05  # the same images


@pytest.mark.parametrize("name", ["ask_service", "distributed_sampler", "torchvision_pipeline"])
def test_a_script_without_its_arguments_says_what_it_needs(name: str) -> None:
    script = Path(__file__).parent.parent / "examples" / f"{name}.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.fullmatch(rf"usage: .*examples/{name}\.py IMAGE.*\n", run.stderr)


def test_defended_model() -> None:
    """Four images, four steps: both attacks lower accuracy, the adaptive attack more."""
    found = defended_model.main(count=4, steps=4, eot=1, seed=0, compute_dtype=torch.float32)
    clean, attacked, defended, gray_box, adaptive = found.values()
    assert all(value in (0, 0.25, 0.5, 0.75, 1) for value in found.values())
    assert clean >= 0.75
    assert attacked <= 0.25
    assert defended >= 0.5
    assert gray_box > attacked
    assert adaptive <= gray_box
    assert adaptive <= 0.5
    assert adaptive < defended


def test_choose_network_steps() -> None:
    chosen = choose_network_steps.main(count=2, longest=4, every=2)
    assert [step for step, _ in chosen.curve] == [2, 4]
    best = max(accuracy for _, accuracy in chosen.curve)
    assert chosen.steps == next(step for step, accuracy in chosen.curve if accuracy >= best - 0.01)


@pytest.mark.parametrize(
    ("name", "network", "parameters"),
    [
        ("resnet20", cifar_models.ResNet(3), 269_722),  # He et al. 2016: 0.27 million
        ("resnet56", cifar_models.ResNet(9), 853_018),  # 0.85 million
        ("resnet2b", cifar_models.PlainResNet(8, stages=1), 112_006),
        ("resnet4b", cifar_models.PlainResNet(16, stages=2), 123_734),
    ],
)
def test_cifar_models(
    name: str, network: torch.nn.Module, parameters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint as it is published, with the prefix of DataParallel, gives the network that it is of, normalised."""
    assert sum(each.numel() for each in network.parameters()) == parameters
    monkeypatch.setenv("CIFAR_MODELS", str(tmp_path))
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / f"{name}.{'th' if parameters > 200_000 else 'pth'}")
    model = getattr(cifar_models, name)()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each)[:, None, None] for each in (model[0].mean, model[0].std))
    with torch.no_grad():
        assert torch.equal(model(images), network.eval()((images - mean) / std))


@pytest.mark.usefixtures("choice_of_processes")
def test_distributed_sampler(tmp_path: Path) -> None:
    """Two processes and three images: each image is purified once, with the result of a single process."""
    (tmp_path / "in").mkdir()
    for i, image in enumerate(torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))):
        to_pil_image(image).save(tmp_path / "in" / f"{i}.png")
    example = Path(__file__).parents[1] / "examples" / "distributed_sampler.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, str(example), str(tmp_path / "in"), str(tmp_path / "out")], check=True, env=environment)
    transform = OnlineAlternateGenerator(seed=0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]
    for path in (tmp_path / "in").iterdir():
        expected = transform(PIL.Image.open(path), index=index_of(path.name))
        with PIL.Image.open(tmp_path / "out" / path.name) as found:
            difference = [abs(a - b) for a, b in zip(found.tobytes(), expected.tobytes(), strict=True)]
        assert max(difference) <= 1  # threads may differ: to rounding
