"""The live status of jobs in Redis, `job:ID`, for people: which event writes what, and how long it is kept. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from pmqd.job import Action, Claimed, Job, Outcome, Status, moment

SLOW_SECONDS: Final = 0.1
"""With `job_status = "lazy"` a job that runs for longer than this is written."""

_AFTER_END_SECONDS: Final = 60
_UNFINISHED_SECONDS: Final = 3600  # what is kept of a job whose end nobody tells (its worker died)
_TOLD_MOST: Final = 10_000
_RECENT_SECONDS: Final = 3600
_RECENT_MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a job's live status; `status` None forgets it."""

    job_id: UUID
    queue_name: str
    status: str | None
    fields: tuple[tuple[str, str], ...] = ()
    keep_seconds: int = _UNFINISHED_SECONDS
    notable: bool = True  # also told when only what is slow, retried or reported is


def migrated(job_id: UUID, queue_name: str, priority: int, at: datetime) -> Event:
    """The hint of a job has been pushed.

    Args:
        job_id: The job.
        queue_name: Its queue.
        priority: Its priority.
        at: When.
    """
    fields = (("queue_name", queue_name), ("priority", str(priority)), ("migrated_at", at.isoformat()))
    return Event(job_id, queue_name, "migrated", fields, notable=False)


def processing(claimed: Claimed, worker_id: str) -> Event:
    """A job runs. With `job_status = "lazy"` to be told once it has run for `SLOW_SECONDS`, with "all" at its start.

    Args:
        claimed: The row.
        worker_id: Who runs it.
    """
    return Event(claimed.id, claimed.queue_name, "processing", (*_about(claimed), ("worker_id", worker_id)))


def progress(job: Job, fraction: float, note: str) -> Event:
    """A job has reported how far it is.

    Args:
        job: The job.
        fraction: 0.0 to 1.0.
        note: A few words.
    """
    fields = (
        ("queue_name", job.queue_name),
        ("worker_id", job.worker_id),
        ("attempt_count", str(job.attempt_count)),
        ("progress", f"{fraction:.4g}"),
        ("note", note),
    )
    return Event(job.id, job.queue_name, "processing", fields)


def ended(outcome: Outcome, new_status: str) -> Event:
    """A settle was acknowledged.

    Args:
        outcome: What was settled.
        new_status: What the settle made of the row.
    """
    fields = [
        ("queue_name", outcome.queue_name),
        ("worker_id", outcome.worker_id),
        ("attempt_count", str(outcome.attempt_number)),
    ]
    if outcome.started is not None:
        finished = outcome.started + outcome.duration_seconds
        fields += [("started_at", _time(outcome.started)), ("finished_at", _time(finished))]
    slow = outcome.attempt_number > 1 or outcome.duration_seconds >= SLOW_SECONDS
    if new_status != Status.QUEUED:
        return Event(outcome.job_id, outcome.queue_name, new_status, tuple(fields), _AFTER_END_SECONDS, slow)
    if outcome.action not in {Action.RETRY, Action.SNOOZE}:
        return Event(outcome.job_id, outcome.queue_name, None, notable=slow)
    keep = int(outcome.delay_seconds) + _AFTER_END_SECONDS
    return Event(outcome.job_id, outcome.queue_name, "retry_scheduled", tuple(fields), keep)


class Telling:
    """Which events are written, by `redis.job_status`, and as which operations of `lua/tell.lua`."""

    def __init__(self, mode: str, prefix: str) -> None:
        """Takes `redis.job_status` ("lazy", "all", "off") and `redis.prefix`."""
        self._mode = mode
        self._prefix = prefix
        self._told: set[UUID] = set()  # jobs that run here and whose hash this process has written

    def operations(self, events: Sequence[Event]) -> tuple[list[str], list[Any]]:
        """The keys and arguments of the script; no keys when nothing is to be written."""
        keys: list[str] = []
        arguments: list[Any] = []
        recent: dict[str, list[str]] = {}
        for event in events:
            if not self._wanted(event):
                continue
            keys.append(f"{self._prefix}job:{event.job_id}")
            arguments += _hash_operation(event)
            if event.status == "migrated":
                recent.setdefault(event.queue_name, []).append(str(event.job_id))
        for name, ids in recent.items():
            keys.append(f"{self._prefix}recent_jobs:{name}")
            arguments += ["s", _RECENT_SECONDS, _RECENT_MOST, len(ids), *ids]
        return keys, arguments

    def _wanted(self, event: Event) -> bool:
        if self._mode == "off":
            return False
        known = event.job_id in self._told
        if event.status == "processing":
            if len(self._told) >= _TOLD_MOST:  # ends that were refused are never told here
                self._told.clear()
            self._told.add(event.job_id)
        else:
            self._told.discard(event.job_id)
        return self._mode == "all" or event.notable or known


def _about(claimed: Claimed) -> tuple[tuple[str, str], ...]:
    return (
        ("queue_name", claimed.queue_name),
        ("priority", str(claimed.priority)),
        ("attempt_count", str(claimed.attempt_count)),
        ("max_attempts", str(claimed.max_attempts)),
        ("created_at", _time(claimed.created_at)),
        ("started_at", _time(claimed.claimed_at)),
    )


def _time(seconds: float) -> str:
    return moment(seconds).isoformat()


def _hash_operation(event: Event) -> list[Any]:
    if event.status is None:
        return ["d"]
    fields = [part for pair in (("status", event.status), *event.fields) for part in pair]
    return ["h", event.keep_seconds, len(fields), *fields]
