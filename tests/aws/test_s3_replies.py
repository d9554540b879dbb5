"""Replies that are not S3's.

Every operation answers, or raises an error of the store, but never an accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from starburst_executor.errors import (
    Conflict,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from starburst_executor.storage.base import Store
from starburst_executor.storage.url import open_store
from tests.support.toy_s3 import DATE, Toy, serving

Reply = tuple[int, Mapping[str, str | None], bytes]

HTML = {"Content-Type": "text/html"}
WHOLE = {"ETag": '"abc"', "Last-Modified": DATE}


def xml(body: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>{body}'.encode()


def error(body: str) -> bytes:
    return xml(f"<Error>{body}</Error>")


def listing(body: str) -> bytes:
    return xml(f"<ListBucketResult><Name>b</Name>{body}</ListBucketResult>")


LISTED = (
    "<Contents><Key>prefix/k</Key><ETag>{}</ETag><Size>1</Size>"
    "<LastModified>{}</LastModified></Contents>"
)
NONE_LEFT = "<IsTruncated>false</IsTruncated>"

ODD: dict[str, Reply] = {
    "a log-in page": (200, HTML, b"<html><body>Please log in</body></html>"),
    "a page that is no XML": (200, HTML, b"<!doctype html><html><br><p>log in"),
    "nothing at all": (200, {}, b""),
    "no content": (204, {}, b""),
    "an error with an empty message": (412, {}, error("<Code>PreconditionFailed</Code><Message/>")),
    "an error without a message": (412, {}, error("<Code>PreconditionFailed</Code>")),
    "an error without a code": (412, {}, error("<Message>no</Message>")),
    "an error without a body": (412, {}, b""),
    "an error as a page": (412, HTML, b"<html><h1>412</h1></html>"),
    "an error that is nested": (400, {}, error("<Code>418</Code><Message>a <b>b</b></Message>")),
    "a refusal without a message": (403, {}, error("<Code>AccessDenied</Code><Message/>")),
    "a refusal as a page": (403, HTML, b"<html>proxy</html>"),
    "not found, as a page": (404, HTML, b"<html>nope</html>"),
    "a gateway's error": (502, HTML, b"<html>bad gateway</html>"),
    "an error of the server's without a body": (500, {}, b""),
    "a redirect without a region": (301, {}, error("<Code>PermanentRedirect</Code><Message/>")),
    "a redirect without a body": (301, {}, b""),
    "a redirect to itself": (307, {"Location": "/x"}, b""),
    "a redirect to a log-in page": (302, {"Location": "http://127.0.0.1:1/login"}, b""),
    "no time": (200, {"ETag": '"abc"'}, b"data"),
    "a time that is none": (200, {"ETag": '"abc"', "Last-Modified": "yesterday"}, b"data"),
    "no date": (200, {**WHOLE, "Date": None}, listing(NONE_LEFT)),
    "a date that is none": (200, {**WHOLE, "Date": "soon"}, listing(NONE_LEFT)),
    "a listing that does not say whether it goes on": (200, WHOLE, listing("")),
    "a listing that goes on and is empty": (200, WHOLE, listing("<IsTruncated>true</IsTruncated>")),
    "an entry without size": (
        200, WHOLE, listing(f"<Contents><Key>prefix/k</Key></Contents>{NONE_LEFT}"),
    ),
}  # fmt: skip

OPERATIONS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("k"),
    "get nothing": lambda store: store.get("k", stop=0),
    "put": lambda store: store.put("k", b"x"),
    "create": lambda store: store.create("k", b"x"),
    "replace": lambda store: store.replace("k", b"x", "v"),
    "list": lambda store: store.list(""),
    "delete": lambda store: store.delete(["k"]),
    "upload": lambda store: store.upload("k", bytes(17 << 20)),
}


class Odd(Toy):
    """Gives the same odd reply to everything."""

    odd: Reply

    def answer(self, body: bytes) -> None:
        status, headers, data = self.odd
        self.send_response_only(status)
        for name, value in {"Date": DATE, **headers}.items():
            if value is not None:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    with serving(Odd) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        opened = open_store("s3://bucket/prefix")
        yield opened
        opened.close()


def fate(store: Store, operation: str, reply: Reply) -> str:
    """What becomes of an operation: "ok", or the class of the store's error.

    Whatever else is raised passes.
    """
    Odd.odd = reply
    try:
        OPERATIONS[operation](store)
    except StoreError as raised:
        return type(raised).__name__
    return "ok"


@pytest.mark.parametrize("reply", ODD)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_odd_reply_is_never_an_accident(store: Store, operation: str, reply: str) -> None:
    fate(store, operation, ODD[reply])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_page_in_place_of_an_answer_is_a_store_that_is_away(store: Store, operation: str) -> None:
    assert fate(store, operation, ODD["a log-in page"]) == StoreUnavailable.__name__


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_server_that_gave_versions_is_away_when_it_says_nothing(
    store: Store, operation: str
) -> None:
    assert fate(store, "put", (200, WHOLE, b"")) == "ok"
    assert fate(store, operation, ODD["nothing at all"]) == StoreUnavailable.__name__


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_redirect_that_leads_nowhere_names_endpoint_and_region(
    store: Store, operation: str
) -> None:
    for reply in (name for name in ODD if name.startswith("a redirect")):
        Odd.odd = ODD[reply]
        with pytest.raises(StoreUnavailable, match=r"http://127\.0\.0\.1:\d+ in region eu-west-1"):
            OPERATIONS[operation](store)


@pytest.mark.parametrize(
    "reply",
    [name for name in ODD if name.startswith("an error") and ODD[name][0] == 412],
)
@pytest.mark.parametrize("operation", ["create", "replace"])
def test_a_refused_condition_is_a_conflict_however_it_is_worded(
    store: Store, operation: str, reply: str
) -> None:
    assert fate(store, operation, ODD[reply]) == Conflict.__name__


@pytest.mark.parametrize("reply", [name for name in ODD if name.startswith("a refusal")])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusal_is_a_denial_however_it_is_worded(
    store: Store, operation: str, reply: str
) -> None:
    assert fate(store, operation, ODD[reply]) == StoreDenied.__name__


@pytest.mark.parametrize("operation", ["get", "get nothing", "replace"])
def test_an_object_that_is_not_there_is_not_found_however_it_is_worded(
    store: Store, operation: str
) -> None:
    assert fate(store, operation, ODD["not found, as a page"]) == ObjectNotFound.__name__


def test_a_deletion_that_does_not_tell_of_each_object_has_not_happened(
    store: Store,
) -> None:
    told = xml("<DeleteResult><Deleted><Key>prefix/a</Key></Deleted></DeleteResult>")
    Odd.odd = (200, {}, told)
    store.delete(["a"])
    with pytest.raises(StoreUnavailable, match="1 of 2 objects"):
        store.delete(["a", "b"])


@pytest.mark.parametrize("etag", ['"abc"', "abc", 'W/"abc"', "&quot;abc&quot;"])
def test_a_version_is_the_same_from_a_write_and_from_a_listing(store: Store, etag: str) -> None:
    entry = LISTED.format(etag, "2026-01-01T00:00:00.250Z")
    Odd.odd = (200, {"ETag": etag.replace("&quot;", '"')}, listing(entry + NONE_LEFT))
    [listed] = store.list("").entries
    assert store.create("k", b"x") == listed.version
    assert listed.modified == int(listed.modified)
