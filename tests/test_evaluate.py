"""``oag-transform evaluate`` end to end, on a tiny random classifier and six images."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.cli import main
from oag_transform.evaluation.attacks import igsm
from oag_transform.evaluation.command import _slug
from oag_transform.evaluation.data import Listing, image_folder
from oag_transform.evaluation.defenses import OURS, defenses
from oag_transform.evaluation.experiments import EXPERIMENTS
from oag_transform.evaluation.measure import along, attacked, choose_subject, classify, noised, row
from oag_transform.evaluation.peers import GaussianNoise
from oag_transform.evaluation.results import Cell, Row, read
from oag_transform.evaluation.store import Store
from oag_transform.evaluation.targets import load_target

FAST = ["mean-filter", "jpeg", "online-alternate-generator"]


class Brightness(nn.Module):
    """Two classes: dark and bright, by the mean of the image."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) - 0.5
        return 30 * torch.stack([-bright, bright], 1)


def brightness() -> nn.Module:
    return Brightness()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for name, level in (("a_dark", 0.485), ("b_bright", 0.515)):
        (root / name).mkdir()
        for number in range(3):
            wave = torch.sin(torch.arange(40) / (3 + number))[None, :, None] * torch.cos(torch.arange(40) / 5)[None, None, :]
            image = 0.1 * wave + 0.02 * torch.randn(3, 40, 40, generator=generator)
            to_pil_image(level + image - image.mean()).save(root / name / f"{number}.png")
    return root


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    here = [
        "--model",
        "tests.test_evaluate:brightness",
        "--data",
        str(folder),
        "--out",
        str(out),
        "--resize",
        "40",
        "--crop",
        "40",
    ]
    return ["evaluate", *more, *here, "--count", "6", "--slow-count", "1"]


def test_every_experiment_writes_its_result_and_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--other", "tests.test_evaluate:brightness"]
    assert main(arguments(folder, tmp_path, "all", "tune", *other, "--defenses", *FAST)) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for name in EXPERIMENTS:
        result = read(tmp_path / f"{name}.json")
        assert result.key == name
        assert result.title in printed
        assert result.facts["n"] == {"autoencoder": 1, "fig5": 3}.get(name, 6)
        assert (tmp_path / f"{name}.csv").exists()
        assert not [line for line in result.rows if line.error], name
        for figure in result.figures:
            assert (tmp_path / figure.file).stat().st_size > 1000
    assert page.count("<table") >= 8
    table = read(tmp_path / "table1.json")
    assert table.rows[0].name == "None"
    assert table.rows[0].cells[0].accuracy == 1  # type: ignore[union-attr]
    # a classifier of brightness alone is moved by every attack, and no filter brings the brightness back
    assert table.rows[0].cells[2].accuracy < 1  # type: ignore[union-attr]


def test_every_defense_has_a_line_and_a_failing_one_says_why(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "table1", "--attacks", "fgsm")) == 0
    rows = {line.name: line for line in read(tmp_path / "table1.json").rows}
    for family in defenses():
        line = rows[family.label(family.published)]
        if family.name == "Pixel Defend":
            assert "--pixelcnn FILE" in line.error
        else:
            assert line.error == ""
            assert [cell.n if cell else 0 for cell in line.cells[:2]] == [1 if family.slow else 6] * 2
            assert line.seconds is not None


def test_a_second_run_computes_nothing_and_a_changed_setting_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arguments(folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "mean-filter")
    assert main(run) == 0
    before = json.loads((tmp_path / "table1.json").read_text())

    def again(*_: object, **__: object) -> None:
        raise RuntimeError("computed again")

    monkeypatch.setattr("oag_transform.evaluation.peers.MeanFilter.forward", again)
    assert main(run) == 0
    after = json.loads((tmp_path / "table1.json").read_text())
    assert before["rows"] == after["rows"]
    assert main([*run, "--eps", "3"]) == 0
    errors = {line["name"]: line["error"] for line in json.loads((tmp_path / "table1.json").read_text())["rows"]}
    assert "computed again" in errors["Mean filter, size 3"]


def test_tuning_takes_the_strongest_within_five_points(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {75: 20, 50: 18, 35: 19, 25: 19, 15: 17, 10: 5}  # of 20, clean and noisy together

    def measured(_: object, name: str, *more: object) -> Row:
        count = next(value for strength, value in right.items() if name == f"JPEG, quality {strength}")
        return Row(name, (Cell("1" * 10), Cell("1" * (count - 10) + "0" * (20 - count)) if count > 10 else Cell("0" * 10)))

    monkeypatch.setattr("oag_transform.evaluation.experiments.row", measured)
    assert main(arguments(folder, tmp_path, "tune", "--defenses", "jpeg")) == 0
    assert read(tmp_path / "tune.json").facts["chosen"] == {"JPEG": 25}


def test_tuned_strengths_are_used(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "tune", "--defenses", "jpeg")) == 0
    found = read(tmp_path / "tune.json")
    assert found.facts["chosen"].keys() == {"JPEG"}
    (tmp_path / "tune.json").write_text(
        json.dumps(json.loads((tmp_path / "tune.json").read_text()) | {"facts": {"chosen": {"JPEG": 15}}})
    )
    run = arguments(
        folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "jpeg", "--tuned", str(tmp_path / "tune.json")
    )
    assert main(run) == 0
    names = [line.name for line in read(tmp_path / "table1.json").rows]
    assert names == ["None", "None, 4 views", "JPEG, quality 75", "JPEG, quality 15"]


def test_fit_target_and_evaluate_it(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.pt"
    assert main(["fit-target", "--data", str(folder), "--out", str(file)]) == 0
    run = ["evaluate", "table1", "--model", str(file), "--data", str(folder), "--out", str(tmp_path), "--count", "2"]
    assert main([*run, "--attacks", "fgsm", "--defenses", "jpeg"]) == 0
    assert "efficientnet-lite0" in read(tmp_path / "table1.json").facts["target"]


def test_fit_pixelcnn_and_defend_with_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oag_transform.evaluation import command, pixeldefend

    monkeypatch.setattr(command, "fit_pixelcnn", lambda images, **more: pixeldefend.fit_pixelcnn(images, steps=2, **more))
    file = tmp_path / "cnn.pt"
    assert main(["fit-pixelcnn", "--data", str(folder), "--out", str(file), "--resize", "40", "--crop", "40"]) == 0
    run = arguments(folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "pixel-defend", "--pixelcnn", str(file))
    assert main(run) == 0
    assert [line.error for line in read(tmp_path / "table1.json").rows if line.name.startswith("Pixel Defend")] == [""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--model", "tests.test_targets:tiny"], "the data has 2 classes"),
        (["--model", "resnet99"], "got 'resnet99'"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--resize", "30"], "--resize must be at least --crop, got 30 and 40"),
        (["--noise-std", "0"], "--noise-std must be above 0"),
        (["--eps", "0"], "grey levels"),
        (["--defenses", "magic"], "no defense 'magic'"),
        (["--tuned", "missing.json"], "missing.json"),
        (["--layout", "ilsvrc2012"], "needs --devkit"),
        (["--layout", "flower17"], "datasplits.mat is missing"),
        (["--device", "abacus"], "abacus"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--crop", "-3"], "--crop must be at least 1, got -3"),
        (["--pixelcnn", "nowhere.pt"], "nowhere.pt"),
        (["table12"], "no experiment 'table12'"),
        (["table2"], "table2 needs a second target"),
    ],
)
def test_bad_arguments_are_named(
    change: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = [] if change[0].startswith("table") else ["table4"]
    positional = change if not experiment else []
    run = arguments(folder, tmp_path, *experiment, *positional)
    assert main([*run, *(change if experiment else [])]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("fit-target", ["--out", "target"], "--out must end in .pt"),
        ("fit-target", ["--out", "."], "--out must end in .pt"),
        ("fit-target", ["--out", "a.pt", "--layout", "flower17"], "datasplits.mat is missing"),
        ("fit-target", ["--out", "a.pt", "--backbone", "abc"], "got 'abc'"),
        ("fit-pixelcnn", ["--out", "."], "must be a file, got the folder"),
        ("fit-pixelcnn", ["--out", "a.pt", "--count", "1"], "two images at least"),
        ("fit-pixelcnn", ["--out", "a.pt", "--crop", "0"], "--crop must be at least 1"),
    ],
)
def test_bad_arguments_of_fitting_are_named(
    command: str,
    more: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, "--data", str(folder), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.pt").exists()


def test_fitting_takes_the_training_split_and_evaluation_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def flowers17(root: Path, split: str) -> Listing:
        asked.append(split)
        return image_folder(root)

    monkeypatch.setattr("oag_transform.evaluation.data.flower17", flowers17)
    flowers = ["--data", "nowhere", "--layout", "flower17"]
    for run in (["fit-target", "--out", "a.pt"], ["fit-pixelcnn", "--out", "a.pt"]):
        assert main([*run, *flowers]) == 2
    assert main(["evaluate", "table4", "--out", "o", "--model", "efficientnet-lite0", *flowers]) == 2
    assert asked == ["trn1", "trn1", "tst1"]


def test_a_target_may_lie_in_the_current_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n"
        "    def forward(self, x):\n        b = x.mean((1, 2, 3)) - 0.5\n        return torch.stack([-b, b], 1)\n"
    )
    code = "import sys; from oag_transform.cli import main; sys.path = [p for p in sys.path if p]; sys.exit(main(sys.argv[1:]))"
    run = ["evaluate", "table1", "--model", "mine:M", "--data", str(folder), "--out", "o", "--resize", "40", "--crop", "40"]
    more = ["--count", "2", "--attacks", "fgsm", "--defenses", "jpeg"]
    subprocess.run([sys.executable, "-c", code, *run, *more], cwd=tmp_path, check=True, capture_output=True)
    assert read(tmp_path / "o" / "table1.json").facts["target"] == "mine:M"


def test_an_experiment_that_fails_leaves_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setitem(EXPERIMENTS, "table4", fail)
    assert main(arguments(folder, tmp_path, "table4", "table1", "--attacks", "fgsm", "--defenses", "jpeg")) == 1
    assert "table4 failed: RuntimeError: no luck" in caplog.text
    assert (tmp_path / "table1.json").exists()
    assert (tmp_path / "report.html").exists()


def test_a_report_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "report", "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["evaluate", "table1", "--out", str(tmp_path)]) == 2
    assert "--model and --data are needed" in capsys.readouterr().err


def test_a_corrupt_image_ends_the_run_with_its_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "a_dark" / "0.png").write_text("no image")
    assert main(arguments(tmp_path / "data", tmp_path / "out", "table4")) == 2
    assert "0.png is not an image that can be read" in capsys.readouterr().err


def test_without_its_extra_the_command_names_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("oag_transform.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    assert main(arguments(folder, tmp_path, "table4")) == 2
    assert "pip install 'oag-transform[eval]'" in capsys.readouterr().err


def test_only_images_that_the_target_gets_right_count(folder: Path, tmp_path: Path) -> None:
    class Half(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            wrong = images[:, 0, 0, 0] * 255 % 2 > 0.5  # an arbitrary half
            return torch.where(wrong[:, None], super().forward(images).flip(1), super().forward(images))

    listing = image_folder(folder)
    small = load_target("tests.test_evaluate:brightness", classes=("a_dark", "b_bright"), resize=40, crop=40)
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


def test_measurements_equal_the_plain_computation_whatever_the_chunks(folder: Path, tmp_path: Path) -> None:
    listing = image_folder(folder)
    target = load_target("tests.test_evaluate:brightness", classes=("a_dark", "b_bright"), resize=40, crop=40)
    found = []
    for chunk in (1, 4):
        subject = choose_subject(target, listing, 6, Store(tmp_path / str(chunk), chunk=chunk), 7, torch.device("cpu"))
        images = attacked(subject, igsm(4))
        defense = OnlineAlternateGenerator(network_steps=4, seed=7)
        cells = along(subject, defense, images, [2, 4], "")
        cell, _ = classify(subject, defense, images, "")
        found.append((images, noised(subject, 0.1), cell, cells))
        plain = igsm(4)(target.model, subject.images.float() / 255, subject.labels, classes=2, seed=7)
        assert torch.equal(images, (255 * plain).round().to(torch.uint8))
        right = target.model(defense(plain)).argmax(1) == subject.labels
        assert cell.right == "".join("1" if value else "0" for value in right)
        assert cells[1] == cell
        viewed, _ = classify(subject, defense, images, "", shift=4)
        right = DefendedModel(target.model, defense, shift=4)(plain).argmax(1) == subject.labels
        assert viewed.right == "".join("1" if value else "0" for value in right)
    (images, noisy, *cells_of_one), (same_images, same_noise, *cells_of_four) = found
    assert torch.equal(images, same_images)
    assert torch.equal(noisy, same_noise)
    assert cells_of_one == cells_of_four


def test_noise_has_the_strength_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    target = load_target("tests.test_evaluate:brightness", classes=("a_dark", "b_bright"), resize=40, crop=40)
    subject = choose_subject(target, image_folder(folder), 6, Store(tmp_path), 0, torch.device("cpu"))
    difference = (noised(subject, 0.05).double() - subject.images.double()) / 255
    count = difference.numel()
    assert abs(float(difference.std()) - 0.05) < 5 * 0.05 / (2 * count) ** 0.5 + 0.0005  # and rounding to 8 bits
    assert abs(float(difference.mean())) < 5 * 0.05 / count**0.5


def test_noise_is_independent_of_a_defenses_own(folder: Path, tmp_path: Path) -> None:
    target = load_target("tests.test_evaluate:brightness", classes=("a_dark", "b_bright"), resize=40, crop=40)
    subject = choose_subject(target, image_folder(folder), 6, Store(tmp_path), 0, torch.device("cpu"))
    one = noised(subject, 0.05).double() - subject.images.double()
    other = GaussianNoise(12, seed=0)(subject.images.double() / 255) * 255 - subject.images.double()
    correlation = float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
    assert abs(correlation) < 5 / one.numel() ** 0.5


def test_a_failing_defense_is_a_line_of_its_own(folder: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor, *, index: int = 0) -> Tensor:
            raise RuntimeError("no luck")

    target = load_target("tests.test_evaluate:brightness", classes=("a_dark", "b_bright"), resize=40, crop=40)
    subject = choose_subject(target, image_folder(folder), 6, Store(tmp_path), 0, torch.device("cpu"))
    line = row(subject, "broken", Broken, [("Clean", subject.images)])
    assert (line.cells, line.error) == ((None,), "RuntimeError: no luck")


def test_the_help_names_every_defense(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    printed = "".join(capsys.readouterr().out.split())
    assert ",".join(_slug(family.name) for family in defenses()) in printed


def test_rows_of_ours_at_the_default_and_those_with_views_as_in_a_defended_model() -> None:
    model = DefendedModel(torch.nn.Identity())
    every = {family.name: family for family in defenses()}
    assert list(every)[-3:] == [f"{OURS}, full strength, 4 views", OURS, f"{OURS}, 4 views"]
    made = [family.make(3, 0).settings.strength for family in list(every.values())[-3:]]  # type: ignore[union-attr]
    assert made == [1, None, None]
    assert every[OURS].published == every[f"{OURS}, 4 views"].published == OnlineAlternateGenerator().settings.network_steps
    assert model.samples == 1
    assert {name: family.shift for name, family in every.items()} == {
        name: model.shift if "4 views" in name else 0 for name in every
    }
