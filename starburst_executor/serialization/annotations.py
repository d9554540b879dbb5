"""cloudpickle's pickler, plus slots of classes pickled by value, and annotations on Python 3.14.

There, annotations are evaluated on access, which fails for names imported only for type checkers.
Cloudpickle evaluates those of functions and loses those of classes.
"""

from __future__ import annotations

import sys
import types
from enum import EnumType
from functools import partial
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

if sys.version_info >= (3, 14):
    import annotationlib

__all__ = ["AnnotationPickler", "annotations_of"]


class AnnotationPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles classes with their slots, and annotations by value, or as text if that fails."""

    def reducer_override(self, obj: Any) -> Any:
        """How to reduce an object that needs special treatment."""
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            _complete(reduced, obj)  # else it is the name of a builtin class
        return reduced

    if sys.version_info >= (3, 14):

        def _dynamic_function_reduce(self, function: types.FunctionType) -> Any:
            try:
                return super()._dynamic_function_reduce(function)
            except Exception:  # whatever evaluating an annotation raises
                return super()._dynamic_function_reduce(_with_text(function))


def _complete(reduced: tuple[Any, ...], cls: type) -> None:
    """Add what cloudpickle omits from a class to be recreated."""
    state = reduced[2][0]
    if state.get("__slots__") and not isinstance(cls, EnumType):
        # Set later it is a mere attribute: instances get a __dict__, and do not fit this class.
        reduced[1][3]["__slots__"] = state.pop("__slots__")
    if sys.version_info >= (3, 14):
        state.pop("__annotations_cache__", None)  # present once they were accessed
        if annotations := annotations_of(cls):
            state["__annotations__"] = annotations


def annotations_of(obj: Any) -> dict[str, Any]:
    """The annotations of a function or class, as text where they cannot be evaluated here."""
    if sys.version_info >= (3, 14):
        try:
            return annotationlib.get_annotations(obj)
        except Exception:  # whatever evaluating an annotation raises
            return annotationlib.get_annotations(obj, format=annotationlib.Format.STRING)
    own = vars(obj).get("__annotations__", {}) if isinstance(obj, type) else obj.__annotations__
    return dict(own)


if sys.version_info >= (3, 14):

    def _with_text(function: types.FunctionType) -> types.FunctionType:
        """A copy of the function as if under `from __future__ import annotations`."""
        copy = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        for name in ("__qualname__", "__module__", "__doc__", "__kwdefaults__"):
            setattr(copy, name, getattr(function, name))
        copy.__dict__.update(function.__dict__)
        copy.__annotations__ = annotations_of(function)
        return copy

    def reduce_forward_reference(reference: annotationlib.ForwardRef) -> Any:
        """A reference without its lookup namespaces, which hold entire modules."""
        make = partial(
            annotationlib.ForwardRef,
            module=reference.__forward_module__,
            is_class=reference.__forward_is_class__,
        )
        return make, (reference.__forward_arg__,)
