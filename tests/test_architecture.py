"""Imports point down the rows; boto3 is for `aws` alone; client and worker are strangers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import starburst_executor

PACKAGE = Path(starburst_executor.__file__).parent
NAME = PACKAGE.name

# A module imports from lower rows only; `aws` and `cli` are packages, free within themselves.
ROWS = """
 11  __init__  __main__
 10  cli
  9  aws       joblib_backend  doctor
  8  executor                        |  poller
  7  page
  6  roster    charts    progress    |  worker
  5  watch  collect  catalog  staff  retry  report  |  workload
  4  stuck  submit  turns  packing  history  lanes  ledger  |  beats  hold  leases  library
  3  session  slots  arguments  choice  pricing
  2  queue  child  future  config  environment
  1  launch  store  records  serialize  modules  mapping  cost  views  nesting
  0  errors  runtime  spec  rate  bootstrap  dropped  interrupts
"""

# Only when asked for, inside a function: the URL or name of a store or launcher on AWS.
ASK_FOR_AWS = {"store", "launch", "poller", "doctor", "cli", "pricing"}

CLIENT_ONLY = {
    "executor",
    "roster",
    "watch",
    "submit",
    "packing",
    "collect",
    "mapping",
}
WORKER_ONLY = {"poller", "worker", "workload", "hold", "beats", "library", "slots"}


def rows() -> dict[str, int]:
    table: dict[str, int] = {}
    for line in ROWS.strip().splitlines():
        number, *names = line.replace("|", " ").split()
        table.update(dict.fromkeys(names, int(number)))
    return table


def modules() -> Iterator[tuple[str, Path]]:
    """Each file with the name by which the table knows it."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).with_suffix("").parts[0], file


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names of modules that a file imports, and whether only inside a function."""
    tree = ast.parse(file.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in _without_type_checking(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == NAME:  # its names may be modules
                for alias in node.names:
                    yield f"{NAME}.{alias.name}", id(node) in inside
            else:
                yield node.module, id(node) in inside


def _without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _without_type_checking(node)


def own_imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Names, as in the table, of this package's modules that a file imports."""
    for name, lazy in imports(file):
        if name == NAME or name.startswith(f"{NAME}."):
            yield [*name.split("."), "__init__"][1], lazy


def test_every_module_has_its_row() -> None:
    assert {name for name, _ in modules()} == rows().keys()


def test_imports_point_down() -> None:
    table = rows()
    for name, file in modules():
        for imported, lazy in own_imports(file):
            if imported == name or (lazy and imported == "aws" and name in ASK_FOR_AWS):
                continue
            assert table[imported] < table[name], f"{file.name} imports {imported}"


def test_client_and_worker_do_not_know_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for name, file in modules():
        graph.setdefault(name, set()).update(
            imported for imported, _ in own_imports(file)
        )

    def reach(start: str) -> set[str]:
        seen, todo = set[str](), [start]
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph[module]
        return seen

    assert not reach("executor") & WORKER_ONLY
    assert not reach("poller") & CLIENT_ONLY


def test_only_aws_imports_the_libraries_of_aws() -> None:
    for name, file in modules():
        if name != "aws":
            found = {imported.split(".")[0] for imported, _ in imports(file)}
            assert not found & {"boto3", "botocore", "s3transfer"}, file


def test_what_unpickles_is_known() -> None:
    """The worker's own process never does: only its children and the client."""
    users = {
        name
        for name, file in modules()
        if {imported for imported, _ in imports(file)} & {"pickle", "cloudpickle"}
    }
    assert users <= {"serialize", "cli", "joblib_backend"}


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
    for name, file in modules():
        if name != "joblib_backend":  # of no use without joblib
            outside = {
                module.split(".")[0] for module, lazy in imports(file) if not lazy
            }
            assert outside - sys.stdlib_module_names <= {*core, NAME}, file
