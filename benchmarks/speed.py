"""Speed and memory on this machine, compared with a matrix product and with other defenses, in one run.

python -m benchmarks.speed [--out docs/data/speed.json]          (from the repository, on an idle machine; some five minutes)

The reference is the rate of a large matrix product. "Share" is the arithmetic of a part per second, divided by that rate.
Random numbers and element-wise operations have almost no arithmetic and appear as time only. The plain reference
(oag_transform/generator/reference.py, the paper's Algorithm 1 with autograd) and ``paper()`` are timed over a few network steps
and scaled up.
"""

import argparse
import dataclasses
import functools
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oag_transform import OnlineAlternateGenerator, noise_level, streams
from oag_transform.baselines.catalogue import Needs, by_key
from oag_transform.evaluation.provenance import provenance
from oag_transform.evaluation.render import tables
from oag_transform.generator import energy, reference
from oag_transform.generator.run import operands
from oag_transform.generator.settings import Settings
from oag_transform.generator.state import Inputs, begin

CPU = torch.device("cpu")
SIZES = ((32, 1), (32, 64), (64, 16), (96, 8), (128, 8), (224, 1), (224, 8), (224, 64), (512, 2), (1024, 1))
"""Pixels a side, images in the batch."""
PARTS = (224, 8)
"""The entry of :data:`SIZES` whose parts are also timed."""
PEERS = ("tvm", "dip", "nlm", "bm3d")


def sample_images(count: int, size: int) -> Tensor:
    """Crops of scikit-image's astronaut, (count, 3, size, size) in [0, 1], enlarged beyond 512; the content costs nothing."""
    import skimage.data

    whole = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1) / 255
    whole = whole.repeat_interleave(-(-size // 448), 1).repeat_interleave(-(-size // 448), 2)
    return torch.stack([whole[:, i : i + size, i : i + size] for i in range(count)])


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``work`` until the device has finished it, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain_settings(transform: OnlineAlternateGenerator, network_steps: int) -> Settings:
    """The paper's algorithm with a transform's kernels and rates: exact Langevin, PyTorch's start, T_I 20, no momentum."""
    plain = {"langevin": "exact", "init": "uniform", "adaptive_lr": False, "strength": 1.0, "image_steps": 20, "momentum": 0.0}
    return dataclasses.replace(transform.settings_for(224, 224), network_steps=network_steps, compute_dtype=None, **plain)  # type: ignore[arg-type]


def ceiling(dtype: torch.dtype, repeats: int) -> float:
    """Operations per second of a product of two 2048 x 2048 matrices."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / seconds(lambda: a @ b, 3 * repeats)


def operations(s: Settings, size: int, products: int) -> float:
    """Operations of ``products`` products of the convolution with an image of ``size`` x ``size`` pixels."""
    cells = -(-size // s.stride)
    return 2.0 * products * cells**2 * s.filters * 3 * s.stride**2 * energy.kernel_cells(s.kernel_size, s.stride) ** 2


def products_in(s: Settings) -> int:
    """Products of a whole run: five for each network step, and two for the last image, which has no network step."""
    return 5 * (s.network_steps - 1) + 2


def parts(s: Settings, dtype: torch.dtype, size: int, repeats: int) -> Iterator[tuple[str, float, int, int]]:
    """(name, seconds, products, times in a run) of the parts of a run on one image that can be timed alone."""
    image = sample_images(1, size)
    inputs = Inputs(image, s, torch.ones(1), 0, [0])
    start, generators = begin(inputs)
    theta, pair = start.theta.cast(dtype), start.pair.to(dtype)
    gates = energy.gate(energy.responses(pair, theta), theta)
    normal = torch.empty(1, *pair.shape[-2:], pair.shape[1])
    n = s.network_steps - 1
    yield "estimate of the noise", seconds(lambda: noise_level.estimate(image), repeats), 0, 1
    yield "random network", seconds(lambda: begin(inputs), repeats), 0, 1
    yield "noise drawn", seconds(lambda: streams.fill_normal(normal, generators), repeats), 0, n + 1
    yield "responses of both images", seconds(lambda: energy.responses(pair, theta), repeats), 2, n
    yield "mode", seconds(lambda: energy.image_gradient(gates[:1], theta), repeats), 1, n + 1
    yield "gradient of W", seconds(lambda: energy.weight_gradient(pair, gates, theta), repeats), 2, n
    work = seconds(lambda: energy.contrast(pair, theta, torch.tensor([s.threshold]), energy.Buffers.of(theta)), repeats)
    products = seconds(lambda: (energy.responses(pair, theta), energy.weight_gradient(pair, gates, theta)), repeats)
    yield "gates, contrast, threshold", max(work - products, 0.0), 0, n


def first_calls() -> tuple[float, float]:
    """Seconds of the first and of the second call in a process; it needs a new process."""
    image, purify = sample_images(1, 224), OnlineAlternateGenerator(seed=0)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        purify(image)
        times.append(time.perf_counter() - start)
    return times[0], times[1]


def throughput(images: Tensor) -> float:
    """Seconds per image in a process with one thread."""
    torch.set_num_threads(1)
    purify = OnlineAlternateGenerator(seed=0)
    purify(images[:1])
    start = time.perf_counter()
    purify(images)
    return (time.perf_counter() - start) / len(images)


def processes(count: int) -> float:
    """Images per second of ``count`` parallel processes with one thread each."""
    images = sample_images(24, 224)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(throughput, [images[:2]] * count))  # started, and warm
        return sum(1 / each for each in pool.map(throughput, [images] * count))


def peak_memory(height: int, width: int) -> tuple[float, float, float]:
    """Peak memory of a process in GiB before and after it purified one uint8 image, and the seconds of the purification."""
    image = torch.randint(0, 256, (3, height // 125, width // 125), dtype=torch.uint8)
    image = image.repeat_interleave(125, 1).repeat_interleave(125, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    OnlineAlternateGenerator()(image)
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter() - start


def of_threads(threads: int, repeats: int) -> dict[str, Any]:
    """Times of the default with this number of threads at each size, and the ceilings."""
    torch.set_num_threads(threads)
    ceilings = {str(dtype): ceiling(dtype, repeats) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    rows = []
    for dtype in dict.fromkeys((operands(Settings(), CPU, torch.float32), torch.float32)):
        transform = OnlineAlternateGenerator(seed=0, compute_dtype=dtype)
        found = [(side, batch, sample_images(batch, side)) for side, batch in SIZES]
        for side, batch, images in found:
            s = transform.settings_for(side, side)
            each = seconds(functools.partial(transform, images), repeats if batch < 64 else 1) / batch
            rate = operations(s, side, products_in(s)) / each / 1e9
            rows.append(
                {"operands": str(dtype), "size": side, "batch": batch, "seconds": each, "gflops": rate}
                | {"share": rate / ceilings[str(dtype)]}
            )
            print(f"  {threads} threads, {dtype}, {side} x {side}, batch {batch}: {each:.4f} s an image", file=sys.stderr)
        side, s = PARTS[0], transform.settings_for(PARTS[0], PARTS[0])
        timed = [
            {
                "part": name,
                "ms": 1e3 * each,
                "times": often,
                "share": operations(s, side, products) / each / 1e9 / ceilings[str(dtype)],
            }
            for name, each, products, often in parts(s, dtype, side, 5 * repeats)
        ]
        rows[SIZES.index(PARTS) - len(SIZES)] |= {"parts": timed}
        gc.collect()
    return {"threads": threads, "ceilings": ceilings, "rows": rows}


def beside(repeats: int) -> list[dict[str, Any]]:
    """Seconds per image of other settings and loops and of other defenses, with all threads."""
    image, rows = sample_images(1, 224), []
    default, paper = OnlineAlternateGenerator(seed=0), OnlineAlternateGenerator.paper(network_steps=4, seed=0)
    plain = plain_settings(default, 2)
    full = OnlineAlternateGenerator.paper().network_steps
    rows.append(("default", seconds(lambda: default(image), 3 * repeats)))
    each = seconds(lambda: reference.purify(image[0], plain, seed=0, index=0), 1)
    rows.append(("plain reference, T_N of the default, T_I 20", each * default.network_steps / plain.network_steps))
    rows.append(("paper()", seconds(lambda: paper(image), 1) / paper.network_steps * full))
    closed = OnlineAlternateGenerator.paper(langevin="closed_form", network_steps=8, seed=0)
    rows.append(("paper(langevin='closed_form')", seconds(lambda: closed(image), 1) / closed.network_steps * full))
    for key in PEERS:
        defense = by_key(key)
        made = defense.make(defense.published, 0, Needs())
        rows.append((defense.describe(defense.published), seconds(functools.partial(made, image), 1)))
        print(f"  {rows[-1][0]}: {rows[-1][1]:.3f} s", file=sys.stderr)
    return [{"what": name, "seconds": each} for name, each in rows]


def measured(repeats: int, large: tuple[int, int]) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    threads = torch.get_num_threads()
    runs = [of_threads(count, repeats) for count in sorted({1, threads})]
    torch.set_num_threads(threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        first, second = pool.submit(first_calls).result()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before, after, took = pool.submit(peak_memory, *large).result()
    return {
        "facts": provenance(CPU, ("oag-transform", "torch", "numpy", "scikit-image"))
        | {"command": "python -m benchmarks.speed --out docs/data/speed.json"},
        "runs": runs,
        "beside": beside(repeats),
        "processes": {str(count): processes(count) for count in (1, 2)},
        "first_calls": [first, second],
        "large": {"pixels": large[0] * large[1], "gib_before": before, "gib": after, "seconds": took},
    }


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    heading = ("Threads", "Operands", "Image", "Batch", "s an image", "ns a pixel", "GFLOP/s", "Of the reference")
    rows = []
    for run in found["runs"]:
        for row in run["rows"]:
            size, each = row["size"], row["seconds"]
            shape = (f"{run['threads']}", row["operands"][6:], f"{size} x {size}", f"{row['batch']}")
            rates = (f"{1e9 * each / size**2:.0f}", f"{row['gflops']:.0f}", f"{100 * row['share']:.0f}%")
            rows.append((*shape, f"{each:.4f}", *rates))
    lines = tables.table(heading, rows)
    many = found["runs"][-1]
    lines += ["", "Rate of the reference in GFLOP/s: "]
    lines[-1] += "; ".join(
        f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}: "
        + ", ".join(f"{name[6:]} {rate:.0f}" for name, rate in run["ceilings"].items())
        for run in found["runs"]
    )
    row = next(row for row in many["rows"] if "parts" in row)
    whole = 1e3 * row["seconds"]
    lines += [
        "",
        f"| Part, {row['operands'][6:]}, {many['threads']} threads | ms | Times | Of the reference |",
        "|---|---|---|---|",
    ]
    for part in row["parts"]:
        share = f"{100 * part['share']:.0f}%" if part["share"] else ""
        lines.append(f"| {part['part']} | {part['ms']:.2f} | {part['times']} | {share} |")
    rest = whole - sum(part["ms"] * part["times"] for part in row["parts"])
    lines.append(f"| all else: moves of image, v and W, copies, memory that is cold in a run | {rest:.1f} in all | 1 | |")
    default = found["beside"][0]["seconds"]
    times = [(row["what"], f"{row['seconds']:.3f}", f"{row['seconds'] / default:.1f}") for row in found["beside"]]
    lines += ["", *tables.table(("One image of 224 x 224, all threads", "Seconds", "Times the default"), times)]
    one, two = found["processes"]["1"], found["processes"]["2"]
    large, pixels, (first, second) = found["large"], found["large"]["pixels"], found["first_calls"]
    lines += [
        "",
        f"The first call in a process takes {first / second:.2f} times as long as the second. Two processes of one thread "
        f"each purify {two:.1f} images a second in total, one purifies {one:.1f} (ratio {two / one:.2f}). One image of "
        f"{pixels / 1e6:.0f} megapixels takes {large['seconds']:.1f} s ({1e9 * large['seconds'] / pixels:.0f} ns a pixel) and "
        f"{large['gib']:.2f} GiB at most ({large['gib_before']:.2f} GiB before it).",
        "",
        *(f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in found["facts"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the tables, and write the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs is given")
    parser.add_argument("--large", type=int, nargs=2, default=(3000, 4000), help="height and width of a large image")
    parser.add_argument("--out", type=Path, help="FILE.json to write")
    options = parser.parse_args()
    found = measured(options.repeats, tuple(options.large))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
