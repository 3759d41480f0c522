"""Tensor network purification: the train, its truncation, and the effect of the fit on images."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from oag_transform.baselines.tensor_network import TensorNetworkPurification, dense, tensor_train

from .test_filters import rand, smooth


@settings(max_examples=20, deadline=None)
@given(bits=st.integers(1, 5), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_a_train_of_full_rank_is_the_image(bits: int, channels: int, seed: int) -> None:
    image = rand(1, channels, 2**bits, 2**bits, seed=seed)
    cores = tensor_train(image, 10**6)
    assert [core.shape[1] for core in cores] == [4] * bits + [channels]
    torch.testing.assert_close(dense(cores), image)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_ranks_are_bounded_and_the_error_is_that_of_the_svds(rank: int) -> None:
    """The squared error is at most the sum of the truncation errors of all unfoldings (Oseledets 2011, theorem 2.2)."""
    image = smooth(1, 3, 16, 16)
    cores = tensor_train(image, rank)
    assert all(max(core.shape[0], core.shape[-1]) <= max(rank, 3) for core in cores[:-1])
    tensor = image[0].reshape(3, *[2] * 8).permute(1, 5, 2, 6, 3, 7, 4, 8, 0).reshape(4, 4, 4, 4, 3)
    left_out = sum(torch.linalg.svdvals(tensor.reshape(4**position, -1))[rank:].square().sum() for position in range(1, 5))
    assert 0 < (dense(cores) - image).square().sum() <= left_out + 1e-9


def test_one_core_speaks_of_one_bit_of_rows_and_columns() -> None:
    """The last core of an image of 2 x 2 blocks is independent of its bit."""
    image = rand(1, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    finest = tensor_train(image, 100)[2]
    torch.testing.assert_close(finest, finest[:, :1].expand_as(finest))


def test_a_lower_rank_keeps_less() -> None:
    image = smooth(1, 3, 32, 32).float()
    errors = [F.mse_loss(TensorNetworkPurification(rank, steps=20)(image), image).item() for rank in (48, 16, 8, 2)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 2


def test_it_removes_noise() -> None:
    y, x = torch.linspace(0, 3, 32)[:, None], torch.linspace(0, 3, 32)
    clean = (0.5 + 0.3 * torch.stack([torch.sin(x + y), torch.cos(x - y), torch.sin(x * y / 3)]))[None]
    noisy = (clean + 0.1 * torch.randn(clean.shape, generator=Generator().manual_seed(0))).clamp(0, 1)
    purified = TensorNetworkPurification(8, steps=50)(noisy)
    assert F.mse_loss(purified, clean) < F.mse_loss(noisy, clean) / 2


def test_steps_lower_the_adversarial_error() -> None:
    """max over |delta| <= eta of (x + delta - y)^2, by evaluation at both ends, plus the error to the coarse result."""
    image, eta = smooth(1, 3, 16, 16), 0.1
    coarse = TensorNetworkPurification(6, scales=0, steps=0)(F.avg_pool2d(image, 2))

    def objective(y: Any) -> float:
        ends = torch.stack([(image + delta - y).square() for delta in (-eta, eta)])
        return (ends.max(0).values.mean() + F.mse_loss(F.avg_pool2d(y, 2), coarse)).item()

    defense = TensorNetworkPurification(3, eta=eta, steps=60, lr=0.003)
    start = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    fitted = defense._fit(start, image, 3, coarse)
    assert objective(fitted) < objective(dense(tensor_train(start, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"eta": -0.1}, "eta must be a finite number >= 0, got -0.1"),
        ({"scales": -1}, "scales must be an integer >= 0, got -1"),
        ({"steps": 1.5}, "steps must be an integer >= 0, got 1.5"),
        ({"lr": 0}, "lr must be a finite number > 0, got 0"),
    ],
)
def test_bad_hyper_parameters_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorNetworkPurification(**arguments)


def test_the_adversarial_error_counts_without_coarser_scales_too() -> None:
    image = rand(1, 3, 8, 8)
    assert not torch.equal(*(TensorNetworkPurification(2, eta=eta, scales=0, steps=5)(image) for eta in (0.0, 0.5)))
