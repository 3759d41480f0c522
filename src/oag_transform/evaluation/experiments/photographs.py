"""Figures 1 and 5: photographs that are attacked and purified, along the way and in the end."""

import torch
from torch import Tensor

from ..measure import attacked, probabilities, traced
from ..results import Iterations, Pair, Photographs, Pixels, Residuals, Result
from .plan import Plan, goal

SHOWN = 4  # rows of Fig. 1; its pairs are more
PAIRS = 12
ROWS = 3  # of Fig. 5
MOMENTS = (0.03, 0.1, 0.25, 0.5, 1)  # shares of T_N


def fig1(plan: Plan) -> Result:
    """Fig. 1: photographs, attacked and purified, their residuals, and what the target makes of them."""
    subject = plan.subject.first(PAIRS)
    attack = plan.attack("igsm")
    model = plan.ours("ours").model(subject)

    def purified(images: Tensor) -> Tensor:
        return model.purify(images.to(subject.device)).cpu()

    original, changed = subject.images.float() / 255, attacked(subject, attack).float() / 255
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
        Photographs(kind, files[kind][:SHOWN], tuple(f"right label: {value:.3f}" for value in truth[kind][:SHOWN].tolist()))
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
        f"{attack}, {goal(attack)}. Original, attacked and purified photographs, the first ones of the sample, not the best.",
        attacks=[attack],
        count=len(original),
        figures=[
            Residuals(
                plan.file("fig1.jpg"), "Photographs, and below each its difference to the original, magnified.", tuple(columns)
            )
        ],
        pairs=pairs,
        photographs={name: _pixels(image) for kind in kinds for name, image in zip(files[kind], kinds[kind], strict=True)},
    )


def fig5(plan: Plan) -> Result:
    """Fig. 5: photographs along the iterations."""
    subject = plan.subject.first(ROWS)
    attack = plan.attack("igsm")
    images = attacked(subject, attack).to(subject.device).float() / 255
    last = plan.network_steps
    steps = {max(1, round(last * part)) for part in MOMENTS}
    moments = traced(plan.ours("ours").model(subject)).trace(images)
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
                tuple(Photographs(kind, files[kind]) for kind in kinds),
            )
        ],
        photographs={name: _pixels(image) for kind in kinds for name, image in zip(files[kind], kinds[kind], strict=True)},
    )


def _pixels(image: Tensor) -> Pixels:
    return (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
