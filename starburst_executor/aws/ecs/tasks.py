"""The ECS tasks of a session, as one launcher knows them."""

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
    """The phase of a task."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"  # stop requested; its process may still hand back
    ENDED = "ended"
    UNBORN = "unborn"  # stopped before its process started


THERE = (Phase.STARTING, Phase.RUNNING)
OVER = (Phase.ENDED, Phase.UNBORN)

SLOW_START = 300.0  # seconds: Fargate takes 20 to 60, an instance one to three minutes
_TRY_AGAIN = (5.0, 60.0)  # first and longest pause after an incomplete launch
_DOUBTS = 3  # consecutive launches from which nothing started, each possibly by accident
_ASK_SHORTAGE = 60.0  # seconds without an instance before its group is queried for the reason


@dataclass(slots=True, kw_only=True)
class Task:
    """A task of a session, as of the last look."""

    arn: str
    since: float  # monotonic: when first seen
    launch: int = 0  # number of this launcher's launch; 0: somebody else's
    phase: Phase = Phase.STARTING
    stop: Stop | None = None
    slow: bool = False  # its slow start was logged
    use_spot: bool = False

    @property
    def worker(self) -> str:
        """The id of its worker."""
        return f"w-{self.id}"

    @property
    def id(self) -> str:
        """The last part of its ARN."""
        return self.arn.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A task for which ECS has found no instance."""

    task: Task
    created: datetime  # on ECS's clock
    seconds: float

    @classmethod
    def among(
        cls, tasks: Iterable[Task], described: Mapping[str, TaskTypeDef], now: float
    ) -> list[Waiting]:
        """The tasks that have waited long enough to query the reason."""
        return [
            cls(task=task, created=about["createdAt"], seconds=now - task.since)
            for task in tasks
            if (about := described.get(task.arn))
            and about.get("lastStatus") == "PROVISIONING"
            and task.phase is Phase.STARTING
            and now - task.since >= _ASK_SHORTAGE
            and "createdAt" in about
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
    hopeless: str = ""  # why the last launch failed, and any other would
    doubts: dict[int, str] = field(default_factory=dict)  # launch -> why nothing started
    not_before: float = 0.0
    pause: float = 0.0
    on_demand_until: float = 0.0  # Spot has no capacity
    fell_short: str = ""  # why the last launch started fewer than asked
    shortage: str = ""  # why no instance comes; logged already
    ask_shortage_at: float = 0.0

    def having(self, *phases: Phase) -> list[Task]:
        """The tasks in one of these phases."""
        return [task for task in self.tasks.values() if task.phase in phases]

    def take(self, arn: str, now: float, launch: int = 0) -> Task:
        """The task with that ARN, added if new."""
        return self.tasks.setdefault(arn, Task(arn=arn, since=now, launch=launch))

    def unsure(self, listed: Collection[str]) -> list[Task]:
        """The tasks that need DescribeTasks: those starting, and those no longer listed."""
        return [
            task
            for task in self.tasks.values()
            if task.phase not in OVER and (task.phase is Phase.STARTING or task.arn not in listed)
        ]

    def note(self, diagnosis: Diagnosis, launch: int) -> None:
        """Count a launch from which nothing started, if that may have been an accident."""
        if diagnosis.retryability is Retryability.DOUBTFUL:
            self.doubts[launch] = diagnosis.text

    def is_hopeless(self, diagnosis: Diagnosis) -> bool:
        """Whether nothing will start until something is fixed."""
        return diagnosis.retryability is Retryability.NEVER or len(self.doubts) >= _DOUBTS

    def hold_off(self, now: float) -> float:
        """Launch nothing for a while; return the seconds."""
        first, last = _TRY_AGAIN
        self.pause = min(last, max(first, 2 * self.pause))
        self.not_before = now + self.pause
        return self.pause

    def forget_troubles(self) -> None:
        """Clear recorded failures, because a task runs."""
        self.hopeless = self.shortage = ""
        self.doubts.clear()


def phase_of(task: TaskTypeDef) -> Phase:
    """The phase of a task, as reported by DescribeTasks."""
    status = task.get("lastStatus", "")
    # DEPROVISIONING only takes down the network: no process is left.
    if status in ("STOPPED", "DEPROVISIONING"):
        return Phase.ENDED if "startedAt" in task else Phase.UNBORN
    if task.get("desiredStatus") == "STOPPED":
        return Phase.STOPPING
    return Phase.RUNNING if status == "RUNNING" else Phase.STARTING


def workers_of(tasks: Iterable[Task]) -> set[str]:
    """Ids of the tasks' workers."""
    return {task.worker for task in tasks}


def names_of(tasks: Sequence[Task]) -> str:
    """The tasks' workers, for messages; at most three by name."""
    first = ", ".join(task.worker for task in tasks[:3])
    more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
    return f"worker{'s' if len(tasks) > 1 else ''} {first}{more}"
