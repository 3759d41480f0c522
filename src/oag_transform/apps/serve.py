"""``oag-transform serve``: a defended classifier over HTTP, with a page to try attacks on it."""

import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import process
from .options import ClassifierOptions, DeviceOptions, check_input, default
from .service.settings import MEGAPIXEL, MIB, Service

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    from .service.engine import Engine

EXTRA = "serve"

LARGEST = 1e9  # of sizes in millions, and of seconds
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Serve(DeviceOptions, ClassifierOptions):
    """Serve a defended classifier over HTTP, with a page to try it.

    POST an image as the body to /classify, /classify?purified=true or /purify. Open / in a browser to try gray-box attacks.
    /health and /metrics are for monitoring. No request is stored. There is no authentication and no TLS: anyone who reaches
    the port can use the service.
    """

    labels: Annotated[Path | None, default("those that come with the model")] = None
    """File with the names of the classes, one a line."""
    host: str = LOOPBACK[0]
    """Address to listen at. The default accepts connections from this machine only."""
    port: int = 8000
    """Port to listen at; 0: any free port."""
    network_steps: Annotated[int | None, default("the transform's")] = None
    """T_N of the defense."""
    strength: Annotated[float | None, default("by the noise of each image")] = None
    """Strength of the defense, above 0 and at most 1."""
    samples: int = 1
    """Number of purifications whose class probabilities are averaged."""
    seed: Annotated[int | None, default("fresh entropy, which is safer")] = None
    """Random seed. The same image then gets the same answer."""
    max_megabytes: float = 10
    """Largest upload, in MiB."""
    max_megapixels: float = 25
    """Largest uploaded image, in megapixels."""
    max_purify_megapixels: float = 1
    """Largest image for /purify, in megapixels."""
    queue: int = 64
    """Largest number of images in the server at one time."""
    timeout: float = 60
    """Longest time from request to answer, in seconds."""
    batch_wait: float = 0.01
    """Longest wait for images of equal size that fill a batch, in seconds."""
    workers: int = 1
    """Number of worker threads, which share the processors."""

    def __post_init__(self) -> None:
        from .. import _checks  # imports torch

        ClassifierOptions.__post_init__(self)
        DeviceOptions.__post_init__(self)
        for name in ("queue", "workers", "samples"):
            _checks.integer(f"--{name}", getattr(self, name), at_least=1)
        for name in ("max_megabytes", "max_megapixels", "max_purify_megapixels", "timeout"):
            _checks.number(f"--{name.replace('_', '-')}", getattr(self, name), above=0, below=LARGEST)
        _checks.number("--batch-wait", self.batch_wait, at_least=0, below=LARGEST)
        check_input("--labels", self.labels)
        if _checks.integer("--port", self.port) > 65535:
            raise ValueError(f"--port must be at most 65535, got {self.port}")

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

    def run(self) -> int:
        """Serve until a signal ends it; returns 0.

        Raises:
            ValueError: an argument is wrong; nothing was served.
            OSError: the port can't be opened.
        """
        import uvicorn  # of the extra

        from .service import application  # with torch

        engine = self.engine()
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.create_server((self.host, self.port), family=family, backlog=min(2 * self.queue, 65535)) as listening:
            port = listening.getsockname()[1]
            shown = f"[{self.host}]" if family == socket.AF_INET6 else self.host
            print(f"{engine.target.name}, defended, at http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
            if self.host not in LOOPBACK:
                print(
                    "anyone who reaches this port can use the service: there is no authentication and no TLS",
                    file=sys.stderr,
                    flush=True,
                )
            config = uvicorn.Config(
                application.make(engine, self.service()),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(self.timeout) + 1,
            )
            uvicorn.Server(config).run(sockets=[listening])
        return 0

    def engine(self) -> "Engine":
        """The engine. It reports all further errors in the arguments before a port is opened."""
        import torch

        from ..transform import OnlineAlternateGenerator
        from .service.engine import Engine, class_names

        process.look_for_modules_here()
        device = self.find_device()
        torch.set_num_threads(max(1, torch.get_num_threads() // self.workers))
        chosen = ("network_steps", "strength", "seed")
        transform = OnlineAlternateGenerator(
            **{name: getattr(self, name) for name in chosen if getattr(self, name) is not None}
        )
        classes = class_names(self.model, self.weights, self.labels)
        return Engine(self.load(classes, device), classes, transform, self.samples, device)


COMMAND = Serve
