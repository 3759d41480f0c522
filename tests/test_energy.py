"""Closed-form gradients of the energy against autograd, and cells against pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oag_transform import OnlineAlternateGenerator, streams
from oag_transform.generator import energy
from oag_transform.generator.run import prepare, trajectory
from tests.sample_images import rand, synthetic_image

CASES = [  # (height, width, kernel_size, stride, channels)
    (31, 29, 15, 1, 3),
    (37, 41, 15, 3, 3),
    (38, 33, 7, 3, 3),
    (35, 40, 11, 3, 1),
    (41, 47, 15, 5, 3),
    (26, 31, 9, 5, 1),
    (23, 25, 6, 2, 3),
    (20, 22, 3, 3, 3),
]


def make(
    height: int, width: int, kernel_size: int, stride: int, channels: int, count: int = 2
) -> tuple[Tensor, energy.Parameters]:
    images = 20 * torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0)).double()
    theta = energy.initial_parameters(
        streams.generators(1, range(count), torch.device("cpu")),
        images.shape,
        kernel_size=kernel_size,
        stride=stride,
        filters=5,
        init="uniform",
        dtype=torch.float64,
    )
    return images, theta


def plain_energy(image: Tensor, kernels: Tensor, bias: Tensor, fc: Tensor, stride: int) -> Tensor:
    """U of one image by a strided convolution over pixels: the kernel at cell p is centred on pixels p*s .. p*s + s - 1."""
    image = F.pad(image, (0, -image.shape[-1] % stride, 0, -image.shape[-2] % stride))
    before = math.ceil((kernels.shape[-1] - stride) / 2)
    after = kernels.shape[-1] - stride - before
    a = F.conv2d(F.pad(image, (before, after, before, after))[None], kernels, bias, stride=stride)
    return -(fc * a.relu()).sum()


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def pixel_kernels(theta: energy.Parameters, kernel_size: int, stride: int, channels: int) -> Tensor:
    """Undo kernel_to_cells by its definition: the taps lie in the middle of the window."""
    window = F.pixel_shuffle(theta.weight, stride)
    left = (window.shape[-1] - kernel_size) // 2
    kernels = window[..., left : left + kernel_size, left : left + kernel_size]
    return kernels.unflatten(0, (theta.groups, -1))


@pytest.mark.parametrize(("height", "width", "kernel_size", "stride", "channels"), CASES)
def test_gradients_match_autograd_over_pixels(height: int, width: int, kernel_size: int, stride: int, channels: int) -> None:
    images, theta = make(height, width, kernel_size, stride, channels)
    cells = energy.to_cells(images, stride)
    a = energy.responses(cells, theta)
    gates = energy.gate(a, theta)
    values = energy.energy(a, theta)[0]
    image_gradient = energy.from_cells(energy.image_gradient(gates, theta), stride, images.shape)
    shaped = theta._replace(weight=energy.weight_gradient(cells, gates, theta))
    kernel_gradient = pixel_kernels(shaped, kernel_size, stride, channels)

    kernels = pixel_kernels(theta, kernel_size, stride, channels)
    for i in range(len(images)):
        leaves = [
            t.clone().requires_grad_()
            for t in (images[i], kernels[i], theta.bias.unflatten(0, (2, -1))[i], theta.fc[0].unflatten(0, (2, -1))[i])
        ]
        value = plain_energy(leaves[0], leaves[1], leaves[2], leaves[3], stride)
        expected = [-g for g in torch.autograd.grad(value, leaves)]
        assert relative(values[i], value) < 1e-10
        assert relative(image_gradient[i], expected[0]) < 1e-10
        assert relative(kernel_gradient[i], expected[1]) < 1e-10
        assert relative(gates.sum((0, 2, 3)).unflatten(0, (2, -1))[i], expected[2]) < 1e-10
        assert relative(a.relu()[0].unflatten(0, (2, -1))[i], expected[3]) < 1e-10


@pytest.mark.parametrize(("height", "width", "kernel_size", "stride", "channels"), CASES)
def test_gradients_match_autograd_over_cells(height: int, width: int, kernel_size: int, stride: int, channels: int) -> None:
    images, theta = make(height, width, kernel_size, stride, channels)
    cells = energy.to_cells(images, stride).requires_grad_()
    weight, bias, fc = (t.clone().requires_grad_() for t in (theta.weight, theta.bias, theta.fc))
    leaves = energy.Parameters(weight, bias, fc, theta.groups)
    value = -energy.energy(energy.responses(cells, leaves), leaves).sum()
    expected = torch.autograd.grad(value, [cells, leaves.weight, leaves.bias])
    gates = energy.gate(energy.responses(cells.detach(), theta), theta)
    assert relative(energy.image_gradient(gates, theta), expected[0]) < 1e-10
    assert relative(energy.weight_gradient(cells.detach(), gates, theta), expected[1]) < 1e-10
    assert relative(gates.sum((0, 2, 3)), expected[2]) < 1e-10


def test_contrast_is_the_difference_of_gradients() -> None:
    images, theta = make(20, 23, 6, 2, 3)
    pair = torch.cat([energy.to_cells(images, 2), energy.to_cells(images.flip(-1), 2)])
    weight, bias, fc = (t.clone().requires_grad_() for t in (theta.weight, theta.bias, theta.fc))
    leaves = energy.Parameters(weight, bias, fc, theta.groups)
    difference = energy.energy(energy.responses(pair, leaves), leaves).diff(dim=0).sum()  # U(I_s) - U(I_z) = F(I_z) - F(I_s)
    expected = torch.autograd.grad(difference, [weight, bias, fc])
    gradient, rectified, _ = energy.contrast(pair, theta)
    for actual, reference in zip(gradient[:3], expected, strict=True):
        assert isinstance(actual, Tensor)
        assert relative(actual, reference) < 1e-10
    assert torch.equal(rectified, energy.responses(pair[1:], theta).relu())


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_trace_has_the_energies_of_its_images(chunk_size: int) -> None:
    """Of the synthesised images and of the references, under the networks of each step."""
    purify = OnlineAlternateGenerator(network_steps=3, filters=5, kernel_size=9, stride=3, seed=0, chunk_size=chunk_size)
    images = synthetic_image(2, 3, 27, 33)  # float64 on every CPU; whole strides, as Langevin noise is in the padding too
    states = trajectory(prepare(images, purify.settings_for(27, 33), 0, [0, 1]), every=1)
    for moment, state in zip(purify.trace(images), states, strict=True):
        kernels, bias = pixel_kernels(state.theta, 9, 3, 3), state.theta.bias.view(2, 5)
        fc = state.theta.fc[0].unflatten(0, (2, 5))
        for i in range(2):
            for found, image in ((moment.energy, state.images), (moment.reference_energy, state.reference)):
                torch.testing.assert_close(found[i], plain_energy(image[i], kernels[i], bias[i], fc[i], 3), rtol=1e-9, atol=0)


def test_mean_square() -> None:
    images, _ = make(20, 24, 6, 2, 3)
    torch.testing.assert_close(energy.mean_square(energy.to_cells(images, 2), 2), images.square().mean((1, 2, 3)))


@given(
    height=st.integers(2, 20),
    width=st.integers(2, 20),
    stride=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    n=st.integers(1, 3),
)
def test_cells_round_trip(height: int, width: int, stride: int, channels: int, n: int) -> None:
    images = rand(n, channels, height, width)
    cells = energy.to_cells(images, stride)
    assert cells.shape == (1, n * channels * stride**2, math.ceil(height / stride), math.ceil(width / stride))
    assert torch.equal(energy.from_cells(cells, stride, images.shape), images)


@given(stride=st.integers(1, 7), more=st.integers(0, 24))
def test_kernel_window_is_the_smallest_odd_one(stride: int, more: int) -> None:
    kernel_size = stride + more
    k = energy.kernel_cells(kernel_size, stride)
    assert k % 2 == 1
    assert k * stride >= kernel_size
    assert k == 1 or (k - 2) * stride < kernel_size


@pytest.mark.parametrize("init", ["gabor", "uniform"])
def test_each_image_of_a_batch_gets_the_network_of_its_own_stream(init: str) -> None:
    def network(indices: list[int]) -> energy.Parameters:
        generators = streams.generators(1, indices, torch.device("cpu"))
        shape = (len(indices), 3, 14, 17)
        return energy.initial_parameters(generators, shape, kernel_size=9, stride=3, filters=12, init=init, dtype=torch.float64)

    together = network([5, 3, 8])
    alone = [network([index]) for index in (5, 3, 8)]
    torch.testing.assert_close(together.weight, torch.cat([one.weight for one in alone]), rtol=0, atol=1e-15)
    assert torch.equal(together.bias, torch.cat([one.bias for one in alone]))
    assert torch.equal(together.fc, torch.cat([one.fc for one in alone], 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [9, 15])
def test_gabor_kernels(size: int, channels: int) -> None:
    """Unit norm, no response to a constant, brightness or hue, and a spectrum centred at the drawn frequency."""
    kernels = energy.gabor_kernels([torch.Generator().manual_seed(0)], 700, channels, size, torch.float64)[0]
    assert kernels.shape == (700, channels, size, size)
    torch.testing.assert_close(kernels.square().sum((1, 2, 3)), torch.ones(700).double())
    plain, gabor = kernels[:70], kernels[70:]
    assert gabor.sum((2, 3)).abs().max() < 1e-9
    assert (plain.abs().sum((2, 3)) - plain.sum((2, 3)).abs()).abs().max() < 1e-9  # one sign in each channel
    grey = (kernels - kernels[:, :1]).abs().amax((1, 2, 3)) < 1e-9
    hue = kernels.sum(1).abs().amax((1, 2)) < 1e-9
    if channels == 1:
        assert grey.all()
    else:
        assert (grey ^ hue).all()
        assert grey[:70].sum() == 24
        assert (plain[grey[:70]].sum((1, 2, 3)) > 0).sum() == 12  # bright, and as many dark
        assert abs(grey[70:].double().mean().item() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 630)
        colours = plain[~grey[:70]].sum((2, 3))
        axes = torch.tensor([[2, -1, -1], [0, math.sqrt(3), -math.sqrt(3)]]).double()
        angles = torch.atan2(*(colours @ axes.T).unbind(1)).sort().values
        gaps = torch.cat([angles, angles[:1] + 2 * math.pi]).diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, 2 * math.pi / 46))  # all hues alike
    # the centre of the power spectrum's half plane; the window spreads it, and little is left below one cycle a kernel
    power = torch.fft.fft2(gabor, s=(64, 64)).abs().square().sum(1)
    f = torch.fft.fftfreq(64).double()
    centre = (power * torch.hypot(f[:, None], f[None])).sum((1, 2)) / power.sum((1, 2))
    assert 0.5 / size < centre.min() < 1.5 / size
    assert 0.38 < centre.max() < 0.46
    angle = torch.atan2(f[:, None], f[None]).expand(64, 64)  # orientations: no direction is preferred
    doubled = torch.stack([(power * torch.cos(2 * angle)).sum((1, 2)), (power * torch.sin(2 * angle)).sum((1, 2))])
    assert (doubled / power.sum((1, 2))).mean(1).abs().max() < 4 / math.sqrt(2 * 630)


@pytest.mark.parametrize("init", ["gabor", "uniform"])
def test_initial_filters_have_the_energy_of_pytorchs(init: str) -> None:
    theta = energy.initial_parameters(
        streams.generators(0, range(2), torch.device("cpu")),
        (2, 3, 30, 30),
        kernel_size=15,
        stride=1,
        filters=400,
        init=init,
        dtype=torch.float64,
    )
    assert theta.weight.square().mean().item() == pytest.approx(1 / (3 * 3 * 15**2), rel=0.02)
    assert not torch.equal(theta.weight[:400], theta.weight[400:])


def test_noise_response_is_the_spread_of_responses_to_noise() -> None:
    _, theta = make(20, 23, 6, 2, 3, count=1)
    noise = torch.randn(1, 12, 150, 150, generator=torch.Generator().manual_seed(0)).double()
    spread = energy.responses(noise, theta)[..., 2:-2, 2:-2].std((0, 2, 3))
    torch.testing.assert_close(spread, energy.noise_response(theta.weight), rtol=0.05, atol=0)
    assert energy.noise_response(theta.weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.5, 6.0])
def test_threshold_leaves_weak_contrasts_out(threshold: float) -> None:
    images, theta = make(20, 23, 6, 2, 3)
    pair = torch.cat([energy.to_cells(images, 2), energy.to_cells(images.flip(-1), 2)])
    plain, rectified, curvature = energy.contrast(pair, theta)
    thresholds = threshold * torch.tensor([1.0, 1.5]).double()  # each image has its own
    actual, again, same = energy.contrast(pair, theta, thresholds)
    least = thresholds.repeat_interleave(5) * theta.weight.square().sum((1, 2, 3)).sqrt()
    for c in range(len(least)):
        for was, now in zip(plain.fc[0, c].flatten().tolist(), actual.fc[0, c].flatten().tolist(), strict=True):
            assert now == (was if abs(was) > least[c] else 0)
    assert 0.05 < (actual.fc != 0).double().mean() < 0.95
    assert torch.equal(actual.weight, plain.weight)
    assert torch.equal(actual.bias, plain.bias)
    assert torch.equal(again, rectified)
    assert torch.equal(same, curvature)
    pair[0, 0, 0, 0] = torch.nan
    assert energy.contrast(pair, theta, thresholds)[0].fc.isnan().any()


@pytest.mark.parametrize("stride", [1, 3])
def test_curvature_predicts_a_step_for_a_constant_residual(stride: int) -> None:
    """One step of W, constant residual, all filters active: the image gradient changes by rate * curvature * residual."""
    size = 60 * stride
    _, theta = make(size, size, 5 * stride, stride, 1, count=1)
    theta = theta._replace(bias=theta.bias + 1e3, fc=torch.ones_like(theta.fc) * torch.arange(1.0, 6)[:, None, None])
    constant = energy.to_cells(torch.full((1, 1, size, size), 2.0).double(), stride)
    pair = torch.cat([constant, 0 * constant])  # all filters respond to both
    gradient, _, curvature = energy.contrast(pair, theta)
    rate = 1e-3 / theta.fc[0, 0].numel()
    gates = energy.gate(energy.responses(constant, theta), theta)
    before = energy.image_gradient(gates, theta)
    after = energy.image_gradient(gates, theta._replace(weight=theta.weight + rate * gradient.weight))
    centre = (after - before)[0, :, 8:-8, 8:-8]
    # patches at the border see zeros outside of the image: 4% less here
    torch.testing.assert_close(centre, torch.full_like(centre, 1e-3 * curvature.item() * 2), rtol=0.05, atol=0)
