"""The examples in the docstrings of the installed package."""

import doctest
import importlib
import pkgutil

import pytest

import oag_transform

MODULES = [
    name for _, name, _ in pkgutil.walk_packages(oag_transform.__path__, "oag_transform.") if not name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_the_two_public_classes_have_examples() -> None:
    for name in ("transform", "defended"):
        assert doctest.testmod(importlib.import_module(f"oag_transform.{name}")).attempted > 3
