"""Between records and rows: the parameters of the larger statements, and their answers."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import orjson
import psycopg

from pmqd.job import BAND_RANGES, Action, Claimed, Outcome
from pmqd.store_session import span
from pmqd.store_types import Fate, QueuePulse, Rescued

Order = Literal["bands", "queues"]


def stretches(queues: Sequence[str], order: Order) -> list[tuple[str, int, int]]:
    """The stretches of priorities that a steal looks at, best first: (queue, lowest, highest)."""
    bands = list(BAND_RANGES.values())
    if order == "bands":
        return [(name, low, high) for low, high in bands for name in queues]
    return [(name, bands[0][0], bands[-1][1]) for name in queues]


def array(values: Iterable[UUID | float | datetime | str | None]) -> str:
    """A literal of a PostgreSQL array, a tenth of the time that psycopg takes for lists of hundreds.

    JSON differs from it in its brackets, and in the escapes of texts: those must need none (letters and digits).
    """
    return "{" + orjson.dumps(list(values)).decode()[1:-1] + "}"


def claim_parameters(ids: Sequence[UUID], token: UUID, worker_id: str, instance_id: UUID) -> dict[str, Any]:
    """The parameters of `claim.sql`."""
    return {
        "ids": array(ids),
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


def rounds(outcomes: Sequence[Outcome]) -> list[Sequence[Outcome]]:
    """Splits outcomes so that no job is twice in one statement, which finds them by the job's id."""
    if len({each.job_id for each in outcomes}) == len(outcomes):
        return [outcomes]
    first: dict[UUID, Outcome] = {}
    rest = [each for each in outcomes if first.setdefault(each.job_id, each) is not each]
    return [list(first.values()), *rounds(rest)]


def settle_parameters(outcomes: Sequence[Outcome], closed_tokens: Iterable[UUID]) -> dict[str, Any]:
    """The parameters of `settle.sql` and `settled_ids.sql`: one array per column, sorted by id."""
    ordered = sorted(outcomes, key=lambda each: each.job_id)
    ids = [each.job_id for each in ordered]
    results = [each.result or b"null" for each in ordered]
    return {
        "ids": array(ids),
        **span(ids),
        "tokens": array(each.token for each in ordered),
        "actions": array(each.action for each in ordered),
        "attempts": array(each.attempt_number for each in ordered),
        "delays": array(each.delay_seconds for each in ordered),
        "starts": array(each.started for each in ordered),
        "durations": array(each.duration_seconds for each in ordered),
        # Texts of any kind, so JSON and no array; nearly always there are none.
        "results": (b"[" + b",".join(results) + b"]").decode()
        if any(each.result for each in ordered)
        else None,
        "errors": orjson.dumps([each.error for each in ordered]).decode()
        if any(each.error for each in ordered)
        else None,
        "workers": orjson.dumps([each.worker_id for each in ordered]).decode(),
        "closed": array(closed_tokens),
    }


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


def rescue_parameters(fates: Mapping[UUID, Fate]) -> dict[str, Any]:
    """The parameters of `rescue.sql` that tell which jobs of a claim get which fate."""
    ids = sorted(fates)
    return {"ids": array(ids), **span(ids), "actions": array(_ACTION_OF[fates[job_id]] for job_id in ids)}


_ACTION_OF = {
    Fate.CHARGED: Action.RETRY,
    Fate.INTERRUPTED: Action.INTERRUPT,
    Fate.UNSTARTED: Action.RELEASE,
}


def rescued_rows(rows: Iterable[Any], fates: Mapping[UUID, Fate]) -> list[Rescued]:
    """The answer of `rescue.sql`."""
    return [
        Rescued(
            job_id=row[0],
            queue_name=row[1],
            kind=row[2],
            status=row[3],
            fate=fates[row[0]],
            attempt_count=row[4],
        )
        for row in rows
    ]
