"""The defenses trained on each image, against PyTorch's own layers and optimisers."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from oag_transform.baselines.per_image import (
    DeepImagePrior,
    OnlineAutoencoder,
    Weights,
    autoencode,
    initial_weights,
    initialise,
    skip_network,
)
from oag_transform.images import to_model_units
from oag_transform.streams import generators
from tests.sample_images import rand

Defense = DeepImagePrior | OnlineAutoencoder
CPU = torch.device("cpu")


def prior(**overrides: Any) -> DeepImagePrior:
    network: dict[str, Any] = {"channels": (4, 3), "skip_channels": (2, 0), "input_channels": 2}
    arguments = network | {"steps": 2, "input_noise": 0.01, "seed": 0}
    return DeepImagePrior(**(arguments | overrides))


def autoencoder(**overrides: Any) -> OnlineAutoencoder:
    return OnlineAutoencoder(**({"steps": 2, "kernel_size": 7, "filters": 4, "seed": 0} | overrides))


both = pytest.mark.parametrize("make", [prior, autoencoder])


def smooth(height: int, width: int) -> Tensor:
    """A smooth colour image (1, 3, height, width) in [0.2, 0.8]."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    waves = [torch.sin(3 * x + 2 * y), torch.cos(4 * y - x), torch.sin(5 * x * y)]
    return (0.5 + 0.3 * torch.stack(waves))[None]


def noisy(image: Tensor) -> Tensor:
    noise = torch.randn(image.shape, generator=Generator().manual_seed(1))
    return (image + 0.1 * noise).clamp(0, 1)


def error(a: Tensor, b: Tensor) -> float:
    return F.mse_loss(a, b).item()


# the hourglass


def test_the_authors_denoising_network_has_as_many_weights_as_counted_by_hand() -> None:
    block = 128 * 129 + 2 * 128  # the 1 x 1 block of a merge, with its normalisation
    shared = 9 * 128 * 128 + 128 + 2 * 128 + 2 * 132 + 9 * 132 * 128 + 128 + 2 * 128 + block
    first = 9 * 32 * 128 + 128 + 2 * 128 + 33 * 4 + 2 * 4
    others = 9 * 128 * 128 + 128 + 2 * 128 + 129 * 4 + 2 * 4
    expected = 5 * shared + first + 4 * others + 129 * 3
    assert sum(p.numel() for p in skip_network(32, 3, (128,) * 5, (4,) * 5).parameters()) == expected


def reference_hourglass(z: Tensor, state: dict[str, Tensor], skips: tuple[int, ...]) -> Tensor:
    """The hourglass from functional pieces, recursion unrolled, instance for batch normalisation."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.instance_norm(x, weight=state[f"{name}.weight"], bias=state[f"{name}.bias"])

    def block(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.0.weight"]
        padded = F.pad(x, (weight.shape[-1] // 2,) * 4, mode="reflect")
        return F.leaky_relu(norm(F.conv2d(padded, weight, state[f"{name}.0.bias"], stride), f"{name}.1"), 0.2)

    scales = ["0" + ".coarser" * level for level in range(len(skips))]
    inputs, x = [], z
    for scale in scales:
        inputs.append(x)
        x = block(block(x, f"{scale}.down.0", 2), f"{scale}.down.1")
    for scale, skip, before in zip(reversed(scales), reversed(skips), reversed(inputs), strict=True):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = torch.cat([block(before, f"{scale}.skip"), x], 1) if skip else x
        x = block(block(norm(x, f"{scale}.merge.0"), f"{scale}.merge.1"), f"{scale}.merge.2")
    return torch.sigmoid(F.conv2d(x, state["1.weight"], state["1.bias"]))


@pytest.mark.parametrize("skips", [(2, 2, 2), (0, 0, 3), (0, 0, 0)])
def test_hourglass_equals_its_functional_pieces(skips: tuple[int, ...]) -> None:
    network = skip_network(2, 3, (4, 3, 5), skips)
    initialise(network, Generator().manual_seed(0), torch.float64)
    z = rand(1, 2, 16, 24, dtype=torch.float64)
    expected = reference_hourglass(z, dict(network.state_dict()), skips)
    torch.testing.assert_close(network(z), expected, rtol=0, atol=1e-12)


def test_initialise_equals_pytorchs_initialisation() -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = layers()
    with torch.device("meta"):
        network = layers()
    initialise(network, Generator().manual_seed(3), torch.float32)
    for actual, reference in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=0)


def test_prior_is_trained_as_by_adam_on_the_mean_squared_error() -> None:
    image = rand(1, 3, 10, 9, dtype=torch.float64)
    generator = generators(0, [5], CPU)[0]
    network = skip_network(2, 3, (4, 3), (2, 0))
    initialise(network, generator, torch.float64)
    z = 0.1 * torch.empty(1, 2, 12, 12, dtype=torch.float64).uniform_(generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(3):
        noise = torch.empty_like(z).normal_(0, 0.01, generator=generator)
        output = network(z + noise)[..., :10, :9]
        optimizer.zero_grad()
        (output - image).square().mean().backward()
        optimizer.step()
    result = prior(steps=3, lr=0.02, average=0.0)(image, index=5)
    torch.testing.assert_close(result, output.detach(), rtol=0, atol=1e-10)


def test_prior_averages_its_outputs_from_the_first_on() -> None:
    image = rand(1, 3, 8, 8, dtype=torch.float64)
    first, second, third = (prior(steps=steps, average=0.0)(image) for steps in (1, 2, 3))
    average = 0.36 * first + 0.24 * second + 0.4 * third
    torch.testing.assert_close(prior(steps=3, average=0.6)(image), average, rtol=0, atol=1e-12)


def test_prior_fits_the_image_and_removes_noise_on_the_way() -> None:
    clean = smooth(40, 40)
    image = noisy(clean)
    results = {s: prior(steps=s, channels=(16, 16), skip_channels=(4, 4), input_channels=8)(image) for s in (1, 100)}
    assert error(results[100], image) < error(results[1], image) / 3
    assert error(results[100], clean) < error(image, clean) / 2


# the auto-encoder


class Layers(nn.Module):
    """Section IV-H from PyTorch's own layers."""

    def __init__(self, shape: tuple[int, int, int], kernel_size: int, stride: int, filters: int) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.tensor = (filters, math.ceil(self.height / stride), math.ceil(self.width / stride))
        self.conv = nn.Conv2d(channels, filters, kernel_size, stride)
        self.squeeze = nn.Linear(math.prod(self.tensor), 1)
        self.expand = nn.Linear(1, math.prod(self.tensor))
        self.deconv = nn.ConvTranspose2d(filters, channels, kernel_size, stride)
        self.margin = math.ceil((kernel_size - stride) / 2)  # of a kernel around the pixels of its stride

    def forward(self, images: Tensor) -> Tensor:
        _, rows, columns = self.tensor
        space = self.conv.kernel_size[0]
        padded = F.pad(images, (self.margin, space, self.margin, space))
        code = torch.tanh(self.squeeze(self.conv(padded)[..., :rows, :columns].flatten(1)))
        output = self.deconv(self.expand(code).unflatten(1, self.tensor))
        return output[..., self.margin : self.margin + self.height, self.margin : self.margin + self.width]

    def load(self, theta: Weights) -> "Layers":
        for actual, reference in zip(self.parameters(), theta, strict=True):
            actual.data = reference.detach().clone().reshape(actual.shape)
        return self


cases = pytest.mark.parametrize(
    ("shape", "kernel_size", "stride"),
    [((3, 16, 19), 7, 3), ((1, 9, 9), 15, 3), ((3, 8, 11), 3, 3), ((3, 7, 6), 5, 1), ((1, 12, 13), 4, 2), ((3, 10, 12), 4, 3)],
)


def weights(shape: tuple[int, int, int], kernel_size: int, stride: int, seed: int = 0) -> Weights:
    return initial_weights(
        Generator().manual_seed(seed), (1, *shape), kernel_size=kernel_size, stride=stride, filters=4, dtype=torch.float64
    )


@cases
def test_autoencoder_equals_pytorch_layers(shape: tuple[int, int, int], kernel_size: int, stride: int) -> None:
    theta = weights(shape, kernel_size, stride)
    images = 2 * rand(1, *shape, dtype=torch.float64) - 1
    model = Layers(shape, kernel_size, stride, 4).load(theta)
    output, expected = autoencode(images, theta, stride), model(images)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    actual = torch.autograd.grad((output - images).square().mean(), list(theta))
    reference = torch.autograd.grad((expected - images).square().mean(), list(model.parameters()))
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=0, atol=1e-12)


@cases
def test_autoencoder_is_trained_as_pytorch_layers_are(shape: tuple[int, int, int], kernel_size: int, stride: int) -> None:
    image = rand(1, *shape, dtype=torch.float64)
    generator = generators(0, [2], CPU)[0]
    theta = initial_weights(generator, image.shape, kernel_size=kernel_size, stride=stride, filters=4, dtype=torch.float64)
    model = Layers(shape, kernel_size, stride, 4).load(theta)
    reference = to_model_units(image, 20.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(reference), reference).backward()
        optimizer.step()
    mean = 255 * image - 20 * reference
    expected = ((20 * model(reference) + mean) / 255).clamp(0, 1).detach()
    defense = autoencoder(steps=4, kernel_size=kernel_size, stride=stride, lr=0.05, scale=20.0)
    torch.testing.assert_close(defense(image, index=2), expected, rtol=0, atol=1e-9)


def test_the_autoencoder_is_initialised_as_in_pytorch() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = Layers((3, 16, 19), 7, 3, 4).double()  # float32 draws
    theta = initial_weights(Generator().manual_seed(3), (1, 3, 16, 19), kernel_size=7, stride=3, filters=4, dtype=torch.float32)
    for actual, reference in zip(theta, expected.parameters(), strict=True):
        assert actual.requires_grad
        torch.testing.assert_close(actual.double().reshape(reference.shape), reference, rtol=1e-5, atol=1e-7)


def test_autoencoder_fits_the_image_and_removes_noise_on_the_way() -> None:
    clean = smooth(96, 96)
    image = noisy(clean)
    results = [autoencoder(steps=steps, kernel_size=15, filters=16, lr=0.01)(image) for steps in (1, 40)]
    assert error(results[1], image) < error(results[0], image) / 3
    assert error(results[1], clean) < error(image, clean) / 2


# the contract of a defense


@both
@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(0, 2),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_same_shape_and_dtype_in_range_and_input_untouched(
    make: Callable[..., Defense], count: int, channels: int, height: int, width: int, dtype: torch.dtype
) -> None:
    images = rand(count, channels, height, width, dtype=dtype)
    before = images.clone()
    result = make(seed=None)(images)
    assert (result.shape, result.dtype, result.device) == (images.shape, dtype, images.device)
    assert torch.equal(images, before)
    assert ((result >= 0) & (result <= 1)).all()  # also false for NaN
    assert not result.requires_grad
    assert not count or result.data_ptr() != images.data_ptr()


@both
def test_an_image_does_not_depend_on_its_batch(make: Callable[..., Defense]) -> None:
    images = rand(3, 3, 13, 10)
    together = make()(images, index=4)
    for row in range(3):
        assert torch.equal(together[row], make()(images[row : row + 1], index=4 + row)[0])
    assert torch.equal(make()(images.flip(0), index=[6, 5, 4]).flip(0), together)


@both
def test_seed_and_index_choose_the_random_numbers(make: Callable[..., Defense]) -> None:
    image = rand(1, 3, 12, 12)
    assert torch.equal(make(seed=1)(image), make(seed=1)(image))
    results = [make(seed=1)(image), make(seed=2)(image), make(seed=1)(image, index=1), make(seed=None)(image)]
    results.append(make(seed=None)(image))
    for a, b in itertools.combinations(results, 2):
        assert not torch.equal(a, b)


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_mode_does_not_matter(make: Callable[..., Defense], mode: Callable[[], Any]) -> None:
    expected = make()(rand(1, 3, 12, 12))
    with mode():
        image = rand(1, 3, 12, 12)
        result = make()(image)
        enabled = torch.is_grad_enabled()
    assert enabled == (mode is torch.enable_grad)
    assert torch.equal(result, expected)
    assert torch.equal(make()(image), expected)  # an inference tensor outside of inference mode
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make()(rand(1, 3, 12, 12)), expected)


@both
def test_an_input_that_requires_gradients_gets_none(make: Callable[..., Defense]) -> None:
    image = rand(1, 3, 12, 12).requires_grad_()
    assert not make()(image).requires_grad
    assert image.grad is None


@both
def test_global_random_state_is_neither_read_nor_changed(make: Callable[..., Defense]) -> None:
    image = rand(1, 3, 12, 12)
    expected = make()(image)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert torch.equal(make()(image), expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_repr_contains_every_argument() -> None:
    text = (
        "DeepImagePrior(steps=7, channels=(5, 6), skip_channels=(0, 1), input_channels=2, lr=0.5, input_noise=0.25, "
        "average=0.75, seed=9, progress=True)"
    )
    assert repr(eval(text)) == text
    assert repr(DeepImagePrior(channels=[5], skip_channels=[0])) == repr(DeepImagePrior(channels=(5,), skip_channels=(0,)))
    text = "OnlineAutoencoder(steps=7, kernel_size=9, stride=2, filters=5, lr=0.5, scale=4.0, seed=None, progress=True)"
    assert repr(eval(text)) == text


def test_numpys_numbers_are_numbers() -> None:
    numpys: dict[str, Any] = {"steps": np.int64(2), "channels": np.array([4]), "skip_channels": [np.int8(1)]}
    numpys |= {"lr": np.float64(0.5), "seed": np.uint8(3)}
    assert repr(DeepImagePrior(**numpys)) == repr(DeepImagePrior(steps=2, channels=[4], skip_channels=[1], lr=0.5, seed=3))
    numpys = {"stride": np.int64(2), "filters": np.int32(5), "scale": np.float64(4.5)}
    assert repr(OnlineAutoencoder(**numpys)) == repr(OnlineAutoencoder(stride=2, filters=5, scale=4.5))


@both
def test_progress_shows_each_step(make: Callable[..., Defense], capsys: pytest.CaptureFixture[str]) -> None:
    make()(rand(1, 3, 12, 12))
    assert capsys.readouterr().err == ""
    make(progress=True)(rand(1, 3, 12, 12))
    assert "/2" in capsys.readouterr().err


@both
@pytest.mark.parametrize(
    ("images", "raised", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        ([[0.5]], TypeError, "list"),
        (torch.zeros(3, 8, 8), ValueError, r"\(N, C, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8), ValueError, "C = 1 or 3"),
        (torch.full((1, 3, 8, 8), 1.5), ValueError, "got \\[1.5, 1.5\\]"),
        (torch.full((1, 3, 8, 8), math.nan), ValueError, "nan"),
    ],
)
def test_bad_images(make: Callable[..., Defense], images: Any, raised: type[Exception], message: str) -> None:
    with pytest.raises(raised, match=message):
        make()(images)


@both
def test_bad_index(make: Callable[..., Defense]) -> None:
    with pytest.raises(ValueError, match="index must be an integer >= 0, got -1"):
        make()(rand(1, 3, 8, 8), index=-1)
    with pytest.raises(ValueError, match="one for each of 1 images, got 2"):
        make()(rand(1, 3, 8, 8), index=[1, 2])


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        *((make, {"steps": 0}, "steps must be an integer >= 1, got 0") for make in (prior, autoencoder)),
        *((make, {"steps": 2.0}, "steps must be an integer >= 1, got 2.0") for make in (prior, autoencoder)),
        *((make, {"steps": True}, "steps must be an integer >= 1, got True") for make in (prior, autoencoder)),
        *((make, {"seed": -1}, "seed must be None or an integer >= 0, got -1") for make in (prior, autoencoder)),
        *((make, {"lr": -1}, "lr must be a finite number >= 0, got -1") for make in (prior, autoencoder)),
        *((make, {"lr": math.inf}, "lr must be a finite number >= 0, got inf") for make in (prior, autoencoder)),
        (prior, {"channels": ()}, "one entry for each scale"),
        (prior, {"channels": (4, 4, 4)}, "one entry for each scale"),
        (prior, {"channels": (4, 0)}, "channels: each must be an integer >= 1, got 0"),
        (prior, {"skip_channels": (4, -1)}, "skip_channels: each must be an integer >= 0, got -1"),
        (prior, {"input_channels": 0}, "input_channels must be an integer >= 1"),
        (prior, {"input_noise": math.nan}, "input_noise must be a finite number >= 0, got nan"),
        (prior, {"average": 1.0}, "average must be a finite number >= 0 and < 1, got 1.0"),
        (autoencoder, {"filters": 0}, "filters must be an integer >= 1"),
        (autoencoder, {"kernel_size": 2}, "kernel_size must be at least stride"),
        (autoencoder, {"scale": 0.0}, "scale must be a finite number > 0, got 0.0"),
        *((make, {"progress": 1}, "progress must be True or False, got 1") for make in (prior, autoencoder)),
    ],
)
def test_bad_hyper_parameters(make: Callable[..., Defense], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
