"""Settings of the service. This module imports no torch, so that a command line is parsed fast."""

from dataclasses import dataclass

MEGAPIXEL, MIB = 1_000_000, 2**20


@dataclass(frozen=True)
class Service:
    """Limits and sizes of the service.

    Attributes:
        body: largest number of bytes of an upload.
        pixels: largest number of pixels of an uploaded image.
        purify_pixels: the same for an image that is purified at its own size.
        queue: largest number of requests with an image at one time.
        timeout: longest time from a request to its answer, in seconds.
        batch_size: largest number of images in a batch.
        batch_wait: longest wait of an image for others, in seconds.
        workers: number of worker threads.
    """

    body: int
    pixels: int
    purify_pixels: int
    queue: int
    timeout: float
    batch_size: int
    batch_wait: float
    workers: int
