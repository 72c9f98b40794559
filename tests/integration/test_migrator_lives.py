"""The migrator when something is lost: hints, Redis, PostgreSQL, the migrator itself, the lead."""

import logging
import signal
import time
from pathlib import Path
from typing import cast

import psycopg
import pytest
import redis

from pmqd.config import Settings
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.migrator import Migrator
from tests.fix_servers import WaitUntil
from tests.roles import (
    Connection,
    Insert,
    Serve,
    arena_for,
    context_for,
    process,
    running,
    settings_for,
    turn_until,
)

pytest_plugins = ["tests.role_fixtures"]
log = logging.getLogger("tests")


def statuses(connection: Connection) -> dict[str, int]:
    """How many jobs there are in each state."""
    rows = connection.execute("select status, count(*) from pmqd.jobs group by 1").fetchall()
    return dict(rows)


def popped(client: redis.Redis, key: str) -> list[str]:
    """All members of a list in the order in which a worker would pop them."""
    return [str(member) for member in reversed(cast("list[str]", client.lrange(key, 0, -1)))]


def test_a_lost_hint_is_offered_again_after_a_workers_death(
    settings: Settings, serve: Serve, insert: Insert, client: redis.Redis
) -> None:
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
    settings: Settings, serve: Serve, insert: Insert, client: redis.Redis
) -> None:
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


def test_old_marks_of_a_paused_queue_are_left(
    settings: Settings, serve: Serve, insert: Insert, client: redis.Redis
) -> None:
    """Nobody could claim them: their hints are offered again with the first pulse after the resume, and not before."""
    serve("q")
    insert(100)
    context = context_for("migrator", settings)
    migrator = Migrator(context)
    turn_until(migrator.poll, lambda: client.llen("queue:q"))
    client.delete("queue:q")
    pulse = {"queue_name": "q", "served": True, "oldest_ready_seconds": 9, "old_marks": True}
    migrator._lead._reoffered_at.clear()  # type: ignore[union-attr]
    context.arena.set_pulse([pulse | {"due_in_seconds": None, "ready": False}])
    for _ in range(20):
        migrator.poll(time.monotonic())
    assert client.llen("queue:q") == 0
    context.arena.set_pulse([pulse | {"due_in_seconds": None, "ready": True}])
    turn_until(migrator.poll, lambda: client.llen("queue:q"), timeout=1.0)
    migrator.close()


def test_flushall_begins_a_new_life(
    settings: Settings, serve: Serve, insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
) -> None:  # fmt: skip
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
    database: str, own_redis: RedisServer, tmp_path: Path, serve: Serve, insert: Insert,
    connection: Connection, wait_until: WaitUntil,
) -> None:  # fmt: skip
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
        log.info("Redis used again after %.2f s", time.monotonic() - started)
        assert time.monotonic() - started < 3.0
        assert not context.arena.redis_down


def test_a_crash_between_mark_and_push_loses_nothing(
    settings: Settings, serve: Serve, insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
) -> None:  # fmt: skip
    """Killed after the mark and before the push: the next migrator offers what has no hint."""
    serve("q", slots=10)
    ids = {str(job) for job in insert(*[100] * 5)}
    with process("migrator", settings, PMQD_CRASHPOINT="migrator.marked=kill") as child:
        assert child.wait(20) == -signal.SIGKILL
    assert (statuses(connection), client.llen("queue:q")) == ({"migrated_to_redis": 5}, 0)
    with running(context_for("migrator", settings)):
        wait_until(lambda: set(popped(client, "queue:q")) == ids, what="offered by the next one")


def test_a_crash_in_the_middle_of_a_new_epoch_is_repaired(
    settings: Settings, serve: Serve, insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
) -> None:  # fmt: skip
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
    settings: Settings, serve: Serve, insert: Insert, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
) -> None:  # fmt: skip
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
    serve: Serve,
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
) -> None:
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
) -> None:
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
    database: str, redis_url: str, tmp_path: Path, serve: Serve, insert: Insert,
    connection: Connection, client: redis.Redis, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
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
    settings: Settings, serve: Serve, connection: Connection
) -> None:
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
