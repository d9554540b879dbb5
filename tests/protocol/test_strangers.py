"""Whatever lies in a store: decoding it gives a value or an error of ours, in bounded memory.

Examples are the same in each run. For a long search among new ones:

    pytest --hypothesis-profile=long tests/protocol/test_strangers.py
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starburst_executor.client import resubmit
from starburst_executor.coordination import administration
from starburst_executor.errors import DamagedObject, StarburstError
from starburst_executor.formatting import duration, utc
from starburst_executor.inspection import status, tasks
from starburst_executor.inspection.report import page
from starburst_executor.inspection.report.review import observe, review
from starburst_executor.inspection.stuck import past_limit
from starburst_executor.launchers.base import open_launcher
from starburst_executor.protocol import codec
from starburst_executor.protocol.keys import Batch, parse_task_id, task_id
from starburst_executor.protocol.launching import Launching
from starburst_executor.protocol.listing import BatchListing, QueueReader
from starburst_executor.protocol.manifest import (
    Heartbeat,
    Intervals,
    Lane,
    Limits,
    LiveLog,
    Manifest,
)
from starburst_executor.protocol.origin import Origin
from starburst_executor.protocol.outcome import (
    Failure,
    Outcome,
    decode_outcome,
    encode_outcome,
)
from starburst_executor.protocol.payload import ENCODER, references
from starburst_executor.protocol.records import Piece, Record, State, Task
from starburst_executor.protocol.session import Session
from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.task_names import Name, decode_names, encode_names
from starburst_executor.protocol.tasks_object import Call, Header, Queued, encode_tasks, read_header
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.runtime import SystemRuntime
from starburst_executor.storage.base import ListedObject, ListingPage
from tests.support.command_line import Made
from tests.support.fakes import MemoryStore

# --- what a stranger may write ------------------------------------------------------

LARGE = st.sampled_from([
    -1, 0, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 1e15, 1e16, 1e308, -1e308, 5e-324,
    253402300800, 1e11, 1e12,
])  # fmt: skip
TEXT = st.text(max_size=20) | st.sampled_from([
    "", "../..", "/etc/passwd", "a" * 64, "\x1b]0;x\x07", "0-0", "-", "9" * 400, "w-1", "pending",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | LARGE | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
BYTES = st.binary(max_size=200)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from places(inner, (*path, key))


@st.composite
def altered(draw: st.DrawFn, whole: Any) -> Any:
    """A document with some of its values replaced or left out, and some added."""
    copy = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(copy))))
        if not path:
            continue
        inner = copy
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()) or not isinstance(inner, dict):
            inner[path[-1]] = draw(VALUES)
        else:
            del inner[path[-1]]
    return copy


EVERY = Manifest(
    session_id="s", name="n", python="3", package="0", created=1.0, deadline=2.0, workers=1,
    spec=WorkerSpec(), limits=Limits(task_timeout=1.0), intervals=Intervals(lease=9),
    lanes=(Lane(client="c", number=3, finished=2, completed=2),), initializer="f",
    modules={"m": "d"}, rate=SessionPrices(source="x", taken=date(2026, 1, 1), worker_hour=1.0),
    max_hourly_cost=1.0, cost_alert=1.0, origin=Origin(directory="/x", argv=("a",)),
)  # fmt: skip
TASK = Task(
    state=State.FAILED, attempt=2, worker="w", claimed=1.0, started=2.0, ended=3.0,
    outcome=Piece(pack="p", start=3, size=4), stdout=Piece(inline=b"x"),
)  # fmt: skip
WHOLE: list[Any] = [
    EVERY,
    Record(round=1, tasks=(TASK, Task(), Task())),
    Heartbeat(worker="w", started=1.0, written=2.0, busy=3.0, completed=1, reads=4),
    LiveLog(stdout="x"),
    Header(functions=("f",), modules={"m": "d"}, calls=(Call(0, 0, 3), Call(0, 3, -1))),
    Launching(nonce="n", by="b", seconds=1.0, shortage="none"),
    resubmit._Retries(tasks={"0-0": "0-1"}),
]
DOCUMENTS = {type(one): json.loads(codec.encode(one)) for one in WHOLE}


# --- decoders -----------------------------------------------------------------------


def test_every_kind_that_is_stored_is_tried() -> None:
    assert DOCUMENTS.keys() == codec._decoders.keys()
    for one in WHOLE:
        assert codec.decode(codec.encode(one), type(one), "key") == one


def use(value: Any) -> None:
    """What is done with it for people."""
    if isinstance(value, Manifest):
        utc(value.created), str(past_limit(value)), str(value.rate)
    if isinstance(value, Record):
        assert len([tasks.attempts(task) for task in value.tasks]) == len(value.tasks)
    if isinstance(value, Heartbeat):
        duration(value.busy), utc(value.written)
    if isinstance(value, Header):
        value.fresh_record(), value.arguments_size
        assert all(value.functions[call.function] for call in value.calls)


@pytest.mark.parametrize("kind", DOCUMENTS)
@given(data=st.data())
def test_stored_json_is_decoded_or_damaged(kind: type[Any], data: st.DataObject) -> None:
    content = data.draw(BYTES | altered(DOCUMENTS[kind]).map(lambda d: json.dumps(d).encode()))
    with contextlib.suppress(DamagedObject):
        use(codec.decode(content, kind, "key"))


@given(header=altered(DOCUMENTS[Header]), body=BYTES, length=st.integers(0, 2**32 - 1) | st.none())
def test_a_tasks_object_is_read_or_damaged(header: Any, body: bytes, length: int | None) -> None:
    head = json.dumps(header).encode()
    size = len(head) if length is None else length
    with contextlib.suppress(DamagedObject):
        needed = read_header(b"SBX1" + size.to_bytes(4, "little") + head + body, "key")
        assert not isinstance(needed, int) or needed <= 64 << 20, "what it has the reader fetch"


NAMES = json.loads(encode_names([Name("f", "1", "label"), Name("g", "2")]))


@given(content=BYTES | altered(NAMES).map(lambda d: json.dumps(d).encode()))
def test_names_of_tasks_are_short_printable_lines_or_refused(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        for name in decode_names(content, 2):
            assert all(part.isprintable() and len(part) <= 80 for part in name)


OUTCOME = encode_outcome(Outcome(failure=Failure(kind="raised", type="T", cargo=b"x")))


@given(content=BYTES | VALUES.map(lambda v: msgspec.msgpack.encode(_small(v))))
def test_outcomes_and_cargoes_are_decoded_or_damaged(content: bytes) -> None:
    for decoder in (decode_outcome, references):
        with contextlib.suppress(DamagedObject):
            decoder(content)


@given(place=st.integers(0, len(OUTCOME) - 1), content=BYTES)
def test_a_spoilt_outcome_is_decoded_or_damaged(place: int, content: bytes) -> None:
    with contextlib.suppress(DamagedObject):
        decode_outcome(OUTCOME[:place] + content + OUTCOME[place + 1 :])
    cargo = ENCODER.encode((("a" * 64, 5), [("b" * 64, 7)]))
    with contextlib.suppress(DamagedObject):
        references(cargo[:place] + content + cargo[place + 1 :])


def _small(value: Any) -> Any:
    """MessagePack has no integers beyond 64 bits."""
    return 2**63 if isinstance(value, int) and not -(2**63) <= value < 2**64 else _inside(value)


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _small(inner) for key, inner in value.items()}
    return [_small(inner) for inner in value] if isinstance(value, list) else value


# --- names --------------------------------------------------------------------------

MARKERS = st.sampled_from([
    "done", "done.", "done.1", "done.1.1.1", "done.0.0.3", "done.a.b.c", "done.1.1.1.1",
    "done.999.999.999", "done.9999999999.0.0", "drained", "drained.", "drained.x", "drained.1",
    "drained." + "9" * 250, "requeued.1", "requeued.-1", "requeued.\u0663", "tasks", "record",
])  # fmt: skip


@given(name=TEXT | st.from_regex(r"\d{4}-\d{8}\.\d{1,200}", fullmatch=True))
def test_a_batch_has_one_name_and_at_most_256_tasks(name: str) -> None:
    batch = Batch.parse(name)
    assert batch is None or (str(batch) == name and 1 <= batch.size <= 256)


@given(text=TEXT | st.from_regex(r"\d{1,30}-\d{1,30}", fullmatch=True))
def test_a_task_id_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        lane, number = parse_task_id(text)
        assert task_id(lane, number).count("-") == 1


@given(names=st.lists(MARKERS | TEXT, max_size=5))
def test_a_marker_is_a_fact_or_nothing(names: list[str]) -> None:
    listing = BatchListing(Batch(0, 0, 3))
    for name in names:
        listing.add(name, ListedObject(key=name, size=0, version="1", modified=1.0))
    assert listing.done is None or sum(listing.done) == 3


def test_an_invented_lane_does_not_make_each_look_list_ten_thousand() -> None:
    class Counting(MemoryStore):
        lists = 0

        def list(
            self, prefix: str, *, after: str = "", limit: int = 1000, delimiter: str = ""
        ) -> ListingPage:
            self.lists += 1
            return super().list(prefix, after=after, limit=limit, delimiter=delimiter)

    store = Counting(SystemRuntime())
    store.put("s/queue/0000-00000000.1/tasks", b"")
    store.put("s/queue/9999-00000000.1/tasks", b"")
    reader = QueueReader(store, "s/")
    assert [listing.batch.lane for listing in reader.look()] == [0]
    reader.look()
    assert store.lists <= 4


# --- a session ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A session with a failed task, a live log and a retry."""
    one = Made(str(tmp_path_factory.mktemp("strangers")))
    one.begin(count=2)
    one.end(0, Failure(kind="raised", type="ValueError", message="no"), stdout="out\n")
    one.prints(1, "running\n")
    store = one.session.store
    store.put(one.session.key("retries/x"), codec.encode(resubmit._Retries(tasks={"0-0": "0-1"})))
    store.put(
        one.session.key("workers/w-one"), codec.encode(Heartbeat(worker="w-one", written=1.0))
    )
    return one


OBJECTS = {
    "session.json": DOCUMENTS[Manifest],
    "queue/0000-00000000.3/record": DOCUMENTS[Record],
    "workers/w-one": DOCUMENTS[Heartbeat],
    "ended/w-two": DOCUMENTS[Heartbeat],
    "logs/0000-00000000.3/1.1": DOCUMENTS[LiveLog],
    "launching": DOCUMENTS[Launching],
    "retries/x": {"schema": 1, "tasks": {"0-0": "0-1", "0-1": "0-0"}},
}


@given(data=st.data())
def test_a_crafted_session_spoils_no_list_and_no_look_at_it(
    made: Made, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(OBJECTS)))
    content = data.draw(BYTES | altered(OBJECTS[name]).map(lambda d: json.dumps(d).encode()))
    with closing(SystemRuntime()) as runtime, _spoilt(made, name, content) as store:
        session = Session(store, made.id, runtime)
        str(status.list_summaries(store))
        administration.unfinished_sessions(store)
        with contextlib.suppress(StarburstError):
            str(status.read_status(session))
        with contextlib.suppress(StarburstError):
            page.html(review(observe(session)), "")
        with contextlib.suppress(StarburstError, LookupError):
            tasks.group_errors(tasks.views(session))
            retries = resubmit.retried(session)
            for found in tasks.find(session):
                retries.chain(found.task_id)
                tasks.history(session, found)


@contextlib.contextmanager
def _spoilt(made: Made, name: str, content: bytes) -> Iterator[MemoryStore]:
    """A copy of the session's store in memory, with one object written by a stranger."""
    store = MemoryStore(SystemRuntime())
    for entry in made.session.list_all("")[0]:
        got = made.session.store.get(entry.key)
        assert got is not None
        store.put(entry.key, got.data)
    store.put(made.session.key(name), content)
    yield store


def test_a_session_on_ecs_that_does_not_say_where_is_refused() -> None:
    for place in ({}, {"cluster": 1}, dict.fromkeys(["cluster", "region", "subnets"], "\x1b")):
        with pytest.raises(ValueError, match="does not say where its workers run"):
            open_launcher(WorkerSpec(launcher="ecs"), place)


def test_the_tasks_of_a_session_cannot_name_what_lies_elsewhere() -> None:
    for name in ("../session", "/etc/passwd", ".hidden", ""):
        content = encode_tasks([Queued(name, b"x")], {})
        with pytest.raises(DamagedObject):
            read_header(content, "key")
        content = encode_tasks([Queued("f", b"x")], {"m": name})
        with pytest.raises(DamagedObject):
            read_header(content, "key")
