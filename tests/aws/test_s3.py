"""The S3 store: exact requests, every refusal, and what only a wire can do to a reply."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from starburst_executor.aws import s3_transfer
from starburst_executor.aws.s3 import S3Store
from starburst_executor.errors import (
    ConfigError,
    Conflict,
    LocalDiskError,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreNotConditional,
    StoreUnavailable,
)
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import Store
from starburst_executor.storage.probe import probe_conditional
from starburst_executor.storage.url import open_store
from tests.support.servers import S3Server, latency_proxy
from tests.support.toy_s3 import Toy, serving

DATE = "Wed, 01 Jul 2026 12:00:05 GMT"
NOW = datetime.datetime(2026, 7, 1, 12, 0, 5, tzinfo=datetime.UTC).timestamp()
MODIFIED = datetime.datetime(2026, 7, 1, 12, 0, tzinfo=datetime.UTC)
META = {"HTTPStatusCode": 200, "HTTPHeaders": {"date": DATE}}
URL = "s3://bucket/pre/fix?region=eu-west-1"
PLACE = {"Bucket": "bucket", "Key": "pre/fix/key"}


@contextlib.contextmanager
def stubbed(url: str = URL) -> Iterator[tuple[S3Store, Stubber]]:
    """A store with a real client whose replies, and expected requests, are scripted."""
    store = S3Store.from_url(url)
    with Stubber(store._s3()) as stub:
        yield store, stub
        stub.assert_no_pending_responses()
    store.close()


Call = Callable[[Store], object]


def get(store: Store) -> object:
    return store.get("key")


def look(store: Store) -> object:
    return store.get("key", stop=0)


def create(store: Store) -> object:
    return store.create("key", b"x")


def replace(store: Store) -> object:
    return store.replace("key", b"x", "etag")


def put(store: Store) -> None:
    store.put("key", b"x")


def list_(store: Store) -> object:
    return store.list("queue/")


def delete(store: Store) -> None:
    store.delete(["key"])


OPERATIONS: Mapping[Call, str] = {
    get: "get_object",
    look: "head_object",
    create: "put_object",
    replace: "put_object",
    put: "put_object",
    list_: "list_objects_v2",
    delete: "delete_objects",
}


# Requests and replies


@pytest.mark.usefixtures("aws_keys")
def test_a_create_is_conditional_on_absence() -> None:
    with stubbed() as (store, stub):
        stub.add_response(
            "put_object",
            {"ETag": '"abc"'},
            {**PLACE, "Body": b"x", "IfNoneMatch": "*"},
        )
        assert store.create("key", b"x") == "abc"


@pytest.mark.usefixtures("aws_keys")
def test_a_replace_is_conditional_on_the_unquoted_etag() -> None:
    with stubbed() as (store, stub):
        stub.add_response(
            "put_object",
            {"ETag": '"new"'},
            {**PLACE, "Body": b"x", "IfMatch": "old"},
        )
        assert store.replace("key", b"x", "old") == "new"


@pytest.mark.usefixtures("aws_keys")
def test_the_time_is_the_servers() -> None:
    with stubbed() as (store, stub):
        reply = {
            "Body": StreamingBody(BytesIO(b"12"), 2),
            "ContentLength": 2,
            "ContentRange": "bytes 1-2/30",
            "ETag": '"abc"',
            "LastModified": MODIFIED,
            "ResponseMetadata": META,
        }
        stub.add_response("get_object", reply, {**PLACE, "Range": "bytes=1-2"})
        got = store.get("key", start=1, stop=3)
    assert got is not None
    assert (got.data, got.size, got.version) == (b"12", 30, "abc")
    assert (got.modified, got.now) == (NOW - 5, NOW)


@pytest.mark.usefixtures("aws_keys")
def test_a_listing_is_one_request_and_its_keys_are_relative() -> None:
    with stubbed() as (store, stub):
        item = {
            "Key": "pre/fix/q/b/record",
            "Size": 7,
            "ETag": '"abc"',
            "LastModified": MODIFIED.replace(microsecond=900_000),
        }
        reply = {"Contents": [item], "IsTruncated": True, "ResponseMetadata": META}
        request = {
            "Bucket": "bucket",
            "Prefix": "pre/fix/q/",
            "StartAfter": "pre/fix/q/a",
            "MaxKeys": 50,
        }
        stub.add_response("list_objects_v2", reply, request)
        page = store.list("q/", after="q/a", limit=50)
    [entry] = page.entries
    assert (entry.key, entry.size, entry.version) == ("q/b/record", 7, "abc")
    assert (entry.modified, page.now, page.truncated) == (NOW - 5, NOW, True)


KMS_URL = "s3://bucket/pre/fix?region=eu-west-1&sse=aws:kms&kms_key_id=abc"
KMS = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "abc"}


@pytest.mark.usefixtures("aws_keys")
@pytest.mark.parametrize(("call", "condition"), [(put, {}), (create, {"IfNoneMatch": "*"})])
def test_each_write_asks_for_the_encryption(call: Call, condition: dict[str, str]) -> None:
    with stubbed(KMS_URL) as (store, stub):
        request = {**PLACE, "Body": b"x", **condition, **KMS}
        stub.add_response("put_object", {"ETag": '"abc"'}, request)
        call(store)
    with stubbed("s3://bucket/pre/fix?sse=AES256") as (store, stub):
        request = {**PLACE, "Body": b"x", **condition, "ServerSideEncryption": "AES256"}
        stub.add_response("put_object", {"ETag": '"abc"'}, request)
        call(store)


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers in parts of 8 bytes, one after the other."""
    monkeypatch.setattr("starburst_executor.aws.s3_transfer.PART", 8)
    monkeypatch.setattr("starburst_executor.aws.s3._SMALL", 4)
    monkeypatch.setattr("starburst_executor.aws.s3_transfer._WIDTH", 1)


def begin_upload(stub: Stubber, **encryption: str) -> None:
    stub.add_client_error("head_object", "404", "Not Found", 404, expected_params=PLACE)
    stub.add_response("create_multipart_upload", {"UploadId": "up"}, {**PLACE, **encryption})


def upload_parts(stub: Stubber) -> None:
    for number, body in enumerate((b"01234567", b"89"), 1):
        request = {**PLACE, "UploadId": "up", "PartNumber": number, "Body": body}
        stub.add_response("upload_part", {"ETag": f'"{number}"'}, request)


PARTS = {"Parts": [{"ETag": '"1"', "PartNumber": 1}, {"ETag": '"2"', "PartNumber": 2}]}


@pytest.mark.usefixtures("aws_keys", "tiny_parts")
def test_a_large_upload_goes_in_parts_and_asks_for_the_encryption() -> None:
    with stubbed(KMS_URL) as (store, stub):
        begin_upload(stub, **KMS)
        upload_parts(stub)
        request = {**PLACE, "UploadId": "up", "MultipartUpload": PARTS}
        stub.add_response("complete_multipart_upload", {}, request)
        store.upload("key", b"0123456789")


@pytest.mark.usefixtures("aws_keys", "tiny_parts")
def test_a_large_upload_is_given_up_when_a_part_fails() -> None:
    with stubbed() as (store, stub):
        begin_upload(stub)
        upload_parts(stub)
        stub.add_client_error("complete_multipart_upload", "InternalError", "", 500)
        stub.add_response("abort_multipart_upload", {}, {**PLACE, "UploadId": "up"})
        with pytest.raises(StoreUnavailable, match="CompleteMultipartUpload"):
            store.upload("key", b"0123456789")


@pytest.mark.usefixtures("aws_keys", "tiny_parts")
def test_an_upload_that_cannot_be_given_up_is_logged_and_the_first_error_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with stubbed() as (store, stub):
        begin_upload(stub)
        upload_parts(stub)
        stub.add_client_error("complete_multipart_upload", "InternalError", "", 500)
        stub.add_client_error("abort_multipart_upload", "AccessDenied", "", 403)
        with pytest.raises(StoreUnavailable):
            store.upload("key", b"0123456789")
    assert "upload up of s3://bucket/pre/fix/key" in caplog.text
    assert "s3:AbortMultipartUpload" in caplog.text


@pytest.mark.usefixtures("aws_keys", "tiny_parts")
def test_an_upload_whose_last_reply_was_lost_is_found_complete() -> None:
    with stubbed() as (store, stub):
        begin_upload(stub)
        upload_parts(stub)
        stub.add_client_error("complete_multipart_upload", "NoSuchUpload", "", 404)
        found = {
            "ContentLength": 10,
            "ETag": '"abc-2"',
            "LastModified": MODIFIED,
            "ResponseMetadata": META,
        }
        stub.add_response("head_object", found, PLACE)
        store.upload("key", b"0123456789")


@pytest.mark.parametrize("server_name", ["ministack", "seaweedfs"])
def test_a_failed_upload_leaves_no_parts_on_the_server(
    server_name: str,
    request: pytest.FixtureRequest,
    s3_env: Callable[..., None],
    tmp_path: Path,
) -> None:
    server: S3Server = request.getfixturevalue(server_name)
    s3_env(server)
    bucket = server.make_bucket()
    store = open_store(f"s3://{bucket}")
    source = tmp_path / "source"
    source.touch()
    os.truncate(source, 40 << 20)
    whole, sizes = os.fstat, []

    def shrinking(file: int) -> os.stat_result:
        sizes.append(file)
        status = whole(file)
        os.truncate(source, 20 << 20)
        return status

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("starburst_executor.aws.s3_transfer.os.fstat", shrinking)
        with pytest.raises(LocalDiskError, match="shrank"):
            store.upload("blob", source)
    client = server.client()
    assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    assert store.list("").entries == []
    client.close()
    store.close()


@pytest.mark.usefixtures("aws_keys")
def test_all_keys_are_tried_before_a_failed_delete_is_reported() -> None:
    with stubbed() as (store, stub):
        denied = {"Key": "pre/fix/0007", "Code": "AccessDenied", "Message": "no"}
        gone = {"Key": "pre/fix/0008", "Code": "NoSuchKey", "Message": "gone"}
        first = [{"Key": f"pre/fix/{number:04d}"} for number in range(1000)]
        failed = [gone, denied]
        done = [one for one in first if one["Key"] not in {f["Key"] for f in failed}]
        stub.add_response("delete_objects", {"Deleted": done, "Errors": failed})
        rest = [{"Key": f"pre/fix/{number:04d}"} for number in range(1000, 1100)]
        request = {"Bucket": "bucket", "Delete": {"Objects": rest}}
        stub.add_response("delete_objects", {"Deleted": rest}, request)
        with pytest.raises(StoreDenied, match=r"1 objects.*0007.*s3:DeleteObject"):
            store.delete(f"{number:04d}" for number in range(1100))


# Refusals


@pytest.mark.usefixtures("aws_keys")
@pytest.mark.parametrize(
    ("call", "code", "status", "kind", "message"),
    [
        (create, "PreconditionFailed", 412, Conflict, "If-None-Match"),
        (create, "ConditionalRequestConflict", 409, Conflict, "If-None-Match"),
        (replace, "PreconditionFailed", 412, Conflict, "If-Match"),
        (replace, "ConditionalRequestConflict", 409, Conflict, "If-Match"),
        (replace, "NoSuchKey", 404, ObjectNotFound, "pre/fix/key"),
        (put, "OperationAborted", 409, StoreUnavailable, "OperationAborted"),
        (get, "NoSuchKey", 404, ObjectNotFound, "s3://bucket/pre/fix/key"),
        (get, "404", 404, ObjectNotFound, "HTTP 404"),
        (get, "NoSuchBucket", 404, StoreMissing, "bucket bucket .* eu-west-1"),
        (list_, "NoSuchBucket", 404, StoreMissing, "bucket bucket"),
        (put, "NoSuchBucket", 404, StoreMissing, "bucket bucket"),
        (get, "AccessDenied", 403, StoreDenied, "s3:GetObject .* s3:ListBucket"),
        (get, "403", 403, StoreDenied, "403, not 404"),
        (put, "AccessDenied", 403, StoreDenied, r"s3:PutObject .*bucket/pre/fix/\*"),
        (replace, "AccessDenied", 403, StoreDenied, "s3:PutObject or s3:GetObject"),
        (list_, "AccessDenied", 403, StoreDenied, "s3:ListBucket .*on the bucket bucket"),
        (delete, "AccessDenied", 403, StoreDenied, "s3:DeleteObject"),
        (get, "SignatureDoesNotMatch", 403, StoreDenied, "credentials are wrong"),
        (get, "ExpiredToken", 400, StoreDenied, "have expired.*in region eu-west-1"),
        (look, "400", 400, StoreDenied, "have expired"),
        (put, "InternalError", 500, StoreUnavailable, "InternalError"),
        (get, "SlowDown", 503, StoreUnavailable, "SlowDown.*in region eu-west-1"),
        (put, "RequestTimeout", 400, StoreUnavailable, "RequestTimeout"),
        (put, "NotImplemented", 501, StoreError, "NotImplemented .*eu-west-1"),
        (put, "AuthorizationHeaderMalformed", 400, StoreError, "in region eu-west-1"),
    ],
)
def test_a_refusal_becomes_the_stores_own_error(
    call: Call, code: str, status: int, kind: type[StoreError], message: str
) -> None:
    with stubbed() as (store, stub):
        stub.add_client_error(OPERATIONS[call], code, "because", status)
        with pytest.raises(kind, match=message) as caught:
            call(store)
    assert type(caught.value) is kind


@pytest.mark.usefixtures("aws_keys")
def test_a_denied_write_with_kms_names_the_permissions_on_the_key() -> None:
    with stubbed(KMS_URL) as (store, stub):
        stub.add_client_error("put_object", "AccessDenied", "no", 403)
        with pytest.raises(StoreDenied, match="kms:GenerateDataKey"):
            store.put("key", b"x")


@pytest.mark.usefixtures("aws_keys")
def test_an_unchanged_object_is_no_error() -> None:
    with stubbed() as (store, stub):
        request = {**PLACE, "IfNoneMatch": "abc"}
        stub.add_client_error("get_object", "304", "", 304, expected_params=request)
        assert store.get("key", unless="abc") is None


@pytest.mark.parametrize("call", OPERATIONS)
def test_missing_credentials_say_where_they_are_looked_for(call: Call) -> None:
    store = open_store(URL)
    with pytest.raises(StoreDenied, match=r"AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
        call(store)
    store.close()


def test_a_missing_profile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreDenied, match="nobody"):
        open_store(URL).list("")


def test_a_missing_bucket_is_named(ministack: S3Server, s3_env: Callable[..., None]) -> None:
    s3_env(ministack)
    store = open_store("s3://no-such-bucket/prefix")
    for call in OPERATIONS.keys() - {look}:  # whose reply does not say what is missing
        with pytest.raises(StoreMissing, match="no-such-bucket"):
            call(store)
    store.close()


@pytest.mark.usefixtures("aws_keys")
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000"),
        ("AWS_ENDPOINT_URL_S3", "minio"),
        ("AWS_ENDPOINT_URL", "http://"),
        ("AWS_ENDPOINT_URL", "s3://bucket"),
        ("AWS_ENDPOINT_URL", "http://localhost:9000\n"),
        ("AWS_ACCESS_KEY_ID", "AKTEST\n"),
        ("AWS_SECRET_ACCESS_KEY", " secret"),
        ("AWS_SESSION_TOKEN", "token\r\n"),
        ("AWS_DEFAULT_REGION", "eu-west-1 "),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    for call in OPERATIONS:
        with pytest.raises(ConfigError, match=variable) as raised:
            call(open_store("s3://bucket/prefix"))
        assert "secret" not in str(raised.value)


@pytest.mark.usefixtures("aws_keys")
def test_a_region_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu west")
    with pytest.raises(ConfigError, match="eu west"):
        open_store("s3://bucket/prefix").list("")


@pytest.mark.usefixtures("aws_keys")
@pytest.mark.parametrize("bucket", ["My_Old.Bucket", "UPPER", "under_score", "a" * 255])
def test_the_names_of_old_buckets_are_the_servers_business(
    bucket: str, toy: Callable[[type[Toy]], Store]
) -> None:
    toy(Toy)
    store = open_store(f"s3://{bucket}/prefix")
    store.put("key", b"x")
    assert store.url == f"s3://{bucket}/prefix"
    store.close()


def test_a_wrong_secret_is_denied(
    seaweedfs: S3Server, s3_env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_env(seaweedfs)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = open_store(seaweedfs.fresh_url())
    with pytest.raises(StoreDenied, match="credentials are wrong"):
        store.put("key", b"x")
    store.close()


def test_credentials_that_are_renewed_are_used_by_a_store_that_was_denied(
    seaweedfs: S3Server,
    s3_env: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    s3_env(seaweedfs)
    monkeypatch.setattr("starburst_executor.aws.s3._RENEW_AFTER", 0)
    right = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in right:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = open_store(seaweedfs.fresh_url())
    for keys in ({}, {**right, "AWS_SECRET_ACCESS_KEY": "expired"}):
        lines = [f"{name.lower()} = {value}" for name, value in keys.items()]
        file.write_text("\n".join(["[default]", *lines]))
        with pytest.raises(StoreDenied):
            store.put("key", b"x")
    file.write_text(file.read_text().replace("expired", right["AWS_SECRET_ACCESS_KEY"]))
    store.put("key", b"x")
    store.close()


# The wire


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, aws_keys: None) -> Iterator[Callable[[type[Toy]], Store]]:
    """Starts a toy server and opens a store on it; botocore's waits take no time."""
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    with contextlib.ExitStack() as stack:

        def start(kind: type[Toy]) -> Store:
            endpoint = stack.enter_context(serving(kind))
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            store = open_store("s3://bucket/prefix?sse=AES256")
            stack.callback(store.close)
            return store

        yield start


def test_a_server_that_grants_everything_is_refused(
    toy: Callable[[type[Toy]], Store],
) -> None:
    store = toy(Toy)
    with pytest.raises(StoreNotConditional, match=r"s3://bucket/prefix.*If-None-Match"):
        probe_conditional(store, "sessions/", SystemRuntime().new_id)
    methods = [method for method, _ in Toy.seen]
    assert methods == ["PUT", "PUT", "POST"]


class WithoutEtag(Toy):
    def reply(self, status: int, data: bytes = b"", promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_a_server_without_etags_is_refused(toy: Callable[[type[Toy]], Store]) -> None:
    store = toy(WithoutEtag)
    with pytest.raises(StoreNotConditional, match="without an ETag"):
        probe_conditional(store, "sessions/", SystemRuntime().new_id)


def test_small_writes_go_out_in_one_piece(toy: Callable[[type[Toy]], Store]) -> None:
    store = toy(Toy)
    store.replace("key", b"x", "etag")
    [(_, headers)] = Toy.seen
    assert "Expect" not in headers
    assert "starburst_executor/" in headers["User-Agent"]
    assert headers["If-Match"] == "etag"
    assert headers["x-amz-server-side-encryption"] == "AES256"
    assert not [name for name in headers if "checksum" in name.lower()]


class WantsMd5(Toy):
    """Refuses deletions without the checksum that boto3 used to send."""

    def answer(self, body: bytes) -> None:
        digest = base64.b64encode(hashlib.md5(body).digest()).decode()
        if self.headers.get("Content-MD5") == digest:
            self.reply(
                200, b"<DeleteResult><Deleted><Key>prefix/key</Key></Deleted></DeleteResult>"
            )
        else:
            self.reply(400, b"<Error><Code>InvalidRequest</Code><Message/></Error>")


def test_deletions_have_the_checksum_that_all_servers_know(
    toy: Callable[[type[Toy]], Store],
) -> None:
    toy(WantsMd5).delete(["key"])
    [(_, headers)] = WantsMd5.seen
    assert not [name for name in headers if name.lower().startswith("x-amz-checksum")]


class Failing(Toy):
    def answer(self, body: bytes) -> None:
        self.reply(503)


def test_a_failing_server_is_asked_four_times(
    toy: Callable[[type[Toy]], Store],
) -> None:
    store = toy(Failing)
    with pytest.raises(StoreUnavailable, match="503"):
        store.put("key", b"x")
    assert len(Failing.seen) == 4


class LosesReplies(Toy):
    """Honours `If-None-Match`, but answers 500 to the write that it applied."""

    def answer(self, body: bytes) -> None:
        if self.command == "PUT" and self.path in self.objects:
            self.reply(412)
        elif self.command == "PUT":
            self.objects[self.path] = body
            self.reply(500)
        else:
            self.reply(200, self.objects[self.path])


def test_a_create_whose_reply_was_lost_conflicts_with_itself(
    toy: Callable[[type[Toy]], Store],
) -> None:
    store = toy(LosesReplies)
    with pytest.raises(Conflict):
        store.create("key", b"mine")
    assert list(LosesReplies.objects.values()) == [b"mine"]


class BreaksOff(Toy):
    """Ends two of three replies in the middle."""

    def answer(self, body: bytes) -> None:
        if len(self.seen) % 3:
            self.reply(200, b"half", promised=8)
            self.close_connection = True
        else:
            self.reply(200, b"complete")


def test_a_reply_that_breaks_off_is_asked_for_again(
    toy: Callable[[type[Toy]], Store],
) -> None:
    store = toy(BreaksOff)
    got = store.get("key")
    assert got is not None
    assert got.data == b"complete"
    assert len(BreaksOff.seen) == 3


class WithoutDate(Toy):
    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Date":
            super().send_header(keyword, value)


def test_a_server_without_a_clock_is_refused(
    toy: Callable[[type[Toy]], Store],
) -> None:
    store = toy(WithoutDate)
    with pytest.raises(StoreError, match="Date header"):
        store.get("key")


class AlwaysBreaksOff(Toy):
    def answer(self, body: bytes) -> None:
        self.reply(200, b"half", promised=8)
        self.close_connection = True


def test_a_reply_that_always_breaks_off_is_no_answer(
    toy: Callable[[type[Toy]], Store],
) -> None:
    store = toy(AlwaysBreaksOff)
    with pytest.raises(StoreUnavailable, match="GetObject"):
        store.get("key")
    assert len(AlwaysBreaksOff.seen) == 3


def test_a_server_that_is_not_there_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, aws_keys: None
) -> None:
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = open_store(URL)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        store.put("key", b"x")
    store.close()


@pytest.mark.parametrize("server_name", ["ministack", "seaweedfs"])
def test_each_operation_is_one_request_on_one_connection(
    server_name: str, request: pytest.FixtureRequest, s3_env: Callable[..., None]
) -> None:
    server: S3Server = request.getfixturevalue(server_name)
    with latency_proxy(server, 1) as proxy:
        s3_env(server, proxy.endpoint)
        store = open_store(server.fresh_url())
        version = store.create("q/key", b"x")
        store.replace("q/key", b"y", version)
        store.get("q/key")
        store.upload("q/small", b"content")
        store.list("q/")
        store.delete(["q/key", "q/small"])
        assert proxy.counts() == {
            "requests": 6,
            "PUT": 3,
            "GET": 1,
            "LIST": 1,
            "DELETE": 1,
            "connections": 1,
        }
        probe_conditional(store, "q/", SystemRuntime().new_id)
        assert proxy.counts()["requests"] == 7
        store.close()


def test_threads_share_one_store(ministack: S3Server, s3_env: Callable[..., None]) -> None:
    s3_env(ministack)
    store = open_store(ministack.fresh_url())
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait(60)  # the client is made by one of them
        store.create(f"q/{number}", b"x")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list("q/").entries) == 8
    store.close()


# --- whose bucket --------------------------------------------------------------------


def every_operation(store: S3Store, file: Path) -> None:
    version = store.create("a", b"x")
    store.replace("a", b"y", version)
    store.put("b", b"z")
    store.get("a")
    store.get("a", start=1)  # a look at its size alone
    store.list("")
    store.upload("large", bytes(2 * s3_transfer.PART))
    store.download("large", file)
    store.delete(["a", "b", "large"])


@pytest.mark.parametrize("owner", ["000000000000", None])
def test_every_request_says_whose_the_bucket_must_be(
    owner: str | None, ministack: S3Server, s3_env: Callable[..., None], tmp_path: Path
) -> None:
    s3_env(ministack)
    url = ministack.fresh_url()
    store = S3Store.from_url(f"{url}?owner={owner}" if owner else url)
    said: set[tuple[str, str]] = set()

    def note(event_name: str, request: Any, **_: Any) -> None:
        value = request.headers.get("x-amz-expected-bucket-owner", b"")
        said.add((event_name.rpartition(".")[2], value.decode() or "nobody's"))

    store._s3().meta.events.register("before-send.s3", note)
    every_operation(store, tmp_path / "file")
    store.close()
    operations = {operation for operation, _ in said}
    assert {"PutObject", "GetObject", "HeadObject", "ListObjectsV2", "DeleteObjects"} < operations
    assert {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"} < operations
    assert {value for _, value in said} == {owner or "nobody's"}


def test_the_owner_is_part_of_the_stores_url() -> None:
    url = "s3://bucket/p?region=eu-west-1&owner=123456789012"
    assert S3Store.from_url(url).url == url
    with pytest.raises(ValueError, match="owner=me is not the id of an AWS account"):
        S3Store.from_url("s3://bucket/p?owner=me")
