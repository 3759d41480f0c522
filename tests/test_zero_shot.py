"""The zero-shot denoisers against independent definitions; test_filters has their contract."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from oag_transform.baselines import zero_shot
from oag_transform.baselines._batches import generators
from oag_transform.baselines.per_image import initialise
from oag_transform.baselines.zero_shot import Noise2Fast, ZeroShotNoise2Noise, diagonals

from .test_filters import rand


def scene(noise: float, side: int = 32) -> tuple[Tensor, Tensor]:
    """A smooth image, without and with white noise."""
    y, x = torch.linspace(0, 3, side)[:, None], torch.linspace(0, 3, side)
    clean = (0.5 + 0.3 * torch.stack([torch.sin(x + y), torch.cos(x - y), torch.sin(x * y / 3)]))[None]
    return clean, (clean + noise * torch.randn(clean.shape, generator=Generator().manual_seed(0))).clamp(0, 1)


def test_halves_are_means_of_diagonals() -> None:
    image = rand(1, 3, 6, 8)
    kernels = torch.tensor([[[0.5, 0], [0, 0.5]], [[0, 0.5], [0.5, 0]]], dtype=torch.float64)
    expected = torch.stack([F.conv2d(image, kernel.expand(3, 1, 2, 2), stride=2, groups=3)[0] for kernel in kernels])
    torch.testing.assert_close(diagonals(image), expected)


@pytest.mark.parametrize("axis", [2, 3])
def test_checkerboards_are_pushed_together_along_one_axis(axis: int) -> None:
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    even, odd = zero_shot._checkerboards(image, axis)
    plain = image[0, 0].numpy() if axis == 2 else image[0, 0].numpy().T
    boards = [np.array([[plain[2 * i + (j % 2 == color), j] for j in range(plain.shape[1])] for i in range(len(plain) // 2)])
              for color in (1, 0)]  # fmt: skip
    for actual, expected in zip((even, odd), boards, strict=True):
        np.testing.assert_array_equal(actual[0, 0] if axis == 2 else actual[0, 0].T, expected)


def test_both_remove_noise() -> None:
    clean, noisy = scene(0.1)
    for defense in (ZeroShotNoise2Noise(steps=300, seed=0), Noise2Fast(channels=16, steps=300, seed=0)):
        assert F.mse_loss(defense(noisy), clean) < F.mse_loss(noisy, clean) / 2.5


def test_a_step_of_zs_n2n_is_that_of_its_losses() -> None:
    """One step with explicit residual and consistency losses, symmetric in the halves."""
    _, noisy = scene(0.1, side=8)
    defense = ZeroShotNoise2Noise(steps=1, channels=4, lr=0.01, seed=3)
    trained = defense._trained(noisy, Generator().manual_seed(5))
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 3, 1)
    )
    initialise(network, Generator().manual_seed(5), torch.float32)
    first, second = diagonals(noisy).split(1)
    one, two = first - network(first), second - network(second)
    whole = diagonals(noisy - network(noisy)).split(1)
    residual = (F.mse_loss(one, second) + F.mse_loss(two, first)) / 2
    consistency = (F.mse_loss(one, whole[0]) + F.mse_loss(two, whole[1])) / 2
    (residual + consistency).backward()
    torch.optim.Adam(network.parameters(), lr=0.01).step()
    for actual, expected in zip(trained.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_gradient_of_zs_n2n_is_that_of_the_trained_network() -> None:
    image = (0.25 + 0.5 * rand(1, 3, 6, 6)).requires_grad_()
    defense = ZeroShotNoise2Noise(steps=5, channels=4, seed=0)
    network = defense._trained(image.detach().clone(), generators(0, [4], torch.device("cpu"))[0])
    (expected,) = torch.autograd.grad((image - network(image)).clamp(0, 1).pow(2).sum(), image)
    (actual,) = torch.autograd.grad(defense(image, index=4).pow(2).sum(), image)
    torch.testing.assert_close(actual, expected)


def test_noise2fast_stops_when_nothing_comes_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are numbered. The closest is the third, and the average excludes the last."""
    results = iter([0.3, 0.4, 0.5, *[0.2] * 100])
    counted = []

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return images * 0 + self.weight.sigmoid()
            counted.append(next(results))
            return torch.full_like(images, counted[-1])

    monkeypatch.setattr(Noise2Fast, "_network", lambda *_: Numbered())
    image = torch.tensor([0.0, 1.0]).repeat(1, 3, 4, 2)
    result = Noise2Fast(patience=4, seed=0)(image)
    assert counted == [0.3, 0.4, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2]
    torch.testing.assert_close(result, torch.full_like(image, float(np.mean(counted[:-1]))))


@pytest.mark.parametrize("defense", [ZeroShotNoise2Noise(steps=2, channels=3, seed=0), Noise2Fast(steps=2, channels=3, seed=0)])
def test_modes_of_the_caller_make_no_difference(defense: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    image = rand(1, 3, 7, 5, dtype=torch.float32)
    expected = defense(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(defense(image), expected)
    with torch.inference_mode():
        inferred = rand(1, 3, 7, 5, dtype=torch.float32)
        assert torch.equal(defense(inferred), expected)
    assert capsys.readouterr().err == ""
    defense.progress = True  # type: ignore[assignment]
    defense(image)
    assert "/2" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ZeroShotNoise2Noise, Noise2Fast])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("channels", 0),
        ("lr", 0),
        ("lr", float("nan")),
        ("seed", -1),
        ("progress", 1),
    ],
)
def test_bad_hyper_parameters_are_errors(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        kind(**{name: value})
