"""Speed and memory on this machine: the default setting against the plain reference, in one run.

python -m benchmarks.speed            (from the repository; a few minutes on two cores)

The plain reference (oag_transform/generator/reference.py, Algorithm 1 by autograd as the paper has it) is timed over the first
``--plain-steps`` network steps and scaled up: every step costs the same.
"""

import argparse
import dataclasses
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from oag_transform import OnlineAlternateGenerator
from oag_transform.generator import reference
from oag_transform.generator.settings import Settings


def photographs(count: int, size: int) -> Tensor:
    """Crops of scikit-image's astronaut, (count, 3, size, size) in [0, 1]; the content doesn't change the cost."""
    import skimage.data

    whole = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1) / 255
    return torch.stack([whole[:, i : i + size, i : i + size] for i in range(count)])


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``work``, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain_settings(transform: OnlineAlternateGenerator, network_steps: int) -> Settings:
    """The paper's algorithm with a transform's T_I, kernels and rates: exact Langevin, PyTorch's start, fixed rates."""
    plain = {"langevin": "exact", "init": "uniform", "adaptive_lr": False, "strength": 1.0, "compute_dtype": None}
    return dataclasses.replace(transform.settings, network_steps=network_steps, **plain)  # type: ignore[arg-type]


def peak_memory(height: int, width: int) -> tuple[float, float]:
    """GiB that a process has held at most before and after it purified one uint8 image: for a process of its own."""
    image = torch.randint(0, 256, (3, height // 125, width // 125), dtype=torch.uint8)
    image = image.repeat_interleave(125, 1).repeat_interleave(125, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    OnlineAlternateGenerator()(image)
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs is given")
    parser.add_argument("--plain-steps", type=int, default=2, help="network steps of the plain reference that are timed")
    parser.add_argument("--memory-batch", type=int, default=64, help="images in the batch whose peak memory is given; 0: none")
    parser.add_argument("--large", type=int, nargs=2, default=(3000, 4000), help="height and width of a large image; 0 0: none")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    images = photographs(options.batch, options.size)
    transform = OnlineAlternateGenerator(seed=0)
    s = transform.settings
    ours = seconds(lambda: transform(images), options.repeats) / len(images)
    print(f"{transform}\n  batch of {len(images)} at {options.size} x {options.size}: {ours:.3f} s an image")

    settings = plain_settings(transform, options.plain_steps)
    plain = seconds(lambda: reference.purify(images[0], settings, seed=0, index=0), options.repeats)
    plain *= s.network_steps / options.plain_steps
    print(f"plain reference, same T_N and T_I: {plain:.1f} s an image, {plain / ours:.0f} times as long")

    bfloat16 = OnlineAlternateGenerator(compute_dtype=torch.bfloat16, seed=0)
    half = seconds(lambda: bfloat16(images), options.repeats) / len(images)
    print(f"compute_dtype=torch.bfloat16: {half:.3f} s an image; the plain reference takes {plain / half:.0f} times as long")

    for name, exact in (
        ("exact Langevin, otherwise the default", OnlineAlternateGenerator(langevin="exact", network_steps=4, seed=0)),
        ("paper()", OnlineAlternateGenerator.paper(network_steps=4, seed=0)),
    ):
        full = OnlineAlternateGenerator.paper().settings if name == "paper()" else transform.settings
        each = seconds(lambda exact=exact: exact(images[:1]), options.repeats) / 4 * full.network_steps  # type: ignore[misc]
        print(f"{name}: {each:.1f} s an image (scaled up from 4 network steps)")

    if options.memory_batch:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        transform(photographs(options.memory_batch, options.size))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak memory, batch of {options.memory_batch}: {after / 2**20:.2f} GiB (before it: {before / 2**20:.2f} GiB)")

    if all(options.large):
        height, width = options.large
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            low, high = pool.submit(peak_memory, height, width).result()
        print(f"peak memory, one image of {width} x {height}: {high:.2f} GiB (before it: {low:.2f} GiB)")


if __name__ == "__main__":
    main()
