"""How the service runs; light, so that a command line is parsed without waiting for torch."""

from dataclasses import dataclass

MEGAPIXEL, MIB = 1_000_000, 2**20


@dataclass(frozen=True)
class Service:
    """Limits and sizes of the service.

    Attributes:
        body: bytes of an upload at most.
        pixels: of an uploaded image at most.
        purify_pixels: of an image that is purified at its own size, at most.
        queue: requests with an image that are in the server at one time, at most.
        timeout: seconds from a request to its answer, at most.
        batch_size: images of equal size that are worked on together, at most.
        batch_wait: seconds that an image waits for others.
        workers: threads that work.
    """

    body: int
    pixels: int
    purify_pixels: int
    queue: int
    timeout: float
    batch_size: int
    batch_wait: float
    workers: int
