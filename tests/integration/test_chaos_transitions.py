"""The trigger of chaos runs: every change of a job's row leaves its transition, in the same transaction; and what the checker reads of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
import redis

from pmqd import schema
from pmqd.chaos import checker, checks_history, checks_stores, history
from pmqd.chaos.history import ProducerLog
from pmqd.errors import SchemaError
from pmqd.job import Action
from tests.store_tools import Bench, open_bench, outcome


@pytest.fixture
def bench(database: str) -> Iterator[Bench]:
    """A store with a lease on a fresh database with the trigger."""
    with psycopg.connect(database, autocommit=True) as connection:
        history.install(connection, "pmqd")
    with open_bench(database) as bench:
        yield bench


def moves(bench: Bench, job_id: UUID) -> list[tuple[str | None, str]]:
    """The transitions of a job: from, to."""
    rows = bench.connection.execute(
        "select old_status, new_status from pmqd_chaos.transitions where job_id = %s order by seq", [job_id]
    ).fetchall()
    return [(row["old_status"], row["new_status"]) for row in rows]


def test_every_change_is_recorded(bench: Bench) -> None:
    """Insert, claim and settle, each with its tokens and the attempt; what changes neither status nor token is not."""
    [job_id] = bench.insert(run_at="2020-01-01")
    [job] = bench.claim([job_id])
    bench.connection.execute("update pmqd.jobs set updated_at = now() where id = %s", [job_id])
    bench.connection.execute("update pmqd.jobs set status = status where id = %s", [job_id])
    bench.store.settle([outcome(job, Action.COMPLETE)], [job.token])
    rows = bench.connection.execute("select * from pmqd_chaos.transitions order by seq").fetchall()
    assert [
        (row["new_status"], row["old_token"], row["new_token"], row["attempt_count"]) for row in rows
    ] == [
        ("queued", None, None, 0),
        ("running", None, job.token, 1),
        ("completed", job.token, job.token, 1),
    ]
    assert all(row["at"] >= row["began"] >= row["run_at"] for row in rows)
    assert rows[1]["worker_id"] == job_worker(bench, job_id)


def job_worker(bench: Bench, job_id: UUID) -> str:
    """Who ran it."""
    return str(bench.row(job_id)["worker_id"])


def test_a_transition_is_part_of_its_transaction(bench: Bench, database: str) -> None:
    """What is rolled back has not happened in the history either."""
    with psycopg.connect(database) as connection:
        connection.execute("insert into pmqd.jobs (queue_name, payload) values ('mail', '{}')")
        connection.rollback()
    assert bench.count("pmqd_chaos.transitions") == 0


def test_copy_and_the_function_are_recorded(bench: Bench, database: str) -> None:
    """Rows come in by COPY and by the SQL function, too, and whoever may only call the function may still do it."""
    with psycopg.connect(database, autocommit=True) as connection:
        with connection.cursor().copy("copy pmqd.jobs (queue_name, payload) from stdin") as copy:
            copy.write("mail\t{}\n" * 1000)
        connection.execute("set role pmqd_enqueue")
        connection.execute("select pmqd.enqueue('mail', '{}')")
    assert bench.count("pmqd_chaos.transitions where new_status = 'queued'") == 1001
    assert bench.count("pmqd_chaos.transitions where old_status is not null") == 0


def test_the_daemons_role_is_recorded(bench: Bench, database: str) -> None:
    """A daemon with its own small role changes rows as before."""
    bench.insert()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("set role pmqd_daemon")
        connection.execute("update pmqd.jobs set status = 'migrated_to_redis'")
        connection.execute(history.INSERT_EFFECT, [uuid4(), uuid4()])
    assert bench.count("pmqd_chaos.transitions where new_status = 'migrated_to_redis'") == 1
    assert bench.count("pmqd_chaos.effects") == 1


def test_a_month_that_is_made_later_records_too(bench: Bench) -> None:
    """Partitions attached after the trigger have it as well, and moving rows there tells of no second enqueue."""
    month = "2020-03-01"
    job_id = bench.connection.execute("select pmqd.id_at(%s)::text as id", [f"{month} 12:00+00"]).fetchone()
    assert job_id is not None
    bench.insert(id=job_id["id"])
    bench.connection.execute("select pmqd.make_partition('jobs', %s)", [month])
    bench.connection.execute("select pmqd.attach_partition('jobs', %s)", [month])
    bench.connection.execute(
        "update pmqd.jobs set status = 'migrated_to_redis' where id = %s", [job_id["id"]]
    )
    assert moves(bench, UUID(job_id["id"])) == [(None, "queued"), ("queued", "migrated_to_redis")]


def test_the_daemon_accepts_the_schema(bench: Bench, database: str) -> None:
    """A store opens on a schema with the trigger: the daemon looks at the version alone. `schema check` names the trigger."""
    assert bench.another().depths() is not None
    with pytest.raises(SchemaError, match="chaos_note"):
        schema.check(database)


def test_transitions_come_in_the_binary_form(bench: Bench, database: str) -> None:
    """What COPY sends is what the table holds: every field, for jobs in the order of their ids."""
    ids = bench.insert(5)
    jobs = bench.claim(ids)
    bench.store.settle([outcome(job, Action.COMPLETE) for job in jobs[:3]], [])
    with psycopg.connect(database, autocommit=True) as connection:
        found = list(checks_history.transitions(connection))
        rows = list(checks_history.rows(connection, "pmqd"))
    assert [each.job for each in found] == sorted(each.job for each in found)
    assert len(found) == 13
    last = bench.connection.execute(
        "select * from pmqd_chaos.transitions order by job_id desc, seq desc"
    ).fetchone()
    assert last is not None
    assert found[-1].seq == last["seq"]
    assert found[-1].new_token == last["new_token"].bytes
    assert found[-1].at == round(last["at"].timestamp() * 1e6) - checks_history.EPOCH_US
    assert (found[-1].attempt, found[-1].max_attempts, found[-1].interruptions) == (1, 3, 0)
    assert sorted(row.status for row in rows) == [b"c", b"c", b"c", b"r", b"r"]
    assert {row.queue for row in rows} == {"mail"}


# --- the checker on real stores ------------------------------------------------------------------------------


def run_one(bench: Bench, folder: Path, *, acknowledged: bool = True) -> UUID:
    """A job that goes its whole way, with all that producers and handlers would have recorded of it."""
    log = ProducerLog(folder / "history", 0)
    [job_id] = ids = bench.insert()
    log.attempt([(job_id, "quick", "mail", 3, 100, 0)])
    log.note("+" if acknowledged else "-", ids)
    [job] = bench.claim(ids)
    moment = f"1 {job.token} 7 {time.monotonic_ns()} {time.time_ns() // 1000}"
    with (folder / "history" / history.HANDLERS).open("a") as handlers:
        handlers.write(f"S {job_id} {moment}\nE {job_id} {moment} ok\n")
    bench.store.settle([outcome(job, Action.COMPLETE)], [job.token])
    log.close()
    return job_id


def test_a_run_that_held(bench: Bench, tmp_path: Path, database: str, redis_url: str) -> None:
    """A whole job in both stores: nothing is found, and the figures are right."""
    run_one(bench, tmp_path)
    page = 'pmqd_jobs_started_total{queue="mail"} 1.0\npmqd_jobs_completed_total{queue="mail"} 1.0\n'
    report = checker.check(tmp_path, database, "pmqd", redis_url, "", [page])
    assert (report.jobs, report.held, report.first) == (1, True, {})


def test_what_is_broken_in_the_stores_is_found(
    bench: Bench, tmp_path: Path, database: str, redis_url: str
) -> None:
    """A lost row, an unknown one, a claim left over, a counter that lies, and every kind of leftover in Redis; the lost job's whole history is shown."""
    lost = run_one(bench, tmp_path)
    bench.connection.execute("delete from pmqd.jobs where id = %s", [lost])
    run_one(bench, tmp_path, acknowledged=False)
    bench.running()
    with redis.Redis.from_url(redis_url) as client:
        client.lpush("queue:mail", "hint")
        client.hset(f"job:{lost}", "status", "completed")
        client.set("pmqd:epoch", "x")
        client.set("else", "x")
    report = checker.check(tmp_path, database, "pmqd", redis_url, "", ["pmqd_jobs_completed_total 5\n"])
    broken = {name: number for name, number in report.counts.items() if number}
    assert broken["lost"] == 1
    assert broken["unknown"] == 2
    assert broken["stuck"] == 1
    assert broken["claims_left"] == 1
    assert broken["leftovers_redis"] == 3
    assert broken["counters_off"] >= 1
    assert not report.held
    assert any(f"? {lost}" in line for line in report.first["lost"])
    assert any("running -> completed" in line for line in report.first["lost"])


def test_effects_are_counted(bench: Bench, database: str) -> None:
    """A job that settled itself has left one row of its own: two are caught, and so is none."""
    [twice, never] = bench.claim(bench.insert(2, kind="settles_itself"))
    for _ in range(2):
        bench.connection.execute(history.INSERT_EFFECT, [twice.id, twice.token])
    bench.store.settle([outcome(each, Action.COMPLETE) for each in (twice, never)], [])
    with psycopg.connect(database, autocommit=True) as connection:
        found = list(checks_stores.effects(connection, "pmqd"))
    assert sorted(name for name, _ in found) == ["effects_doubled"] * 2


def test_rows_of_a_dying_host_need_not_be_counted(bench: Bench, database: str) -> None:
    """What was settled in the second before a whole host died may be missing in its counters, and no more than that."""
    job = bench.running()
    bench.store.settle([outcome(job, Action.COMPLETE)], [job.token])
    now, to_database = time.monotonic_ns() // 1000, (time.time_ns() - time.monotonic_ns()) // 1000
    with psycopg.connect(database, autocommit=True) as connection:
        wanted = checks_stores.recorded(connection, "pmqd")
        soon = checks_stores.orphaned_rows(connection, "pmqd", [now], to_database)
        late = checks_stores.orphaned_rows(connection, "pmqd", [now + 60_000_000], to_database)
    assert (soon, late) == (1, 0)
    around = checks_history.Surroundings()
    seen = checks_stores.counted([""])
    assert list(checks_stores.counters(seen, wanted, soon, around)) == []
    assert {name for name, _ in checks_stores.counters(seen, wanted, late, around)} == {"counters_off"}
    more = checks_stores.counted(['pmqd_jobs_completed_total{a="b"} 2\n'])
    assert any("completed" in text for _, text in checks_stores.counters(more, wanted, soon, around))
