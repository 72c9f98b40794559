from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from pmqd import store_reads
from pmqd.errors import Conflict, NotFound
from pmqd.job import Action, Status
from pmqd.store import Depth, Fate, Room
from tests.store_tools import QUEUE, WORKER, Bench, outcome


def later(seconds: float) -> datetime:
    """So many seconds from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def failed(bench: Bench, count: int = 1, **columns: object) -> list[UUID]:
    """Jobs that have failed, one after the other."""
    found = []
    for job_id in bench.insert(count, **columns):
        [job] = bench.claim([job_id])
        bench.store.settle([outcome(job, Action.FAIL, error="boom")], [job.token])
        found.append(job_id)
    return found


def pages(bench: Bench, queue_name: str | None, status: str | None, limit: int) -> list[UUID]:
    """All ids of a list, page by page."""
    found: list[UUID] = []
    cursor = None
    while True:
        rows, cursor = bench.store.list_jobs(queue_name, status, limit, cursor)
        assert len(rows) <= limit
        found += [row["id"] for row in rows]
        if cursor is None:
            return found


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_every_list_gives_each_job_once(bench: Bench, limit: int) -> None:
    """Page by page, for each state: all its jobs, none twice, in the documented order."""
    term = bench.store.lead()
    assert term is not None
    ended = failed(bench, 4)
    done = bench.claim(bench.insert(3))
    bench.store.settle([outcome(job, Action.COMPLETE) for job in done], [done[0].token])
    runs = [job.id for job in bench.claim(bench.insert(2)) + bench.claim(bench.insert())]
    gone = bench.insert(2)
    for job_id in gone:
        bench.store.cancel_job(job_id)
    marked = bench.insert(3, priority=10)
    bench.store.mark(term, [Room(QUEUE, 1, 50, 9)], full=False)
    waits = [*bench.insert(2, run_at=later(-5)), *bench.insert(3), *bench.insert(2, priority=300)]
    bench.insert(2, queue_name="other")
    wanted = {
        Status.FAILED: ended[::-1],
        Status.COMPLETED: [job.id for job in done][::-1],
        Status.RUNNING: sorted(runs, reverse=True),
        Status.CANCELLED: gone[::-1],
        Status.MIGRATED_TO_REDIS: marked,
        Status.QUEUED: waits,
    }
    for status, ids in wanted.items():
        assert pages(bench, QUEUE, status, limit) == ids, status
    everything = [job_id for ids in wanted.values() for job_id in ids]
    assert pages(bench, QUEUE, None, limit) == sorted(everything, reverse=True)
    assert len(pages(bench, None, None, limit)) == len(everything) + 2
    assert len(pages(bench, None, Status.QUEUED, limit)) == len(waits) + 2
    assert pages(bench, None, Status.FAILED, limit) == ended[::-1]


def test_a_list_walks_on_where_few_match(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind many that do not match: a page may be empty, its cursor leads on, and what matches is found."""
    monkeypatch.setattr(store_reads, "WALK_ROWS", 10)
    monkeypatch.setattr(store_reads, "WALK_PAGES", 2)
    [first] = bench.insert()
    bench.store.cancel_job(first)
    bench.insert(75)
    rows, cursor = bench.store.list_jobs(QUEUE, Status.CANCELLED, 5, None)
    assert rows == []
    assert cursor is not None
    assert pages(bench, QUEUE, Status.CANCELLED, 5) == [first]


@pytest.mark.parametrize("status", [None, "queued", "running", "failed"])
@pytest.mark.parametrize("cursor", ["x", "é", "WzFd", "WyJhIiwiYiIsImMiLCJkIl0", "bnVsbA"])
def test_a_strange_cursor_is_refused(bench: Bench, status: str | None, cursor: str) -> None:
    """A ValueError that shows it, whatever it decodes to; never a database error."""
    with pytest.raises(store_reads.CursorError, match="cursor") as caught:
        bench.store.list_jobs(QUEUE, status, 5, cursor)
    assert isinstance(caught.value, ValueError)


def test_a_job_is_shown_with_its_attempts(bench: Bench) -> None:
    """All columns, the payload decoded, the log rows oldest first; None for an unknown id."""
    job = bench.running(payload='{"a": 1}', tags=["t"])
    bench.store.settle([outcome(job, Action.RETRY, error="once")], [job.token])
    [job] = bench.claim([job.id])
    bench.store.settle([outcome(job, Action.COMPLETE, result=b'{"b": 2}')], [job.token])
    shown = bench.store.show_job(job.id)
    assert shown is not None
    assert (shown["payload"], shown["result"], shown["tags"]) == ({"a": 1}, {"b": 2}, ["t"])
    assert [(each["status"], each["log_message"]) for each in shown["logs"]] == [
        ("retry", "once"),
        ("success", None),
    ]
    columns = {row["attname"] for row in bench.connection.execute(COLUMNS).fetchall()}
    assert columns - set(shown) == {"ready"}
    assert bench.store.show_job(uuid4()) is None


COLUMNS = "select attname from pg_attribute where attrelid = 'pmqd.jobs'::regclass and attnum > 0 and not attisdropped"


def test_depths_count_what_there_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready (marked ones among them), scheduled, running, failed and the oldest, per queue; counted up to a limit."""
    term = bench.store.lead()
    assert term is not None
    failed(bench, 2)
    bench.claim(bench.insert(3))
    bench.insert(2, priority=5)
    bench.store.mark(term, [Room(QUEUE, 1, 50, 1)], full=False)
    bench.insert(run_at=later(-30))
    bench.insert(4, run_at=later(30), priority=70)
    bench.insert(queue_name="new")
    found = {each.queue_name: each for each in bench.store.depths()}
    mail = found[QUEUE]
    assert (mail.ready, mail.scheduled, mail.running, mail.failed) == (3, 4, 3, 2)
    assert mail.oldest_ready_seconds == pytest.approx(30, abs=5)
    assert found["new"].ready == 1
    monkeypatch.setattr(store_reads, "COUNTED_MOST", 2)
    capped = bench.store.depths()[0]
    assert isinstance(capped, Depth)
    assert (capped.ready, capped.scheduled, capped.failed) == (2, 2, 2)


def test_retrying_is_a_new_life(bench: Bench) -> None:
    """A failed or cancelled job starts with all attempts; a waiting retry is due at once; all else is a conflict."""
    [job_id] = failed(bench)
    bench.connection.execute("update pmqd.jobs set interruptions = 4, alone = true where id = %s", [job_id])
    bench.store.retry_job(job_id)
    row = bench.row(job_id)
    assert (row["status"], row["ready"], row["attempt_count"], row["interruptions"], row["alone"]) == (
        "queued",
        True,
        0,
        0,
        False,
    )
    assert (row["failed_at"], row["last_error_message"]) == (None, None)
    [job] = bench.claim([job_id])
    with pytest.raises(Conflict, match="running"):
        bench.store.retry_job(job_id)
    bench.store.settle([outcome(job, Action.RETRY, error="late", delay_seconds=99)], [job.token])
    bench.store.retry_job(job_id)
    row = bench.row(job_id)
    assert (row["attempt_count"], row["last_error_message"]) == (1, "late")
    with pytest.raises(Conflict, match="queued"):
        bench.store.retry_job(job_id)
    bench.store.cancel_job(job_id)
    bench.store.retry_job(job_id)
    [job] = bench.claim([job_id])
    bench.store.settle([outcome(job, Action.COMPLETE)], [job.token])
    with pytest.raises(Conflict, match="completed"):
        bench.store.retry_job(job_id)
    with pytest.raises(NotFound):
        bench.store.retry_job(uuid4())


def test_cancelling(bench: Bench) -> None:
    """Waiting jobs, marked ones too, are cancelled at once and never claimed; running ones asked; ended ones refused."""
    term = bench.store.lead()
    assert term is not None
    queued, marked = bench.insert(2)
    bench.store.mark(term, [Room(QUEUE, 51, 150, 1)], full=False)
    for job_id in (queued, marked):
        bench.store.cancel_job(job_id)
        assert bench.row(job_id)["status"] == "cancelled"
        with pytest.raises(Conflict, match="cancelled"):
            bench.store.cancel_job(job_id)
    assert bench.claim([queued, marked]) == []
    running = bench.running()
    bench.store.cancel_job(running.id)
    bench.store.cancel_job(running.id)
    row = bench.row(running.id)
    assert (row["status"], row["cancel_requested"]) == ("running", True)
    assert "cancelling" in (bench.store.why(row) or "")
    with pytest.raises(NotFound):
        bench.store.cancel_job(uuid4())


def test_replay_by_queue_kind_time_and_limit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was asked for, oldest failure first, in batches, each job once."""
    monkeypatch.setattr(store_reads, "REPLAY_BATCH", 2)
    bench.store.sync_queues({}, ["other"])
    old = failed(bench, 3, kind="a")
    bench.connection.execute("update pmqd.jobs set failed_at = failed_at - interval '1 day'")
    fresh = failed(bench, 3, kind="b")
    other = failed(bench, 1, queue_name="other", kind="a")
    assert bench.store.replay("other", "b", None, 9) == 0
    assert bench.store.replay(QUEUE, None, later(-3600), 1) == 1
    assert bench.row(fresh[0])["status"] == "queued"
    assert bench.store.replay(QUEUE, "a", None, 2) == 2
    assert [bench.row(job_id)["status"] for job_id in old] == ["queued", "queued", "failed"]
    assert bench.store.replay(None, None, None, 100) == 4
    assert bench.row(other[0])["attempt_count"] == 0
    assert bench.store.replay(None, None, None, 100) == 0


def test_pausing_what_does_not_exist(bench: Bench) -> None:
    """NotFound names the queue."""
    with pytest.raises(NotFound, match="nope"):
        bench.store.pause("nope")
    with pytest.raises(NotFound, match="nope"):
        bench.store.resume("nope")


def test_why_a_job_waits(bench: Bench) -> None:
    """Each reason in words; none for a job that does not wait."""
    store = bench.store

    def why(job_id: UUID) -> str | None:
        return store.why(bench.row(job_id))

    [ready] = bench.insert()
    assert why(ready) == "waiting for a free worker"
    [later_on] = bench.insert(run_at=later(60))
    assert why(later_on) == "not due yet"
    [unserved] = bench.insert(queue_name="unserved")
    assert "nobody serves it" in (why(unserved) or "")
    job = bench.running(priority=1)
    assert why(job.id) is None
    store.settle([outcome(job, Action.RETRY, error="Boom: x\ntraceback", delay_seconds=60)], [job.token])
    assert why(job.id) == "retry after attempt 1 of 3: Boom: x"
    store.pause(QUEUE)
    assert why(ready) == "paused: pmqd queues resume mail"
    store.resume(QUEUE)
    [job] = bench.claim([ready], worker_id=WORKER)
    store.rescue(WORKER, fates={}, default=Fate.INTERRUPTED, cause="a neighbour crashed")
    assert why(job.id) == "waiting for a free worker"
