"""Classify an image with a running ``oag-transform serve``, and purify it: ``python -m examples.ask_service FILE``.

Start the server with ``oag-transform serve --model efficientnet-lite0``.
"""

import json
import mimetypes
import sys
import urllib.error
import urllib.request
from pathlib import Path


def ask(url: str, image: Path) -> bytes:
    """POST an image file and return the body of the answer.

    Raises:
        ValueError: the server refused the image; the message is the server's.
    """
    kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    request = urllib.request.Request(url, image.read_bytes(), {"Content-Type": kind}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(json.load(error)["error"]) from error


def main(image: Path, server: str = "http://127.0.0.1:8000") -> Path:
    """Print the likeliest class, undefended and defended; returns the path of the purified image."""
    predictions = json.loads(ask(f"{server}/classify", image))
    for classifier in ("undefended", "defended"):
        best = predictions[classifier][0]
        print(f"{classifier}: {best['name']}, {best['probability']:.0%}")
    purified = image.with_suffix(".purified.png")
    purified.write_bytes(ask(f"{server}/purify", image))
    return purified


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/ask_service.py IMAGE")
    print(main(Path(sys.argv[1])))
