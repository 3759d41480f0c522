"""The public transform: hyper-parameters, kinds of input, chunks, and the gradient that a caller sees."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from . import energy, streams
from .backend import Backend, fused
from .generate import Init, Langevin, Settings, State, alternate, diverged, image_of, purify
from .images import ImageLike, check, like, to_batch, to_model_units, to_pixels

Gradient = Literal["straight_through", "none"]
OnFailure = Literal["raise", "return_input"]


class DivergenceError(RuntimeError):
    """The energy network of an image diverged, also at a quarter of the learning rates."""


class TraceStep(NamedTuple):
    """One moment of Algorithm 1, for a batch of N images.

    Attributes:
        step: network step t, from 1 to T_N.
        images: the synthesised images, of the same kind, shape and dtype as the input.
        residual: (N,) root-mean-square difference to the input, in grey levels (0 to 255).
        energy: (N,) energy U(I_s) = -F(I_s) of the synthesised images.
        reference_energy: (N,) energy U(I_z) of the input images under the same networks.
    """

    step: int
    images: Any
    residual: Tensor
    energy: Tensor
    reference_energy: Tensor


class OnlineAlternateGenerator(nn.Module):
    """Purify images: synthesise each one anew with an energy network trained on it alone (Algorithm 1 of the paper).

    A random network of one convolution, a ReLU and a fully connected layer is trained for each image while, in turns with
    it, a new image is drawn from zeros by Langevin dynamics. The new image keeps what the image shows and loses most of a
    small adversarial perturbation that was computed without knowledge of the defence. There are no pretrained weights.
    It is no protection against an attacker who knows it is there and attacks through it (see the README).

    Args:
        network_steps: T_N, updates of the network. More of them keep more detail, adversarial noise included.
        image_steps: T_I, Langevin steps of the image for each update of the network.
        kernel_size: side of the convolution's kernels in pixels.
        stride: stride of the convolution in pixels.
        filters: number of filters of the convolution.
        noise: e_g of Eq. 3, the noise of one Langevin step, in model units.
        conv_lr: beta of Eq. 5 for the convolution, per position: the gradient is averaged over positions.
        fc_lr: beta of Eq. 5 for the fully connected layer.
        threshold: a weight of the fully connected layer takes a step only where the bracket of Eq. 5 is more than so many
            times the standard deviation that Langevin noise of full strength alone gives it. 0: always, as in the paper. What
            is too weak for it, most of an adversarial perturbation among it, never enters the image.
        scale: grey levels (of 255) in a model unit. At full strength the synthesised image carries noise of about this standard
            deviation.
        strength: temperature of the Langevin dynamics, and share of the contrast that ``threshold`` asks for, above 0 and at
            most 1: the noise goes as its square root. ``None``: what the noise of each image calls for, so that clean
            photographs keep more (:func:`oag_transform.noise_level.strength`). ``1`` doesn't rely on an attack showing up as
            noise, as one does less that is smooth, lies in a small part of the image, or was resized or saved as JPEG.
        init: ``"gabor"``: random Gabor functions, see :func:`oag_transform.energy.gabor_kernels`; ``"uniform"``: PyTorch's
            initialisation.
        langevin: ``"exact"`` takes the T_I steps of Eq. 3 one by one; ``"closed_form"`` draws them at once from their law
            with the ReLU mask held (Eq. 9 and 10), at a T_I-th of the cost. ``"closed_form"`` takes that mask from the
            convolution of the last network step, so it is one update of W behind.
        adaptive_lr: which rates are stable depends on the image. ``True`` holds ``conv_lr`` to half the inverse of the
            curvature that the image gives it (flat areas give more), and halves both rates of an image each time its residual
            rises by over 5%. ``False`` is Eq. 5 as it stands.
        compute_dtype: precision of the convolutions' operands; the state and everything else stays in float32 (float64 for
            float64 images). ``None``: the same. ``torch.bfloat16`` is faster on a CPU with AVX512-BF16 or AMX.
        backend: ``"torch"`` runs the network step as PyTorch operators on any device; ``"triton"`` as fused CUDA kernels, which
            need an NVIDIA GPU of compute capability 8.0 or higher and triton, take no float64 images, and round float32
            operands to TF32. ``"auto"`` is ``"torch"`` until the kernels have been measured on a GPU: so far they ran in
            Triton's interpreter only. The two draw different noise.
        seed: an integer repeats the result; ``None`` draws fresh entropy from the system in each call, as a defender
            should. Global random state is neither read nor changed.
        chunk_size: images that are worked on together. ``None``: 1 on the CPU, where that is fastest, 32 elsewhere.
        gradient: what a backward pass sees: ``"straight_through"`` the identity (BPDA), ``"none"`` nothing at all.
        on_failure: for an image that diverges even at a quarter of the rates: ``"raise"`` a :class:`DivergenceError`, or
            ``"return_input"`` with a warning.
        progress: show a progress bar (needs tqdm).

    Shape:
        - Input: a PIL image (RGB or L), or a tensor or ``tv_tensors.Image`` of shape (..., C, H, W), C = 1 or 3,
          H, W >= ``kernel_size``; uint8, or float16, bfloat16, float32 or float64 in [0, 1]; any device.
        - Output: the same kind, shape, dtype and device. float64 is computed in float64, all else in float32.

    Each image has a random stream of its own: ``t(batch)[i]`` is ``t(batch[i], index=i)``, whatever else is in the batch
    (bit for bit where both are computed in chunks of the same size, to rounding otherwise).

    Raises:
        ValueError, TypeError: bad hyper-parameters, or bad images (see :func:`oag_transform.images.check`).
        DivergenceError: see ``on_failure``.
        RuntimeError: ``backend="triton"`` can't work on these images, and why.

    Example:
        >>> import torch
        >>> from oag_transform import OnlineAlternateGenerator
        >>> purify = OnlineAlternateGenerator(network_steps=3, filters=8, seed=0)
        >>> images = torch.rand(2, 3, 32, 32)
        >>> purify(images).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        *,
        network_steps: int = 12,
        image_steps: int = 20,
        kernel_size: int = 9,
        stride: int = 3,
        filters: int = 128,
        noise: float = 0.3,
        conv_lr: float = 1.2e-3,
        fc_lr: float = 0.06,
        threshold: float = 7.5,
        scale: float = 6.5,
        strength: float | None = None,
        init: Init = "gabor",
        langevin: Langevin = "closed_form",
        adaptive_lr: bool = True,
        compute_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
        seed: int | None = None,
        chunk_size: int | None = None,
        gradient: Gradient = "straight_through",
        on_failure: OnFailure = "raise",
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.settings = Settings(
            network_steps=network_steps,
            image_steps=image_steps,
            kernel_size=kernel_size,
            stride=stride,
            filters=filters,
            noise=noise,
            conv_lr=conv_lr,
            fc_lr=fc_lr,
            threshold=threshold,
            scale=scale,
            strength=strength,
            init=init,
            langevin=langevin,
            adaptive_lr=adaptive_lr,
            compute_dtype=compute_dtype,
            backend=backend,
        )
        if seed is not None:
            check_natural("seed", seed)
        if chunk_size is not None:
            check_natural("chunk_size", chunk_size, minimum=1)
        if gradient not in ("straight_through", "none"):
            raise ValueError(f"gradient must be 'straight_through' or 'none', got {gradient!r}")
        if on_failure not in ("raise", "return_input"):
            raise ValueError(f"on_failure must be 'raise' or 'return_input', got {on_failure!r}")
        self.seed = seed
        self.chunk_size = chunk_size
        self.gradient = gradient
        self.on_failure = on_failure
        self.progress = progress

    @classmethod
    def paper(cls, **overrides: Any) -> "OnlineAlternateGenerator":
        """The paper's setting: T_N 300, T_I 20 exact Langevin steps, 15 x 15 kernels, PyTorch's initialisation (IV-A, IV-E).

        The paper leaves filters, stride, e_g, beta and the colour range open. The rates here were chosen on clean and
        Gaussian-noised photographs (25 of each): accuracy stays within one image from step 200 to 300, and none diverges.
        ``overrides`` are keyword arguments of the class.
        """
        faithful: dict[str, Any] = {
            "network_steps": 300,
            "image_steps": 20,
            "kernel_size": 15,
            "init": "uniform",
            "langevin": "exact",
            "adaptive_lr": False,
            "filters": 64,
            "stride": 3,
            "noise": 0.3,
            "scale": 8.0,
            "conv_lr": 3e-5,
            "fc_lr": 0.01,
            "threshold": 0.0,
            "strength": 1.0,
        }
        return cls(**(faithful | overrides))

    def forward(self, images: ImageLike, *, index: int = 0) -> ImageLike:
        """Purified images of the same kind, shape, dtype and device; the input is not modified.

        Args:
            images: see the class.
            index: random stream of the first image; image i of the batch uses stream ``index + i`` of the seed.
        """
        check(images, minimum_size=self.settings.kernel_size)
        check_natural("index", index)
        batch = self._batch(images)
        with _plain_mode(batch.device):
            result = like(self._purify(batch, index), images)
        if isinstance(images, Tensor) and images.requires_grad and self.gradient == "straight_through":
            plain = _StraightThrough.apply(images.as_subclass(Tensor), result.as_subclass(Tensor))
            return tv_tensors.wrap(plain, like=images) if isinstance(images, tv_tensors.TVTensor) else plain
        return result

    def _batch(self, images: ImageLike) -> Tensor:
        batch = to_batch(images)
        fused(self.settings.backend, batch.device, batch.dtype, self.settings.stride)  # raises where "triton" can't run
        return batch

    def _purify(self, batch: Tensor, index: int) -> Tensor:
        seed = streams.fresh_seed() if self.seed is None else self.seed
        purified = torch.empty_like(batch)
        with _progress_bar(len(batch) * self.settings.network_steps, self.progress) as advance:
            for rows in self.chunks(batch):
                part, failed = purify(batch[rows], self.settings, seed, [index + row for row in rows], advance)
                if failed.any():
                    part = self._handle_failure(part, failed, batch[rows], rows)
                purified[rows] = part
        return purified

    def _handle_failure(self, part: Tensor, failed: Tensor, originals: Tensor, rows: range) -> Tensor:
        names = [row for row, bad in zip(rows, failed.tolist(), strict=True) if bad]
        message = f"the energy network diverged for image(s) {names} of the batch; lower conv_lr and fc_lr or raise scale"
        if self.on_failure == "raise":
            raise DivergenceError(message)
        warnings.warn(f"{message}; returning the input unpurified", stacklevel=6)
        return torch.where(failed[:, None, None, None], originals, part)

    def trace(self, images: ImageLike, *, every: int = 1, index: int = 0) -> Iterator[TraceStep]:
        """Iterate over Algorithm 1: a :class:`TraceStep` after each ``every`` network steps, and after the last one.

        The last step's images are what :meth:`forward` returns. All images of the batch advance together, so memory grows
        with the batch. There is no gradient and no second try.

        Raises:
            DivergenceError: the images have diverged; what was yielded before is finite.
        """
        check(images, minimum_size=self.settings.kernel_size)
        check_natural("index", index)
        check_natural("every", every, minimum=1)
        return self._trace(self._batch(images), images, every, index)

    def _trace(self, batch: Tensor, images: ImageLike, every: int, index: int) -> Iterator[TraceStep]:
        seed = streams.fresh_seed() if self.seed is None else self.seed
        chunks = self.chunks(batch)
        if not chunks:
            return
        with _plain_mode(batch.device):
            references = [to_model_units(batch[rows], self.settings.scale) for rows in chunks]
            runs = [
                alternate(part, self.settings, streams.generators(seed, [index + row for row in rows], batch.device))
                for part, rows in zip(references, chunks, strict=True)
            ]
        for step in range(1, self.settings.network_steps + 1):
            with _plain_mode(batch.device):
                states = [next(run) for run in runs]
                if step % every and step != self.settings.network_steps:
                    continue
                moment = self._trace_step(states, torch.cat(references), images)
            yield moment  # outside of the modes above, which would leak into the caller

    def _trace_step(self, states: list[State], reference: Tensor, images: ImageLike) -> TraceStep:
        shapes = [(state.theta.groups, *reference.shape[1:]) for state in states]
        synthesised = torch.cat([image_of(state, self.settings, shape) for state, shape in zip(states, shapes, strict=True)])
        failed = diverged(synthesised, reference, self.settings.noise)
        if failed.any():
            names = failed.nonzero().flatten().tolist()
            raise DivergenceError(f"the energy network diverged for image(s) {names} by network step {states[0].step}")
        energies = torch.cat([energy.energy(energy.responses(s.pair, s.theta), s.theta) for s in states], dim=1)
        return TraceStep(
            step=states[0].step,
            images=like(to_pixels(synthesised, self.settings.scale), images),
            residual=self.settings.scale * (synthesised - reference).square().mean((1, 2, 3)).sqrt(),
            energy=energies[1],
            reference_energy=energies[0],
        )

    def chunks(self, batch: Tensor) -> list[range]:
        """Rows of a batch (N, C, H, W) that are worked on together; see ``chunk_size``."""
        # one image at a time keeps the state of a CPU run in its caches
        size = self.chunk_size or (1 if batch.device.type == "cpu" else 32)
        return [range(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]

    def extra_repr(self) -> str:
        """Every argument, so that ``repr`` rebuilds the transform."""
        arguments = dataclasses.asdict(self.settings) | {
            name: getattr(self, name) for name in ("seed", "chunk_size", "gradient", "on_failure", "progress")
        }
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


class _StraightThrough(torch.autograd.Function):
    """Value of ``result``, gradient of the identity in ``images``: the BPDA of Athalye et al. (2018)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, result: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


@contextlib.contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    """No gradients, and none of the caller's autocast: the loop chooses its own precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], object] | None]:
    """A callback that advances a tqdm bar of ``total`` network steps, or None where none is wanted."""
    if not show:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        warnings.warn("progress=True needs tqdm (pip install tqdm); going on without a bar", stacklevel=7)
        yield None
        return
    with tqdm(total=total, unit="step", desc="purify", leave=False) as bar:
        yield bar.update


def check_natural(name: str, value: Any, minimum: int = 0) -> None:
    """Raise a ValueError unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
