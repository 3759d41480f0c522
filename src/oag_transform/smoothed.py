"""Randomized smoothing (Cohen, Rosenfeld & Kolter 2019): a class that can be proven not to change within an L2 radius.

Any classifier does; with :meth:`oag_transform.OnlineAlternateGenerator.for_noise` before it, it is denoised smoothing (Salman
et al. 2020) with a denoiser that needs no training. The proof is about the distribution of the classifier's answers under
noise, so every draw has noise and purification of its own, the class is chosen on other draws than those that are counted, and
nothing but the noisy image decides how it is purified.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, streams
from .defended import takes_index

ABSTAIN = -1
"""The class of an image of which nothing is proven."""

SELECTION, COUNTING, AVERAGING = range(3)  # what a draw is for: each has random streams of its own
GIVE_UP = 0.001  # a radius is out of reach where a probability that reaches it would give such counts less often
LOOKS = (0.02, 0.1, 0.3, 1.0)  # shares of n after which a certification that wants a radius may stop


@dataclass
class Tally:
    """How often each class was seen, for one image: an interrupted certification goes on from here.

    Attributes:
        selection: (classes,) int64 on the CPU, of the draws that choose the class; None before the first.
        counted: likewise, of the draws that are counted for the proof.
    """

    selection: Tensor | None = None
    counted: Tensor | None = None

    def draws(self, purpose: int) -> int:
        """Number of draws so far."""
        seen = self.selection if purpose == SELECTION else self.counted
        return 0 if seen is None else int(seen.sum())

    def add(self, purpose: int, classes: Tensor) -> None:
        """Count more draws, (classes,) int64."""
        if purpose == SELECTION:
            self.selection = classes if self.selection is None else self.selection + classes
        else:
            self.counted = classes if self.counted is None else self.counted + classes


@dataclass(frozen=True)
class Certificate:
    """What is proven of one image, with the counts that prove it.

    Attributes:
        label: the class, or ``ABSTAIN``.
        radius: L2 radius, on the [0, 1] scale, within which the smoothed classifier's class is ``label``; 0 with ``ABSTAIN``.
        count: how many of the ``n`` counted draws were of the class that was chosen.
        n: draws that were counted: fewer than asked for where it stopped early.
        alpha: probability that the certificate is wrong.
        noise_std: of the smoothing noise, on the [0, 1] scale.
        looks: how many times it was allowed to stop; alpha is split over them.
        tally: the counts themselves.
    """

    label: int
    radius: float
    count: int
    n: int
    alpha: float
    noise_std: float
    looks: int = 1
    tally: Tally = field(default_factory=Tally, repr=False, compare=False)

    def at(self, alpha: float) -> "Certificate":
        """The certificate that the same counts give for another ``alpha``."""
        alpha = _checks.number("alpha", alpha, above=0, below=1)
        return certificate(self.tally, self.noise_std, alpha, self.looks)


class SmoothedModel(nn.Module):
    """A classifier smoothed by Gaussian noise, which can prove that its class doesn't change within an L2 radius.

    The smoothed classifier gives the class that ``model`` gives most often to the image with ``N(0, noise_std^2)`` added. If it
    gives class A with a probability of at least p > 1/2, no perturbation of an L2 norm below ``noise_std`` * Phi^-1(p) changes
    it (Cohen et al. 2019, Theorem 1). That is in the units of [0, 1] pixels: an L-infinity bound that it implies is smaller by
    sqrt(3 H W), 0.33/255 for a radius of 0.5 at 224 x 224.

    Args:
        model: any classifier of [0, 1] images, (N, C, H, W) -> logits (N, classes), normalisation included; such as
            ``DefendedModel(target, OnlineAlternateGenerator.for_noise(noise_std))``. Noisy images are held to [0, 1] first:
            that is part of the classifier, and doesn't touch the proof. One that takes ``index`` gets another random stream for
            each draw.
        noise_std: standard deviation of the noise, on the [0, 1] scale; fixed before any image is seen.
        samples: draws that :meth:`forward` averages over.
        batch_size: noisy images that ``model`` sees together, of one or several images.
        seed: an integer repeats noise; None draws fresh entropy in each call, as a defender should.

    Raises:
        ValueError, TypeError: bad arguments.

    Example:
        >>> import torch
        >>> from oag_transform import SmoothedModel
        >>> brighter = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
        >>> _ = brighter[2].weight.data.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 3)), brighter[2].bias.data.zero_()
        >>> (certificate,) = SmoothedModel(brighter, 0.1, seed=0).certify(torch.full((1, 3, 8, 8), 0.6), n=1000)
        >>> certificate.label, 0 < certificate.radius < 0.6 * 192**0.5
        (1, True)
    """

    def __init__(
        self, model: nn.Module, noise_std: float, *, samples: int = 16, batch_size: int = 32, seed: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.noise_std = _checks.number("noise_std", noise_std, above=0)
        self.samples = _checks.integer("samples", samples, at_least=1)
        self.batch_size = _checks.integer("batch_size", batch_size, at_least=1)
        self.seed = _checks.seed(seed)
        self.training = model.training

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """Logits (N, classes): the logarithm of the class probabilities averaged over ``samples`` noisy draws.

        Its gradient is that of the average: noise passes gradients on as they are. Nothing is proven by it; see
        :meth:`certify`.

        Args:
            images: (N, C, H, W), floating point in [0, 1].
            index: random stream of the first image, or a sequence of one for each.

        Raises:
            TypeError, ValueError: not such images, a bad index, or a model that doesn't give logits, or none that are finite.
        """
        _checks.batch(images)
        indices = _checks.indices(index, len(images))
        seed = streams.fresh_seed() if self.seed is None else self.seed
        draws = [
            self._logits(images, indices, [draw] * len(images), AVERAGING, seed).log_softmax(-1) for draw in range(self.samples)
        ]
        return torch.stack(draws).logsumexp(0) - math.log(self.samples)

    def predict(self, images: Tensor, n: int = 100, alpha: float = 0.001, *, index: Any = 0) -> Tensor:
        """The smoothed classifier's class of each image, (N,) int64, or ``ABSTAIN`` (Cohen et al. 2019, ``Predict``).

        Args:
            images: (N, C, H, W), floating point in [0, 1].
            n: draws for each image.
            alpha: probability that a class is not the smoothed classifier's.
            index: see :meth:`forward`.

        Raises:
            TypeError, ValueError: bad images or arguments, or logits that are not finite: nothing is proven by NaN.
            ModuleNotFoundError: SciPy is missing (extra ``certify``).
        """
        binomtest = _binomtest()
        _checks.batch(images)
        n, alpha = _checks.integer("n", n, at_least=1), _checks.number("alpha", alpha, above=0, below=1)
        tallies = [Tally() for _ in images]
        self._count(images, tallies, SELECTION, [n] * len(images), _checks.indices(index, len(images)))
        found = []
        for tally in tallies:
            counts, classes = _seen(tally.selection).topk(2)
            first, second = counts.tolist()
            sure = binomtest(first, first + second, 0.5).pvalue <= alpha
            found.append(int(classes[0]) if sure else ABSTAIN)
        return torch.tensor(found, dtype=torch.int64, device=images.device)

    def certify(
        self,
        images: Tensor,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        *,
        radius: float | None = None,
        index: Any = 0,
        tallies: list[Tally] | None = None,
    ) -> list[Certificate]:
        """Prove a class and a radius for each image (Cohen et al. 2019, ``Certify``).

        Args:
            images: (N, C, H, W), floating point in [0, 1].
            n0: draws that choose the class.
            n: draws that are counted for it.
            alpha: probability that a certificate is wrong. The bound on the probability is Clopper and Pearson's.
            radius: the radius that is wanted. An image is done as soon as it is proven, or as it can't be any more; what is
                proven is then no more than was seen until there. ``alpha`` is split over the four times that it may stop.
            index: see :meth:`forward`.
            tallies: what was counted before, one for each image, such as by a call that was interrupted: it goes on from
                there, and they are kept up to date. Give the same ``index``, and another ``seed`` or the same one.

        Raises:
            TypeError, ValueError: bad images or arguments, or logits that are not finite: nothing is proven by NaN.
            ModuleNotFoundError: SciPy is missing (extra ``certify``).
        """
        _binomtest()
        _checks.batch(images)
        n0, n = _checks.integer("n0", n0, at_least=1), _checks.integer("n", n, at_least=1)
        alpha = _checks.number("alpha", alpha, above=0, below=1)
        if radius is not None:
            radius = _checks.number("radius", radius, above=0)
        indices = _checks.indices(index, len(images))
        tallies = [Tally() for _ in images] if tallies is None else tallies
        if len(tallies) != len(images):
            raise ValueError(f"expected a tally for each of {len(images)} images, got {len(tallies)}")
        self._count(images, tallies, SELECTION, [n0] * len(images), indices)
        looks = [n] if radius is None else sorted({max(1, round(share * n)) for share in LOOKS})
        for look in looks:
            # an interrupted tally is looked at where it would have been, and nowhere else: alpha pays for no more
            done = [
                radius is not None and tally.draws(COUNTING) in looks and not self._open(tally, radius, alpha, len(looks))
                for tally in tallies
            ]
            wanted = [tally.draws(COUNTING) if stop else look for tally, stop in zip(tallies, done, strict=True)]
            self._count(images, tallies, COUNTING, wanted, indices)
        return [certificate(tally, self.noise_std, alpha, len(looks)) for tally in tallies]

    def _open(self, tally: Tally, radius: float, alpha: float, looks: int) -> bool:
        """Whether a radius is neither proven yet nor out of reach: giving up costs no alpha, as nothing is claimed by it."""
        if tally.counted is None:
            return True
        if certificate(tally, self.noise_std, alpha, looks).radius >= radius:
            return False
        count = int(tally.counted[int(_seen(tally.selection).argmax())])
        likely = _binomtest()(count, tally.draws(COUNTING), alternative="less").proportion_ci(1 - GIVE_UP, method="exact").high
        return likely >= NormalDist().cdf(radius / self.noise_std)

    def _count(self, images: Tensor, tallies: list[Tally], purpose: int, wanted: list[int], indices: list[int]) -> None:
        """Draw until each tally has as many draws as are wanted; images take turns, so that batches stay full."""
        seed = streams.fresh_seed() if self.seed is None else self.seed
        missing = [(draw, row) for row, total in enumerate(wanted) for draw in range(tallies[row].draws(purpose), total)]
        for part in _parts(sorted(missing), self.batch_size):
            rows, draws = [row for _, row in part], [draw for draw, _ in part]
            with torch.no_grad(), _checks.rows_are(rows):
                logits = self._logits(images[rows], [indices[row] for row in rows], draws, purpose, seed)
            classes = nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).cpu()
            for row in set(rows):
                tallies[row].add(purpose, classes[[each == row for each in rows]].sum(0))

    def _logits(self, images: Tensor, indices: Sequence[int], draws: Sequence[int], purpose: int, seed: int) -> Tensor:
        # a stream for each image, purpose and draw, of which no two are the same
        own = [((index * 3 + purpose) << 40) + draw for index, draw in zip(indices, draws, strict=True)]
        noisy = streams.add_normal(images, self.noise_std, streams.noise_generators(seed, own, images.device))
        output = self.model(noisy, index=own) if takes_index(self.model) else self.model(noisy)
        return _checks.finite(_checks.logits(output, len(images)))

    def extra_repr(self) -> str:
        """Arguments that are not submodules."""
        return f"noise_std={self.noise_std}, samples={self.samples}, batch_size={self.batch_size}, seed={self.seed}"


def certificate(tally: Tally, noise_std: float, alpha: float, looks: int = 1) -> Certificate:
    """What a tally proves: the class chosen by ``selection``, with the bound on its probability that ``counted`` gives.

    Args:
        tally: with draws of both kinds.
        noise_std: of the noise that they were drawn with.
        alpha: probability that the certificate is wrong.
        looks: number of times that counting was allowed to stop.
    """
    chosen, counted = int(_seen(tally.selection).argmax()), _seen(tally.counted)
    count, n = int(counted[chosen]), int(counted.sum())
    radius = _radius(count, n, noise_std, alpha / looks)
    return Certificate(chosen if radius > 0 else ABSTAIN, radius, count, n, alpha, noise_std, looks, tally)


def lower_bound(count: int, n: int, alpha: float) -> float:
    """Clopper and Pearson's bound: a probability below it gives ``count`` or more of ``n`` less often than ``alpha``."""
    return float(_binomtest()(count, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low)


def _radius(count: int, n: int, noise_std: float, alpha: float) -> float:
    p = lower_bound(count, n, alpha)
    return noise_std * NormalDist().inv_cdf(p) if p > 0.5 else 0.0


def _seen(counts: Tensor | None) -> Tensor:
    if counts is None:
        raise ValueError("expected a tally with draws that chose a class and draws that were counted, got none of one kind")
    return counts


def _parts(pairs: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def _binomtest() -> Any:
    try:
        from scipy.stats import binomtest  # SciPy is not needed for anything else
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "predict and certify need SciPy: pip install 'oag-transform[certify]'", name="scipy"
        ) from error
    return binomtest
