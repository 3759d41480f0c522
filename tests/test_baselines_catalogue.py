"""The catalogue of defenses: it imports no torch, and each entry makes the defense of its label."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from oag_transform import OnlineAlternateGenerator
from oag_transform.baselines import barrage, catalogue, denoisers, filters, per_image, tensor_network, zero_shot
from oag_transform.baselines.base import Baseline
from oag_transform.baselines.catalogue import DEFENSES, OAG, Family, Needs, by_key, chosen
from oag_transform.baselines.filters import JPEG, MeanFilter
from oag_transform.baselines.pixeldefend import PixelCNN

every = pytest.mark.parametrize("defense", DEFENSES, ids=lambda defense: defense.key)
TARGET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
NEEDS = Needs(pixelcnn=PixelCNN(radius=1, hidden=4, layers=1, components=1), target=TARGET, compute_dtype=torch.bfloat16)
MODULES = (filters, denoisers, per_image, barrage, tensor_network, zero_shot)
NAMES = {name: value for module in MODULES for name, value in vars(module).items()}
NAMES["OnlineAlternateGenerator"] = OnlineAlternateGenerator
SHOWN_OTHERWISE = ("pixeldefend", "zeropur", "anti-adversary")  # by a hash of the model, by the target's modules


def made(defense: Family, setting: float, seed: int = 3) -> nn.Module:
    if defense.key == "bm3d":
        pytest.importorskip("bm3d")
    module = defense.make(setting, seed, NEEDS)
    assert isinstance(module, nn.Module)
    return module


def image() -> Tensor:
    return torch.rand(1, 3, 18, 20, generator=Generator().manual_seed(0))


def test_importing_it_imports_nothing_heavy() -> None:
    program = "import sys, oag_transform.baselines.catalogue; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "oag_transform" in loaded
    assert not loaded & {"torch", "torchvision", "numpy", "PIL", "scipy", "skimage", "tqdm", "bm3d"}


def test_names_are_unique_and_oag_stands_last() -> None:
    for names in ([d.key for d in DEFENSES], [d.label for d in DEFENSES]):
        assert len(set(names)) == len(names)
    assert [d.key for d in DEFENSES if d.label.startswith(OAG)] == [d.key for d in DEFENSES[-4:]]
    assert by_key("oag").label == OAG


@every
def test_settings_are_different_and_the_chosen_one_can_be_made(defense: Family) -> None:
    assert len(set(defense.settings)) == len(defense.settings)
    for setting in {defense.published, defense.tuned, *defense.settings}:
        module = made(defense, setting)
        if defense.key not in SHOWN_OTHERWISE:
            assert repr(eval(repr(module), NAMES)) == repr(module)
        assert defense.describe(setting).startswith(f"{defense.label}, {defense.knob} ")


@every
def test_each_makes_an_image_of_an_image(defense: Family) -> None:
    module = made(defense, defense.settings[-1]) if defense.key != "oag-paper" else made(defense, 2)
    if defense.key in ("dip", "zs-n2n", "noise2fast"):
        module.steps = 2  # type: ignore[assignment]
    result = module(image().requires_grad_(), index=[5])
    assert result.shape == image().shape or defense.key == "randomization"
    assert ((result >= 0) & (result <= 1)).all()
    own = isinstance(module, Baseline) and module.own_gradient
    assert result.requires_grad == (own or defense.label.startswith(OAG))  # OAG's is straight through


@pytest.mark.parametrize(
    "key", ["mean", "median", "bit-depth", "jpeg", "jpeg-noise", "noise", "tv", "nlm", "wavelets", "deflection"]
)
def test_settings_go_from_weak_to_strong(key: str) -> None:
    """Stronger ones leave less of the difference of an image's noise, or add more of their own."""
    defense = by_key(key)
    y, x = torch.linspace(0, 3, 64)[:, None], torch.linspace(0, 3, 64)
    clean = (0.5 + 0.3 * torch.stack([torch.sin(x + y), torch.cos(x - y), torch.sin(x * y)]))[None]
    noisy = clean + 5 / 255 * torch.randn(clean.shape, generator=Generator().manual_seed(1))
    moved = [(made(defense, setting)(noisy) - noisy).square().mean().item() for setting in defense.settings]
    assert moved == sorted(moved)


def test_each_entry_makes_its_defense() -> None:
    oag = by_key("oag").make(9, 4, NEEDS)
    assert isinstance(oag, OnlineAlternateGenerator)
    assert (oag.network_steps, oag.seed, oag.compute_dtype, oag.strength) == (9, 4, torch.bfloat16, None)
    full: Any = by_key("oag-full-4-views").make(9, 4, Needs())
    assert (full.network_steps, full.strength, full.compute_dtype) == (9, 1.0, None)
    paper: Any = by_key("oag-paper").make(300, 4, Needs())
    assert repr(paper) == repr(OnlineAlternateGenerator.paper(langevin="closed_form", seed=4, compute_dtype=None))
    follow: Any = by_key("jpeg-noise-follow-4-views").make(15, 4, Needs())
    assert (follow.quality, follow.std, follow.follow_noise, follow.seed) == (15, 8, True, 4)
    assert repr(by_key("mean").make(5, 0, Needs())) == repr(MeanFilter(5))
    assert repr(by_key("jpeg-4-views").make(15, 0, Needs())) == repr(JPEG(15))


def test_a_key_puts_any_defense_in_views() -> None:
    assert by_key("tv-4-views") == dataclasses.replace(
        by_key("tv"), key="tv-4-views", label="Total variation, 4 views", in_views=True
    )
    assert by_key("jpeg-4-views").published == 25  # the entry of the list
    assert (by_key("jpeg-4-views:60").settings, by_key("tv:0.02").tuned) == ((60,), 0.02)
    with pytest.raises(ValueError, match="no defense 'tv-5-views'"):
        by_key("tv-5-views")


def test_several_defenses_in_one_model() -> None:
    mix = by_key("jpeg:60+noise")
    assert mix.describe(2) == "JPEG, quality 60 + Gaussian noise, grey levels 12, 4 views"
    assert mix.in_views
    modules = mix.make(2, 3, NEEDS)
    assert isinstance(modules, nn.ModuleList)
    assert [repr(module) for module in modules] == [repr(JPEG(60)), repr(filters.GaussianNoise(12, seed=3))]
    with pytest.raises(ValueError, match="no defense 'jpg'"):
        by_key("jpg+noise")
    with pytest.raises(ValueError, match="a finite number for the setting, got 'jpeg:low'"):
        by_key("jpeg:low+noise")


def test_those_in_views_say_so() -> None:
    assert {d.key for d in DEFENSES if d.in_views} == {d.key for d in DEFENSES if d.key.endswith("-4-views")}
    assert all(d.label.endswith(catalogue.VIEWS) == d.in_views for d in DEFENSES)


@pytest.mark.parametrize("key", ["zeropur", "anti-adversary"])
def test_those_that_use_the_target_say_so(key: str) -> None:
    assert "not portable" in by_key(key).label
    with pytest.raises(ValueError, match="it uses the gradient of its target, and was given none or several"):
        by_key(key).make(1, 0, Needs())


def test_missing_needs_are_named() -> None:
    with pytest.raises(ValueError, match="needs a PixelCNN"):
        by_key("pixeldefend").make(16, 0, Needs())


def test_defenses_are_chosen_by_key() -> None:
    assert [d.key for d in chosen(["oag", "jpeg"])] == ["oag", "jpeg"]
    with pytest.raises(ValueError, match=r"no defense 'jpg'; expected some of mean, median, .*, oag, oag-4-views"):
        chosen(["oag", "jpg"])
    with pytest.raises(ValueError, match=r"no defense 'oag-4-views-4-views'"):
        chosen(["oag-4-views-4-views"])
    for key in ("jpeg:nan", "jpeg:inf", "jpeg-4-views:"):
        with pytest.raises(ValueError, match=f"a finite number for the setting, got '{key}'"):
            chosen(["oag", key])


def test_setting_and_label_are_described() -> None:
    assert by_key("jpeg").describe(75) == "JPEG, quality 75"
    assert by_key("randomization").describe(331 / 299) == "Randomization, ratio 1.107"
    assert dataclasses.replace(by_key("oag"), knob="T").describe(12) == f"{OAG}, T 12"


class Darker(nn.Module):
    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        self.seed, self.indices = seed, list[Any]()

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        self.indices.append(index)
        return images / 2


def no_defense() -> int:
    return 3


def negative() -> Any:
    return lambda images: 1 - images


def too_bright() -> Any:
    return lambda images: 2 * images


def dropping() -> nn.Module:
    return nn.Dropout(0.9)


made_before = functools.partial(negative)


def test_a_defense_of_ones_own_that_leaves_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too_bright must return images in \[0, 1\], got values from"):
        by_key(f"{__name__}:too_bright").make(0, 4, NEEDS)(image())
    assert torch.equal(by_key(f"{__name__}:made_before").make(0, 4, NEEDS)(image()), 1 - image())


def test_a_module_of_ones_own_is_in_eval_mode() -> None:
    module: Any = by_key(f"{__name__}:dropping").make(0, 4, NEEDS)
    assert not any(each.training for each in module.modules())
    assert torch.equal(module(image()), image())


def test_a_defense_of_ones_own() -> None:
    here = f"{__name__}:"
    module: Any = by_key(here + "Darker").make(0, 4, NEEDS)
    assert module.defense.seed == module.seed == 4
    assert torch.equal(module(image(), index=[5]), image() / 2)
    assert module.defense.indices == [[5]]
    assert by_key(here + "Darker").make(0, 4, NEEDS) is module  # a network is loaded once
    function: Any = by_key(here + "negative").make(0, 4, NEEDS)
    assert torch.equal(function(image(), index=[5]), 1 - image())
    assert repr(function) != repr(module)
    assert by_key(here + "negative").describe(0) == here + "negative"
    views = by_key(here + "negative-4-views")
    assert views.in_views
    assert views.label == f"{here}negative, 4 views"
    mix = by_key(f"jpeg:60+{here}negative")
    assert mix.label == f"JPEG, quality 60 + {here}negative, 4 views"
    modules: Any = mix.make(2, 3, NEEDS)
    assert [repr(each) for each in modules[:1]] == [repr(JPEG(60))]
    assert torch.equal(modules[1](image()), 1 - image())
    for name, message in {
        here + "missing": "can't be imported: module .* has no attribute 'missing'",
        "no_such_module:f": "no_such_module:f can't be imported: No module named",
        ":f": ":f can't be imported",
        here + "no_defense": "must return a callable on images, got int",
    }.items():
        with pytest.raises(ValueError, match=message):
            by_key(name).make(0, 0, NEEDS)


def test_a_changed_source_file_is_another_defense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number in (1, 2):
        (tmp_path / f"own{number}.py").write_text(f"def make():\n    return lambda images: images / {number}\n")
        found.append(by_key(f"own{number}:make").make(0, 0, NEEDS))
    assert found[0].source != found[1].source
    assert str(found[0].source) in repr(found[0])
