"""The energy network (paper III-A, III-C, Fig. 2) and its closed-form gradients.

A convolution with weights W and biases b, a ReLU, and a fully connected layer with one weight v per filter and position:

    a_c(p) = (W_c * I)(p) + b_c        F(I) = sum_{c,p} v_c(p) relu(a_c(p))        U(I) = -F(I)

Everything works on *cells*: ``pixel_unshuffle`` turns a convolution of stride s into one of stride 1 with s^2 times the
channels, several times faster. The N images of a batch lie side by side in the channel dimension and are convolved in
groups, so that each one has a network of its own. With D = channels * s^2 and an h x w grid of cells:

    cells (B, N*D, h, w)    a, gate (B, N*C, h, w)    weight (N*C, D, k, k)    bias (N*C,)    fc (1, N*C, h, w)

B is 1 for the synthesised image alone and 2 where the reference goes through the same network in one call.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.grad import conv2d_weight


class Parameters(NamedTuple):
    """theta of the paper for N images: convolution weights W and biases b, fully connected weights v, and N."""

    weight: Tensor
    bias: Tensor
    fc: Tensor
    groups: int

    def cast(self, dtype: torch.dtype) -> "Parameters":
        """The parameters in ``dtype``, as operands of products (themselves where that is their dtype)."""
        return self._replace(weight=self.weight.to(dtype), bias=self.bias.to(dtype), fc=self.fc.to(dtype))


def kernel_cells(kernel_size: int, stride: int) -> int:
    """Side k, in cells, of the smallest odd window that holds a centred kernel of ``kernel_size`` pixels."""
    return 2 * math.ceil((kernel_size - stride) / (2 * stride)) + 1 if kernel_size > stride else 1


def to_cells(images: Tensor, stride: int) -> Tensor:
    """(N, channels, H, W) -> (1, N*D, h, w); zeros (the mean colour) fill the last cells."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % stride, 0, -height % stride))
    cells = F.pixel_unshuffle(padded, stride)
    return cells.reshape(1, -1, *cells.shape[-2:]).contiguous(memory_format=torch.channels_last)


def from_cells(cells: Tensor, stride: int, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`to_cells` for images of ``shape`` (N, channels, H, W)."""
    grouped = cells.reshape(shape[0], -1, *cells.shape[-2:])
    return F.pixel_shuffle(grouped, stride)[..., : shape[-2], : shape[-1]]


def kernel_to_cells(kernels: Tensor, stride: int) -> Tensor:
    """(..., channels, K, K) kernels of pixels -> (..., D, k, k) kernels of cells, centred, zero outside."""
    size = kernels.shape[-1]
    margin = kernel_cells(size, stride) * stride - size
    left = margin // 2
    return F.pixel_unshuffle(F.pad(kernels, (left, margin - left, left, margin - left)), stride)


def natural_spectrum(noise: Tensor) -> Tensor:
    """White noise (..., K, K) -> the same energy with the amplitude spectrum of natural images, 1 / (f + 0.5).

    f is in cycles per kernel. Filters of this kind fit the structure of an image before its noise.
    """
    size = noise.shape[-1]
    cycles = torch.fft.fftfreq(size, d=1 / size, dtype=noise.dtype, device=noise.device)
    radius = torch.hypot(cycles[:, None], cycles[None, : size // 2 + 1].abs())
    shaped = torch.fft.irfft2(torch.fft.rfft2(noise) / (radius + 0.5), s=(size, size))
    return shaped * (noise.square().mean() / shaped.square().mean()).sqrt()


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
    """Random theta_1 for images of ``shape`` (N, channels, H, W), one generator each (Algorithm 1, line 1).

    ``"uniform"`` is PyTorch's own initialisation of a convolution and a linear layer, U(+-1/sqrt(fan_in)).
    ``"natural"`` gives the filters the spectrum of :func:`natural_spectrum` and the energy they have there.
    """
    channels, height, width = shape[1:]
    grid = (math.ceil(height / stride), math.ceil(width / stride))
    bound = 1 / math.sqrt(channels * kernel_size**2)
    fc_bound = 1 / math.sqrt(filters * grid[0] * grid[1])
    kernel_shape = (filters, channels, kernel_size, kernel_size)
    weight, bias, fc = [], [], []
    for generator in generators:
        empty = torch.empty(kernel_shape, dtype=dtype, device=generator.device)
        if init == "natural":
            kernels = natural_spectrum(empty.normal_(0, bound / math.sqrt(3), generator=generator))
        else:
            kernels = empty.uniform_(-bound, bound, generator=generator)
        weight.append(kernel_to_cells(kernels, stride))
        bias.append(kernels.new_empty(filters).uniform_(-bound, bound, generator=generator))
        fc.append(kernels.new_empty(filters, *grid).uniform_(-fc_bound, fc_bound, generator=generator))
    return Parameters(
        torch.cat(weight).contiguous(memory_format=torch.channels_last),
        torch.cat(bias),
        torch.cat(fc)[None].contiguous(memory_format=torch.channels_last),
        len(generators),
    )


def responses(cells: Tensor, theta: Parameters) -> Tensor:
    """Filter responses a(p), before the ReLU."""
    return F.conv2d(cells, theta.weight, theta.bias, padding=theta.weight.shape[-1] // 2, groups=theta.groups)


def gate(a: Tensor, theta: Parameters) -> Tensor:
    """dF/da = v 1[a > 0]: the weight of each filter where it responds."""
    # a mask of the tensor's own dtype: torch.where is eight times slower here
    return torch.gt(a, 0, out=torch.empty_like(a)).mul_(theta.fc)


def image_gradient(gates: Tensor, theta: Parameters) -> Tensor:
    """dF/dI = conv_transpose(v 1[a > 0], W): in Eq. 9 and 10 the mode I* of the image's distribution."""
    return F.conv_transpose2d(gates, theta.weight, padding=theta.weight.shape[-1] // 2, groups=theta.groups)


def conv_gradient(cells: Tensor, gates: Tensor, theta: Parameters) -> tuple[Tensor, Tensor]:
    """dF/dW = sum_p v 1[a > 0] patch_p(I) and dF/db = sum_p v 1[a > 0], summed over the first dimension as well."""
    padding = theta.weight.shape[-1] // 2
    weight = conv2d_weight(cells, theta.weight.shape, gates, padding=padding, groups=theta.groups)
    return weight, gates.sum((0, 2, 3))


def contrast(pair: Tensor, theta: Parameters) -> tuple[Parameters, Tensor, Tensor]:
    """Bracket of Eq. 5, dF(I_z)/dtheta - dF(I_s)/dtheta, for ``pair`` = (I_z, I_s) of shape (2, N*D, h, w).

    dF/dv = relu(a). Returns the gradients, relu(a) of I_s, which is above zero where its mask is on, and the curvature of
    W (N,): a constant image c makes dF/dW = c sum_p gate(p) on each tap, and k^2 taps of a cell make an image of that again,
    so a step of rate r for each position takes r k^2 sum_c mean_p(gate)^2 of a constant residual away.
    """
    a = responses(pair, theta)
    gates = gate(a, theta)
    gates[1:].neg_()  # so that one product gives the difference
    weight, bias = conv_gradient(pair, gates, theta)
    rectified = a.relu_()
    coherent = gates[0].mean((1, 2), dtype=theta.fc.dtype).square().unflatten(0, (theta.groups, -1)).sum(1)
    gradients = Parameters(weight, bias, rectified[:1] - rectified[1:], theta.groups)
    return gradients, rectified[1:], theta.weight.shape[-1] ** 2 * coherent


def mean_square(cells: Tensor, groups: int) -> Tensor:
    """Mean square of each image of cells (1, N*D, h, w) -> (N,)."""
    return cells.square().mean((0, 2, 3)).unflatten(0, (groups, -1)).mean(1)


def energy(a: Tensor, theta: Parameters) -> Tensor:
    """U = -F of each image from its responses: (B, N*C, h, w) -> (B, N)."""
    return -(theta.fc * a.relu()).unflatten(1, (theta.groups, -1)).sum((2, 3, 4))
