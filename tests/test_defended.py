"""DefendedModel: its pipeline, the unchanged target, and its callers."""

import copy
import dataclasses
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import foolbox
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.models import ResNet18_Weights, SqueezeNet1_1_Weights, WeightsEnum
from torchvision.transforms import v2
from torchvision.transforms.v2 import Lambda, Normalize, Resize

from oag_transform import DefendedModel, DivergenceError, OnlineAlternateGenerator
from oag_transform._checks import NonFiniteLogitsError
from oag_transform.baselines.target_aware import AntiAdversary
from oag_transform.defended import shifted
from oag_transform.evaluation.attacks.unrolled import has_gradient, unrolled
from tests.sample_images import QUIET, rand


def make_target(training: bool = False) -> nn.Sequential:
    target = nn.Sequential(nn.Conv2d(3, 6, 5, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 8 * 8, 5))
    generator = torch.Generator().manual_seed(0)
    for parameter in target.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return target.train(training)


def defense(**overrides: Any) -> OnlineAlternateGenerator:
    return OnlineAlternateGenerator(**({"network_steps": 3, "filters": 4, "kernel_size": 9, "seed": 0} | overrides))


def test_equals_the_explicit_pipeline() -> None:
    target, normalize, images = make_target(), Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), rand(3, 3, 20, 20)
    actual = DefendedModel(target, defense(), normalize=normalize, shift=0)(images)
    assert torch.equal(actual, target(normalize(defense()(images))))


def test_any_callable_is_a_defense() -> None:
    target, images = make_target(), rand(3, 3, 20, 20)
    assert torch.equal(DefendedModel(target, lambda x: x.flip(-1), shift=0)(images), target(images.flip(-1)))


def test_default_defense_is_the_default_transform() -> None:
    model = DefendedModel(make_target())
    assert repr(model.defense) == repr(OnlineAlternateGenerator())
    assert model.samples == 1


def test_samples_average_probabilities() -> None:
    target, images = make_target(), rand(2, 3, 20, 20)
    log_probabilities = DefendedModel(target, defense(), samples=3, shift=0)(images)
    # image n's samples use streams 3n, 3n + 1, 3n + 2
    singles = [[target(defense()(images[n : n + 1], index=3 * n + k)).softmax(-1)[0] for k in range(3)] for n in range(2)]
    expected = torch.stack([torch.stack(row).mean(0) for row in singles])
    torch.testing.assert_close(log_probabilities.exp(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(2))


@pytest.mark.parametrize(("samples", "shift"), [(1, 0), (2, 3)])
def test_a_seeded_model_draws_other_noise_in_each_batch_and_the_same_for_an_image(samples: int, shift: int) -> None:
    images = rand(4, 3, 20, 20)
    model = DefendedModel(make_target(), defense(), samples=samples, shift=shift)
    whole = model(images)
    parts = [model(images[start : start + 2], index=start) for start in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(model(images[2:]), whole[2:])
    named = model(images[[3, 0]], index=[3, 0])
    torch.testing.assert_close(named, whole[[3, 0]], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one for each of 4 images, got 2"):
        model(images, index=[0, 1])


def test_purify_and_classify_are_the_two_halves_of_forward() -> None:
    images, model = rand(2, 3, 20, 20), DefendedModel(make_target(), defense(), samples=2, shift=3)
    purified = model.purify(images, index=5)
    assert purified.shape == (4, 3, 20, 20)
    assert torch.equal(model.classify(purified), model(images, index=5))


def test_views_average_probabilities() -> None:
    target, normalize, images = make_target(), Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), rand(2, 3, 20, 20)
    log_probabilities = DefendedModel(target, defense(), normalize=normalize, samples=2, shift=3)(images)
    purified = torch.stack([defense()(images[n // 2 : n // 2 + 1], index=n)[0] for n in range(4)])
    rows, columns = [3, 2, 1, *range(20), 18, 17, 16], [0, 6]  # reflection doesn't repeat the border
    moved = [purified[:, :, rows[top : top + 20]][..., rows[left : left + 20]] for top in columns for left in columns]
    probabilities = torch.stack([target(normalize(view)).softmax(-1) for view in moved]).mean(0)
    torch.testing.assert_close(log_probabilities.exp(), probabilities.unflatten(0, (2, 2)).mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_views_are_moved_by_the_shift_towards_each_corner(dtype: torch.dtype) -> None:
    images = rand(2, 3, 9, 11).to(dtype)
    views = shifted(images, 3)
    offsets = [(down, right) for down in (3, -3) for right in (3, -3)]
    assert all(view.shape == images.shape and view.dtype == dtype for view in views)
    for view, (down, right) in zip(views, offsets, strict=True):
        rolled = images.roll((down, right), (-2, -1))
        assert torch.equal(view[..., 3:-3, 3:-3], rolled[..., 3:-3, 3:-3])


def test_shift_must_fit_into_the_image() -> None:
    model = DefendedModel(make_target(), nn.Identity(), shift=20)
    with pytest.raises(ValueError, match=r"shift must be less than the sides of the images, \(20, 40\), got 20"):
        model(rand(1, 3, 20, 40))
    halved = DefendedModel(make_target(), Resize((4, 8)), shift=5)
    with pytest.raises(ValueError, match=r"shift must be less than the sides of the purified images, \(4, 8\), got 5"):
        halved(rand(1, 3, 20, 40))


@pytest.mark.parametrize("gradient", ["straight_through", "own"])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda images: images[:1], ValueError, r"return 4 images \(N, C, H, W\), got shape \(1, 3, 20, 20\)"),
        (lambda images: images[0], ValueError, r"got shape \(3, 20, 20\)"),
        (lambda images: (255 * images).byte(), TypeError, "floating-point tensor, got torch.uint8"),
        (lambda images: images.detach().numpy(), TypeError, "floating-point tensor, got ndarray"),
        (lambda _: None, TypeError, "got NoneType"),
    ],
)
def test_a_defense_must_return_an_image_for_each(result: Any, error: type[Exception], message: str, gradient: Any) -> None:
    for several in (result, [nn.Identity(), Lambda(result)]):
        with pytest.raises(error, match=message):
            DefendedModel(make_target(), several, samples=2, gradient=gradient)(rand(2, 3, 20, 20))


@pytest.mark.parametrize("training", [False, True])
def test_target_is_left_alone(training: bool) -> None:
    target = make_target(training)
    next(target.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in target.parameters()]
    before = [p.clone() for p in target.parameters()]
    model = DefendedModel(target, defense())
    assert model.training == training
    model(rand(2, 3, 20, 20)).sum().backward()
    assert target.training == training
    assert [p.requires_grad for p in target.parameters()] == flags
    assert all(torch.equal(p, q) for p, q in zip(target.parameters(), before, strict=True))


def test_gradient_is_the_targets_at_the_purified_image() -> None:
    target, images = make_target(), rand(2, 3, 20, 20).requires_grad_()
    (actual,) = torch.autograd.grad(DefendedModel(target, defense(), shift=0)(images).square().sum(), images)
    purified = defense()(images.detach()).requires_grad_()
    (expected,) = torch.autograd.grad(target(purified).square().sum(), purified)
    assert torch.equal(actual, expected)


def test_gradient_passes_through_the_views() -> None:
    """An attack through the defense must not be misled by pixels that moved."""
    target, images = make_target().double(), rand(1, 3, 20, 20).double()
    model = DefendedModel(target, nn.Identity(), shift=3)
    torch.autograd.gradcheck(lambda x: model(x).square().sum(), images.requires_grad_(), fast_mode=True)


def test_foolbox_attacks_the_defended_model() -> None:
    model = foolbox.PyTorchModel(DefendedModel(make_target(), defense()), bounds=(0, 1), device="cpu")
    images, labels = rand(4, 3, 20, 20), torch.zeros(4, dtype=torch.int64)
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=1 / 255, steps=4, random_start=False)
    _, attacked, _ = attack(model, images, labels, epsilons=4 / 255)
    difference = (attacked - images).abs()
    assert 1 / 255 < difference.max() <= 4 / 255 + 1e-6
    loss = nn.CrossEntropyLoss()
    assert loss(model(attacked), labels) > loss(model(images), labels)  # the gradient was of use


def test_torchattacks_style_caller() -> None:
    model = DefendedModel(make_target(), defense(seed=None))
    device = next(model.parameters()).device
    assert not model.eval().training
    images = rand(2, 3, 20, 20).to(device)
    assert not torch.equal(model(images), model(images))  # eval() doesn't switch the defense off or freeze it


def test_pickles_and_copies() -> None:
    model, images = DefendedModel(make_target(), defense(), samples=2), rand(2, 3, 20, 20)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(images), model(images))
    assert "samples=2, shift=None" in repr(model)


def test_empty_batch() -> None:
    assert DefendedModel(make_target(), defense(), samples=2)(rand(0, 3, 20, 20)).shape == (0, 5)
    assert DefendedModel(make_target(), defense())(rand(0, 3, 20, 20)).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": len}, TypeError, "target must be a torch.nn.Module, got builtin"),
        ({"defense": 3}, TypeError, "defense must be callable, a list of modules or None, got int"),
        ({"defense": nn.Identity}, TypeError, r"defense must be an object, got the class Identity; give Identity\(\.\.\.\)"),
        ({"defense": []}, TypeError, r"a list of defenses must have torch.nn.Modules, at least one, got \[\]"),
        ({"defense": [nn.Identity(), len]}, TypeError, r"got \['Identity', 'builtin_function_or_method'\]; wrap a function"),
        ({"normalize": (0.5, 0.5)}, TypeError, "normalize must be callable or None, got tuple"),
        ({"samples": 0}, ValueError, "samples must be an integer >= 1, got 0"),
        ({"shift": -1}, ValueError, "shift must be an integer >= 0, got -1"),
        ({"shift": 2.0}, ValueError, "shift must be an integer >= 0, got 2.0"),
        ({"gradient": "none"}, ValueError, "gradient must be one of"),
        ({"clip": 1}, ValueError, "clip must be True or False, got 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DefendedModel(**({"target": make_target()} | arguments))


class Answers(nn.Module):
    """A target that answers what it is given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer


@dataclasses.dataclass
class Output:
    """As Hugging Face's ImageClassifierOutput."""

    logits: Tensor


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.zeros(2, 1), ValueError, r"got shape \(2, 1\); give a binary classifier two logits"),
        (torch.zeros(2), ValueError, r"got shape \(2,\); give a binary"),
        (torch.zeros(2, 5, 4, 4), ValueError, r"got shape \(2, 5, 4, 4\)"),
        (torch.zeros(3, 5), ValueError, r"N = 2 images.* got shape \(3, 5\)"),
        ((torch.zeros(2, 5), None), TypeError, "got tuple"),
        ({"out": torch.zeros(2, 5)}, TypeError, "got dict"),
        (torch.zeros(2, 5, dtype=torch.int64), TypeError, "floating-point logits, got torch.int64"),
        (Output(torch.zeros(2, 1)), ValueError, r"got shape \(2, 1\)"),
    ],
)
def test_a_target_without_logits_is_refused(answer: Any, error: type[Exception], message: str, shift: int) -> None:
    with pytest.raises(error, match=message):
        DefendedModel(Answers(answer), nn.Identity(), shift=shift)(rand(2, 3, 20, 20))


@pytest.mark.parametrize("shift", [0, 3])
def test_logits_in_an_output_object_are_taken(shift: int) -> None:
    logits = rand(2, 5)
    found = DefendedModel(Answers(Output(logits)), nn.Identity(), shift=shift)(rand(2, 3, 20, 20))
    torch.testing.assert_close(found.softmax(-1), logits.softmax(-1))


def test_a_checkpoint_of_the_undefended_target_loads() -> None:
    source, model = make_target(), DefendedModel(make_target(), defense())
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(source.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.target.parameters(), source.parameters(), strict=True))
    model.load_state_dict(DefendedModel(source, defense()).state_dict())
    nested = nn.Sequential(model)
    nested.load_state_dict({f"0.{name}": value for name, value in source.state_dict().items()})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.weight": source[0].weight})


def test_normalize_must_return_a_tensor() -> None:
    wrong: list[tuple[Any, str]] = [(lambda _: None, "NoneType"), (lambda images: images.detach().numpy(), "ndarray")]
    for normalize, kind in wrong:
        with pytest.raises(TypeError, match=f"expected normalize to return a tensor, got {kind}"):
            DefendedModel(make_target(), defense(), normalize=normalize)(rand(2, 3, 20, 20))


def test_bad_images() -> None:
    model = DefendedModel(make_target(), defense())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype of PyTorch
        nested = [torch.nested.nested_tensor([rand(3, 20, 20)], layout=kind) for kind in (torch.strided, torch.jagged)]
    for images in nested:
        with pytest.raises(TypeError, match="a dense tensor, got a nested one"):
            model(images)
    with pytest.raises(ValueError, match=r"batch of images \(N, C, H, W\), got shape \(3, 20, 20\)"):
        model(rand(3, 20, 20))
    with pytest.raises(ValueError, match="got str"):
        model("cat.jpg")
    with pytest.raises(TypeError, match=r"got torch.uint8; use images.float\(\) / 255"):
        model(torch.zeros(1, 3, 20, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match="before any normalisation"):
        model(rand(1, 3, 20, 20) * 4 - 2)


@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "SqueezeNet1_1_Weights.IMAGENET1K_V1", SqueezeNet1_1_Weights.DEFAULT, ResNet18_Weights.DEFAULT],
    ids=str,
)
def test_from_torchvision(name: str | WeightsEnum, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own loading path, with random numbers in place of the download."""
    expected_type = torchvision.models.ResNet if name is ResNet18_Weights.DEFAULT else torchvision.models.SqueezeNet
    builder = "resnet18" if name is ResNet18_Weights.DEFAULT else "squeezenet1_1"
    asked: list[WeightsEnum] = []

    def random_weights(self: WeightsEnum, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(self)
        return torchvision.models.get_model(builder, weights=None).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    model = DefendedModel.from_torchvision(name, defense(), shift=0, progress=False)
    assert isinstance(model.target, expected_type)
    assert not model.training
    assert not model.target.training
    assert len(asked) == 1
    preset = asked[0].transforms()
    assert isinstance(model.normalize, Normalize)
    assert (model.normalize.mean, model.normalize.std) == (preset.mean, preset.std)
    images = rand(1, 3, 64, 64)
    with torch.no_grad():
        purified = defense()(images)
        mean, std = (torch.tensor(v)[:, None, None] for v in (preset.mean, preset.std))
        torch.testing.assert_close(model(images), model.target((purified - mean) / std))


def test_from_torchvision_hands_on_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: make_target())  # in place of the download
    others: dict[str, Any] = {"samples": 2, "shift": 3, "clip": True, "gradient": "own"}  # than the defaults
    model = DefendedModel.from_torchvision("squeezenet1_1", nn.Identity(), **others)
    assert {name: getattr(model, name) for name in others} == others


@pytest.mark.parametrize("name", ["resnet5000", "fasterrcnn_resnet50_fpn", "FCN_ResNet50_Weights.DEFAULT", 3])
def test_from_torchvision_refuses_models_that_are_not_classifiers(name: Any) -> None:
    with pytest.raises(ValueError, match="classifier"):
        DefendedModel.from_torchvision(name)


@pytest.mark.parametrize("name", ["ResNet18_Weights.IMAGENET22K", "ResNet19_Weights.DEFAULT", "resnet18.pth"])
def test_from_torchvision_names_weights_that_are_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"torchvision has no weights '{name}'"):
        DefendedModel.from_torchvision(name)


class WorksInPlace(nn.Module):
    """A target that normalises in place, as many scripts do, and gives its answers in one buffer, as CUDA graphs do."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.buffer: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        logits = self.target(images.sub_(0.45).div_(0.22))
        if logits.requires_grad:
            return logits
        self.buffer = torch.empty_like(logits) if self.buffer is None else self.buffer
        return self.buffer.copy_(logits)


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("samples", [1, 2])
def test_in_place_operations_change_neither_other_views_nor_the_inputs(samples: int, shift: int) -> None:
    images, target_alone = rand(2, 3, 20, 20), make_target()
    mean, std = [0.45] * 3, [0.22] * 3
    for defended_by in (defense(), nn.Identity()):
        settings: dict[str, Any] = {"samples": samples, "shift": shift}
        expected = DefendedModel(target_alone, defended_by, normalize=Normalize(mean, std), **settings)
        models = [
            DefendedModel(target_alone, defended_by, normalize=Normalize(mean, std, inplace=True), **settings),
            DefendedModel(WorksInPlace(target_alone), defended_by, **settings),
        ]
        for model in models:
            given = images.clone()
            with torch.no_grad():
                torch.testing.assert_close(model(given), expected(given), rtol=1e-5, atol=1e-6)
                purified = expected.purify(given)
                kept = purified.clone()
                model.classify(purified)
            assert torch.equal(given, images)
            assert torch.equal(purified, kept)
            point, other = given.clone().requires_grad_(), given.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(point).square().sum(), point)
            (right,) = torch.autograd.grad(expected(other).square().sum(), other)
            torch.testing.assert_close(slope, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", ["straight_through", "own"])
def test_a_defense_that_works_in_place_leaves_the_callers_images(gradient: Any) -> None:
    images, target = rand(2, 3, 20, 20), make_target()
    given = images.clone()
    found = DefendedModel(target, lambda x: x.mul_(0.5), shift=0, gradient=gradient)(given)
    assert torch.equal(found, target(images * 0.5))
    assert torch.equal(given, images)


@pytest.mark.parametrize("shift", [0, 3])
def test_a_target_may_begin_with_an_operation_in_place(shift: int) -> None:
    target_alone, images = make_target(), rand(2, 3, 20, 20)
    slopes: list[Tensor] = []
    for target in (nn.Sequential(nn.ReLU(inplace=True), target_alone), nn.Sequential(nn.ReLU(), target_alone)):
        point = images.clone().requires_grad_()
        slopes += torch.autograd.grad(DefendedModel(target, defense(), shift=shift)(point).square().sum(), point)
    assert torch.equal(*slopes)


class NotFinite(nn.Module):
    """A target whose logits are of another value where an image is bright; class 0 of two else."""

    def __init__(self, value: float, column: int = 1) -> None:
        super().__init__()
        self.value, self.column = value, column

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([torch.ones(len(images)), torch.zeros(len(images)), torch.zeros(len(images))], 1)
        logits[images.mean((1, 2, 3)) > 0.8, self.column] = self.value
        return logits


def test_a_defense_that_returns_nan_is_named() -> None:
    model = DefendedModel(NotFinite(0.0), lambda images: images / (images < 1), shift=0)
    images = torch.full((3, 3, 20, 20), 0.5)
    images[1] = 1.0
    with pytest.raises(ValueError, match=r"finite images from the defense, got NaN or infinity for image\(s\) \[1\]"):
        model(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("samples", "shift"), [(1, 0), (2, 0), (1, 3), (3, 3)])
def test_logits_that_are_not_finite_are_an_error_that_names_the_image(value: float, samples: int, shift: int) -> None:
    images = torch.full((5, 3, 20, 20), 0.5)
    images[[1, 4]] = 1.0
    model = DefendedModel(NotFinite(value), nn.Identity(), samples=samples, shift=shift)
    with pytest.raises(ValueError, match=r"expected finite logits, got NaN or infinity for image\(s\) \[1, 4\]"):
        model(images)
    assert model(images[[0, 2, 3]]).argmax(1).tolist() == [0, 0, 0]


def test_another_defense_after_construction_gets_the_streams_too() -> None:
    images = rand(2, 3, 20, 20)
    model = DefendedModel(make_target(), nn.Identity(), shift=0)
    model.defense = defense()
    assert torch.equal(model.purify(images, index=[7, 3]), defense()(images, index=[7, 3]))
    model.defense = nn.Identity()
    assert torch.equal(model.purify(images, index=[7, 3]), images)


@pytest.mark.parametrize("wrap", [functools.partial, functools.partial(torch.compile, backend="eager")])
def test_a_wrapped_defense_gets_the_streams_too(wrap: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    images = rand(2, 3, 20, 20)
    model = DefendedModel(make_target(), wrap(defense()), shift=0)
    assert torch.equal(model.purify(images, index=[7, 3]), defense()(images, index=[7, 3]))


@pytest.mark.parametrize("gradient", ["straight_through", "own"])
@pytest.mark.parametrize("shift", [0, 3])
def test_clip_clamps_with_the_gradient_of_the_identity(gradient: Any, shift: int) -> None:
    images = 1.5 * rand(2, 3, 20, 20) - 0.25
    inner = nn.Identity() if gradient == "own" else defense()
    model, plain = (DefendedModel(make_target(), inner, shift=shift, gradient=gradient, clip=clip) for clip in (True, False))
    assert "clip=True" in repr(model)
    point, inside = images.clone().requires_grad_(), images.clamp(0, 1).requires_grad_()
    assert torch.equal(model(point), plain(inside))
    (slope,) = torch.autograd.grad(model(point).square().sum(), point)
    assert torch.equal(slope, *torch.autograd.grad(plain(inside).square().sum(), inside))
    assert (slope[images < 0] != 0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_clip_mends_neither_nan_nor_infinity(value: float) -> None:
    images = rand(2, 3, 20, 20)
    images[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match=r"expected finite values, got .*; NaN and infinity are no pixels"):
        DefendedModel(make_target(), nn.Identity(), clip=True)(images)


class Waves(nn.Module):
    """A differentiable defense that draws a number from each image's own stream; it has a parameter."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(size))
        self.asked: list[int] = []

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        self.asked += index
        draws = torch.tensor([torch.rand((), generator=torch.Generator().manual_seed(i)) for i in index])
        return images + self.size.to(images.dtype) * draws.to(images.dtype)[:, None, None, None] * images.square()


@pytest.mark.parametrize(("samples", "shift"), [(1, 0), (2, 0), (1, 3), (3, 3)])
def test_several_defenses_average_probabilities_over_the_views_of_all(samples: int, shift: int) -> None:
    """In float64, by hand: every defense, sample and view alone."""
    target, images, mean = make_target().double(), rand(2, 3, 20, 20).double(), 0.4
    purify, waves = defense(fc_lr=0.05), Waves(0.3)
    model = DefendedModel(target, [purify, nn.Identity(), waves], normalize=lambda x: x - mean, samples=samples, shift=shift)
    defenses: list[Callable[..., Tensor]] = [purify, lambda x, index: x, waves]
    found = model(images, index=[5, 2])
    for image, stream, log_probabilities in zip(images, (5, 2), found, strict=True):
        probabilities = []
        for d, make in enumerate(defenses):
            for k in range(samples):
                one = make(image[None], index=[(3 * stream + d) * samples + k])
                probabilities += [target(view - mean).softmax(-1)[0] for view in shifted(one, shift)]
        assert len(probabilities) == 3 * samples * (4 if shift else 1)
        torch.testing.assert_close(log_probabilities.exp(), torch.stack(probabilities).mean(0), rtol=1e-9, atol=1e-12)
    purified = model.purify(images, index=[5, 2])
    assert purified.shape == (2 * 3 * samples, 3, 20, 20)
    assert torch.equal(purified[samples : 2 * samples], images[:1].expand(samples, -1, -1, -1))
    assert torch.equal(model.classify(purified), found)
    assert len(set(waves.asked[: 2 * samples])) == 2 * samples


def test_two_defenses_of_one_seed_draw_different_numbers() -> None:
    first, second = DefendedModel(make_target(), [defense(), defense()], shift=0).purify(rand(1, 3, 20, 20))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["straight_through", "own"])
def test_the_gradient_of_several_defenses_has_a_part_for_each(kind: Any) -> None:
    target, images = make_target().double(), rand(2, 3, 20, 20).double()
    silent, waves = defense(gradient="none"), Waves(0.3)
    point, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    model = DefendedModel(target, [silent, waves], shift=0, gradient=kind)
    (slope,) = torch.autograd.grad(model(point).square().sum(), point)
    streams = [[0, 2], [1, 3]]
    if kind == "own":
        parts = [silent(images, index=streams[0]), waves(other, index=streams[1])]
    else:
        parts = [other + (d(images, index=i) - images).detach() for d, i in zip((silent, waves), streams, strict=True)]
    mean = torch.stack([target(part).softmax(-1) for part in parts]).mean(0).log()
    torch.testing.assert_close(slope, *torch.autograd.grad(mean.square().sum(), other), rtol=1e-9, atol=1e-12)


def test_unrolled_of_several_defenses_has_the_best_gradient_of_each() -> None:
    """The exact gradient of OAG, the own gradient of a defense, and the identity's for one without: none is hidden."""
    target, images = make_target().double(), rand(1, 3, 20, 20).double()
    oag, waves, rounds = defense(threshold=1.0), Waves(0.3), Lambda(lambda x: ((8 * x).round() / 8).detach())
    model = DefendedModel(target, [oag, waves, rounds], shift=0)
    exact = unrolled(model)
    torch.testing.assert_close(exact(images), model(images))
    point, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(exact(point).square().sum(), point)
    parts = [
        unrolled(DefendedModel(target, oag, shift=0)).purify(other, index=[0]),
        waves(other, index=[1]),
        other + (rounds(images) - images).detach(),
    ]
    mean = torch.stack([target(part).softmax(-1) for part in parts]).mean(0).log()
    torch.testing.assert_close(slope, *torch.autograd.grad(mean.square().sum(), other), rtol=1e-6, atol=1e-9)
    assert has_gradient(exact.defense, images)


def test_several_defenses_are_submodules() -> None:
    images, model = rand(2, 3, 20, 20), DefendedModel(make_target(), [defense(), Waves(0.3)], samples=2, shift=3)
    assert isinstance(model.defense, nn.ModuleList)
    assert "defense.1.size" in model.state_dict()
    assert "(0): OnlineAlternateGenerator(" in repr(model)
    assert "(1): Waves(" in repr(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(images), model(images))
    assert model.double()(images.double()).dtype == torch.float64
    model.load_state_dict(make_target().state_dict(), strict=False)  # of the undefended target
    assert model(rand(0, 3, 20, 20).double()).shape == (0, 5)


def test_several_defenses_that_return_other_sizes_are_refused() -> None:
    smaller = Lambda(lambda x: x[..., 1:])
    with pytest.raises(ValueError, match=r"images of one size \(C, H, W\), got \[\(3, 20, 20\), \(3, 20, 19\)\]"):
        DefendedModel(make_target(), [nn.Identity(), smaller], shift=0)(rand(1, 3, 20, 20))
    with pytest.raises(ValueError, match="expected 2 purified images for each image, got 3 images"):
        DefendedModel(make_target(), [nn.Identity(), nn.Identity()], shift=0).classify(rand(3, 3, 20, 20))


def test_logits_of_several_defenses_that_are_not_finite_name_the_image() -> None:
    images = torch.full((3, 3, 20, 20), 0.5)
    images[2] = 1.0
    with pytest.raises(ValueError, match=r"for image\(s\) \[2\]"):
        DefendedModel(NotFinite(float("nan")), [nn.Identity(), nn.Identity()], samples=2, shift=0)(images)


def test_a_checkpoint_of_the_undefended_target_loads_beside_a_defense_and_a_normalization_with_weights() -> None:
    class Shift(nn.Module):
        def __init__(self, mean: float) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full((3, 1, 1), mean))

        def forward(self, images: Tensor) -> Tensor:
            return images - self.get_buffer("mean")

    trained = make_target()
    model = DefendedModel(make_target(), nn.Conv2d(3, 3, 1), normalize=Shift(0.25))
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("target.")}
    assert len(before) == 3
    for parameter in trained.parameters():
        nn.init.constant_(parameter, 0.5)
    model.load_state_dict(trained.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.target.parameters(), trained.parameters(), strict=True))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    part = model.state_dict()
    del part["normalize.mean"]  # of a defended model: nothing may be missing
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(part)


def unstable(**overrides: Any) -> OnlineAlternateGenerator:
    """Its network diverges for every image but a quiet one."""
    high = {"network_steps": 4, "compute_dtype": torch.float32, "conv_lr": 100, "fc_lr": 100, "adaptive_lr": False}
    return defense(**high | overrides)


def test_a_diverging_image_of_a_later_chunk_has_its_place_in_the_batch() -> None:
    with pytest.raises(DivergenceError, match=r"image\(s\) \[1\] of the batch") as raised:
        unstable(chunk_size=1)(torch.stack([QUIET, rand(3, 20, 20)]))
    assert raised.value.indices == [1]


def test_a_diverging_image_has_its_place_in_the_batch_of_the_model() -> None:
    images = torch.stack([QUIET, rand(3, 20, 20), QUIET, rand(3, 20, 20)])
    with pytest.raises(DivergenceError, match=r"image\(s\) \[1, 3\]") as raised:
        DefendedModel(make_target(), unstable(), samples=4)(images)
    assert raised.value.indices == [1, 3]
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (copied.indices, str(copied)) == ([1, 3], str(raised.value))


def test_a_diverging_image_has_its_place_in_a_sample() -> None:
    sample = {"a": tv_tensors.Image(QUIET.repeat(2, 1, 1, 1)), "b": tv_tensors.Image(rand(3, 20, 20))}
    with pytest.raises(DivergenceError, match=r"image\(s\) \[2\]") as raised:
        unstable()(sample)
    assert raised.value.indices == [2]


def test_a_checkpoint_reaches_a_defense_that_shares_the_target_by_assignment_too() -> None:
    target = make_target()
    other = {name: value + 1 for name, value in make_target().state_dict().items()}
    model = DefendedModel(target, AntiAdversary(target))
    model.load_state_dict(other, assign=True)
    loaded = model.state_dict()
    for name, value in other.items():
        assert torch.equal(loaded[f"target.{name}"], value)
        assert torch.equal(loaded[f"defense.target.{name}"], value)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda *parts: v1.Compose(parts), lambda *parts: v2.Compose(parts)])
def test_a_container_passes_the_streams_on(wrap: Callable[..., Any]) -> None:
    def oag() -> OnlineAlternateGenerator:
        return OnlineAlternateGenerator(network_steps=2, filters=4, seed=0)

    images = rand(2, 3, 32, 32)
    target = make_target()
    parts = (v2.Identity(), oag(), oag())
    expected = images
    for d, part in enumerate(parts[1:], 1):
        expected = part(expected, index=[3 * 3 + d, 5 * 3 + d])
    assert torch.equal(DefendedModel(target, wrap(*parts), shift=0).purify(images, index=[3, 5]), expected)
    alone = DefendedModel(target, wrap(oag()), shift=0)
    assert torch.equal(alone.purify(images, index=4), oag()(images, index=4))
    assert not torch.equal(alone.purify(images, index=4), alone.purify(images, index=5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_a_defense_returns_has_the_dtype_of_the_images(dtype: torch.dtype) -> None:
    model = DefendedModel(make_target(), lambda images: images.to(dtype), shift=0)
    images = rand(2, 3, 20, 20)
    assert model.purify(images).dtype == torch.float32
    assert model(images).isfinite().all()


def test_images_of_0_to_255_are_refused_where_they_cannot_be_meant() -> None:
    images = rand(2, 3, 20, 20)
    with pytest.raises(ValueError, match=r"expected the defense to return images in \[0, 1\], got values up to 25\d"):
        DefendedModel(make_target(), lambda images: 255 * images)(images)
    with pytest.raises(ValueError, match=r"slightly outside, got .*; divide 0-255 images by 255"):
        DefendedModel(make_target(), defense(), clip=True)(255 * images)
    assert DefendedModel(make_target(), defense(), clip=True)(1.2 * images - 0.1).isfinite().all()


def test_a_class_in_place_of_a_target_is_named() -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got the class Linear"):
        DefendedModel(nn.Linear)  # type: ignore[arg-type]


def test_a_checkpoint_of_a_target_that_has_a_target_itself() -> None:
    class Online(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(2, 2)
            self.target = nn.ModuleDict({"x": nn.Linear(2, 2)})

    source = Online()
    for state in (source.state_dict(), DefendedModel(source, defense()).state_dict()):
        model = DefendedModel(Online(), defense())
        model.load_state_dict(state)
        for name, value in source.state_dict().items():
            assert torch.equal(model.target.state_dict()[name], value)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("gradient", "straight-through", "gradient must be one of"),
        ("clip", 1, "clip must be True or False"),
        ("samples", 0, "samples must be an integer >= 1"),
        ("shift", -3, "shift must be an integer >= 0"),
    ],
)
def test_settings_are_checked_when_they_are_changed(name: str, value: Any, told: str) -> None:
    model = DefendedModel(make_target(), nn.Identity())
    before = getattr(model, name)
    with pytest.raises(ValueError, match=told):
        setattr(model, name, value)
    assert getattr(model, name) == before


@pytest.mark.parametrize("wrap", [v1.Lambda, lambda function: [v2.Lambda(function)]], ids=["v1", "v2"])
def test_a_function_in_a_lambda_gets_the_streams_too(wrap: Callable[..., Any]) -> None:
    images = rand(2, 3, 20, 20)
    model = DefendedModel(make_target(), wrap(functools.partial(defense())), shift=0)
    assert torch.equal(model.purify(images, index=[7, 3]), defense()(images, index=[7, 3]))


@pytest.mark.parametrize("wrap", [lambda function: function, functools.partial(torch.compile, backend="eager")])
def test_a_stream_that_is_bound_stays(wrap: Callable[..., Any]) -> None:
    images = rand(2, 3, 20, 20)
    model = DefendedModel(make_target(), wrap(functools.partial(defense(), index=[5, 5])), shift=0)
    assert torch.equal(model.purify(images, index=[7, 3]), defense()(images, index=[5, 5]))


def test_logits_that_are_not_finite_keep_their_message_in_a_data_loader() -> None:
    error = NonFiniteLogitsError([2, 3])
    again = type(error)(str(error))
    assert str(again) == str(again.renamed([7])) == str(error)
