"""Rows and columns equal the plain computation for any chunks, and each row has its own images."""

import dataclasses
import functools
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oag_transform import DefendedModel, OnlineAlternateGenerator, streams
from oag_transform.baselines import barrage, denoisers, filters, per_image, tensor_network, zero_shot
from oag_transform.baselines.catalogue import DEFENSES, Needs
from oag_transform.baselines.filters import JPEG, GaussianNoise, MeanFilter
from oag_transform.evaluation.attacks.gray_box import Attack, cw, igsm
from oag_transform.evaluation.columns import (
    CLEAN,
    along,
    attacked,
    classify,
    gray_box_column,
    noise,
    noised,
    probabilities,
    traced,
)
from oag_transform.evaluation.data import image_folder
from oag_transform.evaluation.plan import measure
from oag_transform.evaluation.provenance import in_code, model_key
from oag_transform.evaluation.result import Cell
from oag_transform.evaluation.store import Store
from oag_transform.evaluation.subject import UNDEFENDED, Row, Subject, choose_subject
from oag_transform.evaluation.targets import load_target
from tests.tiny import CLASSES, Brightness, make_subject, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def subject(folder: Path, tmp_path: Path) -> Subject:
    return make_subject(folder, tmp_path)


def bits(right: Tensor) -> str:
    return "".join("1" if value else "0" for value in right)


def test_only_images_that_the_target_gets_right_count(folder: Path, tmp_path: Path) -> None:
    class Half(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            wrong = images[:, 0, 0, 0] * 255 % 2 > 0.5  # an arbitrary half
            return torch.where(wrong[:, None], super().forward(images).flip(1), super().forward(images))

    listing = image_folder(folder)
    small = load_target("tests.tiny:brightness", classes=CLASSES, resize=40, crop=40)
    subject = choose_subject(small._replace(model=Half()), listing, 6, Store(tmp_path, chunk=2), 0, torch.device("cpu"))
    assert subject.looked_at == 6
    assert 0 < len(subject.images) < 6
    assert torch.equal(Half()(subject.images.float() / 255).argmax(1), subject.labels)
    limited = choose_subject(small, listing, 3, Store(tmp_path, chunk=2), 0, torch.device("cpu"))
    assert (len(limited.images), limited.looked_at) == (3, 3)

    class Wrong(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            return -super().forward(images)

    with pytest.raises(ValueError, match="none of 6 images right"):
        choose_subject(small._replace(model=Wrong()), listing, 3, Store(tmp_path), 0, torch.device("cpu"))


@pytest.mark.slow
def test_measurements_equal_the_plain_computation_for_any_chunks(folder: Path, tmp_path: Path) -> None:
    found = []
    for chunk in (1, 4):
        subject = make_subject(folder, tmp_path / str(chunk), chunk=chunk, seed=7)
        images = attacked(subject, igsm(4))
        oag = Row("OAG", lambda seed: OnlineAlternateGenerator(network_steps=4, seed=seed, compute_dtype=torch.float32))
        cells = along(subject, oag.model(subject), images, [2, 4], "")
        row = measure(subject, oag, [gray_box_column(igsm(4))])
        found.append((images, noised(subject, 0.1), row.cells[0], cells))
        target, defense = subject.target.model, OnlineAlternateGenerator(network_steps=4, seed=7, compute_dtype=torch.float32)
        plain = igsm(4)(target, subject.images.float() / 255, subject.labels, classes=2, seed=7)
        assert torch.equal(images, (255 * plain).round().to(torch.uint8))
        assert row.cells[0] is not None
        assert row.cells[0].right == bits(target(defense(plain)).argmax(1) == subject.labels)
        for cell, steps in zip(cells, (2, 4), strict=True):  # each against a run of its own
            purified = OnlineAlternateGenerator(network_steps=steps, seed=7, compute_dtype=torch.float32)(plain)
            assert cell.right == bits(target(purified).argmax(1) == subject.labels)
        viewed = Row("viewed", oag.make, in_views=True).model(subject)
        right = DefendedModel(target, defense)(plain).argmax(1) == subject.labels
        assert classify(subject, viewed, images, "")[0].right == bits(right)
        assert Row("shifted", oag.make, in_views=True, shift=3).model(subject).shift == 3
        assert Row("alone", oag.make, shift=3).model(subject).shift == 0
    (images, noisy, *cells_of_one), (same_images, same_noise, *cells_of_four) = found
    assert torch.equal(images, same_images)
    assert torch.equal(noisy, same_noise)
    assert cells_of_one == cells_of_four


class Remembering(nn.Module):
    """Remembers the random streams that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        self.asked += index
        return images


def test_every_image_has_a_random_stream_of_its_own(folder: Path, tmp_path: Path) -> None:
    defense = Remembering()
    measure(make_subject(folder, tmp_path, chunk=4), Row("r", lambda _: defense), [CLEAN])
    assert defense.asked == [0, 1, 2, 3, 4, 5]


def test_a_column_may_give_each_row_images_of_its_own(subject: Subject) -> None:
    class Adaptive:
        label = "adaptive"

        def cell(self, subject: Subject, row: Row, model: DefendedModel) -> tuple[Cell, float | None]:
            images = (subject.images.float() / 255).requires_grad_(True)
            loss = nn.functional.cross_entropy(model(images), subject.labels)
            (gradient,) = torch.autograd.grad(loss, images)
            moved = (255 * (images + 6 / 255 * gradient.sign()).clamp(0, 1)).round().to(torch.uint8)
            return classify(subject, model, moved, row.label)

    class Inverting(nn.Module):
        """Turns dark into bright, which the classifier gets wrong until an attack sets it right."""

        def forward(self, images: Tensor) -> Tensor:
            return 1 - images

    inverting = Row("inverting", lambda _: Inverting())
    rows = [measure(subject, row, [CLEAN, Adaptive()]) for row in (UNDEFENDED, inverting)]
    assert [row.cells[0].accuracy for row in rows if row.cells[0]] == [1, 0]
    # straight through, the attacker of the second has the wrong sign, and sets right what was wrong
    assert [row.cells[1].accuracy for row in rows if row.cells[1]] == [0, 1]


def test_a_gray_box_column_passes_over_the_row(subject: Subject) -> None:
    column = gray_box_column(igsm(4))
    few = Row("few", lambda _: MeanFilter(3), count=2)
    assert torch.equal(column.of(subject), attacked(subject, igsm(4)))
    assert torch.equal(noise(0.1).of(subject), noised(subject, 0.1))
    cells = measure(subject, few, [column]).cells
    assert [cell.n for cell in cells if cell] == [2]


def test_a_row_has_its_defense_setting_seconds_and_code(subject: Subject) -> None:
    row = Row("JPEG, quality 15", lambda _: JPEG(15), in_views=True, defense="jpeg", setting=15)
    found = measure(subject, row, [CLEAN])
    assert (found.name, found.defense, found.setting, found.error) == ("JPEG, quality 15", "jpeg", 15, "")
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.code == "DefendedModel(target, JPEG(quality=15))"
    undefended = measure(subject, UNDEFENDED, [CLEAN])
    assert (undefended.seconds, undefended.defense, undefended.code) == (
        None,
        "",
        "DefendedModel(target, torch.nn.Identity(), shift=0)",
    )


MADE = [each for each in DEFENSES if each.key not in ("pixeldefend", "bm3d", "zeropur", "anti-adversary")]  # without needs


@pytest.mark.parametrize("defense", MADE, ids=lambda d: d.key)
def test_the_code_of_a_row_makes_its_model_but_for_the_seed(defense: Any, subject: Subject) -> None:
    row = Row("", lambda seed: defense.make(defense.tuned, seed, Needs()), defense.in_views)
    model = row.model(subject)
    classes = {"DefendedModel": DefendedModel, "OnlineAlternateGenerator": OnlineAlternateGenerator}
    modules = (filters, denoisers, per_image, barrage, tensor_network, zero_shot)
    names = {name: value for module in modules for name, value in vars(module).items()} | classes
    names["target"] = subject.target.model
    made = eval(in_code(model), names)
    assert (made.shift, made.samples) == (model.shift, model.samples)
    given, expected = (re.sub(r"\.0\b", "", repr(each)) for each in (made.defense, defense.make(defense.tuned, None, Needs())))
    assert given == expected  # 12 and 12.0 are one number


def test_the_code_of_the_default_is_one_call(subject: Subject) -> None:
    row = Row("", lambda seed: OnlineAlternateGenerator(seed=seed), in_views=True)
    assert in_code(row.model(subject)) == "DefendedModel(target)"
    plain = Row("", lambda seed: OnlineAlternateGenerator(seed=seed))
    assert in_code(plain.model(subject)) == "DefendedModel(target, shift=0)"


def test_the_code_of_defenses_in_sequence(subject: Subject) -> None:
    row = Row("", lambda seed: torch.nn.Sequential(GaussianNoise(12, seed=seed), JPEG(50)))
    assert (
        in_code(row.model(subject)) == "DefendedModel(target, torch.nn.Sequential(GaussianNoise(), JPEG(quality=50)), shift=0)"
    )


def test_an_attacker_may_have_other_random_numbers_and_another_gradient(subject: Subject) -> None:
    row = Row("", lambda seed: GaussianNoise(12, seed=seed))
    assert f"seed={subject.seed}" in repr(row.model(subject).defense)
    assert "seed=9" in repr(row.model(subject, seed=9).defense)


def test_noise_has_the_strength_that_was_asked_for(subject: Subject) -> None:
    difference = (noised(subject, 0.05).double() - subject.images.double()) / 255
    count = difference.numel()
    assert abs(float(difference.std()) - 0.05) < 5 * 0.05 / (2 * count) ** 0.5 + 0.0005  # and rounding to 8 bits
    assert abs(float(difference.mean())) < 5 * 0.05 / count**0.5


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_noise_is_independent_of_a_defenses_own(subject: Subject) -> None:
    plain = subject.images.float() / 255  # as the noise is drawn, so that the same stream would give the same noise
    one = noised(subject, 0.05).float() / 255 - plain
    other = GaussianNoise(12, seed=subject.seed)(plain) - plain
    assert abs(correlation(one, other)) < 5 / one.numel() ** 0.5
    # the same draws are found where they are the same
    same = streams.generators(subject.seed, range(6), torch.device("cpu"))
    assert correlation(streams.add_normal(plain, 0.05, same) - plain, other) > 0.99


def test_a_failing_defense_is_a_line_of_its_own(subject: Subject) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no luck")

    line = measure(subject, Row("broken", lambda _: Broken(), defense="b", setting=3), [CLEAN])
    assert (line.cells, line.error, line.defense, line.setting) == ((None,), "RuntimeError: no luck", "b", 3)

    def unmakeable(seed: int) -> nn.Module:
        raise ValueError("not here")

    assert measure(subject, Row("unmakeable", unmakeable), [CLEAN]).error == "ValueError: not here"


def test_probabilities_are_those_of_the_undefended_target(subject: Subject) -> None:
    images = subject.images.float() / 255
    expected = subject.target.model(images).softmax(1)
    assert torch.equal(probabilities(subject, images), expected)
    assert torch.equal(probabilities(subject, subject.images), expected)


def test_only_oag_has_a_trace(subject: Subject) -> None:
    with pytest.raises(TypeError, match="which has a trace, got JPEG"):
        traced(Row("", lambda _: JPEG(25)).model(subject))


class NaNFrom(Brightness):
    """NaN for every image from one on, in the order in which they are asked for."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.seen = first, 0

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.arange(self.seen, self.seen + len(images))
        self.seen += len(images)
        return super().forward(images).where((rows < self.first)[:, None], torch.nan)


def test_logits_that_are_not_finite_are_an_error_that_names_the_image(folder: Path, tmp_path: Path) -> None:
    good = make_subject(folder, tmp_path / "good", chunk=2)
    target = good.target._replace(model=NaNFrom(3), fingerprint="NaN")
    listing = image_folder(folder)
    with pytest.raises(ValueError, match=r"expected finite logits, got NaN or infinity for image\(s\) \[3\]"):
        choose_subject(target, listing, 6, Store(tmp_path / "store", chunk=2), 0, torch.device("cpu"))
    calls = (
        lambda model: classify(good, model, good.images, ""),
        lambda model: along(good, model, good.images, [1], ""),
    )
    for call in calls:
        purify = OnlineAlternateGenerator(network_steps=1, filters=4, seed=0, compute_dtype=torch.float32)
        with pytest.raises(ValueError, match=r"for image\(s\) \[3\]"):
            call(DefendedModel(NaNFrom(3), purify, shift=0))


def convolution(weight: float) -> nn.Conv2d:
    made = nn.Conv2d(3, 3, 1)
    for parameter in made.parameters():
        nn.init.constant_(parameter, weight)
    return made


def key(defense: Any, **settings: Any) -> dict[str, Any]:
    return model_key(DefendedModel(Brightness(), defense, **settings), "target", torch.device("cpu"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: key(JPEG(25)), lambda: key(JPEG(75))),
        (lambda: key(functools.partial(torch.clamp, max=0.7)), lambda: key(functools.partial(torch.clamp, max=0.8))),
        (lambda: key(convolution(0.1)), lambda: key(convolution(0.2))),
        (lambda: key(JPEG(25), shift=1), lambda: key(JPEG(25), shift=2)),
        (lambda: key(JPEG(25), samples=1), lambda: key(JPEG(25), samples=2)),
    ],
    ids=["setting", "function", "weights", "shift", "samples"],
)
def test_the_key_of_a_model_tells_others_apart(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert one() == one()
    assert one() != other()


@pytest.mark.parametrize(
    "package", ["torch", "torchvision", "numpy", "scipy", "scikit-image", "PyWavelets", "pillow", "kornia"]
)
def test_the_key_of_a_model_knows_versions(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(JPEG(25))
    monkeypatch.setattr("oag_transform.evaluation.provenance.version", lambda name: version(name) + ".1" * (name == package))
    assert key(JPEG(25)) != before


def test_the_key_of_a_model_knows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(JPEG(25))
    monkeypatch.setattr("oag_transform.evaluation.provenance.hardware", lambda device: "another machine")
    assert key(JPEG(25)) != before


def stored(subject: Subject) -> int:
    """The number of results in its store, of one chunk each."""
    return len(list(subject.store.folder.rglob("*.npz")))


@pytest.mark.parametrize(
    ("first", "second", "seed"),
    [
        (igsm(2), igsm(3), 0),
        (igsm(2), igsm(2, targeted=False), 0),
        (cw(steps=1, searches=1), cw(steps=1, searches=1, confidence=1), 0),
        (igsm(2), igsm(2), 1),
    ],
    ids=["bound", "goal", "confidence", "seed"],
)
def test_another_attack_is_computed_anew(first: Attack, second: Attack, seed: int, subject: Subject) -> None:
    attacked(subject, first)
    attacked(subject, first)
    assert stored(subject) == 1
    attacked(dataclasses.replace(subject, seed=seed), second)
    assert stored(subject) == 2


def test_attacks_of_another_foolbox_are_computed_anew(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked(subject, igsm(2))
    monkeypatch.setattr("oag_transform.evaluation.provenance.version", lambda name: version(name) + ".1" * (name == "foolbox"))
    attacked(subject, igsm(2))
    assert stored(subject) == 2


def test_what_else_is_stored_of_a_model_is_not_taken_for_classes(subject: Subject) -> None:
    model = UNDEFENDED.model(subject)
    subject.store.rows(subject.key(model), (subject.images,), lambda rows: np.zeros((len(rows), 2)))
    assert classify(subject, model, subject.images, "")[0].right == "1" * 6


def test_other_steps_are_computed_anew(subject: Subject) -> None:
    oag = OnlineAlternateGenerator(network_steps=2, filters=4, seed=0, compute_dtype=torch.float32)
    model = DefendedModel(Brightness(), oag, shift=0)
    counts = [len(along(subject, model, subject.images, steps, "")) for steps in ([1], [1, 2])]
    assert counts == [1, 2]
