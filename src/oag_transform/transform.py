"""The public transform: kinds of images, chunks, failures, and the gradient."""

import contextlib
import dataclasses
import difflib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import PIL.Image
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision import tv_tensors

from . import _checks, streams
from .generator import energy
from .generator.run import choose_loop, diverged, operands, prepare, synthesise, trajectory
from .generator.settings import PAPER, SIZED, BySize, Settings, argument, meanings, one_of
from .generator.state import State
from .generator.tiles import tiles
from .images import ImageLike, like, to_batch, to_pixels, work_type
from .straight_through import straight_through

Gradient = Literal["straight_through", "none"]
OnFailure = Literal["raise", "return_input"]
CHUNK_PIXELS = 2**14
"""Pixels in a chunk of images on the CPU: operators on fewer pixels take less time than Python needs to call them."""

P = ParamSpec("P")
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Arguments(BySize):
    """The arguments of :class:`OnlineAlternateGenerator`: hyper-parameters, and its behaviour as a transform."""

    seed: int | None = argument(
        None,
        """an integer repeats the result. ``None`` draws fresh entropy from the operating system in each call, as a defender
        should. Global random state is neither read nor changed.""",
        lambda _, value: _checks.seed(value),
    )
    chunk_size: int | None = argument(
        None,
        """number of images that are purified together. ``None``: on the CPU as many images as have 16,384 pixels together, at
        least one, which is the fastest; 32 on other devices.""",
        lambda name, value: None if value is None else _checks.integer(name, value, at_least=1),
    )
    gradient: Gradient = argument(
        "straight_through",
        'gradient of the transform: ``"straight_through"`` is that of the identity (BPDA), ``"none"`` no gradient.',
        one_of(Gradient),
    )
    on_failure: OnFailure = argument(
        "raise",
        """for an image that diverges again at a quarter of the rates: ``"raise"`` a :class:`DivergenceError`, or
        ``"return_input"`` with a warning.""",
        one_of(OnFailure),
    )
    progress: bool = argument(False, "show a progress bar (needs tqdm).", _checks.flag)


class DivergenceError(_checks.OfImages, RuntimeError):
    """The energy network of an image diverged, and diverged again at a quarter of the learning rates.

    Attributes:
        indices: the positions of these images in the batch, which stand in the message for ``{images}``.
    """

    def __init__(self, message: str, indices: Sequence[int] = ()) -> None:  # DataLoader makes it anew from its message
        indices = list(indices)
        super().__init__(message, indices)
        self.indices = indices

    def __str__(self) -> str:
        return str(self.args[0]).replace("{images}", str(self.indices))

    def renamed(self, images: Sequence[int]) -> "DivergenceError":
        """The same error about ``images[r]`` in place of image r."""
        return DivergenceError(self.args[0], sorted({images[row] for row in self.indices}))


class TraceStep(NamedTuple):
    """The state of Algorithm 1 after a network step, for a batch of N images.

    Attributes:
        step: network step t, from 1 to T_N.
        images: the synthesised images, of the same kind, shape and dtype as the input.
        residual: (N,) the root-mean-square difference to the input, in grey levels (0 to 255).
        energy: (N,) the energy U(I_s) = -F(I_s) of the synthesised images, padded to whole strides of the kernels.
        reference_energy: (N,) the energy U(I_z) of the input images, padded likewise, under the same networks.
    """

    step: int
    images: Any
    residual: Tensor
    energy: Tensor
    reference_energy: Tensor


def _with_arguments(arguments: Callable[P, object]) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give ``__init__`` the signature of a dataclass, for ``help`` and for type checkers."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        signature = inspect.signature(arguments)
        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        init.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[owner, *signature.parameters.values()], return_annotation=None
        )
        return init

    return decorate


_REASON: Any = {"reason": _checks.NOT_TRACED} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}


def uncompiled(function: Method) -> Method:
    """Exclude a method from ``torch.compile``, because it draws its own random numbers and works in place."""
    return torch.compiler.disable(function, **_REASON)


class OnlineAlternateGenerator(nn.Module):
    """Purify images: synthesise each image anew with an energy network trained on it alone (Algorithm 1 of the paper).

    A random network of one convolution, a ReLU and a fully connected layer is trained for each image. In alternation, Langevin
    dynamics draw a new image, which starts as zeros. The new image keeps the visible content; structure that is too weak to be
    distinguished from noise is not drawn. Under gray-box FGSM, IGSM, MI-FGSM and C&W, most images get their class back (see
    docs/results.md). There are no pretrained weights. The transform is no protection against adaptive attacks
    (docs/adversaries.md).

    Every argument is a read-only attribute; another setting needs another transform. Arguments that follow the size of the
    image (see :func:`~oag_transform.generator.settings.default_for`) are ``None`` by default, and so are their attributes;
    :meth:`settings_for` gives their values for a size.

    Args:
        {arguments}

    Shape:
        - Input: a PIL image (RGB or L), or a tensor or ``tv_tensors.Image`` of shape (..., C, H, W), C = 1 or 3,
          H and W of at least 2 (``kernel_size`` if it is given); uint8, or float16, bfloat16, float32 or float64 in
          [0, 1]; any device. Or, as for a v2 transform, a sample that contains images; see :meth:`forward`.
        - Output: the same kind, shape, dtype and device. float64 images are computed in float64, all others in float32.

    Each image has its own random stream: ``t(batch)[i]`` is ``t(batch[i], index=i)``, whatever else is in the batch (bit for
    bit where both are computed in chunks of the same size, up to rounding otherwise).

    Raises:
        ValueError, TypeError: bad hyper-parameters, or bad images (see :meth:`forward`).
        DivergenceError: see ``on_failure``.
        RuntimeError: ``backend="triton"`` can't work on these images; the message says why.

    Example:
        >>> import torch
        >>> from oag_transform import OnlineAlternateGenerator
        >>> purify = OnlineAlternateGenerator(network_steps=3, filters=8, seed=0)
        >>> images = torch.rand(2, 3, 32, 32)
        >>> purify(images).shape
        torch.Size([2, 3, 32, 32])
        >>> purify.network_steps
        3
    """

    @_with_arguments(Arguments)
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        if unknown := [name for name in arguments if name not in _NAMES]:
            similar = difflib.get_close_matches(unknown[0], _NAMES, n=1, cutoff=0.75)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}{hint}")
        self.settings = Arguments(**arguments)

    @classmethod
    def paper(cls, **overrides: Any) -> "OnlineAlternateGenerator":
        """The paper's setting: T_N 300, T_I 20 exact Langevin steps, 15 x 15 kernels, PyTorch's initialisation (IV-A, IV-E).

        See :data:`oag_transform.generator.settings.PAPER`. ``overrides`` are keyword arguments of the class.
        """
        return cls(**PAPER | overrides)

    @classmethod
    def for_noise(cls, std: float, **overrides: Any) -> "OnlineAlternateGenerator":
        """The setting for Gaussian noise of a known standard deviation: a denoiser in front of a smoothed classifier.

        It is ``OnlineAlternateGenerator(noise_std=std)``; see :func:`oag_transform.generator.settings.for_noise` and
        :class:`~oag_transform.SmoothedModel`. One view is as good as four there:
        ``DefendedModel(target, OnlineAlternateGenerator.for_noise(0.25), shift=0)``.

        Args:
            std: the standard deviation of the noise, on the [0, 1] scale, above 0 and at most 1.
            overrides: keyword arguments of the class.

        Raises:
            ValueError: ``std`` is out of its range, or bad hyper-parameters.
        """
        return cls(noise_std=std, **overrides)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings")
        return getattr(settings, name) if name in _NAMES and settings is not None else super().__getattr__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_NAMES})  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES:
            raise AttributeError(f"{name} can't be set; make another OnlineAlternateGenerator({name}={value!r}, ...)")
        super().__setattr__(name, value)

    def forward(self, images: Any, *others: Any, index: Any = 0) -> Any:
        """Purified images of the same kind, shape, dtype and device. The input is not modified.

        Args:
            images: an image or a batch; see the class. Or a sample of any nested structure, as for v2 transforms: its images
                are purified; labels, boxes, masks and everything else pass through unchanged. As in v2, a plain tensor is an
                image only if it is the first plain tensor and the sample has no image by type.
            others: the rest of the sample, where it is given as several arguments.
            index: the random stream of the first image; image i of the batch has stream ``index + i`` of the seed. Or a
                sequence with one stream for each image. :func:`oag_transform.streams.index_of` derives a stream from a file's
                name.

        Raises:
            TypeError: no image, or a dtype that is neither uint8 nor floating point.
            ValueError: a PIL mode other than RGB or L, a shape other than (..., 1 or 3, H, W), H or W below 2 or below a given
                ``kernel_size``, NaN or infinity, values outside [0, 1], or a bad ``index``.
            DivergenceError: see the class.
            RuntimeError: see the class; or the transform is exported, traced or vmapped.
        """
        _checks.eager(images)
        return self._sample(images, others, index)

    @uncompiled
    def _sample(self, images: Any, others: tuple[Any, ...], index: Any) -> Any:
        if not others and not isinstance(images, (dict, list, tuple)):
            return self._image(images, *self._checked(images, index))
        leaves, structure = pytree.tree_flatten((images, *others) if others else images)
        at = _images_among(leaves)
        settings = [self._settings_of(leaves[place]) for place in at]
        ends = list(itertools.accumulate(_count(leaves[place]) for place in at))
        chosen = _checks.indices(index, ends[-1])
        parts = [chosen[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        for place, part, own, end in zip(at, parts, settings, ends, strict=True):
            with _checks.rows_are(range(end - len(part), end)):
                leaves[place] = self._image(leaves[place], part, own)
        return pytree.tree_unflatten(leaves, structure)

    def settings_for(self, height: int, width: int) -> Settings:
        """The hyper-parameters for images of this size: the given ones, and the defaults for this size.

        Raises:
            ValueError: a side is below 2 pixels, or the given values conflict with the default for this size: kernels smaller
                than their stride.
        """
        for name, side in (("height", height), ("width", width)):
            _checks.integer(name, side, at_least=2)
        return self.settings.at(height, width)

    def _image(self, images: ImageLike, indices: list[int], settings: Settings) -> ImageLike:
        def purified(plain: Any) -> Any:
            with _plain_mode(work_type(images)[0]):
                return like(self._batch(to_batch(plain), indices, settings), plain)

        if not isinstance(images, Tensor) or not images.is_floating_point() or self.settings.gradient == "none":
            return purified(images)
        result = straight_through(images.as_subclass(Tensor), purified)
        return tv_tensors.wrap(result, like=images) if isinstance(images, tv_tensors.TVTensor) else result

    def _checked(self, images: ImageLike, index: Any) -> tuple[list[int], Settings]:
        """The random streams and the settings of images. Everything that can be wrong with a call is found here."""
        settings = self._settings_of(images)
        return _checks.indices(index, _count(images)), settings

    def _settings_of(self, images: ImageLike) -> Settings:
        _checks.images(images, minimum_size=self.settings.minimum_size)
        settings = self.settings.at(*_sides(images))
        choose_loop(settings, *work_type(images))  # raises where the backend can't work on them
        return settings

    def _batch(self, batch: Tensor, indices: list[int], s: Settings) -> Tensor:
        seed = streams.seed_or_fresh(self.settings.seed)
        purified = torch.empty_like(batch)
        height, width = batch.shape[-2:]
        steps = len(batch) * s.network_steps * len(tiles(height, width, s.tile_size, s.stride))
        with _progress_bar(steps, self.settings.progress) as advance:
            for rows in self.chunks(batch):
                part, failed = synthesise(prepare(batch[rows], s, seed, [indices[row] for row in rows]), advance)
                if failed.any():
                    part = self._handle_failure(part, failed, batch[rows], rows)
                if len(part) == len(batch):
                    return part
                purified[rows] = part
        return purified

    def _handle_failure(self, part: Tensor, failed: Tensor, originals: Tensor, rows: range) -> Tensor:
        message = "the energy network diverged for image(s) {images} of the batch; lower conv_lr and fc_lr or raise scale"
        error = DivergenceError(message, [row for row, bad in zip(rows, failed.tolist(), strict=True) if bad])
        if self.settings.on_failure == "raise":
            raise error
        warnings.warn(f"{error}; returning the input unpurified", stacklevel=_callers_level())
        return torch.where(failed[:, None, None, None], originals, part)

    def trace(self, images: ImageLike, *, every: int = 1, index: Any = 0) -> Iterator[TraceStep]:
        """Iterate over Algorithm 1: a :class:`TraceStep` after each ``every`` network steps, and after the last one.

        The images of the last step are those that :meth:`forward` returns without tiles. All images of the batch advance
        together and without tiles, so memory grows with the batch. There is no gradient and no retry.

        Args:
            images: an image or a batch; see the class.
            every: network steps between two trace steps.
            index: see :meth:`forward`.

        Raises:
            TypeError, ValueError: bad images, ``every`` or ``index``; see :meth:`forward`.
            DivergenceError: images have diverged. All earlier trace steps are finite.
        """
        every = _checks.integer("every", every, at_least=1)
        return self._trace(*self._checked(images, index), images, every)

    def _trace(self, indices: list[int], s: Settings, images: ImageLike, every: int) -> Iterator[TraceStep]:
        batch = to_batch(images)
        seed = streams.seed_or_fresh(self.settings.seed)
        with _plain_mode(batch.device):
            chunks = [prepare(batch[rows], s, seed, [indices[row] for row in rows]) for rows in self.chunks(batch)]
            trajectories = [trajectory(inputs, every) for inputs in chunks]
        while trajectories:
            with _plain_mode(batch.device):
                states = [next(states) for states in trajectories]
                moment = _trace_step(states, images, s)
            yield moment  # outside of the modes above, which would leak into the caller
            if moment.step == s.network_steps:
                return

    def chunks(self, batch: Tensor) -> list[range]:
        """The rows of a batch (N, C, H, W) that are purified together; see ``chunk_size``."""
        pixels = batch.shape[-2] * batch.shape[-1]
        size = self.settings.chunk_size or (max(CHUNK_PIXELS // max(pixels, 1), 1) if batch.device.type == "cpu" else 32)
        return [range(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]

    def extra_repr(self) -> str:
        """Every argument, so that ``repr`` rebuilds the transform, and the dtype that ``compute_dtype=None`` selects."""
        arguments = ", ".join(f"{name}={getattr(self.settings, name)!r}" for name in _NAMES)
        notes = []
        if follow := [name for name in SIZED if getattr(self.settings, name) is None]:
            notes.append(f"# by the size of the image, see settings_for(height, width): {', '.join(follow)}")
        if self.settings.compute_dtype is None:
            notes.append(f"# compute_dtype on this CPU: {operands(self.settings, torch.device('cpu'), torch.float32)}")
        return "\n".join([arguments, *notes])


# arguments are documented where they are declared; python -OO removes the docstring
OnlineAlternateGenerator.__doc__ = (OnlineAlternateGenerator.__doc__ or "").replace(
    "        {arguments}", "\n".join(meanings(Arguments, "        "))
)
_NAMES = tuple(field.name for field in dataclasses.fields(Arguments))


def _callers_level() -> int:
    """The ``stacklevel`` of a warning for the caller: the first frame outside of this package and PyTorch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "torch", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level


def _trace_step(states: list[State], images: ImageLike, settings: Settings) -> TraceStep:
    step, scale = states[0].step, settings.scale
    failed = torch.cat([diverged(state, settings) for state in states]).nonzero().flatten().tolist()
    if failed:
        raise DivergenceError(f"the energy network diverged for image(s) {{images}} by network step {step}", failed)
    energies = torch.cat([energy.energy(energy.responses(s.pair, s.theta), s.theta) for s in states], dim=1)
    synthesised = torch.cat([state.images for state in states])
    residual = synthesised - torch.cat([state.reference for state in states])
    return TraceStep(
        step=step,
        images=like(to_pixels(synthesised, scale), images),
        residual=scale * residual.square().mean((1, 2, 3)).sqrt(),
        energy=energies[1],
        reference_energy=energies[0],
    )


def _sides(images: Any) -> tuple[int, int]:
    """Height and width of an image or a batch of a checked kind."""
    return (images.height, images.width) if isinstance(images, PIL.Image.Image) else (images.shape[-2], images.shape[-1])


def _count(images: Any) -> int:
    """The number of images in an image or a batch of a checked kind."""
    return 1 if isinstance(images, PIL.Image.Image) else images.shape[:-3].numel()


def _images_among(leaves: list[Any]) -> list[int]:
    """The positions of the images in a sample, by the rule of torchvision's v2 transforms."""
    typed = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (PIL.Image.Image, tv_tensors.Image, tv_tensors.Video))]
    if typed:
        return typed
    plain = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, tv_tensors.TVTensor)]
    if not plain:
        raise TypeError(f"expected an image in the sample, got {[type(leaf).__name__ for leaf in leaves]}")
    first, *others = [leaves[i] for i in plain]
    if any(first.is_floating_point() and each.dtype == first.dtype and each.shape == first.shape for each in others):
        warnings.warn(
            "only the first plain tensor of a sample is taken as an image, as in torchvision's v2 transforms; give several "
            "images as a batch, or as tv_tensors.Image",
            stacklevel=_callers_level(),
        )
    return plain[:1]


@contextlib.contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    """Without gradients, the caller's autocast and inference mode: the loop chooses its own precision and works in place."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], object] | None]:
    """A callback that advances a tqdm bar of ``total`` network steps; None if ``show`` is false."""
    if not show:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        warnings.warn("progress=True needs tqdm (pip install tqdm); going on without a bar", stacklevel=_callers_level())
        yield None
        return
    with tqdm(total=total, unit="step", desc="purify", leave=False) as bar:
        yield bar.update
