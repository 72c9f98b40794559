"""Maintenance on a real PostgreSQL: the lease, the pulse, the tick, the partitions."""

import os
import time
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from pmqd import maintenance as maintenance_module
from pmqd import served
from pmqd.arena import Arena
from pmqd.config import Settings
from pmqd.embedded import PostgresServer
from pmqd.maintenance import Maintenance
from pmqd.store import Store
from tests.fix_servers import WaitUntil
from tests.hosts import value
from tests.roles import Claim, Connection, context_for, running, settings_for, turn_until, worker_slot

pytest_plugins = ["tests.role_fixtures"]
NO_REDIS = "redis://127.0.0.1:1"
TICK = "select tick from pmqd.ticker"


# --- the lease and the pulse


def test_a_server_that_lets_nobody_end_sessions_costs_neither_lease_nor_daemon(
    database: str, redis_url: str, arena: Arena, connection: Connection, tmp_path: Path, wait_until: WaitUntil,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Where an administrator has taken pg_terminate_backend() away, it is said once, and beats go on."""
    user = "pmqd_test_maintenance"
    connection.execute("revoke execute on function pg_terminate_backend(integer, bigint) from public")
    connection.execute(f"drop role if exists {user}")
    connection.execute(f"create role {user} login in role pmqd_daemon")
    settings = settings_for(psycopg.conninfo.make_conninfo(database, user=user), redis_url, tmp_path)
    try:
        with running(context_for("maintenance", settings, arena)):
            wait_until(lambda: "cannot be ended" in caplog.text, what="it is said")
            before = value(connection, TICK)
            wait_until(lambda: value(connection, TICK) > before + 3, what="ticks")
    finally:
        connection.execute(f"drop role {user}")
    assert caplog.text.count("cannot be ended") == 1


def test_it_registers_beats_and_publishes_the_pulse(
    settings: Settings, arena: Arena, connection: Connection, wait_until: WaitUntil
) -> None:
    """The instance stands in the table, its lease is renewed, and the pulse is in the arena within a second."""
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    connection.execute(
        "insert into pmqd.jobs (queue_name, payload, run_at) values ('later', '{}', now() + interval '100 s')"
    )
    with running(context_for("maintenance", settings, arena)):
        wait_until(arena.pulse, what="the pulse")
        pulse = arena.pulse()
        assert (pulse["q"]["ready"], pulse["q"]["served"], pulse["later"]["served"]) == (True, True, False)
        due = pulse["later"]["due_at"]
        assert due is not None
        assert due - time.monotonic() == pytest.approx(100, abs=3)
        assert arena.lease_age(time.monotonic()) < 2
        tick = "select tick from pmqd.ticker"
        before = connection.execute(tick).fetchall()
        wait_until(lambda: connection.execute(tick).fetchall() != before, timeout=3, what="the tick")
        rows = connection.execute("select id, host, queues from pmqd.instances").fetchall()
        assert rows == [(arena.instance_id, "test", ["q"])]


def test_what_workers_tell_is_served(
    database: str, tmp_path: Path, arena: Arena, connection: Connection
) -> None:
    """A pool without a list serves what its application handles: known as soon as a worker has told it."""
    maintenance = Maintenance(
        context_for("maintenance", settings_for(database, NO_REDIS, tmp_path, ()), arena)
    )
    query = "select queues, kinds, pools -> 'p' -> 'queues' from pmqd.instances"
    maintenance.poll(time.monotonic())
    assert connection.execute(query).fetchall() == [([], [], [])]
    served.tell(tmp_path, "p", ["mails", "bounces"], ["send"])
    served.tell(tmp_path, "of-another-time", ["old"], ["old"])
    maintenance.poll(time.monotonic())
    assert connection.execute(query).fetchall() == [(["bounces", "mails"], ["send"], ["mails", "bounces"])]
    maintenance.close()


def test_what_was_told_is_read_again_only_where_something_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change is seen at once, however shortly it follows another; what has been there for a while is not opened again."""
    reader, reads, whole = served.Reader(tmp_path), list[Path](), served.read

    def noted(folder: Path) -> dict[str, served.Served]:
        reads.append(folder)
        return whole(folder)

    monkeypatch.setattr(served, "read", noted)
    assert reader.read() == {}
    for number in range(50):
        served.tell(tmp_path, "p", [f"q{number}"], [])
        assert reader.read()["p"].queues == (f"q{number}",)
    aged = time.time() - 10
    os.utime(tmp_path / served.FOLDER, (aged, aged))
    del reads[:]
    assert [reader.read()["p"].queues for _ in range(5)] == [("q49",)] * 5
    assert len(reads) == 1
    served.tell(tmp_path, "p", ["other"], [])
    assert reader.read()["p"].queues == ("other",)


def test_frozen_sessions_are_looked_for_less_often_while_nothing_waits(
    database: str, redis_url: str, tmp_path: Path, arena: Arena, connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each two seconds while something is ready or held, each ten while nothing is."""
    looks: list[float] = []

    def looked(_: Store, seconds: float) -> list[tuple[int, float]]:
        looks.append(seconds)
        return []

    monkeypatch.setattr(Store, "end_frozen", looked)
    monkeypatch.setattr(maintenance_module, "FROZEN_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(maintenance_module, "CALM_FROZEN_LOOK_SECONDS", 60.0)
    made = Maintenance(context_for("maintenance", settings_for(database, redis_url, tmp_path), arena))
    turn_until(made.poll, lambda: looks)
    turn_until(made.poll, lambda: arena.pulse_age(time.monotonic()) < 1)
    del looks[:]
    for _ in range(20):
        made.poll(time.monotonic())
        time.sleep(0.02)
    assert not looks
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    turn_until(made.poll, lambda: len(looks) > 2)
    made.close()


def test_ready_work_rings_the_migrator(
    maintenance: Maintenance, arena: Arena, connection: Connection
) -> None:
    """A pulse that sees something ready wakes the migrator; an idle one lets it sleep."""
    arena.answer(arena.bell_migrator)
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert not arena.answer(arena.bell_migrator)
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert arena.answer(arena.bell_migrator)


def test_cancel_requests_reach_the_arena(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """A running job that somebody wants cancelled is named to the workers of its instance."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    connection.execute("update pmqd.jobs set cancel_requested = true")
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert arena.cancels == [(job.id, job.token)]


def test_the_lease_is_not_renewed_for_a_master_that_stands_still(
    maintenance: Maintenance, arena: Arena, connection: Connection
) -> None:
    """Without the master's heartbeat the lease is left to run out: nobody would reap and restart here."""
    query = "select tick, lease_tick from pmqd.ticker, pmqd.instances"
    before = connection.execute(query).fetchall()
    now = time.monotonic() + 20
    maintenance.poll(now)
    assert connection.execute(query).fetchall() == before
    arena.beat_master()
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert connection.execute(query).fetchall() == [(before[0][0] + 1, before[0][0] + 1)]


def test_a_lost_lease_means_a_new_identity(
    maintenance: Maintenance, arena: Arena, connection: Connection
) -> None:
    """An instance whose lease ran out goes on under a new id, registered before anybody claims with it."""
    old = arena.instance_id
    connection.execute("update pmqd.ticker set tick = tick + 100")
    maintenance._beat_at = 0
    turn_until(maintenance.poll, lambda: arena.instance_id != old)
    lease = "select tick - lease_tick < 3 from pmqd.ticker, pmqd.instances where id = %s"
    assert connection.execute(lease, (arena.instance_id,)).fetchall() == [(True,)]
    maintenance.poll(time.monotonic())
    assert arena.lease_age(time.monotonic()) < 1


def test_a_replaced_maintenance_ticks_on(
    maintenance: Maintenance, settings: Settings, arena: Arena, connection: Connection
) -> None:
    """Its instance made the last tick: a new process of it makes the next a second later and no sooner, however often it is replaced."""
    query = "select tick from pmqd.ticker"
    before, began = connection.execute(query).fetchall()[0][0], time.monotonic()
    for _ in range(3):
        maintenance.close()
        maintenance = Maintenance(context_for("maintenance", settings, arena))
        maintenance.poll(time.monotonic())
    assert connection.execute(query).fetchall() == [(before,)]
    turn_until(maintenance.poll, lambda: connection.execute(query).fetchall() == [(before + 1,)])
    maintenance.close()
    assert 0.5 < time.monotonic() - began < 2.0


def test_a_ticker_that_stands_still_is_succeeded(
    maintenance: Maintenance, arena: Arena, settings: Settings, connection: Connection, wait_until: WaitUntil
) -> None:
    """Another instance ticks: this one listens, and takes over once the tick has stood still for two seconds."""
    other = uuid4()
    connection.execute(
        "insert into pmqd.instances (id, host, pid, lease_tick) select %s, 'other', 1, tick from pmqd.ticker",
        (other,),
    )
    connection.execute("update pmqd.ticker set holder = %s", (other,))
    maintenance._holding, maintenance._watch = False, None
    holder = "select holder from pmqd.ticker"
    start = time.monotonic()
    for seconds in (1.0, 2.0, 2.9):
        arena.beat_master()
        maintenance._beat_at = 0
        maintenance.poll(start + seconds)
        assert connection.execute(holder).fetchall() == [(other,)]
    maintenance._beat_at = 0
    maintenance.poll(start + 3.1)
    assert connection.execute(holder).fetchall() == [(arena.instance_id,)]


def test_postgres_away_and_back(
    own_postgres: PostgresServer, tmp_path: Path, arena: Arena, wait_until: WaitUntil
) -> None:
    """PostgreSQL away is flagged in the arena and ends nothing; after its return the lease is renewed, the identity kept."""
    settings = settings_for(own_postgres.dsn("pmqd"), NO_REDIS, tmp_path)
    identity = arena.instance_id
    with running(context_for("maintenance", settings, arena)):
        wait_until(lambda: arena.pulse_age(time.monotonic()) < 5, what="a beat")
        own_postgres.kill()
        wait_until(lambda: arena.store_down, timeout=5, what="seen as down")
        own_postgres.start()
        started = time.monotonic()
        wait_until(lambda: not arena.store_down, timeout=5, what="seen as back")
        wait_until(lambda: arena.pulse_age(time.monotonic()) < time.monotonic() - started, what="a new beat")
        assert arena.instance_id == identity


def test_a_clean_stop_ends_the_lease(
    settings: Settings, arena: Arena, connection: Connection, wait_until: WaitUntil
) -> None:
    """Maintenance stops as the last of its instance: the row is gone, nobody waits for the lease to run out."""
    with running(context_for("maintenance", settings, arena)):
        wait_until(lambda: arena.pulse_age(time.monotonic()) < 5, what="a beat")
        arena.draining = True
    assert connection.execute("select count(*) from pmqd.instances").fetchall() == [(0,)]


def test_a_replaced_maintenance_keeps_the_lease(
    settings: Settings, arena: Arena, connection: Connection, wait_until: WaitUntil
) -> None:
    """On a reload only maintenance is replaced: workers live, and so does the lease, under the same identity."""
    worker_slot(arena)
    for _ in range(2):
        with running(context_for("maintenance", settings, arena)):
            wait_until(lambda: arena.lease_age(time.monotonic()) < 0.5, what="a beat")
    assert connection.execute("select id from pmqd.instances").fetchall() == [(arena.instance_id,)]


def test_the_ticker_keeps_the_partitions(
    settings: Settings, arena: Arena, connection: Connection, wait_until: WaitUntil
) -> None:
    """Partitions for the months to come are there soon after the start; only the instance that ticks makes them."""
    query = "select count(*) from pg_inherits where inhparent = 'pmqd.jobs'::regclass"
    connection.execute(
        "do $$ declare r record; begin for r in select inhrelid::regclass as name from pg_inherits where inhparent ="
        " 'pmqd.jobs'::regclass and inhrelid::regclass::text not like '%default%' loop"
        " execute format('drop table %s', r.name); end loop; end $$"
    )
    assert connection.execute(query).fetchall() == [(1,)]
    with running(context_for("maintenance", settings, arena)):
        wait_until(lambda: connection.execute(query).fetchall() > [(1,)], what="partitions")
