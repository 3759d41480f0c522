"""A defense as a preprocessor of the Adversarial Robustness Toolbox, ART (extra ``art``)."""

from collections.abc import Callable
from typing import Any

from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import Tensor

from . import _checks
from .defended import applied
from .straight_through import clipped, straight_through
from .transform import OnlineAlternateGenerator


class DefensePreprocessor(PreprocessorPyTorch):  # type: ignore[misc]  # ART has no types
    """A defense for ``preprocessing_defences=[...]`` of ART's ``PyTorchClassifier`` with ``clip_values=(0, 1)``.

    ART differentiates ``forward`` if all preprocessors are PyTorch modules. ``forward`` therefore has the straight-through
    gradient (BPDA), and ART's attacks are adaptive attacks on the defense. The views of a
    :class:`~oag_transform.DefendedModel` are not included; for these, give ART the ``DefendedModel`` itself.

    Args:
        defense: a batch transform of [0, 1] images; default ``OnlineAlternateGenerator()``.
        clip: True: images outside [0, 1] are clipped to it, with the straight-through gradient, as ART's randomized smoothing
            needs it. False: the default defense raises an error for them.
        apply_fit: purify the training images of the classifier.
        apply_predict: purify the images for prediction.
        device_type: ``"gpu"`` or ``"cpu"``, as in ART.

    Example:
        >>> import torch
        >>> from art.estimators.classification import PyTorchClassifier
        >>> from oag_transform import OnlineAlternateGenerator
        >>> from oag_transform.art import DefensePreprocessor
        >>> target = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
        >>> defense = DefensePreprocessor(OnlineAlternateGenerator(network_steps=2, filters=4))
        >>> classifier = PyTorchClassifier(
        ...     target, torch.nn.CrossEntropyLoss(), (3, 16, 16), 4, clip_values=(0, 1), preprocessing_defences=[defense]
        ... )
        >>> classifier.predict(torch.rand(2, 3, 16, 16).numpy()).shape
        (2, 4)
    """

    params = ("defense", "clip")

    def __init__(
        self,
        defense: Callable[[Tensor], Tensor] | None = None,
        *,
        clip: bool = False,
        apply_fit: bool = False,
        apply_predict: bool = True,
        device_type: str = "gpu",
    ) -> None:
        super().__init__(device_type=device_type, is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.defense: Any = defense
        self.clip = clip
        self._check_params()

    def _check_params(self) -> None:  # ART calls it in set_params
        if self.defense is None:
            self.defense = OnlineAlternateGenerator()
        if not callable(self.defense) or isinstance(self.defense, type):
            raise TypeError(f"defense must be a batch transform or None, got {self.defense!r}")
        _checks.flag("clip", self.clip)

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """Purified images (N, C, H, W) in [0, 1], and the labels unchanged.

        Raises:
            TypeError, ValueError: bad images, or the defense doesn't return as many images.
        """
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point images in [0, 1], got {x.dtype}; divide 0-255 images by 255")
        x = clipped(x) if self.clip else x.clone()  # a copy: the defense may work in place
        return straight_through(x, lambda plain: _checks.purified(applied(self.defense, plain, 0), plain)), y
