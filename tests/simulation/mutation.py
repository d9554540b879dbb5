"""Mutants: the product with one of its rules taken out; `mutants` has them all.

A mutant edits the source of functions while it is applied. If the text that it replaces is no
longer there, exactly once, applying it fails: whoever rewords a rule must look at its mutant.
"""

from __future__ import annotations
import __future__

import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

__all__ = ["Edit", "Mutant", "StaleMutant", "Verdict"]

PACKAGE = "starburst_executor"


class StaleMutant(Exception):
    """What a mutant edits is not there any more: reword the mutant, or drop it with its rule."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One replacement within one function.

    Attributes:
        where: Module within the package, a colon, and the function's qualified name.
        old: What is replaced; it must occur exactly once.
        new: What replaces it.
    """

    where: str
    old: str
    new: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the edited code in place of the function's own, for all who have a hold of it."""
        function = self._find()
        before = function.__code__
        function.__code__ = self._compile(function)
        try:
            yield
        finally:
            function.__code__ = before

    def _find(self) -> FunctionType:
        module, _, name = self.where.partition(":")
        try:
            found: Any = importlib.import_module(f"{PACKAGE}.{module}")
            for part in name.split("."):
                found = inspect.getattr_static(found, part)
        except (ImportError, AttributeError) as error:
            raise StaleMutant(f"there is no {self.where}: {error}") from error
        return _plain_function(found)

    def _compile(self, function: FunctionType) -> CodeType:
        source = textwrap.dedent(inspect.getsource(function))
        count = source.count(self.old)
        if count != 1:
            raise StaleMutant(f"{self.where} has {self.old!r} {count} times, not once:\n{source}")
        edited = source.replace(self.old, self.new)
        flags = __future__.annotations.compiler_flag
        whole = compile(edited, f"<mutant of {self.where}>", "exec", flags, dont_inherit=True)
        code = next(
            one
            for one in whole.co_consts
            if isinstance(one, CodeType) and one.co_name == function.__name__
        )
        return code.replace(co_qualname=function.__qualname__)


def _plain_function(found: Any) -> FunctionType:
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, classmethod | staticmethod):
        found = found.__func__
    if isinstance(found, functools.cached_property):
        found = found.func
    function = inspect.unwrap(found)
    assert isinstance(function, FunctionType)
    return function


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a mutant.

    Attributes:
        killed: Whether a schedule failed.
        by: Which one.
        schedules: How many were played, that one included.
        why: How it failed.
    """

    killed: bool
    by: str
    schedules: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Mutant:
    """The product without one rule.

    Attributes:
        name: What the rule's absence comes to.
        edits: How to take the rule out.
        killer: Name of the test that fails then, in `test_rules`, `test_protocol` or `test_order`.
        cases: The arguments for a test that takes some; it must fail for one of these.
    """

    name: str
    edits: tuple[Edit, ...]
    killer: str
    cases: tuple[tuple[object, ...], ...] = ((),)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Work without the rule."""
        with ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(edit.applied())
            yield

    def judge(self) -> Verdict:
        """Play the schedules of the test that should fail without the rule, until one does."""
        test = self._test()
        with self.applied():
            for count, case in enumerate(self.cases, 1):
                name = f"{self.killer}[{'-'.join(map(str, case))}]" if case else self.killer
                try:
                    test(*case)
                except Exception as error:
                    return Verdict(True, name, count, _first_line(error))
        return Verdict(False, "", len(self.cases))

    def _test(self) -> Callable[..., object]:
        for name in ("simulation.test_rules", "simulation.test_protocol", "worker.test_order"):
            module = importlib.import_module(f"tests.{name}")
            found = getattr(module, self.killer, None)
            if found is not None:
                return found  # type: ignore[no-any-return]
        raise StaleMutant(f"{self.name}: there is no test {self.killer}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
