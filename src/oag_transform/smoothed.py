"""Randomized smoothing (Cohen, Rosenfeld & Kolter 2019): classes that provably don't change within an L2 radius.

Any classifier can be smoothed. Behind :meth:`oag_transform.OnlineAlternateGenerator.for_noise` this is denoised smoothing
(Salman et al. 2020) with a denoiser that needs no training. The proof is about the distribution of the classifier's
predictions under noise. It needs three things: each draw has its own noise and its own purification, the class is selected on
other draws than those that are counted, and the purification depends on the noisy image alone.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _checks, streams
from .defended import applied

ABSTAIN = -1
"""The class of an image for which nothing is proven."""

SELECTION, COUNTING, AVERAGING = range(3)  # the purpose of a draw: each purpose has its own random streams
INTERIM_SHARES = (0.02, 0.1, 0.3, 1.0)  # shares of n after which a certification with a wanted radius may stop
FUTILITY_LEVEL = 0.001  # a radius is out of reach if a class that reaches it would give such counts with less probability


@dataclass
class ClassCounts:
    """How often each class was predicted for one image. An interrupted certification continues from its counts.

    Attributes:
        selection: (classes,) int64 on the CPU, from the draws that select the class; None before the first draw.
        counted: (classes,) int64 on the CPU, from the draws that are counted for the proof; None before the first draw.
    """

    selection: Tensor | None = None
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("selection", "counted"):
            given = getattr(self, name)
            if given is not None and (not isinstance(given, Tensor) or given.dtype != torch.int64 or given.ndim != 1):
                got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(f"{name} must be None or an int64 tensor (classes,), got {got}")
            if given is not None and bool((given < 0).any()):
                raise ValueError(f"{name} must have counts of at least 0, got {given.tolist()}")

    def draws(self, purpose: int) -> int:
        """The number of draws so far for a purpose, ``SELECTION`` or ``COUNTING``."""
        seen = self.selection if purpose == SELECTION else self.counted
        return 0 if seen is None else int(seen.sum())

    def add(self, purpose: int, classes: Tensor) -> None:
        """Add the counts (classes,) int64 of more draws.

        Raises:
            ValueError: another number of classes than before.
        """
        for seen in (self.selection, self.counted):
            if seen is not None and seen.shape != classes.shape:
                raise ValueError(f"expected counts of {len(seen)} classes, as before, got {len(classes)}")
        if purpose == SELECTION:
            self.selection = classes if self.selection is None else self.selection + classes
        else:
            self.counted = classes if self.counted is None else self.counted + classes


@dataclass(frozen=True)
class Certificate:
    """What is proven for one image, with the counts that prove it.

    Attributes:
        label: the class, or ``ABSTAIN``.
        radius: L2 radius, on the [0, 1] scale, within which the smoothed classifier's class is ``label``; 0 for ``ABSTAIN``.
        count: the number of the ``n`` counted draws that gave the selected class.
        n: the number of counted draws. It is smaller than requested where the certification stopped early.
        alpha: upper bound on the probability that the certificate is wrong.
        sigma: standard deviation of the smoothing noise, on the [0, 1] scale.
        analyses: the number of interim analyses at which the certification could stop, the last one included; alpha is split
            equally over them.
        counts: all counts.
    """

    label: int
    radius: float
    count: int
    n: int
    alpha: float
    sigma: float
    analyses: int = 1
    counts: ClassCounts = field(default_factory=ClassCounts, repr=False, compare=False)

    def at(self, alpha: float) -> "Certificate":
        """The certificate that the same counts give for another ``alpha``."""
        alpha = _checks.number("alpha", alpha, above=0, below=1)
        return certificate(self.counts, self.sigma, alpha, self.analyses)


class SmoothedModel(nn.Module):
    """A classifier smoothed by Gaussian noise. It can prove that its class doesn't change within an L2 radius.

    The smoothed classifier predicts the class that ``model`` predicts most often for the image with ``N(0, sigma^2)`` added. If
    ``model`` predicts class A with a probability of at least p > 1/2, no perturbation with an L2 norm below
    ``sigma`` * Phi^-1(p) changes the class (Cohen et al. 2019, Theorem 1). The radius is in units of [0, 1] pixels. The
    L-infinity radius that it implies is smaller by a factor of sqrt(3 H W): 0.33/255 for an L2 radius of 0.5 at 224 x 224.

    Args:
        model: any classifier of [0, 1] images, (N, C, H, W) -> logits (N, classes), normalisation included, such as
            ``DefendedModel(target, OnlineAlternateGenerator.for_noise(sigma), shift=0)``. Noisy images are clipped to [0, 1]
            first. The clipping is part of the classifier and doesn't affect the proof. A model that takes ``index`` gets
            another random stream for each draw.
        sigma: standard deviation of the noise, on the [0, 1] scale. It must be fixed before any image is seen.
        samples: the number of draws that :meth:`forward` averages over.
        batch_size: the number of noisy images in a call of ``model`` by :meth:`predict` and :meth:`certify`; they may belong to
            several images. :meth:`forward` gives it the whole batch, once for each draw.
        seed: an integer repeats the noise. None draws fresh entropy in each call, as a defender should.

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
        self, model: nn.Module, sigma: float, *, samples: int = 16, batch_size: int = 32, seed: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.sigma = _checks.number("sigma", sigma, above=0)
        self.samples = _checks.integer("samples", samples, at_least=1)
        self.batch_size = _checks.integer("batch_size", batch_size, at_least=1)
        self.seed = _checks.seed(seed)
        self.training = model.training

    def forward(self, images: Tensor, *, index: Any = 0) -> Tensor:
        """Logits (N, classes): the log of the class probabilities averaged over ``samples`` noisy draws.

        The gradient is that of the average. This method proves nothing; see :meth:`certify`.

        Args:
            images: (N, C, H, W), floating point in [0, 1].
            index: the random stream of the first image, or a sequence with one stream for each image.

        Raises:
            TypeError, ValueError: bad images, a bad index, a model that doesn't return logits, or logits that are not finite.
        """
        _checks.batch(images)
        indices = _checks.indices(index, len(images))
        seed = streams.seed_or_fresh(self.seed)
        draws = [
            self._logits(images, indices, [draw] * len(images), AVERAGING, seed).log_softmax(-1) for draw in range(self.samples)
        ]
        return torch.stack(draws).logsumexp(0) - math.log(self.samples)

    def predict(self, images: Tensor, n: int = 100, alpha: float = 0.001, *, index: Any = 0) -> Tensor:
        """The smoothed classifier's class of each image, (N,) int64, or ``ABSTAIN`` (Cohen et al. 2019, ``Predict``).

        Args:
            images: (N, C, H, W), floating point in [0, 1].
            n: the number of draws for each image.
            alpha: upper bound on the probability that a returned class is not the smoothed classifier's.
            index: see :meth:`forward`.

        Raises:
            TypeError, ValueError: bad images or arguments, batch normalization in training mode, or logits that are not finite.
            ModuleNotFoundError: SciPy is missing (extra ``certify``).
        """
        binomtest = _binomtest()
        _checks.batch(images)
        n, alpha = _checks.integer("n", n, at_least=1), _checks.number("alpha", alpha, above=0, below=1)
        self._check_independence()
        counts = [ClassCounts() for _ in images]
        self._count(images, counts, SELECTION, [n] * len(images), _checks.indices(index, len(images)))
        labels = []
        for each in counts:
            highest, classes = _drawn(each.selection).topk(2)
            first, second = highest.tolist()
            significant = binomtest(first, first + second, 0.5).pvalue <= alpha
            labels.append(int(classes[0]) if significant else ABSTAIN)
        return torch.tensor(labels, dtype=torch.int64, device=images.device)

    def certify(
        self,
        images: Tensor,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        *,
        radius: float | None = None,
        index: Any = 0,
        counts: list[ClassCounts] | None = None,
    ) -> list[Certificate]:
        """Prove a class and a radius for each image (Cohen et al. 2019, ``Certify``).

        Args:
            images: (N, C, H, W), floating point in [0, 1].
            n0: the number of draws that select the class.
            n: the number of draws that are counted for it.
            alpha: upper bound on the probability that a certificate is wrong. The bound on the class probability is Clopper and
                Pearson's.
            radius: the wanted radius. An image is finished as soon as this radius is proven or out of reach. Its certificate is
                then based on the draws until that point. Four interim analyses decide; ``alpha`` is split equally over them.
            index: see :meth:`forward`.
            counts: earlier counts, one object for each image, such as those of an interrupted call. The certification continues
                from them and updates them in place. ``index``, ``n``, ``alpha`` and ``radius`` must be those of the interrupted
                call: with others ``alpha`` would not cover all analyses. ``seed`` may be the same or another one.

        Raises:
            TypeError, ValueError: bad images or arguments, batch normalization in training mode, or logits that are not finite.
            ModuleNotFoundError: SciPy is missing (extra ``certify``).
        """
        _binomtest()
        _checks.batch(images)
        self._check_independence()
        n0, n = _checks.integer("n0", n0, at_least=1), _checks.integer("n", n, at_least=1)
        alpha = _checks.number("alpha", alpha, above=0, below=1)
        if radius is not None:
            radius = _checks.number("radius", radius, above=0)
        indices = _checks.indices(index, len(images))
        counts = [ClassCounts() for _ in images] if counts is None else counts
        if others := {type(each).__name__ for each in counts if not isinstance(each, ClassCounts)}:
            raise TypeError(f"counts must be ClassCounts, one for each image, got {', '.join(sorted(others))}")
        if len(counts) != len(images):
            raise ValueError(f"expected class counts for each of {len(images)} images, got {len(counts)}")
        if len({id(each) for each in counts}) < len(counts):
            raise ValueError("expected an object of class counts of its own for each image, got one object for several images")
        self._count(images, counts, SELECTION, [n0] * len(images), indices)
        analyses = analyses_of(n, radius)
        for total in analyses:
            # interrupted counts are analysed at the planned numbers of draws alone: alpha is split over no more analyses
            finished = [
                radius is not None
                and each.draws(COUNTING) in analyses
                and not self._undecided(each, radius, alpha, len(analyses))
                for each in counts
            ]
            wanted = [each.draws(COUNTING) if stop else total for each, stop in zip(counts, finished, strict=True)]
            self._count(images, counts, COUNTING, wanted, indices)
        return [certificate(each, self.sigma, alpha, len(analyses)) for each in counts]

    def _check_independence(self) -> None:
        """Raise where the draws of a batch would influence each other: nothing could be proven."""
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"predict and certify need independent draws, but the batch normalization {name!r} normalizes with the "
                    "statistics of the batch; call model.eval()"
                )

    def _undecided(self, counts: ClassCounts, radius: float, alpha: float, analyses: int) -> bool:
        """Whether a radius is neither proven nor out of reach. Stopping for futility claims nothing and costs no alpha."""
        if counts.counted is None:
            return True
        if certificate(counts, self.sigma, alpha, analyses).radius >= radius:
            return False
        count = int(counts.counted[int(_drawn(counts.selection).argmax())])
        test = _binomtest()(count, counts.draws(COUNTING), alternative="less")
        upper_bound = test.proportion_ci(1 - FUTILITY_LEVEL, method="exact").high
        return bool(upper_bound >= NormalDist().cdf(radius / self.sigma))

    def _count(self, images: Tensor, counts: list[ClassCounts], purpose: int, wanted: list[int], indices: list[int]) -> None:
        """Draw until each image has the wanted number of draws. Batches mix images so that they stay full."""
        seed = streams.seed_or_fresh(self.seed)
        done = [each.draws(purpose) for each in counts]
        every = itertools.product(range(max(wanted, default=0)), range(len(counts)))
        missing = ((draw, row) for draw, row in every if done[row] <= draw < wanted[row])
        while part := list(itertools.islice(missing, self.batch_size)):
            rows, draws = [row for _, row in part], [draw for draw, _ in part]
            with torch.no_grad(), _checks.rows_are(rows):
                logits = self._logits(images[rows], [indices[row] for row in rows], draws, purpose, seed)
            classes = nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).cpu()
            for row in set(rows):
                counts[row].add(purpose, classes[[each == row for each in rows]].sum(0))

    def _logits(self, images: Tensor, indices: Sequence[int], draws: Sequence[int], purpose: int, seed: int) -> Tensor:
        # each combination of image, purpose and draw has its own stream
        own = [((index * 3 + purpose) << 40) + draw for index, draw in zip(indices, draws, strict=True)]
        wide = images.to(torch.promote_types(images.dtype, torch.float32))  # the theorem is about noise before any rounding
        noisy = streams.add_normal(wide, self.sigma, streams.noise_generators(seed, own, images.device)).to(images.dtype)
        return _checks.finite(_checks.logits(applied(self.model, noisy, own), len(images)))

    def extra_repr(self) -> str:
        """Arguments that are not submodules."""
        return f"sigma={self.sigma}, samples={self.samples}, batch_size={self.batch_size}, seed={self.seed}"


def certificate(counts: ClassCounts, sigma: float, alpha: float, analyses: int = 1) -> Certificate:
    """The certificate that class counts give: ``selection`` selects the class, ``counted`` bounds its probability.

    Args:
        counts: with draws of both kinds.
        sigma: standard deviation of the noise of the draws, on the [0, 1] scale.
        alpha: upper bound on the probability that the certificate is wrong.
        analyses: the number of interim analyses at which counting could stop, the last one included.

    Raises:
        ValueError: there are no draws of one kind.
    """
    label, counted = int(_drawn(counts.selection).argmax()), _drawn(counts.counted)
    count, n = int(counted[label]), int(counted.sum())
    radius = certified_radius(count, n, sigma, alpha / analyses)
    return Certificate(label if radius > 0 else ABSTAIN, radius, count, n, alpha, sigma, analyses, copy.copy(counts))


def analyses_of(n: int, radius: float | None) -> list[int]:
    """Numbers of draws at which counting up to ``n`` may stop: ``n`` alone where no radius is asked for."""
    return [n] if radius is None else sorted({max(1, round(share * n)) for share in INTERIM_SHARES})


def lower_bound(count: int, n: int, alpha: float) -> float:
    """Clopper and Pearson's lower bound, at confidence 1 - ``alpha``, on a probability that gave ``count`` of ``n`` draws."""
    return float(_binomtest()(count, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low)


def certified_radius(count: int, n: int, sigma: float, alpha: float) -> float:
    """Radius that ``count`` of ``n`` draws prove (Cohen et al. 2019, Theorem 1 and ``Certify``); 0 where they prove none."""
    p = lower_bound(count, n, alpha)
    return sigma * NormalDist().inv_cdf(p) if p > 0.5 else 0.0


def _drawn(counts: Tensor | None) -> Tensor:
    if counts is None:
        raise ValueError("expected class counts with draws for selection and draws for counting, got none of one kind")
    return counts


def _binomtest() -> Any:
    return _checks.from_extra("scipy.stats", "SmoothedModel", "certify").binomtest  # SciPy is not needed for anything else
