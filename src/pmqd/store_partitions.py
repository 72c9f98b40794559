"""Months: made ahead, attached, retired; and the default partitions, cleaned in small batches.

On a connection of its own with a short lock timeout: whoever waits for an exclusive lock makes everybody else wait behind it.
A lock that is not to be had is no error: the months are made long before they are needed, and the next call tries again.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Final
from uuid import UUID

from pmqd.config import MaintenanceSettings, PostgresSettings
from pmqd.crashpoints import checkpoint
from pmqd.store_session import Life, Session, StoreBusy

AHEAD_MONTHS: Final = 2
LOCK_TIMEOUT_MS: Final = 200
STATEMENT_SECONDS: Final = 60.0
"""For scans that block nobody; what holds a lock is kept short by counting first."""
MOVED_MOST: Final = 50_000
"""Rows that one transaction moves; about a second."""
LARGE_DEFAULT_BYTES: Final = 64 << 20
"""A default partition above this is not scanned under an exclusive lock."""
CLEAN_BATCH: Final = 1000

PARENTS: Final = ("jobs", "job_logs")


@dataclass(slots=True)
class PartitionReport:
    """What a round did. Months as `jobs_2026_01`."""

    made: list[str] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    postponed: list[str] = field(
        default_factory=list
    )  # a lock was not to be had, or too much was to be moved
    cleaned: int = 0  # rows deleted from the default partitions


def keep_partitions(
    postgres: PostgresSettings, retention: MaintenanceSettings, budget_seconds: float, newest: Life
) -> PartitionReport:
    """One round of everything; see `Store.keep_partitions`."""
    keeper = _Keeper(postgres, newest)
    try:
        return keeper.round(retention, budget_seconds)
    finally:
        keeper.close()


class _Keeper(Session):
    """A session that waits neither long nor often for locks; past a pooler, for its own lock is the session's."""

    tries = 1

    def __init__(self, postgres: PostgresSettings, newest: Life) -> None:
        patient = postgres.model_copy(update={"statement_timeout_seconds": STATEMENT_SECONDS})
        super().__init__(patient, "partitions", lock_timeout_ms=LOCK_TIMEOUT_MS, direct=True, newest=newest)

    def round(self, retention: MaintenanceSettings, budget_seconds: float) -> PartitionReport:
        report = PartitionReport()
        if not self._alone():
            return report
        months, this_month, now = self._months()
        for parent in PARENTS:
            for month in _ahead(this_month):
                if month not in months[parent]:
                    self._note(report, report.made, parent, month, self._made(parent, month, this_month))
            for month in _over(months[parent], _days_kept(parent, retention), now):
                self._note(report, report.retired, parent, month, self._retired(parent, month, retention))
        report.cleaned = self._clean(retention, time.monotonic() + budget_seconds)
        return report

    def _alone(self) -> bool:
        """False while another instance keeps the partitions; the lock ends with the connection."""
        return bool(self.run("keep_alone", {"lock": f"pmqd partitions {self._postgres.schema_name}"})[0][0])

    def _months(self) -> tuple[dict[str, set[date]], date, datetime]:
        facts = self.run("partitions")
        months: dict[str, set[date]] = {parent: set() for parent in PARENTS}
        for parent, month, _, _ in facts:
            if parent is not None:
                months[parent].add(month)
        return months, facts[0][2], facts[0][3]

    @staticmethod
    def _note(report: PartitionReport, done: list[str], parent: str, month: date, ok: bool) -> None:
        (done if ok else report.postponed).append(f"{parent}_{month:%Y_%m}")

    def _made(self, parent: str, month: date, this_month: date) -> bool:
        """Builds a month aside and attaches it; False when that has to wait.

        A small default partition is scanned under the lock, its rows of the month moved in the same transaction. A large
        one gets a CHECK first that spares the scan, which only a month to come can have: until it is attached, a row of that
        month is refused. What then stays in the default partition is served like everything else.
        """
        names = {"parent": parent, "month": month}
        inside, size = self.run("default_rows", {**names, "most": MOVED_MOST + 1})[0]
        large = size > LARGE_DEFAULT_BYTES
        if inside > MOVED_MOST or (large and (inside or month <= this_month)):
            return False
        try:
            self.run("make_partition", names)
            if large:
                self.run("hold_off_default", names)
                self.run("validate_hold", names)
            checkpoint("retention.made")
            self.run("attach_partition", names)
            checkpoint("retention.attached")
        except StoreBusy:
            return False
        return True

    def _retired(self, parent: str, month: date, retention: MaintenanceSettings) -> bool:
        """Drops a month that is over; False when that has to wait."""
        keep: list[UUID] = []
        if parent == "jobs":
            days = {"completed_days": retention.completed_days, "failed_days": retention.failed_days}
            keep = [
                row[0] for row in self.run("survivors", {"month": month, **days, "limit": MOVED_MOST + 1})
            ]
        if len(keep) > MOVED_MOST:
            return False
        try:
            checkpoint("retention.retiring")
            self.run("retire_partition", {"parent": parent, "month": month, "keep": keep})
            checkpoint("retention.retired")
        except StoreBusy:
            return False
        return True

    def _clean(self, retention: MaintenanceSettings, deadline: float) -> int:
        days = retention.model_dump(include={"completed_days", "failed_days", "log_days"})
        cleaned = 0
        for name in ("clean_logs", "clean_default"):
            more = True
            while more and time.monotonic() < deadline:
                gone, looked_at = self.run(name, {**days, "batch": CLEAN_BATCH})[0]
                cleaned += gone
                checkpoint("retention.cleaned")
                more = looked_at >= CLEAN_BATCH
        return cleaned


def _ahead(this_month: date) -> Iterator[date]:
    month = this_month
    for _ in range(AHEAD_MONTHS + 1):
        yield month
        month = _following(month)


def _following(month: date) -> date:
    return (month + timedelta(days=31)).replace(day=1)


def _days_kept(parent: str, retention: MaintenanceSettings) -> int:
    return (
        retention.log_days if parent == "job_logs" else max(retention.completed_days, retention.failed_days)
    )


def _over(months: Iterable[date], days: int, now: datetime) -> list[date]:
    """The months of which even the last moment is older than so many days."""
    border = (now - timedelta(days=days)).date()
    return sorted(month for month in months if _following(month) <= border)
