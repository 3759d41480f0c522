"""The command line: its help, and its error messages."""

import dataclasses
import importlib.metadata
import io
import subprocess
import sys
from pathlib import Path

import pytest
from docstring_parser import parse_from_object

from oag_transform import DivergenceError
from oag_transform.apps import cli, demo, process
from tests.tiny import write_images

CONVERTED = [name for name in cli.COMMANDS if hasattr(cli._module(name), "COMMAND")]


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the demo, which raises that."""

    def run(_: demo.Demo) -> int:
        raise error

    monkeypatch.setattr(demo.Demo, "run", run)
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
    listed = {words[0]: words for words in map(str.split, capsys.readouterr().out.partition("commands:\n")[2].splitlines())}
    assert tuple(listed) == cli.COMMANDS
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for name, words in listed.items():
        assert len(words) > 3, name
        assert words[-2] == "(extra"
        extra = words[-1].strip("')")
        assert f"\n{extra} = [" in project, name


@pytest.mark.parametrize("name", CONVERTED)
def test_each_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli._module(name).COMMAND
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(command.__doc__.split()) in shown
    docs = {doc.arg_name: doc.description for cls in command.__mro__[-2::-1] for doc in parse_from_object(cls).params}
    for field in dataclasses.fields(command):
        assert "\n" not in (docs[field.name] or "\n"), f"tyro would keep the line break in the help of {field.name}"


def test_the_extra_of_the_command_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ModuleNotFoundError("No module named 'foolbox'", name="foolbox"), monkeypatch) == 2
    assert capsys.readouterr().err == "oag-transform demo: needs foolbox: pip install 'oag-transform[demo]'\n"


@pytest.mark.parametrize(("arguments", "called"), [(["--help"], "oag-transform"), (["serve", "-h"], "oag-transform serve")])
def test_without_tyro_the_error_names_the_extra(arguments: list[str], called: str) -> None:
    code = f"import sys; sys.modules['tyro'] = None; from oag_transform.apps.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"{called}: needs tyro: pip install 'oag-transform[cli]'\n")


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
def test_errors_of_users_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error, monkeypatch) == 2
    assert capsys.readouterr().err == "oag-transform demo: first second\n"


def test_ctrl_c_and_our_own_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "oag-transform demo: interrupted\n"
    with pytest.raises(RuntimeError, match="a fault"):  # not for the user to mend: the traceback stays
        raising(RuntimeError("a fault"), monkeypatch)


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["--unknown", "demo"]])
def test_without_a_command_it_shows_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("usage: oag-transform")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fit-target --out a.pt", "--data"),
        ("fit-target --data d --out a.pt --epochs many", "--epochs"),
        ("fit-target --data d --out a.pt --size many", "--size"),
        ("fit-target --data d --out a.pt --compute-dtype float16", "--compute-dtype"),
        ("fit-target --data tree:d --out a.pt", "expected a folder, or one of imagefolder"),
        ("fit-target --out a.pt --data ilsvrc2012:d", "needs --devkit"),
        ("fit-target --data d --out a.pt --seed 9223372036854775808", "--seed must be below 2^63"),
        ("fit-target --data d --out a.pt --batch-size 0", "--batch-size must be an integer >= 1, got 0"),
        ("fit-target --data d --out a.pt --device tpu9", "--device 'tpu9' can't be used here"),
        ("fit-pixelcnn --data d --out a.pt --resize 8 --crop 9", "--resize must be at least --crop, got 8 and 9"),
        ("serve --model m --prot 80", "--prot"),
        ("serve --model", "--model"),
        ("serve --model m 80", "80"),
        ("demo --no-out", "--no-out"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_argument_is_one_line_that_names_it(
    arguments: str,
    words: str,
    encoding: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "d")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))  # decides how tyro draws its boxes
    assert cli.main(arguments.split()) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"oag-transform {arguments.split()[0]}: ")
    assert words in shown
    assert shown.count("\n") == 1
    assert not any(mark in shown for mark in ("─", "│", "╭", "--help", "---"))


def test_importing_the_package_stays_light() -> None:
    heavy = ["foolbox", "matplotlib", "skimage", "scipy", "tqdm", "triton", "efficientnet_lite_pytorch"]
    code = (
        "import sys, torchvision; had = set(sys.modules); from oag_transform import *; "
        f"print([name for name in {heavy} if name in set(sys.modules) - had])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "extra"), [("demonstration", "demo"), ("service.engine", "serve")])
def test_a_command_needs_no_more_than_its_extra(module: str, extra: str) -> None:
    """The libraries of the extras ``eval``, ``adaptive`` and ``baselines`` aren't there."""
    others = ["skimage", "pywt", "jinja2", "pyautoattack", "kornia", "bm3d"]
    program = f"import sys; sys.modules.update(dict.fromkeys({others})); import oag_transform.apps.{module}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_an_encoding_lacks_is_written_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    process.print_everything()
    sys.stdout.write("L\N{INFINITY}\n")
    sys.stdout.flush()
    assert written.getvalue() == b"L\\u221e\n"
