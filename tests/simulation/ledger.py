"""The store of the simulator: it refuses to let a rule of the protocol be broken.

Every write is checked against what was there before and against who made it, at the moment it
takes effect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from starburst_executor.protocol import codec, tasks_object
from starburst_executor.protocol.keys import Batch, task_id
from starburst_executor.protocol.listing import QueueReader
from starburst_executor.protocol.manifest import Intervals, Limits, Manifest, SessionState
from starburst_executor.protocol.outcome import decode_outcome
from starburst_executor.protocol.records import Piece, Record, State, Task
from starburst_executor.storage.base import Bytes
from tests.simulation.kernel import SimRuntime, Simulation
from tests.support.fakes import MemoryStore

__all__ = ["SESSION_ID", "BrokenRule", "Ledger"]

SESSION_ID = "20250615-150640-simula"

_KEY = re.compile(
    r"session\.json|launching|(functions|modules|blobs)/\w+|(workers|ended)/[\w-]+"
    r"|(results|logs)/\d{4}-\d{8}\.\d+/[\w.]+"
    r"|queue/\d{4}-\d{8}\.\d+/(tasks|record|drained\.\d+|requeued\.\d+|done\.\d+\.\d+\.\d+)"
)


class BrokenRule(AssertionError):
    """A write, or the state of things at the end, that must not be."""


class Ledger(MemoryStore):
    """A store in memory that refuses to let a rule of the protocol be broken.

    Args:
        sim: The world.
        checked: Whether to check writes; costs time.
    """

    def __init__(self, sim: Simulation, *, checked: bool = True) -> None:
        super().__init__(SimRuntime(sim, "the store's clock"))
        self.prefix = f"sessions/{SESSION_ID}/"
        self.queues: Callable[[], Iterable[tuple[str, QueueReader]]] = lambda: ()
        self._checked = checked
        self._sim = sim
        self.max_attempts = Limits().max_attempts
        self.half_lease = Intervals().lease / 2
        # Set by the world: whose write takes effect, and which workers' processes are alive.
        self.writer: Callable[[], str] = lambda: ""
        self.workers: Callable[[], Mapping[str, bool]] = dict
        self._heard: dict[str, float] = {}  # worker -> when its last heartbeat was stored
        self._begun: set[tuple[Batch, int, int]] = set()  # attempts that began to run
        self.ended: set[tuple[Batch, int, int]] = set()  # of these: those that ran to their end
        # What each worker holds according to the records, and the attempt of a last chance.
        self._holding: dict[str, dict[tuple[Batch, int], int]] = {}
        self._silence: dict[str, float] = {}  # worker -> its longest silence between two of them
        self.terminated_at: float | None = None  # virtual

    def keys(self, below: str = "") -> list[str]:
        """Names of the session's objects, in order."""
        whole = self.prefix + below
        return [k[len(self.prefix) :] for k in self._keys if k.startswith(whole)]

    def record(self, batch: Batch) -> Record | None:
        """The record as it is stored, without a request."""
        data = self._data.get(self.prefix + batch.record_key)
        return None if data is None else codec.decode(data, Record, batch.record_key)

    def batches(self) -> list[Batch]:
        """What is stored, in order."""
        names = [key.split("/")[1] for key in self.keys("queue/") if key.endswith("/tasks")]
        return sorted(cast(Batch, Batch.parse(name)) for name in names)

    def state(self, batch: Batch) -> Record:
        """The record; a fresh one from the header where nobody wrote one."""
        found = self.record(batch)
        if found is not None:
            return found
        head = tasks_object.read_header(self._data[self.prefix + batch.tasks_key], batch.tasks_key)
        assert not isinstance(head, int)
        return head[0].fresh_record()

    def markers(self, batch: Batch) -> set[str]:
        """Names of the markers of a batch."""
        names = {key.rsplit("/", 1)[1] for key in self.keys(f"queue/{batch}/")}
        return names - {"tasks", "record"}

    def manifest(self) -> Manifest:
        """The manifest, without a request."""
        return codec.decode(self._data[self.prefix + "session.json"], Manifest, "session.json")

    def _write(self, key: str, data: Bytes) -> str:
        deleted = self.terminated_at is not None  # what lands late lands among nothing
        if self._checked and not deleted and key.startswith(self.prefix + "queue/"):
            self._check(key[len(self.prefix) :], bytes(data))
        if key.startswith(self.prefix + "workers/"):
            self._note_heartbeat(key.rsplit("/", 1)[1])
        if key == self.prefix + "session.json" and self.terminated_at is None:
            manifest = codec.decode(bytes(data), Manifest, key)
            if manifest.state is SessionState.TERMINATED:
                self.terminated_at = self._sim.now
        return super()._write(key, data)

    def _check(self, name: str, data: bytes) -> None:
        _, folder, last = name.split("/")
        batch = Batch.parse(folder)
        assert batch is not None
        if last == "tasks":
            self._check_cursors(batch)
            self._check_new_batch(batch, data)
        elif last == "record":
            self._check_record(batch, codec.decode(data, Record, name))
        else:
            self._check_marker(batch, last, self.record(batch))

    def _check_cursors(self, batch: Batch) -> None:
        for who, queue in self.queues():
            progress = queue._lanes.get(batch.lane)
            if progress and progress.end_of_run(batch.number) > batch.number:
                raise BrokenRule(f"{batch} appears behind the cursor of {who}")

    def _check_new_batch(self, batch: Batch, data: bytes) -> None:
        """Whether what it names is there, and none of its numbers was given out before."""
        head = tasks_object.read_header(data, batch.tasks_key)
        assert not isinstance(head, int)
        missing = [digest for digest in head[0].functions if not self.keys(f"functions/{digest}")]
        if missing:
            raise BrokenRule(f"{batch} names {missing}, which is not there")
        for other in self.batches():
            if other.lane == batch.lane and other.number < batch.end and batch.number < other.end:
                raise BrokenRule(f"{batch} has numbers of {other}")

    def check_execution(self, key: tuple[Batch, int, int], worker: str) -> None:
        """Whether an attempt may begin on that worker."""
        batch, position, attempt = key
        if key in self._begun:
            raise BrokenRule(f"{batch}[{position}]: attempt {attempt} begins again, by {worker}")
        self._begun.add(key)
        record = self.record(batch)
        if record is None:
            if self.terminated_at is None:
                raise BrokenRule(f"{batch}[{position}] begins without a record, by {worker}")
            return
        task = record.tasks[position]
        if task.attempt < attempt or (task.attempt == attempt and task.worker not in ("", worker)):
            raise BrokenRule(f"{batch}[{position}]: {worker} begins {attempt}, but it is {task}")

    def check_left(self, *, clean: bool) -> None:
        """Whether every object that is there belongs there.

        Args:
            clean: Whether nothing went wrong: then nothing may be left by accident, either.
        """
        packs: set[str] = set()
        for batch in self.batches():
            for task in self.state(batch).tasks:
                pieces = (task.outcome, task.stdout, task.stderr)
                packs |= {batch.pack_key(piece.pack) for piece in pieces if piece and piece.pack}
        left = [key for key in self.keys() if not _KEY.fullmatch(key)]
        if clean:
            left += [key for key in self.keys("results/") if key not in packs]
            alive = {worker for worker, lives in self.workers().items() if lives}
            left += [key for key in self.keys("workers/") if key.split("/")[1] not in alive]
        if left:
            raise BrokenRule(f"left behind: {left}")

    def _note_heartbeat(self, worker: str) -> None:
        self._silence[worker] = self._silent(worker)
        self._heard[worker] = self._sim.now

    def _silent(self, worker: str) -> float:
        """The longest that a worker has been silent since its first heartbeat."""
        since = self._sim.now - self._heard.get(worker, self._sim.now)
        return max(self._silence.get(worker, 0.0), since)

    def _check_record(self, batch: Batch, new: Record) -> None:
        if self.prefix + batch.tasks_key not in self._data:
            raise BrokenRule(f"{batch} gets a record, but is gone")
        stored = self.record(batch)
        old = self.state(batch) if stored is None else stored
        if stored is not None and new.nonce == stored.nonce:
            raise BrokenRule(f"{batch}: two writes with the same nonce")
        if new.round < old.round:
            raise BrokenRule(f"{batch}: round {old.round} -> {new.round}")
        writer = self.writer()
        for position, (was, now) in enumerate(zip(old.tasks, new.tasks, strict=True)):
            if now == was:
                continue
            self._check_task(f"{batch}[{position}]", was, now)
            self._check_writer(f"{batch}[{position}]", was, now, writer)
            if now.state is State.PENDING and was.state.held and new.round == old.round:
                raise BrokenRule(f"{batch}[{position}] went back within a round")
            if now.state is State.COMPLETED:
                self._check_outcome(batch, position, now)
        self._check_claims(batch, old, new)
        for marker in self.markers(batch):
            self._check_marker(batch, marker, new)

    def _check_task(self, name: str, was: Task, now: Task) -> None:
        if was.state.final:
            raise BrokenRule(f"{name} has a second outcome: {was} -> {now}")
        if now.attempt < was.attempt or now.losses < was.losses:
            raise BrokenRule(f"{name}: {was} -> {now}")
        if now.losses > self.max_attempts:
            raise BrokenRule(f"{name} was lost while running {now.losses} times")
        if now.losses == self.max_attempts and now.state is not State.FAILED:
            raise BrokenRule(f"{name} is {now.state} after its last attempt was lost")

    def _check_writer(self, name: str, was: Task, now: Task, writer: str) -> None:
        """Whether it is for this writer to make this change."""
        change = f"{name}: {was} -> {now}, by {writer}"
        if was.state is State.PENDING and now.state.held:
            if now.worker != writer or now.attempt != was.attempt + 1:
                raise BrokenRule(f"a claim for somebody else: {change}")
        elif now.attempt != was.attempt:
            raise BrokenRule(f"another attempt without a claim: {change}")
        elif now.lost > was.lost:
            self._check_loss(change, was, now)
        elif now.state is State.CANCELLED:
            if writer in self.workers():
                raise BrokenRule(f"a worker cancels: {change}")
        elif (not was.state.held or was.worker != writer) and not _is_damaged(now):
            raise BrokenRule(f"it is another's: {change}")

    def _check_loss(self, change: str, was: Task, now: Task) -> None:
        counts = was.state is State.RUNNING
        if (now.lost, now.losses) != (was.lost + 1, was.losses + counts):
            raise BrokenRule(f"miscounted: {change}")
        if self.workers().get(was.worker) and self._silent(was.worker) < self.half_lease - 2:
            raise BrokenRule(f"it was alive, and never silent for half a lease: {change}")

    def _check_outcome(self, batch: Batch, position: int, now: Task) -> None:
        """Whether a value is of the attempt that the record names, by the worker that it names."""
        assert now.outcome is not None
        if (batch, position, now.attempt) not in self.ended:
            raise BrokenRule(f"{batch}[{position}] has an outcome of what never ran: {now}")
        value = decode_outcome(self.piece(batch, now.outcome)).value or b""
        label = task_id(batch.lane, batch.number + position)
        right = f"{label} attempt {now.attempt} by {now.worker}"
        if value.rstrip(b".").decode() != right:
            raise BrokenRule(f"{batch}[{position}]: the outcome is {value[:80]!r}, not of {right}")

    def piece(self, batch: Batch, piece: Piece) -> bytes:
        """The bytes of a piece, without a request."""
        if not piece.pack:
            return piece.inline
        whole = self._data[self.prefix + batch.pack_key(piece.pack)]
        return whole[piece.start : piece.start + piece.size]

    def _check_claims(self, batch: Batch, old: Record, new: Record) -> None:
        """What was lost is claimed alone; at its last chance, by a worker that holds no other."""
        claimed: list[Task] = []
        for position, (was, now) in enumerate(zip(old.tasks, new.tasks, strict=True)):
            if was.state.held:
                self._holding.setdefault(was.worker, {}).pop((batch, position), None)
            if now.state.held:
                last = now.lost > 0 and now.losses >= self.max_attempts - 1
                held = self._holding.setdefault(now.worker, {})
                held[batch, position] = now.attempt if last else 0
                if now.attempt > was.attempt:
                    claimed.append(now)
        if len(claimed) > 1 and any(task.lost for task in claimed):
            raise BrokenRule(f"{batch}: what was lost is claimed beside others: {new}")
        for worker in {task.worker for task in claimed}:
            held = self._holding[worker]
            last_chances = [(*name, attempt) for name, attempt in held.items() if attempt]
            if len(held) > 1 and not self.ended.issuperset(last_chances):
                raise BrokenRule(f"{batch}: {worker} holds others beside a last chance: {held}")

    def _check_marker(self, batch: Batch, marker: str, record: Record | None) -> None:
        kind, _, rest = marker.partition(".")
        if record is None:
            raise BrokenRule(f"{batch}/{marker} without a record")
        if kind == "drained" and int(rest) == record.round:
            wrong = record.count(State.PENDING) > 0
        elif kind in ("drained", "requeued"):
            wrong = int(rest) > record.round
        else:
            finals = (State.COMPLETED, State.FAILED, State.CANCELLED)
            counts = ".".join(str(record.count(state)) for state in finals)
            wrong = not record.finished or rest != counts
        if wrong:
            raise BrokenRule(f"{batch}/{marker} is wrong: {record}")


def _is_damaged(task: Task) -> bool:
    """Whether it failed because what it needs cannot be read, which whoever reads it may write."""
    if task.state is not State.FAILED or task.outcome is None:
        return False
    failure = decode_outcome(task.outcome.inline).failure
    return failure is not None and failure.kind == "damaged"
