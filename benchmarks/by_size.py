"""Three settings of OAG for images of 64 to 128 pixels, for ``oag-transform evaluate tune --defenses benchmarks.by_size:...``.

The kernels of the default at 32 and at 224 pixels, both at the default's threshold and scale for the size of the image, and the
whole setting for 224 pixels. The commands are in docs/data/flower17-64/tune.json and those of the other sizes.
"""

from typing import Any

from oag_transform import OnlineAlternateGenerator

KERNELS = ("kernel_size", "stride", "filters")


def small_kernels(seed: int) -> OnlineAlternateGenerator:
    """The kernels of the default at 32 pixels."""
    return OnlineAlternateGenerator(**_default_at(32, KERNELS), seed=seed)


def large_kernels(seed: int) -> OnlineAlternateGenerator:
    """The kernels of the default at 224 pixels."""
    return OnlineAlternateGenerator(**_default_at(224, KERNELS), seed=seed)


def setting_of_224(seed: int) -> OnlineAlternateGenerator:
    """Kernels, threshold and scale of the default at 224 pixels."""
    return OnlineAlternateGenerator(**_default_at(224, (*KERNELS, "threshold", "scale")), seed=seed)


def _default_at(side: int, names: tuple[str, ...]) -> dict[str, Any]:
    settings = OnlineAlternateGenerator().settings_for(side, side)
    return {name: getattr(settings, name) for name in names}
