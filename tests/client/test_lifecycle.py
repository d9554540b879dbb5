"""Which end of a client may still begin, and which takes it down, without any threads or store."""

from __future__ import annotations

import pytest

from starburst_executor.client.lifecycle import Lifecycle
from starburst_executor.errors import (
    ExecutorBroken,
    SessionDetached,
    SessionTerminated,
)

DETACHED = SessionDetached("detached")
BROKEN = ExecutorBroken("broken")
SHUT_DOWN = RuntimeError("shut down")


def start() -> None:
    """A thread that starts."""


def refuse_to_start() -> None:
    raise RuntimeError("can't start new thread")


def test_an_open_client_takes_calls() -> None:
    client = Lifecycle()
    client.check_admission()
    assert client.untended


def test_the_first_reason_why_no_calls_are_taken_stays() -> None:
    client = Lifecycle()
    client.fail(BROKEN)
    assert client.begin_end(start, SHUT_DOWN)
    client.fail(ExecutorBroken("again"))
    with pytest.raises(ExecutorBroken, match="broken"):
        client.check_admission()


def test_a_failed_detach_leaves_all_as_it_was() -> None:
    client = Lifecycle()
    client.begin_detach(DETACHED)
    with pytest.raises(SessionDetached):
        client.check_admission()
    client.undo_detach()
    client.check_admission()


def test_a_detach_that_failed_because_something_broke_leaves_it_broken() -> None:
    client = Lifecycle()
    client.begin_detach(DETACHED)
    client.fail(BROKEN)
    client.undo_detach()
    with pytest.raises(ExecutorBroken):
        client.check_admission()
    with pytest.raises(ExecutorBroken):
        client.begin_detach(DETACHED)
    assert client.untended


def test_a_detach_that_fails_after_a_cleanup_does_not_open_the_client_again() -> None:
    client = Lifecycle()
    client.begin_detach(DETACHED)
    assert client.claim(SessionTerminated("cleaned up"))
    client.undo_detach()
    assert client.taken_down
    with pytest.raises(SessionDetached):
        client.check_admission()


def test_a_shutdown_after_detach_or_cleanup_begins_nothing() -> None:
    client = Lifecycle()
    client.begin_detach(DETACHED)
    assert not client.begin_end(start, SHUT_DOWN)
    client.leave()
    assert not client.begin_end(start, SHUT_DOWN)
    other = Lifecycle()
    assert other.claim(SessionTerminated("cleaned up"))
    assert not other.begin_end(start, SHUT_DOWN)


def test_a_shutdown_whose_thread_cannot_start_changes_nothing() -> None:
    client = Lifecycle()
    with pytest.raises(RuntimeError, match="start"):
        client.begin_end(refuse_to_start, SHUT_DOWN)
    client.check_admission()
    client.fail(BROKEN)
    with pytest.raises(RuntimeError, match="start"):
        client.begin_end(refuse_to_start, SHUT_DOWN)
    assert client.refusal is BROKEN
    assert client.begin_end(start, SHUT_DOWN)


def test_only_the_first_takes_a_client_down() -> None:
    client = Lifecycle()
    assert client.begin_end(start, SHUT_DOWN)
    assert not client.untended
    assert client.claim()
    assert not client.claim()
    assert not client.claim(SessionTerminated("cleaned up"))
    assert client.refusal is SHUT_DOWN
    assert not client.gone
    client.note_removed()
    assert client.gone


def test_an_exiting_client_takes_no_calls_and_can_still_be_detached() -> None:
    client = Lifecycle()
    client.note_exit()
    assert not client.untended
    with pytest.raises(RuntimeError, match="interpreter shutdown"):
        client.check_admission()
    client.begin_detach(DETACHED)
    with pytest.raises(RuntimeError, match="interpreter shutdown"):
        client.check_admission()
    client.leave()
    client.note_left()
    assert client.left
    assert client.taken_down


def test_a_client_that_had_ended_before_does_not_mind_the_exit() -> None:
    client = Lifecycle()
    client.fail(BROKEN)
    client.note_exit()
    with pytest.raises(ExecutorBroken):
        client.check_admission()
