"""The Python examples of README and docs run as written, with a small classifier and small images as the reader's own.

The command line understands the commands there.
"""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from torch import nn
from torchvision.models._api import WeightsEnum

from oag_transform.apps import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?oag-transform (.*)$", re.MULTILINE)
VALUE = re.compile(r"^(\S.*?)  # (None|\d+)$", re.MULTILINE)
PLACEHOLDER = re.compile(r"^[\w, ]+ = \.\.\..*$", re.MULTILINE)
NOT_RUN = {"docs/scale.md": "reads from and writes to a bucket on S3; tests/test_ray.py runs the same pipeline on local files"}
"""Pages whose examples can't run here, each with the reason."""


def examples(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): examples(path) for path in FILES}
BLOCKS = [(path.name, block) for path in FILES for block in SHELL.findall(path.read_text(encoding="utf-8"))]
COMMANDS = [(name, command) for name, block in BLOCKS for command in COMMAND.findall(block.replace("\\\n", " "))]


@pytest.fixture
def names() -> dict[str, Any]:
    """What examples take for granted: the reader's classifier, images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 16, 16, generator=generator)
    linear = nn.Linear(3 * 16 * 16, 4)
    target = nn.Sequential(nn.Flatten(), linear).eval()
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
        labels = target(images).argmax(1)
    return {"target": target, "images": images, "labels": labels, "image": images[0], "names": ["a.png"]}


def random_weights(self: WeightsEnum, *_: Any, **__: Any) -> dict[str, Any]:
    """A state dict of torchvision's random initialisation, in place of a download."""
    builders = torchvision.models.list_models(module=torchvision.models)
    builder = next(name for name in builders if torchvision.models.get_model_weights(name) is type(self))
    return torchvision.models.get_model(builder, weights=None).state_dict()


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks and page not in NOT_RUN])
def test_examples_run(page: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace, from the root of the repository; values in comments are right."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    monkeypatch.chdir(ROOT)
    for number, block in enumerate(PAGES[page]):
        exec(compile(PLACEHOLDER.sub("", block), f"{page}, example {number}", "exec"), names)
        for expression, value in VALUE.findall(block):
            assert repr(eval(expression, names)) == value


@pytest.mark.parametrize("page", NOT_RUN)
def test_examples_that_do_not_run_are_valid_python(page: str) -> None:
    assert PAGES[page]
    for block in PAGES[page]:
        compile(block, page, "exec")


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_understood(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tuned").mkdir()
    Path("tuned/tune.json").touch()  # of the command before the one that reads it
    arguments = shlex.split(command, comments=True)
    module = importlib.import_module(f"oag_transform.apps.{arguments[0].replace('-', '_')}")
    monkeypatch.setattr(module.COMMAND, "run", lambda self: 0)
    assert cli.main(arguments) == 0


def test_examples_are_found() -> None:
    assert sum(map(len, PAGES.values())) >= 10
    assert len(COMMANDS) >= 20
