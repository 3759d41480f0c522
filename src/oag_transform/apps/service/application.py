"""The HTTP routes: requests, answers and refusals. No request is stored."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import anyio
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, exposition
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torchvision.transforms.v2 import functional as tvf

from ... import _checks
from ...transform import DivergenceError
from . import upload
from .batching import Batcher
from .engine import (
    ATTACK,
    ATTACKS,
    CLASSIFY,
    LARGEST_EPS,
    MAGNIFIED,
    PURIFY,
    Attacked,
    Classified,
    Engine,
    Guess,
    Work,
    data_url,
    difference,
    png,
)
from .settings import MIB, Service
from .upload import RefusedError

HERE = Path(__file__).parent
DRAINED = 4
"""A refused upload is read up to this multiple of the limit: clients read the answer only after they have sent all."""
SECONDS_DRAINED = 5
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

T = TypeVar("T")


class Api:
    """State that the routes share: the engine and its batcher, the number of active requests, and the metrics."""

    def __init__(self, engine: Engine, service: Service) -> None:
        self.engine, self.service = engine, service
        self.inside, self.attacks = 0, itertools.count()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("oag_requests", "Requests answered.", ("path", "status"), registry=self.registry)
        self.seconds = Histogram("oag_request_seconds", "Seconds from request to answer.", ("path",), registry=self.registry)
        self.images = Counter("oag_images", "Images processed.", ("work",), registry=self.registry)
        self.sizes = Histogram("oag_batch_size", "Images in a batch.", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64))
        inside = Gauge("oag_requests_inside", "Requests with an image in progress.", registry=self.registry)
        inside.set_function(lambda: self.inside)
        waiting = Gauge("oag_images_waiting", "Images that wait for a batch.", registry=self.registry)
        waiting.set_function(lambda: len(self.batcher))
        self.batcher: Batcher[Work, torch.Tensor, Any] = Batcher(
            self._run, size=service.batch_size, wait=service.batch_wait, workers=service.workers
        )
        # bounds the memory of images that are decoded at the same time
        self.codecs = ThreadPoolExecutor(service.workers, "codec")

    def close(self) -> None:
        """Stop the threads."""
        self.batcher.close()
        self.codecs.shutdown(cancel_futures=True)

    def _run(self, work: Work, images: Sequence[torch.Tensor]) -> Sequence[Any]:
        results = self.engine.run(work, images)
        self.sizes.observe(len(images))
        self.images.labels(work.kind).inc(len(images))
        return results

    async def in_codec(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that decodes or encodes in the threads for codecs, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.codecs, function, *arguments)

    async def answer(self, request: Request, respond: "Callable[[bytes], Awaitable[Response]]") -> Response:
        """Read the body of a request within the limits, and answer with ``respond(body)``.

        Raises:
            RefusedError: 408, 413, 415 or 503; and the errors of ``respond``.
        """
        if self.inside >= self.service.queue:
            await _drain(request, DRAINED * self.service.body)
            raise RefusedError(503, f"The server is busy with {self.inside} images, as many as it takes; try again soon.")
        self.inside += 1
        seconds = self.service.timeout
        body: bytes | None = None
        try:
            with anyio.fail_after(seconds):
                body = await self._body(request)
                return await respond(body)
        except TimeoutError as error:
            if body is None:
                raise RefusedError(408, f"The image didn't arrive within {seconds:g} seconds; send it again.") from error
            raise RefusedError(503, f"There was no answer within {seconds:g} seconds; try again soon.") from error
        finally:
            self.inside -= 1

    async def _body(self, request: Request) -> bytes:
        limit = self.service.body
        try:
            upload.check_type(request.headers.get("content-type"))
        except RefusedError:
            await _drain(request, DRAINED * limit)
            raise
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            else:
                parts.clear()
            if size > DRAINED * limit:
                break
        if size > limit:
            raise RefusedError(413, f"The upload has more than {limit / MIB:g} MiB, which is the most that is accepted.")
        return b"".join(parts)

    async def prepared(self, body: bytes) -> torch.Tensor:
        """Decode an upload, resize it and crop it for the classifier.

        Raises:
            RefusedError: see :func:`.upload.decode`; 422 for an image that is too thin.
        """
        image = await self.in_codec(upload.decode, body, self.service.pixels)
        try:
            return await self.in_codec(self.engine.prepare, image)
        except ValueError as error:
            raise RefusedError(422, upload.sentence(str(error))) from error

    async def result(self, kind: str, image: torch.Tensor, attack: tuple[str, int] | None = None) -> Any:
        """Process an image with the engine, in a batch with others unless it is attacked.

        Raises:
            RefusedError: 422 for an image that can't be processed.
        """
        try:
            work = Work(kind, tuple(image.shape), attack, 0 if attack is None else next(self.attacks))
            return await asyncio.wrap_future(self.batcher.submit(work, image))
        except DivergenceError as error:
            raise RefusedError(422, "This image can't be processed: the energy network diverged.") from error
        except _checks.NonFiniteLogitsError:  # the fault of the classifier
            raise
        except ValueError as error:
            raise RefusedError(422, f"This image can't be processed: {' '.join(str(error).split())}.") from error

    # the routes

    async def classify(self, request: Request) -> Response:
        """Five likeliest classes, undefended and defended; with ``?purified=true`` the purified image too."""
        _only(request, "purified")
        want = _choice(request, "purified", ("false", "true"), "false") == "true"

        async def respond(body: bytes) -> Response:
            found: Classified = await self.result(CLASSIFY, await self.prepared(body))
            content = {
                "model": self.engine.target.name,
                "undefended": _guesses(found.undefended),
                "defended": _guesses(found.defended),
            }
            if want:
                content["purified"] = await self.in_codec(data_url, found.purified)
            return JSONResponse(content)

        return await self.answer(request, respond)

    async def purify(self, request: Request) -> Response:
        """The image purified at its own size, as a PNG."""
        _only(request)
        pixels = min(self.service.pixels, self.service.purify_pixels)

        async def respond(body: bytes) -> Response:
            image = await self.in_codec(lambda: _tensor(upload.decode(body, pixels)))
            return Response(await self.in_codec(png, await self.result(PURIFY, image)), media_type="image/png")

        return await self.answer(request, respond)

    async def attack(self, request: Request) -> Response:
        """The attacked image, and its purification step by step."""
        _only(request, "method", "eps")
        method = _choice(request, "method", ATTACKS, ATTACKS[0])
        eps = int(_choice(request, "eps", tuple(str(eps) for eps in range(1, LARGEST_EPS + 1)), "6"))

        async def respond(body: bytes) -> Response:
            found: Attacked = await self.result(ATTACK, await self.prepared(body), (method, eps))
            return await self.in_codec(lambda: JSONResponse(_shown(found)))

        return await self.answer(request, respond)

    async def health(self, _: Request) -> Response:
        """Whether the server can process images."""
        alive = self.batcher.alive()
        content = {"status": "ok" if alive else "a worker has ended", "model": self.engine.target.name, "inside": self.inside}
        return JSONResponse(content, 200 if alive else 503)

    async def metrics(self, _: Request) -> Response:
        """Metrics in the format of Prometheus."""
        return Response(exposition.generate_latest(self.registry), headers={"Content-Type": exposition.CONTENT_TYPE_LATEST})

    async def about(self, _: Request) -> Response:
        """Facts about the server that the page shows."""
        return JSONResponse(
            {
                "model": self.engine.target.name,
                "classes": len(self.engine.classes),
                "side": self.engine.target.preprocessing.crop,
                "steps": self.engine.transform.network_steps,
                "largest_eps": LARGEST_EPS,
                "magnified": MAGNIFIED,
                "body": self.service.body,
                "samples": json.loads((HERE / "samples" / "samples.json").read_text(encoding="utf-8")),
            }
        )


def make(engine: Engine, service: Service) -> ASGIApp:
    """The ASGI application. Its threads end with its lifespan."""
    api = Api(engine, service)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(api.close)

    async def page(_: Request) -> Response:
        return FileResponse(HERE / "page" / "index.html")

    routes = [
        Route("/", page),
        Route("/classify", api.classify, methods=["POST"]),
        Route("/purify", api.purify, methods=["POST"]),
        Route("/attack", api.attack, methods=["POST"]),
        Route("/about", api.about),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Mount("/page", StaticFiles(directory=HERE / "page")),
        Mount("/samples", StaticFiles(directory=HERE / "samples")),
    ]
    paths = {route.path for route in routes if isinstance(route, Route)}
    handlers = {RefusedError: _refused, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _failed}
    application = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return _Outside(application, api, paths)  # a middleware would not see answers of 500


class _Outside:
    """Adds headers to every answer and counts every request."""

    def __init__(self, app: ASGIApp, api: Api, paths: set[str]) -> None:
        self.app, self.api, self.paths = app, api, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        path = scope["path"] if scope["path"] in self.paths else "other"  # clients can't create metric labels

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in present)]
                self.api.requests.labels(path, message["status"]).inc()
                self.api.seconds.labels(path).observe(time.perf_counter() - begun)
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def _drain(request: Request, most: int) -> None:
    """Read a body and discard it."""
    size = 0
    with contextlib.suppress(ClientDisconnect), anyio.move_on_after(SECONDS_DRAINED):
        async for part in request.stream():
            size += len(part)
            if size > most:
                return


def _only(request: Request, *names: str) -> None:
    """Refuse a query with other names than these."""
    if others := [name for name in request.query_params if name not in names]:
        known = f"has {', '.join(names)}" if names else "is empty"
        raise RefusedError(422, f"The query of this path {known}, got {others[0][:40]!r}.")


def _choice(request: Request, name: str, choices: Sequence[str], default: str) -> str:
    """A validated value of the query string."""
    value = request.query_params.get(name, default)
    if value not in choices:
        shown = ", ".join(choices) if len(choices) < 5 else f"{choices[0]} to {choices[-1]}"
        raise RefusedError(422, f"Of the query, {name} must be one of {shown}, got {value[:40]!r}.")
    return value


def _tensor(image: Any) -> torch.Tensor:
    return tvf.pil_to_tensor(image)


def _guesses(guesses: Sequence[Guess]) -> list[dict[str, Any]]:
    return [guess._asdict() for guess in guesses]


def _shown(found: Attacked) -> dict[str, Any]:
    """The JSON of an attack, as the page reads it."""
    purified = found.frames[-1].image
    return {
        "original": {"image": data_url(found.original), "guesses": _guesses(found.undefended)},
        "attacked": {
            "image": data_url(found.attacked),
            "difference": data_url(difference(found.attacked, found.original)),
            "guesses": _guesses(found.undefended_attacked),
        },
        "purified": {
            "image": data_url(purified),
            "difference": data_url(difference(purified, found.original)),
            "guesses": _guesses(found.defended),
        },
        "frames": [
            {"step": f.step, "image": data_url(f.image), "residual": f.residual, "guess": f.guess._asdict()}
            for f in found.frames
        ],
    }


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    more = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"error": sentence}, status, headers={**(headers or {}), **more})


async def _refused(_: Request, error: Any) -> Response:
    return _error(error.status, error.sentence)


async def _http_error(request: Request, error: Any) -> Response:
    sentences = {404: f"There is nothing at {request.url.path[:80]}.", 405: f"{request.method} is not answered here."}
    return _error(error.status_code, sentences.get(error.status_code, f"{error.detail}."), dict(error.headers or {}))


async def _gone(*_: Any) -> Response:
    return _error(400, "The client went away.")  # nobody reads it


async def _failed(*_: Any) -> Response:
    return _error(500, "The server failed on this request; what went wrong is in its log.")
