"""Soak of ``oag-transform serve``: many clients at once, some of them sending what is bad, against one server on loopback.

Run from the repository root: ``python -m benchmarks.soak [--requests 1000] [--clients 8] [--side 64]``. The server is a process
of its own around a small classifier with random weights; images are crops of scikit-image's samples. Every request must be
answered with the status it deserves, and every purified image must be of the size that was sent. Beside it stands the transform
alone, on the same images in batches of the server's size, in this process, after the server has ended.
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import skimage.data
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from oag_transform import OnlineAlternateGenerator

CLASSES = 10
BATCH = 8
LIMIT_MIB = 1
FEWEST_SECONDS = 1e-9


class Request(NamedTuple):
    """What a client asks for, and the status that it deserves."""

    path: str
    body: bytes
    content_type: str
    status: int
    side: int | None


class Answered(NamedTuple):
    """The status of an answer, the seconds until it was there, and whether it is what it should be."""

    request: Request
    status: int
    seconds: float
    right: bool


def classifier() -> nn.Module:
    """A small classifier with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, CLASSES)
    ).eval()


def crops(count: int, side: int) -> list[PIL.Image.Image]:
    """Square crops of two sample images."""
    wholes = [PIL.Image.fromarray(skimage.data.astronaut()), PIL.Image.fromarray(skimage.data.coffee())]
    places = [(7 * i % (wholes[i % 2].width - side), 11 * i % (wholes[i % 2].height - side)) for i in range(count)]
    return [wholes[i % 2].crop((x, y, x + side, y + side)) for i, (x, y) in enumerate(places)]


def requests(count: int, side: int) -> list[Request]:
    """Seven in ten are good: classifications, some with the purified image, and purifications of two sizes."""
    good, large = [encoded(image) for image in crops(16, side)], [encoded(image) for image in crops(16, side + 16)]
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"  # of more pixels than any limit
    bomb = b"\x89PNG\r\n\x1a\n\x00\x00\x00\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\x00\x00\x00\x01IDAT"
    made = []
    for i in range(count):
        image, other = good[i % 16], large[i % 16]
        made.append(
            (
                Request("/classify", image, "image/png", 200, None),
                Request("/classify", other, "image/png", 200, None),
                Request("/classify?purified=true", image, "image/png", 200, None),
                Request("/purify", image, "image/png", 200, side),
                Request("/purify", other, "image/png", 200, side + 16),
                Request("/classify", image, "image/png", 200, None),
                Request("/purify", image, "image/png", 200, side),
                Request("/classify", image[: len(image) // 2], "image/png", 422, None),
                Request("/classify", bytes((LIMIT_MIB << 20) + 1), "image/png", 413, None),
                (
                    Request("/purify", bomb, "image/png", 413, None),
                    Request("/classify", image, "text/plain", 415, None),
                    Request("/classify", b"no image", "image/png", 415, None),
                    Request("/purify", b"", "image/png", 422, None),
                )[i // 10 % 4],
            )[i % 10]
        )
    return made


def encoded(image: PIL.Image.Image) -> bytes:
    """A PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(port: int, request: Request) -> Answered:
    """One request on a connection of its own; status 0: no answer came."""
    begun = time.perf_counter()
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request("POST", request.path, request.body, {"Content-Type": request.content_type})
            response = connection.getresponse()
            status, body = response.status, response.read()
    except OSError:
        return Answered(request, 0, time.perf_counter() - begun, False)
    return Answered(request, status, time.perf_counter() - begun, _right(request, status, body))


def _right(request: Request, status: int, body: bytes) -> bool:
    if status != request.status:
        return False
    if status != 200:
        return set(json.loads(body)) == {"error"}
    if request.path == "/purify":
        return PIL.Image.open(io.BytesIO(body)).size == (request.side, request.side)
    return len(json.loads(body)["defended"]) == 5


@contextlib.contextmanager
def served(side: int, workers: int) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process id."""
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.txt"
        labels.write_text("\n".join(f"class {i}" for i in range(CLASSES)), encoding="utf-8")
        arguments = ["--model", "benchmarks.soak:classifier", "--labels", str(labels), "--port", "0", "--workers", str(workers)]
        sizes = ["--resize", str(side), "--crop", str(side), "--max-megabytes", str(LIMIT_MIB), "--batch-size", str(BATCH)]
        command = [sys.executable, "-m", "oag_transform", "serve", *arguments, *sizes]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                found = re.search(r":(\d+)/", process.stdout.readline() if process.stdout else "")
                if found is None:
                    raise RuntimeError("the server did not begin")
                yield int(found[1]), process.pid
            finally:
                process.terminate()


def resident(pid: int) -> float:
    """Resident memory of a process in MiB (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    return int(found[1]) / 1024 if found else float("nan")


def soak(port: int, pid: int, asked: list[Request], clients: int) -> tuple[list[Answered], float, list[float]]:
    """The answers, the seconds that they took, and the server's memory along the way."""
    memory: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            memory.append(resident(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    try:
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda request: ask(port, request), asked))
    finally:
        seconds = time.perf_counter() - begun
        done.set()
        watcher.join()
    return answers, seconds, memory


def bare_rate(asked: list[Request], side: int) -> float:
    """Images per second of the transform alone, on the images that the server was asked to purify or defend."""
    transform = OnlineAlternateGenerator()
    by_size: dict[int, list[Tensor]] = {}
    for request in asked:
        if request.status == 200:
            image = F.pil_to_tensor(PIL.Image.open(io.BytesIO(request.body)).resize((request.side or side,) * 2))
            by_size.setdefault(request.side or side, []).append(image)
    begun = time.perf_counter()
    for images in by_size.values():
        for start in range(0, len(images), BATCH):
            transform(torch.stack(images[start : start + BATCH]))
    return sum(map(len, by_size.values())) / max(time.perf_counter() - begun, FEWEST_SECONDS)


def main() -> int:
    """Print the figures; returns 1 where a request was lost or answered wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--side", type=int, default=64, help="of the images in pixels")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    asked = requests(options.requests, options.side)
    print(
        f"{options.requests} requests from {options.clients} clients, {options.side} and {options.side + 16} pixels; "
        f"{platform.machine()}, {os.cpu_count()} CPUs, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}, "
        f"load {os.getloadavg()[0]:.1f} before"
    )
    with served(options.side, options.workers) as (port, pid):
        soak(port, pid, asked[:40], options.clients)  # warm
        at_first = resident(pid)
        answers, seconds, memory = soak(port, pid, asked, options.clients)
        at_last = resident(pid)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/metrics")
            metrics = connection.getresponse().read().decode()
    good = [answer for answer in answers if answer.request.status == 200]
    wrong = [answer for answer in answers if not answer.right]
    print(f"statuses: {dict(sorted(Counter(answer.status for answer in answers).items()))}; lost or wrong: {len(wrong)}")
    for answer in wrong[:5]:
        print(f"  {answer.request.path}: expected {answer.request.status}, got {answer.status}")
    for name, these in (("good", good), ("bad", [answer for answer in answers if answer.request.status != 200])):
        cuts = statistics.quantiles([answer.seconds for answer in these], n=20)
        print(f"seconds to an answer, {name}: p50 {cuts[9]:.3f}, p95 {cuts[18]:.3f}")
    batches, images = (float(re.findall(rf"^oag_batch_size_{name} (\S+)", metrics, re.M)[0]) for name in ("count", "sum"))
    print(f"{images / batches:.1f} images in a batch on average")
    size = max(1, len(memory) // 4)
    quarters = [round(statistics.mean(part)) for i in range(4) if (part := memory[i * size : (i + 1) * size])]
    print(f"server's memory, MiB: {at_first:.0f} before, by quarters {quarters}, {at_last:.0f} after")
    print(f"images/s: {len(good) / seconds:.1f} served, {bare_rate(asked, options.side):.1f} of the transform alone")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
