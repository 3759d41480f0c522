"""Several defenses as one."""

from typing import Any

from torch import Tensor, nn

from ..defended import applied


class Compose(nn.Module):
    """Defenses in sequence, such as noise and then a denoiser. Each gets ``index`` if it takes it."""

    def __init__(self, *defenses: nn.Module) -> None:
        super().__init__()
        self.defenses = nn.ModuleList(defenses)

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """The result of the last defense for images (N, C, H, W) in [0, 1]."""
        for defense in self.defenses:
            images = applied(defense, images, index)
        return images
