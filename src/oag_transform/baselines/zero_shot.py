"""Zero-shot denoisers: a small network is trained on the noisy image alone, to predict one half of its pixels from the other.

The contract is that of :mod:`oag_transform.baselines.filters`; images are processed one by one. Together with
:class:`~oag_transform.baselines.per_image.DeepImagePrior`, these denoisers need no pretrained weights. Noise2Fast was chosen
beside ZS-N2N because it needs no noise level, has published code and has a stopping rule. Self2Self takes thousands of times as
long, and Blind2Unblind is trained on a data set.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from .. import _checks
from ._batches import draw_integer, generators, one_by_one, with_gradients
from .base import Baseline, Fitted
from .per_image import initialise


class ZeroShotNoise2Noise(Baseline):
    """ZS-N2N (Mansour & Heckel, CVPR 2023, section 3): the image minus its noise, predicted by a network of two hidden layers.

    Two half-size images, the means of the two diagonals of each 2 x 2 block, show the same content with independent noise. The
    network is trained to predict each from the other (residual loss), and to act on the halves as on the whole (consistency
    loss). Defaults are those of the authors' code; the learning rate is halved after three quarters of the steps.

    It has a gradient of its own, that of the trained network. The dependence of the training on the image is ignored.

    Args:
        steps: updates of the network by Adam.
        channels: width of the hidden layers.
        lr: learning rate.
        seed: see :mod:`.filters`; the network starts at random.
        progress: show a progress bar.
    """

    own_gradient = True

    def __init__(
        self, *, steps: int = 2000, channels: int = 48, lr: float = 0.001, seed: int | None = None, progress: bool = False
    ) -> None:
        super().__init__()
        self.steps = _checks.integer("steps", steps, at_least=1)
        self.channels = _checks.integer("channels", channels, at_least=1)
        self.lr = _checks.number("lr", lr, above=0)
        self.seed = _checks.seed(seed)
        self.progress = _checks.flag("progress", progress)

    def _defended(self, batch: Tensor, indices: Sequence[int]) -> Tensor:
        return one_by_one(batch, self._denoised, generators(self.seed, indices, batch.device))

    def _denoised(self, image: Tensor, generator: Generator) -> Tensor:
        with with_gradients():
            network = self._trained(_even(image.detach().clone()), generator)
        return (image - network(image)).clamp(0, 1)

    def _trained(self, image: Tensor, generator: Generator) -> nn.Module:
        with torch.device("meta"):
            network = nn.Sequential(
                nn.Conv2d(image.shape[1], self.channels, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(self.channels, self.channels, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(self.channels, image.shape[1], 1),
            )
        initialise(network, generator, image.dtype)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(3 * self.steps // 4, 1), gamma=0.5)
        halves = diagonals(image)
        for _ in tqdm(range(self.steps), desc="ZS-N2N", unit="step", leave=False, disable=not self.progress):
            denoised = halves - network(halves)
            residual = F.mse_loss(denoised, halves.flip(0))
            consistency = F.mse_loss(denoised, diagonals(image - network(image)))
            optimizer.zero_grad()
            (residual + consistency).backward()
            optimizer.step()
            schedule.step()
        return network.requires_grad_(False)


def diagonals(image: Tensor) -> Tensor:
    """Means of the two diagonals of 2 x 2 blocks: (1, C, H, W) with even H and W -> (2, C, H/2, W/2)."""
    blocks = F.pixel_unshuffle(image, 2).unflatten(1, (-1, 4))[0]
    return torch.stack([(blocks[:, 0] + blocks[:, 3]) / 2, (blocks[:, 1] + blocks[:, 2]) / 2])


class Noise2Fast(Fitted):
    """Noise2Fast (Lequyer et al., Nature Machine Intelligence 2022): checkerboards of the image predict one another.

    The pixels of each colour of a checkerboard, moved together along one axis, form half an image; there are two colours and
    two axes. A network of eight convolutions learns, by binary cross-entropy, to predict one half from the other, and denoises
    the whole image after each step. Training ends when ``patience`` steps have brought the result no closer to the noisy image.
    The output is the mean of the last 105 results without the last one. This follows the authors' code (N2F.py), with three
    differences: the channels of a colour image are denoised together, ``steps`` limits the training, and a constant image
    remains unchanged.

    It has no gradient.

    Args:
        patience: number of steps without a closer result after which training ends.
        steps: largest number of updates of the network by Adam.
        channels: width of the blocks.
        lr: learning rate.
        seed: see :mod:`.filters`; the network starts at random, and pairs are drawn.
        progress: show a progress bar.
    """

    def __init__(
        self,
        *,
        patience: int = 100,
        steps: int = 5000,
        channels: int = 64,
        lr: float = 0.001,
        seed: int | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.patience = _checks.integer("patience", patience, at_least=1)
        self.steps = _checks.integer("steps", steps, at_least=1)
        self.channels = _checks.integer("channels", channels, at_least=1)
        self.lr = _checks.number("lr", lr, above=0)
        self.seed = _checks.seed(seed)
        self.progress = _checks.flag("progress", progress)

    def _fit(self, image: Tensor, generator: Generator) -> Tensor:
        low, high = image.aminmax()
        if low == high:
            return image
        stretched = _even((image - low) / (high - low))
        halves = [half for axis in (2, 3) for half in _checkerboards(stretched, axis)]
        pairs = list(zip(halves, (halves[1], halves[0], halves[3], halves[2]), strict=True))
        network = self._network(image, generator)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        recent: list[Tensor] = []
        closest, since = float("inf"), 0
        for _ in tqdm(range(self.steps), desc="Noise2Fast", unit="step", leave=False, disable=not self.progress):
            half, other = pairs[draw_integer(0, 4, generator)]
            optimizer.zero_grad()
            F.binary_cross_entropy(network(half), other).backward()
            optimizer.step()
            with torch.no_grad():
                recent = [*recent[-105:], network(stretched)]
                error = F.mse_loss(recent[-1], stretched).item()
            closest, since = (error, 0) if error < closest else (closest, since + 1)
            if since > self.patience:
                break
        mean = torch.cat(recent[:-1] or recent).mean(0, keepdim=True)
        return (low + (high - low) * mean[..., : image.shape[-2], : image.shape[-1]]).clamp(0, 1)

    def _network(self, image: Tensor, generator: Generator) -> nn.Module:
        widths = [image.shape[1], *[self.channels] * 8]
        with torch.device("meta"):
            convolutions = [nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)]
            hidden = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
            network = nn.Sequential(*hidden, nn.Conv2d(self.channels, image.shape[1], 1), nn.Sigmoid())
        initialise(network, generator, image.dtype)
        return network


def _checkerboards(image: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The two colours of a checkerboard on an image (1, C, H, W), each moved together along ``axis`` (2 or 3)."""
    first, second = image.unflatten(axis, (-1, 2)).unbind(axis + 1)
    odd = torch.arange(image.shape[5 - axis], device=image.device) % 2 == 1
    odd = odd if axis == 2 else odd[:, None]
    return torch.where(odd, second, first), torch.where(odd, first, second)


def _even(image: Tensor) -> Tensor:
    """An image with even sides: the last row or column is repeated if necessary."""
    return F.pad(image, (0, image.shape[-1] % 2, 0, image.shape[-2] % 2), mode="replicate")
