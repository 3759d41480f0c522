"""Fitted classifiers: training, reproducibility, saving and loading."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from oag_transform.apps.cli import main
from oag_transform.apps.options import check_output
from oag_transform.evaluation import fitting
from oag_transform.evaluation.backbones import build
from oag_transform.evaluation.data import Listing, Preprocessing, image_folder, read_images
from oag_transform.evaluation.fitting import AdversarialExamples, clean_accuracy, fit_target, robust_accuracy
from oag_transform.evaluation.targets import load_target, save_target
from oag_transform.files import read_rgb
from tests.test_data import write_image
from tests.tiny import write_images

from .sample_images import rand, synthetic_image


@pytest.fixture
def flowers(tmp_path: Path) -> Listing:
    for index, name in enumerate(("red", "green", "blue")):
        (tmp_path / name).mkdir()
        for number in range(3):
            path = write_image(tmp_path / name / f"{number}.png", size=(70, 60))
            tint = pil_to_tensor(read_rgb(path))
            tint[torch.arange(3) != index] //= 4
            to_pil_image(tint).save(path)
    return image_folder(tmp_path)


def test_a_fitted_head_learns_saves_and_loads(flowers: Listing, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    model, preprocessing = fit_target(flowers)
    assert torch.equal(torch.get_rng_state(), state)
    save_target(tmp_path / "new" / "t.pt", model, preprocessing, backbone="efficientnet-lite0", classes=flowers.classes)
    target = load_target(str(tmp_path / "new" / "t.pt"), classes=flowers.classes)
    assert target.name == "efficientnet-lite0, fitted (t)"
    images = read_images(flowers, list(range(9)), preprocessing)[0].float() / 255
    with torch.no_grad():
        assert torch.equal(target.model(images).argmax(1), torch.tensor(flowers.labels))
        assert torch.allclose(target.model(images), model(images), atol=1e-4)
    assert target.preprocessing == preprocessing
    with pytest.raises(ValueError, match=r"fitted to the 3 classes \['blue', 'green', 'red'\], but the data has the 3 classes"):
        load_target(str(tmp_path / "new" / "t.pt"), classes=("red", "green", "blue"))


def test_training_all_layers_changes_them_and_repeats(flowers: Listing) -> None:
    small = flowers._replace(names=flowers.names[::2], labels=flowers.labels[::2], read=lambda i: flowers.read(2 * i))
    state = torch.get_rng_state()
    models = [fit_target(small, "resnet18", epochs=epochs, batch_size=2, lr=1e-3, size=32)[0] for epochs in (1, 2, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, trained, again = (next(iter(model.parameters())) for model in models)
    assert not torch.equal(first, trained)
    assert torch.equal(trained, again)
    assert not models[1].training
    assert not any(parameter.requires_grad for parameter in models[1].parameters())


def test_a_single_class_is_refused(flowers: Listing) -> None:
    with pytest.raises(ValueError, match="two classes or more, got 1"):
        fit_target(flowers._replace(names=flowers.names[:2], labels=(0, 0), classes=("red",)))


@pytest.mark.parametrize(
    "setting", [{"epochs": -1}, {"batch_size": 0}, {"lr": 0.0}, {"epochs": 1.5}, {"lr": float("nan")}, {"size": 0}]
)
def test_settings_of_training_are_checked_first(setting: dict[str, Any], flowers: Listing) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
        fit_target(flowers, **setting)


def test_a_random_start_has_no_head_fitted_to_it(flowers: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="resnet18 without weights starts from random numbers: epochs must be at least 1"):
        fit_target(flowers, "resnet18")

    def refuse(*_: object) -> None:
        raise RuntimeError("fitted to random features")

    monkeypatch.setattr(fitting, "_fit_head", refuse)
    fit_target(flowers, "resnet18", epochs=1, size=32)
    with pytest.raises(RuntimeError, match="random features"):
        fit_target(flowers)


def test_images_are_resized_to_eight_sevenths_of_the_crop(flowers: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "build", tiny_build)
    model, preprocessing = fit_target(flowers, epochs=1, size=28)
    assert preprocessing == Preprocessing(32, 28, tiny_build("", None, 3)[1].interpolation)
    assert fit_target(flowers, epochs=1)[1] == tiny_build("", None, 3)[1]
    assert model(rand(1, 3, 28, 28)).shape == (1, 3)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [fitting._rate(step, 50) for step in range(51)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert rates[5] == pytest.approx(1)
    assert rates[50] == pytest.approx(0, abs=1e-9)
    assert [fitting._rate(step, 1) for step in range(1)] == [1]


class Colour(nn.Module):
    """Classes from the mean colour, by a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


def tiny_build(backbone: str, weights: str | None, classes: int) -> tuple[nn.Sequential, Preprocessing]:
    return nn.Sequential(Colour(classes)), Preprocessing(9, 8)


def test_a_loss_that_is_not_finite_and_images_that_cannot_be_read_are_errors(
    flowers: Listing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fitting, "build", tiny_build)
    with pytest.raises(ValueError, match=r"the training loss is (nan|inf) in epoch \d: lower the learning rate"):
        fit_target(flowers, "resnet18", epochs=3, lr=1e38)
    with pytest.raises(ValueError, match=r"the logits are not finite in epoch \d: lower the learning rate"):
        fit_target(flowers, "resnet18", epochs=3, lr=1e38, adversarial=AdversarialExamples(4))
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "0.png").write_text("no image")
    for how in ({"epochs": 1}, {"weights": "DEFAULT"}):
        with pytest.raises(ValueError, match="none of the images can be read"):
            fit_target(image_folder(tmp_path / "broken"), "resnet18", **how)


class Several(Colour):
    """As GoogLeNet in training: several outputs, of which one is called logits."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return types.SimpleNamespace(logits=logits, aux=logits) if self.training else logits


def test_a_backbone_may_return_logits_among_other_outputs(flowers: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kind in (Colour, Several):
        monkeypatch.setattr(fitting, "build", lambda *_, kind=kind: (nn.Sequential(kind(3)), Preprocessing(9, 8)))
        found.append(fit_target(flowers, "resnet18", epochs=1)[0].state_dict()["0.linear.weight"])
    assert torch.equal(*found)
    assert found[0].any()


class OneSize(Colour):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 224, "as torchvision's transformers do"
        return super().forward(images)


@pytest.mark.parametrize("how", [{"epochs": 1}, {"weights": "DEFAULT"}, {"epochs": 1, "adversarial": AdversarialExamples(4)}])
def test_a_backbone_of_another_size_is_named_by_its_input(
    how: dict[str, Any], flowers: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "build", lambda *_: (nn.Sequential(OneSize(3)), Preprocessing(9, 8)))
    with pytest.raises(ValueError, match=r"the backbone fails on images of shape \(\d, 3, 8, 8\): AssertionError"):
        fit_target(flowers, "resnet18", **how)


class Pixels(nn.Module):
    """Two classes by random directions: the worst image within a bound is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3 * 5 * 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


@given(eps=st.floats(0.1, 255), steps=st.integers(1, 4), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_adversarial_examples_stay_in_the_ball_and_in_range(eps: float, steps: int, seed: int) -> None:
    images = synthetic_image(4, 3, 5, 5, seed=seed).float()
    found = AdversarialExamples(eps, steps)(Pixels(), images, torch.tensor([0, 1, 0, 1]), torch.Generator().manual_seed(seed))
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - images).abs().max() <= eps / 255 + 1e-6
    assert not found.requires_grad


def test_pgd_finds_the_worst_image_and_fgsm_steps_from_its_random_start() -> None:
    model, eps = Pixels(), 10 / 255
    images = 0.3 + 0.4 * synthetic_image(4, 3, 5, 5).float()
    labels = torch.tensor([0, 1, 0, 1])
    direction = (model.weight[0] - model.weight[1]).detach() * (1 - 2 * labels[:, None])
    worst = images - eps * direction.sign().reshape(images.shape)
    found = AdversarialExamples(10, 8)(model, images, labels, torch.Generator().manual_seed(0))
    assert torch.allclose(found, worst, atol=1e-6)
    one = AdversarialExamples(10)(model, images, labels, torch.Generator().manual_seed(0))
    start = eps * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1)
    stepped = (start - 1.25 * eps * direction.sign().reshape(images.shape)).clamp(-eps, eps)
    assert torch.allclose(one, images + stepped, atol=1e-6)
    again, other = (AdversarialExamples(10)(model, images, labels, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_making_examples_leaves_the_model_as_it_was() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)).train()
    model[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items() if "num_batches" not in name}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    AdversarialExamples(8, 3)(
        model, synthetic_image(4, 3, 5, 5).float(), torch.tensor([0, 1, 0, 1]), torch.Generator().manual_seed(0)
    )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model[1].momentum == 0.1
    assert model.training


@pytest.mark.parametrize("setting", [{"eps": 0}, {"eps": 256}, {"eps": float("nan")}, {"eps": 4, "steps": 0}])
def test_settings_of_adversarial_examples_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"eps \(grey levels\) must|steps must"):
        AdversarialExamples(**setting)


def test_adversarial_training_needs_epochs(flowers: Listing) -> None:
    with pytest.raises(ValueError, match="adversarial training is of all layers: epochs must be at least 1"):
        fit_target(flowers, adversarial=AdversarialExamples(4))


@pytest.fixture
def colours(tmp_path: Path) -> Listing:
    """Two classes that differ much in red, little in green and blue."""
    for name, sign in (("a", -1), ("b", 1)):
        (tmp_path / name).mkdir()
        colour = (127.5 + sign * torch.tensor([25.5, 10.5, 10.5])[:, None, None]).to(torch.uint8)
        for number in range(3):
            to_pil_image(colour.expand(3, 12, 12)).save(tmp_path / name / f"{number}.png")
    return image_folder(tmp_path)


@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_training_leaves_a_larger_margin(steps: int, colours: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "build", tiny_build)
    margins = []
    for adversarial in (None, AdversarialExamples(15, steps)):  # above what green and blue differ by
        model, preprocessing = fit_target(colours, epochs=150, lr=3, batch_size=6, adversarial=adversarial)
        images = read_images(colours, list(range(6)), preprocessing)[0].float() / 255
        weight = model[0].linear.weight  # type: ignore[union-attr]
        logits = model(images)
        signs = 1 - 2 * torch.tensor(colours.labels)
        margins.append(float((signs * (logits[:, 0] - logits[:, 1])).min() / (weight[0] - weight[1]).abs().sum()))  # type: ignore[index]
    plain, robust = margins
    assert 1.15 * plain < robust < 25.6 / 255  # the best there is, by red alone


def test_mixed_precision_trains_float32_weights(flowers: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_build(*_: Any) -> tuple[nn.Sequential, Preprocessing]:
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
        return nn.Sequential(*layers), Preprocessing(18, 16)

    monkeypatch.setattr(fitting, "build", small_build)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 3, "adversarial": AdversarialExamples(4)}
    models = [fit_target(flowers, "resnet18", lr=lr, compute_dtype=torch.bfloat16, **settings)[0] for lr in (1e-12, 0.01)]
    for before, after in zip(*(model.parameters() for model in models), strict=True):
        assert after.dtype == torch.float32
        assert after.isfinite().all()
        assert not torch.equal(before, after)


def bright() -> nn.Module:
    """Brightness above 0.5, with parameters."""
    model = Colour(2)
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[-10.0], [10.0]]).expand(2, 3))
        model.linear.bias.copy_(torch.tensor([15.0, -15.0]))
    return model.eval()


def test_accuracy_as_they_are_and_under_attack(tmp_path: Path) -> None:
    listing = image_folder(write_images(tmp_path))  # 3.8 grey levels from the threshold
    preprocessing = Preprocessing(40, 40)
    assert clean_accuracy(bright(), listing, preprocessing).right == "111111"
    assert robust_accuracy(bright(), listing, preprocessing, 3, steps=10).right == "111111"
    assert robust_accuracy(bright(), listing, preprocessing, 5, steps=10).right == "000000"
    with torch.no_grad():
        model = bright()
    seen: list[int] = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    assert robust_accuracy(model, listing, preprocessing, 5, steps=10, count=4).right == "0000"
    assert max(seen) == 4  # no more images are attacked than are asked for
    wrong = listing._replace(labels=(1, *listing.labels[1:]))  # one that is wrong as it is
    assert clean_accuracy(bright(), wrong, preprocessing).correct == 5
    assert robust_accuracy(bright(), wrong, preprocessing, 3, steps=10).correct == 5


def test_the_command_trains_adversarially_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "data")
    asked: dict[str, Any] = {}

    def fit(*_: Any, **given: Any) -> tuple[nn.Module, Preprocessing]:
        asked.update(given)
        return nn.Sequential(bright()), Preprocessing(40, 40)

    monkeypatch.setattr(fitting, "fit_target", fit)
    run = ["fit-target", "--data", str(folder), "--out", str(tmp_path / "t.pt"), "--backbone", "resnet18", "--size", "40"]
    more = ["--epochs", "2", "--adversarial", "3", "--adversarial-steps", "2", "--compute-dtype", "bfloat16"]
    assert main([*run, *more, "--report", str(write_images(tmp_path / "others"))]) == 0
    assert asked["adversarial"] == AdversarialExamples(3, 2)
    assert (asked["size"], asked["epochs"], asked["compute_dtype"]) == (40, 2, torch.bfloat16)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("fitted to 6 images, with 100.0% training accuracy")
    assert lines[1] == "held out, clean: 100.0% [61, 100] of 6 images"
    assert lines[2] == "held out, under APGD-CE, L-infinity 3/255, 50 steps, 1 start: 100.0% [61, 100] of 6 images"
    assert torch.load(tmp_path / "t.pt", weights_only=True)["adversarial_eps"] == 3
    assert main([*run, "--epochs", "1"]) == 0
    assert asked["adversarial"] is None
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "0"], "--size must be an integer >= 1"),
        (["--adversarial", "0"], "--adversarial must be"),
        (["--adversarial", "256"], "--adversarial is in grey levels, at most 255, got 256"),
        (["--adversarial-steps", "3"], "--adversarial-steps needs --adversarial"),
        (["--adversarial", "4"], "epochs must be at least 1"),
        (["--compute-dtype", "bfloat16"], "--compute-dtype and --lr are for training all layers, which needs --epochs"),
        (["--lr", "3"], "--compute-dtype and --lr are for training all layers, which needs --epochs"),
        (["--report", "nowhere"], "nowhere is not a folder"),
        (["--report", "data/."], "--report needs other images than those that are trained on"),
        (["--report", "others"], r"--report has the classes ['a', 'b'], but --data has ['a_dark', 'b_bright']"),
    ],
)
def test_unsupported_options_are_named(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_images(tmp_path / "data")
    for name in ("a", "b"):
        (tmp_path / "others" / name).mkdir(parents=True)
        write_image(tmp_path / "others" / name / "0.png", size=(20, 20))
    assert main(["fit-target", "--data", str(folder), "--out", "t.pt", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t.pt").exists()


def test_an_output_that_cannot_be_written_is_an_error_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "there.pt").write_bytes(b"old")
    for name in ("new/a.pt", "there.pt"):
        check_output(tmp_path / name)
    assert (tmp_path / "there.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["there.pt"]
    (tmp_path / "loop.pt").symlink_to("loop.pt")  # a path that nobody can write, a superuser included
    with pytest.raises(OSError, match=r"loop\.pt"):
        check_output(tmp_path / "loop.pt")


def test_an_adversarially_trained_target_is_named_as_such(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        model, preprocessing = build("shufflenet_v2_x0_5", None, 2)
    names = ("a", "b")
    save_target(tmp_path / "s.pt", model, preprocessing, backbone="shufflenet_v2_x0_5", classes=names, adversarial_eps=2.5)
    assert load_target(str(tmp_path / "s.pt"), classes=names).name == "shufflenet_v2_x0_5, adversarially trained at 2.5/255 (s)"
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    del content["adversarial_eps"]  # as the last release wrote it
    torch.save(content, tmp_path / "old.pt")
    assert load_target(str(tmp_path / "old.pt"), classes=names).name == "shufflenet_v2_x0_5, fitted (old)"
