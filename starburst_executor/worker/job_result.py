"""What became of a job, whether its child told of it or died."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starburst_executor.protocol.outcome import Failure, Outcome, encode_outcome
from starburst_executor.worker.child_handle import Job
from starburst_executor.worker.ipc import Kind, Reply, delete_files

__all__ = ["JobResult", "death_failure", "last_lines", "result_of_failure", "result_of_reply"]

STDERR_TAIL = 4096  # bytes of stderr shown in the message of a crash


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What became of a job.

    The files of `blobs` belong to whoever took this, to be uploaded and then deleted.
    """

    key: Hashable
    began: float  # UTC seconds by this machine's clock
    ended: float
    outcome: bytes  # of `encode_outcome`
    ok: bool  # it returned a value
    kind: Kind
    blobs: tuple[tuple[str, Path, int], ...]  # digest, file, bytes
    stdout: bytes  # the last 1 MiB of it
    stderr: bytes

    def delete_blobs(self) -> None:
        """Delete the files of a result that nobody wants."""
        delete_files(file for _, file, _ in self.blobs)


def result_of_reply(job: Job, reply: Reply, now: float) -> JobResult:
    """The result of a job that its child has reported."""
    return JobResult(
        key=job.key,
        began=now - reply.seconds,
        ended=now,
        outcome=reply.outcome,
        ok=reply.kind == "returned",
        kind=reply.kind,
        blobs=tuple((digest, Path(file), size) for digest, file, size in reply.blobs),
        stdout=reply.stdout,
        stderr=reply.stderr,
    )


def result_of_failure(
    job: Job, failure: Failure, seconds: float, now: float, output: tuple[bytes, bytes]
) -> JobResult:
    """The result of a job that failed without its child reporting it.

    Args:
        job: The job.
        failure: What happened.
        seconds: For how long it ran.
        now: UTC seconds.
        output: The last that it wrote to stdout and stderr.
    """
    kind = failure.kind
    assert kind in ("crashed", "timeout", "initializer")
    return JobResult(
        key=job.key,
        began=now - seconds,
        ended=now,
        outcome=encode_outcome(Outcome(failure=failure)),
        ok=False,
        kind=kind,
        blobs=(),
        stdout=output[0],
        stderr=output[1],
    )


def death_failure(
    kind: Literal["timeout", "initializer", "crashed"],
    job: Job,
    seconds: float,
    code: int,
    stderr: bytes,
    fate: str,
) -> Failure:
    """The failure of a job whose child died.

    Args:
        kind: What it died of.
        job: The job that it was running.
        seconds: For how long.
        code: The return code of the process, as `Popen` has it.
        stderr: The last that it printed there.
        fate: What became of a process that let go of us and lives; "" if it is dead.
    """
    text = last_lines(stderr)
    if fate:
        return Failure(kind=kind, message=fate, stderr=text)
    if kind == "timeout":
        message = (
            f"it ran for {seconds:.3g} s, over its limit of {job.timeout:g} s,"
            " and was killed with the processes that it had started"
        )
        return Failure(kind=kind, message=message, stderr=text)
    return Failure(
        kind=kind,
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        stderr=text,
    )


def last_lines(stderr: bytes) -> str:
    """The end of what a child printed, as text."""
    return stderr[-STDERR_TAIL:].decode(errors="replace")
