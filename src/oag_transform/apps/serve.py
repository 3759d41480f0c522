"""``oag-transform serve``: a defended classifier over HTTP, and a page to see what the defense does to an attack."""

import argparse
import dataclasses
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import photographs, process
from .service.settings import MEGAPIXEL, MIB, Service

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    from .service.engine import Engine

HELP = "a defended classifier over HTTP, and a page to try it"
EXTRA: str | None = "serve"

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """What ``oag-transform serve`` is asked for; :func:`add_arguments` says what each means."""

    model: str
    weights: str | None
    labels: Path | None
    resize: int | None
    crop: int | None
    host: str
    port: int
    network_steps: int | None
    strength: float | None
    samples: int
    seed: int | None
    max_megabytes: float
    max_megapixels: float
    max_purify_megapixels: float
    queue: int
    timeout: float
    batch_size: int
    batch_wait: float
    workers: int
    device: str

    def __post_init__(self) -> None:
        from .. import _checks  # with torch

        for name in ("queue", "batch_size", "workers", "samples"):
            _checks.integer(f"--{name.replace('_', '-')}", getattr(self, name), at_least=1)
        for name in ("max_megabytes", "max_megapixels", "max_purify_megapixels", "timeout"):
            _checks.number(f"--{name.replace('_', '-')}", getattr(self, name), above=0)
        _checks.number("--batch-wait", self.batch_wait, at_least=0)
        if _checks.integer("--port", self.port) > 65535:
            raise ValueError(f"--port must be at most 65535, got {self.port}")
        photographs.check_sides(self.resize, self.crop)

    @classmethod
    def of(cls, options: argparse.Namespace) -> "ServeOptions":
        """Those of a command line.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})

    def service(self) -> Service:
        """Its limits and sizes."""
        return Service(
            body=int(self.max_megabytes * MIB),
            pixels=int(self.max_megapixels * MEGAPIXEL),
            purify_pixels=int(self.max_purify_megapixels * MEGAPIXEL),
            queue=self.queue,
            timeout=self.timeout,
            batch_size=self.batch_size,
            batch_wait=self.batch_wait,
            workers=self.workers,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Serve a classifier behind the online alternate generator. POST an image as the body to /classify,\n"
        "/classify?purified=true or /purify; open / in a browser to try gray-box attacks. /health and /metrics tell how\n"
        "it fares. Nothing that is sent is kept. There is no authentication and no TLS: whoever reaches the port may use it."
    )
    parser.add_argument(
        "--model", required=True, help="efficientnet-lite0|1|2, a torchvision model, module:function, or FILE.pt of fit-target"
    )
    parser.add_argument("--weights", help="of a torchvision model: DEFAULT, a name, or a file with a state dict")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="names of the classes, one a line (default: those that come with the model)"
    )
    parser.add_argument("--resize", type=int, help="short side in pixels (default: the target's own; 256 for a callable)")
    parser.add_argument("--crop", type=int, help="centre crop in pixels (default: the target's own; 224 for a callable)")
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen at (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    defense = parser.add_argument_group("defense")
    defense.add_argument("--network-steps", type=int, help="T_N (default: the transform's)")
    defense.add_argument("--strength", type=float, help="above 0, at most 1 (default: what the noise of each image calls for)")
    defense.add_argument("--samples", type=int, default=1, help="purifications to average over (default: %(default)s)")
    defense.add_argument("--seed", type=int, help="the same answer to the same image (default: fresh entropy, as is safer)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-megabytes", type=float, default=10, help="of an upload, in MiB (default: %(default)s)")
    limits.add_argument("--max-megapixels", type=float, default=25, help="of an uploaded image (default: %(default)s)")
    limits.add_argument("--max-purify-megapixels", type=float, default=1, help="of an image for /purify (default: %(default)s)")
    limits.add_argument("--queue", type=int, default=64, help="images in the server at one time (default: %(default)s)")
    limits.add_argument("--timeout", type=float, default=60, help="seconds from request to answer (default: %(default)s)")
    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=8, help="images of equal size that go together (default: %(default)s)")
    work.add_argument("--batch-wait", type=float, default=0.01, help="seconds to wait for others (default: %(default)s)")
    work.add_argument("--workers", type=int, default=1, help="threads of work, sharing the processors (default: %(default)s)")
    work.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Serve until a signal says otherwise; returns 0.

    Raises:
        ValueError: an argument is wrong; nothing was served.
        OSError: the port can't be had.
    """
    asked = ServeOptions.of(options)
    import uvicorn  # of the extra

    from .service import application  # with torch

    engine = _engine(asked)
    family = socket.AF_INET6 if ":" in asked.host else socket.AF_INET
    with socket.create_server((asked.host, asked.port), family=family, backlog=2 * asked.queue) as listening:
        port = listening.getsockname()[1]
        shown = f"[{asked.host}]" if family == socket.AF_INET6 else asked.host
        print(f"{engine.target.name}, defended, at http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
        if asked.host not in LOOPBACK:
            print("whoever reaches this port may use it: there is no authentication and no TLS", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            application.make(engine, asked.service()),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(asked.timeout) + 1,
        )
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _engine(options: ServeOptions) -> "Engine":
    """Everything that can be wrong with the arguments comes before a port is opened."""
    import torch

    from ..evaluation.targets import load_target
    from ..transform import OnlineAlternateGenerator
    from .service.engine import Engine, class_names

    process.look_for_modules_here()
    device = photographs.find_device(options.device)
    torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
    chosen = ("network_steps", "strength", "seed")
    transform = OnlineAlternateGenerator(
        **{name: getattr(options, name) for name in chosen if getattr(options, name) is not None}
    )
    classes = class_names(options.model, options.weights, options.labels)
    target = load_target(
        options.model, options.weights, classes=classes, device=device, resize=options.resize, crop=options.crop
    )
    return Engine(target, classes, transform, options.samples, device)
