import time
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from pmqd.job import Action, Claimed
from pmqd.store import Fate, StatementError
from tests.store_tools import QUEUE, WORKER, Bench, outcome

# action, columns before the claim -> status, attempts, interruptions, log status, seconds until due (None: as before)
ACCOUNTS = [
    pytest.param(Action.COMPLETE, {}, "completed", 1, 0, "success", None, id="complete"),
    pytest.param(Action.RETRY, {}, "queued", 1, 0, "retry", 40, id="retry"),
    pytest.param(Action.RETRY, {"max_attempts": 1}, "failed", 1, 0, "failed", 40, id="retry, none left"),
    pytest.param(Action.FAIL, {}, "failed", 1, 0, "failed", None, id="fail"),
    pytest.param(Action.SNOOZE, {}, "queued", 0, 0, "released", 40, id="snooze"),
    pytest.param(
        Action.SNOOZE, {"max_attempts": 1}, "queued", 0, 0, "released", 40, id="snooze, last attempt"
    ),
    pytest.param(Action.RELEASE, {}, "queued", 0, 0, None, None, id="release"),
    pytest.param(Action.INTERRUPT, {}, "queued", 0, 1, "released", None, id="interrupt"),
    pytest.param(
        Action.INTERRUPT, {"interruptions": 4}, "queued", 0, 5, "released", None, id="fifth interruption"
    ),
    pytest.param(
        Action.INTERRUPT, {"interruptions": 5}, "queued", 1, 5, "released", None, id="sixth is charged"
    ),
    pytest.param(
        Action.INTERRUPT,
        {"interruptions": 5, "max_attempts": 1},
        "failed",
        1,
        5,
        "failed",
        None,
        id="sixth, none left",
    ),
    pytest.param(Action.CANCEL, {}, "cancelled", 1, 0, "cancelled", None, id="cancel"),
]


@pytest.mark.parametrize(("action", "columns", "status", "attempts", "interruptions", "log", "due"), ACCOUNTS)
def test_every_action_is_accounted_as_the_states_say(
    bench: Bench,
    action: Action,
    columns: dict[str, int],
    status: str,
    attempts: int,
    interruptions: int,
    log: str | None,
    due: int | None,
) -> None:
    """Status, attempts, interruptions, due time and log row of each action, with attempts left and without."""
    job = bench.running(**columns)
    delay = 40.0 if action in (Action.RETRY, Action.SNOOZE) else 0.0
    error = None if action == Action.COMPLETE else "boom"
    settled = bench.store.settle([outcome(job, action, error=error, delay_seconds=delay)], [job.token])
    row = bench.row(job.id)
    assert settled == {job.id: status}
    assert (row["status"], row["attempt_count"], row["interruptions"]) == (status, attempts, interruptions)
    assert row["ready"] == (status == "queued")
    moved = row["run_at"].timestamp() - job.run_at
    assert moved == 0 if due is None else due - 1 < moved < due + 10
    assert row["last_error_message"] == error
    ends = {name: row[f"{name}_at"] for name in ("completed", "failed", "cancelled")}
    assert {name for name, at in ends.items() if at is not None} == {status} - {"queued"}
    assert [(each["status"], each["attempt_number"], each["duration"]) for each in bench.logs(job.id)] == (
        [(log, 1, 0.25)] if log else []
    )
    assert bench.count("pmqd.claims") == 0


@pytest.mark.parametrize("action", list(Action))
def test_a_request_to_cancel_is_kept_unless_the_job_ends_first(bench: Bench, action: Action) -> None:
    """A running job that was asked to cancel becomes cancelled by every settle that would put it back; complete and fail stand."""
    job = bench.running()
    bench.store.cancel_job(job.id)
    assert bench.row(job.id)["cancel_requested"]
    [status] = bench.store.settle([outcome(job, action)], [job.token]).values()
    wanted = {Action.COMPLETE: "completed", Action.FAIL: "failed"}.get(action, "cancelled")
    row = bench.row(job.id)
    assert (status, row["status"], row["cancel_requested"]) == (wanted, wanted, False)
    assert [each["status"] for each in bench.logs(job.id)] == (
        [] if action == Action.RELEASE else [{"completed": "success"}.get(wanted, wanted)]
    )


def test_a_release_with_a_delay_waits_and_says_why(bench: Bench) -> None:
    """An unknown kind: uncharged, looked at again later, the reason on the row."""
    job = bench.running()
    bench.store.settle([outcome(job, Action.RELEASE, error="no worker knows kind 'x'", delay_seconds=30)], [])
    row = bench.row(job.id)
    assert (row["status"], row["attempt_count"], row["started_at"]) == ("queued", 0, None)
    assert row["run_at"].timestamp() - job.run_at > 29
    assert bench.store.why(row) == "no worker knows kind 'x'"


def test_results_and_errors_of_any_text_arrive_as_they_are(bench: Bench) -> None:
    """One batch with results, errors and neither: each row gets its own, quotes, brackets and letters of all kinds included."""
    texts = ['"{}[],', "ä\n\t\\", "null", None, "x" * 5000]
    jobs = bench.claim(bench.insert(len(texts)))
    results = [b'{"a": "\xc3\xa4\\n"}', None, b"null", b"[1, 2]", b'"text"']
    outcomes = [
        outcome(job, Action.COMPLETE if at % 2 else Action.FAIL, error=text, result=result)
        for at, (job, text, result) in enumerate(zip(jobs, texts, results, strict=True))
    ]
    bench.store.settle(outcomes[::-1], [jobs[0].token])
    rows = [bench.row(job.id) for job in jobs]
    assert [row["result"] for row in rows] == [None, None, None, [1, 2], None]
    assert [row["last_error_message"] for row in rows] == [texts[0], None, texts[2], None, texts[4]]
    assert [bench.logs(job.id)[0]["log_message"] for job in jobs] == texts


def test_a_settle_without_the_token_touches_nothing(bench: Bench) -> None:
    """Another token, an ended job, a job given back: no row, no log, and the rest of the batch is settled."""
    good, forged, ended, rescued = bench.claim(bench.insert(4))
    bench.store.settle([outcome(ended, Action.COMPLETE)], [])
    bench.connection.execute(
        "update pmqd.jobs set status = 'queued', ready = true, attempt_count = 0 where id = %s", [rescued.id]
    )
    batch = [
        outcome(replace(forged, token=uuid4()), Action.FAIL),
        outcome(ended, Action.FAIL),
        outcome(rescued, Action.COMPLETE),
        outcome(good, Action.COMPLETE),
    ]
    assert bench.store.settle(batch, []) == {good.id: "completed"}
    assert bench.row(forged.id)["status"] == "running"
    assert bench.row(ended.id)["status"] == "completed"
    assert bench.row(rescued.id)["status"] == "queued"
    assert bench.count("pmqd.job_logs") == 2


def test_a_late_settle_does_not_end_the_next_claim(bench: Bench) -> None:
    """A job that was rescued and claimed again, by the same worker even: the first owner's settle finds no row."""
    first = bench.running()
    bench.store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="signal 9")
    [second] = bench.claim([first.id])
    assert bench.store.settle([outcome(first, Action.COMPLETE)], []) == {}
    assert bench.store.settled_ids([outcome(first, Action.COMPLETE)]) == {}
    assert bench.row(first.id)["status"] == "running"
    assert bench.store.settle([outcome(second, Action.COMPLETE)], []) == {first.id: "completed"}


def test_two_outcomes_of_one_job_in_a_batch_find_the_right_one(bench: Bench) -> None:
    """Of a stale and a valid outcome for the same job the valid one counts, in either order."""
    for turn in (1, -1):
        stale = bench.running()
        bench.store.settle([outcome(stale, Action.RELEASE)], [stale.token])
        [fresh] = bench.claim([stale.id])
        batch = [outcome(stale, Action.FAIL), outcome(fresh, Action.COMPLETE)][::turn]
        assert bench.store.settle(batch, [fresh.token]) == {fresh.id: "completed"}
        assert bench.count("pmqd.claims") == 0
        _, status = bench.store.settle_and_claim(
            batch, [], [], token=uuid4(), worker_id=WORKER, instance_id=bench.instance_id
        )
        assert status == []


def test_settle_and_claim_share_a_transaction(bench: Bench) -> None:
    """Both happen; when the settle cannot, the claim does not either, and the store goes on."""
    job = bench.running()
    [waiting] = bench.insert()
    bad = outcome(job, Action.COMPLETE, result=b'"\\u0000"')
    owner: dict[str, Any] = {"worker_id": WORKER, "instance_id": bench.instance_id}
    with pytest.raises(StatementError):
        bench.store.settle_and_claim([bad], [job.token], [waiting], token=uuid4(), **owner)
    assert (bench.row(job.id)["status"], bench.row(waiting)["status"]) == ("running", "queued")
    settled, won = bench.store.settle_and_claim(
        [outcome(job, Action.COMPLETE)], [job.token], [waiting], token=uuid4(), **owner
    )
    assert settled == {job.id: "completed"}
    assert [each.id for each in won] == [waiting]
    assert bench.count("pmqd.claims") == 1


def test_a_settle_in_the_callers_transaction_ends_with_it(bench: Bench) -> None:
    """`settle_on`: rolled back with the caller's writes, committed with them, False when the job was taken away."""
    job = bench.running()
    done = outcome(job, Action.COMPLETE, result=b"1")
    with psycopg.connect(bench.dsn, row_factory=dict_row) as mine:
        mine.execute("create table written (x int)")
        mine.commit()
        mine.execute("insert into written values (1)")
        assert bench.store.settle_on(mine, done, [job.token])
        mine.rollback()
        assert bench.row(job.id)["status"] == "running"
        mine.execute("insert into written values (2)")
        assert bench.store.settle_on(mine, done, [job.token])
        mine.commit()
        assert not bench.store.settle_on(mine, done, [])
    assert bench.row(job.id)["status"] == "completed"
    assert bench.count("written where x = 2") == bench.count("written") == 1


@pytest.mark.parametrize("action", list(Action))
def test_an_unanswered_settle_is_read_back(bench: Bench, action: Action) -> None:
    """`settled_ids` tells a settle that was committed from one that was not, as long as nobody claims the job again."""
    lost, settled = bench.claim(bench.insert(2))
    done = [outcome(lost, action), outcome(settled, action)]
    assert bench.store.settled_ids(done) == {}
    made = bench.store.settle([done[1]], [])
    assert bench.store.settled_ids(done) == {(settled.id, settled.token): made[settled.id]}


def test_a_settle_is_read_back_after_the_job_has_moved_on(bench: Bench) -> None:
    """A retry that was committed is found by its log row, although another worker has the job by now."""
    job = bench.running()
    retry = outcome(job, Action.RETRY)
    bench.store.settle([retry], [job.token])
    [again] = bench.claim([job.id], worker_id="somebody else")
    assert bench.store.settled_ids([retry]) == {(job.id, retry.token): "queued"}
    assert bench.store.settled_ids([outcome(again, Action.RETRY, worker_id="somebody else")]) == {}


def test_an_earlier_interruption_is_not_taken_for_the_settle(bench: Bench) -> None:
    """Same worker, same attempt number, an older log row: the settle that did not commit is not found."""
    job = bench.running()
    bench.store.settle([outcome(job, Action.INTERRUPT)], [job.token])
    [again] = bench.claim([job.id])
    assert again.attempt_count == job.attempt_count
    assert bench.store.settled_ids([outcome(again, Action.COMPLETE)]) == {}


def test_what_a_rescue_gave_back_does_not_look_settled(bench: Bench) -> None:
    """The dead worker's settle was not committed: neither the row nor the `crashed` line may speak for it."""
    job = bench.running()
    bench.store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="signal 9")
    assert bench.store.settled_ids([outcome(job, Action.COMPLETE)]) == {}


def test_attempts_are_bounded_by_the_database(bench: Bench) -> None:
    """Retried by every means, a job is claimed max_attempts times and no more."""
    [job_id] = bench.insert(max_attempts=3)
    claimed: list[Claimed] = []
    while jobs := bench.claim([job_id]):
        claimed += jobs
        bench.store.settle([outcome(jobs[0], Action.RETRY)], [jobs[0].token])
    assert [job.attempt_count for job in claimed] == [1, 2, 3]
    assert bench.row(job_id)["status"] == "failed"


def test_a_batch_of_500_settles_in_milliseconds(bench: Bench) -> None:
    """No join over all pairs: ten times the jobs take about ten times as long, not a hundred times."""
    for _ in range(7):  # beyond the fifth execution plans are generic
        jobs = bench.claim(bench.insert(500))
        started = time.perf_counter()
        assert (
            len(bench.store.settle([outcome(job, Action.COMPLETE) for job in jobs], [jobs[0].token])) == 500
        )
        spent = time.perf_counter() - started
    assert spent < 1.0
    assert bench.count("pmqd.jobs where queue_name = %s and status = 'completed'", QUEUE) == 3500
