"""PostgreSQL goes away, refuses or is in trouble, under a whole daemon: no loop ends, no job is blamed, one line is said."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from benchmarks.outages import measure
from benchmarks.recovery import rig
from pmqd.embedded import PostgresServer
from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_servers import apply_schema, prefer, wait_until

HELD_SECONDS = 4.0


@pytest.mark.timeout(180)
def test_three_crashes_and_no_false_rescue() -> None:
    """PostgreSQL crashes under load, away for a moment, for a second and for some: every job runs once, and is claimed again at once."""
    with rig() as one:
        result = measure(one, [0.0, 1.0, 6.0], backlog=400)
    assert result.faults() == []
    assert result.jobs > 0


ABSENCES = 8
"""The most absences in one trouble; each may be told once by each process."""


@contextmanager
def too_many_connections(server: PostgresServer) -> Iterator[None]:
    """53300: all sessions ended, and every place taken by others."""
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(psycopg.connect(server.dsn(), autocommit=True))
        end_sessions(admin)
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                stack.enter_context(psycopg.connect(server.dsn()))
        yield


def end_sessions(admin: psycopg.Connection[Any]) -> None:
    """End all other sessions."""
    admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where pid <> pg_backend_pid() and backend_type = 'client backend'"
    )


@contextmanager
def terminated(server: PostgresServer) -> Iterator[None]:
    """57P01, again and again."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for _ in range(ABSENCES):
            end_sessions(admin)
            time.sleep(0.1)
        yield


@contextmanager
def read_only(server: PostgresServer) -> Iterator[None]:
    """25006: as a primary that was demoted."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute("alter system set default_transaction_read_only = on")
        admin.execute("select pg_reload_conf()")
        yield
        admin.execute("set default_transaction_read_only = off")
        admin.execute("alter system reset default_transaction_read_only")
        admin.execute("select pg_reload_conf()")


@contextmanager
def locked(server: PostgresServer) -> Iterator[None]:
    """55P03: somebody holds the tables, as a careless ALTER TABLE does."""
    with psycopg.connect(server.dsn("pmqd")) as other:
        other.execute("lock table pmqd.jobs, pmqd.ticker in access exclusive mode")
        yield


@contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """57014 and silence: the table that every beat writes stands still for longer than any statement may run."""
    with psycopg.connect(server.dsn("pmqd")) as other:
        other.execute("set lock_timeout = 0")
        other.execute("lock table pmqd.claims in access exclusive mode")
        time.sleep(HELD_SECONDS)
        yield


TROUBLES = [too_many_connections, terminated, read_only, locked, frozen]


@pytest.fixture
def small_postgres(short_folder: Path) -> Iterator[PostgresServer]:
    """A server with few places for connections."""
    limits = {"max_connections": "24", "superuser_reserved_connections": "0"}
    with PostgresServer(short_folder / "pg", prefer=prefer(), settings=limits) as server:
        apply_schema(server.create_database("pmqd"))
        yield server


@pytest.mark.timeout(180)
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
def test_trouble_is_outlived(
    small_postgres: PostgresServer, redis_url: str, daemon: MakeDaemon, trouble: Any
) -> None:
    """The same processes work on afterwards, every job ran once and was charged once, and the absence is one line per process."""
    pool = {"app": "tests.applications.trial:app", "processes": 2}
    dsn = small_postgres.dsn("pmqd")
    running = daemon({"postgres": {"dsn": dsn}, "redis": {"url": redis_url}, "workers": [pool]})
    before = {process.pid for process in running.family()}
    insert(dsn, 600)
    wait_until(lambda: completed(dsn) > 50, 30, "work is under way")
    made: AbstractContextManager[None] = trouble(small_postgres)
    with made:
        time.sleep(HELD_SECONDS)
    wait_until(lambda: quietly(completed, dsn) == 600, 60, "all jobs are done")
    assert {process.pid for process in running.family()} == before
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert connection.execute(
            "select max(attempt_count), max(interruptions) from pmqd.jobs"
        ).fetchone() == (1, 0)
        assert connection.execute("select distinct status from pmqd.job_logs").fetchall() == [("success",)]
    check_lines(running)


def insert(dsn: str, count: int) -> None:
    """Short jobs."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload)"
            " select 'trial', 'nap', '{\"seconds\": 0.01}' from generate_series(1, %s)",
            [count],
        )


def completed(dsn: str) -> int:
    """Jobs that are done."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("select count(*) from pmqd.jobs where status = 'completed'").fetchone()
    return int(row[0]) if row else 0


def quietly(look: Any, dsn: str) -> Any:
    """The answer, or None while the server gives none."""
    with contextlib.suppress(psycopg.OperationalError):
        return look(dsn)
    return None


def check_lines(running: Daemon) -> None:
    """No traceback, and no process that says the same again and again."""
    assert [r["message"] for r in running.records if "unexpected error" in r["message"]] == []
    told: dict[str, int] = {}
    for record in running.records:
        if record["message"].startswith("PostgreSQL is away"):
            told[record["child"]] = told.get(record["child"], 0) + 1
    assert max(told.values(), default=0) <= ABSENCES + 1, told
