"""Baselines that train a network on each image, as OAG does: Deep Image Prior (Table VI) and an auto-encoder (IV-H).

Both fit a randomly initialised network to the image with Adam on the mean squared error, and stop before it fits the noise.
The contract is that of :mod:`oag_transform.baselines.filters`. Images are processed one by one; results have no gradient.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from .. import _checks
from ..generator import energy
from ..images import to_model_units, to_pixels
from .base import Fitted


class DeepImagePrior(Fitted):
    """Deep Image Prior (Ulyanov, Vedaldi, Lempitsky, CVPR 2018; DIP in Table VI of the paper).

    An hourglass network with skip connections maps a fixed random tensor z ~ U(0, 0.1) to the image. Structure is
    learned before noise, so that stopping after ``steps`` removes noise. The result is an exponential average of the
    outputs, which starts with the first one, as in the authors' denoising.

    The defaults were chosen by PSNR to the clean image on images with Gaussian noise, for seconds per image on a CPU.
    The authors' networks are ``channels=(128,) * 5, skip_channels=(4,) * 5, input_channels=32, steps=3000`` (denoising)
    and ``channels=(8, 16, 32, 64, 128), skip_channels=(0, 0, 0, 4, 4), input_channels=3, steps=2400`` (JPEG artefacts),
    both with ``input_noise=1 / 30, average=0.99``; their return to an earlier step after a jump of the loss is omitted.

    Args:
        steps: updates of the network. More of them keep more detail, adversarial noise included.
        channels: width of each scale, the finest first; each scale halves the resolution.
        skip_channels: width of the skip connection of each scale, 0 for none.
        input_channels: channels of z.
        lr: learning rate of Adam.
        input_noise: standard deviation of Gaussian noise that is added to z, anew in each step. It slows learning down.
        average: weight of the earlier outputs in the average; 0 takes the last output.
        seed: an integer repeats the result, ``None`` draws fresh entropy in each call.
        progress: show a progress bar.

    Raises:
        ValueError: bad hyper-parameters.
    """

    def __init__(
        self,
        *,
        steps: int = 300,
        channels: Sequence[int] = (16, 16, 16, 16, 16),
        skip_channels: Sequence[int] = (4, 4, 4, 4, 4),
        input_channels: int = 16,
        lr: float = 0.01,
        input_noise: float = 0.0,
        average: float = 0.95,
        seed: int | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.steps = _checks.integer("steps", steps, at_least=1)
        self.channels = tuple(_checks.integer("channels: each", width, at_least=1) for width in channels)
        self.skip_channels = tuple(_checks.integer("skip_channels: each", width) for width in skip_channels)
        if not self.channels or len(self.channels) != len(self.skip_channels):
            raise ValueError(
                f"channels and skip_channels must have one entry for each scale, got {channels!r} and {skip_channels!r}"
            )
        self.input_channels = _checks.integer("input_channels", input_channels, at_least=1)
        self.lr = _checks.number("lr", lr, at_least=0)
        self.input_noise = _checks.number("input_noise", input_noise, at_least=0)
        self.average = _checks.number("average", average, at_least=0, below=1)
        self.seed = _checks.seed(seed)
        self.progress = _checks.flag("progress", progress)

    def _fit(self, image: Tensor, generator: Generator) -> Tensor:
        network = skip_network(self.input_channels, image.shape[1], self.channels, self.skip_channels)
        initialise(network, generator, image.dtype)
        factor = 2 ** len(self.channels)
        # two cells at the coarsest scale: one can be neither reflected nor normalised
        size = [factor * max(2, math.ceil(side / factor)) for side in image.shape[-2:]]
        z = image.new_empty(1, self.input_channels, *size).uniform_(0, 0.1, generator=generator)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        mean = image
        for step in tqdm(range(self.steps), desc="deep image prior", unit="step", leave=False, disable=not self.progress):
            noise = self.input_noise * torch.empty_like(z).normal_(generator=generator) if self.input_noise else 0
            output = network(z + noise)[..., : image.shape[-2], : image.shape[-1]]
            optimizer.zero_grad()
            F.mse_loss(output, image).backward()
            optimizer.step()
            mean = mean.lerp(output.detach(), 1 - self.average if step else 1)
        return mean


class OnlineAutoencoder(Fitted):
    """The auto-encoder of section IV-H: convolution, FC layer to one scalar, tanh, FC layer to a tensor, deconvolution.

    The image is the input and the target of one update per step, in contrast to the two-step update of OAG. After ``steps``
    updates, the output of the auto-encoder replaces the image. The convolution is that of OAG. Weights are initialised as in
    PyTorch's layers, U(+-1/sqrt(fan_in)).

    The paper names neither the non-linearity nor the optimiser. A ReLU of one scalar can die. A leaky ReLU is unbounded, and
    the scalar, a sum over all positions, diverged in trials. This implementation uses tanh and Adam. The learning rate and
    ``steps`` were chosen by PSNR to the clean image on images with Gaussian noise.

    Args:
        steps: T_N, updates of the auto-encoder. More of them keep more detail, adversarial noise included.
        kernel_size: side of the kernels in pixels.
        stride: stride of the convolution and the deconvolution in pixels.
        filters: number of filters.
        lr: learning rate of Adam.
        scale: grey levels (of 255) in a model unit.
        seed: an integer repeats the result, ``None`` draws fresh entropy in each call.
        progress: show a progress bar.

    Raises:
        ValueError: bad hyper-parameters.
    """

    def __init__(
        self,
        *,
        steps: int = 80,
        kernel_size: int = 15,
        stride: int = 3,
        filters: int = 64,
        lr: float = 0.005,
        scale: float = 8.0,
        seed: int | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.steps = _checks.integer("steps", steps, at_least=1)
        self.kernel_size = _checks.integer("kernel_size", kernel_size, at_least=1)
        self.stride = _checks.integer("stride", stride, at_least=1)
        if self.kernel_size < self.stride:
            raise ValueError(f"kernel_size must be at least stride, got kernel_size={kernel_size} and stride={stride}")
        self.filters = _checks.integer("filters", filters, at_least=1)
        self.lr = _checks.number("lr", lr, at_least=0)
        self.scale = _checks.number("scale", scale, above=0)
        self.seed = _checks.seed(seed)
        self.progress = _checks.flag("progress", progress)

    def _fit(self, image: Tensor, generator: Generator) -> Tensor:
        reference = to_model_units(image, self.scale)
        theta = initial_weights(
            generator,
            image.shape,
            kernel_size=self.kernel_size,
            stride=self.stride,
            filters=self.filters,
            dtype=image.dtype,
        )
        optimizer = torch.optim.Adam(theta, lr=self.lr)
        for _ in tqdm(range(self.steps), desc="auto-encoder", unit="step", leave=False, disable=not self.progress):
            optimizer.zero_grad()
            F.mse_loss(autoencode(reference, theta, self.stride), reference).backward()
            optimizer.step()
        with torch.no_grad():
            return to_pixels(autoencode(reference, theta, self.stride), self.scale)


def skip_network(inputs: int, outputs: int, channels: Sequence[int], skip_channels: Sequence[int]) -> nn.Module:
    """The authors' hourglass, (1, inputs, H, W) -> (1, outputs, H, W) in (0, 1), on the meta device: it has no weights yet.

    H and W are multiples of 2^scales, at least twice that.
    """
    with torch.device("meta"):
        return nn.Sequential(_Scale(inputs, channels, skip_channels), nn.Conv2d(channels[0], outputs, 1), nn.Sigmoid())


def initialise(network: nn.Module, generator: Generator, dtype: torch.dtype) -> None:
    """Initialise a network from the meta device on the generator's device, as PyTorch's layers do by default."""
    network.to(dtype).to_empty(device=generator.device)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


class _Scale(nn.Module):
    """One scale of the hourglass with all coarser ones in it: (1, inputs, H, W) -> (1, channels[0], H, W)."""

    def __init__(self, inputs: int, channels: Sequence[int], skip_channels: Sequence[int]) -> None:
        super().__init__()
        width, *coarser = channels
        joined = skip_channels[0] + (coarser[0] if coarser else width)
        self.skip = _block(inputs, skip_channels[0], 1) if skip_channels[0] else None
        self.down = nn.Sequential(_block(inputs, width, 3, stride=2), _block(width, width, 3))
        self.coarser = _Scale(width, coarser, skip_channels[1:]) if coarser else nn.Identity()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.merge = nn.Sequential(_norm(joined), _block(joined, width, 3), _block(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.up(self.coarser(self.down(x)))
        return self.merge(deep if self.skip is None else torch.cat([self.skip(x), deep], dim=1))


def _block(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, padding_mode="reflect")
    return nn.Sequential(convolution, _norm(outputs), nn.LeakyReLU(0.2, inplace=True))


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)  # always the statistics of this image


class Weights(NamedTuple):
    """Weights of the auto-encoder for one image of an h x w grid of positions."""

    encoder: Tensor  # (filters, channels, K, K)
    encoder_bias: Tensor  # (filters,)
    squeeze: Tensor  # (1, filters, h, w)
    squeeze_bias: Tensor  # ()
    expand: Tensor  # (1, filters, h, w)
    expand_bias: Tensor  # (1, filters, h, w)
    decoder: Tensor  # (filters, channels, K, K)
    decoder_bias: Tensor  # (channels,)


def initial_weights(
    generator: Generator, shape: Sequence[int], *, kernel_size: int, stride: int, filters: int, dtype: torch.dtype
) -> Weights:
    """Random weights for an image of ``shape`` (1, channels, H, W), U(+-1/sqrt(fan_in)), that require gradients."""
    channels, height, width = shape[1:]
    tensor = (1, filters, math.ceil(height / stride), math.ceil(width / stride))
    kernel = (filters, channels, kernel_size, kernel_size)

    def uniform(shape: Sequence[int], fan_in: int) -> Tensor:
        # the fastest layout for convolutions of cells
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        empty = torch.empty(tuple(shape), dtype=dtype, device=generator.device)
        drawn = empty.uniform_(-1, 1, generator=generator).div_(math.sqrt(fan_in))
        return drawn.contiguous(memory_format=layout).requires_grad_()

    taps, values = channels * kernel_size**2, math.prod(tensor)
    return Weights(
        encoder=uniform(kernel, taps),
        encoder_bias=uniform((filters,), taps),
        squeeze=uniform(tensor, values),
        squeeze_bias=uniform((), values),
        expand=uniform(tensor, 1),
        expand_bias=uniform(tensor, 1),
        decoder=uniform(kernel, taps),
        decoder_bias=uniform((channels,), taps),
    )


def autoencode(images: Tensor, theta: Weights, stride: int) -> Tensor:
    """The auto-encoder (IV-H), (1, channels, H, W) in model units -> the same.

    Kernels are centred on their stride's pixels as in :mod:`oag_transform.generator.energy`, with zeros outside of the image.
    """
    padding = energy.kernel_cells(theta.encoder.shape[-1], stride) // 2
    kernels = energy.kernel_to_cells(theta.encoder, stride).contiguous(memory_format=torch.channels_last)
    responses = F.conv2d(energy.to_cells(images, stride), kernels, theta.encoder_bias, padding=padding)
    code = torch.tanh((responses * theta.squeeze).sum() + theta.squeeze_bias)
    kernels = energy.kernel_to_cells(theta.decoder, stride).contiguous(memory_format=torch.channels_last)
    cells = F.conv_transpose2d(theta.expand * code + theta.expand_bias, kernels, padding=padding)
    return energy.from_cells(cells, stride, images.shape) + theta.decoder_bias[:, None, None]
