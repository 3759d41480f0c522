"""Set-up of a command's process: standard streams, log, and module search path."""

import logging
import os
import sys


def log_to_stderr() -> None:
    """Print the library's log messages to standard error, one per line."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)


def look_for_modules_here() -> None:
    """Find targets given as ``module:function`` in the current folder, too."""
    sys.path.insert(0, os.getcwd())


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


def close_standard_output() -> None:
    """Replace a closed pipe as standard output by the null device, so that Python's last flush doesn't fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
