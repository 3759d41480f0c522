"""``oag-transform evaluate`` and the two fitting commands, end to end, on tiny classifiers and six images."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.apps.cli import main
from oag_transform.apps.evaluate import Evaluate
from oag_transform.baselines import pixeldefend
from oag_transform.baselines.catalogue import DEFENSES, OAG, Needs, has_oag
from oag_transform.evaluation import plan
from oag_transform.evaluation.data import Listing, image_folder
from oag_transform.evaluation.options import ADAPTIVE_ATTACKS, EXPERIMENTS, GRAY_BOX
from oag_transform.evaluation.result import read
from tests.tiny import write_images

FAST = ["mean", "jpeg", "oag"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    here = ["--model", "tests.tiny:brightness", "--data", str(folder), "--out", str(out), "--resize", "40", "--crop", "40"]
    return ["evaluate", *more, *here, "--count", "6", "--slow-count", "1"]


def test_every_experiment_writes_its_result_and_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oag_transform.evaluation.experiments.figures.TRACE_STEPS", (2, 4))  # for time
    monkeypatch.setattr("oag_transform.evaluation.experiments.figures.EPSILONS", (0, 6))
    other = ["--other", "tests.tiny:left_half"]
    more = ["--adaptive.linf", "4", "--adaptive.steps", "2", "--certify.n", "8", "--certify.denoisers", "none", "tv"]
    more += ["--adversarial", str(folder)]
    more += ["--convergence.steps", "2", "--convergence.draws", "1", "--convergence.eot-steps", "2", "--slow-count", "1"]
    run = arguments(
        folder, tmp_path, "all", "tune", "adaptive", "convergence", "certify", "transfer", *other, "--defenses", *FAST
    )
    assert main([*run, *more]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    figures = []
    several = {"adaptive": ["adaptive-linf"], "certify": ["certify-0.25"]}
    several["convergence"] = [f"convergence-{curve}-{key}" for key in FAST for curve in ("steps", "draws")]
    for entry in EXPERIMENTS:
        for key in several.get(entry.key, [entry.key]):
            result = read(tmp_path / f"{key}.json")
            assert result.key == key
            assert result.title.startswith(entry.title)
            assert result.title in printed
            assert result.facts["n"] == {"autoencoder": 1, "fig5": 3}.get(entry.key, 6)
            assert (tmp_path / f"{key}.csv").exists()
            assert not [line for line in result.rows if line.error], entry.key
            figures += [tmp_path / figure.file for figure in result.figures]
    assert all(figure.stat().st_size > 1000 for figure in figures)
    assert page.count("<table") >= 8
    table = read(tmp_path / "table1.json")
    assert table.rows[0].name == "Undefended"
    assert table.rows[0].cells[0].accuracy == 1  # type: ignore[union-attr]
    # a classifier of brightness alone is moved by every attack, and no filter brings the brightness back
    assert table.rows[0].cells[2].accuracy < 1  # type: ignore[union-attr]
    assert printed.rstrip().endswith(table.facts["recommendation"])
    assert "<strong>What to take.</strong>" in page

    before = {figure: figure.read_bytes() for figure in figures}
    for figure in figures:
        figure.unlink()
    (tmp_path / "report.html").unlink()
    assert main(["evaluate", "report", "--out", str(tmp_path)]) == 0
    assert {figure: figure.read_bytes() for figure in figures} == before
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.slow
def test_every_defense_that_can_be_made_has_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm3d", None)  # an extra of its own
    with caplog.at_level("INFO"):
        assert main(arguments(folder, tmp_path, "table1", "--attacks", "fgsm")) == 0
    rows = {line.name: line for line in read(tmp_path / "table1.json").rows}
    for family in DEFENSES:
        name = family.describe(family.published)
        if family.key in ("pixeldefend", "bm3d", "zeropur"):  # without a PixelCNN, the package, a linear layer
            assert name not in rows
            assert f"{family.label} is left out: " in caplog.text
        else:
            line = rows[name]
            assert line.error == ""
            assert [cell.n if cell else 0 for cell in line.cells[:2]] == [1 if family.slow else 6] * 2
            assert line.seconds is not None
            assert (line.defense, line.setting) == (family.key, family.published)
    assert "--pixelcnn FILE" in caplog.text


def test_the_shift_of_the_views_is_that_of_every_row_in_views(folder: Path, tmp_path: Path) -> None:
    asked = ["table1", "--attacks", "fgsm", "--defenses", "jpeg-4-views:50", "jpeg:50"]
    assert main(arguments(folder, tmp_path, *asked, "--shift", "20")) == 0
    shifted = {line.name: line for line in read(tmp_path / "table1.json").rows}
    assert read(tmp_path / "table1.json").facts["shift of the views"] == 20
    assert main(arguments(folder, tmp_path, *asked)) == 0
    usual = {line.name: line for line in read(tmp_path / "table1.json").rows}
    models = "Undefended, 4 views", "JPEG, 4 views, quality 50"
    assert all(shifted[name].code != usual[name].code and "shift=20" in shifted[name].code for name in models)
    assert shifted["JPEG, quality 50"] == usual["JPEG, quality 50"]


def test_a_failed_row_has_a_reason_and_exit_status_1(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(arguments(folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "jpeg", "tests.tiny:broken")) == 1
    rows = {line.name: line for line in read(tmp_path / "table1.json").rows}
    assert rows["tests.tiny:broken"].error == "RuntimeError: it always fails"
    assert rows["JPEG, quality 75"].error == ""
    assert "table1: 1 of 5 rows failed: tests.tiny:broken" in caplog.text
    assert (tmp_path / "report.html").exists()


def test_a_second_run_computes_nothing_and_a_changed_setting_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arguments(folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "mean")
    assert main(run) == 0
    before = json.loads((tmp_path / "table1.json").read_text())

    def again(*_: object, **__: object) -> None:
        raise RuntimeError("computed again")

    monkeypatch.setattr("oag_transform.baselines.filters.MeanFilter.forward", again)
    assert main(run) == 0
    after = json.loads((tmp_path / "table1.json").read_text())
    assert before["rows"] == after["rows"]
    assert main([*run, "--eps", "3"]) == 1
    errors = {line["name"]: line.get("error", "") for line in json.loads((tmp_path / "table1.json").read_text())["rows"]}
    assert "computed again" in errors["Mean filter, size 3"]


def test_a_second_run_with_other_sources_computes_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = arguments(folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "mean")
    assert main(run) == 0
    chunks = len(list((tmp_path / "cache").rglob("*.npz")))
    monkeypatch.setattr("oag_transform.evaluation.store.sources", lambda: "other")
    assert main(run) == 0
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 2 * chunks


def test_the_papers_setting_has_files_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = plan.as_published
    monkeypatch.setattr(plan, "as_published", lambda family: dataclasses.replace(published(family), tuned=3))  # for time
    monkeypatch.setattr("oag_transform.evaluation.experiments.tables.KERNEL_SIZES", (7,))
    run = arguments(folder, tmp_path, "table5", "--count", "1")
    assert main(run) == 0
    assert main([*run, "--setting", "paper"]) == 0
    default, paper = (read(tmp_path / f"{key}.json") for key in ("table5", "table5-paper"))
    assert [row.name for row in paper.rows] == ["7 x 7", "15 x 15"]
    assert {row.setting for row in paper.rows} == {3}
    assert "paper" in paper.facts["setting of OAG"]
    assert "default" in default.facts["setting of OAG"]
    assert "langevin" not in paper.rows[0].code  # closed_form is the default
    assert "init='uniform'" in paper.rows[0].code


def test_tuned_settings_are_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, tmp_path, "tune", "--defenses", "jpeg")) == 0
    found = read(tmp_path / "tune.json")
    assert found.facts["chosen"].keys() == {"jpeg"}
    plain = json.loads((tmp_path / "tune.json").read_text()) | {"facts": {"chosen": {"jpeg": 15}}}
    (tmp_path / "tune.json").write_text(json.dumps(plain))
    more = ["--attacks", "fgsm", "--defenses", "jpeg", "--tuned", str(tmp_path / "tune.json")]
    assert main(arguments(folder, tmp_path, "table1", *more)) == 0
    names = [line.name for line in read(tmp_path / "table1.json").rows]
    assert names == ["Undefended", "Undefended, 4 views", "JPEG, quality 75", "JPEG, quality 15"]
    (tmp_path / "tune.json").write_text(json.dumps(plain | {"facts": {"chosen": {"JPEG": 15}}}))
    assert main(arguments(folder, tmp_path, "table1", *more)) == 2
    assert "tune.json: no defense 'JPEG'" in capsys.readouterr().err
    (tmp_path / "tune.json").write_text(json.dumps(plain | {"facts": {"chosen": {"oag": None}}}))
    assert main(arguments(folder, tmp_path, "table1", *more)) == 2
    assert "tune.json is not the tune.json of an evaluation" in capsys.readouterr().err


def test_a_tuned_setting_that_a_defense_does_not_take_is_an_error_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path, "tune", "--defenses", "jpeg")) == 0
    file = tmp_path / "tune.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"facts": {"chosen": {"jpeg": 500}}}))
    run = arguments(folder, tmp_path / "out", "table1", "--defenses", "jpeg", "--tuned", str(file))
    assert main(run) == 2
    assert f"--tuned {file}: jpeg: quality must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_papers_setting_takes_its_own_tuned_steps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PAPER_STEPS", (2, 3))  # for time
    paper = ["--setting", "paper", "--count", "1", "--slow-count", "1"]
    assert main(arguments(folder, tmp_path, "tune", "--defenses", "oag", *paper)) == 0
    chosen = read(tmp_path / "tune-paper.json").facts["chosen"]["oag"]
    assert chosen in (2, 3)
    tuned = ["--tuned", str(tmp_path / "tune-paper.json")]
    monkeypatch.setattr("oag_transform.evaluation.experiments.tables.KERNEL_SIZES", (7,))
    assert main(arguments(folder, tmp_path, "table5", *paper, *tuned)) == 0
    assert {row.setting for row in read(tmp_path / "table5-paper.json").rows} == {chosen}
    assert main(arguments(folder, tmp_path, "table5", *tuned)) == 2
    assert "tune-paper.json has OAG at another setting; run tune with --setting default" in capsys.readouterr().err


def test_the_papers_setting_has_one_row_of_oag(folder: Path) -> None:
    command = Evaluate(
        experiments=("table1",), out=Path("out"), model="tests.tiny:brightness", data=str(folder), setting="paper"
    )
    assert [family.label for family in command._every() if has_oag(family.key)] == ["OAG, paper(), closed form"]


def test_settings_tuned_in_views_and_of_a_given_setting_are_used(folder: Path, tmp_path: Path) -> None:
    keys = ["jpeg:50", "tv-4-views"]
    assert main(arguments(folder, tmp_path, "tune", "--defenses", *keys)) == 0
    chosen = read(tmp_path / "tune.json").facts["chosen"]
    assert list(chosen) == keys
    assert main(arguments(folder, tmp_path, "table1", "--defenses", *keys, "--tuned", str(tmp_path / "tune.json"))) == 0
    settings = [(row.defense, row.setting) for row in read(tmp_path / "table1.json").rows[2:]]
    assert ("tv-4-views", chosen["tv-4-views"]) in settings
    assert ("jpeg:50", 50) in settings


def test_a_defense_that_is_named_twice_has_one_row(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "table1", "--defenses", "mean:3", "mean:3")) == 0
    assert [row.defense for row in read(tmp_path / "table1.json").rows] == ["", "", "mean:3"]


@pytest.mark.parametrize("attack", ["fgsm", "mifgsm"])
def test_bounds_and_goals_hold_for_attacks_that_table1_leaves_out(folder: Path, tmp_path: Path, attack: str) -> None:
    options = ("--attacks", attack, "--eps", "1", "--goal", "untargeted")
    assert main(arguments(folder, tmp_path, "table4", *options)) == 0
    assert read(tmp_path / "table4.json").facts["attacks"] == "IGSM 1/255 (untargeted)"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("table1", "--attacks"), "--attacks is empty"),
        (("adaptive", "--adaptive.attacks"), "--adaptive.attacks is empty"),
        (("certify", "--certify.sigma"), "--certify.sigma is empty"),
        (("convergence", "--convergence.steps"), "--convergence.steps is empty"),
        (("convergence", "--convergence.draws"), "--convergence.draws is empty"),
        (("certify", "--setting", "paper"), "--setting paper doesn't go with certify"),
        (("convergence", "--adaptive.seed-known"), "--adaptive.seed-known doesn't go with convergence"),
        (("table1", "--setting", "paper", "--defenses", "oag-4-views:2"), "got --defenses oag-4-views:2"),
        (("table1", "--defenses", "pixeldefend"), "--defenses pixeldefend: it needs a PixelCNN"),
        (("table3", "--other", "tests.tiny:left_half", "--defenses", "zeropur"), "its target, and was given none or several"),
        (("adaptive", "--adaptive.attacks", "dlr"), "dlr needs 3 classes or more, got 2"),
        (("adaptive", "--adaptive.linf", "0.0001"), "--adaptive.linf must be"),
        (("convergence", "--convergence.linf", "300"), "--convergence.linf must be"),
        (
            ("certify", "--defenses", "tv"),
            "--defenses has no effect on certify; the denoisers",
        ),
        (("table4", "fig5", "--defenses", "tv"), "--defenses has no effect on table4 and fig5"),
        (("table1", "--defenses"), "--defenses is empty"),
        (
            ("table1", "--defenses", "tests.tiny:write_images"),
            "must return the defense, and is called with seed and std",
        ),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str
) -> None:
    assert main(arguments(folder, tmp_path / "out", *options)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_named_without_what_a_file_name_may_not_hold(folder: Path, tmp_path: Path) -> None:
    options = ("--convergence.steps", "1", "--convergence.draws", "1", "--convergence.eot-steps", "1")
    assert main(arguments(folder, tmp_path, "convergence", "--defenses", "mean:3", *options)) == 0
    for curve in ("steps", "draws"):
        assert (tmp_path / f"convergence-{curve}-mean-3.svg").exists()
        assert read(tmp_path / f"convergence-{curve}-mean-3.json").figures[0].file == f"convergence-{curve}-mean-3.svg"


def test_fit_target_and_evaluate_it(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.pt"
    assert main(["fit-target", "--data", str(folder), "--out", str(file)]) == 0
    run = ["evaluate", "table1", "--model", str(file), "--data", str(folder), "--out", str(tmp_path), "--count", "2"]
    assert main([*run, "--attacks", "fgsm", "--defenses", "jpeg"]) == 0
    assert "efficientnet-lite0" in read(tmp_path / "table1.json").facts["target"]


def test_fit_pixelcnn_and_defend_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from oag_transform.baselines import pixeldefend

    fit = pixeldefend.fit_pixelcnn
    monkeypatch.setattr(pixeldefend, "fit_pixelcnn", lambda images, **more: fit(images, steps=2, **more))
    file = tmp_path / "cnn.pt"
    command = ["fit-pixelcnn", "--data", str(folder), "--out", str(file)]
    assert main(command) == 2
    assert "the first image has 40 x 40 pixels: give --resize and --crop, such as 40" in capsys.readouterr().err
    assert main([*command, "--resize", "40", "--crop", "40"]) == 0
    run = arguments(folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "pixeldefend", "--pixelcnn", str(file))
    assert main(run) == 0
    assert [line.error for line in read(tmp_path / "table1.json").rows if line.defense == "pixeldefend"] == [""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--model", "tests.test_targets:tiny"], "there are 2 classes"),
        (["--model", "resnet99"], "got 'resnet99'"),
        (["--count", "0"], "--count must be an integer >= 1, got 0"),
        (["--resize", "30"], "--resize must be at least --crop, got 30 and 40"),
        (["--noise-std", "0"], "--noise-std must be a finite number > 0"),
        (["--shift", "0"], "--shift must be an integer >= 1, got 0"),
        (["--shift", "40"], "--shift must be less than the images' 40 pixels, got 40"),
        (["--eps", "0"], "grey levels"),
        (["--defenses", "magic"], "no defense 'magic'; expected some of mean, median"),
        (["--out", __file__], "--out must be a folder, got "),
        (["--defenses", "mean", "jpeg:999"], "--defenses jpeg:999: quality must be"),
        (["--defenses", "oag+median:4"], "--defenses oag+median:4: "),
        (["--tuned", "missing.json"], "--tuned must be a file: missing.json is missing"),
        (["--tuned", "."], "--tuned must be a file: . is a folder"),
        (["--data", "ilsvrc2012:here"], "needs --devkit"),
        (["--data", "flower17:here"], "datasplits.mat is missing"),
        (["--data", "cifar10:here"], "doesn't hold cifar10"),
        (["--data", "svhn:here"], "expected a folder, or one of imagefolder, flower17"),
        (["--adaptive.attacks", "pgd"], "--adaptive.attacks must be one of ('transfer'"),
        (["--certify.alpha", "1.5"], "--certify.alpha"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "--device 'meta' can't be used here"),
        (["--split", "test"], "--split is for flower17, cifar10, cifar100, got 'test' for "),
        (["--devkit", "here"], "--devkit is for ilsvrc2012, got it for "),
        (["--defenses", ".relative:make"], "--defenses .relative:make: .relative:make can't be imported: TypeError"),
        (["--seed", "-1"], "--seed must be an integer >= 0"),
        (["--crop", "-3"], "--crop must be an integer >= 1, got -3"),
        (["--pixelcnn", "nowhere.pt"], "--pixelcnn must be a file: nowhere.pt is missing"),
        (["table12"], "no experiment 'table12'"),
        (["--adversarial", "nowhere"], "transfer and --adversarial FOLDER need each other"),
        (["transfer"], "transfer and --adversarial FOLDER need each other"),
        (["transfer", "--adversarial", "nowhere"], "--adversarial nowhere is not a folder"),
        (["table2"], "table2 needs a second target"),
        (["table3"], "table3 needs a second target"),
    ],
)
def test_bad_arguments_are_named(
    change: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = [] if change[0].startswith(("table", "transfer")) else ["table1"]
    positional = change if not experiment else []
    run = arguments(folder, tmp_path, *experiment, *positional)
    assert main([*run, *(change if experiment else [])]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_small_images_need_a_size_where_the_classifier_has_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "a_dark/0.png").write_bytes(b"no image")  # the first that can be read counts
    base = ["evaluate", "table4", "--data", str(data), "--out", str(tmp_path / "out"), "--model", "tests.tiny:brightness"]
    assert main(base) == 2
    assert "tests.tiny:brightness doesn't say which size it takes, and the first image has 40 x 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("fit-target", ["--out", "target"], "--out must end in .pt"),
        ("fit-target", ["--out", "."], "--out must end in .pt"),
        ("fit-target", ["--out", "a.pt", "--data", "flower17:here"], "datasplits.mat is missing"),
        ("fit-target", ["--out", "a.pt", "--backbone", "abc"], "got 'abc'"),
        ("fit-target", ["--out", "a.pt", "--lr", "0"], "--lr must be a finite number > 0"),
        ("fit-pixelcnn", ["--out", "."], "must be a file, got the folder"),
        ("fit-pixelcnn", ["--out", "a.pt", "--count", "1"], "--count must be at least 2"),
        ("fit-pixelcnn", ["--out", "a.pt", "--crop", "0"], "--crop must be an integer >= 1"),
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


def test_fitting_takes_the_training_split_and_evaluation_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def flowers17(root: Path, split: str) -> Listing:
        asked.append(split)
        return image_folder(root)

    monkeypatch.setattr("oag_transform.evaluation.data.flower17", flowers17)
    monkeypatch.chdir(tmp_path)
    flowers = ["--data", "flower17:nowhere"]
    for run in (["fit-target", "--out", "a.pt"], ["fit-pixelcnn", "--out", "a.pt"]):
        assert main([*run, *flowers]) == 2
    assert main(["evaluate", "table4", "--out", "o", "--model", "efficientnet-lite0", *flowers]) == 2
    assert asked == ["trn1", "trn1", "tst1"]


def test_a_damaged_pixelcnn_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": pixeldefend._FORMAT, "settings": {"size": 3}}, tmp_path / "p.pt")
    assert main(arguments(folder, tmp_path, "table4", "--pixelcnn", str(tmp_path / "p.pt"))) == 2
    assert f"--pixelcnn {tmp_path}/p.pt: TypeError" in capsys.readouterr().err


def test_a_target_may_lie_in_the_current_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n"
        "    def forward(self, x):\n        b = x.mean((1, 2, 3)) - 0.5\n        return torch.stack([-b, b], 1)\n"
    )
    code = (
        "import sys\nfrom oag_transform.apps.cli import main\n"
        "sys.path = [p for p in sys.path if p]\nsys.exit(main(sys.argv[1:]))"
    )
    run = ["evaluate", "table1", "--model", "mine:M", "--data", str(folder), "--out", "o", "--resize", "40", "--crop", "40"]
    more = ["--count", "2", "--attacks", "fgsm", "--defenses", "jpeg"]
    subprocess.run([sys.executable, "-c", code, *run, *more], cwd=tmp_path, check=True, capture_output=True)
    assert read(tmp_path / "o" / "table1.json").facts["target"] == "mine:M"


def test_an_experiment_that_fails_leaves_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr("oag_transform.evaluation.experiments.tables.table1", fail)
    assert main(arguments(folder, tmp_path, "table1", "table6", "--defenses", "jpeg")) == 1
    assert "table1 failed: RuntimeError: no luck" in caplog.text
    assert not (tmp_path / "table1.json").exists()
    assert (tmp_path / "table6.json").exists()
    assert (tmp_path / "report.html").exists()


def test_a_report_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "report", "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["evaluate", "table1", "--out", str(tmp_path)]) == 2
    assert "--model and --data are needed" in capsys.readouterr().err


def test_a_corrupt_image_is_left_out_by_name(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "a_dark" / "0.png").write_text("no image")
    run = arguments(tmp_path / "data", tmp_path / "out", "table1", "--attacks", "fgsm", "--defenses", "jpeg")
    assert main(run) == 0
    assert any("left out" in line and "0.png" in line for line in caplog.text.splitlines())
    assert read(tmp_path / "out" / "table1.json").facts["n"] == 5


def test_without_its_extra_the_command_names_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "oag_transform.baselines.denoisers", raising=False)  # imported again, in vain
    for name in ["skimage", *(name for name in sys.modules if name.startswith("skimage."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(arguments(folder, tmp_path, "table4")) == 2
    printed = capsys.readouterr().err
    assert "skimage" in printed
    assert "pip install 'oag-transform[eval]'" in printed


def test_the_help_names_every_experiment_attack_and_defense(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    lines = capsys.readouterr().out.splitlines()
    listed: list[Any] = [*EXPERIMENTS, *GRAY_BOX, *DEFENSES]
    for entry in listed:
        words = entry.title if entry in EXPERIMENTS else entry.label
        assert any(line.split()[:1] == [entry.key] and words in line for line in lines), entry.key
    for attack in ADAPTIVE_ATTACKS:
        assert any(line.split()[:1] == [attack.key] and attack.description in line for line in lines), attack.key


def test_rows_of_oag_at_the_default_and_those_with_views_as_in_a_defended_model() -> None:
    every = {family.key: family for family in DEFENSES}
    assert list(every)[-3:] == ["oag-full-4-views", "oag", "oag-4-views"]
    made = [family.make(3, 0, Needs()).settings.strength for family in list(every.values())[-3:]]  # type: ignore[union-attr]
    assert made == [1, None, None]
    assert every["oag"].label == OAG
    assert every["oag"].published == every["oag-4-views"].published == OnlineAlternateGenerator().settings.network_steps
    assert {key: family.in_views for key, family in every.items()} == {key: "4-views" in key for key in every}
    assert DefendedModel(every["oag"].make(3, 0, Needs())).samples == 1


def test_a_defense_of_ones_own_is_a_row_by_one_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_defense.py").write_text("def negative():\n    return lambda images: 1 - images\n")
    run = arguments(
        folder, tmp_path, "table1", "adaptive", "--attacks", "fgsm", "--adaptive.steps", "2", "--adaptive.linf", "1"
    )
    assert main([*run, "--defenses", "jpeg", "my_defense:negative", "my_defense:negative-4-views"]) == 0
    for key in ("table1", "adaptive-linf"):
        rows = {line.name: line for line in read(tmp_path / f"{key}.json").rows}
        alone, views = rows["my_defense:negative"], rows["my_defense:negative, 4 views"]
        assert alone.cells[0].accuracy == views.cells[0].accuracy == 0  # type: ignore[union-attr]
        assert "OwnDefense('my_defense:negative')" in alone.code
        assert (alone.defense, views.defense) == ("my_defense:negative", "my_defense:negative-4-views")
    assert main([*run, "--defenses", "my_defense:positive"]) == 2
    assert "my_defense:positive can't be imported" in capsys.readouterr().err


def test_a_defense_that_leaves_the_process_is_a_failed_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaving_defense.py").write_text(
        "def make():\n    def defend(images):\n        raise SystemExit(3)\n    return defend\n"
    )
    run = arguments(folder, tmp_path, "table1", "--attacks", "fgsm", "--defenses", "jpeg", "leaving_defense:make", "--verbose")
    assert main(run) == 1
    rows = {row.name: row for row in read(tmp_path / "table1.json").rows}
    assert rows["leaving_defense:make"].error == "SystemExit: 3"
    assert not rows["JPEG, quality 75"].error
    assert "Traceback" in caplog.text
