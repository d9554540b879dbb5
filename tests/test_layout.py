"""Tests mirror the packages, and what they share lies apart from them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import starburst_executor

TESTS = Path(__file__).parent
PACKAGE = Path(starburst_executor.__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = [file for file in FILES if file.name.startswith("test_")]
TOOLS = {"simulation", "emulators"}  # which have tests of their own


def imports(source: str) -> Iterator[str]:
    """Dotted names that a program imports, those in the texts of other programs too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^ *(?:from|import) (tests\.[\w.]+)", node.value, re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from tests.worker.test_pool import Bench", True),
        ("def f():\n    from tests.worker import test_pool", True),
        ("import tests.worker.test_pool", True),
        ("import tests.conftest", True),
        ('P = "import os\\nfrom tests.worker.test_pool import same"', True),
        ("from tests.support.bench import Bench", False),
    ],
)
def test_an_import_of_a_test_module_is_found_wherever_it_stands(source: str, found: bool) -> None:
    assert any(is_test_module(name) for name in imports(source)) is found


def is_test_module(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "tests" and any(p.startswith("test_") or p == "conftest" for p in parts)


def test_no_module_imports_a_test_module() -> None:
    for file in FILES:
        if file != Path(__file__):  # it has examples
            found = [name for name in imports(file.read_text()) if is_test_module(name)]
            assert not found, (
                f"{file.relative_to(TESTS)} imports {found}: share it in tests/support/"
            )


def test_every_test_lies_at_the_top_or_in_the_folder_of_a_package() -> None:
    for file in TEST_FILES:
        folder = file.parent.relative_to(TESTS)
        if folder.name not in {"", *TOOLS}:
            assert (PACKAGE / folder / "__init__.py").exists(), f"there is no package for {file}"


def test_what_tests_share_has_no_tests() -> None:
    assert not [file for file in TEST_FILES if file.is_relative_to(TESTS / "support")]
