"""A complete run: the paper's setting, the trace, and diverging images."""

import dataclasses
import importlib.util
import itertools
import logging
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from oag_transform import DivergenceError, OnlineAlternateGenerator
from oag_transform.generator import run
from oag_transform.generator.energy import slow_down
from oag_transform.generator.run import _multiplies_bfloat16 as multiplies_bfloat16
from oag_transform.generator.run import prepare, trajectory
from oag_transform.images import IMAGENET_MEAN, to_pixels
from tests.sample_images import sample_images, synthetic_image

either = pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)  # what a CPU may choose


def test_paper_holds_the_papers_values() -> None:
    settings = OnlineAlternateGenerator.paper().settings
    assert (settings.network_steps, settings.image_steps, settings.kernel_size) == (300, 20, 15)
    assert (settings.init, settings.langevin, settings.threshold, settings.strength) == ("uniform", "exact", 0, 1)
    assert OnlineAlternateGenerator.paper(network_steps=600).settings == dataclasses.replace(settings, network_steps=600)


@pytest.mark.parametrize(
    ("std", "side", "scale"),
    [(0.05, 224, 5.0), (0.25, 224, 14.0), (0.5, 128, 14.0), (0.25, 32, 3.0), (0.02, 32, 2.0), (0.25, 64, 8.5)],
)
def test_for_noise_sets_threshold_and_scale_by_the_size(std: float, side: int, scale: float) -> None:
    """A contrast of 2.25 standard deviations of the noise, in units of ``scale``; kernels are those of the size."""
    purify = OnlineAlternateGenerator.for_noise(std, seed=3)
    found, default = purify.settings_for(side, side + 9), OnlineAlternateGenerator().settings_for(side, side)
    assert (found.strength, purify.seed) == (1.0, 3)
    assert found.scale == pytest.approx(scale)
    assert found.threshold == pytest.approx(2.25 * 255 * std / scale)
    kept = ("network_steps", "kernel_size", "stride", "filters")
    assert [getattr(found, name) for name in kept] == [getattr(default, name) for name in kept]


def test_for_noise_gives_way_to_explicit_arguments() -> None:
    purify = OnlineAlternateGenerator.for_noise(0.25, threshold=4, strength=0.5)
    assert purify.noise_std == 0.25
    found = purify.settings_for(32, 32)
    assert (found.threshold, found.strength, found.scale) == (4, 0.5, 3.0)
    for wrong in (0, 25):  # 25 grey levels are 25 / 255
        with pytest.raises(ValueError, match=f"noise_std must be a finite number >= 0.0001 and <= 1, got {wrong}"):
            OnlineAlternateGenerator.for_noise(wrong)


def test_a_known_noise_has_nothing_to_set_where_all_is_given() -> None:
    with pytest.raises(ValueError, match="noise_std sets threshold, scale and strength, and all three are given"):
        OnlineAlternateGenerator(noise_std=0.25, threshold=4, scale=6, strength=0.5)


@either
def test_for_noise_takes_most_of_the_noise_away(compute_dtype: torch.dtype) -> None:
    clean = sample_images()[:1]
    noisy = (clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    denoised = OnlineAlternateGenerator.for_noise(0.25, seed=0, compute_dtype=compute_dtype)(noisy)
    assert (denoised - clean).square().mean() < 0.3 * (noisy - clean).square().mean()


def small(**overrides: object) -> OnlineAlternateGenerator:
    arguments = {"network_steps": 12, "filters": 16, "seed": 0} | overrides
    return OnlineAlternateGenerator(**arguments)  # type: ignore[arg-type]


@either
def test_more_network_steps_come_closer_to_the_reference(compute_dtype: torch.dtype) -> None:
    image = synthetic_image(3, 60, 60).float()
    purify = small(network_steps=20, kernel_size=9, stride=3, threshold=7.5, compute_dtype=compute_dtype)
    residuals = [moment.residual.item() for moment in purify.trace(image, every=4)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.6 * residuals[0]


def faster(factor: float, **overrides: object) -> OnlineAlternateGenerator:
    rates = small().settings
    return small(conv_lr=rates.conv_lr * factor, fc_lr=rates.fc_lr * factor, **overrides)


def least_diverging(image: Tensor, compute_dtype: torch.dtype) -> int:
    """The smallest power of two by which the rates are too large for this image."""
    return next(f for f in (2**k for k in range(1, 30)) if _diverges(image, faster(f, compute_dtype=compute_dtype)))


@either
def test_diverging_image_is_redone_at_smaller_rates(compute_dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    image = synthetic_image(3, 40, 40).float()
    factor = least_diverging(image, compute_dtype)
    with caplog.at_level(logging.INFO, logger="oag_transform"):
        redone = faster(factor, compute_dtype=compute_dtype)(image)
    assert "diverged" in caplog.text
    assert torch.equal(redone, faster(factor / 4, compute_dtype=compute_dtype)(image))


def test_an_image_of_a_batch_is_redone_with_its_own_stream_and_strength(caplog: pytest.LogCaptureFixture) -> None:
    image = synthetic_image(3, 40, 40).float()
    quiet = torch.tensor(IMAGENET_MEAN)[:, None, None].expand(3, 40, 40) / 255
    factor = least_diverging(image, torch.float32)
    purify = faster(factor, compute_dtype=torch.float32, chunk_size=2)
    with caplog.at_level(logging.INFO, logger="oag_transform"):
        redone = purify(torch.stack([quiet, image]), index=[1, 0])[1]
    assert "images [0] diverged" in caplog.text  # the streams of those that did: the quiet one holds
    expected = faster(factor / 4, compute_dtype=torch.float32)(image)
    torch.testing.assert_close(redone, expected, rtol=0, atol=1e-4)  # strengths differ by rounding


def _diverges(image: Tensor, purify: OnlineAlternateGenerator) -> bool:
    try:
        for _ in purify.trace(image, every=12):
            pass
    except DivergenceError:
        return True
    return False


def test_hopeless_rates_raise_and_name_the_image_or_return_the_input() -> None:
    images = torch.stack(
        [synthetic_image(3, 30, 30).float(), torch.tensor(IMAGENET_MEAN)[:, None, None].expand(3, 30, 30) / 255]
    )
    hopeless = {"conv_lr": 1e6, "fc_lr": 1e6, "chunk_size": 2}
    with pytest.raises(DivergenceError, match=r"image\(s\) \[0, 1\]"):
        small(**hopeless)(images)
    with pytest.warns(UserWarning, match="returning the input unpurified") as caught:
        returned = small(**hopeless, on_failure="return_input")(images)
    assert torch.equal(returned, images)
    assert caught[0].filename == __file__  # the line of the caller
    with pytest.warns(UserWarning, match="returning the input unpurified") as caught:
        small(**hopeless, on_failure="return_input")((255 * images).byte())
    assert caught[0].filename == __file__


def test_one_diverging_image_leaves_the_others_alone() -> None:
    """A striped image at a rate that only a quiet one stands: the quiet one is what it is alone, the striped one is named."""
    quiet = 0.47 + 0.01 * synthetic_image(3, 30, 30).float()
    striped = (torch.arange(30) % 6 < 3).float().expand(3, 30, 30)
    high: dict[str, object] = {"fc_lr": 0.3, "conv_lr": 0.01, "adaptive_lr": False, "strength": 1.0, "threshold": 0.0}
    high |= {"chunk_size": 2, "compute_dtype": torch.float32}  # in bfloat16 the quiet one diverges, too
    images = torch.stack([quiet, striped])
    with pytest.warns(UserWarning, match=r"image\(s\) \[1\] of the batch"):
        together = small(**high, on_failure="return_input")(images)
    assert torch.equal(together[1], striped)
    alone = small(**high)(quiet)
    assert not torch.equal(alone, quiet)
    torch.testing.assert_close(together[0], alone, rtol=0, atol=1e-4)
    with pytest.raises(DivergenceError) as caught:
        small(**high)(images)
    assert caught.value.indices == [1]
    assert pickle.loads(pickle.dumps(caught.value)).indices == [1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_snapshot_is_a_snapshot(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton" and (os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None):
        pytest.skip("on CUDA, or a PyTorch without Triton")
    purify = small(network_steps=3, backend=backend)
    pixels = synthetic_image(1, 3, 20, 20).float()
    s = purify.settings_for(20, 20)
    states = list(trajectory(prepare(pixels, s, 0, [0]), every=1))
    assert [state.step for state in states] == [1, 2, 3]
    for one, other in itertools.pairwise(states):
        assert not torch.equal(one.images, other.images)
        assert not torch.equal(one.theta.fc, other.theta.fc)
        assert not torch.equal(one.theta.weight, other.theta.weight)
        assert torch.equal(one.reference, other.reference)
    for state, moment in zip(states, purify.trace(pixels), strict=True):
        torch.testing.assert_close(to_pixels(state.images, s.scale), moment.images)


def test_trace_ends_with_what_forward_returns() -> None:
    images = synthetic_image(2, 3, 30, 33).float()
    transform = small()
    trace = list(transform.trace(images, every=5, index=4))
    assert [moment.step for moment in trace] == [5, 10, 12]
    assert torch.equal(trace[-1].images, transform(images, index=4))
    residual = 255 * (trace[-1].images - images).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(trace[-1].residual, residual, rtol=0.05, atol=0)  # pixels are clipped, the residual isn't
    assert trace[0].energy.shape == trace[0].reference_energy.shape == (2,)
    # Eq. 5 lowers the energy of the reference relative to the synthesised image's
    assert (trace[-1].reference_energy < trace[-1].energy).all()


def test_trace_leaves_the_callers_modes_alone() -> None:
    for _ in small(network_steps=2).trace(synthetic_image(3, 20, 20)):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_operands_make_the_same_image_but_for_their_rounding() -> None:
    image = synthetic_image(3, 60, 66).float()
    full, half = (list(small(compute_dtype=dtype).trace(image, every=6)) for dtype in (torch.float32, torch.bfloat16))
    assert half[-1].images.dtype == torch.float32
    for a, b in zip(full, half, strict=True):
        difference = 255 * (a.images - b.images).square().mean().sqrt()
        assert 0 < difference < 0.1 * a.residual.item()


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_used_where_the_cpu_is_faster_and_repr_shows_it(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_multiplies_bfloat16", lambda: fast)
    image = synthetic_image(3, 30, 33).float()
    chosen, other = (torch.bfloat16, torch.float32) if fast else (torch.float32, torch.bfloat16)
    purified = small()(image)
    assert torch.equal(purified, small(compute_dtype=chosen)(image))
    assert not torch.equal(purified, small(compute_dtype=other)(image))
    assert f"# compute_dtype on this CPU: {chosen}" in repr(small())
    assert repr(eval(repr(small()), {"OnlineAlternateGenerator": OnlineAlternateGenerator, "torch": torch})) == repr(small())
    assert "on this CPU" not in repr(small(compute_dtype=chosen))
    double = image.double()
    assert torch.equal(small()(double), small(backend="torch")(double))
    s = small().settings
    assert run.operands(s, torch.device("cpu"), torch.float64) == torch.float64
    assert run.operands(s, torch.device("cuda"), torch.float32) == torch.float32


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, False),  # a CPU that doesn't tell its name
        ({"architecture": "aarch64", "bf16": True}, False),
    ],
    ids=str,
)
def test_bfloat16_is_faster_with_amx_and_on_amd(
    capabilities: dict[str, object], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16() is faster


@pytest.mark.parametrize("amx", [True, False])
def test_an_older_pytorch_is_asked_for_amx(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(_is_amx_tile_supported=lambda: amx))  # PyTorch 2.6
    assert multiplies_bfloat16() is amx


def test_slow_down_halves_the_rates_of_those_whose_residual_rose() -> None:
    lr_factor, best = torch.ones(3), torch.full((3,), torch.inf)
    for residual, expected_factor, expected_best in [
        ([4.0, 4.0, 4.0], [1, 1, 1], [4, 4, 4]),
        ([3.0, 4.1, 4.3], [1, 1, 0.5], [3, 4, 4.3]),  # 2.5% up is noise, 7.5% isn't
        ([3.2, 4.1, 4.4], [0.5, 1, 0.5], [3.2, 4, 4.3]),
    ]:
        lr_factor, best = slow_down(lr_factor, best, torch.tensor(residual))
        torch.testing.assert_close(lr_factor, torch.tensor(expected_factor, dtype=torch.float32))
        torch.testing.assert_close(best, torch.tensor(expected_best, dtype=torch.float32))


def extremes(size: int = 96) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return {
        "black": torch.zeros(3, size, size),
        "white": torch.ones(3, size, size),
        "mean colour": torch.tensor(IMAGENET_MEAN)[:, None, None].expand(3, size, size) / 255,
        "checkerboard": ((rows // 12 + columns // 12) % 2).float().expand(3, -1, -1),
        "fine checkerboard": ((rows + columns) % 2).float().expand(3, -1, -1),
        "edge": (columns > size // 2).float().expand(3, -1, -1),
        "noise": torch.rand(3, size, size, generator=generator),
        "binary noise": torch.rand(3, size, size, generator=generator).round(),
        "red": torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, size, size),
    }


@either
@pytest.mark.parametrize("name", extremes())
def test_default_rates_hold_on_extreme_images(name: str, compute_dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    image, purify = extremes()[name], OnlineAlternateGenerator(seed=0, compute_dtype=compute_dtype)
    with caplog.at_level(logging.INFO, logger="oag_transform"):
        residuals = [moment.residual.item() for moment in purify.trace(image, every=4)]
        purify(image)
    assert "diverged" not in caplog.text
    assert residuals[-1] <= 1.1 * min(residuals)


def test_for_noise_keeps_its_contrast_at_an_explicit_scale() -> None:
    found = OnlineAlternateGenerator.for_noise(0.25, scale=4).settings_for(224, 224)
    assert found.scale == 4
    assert found.threshold == pytest.approx(2.25 * 255 * 0.25 / 4)


def test_a_trace_begun_in_inference_mode_goes_on_outside_of_it() -> None:
    purify = OnlineAlternateGenerator(network_steps=3, filters=4, seed=0, compute_dtype=torch.float32)
    image = sample_images()[:1, :, :24, :24]
    with torch.inference_mode():
        moments = purify.trace(image)
        first = next(moments)
    rest = [moment.images for moment in moments]
    expected = [moment.images for moment in purify.trace(image)]
    assert all(torch.equal(*pair) for pair in zip([first.images, *rest], expected, strict=True))
