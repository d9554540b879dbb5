"""The tasks of a session on ECS, as one launcher knows them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING

from starburst_executor.aws.ecs.diagnosis import Diagnosis, Retryability, Stop

if TYPE_CHECKING:
    from mypy_boto3_ecs.type_defs import TaskTypeDef

__all__ = [
    "OVER",
    "SLOW_START",
    "THERE",
    "Phase",
    "SessionTasks",
    "Task",
    "Waiting",
    "names_of",
    "phase_of",
    "workers_of",
]


class Phase(Enum):
    """How far a task is."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"  # told to; its process may still hand back
    ENDED = "ended"
    UNBORN = "unborn"  # stopped before its process was started


THERE = (Phase.STARTING, Phase.RUNNING)
OVER = (Phase.ENDED, Phase.UNBORN)

SLOW_START = 300.0  # seconds: Fargate takes 20 to 60, an instance one to three minutes
_TRY_AGAIN = (5.0, 60.0)  # first and last pause after a launch that fell short
_DOUBTS = 3  # launches in a row of which nothing began, each perhaps by accident
_ASK_SHORTAGE = 60.0  # seconds without an instance after which its group is asked why


@dataclass(slots=True, kw_only=True)
class Task:
    """A task of a session, as of the last look."""

    arn: str
    since: float  # monotonic: first heard of
    launch: int = 0  # which launch of this object; 0: of somebody else
    phase: Phase = Phase.STARTING
    stop: Stop | None = None
    slow: bool = False  # that it takes long was said
    use_spot: bool = False

    @property
    def worker(self) -> str:
        """The id of the worker that it runs."""
        return f"w-{self.id}"

    @property
    def id(self) -> str:
        """The last part of its ARN."""
        return self.arn.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A task that ECS has found no instance for."""

    task: Task
    created: datetime  # on ECS's clock
    seconds: float

    @classmethod
    def among(
        cls, tasks: Iterable[Task], told: Mapping[str, TaskTypeDef], now: float
    ) -> list[Waiting]:
        """Those of the tasks that wait for as long as is worth asking why."""
        return [
            cls(task=task, created=said["createdAt"], seconds=now - task.since)
            for task in tasks
            if (said := told.get(task.arn))
            and said.get("lastStatus") == "PROVISIONING"
            and task.phase is Phase.STARTING
            and now - task.since >= _ASK_SHORTAGE
            and "createdAt" in said
        ]


@dataclass(slots=True, kw_only=True)
class SessionTasks:
    """The tasks of one session."""

    url: str
    session_id: str
    tasks: dict[str, Task] = field(default_factory=dict)
    looked_at: float | None = None
    known: bool = False  # whether the last look was answered
    launches: int = 0
    hopeless: str = ""  # why those last started were not, and no other would be
    doubts: dict[int, str] = field(default_factory=dict)  # launch -> why none began
    not_before: float = 0.0
    pause: float = 0.0
    on_demand_until: float = 0.0  # Spot has no capacity
    shortage: str = ""  # why no instance comes; was said
    ask_shortage_at: float = 0.0

    def having(self, *phases: Phase) -> list[Task]:
        """The tasks in one of these phases."""
        return [task for task in self.tasks.values() if task.phase in phases]

    def take(self, arn: str, now: float, launch: int = 0) -> Task:
        """The task of that ARN, which may be new."""
        return self.tasks.setdefault(arn, Task(arn=arn, since=now, launch=launch))

    def unsure(self, listed: Collection[str]) -> list[Task]:
        """The tasks that only DescribeTasks can tell about: those starting, and those no longer listed."""
        return [
            task
            for task in self.tasks.values()
            if task.phase not in OVER and (task.phase is Phase.STARTING or task.arn not in listed)
        ]

    def note(self, diagnosis: Diagnosis, launch: int) -> None:
        """Count a launch of which nothing began, where that may have been an accident."""
        if diagnosis.retryability is Retryability.DOUBTFUL:
            self.doubts[launch] = diagnosis.text

    def is_hopeless(self, diagnosis: Diagnosis) -> bool:
        """Whether nothing will start unless something is mended."""
        return diagnosis.retryability is Retryability.NEVER or len(self.doubts) >= _DOUBTS

    def hold_off(self, now: float) -> float:
        """Launch nothing for a while; returns the seconds."""
        first, last = _TRY_AGAIN
        self.pause = min(last, max(first, 2 * self.pause))
        self.not_before = now + self.pause
        return self.pause

    def forget_troubles(self) -> None:
        """A task runs: what kept others from starting is over."""
        self.hopeless = self.shortage = ""
        self.doubts.clear()


def phase_of(task: TaskTypeDef) -> Phase:
    """How far a task is, as DescribeTasks tells of it."""
    status = task.get("lastStatus", "")
    # In DEPROVISIONING only the network is still taken down: no process of it is left.
    if status in ("STOPPED", "DEPROVISIONING"):
        return Phase.ENDED if "startedAt" in task else Phase.UNBORN
    if task.get("desiredStatus") == "STOPPED":
        return Phase.STOPPING
    return Phase.RUNNING if status == "RUNNING" else Phase.STARTING


def workers_of(tasks: Iterable[Task]) -> set[str]:
    """Ids of their workers."""
    return {task.worker for task in tasks}


def names_of(tasks: Sequence[Task]) -> str:
    """Their workers, for people; the first three of many."""
    first = ", ".join(task.worker for task in tasks[:3])
    more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
    return f"worker{'s' if len(tasks) > 1 else ''} {first}{more}"
