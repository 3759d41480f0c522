"""Several defenses as one."""

from typing import Any

from torch import Tensor, nn


class Compose(nn.Module):
    """One defense after the other, such as noise first and then what removes it; ``index`` goes to those that take one."""

    def __init__(self, *defenses: nn.Module) -> None:
        super().__init__()
        self.defenses = nn.ModuleList(defenses)

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """What the last defense makes of images (N, C, H, W) in [0, 1]."""
        for defense in self.defenses:
            images = defense(images, index=index)
        return images
