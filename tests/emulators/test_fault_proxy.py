"""The proxy that injects faults: what it lets through, and what it makes of a reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from starburst_executor.errors import StoreDenied, StoreError, StoreUnavailable
from starburst_executor.storage.base import Store
from starburst_executor.storage.url import open_store
from tests.support.fault_proxy import (
    Fault,
    FaultProxy,
    FirstOfEach,
    Share,
    everything,
    fault_proxy,
    matching,
    nothing,
)
from tests.support.s3_requests import S3Request, kind_of
from tests.support.servers import S3Server

KEY = "sessions/s/queue/b.1/record"
LARGE = bytes(17 << 20)  # sent in parts
OPERATIONS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "create": ("PUT", lambda store: store.create("sessions/s/queue/b.2/record", b"x")),
    "read": ("GET", lambda store: store.get(KEY)),
    "look": ("HEAD", lambda store: store.get(KEY, stop=0)),
    "list": ("LIST", lambda store: store.list("sessions/s/queue/")),
    "begin": ("POST", lambda store: store.upload("sessions/s/blobs/large", LARGE)),
    "send a part": ("PUT", lambda store: store.upload("sessions/s/blobs/large", LARGE)),
    "delete": ("DELETE", lambda store: store.delete([KEY])),
}
ERRORS = {
    Fault.DENIED: StoreDenied,
    Fault.EXPIRED: StoreDenied,
    Fault.SKEWED: StoreDenied,
}


@pytest.fixture(params=["ministack", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server) as running:
        yield running


@pytest.fixture
def store(
    server: S3Server,
    proxy: FaultProxy,
    s3_env: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Store]:
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    s3_env(server, proxy.endpoint)
    opened = open_store(server.fresh_url())
    opened.put(KEY, b"as it was")
    yield opened
    opened.close()


def test_without_a_plan_everything_passes(store: Store, proxy: FaultProxy) -> None:
    for _, call in OPERATIONS.values():
        call(store)
    assert [entry.key for entry in store.list("sessions/").entries] == [
        "sessions/s/blobs/large",
        "sessions/s/queue/b.2/record",
    ]
    assert proxy.seen["PUT", "record"] == 2
    assert proxy.seen["PUT", "blobs"] > 1
    assert not proxy.faulty


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_fault_makes_each_operation_fail_in_its_way(
    store: Store, proxy: FaultProxy, name: str, fault: Fault
) -> None:
    operation, call = OPERATIONS[name]
    proxy.plan = matching(fault, operations={operation})
    if fault is Fault.DATELESS and operation not in ("GET", "HEAD", "LIST"):
        call(store)  # only those who read care for the time
        return
    with pytest.raises(StoreError) as raised:
        call(store)
    assert type(raised.value) is ERRORS.get(fault, StoreUnavailable)


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.CUT])
def test_a_reply_that_is_lost_has_had_its_effect(
    store: Store, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.plan = everything(fault)
    with pytest.raises(StoreUnavailable):
        store.put(KEY, b"changed")
    proxy.plan = nothing
    found = store.get(KEY)
    assert found is not None
    assert found.data == b"changed"


def test_a_plan_may_fail_only_the_first_requests_of_each_kind(
    store: Store, proxy: FaultProxy
) -> None:
    down = Fault.UNAVAILABLE
    proxy.plan = FirstOfEach(*[down] * 4)
    with pytest.raises(StoreUnavailable):
        store.get(KEY)
    store.get(KEY)
    with pytest.raises(StoreUnavailable):
        store.list("sessions/s/queue/")
    assert dict(proxy.faulty) == {(down, "GET", "record"): 4, (down, "LIST", "queue"): 4}


def test_a_share_of_faults_follows_from_the_seed() -> None:
    requests = [S3Request("GET", f"queue/{number}/record") for number in range(2000)]

    def drawn(seed: int) -> list[Fault | None]:
        plan = Share(0.05, [Fault.PAGE, Fault.LOST], seed)
        return [plan(request) for request in requests]

    assert drawn(1) == drawn(1) != drawn(2)
    found = [fault for fault in drawn(1) if fault]
    assert set(found) == {Fault.PAGE, Fault.LOST}
    assert 50 < len(found) < 150


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("session.json", "session.json"),
        ("queue/0000-00000000.4/tasks", "tasks"),
        ("queue/0000-00000000.4/done.3.1.0", "done"),
        ("queue/", "queue"),
        ("blobs/abc", "blobs"),
    ],
)
def test_objects_have_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
