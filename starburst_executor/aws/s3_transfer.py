"""Transfers of large objects: in parallel parts, all or nothing."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starburst_executor.aws.s3_errors import S3Errors
from starburst_executor.errors import LocalDiskError, ObjectNotFound, StoreError
from starburst_executor.storage.base import Bytes, local_disk
from starburst_executor.storage.directory import read_range

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

__all__ = ["PART", "MultipartUpload", "reading", "transfer_threads"]

log = logging.getLogger(__name__)

PART = 16 << 20  # bytes; a transfer holds _WIDTH parts in memory

_WIDTH = 4  # parallel parts: one connection to S3 carries some 80 MB/s
_MOST_PARTS = 10_000  # S3's limit for one object

Read = Callable[[int, int], bytes]


class MultipartUpload:
    """The upload of one object in parts.

    Args:
        client: boto3's S3 client.
        place: `Bucket` and `Key`.
        encryption: Encryption parameters of each request.
        errors: Translates S3's errors.
        key: The object's key without the store's prefix, for messages.
        exists: Tells whether the object exists.
    """

    def __init__(
        self,
        client: S3Client,
        place: Mapping[str, str],
        encryption: Mapping[str, Any],
        errors: S3Errors,
        key: str,
        exists: Callable[[str], bool],
    ) -> None:
        self._client = client
        self._place: dict[str, Any] = dict(place)
        self._encryption = encryption
        self._errors = errors
        self._key = key
        self._exists = exists

    def send(self, size: int, read: Read) -> None:
        """Upload all of it; on any error abort, so that leftover parts cost nothing."""
        part = max(PART, -(-size // _MOST_PARTS))
        upload_id = self._begin()
        try:
            with transfer_threads("upload") as pool:
                done = pool.map(
                    lambda start: self._send_part(
                        upload_id, start // part + 1, read(start, start + part)
                    ),
                    range(0, size, part),
                )
                parts = [*done]
            self._complete(upload_id, parts)
        except BaseException:
            self._abort(upload_id)
            raise

    def _begin(self) -> str:
        with self._errors.translating("CreateMultipartUpload", self._key):
            reply = self._client.create_multipart_upload(**self._place, **self._encryption)
        return reply["UploadId"]

    def _send_part(self, upload_id: str, number: int, data: bytes) -> CompletedPartTypeDef:
        with self._errors.translating("UploadPart", self._key):
            reply = self._client.upload_part(
                **self._place, UploadId=upload_id, PartNumber=number, Body=data
            )
        return {"ETag": reply["ETag"], "PartNumber": number}

    def _complete(self, upload_id: str, parts: Sequence[CompletedPartTypeDef]) -> None:
        try:
            with self._errors.translating("CompleteMultipartUpload", self._key):
                self._client.complete_multipart_upload(
                    **self._place, UploadId=upload_id, MultipartUpload={"Parts": parts}
                )
        except ObjectNotFound:
            # No such upload: an earlier try may have completed it, and its reply was lost.
            if not self._exists(self._key):
                raise

    def _abort(self, upload_id: str) -> None:
        try:
            with self._errors.translating("AbortMultipartUpload", self._key):
                self._client.abort_multipart_upload(**self._place, UploadId=upload_id)
        except StoreError as error:
            # The error that led here matters more.
            log.warning(
                "upload %s of %s failed and could not be aborted; its parts cost money until it "
                "is: %s",
                upload_id,
                self._errors.name(self._key),
                error,
            )


def transfer_threads(what: str) -> ThreadPoolExecutor:
    """Create the threads of one transfer."""
    return ThreadPoolExecutor(_WIDTH, f"starburst-{what}")


@contextlib.contextmanager
def reading(source: Path | Bytes) -> Iterator[tuple[int, Read]]:
    """A source's size, and a function that reads a range of it."""
    if isinstance(source, Path):
        with local_disk(source):
            opened = source.open("rb")
        with opened as file:
            number = file.fileno()
            size = os.fstat(number).st_size
            yield (
                size,
                lambda start, end: _read_part(source, number, start, min(end, size)),
            )
    else:
        view = memoryview(source).cast("B")
        yield len(view), lambda start, end: bytes(view[start:end])


def _read_part(source: Path, file: int, start: int, end: int) -> bytes:
    with local_disk(source):
        data = read_range(file, start, end)
    if len(data) < end - start:
        raise LocalDiskError(f"{source} shrank during the upload")
    return data
