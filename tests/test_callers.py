"""Other callers: torch.compile, exporters and tracers, and libraries that take a defense as a module."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize
from torchvision.transforms.v2.functional import to_pil_image

from oag_transform import DefendedModel, OnlineAlternateGenerator, SmoothedModel
from oag_transform.baselines.barrage import BaRT
from oag_transform.baselines.denoisers import PixelDeflection
from oag_transform.baselines.filters import GaussianNoise
from oag_transform.defended import shifted
from oag_transform.evaluation.attacks.gray_box import fgsm
from oag_transform.evaluation.attacks.unrolled import unrolled


def make_target() -> nn.Sequential:
    target = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in target.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return target


def defense(**overrides: Any) -> OnlineAlternateGenerator:
    made: dict[str, Any] = {"network_steps": 2, "filters": 4, "seed": 0, "compute_dtype": torch.float32}
    return OnlineAlternateGenerator(**made | overrides)


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
def test_compile_compiles_the_target_and_leaves_the_defense_alone() -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compiler.reset()
    model = DefendedModel(make_target(), defense())
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(images()), model(images()))
    assert len(graphs) == 1
    assert sum("conv2d" in name for name in graphs[0]) == 4  # of the target in four views


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [defense, lambda: DefendedModel(make_target(), defense())], ids=["transform", "model"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "export", marks=pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="from torch 2.7 on")
        ),
        "fx",
        "trace",
        "vmap",
    ],
)
def test_exporters_and_tracers_are_told_in_one_sentence(make: Callable[[], nn.Module], kind: str) -> None:
    module = make()
    calls: dict[str, Callable[[], object]] = {
        "export": lambda: torch.export.export(module, (images(),)),
        "fx": lambda: torch.fx.symbolic_trace(module),
        "trace": lambda: torch.jit.trace(module, images()),
        "vmap": lambda: torch.vmap(module)(images()[None]),
    }
    with pytest.raises(RuntimeError, match=r"a defense can't be (vmapped|exported or traced): it") as caught:
        calls[kind]()
    assert len(str(caught.value)) < 200


@pytest.mark.integrations
def test_art_predicts_and_attacks_through_the_preprocessor() -> None:
    pytest.importorskip("art")
    from art.attacks.evasion import FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    from oag_transform.art import DefensePreprocessor

    target, loss = make_target(), nn.CrossEntropyLoss()
    classifier = PyTorchClassifier(
        target, loss, (3, 32, 32), 5, clip_values=(0, 1), preprocessing_defences=[DefensePreprocessor(defense())]
    )
    batch = images()
    expected = DefendedModel(target, defense(), shift=0)
    np.testing.assert_allclose(classifier.predict(batch.numpy()), expected(batch).detach().numpy(), rtol=1e-5, atol=1e-6)
    labels = expected(batch).argmax(1)
    point = batch.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(expected(point), labels) * len(batch), point)
    theirs = classifier.loss_gradient(batch.numpy(), nn.functional.one_hot(labels, 5).numpy())
    np.testing.assert_allclose(theirs / np.abs(theirs).max(), (gradient / gradient.abs().max()).numpy(), rtol=1e-4, atol=1e-6)
    attacked = torch.from_numpy(FastGradientMethod(classifier, eps=4 / 255).generate(batch.numpy(), labels.numpy()))
    assert loss(expected(attacked), labels) > loss(expected(batch), labels)
    assert (attacked - batch).abs().max() <= 4 / 255 + 1e-6


@pytest.mark.integrations
@pytest.mark.parametrize("wrong", [3, nn.Identity], ids=str)
def test_the_preprocessor_of_art_takes_transforms_only(wrong: Any) -> None:
    pytest.importorskip("art")
    from oag_transform.art import DefensePreprocessor

    with pytest.raises(TypeError, match="defense must be a batch transform or None"):
        DefensePreprocessor(wrong)


@pytest.mark.integrations
def test_the_preprocessor_of_art_checks_what_it_is_given() -> None:
    pytest.importorskip("art")
    from oag_transform.art import DefensePreprocessor

    grey = torch.full((1, 3, 32, 32), 0.5)
    once, twice = (
        DefensePreprocessor(nn.Sequential(*[GaussianNoise(9, seed=0)] * count)).forward(grey)[0] - grey for count in (1, 2)
    )
    assert not torch.allclose(twice, 2 * once, atol=1e-3)  # two of one seed draw different numbers
    with pytest.raises(TypeError, match=r"expected floating-point images in \[0, 1\], got torch\.uint8"):
        DefensePreprocessor(nn.Identity()).forward((255 * grey).byte())
    with pytest.raises(ValueError, match="clip must be True or False"):
        DefensePreprocessor(nn.Identity()).set_params(clip="yes")


@pytest.mark.integrations
def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"from_timm needs timm: pip install 'oag-transform\[timm\]'"):
        DefendedModel.from_timm("resnet18")


def test_a_classifier_of_timm_has_its_data_configs_normalisation() -> None:
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with torch.random.fork_rng():
        model = DefendedModel.from_timm(name, nn.Identity(), pretrained=False, shift=0, samples=1)
    config = timm.data.resolve_model_data_config(timm.create_model(name, pretrained=False))
    assert isinstance(model.normalize, Normalize)
    assert (tuple(model.normalize.mean), tuple(model.normalize.std)) == (config["mean"], config["std"]) == ((0.5,) * 3,) * 2
    batch = torch.rand(1, *config["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(batch), model.target(2 * batch - 1))
    assert not model.target.training
    with pytest.raises(ValueError, match="expected a model of timm such as 'resnet50', got 'resnet5000'"):
        DefendedModel.from_timm("resnet5000")


def test_from_timm_hands_on_its_arguments() -> None:
    pytest.importorskip("timm")
    others: dict[str, Any] = {"samples": 2, "shift": 3, "clip": True, "gradient": "own"}  # than the defaults
    with torch.random.fork_rng():
        model = DefendedModel.from_timm("resnet10t", nn.Identity(), pretrained=False, **others)
    assert {name: getattr(model, name) for name in others} == others


@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore")
def test_a_classifier_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=7)
    with torch.random.fork_rng():
        target = transformers.ResNetForImageClassification(config).eval()
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    model = DefendedModel(target, defense(), normalize=normalize, shift=5)
    batch = images()
    with torch.no_grad():
        views = [target(normalize(view)).logits.softmax(-1) for view in shifted(defense()(batch), 5)]
        torch.testing.assert_close(model(batch).softmax(-1), torch.stack(views).mean(0))


@pytest.mark.parametrize("make", [lambda: BaRT(10, seed=0), lambda: PixelDeflection(seed=0), lambda: GaussianNoise(12, seed=0)])
def test_the_default_device_is_no_matter_to_baselines(make: Callable[[], nn.Module]) -> None:
    batch = images()
    expected = make()(batch)
    try:
        torch.set_default_device("meta")
        found = make()(batch)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_the_default_device_is_no_matter_to_gray_box_attacks() -> None:
    target, batch, labels = make_target(), images(), torch.tensor([0, 1])
    expected = fgsm()(target, batch, labels, classes=5)
    try:
        torch.set_default_device("meta")
        found = fgsm()(target, batch, labels, classes=5)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("make", [unrolled, lambda x: x, lambda x: SmoothedModel(x, 0.1, seed=0, samples=2)])
def test_the_default_device_is_another_than_the_images(make: Callable[[DefendedModel], nn.Module]) -> None:
    """``meta`` stands in for a GPU: anything after it can't be computed."""
    model, exact = make(DefendedModel(make_target(), defense())), defense(langevin="exact", image_steps=2, threshold=0)
    other = make(DefendedModel(model.target, exact)) if isinstance(model, DefendedModel) else model
    batch, picture = images(), to_pil_image(images()[0])
    expected = [each(batch) for each in (model, other)]
    try:
        torch.set_default_device("meta")
        found = [each(batch) for each in (model, other)]
        purified = defense()(picture)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert np.array_equal(np.asarray(purified), np.asarray(defense()(picture)))
