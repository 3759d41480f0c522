"""Several defenses as one."""

from typing import Any

from torch import Tensor, nn

from .. import _checks
from ..defended import applied


class Compose(nn.Module):
    """Defenses in sequence, such as noise and then a denoiser.

    A defense that takes ``index`` gets a random stream for each image: number d of D gets stream ``index * D + d``, so that two
    defenses of one seed draw different numbers.
    """

    def __init__(self, *defenses: nn.Module) -> None:
        super().__init__()
        self.defenses = nn.ModuleList(defenses)

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """The result of the last defense for images (N, C, H, W) in [0, 1]."""
        first = _checks.indices(index, len(images))
        for d, defense in enumerate(self.defenses):
            images = applied(defense, images, [i * len(self.defenses) + d for i in first])
        return images
