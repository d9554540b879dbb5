"""The rules of the protocol, each with the mutant that does without it and the test that notices.

`python -m tests.simulation.mutate` plays them all; `test_mutants` does so in the suite. Whoever
adds a rule adds its mutant here.
"""

from __future__ import annotations

from tests.simulation.kernel import Fault
from tests.simulation.mutation import Edit, Mutant

__all__ = ["MUTANTS"]


def mutant(
    name: str,
    where: str,
    old: str,
    new: str,
    killer: str,
    cases: tuple[tuple[object, ...], ...] = ((),),
) -> Mutant:
    """One that takes a single edit."""
    return Mutant(name, (Edit(where, old, new),), killer, cases)


OUTCOMES = (
    mutant(
        "the fence on the attempt dropped",
        "protocol.transitions:_holds",
        "task.attempt == attempt and ",
        "",
        "test_an_end_is_refused_though_the_same_worker_holds_a_later_attempt",
    ),
    mutant(
        "an attempt ends without any fence",
        "protocol.transitions:_finish",
        "if not _holds(task, finish.attempt):",
        "if False:",
        "test_a_result_stored_by_an_attempt_that_was_given_up_is_never_taken",
    ),
    mutant(
        "writes carry no nonce of their own",
        "protocol.session:Session._write",
        "nonce=self.runtime.new_id(8)",
        'nonce="same"',
        "test_running_tasks_go_on_while_the_store_is_away_for_a_minute",
    ),
    mutant(
        "a record that vanished is created anew",
        "protocol.session:Session._write",
        'raise SessionTerminated(f"session {self.id} is being deleted") from error',
        "return VersionedRecord(record, self.store.create(key, data), len(data))",
        "test_an_end_that_comes_after_the_deletion_is_not_stored",
    ),
    mutant(
        "a record that vanished is taken for one that never was",
        "worker.claiming:Claimer._read_newer",
        "if known.version is None:",
        "if False:",
        "test_a_record_that_vanished_is_not_taken_for_one_that_was_never_there",
    ),
    mutant(
        "the watcher remembers a record whose outcomes it could not have",
        "client.settling:Settling._take_in",
        "if len(settled) == len(ended):",
        "if True:",
        "test_an_outcome_that_could_not_be_had_is_asked_for_again_while_its_batch_goes_on",
    ),
)

CLAIMS = (
    mutant(
        "a claim in doubt is forgotten",
        "worker.committing:Committer._doubt",
        "assignment.doubt = set()",
        "pass",
        "test_a_claim_that_lands_long_after_its_worker_went_elsewhere_is_found",
    ),
    mutant(
        "a doubt ends before the version has changed",
        "worker.assignment:Assignment._settle_doubt",
        "len(self.doubt) > 1",
        "self.doubt",
        "test_a_claim_that_lands_long_after_its_worker_went_elsewhere_is_found",
    ),
    mutant(
        "a worker never reads what it holds",
        "worker.dispatch:Dispatcher.refresh_held",
        "if not assignment.settled:",
        "if False:",
        "test_the_cancel_of_a_running_task_is_seen_at_the_next_beat",
    ),
    mutant(
        "a worker goes on with what the record no longer gives it",
        "worker.committing:Committer.accept",
        "self._pool.kill(key)",
        "pass",
        "test_the_cancel_of_a_running_task_is_seen_at_the_next_beat",
    ),
    mutant(
        "new tasks begin without a heartbeat",
        "worker.dispatch:Dispatcher._may_start",
        "not self.paused and self._heartbeats.silent() <= lease / 2 and ",
        "",
        "test_what_waits_in_a_child_does_not_begin_while_no_heartbeat_gets_through",
    ),
    mutant(
        "what a child has not begun stays with it while no heartbeat gets through",
        "worker.dispatch:Dispatcher.check_lease",
        "self._withdraw(assignment, list(assignment.dispatched.values()))",
        "pass",
        "test_what_waits_in_a_child_does_not_begin_while_no_heartbeat_gets_through",
    ),
    mutant(
        "a worker that has enough to do looks on, at later batches",
        "worker.claiming:Claimer._look_and_claim",
        "if assignment is not None and self._planner.full():",
        "if False:",
        "test_four_workers_overtake_only_what_another_of_them_has_claimed",
        ((1,), (0.3,)),
    ),
    mutant(
        "what waits behind a long task is never handed back",
        "worker.planner:ClaimPlanner.stuck",
        "if self.free:",
        "if True:",
        "test_what_waits_behind_a_task_that_turned_out_long_is_handed_back",
    ),
    mutant(
        "what was taken from a child counts as being there",
        "worker.dispatch:Dispatcher._withdraw",
        "assignment.waiting[key.position] = assignment.dispatched.pop(key.position)",
        "pass",
        "test_what_could_not_be_handed_back_at_once_is_handed_back_later",
        ((Fault.UNAVAILABLE,), (Fault.NO_MEMORY,)),
    ),
)

LOSSES = (
    mutant(
        "lost on one look",
        "coordination.recovery:LeaseTracker._judge_silent",
        "if seen is None or seen.version != version:",
        "if seen is None: seen = _Watched(version, -math.inf)\n    if seen.version != version:",
        "test_one_look_gives_nobody_up_when_a_laptop_wakes_before_its_workers",
    ),
    mutant(
        "two looks without time between",
        "coordination.recovery:LeaseTracker._judge_silent",
        "elif now - seen.since >= self._half:",
        "else:",
        "test_two_looks_in_quick_succession_give_nobody_up",
    ),
    mutant(
        "a looker that slept keeps its suspicion",
        "coordination.recovery:LeaseTracker.look",
        "self._watched.clear()",
        "pass",
        "test_what_was_suspected_before_a_sleep_is_not_held_against_anybody_after_it",
    ),
    mutant(
        "a heartbeat that came between two looks is not noticed",
        "coordination.recovery:LeaseTracker._judge_silent",
        " or seen.version != version",
        "",
        "test_a_heartbeat_between_two_looks_clears_a_worker",
    ),
    mutant(
        "what the launcher says of ended workers is ignored",
        "coordination.recovery:LeaseTracker.look",
        "for worker in ended if",
        "for worker in () if",
        "test_what_an_ended_worker_held_begins_again_within_seconds",
    ),
    mutant(
        "heartbeats removed before records are mended",
        "coordination.recovery:Recovery.look",
        "for sight in unfinished:",
        "self._bury(lost, beats)\n    for sight in unfinished:",
        "test_a_heartbeat_outlives_what_its_worker_held_though_the_repairer_dies",
    ),
    mutant(
        "whoever requeues leaves the marker to readers",
        "coordination.recovery:Recovery._requeue",
        "self._session.mark(batch, known.record)",
        "pass",
        "test_what_was_requeued_is_claimed_with_the_next_look",
    ),
    mutant(
        "whoever hands back leaves the marker to readers",
        "worker.committing:Committer.commit",
        "self.mark(assignment, None if",
        "releases or self.mark(assignment, None if",
        "test_what_was_handed_back_is_claimed_with_the_next_look",
    ),
    mutant(
        "a reader writes no marker that is missing",
        "coordination.recovery:Recovery._mend",
        "elif sight.record is not None",
        "elif False",
        "test_a_hand_back_that_dies_between_record_and_marker_is_found",
    ),
    mutant(
        "a claimer writes no marker that is missing",
        "worker.claiming:Claimer._mark_drained",
        "self._committer.mark(assignment)",
        "pass",
        "test_a_missing_marker_is_written_by_the_next_reader",
    ),
    mutant(
        "a loss counts when only claimed",
        "protocol.transitions:_back",
        "(lost and running)",
        "lost",
        "test_only_what_ran_counts_as_lost_with_its_worker",
    ),
    mutant(
        "a hand-back counts as a loss",
        "protocol.transitions:_back",
        "lost = how is Interruption.LOST",
        "lost = True",
        "test_hand_backs_never_fail_a_task",
    ),
    mutant(
        "what was lost is claimed beside others",
        "protocol.transitions:_choose",
        "if not task.lost:",
        "if True:",
        "test_only_what_ran_counts_as_lost_with_its_worker",
    ),
    mutant(
        "a last chance is taken beside other tasks",
        "protocol.transitions:advance",
        "math.inf if update.solo else update.last_chance",
        "math.inf",
        "test_a_task_at_its_last_chance_is_held_alone",
    ),
    mutant(
        "a last chance is taken beside ends that are not written",
        "worker.planner:ClaimPlanner.solo",
        " or one.uploading or (one.ended and one is not hold)",
        "",
        "test_what_ended_and_is_not_written_is_not_held_beside_a_last_chance",
    ),
    mutant(
        "a worker at a last chance claims more",
        "worker.planner:ClaimPlanner._last_chance_held",
        "(task := hold.task(key)).lost > 0 and task.losses >= self.last_chance",
        "False",
        "test_a_task_at_its_last_chance_is_held_alone",
    ),
    mutant(
        "what was lost begins before its start is written",
        "worker.committing:Committer.record_start",
        "if not assignment.task(key).lost or not assignment.claimed(key):",
        "if True:",
        "test_a_poison_task_whose_blob_must_be_fetched_is_blamed",
    ),
)

WHO_IS_THERE = (
    mutant(
        "an idle worker leaves without a last look",
        "worker.loop:Worker._leave_idle",
        "if self._membership.may_leave():",
        "if True:",
        "test_an_idle_worker_that_leaves_does_not_miss_what_is_submitted_and_left",
        tuple((offset,) for offset in range(0, 60, 3)),
    ),
    mutant(
        "a worker looks once more before it takes itself off the list",
        "worker.loop:Worker._leave_idle",
        "self._session.patiently(partial(self._say_goodbye, reason))\n"
        "    if self._membership.may_leave():\n",
        "may_leave = self._membership.may_leave()\n"
        "    self._session.patiently(partial(self._say_goodbye, reason))\n"
        "    if may_leave:\n",
        "test_an_idle_worker_that_leaves_does_not_miss_what_is_submitted_and_left",
        tuple((offset,) for offset in range(0, 60, 3)),
    ),
    mutant(
        "a heartbeat may be under way when its worker says goodbye",
        "worker.loop:Worker._leave",
        "self.heartbeats.pause()",
        "pass",
        "test_no_heartbeat_lands_after_the_goodbye",
    ),
    mutant(
        "a heartbeat is deleted before the goodbye is written",
        "protocol.session:Session.bury",
        'self.store.put(self.key(f"ended/{heartbeat.worker}"), codec.encode(heartbeat))',
        'self.store.delete([self.key(f"workers/{heartbeat.worker}")])\n'
        '    self.store.put(self.key(f"ended/{heartbeat.worker}"), codec.encode(heartbeat))',
        "test_a_worker_between_its_heartbeat_and_its_goodbye_is_not_taken_for_a_young_one",
    ),
    mutant(
        "processes are counted instead of heartbeats",
        "coordination.autoscaler:Autoscaler._heard",
        "(possibly & known)",
        "known",
        "test_a_worker_whose_process_outlives_its_goodbye_is_not_counted_on",
        tuple((offset, 30.0) for offset in range(0, 60, 6)),
    ),
    mutant(
        "a process is young for ever",
        "coordination.autoscaler:Autoscaler._unheard_of",
        "at >= since",
        "True",
        "test_a_worker_that_never_gets_to_its_first_heartbeat_is_replaced",
    ),
    mutant(
        "heartbeats are not counted while enough processes are there",
        "coordination.autoscaler:Autoscaler._fill",
        " and now < self._next_count",
        "",
        "test_a_worker_that_was_stopped_for_ever_is_replaced",
    ),
    mutant(
        "nobody stays while something is unfinished",
        "worker.membership:decide",
        "attends=unfinished and (rank < 2 or rank < least)",
        "attends=False",
        "test_the_first_two_workers_stay_while_a_long_task_runs_and_finish_it_if_lost",
    ),
    mutant(
        "workers beyond the wanted number stay",
        "worker.membership:decide",
        "surplus=rank >= wanted",
        "surplus=False",
        "test_workers_beyond_the_wanted_number_leave_when_idle",
    ),
    mutant(
        "workers are started without taking the turn",
        "coordination.autoscaler:Autoscaler._launch_with_lease",
        "if not self._lease.take(_LEASE_SECONDS + count / _LAUNCHES_PER_SECOND):",
        "if False:",
        "test_two_clients_that_see_the_same_lack_start_its_workers_once",
        ((5.0,),),
    ),
    mutant(
        "whoever has the turn does not look again who is there",
        "coordination.autoscaler:Autoscaler._launch_with_lease",
        "(known or set()) - seen",
        "set()",
        "test_a_client_held_up_between_count_and_turn_starts_none_beside_those_of_another",
    ),
    mutant(
        "whoever has left counts as new when its start is shown late",
        "coordination.autoscaler:Autoscaler._launch_with_lease",
        "others -= self._session.buried()",
        "pass",
        "test_a_worker_that_shows_only_after_it_has_left_is_not_taken_for_a_new_one",
    ),
    mutant(
        "whoever detaches does not wait for the turn of another",
        "coordination.autoscaler:Autoscaler.need",
        "self._session.runtime.signal().wait(self._session.runtime.random.uniform(0.5, 1.0))",
        "return",
        "test_a_client_that_detaches_waits_until_the_turn_of_another_is_over",
    ),
    mutant(
        "the turn of a process that died never ends",
        "coordination.launch_lease:LaunchLease._is_free",
        " or stored.age >= stored.value.seconds",
        "",
        "test_the_turn_of_a_process_that_died_ends_by_itself",
    ),
)

ENDS = (
    mutant(
        "session.json is deleted first",
        "coordination.administration:delete",
        'session.store.delete(key for key in keys if key.endswith("/tasks"))\n',
        'session.store.delete([session.key("session.json")])\n'
        '        session.store.delete(key for key in keys if key.endswith("/tasks"))\n',
        "test_a_deletion_that_dies_leaves_a_session_that_can_be_deleted",
        ((1,), (2,)),
    ),
    mutant(
        "records are deleted before tasks",
        "coordination.administration:delete",
        'session.store.delete(key for key in keys if key.endswith("/tasks"))\n',
        "session.store.delete(\n"
        '            key for key in keys if not key.endswith(("/tasks", "session.json"))\n'
        "        )\n",
        "test_a_worker_that_starts_in_mid_deletion_runs_nothing_again",
    ),
    mutant(
        "a session is deleted without listing it again",
        "coordination.administration:delete",
        "while entries := session.list_all(session.prefix)[0]:",
        "for entries in [session.list_all(session.prefix)[0]]:",
        "test_what_lands_during_a_deletion_is_deleted_too",
    ),
    mutant(
        "a session is deleted without waiting for its workers",
        "coordination.administration:delete",
        "_await_workers(session, intervals, launcher)",
        "pass",
        "test_a_deletion_waits_for_workers_that_nobody_can_stop",
    ),
    mutant(
        "a session is deleted before it is marked terminated",
        "coordination.administration:delete",
        "session.amend(_terminated).intervals",
        "session.check_open().intervals",
        "test_a_deletion_waits_for_workers_that_nobody_can_stop",
    ),
    mutant(
        "a terminated session is worked for",
        "worker.session_check:SessionCheck.check",
        "if self.manifest.state is SessionState.TERMINATED:",
        "if False:",
        "test_nothing_begins_a_minute_after_its_session_was_terminated",
    ),
    mutant(
        "workers are started for a terminated session",
        "coordination.autoscaler:Autoscaler._launch_with_lease",
        "self.manifest = self._session.check_open()",
        "self.manifest = self._session.load()",
        "test_no_worker_is_started_for_a_session_terminated_meanwhile",
    ),
    mutant(
        "a lane in doubt is given back",
        "client.submitter:Submitter._store_group",
        "self.certain = False",
        "pass",
        "test_a_lane_in_doubt_is_never_taken_again",
    ),
    mutant(
        "a lane is given back although another has it by now",
        "protocol.lanes:give_back",
        "if holders[0] == holders[-1]:",
        "if True:",
        "test_a_lane_given_back_twice_is_not_taken_from_who_has_it_now",
    ),
    mutant(
        "a gap does not end the finished prefix",
        "protocol.listing:QueueReader._note",
        "progress.add(batch.number, batch.end, Totals(*listing.done))",
        "progress.add(0, batch.end, Totals(*listing.done))",
        "test_a_batch_whose_put_is_slow_in_mid_flush_is_still_found",
    ),
)

MUTANTS = (*OUTCOMES, *CLAIMS, *LOSSES, *WHO_IS_THERE, *ENDS)
