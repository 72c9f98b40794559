"""Between records and rows: the parameters of the larger statements, and their answers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

import psycopg

from pmqd.job import BAND_RANGES, Claimed, Outcome
from pmqd.store_session import span
from pmqd.store_types import Fate, QueuePulse, Rescued

Order = Literal["bands", "queues"]


def stretches(queues: Sequence[str], order: Order) -> list[tuple[str, int, int]]:
    """The stretches of priorities that a steal looks at, best first: (queue, lowest, highest)."""
    bands = list(BAND_RANGES.values())
    if order == "bands":
        return [(name, low, high) for low, high in bands for name in queues]
    return [(name, bands[0][0], bands[-1][1]) for name in queues]


def claim_parameters(ids: Sequence[UUID], token: UUID, worker_id: str, instance_id: UUID) -> dict[str, Any]:
    """The parameters of `claim.sql`."""
    return {
        "ids": list(ids),
        **span(ids),
        "token": token,
        "worker_id": worker_id,
        "instance_id": instance_id,
    }


def claimed_rows(cursor: psycopg.Cursor[Any], token: UUID) -> list[Claimed]:
    """What a claim or steal won."""
    return [
        Claimed(
            id=row[0],
            queue_name=row[1],
            kind=row[2],
            priority=row[3],
            payload=row[4],
            attempt_count=row[5],
            interruptions=row[6],
            max_attempts=row[7],
            run_at=row[8],
            created_at=row[9],
            tags=tuple(row[10]),
            alone=row[11],
            token=token,
            claimed_at=row[12],
        )
        for row in cursor.fetchall()
    ]


def settle_parameters(outcomes: Sequence[Outcome], closed_tokens: Iterable[UUID]) -> dict[str, Any]:
    """The parameters of `settle.sql` and `settled_ids.sql`: one array per column, sorted by id."""
    outcomes = sorted(outcomes, key=lambda each: each.job_id)
    ids = [each.job_id for each in outcomes]
    return {
        "ids": ids,
        **span(ids),
        "tokens": [each.token for each in outcomes],
        "actions": [str(each.action) for each in outcomes],
        "attempts": [each.attempt_number for each in outcomes],
        "results": _some([each.result and each.result.decode() for each in outcomes]),
        "errors": _some([each.error for each in outcomes]),
        "delays": [float(each.delay_seconds) for each in outcomes],
        "starts": [each.started for each in outcomes],
        "durations": [float(each.duration_seconds) for each in outcomes],
        "workers": [each.worker_id for each in outcomes],
        "closed": list(closed_tokens),
    }


def _some(values: list[Any]) -> list[Any] | None:
    """None for an array of nothing but nulls, which is the usual case and need not be walked."""
    return values if any(value is not None for value in values) else None


def new_statuses(cursor: psycopg.Cursor[Any]) -> dict[UUID, str]:
    """The answer of `settle.sql`: job -> status."""
    return {row[0]: row[1] for row in cursor.fetchall()}


def queue_pulse(entry: Mapping[str, Any], now: float) -> QueuePulse:
    """One entry of a pulse, its times counted from the database's `now` (seconds since 1970)."""
    due, oldest = entry["due_at"], entry["oldest_at"]
    return QueuePulse(
        queue_name=entry["queue_name"],
        ready=entry["ready"],
        served=entry["served"],
        due_in_seconds=None if due is None else max(0.0, float(due) - now),
        oldest_ready_seconds=0.0 if oldest is None else max(0.0, now - float(oldest)),
        old_marks=entry["old_marks"],
    )


def rescued_rows(rows: Iterable[Any]) -> list[Rescued]:
    """The answer of `rescue.sql`."""
    return [
        Rescued(
            job_id=row[0],
            queue_name=row[1],
            kind=row[2],
            status=row[3],
            fate=Fate(row[4]),
            attempt_count=row[5],
        )
        for row in rows
    ]
