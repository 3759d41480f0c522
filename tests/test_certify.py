"""``oag-transform certify``, end to end on tiny photographs and a classifier whose true radius is known."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from oag_transform import ABSTAIN
from oag_transform.apps.cli import main
from oag_transform.baselines.catalogue import OAG_KEY
from oag_transform.baselines.smoothing import DENOISERS, denoisers
from oag_transform.evaluation import batch_norm, certification
from oag_transform.evaluation.certification import Certification, CertifiedRow, Counted, grey_levels, read
from oag_transform.evaluation.data import Preprocessing, image_folder, read_images
from oag_transform.evaluation.render import certified
from oag_transform.evaluation.results import Cell
from oag_transform.evaluation.targets import load_target
from oag_transform.smoothed import Tally
from tests import tiny

SIDE, STD, N = 12, 0.1, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certificates")
    assert main(arguments(folder, out)) == 0
    return out / "certificates.json"


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    here = ["--model", "tests.tiny:brightness", "--data", str(folder), "--resize", "14", "--crop", str(SIDE)]
    size = ["--noise-std", str(STD), "--count", "6", "--n0", "5", "--n", str(N), "--batch-size", "4"]
    return ["certify", *here, *size, "--out", str(out), "--defenses", "none", "tv", "wavelets", *more]


def without_time(path: Path) -> Any:
    """What doesn't depend on when and where it was run."""
    plain = json.loads(path.read_text())
    del plain["facts"]["command"]
    for row in plain["rows"]:
        for photograph in row["photographs"]:
            assert photograph.pop("seconds") > 0
    return plain


def made(*counts: tuple[int, int, int], alpha: float = 0.001) -> Certification:
    """Photographs of class 0 of two, as (class that is chosen, draws of it, draws)."""
    photographs = []
    for chosen, count, n in counts:
        selection, counted = torch.zeros(2, dtype=torch.int64), torch.full((2,), n - count)
        selection[chosen], counted[chosen] = 1, count
        photographs.append(Counted("a/1.png", 0, Tally(selection, counted), 1.0))
    rows = (CertifiedRow("none", "None", 0.25, "", tuple(photographs)),)
    return Certification(rows, alpha, 1, counts[0][2], 1, Cell("1"), (3, 224, 224), {})


def test_the_command_writes_data_a_table_and_a_curve(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = [denoiser.key for denoiser in denoisers()]
    assert every == [OAG_KEY, "none", "tv", "nlm", "wavelets"]
    few = ("--n0", "2", "--n", "6", "--alpha", "0.1", "--defenses", *every)
    assert main(arguments(folder, tmp_path, "--noise-std", "0.05", "0.1", *few)) == 0
    printed = capsys.readouterr().out
    assert "L-infinity" in printed.splitlines()[0]
    result = read(tmp_path / "certificates.json")
    assert result.noises == [0.05, 0.1]
    for std in result.noises:
        rows = result.at_noise(std)
        assert [row.denoiser for row in rows] == every
        assert all(len(row.photographs) == 6 and not row.error for row in rows)
        # the same photographs for all, as the tests between rows are paired
        assert len({tuple((each.name, each.truth) for each in row.photographs) for row in rows}) == 1
        assert (tmp_path / f"certified-{std:g}.svg").stat().st_size > 1000
        assert f"certified-{std:g}.svg" in printed
    for label in [denoiser.label for denoiser in DENOISERS if denoiser.by_default]:
        assert printed.count(f"| {label} |") >= 2
    assert (tmp_path / "certificates.md").read_text() in printed


def test_no_radius_exceeds_the_true_one(folder: Path, found: Path) -> None:
    """Brightness is linear, so without a denoiser an image's true radius is its distance to the plane of mean 1/2."""
    result = read(found)
    (row,) = [row for row in result.rows if row.denoiser == "none"]
    listing = image_folder(folder)
    order = [next(i for i, path in enumerate(listing.paths) if str(path).endswith(each.name)) for each in row.photographs]
    images = read_images(listing, order, Preprocessing(14, SIDE))[0].double() / 255
    true = (images.mean((1, 2, 3)) - 0.5).abs() * math.sqrt(3 * SIDE**2)
    radii = torch.tensor([each.radius for each in result.certificates(row)])
    assert (radii <= true).all()
    assert (radii > 0.3 * true.clamp(max=result.attainable(STD))).sum() >= 3  # nor is it trivially small


def test_json_holds_what_a_reader_needs_to_find_the_radii_himself(found: Path) -> None:
    plain = json.loads(found.read_text())
    assert plain["l2_over_linf"] == pytest.approx(math.sqrt(3 * SIDE**2))
    for row in plain["rows"]:
        for each in row["photographs"]:
            assert each["n"] == sum(each["counted"].values()) == N
            assert sum(each["selection"].values()) == 5
            assert each["classes"] == 2
            chosen = max(each["selection"], key=each["selection"].get)
            assert each["count"] == each["counted"].get(chosen, 0)
            bound = beta.ppf(plain["alpha"], each["count"], N - each["count"] + 1) if each["count"] else 0.0
            expected = max(0.0, STD * norm.ppf(bound)) if bound > 0.5 else 0.0
            assert each["radius"] == pytest.approx(expected, abs=1e-9)
            assert each["label"] == (int(chosen) if expected > 0 else ABSTAIN)


def test_another_alpha_needs_no_draws(folder: Path, found: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "--alpha", "0.1")) == 0
    fresh, again = read(tmp_path / "certificates.json"), read(found).at(0.1)
    certificates = [fresh.certificates(row) for row in fresh.rows]
    assert certificates == [again.certificates(row) for row in again.rows]
    assert certificates != [read(found).certificates(row) for row in again.rows]


@pytest.mark.parametrize("more", [(), ("--radius", "0.05")])
def test_an_interrupted_run_goes_on_to_the_same_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    more = ("--defenses", "none", "wavelets", *more)
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
    stop = whole // 2 + 10  # amid a photograph, of which a part is kept
    assert main(arguments(folder, tmp_path / "parts", *more)) == 130
    assert not (tmp_path / "parts" / "certificates.json").exists()
    calls.clear()
    stop = -1
    assert main(arguments(folder, tmp_path / "parts", *more)) == 0
    assert len(calls) < 0.65 * whole
    assert without_time(tmp_path / "parts" / "certificates.json") == without_time(tmp_path / "whole" / "certificates.json")
    calls.clear()
    assert main(arguments(folder, tmp_path / "parts", *more)) == 0
    assert len(calls) <= 3  # the target is looked at, and nothing is counted


def test_more_images_are_added_to_what_is_there(folder: Path, found: Path, tmp_path: Path) -> None:
    for count in ("3", "6"):
        assert main(arguments(folder, tmp_path, "--count", count)) == 0
    assert without_time(tmp_path / "certificates.json") == without_time(found)


def test_each_photograph_has_noise_of_its_own(folder: Path, tmp_path: Path) -> None:
    (photograph, *_) = (folder / "a_dark").iterdir()
    for name in "abcdef":
        copy = tmp_path / "same" / f"{'a_dark' if name < 'd' else 'b_bright'}" / f"{name}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(photograph.read_bytes())
    assert main(arguments(tmp_path / "same", tmp_path, "--defenses", "none", "--noise-std", "0.4")) == 0
    row = read(tmp_path / "certificates.json").rows[0]
    assert len({str(each.tally.counted) for each in row.photographs}) > 1


def test_a_damaged_tally_is_counted_again(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, found: Path) -> None:
    one = ("--defenses", "none")
    assert main(arguments(folder, tmp_path, *one)) == 0
    before = without_time(tmp_path / "certificates.json")
    damaged = sorted((tmp_path / "cache").rglob("*.json"))[2]
    damaged.write_text('{"selection": ')
    assert main(arguments(folder, tmp_path, *one)) == 0
    assert "counted again" in caplog.text
    assert without_time(tmp_path / "certificates.json") == before


def test_with_a_radius_counting_stops_early_and_alpha_pays_for_it(folder: Path, found: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "--radius", "0.02", "--defenses", "none")) == 0
    result = read(tmp_path / "certificates.json")
    assert result.looks == 4
    early = [each for each in result.certificates(result.rows[0]) if each.n < N]
    assert early
    assert {each.n for each in early} <= {1, 6, 18}
    for each in early:
        if each.radius >= 0.02:
            bound = beta.ppf(0.001 / 4, each.count, each.n - each.count + 1)
            assert each.radius == pytest.approx(STD * norm.ppf(bound))


def test_the_curve_is_drawn_of_every_row_and_falls(found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("oag_transform.evaluation.render.figures.lines", lambda path, series, **_: drawn.extend(series))
    result = read(found)
    certified.render(result, tmp_path)
    assert [series.name for series in drawn] == [row.name for row in result.rows]
    for series in drawn:
        accuracies = [cell.accuracy for cell in series.cells]
        assert series.x[0] == 0
        assert series.x[-1] == pytest.approx(STD * norm.ppf(0.001 ** (1 / N)))
        assert accuracies == sorted(accuracies, reverse=True)
    assert max(cell.accuracy for series in drawn for cell in series.cells) > 0


def test_wrong_images_and_those_of_which_nothing_is_proven_count_as_none() -> None:
    result = made((0, 100, 100), (0, 90, 100), (0, 50, 100), (1, 100, 100))
    row = result.rows[0]
    assert result.certified(row, 0.0).right == "1100"
    assert result.certified(row, 0.25).right == "1000"
    assert result.certified(row, result.attainable(0.25)).right == "1000"
    assert result.certified(row, 0.25 * norm.ppf(0.001**0.01) - 1e-9).right == "1000"
    assert result.certified(row, 0.25 * norm.ppf(0.001**0.01) + 1e-9).right == "0000"
    assert row.one_draw == pytest.approx((1 + 0.9 + 0.5 + 0) / 4)
    assert row.seconds == pytest.approx(1 / 101)


def test_a_second_draw_would_be_needed() -> None:
    """A single draw proves nothing, and says so instead of failing."""
    result = made((0, 1, 1))
    assert result.radii(0.25) == [0.0]
    assert result.certified(result.rows[0], 0.0).accuracy == 0
    assert "prove nothing" in certified.to_markdown(result)


def test_an_l2_radius_is_a_third_of_a_grey_level() -> None:
    result = made((0, 100, 100))
    assert grey_levels(0.5, result.smaller) == pytest.approx(255 * 0.5 / math.sqrt(3 * 224 * 224))
    assert "0.33/255 for 0.5" in certified.in_words(result)


def test_the_sign_test_counts_photographs_that_one_alone_proves() -> None:
    a, b = (
        made((0, 100, 100), (0, 100, 100), (0, 50, 100), (0, 100, 100)),
        made((0, 50, 100), (1, 100, 100), (0, 100, 100), (0, 100, 100)),
    )
    ours = CertifiedRow(OAG_KEY, "ours", 0.25, "", a.rows[0].photographs)
    both = Certification((ours, b.rows[0]), 0.001, 1, 100, 1, Cell("1"), (3, 224, 224), {})
    more, fewer, p = both.against(both.rows[1], 0.0)
    assert (more, fewer) == (2, 1)
    assert p == pytest.approx(1.0)  # two of three, either way, is all that three coins can do
    with pytest.raises(ValueError, match="a row of ours"):
        b.against(b.rows[0], 0.0)


def test_a_denoiser_that_fails_is_told_and_the_others_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no such luck")

    failing = [type(each)(each.key, each.label, lambda *_: Failing()) if each.key == "tv" else each for each in DENOISERS]
    monkeypatch.setattr("oag_transform.baselines.smoothing.DENOISERS", tuple(failing))
    assert main(arguments(folder, tmp_path, "--defenses", "none", "tv")) == 1
    assert "failed: RuntimeError: no such luck" in capsys.readouterr().out
    rows = read(tmp_path / "certificates.json").rows
    assert [bool(row.error) for row in rows] == [False, True]


def test_batch_normalization_is_adapted_to_each_denoiser(folder: Path, tmp_path: Path) -> None:
    every = ("--model", "tests.tiny:normalized", "--batch-norm", str(folder), "--defenses", "none", "tv")
    assert main(arguments(folder, tmp_path, *every)) == 0
    rows = read(tmp_path / "certificates.json").rows
    assert [row.denoiser for row in rows] == ["none", "tv", "none+bn", "tv+bn"]
    assert all(len(row.photographs) == 6 and not row.error for row in rows)
    plain, adapted = ([each.share for each in row.photographs] for row in (rows[0], rows[2]))
    assert plain != adapted


def test_adapted_statistics_are_those_of_noisy_images(folder: Path) -> None:
    target = load_target("tests.tiny:normalized", classes=tiny.CLASSES, resize=40, crop=40)
    listing = image_folder(folder)
    images, _ = read_images(listing, list(range(6)), target.preprocessing)
    found = batch_norm.adapted(target, nn.Identity(), STD, images, batch_size=6, seed=0)
    (before,), (after,) = batch_norm.batch_norms(target), batch_norm.batch_norms(found)
    mean, variance = cast(Tensor, after.running_mean), cast(Tensor, after.running_var)
    pixels = images.double() / 255
    # at six standard deviations from black and white noise isn't cut off
    torch.testing.assert_close(mean.double(), pixels.mean((0, 2, 3)), rtol=0, atol=6 * STD / 9600**0.5)
    torch.testing.assert_close(variance.double(), pixels.var((0, 2, 3)) + STD**2, rtol=0.05, atol=0)
    assert cast(Tensor, before.running_mean).eq(0.5).all()
    assert not any(layer.training for layer in found.model.modules())
    assert after.momentum == before.momentum
    assert found.fingerprint != target.fingerprint


def test_a_target_without_batch_normalization_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "out", "--batch-norm", str(folder))) == 2
    assert "batch normalization" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--defenses", "none", "blur"), "blur"),
        (("--alpha", "1.5"), "--alpha"),
        (("--n", "0"), "--n"),
        (("--n0", "0"), "--n0"),
        (("--count", "0"), "--count"),
        (("--noise-std", "0.1", "0"), "--noise-std"),
        (("--radius", "-1"), "--radius"),
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
    assert main(arguments(folder, tmp_path, "--defenses", "bm3d")) == 2
    assert "oag-transform[bm3d]" in capsys.readouterr().err


def test_another_file_is_no_certification(tmp_path: Path) -> None:
    for content in ("[]", "{}", "no JSON"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match="is not a result of oag-transform certify"):
            certification.read(tmp_path / "other.json")
