"""The demo: a real classifier with the default defense under real attacks. Skipped only without the extra ``demo``.

What is said of a defense is an exact sign test over the images that the classifier classifies correctly (17 of foolbox's 20):
OAG in float32 against no defense, against its views alone, and against white noise of the same size in the same views.
"""

import importlib.util
from pathlib import Path

import PIL.Image
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from oag_transform import OnlineAlternateGenerator, streams
from oag_transform.apps.cli import main

if importlib.util.find_spec("foolbox") is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
    pytest.skip("needs the demo extra", allow_module_level=True)

from oag_transform.apps import demonstration
from oag_transform.apps.demonstration import ADAPTIVE, CLEAN, COMPRESSED, NOISE, NONE, OAG, VIEWS, Outcome, WhiteNoise

pytestmark = pytest.mark.slow  # two minutes of attacks

ATTACKS = {"FGSM 6/255": 0.01, "IGSM 6/255": 0.001, "MI-FGSM 2/255": 0.01, "C&W": 0.001}
"""Largest p of the test of OAG against no defense: the second and the fourth attack break every image."""


def sign_test(first: Tensor, other: Tensor) -> tuple[int, float]:
    """How many more images the first classifies correctly, and the two-sided p-value."""
    more, fewer = int((first & ~other).sum()), int((other & ~first).sum())
    return more - fewer, float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def better(first: Tensor, other: Tensor, most: float = 0.05) -> bool:
    gain, p = sign_test(first, other)
    return gain > 0 and p <= most


def restores(right: dict[str, Tensor], undefended: dict[str, Tensor]) -> bool:
    return all(better(right[name], undefended[name], most) for name, most in ATTACKS.items())


def under_attack(seen: Outcome, row: str) -> Tensor:
    return torch.cat([seen.right[row][name] for name in ATTACKS])


@pytest.fixture(scope="module")
def seen() -> Outcome:
    return demonstration.measure(seed=0, defense=OnlineAlternateGenerator(seed=0, compute_dtype=torch.float32))


def test_the_attacks_fool_the_target_within_their_bounds(seen: Outcome) -> None:
    assert list(seen.images) == [CLEAN, *ATTACKS]
    assert len(seen.labels) >= 15
    right = {name: int(found.sum()) for name, found in seen.right[NONE].items()}
    assert right[CLEAN] == len(seen.labels)
    assert right["FGSM 6/255"] <= 7  # one step towards a random class
    assert all(right[name] <= 2 for name in ("IGSM 6/255", "MI-FGSM 2/255", "C&W"))
    for name, levels in (("FGSM 6/255", 6), ("IGSM 6/255", 6), ("MI-FGSM 2/255", 2)):
        assert (255 * (seen.images[name] - seen.images[CLEAN])).abs().max() <= levels + 1e-3


def test_oag_restores_accuracy_under_gray_box_attacks(seen: Outcome) -> None:
    assert restores(seen.right[OAG], seen.right[NONE])
    assert sign_test(seen.right[OAG][CLEAN], seen.right[NONE][CLEAN])[0] >= -2


def test_oag_is_no_worse_than_white_noise_of_equal_size(seen: Outcome) -> None:
    assert not better(under_attack(seen, NOISE), under_attack(seen, OAG))
    assert sum(sign_test(seen.right[OAG][name], seen.right[NOISE][name])[0] for name in seen.images) >= -6  # of 85


def test_oag_is_better_than_its_views_alone(seen: Outcome) -> None:
    """A defense that returns its input equals the views alone, and fails this test."""
    assert not restores(seen.right[VIEWS], seen.right[NONE])
    assert sign_test(under_attack(seen, OAG), under_attack(seen, VIEWS))[0] >= 6  # of 68


def test_an_adaptive_attack_breaks_each_defense(seen: Outcome) -> None:
    for by_column in seen.right.values():
        attacked = by_column[ADAPTIVE]
        assert len(attacked) == demonstration.ADAPTIVE_COUNT
        assert attacked.sum() <= 2
        assert better(by_column[CLEAN][: len(attacked)], attacked)


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
