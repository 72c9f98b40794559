"""What both stores must be like in the end: nothing left in Redis, no claim open, every effect once, every counter as SQL says."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import psycopg
import redis
from psycopg import sql

from pmqd.chaos.checks_history import Surroundings
from pmqd.chaos.checks_walk import Problem

_ORPHANED_US: Final = 1_500_000
"""A worker that is killed with its whole host takes to its grave what it had settled in the last second, and never counted."""
_DELIVERY_BATCH: Final = 1000
_JOB_KEY: Final = re.compile(r"job:[0-9a-f-]{36}")
_SAMPLE: Final = re.compile(r"^(pmqd_[a-z_]+)(?:\{[^}]*\})? ([0-9.e+-]+)$")


def redis_leftovers(client: "redis.Redis", prefix: str) -> Iterator[Problem]:
    """Keys that should not be there: hints of jobs that are all done, keys that nobody knows, live status for ever."""
    for raw in client.scan_iter(match=f"{_escaped(prefix)}*", count=1000):
        key = raw.decode(errors="replace").removeprefix(prefix)
        if key == "pmqd:epoch":
            continue
        if key.startswith("queue:"):
            yield "leftovers_redis", f"{key} holds {_length(client, raw)} hints"
        elif _JOB_KEY.fullmatch(key):
            if client.ttl(raw) == -1:
                yield "leftovers_redis", f"{key} does not expire"
        else:
            yield "leftovers_redis", f"{key} is no key of pmqd's"


def _escaped(prefix: str) -> str:
    """A prefix as a pattern that means only itself."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", prefix)


def _length(client: "redis.Redis", key: bytes) -> int | str:
    try:
        return int(client.llen(key))
    except redis.ResponseError:
        return "something else than"


def claims_left(connection: psycopg.Connection[Any], schema: str) -> Iterator[Problem]:
    """Claims that nobody closed, though every job has ended."""
    query = sql.SQL("select token, worker_id, ids from {} limit 100").format(sql.Identifier(schema, "claims"))
    for token, worker, ids in connection.execute(query).fetchall():
        yield "claims_left", f"claim {token} of {worker}, {len(ids)} jobs, the first {ids[0] if ids else '-'}"


def effects(connection: psycopg.Connection[Any], schema: str) -> Iterator[Problem]:
    """Jobs that settle themselves: exactly one row of their own for each that completed, none for any other."""
    query = sql.SQL(
        "select j.id, j.status, count(e.job_id) from {jobs} j left join pmqd_chaos.effects e on e.job_id = j.id"
        " where j.kind = 'settles_itself' group by j.id, j.status"
        " having count(e.job_id) <> (j.status = 'completed')::int limit 100"
    ).format(jobs=sql.Identifier(schema, "jobs"))
    for job_id, status, count in connection.execute(query).fetchall():
        yield "effects_doubled", f"job {job_id} is {status} and has {count} rows of its own"


# --- counters ------------------------------------------------------------------------------------------------


def counted(pages: Sequence[str]) -> Counter[str]:
    """The sums of all counters over all pages, by name."""
    found: Counter[str] = Counter()
    for page in pages:
        for line in page.splitlines():
            if (sample := _SAMPLE.match(line)) and sample[1].endswith("_total"):
                found[sample[1]] += round(float(sample[2]))
    return found


def recorded(connection: psycopg.Connection[Any], schema: str) -> Counter[str]:
    """What the same counters have to be, by `job_logs` and the transitions."""
    logs = sql.SQL("select status, count(*) from {} group by status").format(
        sql.Identifier(schema, "job_logs")
    )
    by_log = dict(connection.execute(logs).fetchall())
    moves = connection.execute(
        "select old_status, new_status, count(*) from pmqd_chaos.transitions where old_status is not null group by 1, 2"
    ).fetchall()
    by_move = {(old, new): count for old, new, count in moves}
    return Counter(
        {
            "pmqd_jobs_started_total": sum(by_log.values()),
            "pmqd_jobs_completed_total": by_log.get("success", 0),
            "pmqd_jobs_retried_total": by_log.get("retry", 0),
            "pmqd_rescued_total": by_log.get("crashed", 0),
            "pmqd_jobs_failed_total": by_move.get(("running", "failed"), 0),
            "pmqd_jobs_migrated_total": by_move.get(("queued", "migrated_to_redis"), 0),
        }
    )


def logs_as_transitions(connection: psycopg.Connection[Any], schema: str) -> Iterator[Problem]:
    """Each completion has left one row in `job_logs`, and no row is without one."""
    query = sql.SQL(
        "select (select count(*) from {logs} where status = 'success'),"
        " (select count(*) from pmqd_chaos.transitions where old_status = 'running' and new_status = 'completed')"
    ).format(logs=sql.Identifier(schema, "job_logs"))
    row = connection.execute(query).fetchone()
    if row is not None and row[0] != row[1]:
        yield "counters_off", f"job_logs has {row[0]} successes, and {row[1]} jobs were completed"


def counters(
    seen: Counter[str], wanted: Counter[str], orphaned: int, seen_by: Surroundings
) -> Iterator[Problem]:
    """Counters that do not say what SQL says.

    Args:
        seen: what was counted.
        wanted: what SQL says.
        orphaned: rows of `job_logs` that nobody may have lived to count (see `orphaned_rows`).
        seen_by: deaths and faults; a migrator that dies has not counted its last delivery, and PostgreSQL that
            crashes forgets the last marks, which do not wait for the disk.
    """
    crashed = any(fault.area == "postgres" for fault in seen_by.faults)
    for name, number in wanted.items():
        fewer, more = orphaned, 0
        if name == "pmqd_jobs_migrated_total":
            fewer = _DELIVERY_BATCH * seen_by.migrators_and_masters()
            more = number if crashed else 0
        if not -more <= number - seen[name] <= fewer:
            yield (
                "counters_off",
                f"{name} is {seen[name]}, and SQL says {number} (at most {fewer} fewer allowed)",
            )


def orphaned_rows(
    connection: psycopg.Connection[Any], schema: str, masters: Sequence[int], to_database: int
) -> int:
    """Rows of `job_logs` written in the last second before a whole host died.

    Args:
        connection: to PostgreSQL.
        schema: pmqd's.
        masters: when masters died, monotonic microseconds.
        to_database: microseconds to add to get seconds since 1970 on the database's clock.
    """
    query = sql.SQL(
        "select count(*) from {} l where exists (select from unnest(%s::float8[]) d"
        " where l.created between to_timestamp(d - %s) and to_timestamp(d + %s))"
    ).format(sql.Identifier(schema, "job_logs"))
    moments = [(moment + to_database) / 1e6 for moment in masters]
    seconds = _ORPHANED_US / 1e6
    row = connection.execute(query, [moments, seconds, seconds]).fetchone()
    return int(row[0]) if row else 0
