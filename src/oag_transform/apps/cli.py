"""The command line: asks each command for its help, its arguments and its work, and says in one line what went wrong."""

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from .. import __version__
from . import certify, demo, evaluate, fit_pixelcnn, fit_target, purify, serve


class Command(Protocol):
    """What the module of a command has; importing it must not import torch, so that ``--help`` is there at once.

    Attributes:
        HELP: one line for the list of commands.
        EXTRA: the extra of the package that it needs; None where it needs none.
    """

    HELP: str
    EXTRA: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, options: argparse.Namespace) -> int:
        """Do the work; returns the exit status."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "purify": purify,
    "evaluate": evaluate,
    "certify": certify,
    "serve": serve,
    "fit-target": fit_target,
    "fit-pixelcnn": fit_pixelcnn,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 where a part of the work failed, 2 for an error, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="oag-transform", description="Purify images for a pretrained classifier.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        extra = "" if command.EXTRA is None else f" (extra '{command.EXTRA}')"
        command.add_arguments(commands.add_parser(name, help=f"{command.HELP}{extra}", description=f"{command.HELP}{extra}"))
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except ModuleNotFoundError as error:
        return _fail(options.command, f"needs {error.name}: {_install(COMMANDS[options.command].EXTRA)}", 2)
    except (OSError, ValueError) as error:
        return _fail(options.command, _one_line(error), 2)
    except RuntimeError as error:
        from ..transform import DivergenceError  # imports torch

        if not isinstance(error, DivergenceError):
            raise
        return _fail(options.command, _one_line(error), 2)
    except KeyboardInterrupt:
        return _fail(options.command, "interrupted", 130)


def _install(extra: str | None) -> str:
    return "pip install oag-transform" if extra is None else f"pip install 'oag-transform[{extra}]'"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(command: str, message: str, status: int) -> int:
    print(f"oag-transform {command}: {message}", file=sys.stderr)
    return status
