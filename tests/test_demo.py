"""The demo: a real classifier with the default defense under real attacks. Skipped only without the extra ``demo``.

Bounds are paired counts over the images that the classifier classifies correctly (17 of foolbox's 20), clean and under four
attacks: OAG against no defense, against its views alone, and against white noise of the same size in the same views. A comment
beside each bound gives the measured count.
"""

import importlib.util
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch import Tensor

from oag_transform import streams
from oag_transform.apps.cli import main

if importlib.util.find_spec("foolbox") is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
    pytest.skip("needs the demo extra", allow_module_level=True)

from oag_transform.apps import demonstration
from oag_transform.apps.demonstration import ADAPTIVE, CLEAN, COMPRESSED, NOISE, NONE, OAG, VIEWS, Outcome, WhiteNoise

pytestmark = pytest.mark.slow  # two minutes of attacks

GAIN = {"FGSM 6/255": 8, "IGSM 6/255": 13, "MI-FGSM 2/255": 9, "C&W": 12}  # seen: 11, 16, 12, 15
"""Least gain of OAG over no defense, in images."""


def gain(first: Tensor, other: Tensor) -> int:
    """Number of images that only the first classifies correctly, minus those that only the other does."""
    return int((first & ~other).sum() - (other & ~first).sum())


def restores(right: dict[str, Tensor], undefended: dict[str, Tensor]) -> bool:
    return all(gain(right[name], undefended[name]) >= least for name, least in GAIN.items())


@pytest.fixture(scope="module")
def seen() -> Outcome:
    return demonstration.measure(seed=0)


def test_the_attacks_fool_the_target_within_their_bounds(seen: Outcome) -> None:
    assert list(seen.images) == [CLEAN, *GAIN]
    assert len(seen.labels) >= 15
    right = {name: int(found.sum()) for name, found in seen.right[NONE].items()}
    assert right[CLEAN] == len(seen.labels)
    assert right["FGSM 6/255"] <= 7  # seen: 5; one step towards a random class
    assert all(right[name] <= 2 for name in ("IGSM 6/255", "MI-FGSM 2/255", "C&W"))  # seen: 0, 1, 0
    for name, levels in (("FGSM 6/255", 6), ("IGSM 6/255", 6), ("MI-FGSM 2/255", 2)):
        assert (255 * (seen.images[name] - seen.images[CLEAN])).abs().max() <= levels + 1e-3


def test_oag_restores_accuracy_under_gray_box_attacks(seen: Outcome) -> None:
    assert restores(seen.right[OAG], seen.right[NONE])
    assert gain(seen.right[OAG][CLEAN], seen.right[NONE][CLEAN]) >= -2  # seen: -1


def test_oag_is_no_worse_than_white_noise_of_equal_size(seen: Outcome) -> None:
    assert sum(gain(seen.right[OAG][name], seen.right[NOISE][name]) for name in seen.images) >= -6  # seen: -2, of 85


def test_views_alone_do_not_restore_accuracy(seen: Outcome) -> None:
    """A defense that returns its input equals the views alone, and fails this test."""
    assert not restores(seen.right[VIEWS], seen.right[NONE])
    assert sum(gain(seen.right[OAG][name], seen.right[VIEWS][name]) for name in GAIN) >= 6  # seen: 11, of 68


def test_an_adaptive_attack_breaks_each_defense(seen: Outcome) -> None:
    for by_column in seen.right.values():
        assert len(by_column[ADAPTIVE]) == demonstration.ADAPTIVE_COUNT
        assert by_column[ADAPTIVE].sum() <= 2  # seen: 0, 0, 0, 1, 0 of 8


def test_purified_images_differ_from_their_inputs(seen: Outcome) -> None:
    for name, change in seen.changes.items():
        assert change.shape == seen.labels.shape
        expected = (seen.purified[name] - seen.images[name]).pow(2).flatten(1).mean(1).sqrt()
        torch.testing.assert_close(change, expected)
        assert (255 * change > 3).all()  # grey levels
        assert seen.purified[name].amin() >= 0
        assert seen.purified[name].amax() <= 1


def test_table(seen: Outcome) -> None:
    lines = demonstration.table(seen).splitlines()
    assert max(map(len, lines)) <= 110
    width = max(map(len, seen.right))
    cells = {line[:width].strip(): line[width:].split() for line in lines[3:8]}
    assert list(cells) == [NONE, VIEWS, COMPRESSED, NOISE, OAG]
    for row, found in cells.items():
        columns = [*seen.images, ADAPTIVE]
        assert found == [f"{int(seen.right[row][name].sum())}/{len(seen.right[row][name])}" for name in columns]
    levels = ", ".join(f"{255 * float(seen.changes[name].mean()):.0f}" for name in seen.images)
    assert f"{levels} grey levels" in "\n".join(lines)


def test_command(seen: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demonstration, "measure", lambda: seen)
    assert main(["demo", "--out", str(tmp_path / "new")]) == 0
    picture = tmp_path / "new" / "demo.png"
    assert capsys.readouterr().out == f"{demonstration.table(seen)}\nwrote {picture}\n"
    with PIL.Image.open(picture) as image:
        assert min(image.size) > 500


def test_the_control_is_white_noise_of_the_given_level() -> None:
    """The noise is independent of the batch and of a defense with the same seed, and the result is clipped to [0, 1]."""
    images, levels = torch.full((3, 3, 64, 64), 0.5), torch.tensor([5.0, 11.0, 20.0])
    noisy = WhiteNoise(levels / 255, seed=4)(images, index=[7, 8, 9])
    added = 255 * (noisy - images)
    for one, level in zip(added, levels.tolist(), strict=True):
        assert abs(one.std().item() - level) < 4 * level / (2 * one.numel()) ** 0.5
        assert abs((one[..., 1:] * one[..., :-1]).mean().item()) < 4 * level**2 / one.numel() ** 0.5
    assert torch.equal(WhiteNoise(levels[1:] / 255, seed=4)(images[1:], index=[8, 9]), noisy[1:])
    assert WhiteNoise(levels / 255, seed=4)(torch.ones(3, 3, 64, 64), index=[7, 8, 9]).amax() == 1
    drawn = streams.fill_normal(torch.empty(1, 3, 64, 64), streams.generators(4, [7], images.device))
    assert abs(torch.corrcoef(torch.stack([drawn.flatten(), added[0].flatten()]))[0, 1]) < 4 / drawn.numel() ** 0.5
