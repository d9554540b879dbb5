"""What becomes of a session when replies of its store are faulty for a while: nothing.

`OBJECTS` has every kind of object that a session stores, and the requests for it that each side
makes. Each of them meets every fault, so often in a row that boto3's own retries do not hide it.
To whoever waits for results it is as if nothing had been, and nothing runs twice. Only calls that
read first, such as `retry` and `cleanup`, say that the store is away; made again, they do what they
would have done.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from starburst_executor import StarburstExecutor
from tests.support.fault_proxy import Fault, FirstOfEach
from tests.support.s3_requests import kind_of
from tests.support.scene import Scene, Tally, scene_at, told_or_done
from tests.support.servers import S3Server
from tests.support.sessions import QUICK
from tests.support.tasks import DEADLINE, Gate, shout, until

OBJECTS: dict[str, tuple[set[str], set[str]]] = {
    "session.json": ({"GET", "PUT"}, {"GET"}),
    "queue": ({"LIST"}, {"LIST"}),
    "tasks": ({"PUT", "GET"}, {"GET"}),
    "record": ({"GET"}, {"GET", "PUT"}),
    "drained": (set(), {"PUT"}),
    "requeued": (set(), {"PUT"}),
    "done": (set(), {"PUT"}),
    "functions": ({"PUT"}, {"GET"}),
    "modules": ({"PUT"}, {"GET"}),
    "blobs": ({"HEAD", "PUT", "GET"}, {"HEAD", "PUT", "GET"}),
    "results": ({"GET"}, {"PUT"}),
    "workers": ({"LIST"}, {"PUT", "LIST"}),
    "ended": (set(), {"PUT"}),
    "launching": ({"GET", "PUT"}, set()),
    "logs": (set(), {"PUT"}),
    "retries": ({"LIST", "PUT"}, set()),
}
"""Kind of object -> what the client asks for, what a worker asks for."""

HIDDEN = 4  # boto3 itself tries four times
OUTAGES: list[tuple[Fault, ...]] = [
    (*[Fault.UNAVAILABLE] * HIDDEN, Fault.EXPIRED),
    (*[Fault.WORDLESS] * HIDDEN, Fault.DENIED),
    (*[Fault.PAGE] * HIDDEN, Fault.SKEWED),
    (*[Fault.CUT] * HIDDEN, Fault.DATELESS),
    tuple([Fault.LOST] * HIDDEN),
]
"""What the first requests of each kind meet, one after the other. Every fault is in one."""

PATIENCE = 5 * DEADLINE  # all of it takes some seconds
INTERVALS = replace(QUICK, lease=240)  # nobody is lost, however slow the machine


def square(tally: Tally, number: int) -> int:
    tally.begin(number)
    return number * number


def digest(tally: Tally, data: bytes) -> tuple[str, bytes]:
    tally.begin("digest")
    return hashlib.sha256(data).hexdigest(), data[::-1]


WORDS = [f"word {number}" for number in range(20_000)]


def words(tally: Tally) -> list[str]:
    tally.begin("words")
    return WORDS


def fail_once(tally: Tally) -> str:
    if tally.begin("fail_once") == 1:
        raise ValueError("the first time")
    return "then well"


def hold(tally: Tally, gate: Gate) -> str:
    tally.begin("hold")
    shout("holding")
    gate.hold()
    return "held"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def scene(ministack: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with scene_at(ministack, monkeypatch) as set_up:
        yield set_up


@pytest.mark.slow
@pytest.mark.parametrize("faults", OUTAGES, ids=lambda faults: " and ".join(sorted({*faults})))
def test_a_short_outage_leaves_no_trace(
    faults: Sequence[Fault], scene: Scene, gate: Gate, tmp_path: Path
) -> None:
    tally = Tally(tmp_path / "tally")
    data = os.urandom(2 << 20)
    executor = StarburstExecutor(2, store=scene.url, intervals=INTERVALS)
    scene.plan(lambda: FirstOfEach(*faults))
    try:
        assert [*executor.map(partial(square, tally), range(4))] == [0, 1, 4, 9]
        digests = executor.submit(digest, tally, data).result(PATIENCE)
        assert digests == (hashlib.sha256(data).hexdigest(), data[::-1])
        assert executor.submit(words, tally).result(PATIENCE) == WORDS
        assert str(executor.submit(fail_once, tally).exception(PATIENCE)) == "the first time"
        until(lambda: told_or_done(executor.retry), "retried")
        assert executor.futures[-1].result(PATIENCE) == "then well"
        held = executor.submit(hold, tally, gate)
        until(lambda: any(name.startswith("logs/") for name in scene.stored()), "a log")
        os.kill(parent_of(*gate.await_arrivals()), signal.SIGTERM)  # it hands back
        gate.await_arrivals(2)
        gate.open()
        assert held.result(PATIENCE) == "held"
        assert {kind_of(name) for name in scene.stored()} <= OBJECTS.keys()
    finally:
        until(lambda: told_or_done(partial(executor.cleanup, force=True)), "cleaned up")
    assert scene.stored() == []
    once = {str(n): 1 for n in range(4)} | {"digest": 1, "words": 1}
    assert tally.counts() == once | {"fail_once": 2, "hold": 2}
    assert scene.kinds_seen() == OBJECTS.keys() | {"queue"}
    assert not list(unmet(scene, faults))


def unmet(scene: Scene, faults: Sequence[Fault]) -> Iterator[tuple[str, str, str, Fault]]:
    """Cells of the table that did not come about."""
    for kind, both in OBJECTS.items():
        for side, operations in zip(scene.sides, both, strict=True):
            # A worker that was told to leave has no time for many tries.
            struck = {faults[0]} if kind == "ended" else {*faults}
            for operation, fault in itertools.product(operations, struck):
                # Nobody looks at the date of a write, and what was written need not be again.
                harmless = fault is Fault.DATELESS and operation == "PUT"
                if not harmless and not scene.sides[side].faulty[fault, operation, kind]:
                    yield side, operation, kind, fault


def test_every_fault_is_in_an_outage() -> None:
    assert {fault for faults in OUTAGES for fault in faults} == {*Fault}


def test_every_documented_kind_of_object_is_in_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "explanation" / "protocol.md"
    cells = re.findall(r"^\| (`.*?) \|", page.read_text(), re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`(.*?)`", cell)]
    kinds = {name if name == "session.json" else kind_of(name).partition(".")[0] for name in names}
    assert kinds | {"queue"} == OBJECTS.keys()


def parent_of(child: int) -> int:
    return int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
