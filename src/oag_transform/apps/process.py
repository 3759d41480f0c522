"""What commands do to their process before they work: where the log goes, and where a module that is named is looked for."""

import logging
import os
import sys


def log_to_stderr() -> None:
    """Show what the library logs, a line each."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)


def look_for_modules_here() -> None:
    """A target that is given as ``module:function`` may lie in the current folder."""
    sys.path.insert(0, os.getcwd())
