"""The pickler of what travels by value: cloudpickle's, with what it lacks on Python 3.14.

There annotations are evaluated when somebody asks for them, which may fail: they may name what is imported for type
checkers alone. Cloudpickle asks for those of functions, and forgets those of classes.
"""

from __future__ import annotations

import sys
import types
from functools import partial
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

if sys.version_info >= (3, 14):
    import annotationlib

__all__ = ["Pickler"]


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles annotations with the values that they have here, or else as text."""

    if sys.version_info >= (3, 14):

        def reducer_override(self, obj: Any) -> Any:
            """How an object is pickled, if not as usual."""
            if type(obj) is types.FunctionType:
                return self._reduced_function(obj)
            if type(obj) is annotationlib.ForwardRef:
                return _reduced_reference(obj)
            reduced = super().reducer_override(obj)
            if isinstance(obj, type) and isinstance(reduced, tuple):
                _annotate(reduced, obj)
            return reduced

        def _reduced_function(self, function: types.FunctionType) -> Any:
            try:
                return super().reducer_override(function)
            except Exception:  # whatever evaluating an annotation raises
                return super().reducer_override(_with_text(function))


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

    def _annotate(reduced: tuple[Any, ...], cls: type) -> None:
        """Complete what cloudpickle will set on the class that it makes anew."""
        if len(reduced) == 6:  # else it is a builtin one's name
            state = reduced[2][0]
            state.pop("__annotations_cache__", None)  # there once somebody has asked
            if annotations := _annotations(cls):
                state["__annotations__"] = annotations

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
