"""Points that attacks found, judged again with fresh draws of the defense; and whether the attacks themselves can be trusted.

A random defense loses a clean image too when it is asked often enough, so clean images are judged in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..defended import DefendedModel
from .adaptive import Found, Loss, Streams, gradient, unknown
from .results import Cell

AGREEMENT = 0.1  # cosine of the gradients of two sets of draws, on average over images
LEAD = 0.02  # share of the images by which a black box must be ahead, beyond one image
RISE = 0.1  # of the loss over the last quarter of the steps, as a share of its whole rise: less is converged


@dataclass(frozen=True)
class Judgement:
    """Classes that fresh draws of a defense give some images.

    Attributes:
        right: (k, N) bool, whether draw k has image n right.
        votes: (N,) bool, whether most draws agree on the right class: more of them than on any other.
    """

    right: Tensor
    votes: Tensor

    @property
    def mean(self) -> Cell:
        """Accuracy of one draw; the interval is that of N images."""
        return Cell("".join(_bits(row) for row in self.right), len(self.right))

    @property
    def worst(self) -> Cell:
        """Right in each of the k draws: what is left when an attacker may ask k times."""
        return Cell(_bits(self.right.all(0)))

    @property
    def majority(self) -> Cell:
        """Right by a vote of k draws."""
        return Cell(_bits(self.votes))

    @property
    def shares(self) -> Tensor:
        """(N,) share of the draws that have each image right."""
        return self.right.float().mean(0)


def judge(
    model: DefendedModel, images: Tensor, labels: Tensor, draws: int, *, first: int = 1 << 31, at: Streams = unknown
) -> Judgement:
    """Classify images (N, C, H, W) in [0, 1] ``draws`` times.

    Args:
        model: the defended target; of each draw it sees ``model.samples`` purifications.
        images: see above.
        labels: (N,) the right classes.
        draws: k.
        first: number of the first draw; attackers count from 0, so that these are none of theirs.
        at: random stream of (image, draw).
    """
    classes = []
    for draw in range(first, first + draws):
        with torch.no_grad():
            logits = model(images, index=[at(i, draw) for i in range(len(images))])
        classes.append(logits.argmax(1))
    every = torch.stack(classes)
    counts = torch.zeros(len(labels), logits.shape[1]).scatter_add_(1, every.T.cpu(), torch.ones(every.T.shape))
    right = counts.gather(1, labels[:, None].cpu())[:, 0]
    most = counts.scatter(1, labels[:, None].cpu(), -1).amax(1)
    return Judgement((every == labels).cpu(), right > most)


def worst_points(
    model: DefendedModel, points: Mapping[str, Tensor], labels: Tensor, draws: int, *, first: int = 1 << 30
) -> tuple[Tensor, tuple[str, ...]]:
    """For each image the point that the fewest of ``draws`` draws have right, and the name of the attack that found it.

    Judge them again: the least of several noisy shares is too low.
    """
    shares = torch.stack([judge(model, each, labels, draws, first=first).shares for each in points.values()])
    chosen = shares.argmin(0).tolist()
    names, images = list(points), list(points.values())
    return torch.stack([images[at][row] for row, at in enumerate(chosen)]), tuple(names[at] for at in chosen)


def agreement(model: DefendedModel, images: Tensor, labels: Tensor, loss: Loss, draws: int, *, first: int = 1 << 29) -> Tensor:
    """(N,) cosine of the gradients of two sets of ``draws`` draws: whether that many are enough to know where to go."""
    slopes = []
    for start in (first, first + draws):
        indices = [[unknown(i, draw) for i in range(len(images))] for draw in range(start, start + draws)]
        slopes.append(gradient(model, images, labels, loss, indices)[1].flatten(1))
    return torch.cosine_similarity(slopes[0], slopes[1], dim=1)


def doubts(
    found: Mapping[str, Found],
    majority: Mapping[str, Cell],
    *,
    black_box: Sequence[str] = (),
    agreements: Mapping[str, Tensor] | None = None,
) -> tuple[str, ...]:
    """What speaks against trusting these attacks on one defense, in the manner of AutoAttack's checks; empty: nothing.

    Args:
        found: what each attack found.
        majority: what the defense has left of each, see :attr:`Judgement.majority`.
        black_box: names of those attacks that see no gradient.
        agreements: :func:`agreement` of the draws that gradient attacks took.
    """
    said = []
    for name, each in found.items():
        zero = int((each.gradients == 0).sum())
        if zero:
            said.append(f"{name}: the gradient of {zero} of {len(each.gradients)} images is zero; what it finds means nothing")
        if len(each.losses) >= 4:
            said += _along(name, each.losses.mean(1))
    white = [majority[name] for name in majority if name not in black_box]
    for name in black_box:
        if name in majority and white:
            least = min(cell.accuracy for cell in white)
            behind = least - majority[name].accuracy
            if behind > LEAD + 1 / majority[name].n:
                said.append(f"{name} leaves {majority[name].accuracy:.2f}, less than attacks with gradients ({least:.2f})")
    for name, cosines in (agreements or {}).items():
        if float(cosines.mean()) < AGREEMENT:
            said.append(f"{name}: gradients of two sets of draws agree by {float(cosines.mean()):.2f} only; take more draws")
    return tuple(said)


def _along(name: str, losses: Tensor) -> list[str]:
    quarter = max(1, len(losses) // 4)
    start, middle, end = losses[:1].mean(), losses[-2 * quarter : -quarter].mean(), losses[-quarter:].mean()
    if end <= start:
        return [f"{name}: the loss doesn't rise ({float(start):.2f} to {float(end):.2f})"]
    if end - middle > RISE * (end - start):
        return [f"{name}: the loss still rises at the last step ({float(middle):.2f} to {float(end):.2f}); take more steps"]
    return []


def _bits(right: Tensor) -> str:
    return "".join("1" if each else "0" for each in right.tolist())
