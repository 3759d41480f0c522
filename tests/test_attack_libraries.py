"""Every attack of torchattacks and foolbox, and AutoAttack, runs on a DefendedModel or is listed here with a reason."""

import contextlib
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import foolbox
import pytest
import torch
from torch import Tensor, nn

from oag_transform import DefendedModel, OnlineAlternateGenerator

pytestmark = [pytest.mark.slow, pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # of the libraries' own code

CLASSES = 12
# arguments that make attacks small, where they have them
SMALL: dict[str, Any] = {
    "steps": 2, "n_restarts": 1, "n_queries": 5, "inf_batch": 2, "popsize": 2, "N": 2, "n_classes": CLASSES, "restarts": 1,
    "eot_iter": 1, "pixels": 1, "max_batch_size": 8, "binary_search_steps": 1, "max_iterations": 10, "num_evals": 2,
    "max_gradient_eval_steps": 2, "gradient_eval_steps": 2, "initial_gradient_eval_steps": 2, "population": 4,
    "across_channels": True, "max_rotation": 5, "num_rotations": 2, "num_translations": 2, "max_translation": 2,
    "directions": 10, "distance": foolbox.distances.l2,
}  # fmt: skip

NO_ATTACKS = {"Attack", "MultiAttack"}  # a base class; several attacks one after the other
NOT_THROUGH = {
    "L0BrendelBethgeAttack": "needs numba, which foolbox doesn't install",
    "L1BrendelBethgeAttack": "needs numba, which foolbox doesn't install",
    "L2BrendelBethgeAttack": "needs numba, which foolbox doesn't install",
    "LinfinityBrendelBethgeAttack": "needs numba, which foolbox doesn't install",
    "PointwiseAttack": "foolbox 3.3.4 reads an attribute that it doesn't set",
}


def target() -> nn.Module:
    """Twelve classes: which of four quadrants is brightest in which channel."""

    class Brightest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(20.0))  # torchattacks takes the device from a parameter

        def forward(self, images: Tensor) -> Tensor:
            return self.gain * nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    return Brightest().eval()


def random_images() -> tuple[Tensor, Tensor]:
    """Two images that reach 0 and 1 at the border, so that every attack looks beyond, and their classes."""
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.1 * torch.rand(2, 3, 16, 16, generator=generator)
    images[0, 0, :8, :8] += 0.5
    images[1, 2, 8:, :8] += 0.5
    images[..., 0], images[..., -1] = 0.0, 1.0
    return images, torch.tensor([0, 10])


def model(**settings: Any) -> DefendedModel:
    purify = OnlineAlternateGenerator(
        network_steps=10, filters=16, kernel_size=5, fc_lr=0.2, strength=0.01, seed=0, compute_dtype=torch.float32
    )
    return DefendedModel(target(), purify, shift=2, **settings).eval()


def named(library: str, *, made_of: type) -> list[str]:
    module = _library(library)
    found = [] if module is None else [name for name, each in vars(module).items() if inspect.isclass(each)]
    return [name for name in found if issubclass(getattr(module, name), made_of) and name not in NO_ATTACKS]


def _library(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def small(attack: Callable[..., Any]) -> dict[str, Any]:
    return {name: value for name, value in SMALL.items() if name in inspect.signature(attack).parameters}


def check(attacked: Tensor, images: Tensor) -> None:
    assert attacked.shape == images.shape
    assert attacked.isfinite().all()
    with torch.no_grad():
        model()(attacked)  # it takes them without clipping: what an attack returns is in [0, 1]


def torchattacks_names() -> list[str]:
    module = _library("torchattacks")
    return [] if module is None else named("torchattacks", made_of=module.attack.Attack)


@pytest.mark.parametrize("name", torchattacks_names())  # not in an extra: it pins a requests that others can't use
def test_torchattacks(name: str) -> None:
    attack, (images, labels) = getattr(importlib.import_module("torchattacks"), name), random_images()
    arguments = small(attack)
    if name == "LGV":
        arguments |= {"trainloader": [(images, labels)], "epochs": 1, "nb_models_epoch": 1, "verbose": False}
    with torch.random.fork_rng():
        made = attack(model(clip=True), **arguments)
        for part in made._autoattack.attacks if name == "AutoAttack" else []:  # which takes no number of steps
            part.steps = part.n_queries = 2
        check(made(images, labels), images)


@pytest.mark.parametrize("name", [n for n in named("foolbox.attacks", made_of=foolbox.Attack) if n not in NOT_THROUGH])
def test_foolbox(name: str) -> None:
    attack, (images, labels) = getattr(foolbox.attacks, name), random_images()
    defended = foolbox.PyTorchModel(model(clip=True), bounds=(0, 1), device="cpu")
    criterion: Any = foolbox.criteria.Misclassification(labels)
    made, more = attack(**small(attack)), {}
    if name == "DatasetAttack":
        made.feed(defended, images.flip(0))
    if name == "GenAttack":
        criterion = foolbox.criteria.TargetedMisclassification(labels.flip(0))
    if name in ("BinarizationRefinementAttack", "BoundaryAttack", "HopSkipJumpAttack"):  # each image is the other's
        more["starting_points"] = images.flip(0)
    with torch.random.fork_rng():
        eps = 1000 if name == "L0FMNAttack" else 0.1  # changed values: foolbox can't scale an L0 norm down
        check(made(defended, images, criterion, epsilons=eps, **more)[1], images)


@pytest.mark.parametrize("name", NOT_THROUGH)
def test_attacks_of_foolbox_that_fail_also_fail_without_a_defense(name: str) -> None:
    attack, (images, labels) = getattr(foolbox.attacks, name), random_images()
    undefended = foolbox.PyTorchModel(target(), bounds=(0, 1), device="cpu")
    with torch.random.fork_rng(), pytest.raises((ModuleNotFoundError, AttributeError, NotImplementedError)):
        attack(**small(attack))(undefended, images, labels, epsilons=0.1)


def test_autoattack() -> None:
    library = importlib.import_module("pyautoattack")
    images, labels = random_images()
    attack = library.AutoAttack(
        model(clip=True), norm="Linf", eps=0.05, version="custom", attacks=["apgd-ce", "apgd-t", "fab-t", "square"],
        device="cpu",
    )  # fmt: skip
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 2
    attack.square.n_queries = 5
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 2
    with torch.random.fork_rng():
        attacked = attack.run_standard_evaluation(images, labels, batch_size=2)[0]
    check(attacked, images)
    assert (attacked - images).abs().max() <= 0.05 + 1e-6


@pytest.mark.parametrize("attack", ["SPSA", "NIFGSM"])
def test_without_clip_the_error_names_the_remedy(attack: str) -> None:
    library = pytest.importorskip("torchattacks")
    with torch.random.fork_rng(), pytest.raises(ValueError, match=r"clamp\(0, 1\).* DefendedModel\(\.\.\., clip=True\)"):
        getattr(library, attack)(model())(*random_images())


def test_randomized_smoothing_of_art_through_the_preprocessor() -> None:
    pytest.importorskip("art")
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    from oag_transform.art import DefensePreprocessor

    images, labels = random_images()
    purify = model().defense
    for clip, outcome in ((False, pytest.raises(ValueError, match=r"clamp\(0, 1\)")), (True, contextlib.nullcontext())):
        smoothed = PyTorchRandomizedSmoothing(
            target(), nn.CrossEntropyLoss(), (3, 16, 16), CLASSES, clip_values=(0, 1), sample_size=20, scale=0.05,
            preprocessing_defences=[DefensePreprocessor(purify, clip=clip)], device_type="cpu",
        )  # fmt: skip
        with torch.random.fork_rng(), outcome:
            assert smoothed.predict(images.numpy()).argmax(1).tolist() == labels.tolist()
