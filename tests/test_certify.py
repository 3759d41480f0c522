"""``oag-transform evaluate certify``, end to end on tiny images and a classifier whose true radius is known."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace
from scipy.ndimage import median_filter
from scipy.stats import beta, norm
from skimage.restoration import denoise_nl_means
from torch import Tensor, nn

from oag_transform.apps.cli import main
from oag_transform.baselines.catalogue import OAG_KEY
from oag_transform.baselines.smoothing import DENOISERS, denoisers
from oag_transform.evaluation.data import Preprocessing, image_folder, read_images
from oag_transform.evaluation.experiments.certify import adapt_batch_norm, at_alpha, batch_norms
from oag_transform.evaluation.render.draw import draw_figures
from oag_transform.evaluation.render.tables import to_markdown
from oag_transform.evaluation.result import DrawCounts, Result, RowResult, read
from oag_transform.evaluation.statistics import certified, linf_radius
from oag_transform.evaluation.targets import load_target
from oag_transform.smoothed import certified_radius
from tests import tiny

SIDE, STD, N = 12, 0.1, 60
KEY = "certify-0.1.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certificates")
    assert main(arguments(folder, out)) == 0
    return out / KEY


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    here = ["--model", "tests.tiny:brightness", "--data", str(folder), "--resize", "14", "--crop", str(SIDE)]
    size = ["--certify.sigma", str(STD), "--count", "6", "--certify.n0", "5", "--certify.n", str(N), "--batch-size", "4"]
    return ["evaluate", "certify", *here, *size, "--out", str(out), "--certify.denoisers", "none", "tv", "wavelets", *more]


def without_time(path: Path) -> Any:
    """What doesn't depend on when and where it was run."""
    plain = json.loads(path.read_text())
    del plain["facts"]["command"]
    for row in plain["rows"]:
        del row["notes"]["s a draw"]
        for image in row["certificates"]:
            assert image.pop("seconds") > 0
    return plain


def made(*counts: tuple[int, int, int], alpha: float = 0.001, rows: int = 1) -> Result:
    """Images of class 0 of two, as (class that is chosen, draws of it, draws); so many rows of as many images each."""
    images = [DrawCounts("a/1.png", 0, {chosen: 1}, {chosen: count, 1 - chosen: n - count}, 1.0) for chosen, count, n in counts]
    each = len(images) // rows
    found = [RowResult("r", (), certificates=tuple(images[i * each : (i + 1) * each])) for i in range(rows)]
    facts = {
        "sigma": 0.25,
        "draws counted": counts[0][2],
        "analyses": 1,
        "shape": [3, 224, 224],
        "undefended, without noise": "1",
    }
    return at_alpha(Result("certify", "", "", "Denoiser", (), tuple(found), facts), alpha)


def rights(result: Result, row: int = 0) -> list[str]:
    return [cell.right for cell in result.rows[row].cells if cell is not None]


def test_the_command_writes_data_a_table_and_a_curve(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = [denoiser.key for denoiser in denoisers()]
    assert every == [OAG_KEY, "none", "tv", "nlm", "wavelets"]
    few = ("--certify.n0", "2", "--certify.n", "6", "--certify.alpha", "0.1", "--certify.denoisers", *every)
    assert main(arguments(folder, tmp_path, "--certify.sigma", "0.05", "0.1", *few)) == 0
    printed = capsys.readouterr().out
    for sigma in (0.05, 0.1):
        result = read(tmp_path / f"certify-{sigma:g}.json")
        assert [row.defense for row in result.rows] == every
        assert all(len(row.certificates) == 6 and not row.error for row in result.rows)
        # the same images for all, as the tests between rows are paired
        assert len({tuple((each.name, each.truth) for each in row.certificates) for row in result.rows}) == 1
        assert (tmp_path / f"certify-{sigma:g}.svg").stat().st_size > 1000
        assert "L-infinity" in result.caption
        assert (tmp_path / f"certify-{sigma:g}.md").read_text() in printed
    for label in [denoiser.label for denoiser in DENOISERS if denoiser.by_default]:
        assert printed.count(f"| {label} |") >= 2


def test_denoisers_that_have_to_be_asked_for_are_their_definitions() -> None:
    made = {denoiser.key: denoiser.make(STD, 0, None) for denoiser in denoisers(["median", "nlm-weak"])}
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    median = median_filter(images.numpy(), size=(1, 1, 3, 3), mode="nearest")
    torch.testing.assert_close(made["median"](images), torch.from_numpy(median), rtol=0, atol=0)
    settings = {"patch_size": 5, "patch_distance": 6, "channel_axis": 0, "h": 0.4 * STD, "sigma": STD, "fast_mode": True}
    expected = [torch.from_numpy(denoise_nl_means(image.numpy(), **settings)) for image in images]
    torch.testing.assert_close(made["nlm-weak"](images), torch.stack(expected), rtol=0, atol=1e-5)


def test_a_denoiser_of_ones_own_knows_the_noise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flip = "def flip(std):\n    return lambda images: 1 - images if std == 0.1 else images\n"
    (tmp_path / "my_denoiser.py").write_text(f"{flip}\n\ndef same():\n    return lambda images: images\n")
    assert main(arguments(folder, tmp_path / "out", "my_denoiser:flip", "my_denoiser:same")) == 0
    rows = {row.defense: row.cells[0] for row in read(tmp_path / "out" / KEY).rows}
    assert list(rows) == ["none", "tv", "wavelets", "my_denoiser:flip", "my_denoiser:same"]
    assert rows["my_denoiser:same"] == rows["none"]
    assert all(cell is not None for cell in rows.values())
    assert rows["none"].accuracy > 0 == rows["my_denoiser:flip"].accuracy  # type: ignore[union-attr]
    for name, named in (("my_denoiser:other", "my_denoiser:other can't be imported"), ("blur", "or module:function")):
        assert main(arguments(folder, tmp_path / "other", name)) == 2
        assert named in capsys.readouterr().err


def test_no_certified_radius_exceeds_the_true_radius(folder: Path, found: Path) -> None:
    """Brightness is linear, so without a denoiser an image's true radius is its distance to the plane of mean 1/2."""
    (row,) = [row for row in read(found).rows if row.defense == "none"]
    listing = image_folder(folder)
    order = [listing.names.index(each.name) for each in row.certificates]
    images = read_images(listing, order, Preprocessing(14, SIDE))[0].double() / 255
    true = (images.mean((1, 2, 3)) - 0.5).abs() * math.sqrt(3 * SIDE**2)
    chosen = [max(each.selection, key=each.selection.__getitem__) for each in row.certificates]
    counts = [each.counted[label] for each, label in zip(row.certificates, chosen, strict=True)]
    radii = torch.tensor([certified_radius(count, N, STD, 0.001) for count in counts])
    assert (radii <= true).all()
    assert (radii > 0.3 * true.clamp(max=certified_radius(N, N, STD, 0.001))).sum() >= 3  # nor is it trivially small


def test_radii_can_be_recomputed_from_the_json(found: Path) -> None:
    plain = json.loads(found.read_text())
    assert plain["facts"]["shape"] == [3, SIDE, SIDE]
    for row in plain["rows"]:
        for place, each in enumerate(row["certificates"]):
            assert sum(each["counted"].values()) == plain["facts"]["draws counted"] == N
            assert sum(each["selection"].values()) == plain["facts"]["n0"] == 5
            chosen = max(each["selection"], key=each["selection"].get)
            count = each["counted"].get(chosen, 0)
            bound = beta.ppf(plain["facts"]["alpha"], count, N - count + 1) if count else 0.0
            radius = max(0.0, STD * norm.ppf(bound)) if bound > 0.5 else 0.0
            right = int(chosen) == each["truth"] and radius > 0
            assert row["cells"][0]["right"][place] == "01"[int(right)]


def test_another_alpha_needs_no_new_draws(folder: Path, found: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "--certify.alpha", "0.1")) == 0
    fresh, again = read(tmp_path / KEY), at_alpha(read(found), 0.1)
    assert [row.cells for row in fresh.rows] == [row.cells for row in again.rows]
    assert fresh.columns == again.columns
    assert [row.cells for row in again.rows] != [row.cells for row in read(found).rows]


@pytest.mark.parametrize("more", [(), ("--certify.radius", "0.05")])
def test_an_interrupted_run_goes_on_to_the_same_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    more = ("--certify.denoisers", "none", "wavelets", *more)
    calls: list[int] = []
    forward: Callable[..., Tensor] = tiny.Brightness.forward

    def counted(self: nn.Module, images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(tiny.Brightness, "forward", counted)
    stop = -1
    assert main(arguments(folder, tmp_path / "whole", *more)) == 0
    whole = len(calls)
    calls.clear()
    stop = whole // 2 + 10  # amid an image
    assert main(arguments(folder, tmp_path / "parts", *more)) == 130
    assert not (tmp_path / "parts" / KEY).exists()
    calls.clear()
    stop = -1
    assert main(arguments(folder, tmp_path / "parts", *more)) == 0
    assert len(calls) < 0.65 * whole
    assert without_time(tmp_path / "parts" / KEY) == without_time(tmp_path / "whole" / KEY)
    calls.clear()
    assert main(arguments(folder, tmp_path / "parts", *more)) == 0
    assert len(calls) <= 3  # the target is looked at, and nothing is counted


def test_more_images_extend_an_existing_result(folder: Path, found: Path, tmp_path: Path) -> None:
    for count in ("3", "6"):
        assert main(arguments(folder, tmp_path, "--count", count)) == 0
    assert without_time(tmp_path / KEY) == without_time(found)


def test_each_image_has_noise_of_its_own(folder: Path, tmp_path: Path) -> None:
    (image, *_) = (folder / "a_dark").iterdir()
    for name in "abcdef":
        copy = tmp_path / "same" / f"{'a_dark' if name < 'd' else 'b_bright'}" / f"{name}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(image.read_bytes())
    assert main(arguments(tmp_path / "same", tmp_path, "--certify.denoisers", "none", "--certify.sigma", "0.4")) == 0
    row = read(tmp_path / "certify-0.4.json").rows[0]
    assert len({str(each.counted) for each in row.certificates}) > 1


def test_damaged_counts_are_counted_again(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = ("--certify.denoisers", "none")
    assert main(arguments(folder, tmp_path, *one)) == 0
    before = without_time(tmp_path / KEY)
    for damaged in (tmp_path / "cache").rglob("000002-*.npz"):
        damaged.write_bytes(b"no array")
    assert main(arguments(folder, tmp_path, *one)) == 0
    assert "computed again" in caplog.text
    assert without_time(tmp_path / KEY) == before


def test_with_a_radius_counting_stops_early_and_alpha_pays_for_it(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "--certify.radius", "0.02", "--certify.denoisers", "none")) == 0
    result = read(tmp_path / KEY)
    assert result.facts["analyses"] == 4
    drawn = [sum(each.counted.values()) for each in result.rows[0].certificates]
    assert min(drawn) < N
    assert set(drawn) <= {1, 6, 18, N}
    for each, n in zip(result.rows[0].certificates, drawn, strict=True):
        count = each.counted.get(each.truth, 0)
        radius = STD * norm.ppf(beta.ppf(0.001 / 4, count, n - count + 1))
        right = certified([each], STD, 0.001, 4, 0.02).right
        assert right == "01"[int(radius >= 0.02)]


def test_the_curve_is_drawn_of_every_row_and_falls(found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("oag_transform.evaluation.render.figures.lines", lambda path, series, **_: drawn.extend(series))
    result = read(found)
    draw_figures(result, tmp_path)
    assert [series.name for series in drawn] == [row.name for row in result.rows]
    for series in drawn:
        accuracies = [cell.accuracy for _, cell in series.points]
        assert series.points[0][0] == 0
        assert series.points[-1][0] == pytest.approx(STD * norm.ppf(0.001 ** (1 / N)))
        assert accuracies == sorted(accuracies, reverse=True)
    assert max(cell.accuracy for series in drawn for _, cell in series.points) > 0


def test_wrong_and_abstained_images_count_as_not_certified() -> None:
    result = made((0, 100, 100), (0, 90, 100), (0, 50, 100), (1, 100, 100))
    assert result.columns[0] == "L2 above 0"
    assert dict(zip(result.columns, rights(result), strict=True))["L2 above 0"] == "1100"
    assert rights(result)[-1] == "1000"
    most, images = 0.25 * norm.ppf(0.001**0.01), result.rows[0].certificates
    assert certified(images, 0.25, 0.001, 1, most - 1e-9).right == "1000"
    assert certified(images, 0.25, 0.001, 1, most + 1e-9).right == "0000"


def test_a_radius_of_exactly_what_is_proven_is_certified() -> None:
    (image,) = made((0, 100, 100)).rows[0].certificates
    assert certified([image], 0.25, 0.001, 1, certified_radius(100, 100, 0.25, 0.001)).right == "1"


@pytest.mark.parametrize(("truth", "right"), [(0, "1"), (1, "0")])
def test_of_classes_drawn_as_often_the_first_is_chosen(truth: int, right: str) -> None:
    counts = DrawCounts("a/1.png", truth, {1: 2, 0: 2}, {0: 100}, 1.0)
    assert certified([counts], 0.25, 0.001, 1, 0.1).right == right


def test_a_single_draw_certifies_nothing() -> None:
    result = made((0, 1, 1))
    assert result.columns == ("L2 above 0",)
    assert rights(result) == ["0"]
    assert "prove nothing" in result.caption


def test_an_l2_radius_is_a_third_of_a_grey_level() -> None:
    assert 255 * linf_radius(0.5, (3, 224, 224)) == pytest.approx(255 * 0.5 / math.sqrt(3 * 224 * 224))
    assert "0.33/255 for 0.5" in made((0, 100, 100)).caption


def test_the_sign_test_counts_images_that_one_alone_proves() -> None:
    one = [(0, 100, 100), (0, 100, 100), (0, 50, 100), (0, 100, 100)]
    other = [(0, 50, 100), (1, 100, 100), (0, 100, 100), (0, 100, 100)]
    both = made(*one, *other, rows=2)
    rows = (replace(both.rows[0], name="OAG", defense=OAG_KEY), replace(both.rows[1], name="other"))
    text = to_markdown(replace(both, rows=rows))
    assert "| OAG, against |" in text
    assert "| other | 2, 1 (p = 1) |" in text  # two of three, either way, is all that three coins can do
    assert "against" not in to_markdown(both)  # there is no row of OAG


def test_a_denoiser_that_fails_is_told_and_the_others_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no such luck")

    failing = [type(each)(each.key, each.label, lambda *_: Failing()) if each.key == "tv" else each for each in DENOISERS]
    monkeypatch.setattr("oag_transform.baselines.smoothing.DENOISERS", tuple(failing))
    assert main(arguments(folder, tmp_path, "--certify.denoisers", "none", "tv")) == 1
    assert "failed: RuntimeError: no such luck" in capsys.readouterr().out
    rows = read(tmp_path / KEY).rows
    assert [bool(row.error) for row in rows] == [False, True]


def test_batch_normalization_is_adapted_to_each_denoiser(folder: Path, tmp_path: Path) -> None:
    apart = tiny.write_images(tmp_path / "apart")
    every = ("--model", "tests.tiny:normalized", "--certify.batch-norm", str(apart), "--certify.denoisers", "none", "tv")
    assert main(arguments(folder, tmp_path / "out", *every)) == 0
    rows = read(tmp_path / "out" / KEY).rows
    assert [row.defense for row in rows] == ["none", "tv", "none+bn", "tv+bn"]
    assert all(len(row.certificates) == 6 and not row.error for row in rows)
    plain, adapted = ([each.counted for each in row.certificates] for row in (rows[0], rows[2]))
    assert plain != adapted


def test_adapted_statistics_are_those_of_noisy_images(folder: Path) -> None:
    target = load_target("tests.tiny:normalized", classes=tiny.CLASSES, resize=40, crop=40)
    listing = image_folder(folder)
    images, _ = read_images(listing, list(range(6)), target.preprocessing)
    found = adapt_batch_norm(target, nn.Identity(), STD, images, batch_size=6, seed=0)
    (before,), (after,) = batch_norms(target), batch_norms(found)
    mean, variance = cast(Tensor, after.running_mean), cast(Tensor, after.running_var)
    pixels = images.double() / 255
    # at six standard deviations from black and white noise isn't cut off
    torch.testing.assert_close(mean.double(), pixels.mean((0, 2, 3)), rtol=0, atol=6 * STD / 9600**0.5)
    torch.testing.assert_close(variance.double(), pixels.var((0, 2, 3)) + STD**2, rtol=0.05, atol=0)
    assert cast(Tensor, before.running_mean).eq(0.5).all()
    assert not any(layer.training for layer in found.model.modules())
    assert after.momentum == before.momentum
    assert found.fingerprint != target.fingerprint


def test_images_for_batch_normalization_that_cannot_be_read_end_the_run(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in sorted(folder.iterdir()):
        (tmp_path / "apart" / path.name).mkdir(parents=True)
        (tmp_path / "apart" / path.name / "0.png").write_text("no image")
    every = ("--model", "tests.tiny:normalized", "--certify.batch-norm", str(tmp_path / "apart"))
    assert main(arguments(folder, tmp_path / "out", *every)) != 0
    assert "none of the images for batch normalization can be read" in caplog.text


def test_a_target_without_batch_normalization_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = tiny.write_images(tmp_path / "apart")
    assert main(arguments(folder, tmp_path / "out", "--certify.batch-norm", str(apart))) == 2
    assert "expected a target with batch normalization" in capsys.readouterr().err


def test_batch_normalization_is_not_adapted_on_the_certified_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "tests.tiny:normalized", "--certify.batch-norm", str(folder / "."))
    assert main(arguments(folder, tmp_path / "out", *options)) == 2
    assert "needs other images than those that are certified" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--certify.denoisers", "none", "blur"), "blur"),
        (("--certify.alpha", "1.5"), "--certify.alpha"),
        (("--certify.n", "0"), "--certify.n"),
        (("--certify.n0", "0"), "--certify.n0"),
        (("--count", "0"), "--count"),
        (("--certify.sigma", "0.1", "0"), "--certify.sigma"),
        (("--certify.radius", "-1"), "--certify.radius"),
        (("--device", "nowhere"), "--device"),
    ],
)
def test_a_bad_argument_is_named_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], named: str
) -> None:
    assert main(arguments(folder, tmp_path / "out", *more)) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bm3d_only_if_asked_for_and_in_words_where_it_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bm3d", None)
    assert "bm3d" not in [denoiser.key for denoiser in denoisers()]
    assert main(arguments(folder, tmp_path, "--certify.denoisers", "bm3d")) == 2
    assert "oag-transform[bm3d]" in capsys.readouterr().err
