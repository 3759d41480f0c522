"""Points that attacks found, judged with fresh draws of the defense; and whether the attacks themselves can be trusted.

A randomised defense misclassifies a clean image too when it is asked often enough, so clean images are judged in the same way.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ... import _checks
from ...defended import DefendedModel
from ..options import AdaptiveEntry
from ..result import Cell, bits
from .pgd import AttackResult, Loss, Streams, check, gradient, margin, unknown

# first draws of a judge, of judgements between attacks, and of gradients that are compared: an attacker counts from 0
JUDGED, BETWEEN, COMPARED = 1 << 31, 1 << 30, 1 << 29
LEAD = 0.02  # share of the images by which a black box must be ahead, beyond one image
RISE = 0.1  # of the loss over the last quarter of the steps, as a share of its whole rise: less is converged


def judge(
    model: DefendedModel, images: Tensor, labels: Tensor, draws: int, *, first: int = JUDGED, streams: Streams = unknown
) -> Cell:
    """Classify images (N, C, H, W) in [0, 1] ``draws`` times: who is right by majority vote, and in how many of the draws.

    A vote is right if more draws agree on the right class than on any other: a tie is not.

    Args:
        model: the defended target; of each draw it sees ``model.samples`` purifications.
        images: see above.
        labels: (N,) the right classes.
        draws: k.
        first: number of the first draw; attackers count from 0, so that these are none of theirs.
        streams: random stream of (image, draw).

    Raises:
        TypeError, ValueError: see :func:`.pgd.check`; or ``draws`` below 1.
    """
    check(model, images, labels)
    _checks.integer("draws", draws, at_least=1)
    counts, right, _ = verdict(model, images, labels, draws, first=first, streams=streams)
    return Cell(bits(right), draws=draws, counts=tuple(counts.tolist()) if draws > 1 else ())


def verdict(
    model: DefendedModel, images: Tensor, labels: Tensor, draws: int, *, first: int, streams: Streams
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`judge` says of each image (N,): how many draws are right, whether the vote is, and the mean margin.

    The margin is :func:`.pgd.margin` of logarithms of probabilities.
    """
    votes, margins = torch.zeros(0), torch.zeros(0)
    for draw in range(first, first + draws):
        with torch.no_grad():
            logits = model(images, index=[streams(i, draw) for i in range(len(images))]).log_softmax(1)
            labels = _checks.labels(labels, len(images), logits.shape[1])
        chosen, above = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]), margin(logits, labels)
        votes, margins = (chosen, above) if draw == first else (votes + chosen, margins + above)
    counts = votes.gather(1, labels[:, None])[:, 0]
    return counts, counts > votes.scatter(1, labels[:, None], -1).amax(1), margins / draws


def agreement(
    model: DefendedModel, images: Tensor, labels: Tensor, loss: Loss, draws: int, *, streams: Streams = unknown
) -> Tensor:
    """(N,) cosine of the gradients of two sets of ``draws`` draws: whether that many are enough to know where to go."""
    slopes = []
    for start in (COMPARED, COMPARED + draws):
        indices = [[streams(i, draw) for i in range(len(images))] for draw in range(start, start + draws)]
        slopes.append(gradient(model, images, labels, loss, indices)[1].flatten(1))
    return torch.cosine_similarity(slopes[0], slopes[1], dim=1)


def diagnose(name: str, found: AttackResult) -> tuple[str, ...]:
    """What speaks against trusting an attack's result, in the manner of AutoAttack's checks; empty: nothing."""
    said = [f"{name}: no gradient through the defense was found; BPDA took its place"] if found.fell_back else []
    zero = int((found.gradients == 0).sum())
    if zero:
        said.append(f"{name}: the gradient of {zero} of {len(found.gradients)} images is zero; what it finds means nothing")
    if len(found.losses) >= 4:
        said += _trend(name, found.losses.mean(1))
    return tuple(said)


def black_box_leads(cells: Mapping[AdaptiveEntry, Cell]) -> tuple[str, ...]:
    """A warning for each black-box attack that leaves fewer images right than every attack with gradients: a masked gradient.

    Args:
        cells: what attacks on the same images leave of a defense.
    """
    white = [cell.accuracy for attack, cell in cells.items() if not attack.black_box]
    least = min(white, default=0.0)
    return tuple(
        f"{attack.key} leaves {100 * cell.accuracy:.1f}%, less than attacks with gradients ({100 * least:.1f}%)"
        for attack, cell in cells.items()
        if attack.black_box and white and least - cell.accuracy > LEAD + 1 / cell.n
    )


def _trend(name: str, losses: Tensor) -> list[str]:
    quarter = max(1, len(losses) // 4)
    start, middle, end = losses[:1].mean(), losses[-2 * quarter : -quarter].mean(), losses[-quarter:].mean()
    if end <= start:
        return [f"{name}: the loss doesn't rise ({float(start):.2f} to {float(end):.2f})"]
    if end - middle > RISE * (end - start):
        return [f"{name}: the loss still rises at the last step ({float(middle):.2f} to {float(end):.2f}); take more steps"]
    return []
