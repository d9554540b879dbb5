"""Store URLs, and opening the stores they name."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from starburst_executor.storage.base import Store
from starburst_executor.storage.directory import DirectoryStore

__all__ = ["join_url", "open_store", "split_session_url", "without_owner"]


_URL_FORMS = (
    "s3://bucket/prefix (optionally with ?region=eu-west-1&sse=aws:kms&kms_key_id=...&owner=...), "
    "file:///a/directory, or the path of a directory"
)


def open_store(url: str | Path) -> Store:
    """Open the store that a URL or path names; nothing is read or written yet.

    Args:
        url: `s3://bucket/prefix`, optionally with `?region=..&sse=AES256|aws:kms&kms_key_id=..`
            and `owner=..`, the account that must own the bucket (the endpoint comes from the usual
            AWS settings, such as `AWS_ENDPOINT_URL`);
            `file:///a/directory`; or the path of a directory, which may be relative or use `~`.

    Raises:
        ValueError: the URL is none of these.
    """
    text = str(url)
    scheme, colon, rest = text.partition("://")
    if colon and scheme == "s3":
        from starburst_executor.aws.s3 import S3Store

        return S3Store.from_url(text)
    if colon and scheme == "file" and rest.startswith("/"):
        return DirectoryStore(unquote(rest))
    # A single slash is a typo, or a URL that went through `Path`.
    if colon or not text or text.startswith(("s3:", "file:")):
        raise ValueError(f"{text!r} does not name a store; expected {_URL_FORMS}")
    if Path(text).expanduser().is_file():
        raise ValueError(f"{text!r} is a file; a store is {_URL_FORMS}")
    return DirectoryStore(text)


def join_url(store_url: str, path: str) -> str:
    """The URL of a path in a store: `s3://b/p?region=x` and `a/b` give `s3://b/p/a/b?region=x`."""
    base, mark, query = _split_query(store_url)
    return f"{base.rstrip('/')}/{path}{mark}{query}"


def split_session_url(url: str) -> tuple[str, str]:
    """Split a session's URL (`<store>/sessions/<id>`) into the store's URL and the session's id.

    Raises:
        ValueError: it does not end in `sessions/<id>`.
    """
    path, mark, query = _split_query(url)
    base, middle, session_id = path.rstrip("/").rpartition("/sessions/")
    if not middle or not session_id or "/" in session_id:
        raise ValueError(f"{url!r} is not a session's URL; expected <store>/sessions/<session id>")
    return f"{base or '/'}{mark}{query}", session_id


def without_owner(url: str) -> str:
    """The same URL without `owner=`, which earlier versions do not know."""
    base, _, query = _split_query(url)
    left = "&".join(part for part in query.split("&") if not part.startswith("owner="))
    return f"{base}?{left}" if left else base


def _split_query(url: str) -> tuple[str, str, str]:
    # A `?` starts a query only in S3's URLs: in a directory's path it is an ordinary character.

    return url.partition("?") if url.startswith("s3://") else (url, "", "")
