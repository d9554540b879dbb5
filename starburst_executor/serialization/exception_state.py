"""Takes an exception apart into plain parts, and puts it together again.

Pickle calls an exception's class with `args`, which fails or changes the message if the constructor
has other parameters. This module never calls a user's class:

    take apart, where it was raised          put together, where it is awaited
      class, args, __dict__, slots  ------>    the `__new__` of its builtin base, then
      cause, context, notes, members           all of these set as they were

* Each exception of a chain or group is independent: one that cannot be pickled becomes a
  `RemoteError`, and the others stay intact.
* Each argument and attribute is independent too: one that cannot be pickled and unpickled is left
  out, and a note says so.
* An exception whose state Python cannot see (in a compiled extension) is left to its own
  `__reduce__`, if that preserves class and text.
"""

from __future__ import annotations

import builtins
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec
from msgspec.structs import replace

from starburst_executor.errors import RemoteError
from starburst_executor.serialization.remote import OtherException

__all__ = [
    "Pack",
    "Part",
    "clean",
    "is_interrupt",
    "message_of",
    "one_line",
    "put_together",
    "take_apart",
    "type_name",
]

Pack: TypeAlias = Callable[[object], tuple[bytes, Any]]
"""Pickles a value; returns the bytes and what they unpickle to."""

Unpack: TypeAlias = Callable[[bytes], Any]

_DEPTH = 4  # of lists, tuples and dicts searched for exceptions


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One exception; refers to others by index, where -1 means none."""

    name: str  # qualified name of its class
    text: str
    kind: bytes | None = None  # pickle of the class; None if that is impossible
    reason: str = ""  # why it is impossible
    args: tuple[bytes, ...] = ()
    attributes: dict[str, bytes] = {}
    slots: dict[str, bytes] = {}
    whole: bytes | None = None  # pickle by `__reduce__`, in place of the three above
    notes: tuple[str, ...] = ()
    cause: int = -1
    context: int = -1
    hides: bool = False  # __suppress_context__
    message: str = ""  # of a group
    members: tuple[int, ...] = ()  # of a group


class _Absent:
    """Replaces an argument that could not be pickled, with the same repr."""

    def __init__(self, text: str, shown: str) -> None:
        self._text = text
        self._shown = shown

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._shown


# --- what exceptions say ----------------------------------------------------------


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception from a user's code likely comes from Ctrl-C.

    Python delivers it only to the main thread; on any other it was raised on purpose.
    """
    on_main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and on_main


def type_name(kind: type) -> str:
    """Qualified name of a class, as in tracebacks."""
    plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"


def message_of(exc: BaseException) -> str:
    """`str(exc)`, whatever its `__str__` does."""
    return _said(str, exc)


def _said(how: Callable[[Any], str], obj: object) -> str:
    try:
        return how(obj)
    except BaseException as error:  # a user's __str__ or __repr__
        if is_interrupt(error):
            raise
        name = f"__{how.__name__}__"
        return f"<no message: its {name} raised {type(error).__qualname__}>"


def one_line(exc: BaseException) -> str:
    """Class and message of an exception, as in the last line of a traceback."""
    message = message_of(exc)
    return f"{type_name(type(exc))}: {message}" if message else type_name(type(exc))


def clean(text: str) -> str:
    """The text without lone surrogates (from undecodable file names), which are invalid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- taking apart -----------------------------------------------------------------


def take_apart(exc: BaseException, pack: Pack) -> list[Part]:
    """The parts of an exception and of all exceptions reachable from it; its own comes first.

    Args:
        exc: The exception.
        pack: Pickles one class, argument or attribute. If it raises, that one is left out.
    """
    apart = _Apart(exc, pack)
    parts = list(apart.parts())
    together = _Together(parts, apart.twins.__getitem__)
    for i, twin in enumerate(together.run()):
        if i in together.stand_ins or message_of(twin) != message_of(apart.found[i]):
            parts[i] = apart.otherwise(i, parts[i], twin)
    return parts


class _Apart:
    def __init__(self, exc: BaseException, pack: Pack) -> None:
        self.found = [exc]
        self.twins: dict[bytes, Any] = {}
        self._indices = {id(exc): 0}
        self._pack = pack

    def parts(self) -> Iterator[Part]:
        for exc in self.found:  # which grows during iteration
            yield self._part(exc)

    def _part(self, exc: BaseException) -> Part:
        notes: list[str] = []
        state = dict(object.__getattribute__(exc, "__dict__"))
        own_notes = _plain_notes(state)
        kind, reason = self._kind(exc)
        group = exc if isinstance(exc, BaseExceptionGroup) else None
        return Part(
            name=clean(type_name(type(exc))),
            text=clean(message_of(exc)),
            kind=kind,
            reason=reason,
            args=tuple([self._argument(arg, notes) for arg in exc.args]),
            attributes=self._fields(state, notes),
            slots=self._fields(dict(_slot_values(exc)), notes),
            cause=self._index(exc.__cause__),
            context=self._index(exc.__context__),
            hides=exc.__suppress_context__,
            message="" if group is None else clean(group.message),
            members=() if group is None else tuple(map(self._index, group.exceptions)),
            notes=(*own_notes, *notes),
        )

    def _kind(self, exc: BaseException) -> tuple[bytes | None, str]:
        try:
            return self._packed(type(exc)), ""
        except BaseException as error:  # users' classes may raise anything here
            return None, clean(one_line(error))

    def _index(self, exc: BaseException | None) -> int:
        if exc is None:
            return -1
        if id(exc) not in self._indices:
            self._indices[id(exc)] = len(self.found)
            self.found.append(exc)
        return self._indices[id(exc)]

    def _packed(self, value: object) -> bytes:
        data, self.twins[data] = self._pack(value)
        return data

    def _argument(self, arg: object, notes: list[str]) -> bytes:
        try:
            return self._packed(self._lowered(arg, _DEPTH))
        except BaseException as error:
            notes.append(_left_behind("An argument", error))
            return self._packed(_Absent(_said(str, arg), _said(repr, arg)))

    def _fields(self, values: dict[str, Any], notes: list[str]) -> dict[str, bytes]:
        fields: dict[str, bytes] = {}
        for name, value in values.items():
            try:
                fields[name] = self._packed(self._lowered(value, _DEPTH))
            except BaseException as error:
                notes.append(_left_behind(f"Its attribute {name!r}", error))
        return fields

    def _lowered(self, value: Any, depth: int) -> Any:
        """The value with its exceptions replaced by their indices."""
        if isinstance(value, BaseException):
            return OtherException(self._index(value))
        return _mapped(self._lowered, value, depth)

    def otherwise(self, i: int, part: Part, twin: BaseException) -> Part:
        """The part of an exception that its state alone does not restore."""
        try:
            data, whole = self._pack(self.found[i])
        except BaseException as error:
            reason = one_line(error)
        else:
            if _same(whole, self.found[i]):
                return replace(part, whole=data, args=(), attributes={}, slots={})
            reason = "pickling and unpickling change it"
        if _same_class(twin, self.found[i]):
            said = f"Where it was raised, its text was: {part.text}"
            return replace(part, notes=(*part.notes, said))
        return replace(part, kind=None, reason=part.reason or clean(reason))


def _mapped(function: Callable[[Any, int], Any], value: Any, depth: int) -> Any:
    """A list, tuple or dict with the function applied to its values; unchanged if none changes."""
    kind = type(value)
    if kind not in (list, tuple, dict) or depth == 0:
        return value
    old = list(value.values()) if kind is dict else value
    new = [function(item, depth - 1) for item in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return value
    return dict(zip(value, new, strict=True)) if kind is dict else kind(new)


def _same_class(twin: object, exc: BaseException) -> bool:
    return type_name(type(twin)) == type_name(type(exc))


def _same(twin: object, exc: BaseException) -> bool:
    return (
        isinstance(twin, BaseException)
        and _same_class(twin, exc)
        and message_of(twin) == message_of(exc)
    )


def _left_behind(what: str, error: BaseException) -> str:
    return clean(f"{what} was left out: it cannot be pickled and unpickled ({one_line(error)})")


def _plain_notes(state: dict[str, Any]) -> tuple[str, ...]:
    """Remove the notes from an exception's state, unless they are not a list of strings."""
    notes = state.get("__notes__")
    if type(notes) is not list or not all(type(note) is str for note in notes):
        return ()
    del state["__notes__"]
    return tuple(map(clean, notes))


# --- classes ----------------------------------------------------------------------

_BUILTIN = frozenset(
    kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, BaseException)
)
_HANDLED = frozenset({object, BaseException, BaseExceptionGroup})
# A failed attribute lookup should not ship the whole object.
_NEVER = frozenset({(AttributeError, "obj")})
_SLOT_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)


def _slots(kind: type) -> Iterator[tuple[str, type, Any]]:
    """Name, class and descriptor of each field outside `__dict__`, including builtin classes'."""
    seen = {"__dict__", "__weakref__"}
    for base in kind.__mro__:
        for name, slot in () if base in _HANDLED else list(vars(base).items()):
            if isinstance(slot, _SLOT_TYPES) and name not in seen:
                seen.add(name)
                if (base, name) not in _NEVER:
                    yield name, base, slot


def _slot_values(exc: BaseException) -> Iterator[tuple[str, Any]]:
    for name, base, slot in _slots(type(exc)):
        try:
            value = slot.__get__(exc)
        except Exception:  # never set
            continue
        # Builtin classes show None for one that was never set.
        if value is not None or base not in _BUILTIN:
            yield name, value


def _shell(
    kind: type[BaseException], message: str, members: Sequence[BaseException]
) -> BaseException:
    """An exception without state, created by a builtin class among its bases.

    Raises:
        TypeError: no base can create it.
    """
    given = (message, members) if members else ()
    for base in kind.__mro__:
        if base in _BUILTIN:
            with suppress(TypeError):  # another base determines its memory layout
                made: BaseException = base.__new__(kind, *given)
                return made
    raise TypeError(f"no builtin class can create a {type_name(kind)}")


# --- putting together -------------------------------------------------------------


def put_together(parts: Sequence[Part], unpack: Unpack) -> BaseException:
    """The exception that was taken apart.

    Args:
        parts: What `take_apart` returned.
        unpack: Unpickles one class, argument or attribute. If it raises, that one is missing, and
            a note says so.
    """
    return _Together(parts, unpack).run()[0]


class _Together:
    def __init__(self, parts: Sequence[Part], unpack: Unpack) -> None:
        self._parts = parts
        self._unpack = unpack
        self._made: dict[int, BaseException] = {}
        self._notes: dict[int, list[str]] = {}
        self.stand_ins: set[int] = set()

    def run(self) -> list[BaseException]:
        made = [self._exception(i) for i in range(len(self._parts))]
        for i, exc in enumerate(made):
            if self._parts[i].whole is None and i not in self.stand_ins:
                self._fill(exc, self._parts[i], self._notes[i])
        for i, exc in enumerate(made):
            self._link(exc, self._parts[i], self._notes[i])
        return made

    def _exception(self, i: int) -> BaseException:
        if i not in self._made:
            part = self._parts[i]
            self._notes[i] = list(part.notes)
            try:
                self._made[i] = self._new(part)
            except BaseException as error:  # code of the user, or the store
                if is_interrupt(error):
                    raise
                self.stand_ins.add(i)
                self._made[i] = RemoteError(f"{part.name}: {part.text}")
                self._notes[i].append(_not_itself(part.reason or one_line(error)))
        return self._made[i]

    def _new(self, part: Part) -> BaseException:
        if part.whole is not None:
            return _checked(self._unpack(part.whole))
        if part.kind is None:
            raise TypeError(part.reason)
        kind = self._unpack(part.kind)
        members = [self._exception(i) for i in part.members]
        return _shell(kind, part.message, members)

    def _fill(self, exc: BaseException, part: Part, notes: list[str]) -> None:
        _set(exc, "args", tuple([self._argument(d, part, notes) for d in part.args]))
        state = object.__getattribute__(exc, "__dict__")
        state.update(self._fields(part.attributes, notes))
        slots = {name: slot for name, _, slot in _slots(type(exc))}
        for name, value in self._fields(part.slots, notes).items():
            with suppress(Exception):  # it is computed, or the class here lacks it
                slots[name].__set__(exc, value)

    def _argument(self, data: bytes, part: Part, notes: list[str]) -> Any:
        found = self._fields({"": data}, notes, "An argument")
        return found.get("", _Absent(part.text, "<absent>"))

    def _fields(self, packed: dict[str, bytes], notes: list[str], what: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, data in packed.items():
            try:
                values[name] = self._raised(self._unpack(data), _DEPTH)
            except BaseException as error:  # code of the user, or the store
                if is_interrupt(error):
                    raise
                notes.append(_left_behind(what or f"Its attribute {name!r}", error))
        return values

    def _raised(self, value: Any, depth: int) -> Any:
        """The value with its indices replaced by their exceptions."""
        if isinstance(value, OtherException):
            return self._made[value.index]
        return _mapped(self._raised, value, depth)

    def _link(self, exc: BaseException, part: Part, notes: list[str]) -> None:
        _set(exc, "__cause__", self._made.get(part.cause))
        _set(exc, "__context__", self._made.get(part.context))
        _set(exc, "__suppress_context__", part.hides)
        if notes:
            _set(exc, "__notes__", notes)


def _checked(whole: Any) -> BaseException:
    if not isinstance(whole, BaseException):
        raise TypeError(f"{type_name(type(whole))} is not an exception")
    return whole


def _not_itself(reason: str) -> str:
    return f"The exception could not be restored: {reason}"


def _set(exc: BaseException, name: str, value: object) -> None:
    object.__setattr__(exc, name, value)  # works for frozen classes too
