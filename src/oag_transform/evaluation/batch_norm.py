"""Batch normalization for noisy images: a target's statistics estimated again on what a denoiser makes of them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..defended import DefendedModel
from ..smoothed import SmoothedModel
from .store import fingerprint
from .targets import Target


def adapted(target: Target, denoiser: nn.Module, noise_std: float, images: Tensor, batch_size: int, seed: int) -> Target:
    """A target whose batch normalization has the means and variances of noisy images behind a denoiser; weights are as before.

    Args:
        target: the classifier; it is copied.
        denoiser: transform of [0, 1] batches.
        noise_std: of the noise that goes first, on the [0, 1] scale.
        images: (N, C, H, W) uint8, other ones than those that are certified: statistics are fixed before these are seen.
        batch_size: images that are normalized together; each batch counts alike.
        seed: of the noise.

    Raises:
        ValueError: the target has no batch normalization with statistics.
    """
    target = target._replace(model=copy.deepcopy(target.model))
    network, layers = target.model, batch_norms(target)
    noisy = SmoothedModel(DefendedModel(network, denoiser, shift=0), noise_std, samples=1, seed=seed)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:  # alone: dropout stays off
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    device = next(network.parameters()).device
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            noisy(images[start : start + batch_size].to(device).float() / 255, index=start)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    return target._replace(model=network, fingerprint=f"{fingerprint(network)}, batch norm of {target.fingerprint}")


def batch_norms(target: Target) -> list[_BatchNorm]:
    """A target's layers of batch normalization with statistics.

    Raises:
        ValueError: it has none.
    """
    layers = [layer for layer in target.model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        raise ValueError(f"expected a target with batch normalization, got {target.name}, which has none")
    return layers
