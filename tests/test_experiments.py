"""Tables and curves against plain computations on two different classifiers, and the data of the figures."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oag_transform import OnlineAlternateGenerator
from oag_transform.baselines.catalogue import Family, Needs, chosen
from oag_transform.evaluation.attacks.gray_box import Attack, fgsm, igsm, mifgsm
from oag_transform.evaluation.data import image_folder
from oag_transform.evaluation.experiments import adaptive, certify, convergence, figures, tables, transfer
from oag_transform.evaluation.options import EXPERIMENTS, GRAY_BOX, AdaptiveOptions, ConvergenceOptions, experiment
from oag_transform.evaluation.plan import Plan, against_peers, as_published
from oag_transform.evaluation.result import Cell, Cost, Iterations, Lines, Residuals, RowResult, Tradeoff
from oag_transform.evaluation.subject import choose_subject
from oag_transform.evaluation.targets import load_target
from tests.tiny import CLASSES, brightness, left_half, make_subject, write_images

STEPS = 3
bright, left = brightness().eval(), left_half().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def make_plan(folder: Path, cache: Path, *, attacks: tuple[Attack, ...] = (fgsm(3),), families: Any = ()) -> Plan:
    subject, other = (make_subject(folder, cache, model=name) for name in ("brightness", "left_half"))
    by_key = {entry.key: attack for attack in attacks for entry in GRAY_BOX if entry.label == attack.name}
    facts = {"seed": 0, "data": "d"}
    return Plan(
        subject=subject,
        families=tuple(families),
        attacks=attacks,
        facts=facts,
        slow_count=2,
        noise_std=0.1,
        network_steps=STEPS,
        others=(other,),
        attacks_by_key=by_key,
    )


def bits(right: Tensor) -> str:
    return "".join("1" if value else "0" for value in right)


def right_of(row: RowResult) -> list[str]:
    assert row.error == ""
    return [cell.right for cell in row.cells if cell is not None]


def test_the_list_is_complete() -> None:
    homes = {
        "tables": tables,
        "figures": figures,
        "adaptive": adaptive,
        "convergence": convergence,
        "certify": certify,
        "transfer": transfer,
    }
    listed = {(entry.module, entry.key) for entry in EXPERIMENTS}
    public = {
        (name, function)
        for name, module in homes.items()
        for function in vars(module)
        if getattr(vars(module)[function], "__module__", "") == module.__name__
        and inspect.signature(vars(module)[function]).parameters.keys() == {"plan"}
        and not function.startswith("_")
        and function != "check"
    }
    assert listed == public
    with pytest.raises(ValueError, match="no experiment 'table12'; expected some of table1, table2"):
        experiment("table12")


def test_table2_is_transfer_between_two_targets(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, tmp_path, attacks=(mifgsm(4),))
    one, other = plan.subject, plan.others[0]
    images, labels = one.images.float() / 255, one.labels
    models: list[nn.Module] = [bright, left]
    both = torch.stack([model(images).argmax(1) == labels for model in models]).all(0)
    images, labels = images[both], labels[both]
    assert len(images) > 0
    expected = []
    for changed in (images, *(mifgsm(4)(attacker, images, labels, classes=2, seed=0) for attacker in models)):
        purified = OnlineAlternateGenerator(network_steps=STEPS, seed=0)(changed)
        expected.append([bits(victim(each).argmax(1) == labels) for victim in models for each in (changed, purified)])
    assert expected[1] != expected[2]  # or swapped rows would pass
    assert [row[0] for row in expected] != [row[2] for row in expected]  # or swapped columns
    result = tables.table2(plan)
    assert [right_of(row) for row in result.rows] == expected
    assert [row.name for row in result.rows] == ["no attack", one.target.name, other.target.name]
    assert result.columns == tuple(f"{name}{end}" for name in (one.target.name, other.target.name) for end in ("", " + OAG"))
    assert result.facts["n"] == len(images)
    own = f"{other.target.name}: {len(other.images)} right of {other.looked_at} looked at, 40 pixels"
    assert own in result.facts["targets' own accuracy"]


def test_table2_refuses_targets_that_want_other_images(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, tmp_path)
    other = plan.others[0].target
    small = other._replace(name="small", preprocessing=other.preprocessing._replace(resize=36, crop=32))
    with pytest.raises(ValueError, match=r"brightness crops 40 of 40 pixels; small crops 32 of 36 pixels. Give --resize"):
        tables.table2(dataclasses.replace(plan, others=(dataclasses.replace(plan.others[0], target=small),)))


def test_table3_takes_targets_of_other_sizes(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, tmp_path, attacks=(igsm(4, targeted=False),), families=chosen(["mean"]))
    target = load_target("tests.tiny:left_half", classes=CLASSES, resize=36, crop=32)
    store = plan.subject.store
    smaller = choose_subject(target, image_folder(folder), 6, store, 0, torch.device("cpu"))
    result = tables.table3(dataclasses.replace(plan, others=(smaller,)))
    changed = igsm(4, targeted=False)(left, smaller.images.float() / 255, smaller.labels, classes=2)
    assert changed.shape[-2:] == (32, 32)
    assert right_of(result.rows[0])[1] == bits(left(changed).argmax(1) == smaller.labels)
    assert "32 pixels" in result.facts["targets' own accuracy"]


def test_table3_has_a_column_for_each_target_on_images_of_its_own(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, tmp_path, attacks=(igsm(4, targeted=False),), families=chosen(["mean"]))
    mean = chosen(["mean"])[0]
    expected: dict[str, list[str]] = {"Undefended": [], mean.describe(mean.tuned): []}
    for subject, model in zip((plan.subject, *plan.others), (bright, left), strict=True):
        images = subject.images.float() / 255
        changed = igsm(4, targeted=False)(model, images, subject.labels, classes=2)
        filtered = mean.make(mean.tuned, 0, Needs())(changed)
        for name, each in zip(expected, (changed, filtered), strict=True):
            expected[name].append(bits(model(each).argmax(1) == subject.labels))
    assert expected["Undefended"][0] != expected["Undefended"][1]  # or swapped columns would pass
    result = tables.table3(plan)
    assert {row.name: right_of(row) for row in result.rows if row.name in expected} == expected
    names = [f"{subject.target.name} (n = {len(subject.images)})" for subject in (plan.subject, *plan.others)]
    assert list(result.columns) == names


def test_table1_pools_the_attacks_and_recommends(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, tmp_path, attacks=(fgsm(3), igsm(5)), families=chosen(["mean", "jpeg", "oag"]))
    result = tables.table1(plan)
    assert result.columns == ("Clean", "FGSM 3/255", "IGSM 5/255", "Mean attacked")
    for row in result.rows:
        _, first, second, mean = row.cells
        assert first is not None
        assert second is not None
        assert mean == Cell(first.right + second.right, 2)
    assert [row.defense for row in result.rows] == ["", "", "mean", "mean", "jpeg", "jpeg", "oag"]
    (cost,) = result.figures
    assert cost == Cost("cost.svg", cost.caption, (2, 3, 4, 5, 6), 3)
    assert "highest mean accuracy under attack" in result.facts["recommendation"]


def test_slow_defenses_meet_fewer_images_and_a_row_may_fail(folder: Path, tmp_path: Path) -> None:
    slow = dataclasses.replace(chosen(["mean"])[0], slow=True, settings=(3,))

    def refuse(*_: Any) -> nn.Module:
        raise ValueError("no luck")

    broken = dataclasses.replace(chosen(["jpeg"])[0], make=refuse)
    plan = make_plan(folder, tmp_path, families=(slow, broken))
    rows = {row.name: row for row in tables.table1(plan).rows}
    assert [cell.n for cell in rows[slow.describe(7)].cells if cell] == [2, 2, 2]
    assert rows["JPEG, quality 75"].error == "ValueError: no luck"
    assert rows["JPEG, quality 75"].cells == (None,) * 3
    result = figures.tradeoff(plan)
    (figure,) = result.figures
    assert isinstance(figure, Tradeoff)
    assert [(curve.name, curve.rows) for curve in figure.curves] == [("Mean filter", (0,))]


def test_tables_4_and_5_vary_one_setting(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Recording(OnlineAlternateGenerator):
        def __init__(self, **settings: Any) -> None:
            made.append(settings)
            super().__init__(**settings)

    monkeypatch.setattr("oag_transform.evaluation.plan.OnlineAlternateGenerator", Recording)
    plan = make_plan(folder, tmp_path)
    common = {"network_steps": STEPS, "compute_dtype": None, "seed": 0}
    own = OnlineAlternateGenerator().settings_for(
        *plan.subject.images.shape[-2:]
    )  # the default's own value is among the paper's
    counts, sides = sorted({10, 20, 30, 40, own.image_steps}), sorted({7, 11, 15, 21, own.kernel_size})
    assert [row.name for row in tables.table4(plan).rows] == [f"T_I = {count}" for count in counts]
    assert [settings for settings in made if len(settings) > 3] == [common | {"image_steps": count} for count in counts]
    made.clear()
    assert [row.name for row in tables.table5(plan).rows] == [f"{side} x {side}" for side in sides]
    assert [settings for settings in made if len(settings) > 3] == [common | {"kernel_size": side} for side in sides]


def test_the_papers_setting_is_oag_with_the_papers_values_and_separate_files(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(folder, tmp_path), paper=True)
    made = plan.oag("", kernel_size=7).model(plan.subject).defense
    own = {"langevin": "closed_form", "network_steps": STEPS, "compute_dtype": None}
    assert repr(made) == repr(OnlineAlternateGenerator.paper(**own, kernel_size=7, seed=0))
    result = tables.table5(plan)
    assert [row.name for row in result.rows] == ["7 x 7", "11 x 11", "15 x 15", "21 x 21"]
    assert not any(row.error for row in result.rows)
    assert (result.key, tables.table5(dataclasses.replace(plan, paper=False)).key) == ("table5-paper", "table5")
    assert "the paper's setting, with closed-form Langevin steps" in result.facts["setting of OAG"]
    assert "the paper's setting" in result.caption
    assert "paper" in result.title


def test_our_family_at_the_papers_setting_is_the_plans(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(folder, tmp_path), paper=True)
    oag, mean = map(as_published, chosen(["oag", "mean"]))
    assert mean == chosen(["mean"])[0]
    assert (oag.key, oag.tuned, oag.published, oag.slow, max(oag.settings)) == ("oag", 300, 300, False, 300)
    assert repr(oag.make(STEPS, 0, Needs())) == repr(plan.oag("").model(plan.subject).defense)
    assert "T_N 300" in oag.describe(oag.tuned)


def test_fig3_has_a_line_for_each_row_that_was_measured(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, tmp_path, families=chosen(["mean"]))
    result = figures.fig3(plan)
    (lines,) = result.figures
    assert isinstance(lines, Lines)
    assert lines.x == figures.EPSILONS
    assert lines.rows == (0, 1, 2)
    none = right_of(result.rows[0])
    for eps, right in zip(figures.EPSILONS, none, strict=True):
        images = plan.subject.images.float() / 255
        changed = images if eps == 0 else igsm(eps)(bright, images, plan.subject.labels, classes=2)
        assert right == bits(bright(changed).argmax(1) == plan.subject.labels)
    assert none[0] != none[-1]


def test_fig4_chooses_the_first_step_that_is_flat_under_noise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "TRACE_STEPS", tuple(range(6, 121, 6)))
    right = {step: min(step, 42) // 6 - (step == 54) for step in figures.TRACE_STEPS}  # of 7; one less at 54

    def measured(*_: Any) -> list[Cell]:
        return [Cell("1" * right[step] + "0" * (7 - right[step])) for step in figures.TRACE_STEPS]

    monkeypatch.setattr(figures, "along", measured)
    result = figures.fig4(make_plan(folder, tmp_path))
    assert result.facts["chosen T_N"] == 42
    (lines,) = result.figures
    assert isinstance(lines, Lines)
    assert (lines.x, lines.rows, lines.mark, lines.mark_label) == (figures.TRACE_STEPS, (0, 1, 2), 42, "T_N = 42")
    assert [row.name for row in result.rows] == ["Gaussian noise, std 0.1", "FGSM 3/255", "IGSM 6/255"]


def test_fig4_at_the_papers_setting_goes_further(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "PAPER_TRACE_STEPS", (2, 4))
    plan = dataclasses.replace(make_plan(folder, tmp_path), paper=True)
    result = figures.fig4(plan)
    changed = fgsm(3)(bright, plan.subject.images.float() / 255, plan.subject.labels, classes=2)
    for position, steps in enumerate((2, 4)):
        own = {"langevin": "closed_form", "network_steps": steps, "compute_dtype": None}
        purified = OnlineAlternateGenerator.paper(**own, seed=0)(changed)
        assert right_of(result.rows[1])[position] == bits(bright(purified).argmax(1) == plan.subject.labels)
    (lines,) = result.figures
    assert isinstance(lines, Lines)
    assert (result.key, lines.file, lines.x) == ("fig4-paper", "fig4-paper.svg", (2, 4))


def test_one_run_gives_every_setting_of_oag(folder: Path, tmp_path: Path) -> None:
    oag = dataclasses.replace(chosen(["oag"])[0], settings=(4, 2, 1))
    plan = make_plan(folder, tmp_path, families=(oag,))
    rows = figures.tradeoff(plan).rows
    changed = fgsm(3)(bright, plan.subject.images.float() / 255, plan.subject.labels, classes=2)
    for row, steps in zip(rows, (4, 2, 1), strict=True):
        assert (row.name, row.setting) == (oag.describe(steps), steps)
        purified = OnlineAlternateGenerator(network_steps=steps, seed=0)(changed)
        assert right_of(row)[1] == bits(bright(purified).argmax(1) == plan.subject.labels)


def test_tuning_takes_the_strongest_within_five_points(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {90: 20, 75: 20, 60: 19, 50: 18, 35: 19, 25: 19, 15: 17, 10: 5}  # of 20, clean and noisy together

    def measured(_: Any, candidate: Any, __: Any) -> RowResult:
        count = right[candidate.setting]
        noisy = Cell("1" * (count - 10) + "0" * (20 - count)) if count > 10 else Cell("0" * 10)
        return RowResult(candidate.label, (Cell("1" * 10), noisy))

    monkeypatch.setattr(figures, "measure", measured)
    assert figures.tune(make_plan(folder, tmp_path, families=chosen(["jpeg"]))).facts["chosen"] == {"jpeg": 25}


def test_a_model_with_oag_and_others_is_no_peer_of_oag() -> None:
    def row(name: str, defense: str, attacked: str) -> RowResult:
        return RowResult(name, (Cell("1111"), Cell(attacked), Cell(attacked)), defense=defense)

    rows = [row("A", "oag-4-views", "1100"), row("B", "jpeg:25+oag", "1111"), row("C", "jpeg:25+noise:12", "1000")]
    assert [sentence.partition(":")[0] for sentence in against_peers(rows)] == ["A, against C", "B, against C"]


def test_fig1_hands_over_its_images(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, tmp_path, attacks=(igsm(5),))
    result = figures.fig1(plan)
    (figure,) = result.figures
    assert isinstance(figure, Residuals)
    images = plan.subject.images.float() / 255
    changed = igsm(5)(bright, images, plan.subject.labels, classes=2)
    purify = OnlineAlternateGenerator(network_steps=STEPS, seed=0)
    kinds = [images, changed, purify(images), purify(changed)]
    truth = torch.arange(6), plan.subject.labels
    for column, kind in zip(figure.columns, kinds, strict=True):
        for file, image in zip(column.files, kind, strict=False):
            assert torch.equal(torch.from_numpy(result.images[file]).permute(2, 0, 1), (255 * image).round().to(torch.uint8))
        assert list(column.notes) == [f"right label: {p:.3f}" for p in bright(kind).softmax(1)[truth][:4].tolist()]
    assert len(result.pairs) == 6
    for i, pair in enumerate(result.pairs):
        for file, kind in ((pair.original, kinds[0]), (pair.attacked, kinds[1]), (pair.purified, kinds[3])):
            assert torch.equal(torch.from_numpy(result.images[file]).permute(2, 0, 1), (255 * kind[i]).round().byte())
        assert pair.name == plan.subject.classes[int(plan.subject.labels[i])] == pair.classes[0]


def test_fig1_measures_what_every_defense_leaves_of_the_attack(folder: Path, tmp_path: Path) -> None:
    families = chosen(["oag", "mean:3", "jpeg-4-views", "bm3d"])
    result = figures.fig1(make_plan(folder, tmp_path, attacks=(igsm(5),), families=families))
    assert [row.defense for row in result.rows] == ["", "oag", "mean:3"]
    assert [len(right) for right in right_of(result.rows[0])] == [6, 6]
    assert result.facts["n"] == 6
    subject = make_subject(folder, tmp_path)
    clean = subject.images.double() / 255
    changed = (255 * igsm(5)(bright, clean.float(), subject.labels, classes=2)).round().double() / 255

    def distance(a: Tensor, b: Tensor) -> str:
        return f"{255 * (a - b).flatten(1).norm(dim=1).mean().item() / clean[0].numel() ** 0.5:.2f}"

    def blurred(images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)

    none, oag, mean = (list(row.notes.values()) for row in result.rows)
    assert none == [distance(changed, clean), "0.00", distance(changed, clean)]
    assert mean == [distance(changed, clean), distance(blurred(clean), clean), distance(blurred(changed), blurred(clean))]
    defense = OnlineAlternateGenerator(seed=0)
    one, two = (defense(each.float(), index=range(6)) for each in (clean, changed))
    assert oag == [distance(changed, clean), distance(one, clean), distance(two, one)]


def test_fig5_shows_moments_of_one_run(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(folder, tmp_path, attacks=(igsm(5),)), network_steps=8)
    result = figures.fig5(plan)
    (figure,) = result.figures
    assert isinstance(figure, Iterations)
    assert [column.heading for column in figure.columns] == ["original", "attacked", "step 1", "step 2", "step 4", "step 8"]
    subject = plan.subject.first(3)
    changed = igsm(5)(bright, subject.images.float() / 255, subject.labels, classes=2)
    for column, steps in zip(figure.columns[2:], (1, 2, 4, 8), strict=True):
        purified = OnlineAlternateGenerator(network_steps=steps, seed=0)(changed)
        for file, image in zip(column.files, purified, strict=True):
            assert torch.equal(torch.from_numpy(result.images[file]).permute(2, 0, 1), (255 * image).round().byte())


def test_a_second_target_is_asked_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table2 needs a second target"):
        tables.table2(dataclasses.replace(make_plan(folder, tmp_path), others=()))


def test_the_auto_encoder_and_ours_meet_the_same_images(folder: Path, tmp_path: Path) -> None:
    families: tuple[Family, ...] = chosen(["jpeg", "oag"])
    result = tables.autoencoder(make_plan(folder, tmp_path, families=families))
    assert [row.defense for row in result.rows] == ["", "", "oag"]
    assert {cell.n for row in result.rows for cell in row.cells if cell} == {2}


def test_adaptive_attacks_go_through_each_rows_own_defense(folder: Path, tmp_path: Path) -> None:
    """A defense that raises contrast without a gradient resists a transferred attack better than BPDA."""

    class Contrast(nn.Module):
        def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
            return (images - images.mean((1, 2, 3), keepdim=True)).sign().mul(0.1).add(images)

    family = Family("contrast", "Contrast", "by", lambda *_: Contrast(), 1, (1,))
    options = AdaptiveOptions(attacks=("bpda",), linf=(6, 1), l2=(0.1,), steps=8, judge=3)
    plan = dataclasses.replace(make_plan(folder, tmp_path, families=(family,)), adaptive=options)
    linf, l2 = adaptive.adaptive(plan)
    assert (linf.key, l2.key, l2.columns) == ("adaptive-linf", "adaptive-l2", ("Clean", "L2 0.1"))
    assert linf.columns == ("Clean", "L∞ 1/255", "L∞ 6/255")  # margins are of 4 grey levels
    none, _, contrast = linf.rows
    assert right_of(none) == ["111111", "111111", "000000"]
    assert right_of(contrast)[2] == "000000"
    assert contrast.cells[2] is not None
    assert contrast.cells[2].draws == 3
    assert contrast.cells[2].attacks[0].images == (0, 1, 2, 3, 4, 5)
    assert contrast.notes["attacks (gradients an image)"] == "bpda 8"
    (lines,) = linf.figures
    assert isinstance(lines, Lines)
    assert lines.x == (0.0, 1, 6)


def test_each_attack_alone_has_a_row_and_the_worst_of_them_too(folder: Path, tmp_path: Path) -> None:
    options = AdaptiveOptions(attacks=("transfer", "margin"), each_alone=True, linf=(6,), steps=8)
    plan = dataclasses.replace(make_plan(folder, tmp_path), adaptive=options)
    (result,) = adaptive.adaptive(plan)
    assert [row.name for row in result.rows[:3]] == [
        *(f"Undefended: {each}" for each in ("transfer", "margin", "worst for each image"))
    ]
    transfer, by_margin, worst = map(right_of, result.rows[:3])
    assert worst == [transfer[0], "".join(map(min, zip(transfer[1], by_margin[1], strict=True)))]


def test_a_known_seed_is_attacked_in_the_draw_that_judges(folder: Path, tmp_path: Path) -> None:
    options = AdaptiveOptions(attacks=("bpda",), linf=(4,), steps=6, seed_known=True)
    plan = dataclasses.replace(make_plan(folder, tmp_path, families=chosen(["noise"])), adaptive=options)
    (result,) = adaptive.adaptive(plan)
    cell = result.rows[2].cells[1]
    assert cell is not None
    assert (result.key, cell.draws, cell.counts) == ("adaptive-seed-known-linf", 1, ())


def test_convergence_measures_accuracy_on_fresh_draws(folder: Path, tmp_path: Path) -> None:
    options = ConvergenceOptions(linf=3, steps=(1, 10), draws=(1,), eot_steps=10)
    identity = Family("identity", "Identity", "by", lambda *_: nn.Identity(), 1, (1,))
    plan = dataclasses.replace(make_plan(folder, tmp_path, families=(identity,)), convergence=options)
    steps, draws = convergence.convergence(plan)
    images, labels = plan.subject.images.float() / 255, plan.subject.labels
    logits = bright(images).log_softmax(1)
    mean = (logits[torch.arange(6), 1 - labels] - logits[torch.arange(6), labels]).mean()
    best = float(mean) + 60 * 3 / 255  # logits are 30 times the brightness, and its negative
    assert steps.rows[1].notes["mean margin"] == f"{best:.2f}"
    assert steps.rows[1].notes["agreement"] == "1.00"
    assert [row.name for row in steps.rows] == ["1, 1", "10, 1"]
    assert draws.rows[0].cells == steps.rows[1].cells
    (lines,) = steps.figures
    assert isinstance(lines, Lines)
    assert (lines.x, lines.rows, lines.column) == ((1, 10), (0, 1), 0)
