"""PixelDefend: the density against its definition, the decoding against a loop in raster order."""

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from oag_transform.baselines.pixeldefend import (
    Mixture,
    PixelCNN,
    PixelDefend,
    bits_per_dim,
    fit_pixelcnn,
    load_pixelcnn,
    save_pixelcnn,
)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=Generator().manual_seed(seed)).to(torch.uint8)


def model(channels: int = 3, radius: int = 1, **overrides: Any) -> PixelCNN:
    """Random weights, the linear part of the means (zero at first) included."""
    net = PixelCNN(channels, radius=radius, **({"hidden": 16, "layers": 1, "components": 3, "seed": 1} | overrides))
    net = net.double().requires_grad_(False)
    g = Generator().manual_seed(2)
    for name, weight in net.named_parameters():
        if name.startswith("predictors"):
            weight.normal_(0, 0.05, generator=g)
    return net


@pytest.mark.parametrize(("channels", "radius"), [(3, 1), (3, 2), (1, 2)])
def test_a_value_changes_the_density_of_just_those_after_it_in_its_window(channels: int, radius: int) -> None:
    net, original = model(channels, radius), images(1, channels, 5, 6)
    before = net(original)[0]
    for c, i, j in itertools.product(range(channels), range(5), range(6)):
        changed = original.clone()
        changed[0, c, i, j] = (int(original[0, c, i, j]) + 100) % 256
        differs = net(changed)[0] != before
        for c2, i2, j2 in itertools.product(range(channels), range(5), range(6)):
            above = i < i2 <= i + radius and abs(j - j2) <= radius
            left = i == i2 and j < j2 <= j + radius
            here = (i, j) == (i2, j2) and c <= c2
            assert differs[c2, i2, j2] == (above or left or here), ((c, i, j), (c2, i2, j2))


@pytest.mark.parametrize("at", [(0, 0, 0), (1, 2, 3), (2, 4, 0)])
def test_probabilities_of_256_values_sum_to_one(at: tuple[int, int, int]) -> None:
    batch = images(1, 3, 5, 6).repeat(256, 1, 1, 1)
    batch[(slice(None), *at)] = torch.arange(256).to(torch.uint8)
    total = model()(batch)[(slice(None), *at)].exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


@given(st.floats(-50, 300), st.floats(-2, 4), st.floats(0.01, 0.99))
def test_mixture_is_the_mass_of_the_logistics_in_each_bin(mean: float, log_scale: float, weight: float) -> None:
    """Against differences of distribution functions, wherever these are not lost to rounding."""
    means = torch.tensor([mean, 128.0], dtype=torch.float64)
    log_scales = torch.tensor([log_scale, 2.0], dtype=torch.float64)
    weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
    levels = torch.arange(256, dtype=torch.float64)
    edges = torch.cat([torch.tensor([-math.inf]), levels[:-1] + 0.5, torch.tensor([math.inf])])
    mass = torch.special.expit((edges[:, None] - means) / log_scales.exp()).diff(dim=0) @ weights
    actual = Mixture(weights.log(), means, log_scales).log_prob(levels)
    torch.testing.assert_close(actual.exp(), mass, rtol=1e-9, atol=1e-14)
    assert actual.isfinite().all()


def raster_order(net: PixelCNN, image: Tensor, epsilon: int) -> Tensor:
    """Algorithm 1 of PixelDefend as it stands: the whole network for each value."""
    result = image.clone()
    for i, j, c in itertools.product(range(image.shape[1]), range(image.shape[2]), range(image.shape[0])):
        x = int(image[c, i, j])
        window = torch.arange(max(0, x - epsilon), min(255, x + epsilon) + 1)
        tried = result.repeat(len(window), 1, 1, 1)
        tried[:, c, i, j] = window.to(torch.uint8)
        result[c, i, j] = int(window[net(tried)[:, c, i, j].argmax()])
    return result


@pytest.mark.parametrize(
    ("shape", "radius", "epsilon"),
    [((2, 3, 6, 7), 1, 16), ((1, 3, 6, 7), 2, 5), ((1, 1, 7, 6), 2, 40), ((1, 3, 5, 1), 2, 16), ((1, 3, 1, 4), 1, 255)],
)
def test_decoding_is_the_loop_in_raster_order(shape: tuple[int, ...], radius: int, epsilon: int) -> None:
    batch, net = images(*shape), model(shape[1], radius)
    purified = PixelDefend(net, epsilon)(batch / 255)
    expected = torch.stack([raster_order(net, image, epsilon) for image in batch])
    assert not torch.equal(expected, batch)
    assert torch.equal(purified, (expected.double() / 255).float())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 255), st.integers(0, 100), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_moves_no_value_by_more_than_epsilon(epsilon: int, seed: int, dtype: torch.dtype) -> None:
    batch = torch.rand(2, 3, 4, 5, generator=Generator().manual_seed(seed)).to(dtype)
    given_images = batch.clone()
    purified = PixelDefend(model(), epsilon)(batch, index=seed)
    assert torch.equal(batch, given_images)
    assert (purified.dtype, purified.shape) == (dtype, batch.shape)
    assert 0 <= purified.min() <= purified.max() <= 1
    eight_bit = (batch.double() * 255).round()
    assert ((purified.double() * 255).round() - eight_bit).abs().max() <= epsilon


def test_epsilon_zero_gives_the_image_in_8_bits() -> None:
    batch = torch.rand(2, 3, 4, 5, generator=Generator().manual_seed(0))
    assert torch.equal(PixelDefend(model(), 0)(batch), (batch * 255).round() / 255)


def test_an_image_alone_is_the_image_in_a_batch() -> None:
    batch, defense = images(19, 3, 6, 7) / 255, PixelDefend(model())  # more than are purified together
    together = defense(batch)
    assert torch.equal(together, torch.cat([defense(image[None]) for image in batch]))
    assert defense(batch[:0]).shape == (0, 3, 6, 7)


def test_no_gradient_and_the_model_is_unchanged() -> None:
    net = model().float().requires_grad_()
    defense = PixelDefend(net)
    assert not defense(torch.rand(1, 3, 4, 4, generator=Generator().manual_seed(0)).requires_grad_()).requires_grad
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())
    assert net(images(1, 3, 4, 4)).requires_grad


def waves(n: int, channels: int = 3) -> Tensor:
    """Smooth images, of few bits."""
    g = Generator().manual_seed(3)
    phase, rate = torch.rand(n, channels, 1, 1, generator=g) * 6, torch.rand(n, 1, 1, 1, generator=g)
    row, column = torch.arange(20.0)[:, None], torch.arange(24.0)
    return (127.5 + 100 * torch.sin(phase + rate * (row + column / 2) / 3)).round().to(torch.uint8)


def fit(data: Tensor, **overrides: Any) -> PixelCNN:
    return fit_pixelcnn(data, **({"radius": 1, "hidden": 24, "components": 2, "steps": 150, "batch": 128} | overrides))


def test_fit_learns_and_repeats_and_leaves_global_random_state_alone(caplog: pytest.LogCaptureFixture) -> None:
    data = waves(12)
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO):
        first, again, other = fit(data[:10]), fit(data[:10]), fit(data[:10], seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bits_per_dim(first, data[10:]) < 5  # 8 is a uniform distribution
    assert repr(first) == repr(again) != repr(other)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "step 150 of 150" in caplog.text


def test_fit_takes_floating_point_and_grey_images() -> None:
    data = waves(4, channels=1)
    assert repr(fit(data, steps=3)) == repr(fit(data / 255, steps=3))


def test_bits_per_dim_is_the_mean_of_minus_log2() -> None:
    batch, net = images(2, 3, 4, 5), model()
    assert bits_per_dim(net, batch) == pytest.approx(float(-net(batch).exp().log2().mean()), rel=1e-12)


def test_save_and_load(tmp_path: Path) -> None:
    batch, net = images(1, 3, 4, 5), model(radius=2, layers=3)
    save_pixelcnn(net, tmp_path / "model.pt")
    loaded = load_pixelcnn(tmp_path / "model.pt")
    assert repr(loaded) == repr(net)
    assert torch.equal(loaded(batch), net(batch))


@pytest.mark.parametrize("content", [b"", b"no model at all", {"a": 1}, [1.0], torch.nn.Linear(1, 1)])
def test_load_refuses_other_files(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"save_pixelcnn.*other\.pt"):
        load_pixelcnn(path)
    with pytest.raises(FileNotFoundError):
        load_pixelcnn(tmp_path / "missing.pt")


def test_repr_has_the_bound_the_settings_and_the_weights() -> None:
    net = model()
    text = repr(PixelDefend(net, 12))
    for part in ("epsilon=12", "channels=3", "radius=1", "hidden=16", "layers=1", "components=3", "weights="):
        assert part in text
    next(net.parameters()).view(-1)[0] += 1
    assert repr(PixelDefend(net, 12)) != text


def test_numpys_numbers_are_numbers(tmp_path: Path) -> None:
    net = PixelCNN(np.int64(1), radius=np.int32(2), hidden=np.int64(8), seed=np.uint8(3))  # type: ignore[arg-type]
    assert repr(net) == repr(PixelCNN(1, radius=2, hidden=8, seed=3))
    save_pixelcnn(net, tmp_path / "model.pt")
    assert repr(load_pixelcnn(tmp_path / "model.pt")) == repr(net)
    assert PixelDefend(net, np.int64(4)).epsilon == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"channels must be one of \(1, 3\), got 2", lambda: PixelCNN(2)),
        (ValueError, "radius must be an integer >= 1, got 0", lambda: PixelCNN(radius=0)),
        (ValueError, "hidden must be an integer >= 1, got 1.5", lambda: PixelCNN(hidden=1.5)),  # type: ignore[arg-type]
        (TypeError, "model must be a PixelCNN, got Linear", lambda: PixelDefend(torch.nn.Linear(1, 1))),  # type: ignore[arg-type]
        (ValueError, "epsilon must be an integer from 0 to 255, got -1", lambda: PixelDefend(model(), -1)),
        (ValueError, "epsilon must be an integer from 0 to 255, got 256", lambda: PixelDefend(model(), 256)),
        (ValueError, "epsilon must be an integer from 0 to 255, got 0.06", lambda: PixelDefend(model(), 0.06)),  # type: ignore[arg-type]
        (ValueError, r"\(N, C, H, W\), got \(3, 4, 4\)", lambda: PixelDefend(model())(torch.zeros(3, 4, 4))),
        (ValueError, r"1 channel\(s\).*\(2, 3, 4, 4\)", lambda: PixelDefend(model(1))(torch.zeros(2, 3, 4, 4))),
        (ValueError, r"in \[0, 1\]", lambda: PixelDefend(model())(torch.full((1, 3, 4, 4), 2.0))),
        (TypeError, "floating-point tensor, got torch.uint8", lambda: PixelDefend(model())(images(1, 3, 4, 4))),
        (ValueError, "index must be .*, got -1", lambda: PixelDefend(model())(torch.zeros(1, 3, 4, 4), index=-1)),
        (ValueError, "seed must be an integer >= 0, got -1", lambda: fit(waves(1), seed=-1)),
        (
            TypeError,
            "expected a dense tensor with values",
            lambda: model()(torch.zeros(1, 3, 4, 4, device="meta", dtype=torch.uint8)),
        ),
        (ValueError, "steps must be an integer >= 1, got 0", lambda: fit(waves(1), steps=0)),
        (ValueError, "lr must be a finite number > 0, got nan", lambda: fit(waves(1), lr=math.nan)),
        (ValueError, "at least one image", lambda: fit(waves(1)[:0])),
        (ValueError, r"\(N, C, H, W\)", lambda: fit(waves(1)[0])),
        (RuntimeError, "diverged by step 3; lower lr", lambda: fit(waves(1), steps=30, lr=1e30)),
    ],
)
def test_errors(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float])
def test_it_stays_in_float64_whatever_a_model_is_cast_to(cast: Any) -> None:
    defense, batch = PixelDefend(model(), 16), images(2, 3, 6, 7) / 255
    expected = defense(batch)
    assert torch.equal(cast(torch.nn.Sequential(defense))[0](batch), expected)


def test_the_density_is_that_without_the_callers_autocast() -> None:
    net = model().float()
    expected = net(images(1, 3, 6, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images(1, 3, 6, 7)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_has_no_say_in_the_training(dtype: torch.dtype) -> None:
    def fitted() -> PixelCNN:
        return fit_pixelcnn(images(2, 3, 8, 8), radius=1, hidden=8, layers=1, components=2, steps=2, batch=4)

    expected = fitted().state_dict()
    torch.set_default_dtype(dtype)
    try:
        actual = fitted().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
