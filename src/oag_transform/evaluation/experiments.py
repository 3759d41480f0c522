"""The tables and figures of the paper's section IV, and two that it lacks, each as a function of what is to be measured."""

import dataclasses
import itertools
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from ..defended import SHIFT
from ..stopping import smallest_flat_step
from ..transform import DivergenceError, OnlineAlternateGenerator
from . import figures
from .attacks import Attack, cw, fgsm, igsm, mifgsm
from .defenses import OURS, VIEWS, Defense
from .measure import Subject, along, attacked, classify, hardware, noised, pooled, probabilities, row
from .results import Figure, Pair, Result, Row, paired

EPSILONS = (0, 1, 2, 3, 4, 5, 6, 8, 10)  # Fig. 3
TRACE_STEPS = tuple(range(6, 121, 6))  # Fig. 4
TUNE_TOLERANCE = 0.05  # accuracy that a stronger setting may cost
NONE = "None"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and on what.

    Attributes:
        subject: the target and its photographs.
        others: further targets and theirs, for Tables II and III.
        families: the defenses.
        attacks: those of Table I.
        slow_count: images for slow defenses.
        noise_std: standard deviation of the Gaussian noise of ``tune`` and Fig. 4, on the [0, 1] scale.
        network_steps: T_N of our transform, tuned.
        compute_dtype: of our transform.
        folder: where figures go.
        facts: that go with every result.
    """

    subject: Subject
    others: tuple[Subject, ...]
    families: tuple[Defense, ...]
    attacks: tuple[Attack, ...]
    slow_count: int
    noise_std: float
    network_steps: int
    compute_dtype: torch.dtype | None
    folder: Path
    facts: dict[str, Any]

    def ours(self, **settings: Any) -> OnlineAlternateGenerator:
        """Our transform, tuned, with some settings of its own."""
        tuned = {"network_steps": self.network_steps, "seed": self.subject.seed, "compute_dtype": self.compute_dtype}
        return OnlineAlternateGenerator(**tuned | settings)

    def attack(self, name: str, otherwise: Attack) -> Attack:
        """The attack of this name in Table I, or another where Table I has none."""
        return next((attack for attack in self.attacks if attack.name == name), otherwise)

    def rows(
        self, columns: Sequence[tuple[str, Tensor]], *, subject: Subject | None = None, published: bool = True
    ) -> list[Row]:
        """No defense, and each family at its published and at its tuned strength."""
        subject = self.subject if subject is None else subject
        rows = [row(subject, NONE, None, columns), row(subject, f"{NONE}, {VIEWS}", None, columns, shift=SHIFT)]
        for family in self.families:
            count = self.slow_count if family.slow else None
            for strength in dict.fromkeys([*([family.published] if published else []), family.tuned]):
                rows.append(_row(subject, family, strength, columns, count))
        return rows

    def columns(self, attacks: Sequence[Attack]) -> list[tuple[str, Tensor]]:
        """Clean images, and those of each attack."""
        return [("Clean", self.subject.images), *((str(attack), attacked(self.subject, attack)) for attack in attacks)]

    def result(
        self,
        key: str,
        title: str,
        caption: str,
        first: str,
        columns: Sequence[str],
        rows: Sequence[Row],
        *,
        attacks: Sequence[Attack] = (),
        count: int | None = None,
        facts: Mapping[str, Any] | None = None,
        figures: Sequence[Figure] = (),
        pairs: Sequence[Pair] = (),
    ) -> Result:
        """A result with this plan's facts, the attacks that it made, and the number of images: the subject's, or ``count``."""
        own = {
            "n": len(self.subject.images) if count is None else count,
            "attacks": ", ".join(f"{attack} ({_kind(attack)})" for attack in attacks) or "none",
        }
        every = own | self.facts | dict(facts or {})
        return Result(key, title, caption, first, tuple(columns), tuple(rows), every, tuple(figures), tuple(pairs))


def table1(plan: Plan) -> Result:
    """Table I, with clean images (Table VI) and the cost beside it."""
    columns = plan.columns(plan.attacks)
    rows = [_with_mean(line) for line in plan.rows(columns)]
    points = [
        (line.name, line.seconds, line.cells[-1].accuracy)
        for line in rows
        if line.seconds is not None and line.cells[-1] is not None
    ]
    if points:
        figures.cost(plan.folder / "cost.svg", points)
    return plan.result(
        "table1",
        "Table I: top-1 accuracy of defenses under gray-box attacks",
        "Images that the target classifies correctly, clean and attacked by someone who knows the target but not the defense. "
        f"{_kinds(plan.attacks)} Attacked images are rounded to 8 bits. Each defense stands at its published strength and, "
        "where that is another, at one tuned on clean and Gaussian-noised images. The mean is over the attacks; its interval "
        "is that of n images. " + " ".join(_against_peers(rows)),
        "Defense",
        [*(name for name, _ in columns), "Mean attacked"],
        rows,
        attacks=plan.attacks,
        figures=(Figure("cost.svg", "Mean accuracy under attack, and what a defense costs."),) if points else (),
    )


def table2(plan: Plan) -> Result:
    """Table II: black-box and gray-box transfer between two targets, each with and without our defense."""
    other = _one_other(plan, "table2")
    one = plan.subject
    same = dataclasses.replace(one, target=other.target)
    right = probabilities(same, one.images).argmax(1) == one.labels
    if not right.any():
        raise ValueError(f"{one.target.name} and {other.target.name} have no image that both classify correctly")
    subjects = [dataclasses.replace(model, images=one.images[right], labels=one.labels[right]) for model in (one, same)]
    attack = plan.attack("MI-FGSM", mifgsm())
    rows = []
    for attacker in subjects:
        images = attacked(attacker, attack)
        cells = []
        for model, defense in itertools.product(subjects, (None, plan.ours())):
            cells.append(classify(model, defense, images, f"{attacker.target.name} -> {model.target.name}")[0])
        rows.append(Row(attacker.target.name, tuple(cells)))
    columns = [f"{model.target.name}{end}" for model in subjects for end in ("", " + ours")]
    return plan.result(
        "table2",
        "Table II: transfer of attacks between two targets",
        f"{attack}, {_kind(attack)}, made on the target of each row, classified by the target of each column: gray box where "
        f"they are the same, black box where they aren't. Images that both classify correctly.",
        "Attacks with",
        columns,
        rows,
        attacks=[attack],
        count=int(right.sum()),
        facts={"target": f"{one.target.name}; {other.target.name}"},
    )


def table3(plan: Plan) -> Result:
    """Table III: the defenses on several targets, under IGSM."""
    subjects = (plan.subject, *plan.others)
    attack = plan.attack("IGSM", igsm())
    lists = [plan.rows([("IGSM", attacked(subject, attack))], subject=subject, published=False) for subject in subjects]
    rows = []
    for lines in zip(*lists, strict=True):
        error = next((line.error for line in lines if line.error), "")
        rows.append(Row(lines[0].name, tuple(line.cells[0] for line in lines), lines[0].seconds, error))
    return plan.result(
        "table3",
        "Table III: several targets",
        f"{attack}, {_kind(attack)}, on each target, each on images of its own that it classifies correctly; tuned strengths.",
        "Defense",
        [f"{subject.target.name} (n = {len(subject.images)})" for subject in subjects],
        rows,
        attacks=[attack],
        facts={"target": "; ".join(subject.target.name for subject in subjects)},
    )


def table4(plan: Plan) -> Result:
    """Table IV: image steps T_I."""
    settings = [(f"T_I = {steps}", {"image_steps": steps}) for steps in (10, 20, 30, 40)]
    return _ablation(plan, "table4", "Table IV: image steps", "Image steps", settings)


def table5(plan: Plan) -> Result:
    """Table V: kernel size."""
    settings = [(f"{size} x {size}", {"kernel_size": size}) for size in (7, 11, 15, 21)]
    return _ablation(plan, "table5", "Table V: kernel size", "Kernel size", settings)


def table6(plan: Plan) -> Result:
    """Table VI: clean against attacked by C&W."""
    attack = plan.attack("C&W", cw())
    columns = plan.columns([attack])
    return plan.result(
        "table6",
        "Table VI: clean images against attacked ones",
        f"{attack}, {_kind(attack)}. Images that the target classifies correctly: with no defense, all clean ones are right.",
        "Defense",
        [name for name, _ in columns],
        plan.rows(columns),
        attacks=[attack],
    )


def autoencoder(plan: Plan) -> Result:
    """IV-H: whether the alternate update is needed."""
    pair = [family for family in plan.families if family.name in ("Auto-encoder", OURS)]
    subject = plan.subject.first(plan.slow_count)  # the same images for both
    small = dataclasses.replace(plan, families=tuple(pair), subject=subject)
    columns = small.columns(plan.attacks)
    rows = [_with_mean(line) for line in small.rows(columns)]
    return small.result(
        "autoencoder",
        "IV-H: an auto-encoder updated in one step, against the alternate update",
        "The auto-encoder has our convolution, one number in the middle and a deconvolution, and is trained on each image. "
        + " ".join(_against_peers(rows)),
        "Defense",
        [*(name for name, _ in columns), "Mean attacked"],
        rows,
        attacks=plan.attacks,
    )


def fig3(plan: Plan) -> Result:
    """Fig. 3: accuracy against the attack's budget."""
    targeted = plan.attack("IGSM", igsm()).targeted
    attacks = [igsm(eps, targeted=targeted) for eps in EPSILONS if eps]
    tests = [plan.subject.images, *(attacked(plan.subject, attack) for attack in attacks)]
    columns = [(f"eps {eps}", images) for eps, images in zip(EPSILONS, tests, strict=True)]
    fast = [family for family in plan.families if not family.slow]
    rows = dataclasses.replace(plan, families=tuple(fast)).rows(columns, published=False)
    figures.lines(
        plan.folder / "fig3.svg",
        [figures.Series(line.name, EPSILONS, line.cells) for line in rows if not line.error],  # type: ignore[arg-type]
        xlabel="eps (grey levels)",
    )
    return plan.result(
        "fig3",
        "Fig. 3: accuracy against the strength of the attack",
        f"IGSM, {_kind(attacks[0])}, with growing L-infinity bound; tuned strengths.",
        "Defense",
        [name for name, _ in columns],
        rows,
        attacks=attacks,
        figures=[Figure("fig3.svg", "Top-1 accuracy under IGSM against its L-infinity bound.")],
    )


def fig4(plan: Plan) -> Result:
    """Fig. 4: accuracy against network steps under Gaussian noise, FGSM and IGSM; the first of them chooses T_N."""
    attacks = [plan.attack("FGSM", fgsm()), plan.attack("IGSM", igsm())]
    kinds = [
        (f"Gaussian noise, std {plan.noise_std:g}", noised(plan.subject, plan.noise_std)),
        *((str(attack), attacked(plan.subject, attack)) for attack in attacks),
    ]
    defense = plan.ours(network_steps=max(TRACE_STEPS))
    rows = [Row(name, tuple(along(plan.subject, defense, images, TRACE_STEPS, name))) for name, images in kinds]
    curve = [(step, cell.accuracy) for step, cell in zip(TRACE_STEPS, rows[0].cells, strict=True) if cell is not None]
    chosen = smallest_flat_step(curve, 0.01)
    figures.lines(
        plan.folder / "fig4.svg",
        [figures.Series(line.name, TRACE_STEPS, line.cells) for line in rows],  # type: ignore[arg-type]
        xlabel="network steps",
        mark=chosen,
        mark_label=f"T_N = {chosen}",
    )
    return plan.result(
        "fig4",
        "Fig. 4: accuracy against network steps",
        f"T_N = {chosen} is the first step after which accuracy under Gaussian noise rises by no more than one point: it is "
        "chosen without any attack (III-D).",
        "Noise",
        [str(step) for step in TRACE_STEPS],
        rows,
        attacks=attacks,
        facts={"chosen T_N": chosen},
        figures=[Figure("fig4.svg", "Top-1 accuracy of images purified with more and more network steps.")],
    )


def fig1(plan: Plan) -> Result:
    """Fig. 1: photographs, attacked and purified, their residuals, and what the target makes of them."""
    subject = plan.subject.first(12)
    attack = plan.attack("IGSM", igsm())
    attacked_images = attacked(subject, attack)
    defense = plan.ours()
    kinds = [
        ("original", subject.images.float() / 255),
        ("attacked", attacked_images.float() / 255),
        ("original, purified", _purified(subject, defense, subject.images)),
        ("attacked, purified", _purified(subject, defense, attacked_images)),
    ]
    guesses = [probabilities(subject, images) for _, images in kinds]
    truth = [guess[torch.arange(len(subject.labels)), subject.labels] for guess in guesses]
    figures.residuals(
        plan.folder / "fig1.jpg",
        [(name, images[:4]) for name, images in kinds],
        kinds[0][1][:4],
        [[f"right label: {value:.3f}" for value in values[:4].tolist()] for values in truth],
    )
    pairs = []
    for i, label in enumerate(subject.labels.tolist()):
        names = [f"photo{i + 1}-{kind}.png" for kind in ("original", "attacked", "purified")]
        for name, k in zip(names, (0, 1, 3), strict=True):
            to_pil_image((255 * kinds[k][1][i]).round().to(torch.uint8)).save(plan.folder / name)
        original, attacked_class, purified = (subject.classes[int(guesses[k][i].argmax())] for k in (0, 1, 3))
        before, under, after = (float(truth[k][i]) for k in (0, 1, 3))
        classes = (original, attacked_class, purified)
        pairs.append(Pair(subject.classes[label], names[0], names[1], names[2], classes, (before, under, after)))
    return plan.result(
        "fig1",
        "Fig. 1: what is left of an attack",
        f"{attack}, {_kind(attack)}. Original, attacked and purified photographs, the first ones of the sample, not the best.",
        "",
        [],
        [],
        attacks=[attack],
        count=len(subject.images),
        figures=[Figure("fig1.jpg", "Photographs, and below each its difference to the original, magnified.")],
        pairs=pairs,
    )


def fig5(plan: Plan) -> Result:
    """Fig. 5: photographs along the iterations."""
    subject = plan.subject.first(3)
    attack = plan.attack("IGSM", igsm())
    images = attacked(subject, attack).to(subject.device).float() / 255
    defense = plan.ours()
    last = defense.settings.network_steps
    steps = sorted({max(1, round(last * part)) for part in (0.03, 0.1, 0.25, 0.5, 1)})
    moments = [(f"step {moment.step}", moment.images.cpu()) for moment in defense.trace(images) if moment.step in steps]
    figures.iterations(plan.folder / "fig5.jpg", moments, subject.images.float() / 255, images.cpu())
    return plan.result(
        "fig5",
        "Fig. 5: images along the iterations",
        f"{attack}, {_kind(attack)}, purified with T_N = {last}; (a) what the attack added, (b) how the last image differs "
        "from the original, both normalised.",
        "",
        [],
        [],
        attacks=[attack],
        count=len(subject.images),
        figures=[Figure("fig5.jpg", "The synthesised image from the first network steps to the last.")],
    )


def tradeoff(plan: Plan) -> Result:
    """Clean against attacked accuracy of every defense as its strength varies; ours: T_N."""
    columns = plan.columns(plan.attacks)
    rows, curves = [], []
    for family in plan.families:
        lines = [_with_mean(line) for line in _strengths(plan, family, columns)]
        rows += lines
        drawn = [(s, line) for s, line in zip(family.strengths, lines, strict=True) if not line.error]
        if drawn:
            clean = [line.cells[0].accuracy for _, line in drawn if line.cells[0] is not None]
            mean = [line.cells[-1].accuracy for _, line in drawn if line.cells[-1] is not None]
            names = [f"{strength:.4g}" for strength, _ in drawn]
            curves.append(figures.Tradeoff(family.name, names, clean, mean, family.name == OURS))
    figures.tradeoff(plan.folder / "tradeoff.svg", curves)
    return plan.result(
        "tradeoff",
        "Clean against attacked accuracy as the strength of each defense varies",
        "A defense that lies above and to the right of another beats it. Slow ones are measured on fewer images.",
        "Defense",
        [*(name for name, _ in columns), "Mean attacked"],
        rows,
        attacks=plan.attacks,
        figures=[Figure("tradeoff.svg", "Clean accuracy, and mean accuracy under the attacks, of each strength.")],
    )


def tune(plan: Plan) -> Result:
    """The strongest setting of each defense that costs little on clean and Gaussian-noised images: no attack is looked at."""
    columns = [
        ("Clean", plan.subject.images),
        (f"Gaussian noise, std {plan.noise_std:g}", noised(plan.subject, plan.noise_std)),
    ]
    rows, chosen = [], {}
    for family in plan.families:
        lines = [_with_mean(line, of=2) for line in _strengths(plan, family, columns)]
        rows += lines
        scores = [(strength, line.cells[-1]) for strength, line in zip(family.strengths, lines, strict=True)]
        known = [(strength, cell.correct, len(cell.right)) for strength, cell in scores if cell is not None]
        if known:
            least = max(correct for _, correct, _ in known) - TUNE_TOLERANCE * known[0][2]
            chosen[family.name] = [strength for strength, correct, _ in known if correct >= least][-1]
    return plan.result(
        "tune",
        "Strengths, tuned on clean and Gaussian-noised images",
        f"Chosen is the strongest whose mean of both columns is within {100 * TUNE_TOLERANCE:g} points of the defense's best: "
        f"{', '.join(f'{name} {strength:g}' for name, strength in chosen.items())}. No attack was looked at.",
        "Defense",
        [*(name for name, _ in columns), "Mean"],
        rows,
        facts={"chosen": chosen},
    )


EXPERIMENTS: dict[str, Callable[[Plan], Result]] = {
    function.__name__: function
    for function in (table1, table2, table3, table4, table5, table6, autoencoder, fig1, fig3, fig4, fig5, tradeoff, tune)
}


def common_facts(subject: Subject, data: str) -> dict[str, Any]:
    """What is needed to repeat a result, beside its attacks and n: seed, data, target, versions, hardware and command."""
    packages = ("oag-transform", "torch", "torchvision", "foolbox", "scikit-image", "numpy")
    return {
        "seed": subject.seed,
        "data": f"{data}: {len(subject.images)} images that the target gets right, of {subject.looked_at} looked at",
        "target": subject.target.name,
        "versions": ", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}",
        "hardware": hardware(subject.device),
        "command": shlex.join(["oag-transform", *sys.argv[1:]]),
    }


def _ablation(plan: Plan, key: str, title: str, first: str, settings: Sequence[tuple[str, dict[str, Any]]]) -> Result:
    attack = plan.attack("IGSM", igsm())
    columns = plan.columns([attack])
    rows = [
        row(plan.subject, name, lambda chosen=chosen: plan.ours(**chosen), columns)  # type: ignore[misc]
        for name, chosen in settings
    ]
    caption = f"{attack}, {_kind(attack)}; everything else at the default, T_N = {plan.network_steps}."
    return plan.result(key, title, caption, first, [name for name, _ in columns], rows, attacks=[attack])


def _strengths(plan: Plan, family: Defense, columns: Sequence[tuple[str, Tensor]]) -> list[Row]:
    """A defense at each of its strengths, in their order."""
    if family.name == OURS:
        return _our_strengths(plan, family, columns)
    count = plan.slow_count if family.slow else None
    return [_row(plan.subject, family, strength, columns, count) for strength in family.strengths]


def _our_strengths(plan: Plan, family: Defense, columns: Sequence[tuple[str, Tensor]]) -> list[Row]:
    # T_N steps are the first T_N of a longer run: one run gives all of them
    steps = sorted(int(strength) for strength in family.strengths)
    defense = plan.ours(network_steps=steps[-1])
    try:
        lists = [along(plan.subject, defense, images, steps, f"{OURS}: {name}") for name, images in columns]
    except DivergenceError as error:
        return [Row(family.label(strength), (None,) * len(columns), None, str(error)) for strength in family.strengths]
    found = [dict(zip(steps, cells, strict=True)) for cells in lists]
    return [Row(family.label(strength), tuple(cells[int(strength)] for cells in found)) for strength in family.strengths]


def _row(subject: Subject, family: Defense, strength: float, columns: Sequence[tuple[str, Tensor]], count: int | None) -> Row:
    def make() -> nn.Module:
        return family.make(strength, subject.seed)

    return row(subject, family.label(strength), make, columns, count, family.shift)


def _with_mean(line: Row, of: int = 0) -> Row:
    """The line with a column that pools its last ``of`` cells, or all but the first."""
    return line._replace(cells=(*line.cells, pooled(line.cells[-of:] if of else line.cells[1:])))


def _kind(attack: Attack) -> str:
    return "targeted" if attack.targeted else "untargeted"


def _kinds(attacks: Sequence[Attack]) -> str:
    return "; ".join(f"{attack.name} is {_kind(attack)}" for attack in attacks) + "."


def _against_peers(rows: Sequence[Row]) -> list[str]:
    """A sentence on each of our rows and the peer with the best mean under attack, paired."""
    full = max((cell.n for line in rows for cell in line.cells[:1] if cell is not None), default=0)
    whole = [line for line in rows if line.cells[-1] is not None and line.cells[-1].n == full]
    peers = [line for line in whole if not line.name.startswith((OURS, NONE))]
    if not peers:
        return []
    best = max(peers, key=lambda line: line.cells[-1].accuracy if line.cells[-1] is not None else 0)
    sentences = []
    for line in whole:
        if line.name.startswith(OURS):
            more, fewer, p = paired(line.cells[1:-1], best.cells[1:-1])
            sentences.append(
                f"{line.name}, against {best.name}: right under more of the attacks on {more} images, under fewer on {fewer} "
                f"(exact sign test, p = {p:.2g})."
            )
    return sentences


def _one_other(plan: Plan, key: str) -> Subject:
    if not plan.others:
        raise ValueError(f"{key} needs a second target: --other NAME[=WEIGHTS]")
    return plan.others[0]


def _purified(subject: Subject, defense: OnlineAlternateGenerator, images: Tensor) -> Tensor:
    return defense(images.to(subject.device).float() / 255).cpu()
