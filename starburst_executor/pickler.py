"""The pickler of what travels by value: cloudpickle's, with what it lacks.

It makes classes anew without their slots. And since Python 3.14 annotations are evaluated when somebody asks for them, which may fail: they may name what is imported for type
checkers alone. Cloudpickle asks for those of functions, and forgets those of classes.
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

__all__ = ["Pickler"]


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles classes with their slots, and annotations with the values that they have here, or else as text."""

    def reducer_override(self, obj: Any) -> Any:
        """How an object is pickled, if not as usual."""
        if sys.version_info >= (3, 14):
            if type(obj) is types.FunctionType:
                return self._reduced_function(obj)
            if type(obj) is annotationlib.ForwardRef:
                return _reduced_reference(obj)
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            _complete(reduced, obj)  # else it is a builtin one's name
        return reduced

    if sys.version_info >= (3, 14):

        def _reduced_function(self, function: types.FunctionType) -> Any:
            try:
                return super().reducer_override(function)
            except Exception:  # whatever evaluating an annotation raises
                return super().reducer_override(_with_text(function))


def _complete(reduced: tuple[Any, ...], cls: type) -> None:
    """Give the class that will be made anew what cloudpickle leaves out."""
    state = reduced[2][0]
    if state.get("__slots__") and not isinstance(cls, EnumType):
        # Set later they are a mere attribute: its objects have a __dict__, and do not fit into this class.
        reduced[1][3]["__slots__"] = state.pop("__slots__")
    if sys.version_info >= (3, 14):
        state.pop("__annotations_cache__", None)  # there once somebody has asked
        if annotations := _annotations(cls):
            state["__annotations__"] = annotations


if sys.version_info >= (3, 14):

    def _with_text(function: types.FunctionType) -> types.FunctionType:
        """A copy as `from __future__ import annotations` would have made the function."""
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
        copy.__annotations__ = _annotations(function)
        return copy

    def _annotations(of: Any) -> dict[str, Any]:
        try:
            return annotationlib.get_annotations(of)
        except Exception:  # as above
            text = annotationlib.Format.STRING
            return annotationlib.get_annotations(of, format=text)

    def _reduced_reference(reference: annotationlib.ForwardRef) -> Any:
        """Without the namespaces in which it would be looked up here, which hold everything."""
        make = partial(
            annotationlib.ForwardRef,
            module=reference.__forward_module__,
            is_class=reference.__forward_is_class__,
        )
        return make, (reference.__forward_arg__,)
