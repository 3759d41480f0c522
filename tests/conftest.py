"""Where there is no GPU, the fused kernels run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():  # read when triton is imported, which torchvision may do
    os.environ.setdefault("TRITON_INTERPRET", "1")
