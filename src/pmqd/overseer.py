"""Looks after the jobs that a worker holds: timeouts, cancels, what does not get started, what people are told."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final
from uuid import UUID

from pmqd import live
from pmqd.desk import Desk, Finished, Item
from pmqd.executor import Executor
from pmqd.job import Action
from pmqd.retry import JobCancelled, JobTimeout, release

if TYPE_CHECKING:  # the clerk imports this module
    from pmqd.clerk import Post

RELEASE_AFTER_SECONDS: Final = 0.25
"""How long a claimed job may wait in this process before it is given back."""

_TELL_SECONDS: Final = 0.25  # how often progress is told at most
_TOLD_MOST: Final = 10_000


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
        self._told: set[UUID] = set()  # jobs that have reported how far they are
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

    def ended(self, settled: Collection[tuple[Finished, str]]) -> None:
        """Outcomes that PostgreSQL has, with the status of their rows."""
        self._executor.forget_reports(each.outcome.job_id for each, _ in settled)
        if self._mode != "off":
            self._events += [
                self._end_of(each, status) for each, status in settled if self._worth_telling(each)
            ]

    def events(self, now: float) -> list[live.Event]:
        """What is to be told now, in order."""
        reports: list[live.Event] = []
        if self._mode != "off" and now - self._reported >= _TELL_SECONDS:
            reports = self._executor.reports()
            self._reported = now
            if len(self._told) > _TOLD_MOST:  # ends that were refused are never told
                self._told.clear()
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
        if not item.told and (self._mode == "all" or (self._mode == "lazy" and age >= live.SLOW_SECONDS)):
            item.told = True
            self._events.append(live.processing(item.claimed, self._post.worker_id))

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

    def _end_of(self, each: Finished, status: str) -> live.Event:
        news = each.item.claimed if each.item is not None and not each.item.told else None
        return live.ended(each.outcome, status, news)

    def _worth_telling(self, each: Finished) -> bool:
        """Whether anybody was told of the job, or will be: most jobs are over before that."""
        outcome = each.outcome
        if self._told and outcome.job_id in self._told:
            self._told.discard(outcome.job_id)
            return True
        if self._mode == "all" or (each.item is not None and each.item.told):
            return True
        if outcome.attempt_number > 1 or outcome.duration_seconds >= live.SLOW_SECONDS:
            return True
        return outcome.action is Action.RETRY or outcome.action is Action.SNOOZE
