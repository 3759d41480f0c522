"""Large images in tiles: positions and weights, seamless overlaps, and what diverges."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oag_transform import DivergenceError, OnlineAlternateGenerator
from oag_transform.generator import run
from oag_transform.generator.state import Inputs
from oag_transform.generator.tiles import OVERLAP, fade, tiles
from oag_transform.images import IMAGENET_MEAN
from tests.sample_images import synthetic_image


@settings(deadline=None, max_examples=40)
@given(height=st.integers(9, 1500), width=st.integers(9, 1500), size=st.integers(128, 900), stride=st.integers(1, 6))
def test_shares_add_up_to_one_and_tiles_keep_to_the_size_and_the_grid(height: int, width: int, size: int, stride: int) -> None:
    total = torch.zeros(height, width, dtype=torch.float64)
    places = tiles(height, width, size, stride)
    for place in places:
        assert place.top % stride == place.left % stride == 0
        assert 9 <= place.bottom - place.top <= max(size + stride, min(height, size))
        assert 9 <= place.right - place.left <= max(size + stride, min(width, size))
        share = fade(place, height, width, like=total)
        assert (share > 0).all()
        place.of(total).add_(share)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert (len(places) == 1) == (max(height, width) <= size)


def purifier(**settings: Any) -> OnlineAlternateGenerator:
    """The default at seed 0 but for these settings, in float32."""
    made: dict[str, Any] = {"seed": 0, "compute_dtype": torch.float32}
    return OnlineAlternateGenerator(**made | settings)


def columns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, over channels and rows."""
    return images.mean((0, 1)), images.std((0, 1))


def test_nothing_shows_where_tiles_meet() -> None:
    """The residual in the overlap has the same deviation as elsewhere, and no step in its mean; 5 standard errors."""
    image = synthetic_image(3, 120, 330).float()
    purify = purifier(filters=24, network_steps=8, strength=1.0, tile_size=None)
    tiled = purifier(filters=24, network_steps=8, strength=1.0, tile_size=189)
    first, second = tiles(120, 330, 189, 3)
    whole, parts = (255 * (t(image) - image) for t in (purify, tiled))
    assert not torch.equal(whole[..., :100], parts[..., :100])  # the network is trained on its tile
    overlap = slice(second.left, first.right)
    assert first.right - second.left == OVERLAP
    inside = parts[..., overlap].std() / parts.std()
    expected = whole[..., overlap].std() / whole.std()
    assert inside.item() == pytest.approx(expected.item(), rel=5 / (2 * 3 * 120 * OVERLAP) ** 0.5 + 0.02)
    mean, spread = columns(parts)
    steps = (mean[1:] - mean[:-1])[second.left - 3 : first.right + 3]
    assert steps.abs().max() < 5 * spread.max() * (2 / 360) ** 0.5


def test_a_row_of_a_tiled_batch_is_the_image_alone_and_tiles_draw_noise_of_their_own() -> None:
    images = torch.full((2, 3, 140, 300), 0.4)
    purify = purifier(filters=4, network_steps=2, strength=1.0, tile_size=150, seed=3)
    together = purify(images, index=4)
    torch.testing.assert_close(together[1], purify(images[1], index=5), rtol=0, atol=1e-5)
    left, right = (part - part.mean((1, 2), keepdim=True) for part in (together[0, :, :90, :90], together[0, :, :90, 210:300]))
    correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
    assert abs(correlation.item()) < 5 / left.numel() ** 0.5


def noise_in_four_tiles(strength: float) -> tuple[Tensor, list[Tensor]]:
    """The Langevin noise alone (3, 242, 332), and its tiles, all of one size."""
    purify = OnlineAlternateGenerator(
        filters=4, network_steps=1, fc_lr=0.0, strength=strength, tile_size=189, seed=0, compute_dtype=torch.float32
    )
    noise = purify(torch.full((3, 242, 332), 0.5)) - torch.tensor(IMAGENET_MEAN)[:, None, None] / 255
    parts = [place.of(noise) for place in tiles(242, 332, 189, 3)]
    assert [part.shape for part in parts] == [(3, 137, 182)] * 4
    return noise, parts


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_noise_is_as_strong_where_tiles_overlap(strength: float) -> None:
    """Within five standard errors of the two standard deviations."""
    noise, _ = noise_in_four_tiles(strength)
    covered = torch.zeros(242, 332)
    for place in tiles(242, 332, 189, 3):
        place.of(covered).add_(1)
    inside, beside = noise[:, covered > 1], noise[:, covered == 1]
    error = (1 / (2 * inside.numel()) + 1 / (2 * beside.numel())) ** 0.5
    assert (inside.std() / beside.std()).item() == pytest.approx(1, abs=5 * error)


def test_no_two_tiles_have_the_same_noise() -> None:
    _, parts = noise_in_four_tiles(1.0)
    alone = torch.stack([part[:, OVERLAP:-OVERLAP, OVERLAP:-OVERLAP].flatten() for part in parts])  # of one tile only
    assert (torch.corrcoef(alone) - torch.eye(4)).abs().max() < 5 / alone.shape[1] ** 0.5


def test_a_tile_that_diverges_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_tile_of_second_image_fails(inputs: Inputs, advance: object = None) -> tuple[Tensor, Tensor]:
        return inputs.pixels.clone(), torch.tensor([False, inputs.tile == 0])

    monkeypatch.setattr(run, "with_retry", first_tile_of_second_image_fails)
    purify = purifier(tile_size=150, chunk_size=2, seed=None)
    with pytest.raises(DivergenceError) as raised:
        purify(torch.full((2, 3, 130, 300), 0.5))
    assert raised.value.indices == [1]


def test_strength_is_that_of_the_whole_image() -> None:
    """With noise in one half only, both halves get the same strength."""
    image = torch.full((3, 130, 400), 0.5)
    image[..., :200] += 4 / 255 * torch.randn(3, 130, 200, generator=torch.Generator().manual_seed(0))
    quiet = image[..., 240:]
    purify = purifier(filters=4, network_steps=2, tile_size=224)
    alone = purifier(filters=4, network_steps=2)(quiet).std((1, 2))
    assert (purify(image)[..., 240:].std((1, 2)) > 1.5 * alone).all()  # a quarter of the temperature is half of the noise


def test_small_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="tile_size must be an integer >= 128, got 64"):
        OnlineAlternateGenerator(tile_size=64)
