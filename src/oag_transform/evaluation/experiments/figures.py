"""Accuracy along a number (Fig. 3, Fig. 4), trade-off and tuning of settings, and images that are attacked and purified."""

from collections.abc import Sequence

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from ...baselines.catalogue import OAG_KEY, Family
from ...images import to_uint8
from ...stopping import smallest_flat_step
from ...transform import DivergenceError
from ..attacks.gray_box import igsm
from ..columns import CLEAN, Images, along, attacked, gray_box_column, noise, probabilities, traced
from ..plan import Plan, goal, measure, with_mean
from ..result import Curve, ImageColumn, Iterations, Lines, Pair, Pixels, Residuals, Result, RowResult, Tradeoff
from ..store import Array
from ..subject import Row, Subject

EPSILONS = (0, 1, 2, 3, 4, 5, 6, 8, 10)  # Fig. 3
TRACE_STEPS = (2, 4, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 48, 72, 96)  # Fig. 4: dense where the default is
PAPER_TRACE_STEPS = tuple(range(20, 301, 20))  # up to the paper's T_N
FLAT = 0.01  # accuracy by which Fig. 4 may still rise after the chosen T_N
TUNE_TOLERANCE = 0.05  # accuracy that a stronger setting may cost
SHOWN = 4  # rows of Fig. 1; its pairs are more
PAIRS = 12
ROWS = 3  # of Fig. 5
MOMENTS = (0.03, 0.1, 0.25, 0.5, 1)  # shares of T_N


def fig3(plan: Plan) -> Result:
    """Fig. 3: accuracy against the attack's budget."""
    targeted = plan.attack("igsm").targeted
    attacks = [igsm(eps, targeted=targeted) for eps in EPSILONS if eps]
    columns = plan.columns(attacks)
    rows = plan.fast.measured(columns, published=False)
    lines = Lines(
        plan.file("fig3.svg"),
        "Top-1 accuracy under IGSM against its L-infinity bound.",
        EPSILONS,
        "eps (grey levels)",
        tuple(i for i, row in enumerate(rows) if not row.error),
    )
    return plan.result(
        "fig3",
        f"IGSM, {goal(attacks[0])}, with growing L-infinity bound; tuned settings, OAG at {plan.setting_name}.",
        "Defense",
        [f"eps {eps}" for eps in EPSILONS],
        rows,
        attacks=attacks,
        figures=[lines],
    )


def fig4(plan: Plan) -> Result:
    """Fig. 4: accuracy against network steps under Gaussian noise, FGSM and IGSM; the first of them chooses T_N."""
    attacks = [plan.attack("fgsm"), plan.attack("igsm")]
    columns = [noise(plan.noise_std), *map(gray_box_column, attacks)]
    steps = PAPER_TRACE_STEPS if plan.paper else TRACE_STEPS
    longest = plan.oag("", network_steps=max(steps))
    model = longest.model(plan.subject)
    rows = []
    for column in columns:
        cells = along(plan.subject, model, column.of(plan.subject), steps, column.label)
        rows.append(RowResult(column.label, tuple(cells), defense=OAG_KEY))
    curve = [(step, cell.accuracy) for step, cell in zip(steps, rows[0].cells, strict=True) if cell is not None]
    chosen = smallest_flat_step(curve, FLAT)
    lines = Lines(
        plan.file("fig4.svg"),
        "Top-1 accuracy of images purified with more and more network steps.",
        steps,
        "network steps",
        tuple(range(len(rows))),
        chosen,
        f"T_N = {chosen}",
    )
    return plan.result(
        "fig4",
        f"T_N = {chosen} is the first step after which accuracy under Gaussian noise rises by no more than one point: it is "
        f"chosen without any attack (III-D). Everything else is at {plan.setting_name}.",
        "Noise",
        [str(step) for step in steps],
        rows,
        attacks=attacks,
        facts={"chosen T_N": chosen},
        figures=[lines],
    )


def tradeoff(plan: Plan) -> Result:
    """Clean against attacked accuracy of every defense as its setting varies, which for OAG is T_N."""
    columns = plan.columns(plan.attacks)
    rows: list[RowResult] = []
    curves = []
    for family in plan.families:
        found = [with_mean(row) for row in _settings(plan, family, columns)]
        drawn = tuple(len(rows) + i for i, row in enumerate(found) if not row.error)
        rows += found
        if drawn:
            curves.append(Curve(family.label, drawn, family.key == OAG_KEY))
    caption = "Clean accuracy, and mean accuracy under the attacks, of each setting."
    return plan.result(
        "tradeoff",
        "A defense above and to the right of another is better. Slow defenses are measured on fewer images. "
        f"OAG is at {plan.setting_name}, except for T_N.",
        "Defense",
        [*(column.label for column in columns), "Mean attacked"],
        rows,
        attacks=plan.attacks,
        figures=[Tradeoff(plan.file("tradeoff.svg"), caption, tuple(curves), clean=0, attacked=len(columns))] if curves else [],
    )


def tune(plan: Plan) -> Result:
    """The strongest setting of each defense that costs little on clean and Gaussian-noised images: no attack is looked at."""
    columns = [CLEAN, noise(plan.noise_std)]
    rows, chosen = [], {}
    for family in plan.families:
        found = [with_mean(row, of=2) for row in _settings(plan, family, columns)]
        rows += found
        means = [(setting, row.cells[-1]) for setting, row in zip(family.settings, found, strict=True)]
        known = [(setting, cell.correct, len(cell.right)) for setting, cell in means if cell is not None]
        if known:
            least = max(correct for _, correct, _ in known) - TUNE_TOLERANCE * known[0][2]
            chosen[family.key] = [setting for setting, correct, _ in known if correct >= least][-1]
    return plan.result(
        "tune",
        f"Chosen is the strongest whose mean of both columns is within {100 * TUNE_TOLERANCE:g} points of the defense's best: "
        f"{', '.join(f'{key} {setting:g}' for key, setting in chosen.items())}. No attack was looked at.",
        "Defense",
        [*(column.label for column in columns), "Mean"],
        rows,
        facts={"chosen": chosen},
    )


def fig1(plan: Plan) -> Result:
    """Fig. 1: images, attacked and purified, their residuals, and what the target makes of them; and every row in numbers."""
    attack = plan.attack("igsm")
    measured = plan.columns([attack])
    every = attacked(plan.subject, attack)
    rows = [
        _with_distances(plan.subject, row, measure(plan.subject, row, measured), every)
        for row in plan.fast.rows(published=False)
        if not row.in_views  # they show the same image
    ]
    subject = plan.subject.first(PAIRS)
    model = plan.oag("OAG").model(subject)

    def purified(images: Tensor) -> Tensor:
        return model.purify(images.to(subject.device)).cpu()

    original, changed = subject.images.float() / 255, every[:PAIRS].float() / 255
    kinds = {
        "original": original,
        "attacked": changed,
        "original, purified": purified(original),
        "attacked, purified": purified(changed),
    }
    guesses = {kind: probabilities(subject, images) for kind, images in kinds.items()}
    truth = {kind: guess[torch.arange(len(subject.labels)), subject.labels] for kind, guess in guesses.items()}
    files = {
        kind: tuple(plan.file(f"photo{i + 1}-{kind.replace(', ', '-')}.png") for i in range(len(original))) for kind in kinds
    }
    columns = [
        ImageColumn(kind, files[kind][:SHOWN], tuple(f"right label: {value:.3f}" for value in truth[kind][:SHOWN].tolist()))
        for kind in kinds
    ]
    way, pairs = ("original", "attacked", "attacked, purified"), []
    for i, label in enumerate(subject.labels.tolist()):
        name, (one, two, three) = subject.classes[label], (files[kind][i] for kind in way)
        first, second, third = (subject.classes[int(guesses[kind][i].argmax())] for kind in way)
        before, under, after = (float(truth[kind][i]) for kind in way)
        pairs.append(Pair(name, one, two, three, (first, second, third), (before, under, after)))
    return plan.result(
        "fig1",
        f"{attack}, {goal(attack)}. Images that are shown are the first ones of the sample, not the best. Distances are root "
        "mean squares over all values of an image, in grey levels, averaged over images. What is left of the attack is the "
        "distance of the attacked image, purified, to the original image, purified with the same random numbers.",
        "Defense",
        [column.label for column in measured],
        rows,
        attacks=[attack],
        figures=[
            Residuals(
                plan.file("fig1.jpg"), "Images, and below each its difference to the original, magnified.", tuple(columns)
            )
        ],
        pairs=pairs,
        images={name: _pixels(image) for kind in kinds for name, image in zip(files[kind], kinds[kind], strict=True)},
    )


def _with_distances(subject: Subject, row: Row, found: RowResult, changed: Tensor) -> RowResult:
    """The row with the distances of Fig. 1; without them where it failed, or where its images have another size."""
    if found.error:
        return found
    model = row.model(subject)

    def compute(rows: range) -> Array:
        clean, other = subject.batch(subject.images, rows), subject.batch(changed, rows)
        with torch.no_grad():
            one, two = model.purify(clean, index=rows), model.purify(other, index=rows)
        if one.shape != clean.shape:
            return np.full((len(rows), 3), np.nan)
        differences = (other - clean, one - clean, two - one)
        return np.stack([255 * each.square().mean((1, 2, 3)).sqrt().cpu().numpy() for each in differences], 1)

    key = {"what": "distances"} | subject.key(model)
    means = subject.store.rows(key, (subject.images, changed), compute, f"{row.label}: distances").mean(0)
    if np.isnan(means).any():
        return found
    headings = ("attacked to original", "purified to original", "left of the attack")
    return replace(found, notes={name: f"{mean:.2f}" for name, mean in zip(headings, means, strict=True)})


def fig5(plan: Plan) -> Result:
    """Fig. 5: images along the iterations."""
    subject = plan.subject.first(ROWS)
    attack = plan.attack("igsm")
    images = attacked(subject, attack).to(subject.device).float() / 255
    last = plan.network_steps
    steps = {max(1, round(last * part)) for part in MOMENTS}
    moments = traced(plan.oag("OAG").model(subject)).trace(images)
    kinds = {"original": subject.images.float() / 255, "attacked": images.cpu()}
    kinds |= {f"step {moment.step}": moment.images.cpu() for moment in moments if moment.step in steps}
    files = {kind: tuple(plan.file(f"fig5-{i + 1}-{kind.replace(' ', '')}.png") for i in range(len(images))) for kind in kinds}
    return plan.result(
        "fig5",
        f"{attack}, {goal(attack)}, purified with T_N = {last}; (a) what the attack added, (b) how the last image differs "
        "from the original, both normalised.",
        attacks=[attack],
        count=len(images),
        figures=[
            Iterations(
                plan.file("fig5.jpg"),
                "The synthesised image from the first network steps to the last.",
                tuple(ImageColumn(kind, files[kind]) for kind in kinds),
            )
        ],
        images={name: _pixels(image) for kind in kinds for name, image in zip(files[kind], kinds[kind], strict=True)},
    )


def _settings(plan: Plan, family: Family, columns: Sequence[Images]) -> list[RowResult]:
    """A defense at each of its settings, in their order."""
    if family.key == OAG_KEY:
        return _oag_settings(plan, family, columns)
    return [measure(plan.subject, plan.row(family, setting), columns) for setting in family.settings]


def _oag_settings(plan: Plan, family: Family, columns: Sequence[Images]) -> list[RowResult]:
    # T_N steps are the first T_N of a longer run: one run gives all of them
    steps = sorted(int(setting) for setting in family.settings)
    longest = plan.oag(family.label, network_steps=steps[-1])
    rows = [RowResult(family.describe(n), (None,) * len(columns), defense=family.key, setting=n) for n in family.settings]
    try:
        model = longest.model(plan.subject)
        cells = [
            along(plan.subject, model, column.of(plan.subject), steps, f"{family.label}: {column.label}") for column in columns
        ]
    except DivergenceError as error:
        return [replace(row, error=str(error)) for row in rows]
    found = [dict(zip(steps, column, strict=True)) for column in cells]
    return [
        replace(row, cells=tuple(by_step[int(n)] for by_step in found)) for row, n in zip(rows, family.settings, strict=True)
    ]


def _pixels(image: Tensor) -> Pixels:
    return to_uint8(image).permute(1, 2, 0).numpy()
