"""All the ways in which one client ends its work on a session.

    detach         stores everything, ensures workers; the session continues without this client
    shutdown       on its own thread: waits for every task, stops workers, removes the session
    cleanup        at once: every future ends; the session is marked terminated, or deleted
    Ctrl-C         at once, on a thread no interrupt reaches: workers stop, tasks return to pending
    dropped        the executor was garbage-collected: runs until all is done, then as `shutdown`
    exit           the interpreter exits: as `shutdown` if all is done, else as `detach`

`Lifecycle` decides which of them may still start and which one takes the client down; this module
implements them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable

from starburst_executor.client.dropped import Dropped
from starburst_executor.client.engine import Engine
from starburst_executor.client.interrupts import Uninterrupted
from starburst_executor.coordination import administration
from starburst_executor.errors import (
    ExecutorBroken,
    SessionDetached,
    SessionNotFound,
    SessionTerminated,
    StarburstError,
)
from starburst_executor.protocol.manifest import SessionState

__all__ = ["Ending", "register_at_exit"]

log = logging.getLogger(__name__)

_open: weakref.WeakSet[Ending] = weakref.WeakSet()


class Ending:
    """Ends one client.

    Args:
        engine: The client.
        keep: Whether `shutdown` leaves the session's objects where they are.
    """

    def __init__(self, engine: Engine, *, keep: bool) -> None:
        self._engine = engine
        self._lifecycle = engine.lifecycle
        self._session_id = engine.session.id
        self._keep = keep
        self._thread: threading.Thread | None = None  # of `shutdown`
        self._detaching = threading.RLock()
        self._stopping = Uninterrupted("starburst-stop", self._stop_workers)
        _open.add(self)
        _dropped.watch()

    # --- detach -------------------------------------------------------------------------

    def detach(self) -> str:
        """Implements `StarburstExecutor.detach`."""
        self._engine.check_process()
        with self._detaching:
            if not self._lifecycle.left:
                self._detach()
        return self._session_id

    def _detach(self) -> None:
        if not self._lifecycle.detached:
            detached = self._store_and_refuse()
            self._lifecycle.leave()
            self._engine.stop()
            self._engine.watcher.abandon(detached)
        self._engine.give_back_lane(SessionState.OPEN)
        self._close()
        self._lifecycle.note_left()

    def _store_and_refuse(self) -> SessionDetached:
        """Store everything, ensure workers, and refuse new tasks; undone on failure."""
        detached = SessionDetached(
            f"session {self._session_id} was detached; "
            f"StarburstExecutor.attach({self._session_id!r}) picks it up again"
        )
        # Wait for threads without the lock: their callbacks may submit.
        with self._lifecycle.admission:
            self._lifecycle.check_open()
            self._lifecycle.begin_detach(detached)
        try:
            self._engine.flush()
            with contextlib.suppress(SessionTerminated):  # then nobody is to work for it
                self._engine.autoscaler.need(self._engine.watcher.unfinished)
        except BaseException:
            self._lifecycle.undo_detach()
            raise
        return detached

    # --- shutdown -----------------------------------------------------------------------

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Implements `StarburstExecutor.shutdown`."""
        if self._engine.forked:
            return  # a forked child's copy must not end its parent's session
        self._begin(cancel_futures=cancel_futures, clean=True)
        if wait:
            try:
                self._await()
            except BaseException as interrupt:  # Ctrl-C
                self._stop_at_once()
                self._say_how_to_come_back(interrupt)
                raise

    def leave_block(self, error: BaseException | None) -> None:
        """Implements the end of a `with` block.

        Args:
            error: The exception that the block raised, if any.
        """
        if self._engine.forked or self._lifecycle.detached:
            return
        try:
            if error is None or isinstance(error, Exception):
                self._begin(cancel_futures=False, clean=error is None)
                self._await()
            else:
                self._stop_at_once()
        except BaseException as interrupt:  # Ctrl-C while waiting for tasks
            self._stop_at_once()
            self._say_how_to_come_back(interrupt)
            raise
        if error is not None:
            self._say_how_to_come_back(error)

    def _say_how_to_come_back(self, error: BaseException) -> None:
        if self._lifecycle.gone:
            return
        url = self._engine.session.store.url
        text = (
            f"session {self._session_id} is kept in {url}: "
            f"StarburstExecutor.attach({self._session_id!r}, store={url!r}) picks it "
            f"up, `starburst-executor cleanup --force {self._session_id}` removes it"
        )
        error.add_note(text)
        if not isinstance(error, Exception):
            log.warning("%s", text)  # the notes of a SystemExit are never shown

    def _begin(self, *, cancel_futures: bool, clean: bool) -> None:
        refusal = RuntimeError("cannot schedule new futures after shutdown")
        with self._lifecycle.admission:
            if self._thread is not None:
                return
            thread = threading.Thread(
                target=self._end_when_done,
                args=(cancel_futures, clean and self._lifecycle.refusal is None),
                name="starburst-end",
            )
            try:
                if self._lifecycle.begin_end(thread.start, refusal):
                    self._thread = thread
            except RuntimeError as error:
                if "interpreter shutdown" not in str(error):  # but "can't start new thread"
                    raise
                # Python 3.12 starts none at exit; `_leave_at_exit` ends this one too, or has

    def _await(self) -> None:
        """Wait for the thread that ends the session; not in a callback, which it waits for."""
        if self._thread is not None and threading.current_thread() not in self._engine.threads:
            self._thread.join()

    def _end_when_done(self, cancel_futures: bool, clean: bool) -> None:
        """Wait until all is done, then tear everything down; on its own thread except at exit."""
        try:
            if cancel_futures:
                self._engine.cancel_pending()
            self._engine.wait_until_idle()
            if self._lifecycle.claim():
                self._take_down(clean=clean)
        except SessionNotFound:
            log.info("session %s was removed by another client", self._session_id)
        except (StarburstError, OSError) as error:
            log.error("session %s could not be ended: %s", self._session_id, error)

    def _take_down(self, *, clean: bool) -> None:
        engine = self._engine
        try:
            engine.stop()
            others = engine.others()
            if clean and not self._keep and not others:
                administration.delete(engine.session, engine.launcher)
                self._lifecycle.note_removed()
                return
            if clean and not self._keep:
                log.warning(
                    "session %s is kept: another client is attached to it (%s); "
                    "`starburst-executor cleanup --force %s` removes it",
                    self._session_id, ", ".join(others), self._session_id,
                )  # fmt: skip
            engine.give_back_lane(SessionState.OPEN if others else SessionState.CLOSED)
            # Another client may have submitted tasks that this one does not know of.
            if not others or all(s.done for s in engine.watcher.queue.look()):
                engine.stop_workers()
        finally:
            self._close()

    def _close(self) -> None:
        _open.discard(self)
        self._engine.close()

    # --- at once ------------------------------------------------------------------------

    def cleanup(self, *, force: bool) -> None:
        """Implements `StarburstExecutor.cleanup`."""
        engine = self._engine
        engine.check_process()
        error = SessionTerminated(f"session {self._session_id} was cleaned up")
        if not self._lifecycle.claim(error):
            self._await()
        engine.abandon(error)
        engine.stop()
        try:
            if force:
                administration.delete(engine.session, engine.launcher)
            else:
                administration.terminate(engine.session, engine.launcher)
        finally:
            self._close()

    def _stop_at_once(self) -> None:
        """Stop workers; their tasks return to pending. Safe to interrupt."""
        try:
            self._stopping.run()
        except BaseException:
            log.warning(
                "session %s: interrupted before its workers were known to have stopped; "
                "`starburst-executor cleanup %s` stops those that are left",
                self._session_id, self._session_id,
            )  # fmt: skip
            raise

    def _stop_workers(self) -> None:
        """Runs after an interrupt, on a thread that no interrupt reaches."""
        if not self._lifecycle.claim(RuntimeError("this executor was interrupted")):
            self._await()
            return
        engine = self._engine
        engine.abandon(SessionDetached(f"session {self._session_id} was left by an interrupt"))
        engine.stop()
        try:
            engine.stop_workers()
            engine.give_back_lane(SessionState.CLOSED)
        except (StarburstError, OSError) as failure:
            log.error("session %s: %s", self._session_id, failure)
        self._close()

    # --- dropped ------------------------------------------------------------------------

    def note_dropped(self) -> None:
        """The executor was garbage-collected; called by its finalizer, so takes no lock."""
        # In this order: once the interpreter has ended, modules are gone, and nothing is untended.
        if self._lifecycle.untended and not self._engine.forked:
            _dropped.put(self)

    def outlive(self) -> None:
        """Continue without an executor, and end as `shutdown` does once all is done."""
        _open.add(self)
        unfinished = sum(not future.done() for future in self._engine.registry.living())
        if unfinished:
            log.warning(
                "session %s goes on: its executor was dropped without `shutdown` or `detach` "
                "(unfinished tasks: %d). Workers and session end when those tasks have",
                self._session_id, unfinished,
            )  # fmt: skip
        threading.Thread(target=self._end_when_idle, name="starburst-outlive", daemon=True).start()

    def _end_when_idle(self) -> None:
        self._engine.wait_until_idle()
        if not self._lifecycle.exiting:
            self._begin(cancel_futures=False, clean=True)

    # --- exit ---------------------------------------------------------------------------

    def leave_at_exit(self) -> None:
        """At interpreter exit: remove the session if all is done, else leave it running."""
        engine, lifecycle = self._engine, self._lifecycle
        if engine.forked:
            return
        if self._stopping.begun:
            self._stop_at_once()
            return
        with lifecycle.admission:  # another thread may just be starting the one that ends it
            ending = self._thread
            lifecycle.note_exit()
        if ending is not None:
            ending.join()
            return
        engine.start_no_threads()
        if lifecycle.refusal is not None:
            if isinstance(lifecycle.refusal, ExecutorBroken):
                self._end_when_done(False, clean=False)  # its workers are no longer of use
            return
        if engine.watcher.unfinished or not engine.submitter.idle:
            self._start_last_workers()
            self.detach()
            log.warning(
                "session %s is left running with unfinished tasks; "
                "StarburstExecutor.attach(%r, store=%r) picks it up",
                self._session_id, self._session_id, engine.session.store.url,
            )  # fmt: skip
        else:
            engine.autoscaler.close()
            lifecycle.end_here(RuntimeError("the interpreter has ended"))
            self._end_when_done(False, clean=True)

    def _start_last_workers(self) -> None:
        """Start workers for the last tasks; fails on Python 3.12, which starts none at exit."""
        try:
            self._engine.flush()
            with contextlib.suppress(SessionTerminated):  # then nobody is to work for it
                self._engine.autoscaler.need(self._engine.watcher.unfinished)
        except RuntimeError as error:
            log.warning("no worker could be started, attach will: %s", error)
        self._engine.autoscaler.close()

    def say_left_running(self) -> None:
        """Warn that leaving the session at exit was interrupted."""
        log.warning(
            "session %s: interrupted at interpreter exit, and possibly left running; "
            "StarburstExecutor.attach(%r, store=%r) picks it up, "
            "`starburst-executor cleanup %s` stops its workers",
            self._session_id, self._session_id, self._engine.session.store.url, self._session_id,
        )  # fmt: skip


_dropped: Dropped[Ending] = Dropped(Ending.outlive)


@functools.cache
def register_at_exit() -> None:
    """Have clients end while new threads can still be started.

    `atexit` would be too late: no thread can be started by then, and storing needs some. The
    standard library's executors use this hook for the same reason.
    """
    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]  # noqa: SLF001
    register(_leave_all_at_exit)


def _leave_all_at_exit() -> None:
    interrupt: BaseException | None = None
    for ending in {*_open, *_dropped.take_out()}:
        try:
            ending.leave_at_exit()
        except BaseException as error:  # the other clients must still be ended
            ending.say_left_running()
            interrupt = error
    if interrupt is not None:
        raise interrupt
