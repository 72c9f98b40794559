"""What the trial application recorded outside both stores, and a few words to ask both sides."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import psycopg


@dataclass(frozen=True)
class Mark:
    """One line of the history: the start (S) or the end (E) of an attempt; `at` is monotonic seconds."""

    mark: str
    job_id: UUID
    attempt: int
    pid: int
    at: float
    thread: int


def read(path: Path) -> list[Mark]:
    """All marks so far, in the order in which they were written."""
    if not path.exists():
        return []
    marks = []
    # A line that is being written may be seen half.
    for line in path.read_text().rpartition("\n")[0].splitlines():
        mark, job_id, attempt, pid, at, thread = line.split()
        marks.append(Mark(mark, UUID(job_id), int(attempt), int(pid), int(at) / 1e9, int(thread)))
    return marks


def starts(path: Path, job_id: UUID | None = None) -> list[Mark]:
    """The starts, of one job or all."""
    return [each for each in read(path) if each.mark == "S" and job_id in (None, each.job_id)]


def ends(path: Path) -> Counter[UUID]:
    """How often each job came to its handler's end."""
    return Counter(each.job_id for each in read(path) if each.mark == "E")


def enqueue(
    dsn_or_connection: str | psycopg.Connection[Any],
    kind: str,
    /,
    queue: str = "trial",
    attempts: int | None = None,
    **payload: Any,
) -> UUID:
    """One job by plain SQL, with so many attempts (the default: the queue's)."""
    if isinstance(dsn_or_connection, str):
        with psycopg.connect(dsn_or_connection, autocommit=True) as connection:
            return enqueue(connection, kind, queue, attempts, **payload)
    row = dsn_or_connection.execute(
        "select pmqd.enqueue(%s, %s::jsonb, kind => %s, max_attempts => %s)",
        (queue, orjson.dumps(payload).decode(), kind, attempts),
    ).fetchone()
    assert row is not None
    return UUID(str(row[0]))


def enqueue_many(connection: psycopg.Connection[Any], count: int, kind: str, **payload: Any) -> None:
    """So many equal jobs by one plain insert."""
    connection.execute(
        "insert into pmqd.jobs (queue_name, kind, payload) select 'trial', %s, %s::jsonb from generate_series(1, %s)",
        (kind, orjson.dumps(payload).decode(), count),
    )


def statuses(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """How many jobs are in each state."""
    return dict(connection.execute("select status, count(*) from pmqd.jobs group by status").fetchall())


def job(connection: psycopg.Connection[Any], job_id: UUID) -> dict[str, Any]:
    """One row of jobs."""
    cursor = connection.cursor(row_factory=psycopg.rows.dict_row)
    row = cursor.execute("select * from pmqd.jobs where id = %s", (job_id,)).fetchone()
    assert row is not None, job_id
    return row


def log_statuses(connection: psycopg.Connection[Any], job_id: UUID) -> list[str]:
    """The states of a job's log rows, oldest first."""
    rows = connection.execute(
        "select status from pmqd.job_logs where job_id = %s order by id", (job_id,)
    ).fetchall()
    return [row[0] for row in rows]


def settled_once(connection: psycopg.Connection[Any]) -> None:
    """No job has more than one success in the audit trail, and every completed job has one."""
    doubled = connection.execute(
        "select job_id from pmqd.job_logs where status = 'success' group by job_id having count(*) > 1"
    ).fetchall()
    assert not doubled, f"settled twice: {doubled[:5]}"
    lonely = connection.execute(
        "select id from pmqd.jobs j where status = 'completed'"
        " and not exists (select from pmqd.job_logs l where l.job_id = j.id and l.status = 'success')"
    ).fetchall()
    assert not lonely, f"completed without a log row: {lonely[:5]}"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def until(moment: float) -> None:
    """Pace a load: sleep until a moment of time.monotonic()."""
    time.sleep(max(0.0, moment - time.monotonic()))
