"""The gray-box attacks and PGD against plain autograd references in float64, and the rules of the gray-box ones."""

import foolbox
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oag_transform import DefendedModel
from oag_transform.evaluation.attacks.gray_box import (
    Attack,
    cw,
    fgsm,
    igsm,
    iterations,
    make,
    mifgsm,
    wrong_classes,
)
from oag_transform.evaluation.attacks.pgd import PGD, Bound, Norm
from oag_transform.evaluation.options import GRAY_BOX

CLASSES = 5


class Counting(nn.Module):
    """A smooth random classifier that counts the passes a gradient is asked of."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(12, 3 * 6 * 7, generator=generator, dtype=torch.float64) / 6, requires_grad=False)
        self.second = nn.Parameter(torch.randn(CLASSES, 12, generator=generator, dtype=torch.float64), requires_grad=False)
        self.gradients = 0

    def forward(self, images: Tensor) -> Tensor:
        self.gradients += images.requires_grad
        return (images.flatten(1).double() @ self.first.T).tanh() @ self.second.T


@pytest.fixture
def target() -> Counting:
    return Counting().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 6, 7), generator=torch.Generator().manual_seed(1)).double() / 255


def right(target: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return target(images).argmax(1)


def reference(
    target: nn.Module, image: Tensor, label: Tensor, eps: int, step: int, count: int, *, sign: int, decay: float
) -> Tensor:
    """Eq. 1 of the paper for one image, or MI-FGSM with ``decay``; ``sign`` -1 descends towards ``label``."""
    original, momentum = image[None], torch.zeros_like(image[None])
    attacked = original.clone()
    for _ in range(count):
        attacked.requires_grad_(True)
        loss = nn.functional.cross_entropy(target(attacked), label[None])
        (gradient,) = torch.autograd.grad(loss, attacked)
        momentum = decay * momentum + gradient / gradient.abs().mean()
        moved = attacked.detach() + sign * step / 255 * momentum.sign()
        attacked = torch.minimum(torch.maximum(moved, original - eps / 255), original + eps / 255).clamp(0, 1)
    return (255 * attacked[0]).round() / 255


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize(("make", "single", "decay"), [(fgsm, True, 0), (igsm, False, 0), (mifgsm, False, 1)])
@pytest.mark.parametrize("eps", [2, 6])
def test_sign_attacks_equal_the_equations(
    make: type, single: bool, decay: float, eps: int, targeted: bool, target: Counting, images: Tensor
) -> None:
    labels = right(target, images)
    aims = wrong_classes(labels, CLASSES, 3) if targeted else labels
    attacked = make(eps, targeted=targeted)(target, images, labels, classes=CLASSES, seed=3)
    step, count = (eps, 1) if single else (1, iterations(eps))
    for row, aim in enumerate(aims):
        sign = -1 if targeted else 1
        expected = reference(target, images[row], aim, eps, step, count, sign=sign, decay=decay)
        assert torch.equal(attacked[row], expected)


@pytest.mark.parametrize(
    ("make", "eps", "expected"), [(fgsm, 6, 1), (igsm, 6, 8), (igsm, 2, 3), (mifgsm, 4, 5), (igsm, 40, 44)]
)
def test_number_of_gradient_steps(make: type, eps: int, expected: int, target: Counting, images: Tensor) -> None:
    labels = right(target, images)
    target.gradients = 0
    make(eps)(target, images, labels, classes=CLASSES)
    assert target.gradients == expected


def test_iterations_are_those_of_kurakin() -> None:
    assert [iterations(eps) for eps in (1, 2, 4, 6, 8, 16, 32)] == [2, 3, 5, 8, 10, 20, 36]


@settings(deadline=None, max_examples=20)
@given(eps=st.integers(1, 30), index=st.integers(0, 3), make=st.sampled_from([fgsm, igsm, mifgsm]), targeted=st.booleans())
def test_bound_eight_bits_and_no_influence_of_the_batch(eps: int, index: int, make: type, targeted: bool) -> None:
    target = Counting().eval()
    images = torch.randint(0, 256, (4, 3, 6, 7), generator=torch.Generator().manual_seed(eps)).double() / 255
    labels = right(target, images)
    before, state = images.clone(), torch.get_rng_state()
    attack = make(eps, targeted=targeted)
    attacked = attack(target, images, labels, classes=CLASSES, seed=1)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert float((attacked - images).abs().max()) <= (eps + 1e-6) / 255
    assert torch.allclose(255 * attacked, (255 * attacked).round(), atol=1e-9)
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    one = slice(index, index + 1)
    assert torch.equal(attack(target, images[one], labels[one], classes=CLASSES, seed=1, index=index), attacked[one])


@pytest.mark.parametrize("targeted", [True, False])
def test_carlini_wagner_fools_with_less_than_a_sign_attack(targeted: bool, target: Counting, images: Tensor) -> None:
    labels = right(target, images)
    attacked = cw(targeted=targeted, confidence=0.5, steps=200, lr=0.05)(target, images, labels, classes=CLASSES)
    now = right(target, attacked)
    assert bool((now == wrong_classes(labels, CLASSES, 0)).all()) if targeted else bool((now != labels).all())
    with torch.no_grad():
        logits = target(attacked)
    margin = logits.gather(1, now[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
    assert bool((margin > 0.3).all())  # the confidence, less what rounding to 8 bits costs
    loud = igsm(30, targeted=targeted)(target, images, labels, classes=CLASSES)
    assert float((attacked - images).norm()) < float((loud - images).norm())


def test_carlini_wagner_is_the_same_in_any_batch(target: Counting, images: Tensor) -> None:
    labels = right(target, images)
    whole = cw(steps=10)(target, images, labels, classes=CLASSES)
    parts = [cw(steps=10)(target, images[i : i + 1], labels[i : i + 1], classes=CLASSES, index=i) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))


@settings(deadline=None)
@given(classes=st.integers(2, 9), seed=st.integers(0, 2**40))
def test_target_classes_are_wrong_and_belong_to_the_image(classes: int, seed: int) -> None:
    labels = torch.arange(30) % classes
    wrong = wrong_classes(labels, classes, seed)
    assert bool(((wrong != labels) & (wrong >= 0) & (wrong < classes)).all())
    assert torch.equal(wrong[7:], wrong_classes(labels[7:], classes, seed, 7))


def test_target_classes_reach_all_others_alike() -> None:
    drawn = wrong_classes(torch.zeros(3000, dtype=torch.int64), 4, 0).bincount(minlength=4)
    assert drawn[0] == 0
    # five standard deviations of a binomial count
    assert bool(((drawn[1:] - 1000).abs() < 5 * (3000 * (1 / 3) * (2 / 3)) ** 0.5).all())


def test_the_papers_attacks() -> None:
    assert [(str(attack), attack.targeted) for attack in (make(entry.key) for entry in GRAY_BOX)] == [
        ("FGSM 6/255", True),
        ("IGSM 6/255", True),
        ("MI-FGSM 4/255", False),
        ("C&W", False),
    ]


def test_the_list_makes_its_attacks_and_others() -> None:
    for entry, own in zip(GRAY_BOX, (fgsm(), igsm(), mifgsm(), cw()), strict=True):
        assert (entry.label, entry.eps, entry.targeted) == (own.name, own.eps, own.targeted)
        assert make(entry.key, targeted=not entry.targeted).targeted is not entry.targeted
    assert str(make("igsm", 3)) == "IGSM 3/255"
    with pytest.raises(ValueError, match="C&W has no bound, got eps = 3"):
        make("cw", 3)
    with pytest.raises(ValueError, match="no attack 'pgd'; expected some of fgsm, igsm, mifgsm, cw"):
        make("pgd")


@pytest.mark.parametrize("eps", [0, -1, 2.5, 256, True])
def test_budgets_are_grey_levels(eps: object) -> None:
    with pytest.raises(ValueError, match="grey levels"):
        igsm(eps)  # type: ignore[arg-type]


def test_labels_must_be_classes(target: Counting, images: Tensor) -> None:
    attack: Attack = fgsm()
    with pytest.raises(ValueError, match="labels from 0 to"):
        attack(target, images, torch.tensor([0, 1, 2, 5]), classes=CLASSES)
    with pytest.raises(ValueError, match="classes must be an integer >= 2, got 1"):
        attack(target, images, torch.zeros(4, dtype=torch.int64), classes=1)


def test_foolbox_gives_the_methods() -> None:
    assert all(isinstance(attack.method, foolbox.Attack) for attack in (make(entry.key) for entry in GRAY_BOX))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.8)])
def test_pgd_equals_its_equations(norm: Norm, eps: float, target: Counting, images: Tensor) -> None:
    """Momentum of .75 on gradients over their mean size; steps of .3 of the bound, halved after 40% and 75% of the steps."""
    labels = right(target, images)
    found = PGD(Bound(norm, eps), 10, 1)(DefendedModel(target, nn.Identity(), shift=0), images, labels).images
    for row, original in enumerate(images):
        moved, momentum = torch.zeros_like(original), torch.zeros_like(original)
        for step in range(10):
            point = (original + moved).requires_grad_()
            loss = nn.functional.cross_entropy(target(point[None]), labels[row : row + 1])
            (gradient,) = torch.autograd.grad(loss, point)
            momentum = 0.75 * momentum + gradient / gradient.abs().mean()
            size = eps * (0.3 if step < 4 else 0.15 if step < 7.5 else 0.075)
            if norm == "linf":
                moved = (moved + size * momentum.sign()).clamp(-eps, eps)
            else:
                moved = moved + size * momentum / momentum.norm()
                moved = moved * min(1, eps / float(moved.norm()))
            moved = (original + moved).clamp(0, 1) - original
        torch.testing.assert_close(found[row], original + moved, rtol=0, atol=1e-9)  # both in float64


def test_gradients_of_the_parameters_are_kept(images: Tensor) -> None:
    layer = nn.Linear(3 * 6 * 7, CLASSES, dtype=torch.float64)
    target, weight = nn.Sequential(nn.Flatten(), layer).eval(), layer.weight
    weight.grad = torch.ones_like(weight)
    fgsm(2)(target, images, right(target, images), classes=CLASSES)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert layer.bias.grad is None
