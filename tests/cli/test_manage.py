"""Commands that change a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from starburst_executor.cli.exits import Exit
from starburst_executor.client.codec import python_version
from starburst_executor.protocol import transitions
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import Lane, SessionState
from starburst_executor.protocol.outcome import Outcome, encode_outcome
from starburst_executor.protocol.records import Record
from starburst_executor.protocol.session import VersionedRecord
from starburst_executor.protocol.tasks_object import Queued, encode_tasks
from starburst_executor.storage.url import open_store
from tests.support.command_line import PATIENCE, Made, crash, parsed, run

# --- cancel ------------------------------------------------------------------------


def test_cancel_stops_named_tasks_alone(made: Made) -> None:
    made.begin()
    result = made.run("cancel", "0-0", "0-2")
    assert result.stdout == "Cancelled 2 tasks.\n"
    assert made.states() == ["cancelled", "pending", "cancelled"]


def test_cancel_without_tasks_cancels_all_that_are_unfinished(made: Made) -> None:
    made.begin()
    made.end(0)
    assert made.run("cancel").stdout == "Cancelled 2 tasks.\n"
    assert made.states() == ["completed", "cancelled", "cancelled"]


def test_cancel_says_what_had_ended_before(made: Made) -> None:
    made.begin()
    made.end(0)
    result = made.run("cancel", "0-0")
    assert result.stdout == "Cancelled 0 tasks. 1 had ended before.\n"


# --- retry -------------------------------------------------------------------------


def test_failed_tasks_are_retried_once_and_run_by_workers(directory_url: str) -> None:
    made = Made(directory_url, python=python_version())
    made.begin(count=3)
    made.end(0, crash())
    made.end(1, crash())
    made.end(2)
    try:
        result = made.run("retry", "--failed")
        assert result.stdout.splitlines()[:2] == ["0-0 -> 0-3", "0-1 -> 0-4"]
        again = made.run("retry", "--failed")
        assert again.stdout == ""
        assert "not retried already" in again.stderr
        made.run("collect", "--wait", "--timeout", str(PATIENCE))
        outcomes = parsed(made.run("collect", "--json").stdout, "outcomes")
        assert [(one["task_id"], one["retried_as"], one["value"]) for one in outcomes] == [
            ("0-0", "0-3", 1), ("0-1", "0-4", 2), ("0-2", "", 4),
        ]  # fmt: skip
        # What failed has been healed: nothing is left to complain of.
        assert made.run("collect").exit_code == Exit.OK
        assert made.run("status", "--watch").exit_code == Exit.OK
        errors = made.run("errors")
        assert (errors.stdout, "2 failures left out" in errors.stderr) == ("", True)
        shown = parsed(made.run("show", "0-0", "--json").stdout, "task")
        assert shown["retried_as"] == "0-3"
    finally:
        made.run("cleanup", "--force")


def test_retried_tasks_go_on_in_a_free_lane_or_a_new_one(made: Made) -> None:
    made.begin(count=2)
    made.end(0, crash())
    made.end(1)
    assert made.run("retry", "0-1").stdout.startswith("0-1 -> 0-3\n")
    taken = Lane(client="somebody", number=4)
    made.amend(lanes=(taken,))
    assert made.run("retry", "0-0").stdout.startswith("0-0 -> 1-0\n")
    manifest = made.session.load()
    assert manifest.lanes[0] == taken
    assert (manifest.lanes[1].taken, manifest.lanes[1].number) == (False, 1)


def test_retrying_opens_a_session_that_was_shut_down(made: Made) -> None:
    made.begin()
    made.end(0, crash())
    made.amend(state=SessionState.CLOSED)
    made.run("retry", "0-0")
    assert made.session.load().state is SessionState.OPEN


def test_many_failures_are_retried_in_few_batches(directory_url: str) -> None:
    made = Made(directory_url)
    batch = Batch(0, 3, 200)
    header = made.session.tasks(made.batch).header
    calls = [Queued(header.functions[0], b"x" * i) for i in range(200)]
    made.session.put_batch(batch, encode_tasks(calls, {}, light=False))
    now = made.runtime.time()
    failed = encode_outcome(Outcome(failure=crash()))
    made.session.change(
        batch,
        VersionedRecord(Record.fresh(200), None),
        lambda r: transitions.fail_all(r, now, failed),
    )
    made.amend(lanes=(Lane(client="x", taken=False, number=203),))
    assert len(made.run("retry", "--failed").stdout.splitlines()) >= 200
    sights = [s for s in made.session.queue().look() if s.batch.number >= 203]
    assert [sight.batch.size for sight in sights] == [25] * 8  # 2 workers, 4 batches each
    copied = made.session.tasks(sights[-1].batch)
    assert made.session.arguments(sights[-1].batch, copied, 24) == b"x" * 199
    assert not copied.header.light


@pytest.mark.parametrize("arguments", [(), ("0-0", "--failed")])
def test_retry_wants_either_tasks_or_failed(made: Made, arguments: tuple[str, ...]) -> None:
    assert made.run("retry", *arguments).exit_code == Exit.USAGE


def test_unfinished_tasks_are_not_retried(made: Made) -> None:
    result = made.run("retry", "0-0")
    assert result.exit_code == Exit.USAGE
    assert "task 0-0 is pending" in result.stderr


def test_a_task_withdrawn_before_it_was_stored_has_nothing_to_retry(
    made: Made,
) -> None:
    batch = Batch(0, 3, 2)
    header = made.session.tasks(made.batch).header
    calls = [Queued(header.functions[0], b"x"), Queued(header.functions[0], None)]
    made.session.put_batch(batch, encode_tasks(calls, {}))
    made.session.withdraw(batch, [1])
    result = made.run("retry", "0-4")
    assert result.exit_code == 0
    assert "nothing to retry" in result.stderr


def test_nothing_of_a_terminated_session_is_retried(made: Made) -> None:
    made.begin()
    made.end(0, crash())
    made.amend(state=SessionState.TERMINATED)
    result = made.run("retry", "--failed")
    assert result.exit_code == Exit.OTHER
    assert "terminated" in result.stderr


# --- extend, scale, cleanup, prune -------------------------------------------------


def test_extend_moves_the_time_limit_on(made: Made) -> None:
    before = made.session.load().deadline
    result = made.run("extend", "100")
    assert made.session.load().deadline == pytest.approx(before + 100)
    assert result.stdout.startswith(f"Session {made.id} goes on until ")


@pytest.mark.parametrize("seconds", ["0", "nan", "-5", "soon"])
def test_a_session_can_only_be_extended(made: Made, seconds: str) -> None:
    before = made.session.load()
    result = run("extend", "--store", made.store, "--", made.id, seconds)
    assert result.exit_code == Exit.USAGE
    assert made.session.load() == before


def test_scale_sets_how_many_workers_are_wanted(made: Made) -> None:
    assert made.run("scale", "7").exit_code == 0
    assert made.session.load().workers == 7


def test_scale_auto_goes_back_to_what_it_was_made_for(made: Made) -> None:
    made.run("scale", "7")
    made.run("scale", "5")
    assert "at most 2 workers" in made.run("scale", "auto").stdout
    assert made.session.load().workers == 2


@pytest.mark.parametrize("count", ["0", "-1", "100000", "many"])
def test_scale_refuses_counts_beyond_reason(made: Made, count: str) -> None:
    result = run("scale", "--store", made.store, "--", made.id, count)
    assert result.exit_code == Exit.USAGE
    assert made.session.load().workers == 2


def test_scale_starts_the_workers_that_unfinished_tasks_lack(
    directory_url: str,
) -> None:
    made = Made(directory_url, python=python_version())
    try:
        assert "Started 3 workers." in made.run("scale", "8").stdout
    finally:
        made.run("cleanup", "--force")


def test_cleanup_terminates_and_keeps_the_results(made: Made) -> None:
    made.begin()
    made.end(0)
    assert made.run("cleanup").exit_code == 0
    assert made.session.load().state is SessionState.TERMINATED
    assert made.run("collect").exit_code == 0


def test_cleanup_with_force_leaves_no_object(made: Made) -> None:
    assert made.run("cleanup", "--force").exit_code == 0
    assert made.stored() == []


def test_cleanup_with_force_removes_what_a_broken_off_deletion_left(
    made: Made,
) -> None:
    made.session.store.delete([made.session.key("session.json")])
    assert made.run("cleanup", "--force").exit_code == 0
    assert made.stored() == []


def aged(made: Made, seconds: float) -> None:
    """Have all objects of a session written so long ago."""
    for key in made.stored():
        path = Path(made.store, key)
        then = path.stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(then, then))


def test_prune_deletes_what_nobody_has_touched_and_nothing_else(
    directory_url: str,
) -> None:
    old = Made(directory_url, session_id="20250101-120000-aaaaaa")
    debris = Made(directory_url, session_id="20250101-120000-bbbbbb")
    young = Made(directory_url, session_id="20250101-120000-cccccc")
    debris.session.store.delete([debris.session.key("session.json")])
    aged(old, 8 * 86400)
    aged(debris, 8 * 86400)
    aged(young, 6 * 86400)
    dry = run("prune", "--older-than", "7d", "--dry-run", store=directory_url)
    assert dry.stdout.splitlines() == [old.id, debris.id]
    assert old.stored()
    result = run("prune", "--older-than", "7d", store=directory_url)
    assert result.stdout.splitlines() == [old.id, debris.id]
    assert (old.stored(), debris.stored()) == ([], [])
    assert young.stored()


def test_prune_spares_an_old_session_in_which_something_was_written_lately(
    made: Made,
) -> None:
    aged(made, 8 * 86400)
    made.begin()
    assert run("prune", "--older-than", "7d", store=made.store).stdout == ""
    assert made.stored()


def test_prune_spares_a_session_that_is_just_being_made(directory_url: str) -> None:
    store = open_store(directory_url)
    store.put("sessions/20250101-120000-aaaaaa/functions/f", b"x")
    assert run("prune", "--older-than", "1h", store=directory_url).stdout == ""


@pytest.mark.parametrize("age", ["7", "d", "7 days", "-7d", ""])
def test_prune_refuses_what_is_no_age(made: Made, age: str) -> None:
    result = run("prune", f"--older-than={age}", store=made.store)
    assert result.exit_code == Exit.USAGE
    assert "7d" in result.stderr
