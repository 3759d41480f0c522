"""The command line: what it says of itself, and what it says when it can't."""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from oag_transform import DivergenceError
from oag_transform.apps import cli, demo, purify


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the demo, which raises that."""

    def run(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(demo, "run", run)
    return cli.main(["demo"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_is_there_without_waiting_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom oag_transform.apps.cli import main\n"
        f"try: main({arguments})\n"
        "finally: print([name for name in ('torch', 'torchvision', 'foolbox', 'skimage') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert done.stderr == ""


def test_python_dash_m_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "oag_transform", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"oag-transform {importlib.metadata.version('oag-transform')}\n"


def test_help_lists_every_command_with_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, command in cli.COMMANDS.items():
        assert f"{name} {command.HELP}" in shown
        assert command.EXTRA is None or f"{command.HELP} (extra '{command.EXTRA}')" in shown


def test_the_extra_of_the_command_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ModuleNotFoundError("No module named 'foolbox'", name="foolbox"), monkeypatch) == 2
    assert capsys.readouterr().err == "oag-transform demo: needs foolbox: pip install 'oag-transform[demo]'\n"
    monkeypatch.setattr(purify, "run", demo.run)
    assert cli.main(["purify", "a.png", "--out", "o"]) == 2
    assert capsys.readouterr().err == "oag-transform purify: needs foolbox: pip install oag-transform\n"


def test_demo_without_its_extra_names_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['foolbox'] = None; from oag_transform.apps.cli import main; "
        f"sys.exit(main(['demo', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "oag-transform demo: needs foolbox: pip install 'oag-transform[demo]'\n")


@pytest.mark.parametrize(
    "error", [ValueError("first\n  second"), OSError("first second"), DivergenceError("first second", [0])]
)
def test_what_a_user_can_mend_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error, monkeypatch) == 2
    assert capsys.readouterr().err == "oag-transform demo: first second\n"


def test_ctrl_c_and_our_own_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "oag-transform demo: interrupted\n"
    with pytest.raises(RuntimeError, match="a fault"):  # not for the user to mend: the traceback stays
        raising(RuntimeError("a fault"), monkeypatch)


@pytest.mark.parametrize("arguments", [[], ["purify", "a.png"], ["purify", "--out", "o"], ["unknown"]])
def test_usage_errors_come_from_argparse(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2


def test_importing_the_package_stays_light() -> None:
    heavy = ["foolbox", "matplotlib", "skimage", "scipy", "tqdm", "triton", "efficientnet_lite_pytorch"]
    code = (
        "import sys, torchvision; had = set(sys.modules); from oag_transform import *; "
        f"print([name for name in {heavy} if name in set(sys.modules) - had])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
