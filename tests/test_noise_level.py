"""The noise estimate, against noise of known strength and scikit-image's estimator, and the strength that follows from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.restoration import estimate_sigma
from torch import Tensor

from oag_transform import OnlineAlternateGenerator
from oag_transform.noise_level import FULL, LEAST, TEXTURE, _at, estimate, matching_strength
from tests.sample_images import synthetic_image


def smooth(channels: int = 3, size: int = 96) -> Tensor:
    """An image without noise (1, channels, size, size), away from black and white."""
    turn = torch.linspace(0, 6, size, dtype=torch.float64)
    phase = torch.arange(channels, dtype=torch.float64)[:, None, None]
    return (0.5 + 0.05 * (turn + phase).sin() + 0.05 * (turn[:, None] - phase).cos())[None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(std=st.floats(0.5, 18), seed=st.integers(0, 99))
def test_white_noise_is_found(std: float, seed: int) -> None:
    """Tolerance of 5%: the standard error is 0.6%, and the border lowers the estimate by 1.2%."""
    noisy = smooth(size=192) + std / 255 * normal(1, 3, 192, 192, seed=seed)
    assert estimate(noisy).item() == pytest.approx(std, rel=0.05)


def test_agrees_with_scikit_image() -> None:
    noisy = smooth() + 5 / 255 * normal(1, 3, 96, 96)
    theirs = 255 * estimate_sigma(noisy[0].numpy(), average_sigmas=True, channel_axis=0)
    assert estimate(noisy).item() == pytest.approx(theirs, rel=0.05)


def test_noise_that_is_the_same_in_all_channels_is_found_in_brightness() -> None:
    """Grey noise has sqrt(3) times the deviation along (1, 1, 1) / sqrt(3); the smoothest blocks are slightly below it."""
    grey = smooth(1) + 6 / 255 * normal(1, 1, 96, 96)
    assert 0.85 * 3**0.5 * 6 / TEXTURE < estimate(grey).item() < 3**0.5 * 6 / TEXTURE
    torch.testing.assert_close(estimate(grey), estimate(grey.expand(1, 3, 96, 96)), rtol=1e-9, atol=0)


def test_each_direction_of_hue_counts_for_half() -> None:
    for axis in ([1.0, -1.0, 0.0], [1.0, 1.0, -2.0]):
        direction = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0)[:, None, None]
        noisy = smooth(size=192) + 4 / 255 * direction * normal(1, 1, 192, 192)
        assert estimate(noisy).item() == pytest.approx(2, rel=0.05)


def test_noise_that_was_enlarged_is_found_at_half_resolution() -> None:
    coarse = torch.nn.functional.interpolate(4 / 255 * normal(1, 3, 128, 128), scale_factor=2)
    assert estimate(smooth(size=256) + coarse).item() == pytest.approx(4, rel=0.05)


def test_letterbox_and_clipped_areas_say_nothing() -> None:
    noisy = smooth(size=192) + 4 / 255 * normal(1, 3, 192, 192)
    boxed = torch.nn.functional.pad(noisy, (0, 0, 160, 160))
    assert estimate(boxed).item() == pytest.approx(4, rel=0.1)  # the edge of the box is structure
    assert estimate((2 * boxed).clamp(0, 0)).item() == 0
    grey = smooth(1, size=192) + 4 / 255 * normal(1, 1, 192, 192)
    boxed = torch.nn.functional.pad(grey, (0, 0, 160, 160))
    assert 0 < estimate(boxed) < estimate(grey)  # in brightness the blocks along the edge, nearly flat, are the smoothest


def test_structure_in_brightness_counts_only_where_it_is_everywhere() -> None:
    """A texture of 20 grey levels over half of the image does not change the estimate."""
    texture = 20 / 255 * normal(1, 1, 96, 96)
    texture[..., :48, :] /= 100
    assert estimate(smooth() + texture).item() < 0.2
    assert estimate(smooth() + 20 / 255 * normal(1, 1, 96, 96)).item() > 8


@pytest.mark.parametrize("shape", [(1, 3, 67, 53), (2, 1, 40, 31), (1, 3, 33, 20), (1, 3, 16, 9)])
def test_bands_change_nothing(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    images = 0.5 + 0.02 * normal(*shape) + 0.1 * normal(shape[0], shape[1], 1, 1, seed=1)
    images[..., : shape[2] // 3, :] = 0.4  # a flat part
    whole = estimate(images)
    monkeypatch.setattr("oag_transform.noise_level.BAND", 1)
    assert torch.equal(estimate(images), whole)


@given(gain=st.floats(0.05, 1), offset=st.floats(0, 0.1))
def test_estimate_scales_with_contrast_and_ignores_colour(gain: float, offset: float) -> None:
    images = smooth() + 0.02 * normal(1, 3, 96, 96)
    torch.testing.assert_close(estimate(gain * images + offset), gain * estimate(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 1, 2, 40), (3, 3, 15, 17), (0, 3, 9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_and_flat_images_have_no_noise(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    found = estimate(torch.full(shape, 0.7, dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.zeros(shape[0], dtype=dtype), rtol=0, atol=1e-4)


def test_each_image_has_its_own() -> None:
    images = torch.cat([smooth() + std / 255 * normal(1, 3, 96, 96) for std in (0, 1, 8)])
    together = estimate(images)
    torch.testing.assert_close(together, torch.cat([estimate(image) for image in images.split(1)]))
    expected = (together / FULL).tolist()
    assert matching_strength(images).tolist() == pytest.approx([LEAST, max(LEAST, expected[1]), 1])


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 8) + 2])
def test_bad_images(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        matching_strength(bad)


def test_bytes_are_not_taken_for_images_in_0_to_1() -> None:
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.uint8"):
        matching_strength(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


class Elsewhere(Tensor):
    """A tensor that says it is on another device than the CPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("kind", [Tensor, Elsewhere])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_quantiles_are_those_of_torch(kind: type[Tensor], share: float) -> None:
    values = normal(3, 48)
    skipped = normal(3, 48, seed=1) > torch.tensor([9.0, 0.0, -9.0])[:, None]  # none, about half, all
    found = _at(values.clone().as_subclass(kind), skipped, share).as_subclass(Tensor)
    expected = [torch.quantile(v[~s], share, interpolation="lower") for v, s in zip(values[:2], skipped[:2], strict=True)]
    assert torch.equal(found, torch.stack([*expected, torch.zeros((), dtype=torch.float64)]))


def transform(**overrides: object) -> OnlineAlternateGenerator:
    return OnlineAlternateGenerator(**{"network_steps": 6, "filters": 16, "seed": 0} | overrides)  # type: ignore[arg-type]


def test_strength_none_follows_the_noise() -> None:
    noisy = torch.cat([smooth() + std / 255 * normal(1, 3, 96, 96) for std in (0, 0.5 * FULL)])
    for i, chosen in enumerate(matching_strength(noisy).tolist()):
        expected = transform(strength=chosen)(noisy[i], index=i)
        torch.testing.assert_close(transform()(noisy[i], index=i), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(transform(chunk_size=2)(noisy)[i], expected, rtol=0, atol=1e-5)
        assert not torch.allclose(transform(strength=1)(noisy[i], index=i), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("langevin", ["closed_form", "exact"])
def test_strength_is_the_temperature_and_the_share_of_the_threshold(langevin: str) -> None:
    """With a negligible network the result is noise; otherwise a lower strength lets more of the image in."""
    image = synthetic_image(3, 64, 64)
    spreads = [
        (255 * transform(strength=share, fc_lr=0.0, langevin=langevin)(image)).std((1, 2)).mean().item() for share in (0.2, 0.8)
    ]
    assert spreads[1] == pytest.approx(2 * spreads[0], rel=0.02)
    # the same threshold in units of ||W||, by two ways
    quiet = {"step_size": 0.0, "network_steps": 2, "langevin": langevin}
    torch.testing.assert_close(
        transform(strength=0.5, threshold=8.0, **quiet)(image), transform(strength=1, threshold=4.0, **quiet)(image)
    )


def test_low_precision_and_autocast_have_no_say() -> None:
    coarse = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5).half()
    torch.testing.assert_close(estimate(coarse), estimate(coarse.float()).half())
    image = smooth().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = estimate(image)
    assert torch.equal(found, estimate(image))


def test_it_can_be_compiled() -> None:
    image = smooth()
    assert torch.equal(torch.compile(estimate, backend="eager")(image), estimate(image))
