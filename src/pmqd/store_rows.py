"""Between records and rows: the parameters of the larger statements, and their answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

import orjson
import psycopg

from pmqd.job import BAND_RANGES, Action, Claimed, Outcome
from pmqd.store_arrays import array, float_array, uuid_array
from pmqd.store_session import span
from pmqd.store_types import Best, Fate, QueuePulse, Rescued

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
        "ids": uuid_array(ids),
        **span(ids),
        "token": token,
        "worker_id": worker_id,
        "instance_id": instance_id,
    }


def claiming(
    wanted: Sequence[UUID] | Best, token: UUID, worker_id: str, instance_id: UUID
) -> tuple[str, dict[str, Any]]:
    """The statement that claims these jobs, or the best ones: its name in `sql/queries`, and its parameters."""
    if not isinstance(wanted, Best):
        return "claim", claim_parameters(wanted, token, worker_id, instance_id)
    stretch, row = wanted.after or (None, None)
    return "steal", {
        "queues": [name for name, _, _ in wanted.stretches],
        "lows": [low for _, low, _ in wanted.stretches],
        "highs": [high for _, _, high in wanted.stretches],
        "limit": wanted.limit,
        "marked": wanted.marked,
        "after_stretch": None if stretch is None else stretch + 1,
        "after_priority": row and row.priority,
        "after_time": row and row.run_at,
        "after_id": row and row.id,
        "hinted": uuid_array(wanted.hinted) if wanted.hinted else None,
        "token": token,
        "worker_id": worker_id,
        "instance_id": instance_id,
    }


def claimed_rows(cursor: psycopg.Cursor[Any], token: UUID) -> list[Claimed]:
    """What a claim or steal won; the columns stand in the order of the fields."""
    make: Callable[..., Claimed] = Claimed
    return [make(*row, token) for row in cursor.fetchall()]


def rounds(outcomes: Sequence[Outcome]) -> list[Sequence[Outcome]]:
    """Splits outcomes so that no job is twice in one statement, which finds them by the job's id."""
    if len({each.job_id.int for each in outcomes}) == len(outcomes):
        return [outcomes]
    first: dict[UUID, Outcome] = {}
    rest = [each for each in outcomes if first.setdefault(each.job_id, each) is not each]
    return [list(first.values()), *rounds(rest)]


class Settle:
    """One statement that settles outcomes of different jobs: which, with what parameters, and how its answer is read.

    Attributes:
        query: its name in `sql/queries`.
        parameters: one array per column, sorted by id.
    """

    def __init__(self, outcomes: Sequence[Outcome], closed_tokens: Iterable[UUID]) -> None:
        """Takes the outcomes, and the claims of which nothing is left to settle after this."""
        self._ordered = sorted(outcomes, key=_number_of_job)
        plain = all(
            each.action is Action.COMPLETE and each.result is None and each.started is not None
            for each in self._ordered
        )
        self.query = "settle_completed" if plain else "settle"
        columns = _plain_columns(self._ordered) if plain else settle_columns(self._ordered)
        self.parameters = {**columns, "closed": uuid_array(closed_tokens)}

    def statuses(self, cursor: psycopg.Cursor[Any]) -> dict[UUID, str]:
        """The new status of each job that was still its owner's."""
        rows, ordered = cursor.fetchall(), self._ordered
        if self.query == "settle":
            return {ordered[place - 1].job_id: status for place, status, _ in rows}
        [(_, places)] = rows
        found = ordered if places is None else [ordered[place - 1] for place in places]
        return dict.fromkeys([each.job_id for each in found], "completed")


def settle_columns(ordered: Sequence[Outcome]) -> dict[str, Any]:
    """The columns of `settle.sql` and `settled_ids.sql`, of outcomes sorted by job."""
    results = [each.result or b"null" for each in ordered]
    return {
        **_plain_columns(ordered),
        "actions": array(each.action for each in ordered),
        "delays": float_array(each.delay_seconds for each in ordered),
        # Texts of any kind, so JSON and no array; nearly always there are none.
        "results": (b"[" + b",".join(results) + b"]").decode()
        if any(each.result for each in ordered)
        else None,
        "errors": orjson.dumps([each.error for each in ordered]).decode()
        if any(each.error for each in ordered)
        else None,
        "workers": orjson.dumps([each.worker_id for each in ordered]).decode(),
    }


def _plain_columns(ordered: Sequence[Outcome]) -> dict[str, Any]:
    ids = [each.job_id for each in ordered]
    return {
        "ids": uuid_array(ids),
        "lowest": ids[0] if ids else None,
        "highest": ids[-1] if ids else None,
        "tokens": uuid_array(each.token for each in ordered),
        "attempts": array(each.attempt_number for each in ordered),
        "starts": float_array(each.started for each in ordered),
        "durations": float_array(each.duration_seconds for each in ordered),
    }


def _number_of_job(outcome: Outcome) -> int:
    """As PostgreSQL orders ids; comparing UUIDs themselves is slow."""
    return outcome.job_id.int


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
    return {
        "ids": uuid_array(ids),
        **span(ids),
        "actions": array(_ACTION_OF[fates[job_id]] for job_id in ids),
    }


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
