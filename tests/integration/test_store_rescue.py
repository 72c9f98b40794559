import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NoReturn
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd.job import Action, moment
from pmqd.store import Fate, Rescued
from pmqd.store_types import Held
from tests.fix_servers import WaitUntil
from tests.store_tools import WORKER, Bench, outcome

# fate, columns before the claim -> status, attempts, interruptions, alone, logged
FATES = [
    pytest.param(Fate.CHARGED, {}, "queued", 1, 0, True, True, id="charged"),
    pytest.param(Fate.CHARGED, {"max_attempts": 1}, "failed", 1, 0, True, True, id="charged, none left"),
    pytest.param(Fate.INTERRUPTED, {}, "queued", 0, 1, True, True, id="interrupted"),
    pytest.param(Fate.INTERRUPTED, {"interruptions": 5}, "queued", 1, 5, True, True, id="sixth is charged"),
    pytest.param(
        Fate.INTERRUPTED,
        {"interruptions": 5, "max_attempts": 1},
        "failed",
        1,
        5,
        True,
        True,
        id="sixth, none left",
    ),
    pytest.param(Fate.UNSTARTED, {}, "queued", 0, 0, False, False, id="unstarted"),
    pytest.param(Fate.UNSTARTED, {"alone": True}, "queued", 0, 0, True, False, id="unstarted, to run alone"),
]


@pytest.mark.parametrize(("fate", "columns", "status", "attempts", "interruptions", "alone", "logged"), FATES)
def test_every_fate_is_accounted_as_the_states_say(
    bench: Bench,
    fate: Fate,
    columns: dict[str, object],
    status: str,
    attempts: int,
    interruptions: int,
    alone: bool,
    logged: bool,
) -> None:
    """Status, attempts, interruptions, `alone`, message and log row of each fate, with attempts left and without."""
    job = bench.running(**columns)
    [rescued] = bench.store.rescue(WORKER, fates={job.id: fate}, default=Fate.UNSTARTED, cause="signal 11")
    row = bench.row(job.id)
    assert (rescued.job_id, rescued.status, rescued.fate, rescued.attempt_count) == (
        job.id,
        status,
        fate,
        attempts,
    )
    assert (row["status"], row["attempt_count"], row["interruptions"]) == (status, attempts, interruptions)
    assert (row["alone"], row["claim_token"], row["run_at"]) == (alone, None, moment(job.run_at))
    assert row["last_error_message"] == ("signal 11" if logged else None)
    assert [(each["status"], each["log_message"]) for each in bench.logs(job.id)] == (
        [("crashed", "signal 11")] if logged else []
    )
    assert bench.count("pmqd.claims") == 0


@pytest.mark.parametrize("fate", list(Fate))
def test_a_rescued_job_that_was_to_be_cancelled_is(bench: Bench, fate: Fate) -> None:
    """The request outlives the owner."""
    job = bench.running()
    bench.store.cancel_job(job.id)
    [rescued] = bench.store.rescue(WORKER, fates={}, default=fate, cause="signal 9")
    assert (rescued.status, bench.row(job.id)["cancelled_at"] is not None) == ("cancelled", True)


def test_a_rescue_takes_only_what_the_dead_still_held(bench: Bench) -> None:
    """Settled jobs and those of other workers stay; doing it again does nothing."""
    held, settled = bench.claim(bench.insert(2))
    [other] = bench.claim(bench.insert(), worker_id="lives")
    bench.store.settle([outcome(settled, Action.COMPLETE)], [])
    rescued = bench.store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="x")
    assert [job.job_id for job in rescued] == [held.id]
    assert bench.row(other.id)["status"] == "running"
    assert bench.store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="x") == []
    assert bench.count("pmqd.claims where worker_id = 'lives'") == bench.count("pmqd.claims") == 1
    assert len(bench.logs(held.id)) == 1


def test_a_job_claimed_twice_by_the_dead_is_found_by_its_last_claim(bench: Bench) -> None:
    """Two open claims name the job, one of them over: it is given back whichever token sorts first."""
    for first, second in ((1, 2), (4, 3)):
        tokens = [uuid4() for _ in range(2)]
        tokens.sort(reverse=first > second)
        ids = bench.insert(2)
        jobs = bench.claim(ids, tokens[0])
        bench.store.settle([outcome(jobs[0], Action.RELEASE)], [])
        bench.claim(ids[:1], tokens[1])
        rescued = bench.store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="x")
        assert sorted(job.job_id for job in rescued) == ids
        assert bench.count("pmqd.claims") == 0


def test_a_claim_that_commits_after_the_rescue_is_found_by_the_next(bench: Bench) -> None:
    """The dead worker's statement was still under way: its claims row shows in the next beat, and is rescued then."""
    bench.store.rescue(WORKER, fates={}, default=Fate.UNSTARTED, cause="x")
    job = bench.running()
    assert bench.store.beat(bench.instance_id, holding=False, stalled_tick=None).claim_workers == [WORKER]
    assert bench.store.rescue(WORKER, fates={}, default=Fate.UNSTARTED, cause="x")[0].job_id == job.id
    assert bench.store.beat(bench.instance_id, holding=True, stalled_tick=None).claim_workers == []


def test_a_dead_instance_gives_everything_back(bench: Bench) -> None:
    """All workers of the instance; interrupted, but not to run alone; its lease ends."""
    jobs = bench.claim(bench.insert(2)) + bench.claim(bench.insert(), worker_id="w2")
    rescued = bench.store.rescue_instance(bench.instance_id, "gone")
    assert sorted(job.job_id for job in rescued) == sorted(job.id for job in jobs)
    assert {job.fate for job in rescued} == {Fate.INTERRUPTED}
    assert not bench.row(jobs[0].id)["alone"]
    assert bench.count("pmqd.instances") == bench.count("pmqd.claims") == 0


@pytest.mark.parametrize("age", [31, 32])
def test_orphans_are_those_whose_lease_ran_out_a_tick_ago(bench: Bench, age: int) -> None:
    """Until then nothing is taken from an instance; afterwards everything, and it is forgotten."""
    job = bench.running()
    bench.set_tick(age)
    rescued = bench.store.rescue_orphans("lease ran out")
    assert [each.job_id for each in rescued] == ([job.id] if age == 32 else [])
    assert bench.count("pmqd.instances") == (0 if age == 32 else 1)
    assert bench.row(job.id)["status"] == ("queued" if age == 32 else "running")


def test_claims_of_an_instance_that_signed_off_are_orphans(bench: Bench) -> None:
    """An instance without a row has no lease at all."""
    job = bench.running()
    bench.store.unregister(bench.instance_id)
    assert [each.job_id for each in bench.store.rescue_orphans("gone")] == [job.id]


def test_who_did_nothing_wrong_need_not_run_alone(bench: Bench) -> None:
    """A worker that was cut by the end of its time to drain: interrupted, and not under suspicion."""
    job = bench.running()
    bench.store.rescue(WORKER, fates={}, default=Fate.INTERRUPTED, cause="drained", alone=False)
    row = bench.row(job.id)
    assert (row["status"], row["interruptions"], row["alone"]) == ("queued", 1, False)


def test_a_row_that_cannot_be_written_does_not_keep_the_others(bench: Bench) -> None:
    """The batch fails, the rows go singly; the claim of the one that cannot is kept and found again."""
    jobs = bench.claim(bench.insert(5))
    bad = jobs[2].id
    bench.connection.execute(
        f"alter table pmqd.jobs add constraint trouble check (id <> '{bad}' or status = 'running') not valid"
    )
    rescued = bench.store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="x")
    assert sorted(job.job_id for job in rescued) == sorted(job.id for job in jobs if job.id != bad)
    assert bench.count("pmqd.claims") == 1
    bench.connection.execute("alter table pmqd.jobs drop constraint trouble")
    assert [job.job_id for job in bench.store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="x")] == [
        bad
    ]
    assert bench.count("pmqd.claims") == 0


def test_rescues_and_settles_at_once_end_each_job_once(bench: Bench) -> None:
    """Two rescuers and the living owner at the same 300 jobs: no deadlock gets out, each attempt has exactly one log row."""
    jobs = bench.claim(bench.insert(300))
    owner, *rescuers = (bench.another() for _ in range(3))
    gate = threading.Barrier(3)
    settled: dict[UUID, str] = {}

    def settle() -> None:
        gate.wait()
        mixed = random.sample(jobs, len(jobs))
        for at in range(0, 300, 30):
            settled.update(owner.settle([outcome(job, Action.COMPLETE) for job in mixed[at : at + 30]], []))

    def rescue(number: int) -> None:
        gate.wait()
        rescuers[number].rescue(WORKER, fates={}, default=Fate.CHARGED, cause="x")

    threads = [threading.Thread(target=settle), *(threading.Thread(target=rescue, args=[n]) for n in (0, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.count("pmqd.job_logs") == bench.count("(select distinct job_id from pmqd.job_logs) l") == 300
    assert bench.count("pmqd.jobs where status = 'completed'") == len(settled)
    assert bench.count("pmqd.jobs where status = 'queued' and attempt_count = 1") == 300 - len(settled)


class Died(BaseException):
    """A maintenance that ends between giving back and counting."""


def test_what_became_of_a_job_later_is_not_taken_for_what_an_uncounted_rescue_did(bench: Bench) -> None:
    """Given back, not counted; then the job runs elsewhere and fails. Whoever counts the rescue later must not count that failure."""
    [twice], [once] = bench.insert(max_attempts=2), bench.insert(max_attempts=1)
    bench.claim([twice, once])
    told: list[Sequence[Rescued]] = []

    def dies(_claim: Held, _left: Sequence[UUID], _rescued: Sequence[Rescued]) -> NoReturn:
        raise Died

    @contextmanager
    def counts(_claim: Held, _left: Sequence[UUID], rescued: Sequence[Rescued]) -> Iterator[None]:
        told.append(rescued)
        yield

    given: dict[str, Any] = {"fates": {}, "default": Fate.CHARGED, "cause": "signal 11"}
    with pytest.raises(Died):
        bench.store.rescue(WORKER, **given, account=dies)
    [again] = bench.claim([twice], worker_id="elsewhere")
    bench.store.settle([outcome(again, Action.FAIL)], [])
    assert bench.store.rescue(WORKER, **given, account=counts) == []
    found = {job.job_id: job.status for rescued in told for job in rescued}
    assert found == {twice: "queued", once: "failed"}


def test_sessions_are_ended_that_stand_still_in_a_pipeline_and_no_others(
    bench: Bench, database: str, wait_until: WaitUntil
) -> None:
    """Neither an idle worker's session, nor a stranger's that stands still, nor one that did something a moment ago."""
    names = ("pmqd:worker", "pmqd:worker", "somebody")
    frozen, idle, stranger = (
        psycopg.connect(database, autocommit=True, application_name=name) for name in names
    )
    with closing(frozen), closing(idle), closing(stranger):
        idle.execute("select 1")
        for each in (frozen, stranger):
            each.pgconn.enter_pipeline_mode()
            each.pgconn.send_query_params(b"select 1", [])
            each.pgconn.flush()
        assert bench.store.end_frozen(60.0) == []
        [(pid, waited)] = wait_until(
            lambda: bench.store.end_frozen(0.2), what="it has stood still for long enough"
        )
        assert pid == frozen.info.backend_pid
        assert 0.2 <= waited < 10
        wait_until(lambda: bench.count(f"pg_stat_activity where pid = {pid}") == 0, what="its end")
        assert bench.store.end_frozen(0.0) == []
        left = f"pg_stat_activity where pid in ({idle.info.backend_pid}, {stranger.info.backend_pid})"
        assert bench.count(left) == 2
