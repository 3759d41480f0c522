"""Targets: torchvision's models and callables, and error messages."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from oag_transform.evaluation.backbones import IMAGENET
from oag_transform.evaluation.data import Preprocessing
from oag_transform.evaluation.targets import load_target
from tests.sample_images import rand


class MeanColor(nn.Module):
    """Ten classes, from the mean colour."""

    sign = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return self.sign * images.mean((2, 3)) @ self.weight


def tiny() -> nn.Module:
    return MeanColor().train()


def upside_down() -> nn.Module:
    model = MeanColor()
    model.sign = -1  # an attribute that neither weights nor repr show
    return model


class Number(nn.Module):
    def forward(self, images: Tensor) -> float:
        return float(images.mean())


def number() -> nn.Module:
    return Number()


class Guess(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).argmax(1)


def guess() -> nn.Module:
    return Guess()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def no_module() -> int:
    return 3


def test_a_callable_gives_the_target() -> None:
    target = load_target("tests.test_targets:tiny", classes=names(10))
    assert not target.model.training
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    assert target.preprocessing.crop == 224


def test_a_torchvision_model_with_a_checkpoint(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(network.state_dict(), tmp_path / "five.pt")
    target = load_target("resnet18", str(tmp_path / "five.pt"), classes=names(5))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        assert torch.allclose(target.model(images), network((images - mean) / std), atol=1e-5)


def test_a_checkpoint_does_not_say_its_size(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "five.pt")
    weights = str(tmp_path / "five.pt")
    assert load_target("resnet18", weights, classes=names(5), side=32).preprocessing == Preprocessing(32, 32)
    with pytest.raises(ValueError, match="doesn't say which size it takes, and the first image has 40 x 40 pixels"):
        load_target("resnet18", weights, classes=names(5), first=(40, 40))
    assert load_target("resnet18", weights, classes=names(5), first=(300, 300)).preprocessing == IMAGENET


def test_torchvisions_own_weights_go_through_its_own_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    state = torchvision.models.resnet18().state_dict()
    asked = []

    def download(url: str, **_: object) -> dict[str, Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        target = load_target("resnet18", name, classes=names(1000))
        preset = weights.transforms()
        assert target.preprocessing == Preprocessing(preset.resize_size[0], preset.crop_size[0], preset.interpolation)
    assert asked == [weights.url] * 3


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("tests.test_targets:tiny", None, r"shape \(1, 10\) for one image, but there are 4 classes"),
        ("tests.test_targets:no_module", None, "must return a torch.nn.Module, got int"),
        ("tests.test_targets:nothing", None, "can't be imported"),
        ("no.such.module:tiny", None, "can't be imported"),
        (":tiny", None, "can't be imported"),
        ("tests.test_targets:torch", None, r"torch\(\) failed: TypeError: 'module' object is not callable"),
        ("resnet18", None, "resnet18 needs weights"),
        ("resnet18", "IMAGENET1K_V9", "has the weights"),
        ("resnet18", "missing.pt", "missing.pt is missing"),
        ("resnet1", "DEFAULT", "got 'resnet1'"),
        ("efficientnet-lite7", None, "efficientnet-lite7"),
        ("efficientnet-lite0", "DEFAULT", "has its own, got weights 'DEFAULT'"),
        ("missing.pt", None, "missing.pt is missing"),
        (
            "tests.test_targets:number",
            None,
            r"must return logits, .*, or an object with \.logits, got float",
        ),
        ("tests.test_targets:guess", None, "got a tensor of torch.int64"),
        (".relative:tiny", None, "relative:tiny can't be imported: TypeError"),
    ],
)
def test_what_does_not_fit_is_named(model: str, weights: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_target(model, weights, classes=names(4))


@pytest.mark.parametrize(
    ("source", "message"), [("def make(:", "invalid syntax"), ("1 / 0", "ZeroDivisionError: division by zero")]
)
def test_a_module_that_fails_is_named(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"failing_module:make can't be imported: {message}"):
        load_target("failing_module:make", classes=names(4))


def test_a_size_beyond_the_memory_is_an_error_of_the_classifier() -> None:
    with pytest.raises(ValueError, match=r"tiny fails on an image of shape \(1, 3, 10000000, 10000000\)"):
        load_target("tests.test_targets:tiny", classes=names(10), resize=10**7, crop=10**7)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"empty\.pt can't be read as weights"):
        load_target(str(tmp_path / "empty.pt"), classes=names(4))
    with pytest.raises(ValueError, match=r"text\.pt can't be read as weights: it is no state dict"):
        load_target(str(tmp_path / "text.pt"), classes=names(4))
    with pytest.raises(ValueError, match="not written by oag-transform fit-target"):
        load_target(str(tmp_path / "state.pt"), classes=names(4))
    fitted = {"backbone": "resnet18", "classes": names(4), "preprocessing": [40, 40, "bilinear"], "state_dict": {}}
    torch.save(fitted, tmp_path / "fitted.pt")
    with pytest.raises(ValueError, match=r"fitted\.pt is damaged, or of another version: .*state_dict"):
        load_target(str(tmp_path / "fitted.pt"), classes=names(4))
    with pytest.raises(ValueError, match=r"state\.pt doesn't fit resnet18 with 4 classes"):
        load_target("resnet18", str(tmp_path / "state.pt"), classes=names(4))


def test_sides_are_overridden_and_a_model_that_cannot_take_them_is_named() -> None:
    target = load_target("tests.test_targets:tiny", classes=names(10), resize=40, crop=32)
    assert (target.preprocessing.resize, target.preprocessing.crop) == (40, 32)
    with pytest.raises(ValueError, match="got crop 300, resize 256"):
        load_target("tests.test_targets:tiny", classes=names(10), crop=300)
    assert load_target("tests.test_targets:flat", classes=names(4), resize=8, crop=8).preprocessing.crop == 8
    with pytest.raises(ValueError, match=r"flat fails on an image of shape \(1, 3, 9, 9\)"):
        load_target("tests.test_targets:flat", classes=names(4), resize=9, crop=9)


def test_a_classifier_of_unknown_size_needs_the_size_of_small_images() -> None:
    function = "tests.test_targets:tiny"
    message = f"{function} doesn't say which size it takes, and the first image has 40 x 32 pixels: give --resize and --crop"
    for crop in (None, 32):
        with pytest.raises(ValueError, match=message):
            load_target(function, classes=names(10), first=(40, 32), crop=crop)
    assert load_target(function, classes=names(10), first=(40, 32), resize=32, crop=32).preprocessing.crop == 32
    for known in ({"side": 32}, {"first": (224, 40)}, {"first": None}):
        load_target(function, classes=names(10), **known)


def test_fingerprints_tell_other_code_with_the_same_weights_apart() -> None:
    one, other = (load_target(f"tests.test_targets:{name}", classes=names(10)) for name in ("tiny", "upside_down"))
    assert one.fingerprint == load_target("tests.test_targets:tiny", classes=names(10)).fingerprint
    assert one.fingerprint != other.fingerprint


def test_fingerprints_tell_versions_of_a_source_file_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or the second version would be the first
    found = []
    for scale in (1, 1000):  # the order of the classes is the same
        lines = [
            "from torch import nn",
            "from tests.test_targets import tiny",
            "class Scaled(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.model = tiny()",
            "    def forward(self, images):",
            f"        return {scale} * self.model(images)",
        ]
        (tmp_path / "scaled_target.py").write_text("\n".join(lines))
        monkeypatch.delitem(sys.modules, "scaled_target", raising=False)
        importlib.invalidate_caches()
        found.append(load_target("scaled_target:Scaled", classes=names(10)).fingerprint)
    assert found[0] != found[1]


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least two classes, but there are 1"):
        load_target("tests.test_targets:tiny", classes=names(1))


def test_timm_by_name_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    target = load_target("timm:resnet10t", str(tmp_path / "net.pth"), classes=("a", "b", "c"), resize=64, crop=64)
    config = timm.data.resolve_model_data_config(network)
    images = rand(2, 3, 64, 64)
    normalized = (images - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    torch.testing.assert_close(target.model(images), network(normalized))
    of_config = timm.data.resolve_model_data_config
    monkeypatch.setattr(
        timm.data, "resolve_model_data_config", lambda model: of_config(model) | {"input_size": (3, 224, 224), "crop_pct": 0.95}
    )
    own = load_target("timm:resnet10t", str(tmp_path / "net.pth"), classes=("a", "b", "c")).preprocessing
    assert (own.crop, own.resize) == (224, 235)  # of 235.8, as timm has it
    with pytest.raises(ValueError, match="timm has no model 'resnet99'"):
        load_target("timm:resnet99", classes=("a", "b"))


def test_robustbench_by_name_takes_the_datas_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_model(**names: str) -> torch.nn.Module:
        asked.append(names)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    utils = types.SimpleNamespace(load_model=load_model)
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    target = load_target("robustbench:cifar10/Linf/Wong2020Fast", classes=("r", "g", "b"), side=32)
    assert asked == [{"model_name": "Wong2020Fast", "dataset": "cifar10", "threat_model": "Linf"}]
    assert target.preprocessing == Preprocessing(32, 32)
    with pytest.raises(ValueError, match="expected robustbench:DATASET/THREAT/NAME"):
        load_target("robustbench:Wong2020Fast", classes=("r", "g", "b"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", None)
    with pytest.raises(ValueError, match="pip install robustbench"):
        load_target("robustbench:cifar10/Linf/Wong2020Fast", classes=("r", "g", "b"))


class OfLogits(nn.Module):
    """Returns what classifiers of Hugging Face return."""

    def forward(self, images: Tensor) -> Any:
        return types.SimpleNamespace(logits=images.mean((2, 3)))


def of_logits() -> nn.Module:
    return OfLogits()


def test_a_classifier_may_return_an_object_with_logits() -> None:
    target = load_target("tests.test_targets:of_logits", classes=names(3), resize=8, crop=8)
    images = rand(2, 3, 8, 8)
    assert torch.equal(target.model(images), images.mean((2, 3)))


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * float("nan")


def broken() -> nn.Module:
    return Broken()


def leaving() -> nn.Module:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken", "gives logits that are not finite for a random image"), ("leaving", r"leaving\(\) failed: SystemExit: 3")],
)
def test_a_classifier_that_cannot_be_used_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_target(f"tests.test_targets:{name}", classes=names(3), resize=8, crop=8)
