"""The fused kernels against float64, in Triton's interpreter on the CPU or, marked ``gpu``, on the device itself."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oag_transform import DivergenceError, OnlineAlternateGenerator, streams
from oag_transform.generator import energy, loop, run
from oag_transform.generator.energy import Parameters
from oag_transform.generator.settings import Backend, Settings
from oag_transform.generator.state import Inputs, State

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from oag_transform.generator import fused  # noqa: E402
from oag_transform.generator.fused import Chunk  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 was not set at the start")),
    pytest.param("cuda", marks=gpu),
]
DTYPES = [torch.float32, torch.bfloat16]

# (count, channels, height, width), and what is odd about the case
CASES: list[tuple[tuple[int, int, int, int], dict[str, Any], torch.dtype]] = [
    ((2, 3, 25, 31), {"filters": 5}, torch.float32),  # cells that pixels don't fill, filters that don't fill a block
    ((2, 3, 25, 31), {"filters": 5, "threshold": 0.0}, torch.bfloat16),
    ((1, 1, 23, 19), {"filters": 16, "stride": 2, "kernel_size": 13, "threshold": 12.0}, torch.float32),  # grey, 7 x 7 cells
    ((2, 3, 20, 9), {"filters": 3, "kernel_size": 9}, torch.float32),  # an image as narrow as a kernel
    # two blocks of filters, 48 channels, two tiles, few rows
    ((1, 3, 14, 130), {"filters": 70, "stride": 4, "kernel_size": 7}, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=INTERPRETED)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as 16-bit integers, and multiplies matrices of those as they are."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def as_float(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        return type(handle)((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, as_float(a), as_float(b), *rest)

    monkeypatch.setattr(builder, "create_dot", create)


def settings(**overrides: Any) -> Settings:
    arguments: dict[str, Any] = {"network_steps": 3, "kernel_size": 9, "backend": "triton"}
    return Settings(**arguments | overrides)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that bfloat16 holds exactly, so that operands of every precision are the same numbers."""
    return torch.randn(shape, generator=Generator().manual_seed(seed)).bfloat16().float()


def network(shape: tuple[int, int, int, int], s: Settings, init: str) -> Parameters:
    """Random networks on the CPU in float32."""
    return energy.initial_parameters(
        streams.generators(1, range(shape[0]), torch.device("cpu")),
        shape,
        kernel_size=s.kernel_size,
        stride=s.stride,
        filters=s.filters,
        init=init,
        dtype=torch.float32,
    )


def example(shape: tuple[int, int, int, int], s: Settings, device: str) -> tuple[Tensor, Parameters, Chunk]:
    """A reference and an image as cells, a network for each, and a chunk of them on ``device``."""
    theta = network(shape, s, "uniform")
    theta = theta._replace(fc=64 * theta.fc).cast(torch.bfloat16).cast(torch.float32)  # modes as large as images
    pair = torch.cat([energy.to_cells(10 * random(*shape, seed=seed).bfloat16().float(), s.stride) for seed in (1, 2)])
    pair = pair.bfloat16().float()
    return pair, theta, chunk_of(pair, theta, shape, s, device)


def chunk_of(pair: Tensor, theta: Parameters, shape: Sequence[int], s: Settings, device: str) -> Chunk:
    start = State(0, pair.to(device), moved(theta, device, torch.float32), s.stride, tuple(shape))
    return Chunk(start, s, streams.generators(3, range(shape[0]), torch.device(device)), strengths(shape[0]).to(device))


def strengths(count: int) -> Tensor:
    """A different value for each image."""
    return torch.tensor([0.5, 0.75])[:count]


def moved(theta: Parameters, device: str, dtype: torch.dtype) -> Parameters:
    """A copy."""
    weight, bias, fc = (t.to(device, dtype, copy=True) for t in (theta.weight, theta.bias, theta.fc))
    return Parameters(weight, bias, fc, theta.groups)


def double(theta: Parameters) -> Parameters:
    return theta.cast(torch.float64)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.cpu().double() - expected).norm() / expected.norm()).item()


def assert_as_good_as_float32(actual: Tensor, expected: Tensor, float32: Tensor, rounding: float = 0.0) -> None:
    """The error against float64 is at most four times that of the same maths in float32 (and of a rounded result).

    Tensor cores cut off the last bits of a sum where a CPU rounds; operands that were rounded would show at 1e-4.
    """
    assert actual.shape == expected.shape
    assert error(actual, expected) <= 4 * max(error(float32, expected), 1e-5 if ON_GPU else 1e-7) + rounding


ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}  # Triton's interpreter cuts bits off where a GPU rounds


def assert_rounded(operand: Tensor, full: Tensor) -> None:
    torch.testing.assert_close(operand.float(), full, rtol=ROUNDING[operand.dtype], atol=0)


def cells_of(packed: Tensor, channels: int) -> Tensor:
    """(N, h, w, padded channels) -> (1, N*channels, h, w)."""
    return packed[..., :channels].movedim(-1, 1).flatten(0, 1)[None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "overrides", "dtype"), CASES)
def test_gates(shape: tuple[int, int, int, int], overrides: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    pair, theta, chunk = example(shape, settings(compute_dtype=dtype, **overrides), device)
    chunk.respond()
    a = energy.responses(pair[1:].double(), double(theta))
    gates = cells_of(chunk.mode_gates, theta.bias.numel() // theta.groups).cpu()
    clear = a.abs() > 1e-4  # the sign of a response closer to zero is a matter of rounding
    assert clear.double().mean() > 0.99
    assert torch.equal(gates.float()[clear], energy.gate(a, double(theta)).float()[clear])
    assert not chunk.mode_gates[..., theta.bias.numel() // theta.groups :].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "overrides", "dtype"), CASES)
def test_image_step(shape: tuple[int, int, int, int], overrides: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Eq. 3 without noise, from the gates of the chunk, and its residual."""
    s = settings(compute_dtype=dtype, **overrides)
    pair, theta, chunk = example(shape, s, device)
    chunk.respond()
    gates = cells_of(chunk.mode_gates, s.filters).cpu()
    chunk.image_step(0.25, 0.0)

    def stepped(precision: torch.dtype) -> Tensor:
        return 0.25 * pair[1:].to(precision) + 0.75 * energy.image_gradient(gates.to(precision), theta.cast(precision))

    expected = stepped(torch.float64)
    assert_as_good_as_float32(chunk.snapshot(1).pair[1:], expected, stepped(torch.float32))
    assert torch.equal(chunk.snapshot(1).pair[:1].cpu(), pair[:1])
    assert_rounded(chunk.image_operand, chunk.image)
    assert not chunk.image[..., chunk.depth :].any()
    squares = chunk.squares.sum(1) / (chunk.size * chunk.depth)
    torch.testing.assert_close(squares.cpu().double(), energy.mean_square(pair[:1] - expected, shape[0]), rtol=3e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "overrides", "dtype"), CASES)
def test_network_step(
    shape: tuple[int, int, int, int],
    overrides: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eq. 5 at fixed rates: the change of each parameter, and the gates for the next image."""
    monkeypatch.setattr(fused, "MIN_POSITIONS", 64)  # several partial sums
    s = settings(compute_dtype=dtype, adaptive_lr=False, conv_lr=0.125, fc_lr=0.25, **overrides)
    pair, theta, chunk = example(shape, s, device)
    assert chunk.splits > 1 or chunk.size <= 64
    before = random(*theta.fc.shape)  # where v was moving to
    chunk.velocity[..., : s.filters] = before[0].unflatten(0, (shape[0], -1)).movedim(1, -1)
    before = cells_of(chunk.velocity, s.filters).cpu().clone()  # rounded
    chunk.network_step()
    after = chunk.snapshot(1).theta

    def changes(precision: torch.dtype) -> list[Tensor]:
        gradient, _, _ = energy.contrast(pair.to(precision), theta.cast(precision), s.threshold * strengths(shape[0]))
        moved = gradient.fc + s.momentum * before.to(precision)
        taps = energy.kernel_to_cells(torch.ones(shape[1], s.kernel_size, s.kernel_size), s.stride).to(precision)
        rate = s.conv_lr / chunk.size
        return [rate * taps * gradient.weight, rate * gradient.bias, s.fc_lr * moved]

    for name, new, old, expected, float32 in zip(
        Parameters._fields, after[:3], theta[:3], changes(torch.float64), changes(torch.float32), strict=False
    ):
        assert isinstance(old, Tensor), name
        assert isinstance(new, Tensor), name
        rounding = 2.0**-22 * old.norm() / expected.norm()  # the change is read off a float32 sum
        assert_as_good_as_float32(new.cpu() - old.double(), expected, float32, rounding.item())
    gates = cells_of(chunk.mode_gates, s.filters).cpu()
    on = energy.responses(pair[1:].double(), double(theta)) > 0
    close = torch.isclose(gates.float(), torch.where(on, after.fc.cpu(), 0), rtol=ROUNDING[dtype], atol=0)
    assert close.float().mean() > 0.99  # the sign of a response close to zero is a matter of rounding
    assert_rounded(chunk.weight_operand, chunk.weight)
    for padding in (chunk.weight[:, s.filters :], chunk.weight[..., chunk.depth :], chunk.fc[..., s.filters :]):
        assert not padding.any()
    assert not chunk.bias[:, s.filters :].any()


def normals(
    shape: tuple[int, ...], s: Settings, generators: list[Generator], draw: int, strength: Tensor | None = None
) -> Tensor:
    """The noise of one draw, (N, h, w, D): the cells after a step from zero without a network."""
    device = generators[0].device
    zero = torch.zeros(shape, device=device)
    cells, n, k = energy.to_cells(zero, s.stride), shape[0], energy.kernel_cells(s.kernel_size, s.stride)
    new = zero.new_zeros
    theta = Parameters(new(n, cells.shape[1] // n, k, k), new(n), new(1, n, *cells.shape[2:]), n)
    alone = settings(filters=1, stride=s.stride, kernel_size=s.kernel_size)
    strength = torch.ones(n, device=device) if strength is None else strength.to(device)
    chunk = Chunk(State(0, torch.cat([cells, cells]), theta, s.stride, shape), alone, generators, strength)
    chunk.mode_gates.zero_()
    chunk.draw.fill_(draw - 1)
    chunk.image_step(0.0, 1.0)
    return chunk.snapshot(1).pair[1].unflatten(0, (n, -1)).movedim(1, -1)


RUNS: list[dict[str, Any]] = [
    {"threshold": 2.0},
    {"langevin": "exact", "image_steps": 2, "network_steps": 2},
    {"adaptive_lr": False, "stride": 2, "kernel_size": 5},
    {"fc_lr": 10.0, "network_steps": 5},  # large enough for the rates to be halved
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overrides", RUNS, ids=["default", "exact", "fixed rates", "halved rates"])
def test_the_loop_is_the_reference(overrides: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs from the same network and with the same noise: fused, and PyTorch in float32 and float64."""
    shape = (2, 3, 23, 25)
    base = {"filters": 6, "network_steps": 4, "image_steps": 5, "conv_lr": 0.01, "fc_lr": 1.0, "threshold": 0.0} | overrides
    s = settings(**base | {"backend": "torch"})
    generators = streams.generators(0, range(2), torch.device(device))
    theta = network(shape, s, "gabor")
    reference = 8 * torch.nn.functional.interpolate(random(2, 3, 5, 5), size=shape[2:], mode="bicubic")
    strength = strengths(2).flip(0)  # each image has one of its own
    lr_factors: list[Tensor] = []
    updates = s.image_steps if s.langevin == "exact" else 1
    noise = [normals(shape, s, generators, draw) for draw in range(1, 1 + s.network_steps * updates)]

    def ran(kind: run.Loop, dtype: torch.dtype, where: str) -> list[State]:
        draws = iter(noise)

        def same_noise(out: Tensor, _: object) -> Tensor:
            return out.copy_(next(draws))

        def recorded(*args: Tensor) -> tuple[Tensor, Tensor]:
            lr_factors.append(slow_down(*args)[0].cpu())
            return slow_down(*args)

        def same_start(_: Inputs) -> tuple[State, list[Generator]]:
            cells = energy.to_cells(reference.to(where, dtype), s.stride)
            pair = torch.cat([cells, torch.zeros_like(cells)])
            return State(0, pair, moved(theta, where, dtype), s.stride, shape), generators

        slow_down = energy.slow_down
        inputs = Inputs(torch.empty(shape, dtype=dtype, device=where), s, strength.to(where, dtype), 0, range(2))
        with monkeypatch.context() as patch:
            patch.setattr(streams, "fill_normal", same_noise)
            patch.setattr(energy, "slow_down", recorded)
            for module in (loop, fused):
                patch.setattr(module, "begin", same_start)
            return list(kind(inputs, 1))

    kernels = ran(fused.alternate, torch.float32, device)
    plain, expected = (ran(loop.alternate, dtype, "cpu") for dtype in (torch.float32, torch.float64))
    assert [state.step for state in kernels] == list(range(1, s.network_steps + 1))
    for step, states in enumerate(zip(kernels, plain, expected, strict=True)):
        for a, b, c in zip(*((state.pair, *state.theta[:3]) for state in states), strict=True):
            if device == "cpu":
                assert_as_good_as_float32(a, c, b)
            else:  # TF32 operands
                assert error(a, c) < 0.02, step
    if s.fc_lr == 10:
        assert any((factor < 1).any() for factor in lr_factors)  # the case does what it is there for
    assert error(kernels[-1].pair[1:], expected[0].pair[1:]) > 0.01  # the image moved


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_standard_normal_and_independent(device: str) -> None:
    """Moments and the Kolmogorov-Smirnov distance, and correlations between pixels, images and draws; 5 standard errors."""
    shape = (2, 3, 61, 59)
    generators = streams.generators(5, range(2), torch.device(device))
    s = settings()
    first, second, later = (normals(shape, s, generators, draw).cpu().double() for draw in (1, 2, 1000))
    n = first[0].numel()
    for sample in (*first, *second, *later):
        z = sample.flatten()
        assert abs(z.mean()) < 5 / n**0.5
        assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
        assert abs(z.pow(3).mean()) < 5 * (15 / n) ** 0.5
        assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
        distance = (torch.special.ndtr(z.sort().values) - torch.arange(n).double() / n).abs().max()
        assert distance < 1.95 / n**0.5  # p = 0.001
    one = first[0]
    others = [first[1], second[0], later[0], one.roll(1, -1), one.roll(1, -2), one.roll(3, -1), one.roll(1, 0)]
    for other in others:
        assert abs((one * other).mean()) < 5 / n**0.5
        assert abs((one.square() * other.square()).mean() - 1) < 5 * (8 / n) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_as_strong_as_each_image_asks_for(device: str) -> None:
    generators = streams.generators(5, range(2), torch.device(device))
    full, less = (normals((2, 3, 17, 20), settings(), generators, 1, share) for share in (None, strengths(2)))
    torch.testing.assert_close(less.cpu(), full.cpu() * strengths(2).sqrt()[:, None, None, None])


@pytest.mark.parametrize("device", DEVICES)
def test_noise_falls_on_whole_cells_and_depends_on_the_draw_and_the_seed(device: str) -> None:
    shape, s = (2, 3, 22, 26), settings(filters=4)
    _, _, chunk = example(shape, s, device)
    chunk.respond()
    chunk.image_step(0.0, 1.0)
    noisy = chunk.snapshot(1).pair[1:]
    _, _, again = example(shape, s, device)
    again.respond()
    again.image_step(0.0, 0.0)
    whole = [8 * 3, 9 * 3]
    noise = energy.from_cells(noisy - again.snapshot(1).pair[1:], 3, (2, 3, *whole))
    assert (noise != 0).all()
    assert not chunk.image[..., chunk.depth :].any()  # what the tensor cores are filled up with
    again.image_step(0.0, 1.0)
    assert not torch.equal(again.snapshot(1).pair, noisy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("langevin", ["closed_form", "exact"])
def test_a_row_of_a_batch_is_the_image_alone(langevin: Any, device: str) -> None:
    images = torch.rand(2, 3, 12, 14, generator=Generator().manual_seed(0)).to(device)
    purify = OnlineAlternateGenerator(
        network_steps=2, image_steps=2, filters=4, kernel_size=9, seed=0, backend="triton", langevin=langevin, chunk_size=3
    )
    together = purify(images, index=2)
    for i in range(2):
        alone = purify(images[i], index=2 + i)
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-6 if device == "cpu" else 1e-4)
    last = list(purify.trace(images, every=2, index=2))[-1]
    assert torch.equal(last.images, together)
    assert (last.reference_energy != last.energy).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
def test_divergence_is_seen(device: str) -> None:
    images = torch.rand(2, 3, 12, 12, generator=Generator().manual_seed(0)).to(device)
    hopeless = OnlineAlternateGenerator(
        network_steps=3, filters=3, kernel_size=9, conv_lr=1e9, fc_lr=1e9, adaptive_lr=False, chunk_size=2, backend="triton"
    )
    with pytest.raises(DivergenceError, match=r"image\(s\) \[0, 1\]"):
        hopeless(images)


class Recorder(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


SYNCHRONIZING = {  # reads of a value, and copies from Python's memory
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::lift_fresh",
    "aten::_to_cpu",
    "aten::masked_select",
    "aten::equal",
    "aten::repeat_interleave.Tensor",
}


@pytest.mark.parametrize("kind", ["torch", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="on CUDA"))])
@pytest.mark.parametrize("langevin", ["closed_form", "exact"])
def test_the_loop_never_waits_for_the_device(kind: Any, langevin: Any) -> None:
    s = settings(backend=kind, langevin=langevin, image_steps=2, filters=3, compute_dtype=torch.bfloat16)
    states = run.trajectory(Inputs(random(2, 3, 12, 12), s, strengths(2), 0, range(2)), every=1)
    next(states)  # what comes before the loop may wait
    with Recorder() as recorder:
        assert [state.step for state in states] == [2, 3]
    assert "aten::addcmul_" in recorder.names
    assert not recorder.names & SYNCHRONIZING


def test_auto_is_torch_on_the_cpu() -> None:
    image = torch.rand(3, 12, 12, generator=Generator().manual_seed(0))
    auto, plain = (
        OnlineAlternateGenerator(network_steps=2, filters=3, kernel_size=9, seed=0, backend=kind)
        for kind in cast("list[Backend]", ["auto", "torch"])
    )
    assert torch.equal(auto(image), plain(image))
    assert "backend='auto'" in repr(auto)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "stride", "version", "capability", "found", "message"),
    [
        (CUDA, torch.float32, 3, "13.0", (9, 0), True, None),
        (CUDA, torch.float32, 6, "13.0", (8, 0), True, None),
        (CPU, torch.float32, 3, "13.0", (9, 0), True, "needs an NVIDIA GPU, got a tensor on cpu"),
        (torch.device("mps"), torch.float32, 3, None, (9, 0), True, "got a tensor on mps"),
        (CUDA, torch.float32, 3, None, (9, 0), True, r"got a tensor on cuda:0 \(ROCm\)"),
        (CUDA, torch.float64, 3, "13.0", (9, 0), True, "its state is float32, got float64"),
        (CUDA, torch.float32, 7, "13.0", (9, 0), True, "strides up to 6, got 7"),
        (CUDA, torch.float32, 3, "13.0", (7, 5), True, "needs compute capability 8.0 or higher, got 7.5"),
        (CUDA, torch.float32, 3, "13.0", (9, 0), False, "triton is not installed"),
    ],
)
def test_backend_runs_or_names_the_reason(
    device: torch.device,
    dtype: torch.dtype,
    stride: int,
    version: str | None,
    capability: tuple[int, int],
    found: bool,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if found else None)

    def chosen(backend: Backend) -> run.Loop:
        return run.choose_loop(settings(backend=backend, stride=stride), device, dtype)

    assert chosen("auto") is loop.alternate
    monkeypatch.setattr(run, "AUTO", True)
    assert chosen("auto") is (fused.alternate if message is None else loop.alternate)
    assert chosen("torch") is loop.alternate
    if message is None:
        assert chosen("triton") is fused.alternate
    else:
        with pytest.raises(RuntimeError, match=message):
            chosen("triton")


def test_triton_that_cannot_run_raises_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("oag_transform.transform.synthesise", lambda *_, **__: pytest.fail("work began"))
    transform = OnlineAlternateGenerator(kernel_size=9, backend="triton")
    for call in (transform, transform.trace):
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, got a tensor on cpu"):
            call(torch.zeros(3, 12, 12))
        with pytest.raises(RuntimeError, match="got float64"):
            call(torch.zeros(3, 12, 12, dtype=torch.float64))


def python(*arguments: str, folder: Path) -> str:
    """Output of a Python process without the interpreter's variable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3), reason="another interface of the compiler")
def test_kernels_compile_ahead_of_time_for_tensor_cores(tmp_path: Path) -> None:
    """Compiled for compute capability 9.0 without a GPU: warpgroup products except in the sum of splits, within shared memory.

    The package itself doesn't import the kernels' module.
    """
    rows = [line.split() for line in python("-m", "benchmarks.kernels", "--arch", "90", folder=tmp_path).splitlines()]
    kernels = [row for row in rows if row and row[0].endswith("_kernel")]
    assert len(kernels) == 10  # five of each precision
    for name, _, stack, shared, wide, narrow, *_ in kernels:
        assert int(shared) <= 227 * 1024
        assert int(stack) <= 64
        assert int(narrow) == 0
        assert (int(wide) > 0) == (name != "_weight_kernel")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("langevin", ["closed_form", "exact"])
def test_a_cuda_graph_changes_nothing(langevin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(3, 3, 50, 52, generator=Generator().manual_seed(0)).cuda()
    purify = OnlineAlternateGenerator(network_steps=6, image_steps=4, seed=0, backend="triton", langevin=langevin)
    expected = purify(images)
    monkeypatch.setattr(fused, "CAPTURE", True)
    assert torch.equal(purify(images), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_and_pytorch_agree_on_the_device(dtype: torch.dtype) -> None:
    """At full size with independent noise, the residuals agree."""
    generator = Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 16, 16, generator=generator), size=(224, 224), mode="bicubic")
    residuals = [
        list(OnlineAlternateGenerator(seed=0, backend=kind, compute_dtype=dtype).trace(images.clamp(0, 1).cuda(), every=24))[
            -1
        ].residual
        for kind in cast("list[Backend]", ["triton", "torch"])
    ]
    torch.testing.assert_close(residuals[0], residuals[1], rtol=0.03, atol=0)
