"""What the compiler makes of the fused kernels, without a GPU: registers, spills, shared memory and matrix instructions.

python -m benchmarks.kernels [--arch 90] [--compute-dtype bfloat16] [--kernel-size 9]

Records the launches of one network step for a 224 x 224 image, arguments and all, and compiles each of them ahead of time.
Occupancy, and the time that a roofline gives each kernel on an H100 for ``--batch`` images (its arithmetic, or each of its
tensors read or written once, whichever takes longer by the data sheet's rates), are computed; nothing is run.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oag_transform import OnlineAlternateGenerator
from oag_transform.generator import fused
from oag_transform.generator.settings import Settings

from .gpu import chunk_arguments, work_of_kernels

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}

H100 = {torch.bfloat16: 989e12, torch.float32: 494e12}  # operations a second, dense, SXM; float32 as TF32
H100_BYTES = 3.35e12  # a second
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor, all of compute capability 8.0 and 9.0
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor, of which each block takes 1 KB for the system


class Compiled(NamedTuple):
    """A kernel for one architecture; ``wide`` and ``narrow`` count matrix instructions for a warpgroup and for a warp."""

    name: str
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide: int
    narrow: int
    vector_loads: int


def launches(transform: OnlineAlternateGenerator, size: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernel, arguments and options of every launch of one network step, without running them."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((kernel, args, options))

    arguments = chunk_arguments(torch.zeros(1, 3, size, size), transform)
    run = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        chunk = fused.Chunk(*arguments)
        chunk.respond()
        chunk.image_step(0.5, 0.5)
        chunk.network_step()
    finally:
        triton.JITFunction.run = run
    return seen


def compile_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> Compiled:
    """Compile a recorded launch for compute capability ``arch`` (80, 90), specialized as the launch would be."""
    options = dict(options)
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = True
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(options, "constexpr")
    source = ASTSource(kernel, signature, options, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return Compiled(
        kernel.__name__,
        settings["num_warps"],
        int(re.findall(r"REG:(\d+)", usage)[-1]),
        int(re.findall(r"STACK:(\d+)", usage)[-1]),
        compiled.metadata.shared,
        len(re.findall(r"wgmma\.mma_async", ptx)),
        len(re.findall(r"\bmma\.sync", ptx)),
        len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*\], \[.*\], 0x10|ld\.global[.\w]*\.v4\.b32", ptx)),
    )


def occupancy(c: Compiled, arch: int) -> float:
    """Share of a multiprocessor's warps that are resident at once: registers are given out by 256 a warp."""
    of_a_warp = -(-32 * c.registers // 256) * 256
    blocks = min(REGISTERS // of_a_warp // c.warps, SHARED[arch] // (c.shared_bytes + 1024), WARPS // c.warps, BLOCKS)
    return blocks * c.warps / WARPS


def roofline(name: str, transform: OnlineAlternateGenerator, size: int, batch: int) -> float:
    """Microseconds of a kernel on an H100 at its data sheet's rates."""
    operations, moved = work_of_kernels(transform.settings_for(size, size), size)[name]
    dtype = transform.settings.compute_dtype or torch.float32
    return 1e6 * batch * max(operations / H100[dtype], moved / H100_BYTES)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, without the dot")
    parser.add_argument("--compute-dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    default = Settings()
    parser.add_argument("--kernel-size", type=int, default=default.kernel_size)
    parser.add_argument("--filters", type=int, default=default.filters)
    parser.add_argument("--stride", type=int, default=default.stride)
    parser.add_argument("--size", type=int, default=224, help="height and width of the image")
    parser.add_argument("--batch", type=int, default=64, help="images of the roofline")
    options = parser.parse_args()
    print(f"triton {triton.__version__}")
    for dtype in options.compute_dtype:
        transform = OnlineAlternateGenerator(
            kernel_size=options.kernel_size,
            stride=options.stride,
            filters=options.filters,
            compute_dtype=getattr(torch, dtype),
        )
        for arch in options.arch:
            print(f"\n{dtype}, sm_{arch}")
            print(
                "kernel               registers  stack bytes  shared bytes  wgmma  mma.sync  16-byte loads  occupancy  H100, us"
            )
            total = 0.0
            for launch in launches(transform, options.size):
                c = compile_launch(*launch, arch)
                ideal = roofline(c.name, transform, options.size, options.batch)
                total += ideal * (0 if c.name == "_gate_kernel" else 1)  # that one runs once, before the first step
                print(
                    f"{c.name:20} {c.registers:9} {c.stack_bytes:12} {c.shared_bytes:13} {c.wide:6} {c.narrow:9} "
                    f"{c.vector_loads:14} {100 * occupancy(c, arch):9.0f}% {ideal:12.1f}"
                )
            each = transform.network_steps * total / 1e3 / options.batch
            print(f"{transform.network_steps} steps of {options.batch} images, computed for an H100: {each:.3f} ms an image")


if __name__ == "__main__":
    main()
