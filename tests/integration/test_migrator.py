"""The migrator on real servers: order, windows, wakes, schedules, the lives of Redis, who leads."""

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import redis

from pmqd.config import Settings
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.migrator import Migrator
from tests.fix_servers import WaitUntil
from tests.roles import arena_for, context_for, process, running, settings_for, turn_until

Connection = psycopg.Connection[Any]
Insert = Callable[..., list[UUID]]


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the test's own for looking into Redis."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def settings(database: str, redis_url: str, tmp_path: Path) -> Settings:
    """An instance whose pool of two workers serves `q`."""
    return settings_for(database, redis_url, tmp_path)


@pytest.fixture
def serve(connection: Connection) -> Callable[..., UUID]:
    """Makes a live instance that serves these queues with two slots, as its maintenance would."""

    def make(*queues: str, slots: int = 2) -> UUID:
        instance_id = uuid4()
        pools = {"p": {"queues": list(queues), "processes": slots, "concurrency": 1}}
        connection.execute(
            "insert into pmqd.instances (id, host, pid, lease_tick, queues, pools)"
            " select %s, 'test', 1, tick, %s, %s from pmqd.ticker",
            (instance_id, list(queues), json.dumps(pools)),
        )
        return instance_id

    return make


@pytest.fixture
def insert(connection: Connection) -> Insert:
    """Inserts jobs, one per priority given, all in one statement; returns their ids."""

    def make(*priorities: int, queue: str = "q", delay: float = 0.0) -> list[UUID]:
        rows = connection.execute(
            "insert into pmqd.jobs (queue_name, payload, priority, run_at)"
            " select %s, '{}', p, now() + %s * interval '1 s' from unnest(%s::int[]) p returning id",
            (queue, delay, list(priorities)),
        ).fetchall()
        return [row[0] for row in rows]

    return make


def statuses(connection: Connection) -> dict[str, int]:
    """How many jobs there are in each state."""
    rows = connection.execute("select status, count(*) from pmqd.jobs group by 1").fetchall()
    return dict(rows)


def popped(client: redis.Redis, key: str) -> list[str]:
    """All members of a list in the order in which a worker would pop them."""
    return list(reversed(client.lrange(key, 0, -1)))  # type: ignore[arg-type, type-var]


def test_lists_hold_due_jobs_in_order(
    settings: Settings,
    serve: Callable[..., UUID],
    connection: Connection,
    client: redis.Redis,
    wait_until: WaitUntil,
):
    """Each band's list is popped in (priority, run_at, id) order, whatever the order of the inserts."""
    serve("q", slots=50)
    now = datetime.now(UTC)
    rows = [
        (uuid4(), priority, now - timedelta(seconds=age))
        for age in (5, 60, 5)
        for priority in (200, 1, 100, 50, 51, 150, 151)
    ]
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into pmqd.jobs (id, queue_name, payload, priority, run_at) values (%s, 'q', '{}', %s, %s)",
            rows,
        )
    with running(context_for("migrator", settings)):
        wait_until(lambda: statuses(connection) == {"migrated_to_redis": len(rows)}, what="all marked")
        wait_until(lambda: client.llen("queue:q:low") == 6, what="all pushed")
    ordered = sorted(rows, key=lambda row: (row[1], row[2], row[0]))
    for key, low, high in (("queue:q:high", 1, 50), ("queue:q", 51, 150), ("queue:q:low", 151, 999)):
        assert popped(client, key) == [str(row[0]) for row in ordered if low <= row[1] <= high]


def test_a_backlog_costs_redis_only_its_window(
    settings: Settings,
    serve: Callable[..., UUID],
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
):
    """Of five thousand due jobs that nobody takes, two per slot and band are marked and pushed, and no more."""
    serve("q", slots=3)
    insert(*[100] * 5000)
    insert(*[10] * 40)
    migrator = Migrator(context_for("migrator", settings))
    turn_until(migrator.poll, lambda: client.llen("queue:q") and client.llen("queue:q:high"))
    for _ in range(50):
        migrator.poll(time.monotonic())
    migrator.close()
    assert (client.llen("queue:q"), client.llen("queue:q:high")) == (6, 6)
    assert statuses(connection) == {"migrated_to_redis": 12, "queued": 5028}


def test_bands_do_not_share_room(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, client: redis.Redis
):
    """A full list of newsletters does not keep a receipt waiting: the high band has room of its own."""
    serve("q")
    insert(*[200] * 1000)
    migrator = Migrator(context_for("migrator", settings))
    turn_until(migrator.poll, lambda: client.llen("queue:q:low"))
    receipt = insert(10)
    turn_until(migrator.poll, lambda: client.lrange("queue:q:high", 0, -1) == [str(receipt[0])], timeout=1.0)
    migrator.close()


def test_a_fast_backlog_flows(
    settings: Settings, serve: Callable[..., UUID], connection: Connection, client: redis.Redis
):
    """A backlog that is popped as fast as it comes keeps flowing, in order, and never exceeds the cap in Redis."""
    serve("q")
    connection.execute(
        "insert into pmqd.jobs (queue_name, payload, run_at)"
        " select 'q', '{}', now() - interval '1 h' + n * interval '1 ms' from generate_series(1, 20000) n"
    )
    expected = [
        str(row[0]) for row in connection.execute("select id from pmqd.jobs order by priority, run_at, id")
    ]
    found: list[str] = []
    longest, started = 0, time.monotonic()
    with running(context_for("migrator", settings)):
        while len(found) < 20000:
            assert time.monotonic() - started < 30, f"only {len(found)} of 20000 hints"
            longest = max(longest, client.llen("queue:q"))  # type: ignore[type-var]
            found += client.rpop("queue:q", 100) or []  # type: ignore[operator]
            # What was popped is claimed, as a worker would: marked rows that stay would be walked over by every mark.
            if len(found) % 2000 == 0:
                claim_all(connection, found[-2000:])
    assert found == expected
    assert longest <= 2000
    print(f"20000 hints in {time.monotonic() - started:.2f} s, longest list {longest}")


def claim_all(connection: Connection, ids: list[str]) -> None:
    """Makes jobs completed, as if a worker had claimed, run and settled them."""
    connection.execute(
        "update pmqd.jobs set status = 'completed', ready = false, completed_at = now() where id = any(%s::uuid[])",
        (ids,),
    )


def test_a_commit_wakes_the_migrator_within_milliseconds(
    settings: Settings,
    serve: Callable[..., UUID],
    insert: Insert,
    client: redis.Redis,
    connection: Connection,
):
    """From the commit of an insert to the hint in Redis: one mark and one push, measured over 200 jobs."""
    serve("q")
    waits = []
    with running(context_for("migrator", settings)):
        client.blpop(["queue:q"], timeout=10) if insert(100) else None
        for _ in range(200):
            time.sleep(0.005)
            job = insert(100)[0]
            started = time.monotonic()
            found = client.blpop(["queue:q"], timeout=5)
            waits.append(time.monotonic() - started)
            assert found == ("queue:q", str(job))  # type: ignore[comparison-overlap]
            claim_all(connection, [str(job)])
    p50, p99 = statistics.median(waits), statistics.quantiles(waits, n=100)[98]
    print(f"commit to hint: p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms, max {max(waits) * 1000:.2f} ms")
    assert p50 < 0.02
    assert p99 < 0.25


def test_without_a_word_it_looks_each_poll_seconds(
    database: str, redis_url: str, tmp_path: Path, serve: Callable[..., UUID], insert: Insert,
    connection: Connection, client: redis.Redis,
):  # fmt: skip
    """A notification that never comes costs at most poll_seconds, even without a pulse."""
    serve("q")
    settings = settings_for(database, redis_url, tmp_path, migrator={"poll_seconds": 0.4})
    with running(context_for("migrator", settings)):
        assert insert(100)
        assert client.blpop(["queue:q"], timeout=10)
        time.sleep(1.5)  # the looks that follow a wake are over
        connection.execute("alter table pmqd.jobs disable trigger all")
        insert(100)
        started = time.monotonic()
        assert client.blpop(["queue:q"], timeout=5)
        assert time.monotonic() - started < 0.8


def test_a_scheduled_job_is_offered_when_it_is_due(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, client: redis.Redis
):
    """The pulse names the next due time; the hint comes then: not before, and within milliseconds after."""
    serve("q")
    context = context_for("migrator", settings)
    arena = context.arena
    with running(context):
        insert(100, delay=1.0)
        due = time.monotonic() + 1.0
        pulse = {
            "queue_name": "q",
            "ready": False,
            "served": True,
            "oldest_ready_seconds": 0,
            "old_marks": False,
        }
        arena.set_pulse([pulse | {"due_in_seconds": 1.0}])
        arena.ring(arena.bell_migrator)
        assert client.blpop(["queue:q"], timeout=5)
        late = time.monotonic() - due
    print(f"scheduled job late by {late * 1000:.1f} ms")
    assert -0.01 <= late < 0.1


def test_jobs_due_within_a_second_need_no_pulse(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, client: redis.Redis
):
    """A job due before the next pulse can tell of it is found by the looks that follow its own notification."""
    serve("q")
    with running(context_for("migrator", settings)):
        insert(100)
        assert client.blpop(["queue:q"], timeout=10)
        insert(100, delay=0.4)
        due = time.monotonic() + 0.4
        assert client.blpop(["queue:q"], timeout=5)
        late = time.monotonic() - due
    assert -0.01 <= late < 0.25


def test_a_paused_queue_is_not_marked(
    settings: Settings,
    serve: Callable[..., UUID],
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
):
    """Jobs of a paused queue stay queued; another queue flows; after the resume they are offered."""
    serve("q", "other")
    connection.execute("insert into pmqd.job_queues (name, is_active) values ('q', false)")
    insert(100)
    insert(100, queue="other")
    migrator = Migrator(context_for("migrator", settings))
    turn_until(migrator.poll, lambda: client.llen("queue:other"))
    assert client.llen("queue:q") == 0
    connection.execute("update pmqd.job_queues set is_active = true")
    connection.execute("select pmqd.wake()")
    turn_until(migrator.poll, lambda: client.llen("queue:q"), timeout=2.0)
    migrator.close()


def test_a_queue_that_nobody_serves_stays_queued(
    settings: Settings,
    serve: Callable[..., UUID],
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
):
    """Jobs for which no live instance has a worker are left alone, and offered as soon as one has."""
    serve("other")
    insert(100)
    insert(100, queue="other")
    context = context_for("migrator", settings)
    migrator = Migrator(context)
    turn_until(migrator.poll, lambda: client.llen("queue:other"))
    assert client.llen("queue:q") == 0
    assert statuses(connection) == {"queued": 1, "migrated_to_redis": 1}
    serve("q")
    pulse = {"queue_name": "q", "ready": True, "served": True, "oldest_ready_seconds": 1, "old_marks": False}
    context.arena.set_pulse([pulse | {"due_in_seconds": None}])
    turn_until(migrator.poll, lambda: client.llen("queue:q"), timeout=2.0)
    migrator.close()


def test_queue_settings_are_written_at_the_start(
    database: str, redis_url: str, tmp_path: Path, serve: Callable[..., UUID], connection: Connection, wait_until: WaitUntil
):  # fmt: skip
    """Every queue that is served or configured has its row, with its configured settings."""
    serve("q")
    settings = settings_for(database, redis_url, tmp_path, queues={"slow": {"max_attempts": 7}})
    with running(context_for("migrator", settings)):
        query = "select name, max_attempts from pmqd.job_queues order by name"
        wait_until(
            lambda: connection.execute(query).fetchall() == [("q", None), ("slow", 7)], what="the rows"
        )


def test_the_missions_item_is_pushed_when_asked_for(
    database: str, redis_url: str, tmp_path: Path, serve: Callable[..., UUID], insert: Insert, client: redis.Redis,
    wait_until: WaitUntil,
):  # fmt: skip
    """With item = "full" and job_status = "all" the list holds the mission's JSON, and job:ID says migrated."""
    serve("q")
    settings = settings_for(database, redis_url, tmp_path, redis={"item": "full", "job_status": "all"})
    job = insert(10)[0]
    with running(context_for("migrator", settings)):
        wait_until(lambda: client.llen("queue:q:high"), what="the hint")
        item = json.loads(client.lindex("queue:q:high", 0))  # type: ignore[arg-type]
        assert client.hget(f"job:{job}", "status") == "migrated"
        assert client.sismember("recent_jobs:q", str(job))
    assert list(item)[0] == "id"
    assert item["id"] == str(job)
    assert set(item) == {
        "id",
        "queue_name",
        "priority",
        "payload",
        "created_at",
        "attempt_count",
        "max_attempts",
    }


def test_inserts_under_flood_do_not_notify(
    settings: Settings, serve: Callable[..., UUID], database: str, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
):  # fmt: skip
    """While deliveries keep the migrator busy it declares itself awake; when the flood is over, inserts notify again."""
    serve("q", slots=200)
    awake = "select awake_until > clock_timestamp() from pmqd.leader"
    with running(context_for("migrator", settings)), psycopg.connect(database, autocommit=True) as listener:
        deadline = time.monotonic() + 15
        while not connection.execute(awake).fetchall()[0][0]:
            assert time.monotonic() < deadline, "never declared awake"
            connection.execute(
                "insert into pmqd.jobs (queue_name, payload) select 'q', '{}' from generate_series(1, 200)"
            )
            client.delete("queue:q")
        channel = connection.execute(
            "select nspname::text from pg_namespace where nspname = 'pmqd'"
        ).fetchone()
        assert channel is not None
        listener.execute("listen pmqd")
        connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
        wait_until(lambda: not connection.execute(awake).fetchall()[0][0], what="fallen asleep")


def test_a_lost_hint_is_offered_again_after_a_workers_death(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, client: redis.Redis
):
    """A hint that died with the worker that had popped it is back in its list, at the pop end, in milliseconds."""
    serve("q", slots=10)
    ids = [str(job) for job in insert(*[100] * 5)]
    context = context_for("migrator", settings)
    migrator = Migrator(context)
    turn_until(migrator.poll, lambda: client.llen("queue:q") == 5)
    before = popped(client, "queue:q")
    client.rpop("queue:q", 2)
    context.arena.request_reoffer()
    turn_until(migrator.poll, lambda: client.llen("queue:q") == 5, timeout=1.0)
    migrator.close()
    assert popped(client, "queue:q") == before == sorted(ids)


def test_old_marks_are_offered_again_at_most_every_five_seconds(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, client: redis.Redis
):
    """A pulse that sees old marks brings their hints back, and a second one soon after costs nothing."""
    serve("q")
    insert(100)
    context = context_for("migrator", settings)
    migrator = Migrator(context)
    turn_until(migrator.poll, lambda: client.llen("queue:q"))
    client.delete("queue:q")
    pulse = {"queue_name": "q", "ready": True, "served": True, "oldest_ready_seconds": 9, "old_marks": True}
    migrator._lead._reoffered_at.clear()  # type: ignore[union-attr]
    context.arena.set_pulse([pulse | {"due_in_seconds": None}])
    turn_until(migrator.poll, lambda: client.llen("queue:q"), timeout=1.0)
    client.delete("queue:q")
    for _ in range(20):
        migrator.poll(time.monotonic())
    assert client.llen("queue:q") == 0
    migrator.close()


def test_flushall_begins_a_new_life(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
):  # fmt: skip
    """After FLUSHALL the epoch is another one, in Redis and in PostgreSQL, and everything marked is offered again."""
    serve("q", slots=10)
    ids = {str(job) for job in insert(*[100] * 8)}
    with running(context_for("migrator", settings)):
        wait_until(lambda: client.llen("queue:q") == 8, what="offered")
        epoch = client.get("pmqd:epoch")
        client.flushall()
        wait_until(lambda: set(popped(client, "queue:q")) == ids, timeout=3.0, what="offered again")
        assert client.get("pmqd:epoch") not in (None, epoch)
        row = connection.execute("select redis_epoch::text from pmqd.leader").fetchone()
        assert row == (client.get("pmqd:epoch"),)


def test_redis_killed_and_started_again(
    database: str, own_redis: RedisServer, tmp_path: Path, serve: Callable[..., UUID], insert: Insert,
    connection: Connection, wait_until: WaitUntil,
):  # fmt: skip
    """While Redis is away nothing new is marked and the flag is up; within 3 s of its return all marks are offered."""
    serve("q", slots=10)
    settings = settings_for(database, own_redis.url, tmp_path)
    context = context_for("migrator", settings)
    first = insert(*[100] * 4)
    with running(context):
        with redis.Redis.from_url(own_redis.url) as client:
            wait_until(lambda: client.llen("queue:q") == 4, what="offered")
        own_redis.kill()
        second = insert(*[100] * 4)
        wait_until(lambda: context.arena.redis_down, timeout=3.0, what="seen as down")
        assert statuses(connection)["migrated_to_redis"] <= len(first + second)
        own_redis.start()
        started = time.monotonic()
        with redis.Redis.from_url(own_redis.url) as client:
            wait_until(lambda: client.llen("queue:q") == 8, timeout=5.0, what="all offered")
        print(f"Redis used again after {time.monotonic() - started:.2f} s")
        assert time.monotonic() - started < 3.0
        assert not context.arena.redis_down


def test_a_crash_between_mark_and_push_loses_nothing(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
):  # fmt: skip
    """Killed after the mark and before the push: the next migrator offers what has no hint."""
    serve("q", slots=10)
    ids = {str(job) for job in insert(*[100] * 5)}
    with process("migrator", settings, PMQD_CRASHPOINT="migrator.marked=kill") as child:
        assert child.wait(20) == -signal.SIGKILL
    assert (statuses(connection), client.llen("queue:q")) == ({"migrated_to_redis": 5}, 0)
    with running(context_for("migrator", settings)):
        wait_until(lambda: set(popped(client, "queue:q")) == ids, what="offered by the next one")


def test_a_crash_in_the_middle_of_a_new_epoch_is_repaired(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
):  # fmt: skip
    """Killed between the row and the key of a new epoch: the next migrator finds them different and binds them anew."""
    serve("q", slots=10)
    insert(100)
    with process("migrator", settings, PMQD_CRASHPOINT="migrator.epoch=kill") as child:
        assert child.wait(20) == -signal.SIGKILL
    assert client.get("pmqd:epoch") is None
    with running(context_for("migrator", settings)):
        wait_until(lambda: client.llen("queue:q") == 1, what="offered")
        row = connection.execute("select redis_epoch::text from pmqd.leader").fetchone()
        assert row == (client.get("pmqd:epoch"),)


def test_one_of_two_leads_and_the_other_takes_over(
    settings: Settings, serve: Callable[..., UUID], insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
):  # fmt: skip
    """Two migrators: one term. The leader is killed: the other leads within two seconds and delivers."""
    serve("q")
    term = "select term from pmqd.leader"
    with process("migrator", settings) as leader:
        wait_until(lambda: connection.execute(term).fetchall() == [(1,)], what="the first leads")
        with running(context_for("migrator", settings)):
            insert(100)
            assert client.blpop(["queue:q"], timeout=10)
            time.sleep(1.2)  # long enough for the other one to have tried
            assert connection.execute(term).fetchall() == [(1,)]
            leader.kill()
            leader.wait()
            started = time.monotonic()
            insert(100)
            assert client.blpop(["queue:q"], timeout=10)
            assert time.monotonic() - started < 2.5
            assert connection.execute(term).fetchall() == [(2,)]


def test_a_leader_whose_term_has_ended_writes_nothing(
    settings: Settings,
    serve: Callable[..., UUID],
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
):
    """A leader that was cut off and is back sees a higher term, marks nothing, and stands for the lead anew."""
    serve("q")
    migrator = Migrator(context_for("migrator", settings))
    turn_until(migrator.poll, lambda: client.exists("pmqd:epoch"))
    connection.execute("update pmqd.leader set term = term + 5")
    insert(100)
    turn_until(migrator.poll, lambda: client.llen("queue:q"), timeout=5.0)
    migrator.close()
    assert connection.execute("select term from pmqd.leader").fetchall() == [(7,)]


def test_postgres_killed_and_started_again(
    own_postgres: PostgresServer, redis_url: str, tmp_path: Path, client: redis.Redis, wait_until: WaitUntil
):
    """PostgreSQL away: the migrator stays, and delivers within seconds of its return."""
    dsn = own_postgres.dsn("pmqd")
    insert = "insert into pmqd.jobs (queue_name, payload) values ('q', '{}')"
    serve = "insert into pmqd.instances (id, host, pid, lease_tick, queues) values (gen_random_uuid(), 'h', 1, 0, '{q}')"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(serve)
    with running(context_for("migrator", settings_for(dsn, redis_url, tmp_path))):
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(insert)
        assert client.blpop(["queue:q"], timeout=10)
        own_postgres.kill()
        own_postgres.start()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(insert)
        started = time.monotonic()
        wait_until(lambda: client.llen("queue:q"), timeout=10.0, what="delivered")
        assert time.monotonic() - started < 3.0


def test_an_unexpected_error_pauses_and_does_not_end_it(
    database: str, redis_url: str, tmp_path: Path, serve: Callable[..., UUID], insert: Insert,
    connection: Connection, client: redis.Redis, caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    """An error that is no lost connection costs error_pause_seconds; then the work goes on."""
    serve("q")
    settings = settings_for(database, redis_url, tmp_path, migrator={"error_pause_seconds": 0.5})
    connection.execute(
        "create function pmqd.refuse() returns trigger language plpgsql as"
        " $$ begin raise exception 'refused' using errcode = '23514'; end $$"
    )
    connection.execute(
        "create trigger refuse before update on pmqd.jobs for each row execute function pmqd.refuse()"
    )
    insert(100)
    with running(context_for("migrator", settings)):
        deadline = time.monotonic() + 10
        while "unexpected error" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        connection.execute("drop trigger refuse on pmqd.jobs")
        assert client.blpop(["queue:q"], timeout=5)


def test_the_lease_is_renewed_when_maintenance_is_not_there(
    settings: Settings, serve: Callable[..., UUID], connection: Connection
):
    """A lease that has not been renewed for seconds is renewed by the migrator, as long as the master lives."""
    instance_id = serve("q")
    arena = arena_for(instance_id)
    arena.lease_renewed()
    migrator = Migrator(context_for("migrator", settings, arena))
    connection.execute("update pmqd.ticker set tick = tick + 10, holder = %s", (instance_id,))
    old = time.monotonic() + 10
    arena.beat_master()
    migrator._keep_lease(old + 20)
    query = "select tick - lease_tick from pmqd.ticker, pmqd.instances"
    assert connection.execute(query).fetchall() == [(10,)], "the master has stood still for long"
    migrator._keep_lease(old - 3)
    assert connection.execute(query).fetchall() == [(0,)]
    migrator.close()
