"""What AWS would refuse in a request: by botocore's models, and by the sentences beside them.

botocore itself checks types and little else. Its models have patterns, lengths and values; where
they have none, the documentation of a member may tell, and `constraints.json` has what it tells.
Like the recorder, this needs nothing but the standard library.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

_SPEAKS = re.compile(r"\bcharacters?\b|\bletters\b|\bmaximum length\b")
_KNOWS = {"pattern", "max", "enum"}  # what models may have
_OPEN = {"InstanceType"}  # EC2 has more of these than botocore knows, and is asked about each
# Classes of Unicode that the models use and `re` lacks; all of them within brackets.
_CLASSES = {r"\p{L}": r"\w", r"\p{N}": r"\d", r"\p{Z}": r"\s", r"\p{ASCII}": r"\x00-\x7f"}
# Halves of characters, as Java sees those beyond the first 65,536; `re` sees them whole.
_HALVES = re.compile(r"\\uD800\\uDC00-\\uDBFF\\uDFFF", re.IGNORECASE)


def faults(value: Any, shape: Any, service: str, where: str = "", name: str = "") -> Iterator[str]:
    """What AWS would refuse in a value, and of what nobody has looked up whether it would.

    Args:
        value: The value, which has the right type.
        shape: botocore's model of it.
        service: botocore's name of the service.
        where: The value's path in the request.
        name: Its key in `constraints.json`, as "Shape.member"; an item of a list has none.
    """
    rule = rules().get(service, {}).get(name)
    if rule is not None:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield from _refused(text, rule, f"{service} {where}")
    elif isinstance(value, str) and name and not _KNOWS & shape.metadata.keys():
        yield from _not_looked_up(shape, f"{service} {name}")
    if shape.name not in _OPEN:
        yield from _refused(value, shape.metadata, f"{service} {where}")
    for inner, member, path, key in _parts(value, shape, where):
        yield from faults(inner, member, service, path, key)


def _parts(value: Any, shape: Any, where: str) -> Iterator[tuple[Any, Any, str, str]]:
    if shape.type_name == "structure":
        for name, inner in value.items():
            if name in shape.members and inner is not None:
                yield inner, shape.members[name], f"{where}.{name}", f"{shape.name}.{name}"
    elif shape.type_name == "list":
        yield from ((inner, shape.member, f"{where}[]", "") for inner in value)
    elif shape.type_name == "map":
        for name, inner in value.items():
            yield name, shape.key, f"{where}{{}}", ""
            yield inner, shape.value, f"{where}.{name}", ""


def _refused(value: Any, told: Mapping[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, str | bytes | list | dict):
        size = len(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        return
    short = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    least, most = told.get("min", size), told.get("max", size)
    if not least <= size <= most:
        yield f"{where}: {short} has {size}, not {told.get('min', 0)} to {told.get('max', 'any')}"
    if isinstance(value, str):
        if "pattern" in told and not compiled(told["pattern"]).fullmatch(value):
            yield f"{where}: {short} does not match {told['pattern']}"
        if value not in told.get("enum", (value,)):
            yield f"{where}: {short} is none of {', '.join(told['enum'])}"


def _not_looked_up(shape: Any, where: str) -> Iterator[str]:
    said = documentation(shape)
    if found := _SPEAKS.search(said):
        near = said[max(0, found.start() - 80) : found.end() + 80]
        yield f"{where}: constraints.json lacks what is said of it: ...{near}..."


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as the models write it."""
    for name, ours in _CLASSES.items():
        pattern = pattern.replace(name, ours)
    return re.compile(_HALVES.sub(r"\\U00010000-\\U0010ffff", pattern))


@cache
def rules() -> dict[str, dict[str, dict[str, Any]]]:
    """What `constraints.json` says."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("constraints.json").read_text())
    del found["about"]
    return found


def documentation(shape: Any) -> str:
    """What botocore says of a member, as one line of plain text."""
    text = html.unescape(re.sub("<[^>]+>", " ", shape.documentation))
    return re.sub(r"\s+", " ", text)
