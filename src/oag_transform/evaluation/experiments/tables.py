"""Tables I to VI, and section IV-H."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from ...baselines.catalogue import OAG_KEY
from ...transform import OnlineAlternateGenerator
from ..columns import attacked, classify, gray_box_column, probabilities
from ..plan import Plan, against_peers, goal, measure, target_facts, with_mean
from ..result import Cost, Result, RowResult
from ..statistics import recommend
from ..subject import UNDEFENDED

IMAGE_STEPS = (10, 20, 30, 40)  # Table IV
KERNEL_SIZES = (7, 11, 15, 21)  # Table V


def table1(plan: Plan) -> Result:
    """Table I, with clean images (Table VI), the cost beside it, and what to take."""
    columns = plan.columns(plan.attacks)
    rows = [with_mean(row) for row in plan.measured(columns)]
    timed = tuple(i for i, row in enumerate(rows) if row.seconds is not None and row.cells[-1] is not None)
    cost = Cost(plan.file("cost.svg"), "Mean accuracy under attack, and what a defense costs.", timed, len(columns))
    goals = "; ".join(f"{attack.name} is {goal(attack)}" for attack in plan.attacks)
    return plan.result(
        "table1",
        "Images that the target classifies correctly, clean and under gray-box attacks. "
        f"{goals}. Attacked images are rounded to 8 bits. Each defense has its published setting and, if "
        "different, one tuned on clean and Gaussian-noised images. The mean is over the attacks; its interval is that of n "
        "images. " + " ".join(against_peers(rows)),
        "Defense",
        [*(column.label for column in columns), "Mean attacked"],
        rows,
        attacks=plan.attacks,
        facts={"recommendation": recommend(rows, clean=0, attacked=range(1, len(columns)))},
        figures=[cost] if timed else [],
    )


def table2(plan: Plan) -> Result:
    """Table II: black-box and gray-box transfer between two targets, each with and without OAG, and clean images.

    Raises:
        ValueError: no second target, one that wants images of another size, or no image that both get right.
    """
    if not plan.others:
        raise ValueError("table2 needs a second target: --other MODEL[=WEIGHTS]")
    one, other = plan.subject, plan.others[0]
    sizes = [(subject.target.preprocessing.resize, subject.target.preprocessing.crop) for subject in (one, other)]
    if sizes[0] != sizes[1]:
        wanted = "; ".join(
            f"{subject.target.name} crops {crop} of {resize} pixels"
            for subject, (resize, crop) in zip((one, other), sizes, strict=True)
        )
        raise ValueError(
            f"table2 shows both targets the same images, and they want other ones: {wanted}. Give --resize and --crop, or fit "
            "one with the --size of the other"
        )
    same = dataclasses.replace(one, target=other.target)
    right = probabilities(same, one.images).argmax(1) == one.labels
    if not right.any():
        raise ValueError(f"{one.target.name} and {other.target.name} have no image that both classify correctly")
    subjects = [model.only(right.nonzero().flatten().tolist()) for model in (one, same)]
    attack = plan.attack("mifgsm")
    shown = [("no attack", subjects[0].images)]
    shown += [(attacker.target.name, attacked(attacker, attack)) for attacker in subjects]
    rows = []
    for name, images in shown:
        cells = [
            classify(victim, row.model(victim), images, f"{name} -> {victim.target.name}")[0]
            for victim, row in itertools.product(subjects, (UNDEFENDED, plan.oag("OAG")))
        ]
        rows.append(RowResult(name, tuple(cells)))
    return plan.result(
        "table2",
        f"{attack}, {goal(attack)}, made on the target of each row, classified by the target of each column: gray box where "
        "they are the same, black box where they aren't. Images that both classify correctly, so that clean ones are all right "
        f"without a defense. OAG is at {plan.setting_name}.",
        "Attacks with",
        [f"{victim.target.name}{end}" for victim in subjects for end in ("", " + OAG")],
        rows,
        attacks=[attack],
        count=int(right.sum()),
        facts=target_facts((one, other)),
    )


def table3(plan: Plan) -> Result:
    """Table III: the defenses on several targets, under IGSM."""
    subjects = (plan.subject, *plan.others)
    attack = plan.attack("igsm")
    lists = [plan.measured([gray_box_column(attack)], subject=subject, published=False) for subject in subjects]
    rows = []
    for lines in zip(*lists, strict=True):
        error = next((line.error for line in lines if line.error), "")
        rows.append(replace(lines[0], cells=tuple(line.cells[0] for line in lines), error=error))
    return plan.result(
        "table3",
        f"{attack}, {goal(attack)}, on each target, each on images of its own that it classifies correctly; tuned settings.",
        "Defense",
        [f"{subject.target.name} (n = {len(subject.images)})" for subject in subjects],
        rows,
        attacks=[attack],
        facts=target_facts(subjects),
    )


def table4(plan: Plan) -> Result:
    """Table IV: image steps T_I."""
    counts = _with_own(plan, "image_steps", IMAGE_STEPS)
    return _ablation(plan, "table4", "Image steps", [(f"T_I = {n}", {"image_steps": n}) for n in counts])


def table5(plan: Plan) -> Result:
    """Table V: kernel size."""
    sides = _with_own(plan, "kernel_size", KERNEL_SIZES)
    return _ablation(plan, "table5", "Kernel size", [(f"{n} x {n}", {"kernel_size": n}) for n in sides])


def table6(plan: Plan) -> Result:
    """Table VI: clean against attacked by C&W."""
    attack = plan.attack("cw")
    columns = plan.columns([attack])
    return plan.result(
        "table6",
        f"{attack}, {goal(attack)}. Images that the target classifies correctly: with no defense, all clean ones are right.",
        "Defense",
        [column.label for column in columns],
        plan.measured(columns),
        attacks=[attack],
    )


def autoencoder(plan: Plan) -> Result:
    """IV-H: whether the alternate update is needed."""
    pair = tuple(family for family in plan.families if family.key in ("autoencoder", OAG_KEY))
    subject = plan.subject.first(plan.slow_count)  # the same images for both
    small = dataclasses.replace(plan, families=pair, subject=subject)
    columns = small.columns(plan.attacks)
    rows = [with_mean(row) for row in small.measured(columns)]
    return small.result(
        "autoencoder",
        "The auto-encoder has OAG's convolution, one number in the middle and a deconvolution, and is trained on each image. "
        + " ".join(against_peers(rows)),
        "Defense",
        [*(column.label for column in columns), "Mean attacked"],
        rows,
        attacks=plan.attacks,
    )


def _ablation(plan: Plan, key: str, first: str, settings: Sequence[tuple[str, dict[str, Any]]]) -> Result:
    attack = plan.attack("igsm")
    columns = plan.columns([attack])
    rows = [measure(plan.subject, plan.oag(name, **chosen), columns) for name, chosen in settings]
    caption = f"{attack}, {goal(attack)}; everything else at {plan.setting_name}, T_N = {plan.network_steps}."
    return plan.result(key, caption, first, [column.label for column in columns], rows, attacks=[attack])


def _with_own(plan: Plan, name: str, values: Sequence[int]) -> list[int]:
    """The paper's values of a setting of OAG and the one that it has here, in their order."""
    settings = OnlineAlternateGenerator(**plan.setting).settings_for(*plan.subject.images.shape[-2:])
    return sorted({*values, getattr(settings, name)})
