"""PixelDefend (Song et al., 2018), with a small PixelCNN (van den Oord et al., 2016) to train on a user's images.

All context enters this PixelCNN in its first layer, a causal window of r rows above and r pixels to the left. Pixel (i, j)
then needs only pixels of smaller t = j + (r + 1) i, and all those of one t are decoded at once: W + (r + 1)(H - 1) steps for
a batch of images, in place of H W in raster order, to the same result.
"""

import copy
import hashlib
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from .. import _checks, atomic
from .base import Baseline

logger = logging.getLogger(__name__)

_FORMAT = "oag_transform PixelCNN 1"
_GAIN = 8 / 127.5  # of colour differences in the input: neighbours differ by little
_MEAN_UNIT, _LOG_SCALE_START, _MIN_LOG_SCALE = 16.0, 1.5, -2.0  # of the logistics, in grey levels
_POSITIONS = 8192  # pixels that PixelCNN.forward works on together
_CHUNK = 16  # images that are purified together


class Mixture(NamedTuple):
    """Logistics over grey levels, each (..., components): log weights, means, and logarithms of the scales."""

    log_weight: Tensor
    mean: Tensor
    log_scale: Tensor

    def log_prob(self, levels: Tensor) -> Tensor:
        """Log-probability in nats of grey levels (..., V), 0 to 255; the bins of 0 and 255 take in the tails.

        For a bin from a to b (standardised), s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), which loses no digits.
        """
        inverse = torch.exp(-self.log_scale)[..., None, :]
        centred = (levels[..., None] - self.mean[..., None, :]) * inverse
        first, last = (levels == 0)[..., None], (levels == 255)[..., None]
        below = F.logsigmoid(inverse / 2 + centred).masked_fill(last, 0)
        above = F.logsigmoid(inverse / 2 - centred).masked_fill(first, 0)
        width = torch.log(-torch.expm1(-inverse)).masked_fill(first | last, 0)
        return torch.logsumexp(self.log_weight[..., None, :] + below + above + width, -1)


class Features(NamedTuple):
    """Features of windows: (..., inputs), (..., hidden), and (..., C) base colours, to which colours are relative."""

    inputs: Tensor
    hidden: Tensor
    base: Tensor


class PixelCNN(nn.Module):
    """Density of 8-bit images, value by value in raster order, R, G, B within a pixel (van den Oord et al., 2016, Sec. 2, 3).

    A masked convolution over the r x (2r + 1) pixels above and the r to the left, then 1 x 1 layers; each value has a
    discretised mixture of logistics (PixelCNN++, Salimans et al., 2017, Eq. 2), and G also sees R, and B both, of its pixel.
    Input colours are relative to the mean of the left and the upper pixel, with an indicator of positions inside the image.

    Args:
        channels: 3 (RGB) or 1.
        radius: r of the window, in pixels.
        hidden: width of the layers.
        layers: residual layers after the first one.
        components: logistics in a mixture.
        seed: of the initial weights. Global random state is neither read nor changed.

    Raises:
        ValueError, TypeError: bad hyper-parameters.
    """

    def __init__(
        self, channels: int = 3, *, radius: int = 3, hidden: int = 128, layers: int = 2, components: int = 5, seed: int = 0
    ) -> None:
        super().__init__()
        channels = _checks.choice("channels", _checks.integer("channels", channels), (1, 3))
        sizes = {"radius": radius, "hidden": hidden, "layers": layers, "components": components}
        sizes = {name: _checks.integer(name, value, at_least=1) for name, value in sizes.items()}
        radius, hidden, layers, components = sizes.values()
        self.settings = {"channels": channels, **sizes}
        self.channels, self.radius = channels, radius
        g = Generator().manual_seed(_checks.integer("seed", seed))
        inputs = 2 * radius * (radius + 1) * (channels + 1) + channels
        self.first = _linear(inputs, hidden, 1, g)
        self.residual = nn.ModuleList([_linear(hidden, hidden, 0.5, g) for _ in range(layers)])
        self.heads = nn.ModuleList([_linear(hidden + c, hidden, 1, g) for c in range(channels)])
        self.mixtures = nn.ModuleList([_linear(hidden, 3 * components, 0.3, g) for _ in range(channels)])
        self.predictors = nn.ModuleList([_linear(inputs + c, 1, 0, g) for c in range(channels)])  # linear part of the means

    def forward(self, images: Tensor) -> Tensor:
        """Log-probability, in nats, of each value given all those before it: (N, C, H, W) -> the same shape.

        Args:
            images: uint8, or floating point in [0, 1] (rounded to 8 bits), of the model's number of channels.

        Raises:
            ValueError, TypeError: not such images, or on another device than the model.
        """
        levels = self.to_levels(images)
        if not len(levels):
            return levels
        (height, width), stride = levels.shape[2:], levels.shape[3] + 2 * self.radius
        sizes = (len(levels), height, width)
        image, row, column = torch.meshgrid(*(torch.arange(size, device=levels.device) for size in sizes), indexing="ij")
        at = ((image * (height + self.radius) + row) * stride + column).flatten()
        padded, offsets = self.pad(levels).flatten(0, 1), self.offsets(stride)
        with torch.autocast(levels.device.type, enabled=False):  # not the caller's
            result = torch.cat([self.log_prob(padded[part[:, None] + offsets]) for part in at.split(_POSITIONS)])
        return result.unflatten(0, sizes).permute(0, 3, 1, 2).contiguous()

    def to_levels(self, images: Tensor) -> Tensor:
        """Check images as :meth:`forward` takes them -> grey levels 0 to 255, in the dtype of the weights."""
        levels, weight = _to_uint8(images), self.first.weight
        if images.shape[1] != self.channels:
            raise ValueError(f"expected images of {self.channels} channel(s), as the PixelCNN has, got {tuple(images.shape)}")
        if images.device != weight.device:
            raise ValueError(f"expected images on {weight.device}, where the PixelCNN is, got {images.device}")
        return levels.to(weight.dtype)

    def pad(self, levels: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, (H + r)(W + 2r), C + 1): the colours and an indicator of the inside; zeros outside."""
        marked = torch.cat([levels, torch.ones_like(levels[:, :1])], 1)
        return F.pad(marked, (self.radius, self.radius, self.radius, 0)).permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    def offsets(self, stride: int) -> Tensor:
        """(K + 1,) addresses, in padded rows of ``stride`` pixels, of the window of pixel (0, 0) and, last, of the pixel."""
        r = self.radius
        addresses = torch.arange((r + 1) * stride, device=self.first.weight.device).unflatten(0, (r + 1, stride))
        return addresses[:, : 2 * r + 1].flatten()[: r * (2 * r + 1) + r + 1]

    def features(self, windows: Tensor) -> Features:
        """Features of windows (..., K + 1, C + 1) of padded images, without the pixel itself."""
        r = self.radius
        inside = windows[..., :-1, -1:]
        colours = (windows[..., :-1, :-1] - 127.5) * inside
        near = [r * (2 * r + 1) + r - 1, (r - 1) * (2 * r + 1) + r]  # left, above
        base = colours[..., near, :].sum(-2) / inside[..., near, :].sum(-2).clamp(min=1)
        relative = _GAIN * (colours - inside * base[..., None, :])
        inputs = torch.cat([relative.flatten(-2), inside.flatten(-2), base / 127.5], -1)
        hidden = F.silu(self.first(inputs))
        for layer in self.residual:
            hidden = hidden + F.silu(layer(hidden))
        return Features(inputs, hidden, base + 127.5)

    def mixture(self, features: Features, earlier: Tensor) -> Mixture:
        """Distribution of the next channel of pixels, given their ``earlier`` channels (..., c)."""
        c = earlier.shape[-1]
        seen = _GAIN * (earlier - features.base[..., :c])
        raw = self.mixtures[c](F.silu(self.heads[c](torch.cat([features.hidden, seen], -1))))
        weight, mean, log_scale = raw.chunk(3, -1)
        predicted = self.predictors[c](torch.cat([features.inputs, seen], -1))
        return Mixture(
            F.log_softmax(weight, -1),
            features.base[..., c : c + 1] + _MEAN_UNIT * (predicted + mean),
            (_LOG_SCALE_START + log_scale).clamp(min=_MIN_LOG_SCALE),
        )

    def log_prob(self, windows: Tensor) -> Tensor:
        """Log-probability in nats (..., C) of the pixels of windows (..., K + 1, C + 1)."""
        features, pixel = self.features(windows), windows[..., -1, :-1]
        values = [self.mixture(features, pixel[..., :c]).log_prob(pixel[..., c : c + 1]) for c in range(self.channels)]
        return torch.cat(values, -1)

    def extra_repr(self) -> str:
        """The settings and a hash of the weights."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{settings}, weights={digest.hexdigest()[:12]}"


def fit_pixelcnn(
    images: Tensor,
    *,
    radius: int = 3,
    hidden: int = 128,
    layers: int = 2,
    components: int = 5,
    steps: int = 10_000,
    batch: int = 512,
    lr: float = 5e-3,
    seed: int = 0,
    progress: bool = False,
) -> PixelCNN:
    """Train a :class:`PixelCNN` on images by maximum likelihood, on their device.

    Adam on random pixels. The learning rate rises over 50 steps and falls to zero along a cosine. The default takes about two
    minutes on one CPU core. Logs the bits per dimension of training ten times.

    Args:
        images: (N, C, H, W), uint8 or floating point in [0, 1] (rounded to 8 bits), C = 1 or 3, N at least 1.
        radius: see :class:`PixelCNN`, as for ``hidden``, ``layers`` and ``components``.
        hidden: width of the layers.
        layers: residual layers.
        components: logistics in a mixture.
        steps: of Adam.
        batch: pixels in a step.
        lr: highest rate of Adam.
        seed: of the weights and the pixels. Global random state is neither read nor changed.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: bad hyper-parameters or images.
        RuntimeError: training diverged.
    """
    levels = _to_uint8(images)
    steps, batch = _checks.integer("steps", steps, at_least=1), _checks.integer("batch", batch, at_least=1)
    lr, seed = _checks.number("lr", lr, above=0), _checks.integer("seed", seed)
    if not len(images):
        raise ValueError("expected at least one image to train on, got none")
    model = PixelCNN(images.shape[1], radius=radius, hidden=hidden, layers=layers, components=components, seed=seed)
    model.to(images.device)
    radius = model.radius
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    generator = Generator(images.device).manual_seed(seed)
    (height, width), stride = images.shape[2:], images.shape[3] + 2 * radius
    padded, offsets = model.pad(levels).flatten(0, 1), model.offsets(stride)
    total, report = 0.0, max(1, steps // 10)
    for step in tqdm(range(1, steps + 1), "PixelCNN", disable=not progress):
        rate = lr * min(1, step / 50) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        image, row, column = (
            torch.randint(size, (batch,), generator=generator, device=images.device) for size in (len(images), height, width)
        )
        at = (image * (height + radius) + row) * stride + column
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            loss = -model.log_prob(padded[at[:, None] + offsets].float()).mean() / math.log(2)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        total += loss.item()
        if step % report == 0:
            logger.info("step %d of %d: %.3f bits per dimension", step, steps, total / report)
            if not math.isfinite(total):
                raise RuntimeError(f"training diverged by step {step}; lower lr = {lr}")
            total = 0.0
    return model.eval()


@torch.no_grad()
def bits_per_dim(model: PixelCNN, images: Tensor) -> float:
    """Mean of -log2 p over all values of ``images`` (see :meth:`PixelCNN.forward`); 8 is a uniform distribution."""
    return -model(images).double().mean().item() / math.log(2)


def save_pixelcnn(model: PixelCNN, path: str | os.PathLike[str]) -> None:
    """Write the settings and weights of ``model``, for :func:`load_pixelcnn`."""
    atomic.save_checkpoint({"format": _FORMAT, "settings": model.settings, "state": model.state_dict()}, Path(path))


def load_pixelcnn(path: str | os.PathLike[str]) -> PixelCNN:
    """Read a model that :func:`save_pixelcnn` wrote, onto the CPU. No code in the file is executed.

    Raises:
        ValueError: another kind of file.
    """
    with open(path, "rb") as file:  # a missing file raises its own error
        known = zipfile.is_zipfile(file)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True) if known else None
    except (RuntimeError, pickle.UnpicklingError):
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"expected a file that save_pixelcnn wrote, got {os.fspath(path)!r}")
    model = PixelCNN(**content["settings"])
    model.to(content["state"]["first.weight"].dtype).load_state_dict(content["state"])
    return model.eval()


class PixelDefend(Baseline):
    """Purify images by greedy decoding of a PixelCNN (Song et al., 2018, Algorithm 1).

    In raster order, each value x becomes the most probable one of [x - epsilon, x + epsilon] within [0, 255], given those
    already purified. It is deterministic, and computed in float64: a choice changed by rounding would change all later ones.
    Images are rounded to 8 bits first, and have the channels and the device of the model. It has no gradient.

    Args:
        model: trained on images like the ones to purify (see :func:`fit_pixelcnn`). It is copied.
        epsilon: largest change of a value in grey levels, 0 to 255 (the paper's is 16).

    Raises:
        ValueError, TypeError: bad arguments.
    """

    def __init__(self, model: PixelCNN, epsilon: int = 16) -> None:
        super().__init__()
        if not isinstance(model, PixelCNN):
            raise TypeError(f"model must be a PixelCNN, got {type(model).__name__}")
        self.epsilon = _checks.integer("epsilon", epsilon, at_most=255)
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to()``, ``.half()`` and others move the model to another device, and leave it in float64."""
        return super()._apply(lambda value: value.to(fn(value).device), recurse)  # type: ignore[no-untyped-call]

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        levels = self.model.to_levels(batch)
        with torch.no_grad():
            parts = [_greedy(self.model, part, self.epsilon) for part in levels.split(_CHUNK)]
        return torch.cat(parts) / 255


def _greedy(model: PixelCNN, levels: Tensor, epsilon: int) -> Tensor:
    """Algorithm 1 on grey levels (N, C, H, W), all pixels of one t = j + (r + 1) i at once."""
    height, width = levels.shape[2:]
    r, stride = model.radius, width + 2 * model.radius
    flat, offsets = model.pad(levels), model.offsets(stride)
    changes = torch.arange(-epsilon, epsilon + 1, device=levels.device)
    for t in range(width + (r + 1) * (height - 1)):
        first, last = max(0, -((width - 1 - t) // (r + 1))), min(height - 1, t // (r + 1))
        rows = torch.arange(first, last + 1, device=levels.device)
        at = rows * stride + t - (r + 1) * rows
        windows = flat[:, at[:, None] + offsets]
        features, pixel = model.features(windows), windows[..., -1, :-1]
        for c in range(model.channels):
            candidates = (pixel[..., c : c + 1] + changes).clamp(0, 255)
            best = model.mixture(features, pixel[..., :c]).log_prob(candidates).argmax(-1, keepdim=True)
            pixel[..., c : c + 1] = candidates.gather(-1, best)
        flat[:, at + offsets[-1], :-1] = pixel
    return flat.unflatten(1, (height + r, stride))[:, r:, r : r + width, :-1].permute(0, 3, 1, 2)


def _to_uint8(images: Tensor) -> Tensor:
    _checks.images(images, minimum_size=1)
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"expected a batch of images of shape (N, C, H, W), got {got}")
    plain = images.detach().as_subclass(Tensor)
    return plain if plain.dtype == torch.uint8 else (plain.double() * 255).round().clamp(0, 255).to(torch.uint8)


def _linear(inputs: int, outputs: int, gain: float, generator: Generator) -> nn.Linear:
    # the default initialisation draws from global random state
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.normal_(0, gain * math.sqrt(2 / inputs), generator=generator)
        layer.bias.zero_()
    return layer
