"""The contents of a script's class, and the arguments to recreate it."""

from __future__ import annotations

import abc
import types
from enum import Enum, Flag
from typing import Any

from starburst_executor.serialization import remote
from starburst_executor.serialization.annotations import annotations_of
from starburst_executor.serialization.content_ids import is_code
from starburst_executor.serialization.known_code import Key

__all__ = ["BUILTIN_TYPES", "class_arguments", "class_attributes", "enum_arguments"]

BUILTIN_TYPES = {value for value in vars(types).values() if isinstance(value, type)} | {
    type(None),
    type(...),
    type(NotImplemented),
}

# Recreated with the class, or not accessible from outside.
_LEFT_OUT = {"__dict__", "__weakref__", "__slotnames__"}
# Their values: from Python 3.14 on, only `__annotate_func__` is there until somebody asks.
_ANNOTATIONS = {"__annotations__", "__annotations_cache__", "__annotate_func__"}
_ENUM_LEFT_OUT = {
    "_member_names_", "_member_map_", "_value2member_map_", "_hashable_values_",
    "_unhashable_values_", "_unhashable_values_map_", "_member_type_", "_sort_order_",
    "_flag_mask_", "_singles_mask_", "_all_bits_", "_inverted_", "_boundary_",
}  # fmt: skip


def class_attributes(cls: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A class's attributes: code, and data that a program may change."""
    left_out = _LEFT_OUT | _ANNOTATIONS
    if issubclass(cls, Enum):
        left_out |= _ENUM_LEFT_OUT | set(cls.__members__)
    annotations = annotations_of(cls)
    code: dict[str, Any] = {"__annotations__": annotations} if annotations else {}
    data: dict[str, Any] = {}
    for name, value in list(vars(cls).items()):
        if name in left_out or isinstance(value, types.MemberDescriptorType):
            continue
        if name == "_abc_impl":
            code[name] = _abc_registry(cls)
        elif is_code(value) or (name.startswith("__") and name.endswith("__")):
            code[name] = value
        else:
            data[name] = value
    return code, data


def _abc_registry(cls: Any) -> list[Any]:
    registry, *_ = abc._get_dump(cls)  # type: ignore[attr-defined]  # noqa: SLF001
    return [kind for ref in registry if (kind := ref()) is not None]


def class_arguments(cls: Any, key: Key) -> tuple[Any, ...]:
    """The arguments for `make_class`."""
    own = vars(cls)
    attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if "__slots__" in own:
        attributes["__slots__"] = own["__slots__"]
    if isinstance(own.get("__dict__"), property):
        attributes["__dict__"] = own["__dict__"]
    if "__orig_bases__" in own:  # `Generic` derives its parameters from it
        attributes["__orig_bases__"] = own["__orig_bases__"]
    return key, type(cls), cls.__name__, cls.__bases__, attributes


def enum_arguments(cls: Any, key: Key) -> tuple[Any, tuple[Any, ...]]:
    """How to recreate an enumeration: `make_enum` and its arguments."""
    own = {"_value_", "_name_", "__objclass__", "_sort_order_"}
    members = []
    for label, member in cls.__members__.items():
        state = {k: v for k, v in member.__dict__.items() if k not in own}
        of_its_type = getattr(cls._member_type_, "__getnewargs__", None)
        arguments = () if of_its_type is None else of_its_type(member)
        members.append((label, member.value, arguments, state))
    options = {"boundary": cls._boundary_} if issubclass(cls, Flag) else {}
    return remote.make_enum, (key, cls.__bases__, cls.__name__, members, options)
