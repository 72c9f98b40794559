"""What the store and the broker must do, said a second time and as shortly as possible: dicts and lists, no SQL.

`tests/integration/test_protocol.py` does the same to this and to real servers, and compares after each step.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from uuid import UUID

from pmqd.job import BAND_RANGES, Action, Status, band_of

REFUNDED = (Action.RELEASE, Action.SNOOZE)
ENDS = {Action.COMPLETE: Status.COMPLETED, Action.FAIL: Status.FAILED, Action.CANCEL: Status.CANCELLED}


@dataclass
class Row:
    """One job."""

    priority: int
    place: int  # stands for run_at
    due: bool
    max_attempts: int
    status: str = Status.QUEUED
    attempts: int = 0
    interruptions: int = 0
    token: UUID | None = None
    cancel: bool = False

    @property
    def waiting(self) -> bool:
        """Whether a claim may have it, once it is due."""
        return self.status in (Status.QUEUED, Status.MIGRATED_TO_REDIS)


@dataclass
class Model:
    """One queue, its three lists (rightmost pops first), and who holds what."""

    rows: dict[UUID, Row] = field(default_factory=dict)
    lists: dict[str, list[UUID]] = field(default_factory=lambda: {band: [] for band in BAND_RANGES})
    claims: dict[UUID, tuple[str, list[UUID]]] = field(default_factory=dict)  # token -> worker, jobs
    paused: bool = False
    leased: bool = True

    def best(self, limit: int, wanted: Callable[[Row], bool], band: str | None = None) -> list[UUID]:
        """The first jobs in order that are due and wanted; none of a paused queue."""
        found = [
            job_id
            for job_id, row in self.rows.items()
            if row.due and wanted(row) and band in (None, band_of(row.priority)) and not self.paused
        ]
        return sorted(found, key=lambda i: (self.rows[i].priority, self.rows[i].place, i))[:limit]

    def claim(self, ids: Iterable[UUID], token: UUID, worker: str) -> list[UUID]:
        """Whoever waits and is due becomes this worker's."""
        asked = set(ids)
        won = self.best(len(self.rows), lambda row: row.waiting) if self.leased else []
        won = [job_id for job_id in won if job_id in asked]
        for job_id in won:
            row = self.rows[job_id]
            row.status, row.token, row.attempts = Status.RUNNING, token, row.attempts + 1
        if won:
            self.claims[token] = (worker, won)
        return won

    def end(self, job_id: UUID, token: UUID, action: Action, place: int) -> str | None:
        """Ends an attempt; None where the job is not this token's."""
        row = self.rows[job_id]
        if row.status != Status.RUNNING or row.token != token:
            return None
        interrupt = action is Action.INTERRUPT
        spent = (action is Action.RETRY or (interrupt and row.interruptions == 5)) and (
            row.attempts >= row.max_attempts
        )
        otherwise = Status.CANCELLED if row.cancel else Status.FAILED if spent else Status.QUEUED
        row.status = ENDS.get(action, otherwise)
        row.attempts -= action in REFUNDED or (interrupt and row.interruptions < 5)
        row.interruptions += interrupt and row.interruptions < 5
        if action in (Action.RETRY, Action.SNOOZE):
            row.place = place
        row.cancel = False
        return row.status
