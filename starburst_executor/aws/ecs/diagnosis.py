"""Diagnoses why ECS starts no task, or why a task has stopped.

Texts are looked up in one table of known errors; unknown ones are retried a few times and then
taken at their word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
)

from starburst_executor.aws.ecs.known_errors import Retryability, find_known

if TYPE_CHECKING:
    from mypy_boto3_ecs.type_defs import TaskTypeDef

__all__ = [
    "Diagnosis",
    "NotYet",
    "Retryability",
    "Stop",
    "is_passing",
    "judge_error",
    "judge_failure",
    "judge_shortage",
    "judge_start",
]


class NotYet(Exception):
    """The requested change is in progress, and takes AWS some more seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why no task was started.

    Attributes:
        retryability: Whether to try again.
        text: ECS's message, and what to do about it.
    """

    retryability: Retryability
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why a task stopped.

    Attributes:
        code: ECS's stop code, such as "SpotInterruption".
        reason: ECS's reasons, including the container's own.
        exit_code: Exit code of the worker's process; None if ECS has none.
        began: Whether the worker's process ever started.
    """

    code: str
    reason: str
    exit_code: int | None
    began: bool

    @classmethod
    def of(cls, task: TaskTypeDef) -> Stop:
        """The stop of a task, as reported by DescribeTasks."""
        containers = task.get("containers", [])
        reasons = [
            task.get("stoppedReason", ""),
            *(c.get("reason", "") for c in containers),
        ]
        codes = [c["exitCode"] for c in containers if c.get("exitCode") is not None]
        return cls(
            code=task.get("stopCode", ""),
            reason="; ".join(dict.fromkeys(text for text in reasons if text)),
            exit_code=codes[0] if codes else None,
            began="startedAt" in task,
        )

    @property
    def expected(self) -> bool:
        """Whether it left by itself, or was stopped by a user."""
        by_user = self.code == "UserInitiated"
        return by_user or (self.code == "EssentialContainerExited" and not self.exit_code)

    def __str__(self) -> str:
        parts = [self.code or "stopped", self.reason]
        if self.exit_code is not None:
            parts.append(f"exit code {_exit(self.exit_code)}")
        text = ": ".join(part for part in parts[:2] if part)
        advice = next((a for p, a in _ENDS if p.search(f"{text} {parts[-1]}")), "")
        return "; ".join(part for part in (text, *parts[2:], advice) if part)


_ENDS = (
    (re.compile("OutOfMemory"), "out of memory: raise memory=, or lower slots="),
    (
        re.compile(r"\b137\b"),
        (
            "killed: probably out of memory (raise memory=, or lower slots=), or it took too long "
            "to stop"
        ),
    ),
    (
        re.compile("SpotInterruption|TerminationNotice"),
        "its tasks were handed back and run elsewhere",
    ),
)


def is_passing(error: BaseException) -> bool:
    """Whether to retry after this error, some seconds later."""
    if not isinstance(error, ClientError):
        return isinstance(error, ConnectionError | HTTPClientError | NotYet)
    known = find_known(_text(error))
    return known.soon if known else _status(error) >= 500


def judge_error(error: ClientError | BotoCoreError | NotYet) -> Diagnosis:
    """What an error means for starting workers."""
    if not isinstance(error, ClientError):
        retryability = Retryability.LATER if is_passing(error) else Retryability.NEVER
        return Diagnosis(retryability=retryability, text=str(error))
    # A server's own failure passes; otherwise the request itself was rejected.
    otherwise = Retryability.LATER if _status(error) >= 500 else Retryability.NEVER
    return _look_up(_text(error), otherwise)


def judge_failure(reason: str, detail: str) -> Diagnosis:
    """What a failure in a RunTask reply means; such replies have HTTP status 200."""
    text = f"RunTask: {reason}" + (f" ({detail})" if detail else "")
    return _look_up(text, Retryability.DOUBTFUL)


def judge_start(stop: Stop) -> Diagnosis:
    """What it means that a task stopped before its process started."""
    return _look_up(str(stop), Retryability.DOUBTFUL)


def judge_shortage(text: str) -> Diagnosis:
    """What it means that a group of instances cannot grow."""
    return _look_up(text, Retryability.FULL)


def _look_up(text: str, otherwise: Retryability) -> Diagnosis:
    known = find_known(text)
    retryability, advice = (known.retryability, known.advice) if known else (otherwise, "")
    return Diagnosis(retryability=retryability, text=f"{text.rstrip('. ')}. {advice}".rstrip())


def _text(error: ClientError) -> str:
    code = error.response["Error"].get("Code", "")
    message = error.response["Error"].get("Message", "") or code
    return f"{error.operation_name}: {code}: {message}"


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _exit(code: int) -> str:
    return f"{code} (killed by signal {code - 128})" if 128 < code < 160 else str(code)
