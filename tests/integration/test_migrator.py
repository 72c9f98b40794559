"""The migrator on real servers: order, windows, wakes, schedules, which queues, which form."""

import json
import logging
import statistics
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import psycopg
import pytest
import redis

from pmqd import metrics
from pmqd import migrator as migrator_module
from pmqd.broker import Broker
from pmqd.config import Settings
from pmqd.errors import BrokerUnavailable
from pmqd.migrator import Migrator
from pmqd.store import Store
from tests.fix_servers import WaitUntil
from tests.roles import Connection, Insert, Serve, context_for, running, settings_for, turn_until

pytest_plugins = ["tests.role_fixtures"]
log = logging.getLogger("tests")


def statuses(connection: Connection) -> dict[str, int]:
    """How many jobs there are in each state."""
    rows = connection.execute("select status, count(*) from pmqd.jobs group by 1").fetchall()
    return dict(rows)


def popped(client: redis.Redis, key: str) -> list[str]:
    """All members of a list in the order in which a worker would pop them."""
    return [str(member) for member in reversed(cast("list[str]", client.lrange(key, 0, -1)))]


def test_lists_hold_due_jobs_in_order(
    settings: Settings,
    serve: Serve,
    connection: Connection,
    client: redis.Redis,
    wait_until: WaitUntil,
) -> None:
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
    serve: Serve,
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
) -> None:
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


def test_where_workers_claim_straight_from_postgres_a_hint_for_each_slot_is_enough(
    settings: Settings, serve: Serve, insert: Insert, client: redis.Redis
) -> None:
    """They pass what is marked; whoever waits for hints still finds some, each few milliseconds."""
    serve("q", slots=3)
    insert(*[100] * 500)
    context = context_for("migrator", settings)
    context.arena.slots[0].deep = True
    migrator = Migrator(context)
    for most in (3, 3, 3):
        turn_until(migrator.poll, lambda: client.llen("queue:q"))
        assert client.llen("queue:q") == most
        client.delete("queue:q")
    context.arena.slots[0].deep = False
    turn_until(migrator.poll, lambda: client.llen("queue:q"), timeout=1.0)
    turn_until(migrator.poll, lambda: client.llen("queue:q") >= 6, timeout=1.0)
    migrator.close()


def test_bands_do_not_share_room(
    settings: Settings, serve: Serve, insert: Insert, client: redis.Redis
) -> None:
    """A full list of newsletters does not keep a receipt waiting: the high band has room of its own."""
    serve("q")
    insert(*[200] * 1000)
    migrator = Migrator(context_for("migrator", settings))
    turn_until(migrator.poll, lambda: client.llen("queue:q:low"))
    receipt = insert(10)
    turn_until(migrator.poll, lambda: client.lrange("queue:q:high", 0, -1) == [str(receipt[0])], timeout=1.0)
    migrator.close()


def test_a_fast_backlog_flows(
    settings: Settings, serve: Serve, connection: Connection, client: redis.Redis
) -> None:
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
            longest = max(longest, client.llen("queue:q"))
            found += cast("list[str] | None", client.rpop("queue:q", 100)) or []
            # What was popped is claimed, as a worker would: marked rows that stay would be walked over by every mark.
            if len(found) % 2000 == 0:
                claim_all(connection, found[-2000:])
    assert found == expected
    assert longest <= 2000
    log.info("20000 hints in %.2f s, longest list %d", time.monotonic() - started, longest)


def claim_all(connection: Connection, ids: list[str]) -> None:
    """Makes jobs completed, as if a worker had claimed, run and settled them."""
    connection.execute(
        "update pmqd.jobs set status = 'completed', ready = false, completed_at = now() where id = any(%s::uuid[])",
        (ids,),
    )


def test_a_commit_wakes_the_migrator_within_milliseconds(
    settings: Settings,
    serve: Serve,
    insert: Insert,
    client: redis.Redis,
    connection: Connection,
) -> None:
    """From the commit of an insert to the hint in Redis: one mark and one push, measured over 200 jobs."""
    serve("q")
    waits = []
    with running(context_for("migrator", settings)):
        insert(100)
        client.blpop(["queue:q"], timeout=10)
        for _ in range(200):
            time.sleep(0.005)
            job = insert(100)[0]
            started = time.monotonic()
            found = client.blpop(["queue:q"], timeout=5)
            waits.append(time.monotonic() - started)
            assert found == ("queue:q", str(job))
            claim_all(connection, [str(job)])
    p50, p99 = statistics.median(waits), statistics.quantiles(waits, n=100)[98]
    log.info(
        "commit to hint: p50 %.2f ms, p99 %.2f ms, max %.2f ms", p50 * 1000, p99 * 1000, max(waits) * 1000
    )
    assert p50 < 0.02
    assert p99 < 0.25


def test_without_a_word_it_looks_each_poll_seconds(
    database: str, redis_url: str, tmp_path: Path, serve: Serve, insert: Insert,
    connection: Connection, client: redis.Redis,
) -> None:  # fmt: skip
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


def test_its_own_ping_is_no_reason_to_look(
    settings: Settings, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ping comes back, and nothing is marked for it."""
    serve("q")
    pings: list[float] = []
    marks: list[float] = []
    ping, mark = Store.ping_self, Store.mark_ids

    def pinged(self: Store) -> None:
        pings.append(time.monotonic())
        ping(self)

    def marked(self: Store, *args: Any, **more: Any) -> Any:
        marks.append(time.monotonic())
        return mark(self, *args, **more)

    monkeypatch.setattr(migrator_module, "PING_SECONDS", 0.1)
    monkeypatch.setattr(Store, "ping_self", pinged)
    monkeypatch.setattr(Store, "mark_ids", marked)
    migrator = Migrator(context_for("migrator", settings))
    turn_until(migrator.poll, lambda: marks and time.monotonic() - marks[-1] > 0.5)
    del pings[:], marks[:]
    turn_until(migrator.poll, lambda: len(pings) > 8)
    migrator.close()
    assert len(marks) <= 1  # the look each poll_seconds


def test_a_scheduled_job_is_offered_when_it_is_due(
    settings: Settings, serve: Serve, insert: Insert, client: redis.Redis
) -> None:
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
    log.info("scheduled job late by %.1f ms", late * 1000)
    assert -0.01 <= late < 0.1


def test_jobs_due_within_a_second_need_no_pulse(
    settings: Settings, serve: Serve, insert: Insert, client: redis.Redis
) -> None:
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
    serve: Serve,
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
) -> None:
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
    serve: Serve,
    insert: Insert,
    connection: Connection,
    client: redis.Redis,
) -> None:
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
    database: str, redis_url: str, tmp_path: Path, serve: Serve, connection: Connection, wait_until: WaitUntil
) -> None:  # fmt: skip
    """Every queue that is served or configured has its row, with its configured settings."""
    serve("q")
    settings = settings_for(database, redis_url, tmp_path, queues={"slow": {"max_attempts": 7}})
    with running(context_for("migrator", settings)):
        query = "select name, max_attempts from pmqd.job_queues order by name"
        wait_until(
            lambda: connection.execute(query).fetchall() == [("q", None), ("slow", 7)], what="the rows"
        )


def test_the_missions_item_is_pushed_when_asked_for(
    database: str, redis_url: str, tmp_path: Path, serve: Serve, insert: Insert, client: redis.Redis,
    wait_until: WaitUntil,
) -> None:  # fmt: skip
    """With item = "full" and job_status = "all" the list holds the mission's JSON, and job:ID says migrated."""
    serve("q")
    settings = settings_for(database, redis_url, tmp_path, redis={"item": "full", "job_status": "all"})
    job = insert(10)[0]
    with running(context_for("migrator", settings)):
        wait_until(lambda: client.llen("queue:q:high"), what="the hint")
        item = json.loads(client.lindex("queue:q:high", 0))  # type: ignore[arg-type]
        assert client.hget(f"job:{job}", "status") == "migrated"
        assert client.sismember("recent_jobs:q", str(job))
    assert next(iter(item)) == "id"
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
    settings: Settings, serve: Serve, database: str, connection: Connection, client: redis.Redis,
    wait_until: WaitUntil,
) -> None:  # fmt: skip
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


def test_what_is_delivered_is_counted_by_queue_and_kind(
    settings: Settings, serve: Serve, connection: Connection, client: redis.Redis, counters: Path
) -> None:
    """The counter of deliveries has the queue and kind of each job that was marked."""
    serve("q", slots=10)
    connection.execute(
        "insert into pmqd.jobs (queue_name, kind, payload) values ('q', 'send', '{}'), ('q', 'send', '{}'), ('q', null, '{}')"
    )
    migrator = Migrator(context_for("migrator", settings))
    turn_until(migrator.poll, lambda: client.llen("queue:q") == 3)
    migrator.close()
    page = metrics.render(counters).decode().splitlines()
    assert sorted(line for line in page if line.startswith("pmqd_jobs_migrated_total")) == [
        'pmqd_jobs_migrated_total{kind="",queue="q"} 1.0',
        'pmqd_jobs_migrated_total{kind="send",queue="q"} 2.0',
    ]


def test_what_is_marked_is_counted_though_its_push_fails(
    settings: Settings,
    serve: Serve,
    connection: Connection,
    counters: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deliveries are counted by their marks: a push that Redis did not take changes nothing about that."""

    def refuse(*_: object) -> None:
        raise BrokerUnavailable("it is away")

    serve("q", slots=10)
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    migrator = Migrator(context_for("migrator", settings))
    monkeypatch.setattr(Broker, "push_ids", refuse)
    turn_until(migrator.poll, lambda: statuses(connection) == {"migrated_to_redis": 1})
    migrator.close()
    assert 'pmqd_jobs_migrated_total{kind="",queue="q"} 1.0' in metrics.render(counters).decode().splitlines()
