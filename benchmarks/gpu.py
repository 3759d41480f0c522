"""Speed and memory on a GPU: fused kernels, PyTorch operators, the plain reference and peers, in one run.

python -m benchmarks.gpu            (from the repository; on a machine without a GPU, the rows that run on the CPU)

Rates count the products and the memory traffic that the method needs (``work``). The two ceilings are measured in the same run.
The fused kernels are reported only if they agree with the PyTorch operators on the same images.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oag_transform import OnlineAlternateGenerator, streams
from oag_transform.baselines.catalogue import Needs, by_key
from oag_transform.generator import energy, loop, reference
from oag_transform.generator.settings import Settings
from oag_transform.generator.state import Inputs

from .speed import operations, plain_settings, sample_images, seconds

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """See :func:`.speed.seconds`."""
    return 1e3 * seconds(work, repeats)


def peak_memory(work: Callable[[], object]) -> float:
    """MiB on the GPU that ``work`` takes at its peak, beyond what was there; NaN without a GPU."""
    if not GPU:
        return math.nan
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings() -> tuple[dict[torch.dtype, float], float]:
    """TFLOP/s of a large matrix product, float32 as TF32, and GB/s, read and written, of a large copy."""
    n, size = (8192, 2**31) if GPU else (1024, 2**26)
    rates = {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        rates[dtype] = 2 * n**3 / milliseconds(functools.partial(torch.mm, a, b), 20) / 1e9
    torch.set_float32_matmul_precision(precision)
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return rates, 2 * size / milliseconds(lambda: target.copy_(source), 20) / 1e6


def work_of_kernels(s: Settings, size: int) -> dict[str, tuple[float, float]]:
    """Floating-point operations and bytes of each kernel for an image, each of its tensors read or written once."""
    cells, k = math.ceil(size / s.stride) ** 2, energy.kernel_cells(s.kernel_size, s.stride)
    depth, filters, low = 3 * s.stride**2, s.filters, (s.compute_dtype or torch.float32).itemsize
    product = operations(s, size, 1)
    weights = filters * depth * k**2
    return {
        # operand, W and v read, gates written
        "_gate_kernel": (product, cells * (low * depth + (4 + low) * filters) + low * weights),
        # float32 read and written, its operand written, the gates and W read; reference: read for the residual
        "_image_kernel": (product, cells * (12 * depth + low * (depth + filters)) + low * weights),
        # both operands and W read, v and its velocity read and written, three gates written
        "_contrast_kernel": (2 * product, cells * (2 * low * depth + (8 + 5 * low) * filters) + low * weights),
        # operands and gates of both read, sums written
        "_gradient_kernel": (2 * product, cells * 2 * low * (depth + filters) + 4 * weights),
        # sums read, W read and written, its operand written
        "_weight_kernel": (0, (12 + low) * weights),
    }


def work(transform: OnlineAlternateGenerator, size: int) -> tuple[float, float]:
    """Floating-point operations and bytes for an image, over a whole run."""
    s = transform.settings_for(size, size)
    kernels = work_of_kernels(s, size)
    image = ["_image_kernel"] if s.langevin == "closed_form" else ["_gate_kernel", "_image_kernel"] * s.image_steps
    runs = image * s.network_steps + ["_contrast_kernel", "_gradient_kernel", "_weight_kernel"] * (s.network_steps - 1)
    return sum(kernels[name][0] for name in runs), sum(kernels[name][1] for name in runs)


def agree(fused: OnlineAlternateGenerator, images: Tensor) -> None:
    """Raise unless fused kernels and PyTorch operators leave the same residual, to 3%, on each image; their noise differs."""
    plain = copy(fused, backend="torch")
    residuals = [list(t.trace(images, every=t.settings.network_steps))[-1].residual for t in (fused, plain)]
    torch.testing.assert_close(*residuals, rtol=0.03, atol=0)


def copy(transform: OnlineAlternateGenerator, **overrides: Any) -> OnlineAlternateGenerator:
    """The same transform with other arguments."""
    return OnlineAlternateGenerator(**dataclasses.asdict(transform.settings) | {"seed": 0} | overrides)


def variants(network_steps: int, paper_steps: int) -> Iterator[tuple[str, OnlineAlternateGenerator, float, bool]]:
    """Name, transform, by how much its time is scaled up, and whether a step is captured as a CUDA graph."""
    default = OnlineAlternateGenerator(network_steps=network_steps, seed=0)
    paper = OnlineAlternateGenerator.paper(network_steps=paper_steps, seed=0)
    scale = OnlineAlternateGenerator.paper().settings.network_steps / paper_steps
    for name, transform, factor in (("default", default, 1.0), (f"paper(), from {paper_steps} steps", paper, scale)):
        for dtype in (torch.float32, torch.bfloat16):
            precision = str(dtype).removeprefix("torch.")
            yield f"{name}, PyTorch, {precision}", copy(transform, compute_dtype=dtype, backend="torch"), factor, False
            if GPU:
                fused = copy(transform, compute_dtype=dtype, backend="triton")
                yield f"{name}, fused, {precision}", fused, factor, False
                yield f"{name}, fused, {precision}, CUDA graph", fused, factor, True


def moves(images: Tensor, repeats: int) -> Iterator[tuple[str, float, int]]:
    """The fused moves alone, for all images at once: name, milliseconds, and the number of products for each image."""
    from oag_transform.generator.fused import Chunk

    for dtype in (torch.float32, torch.bfloat16):
        chunk = Chunk(*chunk_arguments(images, copy(OnlineAlternateGenerator(), compute_dtype=dtype)))
        name = str(dtype).removeprefix("torch.")
        yield f"respond, {name}", milliseconds(chunk.respond, repeats), 1
        yield f"image_step, {name}", milliseconds(functools.partial(chunk.image_step, 0.9, 0.1), repeats), 1
        yield f"network_step, {name}", milliseconds(chunk.network_step, repeats), 4


def chunk_arguments(images: Tensor, transform: OnlineAlternateGenerator) -> tuple[Any, ...]:
    """What a fused chunk is made of, after the first image update."""
    s = transform.settings_for(*images.shape[-2:])
    inputs = Inputs(images, s, images.new_ones(len(images)), 0, range(len(images)))
    generators = streams.generators(inputs.seed, inputs.indices, images.device)
    return next(loop.alternate(inputs, every=1)), s, generators, inputs.strength


def products(images: Tensor, dtype: torch.dtype, repeats: int) -> Iterator[tuple[str, float]]:
    """The three products of the PyTorch path for all images at once, as grouped convolutions and as batched matrix products."""
    state = chunk_arguments(images, OnlineAlternateGenerator())[0]
    theta, cells, count = state.theta.cast(dtype), state.pair[1:].to(dtype), len(images)
    gates = energy.gate(energy.responses(cells, theta), theta)
    k, size = theta.weight.shape[-1], cells.shape[-2:]
    weight = theta.weight.unflatten(0, (count, -1)).flatten(2)
    single = cells.unflatten(1, (count, -1))[0]

    def unfolded() -> Tensor:
        return F.unfold(single, k, padding=k // 2)

    def flat() -> Tensor:
        return gates[0].unflatten(0, (count, -1)).flatten(2)

    def folded() -> Tensor:
        return F.fold(weight.mT @ flat(), size, k, padding=k // 2)

    def contiguous(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.contiguous_format)

    plain = theta._replace(weight=contiguous(theta.weight))
    plain_cells, plain_gates = contiguous(cells), contiguous(gates)
    bias = theta.bias.unflatten(0, (count, -1))[..., None]
    ways: dict[str, list[tuple[str, Callable[[], Tensor]]]] = {
        "responses": [
            ("grouped, channels last", lambda: energy.responses(cells, theta)),
            ("grouped, contiguous", lambda: energy.responses(plain_cells, plain)),
            ("unfold + bmm", lambda: torch.baddbmm(bias, weight, unfolded())),
        ],
        "image gradient": [
            ("grouped, channels last", lambda: energy.image_gradient(gates, theta)),
            ("grouped, contiguous", lambda: energy.image_gradient(plain_gates, plain)),
            ("bmm + fold", folded),
        ],
        "weight gradient": [
            ("grouped, channels last", lambda: energy.weight_gradient(cells, gates, theta)),
            ("grouped, contiguous", lambda: energy.weight_gradient(plain_cells, plain_gates, plain)),
            ("unfold + bmm", lambda: flat() @ unfolded().mT),
        ],
    }
    for product, kinds in ways.items():
        expected = kinds[0][1]().float()
        for name, way in kinds:
            difference = (way().float().reshape(expected.shape) - expected).norm() / expected.norm()
            if not difference < 0.02:
                raise RuntimeError(f"{product} by {name} differs from grouped convolution by {difference:.2g}")
            yield f"{product}, {name}", milliseconds(way, repeats)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256] if GPU else [1, 8])
    parser.add_argument("--large", type=int, default=512, help="size of one more batch, of 8; 0: none")
    parser.add_argument("--network-steps", type=int, default=OnlineAlternateGenerator().settings.network_steps)
    parser.add_argument("--paper-steps", type=int, default=4, help="network steps of paper() that are timed and scaled up")
    parser.add_argument("--plain-steps", type=int, default=2, help="network steps of the plain reference, likewise")
    parser.add_argument("--dip-steps", type=int, default=300, help="steps of the deep image prior")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs is given")
    options = parser.parse_args()

    rates, bandwidth = ceilings()
    device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}")
    print(
        f"ceilings: bfloat16 {rates[torch.bfloat16]:.1f} and TF32 {rates[torch.float32]:.1f} TFLOP/s, copy {bandwidth:.0f} GB/s"
    )
    heading = f"{'':50} {'ms an image':>12} {'peak MiB':>9} {'TFLOP/s':>8} {'of max':>7} {'GB/s':>7} {'of max':>7}"

    if GPU:
        sample = sample_images(4, options.size).to(DEVICE)
        for _, transform, _, _ in variants(options.network_steps, options.paper_steps):
            if transform.settings.backend == "triton":
                agree(transform, sample)
        print("fused kernels and PyTorch operators leave the same residual")

    batches = [(options.size, batch) for batch in options.batches] + ([(options.large, 8)] if options.large else [])
    for size, batch in batches:
        images = _batch(batch, size)
        print(f"\nbatch of {batch} at {size} x {size}\n{heading}")
        for name, transform, factor, graph in variants(options.network_steps, options.paper_steps):
            if GPU:
                from oag_transform.generator import fused

                fused.CAPTURE = graph
            run = functools.partial(transform, images)
            memory, each = peak_memory(run), milliseconds(run, options.repeats) / batch
            flop, moved = work(transform, size)
            speed, traffic = flop / each / 1e9, moved / each / 1e6
            ceiling = rates[transform.settings.compute_dtype or torch.float32]
            print(
                f"{name:50} {factor * each:12.3f} {memory:9.0f} {speed:8.2f} {speed / ceiling:7.1%} "
                f"{traffic:7.0f} {traffic / bandwidth:7.1%}"
            )

    images = _batch(min(32, max(options.batches)), options.size)
    if GPU:
        print(f"\nfused moves, {len(images)} images at {options.size} x {options.size}\n{'':40} {'ms':>9} {'TFLOP/s':>8}")
        # one step of an image is one product
        product = work(OnlineAlternateGenerator(network_steps=1), options.size)[0] * len(images)
        for name, time_, count in moves(images, 20):
            print(f"{name:40} {time_:9.3f} {count * product / time_ / 1e9:8.1f}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\nproducts of the PyTorch path, {dtype}, {len(images)} images at {options.size} x {options.size}")
        print(f"{'':40} {'ms':>9}")
        for name, time_ in products(images, dtype, options.repeats):
            print(f"{name:40} {time_:9.3f}")

    print(f"\none image at {options.size} x {options.size}, in the same run\n{'':70} {'ms an image':>12} {'peak MiB':>9}")
    for name, peer in _peers(options):
        run = functools.partial(peer, images[:1])
        memory, each = peak_memory(run), milliseconds(run, options.repeats)
        print(f"{name:70} {each:12.3f} {memory:9.0f}")
    for name, factor, plain in _references(images[0], options):
        memory = peak_memory(plain)
        print(f"{name:70} {factor * milliseconds(plain, 1):12.1f} {memory:9.0f}")


def _batch(count: int, size: int) -> Tensor:
    """Sample images, repeated where there are not so many crops."""
    crops = max(1, min(count, 512 - size))
    return sample_images(crops, size)[torch.arange(count) % crops].to(DEVICE)


def _peers(options: argparse.Namespace) -> list[tuple[str, nn.Module]]:
    peers = [(by_key(key), setting) for key, setting in (("mean", 3), ("tvm", 0.03), ("dip", options.dip_steps))]
    return [(peer.describe(setting), peer.make(setting, 0, Needs())) for peer, setting in peers]


def _references(image: Tensor, options: argparse.Namespace) -> Iterator[tuple[str, float, Callable[[], Tensor]]]:
    default = OnlineAlternateGenerator(network_steps=options.network_steps)
    for name, transform in (("the default's T_N and T_I", default), ("paper()", OnlineAlternateGenerator.paper())):
        settings = plain_settings(transform, options.plain_steps)
        run = functools.partial(reference.purify, image, settings, seed=0, index=0)
        factor = transform.settings.network_steps / options.plain_steps
        yield f"plain reference, {name}, from {options.plain_steps} steps", factor, run


if __name__ == "__main__":
    main()
