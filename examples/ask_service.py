"""Ask a running ``oag-transform serve`` what is on a photograph, and have it purified: ``python -m examples.ask_service FILE``.

The server: ``oag-transform serve --model efficientnet-lite0``.
"""

import json
import mimetypes
import sys
import urllib.error
import urllib.request
from pathlib import Path


def ask(url: str, photograph: Path) -> bytes:
    """The body of the answer to a photograph.

    Raises:
        ValueError: the server refuses it; its own words.
    """
    kind = mimetypes.guess_type(photograph.name)[0] or "application/octet-stream"
    request = urllib.request.Request(url, photograph.read_bytes(), {"Content-Type": kind}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(json.load(error)["error"]) from error


def main(photograph: Path, server: str = "http://127.0.0.1:8000") -> Path:
    """Print the likeliest class of the bare and of the defended classifier; returns the file with the purified photograph."""
    found = json.loads(ask(f"{server}/classify", photograph))
    for who in ("bare", "defended"):
        best = found[who][0]
        print(f"{who}: {best['name']}, {best['probability']:.0%}")
    purified = photograph.with_suffix(".purified.png")
    purified.write_bytes(ask(f"{server}/purify", photograph))
    return purified


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
