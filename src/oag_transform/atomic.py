"""Writing files completely or not at all."""

import contextlib
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(target: Path, token: str | None = None) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``target`` at the end: it has its old or its complete new content.

    Folders are created. After an error nothing is left of the new file.

    Args:
        target: the file.
        token: see :func:`partial_path`; None: one of its own.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target, secrets.token_hex(4) if token is None else token)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(content: object, path: Path) -> None:
    """Write what ``torch.save`` makes of ``content``; the target of a link is replaced, not the link."""
    import torch  # the others write files without it

    with replaced(Path(os.path.realpath(path))) as partial, partial.open("wb") as file:  # torch's errors name no path
        torch.save(content, file)


def partial_path(target: Path, token: str) -> Path:
    """The hidden path, in the same folder, of a file until it is complete; ``token`` distinguishes runs."""
    digest = zlib.crc32(os.fsencode(target.name))  # a long name could not be extended
    return target.with_name(f".{digest:08x}.{token}.part")
