"""What a request to an S3 server asks for, read from its first line and body."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["S3Request", "kind_of", "operation_of"]

_KEYS = re.compile(rb"<Key>([^<]*)</Key>")
_IN_SESSION = re.compile(r"(?:.*/)?sessions/[^/]+/(.*)")


def operation_of(method: str, target: str) -> str:
    """`LIST`, `DELETE` of many, or the request's own method."""
    query = target.partition("?")[2]
    if method == "GET" and "list-type=" in query:
        return "LIST"
    if method == "POST" and query.startswith("delete"):
        return "DELETE"
    return method


def kind_of(name: str) -> str:
    """The kind of a session's object: `record` of `queue/<batch>/record`, `blobs` of `blobs/..`."""
    first, *rest = name.split("/")
    if first == "queue" and len(rest) > 1:
        return rest[-1].partition(".")[0]
    return first


@dataclass(frozen=True, slots=True)
class S3Request:
    """One request.

    Attributes:
        operation: `GET`, `HEAD`, `PUT`, `LIST`, `DELETE` (of many), `POST` (of a large object).
        name: The object, or the listed prefix, within its session; outside of one, the whole key.
    """

    operation: str
    name: str

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @classmethod
    def parse(cls, method: str, target: str, body: bytes) -> S3Request:
        url = urlsplit(target)
        operation = operation_of(method, target)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        if operation == "LIST":
            key = parse_qs(url.query).get("prefix", [""])[0]
        elif operation == "DELETE" and (first := _KEYS.search(body)):
            key = first[1].decode()
        inside = _IN_SESSION.fullmatch(key)
        return cls(operation, inside[1] if inside else key)
