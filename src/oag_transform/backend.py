"""Which implementation of the network step works on a batch: PyTorch operators, or the fused CUDA kernels."""

import importlib.util
import os
from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]

AUTO = False  # "auto" takes the kernels once benchmarks.gpu has shown them right, and faster, on a GPU
MAX_FUSED_STRIDE = 6  # the kernels hold all channels * stride^2 channels of a cell at once: up to 108, padded to 128


def fused(backend: Backend, device: torch.device, dtype: torch.dtype, stride: int) -> bool:
    """Whether the fused kernels take images of this device and dtype (as they are worked on) at this stride.

    Raises:
        RuntimeError: ``backend="triton"``, and they can't; the message says why.
    """
    if backend == "torch" or (backend == "auto" and not AUTO):
        return False
    reason = _obstacle(backend, device, dtype, stride)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"backend='triton' can't work on these images: {reason}; use backend='auto' or 'torch'")
    return reason is None


def _obstacle(backend: Backend, device: torch.device, dtype: torch.dtype, stride: int) -> str | None:
    if dtype != torch.float32:
        return f"its state is float32, got {str(dtype).removeprefix('torch.')}"
    if stride > MAX_FUSED_STRIDE:
        return f"it supports strides up to {MAX_FUSED_STRIDE}, got {stride}"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # runs on the CPU, for tests
    if not interpreted:
        if device.type != "cuda" or torch.version.cuda is None:
            return f"it needs an NVIDIA GPU, got a tensor on {device}{' (ROCm)' if device.type == 'cuda' else ''}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with PyTorch for CUDA on Linux)"
    return None
