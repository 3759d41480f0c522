"""The default: a golden test against unintended changes, and a test of each constant by its purpose.

The golden figures are for two images that come with scikit-image; ``pytest tests/test_default.py`` prints what differs.
``python -m benchmarks.detail`` measures the same quantities on other images.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model

from oag_transform import DefendedModel, OnlineAlternateGenerator, noise_level, streams
from oag_transform.generator import energy, reference
from oag_transform.generator.run import diverged, prepare, trajectory
from oag_transform.generator.settings import Settings
from oag_transform.generator.state import Inputs, State, begin
from oag_transform.images import to_model_units, to_pixels
from tests.sample_images import sample_images, synthetic_image

# with compute_dtype=torch.float32; AVX2 and AVX512 kernels give the same five digits
PSNR = (33.433, 33.729)  # of the mode, which has no Langevin noise, to the clean image, in dB
FULL_PSNR = (31.474, 30.827)  # with strength=1
SHARE = (0.0519, 0.0573)  # of white noise of 6 grey levels that comes through
STRENGTH = (0.493, 0.366)
GREY_ESTIMATE = (0.772, 0.541)  # of the images in grey, in grey levels


def noise() -> Tensor:
    return 6 / 255 * torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def modes(images: Tensor, purify: OnlineAlternateGenerator) -> Tensor:
    """The modes of the synthesised images, (N, 3, H, W) in [0, 1]."""
    s, found = purify.settings_for(*images.shape[-2:]), []
    for i, image in enumerate(images.split(1)):
        (state,) = trajectory(prepare(image, s, 0, [i]), every=s.network_steps)
        found.append(to_pixels(state.mode, s.scale))
    return torch.cat(found)


def psnr(one: Tensor, other: Tensor) -> list[float]:
    return (-10 * (one - other).square().mean((1, 2, 3)).log10()).tolist()


def test_golden_what_the_default_keeps_and_what_it_lets_through() -> None:
    clean, purify = sample_images(), OnlineAlternateGenerator(compute_dtype=torch.float32)
    kept, full = modes(clean, purify), modes(clean, OnlineAlternateGenerator(strength=1, compute_dtype=torch.float32))
    assert psnr(kept, clean) == pytest.approx(PSNR, abs=0.05)
    assert psnr(full, clean) == pytest.approx(FULL_PSNR, abs=0.05)
    through = modes((clean + noise()).clamp(0, 1), purify) - kept
    share = (through * noise()).sum((1, 2, 3)) / noise().square().sum((1, 2, 3))
    assert share.tolist() == pytest.approx(SHARE, abs=0.002)


def test_bfloat16_operands_change_the_mode_by_less_than_their_rounding() -> None:
    """The two operands of a product round by at most 2^-8 each: the mode changes by at most 2^-7 of the image's RMS."""
    clean = sample_images()
    full, half = (modes(clean, OnlineAlternateGenerator(compute_dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    scale = OnlineAlternateGenerator().settings_for(224, 224).scale
    rms = scale / 255 * to_model_units(clean, scale).square().mean((1, 2, 3)).sqrt()  # around the mean colour
    change = (full - half).square().mean((1, 2, 3)).sqrt()
    assert (change > 0).all()
    assert (change <= 2**-7 * rms).all()


def test_golden_strength_and_estimate() -> None:
    assert noise_level.matching_strength(sample_images()).tolist() == pytest.approx(STRENGTH, abs=0.002)
    grey = sample_images().mean(1, keepdim=True)
    assert noise_level.estimate(grey).tolist() == pytest.approx(GREY_ESTIMATE, abs=0.002)


def test_an_image_without_noise_gets_a_quarter_and_full_strength_begins_at_2_6_grey_levels() -> None:
    flat = torch.full((1, 3, 192, 192), 0.5, dtype=torch.float64)
    normal = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = {0.0: 0.25, 1.3: 0.5, 2.6: 1.0, 5.2: 1.0}
    for level, expected in levels.items():
        assert noise_level.matching_strength(flat + level / 255 * normal).item() == pytest.approx(expected, rel=0.03)
    assert noise_level.matching_strength(flat + 2.0 / 255 * normal).item() < 0.85


def test_noise_in_brightness_counts_a_third_of_its_smoothest_tenth_of_blocks() -> None:
    """Blocks of 16 x 16 pixels with more and more noise: the estimate is a third of the square root of the tenth percentile."""
    blocks, generator = 20, torch.Generator().manual_seed(0)
    levels = torch.linspace(2, 22, blocks**2, dtype=torch.float64)  # in order: a block's neighbours reach into it
    spread = levels.view(blocks, blocks).repeat_interleave(16, 0).repeat_interleave(16, 1)
    normal = torch.randn(1, 1, 16 * blocks, 16 * blocks, generator=generator, dtype=torch.float64)
    expected = math.sqrt(3) * (2 + 20 * 0.1) / 3
    assert noise_level.estimate(0.5 + spread / 255 * normal).item() == pytest.approx(expected, rel=0.05)


def test_gabor_functions_are_half_as_fine_in_hue_and_as_wide_as_half_their_period() -> None:
    """Frequency from the spacing of zero crossings and width from the envelope, of kernels long enough for both."""
    size, filters = 31, 400
    generator = torch.Generator().manual_seed(0)
    kernels = energy.gabor_kernels([generator], filters, 3, size, torch.float64)[0, filters // 10 :]
    spectrum = torch.fft.fftshift(torch.fft.fft2(kernels, s=(128, 128)).abs().square().sum(1), dim=(-2, -1))
    axis = torch.arange(-64, 64, dtype=torch.float64) / 128
    radius = (axis[:, None].square() + axis.square()).sqrt()
    power = spectrum / spectrum.sum((-2, -1), keepdim=True)
    frequency = (power * radius).sum((-2, -1))
    grey = kernels.sum(1).square().sum((-2, -1)) > 0.5 * kernels.square().sum((1, 2, 3))
    # the logarithm is uniform from 1 / K to 0.45 cycles a pixel, or half of both: the medians are half an octave apart each way
    middle = math.exp((math.log(1 / size) + math.log(0.45)) / 2)
    assert frequency[grey].median().item() == pytest.approx(middle, rel=0.2)
    assert frequency[~grey].median().item() == pytest.approx(middle / 2, rel=0.35)
    assert frequency[~grey].max() < 0.27
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    away = place[:, None].square() + place.square()
    weight = kernels.square().sum(1)
    width = (
        (weight * away).sum((-2, -1)) / weight.sum((-2, -1))
    ).sqrt()  # sigma of the Gaussian, squared and in two dimensions
    fine = (frequency > 0.15) & grey  # those whose window is not cut off
    assert (width[fine] * frequency[fine]).median().item() == pytest.approx(0.5, rel=0.1)


def test_the_limit_of_divergence_is_twice_the_residual_without_content() -> None:
    settings = Settings(filters=4)
    start, _ = begin(Inputs(synthetic_image(3, 30, 30)[None], settings, torch.ones(1), 0, [0]))
    limit = 2 * (start.reference.square().mean() + 1 / (1 - settings.step_size**2 / 4))

    def off_by(mean_square: Tensor) -> State:
        pair = start.pair.clone()
        pair[1:] = pair[:1] + mean_square.sqrt()
        return start._replace(pair=pair)

    assert not diverged(off_by(0.98 * limit), settings).any()
    assert diverged(off_by(1.02 * limit), settings).all()


def test_the_rate_of_w_is_half_of_what_the_curvature_allows() -> None:
    """A rate that is always at its limit, against the plain reference, which has its own half."""
    image, purify = synthetic_image(3, 24, 27), OnlineAlternateGenerator(filters=16, conv_lr=1.0, seed=0)
    assert energy.STABLE == 0.5
    expected = reference.purify(image, purify.settings_for(24, 27), seed=0, index=0)
    torch.testing.assert_close(purify(image), expected, rtol=0, atol=1e-9)


def test_noise_on_images_is_independent_of_a_defense_with_the_same_seed() -> None:
    cpu = torch.device("cpu")
    drawn = [
        streams.fill_normal(torch.empty(3, 1000, dtype=torch.float64), make(7, range(3), cpu))
        for make in (streams.generators, streams.noise_generators)
    ]
    for one, other in zip(*drawn, strict=True):
        assert not torch.equal(one, other)
        assert abs(float(np.corrcoef(one, other)[0, 1])) < 5 / math.sqrt(1000)


def test_from_torchvision_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def random_weights(*_: object, **__: object) -> dict[str, Tensor]:
        return get_model("squeezenet1_1", weights=None).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    defense = nn.Identity()
    model = DefendedModel.from_torchvision("squeezenet1_1", defense, samples=3, shift=7, gradient="own")
    assert (model.defense, model.samples, model.shift, model.gradient) == (defense, 3, 7, "own")
