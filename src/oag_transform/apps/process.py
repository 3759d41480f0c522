"""What commands do to their process before they work: its streams, its log, and where it looks for modules."""

import logging
import os
import sys


def log_to_stderr() -> None:
    """Show what the library logs, a line each."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)


def look_for_modules_here() -> None:
    """A target that is given as ``module:function`` may lie in the current folder."""
    sys.path.insert(0, os.getcwd())


def open_missing_streams() -> None:
    """Open the null device for standard streams that are closed (``2>&-``), so that no other file takes their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, number)  # also for processes that this one starts
                if null != number:
                    os.close(null)
                os.set_inheritable(number, True)
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115 - as long as we run


def close_standard_output() -> None:
    """Put the null device in place of an output that nobody reads any more, so that Python's last flush doesn't fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
