"""What people ask of PostgreSQL: figures, lists, single jobs; and what they change: retry, cancel, replay, pause."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import orjson

from pmqd.crashpoints import checkpoint
from pmqd.errors import Conflict, NotFound, PmqdError
from pmqd.job import Status
from pmqd.store_session import Session

COUNTED_MOST: Final = 100_000
"""Depths are counted up to here."""
WALK_ROWS: Final = 5_000
WALK_PAGES: Final = 20
REPLAY_BATCH: Final = 1000
ERROR_SHOWN: Final = 200

Rows = list[dict[str, Any]]


class CursorError(PmqdError, ValueError):
    """A cursor that no list has given out."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How many jobs of a queue there are, counted up to `COUNTED_MOST`."""

    queue_name: str
    ready: int  # due, marked ones among them
    scheduled: int
    running: int
    failed: int
    oldest_ready_seconds: float


class StoreReads(Session):
    """The statements behind lists, figures and buttons."""

    def depths(self) -> list[Depth]:
        """The figures of every queue that has a row or jobs."""
        return [Depth(*row) for row in self.run("depths", {"most": COUNTED_MOST})]

    def list_jobs(
        self, queue_name: str | None, status: str | None, limit: int, cursor: str | None
    ) -> tuple[Rows, str | None]:
        """A page of jobs.

        Args:
            queue_name: Of this queue only.
            status: In this state only.
            limit: Rows at most.
            cursor: What the page before gave.

        Returns:
            Rows keyed by column, and the next page's cursor or None. Waiting jobs come in the order in which they will
            run, failed ones last failed first, all others newest first. Where few jobs match among very many, a page
            may be short, or empty, and still have a next one.

        Raises:
            CursorError: The cursor is not one of this list's.
        """
        if status in (Status.QUEUED, Status.MIGRATED_TO_REDIS):
            return self._list_waiting(queue_name, status, limit, cursor)
        if status == Status.FAILED:
            return self._list_failed(queue_name, limit, cursor)
        if status == Status.RUNNING:
            return self._list_running(queue_name, limit, cursor)
        return self._list_newest(queue_name, status, limit, cursor)

    def show_job(self, job_id: UUID) -> dict[str, Any] | None:
        """One job's columns, with its log rows under `logs`; None if there is no such job."""
        rows = self.rows("show_job", {"id": job_id})
        return {**rows[0], "logs": self.rows("job_logs", {"id": job_id})} if rows else None

    def retry_job(self, job_id: UUID) -> None:
        """A failed or cancelled job starts a new life; one that waits for its time is due now.

        Raises:
            NotFound: There is no such job.
            Conflict: It is waiting already, runs, or is completed.
        """
        done, status = self.run("retry_job", {"id": job_id})[0][:2]
        _expect(job_id, status, done=done, asked="retried")

    def cancel_job(self, job_id: UUID) -> None:
        """A waiting job is cancelled at once; a running one is interrupted by its owner, unless it ends first.

        Raises:
            NotFound: There is no such job.
            Conflict: It has ended.
        """
        done, status = self.run("cancel_job", {"id": job_id})[0]
        _expect(job_id, status, done=done, asked="cancelled")

    def replay(self, queue_name: str | None, kind: str | None, since: datetime | None, limit: int) -> int:
        """Failed jobs start a new life, in batches, oldest failure first.

        Args:
            queue_name: Of this queue only.
            kind: Of this kind only.
            since: Failed since then only.
            limit: Jobs at most.

        Returns:
            How many. What fails again meanwhile is not taken twice.
        """
        names = [queue_name] if queue_name is not None else [row["name"] for row in self.list_queues()]
        until = self.rows("why", {"queue_name": ""})[0]["now"]
        done = 0
        for name in names:
            done += self._replay_queue(
                name, kind, since or datetime.min.replace(tzinfo=UTC), until, limit - done
            )
        return done

    def pause(self, queue_name: str) -> None:
        """No job of the queue is claimed any more; running ones finish.

        Raises:
            NotFound: There is no such queue.
        """
        self._set_active(queue_name, active=False)

    def resume(self, queue_name: str) -> None:
        """Ends a pause.

        Raises:
            NotFound: There is no such queue.
        """
        self._set_active(queue_name, active=True)

    def list_queues(self) -> Rows:
        """The rows of `job_queues`, by name."""
        return self.rows("list_queues")

    def instances(self) -> Rows:
        """The instances whose lease holds, oldest first."""
        return self.rows("instances")

    def why(self, row: Mapping[str, Any]) -> str | None:
        """Why a job waits, in words; None for one that does not.

        Args:
            row: `status`, `queue_name`, `run_at`, `attempt_count`, `last_error_message`, `cancel_requested` of a job.
        """
        if row["status"] == Status.RUNNING and row.get("cancel_requested"):
            return "cancelling: its owner has been asked to end it"
        if row["status"] not in (Status.QUEUED, Status.MIGRATED_TO_REDIS):
            return None
        facts = self.rows("why", {"queue_name": row["queue_name"]})[0]
        return _reason(row, paused=facts["paused"], served=facts["served"], now=facts["now"])

    # --- inside

    def _list_newest(
        self, queue_name: str | None, status: str | None, limit: int, cursor: str | None
    ) -> tuple[Rows, str | None]:
        """Walks back from the newest job; gives up for this page when very many did not match."""
        before = _uuid(_decoded(cursor, 1)[0]) if cursor else None
        found: Rows = []
        for _ in range(WALK_PAGES):
            page = self.rows(
                "list_newest",
                {
                    "queue_name": queue_name,
                    "status": status,
                    "limit": limit - len(found),
                    "before": before,
                    "scan": WALK_ROWS,
                },
            )
            before = page[0]["walked_to"]
            found += [_without(row, "walked_to") for row in page if row["id"] is not None]
            if before is None or len(found) >= limit:
                break
        return found, _encoded(before) if before is not None else None

    def _list_waiting(
        self, queue_name: str | None, status: str, limit: int, cursor: str | None
    ) -> tuple[Rows, str | None]:
        queue, priority, run_at, job_id = _decoded(cursor, 4) if cursor else (None, None, None, None)
        rows = self.rows(
            "list_waiting",
            {
                "queue_name": queue_name,
                "status": status,
                "limit": limit,
                "after_queue": queue,
                "after_priority": _number(priority),
                "after_run_at": _time(run_at),
                "after_id": _uuid(job_id),
            },
        )
        return rows, _next(rows, limit, "queue_name", "priority", "run_at", "id")

    def _list_failed(self, queue_name: str | None, limit: int, cursor: str | None) -> tuple[Rows, str | None]:
        failed_at, job_id = _decoded(cursor, 2) if cursor else (None, None)
        rows = self.rows(
            "list_failed",
            {
                "queue_name": queue_name,
                "limit": limit,
                "before_at": _time(failed_at),
                "before_id": _uuid(job_id),
            },
        )
        return rows, _next(rows, limit, "failed_at", "id")

    def _list_running(
        self, queue_name: str | None, limit: int, cursor: str | None
    ) -> tuple[Rows, str | None]:
        before = _uuid(_decoded(cursor, 1)[0]) if cursor else None
        rows = self.rows("list_running", {"queue_name": queue_name, "limit": limit, "before": before})
        return rows, _next(rows, limit, "id")

    def _replay_queue(self, name: str, kind: str | None, since: datetime, until: datetime, limit: int) -> int:
        done, place = 0, (since, None)
        while done < limit:
            count, *place_found = self.run(
                "replay",
                {
                    "queue_name": name,
                    "kind": kind,
                    "after_at": place[0],
                    "after_id": place[1],
                    "until": until,
                    "batch": REPLAY_BATCH,
                    "most": limit - done,
                },
            )[0][:3]
            done += count
            checkpoint("replay.replayed")
            if place_found[1] is None:
                break
            place = (place_found[0], place_found[1])
        return done

    def _set_active(self, queue_name: str, *, active: bool) -> None:
        if not self.run("set_active", {"queue_name": queue_name, "active": active}):
            raise NotFound(f"there is no queue {queue_name!r}")


def _expect(job_id: UUID, status: str | None, *, done: bool, asked: str) -> None:
    if status is None:
        raise NotFound(f"there is no job {job_id}")
    if not done:
        raise Conflict(f"job {job_id} is {status}: it cannot be {asked}")


def _reason(row: Mapping[str, Any], *, paused: bool, served: bool, now: datetime) -> str:
    name, error = (
        row["queue_name"],
        (row["last_error_message"] or "").strip().partition("\n")[0][:ERROR_SHOWN],
    )
    if paused:
        return f"paused: pmqd queues resume {name}"
    if row["run_at"] > now and row["attempt_count"] > 0:
        attempts = f"{row['attempt_count']} of {row['max_attempts']}"
        return f"retry after attempt {attempts}" + (f": {error}" if error else "")
    if row["run_at"] > now:  # given back with a word, uncharged: nobody there knew its kind
        return error or "not due yet"
    if not served:
        return "nobody serves it: no running instance has the queue in a pool"
    return "waiting for a free worker"


# --- cursors: opaque to whoever holds them


def _next(rows: Sequence[Mapping[str, Any]], limit: int, *columns: str) -> str | None:
    return _encoded(*(rows[-1][name] for name in columns)) if len(rows) >= limit else None


def _encoded(*values: object) -> str:
    return base64.urlsafe_b64encode(orjson.dumps([*values])).decode().rstrip("=")


def _decoded(cursor: str, length: int) -> list[Any]:
    try:
        values = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError) as error:
        raise _not_ours(cursor) from error
    if not isinstance(values, list) or len(values) != length:
        raise _not_ours(cursor)
    return values


def _not_ours(cursor: object) -> CursorError:
    return CursorError(f"cursor {str(cursor)[:100]!r} is not one that this list has given out")


def _uuid(value: object) -> UUID | None:
    try:
        return None if value is None else UUID(str(value))
    except ValueError as error:
        raise _not_ours(value) from error


def _time(value: object) -> datetime | None:
    try:
        return None if value is None else datetime.fromisoformat(str(value))
    except ValueError as error:
        raise _not_ours(value) from error


def _number(value: object) -> int | None:
    if value is None or isinstance(value, int):
        return value
    raise _not_ours(value)


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}
