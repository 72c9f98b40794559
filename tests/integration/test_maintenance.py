"""Maintenance on a real PostgreSQL: the lease, the pulse, and every way in which something is given back."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd import metrics, served
from pmqd.arena import Arena, Slot, State
from pmqd.config import Settings
from pmqd.embedded import PostgresServer
from pmqd.job import Action, Claimed, Outcome
from pmqd.maintenance import Maintenance
from pmqd.recovery import save_outcomes, settles_path
from pmqd.store import Store
from tests.fix_servers import WaitUntil
from tests.roles import arena_for, context_for, process, running, settings_for, turn_until, worker_slot

Connection = psycopg.Connection[Any]
NO_REDIS = "redis://127.0.0.1:1"


@pytest.fixture
def settings(database: str, tmp_path: Path) -> Settings:
    """An instance whose pool serves `q`."""
    return settings_for(database, NO_REDIS, tmp_path)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """The statements of the workers that a test plays."""
    store = Store(settings.postgres, "test")
    yield store
    store.close()


@pytest.fixture
def arena() -> Arena:
    """The instance's arena."""
    return arena_for()


@pytest.fixture
def maintenance(settings: Settings, arena: Arena) -> Iterator[Maintenance]:
    """The instance's maintenance, registered, its rounds turned by the test."""
    maintenance = Maintenance(context_for("maintenance", settings, arena))
    maintenance.poll(time.monotonic())
    yield maintenance
    maintenance.close()


@pytest.fixture
def claim(connection: Connection, store: Store, arena: Arena) -> Callable[..., list[Claimed]]:
    """Inserts so many jobs and claims them for a worker, as one batch."""

    def make(worker_id: str, count: int = 1, **columns: object) -> list[Claimed]:
        names = "".join(f", {name}" for name in columns)
        places = "".join(f", %({name})s" for name in columns)
        rows = connection.execute(
            f"insert into pmqd.jobs (queue_name, payload{names}) select 'q', '{{}}'{places}"
            " from generate_series(1, %(count)s) returning id",
            columns | {"count": count},
        ).fetchall()
        claimed = store.claim(
            [row[0] for row in rows], token=uuid4(), worker_id=worker_id, instance_id=arena.instance_id
        )
        assert len(claimed) == count
        return claimed

    return make


def begin(slot: Slot, *jobs: Claimed) -> None:
    """User code of these jobs starts."""
    for entry, job in enumerate(jobs):
        slot.begin(entry, job.id, job.token, None)


def row(connection: Connection, job: Claimed | UUID) -> dict[str, Any]:
    """A job's row."""
    job_id = job if isinstance(job, UUID) else job.id
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute("select * from pmqd.jobs where id = %s", (job_id,)).fetchone()
    assert found is not None
    return found


def charged(connection: Connection, job: Claimed) -> tuple[str, int, int]:
    """A job's status, attempts charged, and interruptions."""
    found = row(connection, job)
    return found["status"], found["attempt_count"], found["interruptions"]


def logged(connection: Connection, job: Claimed) -> list[str]:
    """The states of a job's log rows."""
    query = "select status from pmqd.job_logs where job_id = %s order by id"
    return [found[0] for found in connection.execute(query, (job.id,))]


def claims(connection: Connection) -> int:
    """How many claims there are."""
    found = connection.execute("select count(*) from pmqd.claims").fetchone()
    assert found is not None
    return int(found[0])


def outcome(job: Claimed, worker_id: str, **parts: Any) -> Outcome:
    """A completed job's outcome, some of its fields as given."""
    fields: dict[str, Any] = {
        "job_id": job.id,
        "token": job.token,
        "action": Action.COMPLETE,
        "attempt_number": job.attempt_count,
        "queue_name": job.queue_name,
        "kind": job.kind,
        "worker_id": worker_id,
        "started": datetime.now(UTC),
        "duration_seconds": 0.1,
    }
    return Outcome(**(fields | parts))


def counted(folder: Path, name: str) -> float:
    """The sum of a counter over all its series."""
    page = metrics.render(folder).decode()
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the metric files, opened for this test."""
    monkeypatch.setattr(metrics, "_book", None)
    metrics.start(tmp_path / "metrics", "maintenance-0")
    return tmp_path / "metrics"


# --- the lease and the pulse


def test_it_registers_beats_and_publishes_the_pulse(
    settings: Settings, arena: Arena, connection: Connection, wait_until: WaitUntil
):
    """The instance stands in the table, its lease is renewed, and the pulse is in the arena within a second."""
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    connection.execute(
        "insert into pmqd.jobs (queue_name, payload, run_at) values ('later', '{}', now() + interval '100 s')"
    )
    with running(context_for("maintenance", settings, arena)):
        wait_until(lambda: arena.pulse(), what="the pulse")
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


def test_what_workers_tell_is_served(database: str, tmp_path: Path, arena: Arena, connection: Connection):
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


def test_ready_work_rings_the_migrator(maintenance: Maintenance, arena: Arena, connection: Connection):
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
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]]
):
    """A running job that somebody wants cancelled is named to the workers of its instance."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    connection.execute("update pmqd.jobs set cancel_requested = true")
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert arena.cancels == [(job.id, job.token)]


def test_the_lease_is_not_renewed_for_a_master_that_stands_still(
    maintenance: Maintenance, arena: Arena, connection: Connection
):
    """Without the master's heartbeat the lease is left to run out: nobody would reap and restart here."""
    query = "select tick, lease_tick from pmqd.ticker, pmqd.instances"
    before = connection.execute(query).fetchall()
    now = time.monotonic() + 20
    maintenance.poll(now)
    assert connection.execute(query).fetchall() == before
    arena.beat_master()
    maintenance.poll(now + 1 - 20)
    assert connection.execute(query).fetchall() == [(before[0][0] + 1, before[0][0] + 1)]


def test_a_lost_lease_means_a_new_identity(maintenance: Maintenance, arena: Arena, connection: Connection):
    """An instance whose lease ran out goes on under a new id, registered before anybody claims with it."""
    old = arena.instance_id
    connection.execute("update pmqd.ticker set tick = tick + 100")
    maintenance._beat_at = 0
    turn_until(maintenance.poll, lambda: arena.instance_id != old)
    lease = "select tick - lease_tick < 3 from pmqd.ticker, pmqd.instances where id = %s"
    assert connection.execute(lease, (arena.instance_id,)).fetchall() == [(True,)]
    maintenance.poll(time.monotonic())
    assert arena.lease_age(time.monotonic()) < 1


def test_a_ticker_that_stands_still_is_succeeded(
    maintenance: Maintenance, arena: Arena, settings: Settings, connection: Connection, wait_until: WaitUntil
):
    """Another instance ticks: this one listens, and takes over once the tick has stood still for three seconds."""
    other = uuid4()
    connection.execute(
        "insert into pmqd.instances (id, host, pid, lease_tick) select %s, 'other', 1, tick from pmqd.ticker",
        (other,),
    )
    connection.execute("update pmqd.ticker set holder = %s", (other,))
    maintenance._holding = False
    holder = "select holder from pmqd.ticker"
    start = time.monotonic()
    for seconds in (1, 2, 3):
        arena.beat_master()
        maintenance._beat_at = 0
        maintenance.poll(start + seconds)
        assert connection.execute(holder).fetchall() == [(other,)]
    maintenance._beat_at = 0
    maintenance.poll(start + 4.1)
    assert connection.execute(holder).fetchall() == [(arena.instance_id,)]


def test_postgres_away_and_back(
    own_postgres: PostgresServer, tmp_path: Path, arena: Arena, wait_until: WaitUntil
):
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
):
    """Maintenance stops as the last of its instance: the row is gone, nobody waits for the lease to run out."""
    with running(context_for("maintenance", settings, arena)):
        wait_until(lambda: arena.pulse_age(time.monotonic()) < 5, what="a beat")
        arena.draining = True
    assert connection.execute("select count(*) from pmqd.instances").fetchall() == [(0,)]


def test_a_replaced_maintenance_keeps_the_lease(
    settings: Settings, arena: Arena, connection: Connection, wait_until: WaitUntil
):
    """On a reload only maintenance is replaced: workers live, and so does the lease, under the same identity."""
    worker_slot(arena)
    for _ in range(2):
        with running(context_for("maintenance", settings, arena)):
            wait_until(lambda: arena.lease_age(time.monotonic()) < 0.5, what="a beat")
    assert connection.execute("select id from pmqd.instances").fetchall() == [(arena.instance_id,)]


# --- rescue

GUILTY = ("queued", 1, 0)
GIVEN_BACK = ("queued", 0, 0)
INTERRUPTED = ("queued", 0, 1)


@pytest.mark.parametrize(
    ("reason", "exit_code", "culprit", "running_jobs", "expected"),
    [
        ("signal", -9, None, 1, [GUILTY, GIVEN_BACK]),
        ("signal", -11, None, 1, [GUILTY, GIVEN_BACK]),
        ("error", 1, None, 1, [GUILTY, GIVEN_BACK]),
        ("oom", -9, None, 1, [GUILTY, GIVEN_BACK]),
        ("hung", -6, None, 1, [GUILTY, GIVEN_BACK]),
        ("signal", -9, None, 2, [INTERRUPTED, INTERRUPTED, GIVEN_BACK]),
        ("error", 1, None, 3, [INTERRUPTED, INTERRUPTED, INTERRUPTED, GIVEN_BACK]),
        ("timeout", -9, 0, 1, [GUILTY, GIVEN_BACK]),
        ("timeout", -9, 1, 3, [INTERRUPTED, GUILTY, INTERRUPTED, GIVEN_BACK]),
        ("drained", -9, None, 1, [INTERRUPTED, GIVEN_BACK]),
        ("recycled", -9, None, 2, [INTERRUPTED, INTERRUPTED, GIVEN_BACK]),
        ("boot", -9, None, 0, [GIVEN_BACK]),
        ("signal", -9, None, 0, [GIVEN_BACK, GIVEN_BACK]),
    ],
)
def test_fates(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]],
    reason: str, exit_code: int, culprit: int | None, running_jobs: int, expected: list[tuple[str, int, int]],
):  # fmt: skip
    """Each kind of death: who is charged, who is interrupted, what is given back as never started, and why, in words."""
    slot = worker_slot(arena)
    jobs = claim(slot.worker_id, len(expected))
    begin(slot, *jobs[:running_jobs])
    slot.bury(exit_code, reason, None if culprit is None else jobs[culprit].id)
    maintenance.poll(time.monotonic())
    assert [charged(connection, job) for job in jobs] == expected
    started, unstarted = jobs[:running_jobs], jobs[running_jobs:]
    assert [logged(connection, job) for job in started] == [["crashed"]] * len(started)
    assert [logged(connection, job) for job in unstarted] == [[]] * len(unstarted)
    for job in started:
        assert slot.worker_id in row(connection, job)["last_error_message"]
    assert (claims(connection), slot.state) == (0, State.RESCUED)
    assert arena.reoffer_requests == (0 if reason == "boot" else 1)


def test_a_death_is_rescued_within_milliseconds_of_the_masters_word(
    settings: Settings, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]], wait_until: WaitUntil
):  # fmt: skip
    """The master buries and rings: the job is due again long before the next beat."""
    waits = []
    with running(context_for("maintenance", settings, arena)):
        wait_until(lambda: arena.pulse_age(time.monotonic()) < 5, what="a beat")
        for number in range(10):
            slot = worker_slot(arena, number)
            begin(slot, *claim(slot.worker_id))
            started = time.monotonic()
            slot.bury(-9, "signal")
            arena.ring(arena.bell_maintenance)
            wait_until(lambda slot=slot: slot.state == State.RESCUED, what="rescued")  # type: ignore[misc]
            waits.append(time.monotonic() - started)
            slot.free()
    print(f"rescue: median {sorted(waits)[5] * 1000:.1f} ms, max {max(waits) * 1000:.1f} ms")
    assert sorted(waits)[5] < 0.2


def test_a_poison_job_ends_as_failed_with_its_cause(
    maintenance: Maintenance,
    arena: Arena,
    connection: Connection,
    claim: Callable[..., list[Claimed]],
    counters: Path,
):
    """A job that kills its process with its last attempt is failed, says how, and is counted as poison."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id, max_attempts=1)[0]
    begin(slot, job)
    slot.bury(-11, "signal")
    maintenance.poll(time.monotonic())
    found = row(connection, job)
    assert found["status"] == "failed"
    assert "signal 11 (SIGSEGV)" in found["last_error_message"]
    assert counted(counters, "pmqd_poisoned_total") == 1
    assert counted(counters, "pmqd_rescued_total") == 1
    assert counted(counters, "pmqd_jobs_failed_total") == 1


def test_the_sixth_interruption_is_charged(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]]
):
    """Interruptions are free five times; then each costs an attempt."""
    slot = worker_slot(arena)
    jobs = claim(slot.worker_id, 2, interruptions=5)
    begin(slot, *jobs)
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert [charged(connection, job) for job in jobs] == [("queued", 1, 5)] * 2


def test_a_claim_that_commits_after_its_workers_death_is_found(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]]
):
    """The claim was under way when its worker died: the next beat sees it and gives it back, uncharged."""
    slot = worker_slot(arena)
    worker_id = slot.worker_id
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert slot.state == State.RESCUED
    job = claim(worker_id)[0]
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert (charged(connection, job), claims(connection)) == (GIVEN_BACK, 0)


def test_the_living_are_left_alone(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]]
):
    """A claim of a worker that lives is nobody's to take, however long it has been held."""
    slot = worker_slot(arena)
    slot.state = State.BUSY
    job = claim(slot.worker_id)[0]
    begin(slot, job)
    connection.execute("update pmqd.claims set claimed_at = now() - interval '1 day'")
    for _ in range(3):
        maintenance._beat_at = 0
        maintenance.poll(time.monotonic())
    assert charged(connection, job)[0] == "running"


def test_another_instances_expired_lease(
    maintenance: Maintenance, arena: Arena, connection: Connection, store: Store
):
    """A host that is gone: when its lease has run out the ticker gives back what it held, not charged, and forgets it."""
    other = uuid4()
    connection.execute(
        "insert into pmqd.instances (id, host, pid, lease_tick) select %s, 'gone', 1, tick from pmqd.ticker",
        (other,),
    )
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    ids = [found[0] for found in connection.execute("select id from pmqd.jobs")]
    job = store.claim(ids, token=uuid4(), worker_id="gone:1:w1.1", instance_id=other)[0]
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert charged(connection, job)[0] == "running", "its lease is valid"
    connection.execute("update pmqd.instances set lease_tick = lease_tick - 40 where id = %s", (other,))
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert charged(connection, job) == INTERRUPTED
    assert connection.execute("select id from pmqd.instances").fetchall() == [(arena.instance_id,)]


def test_what_the_last_family_held_is_given_back_at_once(
    settings: Settings, arena: Arena, connection: Connection, store: Store
):
    """A new master in the same state_dir holds the lock, so the old family is gone: no lease is waited for."""
    previous = uuid4()
    store.register(previous, "test", 1, ["q"], [], {})
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    ids = [found[0] for found in connection.execute("select id from pmqd.jobs")]
    job = store.claim(ids, token=uuid4(), worker_id="old:1:w1.1", instance_id=previous)[0]
    maintenance = Maintenance(context_for("maintenance", settings, arena, previous=previous))
    maintenance.poll(time.monotonic())
    maintenance.close()
    assert charged(connection, job) == INTERRUPTED
    assert connection.execute("select id from pmqd.instances").fetchall() == [(arena.instance_id,)]


# --- settles that outlived their process


def test_saved_settles_come_before_the_rescue_of_the_last_family(
    settings: Settings, arena: Arena, connection: Connection, store: Store, tmp_path: Path, counters: Path
):
    """A job that was done when PostgreSQL was away at the end is completed, and not given back to run again."""
    previous, worker_id = uuid4(), "old:1:w1.1"
    store.register(previous, "test", 1, ["q"], [], {})
    connection.execute(
        "insert into pmqd.jobs (queue_name, payload) select 'q', '{}' from generate_series(1, 3)"
    )
    ids = [found[0] for found in connection.execute("select id from pmqd.jobs")]
    done, failed, lost = store.claim(ids, token=uuid4(), worker_id=worker_id, instance_id=previous)
    outcomes = [
        outcome(done, worker_id, result=b'{"sent": true}'),
        outcome(failed, worker_id, action=Action.RETRY, error="later", delay_seconds=100),
    ]
    save_outcomes(settles_path(tmp_path, worker_id), outcomes, [])
    maintenance = Maintenance(context_for("maintenance", settings, arena, previous=previous))
    maintenance.poll(time.monotonic())
    maintenance.close()
    assert (row(connection, done)["status"], row(connection, done)["result"]) == ("completed", {"sent": True})
    assert charged(connection, failed) == ("queued", 1, 0)
    assert charged(connection, lost) == INTERRUPTED
    assert logged(connection, done) == ["success"]
    assert list((tmp_path / "settles").iterdir()) == []
    assert counted(counters, "pmqd_jobs_completed_total") == 1
    assert counted(counters, "pmqd_jobs_retried_total") == 1
    assert counted(counters, "pmqd_jobs_started_total") == 3


def test_saved_settles_of_a_worker_that_died_today(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]], tmp_path: Path,
    counters: Path,
):  # fmt: skip
    """The same within one family: while the worker lives its file is its own affair, once it is dead it is applied, counted once."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    slot.settling([job.id])
    save_outcomes(settles_path(tmp_path, slot.worker_id), [outcome(job, slot.worker_id)], [job.token])
    maintenance.poll(time.monotonic())
    assert charged(connection, job)[0] == "running"
    slot.bury(0, "drained")
    maintenance.poll(time.monotonic())
    assert (charged(connection, job)[0], logged(connection, job)) == ("completed", ["success"])
    assert (claims(connection), slot.state) == (0, State.RESCUED)
    assert counted(counters, "pmqd_jobs_completed_total") == 1


def test_saved_settles_are_applied_once_though_a_crash_interrupts(
    settings: Settings, connection: Connection, store: Store, tmp_path: Path
):
    """Killed after the settles were applied and before the file was removed: the next round changes nothing more."""
    previous, worker_id = uuid4(), "old:1:w1.1"
    store.register(previous, "test", 1, ["q"], [], {})
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    ids = [found[0] for found in connection.execute("select id from pmqd.jobs")]
    job = store.claim(ids, token=uuid4(), worker_id=worker_id, instance_id=previous)[0]
    save_outcomes(settles_path(tmp_path, worker_id), [outcome(job, worker_id)], [job.token])
    with process("maintenance", settings, PMQD_CRASHPOINT="maintenance.settled=kill") as child:
        assert child.wait(20) == -9
    assert len(list((tmp_path / "settles").iterdir())) == 1
    maintenance = Maintenance(context_for("maintenance", settings))
    maintenance.poll(time.monotonic())
    maintenance.close()
    assert list((tmp_path / "settles").iterdir()) == []
    assert (charged(connection, job)[0], logged(connection, job)) == ("completed", ["success"])


def test_a_broken_file_of_settles_is_put_aside(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Callable[..., list[Claimed]], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    """What cannot be read stops nothing: it is kept under another name and named in the log, the job runs again."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    path = settles_path(tmp_path, slot.worker_id)
    path.parent.mkdir()
    path.write_bytes(b"{broken")
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert path.with_suffix(".bad").exists()
    assert "line 1" in caplog.text
    assert charged(connection, job) == GIVEN_BACK


def test_an_unacknowledged_settle_is_credited(
    maintenance: Maintenance, arena: Arena, connection: Connection, store: Store,
    claim: Callable[..., list[Claimed]], counters: Path,
):  # fmt: skip
    """The worker's settle was committed, the worker died before it heard so: the outcome is counted, once, by maintenance."""
    slot = worker_slot(arena)
    done, open_ = claim(slot.worker_id, 2)
    slot.settling([done.id, open_.id])
    assert store.settle([outcome(done, slot.worker_id)], []) == {done.id: "completed"}
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert charged(connection, done) == ("completed", 1, 0)
    assert charged(connection, open_) == INTERRUPTED, "it did run: it must not be given back for nothing"
    assert counted(counters, "pmqd_jobs_completed_total") == 1
    assert counted(counters, "pmqd_rescued_total") == 1
    assert counted(counters, "pmqd_jobs_started_total") == 2


# --- partitions


def test_the_ticker_keeps_the_partitions(
    settings: Settings, arena: Arena, connection: Connection, wait_until: WaitUntil
):
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
