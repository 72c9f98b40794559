"""Rescue on a real PostgreSQL: every way in which something is given back, and settles that outlived their process."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd import metrics
from pmqd.arena import Arena, Slot, State
from pmqd.config import Settings
from pmqd.job import Action, Claimed, Outcome
from pmqd.maintenance import Maintenance
from pmqd.notes import Sort
from pmqd.recovery import save_outcomes, settles_path
from pmqd.store import Store
from tests.fix_servers import WaitUntil
from tests.roles import Claim, Connection, context_for, process, running, turn_until, worker_slot

pytest_plugins = ["tests.role_fixtures"]
log = logging.getLogger("tests")


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
        "started": time.time(),
        "duration_seconds": 0.1,
    }
    return Outcome(**(fields | parts))


def counted(folder: Path, name: str) -> float:
    """The sum of a counter over all its series."""
    page = metrics.render(folder).decode()
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


def refuse(connection: Connection, job: Claimed) -> None:
    """From now on PostgreSQL refuses whatever is to be written to this job's row."""
    connection.execute(
        "create function pmqd.refuse() returns trigger language plpgsql as $$ begin"
        f" if new.id = '{job.id}' then raise exception 'refused' using errcode = '23514'; end if; return new; end $$"
    )
    connection.execute(
        "create trigger refuse before update on pmqd.jobs for each row execute function pmqd.refuse()"
    )


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
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim,
    reason: str, exit_code: int, culprit: int | None, running_jobs: int, expected: list[tuple[str, int, int]],
) -> None:  # fmt: skip
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
    # Whoever may do it again has no neighbours then.
    alone = culprit is None and reason not in ("drained", "recycled")
    assert {row(connection, job)["alone"] for job in started} <= {alone}
    assert (claims(connection), slot.state) == (0, State.RESCUED)
    assert arena.reoffer_requests == (0 if reason == "boot" else 1)


def test_a_death_is_rescued_within_milliseconds_of_the_masters_word(
    settings: Settings, arena: Arena, connection: Connection, claim: Claim, wait_until: WaitUntil
) -> None:  # fmt: skip
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
    log.info("rescue: median %.1f ms, max %.1f ms", sorted(waits)[5] * 1000, max(waits) * 1000)
    assert sorted(waits)[5] < 0.2


def test_a_poison_job_ends_as_failed_with_its_cause(
    maintenance: Maintenance,
    arena: Arena,
    connection: Connection,
    claim: Claim,
    counters: Path,
) -> None:
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
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """Interruptions are free five times; then each costs an attempt."""
    slot = worker_slot(arena)
    jobs = claim(slot.worker_id, 2, interruptions=5)
    begin(slot, *jobs)
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert [charged(connection, job) for job in jobs] == [("queued", 1, 5)] * 2


def test_a_claim_that_commits_after_its_workers_death_is_found(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
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
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
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
) -> None:
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
) -> None:
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
) -> None:
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
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, tmp_path: Path,
    counters: Path,
) -> None:  # fmt: skip
    """The same within one family: while the worker lives its file is its own affair, once it is dead it is applied, counted once."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    slot.notes.put(outcome(job, slot.worker_id))
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
) -> None:
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
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
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
    claim: Claim, counters: Path,
) -> None:  # fmt: skip
    """The worker's settle was committed, the worker died before it heard so: the outcome is counted, once, by maintenance."""
    slot = worker_slot(arena)
    done, open_ = claim(slot.worker_id, 2)
    ends = [replace(outcome(each, slot.worker_id), started=each.claimed_at) for each in (done, open_)]
    for end in ends:
        slot.notes.put(end, Sort.PARTIAL)
    assert store.settle(ends[:1], []) == {done.id: "completed"}
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert charged(connection, done) == ("completed", 1, 0)
    assert charged(connection, open_) == INTERRUPTED, "it did run: it must not be given back for nothing"
    assert counted(counters, "pmqd_jobs_completed_total") == 1
    assert counted(counters, "pmqd_rescued_total") == 1
    assert counted(counters, "pmqd_jobs_started_total") == 2


def test_a_saved_settle_that_cannot_be_stored_fails_its_job_alone(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, tmp_path: Path
) -> None:
    """One outcome that PostgreSQL refuses ends as a failed job with the reason; its neighbours are settled as they ended."""
    slot = worker_slot(arena)
    fine, bad, also_fine = claim(slot.worker_id, 3)
    outcomes = [outcome(job, slot.worker_id) for job in (fine, bad, also_fine)]
    outcomes[1] = replace(outcomes[1], result=b"no json")
    save_outcomes(settles_path(tmp_path, slot.worker_id), outcomes, [fine.token])
    slot.bury(0, "drained")
    maintenance.poll(time.monotonic())
    assert [charged(connection, job)[0] for job in (fine, bad, also_fine)] == [
        "completed",
        "failed",
        "completed",
    ]
    assert "could not be written" in row(connection, bad)["last_error_message"]
    assert (claims(connection), slot.state) == (0, State.RESCUED)


def test_a_rescue_that_is_refused_costs_no_lease(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """PostgreSQL refuses the rescue of one worker: another's goes through, the lease is kept, later beats try again."""
    slots = [worker_slot(arena), worker_slot(arena)]
    stuck, free = claim(slots[0].worker_id)[0], claim(slots[1].worker_id)[0]
    refuse(connection, stuck)
    for slot in slots:
        slot.bury(-9, "signal")
    query = "select lease_tick from pmqd.instances"
    before = connection.execute(query).fetchall()
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert connection.execute(query).fetchall() > before
    assert (charged(connection, free)[0], slots[1].state) == ("queued", State.RESCUED)
    assert charged(connection, stuck)[0] == "running"
    connection.execute("drop trigger refuse on pmqd.jobs")
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert (charged(connection, stuck)[0], claims(connection)) == ("queued", 0)


def test_a_rescue_that_comes_late_knows_what_happened(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """The slot of a guilty job is free again while its row refuses to be written: what it did is not forgotten meanwhile."""
    slot = worker_slot(arena)
    guilty, unstarted = claim(slot.worker_id, 2)
    begin(slot, guilty)
    refuse(connection, guilty)
    slot.bury(-11, "signal")
    for _ in range(2):
        maintenance._beat_at = 0
        maintenance.poll(time.monotonic())
    assert (slot.state, charged(connection, unstarted)) == (State.RESCUED, GIVEN_BACK)
    slot.free()
    connection.execute("drop trigger refuse on pmqd.jobs")
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert (charged(connection, guilty), logged(connection, guilty)) == (GUILTY, ["crashed"])
    assert "SIGSEGV" in row(connection, guilty)["last_error_message"]
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())
    assert maintenance._rescuer._judged == {}, "what is given back is forgotten"


def test_a_saved_settle_that_is_refused_for_good_holds_up_nobody(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, tmp_path: Path
) -> None:
    """A row that cannot be written at all: the file is put aside, and everybody else is rescued."""
    slots = [worker_slot(arena), worker_slot(arena)]
    stuck, free = claim(slots[0].worker_id)[0], claim(slots[1].worker_id)[0]
    refuse(connection, stuck)
    path = settles_path(tmp_path, slots[0].worker_id)
    save_outcomes(path, [outcome(stuck, slots[0].worker_id)], [stuck.token])
    for slot in slots:
        slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert (charged(connection, free)[0], slots[1].state) == ("queued", State.RESCUED)
    assert path.with_suffix(".bad").exists()
    assert (charged(connection, stuck)[0], claims(connection)) == ("running", 1)


def test_an_idle_instance_that_is_gone_is_forgotten(
    maintenance: Maintenance, connection: Connection, store: Store
) -> None:
    """An instance that was lost while it held nothing leaves its row behind only until its lease has run out."""
    gone = uuid4()
    store.register(gone, "gone", 1, ["q"], [], {})
    connection.execute("update pmqd.instances set lease_tick = lease_tick - 40 where id = %s", (gone,))
    turn_until(
        maintenance.poll,
        lambda: connection.execute("select host from pmqd.instances").fetchall() == [("test",)],
        timeout=5,
    )
