"""CloudFormation's templates: read, and with what their functions put in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

_NOTHING = object()


class Loader(yaml.SafeLoader):
    """Reads CloudFormation's short forms as {name: value}."""


def _short_form(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        return {suffix: loader.construct_scalar(node)}
    if isinstance(node, yaml.SequenceNode):
        return {suffix: loader.construct_sequence(node, deep=True)}
    raise AssertionError(node)


Loader.add_multi_constructor("!", _short_form)


def rendered(node: Any, values: Mapping[str, Any], *, then: bool) -> Any:
    """A part of a template with what `Ref`, `GetAtt`, `Sub`, `Split` and `If` put in.

    Args:
        node: The part.
        values: What parameters, resources and their attributes are, by name.
        then: Which branch of each `If` to take.
    """
    if isinstance(node, list):
        return [rendered(item, values, then=then) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        [(name, given)] = node.items()
        put_in = _put_in(name, given, values, then=then)
        if put_in is not _NOTHING:
            return put_in
    return {name: rendered(item, values, then=then) for name, item in node.items()}


def _put_in(name: str, given: Any, values: Mapping[str, Any], *, then: bool) -> Any:
    if name in ("Ref", "GetAtt") and isinstance(given, str):
        return values[given]
    if name == "Sub":
        return re.sub(r"\$\{([^}]+)\}", lambda found: values[found[1]], given)
    if name == "If":
        return rendered(given[1 if then else 2], values, then=then)
    if name == "Split":
        return str(rendered(given[1], values, then=then)).split(given[0])
    return _NOTHING
