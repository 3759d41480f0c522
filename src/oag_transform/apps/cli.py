"""The command line: imports the module of a command, parses its arguments, runs it, and prints an error as one line.

The module of a command (``fit_target`` for ``fit-target``) is imported when that command runs. It imports no torch, and has

- ``COMMAND``: a frozen dataclass whose fields are the arguments. Its docstring is the description, of which the first line is
  in the list of commands; ``__post_init__`` validates; ``run()`` does the work and returns the exit status.
- ``EXTRA``: the extra of the package that the command needs.
"""

import argparse
import contextlib
import functools
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from .. import __version__
from . import process

PROG = "oag-transform"
COMMANDS = ("demo", "purify", "evaluate", "serve", "fit-target", "fit-pixelcnn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 where a part of the work failed, 2 for an error, 130 for Ctrl-C.

    Raises:
        SystemExit: help or the version was asked for, or there is no such command.
    """
    process.open_missing_streams()
    process.print_everything()
    given = sys.argv[1:] if arguments is None else arguments
    called, extra = PROG, "cli"  # without this extra no command can be imported
    try:
        asked = _parser(overview="-h" in given[:1] or "--help" in given[:1]).parse_args(given)
        called = f"{PROG} {asked.command}"
        if "" in asked.arguments:
            raise ValueError("an argument is empty; is a variable of the shell unset?")
        module = _module(asked.command)
        extra = module.EXTRA
        return _run(called, module, asked.arguments)
    except ModuleNotFoundError as error:
        told = _one_line(error) if error.name is None else f"needs {error.name}: pip install 'oag-transform[{extra}]'"
        return _fail(called, told, 2)
    except BrokenPipeError:  # the reader of the output has what it wants, as in ``--help | head -1``
        process.discard(sys.stdout)
        return 0
    except (OSError, ValueError) as error:
        return _fail(called, _one_line(error), 2)
    except RuntimeError as error:
        from ..transform import DivergenceError  # imports torch

        if not isinstance(error, DivergenceError):
            raise
        return _fail(called, _one_line(error), 2)
    except KeyboardInterrupt:
        return _fail(called, "interrupted", 130)


def _parser(*, overview: bool) -> argparse.ArgumentParser:
    """Splits off the command; with a line on each command in its help if there is to be an overview."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Purify images for a pretrained classifier.",
        epilog=_overview() if overview else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the list below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments; --help lists them")
    return parser


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = []
    for name in COMMANDS:
        module = _module(name)
        lines.append(f"  {name:<{width}}  {module.COMMAND.__doc__.splitlines()[0].rstrip('.')} (extra '{module.EXTRA}')")
    return "\n".join(["commands:", *lines])


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def _run(called: str, module: ModuleType, arguments: list[str]) -> int:
    status: int = _parse(called, module.COMMAND, arguments).run()
    return status


def _parse(called: str, command: Callable[..., Any], arguments: list[str]) -> Any:
    """The command with its arguments.

    Raises:
        SystemExit: help was asked for, and is printed.
        ValueError: an argument is wrong or missing.
    """
    import tyro  # of the extra 'cli'

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                functools.partial(command),  # tyro would print the errors of a class's own __post_init__ in a box
                prog=called,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_out_of_the_box(said.getvalue())) from None


def _out_of_the_box(text: str) -> str:
    """What is wrong, of a box that tyro draws: a title, what is wrong, a rule or an empty line, and where to find help."""
    lines = [line.strip("─│╭╮╰╯ ") for line in text.splitlines()[1:]]
    paragraphs = " ".join(line if line.strip("-") else "\n" for line in lines).split("\n")
    return next((paragraph for paragraph in paragraphs if paragraph.strip()), text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(called: str, message: str, status: int) -> int:
    print(f"{called}: {message}", file=sys.stderr)
    return status
