"""The loop of :func:`.loop.alternate` as five fused CUDA kernels, for a chunk of images with one network each.

Nothing is unfolded in memory: each product reads its tile of patches directly from the cells (:func:`_patches`). Operands are
in ``compute_dtype`` (float32 is rounded to TF32); sums and state are in float32. An image has P = h * w cells. D and C are
padded with zeros, which stay zero, to sizes that the tensor cores accept. The layout is

    cells (N, h, w, D)    gates, fc (N, h, w, C)    weight (N, C, k, k, D)    bias (N, C)

Results don't depend on the batch: no sum mixes images, sums have a fixed order, and the noise of an image is that of Philox at
(its seed; pixel, number of the draw). The module needs triton and is imported only where it is used.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Generator, Tensor

from . import energy, langevin
from .energy import Parameters
from .settings import Settings
from .state import Inputs, State, begin

CAPTURE = False  # True: record a step as a CUDA graph and replay it; benchmarks.gpu times both
MIN_POSITIONS, MAX_SPLITS = 1024, 16  # cells in a partial sum of the weight gradient, and partial sums of an image


@triton.jit
def _patches(cells, p, j, height, width, K: tl.constexpr, D: tl.constexpr):
    """A tile of the matrix of patches: row p is the K x K window around cell p, column j = (tap, channel); zero outside."""
    tap = j // D
    y = p // width + tap // K - K // 2
    x = p % width + tap % K - K // 2
    inside = (tap < K * K) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(cells + (y * width + x) * D + j % D, mask=inside, other=0.0)


@triton.jit
def _weights(weight, c, j, K: tl.constexpr, D: tl.constexpr):
    """Tile (j, c) of the filters of an image: the right operand of patches @ filters."""
    return tl.load(weight + c * (K * K * D) + j, mask=j < K * K * D, other=0.0)


@triton.jit
def _normal(seed, draw, index):
    """N(0, 1) for number ``index`` among the cells of an image. Draws count from 1; PyTorch's own noise uses 0."""
    zero = index * 0
    a, b, _, _ = tl.philox(seed, index, zero + draw, zero, zero)
    normal, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
    return normal


@triton.jit
def _gate_kernel(
    cells, weight, bias, fc, gates, height, width,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The gates v 1[a > 0] of the responses a = W * I + b."""
    n = tl.program_id(1).to(tl.int64)
    size = height * width
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, K * K * D, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        patches = _patches(cells + n * size * D, p, j[None, :], height, width, K, D)
        filters = _weights(weight + n * C * K * K * D, c, j[:, None], K, D)
        a = tl.dot(patches, filters, a, input_precision="tf32")
    a += tl.load(bias + n * C + c)
    at = n * size * C + p * C + c
    v = tl.load(fc + at, mask=p < size, other=0.0)
    tl.store(gates + at, tl.where(a > 0, v, 0.0).to(gates.dtype.element_ty), mask=p < size)


@triton.jit
def _image_kernel(
    gates, weight, image, image_operand, reference, squares, seeds, draw, deviation, decay, pull, std, height, width,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Eq. 3: I <- decay I + pull I* + std deviation N(0, 1), I* = conv_transpose(gates, W).

    ``deviation`` (N,): the square root of each image's temperature. ``squares``: the sum of squared residuals of each tile.
    """
    n = tl.program_id(1).to(tl.int64)
    size = height * width
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    d = tl.arange(0, D)[None, :]
    mode = tl.zeros((BLOCK_P, D), tl.float32)
    for start in range(0, K * K * C, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        patches = _patches(gates + n * size * C, p, j[None, :], height, width, K, C)
        rotated_tap = K * K - 1 - start // C  # the transpose of a convolution is a convolution with rotated kernels
        c = (j % C)[:, None]
        filters = tl.load(weight + n * C * K * K * D + (c * (K * K) + rotated_tap) * D + d)
        mode = tl.dot(patches, filters, mode, input_precision="tf32")

    normal = tl.load(deviation + n) * _normal(tl.load(seeds + n), tl.load(draw), p * DEPTH + d)
    at = n * size * D + p * D + d
    new = decay * tl.load(image + at, mask=p < size, other=0.0) + pull * mode + tl.where(d < DEPTH, std * normal, 0.0)
    tl.store(image + at, new, mask=p < size)
    tl.store(image_operand + at, new.to(image_operand.dtype.element_ty), mask=p < size)
    residual = tl.where(p < size, new - tl.load(reference + at, mask=p < size, other=0.0), 0.0)
    tl.store(squares + n * tl.num_programs(0) + tl.program_id(0), tl.sum(residual * residual))


@triton.jit
def _contrast_kernel(
    reference, image, weight, bias, fc, velocity, threshold, lr_factor, reference_gates, image_gates, mode_gates, sums,
    fc_lr, momentum, height, width,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Responses of both images; u <- relu(a_z) - relu(a_s) + momentum u; v <- v + lr_factor fc_lr u; the gates.

    Gates are those of both images by the old v (negated for the synthesised image), and of the synthesised image by the new v.
    Brackets of at most ``threshold`` (N, C) are set to 0. ``sums`` (N, tiles, 2, C): sums over the tile of the reference's
    gates and of the difference of gates.
    """
    n = tl.program_id(1).to(tl.int64)
    size = height * width
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    a_z = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    a_s = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, K * K * D, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        filters = _weights(weight + n * C * K * K * D, c, j[:, None], K, D)
        patches_z = _patches(reference + n * size * D, p, j[None, :], height, width, K, D)
        patches_s = _patches(image + n * size * D, p, j[None, :], height, width, K, D)
        a_z = tl.dot(patches_z, filters, a_z, input_precision="tf32")
        a_s = tl.dot(patches_s, filters, a_s, input_precision="tf32")
    b = tl.load(bias + n * C + c)
    a_z += b
    a_s += b

    at = n * size * C + p * C + c
    v = tl.load(fc + at, mask=p < size, other=0.0)
    # stored early, so that registers hold few tiles at once
    gates_z = tl.where(a_z > 0, v, 0.0).to(reference_gates.dtype.element_ty)
    tl.store(reference_gates + at, gates_z, mask=p < size)
    total_z = tl.sum(gates_z.to(tl.float32), 0, keep_dims=True)
    gates_s = tl.where(a_s > 0, -v, 0.0).to(image_gates.dtype.element_ty)
    tl.store(image_gates + at, gates_s, mask=p < size)
    sums += (n * tl.num_programs(0) + tl.program_id(0)) * 2 * C + c
    tl.store(sums, total_z)
    tl.store(sums + C, total_z + tl.sum(gates_s.to(tl.float32), 0, keep_dims=True))

    moved = tl.where(a_z <= 0, 0.0, a_z) - tl.where(a_s <= 0, 0.0, a_s)  # keeps NaN, and so does the next line
    moved = tl.where(tl.abs(moved) <= tl.load(threshold + n * C + c), 0.0, moved)
    moved += momentum * tl.load(velocity + at, mask=p < size, other=0.0).to(tl.float32)
    tl.store(velocity + at, moved.to(velocity.dtype.element_ty), mask=p < size)
    # read again: registers can't keep it
    v = tl.load(fc + at, mask=p < size, other=0.0) + tl.load(lr_factor + n) * fc_lr * moved
    tl.store(fc + at, v, mask=p < size)
    tl.store(mode_gates + at, tl.where(a_s > 0, v, 0.0).to(mode_gates.dtype.element_ty), mask=p < size)


@triton.jit
def _gradient_kernel(
    reference, image, reference_gates, image_gates, partial, height, width,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """``partial`` (N, splits, C, k * k * D): the sum of gates times patches over ``POSITIONS`` cells of both images."""
    n = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    size = height * width
    columns: tl.constexpr = (K * K * D + BLOCK_J - 1) // BLOCK_J
    j = tl.program_id(0) % columns * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    c = tl.program_id(0) // columns * BLOCK_C
    over_p = c + tl.arange(0, BLOCK_C)[None, :]
    gradient = tl.zeros((BLOCK_C, BLOCK_J), tl.float32)
    for start in range(0, POSITIONS, BLOCK_P):
        p = split * POSITIONS + start + tl.arange(0, BLOCK_P)[:, None]
        at = n * size * C + p * C + over_p
        gates_z = tl.load(reference_gates + at, mask=p < size, other=0.0)
        gates_s = tl.load(image_gates + at, mask=p < size, other=0.0)
        patches_z = _patches(reference + n * size * D, p, j, height, width, K, D)
        patches_s = _patches(image + n * size * D, p, j, height, width, K, D)
        gradient = tl.dot(tl.trans(gates_z), patches_z, gradient, input_precision="tf32")
        gradient = tl.dot(tl.trans(gates_s), patches_s, gradient, input_precision="tf32")
    over_c = c + tl.arange(0, BLOCK_C)[:, None]
    at = ((n * tl.num_programs(2) + split) * C + over_c) * (K * K * D) + j
    tl.store(partial + at, gradient, mask=j < K * K * D)


@triton.jit
def _weight_kernel(
    partial, taps, rate, weight, weight_operand,
    SPLITS: tl.constexpr, C: tl.constexpr, KKD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 5: W <- W + rate * taps * (the sum over the splits)."""
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < C * KKD
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + (n * SPLITS + split) * C * KKD + i, mask=there, other=0.0)
    at = n * C * KKD + i
    step = tl.load(rate + n) * tl.load(taps + i % KKD, mask=there, other=0.0)
    new = tl.load(weight + at, mask=there, other=0.0) + step * total
    tl.store(weight + at, new, mask=there)
    tl.store(weight_operand + at, new.to(weight_operand.dtype.element_ty), mask=there)


class Chunk:
    """The state of Algorithm 1 for N images in the layout of the kernels, and its three operations.

    ``start`` is not modified.
    """

    def __init__(self, start: State, settings: Settings, generators: Sequence[Generator], strength: Tensor) -> None:
        self.start, self.settings = start, settings
        pair, theta, shape, s = start.pair, start.theta, start.shape, settings
        self.strength, self.deviation = strength, strength.sqrt()
        self.count = shape[0]
        self.depth, self.k = theta.weight.shape[1], theta.weight.shape[-1]
        self.grid = theta.fc.shape[-2:]
        self.size = self.grid[0] * self.grid[1]
        self.D = max(16, triton.next_power_of_2(self.depth))
        self.block_c = min(64, max(16, triton.next_power_of_2(s.filters)))
        self.C = triton.cdiv(s.filters, self.block_c) * self.block_c
        self.dims = {"K": self.k, "C": self.C, "D": self.D}
        dtype = s.compute_dtype or torch.float32
        # rows of 128 bytes: their stages fit into the 99 KB of shared memory of the smallest supported GPUs
        self.block_p, self.block_j = 128, 128 // dtype.itemsize
        self.tiles = triton.cdiv(self.size, self.block_p)
        self.positions = triton.next_power_of_2(max(min(self.size, MIN_POSITIONS), triton.cdiv(self.size, MAX_SPLITS)))
        self.splits = triton.cdiv(self.size, self.positions)

        grouped = (self.count, -1)
        self.reference, self.image = _pack(pair.unflatten(1, grouped), self.D).unbind()
        self.reference_operand, self.image_operand = self.reference.to(dtype), self.image.to(dtype)
        self.fc = _pack(theta.fc[0].unflatten(0, grouped), self.C)
        missing = self.C - s.filters
        self.weight = F.pad(_pack(theta.weight.unflatten(0, grouped), self.D), (0,) * 7 + (missing,))
        self.weight_operand = self.weight.to(dtype)
        self.bias = F.pad(theta.bias.unflatten(0, grouped), (0, missing))
        taps = energy.kernel_to_cells(pair.new_ones(shape[1], s.kernel_size, s.kernel_size), s.stride)
        self.taps = _pack(taps, self.D)

        new = pair.new_empty
        self.mode_gates, self.reference_gates, self.image_gates = (torch.empty_like(self.fc, dtype=dtype) for _ in range(3))
        self.velocity = torch.zeros_like(self.fc, dtype=dtype)
        self.squares, self.sums = new(self.count, self.tiles), new(self.count, self.tiles, 2, self.C)
        self.partial = new(self.count, self.splits, self.C, self.k**2 * self.D)
        self.lr_factor, self.best = pair.new_ones(self.count), pair.new_full((self.count,), torch.inf)
        self.seeds = torch.tensor([generator.initial_seed() for generator in generators], device=pair.device)
        self.draw = torch.zeros((), dtype=torch.int32, device=pair.device)

    def respond(self) -> None:
        """Compute the gates of the synthesised image from its own responses."""
        _gate_kernel[self.tiles, self.count, self.C // self.block_c](
            self.image_operand, self.weight_operand, self.bias, self.fc, self.mode_gates, *self.grid,
            **self.dims, BLOCK_P=self.block_p, BLOCK_C=self.block_c, BLOCK_J=self.block_j, num_warps=4, num_stages=3,
        )  # fmt: skip

    def image_step(self, decay: float, std: float) -> None:
        """Eq. 3 with fixed gates; see :func:`.langevin.step`."""
        self.draw += 1
        _image_kernel[self.tiles, self.count](
            self.mode_gates, self.weight_operand, self.image, self.image_operand, self.reference,
            self.squares, self.seeds, self.draw, self.deviation, decay, 1 - decay, std, *self.grid,
            **self.dims, DEPTH=self.depth, BLOCK_P=self.block_p,
            BLOCK_J=min(self.block_j, self.block_c), num_warps=4 if self.D < 64 else 8, num_stages=3,
        )  # fmt: skip

    def network_step(self) -> None:
        """Eq. 5, with the rates of ``adaptive_lr``. Gates for the next image have the new v and the mask of the old network."""
        s = self.settings
        if s.adaptive_lr:
            residual = self.squares.sum(1)  # the sum serves as the mean: it is compared with other sums of this image
            lr_factor, best = energy.slow_down(self.lr_factor, self.best, residual)
            self.lr_factor.copy_(lr_factor)  # in place, as a CUDA graph needs it
            self.best.copy_(best)
        threshold = s.threshold * self.strength[:, None] * energy.noise_response(self.weight_operand)
        _contrast_kernel[self.tiles, self.count, self.C // self.block_c](
            self.reference_operand, self.image_operand, self.weight_operand, self.bias, self.fc, self.velocity, threshold,
            self.lr_factor, self.reference_gates, self.image_gates, self.mode_gates, self.sums, s.fc_lr, s.momentum, *self.grid,
            **self.dims, BLOCK_P=self.block_p, BLOCK_C=self.block_c, BLOCK_J=self.block_j, num_warps=8, num_stages=3,
        )  # fmt: skip
        block_j = 2 * self.block_j
        columns = triton.cdiv(self.k**2 * self.D, block_j)
        _gradient_kernel[columns * (self.C // self.block_c), self.count, self.splits](
            self.reference_operand, self.image_operand, self.reference_gates, self.image_gates, self.partial, *self.grid,
            **self.dims, POSITIONS=self.positions,
            BLOCK_P=self.block_j, BLOCK_C=self.block_c, BLOCK_J=block_j, num_warps=4, num_stages=3,
        )  # fmt: skip
        sums = self.sums.sum(1)
        rate = self.lr_factor * s.conv_lr
        if s.adaptive_lr:
            curvature = self.k**2 * (sums[:, 0] / self.size).square().sum(1)
            rate = self.lr_factor * (energy.STABLE / curvature).clamp(max=s.conv_lr)
        rate = rate / self.size
        self.bias.addcmul_(sums[:, 1], rate[:, None])
        block = 1024
        _weight_kernel[triton.cdiv(self.weight[0].numel(), block), self.count](
            self.partial, self.taps, rate, self.weight, self.weight_operand,
            SPLITS=self.splits, C=self.C, KKD=self.k**2 * self.D, BLOCK=block, num_warps=4,
        )  # fmt: skip

    def snapshot(self, step: int) -> State:
        """A copy of the current state."""
        filters = self.settings.filters
        theta = Parameters(
            _unpack(self.weight[:, :filters], self.depth).flatten(0, 1),
            self.bias[:, :filters].flatten(),
            _unpack(self.fc, filters).flatten(0, 1)[None],
            self.count,
        )
        pair = _unpack(torch.stack([self.reference, self.image]), self.depth).flatten(1, 2)
        return self.start._replace(step=step, pair=pair, theta=theta.copy())


def alternate(inputs: Inputs, every: int) -> Iterator[State]:
    """Algorithm 1; see :func:`.loop.alternate`."""
    s = inputs.settings
    start, generators = begin(inputs)
    chunk = Chunk(start, s, generators, inputs.strength)
    updates, steps_per_update = s.image_updates
    decay, std = langevin.law(s.step_size, steps_per_update)

    def image_update() -> None:
        if s.langevin == "exact":
            chunk.respond()
        chunk.image_step(decay, std)

    with _on(chunk.image):
        chunk.respond()
    image_update, network_step = _replayed(image_update, chunk.image), _replayed(chunk.network_step, chunk.image)
    for step in range(1, s.network_steps + 1):
        for _ in range(updates):
            image_update()
        if step % every == 0 or step == s.network_steps:
            yield chunk.snapshot(step)
        if step < s.network_steps:  # nothing uses the network update after the last image
            network_step()


def _replayed(work: Callable[[], None], like: Tensor) -> Callable[[], None]:
    """``work`` on the device of ``like``; with ``CAPTURE``, its CUDA graph from the second call on.

    The first call compiles the kernels, and a compilation can't be captured.
    """
    graph: torch.cuda.CUDAGraph | None = None
    calls = 0

    def call() -> None:
        nonlocal graph, calls
        calls += 1
        with _on(like):
            if calls == 1 or not (CAPTURE and like.is_cuda):
                work()
                return
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    work()
            graph.replay()

    return call


def _on(like: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


def _pack(tensor: Tensor, channels: int) -> Tensor:
    """(..., channels, rows, columns) -> (..., rows, columns, padded channels)."""
    last = tensor.movedim(-3, -1)
    return F.pad(last, (0, channels - last.shape[-1])).contiguous()


def _unpack(packed: Tensor, channels: int) -> Tensor:
    return packed[..., :channels].movedim(-1, -3)
