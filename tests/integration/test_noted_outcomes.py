"""Maintenance and what a dead worker had noted: settled with its own outcome, counted once, whoever dies in the middle."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pmqd import metrics, rescue
from pmqd.arena import Arena, Slot, State
from pmqd.config import Settings
from pmqd.errors import StoreUnavailable
from pmqd.job import Action, Claimed, Outcome
from pmqd.maintenance import Maintenance
from pmqd.notes import Sort
from pmqd.process import ChildContext
from pmqd.recovery import save_outcomes, settles_path
from pmqd.slot import Receipt
from pmqd.store import Store
from tests.integration.test_rescue import GIVEN_BACK, GUILTY, INTERRUPTED, begin, charged, claims, logged, row
from tests.integration.test_rescue import outcome as outcome_of
from tests.roles import Claim, Connection, context_for, worker_slot

pytest_plugins = ["tests.role_fixtures"]


def outcome(job: Claimed, slot: Slot, **parts: Any) -> Outcome:
    """As its worker would have settled it."""
    return replace(outcome_of(job, slot.worker_id, started=job.claimed_at), **parts)


def counted(folder: Path) -> dict[str, float]:
    """The counters that are not zero, by name."""
    found: dict[str, float] = {}
    for line in metrics.render(folder).decode().splitlines():
        name, _, value = line.partition(" ")
        name = name.partition("{")[0].removeprefix("pmqd_").removesuffix("_total")
        if (
            line.startswith("pmqd_")
            and float(value)
            and name.startswith(("jobs", "rescued", "stale", "poison"))
        ):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def away(*_: Any) -> None:
    """PostgreSQL is away."""
    raise StoreUnavailable("away")


def turn(maintenance: Maintenance) -> None:
    """One round with a beat in it."""
    maintenance._beat_at = 0
    maintenance.poll(time.monotonic())


def test_each_outcome_is_settled_as_it_was(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, counters: Path
) -> None:
    """Completed, failed, to be retried, snoozed, cancelled: what the worker had noted is what its jobs become, with texts,
    results, times and audit trail; what ran is guilty, what had not started is given back.
    """
    slot = worker_slot(arena)
    done, failed, retry, snoozed, cancelled, ran, unstarted = claim(slot.worker_id, 7)
    begin(slot, ran)
    slot.notes.put(outcome(done, slot, result=b'{"sent": 1}'))
    slot.notes.put(outcome(failed, slot, action=Action.FAIL, error="550 no such user"))
    slot.notes.put(outcome(retry, slot, action=Action.RETRY, error="451 later", delay_seconds=100.0))
    slot.notes.put(outcome(snoozed, slot, action=Action.SNOOZE, delay_seconds=50.0))
    slot.notes.put(outcome(cancelled, slot, action=Action.CANCEL, error="cancelled"))
    slot.bury(-11, "signal")
    maintenance.poll(time.monotonic())
    assert (row(connection, done)["status"], row(connection, done)["result"]) == ("completed", {"sent": 1})
    assert (row(connection, failed)["status"], row(connection, failed)["last_error_message"]) == (
        "failed", "550 no such user",
    )  # fmt: skip
    assert charged(connection, retry) == ("queued", 1, 0)
    assert charged(connection, snoozed) == ("queued", 0, 0)
    assert charged(connection, cancelled)[0] == "cancelled"
    assert charged(connection, ran) == GUILTY
    assert charged(connection, unstarted) == GIVEN_BACK
    assert [logged(connection, job) for job in (done, failed, retry, snoozed, cancelled, ran, unstarted)] == [
        ["success"], ["failed"], ["retry"], ["released"], ["cancelled"], ["crashed"], [],
    ]  # fmt: skip
    assert (claims(connection), slot.state, slot.noted()) == (0, State.RESCUED, [])
    assert counted(counters) == {
        "jobs_started": 6, "jobs_completed": 1, "jobs_failed": 1, "jobs_retried": 1, "rescued": 1,
    }  # fmt: skip


def test_a_finished_job_is_neither_charged_nor_a_suspect(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """Noted, and its entry not cleared yet: it did not run any more. So its neighbour was alone, and it is guilty."""
    slot = worker_slot(arena)
    done, ran = claim(slot.worker_id, 2)
    begin(slot, done, ran)
    slot.notes.put(outcome(done, slot))
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert (charged(connection, done)[0], charged(connection, ran)) == ("completed", GUILTY)


def test_who_was_killed_for_its_time_and_had_just_finished_is_done(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """The master's word came too late: the outcome stands, and nobody is charged."""
    slot = worker_slot(arena)
    late, beside = claim(slot.worker_id, 2)
    begin(slot, late, beside)
    slot.notes.put(outcome(late, slot))
    slot.bury(-9, "timeout", late.id)
    maintenance.poll(time.monotonic())
    assert charged(connection, late)[0] == "completed"
    assert charged(connection, beside)[0] == "queued"


def test_a_result_that_found_no_place_means_an_interruption(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, counters: Path
) -> None:
    """It is known that the job is done and not with what: it runs again, uncharged, as any job that was cut."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    slot.notes.put(outcome(job, slot), Sort.PARTIAL)
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert charged(connection, job) == INTERRUPTED
    assert counted(counters) == {"jobs_started": 1, "rescued": 1}


@pytest.mark.parametrize("committed", [True, False])
def test_a_job_that_settles_itself(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, store: Store, counters: Path,
    *, committed: bool,
) -> None:  # fmt: skip
    """Its handler's transaction came through: it is done, and counted. It did not: the job ran, and is guilty."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    begin(slot, job)
    slot.notes.put(outcome(job, slot), Sort.DOUBTFUL)
    if committed:
        store.settle([outcome(job, slot)], [])
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert charged(connection, job) == (("completed", 1, 0) if committed else GUILTY)
    ended = {"jobs_completed": 1} if committed else {"rescued": 1}
    assert counted(counters) == {"jobs_started": 1} | ended


def test_what_follows_a_lost_commit_counts_only_if_it_was_lost(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, store: Store, counters: Path
) -> None:
    """Two jobs whose own commit got no answer, and which then failed: the one whose commit was in is completed, the other is
    retried.
    """
    slot = worker_slot(arena)
    jobs = claim(slot.worker_id, 2)
    for job in jobs:
        slot.notes.put(outcome(job, slot), Sort.DOUBTFUL)
        slot.notes.put(outcome(job, slot, action=Action.RETRY, error="lost", delay_seconds=60.0))
    store.settle([outcome(jobs[0], slot)], [])
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert [charged(connection, job)[0] for job in jobs] == ["completed", "queued"]
    assert [logged(connection, job) for job in jobs] == [["success"], ["retry"]]
    assert counted(counters) == {"jobs_started": 2, "jobs_completed": 1, "jobs_retried": 1}


def test_a_settle_that_was_committed_without_an_answer_counts_once(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, store: Store, counters: Path
) -> None:
    """Also where the database made something else of it than was asked for: the last attempt, a cancel meanwhile."""
    slot = worker_slot(arena)
    plain = claim(slot.worker_id)[0]
    last = claim(slot.worker_id, max_attempts=1)[0]
    wanted_away = claim(slot.worker_id)[0]
    connection.execute("update pmqd.jobs set cancel_requested = true where id = %s", (wanted_away.id,))
    ends = [
        outcome(job, slot, action=Action.RETRY, error="x", delay_seconds=9.0)
        for job in (plain, last, wanted_away)
    ]
    for each in ends:
        slot.notes.put(each)
    store.settle(ends, [])
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert [row(connection, job)["status"] for job in (plain, last, wanted_away)] == [
        "queued",
        "failed",
        "cancelled",
    ]
    assert counted(counters) == {"jobs_started": 3, "jobs_retried": 1, "jobs_failed": 1}


def test_what_somebody_else_took_is_stale(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, counters: Path
) -> None:
    """Its instance's lease had run out and the job was given to somebody else: the outcome is dropped, as the worker's own."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    slot.notes.put(outcome(job, slot))
    connection.execute(
        "update pmqd.jobs set claim_token = %s, worker_id = 'other' where id = %s", (uuid4(), job.id)
    )
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert charged(connection, job)[0] == "running"
    assert counted(counters) == {"stale_settles": 1}


def test_one_job_under_two_tokens(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, store: Store, counters: Path
) -> None:
    """The worker lost a job with its lease and claimed it again: of two outcomes for it the one that is its own counts."""
    slot = worker_slot(arena)
    first = claim(slot.worker_id)[0]
    connection.execute(
        "update pmqd.jobs set status = 'queued', ready = true, claim_token = null where id = %s", (first.id,)
    )
    [second] = store.claim([first.id], token=uuid4(), worker_id=slot.worker_id, instance_id=arena.instance_id)
    slot.notes.put(outcome(first, slot))
    slot.notes.put(outcome(second, slot, action=Action.RETRY, delay_seconds=9.0))
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert (charged(connection, first)[0], logged(connection, first)) == ("queued", ["retry"])
    assert counted(counters) == {"jobs_started": 1, "jobs_retried": 1, "stale_settles": 1}


def test_an_outcome_that_cannot_be_written_fails_its_job_alone(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """One result that PostgreSQL refuses: that job is failed with the reason, its neighbours are settled as they ended."""
    slot = worker_slot(arena)
    fine, bad, also_fine = claim(slot.worker_id, 3)
    slot.notes.put(outcome(fine, slot))
    slot.notes.put(outcome(bad, slot, result=b"no json"))
    slot.notes.put(outcome(also_fine, slot))
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert [charged(connection, job)[0] for job in (fine, bad, also_fine)] == [
        "completed",
        "failed",
        "completed",
    ]
    assert "could not be written" in row(connection, bad)["last_error_message"]


def test_done_and_not_to_be_written_waits_until_it_can(
    maintenance: Maintenance,
    arena: Arena,
    connection: Connection,
    claim: Claim,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A trigger refuses every change of the row: the job is not given back to run again, it is completed once that is
    possible, and it is said once.
    """
    slot = worker_slot(arena)
    job, other = claim(slot.worker_id, 2)
    connection.execute(
        "create function pmqd.refuse() returns trigger language plpgsql as $$ begin"
        f" if new.id = '{job.id}' then raise exception 'refused'; end if; return new; end $$"
    )
    connection.execute(
        "create trigger refuse before update on pmqd.jobs for each row execute function pmqd.refuse()"
    )
    slot.notes.put(outcome(job, slot))
    slot.bury(-9, "signal")
    for _ in range(3):
        turn(maintenance)
    assert (charged(connection, job)[0], charged(connection, other), slot.state) == (
        "running",
        GIVEN_BACK,
        State.RESCUED,
    )
    assert caplog.text.count("cannot be written") == 1
    connection.execute("drop trigger refuse on pmqd.jobs")
    turn(maintenance)
    turn(maintenance)
    assert (charged(connection, job)[0], logged(connection, job), claims(connection)) == (
        "completed",
        ["success"],
        0,
    )


# --- deaths in the middle


class Died(BaseException):
    """Stands for a SIGKILL at a crash point."""


STEPS = [
    "maintenance.settled",
    "maintenance.counting",
    "maintenance.counted",
    "maintenance.rescued",
    "maintenance.buried",
]


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_a_second_maintenance_goes_on(
    settings: Settings, arena: Arena, connection: Connection, claim: Claim, counters: Path,
    monkeypatch: pytest.MonkeyPatch, step: str, times: int,
) -> None:  # fmt: skip
    """Dead at a step of the rescue, at its first, second or third passing, and once more at the same: all is settled, given
    back and counted once in the end.
    """
    first = Maintenance(context_for("maintenance", settings, arena))
    first.poll(time.monotonic())  # for the lease
    first.close()
    slot = worker_slot(arena)
    jobs = [*claim(slot.worker_id, 3), *claim(slot.worker_id, 2, max_attempts=1)]
    begin(slot, jobs[3])
    for job in jobs[:2]:
        slot.notes.put(outcome(job, slot))
    slot.bury(-9, "signal")
    passed = 0

    def die(name: str) -> None:
        nonlocal passed
        passed += name == step
        if name == step and passed in (times, times + 1):
            raise Died

    monkeypatch.setattr(rescue, "checkpoint", die)
    for _ in range(4):
        maintenance = Maintenance(context_for("maintenance", settings, arena))
        try:
            turn(maintenance)
        except Died:
            pass
        maintenance.close()
    assert [charged(connection, job)[0] for job in jobs] == [
        "completed",
        "completed",
        "queued",
        "failed",
        "queued",
    ]
    assert [logged(connection, job) for job in jobs] == [["success"], ["success"], [], ["crashed"], []]
    assert counted(counters) == {
        "jobs_started": 3, "jobs_completed": 2, "jobs_failed": 1, "rescued": 1, "poisoned": 1,
    }  # fmt: skip
    assert (slot.state, claims(connection), arena.journal.pending()) == (State.RESCUED, 0, None)


@pytest.mark.parametrize("step", ["maintenance.settled", "maintenance.counting", "maintenance.counted"])
def test_saved_settles_are_counted_once(
    settings: Settings, arena: Arena, connection: Connection, store: Store, counters: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, step: str,
) -> None:  # fmt: skip
    """A file of the last family, and maintenance dead at a step of applying it, twice: settled once, counted once, removed."""
    previous, worker_id = uuid4(), "old:1:w1.1"
    store.register(previous, "test", 1, ["q"], [], {})
    connection.execute("insert into pmqd.jobs (queue_name, payload) values ('q', '{}')")
    ids = [found[0] for found in connection.execute("select id from pmqd.jobs")]
    job = store.claim(ids, token=uuid4(), worker_id=worker_id, instance_id=previous)[0]
    save_outcomes(settles_path(tmp_path, worker_id), [outcome_of(job, worker_id)], [job.token])
    deaths = iter([True, True, False])

    def die(name: str) -> None:
        if name == step and next(deaths, False):
            raise Died

    monkeypatch.setattr(rescue, "checkpoint", die)
    for _ in range(4):
        maintenance = Maintenance(context_for("maintenance", settings, arena, previous=previous))
        try:
            turn(maintenance)
        except Died:
            pass
        maintenance.close()
    assert (charged(connection, job)[0], logged(connection, job)) == ("completed", ["success"])
    assert list((tmp_path / "settles").iterdir()) == []
    assert counted(counters) == {"jobs_started": 1, "jobs_completed": 1}


def test_a_saved_settle_that_was_counted_is_not_counted_again(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, store: Store, counters: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Saved near the deadline, then settled and counted by its worker after all, which was killed before it removed the file."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    end = outcome(job, slot)
    place = slot.notes.put(end)
    save_outcomes(settles_path(tmp_path, slot.worker_id), [end], [job.token])
    store.settle([end], [])
    receipt = Receipt(slot, [place], lambda: None, lambda: None)
    metrics.post(metrics.Count().settled([(end, "completed")]), receipt)
    slot.bury(-9, "drained")
    maintenance.poll(time.monotonic())
    assert counted(counters) == {"jobs_started": 1, "jobs_completed": 1}
    assert list((tmp_path / "settles").iterdir()) == []


def test_a_file_stays_until_what_is_noted_is_settled(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, counters: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """PostgreSQL is away while the worker dies: the arena ends with the family, the file does not. It is removed when both are
    settled; a result that had found no place in the arena comes from the file.
    """
    slot = worker_slot(arena)
    noted, partial, unnoted = claim(slot.worker_id, 3)
    ends = [outcome(job, slot, result=b'"r"') for job in (noted, partial, unnoted)]
    slot.notes.put(ends[0])
    slot.notes.put(replace(ends[1], result=None), Sort.PARTIAL)
    save_outcomes(settles_path(tmp_path, slot.worker_id), ends, [noted.token])
    slot.bury(0, "drained")

    with monkeypatch.context() as patch:
        patch.setattr(maintenance._store, "attempt", away)
        maintenance.poll(time.monotonic())
    assert len(list((tmp_path / "settles").iterdir())) == 1
    maintenance._rest_until = 0
    turn(maintenance)
    assert [
        (row(connection, job)["status"], row(connection, job)["result"]) for job in (noted, partial, unnoted)
    ] == [("completed", "r")] * 3
    assert list((tmp_path / "settles").iterdir()) == []
    assert counted(counters) == {"jobs_started": 3, "jobs_completed": 3}
    assert (slot.state, claims(connection)) == (State.RESCUED, 0)


def succeed(maintenance: Maintenance, context: ChildContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The family ends while PostgreSQL is away; the next one finds it again and tidies up."""
    with monkeypatch.context() as patch:
        patch.setattr(maintenance._store, "attempt", away)
        maintenance.leave()
    successor = Maintenance(context)
    successor.poll(time.monotonic())
    successor.close()


def test_what_is_noted_outlives_the_family(
    settings: Settings, arena: Arena, connection: Connection, store: Store, counters: Path, tmp_path: Path,
    maintenance: Maintenance, claim: Claim, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A worker was killed while PostgreSQL was away, and all stop before it is back: the next family completes the job."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    slot.notes.put(outcome(job, slot, result=b"7"))
    slot.bury(-9, "signal")

    succeed(maintenance, context_for("maintenance", settings, previous=arena.instance_id), monkeypatch)
    assert (row(connection, job)["status"], row(connection, job)["result"]) == ("completed", 7)
    assert logged(connection, job) == ["success"]


def test_what_a_worker_saved_itself_is_not_saved_again(
    settings: Settings, arena: Arena, connection: Connection, counters: Path, tmp_path: Path,
    maintenance: Maintenance, claim: Claim, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its notes still say what its file says; the next family applies and counts each once."""
    slot = worker_slot(arena)
    both, only_noted = claim(slot.worker_id, 2)
    ends = [outcome(job, slot) for job in (both, only_noted)]
    for end in ends:
        slot.notes.put(end)
    save_outcomes(settles_path(tmp_path, slot.worker_id), ends[:1], [])
    slot.bury(0, "drained")

    succeed(maintenance, context_for("maintenance", settings, previous=arena.instance_id), monkeypatch)
    assert [logged(connection, job) for job in (both, only_noted)] == [["success"]] * 2
    assert counted(counters) == {"jobs_started": 2, "jobs_completed": 2}


@pytest.mark.parametrize("end", ["told to stop", "killed"])
def test_what_was_counted_is_not_counted_by_the_next_family(
    settings: Settings, arena: Arena, connection: Connection, counters: Path, maintenance: Maintenance,
    claim: Claim, monkeypatch: pytest.MonkeyPatch, end: str,
) -> None:  # fmt: skip
    """PostgreSQL goes away between the count of a rescue and the end of its claim, and the family ends before it is back: the
    next one, which finds the claim open and the crash in the audit trail, closes it and counts nothing.
    """
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    begin(slot, job)
    slot.bury(-9, "signal")

    with monkeypatch.context() as patch:
        patch.setattr(maintenance._store, "close_claim", away)
        maintenance.poll(time.monotonic())
    assert (claims(connection), charged(connection, job)) == (1, GUILTY)
    successor = context_for("maintenance", settings, previous=arena.instance_id)
    if end == "told to stop":
        succeed(maintenance, successor, monkeypatch)
    else:
        new = Maintenance(successor)
        new.poll(time.monotonic())
        new.close()
    assert (claims(connection), logged(connection, job)) == (0, ["crashed"])
    assert counted(counters) == {"jobs_started": 1, "rescued": 1}


def test_what_a_worker_had_counted_is_not_saved_for_the_next_family(
    settings: Settings, arena: Arena, connection: Connection, store: Store, counters: Path,
    maintenance: Maintenance, claim: Claim, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A worker is killed in the middle of its count while maintenance has one of its own that waits for PostgreSQL, and the family
    ends before that is back: the worker's count is ended first, and its outcome, which is settled and counted, goes into no file.
    """
    slot, other = worker_slot(arena), worker_slot(arena)
    done, cut = claim(slot.worker_id)[0], claim(other.worker_id)[0]
    begin(other, cut)
    other.bury(-9, "signal")
    with monkeypatch.context() as patch:
        patch.setattr(maintenance._store, "close_claim", away)
        maintenance.poll(time.monotonic())
    end = outcome(done, slot)
    place = slot.notes.put(end)
    store.settle([end], [])

    def die() -> None:
        raise Died

    receipt = Receipt(slot, [place], lambda: None, die)
    with closing(metrics.Book(counters, f"worker-{slot.index}")) as book, pytest.raises(Died):
        book.post(metrics.Count().settled([(end, "completed")]), receipt)
    slot.bury(-9, "signal")
    succeed(maintenance, context_for("maintenance", settings, previous=arena.instance_id), monkeypatch)
    assert counted(counters) == {"jobs_started": 2, "jobs_completed": 1, "rescued": 1}


@pytest.mark.parametrize("when", ["counting", "counted"])
def test_a_worker_killed_in_the_middle_of_counting(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, store: Store, counters: Path,
    monkeypatch: pytest.MonkeyPatch, when: str,
) -> None:  # fmt: skip
    """With the journal written and some of the figures, or all of them: each counter has it once."""
    slot = worker_slot(arena)
    jobs = claim(slot.worker_id, 3)
    ends = [outcome(job, slot) for job in jobs]
    places = [slot.notes.put(end) for end in ends]
    store.settle(ends, [])

    def die() -> None:
        raise Died

    receipt = Receipt(slot, places, *((die, lambda: None) if when == "counting" else (lambda: None, die)))
    book = metrics.Book(counters, f"worker-{slot.index}")
    with closing(book), pytest.raises(Died):
        book.post(metrics.Count().settled([(end, "completed") for end in ends]), receipt)
    slot.bury(-9, "signal")
    maintenance.poll(time.monotonic())
    assert counted(counters) == {"jobs_started": 3, "jobs_completed": 3}
    assert slot.noted() == []


def test_an_answer_lost_while_a_claim_is_closed(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, counters: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The count is made and PostgreSQL goes away: the next round closes the claim and counts nothing again."""
    slot = worker_slot(arena)
    job = claim(slot.worker_id)[0]
    begin(slot, job)
    slot.bury(-9, "signal")
    close: Callable[..., None] = maintenance._store.close_claim
    answers = iter([True])

    def lost(*args: Any) -> None:
        if next(answers, False):
            raise StoreUnavailable("lost")
        close(*args)

    monkeypatch.setattr(maintenance._store, "close_claim", lost)
    maintenance.poll(time.monotonic())
    assert (claims(connection), slot.state) == (1, State.DEAD)
    maintenance._rest_until = 0
    turn(maintenance)
    assert (claims(connection), slot.state, charged(connection, job)) == (0, State.RESCUED, GUILTY)
    assert counted(counters) == {"jobs_started": 1, "rescued": 1}


# --- claims that their worker does not know


def test_a_claim_that_commits_after_its_worker_gave_it_up(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim, store: Store
) -> None:
    """The worker lives and works, and asks for the claim no more: given back uncharged after a few beats; its other claims stay."""
    slot = worker_slot(arena)
    slot.state = State.BUSY
    known = claim(slot.worker_id)[0]
    slot.add_token(known.token)
    late = claim(slot.worker_id, 2)
    for _ in range(rescue.STRAY_BEATS - 1):
        turn(maintenance)
    assert [charged(connection, job)[0] for job in late] == ["running"] * 2, (
        "a beat may see a claim that is just over"
    )
    turn(maintenance)
    assert [charged(connection, job) for job in late] == [GIVEN_BACK] * 2
    assert (charged(connection, known)[0], claims(connection)) == ("running", 1)


def test_a_worker_with_more_claims_than_places_for_them_is_left_alone(
    maintenance: Maintenance, arena: Arena, connection: Connection, claim: Claim
) -> None:
    """Not all its tokens stand in the arena: nobody can say which of its claims it does not know."""
    slot = worker_slot(arena)
    slot.state = State.BUSY
    for _ in range(arena.tokens):
        slot.add_token(uuid4())
    job = claim(slot.worker_id)[0]
    assert not slot.add_token(job.token)
    for _ in range(rescue.STRAY_BEATS * 2):
        turn(maintenance)
    assert charged(connection, job)[0] == "running"
    slot.drop_token(job.token)
    for _ in range(rescue.STRAY_BEATS):
        turn(maintenance)
    assert charged(connection, job) == GIVEN_BACK
