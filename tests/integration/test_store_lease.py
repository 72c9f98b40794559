import threading
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd.config import PostgresSettings, QueueSettings
from pmqd.embedded import PostgresServer
from pmqd.errors import SchemaError, StoreUnavailable
from pmqd.job import Action
from pmqd.store import Beat, QueuePulse, Room, ServedQueue, Store
from tests.store_tools import QUEUE, WORKER, Bench, open_bench, outcome


def later(seconds: float) -> datetime:
    """So many seconds from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def beat(
    bench: Bench, instance_id: UUID | None = None, *, holding: bool = False, stalled: int | None = None
) -> Beat:
    """One beat of the bench's instance, or of another."""
    return bench.store.beat(instance_id or bench.instance_id, holding=holding, stalled_tick=stalled)


def second(bench: Bench) -> UUID:
    """Another instance."""
    instance_id = uuid4()
    bench.store.register(instance_id, "other", 2, ["x"], [], {})
    return instance_id


def test_the_first_beat_ticks_and_only_the_holder_goes_on(bench: Bench) -> None:
    """Nobody holds the ticker: the first beat takes it. Afterwards only the one who holds it ticks, once per beat."""
    other = second(bench)
    first = beat(bench)
    assert (first.ticking, first.tick, first.lost) == (True, 1, False)
    assert [beat(bench, other).tick for _ in range(3)] == [1, 1, 1]
    assert not beat(bench).ticking, "it does not know that it holds: no tick"
    assert [beat(bench, holding=True).tick for _ in range(3)] == [2, 3, 4]
    assert not beat(bench, other, holding=True).ticking, "believing to hold is not holding"


def test_a_stalled_ticker_is_taken_over_by_exactly_one(bench: Bench) -> None:
    """Eight that saw the same tick stand still: one takes it over, the former holder ticks no more."""
    beat(bench)
    others = [second(bench) for _ in range(8)]
    stores = [bench.another() for _ in others]
    beats: list[Beat] = []
    gate = threading.Barrier(len(others))

    def take(number: int) -> None:
        gate.wait()
        beats.append(stores[number].beat(others[number], holding=False, stalled_tick=1))

    threads = [threading.Thread(target=take, args=[number]) for number in range(len(others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.ticking for each in beats) == 1
    assert {each.tick for each in beats} <= {1, 2}
    assert not beat(bench, holding=True).ticking


def test_the_ticker_of_an_instance_that_is_gone_is_taken_at_once(bench: Bench) -> None:
    """No two seconds are lost after a clean end; and succeeding is no tick, so that two ticks are never closer than a second."""
    other, third = second(bench), second(bench)
    first = beat(bench)
    bench.store.unregister(bench.instance_id)
    successor = beat(bench, other)
    assert (successor.ticking, successor.tick) == (True, first.tick)
    bench.store.unregister(other)
    last = beat(bench, third)
    assert (last.ticking, last.tick) == (True, first.tick), "a rolling restart makes no lease age faster"
    assert beat(bench, third, holding=True).tick == first.tick + 1


@pytest.mark.parametrize("age", [30, 31])
def test_a_lease_is_renewed_for_thirty_ticks_and_lost_after(bench: Bench, age: int) -> None:
    """A lost lease stays lost, registering again does not renew it, and a new identity has one of its own."""
    other = second(bench)
    beat(bench, other)
    bench.set_tick(age)
    assert beat(bench).lost == (age == 31)
    bench.store.register(bench.instance_id, "host", 1, ["new"], [], {})
    bench.set_tick(age + 1)
    assert beat(bench).lost == (age == 31)
    assert not beat(bench, second(bench)).lost
    assert beat(bench, uuid4()).lost, "never registered"


def test_a_beat_tells_what_is_to_be_done(bench: Bench) -> None:
    """Workers with claims, jobs to be cancelled and orphans: of this instance only, orphans of any."""
    other = second(bench)
    mine, kept = bench.claim(bench.insert(2))
    theirs = bench.store.claim(bench.insert(), token=uuid4(), worker_id="w2", instance_id=other)[0]
    for job in (mine, theirs):
        bench.store.cancel_job(job.id)
    found = beat(bench)
    assert (found.claim_workers, found.cancels, found.orphans) == ([WORKER], [(mine.id, mine.token)], False)
    assert beat(bench, other).cancels == [(theirs.id, theirs.token)]
    bench.store.unregister(other)
    assert beat(bench).orphans
    bench.store.settle([outcome(job, Action.CANCEL) for job in (mine, kept)], [mine.token])
    found = beat(bench)
    assert (found.claim_workers, found.cancels) == ([], [])


def test_the_pulse_says_what_waits(bench: Bench) -> None:
    """Ready, served, next due time, oldest, old marks; every instance hears it, made by the ticker alone."""
    bench.insert(run_at=later(-30))
    bench.insert(run_at=later(50), priority=5)
    bench.insert(run_at=later(20), priority=200)
    bench.insert(queue_name="unserved", run_at=later(9))
    made = {each.queue_name: each for each in beat(bench).pulse}
    assert set(made) == {QUEUE, "unserved"}
    mail, unserved = made[QUEUE], made["unserved"]
    assert (mail.ready, mail.served, mail.old_marks) == (True, True, False)
    assert mail.due_in_seconds == pytest.approx(20, abs=3)
    assert mail.oldest_ready_seconds == pytest.approx(30, abs=3)
    assert (unserved.ready, unserved.served, unserved.oldest_ready_seconds) == (False, False, 0.0)
    bench.insert(queue_name="unserved")
    heard = {each.queue_name: each for each in beat(bench, second(bench)).pulse}
    assert not heard["unserved"].ready, "made by the ticker only"
    assert heard[QUEUE].oldest_ready_seconds >= mail.oldest_ready_seconds


def test_the_pulse_sees_old_marks_and_pauses(bench: Bench) -> None:
    """A mark that nobody claimed for five seconds is old; a paused queue has nothing ready."""
    term = bench.store.lead()
    assert term is not None
    bench.insert()
    bench.store.mark(term, [Room(QUEUE, 51, 150, 9)], full=False)
    [found] = beat(bench).pulse
    assert (found.ready, found.old_marks) == (True, False)
    bench.connection.execute("update pmqd.jobs set updated_at = now() - interval '6 s'")
    [found] = beat(bench, holding=True).pulse
    assert found.old_marks
    bench.store.pause(QUEUE)
    [found] = beat(bench, holding=True).pulse
    assert not found.ready


def test_hundreds_of_priorities_do_not_hold_up_the_tick(bench: Bench) -> None:
    """A queue with more priorities than the pulse probes is called ready rather than read to the end."""
    bench.connection.execute(
        "insert into pmqd.jobs (queue_name, payload, priority, run_at)"
        " select 'mail', '1', n, now() + interval '1 d' from generate_series(1, 300) n"
    )
    [found] = beat(bench).pulse
    assert isinstance(found, QueuePulse)
    assert found.ready


def test_served_queues_are_those_of_live_instances(bench: Bench) -> None:
    """Slots add up over instances and pools; an expired lease serves nothing; a pool without a list serves all of its instance."""
    pools = {
        "a": {"queues": ["x"], "processes": 2, "concurrency": 3},
        "b": {"queues": [], "processes": 1, "concurrency": 4},
        "c": {"queues": ["y"], "processes": 5, "concurrency": 1},
    }
    bench.store.register(uuid4(), "h", 1, ["x", "y"], [], pools)
    bench.store.register(uuid4(), "h", 1, ["x"], [], {"a": pools["a"]})
    bench.store.sync_queues({}, ["x"])
    bench.store.pause("x")
    served = {each.name: each for each in bench.store.served_queues()}
    assert served["x"] == ServedQueue("x", active=False, slots=16)
    assert served["y"] == ServedQueue("y", active=True, slots=9)
    assert served[QUEUE].slots == 1
    assert len(bench.store.instances()) == 3
    bench.set_tick(31)
    assert bench.store.served_queues() == []
    assert bench.store.instances() == []


def test_queues_get_rows_and_settings(bench: Bench) -> None:
    """New names get rows, configured ones their settings; others' settings and pauses are left alone, nothing is written twice."""
    bench.store.sync_queues({"a": QueueSettings(default_priority=5, timeout_seconds=1.5)}, ["a", "b"])
    bench.connection.execute("update pmqd.job_queues set max_attempts = 9 where name = 'b'")
    bench.store.pause("a")
    before = bench.connection.execute("select name, xmin::text from pmqd.job_queues order by 1").fetchall()
    bench.store.sync_queues({"a": QueueSettings(default_priority=5, timeout_seconds=1.5)}, ["a", "b"])
    assert (
        before
        == bench.connection.execute("select name, xmin::text from pmqd.job_queues order by 1").fetchall()
    )
    bench.store.sync_queues({"a": QueueSettings(default_priority=6)}, [])
    rows = {row["name"]: row for row in bench.store.list_queues()}
    assert (rows["a"]["default_priority"], rows["a"]["timeout_seconds"], rows["a"]["is_active"]) == (
        6,
        None,
        False,
    )
    assert rows["b"]["max_attempts"] == 9


# --- the connection


def test_a_server_that_goes_and_comes_back(own_postgres: PostgresServer) -> None:
    """Killed and started: the call fails as StoreUnavailable at once, a later one succeeds; no lease has aged meanwhile."""
    with open_bench(own_postgres.dsn("pmqd")) as bench:
        tick = beat(bench).tick
        bench.connection.close()
        own_postgres.kill()
        with pytest.raises(StoreUnavailable):
            beat(bench, holding=True)
        with pytest.raises(StoreUnavailable):
            bench.store.redis_epoch()
        own_postgres.start()
        again = beat(bench, holding=True)
        assert (again.lost, again.tick) == (False, tick + 1)


def test_a_statement_that_takes_too_long_drops_the_connection(bench: Bench) -> None:
    """The server's own timeout ends it; the next call has a fresh connection."""
    store = Store(PostgresSettings(dsn=bench.dsn, statement_timeout_seconds=0.3), "short")
    bench.others.append(store)
    pid = store.connection.info.backend_pid
    with pytest.raises(StoreUnavailable):
        store.attempt(lambda connection: connection.execute("select pg_sleep(30)"))
    assert store.connection.info.backend_pid != pid


def test_a_frozen_server_does_not_freeze_the_caller(bench: Bench) -> None:
    """A backend that does not answer at all (its own timeout switched off here) is given up by this side's deadline."""
    store = Store(PostgresSettings(dsn=bench.dsn, statement_timeout_seconds=0.1), "frozen")
    bench.others.append(store)
    store.connection.execute("set statement_timeout = 0")
    with pytest.raises(StoreUnavailable, match="no answer"):
        store.attempt(lambda connection: connection.execute("select pg_sleep(60)"))


def test_locks_in_the_way_are_waited_for_and_tried_again(bench: Bench) -> None:
    """Longer than lock_timeout: the claim is sent again, and wins when the lock is gone."""
    ids = bench.insert()
    with psycopg.connect(bench.dsn) as other:
        other.execute("select from pmqd.jobs where id = %s for update", ids)
        timer = threading.Timer(2.0, other.rollback)
        timer.start()
        assert len(bench.claim(ids)) == 1
        timer.join()


def test_the_session_has_its_guards(bench: Bench) -> None:
    """Timeouts, name and planner settings stand on the session; options of the DSN stay beside them."""
    dsn = psycopg.conninfo.make_conninfo(bench.dsn, options="-c work_mem=7MB")
    store = Store(PostgresSettings(dsn=dsn, statement_timeout_seconds=2.5), "guarded")
    bench.others.append(store)
    names = [
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
        "application_name",
        "work_mem",
    ]
    names += ["transaction_isolation", "jit", "TimeZone"]
    found = [store.connection.execute("select current_setting(%s)", [name]).fetchone() for name in names]
    wanted = ["2500ms", "1500ms", "10s", "pmqd:guarded", "7MB", "read committed", "off", "UTC"]
    assert [each[0] for each in found if each] == wanted


def test_the_server_ends_the_session_of_a_host_that_is_gone(bench: Bench) -> None:
    """Asked for of the server too, whose own default is two hours: a lost host's lead and locks must end with its lease."""
    query = "select name, reset_val::int from pg_settings where name like 'tcp_%%'"
    found = dict(bench.store.connection.execute(query).fetchall())
    idle = found["tcp_keepalives_idle"] + found["tcp_keepalives_interval"] * found["tcp_keepalives_count"]
    assert 0 < idle <= 30
    assert 0 < found["tcp_user_timeout"] <= 30_000


def test_a_database_without_the_schema_is_said_so(empty_database: str) -> None:
    """One line that says what to do, in place of a missing table."""
    store = Store(PostgresSettings(dsn=empty_database), "test")
    with pytest.raises(SchemaError, match="pmqd schema apply"):
        store.redis_epoch()
    store.close()


def test_a_part_of_the_schema_that_disappears_is_said_so(bench: Bench) -> None:
    """Somebody drops a table under a running daemon: a schema error, which ends the master, not a loop of strange failures."""
    bench.connection.execute("drop table pmqd.claims")
    with pytest.raises(SchemaError, match="pmqd schema check"):
        beat(bench)


def test_an_error_about_the_connection_never_holds_the_password() -> None:
    """Neither with a refused connection nor with a string that libpq cannot read."""
    for dsn in ("postgresql://u:s3cret@127.0.0.1:1/x", "host=127.0.0.1 port=1 user=u password=s3cret"):
        store = Store(PostgresSettings(dsn=dsn), "test")
        with pytest.raises(StoreUnavailable) as caught:
            store.redis_epoch()
        assert "s3cret" not in str(caught.value)
