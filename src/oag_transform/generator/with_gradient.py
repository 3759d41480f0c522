"""Algorithm 1 for a batch with a gradient: closed-form gradients in products that autograd differentiates once.

Adaptive attacks with exact gradients use it. :mod:`.reference` says the same of one image in autograd alone, which then has to
differentiate twice and takes several times as long. The N images are the batch of all products. With P = h * w positions and K
taps of a kernel:

    patches (N, K, P)    weight (N, C, K)    bias (N, C, 1)    fc, responses, gates (N, C, P)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import noise_level, streams
from ..images import to_model_units, to_pixels
from . import energy, langevin
from .reference import StepFunction, heaviside, random_network
from .settings import Settings


def purify(
    images: Tensor, settings: Settings, *, seed: int, indices: list[int], step_function: StepFunction = heaviside
) -> Tensor:
    """Purify images (N, channels, H, W) in [0, 1], each with its own random stream of ``seed``, differentiably.

    The result is that of :class:`~oag_transform.OnlineAlternateGenerator` in the images' own precision, without the retry at
    smaller rates. ReLU masks, threshold and the halving of the rates are piecewise constant and have no derivative; a
    ``step_function`` of the same values may give one to the masks of Eq. 9 and to the threshold.

    Raises:
        ValueError: a ``compute_dtype`` other than that of the images.
    """
    s = settings
    if s.compute_dtype not in (None, images.dtype):
        raise ValueError(f"compute_dtype must be None: this loop works in the images' own dtype, got {s.compute_dtype}")
    count, channels, height, width = images.shape
    rows, columns = math.ceil(height / s.stride), math.ceil(width / s.stride)
    before = math.ceil((s.kernel_size - s.stride) / 2)  # kernels are centred on their stride
    after = s.kernel_size - s.stride - before
    padded = (rows * s.stride + before + after, columns * s.stride + before + after)

    def patches(of: Tensor) -> Tensor:
        return F.unfold(F.pad(of, (before, after, before, after)), s.kernel_size, stride=s.stride)

    def responses(of: Tensor) -> Tensor:
        return torch.baddbmm(bias, weight, of)

    def noise_std() -> Tensor:  # of the Langevin noise of T_I steps in the responses
        return whole_std * temperature.sqrt() * weight.norm(dim=2, keepdim=True)

    strength = noise_level.matching_strength(images) if s.strength is None else images.new_full((count,), s.strength)
    temperature = strength[:, None, None]
    reference = F.pad(to_model_units(images, s.scale), (0, columns * s.stride - width, 0, rows * s.stride - height))
    generators = streams.generators(seed, indices, images.device)
    thetas = [random_network(images[0], s, (rows, columns), generator) for generator in generators]
    weight = torch.stack([theta.weight for theta in thetas]).flatten(2)
    bias = torch.stack([theta.bias for theta in thetas])[..., None]
    fc = torch.stack([theta.fc for theta in thetas]).flatten(2)
    seen, image = patches(reference), torch.zeros_like(reference)
    updates, steps = s.image_updates
    decay, added_std = langevin.law(s.step_size, steps)
    whole_std = langevin.law(s.step_size, s.image_steps)[1]
    lr_factor, best = images.new_ones(count), images.new_full((count,), math.inf)
    velocity = torch.zeros_like(fc)
    taps = energy.kernel_cells(s.kernel_size, s.stride) ** 2
    mask = step_function(responses(patches(image)), noise_std())
    for step in range(1, s.network_steps + 1):
        for _ in range(updates):
            if s.langevin == "exact":
                mask = heaviside(responses(patches(image)), image)
            mode = F.fold(weight.mT.matmul(fc * mask), padded, s.kernel_size, stride=s.stride)
            mode = mode[..., before : before + rows * s.stride, before : before + columns * s.stride]  # Eq. 9
            normal = streams.fill_normal(image.new_empty(count, rows, columns, channels * s.stride**2), generators)
            noise = F.pixel_shuffle(normal.permute(0, 3, 1, 2), s.stride)
            image = decay * image + (1 - decay) * mode + added_std * temperature.sqrt()[..., None] * noise  # Eq. 3
        if step == s.network_steps:
            break
        drawn, deviation = patches(image), noise_std()
        of_reference, of_image = responses(seen), responses(drawn)
        gates, own = fc * (of_reference > 0), fc * (of_image > 0)
        weight_step = gates.matmul(seen.mT) - own.matmul(drawn.mT)  # the bracket of Eq. 5
        bias_step = (gates - own).sum(2, keepdim=True)
        fc_step = of_reference.relu() - of_image.relu()
        if s.threshold:
            limit = temperature * s.threshold * weight.norm(dim=2, keepdim=True)
            fc_step = fc_step * step_function(fc_step.abs() - limit, deviation)
        rate = images.new_full((count,), s.conv_lr)
        if s.adaptive_lr:
            with torch.no_grad():
                lr_factor, best = energy.slow_down(lr_factor, best, (reference - image).square().mean((1, 2, 3)))
            rate = (energy.STABLE / (taps * gates.mean(2).square().sum(1))).clamp(max=s.conv_lr)
        rate = (lr_factor * rate / (rows * columns))[:, None, None]
        mask = step_function(of_image, deviation)
        velocity = fc_step + s.momentum * velocity
        weight, bias = weight + rate * weight_step, bias + rate * bias_step  # Eq. 5
        fc = fc + (lr_factor * s.fc_lr)[:, None, None] * velocity
    return to_pixels(image[..., :height, :width], s.scale)
