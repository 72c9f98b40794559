"""Looks after the jobs that a worker holds: timeouts, cancels, what does not get started, what people are told."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final
from uuid import UUID

from pmqd import live
from pmqd.desk import Desk, Finished, Item
from pmqd.executor import Executor
from pmqd.job import Action, Outcome
from pmqd.retry import JobCancelled, JobTimeout, release

if TYPE_CHECKING:  # the clerk imports this module
    from pmqd.clerk import Post

RELEASE_AFTER_SECONDS: Final = 0.25
"""How long a claimed job may wait in this process before it is given back."""

_TELL_SECONDS: Final = 0.25  # how often progress is told at most


class Overseer:
    """One worker's overseer; the clerk calls it, in its thread."""

    def __init__(self, post: "Post", desk: Desk, executor: Executor) -> None:
        """Takes what the clerk was given, the desk, and who runs the jobs."""
        self._post = post
        self._desk = desk
        self._executor = executor
        self._mode = post.settings.redis.job_status
        self._grace = post.settings.timeout_grace_seconds
        self._events: list[live.Event] = []
        self._told: set[UUID] = set()
        self._reported = 0.0

    def look(self, now: float) -> list[Finished]:
        """Interrupts what runs for too long or is to be cancelled; gives back what was not started in time.

        Args:
            now: monotonic seconds.

        Returns:
            The jobs given back, as settles that are owed.
        """
        running = self._desk.running()
        for item in running:
            self._look_at(item, now)
        late = self._desk.withdraw(now - RELEASE_AFTER_SECONDS)
        return [self.release(item, now) for item in (*late, *self._cancel(running, now))]

    def release(self, item: Item, now: float) -> Finished:
        """The settle that gives a withdrawn job back, uncharged."""
        return Finished(item, release(item.claimed, self._post.worker_id), now)

    def handed_over(self, items: Sequence[Item]) -> None:
        """Jobs that start now; told where all is told."""
        if self._mode == "all":
            for item in items:
                self._tell_runs(item)

    def ended(self, settled: Collection[tuple[Outcome, str]]) -> None:
        """Outcomes that PostgreSQL has, with the status of their rows."""
        self._executor.forget_reports(outcome.job_id for outcome, _ in settled)
        if self._mode != "off":
            self._events += [
                live.ended(outcome, status) for outcome, status in settled if self._worth_telling(outcome)
            ]

    def events(self, now: float) -> list[live.Event]:
        """What is to be told now, in order."""
        reports: list[live.Event] = []
        if self._mode != "off" and now - self._reported >= _TELL_SECONDS:
            reports = self._executor.reports()
            self._reported = now
            self._told |= {event.job_id for event in reports}
        events, self._events = [*reports, *self._events], []
        return events

    def _look_at(self, item: Item, now: float) -> None:
        age = now - item.started
        attempt = item.attempt
        if attempt is not None and age >= item.timeout:
            attempt.interrupt(JobTimeout, f"ran longer than its timeout of {item.timeout:g} s")
        elif attempt is not None:
            attempt.strike()  # where it was asked for while it could not be done
        if age >= live.SLOW_SECONDS and self._mode == "lazy":
            self._tell_runs(item)

    def _cancel(self, running: Sequence[Item], now: float) -> list[Item]:
        """Interrupts running jobs whose end was asked for. Returns those that had not started, taken back."""
        cancels = set(self._post.arena.cancels)
        if not cancels:
            return []
        for item in running:
            attempt = item.attempt
            if (item.claimed.id, item.claimed.token) in cancels and attempt and attempt.wanted is None:
                self._desk.hurry(item, min(now, item.started + item.timeout) + self._grace)
                attempt.interrupt(JobCancelled, "its end was asked for")
        return self._desk.withdraw_jobs(cancels)

    def _tell_runs(self, item: Item) -> None:
        if not item.told:
            item.told = True
            self._told.add(item.claimed.id)
            self._events.append(live.processing(item.claimed, self._post.worker_id))

    def _worth_telling(self, outcome: Outcome) -> bool:
        """Whether anybody was told of the job, or will be: most jobs are over before that."""
        if self._told and outcome.job_id in self._told:
            self._told.discard(outcome.job_id)
            return True
        if self._mode == "all":
            return True
        if outcome.attempt_number > 1 or outcome.duration_seconds >= live.SLOW_SECONDS:
            return True
        return outcome.action is Action.RETRY or outcome.action is Action.SNOOZE
