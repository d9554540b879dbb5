"""Tools for schedules that are forced: one fault, at one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starburst_executor.protocol.records import Task
from tests.simulation.kernel import Call, Fault, FaultPlan
from tests.simulation.world import Settings, SimClient, Work, World

Strike = Callable[[Call], Fault | None]


def striking(strike: Strike) -> FaultPlan:
    return lambda call, _: strike(call)


def once(fault: Fault, op: str, ending: str, process: str = "") -> FaultPlan:
    """A fault that strikes the first such call: an operation on a key that ends so."""
    left = [fault]

    def strike(call: Call) -> Fault | None:
        fits = call.op == op and call.key.endswith(ending)
        return left.pop() if fits and process in ("", call.process) and left else None

    return striking(strike)


def submitting(
    *works: Work, then: Callable[[SimClient], None] = SimClient.wait
) -> Callable[[SimClient], None]:
    """What a client does: make a session, submit, and then."""

    def script(client: SimClient) -> None:
        client.create()
        client.submit(works)
        then(client)
        client.exit()

    return script


def outlasting(client: SimClient) -> None:
    """What a client does that is still there in the end."""
    client.wait()
    client.runtime.signal().wait()


def a_world(faults: FaultPlan | None = None, **settings: Any) -> World:
    return World(1, Settings(faults=faults, **settings))


def only_task(world: World) -> Task:
    (task,) = world.tasks().values()
    return task


def without_launcher(world: World) -> None:
    """All workers are those that the test starts."""
    world.launcher.launch = lambda session_url, count: []  # type: ignore[method-assign]
