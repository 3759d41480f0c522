"""The default for images of every size: the rule, explicit arguments, and chunks."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.defended import shifted
from oag_transform.generator.settings import AT_SMALL, LARGE, PAPER, SIZED, SMALL, Settings, default_for, shift_for

from .sample_images import synthetic_image

sides = st.integers(2, 700)


def of(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in SIZED}


@given(short=st.integers(LARGE, 5000), long=st.integers(0, 5000))
def test_large_images_get_the_default_of_settings(short: int, long: int) -> None:
    purify = OnlineAlternateGenerator()
    assert purify.settings_for(short, short + long) == purify.settings_for(short + long, short) == Settings()


def test_small_images_get_finer_kernels_and_less_noise() -> None:
    assert of(OnlineAlternateGenerator().settings_for(SMALL, SMALL)) == AT_SMALL
    assert of(OnlineAlternateGenerator().settings_for(SMALL - 8, 500)) == AT_SMALL
    assert shift_for(SMALL, SMALL) == 1
    assert shift_for(160, 200) == shift_for(224, 224) == 5


@given(height=sides, width=sides)
def test_only_the_short_side_counts(height: int, width: int) -> None:
    side = min(height, width)
    assert default_for(height, width) == default_for(side, side)
    assert shift_for(height, width) == shift_for(side, side) < side


def test_it_is_smooth() -> None:
    """Between successive sides, numbers change by at most 5% of their range; kernels change once, and shifts only grow."""
    every = [default_for(side, side) for side in range(SMALL, LARGE + 1)]
    for name in ("threshold", "scale"):
        values = [found[name] for found in every]
        assert values == sorted(values, reverse=values[0] > values[-1])
        whole = abs(values[-1] - values[0])
        assert all(abs(one - other) <= whole / 20 for one, other in itertools.pairwise(values))
    kernels = [(found["kernel_size"], found["stride"], found["filters"]) for found in every]
    assert len(list(itertools.groupby(kernels))) == 2
    shifts = [shift_for(side, side) for side in range(SMALL, LARGE + 1)]
    assert shifts == sorted(shifts)
    assert all(shift % 2 == 1 for shift in shifts)


@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (3, 3), (5, 4), (6, 7), (8, 40), (31, 33)])
def test_it_works_from_two_pixels_on(shape: tuple[int, int]) -> None:
    image = synthetic_image(3, *shape).float()
    purified = OnlineAlternateGenerator(seed=0, network_steps=3)(image)
    assert purified.shape == image.shape
    assert 0 <= purified.min() <= purified.max() <= 1
    with pytest.raises(ValueError, match="at least 2 pixels, got 1 x 9"):
        OnlineAlternateGenerator()(image[..., :1, :1].expand(3, 1, 9))
    with pytest.raises(ValueError, match="height must be an integer >= 2, got 1"):
        OnlineAlternateGenerator().settings_for(1, 9)


@given(
    height=sides,
    width=sides,
    own=st.fixed_dictionaries(
        {},
        optional={
            "kernel_size": st.integers(9, 20),
            "stride": st.integers(1, 2),
            "filters": st.integers(1, 200),
            "threshold": st.floats(0, 20),
            "scale": st.floats(0.5, 20),
        },
    ),
)
def test_what_is_given_wins(height: int, width: int, own: dict[str, Any]) -> None:
    purify = OnlineAlternateGenerator(**own)
    assert of(purify.settings_for(height, width)) == default_for(height, width) | own
    assert {name: getattr(purify, name) for name in SIZED} == dict.fromkeys(SIZED) | own
    assert OnlineAlternateGenerator(**default_for(40, 40)).settings_for(height, width) == purify_like(40)


def purify_like(side: int) -> Settings:
    return OnlineAlternateGenerator().settings_for(side, side)


def test_an_image_is_purified_by_what_its_size_gets() -> None:
    for side in (20, 50, 120):
        image = synthetic_image(3, side, side + 7)
        own = default_for(side, side + 7)
        assert torch.equal(OnlineAlternateGenerator(seed=1)(image), OnlineAlternateGenerator(seed=1, **own)(image))


def test_the_papers_setting_is_the_same_at_every_size() -> None:
    assert set(SIZED) <= set(PAPER)
    paper = OnlineAlternateGenerator.paper()
    assert paper.settings_for(32, 32) == paper.settings_for(224, 224)


def test_repr_says_what_follows_the_size() -> None:
    shown = repr(OnlineAlternateGenerator())
    assert f"# by the size of the image, see settings_for(height, width): {', '.join(SIZED)}" in shown
    shown = repr(OnlineAlternateGenerator(threshold=3))
    assert "see settings_for(height, width): kernel_size, stride, filters, scale\n" in shown
    assert "settings_for" not in repr(OnlineAlternateGenerator.paper())


@pytest.mark.parametrize(
    ("given", "fitting", "other", "message"),
    [
        ({"stride": 7}, 224, 40, "got stride=7, and the default of kernel_size is 6 for 40 x 41 pixels; give kernel_size too"),
        ({"stride": 5}, 32, 4, "got stride=5, and the default of kernel_size is 4 for 4 x 5 pixels.* or a smaller stride"),
        (
            {"kernel_size": 2},
            40,
            128,
            "got kernel_size=2, and the default of stride is 3 for 128 x 129 pixels; give stride",
        ),
    ],
)
def test_an_argument_that_does_not_fit_the_default_of_a_size_is_refused_for_that_size(
    given: dict[str, int], fitting: int, other: int, message: str
) -> None:
    transform = OnlineAlternateGenerator(network_steps=1, filters=4, **given)  # type: ignore[arg-type]
    assert transform(synthetic_image(3, fitting, fitting)).shape == (3, fitting, fitting)
    with pytest.raises(ValueError, match=message):
        transform(synthetic_image(3, other, other + 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stride": 10}, "got stride=10, and the default of kernel_size is 9 for 128 x 128 pixels and 6 for 32 x 32 pixels"),
        ({"kernel_size": 1}, "got kernel_size=1, and the default of stride is 3 for 128 x 128 pixels and 2 for 32 x 32 pixels"),
        ({"kernel_size": 2, "stride": 3}, "got kernel_size=2 and stride=3"),
    ],
)
def test_what_fits_no_size_is_refused_at_once(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"kernel_size must be at least stride.*{message}"):
        OnlineAlternateGenerator(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "given_shift", "expected"), [((32, 40), None, 1), ((224, 240), None, 5), ((32, 32), 3, 3)])
def test_the_views_follow_the_size(shape: tuple[int, int], given_shift: int | None, expected: int) -> None:
    seen: list[Tensor] = []

    class Looks(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1)[:, :3]

    images = synthetic_image(3, *shape)[None]
    model = DefendedModel(Looks(), nn.Identity(), shift=given_shift)
    model(images)
    assert len(seen) == 4
    assert all(torch.equal(one, other) for one, other in zip(seen, shifted(images, expected), strict=True))
    assert model.shift == given_shift


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((40, 3, 32, 32), [16, 16, 8]), ((5, 3, 64, 64), [4, 1]), ((2, 1, 224, 224), [1, 1]), ((0, 3, 9, 9), [])],
)
def test_a_cpu_takes_as_many_images_together_as_have_so_many_pixels(shape: tuple[int, ...], expected: list[int]) -> None:
    batch = torch.zeros(shape)
    assert [len(rows) for rows in OnlineAlternateGenerator().chunks(batch)] == expected
    assert [len(rows) for rows in OnlineAlternateGenerator(chunk_size=3).chunks(batch)][:1] == [min(3, shape[0])][: shape[0]]


def test_other_devices_take_32_images_together() -> None:
    batch = torch.zeros(40, 3, 9, 9, device="meta")
    assert [len(rows) for rows in OnlineAlternateGenerator().chunks(batch)] == [32, 8]
