"""The live status of jobs in Redis, `job:ID`, for people: which event writes what, and how long it is kept. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final
from uuid import UUID

from pmqd import resp
from pmqd.job import Action, Claimed, Job, Outcome, Status, moment

SLOW_SECONDS: Final = 0.1
"""With `job_status = "lazy"` a job that runs for longer than this is written."""

_AFTER_END_SECONDS: Final = 60
_UNFINISHED_SECONDS: Final = 3600  # what is kept of a job whose end nobody tells (its worker died)


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a job's live status; `status` None forgets it."""

    job_id: UUID
    status: str | None
    fields: tuple[tuple[str, str], ...] = ()
    keep_seconds: int = _UNFINISHED_SECONDS


def migrated(job_id: UUID, queue_name: str, priority: int, at: datetime) -> Event:
    """The hint of a job has been pushed.

    Args:
        job_id: The job.
        queue_name: Its queue.
        priority: Its priority.
        at: When.
    """
    fields = (("queue_name", queue_name), ("priority", str(priority)), ("migrated_at", at.isoformat()))
    return Event(job_id, "migrated", fields)


def processing(claimed: Claimed, worker_id: str) -> Event:
    """A job runs. To be told once it has run for `SLOW_SECONDS`, with `job_status = "all"` as soon as it is seen to.

    Args:
        claimed: The row.
        worker_id: Who runs it.
    """
    return Event(
        claimed.id, "processing", (*_about(claimed, worker_id), ("started_at", _time(claimed.claimed_at)))
    )


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
    return Event(job.id, "processing", fields)


def ended(outcome: Outcome, new_status: str, claimed: Claimed | None = None) -> Event:
    """A settle was acknowledged.

    Args:
        outcome: What was settled.
        new_status: What the settle made of the row.
        claimed: The row, where nobody was told yet that it ran: both is told at once.
    """
    if new_status == Status.QUEUED and outcome.action not in {Action.RETRY, Action.SNOOZE}:
        return Event(outcome.job_id, None)
    fields = _about(claimed, outcome.worker_id) if claimed is not None else _of(outcome)
    if outcome.started is not None:
        finished = outcome.started + outcome.duration_seconds
        fields += ("started_at", _time(outcome.started)), ("finished_at", _time(finished))
    if new_status != Status.QUEUED:
        return Event(outcome.job_id, new_status, fields, _AFTER_END_SECONDS)
    keep = int(outcome.delay_seconds) + _AFTER_END_SECONDS
    return Event(outcome.job_id, "retry_scheduled", fields, keep)


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
            made += "*2\r\n$3\r\nDEL\r\n", key
            count += 1
        else:
            made += f"*{4 + 2 * len(event.fields)}\r\n$4\r\nHSET\r\n", key, _pair("status", event.status)
            made += [_pair(*field) for field in event.fields]
            made += "*3\r\n$6\r\nEXPIRE\r\n", key, resp.bulk(str(event.keep_seconds))
            count += 2
    return "".join(made), count


def _about(claimed: Claimed, worker_id: str) -> tuple[tuple[str, str], ...]:
    return (
        ("queue_name", claimed.queue_name),
        ("priority", str(claimed.priority)),
        ("attempt_count", str(claimed.attempt_count)),
        ("max_attempts", str(claimed.max_attempts)),
        ("created_at", _time(claimed.created_at)),
        ("worker_id", worker_id),
    )


def _of(outcome: Outcome) -> tuple[tuple[str, str], ...]:
    return (
        ("queue_name", outcome.queue_name),
        ("worker_id", outcome.worker_id),
        ("attempt_count", str(outcome.attempt_number)),
    )


def _time(seconds: float) -> str:
    """As `isoformat` of the aware time, in a third of the time."""
    whole, microseconds = divmod(round(seconds * 1e6), 1_000_000)
    return f"{_second(whole)}.{microseconds:06d}+00:00"


@lru_cache(maxsize=256)
def _second(whole: int) -> str:
    return moment(whole).replace(tzinfo=None).isoformat()


def _pair(name: str, value: str) -> str:
    return _name(name) + resp.bulk(value)


_name = lru_cache(maxsize=64)(resp.bulk)
