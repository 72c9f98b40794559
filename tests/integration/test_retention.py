import threading
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd import schema, store_partitions
from pmqd.config import MaintenanceSettings, PostgresSettings
from pmqd.store import PartitionReport
from pmqd.store_session import SeenLife
from tests.store_tools import QUEUE, Bench

KEEP = MaintenanceSettings(completed_days=100, failed_days=200, log_days=50)


def keep(bench: Bench) -> PartitionReport:
    """One round."""
    return bench.store.keep_partitions(KEEP)


def months(bench: Bench, parent: str = "jobs") -> list[int]:
    """The months that exist, counted from this one."""
    rows = bench.connection.execute(
        "select (extract(year from age) * 12 + extract(month from age))::int as n from (select age(p.month::timestamp,"
        " date_trunc('month', now() at time zone 'utc')) as age from pmqd.partitions p where p.parent = %s) a order by 1",
        [parent],
    ).fetchall()
    return [row["n"] for row in rows]


def name(bench: Bench, parent: str, months_from_now: int) -> str:
    """The name of a month's partition."""
    row = bench.connection.execute(
        "select pmqd.partition_name(%s, (date_trunc('month', now() at time zone 'utc') + make_interval(months => %s))::date)"
        " as name",
        [parent, months_from_now],
    ).fetchone()
    assert row is not None
    return str(row["name"])


def attach(bench: Bench, parent: str, months_from_now: int) -> None:
    """Makes and attaches a month."""
    for step in ("make_partition", "attach_partition"):
        bench.connection.execute(
            f"select pmqd.{step}(%s, (date_trunc('month', now() at time zone 'utc') + make_interval(months => %s))::date)",
            [parent, months_from_now],
        )


def drop(bench: Bench, parent: str, months_from_now: int) -> None:
    """Removes a month with all its rows, as if it had never been made."""
    found = name(bench, parent, months_from_now)
    bench.connection.execute(f"alter table pmqd.{parent} detach partition pmqd.{found}")
    bench.connection.execute(f"drop table pmqd.{found}")


def put(bench: Bench, age_days: float, count: int = 1, *, random_id: bool = False, **columns: Any) -> None:
    """Jobs made (and ended, if a `*_at` column names another age in days) so long ago."""
    values = {
        key: f"now() - {value} * interval '1 day'" if key.endswith("_at") else repr(value)
        for key, value in columns.items()
    }
    new_id = (
        "gen_random_uuid()"
        if random_id
        else f"overlay(pmqd.id_at(now() - {age_days} * interval '1 day')::text placing right(gen_random_uuid()::text, 22) from 15)::uuid"
    )
    bench.connection.execute(
        f"insert into pmqd.jobs (id, queue_name, payload{''.join(', ' + key for key in values)})"
        f" select {new_id}, '{QUEUE}', '1'{''.join(', ' + value for value in values.values())} from generate_series(1, {count})"
    )


def completed(bench: Bench, age_days: float, ended_days: float, count: int = 1, **more: Any) -> None:
    """Completed jobs."""
    put(bench, age_days, count, status="completed", ready=False, completed_at=ended_days, **more)


def middle(bench: Bench, months_from_now: int) -> float:
    """How many days ago the fifteenth of a month was."""
    row = bench.connection.execute(
        "select extract(epoch from now() - (date_trunc('month', now() at time zone 'utc') + make_interval(months => %s)"
        " + interval '14 days') at time zone 'utc')::float8 / 86400 as days",
        [months_from_now],
    ).fetchone()
    assert row is not None
    return float(row["days"])


def where(bench: Bench) -> dict[str, int]:
    """How many jobs lie in which partition."""
    rows = bench.connection.execute(
        "select tableoid::regclass::text as name, count(*) as n from pmqd.jobs group by 1"
    ).fetchall()
    return {row["name"].removeprefix("pmqd."): row["n"] for row in rows}


def test_months_are_made_two_ahead(bench: Bench) -> None:
    """A fresh schema has them; what is missing, this month included, is made; a second round does nothing."""
    assert months(bench) == months(bench, "job_logs") == [0, 1, 2]
    for parent in ("jobs", "job_logs"):
        for month in (0, 2):
            drop(bench, parent, month)
    made = keep(bench).made
    assert sorted(made) == sorted(
        name(bench, parent, month) for parent in ("jobs", "job_logs") for month in (0, 2)
    )
    assert months(bench) == months(bench, "job_logs") == [0, 1, 2]
    assert keep(bench) == PartitionReport()
    schema.check(bench.dsn)


def test_a_new_month_is_stored_like_the_others(bench: Bench) -> None:
    """Indexes, checks and storage settings: those of the parent, and the ones that have their reason in the schema."""
    row = bench.connection.execute(
        "select c.reloptions, (select count(*) from pg_index i where i.indrelid = c.oid)::int as indexes,"
        " (select count(*) from pg_constraint k where k.conrelid = c.oid and k.contype = 'c')::int as checks"
        " from pg_class c where c.oid = %s::regclass",
        [f"pmqd.{name(bench, 'jobs', 2)}"],
    ).fetchone()
    assert row is not None
    assert {"fillfactor=50", "autovacuum_vacuum_scale_factor=0.02"} <= set(row["reloptions"])
    assert (row["indexes"], row["checks"]) == (4, 5)


@pytest.mark.parametrize("large", [False, True])
def test_rows_in_the_default_move_with_their_month(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """This month missing: its rows move in the transaction that attaches it. A large default partition is not scanned under
    a lock for that: its rows stay where they are, and are served as well.
    """
    if large:
        monkeypatch.setattr(store_partitions, "LARGE_DEFAULT_BYTES", 0)
    drop(bench, "jobs", 0)
    ids = bench.insert(5)
    put(bench, 0, 3, random_id=True)
    report = keep(bench)
    this = name(bench, "jobs", 0)
    if large:
        assert (report.made, report.postponed, where(bench)) == ([], [this], {"jobs_default": 8})
    else:
        assert (report.made, where(bench)) == ([this], {this: 5, "jobs_default": 3})
    assert len(bench.claim(ids)) == 5


def test_a_month_ahead_is_attached_to_a_large_default_without_a_scan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validated CHECK comes first and is gone afterwards; PostgreSQL says that it needed no scan."""
    monkeypatch.setattr(store_partitions, "LARGE_DEFAULT_BYTES", 0)
    put(bench, 0, 3, random_id=True)
    drop(bench, "jobs", 2)
    assert keep(bench).made == [name(bench, "jobs", 2)]
    schema.check(bench.dsn)
    drop(bench, "jobs", 2)
    said: list[str] = []
    with psycopg.connect(bench.dsn, autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
        connection.execute("set client_min_messages = debug1")
        for step in ("make_partition", "hold_off_default", "validate_hold", "attach_partition"):
            connection.execute(
                f"select pmqd.{step}('jobs', (date_trunc('month', now() at time zone 'utc') + interval '2 months')::date)"
            )
    assert any("jobs_default" in line and "implied by existing constraints" in line for line in said)
    assert where(bench) == {"jobs_default": 3}


def test_a_round_that_died_in_the_middle_is_finished_by_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made but not attached, with the CHECK left behind: the next round attaches, and the CHECK is gone."""
    monkeypatch.setattr(store_partitions, "LARGE_DEFAULT_BYTES", 0)
    drop(bench, "jobs", 2)
    for step in ("make_partition", "hold_off_default"):
        bench.connection.execute(
            f"select pmqd.{step}('jobs', (date_trunc('month', now() at time zone 'utc') + interval '2 months')::date)"
        )
    schema.check(bench.dsn)
    assert keep(bench).made == [name(bench, "jobs", 2)]
    assert bench.count("pg_constraint where conname like 'hold%%'") == 0


def test_a_month_is_dropped_when_its_last_job_is_over(bench: Bench) -> None:
    """Older than the longest retention: dropped; what is unfinished, or ended not long enough ago, moves to the default partition
    and goes on.
    """
    attach(bench, "jobs", -8)
    attach(bench, "jobs", -5)
    old = middle(bench, -8)
    put(bench, old, 2)
    completed(bench, old, old, 5)
    completed(bench, old, 99, 1)
    put(bench, old, 1, status="failed", ready=False, failed_at=199)
    put(bench, old, 1, status="cancelled", ready=False, cancelled_at=201)
    put(bench, old, 1, status="failed", ready=False, failed_at=201)
    completed(bench, middle(bench, -5), 120, 4)
    [held] = bench.steal(1)
    before = where(bench)
    retired = name(bench, "jobs", -8)
    assert before[retired] == 11, before
    assert keep(bench).retired == [retired]
    after = where(bench)
    assert after == {"jobs_default": 4, name(bench, "jobs", -5): 4}
    assert bench.row(held.id)["status"] == "running"
    assert months(bench) == [-5, 0, 1, 2]
    schema.check(bench.dsn)


def test_a_job_replayed_while_its_month_is_retired_is_kept(bench: Bench) -> None:
    """After the look without a lock it starts a new life: found by the second look, under the lock."""
    attach(bench, "jobs", -8)
    put(bench, middle(bench, -8), 2, status="failed", ready=False, failed_at=220)
    row = bench.connection.execute("select id from pmqd.jobs order by id limit 1").fetchone()
    assert row is not None
    bench.store.retry_job(row["id"])
    bench.connection.execute(
        "select pmqd.retire_partition('jobs', (date_trunc('month', now() at time zone 'utc') - interval '8 months')::date, %s::uuid[])",
        [[]],
    )
    assert where(bench) == {"jobs_default": 1}
    assert [job.id for job in bench.steal(9)] == [row["id"]]


def test_too_many_survivors_postpone_the_end_of_a_month(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving them would hold the lock too long: the month stays, and is said so."""
    monkeypatch.setattr(store_partitions, "MOVED_MOST", 2)
    attach(bench, "jobs", -8)
    put(bench, middle(bench, -8), 3)
    report = keep(bench)
    assert (report.retired, report.postponed) == ([], [name(bench, "jobs", -8)])
    assert bench.count("pmqd.jobs") == 3


def test_the_default_partition_is_cleaned_in_batches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ids that are no UUIDv7: what ended long enough ago goes, all else stays; a round out of time goes on where it ended."""
    monkeypatch.setattr(store_partitions, "CLEAN_BATCH", 10)
    completed(bench, 0, 101, 35, random_id=True)
    completed(bench, 0, 99, 10, random_id=True)
    put(bench, 0, 5, random_id=True)
    put(bench, 0, 7, random_id=True, status="failed", ready=False, failed_at=150)
    put(bench, 0, 3, random_id=True, status="cancelled", ready=False, cancelled_at=201)
    assert bench.store.keep_partitions(KEEP, budget_seconds=0).cleaned == 0
    assert keep(bench).cleaned == 38
    assert where(bench) == {"jobs_default": 22}
    bench.connection.execute(
        "insert into pmqd.jobs (id, queue_name, payload, status, ready, completed_at) values (%s, 'a', '1', 'completed', false,"
        " now() - interval '1 year')",
        [UUID(int=1)],
    )
    assert keep(bench).cleaned == 1, "the walk begins again at the start"


def test_logs_go_by_their_own_age(bench: Bench) -> None:
    """A month of logs is dropped when its last row is too old; stray rows of no month are deleted."""
    attach(bench, "job_logs", -3)
    attach(bench, "job_logs", -1)
    for days in (100, 45, 51):
        bench.connection.execute(
            "insert into pmqd.job_logs (job_id, attempt_number, status, created) values (%s, 1, 'success', now() - %s * interval '1 day')",
            [uuid4(), days],
        )
    drop(bench, "job_logs", -1)
    attach(bench, "job_logs", -1)
    bench.connection.execute(
        "insert into pmqd.job_logs (job_id, attempt_number, status, created) values (%s, 1, 'success', now() - interval '300 days')",
        [uuid4()],
    )
    report = keep(bench)
    assert report.retired == [name(bench, "job_logs", -3)]
    assert report.cleaned >= 1
    assert bench.count("pmqd.job_logs where created < now() - interval '120 days'") == 0


def test_a_lock_in_the_way_postpones_and_holds_up_nobody(bench: Bench) -> None:
    """While a transaction uses the default partition the month waits; enqueues beside it wait 200 ms at most, not for it."""
    drop(bench, "jobs", 2)
    with psycopg.connect(bench.dsn) as busy:
        busy.execute("insert into pmqd.jobs (id, queue_name, payload) values (%s, 'a', '1')", [uuid4()])
        reports: list[PartitionReport] = []
        thread = threading.Thread(target=lambda: reports.append(keep(bench)))
        thread.start()
        bench.insert(3)
        thread.join()
        assert reports[0].postponed == [name(bench, "jobs", 2)]
    assert keep(bench).made == [name(bench, "jobs", 2)]


def test_partitions_can_be_asked_for_by_month_alone(bench: Bench) -> None:
    """The view's own condition on names may come last: jobs_default must not be read as a month."""
    found = bench.connection.execute(
        "select parent from pmqd.partitions where month > '2000-01-01' and month < 'infinity'"
    )
    assert {row["parent"] for row in found.fetchall()} == {"jobs", "job_logs"}


def test_one_keeps_the_partitions_at_a_time(bench: Bench) -> None:
    """A second instance at the same moment does nothing."""
    drop(bench, "jobs", 2)
    first = store_partitions._Keeper(PostgresSettings(dsn=bench.dsn), SeenLife())
    assert first._alone()
    assert keep(bench) == PartitionReport()
    first.close()
    assert keep(bench).made
