"""The live status of jobs in Redis, `job:ID`, for people: which event writes what, and how long it is kept. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from uuid import UUID

from pmqd import resp
from pmqd.job import Action, Claimed, Job, Outcome, Status, moment

SLOW_SECONDS: Final = 0.1
"""With `job_status = "lazy"` a job that runs for longer than this is written."""

_AFTER_END_SECONDS: Final = 60
_UNFINISHED_SECONDS: Final = 3600  # what is kept of a job whose end nobody tells (its worker died)


@dataclass(slots=True)
class Event:
    """One change of a job's live status, made for every job where all is told; never changed.

    Attributes:
        job_id: The job.
        status: What people see; None forgets it.
        fields: More fields of the hash and their values, as words of a command.
        count: How many fields.
        keep_seconds: When it is forgotten by itself.
    """

    job_id: UUID
    status: str | None
    fields: str = ""
    count: int = 0
    keep_seconds: int = _UNFINISHED_SECONDS


def migrated(job_id: UUID, queue_name: str, priority: int, at: float) -> Event:
    """The hint of a job has been pushed.

    Args:
        job_id: The job.
        queue_name: Its queue.
        priority: Its priority.
        at: When (seconds since 1970).
    """
    fields = _words(("queue_name", queue_name), ("priority", priority)) + _time("migrated_at", at)
    return Event(job_id, "migrated", fields, 3)


def processing(claimed: Claimed, worker_id: str) -> Event:
    """A job runs. To be told once it has run for `SLOW_SECONDS`, with `job_status = "all"` as soon as it is seen to.

    Args:
        claimed: The row.
        worker_id: Who runs it.
    """
    fields, count = _about(claimed, worker_id)
    return Event(claimed.id, "processing", fields + _time("started_at", claimed.claimed_at), count + 1)


def progress(job: Job, fraction: float, note: str) -> Event:
    """A job has reported how far it is.

    Args:
        job: The job.
        fraction: 0.0 to 1.0.
        note: A few words.
    """
    fields = _words(("progress", f"{fraction:.4g}"), ("note", note))
    return Event(job.id, "processing", _of(job.queue_name, job.worker_id, job.attempt_count) + fields, 5)


def ended(outcome: Outcome, new_status: str, claimed: Claimed | None = None) -> Event:
    """A settle was acknowledged.

    Args:
        outcome: What was settled.
        new_status: What the settle made of the row.
        claimed: The row, where nobody was told yet that it ran: both is told at once.
    """
    if new_status == Status.QUEUED and outcome.action not in {Action.RETRY, Action.SNOOZE}:
        return Event(outcome.job_id, None)
    if claimed is not None:
        fields, count = _about(claimed, outcome.worker_id)
    else:
        fields, count = _of(outcome.queue_name, outcome.worker_id, outcome.attempt_number), 3
    if outcome.started is not None:
        fields += _time("started_at", outcome.started)
        fields += _time("finished_at", outcome.started + outcome.duration_seconds)
        count += 2
    if new_status != Status.QUEUED:
        return Event(outcome.job_id, new_status, fields, count, _AFTER_END_SECONDS)
    keep = int(outcome.delay_seconds) + _AFTER_END_SECONDS
    return Event(outcome.job_id, "retry_scheduled", fields, count, keep)


def commands(events: Iterable[Event], prefix: str) -> tuple[str, int]:
    """What writes them to `job:ID`.

    Args:
        events: In their order.
        prefix: `redis.prefix`.

    Returns:
        Commands for `pmqd.resp.send`, and how many.
    """
    made: list[str] = []
    count = 0
    for event in events:
        key = resp.bulk(f"{prefix}job:{event.job_id}")
        if event.status is None:
            made.append(f"*2\r\n$3\r\nDEL\r\n{key}")
            count += 1
        else:
            status, keep = resp.bulk(event.status), resp.bulk(str(event.keep_seconds))
            hset = f"*{4 + 2 * event.count}\r\n$4\r\nHSET\r\n{key}$6\r\nstatus\r\n{status}{event.fields}"
            made.append(f"{hset}*3\r\n$6\r\nEXPIRE\r\n{key}{keep}")
            count += 2
    return "".join(made), count


def _about(claimed: Claimed, worker_id: str) -> tuple[str, int]:
    """What is known of a job that was claimed."""
    of = _of(claimed.queue_name, worker_id, claimed.attempt_count)
    return of + _limits(claimed.priority, claimed.max_attempts) + _time("created_at", claimed.created_at), 6


@lru_cache(maxsize=1024)
def _of(queue_name: str, worker_id: str, attempt: int) -> str:
    return _words(("queue_name", queue_name), ("worker_id", worker_id), ("attempt_count", attempt))


@lru_cache(maxsize=1024)
def _limits(priority: int, max_attempts: int) -> str:
    return _words(("priority", priority), ("max_attempts", max_attempts))


def _words(*fields: tuple[str, str | int]) -> str:
    return "".join(resp.bulk(name) + resp.bulk(str(value)) for name, value in fields)


def _time(name: str, seconds: float) -> str:
    """A field with a time: as `isoformat` of the aware one, in a third of the time."""
    whole, microseconds = divmod(round(seconds * 1e6), 1_000_000)
    return f"${len(name)}\r\n{name}\r\n$32\r\n{_second(whole)}.{microseconds:06d}+00:00\r\n"


@lru_cache(maxsize=256)
def _second(whole: int) -> str:
    return moment(whole).replace(tzinfo=None).isoformat()
