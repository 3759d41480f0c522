"""Several defenses as one."""

from typing import Any

from torch import Tensor, nn

from ..defended import in_sequence


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
        return in_sequence(list(self.defenses), images, index)
