"""The examples in the docstrings of the installed package."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import oag_transform

MODULES = [
    name for _, name, _ in pkgutil.walk_packages(oag_transform.__path__, "oag_transform.") if not name.endswith("__main__")
]
MARKERS = {"ray": pytest.mark.ray, "starlette": pytest.mark.serve, "art": pytest.mark.integrations}
"""What a module imports, and the marker of the tests that have it."""


def marked(name: str) -> Any:
    """The module's name as a parameter, with the marker of what it imports at its start."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    imported = re.findall(r"^(?:import|from) (\w+)", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
    return pytest.param(name, marks=[MARKERS[package] for package in {*imported} & {*MARKERS}])


@pytest.mark.parametrize("name", [marked(name) for name in MODULES])
def test_doctests(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_the_two_public_classes_have_examples() -> None:
    for name in ("transform", "defended"):
        assert doctest.testmod(importlib.import_module(f"oag_transform.{name}")).attempted > 3
