"""S3 as a store: one object per key, conditions by `If-Match` and `If-None-Match`.

Retries are botocore's (four tries), except for one case that it does not see: a reply that breaks
off while its body is read is requested again here. A conditional write that botocore repeats after
a lost reply conflicts with itself; writers read back to find out.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import re
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast
from urllib.parse import parse_qsl, urlencode

from botocore.exceptions import ClientError
from botocore.handlers import add_expect_header

from starburst_executor.aws import s3_transfer
from starburst_executor.aws.clients import make_client
from starburst_executor.aws.s3_errors import NO_ANSWER, S3Errors, http_status
from starburst_executor.aws.s3_transfer import (
    MultipartUpload,
    reading,
    transfer_threads,
)
from starburst_executor.errors import (
    Conflict,
    ObjectNotFound,
    StoreNotConditional,
)
from starburst_executor.storage.base import (
    Bytes,
    ListedObject,
    ListingPage,
    LocalFile,
    RequestCounter,
    StoredObject,
    appearing,
    check_key,
    check_listing,
)

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        ErrorTypeDef,
        GetObjectOutputTypeDef,
        GetObjectRequestTypeDef,
        ListObjectsV2OutputTypeDef,
        ListObjectsV2RequestTypeDef,
        ObjectIdentifierTypeDef,
        ResponseMetadataTypeDef,
    )

__all__ = ["S3Store"]

_log = logging.getLogger(__name__)

_SMALL = 1 << 20  # bytes: sending this much in vain costs no more than checking first
_READ_TRIES = 3
_RENEW_AFTER = 5.0  # seconds: creating a client takes a quarter of one
_DELETE_AT_ONCE = 1000  # S3's limit
_LAST = "\U0010ffff"  # sorts after every other character

# How S3 prices its operations: these are free, these are reads, all others are writes.
_FREE = {"DeleteObjects", "AbortMultipartUpload"}
_READS = {"GetObject", "HeadObject"}
# Old buckets have capitals and underscores, other servers have rules of their own; boto3 has these.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{3,255}")
_SETTINGS = ("region", "sse", "kms_key_id", "owner")
_ACCOUNT = re.compile(r"[0-9]{12}")
_CHECKSUMS = ("x-amz-checksum-", "x-amz-sdk-checksum-")

Encryption = Literal["AES256", "aws:kms"]


class _EncryptionParameters(TypedDict, total=False):
    ServerSideEncryption: Encryption
    SSEKMSKeyId: str


class S3Store:
    """A store in an S3 bucket, or on an S3-compatible server that honours conditional writes.

    Versions are ETags. Times are whole seconds. Thread-safe.

    Args:
        bucket: Name of a general purpose bucket; directory buckets list without order.
        prefix: Prefix of all keys in the bucket, without trailing slash.
        region: The bucket's region; by default from the usual AWS settings.
        sse: Encryption to request with each write; by default the bucket's own.
        kms_key_id: Id or ARN of the KMS key, with `sse="aws:kms"`.
        owner: Id of the AWS account that must own the bucket; by default any may.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        region: str | None = None,
        sse: Encryption | None = None,
        kms_key_id: str | None = None,
        owner: str | None = None,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._region = region
        self._owner = owner
        self._encryption = _EncryptionParameters()
        if sse:
            self._encryption["ServerSideEncryption"] = sse
        if kms_key_id:
            self._encryption["SSEKMSKeyId"] = kms_key_id
        self.url = _canonical_url(bucket, prefix, (region, sse, kms_key_id, owner))
        self.tally = RequestCounter()
        uses_kms = sse == "aws:kms"
        self._errors = S3Errors(
            bucket,
            self._prefix,
            self._endpoint,
            uses_kms=uses_kms,
            owner=owner,
            denied=self._renew,
        )
        self._gives_etags = False  # a reply had an ETag, so all should
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._created = 0.0  # when, on the monotonic clock

    @classmethod
    def from_url(cls, url: str) -> S3Store:
        """Open the store at `s3://bucket/prefix?region=..&sse=..&kms_key_id=..&owner=..`.

        Raises:
            ValueError: the URL is not of that form.
        """
        path, _, query = url.removeprefix("s3://").partition("?")
        bucket, _, prefix = path.partition("/")
        prefix = prefix.rstrip("/")
        settings = _settings(url, query)
        sse = settings.get("sse")
        if not _BUCKET.fullmatch(bucket):
            raise _bad_url(url, f"{bucket!r} is not a valid bucket name")
        if bucket.endswith("--x-s3"):
            raise _bad_url(
                url, "directory buckets list without order; use a general purpose bucket"
            )
        if any(name in ("", ".", "..") for name in prefix.split("/")) and prefix:
            raise _bad_url(url, f"the prefix {prefix!r} has an empty or dotted part")
        if sse not in (None, "AES256", "aws:kms"):
            raise _bad_url(url, f"sse={sse} is not AES256 or aws:kms")
        if "kms_key_id" in settings and sse != "aws:kms":
            raise _bad_url(url, "kms_key_id needs sse=aws:kms")
        if not _ACCOUNT.fullmatch(settings.get("owner", "0" * 12)):
            raise _bad_url(url, f"owner={settings['owner']} is not the id of an AWS account")
        return cls(
            bucket,
            prefix,
            region=settings.get("region"),
            sse=cast("Encryption | None", sse),
            kms_key_id=settings.get("kms_key_id"),
            owner=settings.get("owner"),
        )

    def get(
        self,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        unless: str | None = None,
    ) -> StoredObject | None:
        """Read an object or a range of it; None if its version is `unless`."""
        request = self._get_request(key, start, stop)
        if unless is not None:
            request["IfNoneMatch"] = unless
        if stop is not None and stop <= start:
            return self._nothing_of(key, unless)
        with self._errors.translating("GetObject", key):
            try:
                return self._get(request, start, stop)
            except ClientError as error:
                status = http_status(error)
                if status not in (304, 416):
                    raise
        # 416: the object ends before `start`.
        return None if status == 304 else self._nothing_of(key, unless)

    def put(self, key: str, data: Bytes) -> None:
        """Write an object unconditionally."""
        self._put(key, data)

    def create(self, key: str, data: Bytes) -> str:
        """Write an object that must not exist yet; return its version."""
        return self._put(key, data, condition="If-None-Match", IfNoneMatch="*")

    def replace(self, key: str, data: Bytes, version: str) -> str:
        """Write an object that must still have `version`; return the new version."""
        # Without quotes: some servers accept no other form.
        return self._put(key, data, condition="If-Match", IfMatch=version)

    def list(
        self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
    ) -> ListingPage:
        """List one page of the objects under `prefix`, in key order, with one request."""
        check_listing(prefix, limit, delimiter)
        request: ListObjectsV2RequestTypeDef = {
            "Bucket": self._bucket,
            "Prefix": self._prefix + prefix,
            "MaxKeys": limit,
        }
        if delimiter:
            request["Delimiter"] = delimiter
            after = _past_fold(prefix, after, delimiter)
        if after:
            request["StartAfter"] = self._prefix + after
        with self._errors.translating("ListObjectsV2", prefix):
            reply = self._s3().list_objects_v2(**request)
            page = self._page(reply)
            if page.truncated and not page.entries and not page.prefixes:
                raise ValueError("an empty page claims that more follow")
            return page

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, 1,000 per request; try all before reporting any failure."""
        rest = iter(keys)
        failures: list[ErrorTypeDef] = []
        while chunk := tuple(islice(rest, _DELETE_AT_ONCE)):
            failures += self._delete(chunk)
        failures = [e for e in failures if e.get("Code") != "NoSuchKey"]
        if failures:
            raise self._errors.not_deleted(failures)

    def upload(self, key: str, source: Path | Bytes) -> None:
        """Write an object named after its content unless it exists, in parallel parts if large."""
        with reading(source) as (size, read):
            if size <= _SMALL:
                with contextlib.suppress(Conflict):
                    self.create(key, read(0, size))
                    return
            # A conflict may also mean that the object was deleted during the write.
            if self._exists(key):
                return
            if size <= s3_transfer.PART:
                self.put(key, read(0, size))
            else:
                self._parts_of(key).send(size, read)

    def download(self, key: str, target: Path) -> None:
        """Download an object, in parallel parts if large; the file appears whole or not at all."""
        first = self.get(key, stop=s3_transfer.PART)
        assert first is not None  # None only with `unless`
        with appearing(target) as out:
            out.write_at(first.data, 0)
            starts = range(s3_transfer.PART, first.size, s3_transfer.PART)
            if not starts:
                return
            with transfer_threads("download") as pool:
                for _ in pool.map(
                    lambda start: self._download_part(key, first, start, out),
                    starts,
                ):
                    pass

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # Requests

    def _put(self, key: str, data: Bytes, *, condition: str | None = None, **header: str) -> str:
        name = self._key(key)
        with self._errors.translating("PutObject", key, condition):
            reply = self._s3().put_object(
                Bucket=self._bucket,
                Key=name,
                Body=bytes(data),
                **cast(Any, header),
                **self._encryption,
            )
            return self._version(reply)

    def _delete(self, keys: Sequence[str]) -> Sequence[ErrorTypeDef]:
        """Delete up to 1,000 objects; return the failures. The reply must cover every key."""
        names: list[ObjectIdentifierTypeDef] = [{"Key": self._key(key)} for key in keys]
        with self._errors.translating("DeleteObjects", keys[0]):
            reply = self._s3().delete_objects(Bucket=self._bucket, Delete={"Objects": names})
            failed = reply.get("Errors", [])
            answered = len(reply.get("Deleted", [])) + len(failed)
            if answered < len(names):
                raise ValueError(f"it covers {answered} of {len(names)} objects")
            return failed

    def _count(self, event_name: str, **_: object) -> None:
        """Count a request, including retries: S3 bills those too."""
        operation = event_name.rpartition(".")[2]
        if operation in _READS:
            self.tally.read()
        elif operation not in _FREE:
            self.tally.wrote()

    def _s3(self) -> S3Client:
        if (client := self._client) is not None:
            return client
        with self._lock:
            if self._client is None:
                self._client = _s3_client(self._region, self._owner)
                self._created = time.monotonic()
                self._client.meta.events.register("before-send.s3", self._count)
            return self._client

    def _renew(self) -> None:
        """Look for credentials again at the next request: a client keeps those that it found."""
        if self._client is not None and time.monotonic() - self._created >= _RENEW_AFTER:
            self.close()

    def _endpoint(self) -> tuple[str, str]:
        meta = self._s3().meta
        return meta.endpoint_url, meta.region_name

    def _parts_of(self, key: str) -> MultipartUpload:
        place = {"Bucket": self._bucket, "Key": self._key(key)}
        return MultipartUpload(self._s3(), place, self._encryption, self._errors, key, self._exists)

    def _key(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    def _get_request(self, key: str, start: int, stop: int | None) -> GetObjectRequestTypeDef:
        request: GetObjectRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": self._key(key),
        }
        if start or stop is not None:
            request["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        return request

    def _get(self, request: GetObjectRequestTypeDef, start: int, stop: int | None) -> StoredObject:
        reply, data = self._read(request)
        size = reply["ContentLength"]
        if "ContentRange" in reply:
            size = int(reply["ContentRange"].rpartition("/")[2])
        elif "Range" in request:  # a server may ignore the range and send everything
            data = data[start:stop]
        return StoredObject(
            data=data,
            size=size,
            version=self._version(reply),
            modified=_seconds(reply["LastModified"]),
            now=self._now(reply["ResponseMetadata"]),
        )

    def _read(self, request: GetObjectRequestTypeDef) -> tuple[GetObjectOutputTypeDef, bytes]:
        for _ in range(_READ_TRIES - 1):
            reply = self._s3().get_object(**request)
            with contextlib.suppress(*NO_ANSWER):
                return reply, _content(reply)
        reply = self._s3().get_object(**request)
        return reply, _content(reply)

    def _nothing_of(self, key: str, unless: str | None) -> StoredObject | None:
        """Describe an object without its data."""
        name = self._key(key)
        with self._errors.translating("HeadObject", key):
            reply = self._s3().head_object(Bucket=self._bucket, Key=name)
            version = self._version(reply)
            if version == unless:
                return None
            return StoredObject(
                data=b"",
                size=reply["ContentLength"],
                version=version,
                modified=_seconds(reply["LastModified"]),
                now=self._now(reply["ResponseMetadata"]),
            )

    def _exists(self, key: str) -> bool:
        try:
            self._nothing_of(key, None)
        except ObjectNotFound:
            return False
        return True

    def _download_part(self, key: str, first: StoredObject, start: int, file: LocalFile) -> None:
        stop = min(start + s3_transfer.PART, first.size)
        request = self._get_request(key, start, stop)
        request["IfMatch"] = first.version
        with self._errors.translating("GetObject", key, condition="If-Match"):
            part = self._get(request, start, stop)
        file.write_at(part.data, start)

    # Replies

    def _page(self, reply: ListObjectsV2OutputTypeDef) -> ListingPage:
        skip = len(self._prefix)
        return ListingPage(
            entries=[
                ListedObject(
                    key=item["Key"][skip:],
                    size=item["Size"],
                    version=_unquoted(item["ETag"]),
                    modified=_seconds(item["LastModified"]),
                )
                for item in reply.get("Contents", ())
            ],
            prefixes=[p["Prefix"][skip:] for p in reply.get("CommonPrefixes", ())],
            now=self._now(reply["ResponseMetadata"]),
            truncated=reply["IsTruncated"],
        )

    def _version(self, reply: Any) -> str:
        etag = reply.get("ETag")
        if etag:
            self._gives_etags = True
            return _unquoted(etag)
        headers = reply["ResponseMetadata"]["HTTPHeaders"]
        if self._gives_etags or "html" in headers.get("content-type", ""):
            raise ValueError("it has no ETag (did a gateway or a login page answer?)")
        raise StoreNotConditional(
            f"the server behind {self.url} answers without an ETag, so conditional writes are "
            f"impossible. {self._errors.place()}"
        )

    def _now(self, metadata: ResponseMetadataTypeDef) -> float:
        date = metadata["HTTPHeaders"].get("date")
        if date is None:
            raise ValueError("it has no Date header, which leases depend on")
        return parsedate_to_datetime(date).timestamp()


def _s3_client(region: str | None, owner: str | None) -> S3Client:
    client: S3Client = make_client("s3", region=region)
    # boto3 sends `Expect: 100-continue` before each body, an extra round trip for every write.
    # A small body is as fast as the question; a refused part wastes 16 MiB, and rarely happens.
    client.meta.events.unregister("before-call.s3", add_expect_header)
    client.meta.events.register("before-sign.s3.DeleteObjects", _check_by_md5)
    if owner is not None:
        # S3 then refuses each request if the bucket has become somebody else's.
        expect = partial(_expect_owner, owner)
        client.meta.events.register("before-parameter-build.s3", expect)
    return client


def _check_by_md5(request: AWSRequest, **_: object) -> None:
    """Replace boto3's checksum by the one that every server knows; DeleteObjects must have one."""
    for name in [name for name in request.headers if name.lower().startswith(_CHECKSUMS)]:
        del request.headers[name]
    digest = hashlib.md5(cast("bytes", request.body), usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def _expect_owner(owner: str, params: dict[str, Any], model: OperationModel, **_: object) -> None:
    if model.input_shape is not None and "ExpectedBucketOwner" in model.input_shape.members:
        params["ExpectedBucketOwner"] = owner


def _canonical_url(bucket: str, prefix: str, settings: tuple[str | None, ...]) -> str:
    given = [(k, v) for k, v in zip(_SETTINGS, settings, strict=True) if v]
    base = f"s3://{bucket}/{prefix}".rstrip("/")
    return f"{base}?{urlencode(given, safe=':/')}" if given else base


def _settings(url: str, query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError as error:
        raise _bad_url(url, str(error)) from error
    settings = dict(pairs)
    unknown = settings.keys() - set(_SETTINGS)
    if unknown or len(settings) != len(pairs):
        raise _bad_url(url, f"after '?', only {', '.join(_SETTINGS)} are allowed, once each")
    return settings


def _bad_url(url: str, why: str) -> ValueError:
    return ValueError(
        f"{url!r} is not a store URL: {why}. Expected s3://bucket/prefix, optionally with "
        "?region=eu-west-1&sse=AES256 or ?sse=aws:kms&kms_key_id=..."
    )


def _past_fold(prefix: str, after: str, delimiter: str) -> str:
    """Where to start so that the folded prefix that is, or contains, `after` is not repeated."""
    if not after.startswith(prefix):
        return after
    end = after.find(delimiter, len(prefix))
    return after if end < 0 else after[: end + len(delimiter)] + _LAST


def _content(reply: GetObjectOutputTypeDef) -> bytes:
    # Not `with reply["Body"]`: it bypasses botocore and raises urllib3's errors.
    with contextlib.closing(reply["Body"]) as body:
        return body.read()


def _seconds(time: datetime) -> float:
    """Whole seconds, like the Date header: fractions, as some servers list, lie in the future."""
    return float(int(time.timestamp()))


def _unquoted(etag: str) -> str:
    return etag if etag.startswith("W/") else etag.strip('"')
