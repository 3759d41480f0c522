"""The energy network (paper III-A, III-C, Fig. 2) and its closed-form gradients.

The network is a convolution with weights W and biases b, a ReLU, and a fully connected layer with one weight v per filter and
position:

    a_c(p) = (W_c * I)(p) + b_c        F(I) = sum_{c,p} v_c(p) relu(a_c(p))        U(I) = -F(I)

All functions work on *cells*: ``pixel_unshuffle`` turns a convolution of stride s into one of stride 1 with s^2 times the
channels, which is several times faster. The N images of a batch lie side by side in the channel dimension. A grouped
convolution gives each image its own network. With D = channels * s^2 and an h x w grid of cells:

    cells (B, N*D, h, w)    a, gate (B, N*C, h, w)    weight (N*C, D, k, k)    bias (N*C,)    fc (1, N*C, h, w)

B is 1 for the synthesised images alone, and 2 where one call has the references and the synthesised images.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.grad import conv2d_weight

STABLE = 0.5
"""The limit of rate times curvature of W with ``adaptive_lr``. At 1 a constant residual is gone in a step; from 2 it grows."""


class Parameters(NamedTuple):
    """theta of the paper for N images: convolution weights W, biases b, fully connected weights v, and ``groups`` = N."""

    weight: Tensor
    bias: Tensor
    fc: Tensor
    groups: int

    def cast(self, dtype: torch.dtype) -> "Parameters":
        """The parameters in ``dtype``, as operands of products; the same tensors where they have this dtype."""
        return self._replace(weight=self.weight.to(dtype), bias=self.bias.to(dtype), fc=self.fc.to(dtype))

    def follow(self, theta: "Parameters") -> None:
        """Copy the values of ``theta``, of which this is a :meth:`cast`."""
        for own, value in ((self.weight, theta.weight), (self.bias, theta.bias), (self.fc, theta.fc)):
            if own is not value:
                own.copy_(value)

    def copy(self) -> "Parameters":
        """A copy of the parameters in the same memory layout."""
        return self._replace(weight=self.weight.clone(), bias=self.bias.clone(), fc=self.fc.clone())


class Buffers(NamedTuple):
    """Memory that :func:`contrast` reuses: a new allocation in each step costs a page fault for every 4 KB."""

    gates: Tensor
    bracket: Tensor
    above: Tensor

    @classmethod
    def of(cls, theta: Parameters) -> "Buffers":
        """Buffers for networks of this size and dtype."""
        fc = theta.fc
        shape = (2, *fc.shape[1:])
        pair = torch.empty(shape, dtype=fc.dtype, device=fc.device, memory_format=torch.channels_last)
        return cls(pair, torch.empty_like(fc), torch.empty_like(fc))


def kernel_cells(kernel_size: int, stride: int) -> int:
    """Side k, in cells, of the smallest odd window that contains a centred kernel of ``kernel_size`` pixels."""
    return 2 * math.ceil((kernel_size - stride) / (2 * stride)) + 1 if kernel_size > stride else 1


def to_cells(images: Tensor, stride: int) -> Tensor:
    """(N, channels, H, W) -> (1, N*D, h, w). Zeros, the mean colour, pad the last cells."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % stride, 0, -height % stride))
    cells = F.pixel_unshuffle(padded, stride)
    return cells.reshape(1, -1, *cells.shape[-2:]).contiguous(memory_format=torch.channels_last)


def from_cells(cells: Tensor, stride: int, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_cells` for images of ``shape`` (N, channels, H, W)."""
    grouped = cells.reshape(shape[0], -1, *cells.shape[-2:])
    return F.pixel_shuffle(grouped, stride)[..., : shape[-2], : shape[-1]]


def beside(channels_last: Tensor) -> Tensor:
    """Cells of separate images (N, h, w, D) -> (1, N*D, h, w)."""
    count, height, width, depth = channels_last.shape
    return channels_last.permute(0, 3, 1, 2).reshape(1, count * depth, height, width)


def kernel_to_cells(kernels: Tensor, stride: int) -> Tensor:
    """Kernels over pixels (..., channels, K, K) -> kernels over cells (..., D, k, k), centred, padded with zeros."""
    size = kernels.shape[-1]
    margin = kernel_cells(size, stride) * stride - size
    left = margin // 2
    return F.pixel_unshuffle(F.pad(kernels, (left, margin - left, left, margin - left)), stride)


def gabor_kernels(generators: Sequence[Generator], filters: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
    """Random Gabor functions (N, filters, channels, K, K) of unit norm: they fit edges and texture in few, large weights.

    A Gabor function is a cosine of random orientation and phase, minus its mean, times a Gaussian window whose standard
    deviation is half the period of the cosine (at most K/4). The logarithms of the frequencies are uniform, from 1 / K to 0.45
    cycles per pixel. Eight in ten functions are in brightness. The others are in a random hue at half the frequency, because
    colours vary slowly in natural images. The first tenth of the filters are Gaussians without a cosine: a third of them are
    bright or dark, the others are in evenly spaced hues. With one channel, all functions are in brightness. Each of the N
    images has its own functions, from its own generator.
    """
    device, full = generators[0].device, 2 * math.pi
    bounds = ((0, 1), (-math.log(max(size, 3)), math.log(0.45)), (0, full), (0, full), (0, full))
    drawn = torch.empty(len(generators), len(bounds), filters, 1, 1, dtype=dtype, device=device)
    for rows, generator in zip(drawn, generators, strict=True):
        for row, (low, high) in zip(rows, bounds, strict=True):
            row.uniform_(low, high, generator=generator)
    lot, octave, angle, phase, hue = drawn.unbind(1)

    number = torch.arange(filters, device=device)[:, None, None]
    plain = number < filters // 10
    in_brightness = torch.where(plain, number % 3 == 0, lot < 0.8) | (channels == 1)
    frequency = octave.exp() / (2 - in_brightness.to(dtype))
    frequency = torch.where(plain, 0.0, frequency)
    phase = torch.where(plain, torch.where(in_brightness, math.pi * (number // 3 % 2), 0.0).to(dtype), phase)
    hues = plain & ~in_brightness
    around = hues.cumsum(1).to(dtype) / hues.sum((1, 2, 3), keepdim=True).clamp(min=1)
    hue = torch.where(hues, hue[:, :1] + full * around, hue)

    x = torch.arange(size, dtype=dtype, device=device) - (size - 1) / 2
    along = x * angle.cos() + x[:, None] * angle.sin()
    width = (0.5 / frequency).clamp(max=size / 4)
    window = torch.exp(-(x.square() + x[:, None].square()) / (2 * width.square()))
    wave = window * torch.cos(full * frequency * along + phase)
    mean = window * wave.sum((2, 3), keepdim=True) / window.sum((2, 3), keepdim=True)
    wave = torch.where(plain, wave, wave - mean)
    wave = wave / wave.square().sum((2, 3), keepdim=True).sqrt()
    colour = torch.full((1, 1, channels, 1, 1), 1 / math.sqrt(channels), dtype=dtype, device=device)
    if channels == 3:
        thirds = full / 3 * torch.arange(3, dtype=dtype, device=device)[:, None, None]
        tinted = math.sqrt(2 / 3) * torch.cos(hue[:, :, None] + thirds)
        colour = torch.where(in_brightness[:, :, None], colour, tinted)
    return colour * wave[:, :, None]


def initial_parameters(
    generators: Sequence[Generator],
    shape: Sequence[int],
    *,
    kernel_size: int,
    stride: int,
    filters: int,
    init: str,
    dtype: torch.dtype,
) -> Parameters:
    """Random theta_1 for images of ``shape`` (N, channels, H, W), with one generator each (Algorithm 1, line 1).

    ``init="uniform"`` is PyTorch's initialisation of a convolution and a linear layer, U(+-1/sqrt(fan_in)). ``init="gabor"``
    draws the filters from :func:`gabor_kernels` and scales them to the expected energy of the uniform ones.
    """
    count, channels, height, width = shape
    grid = (math.ceil(height / stride), math.ceil(width / stride))
    bound = 1 / math.sqrt(channels * kernel_size**2)
    fc_bound = 1 / math.sqrt(filters * grid[0] * grid[1])
    kernels = torch.empty(count, filters, channels, kernel_size, kernel_size, dtype=dtype, device=generators[0].device)
    bias, fc = kernels.new_empty(count, filters), kernels.new_empty(count, filters, *grid)
    if init == "gabor":
        kernels = gabor_kernels(generators, filters, channels, kernel_size, dtype).div_(math.sqrt(3))
    for i, generator in enumerate(generators):
        if init == "uniform":
            kernels[i].uniform_(-bound, bound, generator=generator)
        bias[i].uniform_(-bound, bound, generator=generator)
        fc[i].uniform_(-fc_bound, fc_bound, generator=generator)
    return Parameters(
        kernel_to_cells(kernels.flatten(0, 1), stride).contiguous(memory_format=torch.channels_last),
        bias.flatten(),
        fc.flatten(0, 1)[None].contiguous(memory_format=torch.channels_last),
        count,
    )


def responses(cells: Tensor, theta: Parameters) -> Tensor:
    """The filter responses a(p), before the ReLU."""
    return F.conv2d(cells, theta.weight, theta.bias, padding=theta.weight.shape[-1] // 2, groups=theta.groups)


def gate(a: Tensor, theta: Parameters, out: Tensor | None = None) -> Tensor:
    """dF/da = v 1[a > 0]: the weight of each filter where its response is positive."""
    # the derivative of the ReLU in one pass; torch.where takes eight times as long
    out = torch.empty_like(a) if out is None else out
    return torch.ops.aten.threshold_backward.grad_input(theta.fc.expand_as(a), a, 0, grad_input=out)


def image_gradient(gates: Tensor, theta: Parameters) -> Tensor:
    """dF/dI = conv_transpose(v 1[a > 0], W). In Eq. 9 and 10 this is the mode I* of the image's distribution."""
    return F.conv_transpose2d(gates, theta.weight, padding=theta.weight.shape[-1] // 2, groups=theta.groups)


def weight_gradient(cells: Tensor, gates: Tensor, theta: Parameters) -> Tensor:
    """dF/dW = sum_p v 1[a > 0] patch_p(I), also summed over the first dimension."""
    padding = theta.weight.shape[-1] // 2
    return conv2d_weight(cells, theta.weight.shape, gates, padding=padding, groups=theta.groups)


def contrast(
    pair: Tensor, theta: Parameters, threshold: Tensor | None = None, buffers: Buffers | None = None
) -> tuple[Parameters, Tensor, Tensor]:
    """The bracket of Eq. 5, dF(I_z)/dtheta - dF(I_s)/dtheta, for ``pair`` = (I_z, I_s) of shape (2, N*D, h, w).

    dF/dv = relu(a) and dF/db = sum_p v 1[a > 0]. Differences of dF/dv of at most ``threshold`` (N,) times
    :func:`noise_response` are set to 0, because noise of this size causes them.

    Returns:
        The gradients (that of v lies in ``buffers``), relu(a) of I_s, which is positive where its mask is 1, and the curvature
        of W (N,). For a constant image c, dF/dW = c sum_p gate(p) on each tap, and the k^2 taps of a cell turn this into an
        image. A step of rate r per position therefore removes r k^2 sum_c mean_p(gate)^2 of a constant residual.
    """
    buffers = Buffers.of(theta) if buffers is None else buffers
    a = responses(pair, theta)
    gates = gate(a, theta, buffers.gates)
    weight = weight_gradient(torch.cat([pair[:1], -pair[1:]]), gates, theta)  # the difference in one product
    # the precision of the operands is enough: a rate times this sum is small compared with b
    sums = gates.sum((2, 3)).to(torch.promote_types(gates.dtype, torch.float32))
    coherent = (sums[0] / gates[0, 0].numel()).square().unflatten(0, (theta.groups, -1)).sum(1)
    rectified = a.relu_()
    fc = torch.sub(rectified[:1], rectified[1:], out=buffers.bracket)
    if threshold is not None:
        of_filters = threshold.repeat_interleave(len(theta.bias) // theta.groups)
        limit = (of_filters * noise_response(theta.weight)).to(fc.dtype)[:, None, None]
        size = torch.abs(fc, out=buffers.above)
        fc.mul_(torch.gt(size, limit, out=size))  # 1 or 0 in the dtype of both; NaN stays NaN
    gradient = Parameters(weight, sums[0] - sums[1], fc, theta.groups)
    return gradient, rectified[1:], theta.weight.shape[-1] ** 2 * coherent


def noise_response(weight: Tensor) -> Tensor:
    """Standard deviation of a filter's response to N(0, 1) noise, its norm: (..., D, k, k) -> (...), at least float32."""
    return torch.linalg.vector_norm(weight, dim=(-3, -2, -1), dtype=torch.promote_types(weight.dtype, torch.float32))


def mean_square(cells: Tensor, groups: int) -> Tensor:
    """The mean square of each image in cells (1, N*D, h, w): (N,)."""
    return cells.square().mean((0, 2, 3)).unflatten(0, (groups, -1)).mean(1)


def slow_down(lr_factor: Tensor, best: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Halve the factor (N,) of both learning rates for images whose mean square residual rose by over 5%.

    A step of Eq. 5 is too long for these images. Returns the new factors and the residuals to compare with next.
    """
    rose = residual > 1.05 * best
    return torch.where(rose, lr_factor / 2, lr_factor), torch.where(rose, residual, torch.minimum(best, residual))


def energy(a: Tensor, theta: Parameters) -> Tensor:
    """The energy U = -F of each image, from its responses (B, N*C, h, w): (B, N)."""
    return -(theta.fc * a.relu()).unflatten(1, (theta.groups, -1)).sum((2, 3, 4))
