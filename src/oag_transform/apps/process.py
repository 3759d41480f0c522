"""Set-up of a command's process: standard streams, log, and module search path."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def log_to_stderr(*, verbose: bool = False) -> None:
    """Print the library's log messages to standard error, one per line; ``verbose``: with tracebacks of what fails."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if verbose:
        logging.getLogger(__package__.partition(".")[0]).setLevel(logging.DEBUG)


def look_for_modules_here() -> None:
    """Find what is given as ``module:function`` in the current folder, too, behind what is installed."""
    sys.path.append(os.getcwd())


def open_missing_streams() -> None:
    """Open the null device for standard streams that are closed (``2>&-``), so that no other file takes their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, number)  # also for child processes
                if null != number:
                    os.close(null)
                os.set_inheritable(number, True)
            stream = open(os.devnull, "r" if number == 0 else "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
            setattr(sys, name, stream)


def print_everything() -> None:
    """Let standard output and error write what their encoding lacks as escapes: a character must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """Replace a pipe without a reader by the null device, so that neither the next line nor Python's last flush fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def reader_may_end(stream: TextIO) -> Iterator[None]:
    """A context in which a line is printed; if its reader has ended, as ``| head -1`` does, the work goes on."""
    try:
        yield
    except BrokenPipeError:
        discard(stream)
