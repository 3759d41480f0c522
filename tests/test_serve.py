"""The service: real servers on loopback, with a classifier of brightness; limits, batches, page."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import queue
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

pytest.importorskip("starlette")

import anyio
import uvicorn

from examples import ask_service
from oag_transform import DivergenceError, OnlineAlternateGenerator, _checks
from oag_transform.apps import cli
from oag_transform.apps.serve import Serve
from oag_transform.apps.service import application
from oag_transform.apps.service.application import HERE
from oag_transform.apps.service.batching import Batcher
from oag_transform.apps.service.engine import CLASSIFY, PURIFY, Engine, Work, _stream, class_names, difference
from oag_transform.apps.service.settings import Service
from oag_transform.apps.service.upload import RefusedError, check_type, decode
from oag_transform.evaluation.targets import load_target
from tests.tiny import CLASSES

pytestmark = pytest.mark.serve

SIDE = 40
SMALL = Service(
    body=200_000, pixels=400_000, purify_pixels=10_000, queue=16, timeout=3600, batch_size=4, batch_wait=0.02, workers=2
)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """Where a server listens, and what it was made with."""

    def __init__(self, port: int, engine: Engine) -> None:
        self.port, self.engine = port, engine

    def ask(self, method: str, path: str, body: bytes | None = None, content_type: str | None = "image/png") -> Answer:
        headers = {} if content_type is None or body is None else {"Content-Type": content_type}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def post(self, path: str, body: bytes, content_type: str | None = "image/png") -> Answer:
        return self.ask("POST", path, body, content_type)


def make_engine() -> Engine:
    target = load_target("tests.tiny:brightness", classes=CLASSES, resize=SIDE, crop=SIDE)
    # in chunks of one size, images are equal bit for bit
    transform = OnlineAlternateGenerator(network_steps=2, filters=4, seed=0, chunk_size=1, compute_dtype=torch.float32)
    return Engine(target, CLASSES, transform, 1, torch.device("cpu"))


@contextlib.contextmanager
def serving(engine: Engine, service: Service) -> Iterator[Server]:
    config = uvicorn.Config(application.make(engine, service), log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Server(listening.getsockname()[1], engine)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(make_engine(), SMALL) as running:
        yield running


def image(level: float, side: int = SIDE, seed: int = 0) -> PIL.Image.Image:
    """A picture of some mean, from 0 to 1, in three slightly different channels."""
    noise = np.random.default_rng(seed).normal(0, 0.02, (side, side, 3)) + np.array([-0.02, 0, 0.02])
    return PIL.Image.fromarray(np.uint8(255 * (level + noise - noise.mean()).clip(0, 1)))


def encoded(picture: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(level: float, side: int = SIDE, seed: int = 0) -> bytes:
    return encoded(image(level, side, seed))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels, all black."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# classification and purification


def test_top_guesses_are_the_classifiers_own_and_those_behind_the_defense(server: Server) -> None:
    picture = image(0.49)
    answer = server.post("/classify", encoded(picture))
    assert answer.status == 200
    assert set(answer.json) == {"model", "undefended", "defended"}
    mean = np.asarray(picture).mean() / 255
    bright = 1 / (1 + np.exp(60 * (0.5 - mean)))  # the softmax of -30 x and 30 x
    assert [guess["name"] for guess in answer.json["undefended"]] == list(CLASSES)
    assert answer.json["undefended"][0]["probability"] == pytest.approx(1 - bright, abs=1e-5)
    assert answer.json["undefended"][1] == {"label": 1, "name": "b_bright", "probability": pytest.approx(bright, abs=1e-5)}
    assert answer.json["defended"] != answer.json["undefended"]
    assert sum(guess["probability"] for guess in answer.json["defended"]) == pytest.approx(1)
    assert server.post("/classify", encoded(image(0.6))).json["undefended"][0]["name"] == "b_bright"


def test_the_purified_image_on_request_is_the_classified_one(server: Server) -> None:
    answer = server.post("/classify?purified=true", png(0.49)).json
    head, _, data = answer["purified"].partition(",")
    assert head == "data:image/png;base64"
    purified = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
    assert purified.shape == (SIDE, SIDE, 3)
    # the four views mirror a border of 5 pixels, so that their mean is only about that of the image
    bright = 1 / (1 + np.exp(60 * (0.5 - purified.mean() / 255)))
    assert answer["defended"][0]["probability"] == pytest.approx(max(bright, 1 - bright), abs=0.05)


def test_a_large_image_is_resized_and_cropped_for_the_classifier(server: Server) -> None:
    wide = PIL.Image.new("RGB", (300, 100), "black")
    wide.paste(PIL.Image.new("RGB", (100, 100), "white"), (100, 0))  # the centre is what is left
    for kind, name in (("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")):
        assert server.post("/classify", encoded(wide, kind), name).json["undefended"][0]["name"] == "b_bright"


def test_an_image_is_purified_at_its_own_size(server: Server) -> None:
    picture = image(0.5, 60)
    answer = server.post("/purify", encoded(picture))
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    purified = PIL.Image.open(io.BytesIO(answer.body))
    assert (purified.size, purified.mode) == ((60, 60), "RGB")
    direct = server.engine.run(Work(PURIFY, (3, 60, 60)), [tvf.pil_to_tensor(picture)])[0]
    np.testing.assert_array_equal(np.asarray(purified), direct.permute(1, 2, 0).numpy())
    assert not np.array_equal(np.asarray(purified), np.asarray(picture))


def test_an_answer_is_independent_of_other_requests(server: Server) -> None:
    """With a seed: alone, and in a crowd of other sizes and pictures."""
    bodies = [png(0.3 + 0.04 * i, side, i) for i, side in enumerate([40, 40, 50, 40, 60, 50, 40, 40, 50, 60] * 2)]
    alone = [server.post("/purify", body).body for body in bodies]
    assert len(set(alone)) == len(bodies)
    order = list(range(len(bodies)))
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as clients:
        crowd = list(clients.map(lambda i: server.post("/purify", bodies[i]), order))
    assert [answer.status for answer in crowd] == [200] * len(bodies)
    assert [answer.body for answer in crowd] == [alone[i] for i in order]


def test_attack_and_its_undoing(server: Server) -> None:
    picture = image(0.495)
    answers = {eps: server.post(f"/attack?method=igsm&eps={eps}", encoded(picture)) for eps in (1, 8)}
    assert [answer.status for answer in answers.values()] == [200, 200]
    for eps, answer in answers.items():
        shown = answer.json
        pixels = {
            name: np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(shown[name]["image"].partition(",")[2])))).astype(int)
            for name in ("original", "attacked", "purified")
        }
        np.testing.assert_array_equal(pixels["original"], np.asarray(picture))
        moved = np.abs(pixels["attacked"] - pixels["original"])
        assert 0 < moved.max() <= eps
        assert [frame["step"] for frame in shown["frames"]] == [1, 2]
        assert shown["frames"][-1]["image"] == shown["purified"]["image"]
        assert shown["frames"][-1]["guess"] == shown["purified"]["guesses"][0]
        root_mean_square = np.sqrt(np.mean((pixels["purified"] - pixels["attacked"]) ** 2))
        assert shown["frames"][-1]["residual"] == pytest.approx(root_mean_square, rel=0.1)  # before rounding and clipping
    assert answers[8].json["original"]["guesses"][0]["name"] == "a_dark"
    assert answers[8].json["attacked"]["guesses"][0]["name"] == "b_bright"
    other = server.post("/attack?method=mifgsm&eps=8", encoded(picture)).json
    assert other["attacked"]["guesses"][0]["name"] == "b_bright"


def test_differences_are_magnified_and_held() -> None:
    a, b = torch.tensor([[[0, 10, 200]]], dtype=torch.uint8), torch.tensor([[[0, 13, 100]]], dtype=torch.uint8)
    assert difference(a, b).tolist() == difference(b, a).tolist() == [[[0, 45, 255]]]


# limits

SCAN = b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00\x00"  # of a JPEG: each is decoded for the whole picture


def test_types_that_are_not_images_are_refused(server: Server) -> None:
    for named in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/svg+xml"):
        refused(server.post("/classify", png(0.5), named), 415, f"got {named.partition(';')[0]}")
    check_type("IMAGE/JPEG; charset=x")
    with pytest.raises(RefusedError, match=r"got none"):
        check_type(None)


def refused(answer: Answer, status: int, words: str) -> None:
    """One sentence in JSON, and no more."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json) == {"error"}
    sentence = answer.json["error"]
    assert words in sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert len(sentence) < 300


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "empty"),
        (b"no image at all", 415, "JPEG, PNG or WEBP"),
        (encoded(image(0.5), "GIF"), 415, "JPEG, PNG or WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 415, "JPEG, PNG or WEBP"),
        (png(0.5)[:200], 422, "not an image that can be read"),
        (encoded(image(0.5), "JPEG")[:400], 422, "not an image that can be read"),
        (png(0.5).replace(b"IDAT", b"IDAX", 1), 422, "not an image that can be read"),
        (bomb(700, 700), 413, "700 x 700 pixels; at most 0.4 megapixels"),
        (bomb(60_000, 60_000), 413, "pixels"),
        (encoded(PIL.Image.new("L", (500, 20))), 422, "16 times the other"),
        (encoded(image(0.5), "JPEG")[:-2] + 200 * SCAN, 422, "more than 100 scans"),
    ],
    ids=["empty", "text", "gif", "postscript", "cut-png", "cut-jpeg", "broken-png", "bomb", "huge-bomb", "strip", "scans"],
)
def test_bad_files_are_told_in_one_sentence(server: Server, body: bytes, status: int, words: str) -> None:
    for path in ("/classify", "/attack?eps=4"):
        refused(server.post(path, body, "application/octet-stream"), status, words)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_damaged_files_are_refused(noise: bytes, place: int) -> None:
    whole = PNG_AND_JPEG[len(noise) % 2]
    damaged = whole[:place] + noise + whole[place + len(noise) :]
    try:
        read = decode(damaged, 400_000)
    except RefusedError as refusal:
        status, sentence = refusal.status, refusal.sentence
    else:
        status, sentence = 200, read.mode
    assert status in (200, 413, 415, 422)
    assert "\n" not in sentence
    assert (status == 200) == (sentence == "RGB")


PNG_AND_JPEG = (png(0.5), encoded(image(0.5), "JPEG"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_data_behind_a_jpeg_and_its_thumbnail_have_no_scans(options: dict[str, Any]) -> None:
    thumbnail = PNG_AND_JPEG[1][:-2] + 200 * SCAN
    buffer = io.BytesIO()
    image(0.5).save(buffer, "JPEG", exif=b"Exif\0\0" + thumbnail, **options)
    motion_photo = buffer.getvalue() + 1000 * SCAN
    whole = decode(buffer.getvalue(), 400_000)
    assert decode(motion_photo, 400_000).tobytes() == whole.tobytes()
    with pytest.raises(RefusedError, match="more than 100 scans"):
        decode(buffer.getvalue()[:-2] + 200 * SCAN, 400_000)


def test_a_turned_jpeg_with_a_tag_of_another_type_is_answered(server: Server) -> None:
    tags = "1201 0300 01000000 06000000  3101 0500 01000000 26000000  00000000  0100000001000000"  # turned; software: a ratio
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + bytes.fromhex(tags)
    jpeg = encoded(image(0.5), "JPEG")
    content = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    for path in ("/classify", "/purify", "/attack?eps=4"):
        assert server.post(path, content, "image/jpeg").status == 200


def test_a_too_long_upload_is_refused_and_the_client_gets_the_answer(server: Server) -> None:
    for size in (SMALL.body + 1, 3 * SMALL.body):
        refused(server.post("/classify", bytes(size)), 413, "more than 0.19")
    assert server.post("/classify", png(0.5) + bytes(SMALL.body - len(png(0.5)))).status == 200  # as many as may be


def test_a_body_of_unknown_length_is_counted(server: Server) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        parts = (bytes(10_000) for _ in range(30))
        connection.request("POST", "/classify", parts, {"Content-Type": "image/png"}, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_purifying_at_its_own_size_has_a_limit_of_its_own_and_a_least(server: Server) -> None:
    refused(server.post("/purify", png(0.5, 101)), 413, "at most 0.01 megapixels")
    refused(server.post("/purify", png(0.5, 1)), 422, "at least 2 pixels, got 1 x 1")


@pytest.mark.parametrize("query", ["eps=0", "eps=17", "eps=x", "eps=6.5", "method=cw", "method=", "eps="])
def test_bad_queries(server: Server, query: str) -> None:
    refused(server.post(f"/attack?{query}", png(0.5)), 422, f"Of the query, {query.partition(chr(61))[0]} must be one of")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/attack?foo=1", "The query of this path has method, eps, got 'foo'."),
        ("/classify?eps=1", "The query of this path has purified, got 'eps'."),
        ("/purify?purified=true", "The query of this path is empty, got 'purified'."),
    ],
)
def test_names_that_a_query_does_not_have(server: Server, path: str, told: str) -> None:
    refused(server.post(path, png(0.5)), 422, told)


def test_other_paths_and_methods(server: Server) -> None:
    refused(server.ask("GET", "/nothing"), 404, "/nothing")
    refused(server.ask("GET", "/page/../../engine.py"), 404, "nothing at")
    refused(server.ask("GET", "/page/%2e%2e/engine.py"), 404, "nothing at")
    refused(server.ask("GET", "/classify"), 405, "GET")
    refused(server.ask("DELETE", "/health"), 405, "DELETE")
    refused(server.post("/classify?purified=yes", png(0.5)), 422, "false, true")


class Gated(Engine):
    """An engine that waits until it may go on: until its gate is set, or its ``with`` block ends."""

    def __init__(self, engine: Engine) -> None:
        self.__dict__ = dict(engine.__dict__)
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.seen: list[tuple[Work, int]] = []

    def run(self, work: Work, images: Sequence[Tensor]) -> Sequence[Any]:
        self.seen.append((work, len(images)))
        self.begun.release()
        self.gate.wait()
        return super().run(work, images)

    def __enter__(self) -> "Gated":
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()


def until(true: Callable[[], bool]) -> None:
    """Ask the server or the browser until it is true, which only the suite's timeout ends: each question is a round trip."""
    while not true():
        pass


class Deadlines:
    """In place of ``anyio.fail_after``: deadlines that pass when a test says so, in the order in which they were set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        monkeypatch.setattr(anyio, "fail_after", self.fail_after)

    @contextlib.contextmanager
    def fail_after(self, _: float) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            self.waiting.put(lambda: loop.call_soon_threadsafe(scope.cancel))
            yield
        if scope.cancelled_caught:
            raise TimeoutError


def test_a_full_queue_refuses_and_nobody_inside_is_lost() -> None:
    engine = Gated(make_engine())
    with serving(engine, replace(SMALL, queue=3, workers=1)) as server, ThreadPoolExecutor(3) as clients, engine:
        inside = [clients.submit(server.post, "/classify", png(0.3 + 0.1 * i)) for i in range(3)]
        until(lambda: server.ask("GET", "/health").json["inside"] == 3)
        answer = server.post("/classify", png(0.5))
        refused(answer, 503, "busy with 3 images")
        assert answer.headers["retry-after"] == "1"
        engine.gate.set()
        assert [future.result().status for future in inside] == [200] * 3
        assert server.post("/classify", png(0.5)).status == 200


def test_equal_sizes_are_batched_and_others_are_not_mixed_in() -> None:
    engine = Gated(make_engine())
    sides = [40, 40, 50, 40, 50, 40, 40]
    with serving(engine, replace(SMALL, workers=1)) as server, ThreadPoolExecutor(8) as clients, engine:
        first = clients.submit(server.post, "/purify", png(0.5, 70))
        engine.begun.acquire()
        rest = [clients.submit(server.post, "/purify", png(0.4, side, i)) for i, side in enumerate(sides)]
        until(lambda: "oag_images_waiting 7.0" in server.ask("GET", "/metrics").body.decode())
        engine.gate.set()
        answers = [future.result() for future in [first, *rest]]
    assert [PIL.Image.open(io.BytesIO(answer.body)).size[0] for answer in answers] == [70, *sides]
    assert sorted((work.shape[1], count) for work, count in engine.seen) == [(40, 1), (40, 4), (50, 2), (70, 1)]


def test_an_attack_does_not_wait_for_another() -> None:
    engine = Gated(make_engine())
    with serving(engine, replace(SMALL, workers=1)) as server, ThreadPoolExecutor(3) as clients, engine:
        answers = [clients.submit(server.post, "/attack?eps=4", png(0.4)) for _ in range(3)]
        until(lambda: server.ask("GET", "/health").json["inside"] == 3)
        engine.gate.set()
        assert [answer.result().status for answer in answers] == [200] * 3
    assert [count for _, count in engine.seen] == [1, 1, 1]


def test_there_is_an_answer_in_time_though_the_work_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, deadlines = Gated(make_engine()), Deadlines(monkeypatch)
    with serving(engine, replace(SMALL, timeout=0.5, workers=1)) as server, ThreadPoolExecutor(2) as clients, engine:
        first = clients.submit(server.post, "/classify", png(0.5))
        engine.begun.acquire()
        second = clients.submit(server.post, "/classify", png(0.6))
        until(lambda: "oag_images_waiting 1.0" in server.ask("GET", "/metrics").body.decode())
        for answer in (first, second):
            deadlines.waiting.get()()
            refused(answer.result(), 503, "no answer within 0.5 seconds")
        engine.gate.set()
        assert server.post("/classify", png(0.5)).status == 200
    assert len(engine.seen) == 2  # what nobody waits for any more is not worked on


def test_a_slow_client_gets_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = Deadlines(monkeypatch)
    with serving(make_engine(), SMALL) as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc")
        deadlines.waiting.get()()
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        until(lambda: server.ask("GET", "/health").json["inside"] == 0)


def test_a_client_that_goes_away_leaves_nothing_behind(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc")
        until(lambda: server.ask("GET", "/health").json["inside"] == 1)
    until(lambda: server.ask("GET", "/health").json["inside"] == 0)
    assert server.post("/classify", png(0.5)).status == 200


class Faulty(Engine):
    def __init__(self, engine: Engine) -> None:
        self.__dict__ = dict(engine.__dict__)

    def run(self, work: Work, images: Sequence[Tensor]) -> Sequence[Any]:
        if any(image.float().mean() > 240 for image in images):
            raise RuntimeError("a fault\nof two lines")
        if any(100 < image.float().mean() < 110 for image in images):
            raise _checks.NonFiniteLogitsError([0])
        if any(image.float().mean() < 10 for image in images):
            raise DivergenceError("the energy network diverged for image(s) [0]", [0])
        return super().run(work, images)


def test_a_fault_of_the_server_is_500_without_details_and_its_neighbours_are_answered() -> None:
    with (
        serving(Faulty(make_engine()), replace(SMALL, batch_size=3, batch_wait=3600, workers=1)) as server,
        ThreadPoolExecutor(3) as clients,
    ):
        white, black, grey = clients.map(lambda level: server.post("/classify", png(level)), (1.0, 0.0, 0.5))
        refused(white, 500, "in its log")
        assert "fault" not in white.json["error"]
        assert "content-security-policy" in white.headers
        refused(black, 422, "the energy network diverged")
        assert grey.status == 200
        assert server.ask("GET", "/health").status == 200


def test_a_broken_classifier_is_no_fault_of_the_client() -> None:
    with serving(Faulty(make_engine()), replace(SMALL, batch_size=1, workers=1)) as server:
        refused(server.post("/classify", png(0.41)), 500, "in its log")


# the rest


def test_nothing_is_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    server.post("/classify?purified=true", encoded(image(0.5, 200)))
    server.post("/classify", bytes(SMALL.body + 1))
    server.post("/attack", png(0.5))
    assert list(tmp_path.iterdir()) == []


def test_health_and_metrics(server: Server) -> None:
    assert server.ask("GET", "/health").json == {"status": "ok", "model": "tests.tiny:brightness", "inside": 0}
    before, after = (metrics_after(server, ask) for ask in (False, True))
    name = 'oag_requests_total{path="/classify",status="200"}'
    assert after[name] == before.get(name, 0) + 1
    assert after['oag_images_total{work="classify"}'] == before.get('oag_images_total{work="classify"}', 0) + 1
    server.ask("GET", "/some/path/that/nobody/made")
    assert not [name for name in metrics_after(server, False) if "nobody" in name]


def metrics_after(server: Server, ask: bool) -> dict[str, float]:
    if ask:
        assert server.post("/classify", png(0.5)).status == 200
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = (line.rpartition(" ") for line in answer.body.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def test_the_page_and_its_samples_come_from_here_alone(server: Server) -> None:
    answer = server.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    about = server.ask("GET", "/about").json
    assert (about["model"], about["classes"], about["side"]) == ("tests.tiny:brightness", 2, SIDE)
    for path in ("/page/page.js", "/page/page.css", *(f"/samples/{sample['file']}" for sample in about["samples"])):
        found = server.ask("GET", path)
        assert found.status == 200
        assert len(found.body) < 60 * 1024
    for file in (HERE / "page").iterdir():
        assert "http:" not in file.read_text(encoding="utf-8")
        assert "https:" not in file.read_text(encoding="utf-8")
    licences = (HERE / "samples" / "LICENSES.md").read_text(encoding="utf-8")
    assert {path.name for path in (HERE / "samples").glob("*.jpg")} == {sample["file"] for sample in about["samples"]}
    assert all(sample["file"] in licences for sample in about["samples"])


# batches


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40), st.integers(1, 5), st.integers(1, 3))
def test_every_item_gets_its_own_result_in_a_batch_of_its_kind(items: list[tuple[int, bool]], size: int, workers: int) -> None:
    batches: list[tuple[int, list[tuple[int, int, bool]]]] = []

    def work(key: int, batch: Sequence[tuple[int, int, bool]]) -> list[int]:
        batches.append((key, list(batch)))
        if any(bad for _, _, bad in batch):
            raise ValueError(f"bad among {len(batch)}")
        return [number for number, _, _ in batch]

    batcher: Batcher[int, tuple[int, int, bool], int] = Batcher(work, size=size, wait=0.001, workers=workers)
    futures = [batcher.submit(key, (number, key, bad)) for number, (key, bad) in enumerate(items)]
    wait(futures)
    batcher.close()
    for number, (future, (_, bad)) in enumerate(zip(futures, items, strict=True)):
        if bad:
            assert str(future.exception()) == "bad among 1"  # it failed alone
        else:
            assert future.result() == number
    assert all(len(batch) <= size and {of for _, of, _ in batch} == {key} for key, batch in batches)


def test_a_full_batch_does_not_wait_and_an_item_does_not_wait_long() -> None:
    sizes: list[int] = []

    def work(_: str, batch: Sequence[int]) -> Sequence[int]:
        sizes.append(len(batch))
        return batch

    patient: Batcher[str, int, int] = Batcher(work, size=3, wait=1e6, workers=1)
    futures = [patient.submit("a", i) for i in range(6)]
    assert [future.result() for future in futures] == list(range(6))
    assert sizes == [3, 3]
    left = patient.submit("b", 0)
    patient.close()
    with pytest.raises(CancelledError):
        left.result()
    with pytest.raises(RuntimeError, match="closed"):
        patient.submit("a", 0)
    quick: Batcher[str, int, int] = Batcher(work, size=3, wait=0.01, workers=1)
    assert quick.submit("a", 5).result() == 5
    assert quick.alive()
    quick.close()
    assert not quick.alive()


def test_cancelled_items_are_not_processed() -> None:
    seen: list[int] = []

    def work(_: str, batch: Sequence[int]) -> Sequence[int]:
        seen.extend(batch)
        return batch

    batcher: Batcher[str, int, int] = Batcher(work, size=2, wait=60, workers=1)
    gone = batcher.submit("a", 1)
    assert gone.cancel()
    assert len(batcher) == 0
    assert [future.result() for future in (batcher.submit("a", 2), batcher.submit("a", 3))] == [2, 3]
    assert seen == [2, 3]
    batcher.close()


def test_work_that_returns_too_few_results_is_an_error_of_each_item() -> None:
    batcher: Batcher[str, int, int] = Batcher(lambda *_: [], size=2, wait=60, workers=1)
    waiting = [batcher.submit("a", item) for item in (1, 2)]
    for future in waiting:
        with pytest.raises(ValueError, match="zip"):
            future.result()
    assert batcher.alive()
    batcher.close()


def test_engine_batches_equal_single_images_bit_for_bit() -> None:
    engine = make_engine()
    images = [tvf.pil_to_tensor(image(0.3 + 0.1 * i, seed=i)) for i in range(4)]
    together = engine.run(Work(CLASSIFY, (3, SIDE, SIDE)), images)
    for one, alone in zip(together, images, strict=True):
        single = engine.run(Work(CLASSIFY, (3, SIDE, SIDE)), [alone])[0]
        assert torch.equal(one.purified, single.purified)


def test_several_samples_are_averaged_for_each_image() -> None:
    one = make_engine()
    two = Engine(one.target, CLASSES, one.transform, 2, torch.device("cpu"))
    images = [tvf.pil_to_tensor(image(level)) for level in (0.3, 0.7)]
    found = two.run(Work(CLASSIFY, (3, SIDE, SIDE)), images)
    index = [_stream(each) for each in images]
    purified = two.defended.purify(torch.stack(images) / 255, index=index)
    assert len(purified) == 4
    for row, each in enumerate(found):
        assert torch.equal(each.purified, (255 * purified[2 * row]).round().to(torch.uint8))
        both = [one.defended.classify(purified[2 * row + k : 2 * row + k + 1]).softmax(1)[0] for k in (0, 1)]
        for guess in each.defended:
            assert guess.probability == pytest.approx(float(both[0][guess.label] + both[1][guess.label]) / 2, abs=1e-6)


def test_the_example_client(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bright.png"
    file.write_bytes(png(0.7, 50))
    purified = ask_service.main(file, f"http://127.0.0.1:{server.port}")
    assert capsys.readouterr().out.startswith("undefended: b_bright, 100%\ndefended: ")
    with PIL.Image.open(purified) as image_file:
        assert image_file.size == (50, 50)
    file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image of a format that is accepted"):
        ask_service.main(file, f"http://127.0.0.1:{server.port}")


# the command


def test_class_names(tmp_path: Path) -> None:
    assert class_names("efficientnet-lite0", None, None)[967] == "espresso"
    assert class_names("resnet18", "DEFAULT", None)[285] == "Egyptian cat"
    names = tmp_path / "names.txt"
    names.write_text("one\n two \nthree\n", encoding="utf-8")
    assert class_names("a:b", None, names) == ("one", "two", "three")
    names.write_text("one\n\nthree\n", encoding="utf-8")
    with pytest.raises(ValueError, match="got 1 empty ones"):
        class_names("a:b", None, names)
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        class_names("a:b", None, names)
    (tmp_path / "w.bin").touch()
    for model, weights in (("a:b", None), ("resnet18", "w.pt"), ("resnet18", str(tmp_path / "w.bin"))):
        with pytest.raises(ValueError, match=r"give --labels FILE"):
            class_names(model, weights, None)
    torch.save({"classes": ["x", "y"]}, tmp_path / "fitted.pt")
    assert class_names(str(tmp_path / "fitted.pt"), None, None) == ("x", "y")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--queue", "0"], "--queue must be an integer >= 1, got 0"),
        (["--timeout", "0"], "--timeout must be a finite number > 0"),
        (["--port", "70000"], "--port must be at most 65535"),
        (["--strength", "2"], "strength must be a finite number > 0 and <= 1"),
        (["--device", "cuda:99"], "--device 'cuda:99' can't be used here"),
        ([], "give --labels FILE"),
        (["--labels", "nothing.txt"], "--labels must be a file: nothing.txt is missing"),
        (["--labels", "."], "--labels must be a file: . is a folder"),
        (["--max-megapixels", "1e308"], "--max-megapixels must be a finite number > 0 and < 1e+09, got 1e+308"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", "tests.tiny:brightness", *arguments]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1


def test_loopback_is_the_default() -> None:
    assert Serve(model="x").host == "127.0.0.1"


@pytest.mark.parametrize("changed", [{}, {"network_steps": 3, "strength": 0.5}])
def test_the_service_purifies_as_the_transform_does(changed: dict[str, Any], tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(CLASSES), encoding="utf-8")
    engine = Serve(model="tests.tiny:brightness", labels=labels, crop=40, resize=40, **changed).engine()
    assert engine.transform.settings == OnlineAlternateGenerator(**changed).settings


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``oag-transform serve`` in a process of its own, which ends with the test."""
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(CLASSES), encoding="utf-8")
    given_by_all = ("--model", "tests.tiny:brightness", "--labels", str(labels), "--crop", "40", "--resize", "40")
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "oag_transform", "serve", *given_by_all, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def test_the_command_serves_until_it_is_ended(command: Callable[..., subprocess.Popen[str]]) -> None:
    process = command("--port", "0", "--network-steps", "1")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("tests.tiny:brightness, defended, at http://127.0.0.1:"), process.communicate()
    server = Server(int(line.partition("127.0.0.1:")[2].partition("/")[0]), make_engine())
    assert server.post("/classify", png(0.7)).json["undefended"][0]["name"] == "b_bright"
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGTERM


def test_a_port_that_is_taken_is_one_line(command: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = command("--port", str(taken.getsockname()[1]))
        said = process.communicate()[1]
    assert process.returncode == 2
    assert "in use" in said
    assert said.count("\n") == 1


# the page in a browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", f"user-data-dir={profile}", *quiet):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def element(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return [found.text for found in browser.find_elements("css selector", selector)]


def open_page(browser: Any, server: Server, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"http://127.0.0.1:{server.port}/")
    until(lambda: len(texts(browser, "#samples button")) == 3)


def fits(browser: Any) -> bool:
    """Nothing has to be scrolled sideways."""
    return bool(browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"))


@pytest.mark.parametrize("width", [390, 1280])
def test_page_attacks_and_purifies_a_file(browser: Any, server: Server, width: int, tmp_path: Path) -> None:
    file = tmp_path / "dusk.png"
    file.write_bytes(png(0.495))
    open_page(browser, server, width)
    assert fits(browser)
    assert not element(browser, "#go").is_enabled()
    element(browser, "#file").send_keys(str(file))
    until(lambda: element(browser, "#go").is_enabled())
    assert element(browser, "#file-name").text == "dusk.png"
    element(browser, "#go").click()
    until(lambda: element(browser, "#results").is_displayed())
    assert fits(browser)
    assert "a_dark before, b_bright under IGSM within 6 grey levels" in element(browser, "#verdict").text
    for part, first in (("original", "a_dark"), ("attacked", "b_bright")):
        rows = texts(browser, f"#{part} .guesses li")
        assert len(rows) == 2
        assert rows[0].startswith(first)
        bars = [bar.size["width"] for bar in browser.find_elements("css selector", f"#{part} .bar")]
        assert bars[0] > bars[1]
    shown = "return [...document.querySelectorAll('#results img')].map((image) => image.naturalWidth)"
    until(lambda: browser.execute_script(shown) == [SIDE] * 6)
    assert browser.execute_script("return document.activeElement.id") == "results-title"  # a screen reader goes on there
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    sources = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    allowed = (f"http://127.0.0.1:{server.port}/", "data:")
    assert all(name.startswith(allowed) for name in browser.execute_script(sources))


def test_page_by_keyboard_alone(browser: Any, server: Server) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> str:
        ActionChains(browser).send_keys(*keys).perform()
        return str(browser.execute_script("return document.activeElement.id || document.activeElement.textContent"))

    open_page(browser, server, 1280)
    assert press(Keys.TAB) == "file"
    assert press(Keys.TAB) == "Coffee"
    press(Keys.SPACE)
    until(lambda: element(browser, "#go").is_enabled())
    assert element(browser, "#samples button").get_attribute("aria-pressed") == "true"
    assert press(Keys.TAB, Keys.TAB, Keys.TAB) == "method"
    press("M")
    assert press(Keys.TAB) == "eps"
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert element(browser, "#eps-value").text == "8"
    assert press(Keys.TAB) == "go"
    press(Keys.ENTER)
    until(lambda: element(browser, "#results").is_displayed())
    assert "under MI-FGSM within 8 grey levels" in element(browser, "#verdict").text
    assert element(browser, "#step-value").text == "2 of 2"
    last = element(browser, "#frame").get_attribute("src")
    assert last == element(browser, "#purified img").get_attribute("src")
    assert press(Keys.TAB) == "step"
    press(Keys.ARROW_LEFT)
    assert element(browser, "#step-value").text == "1 of 2"
    assert element(browser, "#frame").get_attribute("src") != last
    assert element(browser, "#step").get_attribute("aria-valuetext").startswith("1 of 2: ")


def test_a_picture_is_dropped_on_the_page(browser: Any, server: Server) -> None:
    open_page(browser, server, 1280)
    drop = """
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(arguments[0])], 'dropped.png', { type: 'image/png' }));
        const event = new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer: data });
        return document.getElementById(arguments[1]).dispatchEvent(event);"""
    for place in ("drop", "model"):  # beside it, too: the browser would leave the page for the picture
        assert browser.execute_script(drop, list(png(0.495)), place) is False
        until(lambda: element(browser, "#file-name").text == "dropped.png")
    element(browser, "#go").click()
    until(lambda: element(browser, "#results").is_displayed())


def test_everything_on_the_page_has_a_name(browser: Any, server: Server) -> None:
    open_page(browser, server, 390)
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("button", "combobox", "slider", "image", "group")
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    named = [(role, name) for role, name in found if role in roles]
    assert len(named) >= 9
    assert [role for role, name in named if not name] == []


def test_page_tells_what_the_server_refuses(browser: Any, server: Server, tmp_path: Path) -> None:
    open_page(browser, server, 390)
    (tmp_path / "broken.png").write_bytes(png(0.5)[:300])
    (tmp_path / "large.png").write_bytes(bytes(SMALL.body + 1))
    element(browser, "#file").send_keys(str(tmp_path / "large.png"))
    until(lambda: "at most 0.19" in element(browser, "#error").text)
    assert not element(browser, "#go").is_enabled()
    element(browser, "#file").send_keys(str(tmp_path / "broken.png"))
    until(lambda: element(browser, "#go").is_enabled())
    element(browser, "#go").click()
    until(lambda: "not an image that can be read" in element(browser, "#error").text)
    assert element(browser, "#error").get_attribute("role") == "alert"
    assert not element(browser, "#results").is_displayed()
    assert fits(browser)
