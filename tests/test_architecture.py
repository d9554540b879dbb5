"""Imports point down the rows, without circles; each package keeps to what it is for."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import starburst_executor
from tests.support.markdown import blocks, page, sections
from tests.support.markdown import rows as table_rows

PAGE = page("explanation/architecture.md")
PACKAGE = Path(starburst_executor.__file__).parent
NAME = PACKAGE.name

# A package or module imports from lower rows only; those of one row do not know each other.
ROWS = """
__main__
cli, joblib_backend
executor
client, worker
coordination
inspection
launchers
aws
serialization, costs
protocol, environment
storage
config, nesting
tables
formatting, errors, runtime
"""

# What opens AWS, inside a function, when a URL, a name or a price asks for it.
DOORS = {
    ("storage.url", "aws.s3"),
    ("costs.session_prices", "aws.account"),
    ("costs.session_prices", "aws.prices"),
}

STANDARD = sys.stdlib_module_names | {"annotationlib"}  # which Python 3.14 brings
AWS_LIBRARIES = {"boto3", "botocore", "s3transfer"}
PICKLES = {"pickle", "cloudpickle", "marshal", "shelve"}


class When(StrEnum):
    """When an import is executed."""

    LOADING = "loading"
    CALLED = "called"
    CHECKING = "checking types"


class Import(NamedTuple):
    """One module that a module names in an import."""

    importer: str
    imported: str  # of this package: without the package's own name
    when: When
    own: bool


def row_of(module: str) -> int:
    top = module.partition(".")[0]
    return next(number for number, row in enumerate(rows()) if top in row)


def rows() -> list[list[str]]:
    return [row.split(", ") for row in ROWS.strip().splitlines()]


@cache
def modules() -> dict[str, ast.Module]:
    """By dotted name below the package; "" is the package's own `__init__`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text())
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        Import(importer, imported, when, own)
        for importer, tree in modules().items()
        for statement, when in _import_statements(tree, When.LOADING)
        for imported, own in _imported(statement)
    )


def _import_statements(tree: ast.AST, when: When) -> Iterator[tuple[ast.stmt, When]]:
    for node in ast.iter_child_nodes(tree):
        inside = when
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and when is When.LOADING:
            inside = When.CALLED
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            inside = When.CHECKING
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, inside
        yield from _import_statements(node, inside)


def _imported(statement: ast.stmt) -> Iterator[tuple[str, bool]]:
    names: list[str] = []
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    elif isinstance(statement, ast.ImportFrom) and statement.module:
        parent = statement.module
        names = [
            f"{parent}.{alias.name}" if _is_own(f"{parent}.{alias.name}") else parent
            for alias in statement.names
        ]
    for name in dict.fromkeys(names):
        own = name.partition(".")[0] == NAME
        yield (name.removeprefix(NAME).removeprefix(".") if own else name), own


def _is_own(name: str) -> bool:
    return name.startswith(f"{NAME}.") and name.removeprefix(f"{NAME}.") in modules()


def own_imports(*whens: When) -> list[Import]:
    """Of this package's modules; the package itself, which imports nothing, is left out."""
    return [i for i in imports() if i.own and i.imported and i.when in whens]


def reached_from(*starts: str) -> set[str]:
    """Modules that importing those leads to, at once or when their functions are called."""
    seen, todo = set[str](), list(starts)
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += [
                i.imported
                for i in own_imports(When.LOADING, When.CALLED)
                if i.importer == module and (i.importer, i.imported) not in DOORS
            ]
    return seen


def of(package: str) -> list[str]:
    return [m for m in modules() if m.partition(".")[0] == package]


def importers_of(names: Iterable[str]) -> set[str]:
    wanted = set(names)
    return {i.importer for i in imports() if not i.own and i.imported.partition(".")[0] in wanted}


# --- the rows -----------------------------------------------------------------------


def test_every_package_and_module_has_its_row() -> None:
    placed = [name for row in rows() for name in row]
    assert sorted(placed) == sorted({m.partition(".")[0] for m in modules()} - {""})


def test_imports_point_down() -> None:
    upward = [
        f"{i.importer} -> {i.imported}"
        for i in own_imports(When.LOADING, When.CALLED)
        if i.importer
        and i.importer.partition(".")[0] != i.imported.partition(".")[0]
        and row_of(i.imported) <= row_of(i.importer)
        and (i.importer, i.imported, i.when) not in {(*door, When.CALLED) for door in DOORS}
    ]
    assert upward == []


def test_doors_to_aws_are_used() -> None:
    assert {(i.importer, i.imported) for i in own_imports(When.CALLED)} >= DOORS


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for i in own_imports(When.LOADING, When.CALLED):
        if (i.importer, i.imported) not in DOORS:
            graph[i.importer].add(i.imported)
    while leaves := {module for module, imported in graph.items() if not imported}:
        graph = {m: imported - leaves for m, imported in graph.items() if m not in leaves}
    assert graph == {}


def test_package_itself_imports_nothing_when_it_is_loaded() -> None:
    assert [
        i.imported for i in imports() if i.importer == "" and i.when is When.LOADING and i.own
    ] == []


# --- what each package is for -------------------------------------------------------


def test_client_and_worker_are_strangers() -> None:
    assert not reached_from(*of("client")) & {"executor", *of("worker")}
    assert not reached_from(*of("worker")) & {"executor", *of("client")}


def test_only_aws_imports_the_libraries_of_aws() -> None:
    assert {m.partition(".")[0] for m in importers_of(AWS_LIBRARIES)} == {"aws"}


@pytest.mark.parametrize("package", ["protocol", "inspection"])
def test_no_chain_of_imports_leads_from_what_only_reads_to_pickle(package: str) -> None:
    assert reached_from(*of(package)) & (importers_of(PICKLES) | set(of("serialization"))) == set()


def test_what_pickles_is_serialization_and_the_file_that_collect_writes() -> None:
    others = importers_of(PICKLES) - set(of("serialization"))
    assert others == {"cli.results"}


def test_in_worker_only_the_child_reaches_serialization() -> None:
    own_process = [module for module in of("worker") if module != "worker.child"]
    assert reached_from(*own_process) & {*of("serialization"), "worker.child"} == set()
    assert reached_from("worker.child") & set(of("serialization"))


def test_packages_consist_of_their_modules_alone() -> None:
    """Importing one module of a package must not run another."""
    for init in PACKAGE.rglob("*/__init__.py"):
        tree = ast.parse(init.read_text())
        assert len(tree.body) == 1, init
        assert ast.get_docstring(tree), init


def test_what_is_imported_at_once_is_a_core_dependency() -> None:
    """Extras are imported where they are used, with a message that names the extra."""
    core = {
        "boto3",
        "botocore",
        "click",
        "cloudpickle",
        "msgspec",
        "platformdirs",
        "rich",
        "tenacity",
        "uv",
    }
    for i in imports():
        if not i.own and i.when is When.LOADING and i.importer != "joblib_backend":
            assert i.imported.partition(".")[0] in STANDARD | core, i


# --- names in strings, which moving a module does not change --------------------------


def test_modules_that_are_named_in_strings_exist() -> None:
    named = {
        (module, found)
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for found in re.findall(rf"(?:-m |^){NAME}\.([a-z_.]+[a-z_])$", node.value)
    }
    for module, found in named:
        assert importlib.util.find_spec(f"{NAME}.{found}"), f"{module} names {found}"
    assert ("environment.bootstrap", "environment") in named  # it is one file, and imports nothing
    assert importlib.util.find_spec(f"{NAME}.environment.__main__")


def test_standalone_bootstrap_imports_the_standard_library_alone() -> None:
    names = {
        i.imported.partition(".")[0] for i in imports() if i.importer == "environment.bootstrap"
    }
    assert names <= sys.stdlib_module_names


def test_no_module_counts_the_folders_above_its_own_file() -> None:
    """Of the package it is `starburst_executor.__file__`, and its name is `starburst_executor`."""
    counted = re.compile(
        r"Path\(__file__\)[^\n]*\.parents?\b|__package__\.|__name__\.partition\(\"\.\"\)\[0\]$"
    )
    for file in PACKAGE.rglob("*.py"):
        assert not counted.search(file.read_text()), file


# --- the page about it --------------------------------------------------------------


def drawing() -> str:
    [drawn, _] = blocks(PAGE, "text")
    return "\n".join(line.partition(":")[0] for line in drawn.splitlines())


def test_drawing_has_the_rows_from_top_to_bottom() -> None:
    drawn = [re.findall(r"[a-z_]+", line) for line in drawing().splitlines()]
    # The program `python -m starburst_executor` is not drawn.
    assert [names for names in drawn if names] == rows()[1:]


def test_table_of_packages_has_each_with_its_modules() -> None:
    stated = {
        row[0].strip("`"): set(re.findall(r"`([a-z0-9_]+/?)`", row[2]))
        for row in table_rows(sections(PAGE)["Map of the packages"])
    }
    found: dict[str, set[str]] = {name: set() for row in rows()[1:] for name in row}
    for module in modules():
        top, *rest = module.split(".")
        if rest and rest[0] != "__main__":
            found[top].add(f"{rest[0]}/" if (PACKAGE / top / rest[0]).is_dir() else rest[0])
    assert stated == found


def test_what_former_names_are_now_exists() -> None:
    moved, renamed = sections(PAGE)["Former names"].split("Classes:")
    for _, now in table_rows(moved):
        for path in re.findall(r"`([a-z0-9_/]+)`", now):
            assert (PACKAGE / f"{path}.py").exists() or (PACKAGE / path).is_dir(), path
    classes = {
        n.name for tree in modules().values() for n in ast.walk(tree) if type(n) is ast.ClassDef
    }
    for _, now in table_rows(renamed):
        assert set(re.findall(r"`(\w+)`", now)) <= classes


def test_classes_of_the_glossary_exist() -> None:
    named = table_rows(sections(page("explanation/glossary.md"))["Names in the code"])
    classes = {
        n.name for tree in modules().values() for n in ast.walk(tree) if type(n) is ast.ClassDef
    }
    assert {row[0].strip("`") for row in named} <= classes


def test_longest_class_and_function_are_as_the_page_says() -> None:
    spans = [
        (kind, node.end_lineno - node.lineno + 1, node.name)
        for tree in modules().values()
        for node in ast.walk(tree)
        for kind, types in (
            ("class", ast.ClassDef),
            ("function", (ast.FunctionDef, ast.AsyncFunctionDef)),
        )
        if isinstance(node, types) and node.end_lineno is not None
    ]
    longest = [max(span for span in spans if span[0] == kind) for kind in ("class", "function")]
    stated = "The longest {} is `{}` ({} lines) and the longest {} is `{}` ({} lines)."
    words = (word for kind, lines, name in longest for word in (kind, name, lines))
    assert stated.format(*words) in PAGE
