"""What becomes of a handler's end, whatever it does; real threads, loops and signals, no store."""

import asyncio
import contextvars
import gc
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from pmqd import App, Discard, Job, Retry, Snooze
from pmqd.arena import Arena
from pmqd.crew import Crew, make_crew
from pmqd.desk import Desk, Finished, Item
from pmqd.errors import SettleRefused
from pmqd.executor import Attempt, Executor
from pmqd.job import Action, Claimed, Outcome
from pmqd.logs import job_context
from pmqd.overseer import Overseer
from pmqd.retry import JobCancelled, JobTimeout, RetryPolicy
from pmqd.settings import RedisSettings

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CONCURRENCIES = pytest.mark.parametrize("concurrency", [1, 4])


def claimed(kind: str, payload: str = "{}", **changes: Any) -> Claimed:
    """A row of queue `q`, just claimed."""
    values: dict[str, Any] = {
        "id": uuid4(), "queue_name": "q", "kind": kind, "priority": 100, "payload": payload, "attempt_count": 1,
        "interruptions": 0, "max_attempts": 3, "run_at": NOW.timestamp(), "created_at": NOW.timestamp(), "tags": (), "alone": False,
        "token": uuid4(), "claimed_at": NOW.timestamp(),
    }  # fmt: skip
    return Claimed(**values | changes)


class FakeConnection:
    """Records how its transaction ended."""

    def __init__(self, log: list[str], *, broken_commit: bool) -> None:
        self.log, self.broken_commit = log, broken_commit

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """As psycopg's."""
        try:
            yield
        except BaseException:
            self.log.append("rollback")
            raise
        if self.broken_commit:
            raise ConnectionError("the connection was lost during the commit")
        self.log.append("commit")


class FakeStore:
    """A store whose settles are recorded; `owned` False: the row belongs to somebody else."""

    def __init__(self, log: list[Any], *, owned: bool = True, broken_commit: bool = False) -> None:
        self.log, self.owned = log, owned
        self.connection = FakeConnection(log, broken_commit=broken_commit)

    def settle_on(self, _connection: Any, outcome: Outcome, _closed: Any) -> bool:
        """As the store's."""
        self.log.append(outcome)
        return self.owned

    def close(self) -> None:
        """As the store's."""
        self.log.append("close")


@dataclass
class Bench:
    """Runners without a clerk: a thread hands jobs over, watches them and collects their ends."""

    app: App
    concurrency: int = 1
    grace: float = 5.0
    store: Any = None
    cancel: set[UUID] = field(default_factory=set)
    finished: list[Finished] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arena = Arena.create(1, entries=8)
        self.slot = self.arena.slots[0]
        self.slot.open("worker", "host:i:w0.1")
        self.desk = Desk(self.concurrency, self.slot, lambda: None)
        self.executor = Executor(self.desk, self.slot, "host:i:w0.1", self.grace, lambda: self.store)
        post: Any = SimpleNamespace(
            settings=SimpleNamespace(redis=RedisSettings(), timeout_grace_seconds=self.grace),
            arena=self.arena,
            worker_id="host:i:w0.1",
        )
        self.overseer = Overseer(post, self.desk, self.executor)

    def item(self, job: Claimed, timeout: float = 30.0) -> Item:
        """A claimed job as the clerk hands it over."""
        task = self.app.registry.find(job.queue_name, job.kind)
        assert task is not None
        return Item(job, task, task.timeout or timeout, RetryPolicy(), time.monotonic())

    def run(self, *jobs: Claimed, until: float = 20.0) -> list[Finished]:
        """Run these jobs; returns their ends in the order in which they came."""
        before = signal.getsignal(signal.SIGUSR2)
        with asyncio.Runner() as runner:
            crew = make_crew(self.concurrency, self.executor, self.desk, runner)
            clerk = threading.Thread(target=self._feed, args=(crew, jobs, time.monotonic() + until))
            clerk.start()
            crew.serve()
            clerk.join()
        signal.signal(signal.SIGUSR2, before)
        assert len(self.finished) == len(jobs)
        assert self.slot.running() == []
        return self.finished

    def one(self, job: Claimed) -> Finished:
        """Run one job; returns its end."""
        return self.run(job)[0]

    def _feed(self, crew: Crew, jobs: tuple[Claimed, ...], deadline: float) -> None:
        try:
            self.desk.hand_over([self.item(job) for job in jobs])
            while len(self.finished) < len(jobs) and time.monotonic() < deadline:
                self.arena.cancels = [(job.id, job.token) for job in jobs if job.id in self.cancel]
                late = self.overseer.look(time.monotonic())  # what is given back is claimed again at once
                self.desk.hand_over([self.item(each.item.claimed) for each in late if each.item])
                ended = self.desk.collect()
                self.desk.spread([each.outcome.duration_seconds for each in ended], time.monotonic())
                self.finished += ended
                self.desk.settled(owed=False)
                time.sleep(0.002)
        finally:
            crew.stop()


@CONCURRENCIES
def test_a_returned_value_is_the_result(concurrency: int) -> None:
    """Arguments come as annotated, the result goes out as JSON, and times are on the database's clock."""
    app = App()

    @app.task(queue="q")
    def double(job: Job, ident: UUID, n: int) -> dict[str, Any]:
        assert isinstance(ident, UUID)
        assert (job.attempt_count, job.kind, job.worker_id) == (1, "double", "host:i:w0.1")
        return {"n": 2 * n}

    payload = f'{{"ident": "{uuid4()}", "n": 21}}'
    end = Bench(app, concurrency).one(claimed("double", payload))
    assert (end.outcome.action, end.outcome.result, end.outcome.error) == (Action.COMPLETE, b'{"n":42}', None)
    assert end.outcome.started is not None
    assert 0 <= end.outcome.started - NOW.timestamp() < 5
    assert end.outcome.duration_seconds > 0


@CONCURRENCIES
def test_async_handlers_run_on_one_loop(concurrency: int) -> None:
    """Async handlers complete, and at concurrency 4 four of them wait at the same time, on the same loop."""
    app, loops, together = App(), set(), []

    @app.task(queue="q")
    async def wait() -> str:
        loops.add(id(asyncio.get_running_loop()))
        together.append(1)
        while concurrency > 1 and len(together) < 4:  # noqa: ASYNC110 - an Event would not show that all run
            await asyncio.sleep(0.001)
        return "done"

    ends = Bench(app, concurrency).run(*(claimed("wait") for _ in range(4)))
    assert [end.outcome.result for end in ends] == [b'"done"'] * 4
    assert len(loops) == 1


def test_plain_handlers_run_in_the_main_thread_at_concurrency_1_and_in_threads_above() -> None:
    """Libraries that insist on the main thread work at concurrency 1; above, jobs run at once in threads."""
    app, seen = App(), []
    barrier = threading.Barrier(4)

    @app.task(queue="q")
    def where(at_once: bool) -> None:
        seen.append(threading.current_thread() is threading.main_thread())
        if at_once:
            barrier.wait(10)

    Bench(app, 1).one(claimed("where", '{"at_once": false}'))
    Bench(app, 4).run(*(claimed("where", '{"at_once": true}') for _ in range(4)))
    assert seen == [True] + [False] * 4


@CONCURRENCIES
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("error", "action", "text"),
    [
        (ValueError("a\0b"), Action.RETRY, "ValueError: a\\x00b"),
        (Retry(7, "later"), Action.RETRY, "Retry: later"),
        (Snooze(9), Action.SNOOZE, "snoozed for 9 s"),
        (Discard("never"), Action.FAIL, "Discard: never"),
        (SystemExit(3), Action.RETRY, "SystemExit: 3"),
        (KeyboardInterrupt(), Action.RETRY, "KeyboardInterrupt"),
        (asyncio.CancelledError("own"), Action.RETRY, "CancelledError"),
        (StopIteration(1), Action.RETRY, "StopIteration"),
        (GeneratorExit(), Action.RETRY, "GeneratorExit"),
    ],
)
def test_every_exception_becomes_an_outcome(
    concurrency: int, is_async: bool, error: BaseException, action: Action, text: str
) -> None:
    """Whatever a handler raises, SystemExit too, ends its attempt and not the worker: the next job runs."""
    if is_async and isinstance(error, StopIteration):
        pytest.skip("Python turns it into a RuntimeError inside a coroutine")
    app = App()

    if is_async:

        @app.task(queue="q", name="raise")
        async def raising() -> None:
            raise error
    else:

        @app.task(queue="q", name="raise")
        def raising() -> None:
            raise error

    @app.task(queue="q")
    def fine() -> None: ...

    ends = {e.outcome.kind: e.outcome for e in Bench(app, concurrency).run(claimed("raise"), claimed("fine"))}
    assert ends["raise"].action == action
    assert (ends["raise"].error or "").startswith(text)
    assert ends["fine"].action == Action.COMPLETE


def test_attempts_used_up_fail_and_delays_follow_the_handler() -> None:
    """The last attempt's error fails the job; Retry's own delay is taken as it is, the backoff else."""
    app = App()

    @app.task(queue="q")
    def own() -> None:
        raise Retry(7)

    @app.task(queue="q")
    def usual() -> None:
        raise ValueError

    ends = Bench(app).run(claimed("own"), claimed("usual", attempt_count=2), claimed("own", attempt_count=3))
    assert ends[0].outcome.delay_seconds == 7
    assert 3 <= ends[1].outcome.delay_seconds <= 5
    assert ends[2].outcome.action == Action.FAIL


def test_what_cannot_work_fails_at_once() -> None:
    """A payload that does not fit, one that is no object, and a result that is no JSON are not tried again."""
    app = App()

    @app.task(queue="q")
    def needs(n: int) -> object:
        return object()

    ends = Bench(app).run(
        claimed("needs", '{"n": "x"}'), claimed("needs", "[]"), claimed("needs", '{"n": 1}')
    )
    assert [end.outcome.action for end in ends] == [Action.FAIL] * 3
    assert "n='x'" in (ends[0].outcome.error or "")
    assert "no JSON object" in (ends[1].outcome.error or "")
    assert "result cannot be stored" in (ends[2].outcome.error or "")


def test_a_timeout_interrupts_a_sleep_in_the_main_thread() -> None:
    """At concurrency 1 even a blocking call ends at the soft timeout, as a retry with the cause.

    `except Exception` does not swallow it, and `finally` runs.
    """
    app, cleaned = App(), []

    @app.task(queue="q", timeout=0.2)
    def sleeps() -> None:
        try:
            time.sleep(30)
        except Exception:  # noqa: BLE001 - what a careless handler does
            cleaned.append("swallowed")
        finally:
            cleaned.append("finally")

    started = time.monotonic()
    end = Bench(app).one(claimed("sleeps"))
    assert time.monotonic() - started < 5
    assert cleaned == ["finally"]
    assert end.outcome.action == Action.RETRY
    assert (end.outcome.error or "").startswith("JobTimeout: ran longer than its timeout of 0.2 s\nTraceback")


def test_a_timeout_interrupts_a_loop_in_a_thread_and_an_await() -> None:
    """In threads a loop of Python ends, on the loop an await; both say why, and neighbours go on."""
    app = App()

    @app.task(queue="q", timeout=0.2)
    def loops() -> None:
        while True:
            pass

    @app.task(queue="q", timeout=0.2)
    async def awaits() -> None:
        await asyncio.sleep(30)

    @app.task(queue="q")
    def neighbour() -> None:
        time.sleep(0.6)

    ends = Bench(app, 4).run(claimed("loops"), claimed("awaits"), claimed("neighbour"))
    by_kind = {end.outcome.kind: end.outcome for end in ends}
    for kind in ("loops", "awaits"):
        assert (by_kind[kind].error or "").startswith(
            "JobTimeout: ran longer than its timeout of 0.2 s\nTrace"
        ), kind
    assert by_kind["neighbour"].action == Action.COMPLETE


@CONCURRENCIES
def test_a_swallowed_timeout_leaves_a_hard_deadline_in_the_arena(concurrency: int) -> None:
    """The arena tells the master when to kill: soft timeout and grace after the start. It is struck once."""
    app, seen, struck = App(), [], []
    bench = Bench(app, concurrency, grace=0.7)

    @app.task(queue="q", timeout=0.2)
    def swallows() -> str:
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            try:
                while time.monotonic() < end:
                    time.sleep(0.001)
            except JobTimeout:
                struck.append(1)
                seen.extend(bench.slot.running())
        return "finished all the same"

    job = claimed("swallows")
    end = bench.one(job)
    assert struck == [1]
    (running,) = seen
    assert (running.job_id, running.token) == (job.id, job.token)
    assert running.deadline is not None
    assert running.deadline - running.started == pytest.approx(0.9, abs=0.01)
    assert end.outcome.action == Action.COMPLETE


@pytest.mark.parametrize("kind", ["plain", "as_task"])
@CONCURRENCIES
def test_a_cancel_interrupts_and_hurries_the_deadline(concurrency: int, kind: str) -> None:
    """A running job whose end is asked for is interrupted at once, settles as cancelled, and has the grace at most."""
    app = App()
    deadlines: list[float] = []
    bench = Bench(app, concurrency, grace=1.0)

    def note_deadline() -> None:
        deadlines.extend(
            entry.deadline - time.monotonic() for entry in bench.slot.running() if entry.deadline
        )

    @app.task(queue="q")
    def plain(job: Job) -> None:
        bench.cancel.add(job.id)
        try:
            while True:
                time.sleep(0.001)
        except JobCancelled:
            note_deadline()
            raise

    @app.task(queue="q")
    async def as_task(job: Job) -> None:
        bench.cancel.add(job.id)
        try:
            await asyncio.sleep(30)
        finally:
            note_deadline()

    assert bench.one(claimed(kind)).outcome.action == Action.CANCEL
    assert deadlines[0] <= 1.0


@CONCURRENCIES
def test_no_interruption_escapes_the_handler(concurrency: int) -> None:
    """Jobs that end at the very instant of their timeout, hundreds of times: each has an outcome, no runner dies."""
    app = App()

    @app.task(queue="q", timeout=0.005)
    def close_call(n: int) -> None:
        end = time.monotonic() + 0.0045 + (n % 20) * 0.0001
        while time.monotonic() < end:
            pass

    bench = Bench(app, concurrency)
    ends = bench.run(*(claimed("close_call", json.dumps({"n": n})) for n in range(300)))
    assert {end.outcome.action for end in ends} <= {Action.COMPLETE, Action.RETRY}


def test_the_log_knows_the_job_and_context_variables_do_not_leak() -> None:
    """Records of a handler carry its job; what a handler sets in a context variable is gone in the next job."""
    app, notes = App(), []
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    @app.task(queue="q")
    def look() -> int:
        note = job_context.get()
        assert note is not None
        notes.append((note.id, note.attempt_count, note.queue_name, note.kind))
        variable.set(variable.get() + 1)
        return variable.get()

    jobs = [claimed("look"), claimed("look", attempt_count=2)]
    ends = Bench(app).run(*jobs)
    assert notes == [(jobs[0].id, 1, "q", "look"), (jobs[1].id, 2, "q", "look")]
    assert [end.outcome.result for end in ends] == [b"1", b"1"]


@CONCURRENCIES
def test_an_alone_job_waits_for_all_and_all_wait_for_it(concurrency: int) -> None:
    """Nothing runs beside a job that must run alone, and those behind it do not overtake it."""
    app, events, lock = App(), [], threading.Lock()
    running = set()

    @app.task(queue="q")
    def note(n: int) -> None:
        with lock:
            running.add(n)
            events.append((n, frozenset(running)))
        time.sleep(0.02)
        with lock:
            running.discard(n)

    jobs = [claimed("note", json.dumps({"n": n}), alone=n == 3) for n in range(6)]
    Bench(app, concurrency).run(*jobs)
    order = [n for n, _ in events]
    assert dict(events)[3] == {3}
    assert set(order[: order.index(3)]) == {0, 1, 2}


def test_an_alone_job_waits_until_what_was_done_before_it_is_settled() -> None:
    """It may end the process the moment it starts: a job that is done must be settled by then, or it would run again."""
    app = App()

    @app.task(queue="q")
    def nothing() -> None: ...

    bench = Bench(app)
    dispatched: list[Item] = []
    bench.desk.dispatch = dispatched.append
    before, alone = bench.item(claimed("nothing")), bench.item(claimed("nothing", alone=True))
    bench.desk.hand_over([before, alone])
    assert dispatched == [before]
    assert bench.executor.run_in_main(before) is None  # its handler has returned
    assert [each.item for each in bench.desk.collect()] == [
        before
    ]  # the clerk has it, and has not settled it
    bench.desk.hand_over([])
    assert dispatched == [before]
    assert bench.desk.withdraw(time.monotonic() + 1) == []  # held back, not given back
    bench.desk.settled(owed=False)
    assert dispatched == [before, alone]


def test_settling_commits_with_the_handlers_writes_and_is_not_settled_again() -> None:
    """The settle happens inside the handler's transaction; what the handler returns or raises later does not count."""
    app = App()
    log: list[Any] = []
    later: list[Any] = []
    connections: list[Any] = []

    @app.task(queue="q")
    def transfer(job: Job, fail: bool) -> str:
        with job.settling(result={"n": 1}) as connection:
            connections.append(connection)
        with pytest.raises(SettleRefused):
            job.settling()
        later.append(job)
        if fail:
            raise ValueError("too late")
        return "ignored"

    ends = Bench(app, store=FakeStore(log)).run(
        claimed("transfer", '{"fail": false}'), claimed("transfer", '{"fail": true}')
    )
    for end in ends:
        assert end.acknowledged
        assert (end.outcome.action, end.outcome.result) == (Action.COMPLETE, b'{"n":1}')
    assert [entry for entry in log if isinstance(entry, str)] == ["commit", "commit"]
    assert all(isinstance(connection, FakeConnection) for connection in connections)
    with pytest.raises(SettleRefused):
        later[0].settling()


def test_settling_a_discard_fails_the_job_and_an_error_inside_rolls_back() -> None:
    """`settling(Discard)` fails the job with the transaction; an exception in the block takes the usual way."""
    app = App()
    log: list[Any] = []

    @app.task(queue="q")
    def bounce(job: Job) -> None:
        with job.settling(Discard("550")):
            pass

    @app.task(queue="q")
    def breaks(job: Job) -> None:
        with job.settling():
            raise ValueError("inside")

    @app.task(queue="q")
    def bad_result(job: Job) -> None:
        with job.settling(result=object()):
            pytest.fail("the block must not run")

    ends = Bench(app, store=FakeStore(log)).run(claimed("bounce"), claimed("breaks"), claimed("bad_result"))
    assert (ends[0].acknowledged, ends[0].outcome.action, ends[0].outcome.error) == (
        True,
        Action.FAIL,
        "Discard: 550",
    )
    assert (ends[1].acknowledged, ends[1].outcome.action) == (False, Action.RETRY)
    assert ends[2].outcome.action == Action.RETRY
    assert (ends[2].outcome.error or "").startswith("TypeError")
    assert [entry for entry in log if isinstance(entry, str)] == ["commit", "rollback", "close"]


def test_a_transaction_leaves_the_job_as_it_is() -> None:
    """`transaction()` commits while the job goes on, as often as it is asked for; an error undoes its own block alone."""
    app = App()
    log: list[Any] = []

    @app.task(queue="q")
    def sends(job: Job) -> None:
        with job.transaction(), pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), job.transaction():
            raise ZeroDivisionError
        with job.transaction():
            pass
        with job.settling(result="sent"):
            pass

    end = Bench(app, store=FakeStore(log)).one(claimed("sends"))
    assert (end.acknowledged, end.outcome.result) == (True, b'"sent"')
    assert [entry for entry in log if isinstance(entry, str)] == [
        "commit",
        "rollback",
        "close",
        "commit",
        "commit",
    ]


def test_settling_of_a_job_that_was_taken_away_is_refused_and_rolled_back() -> None:
    """No row: the handler's writes are undone and SettleRefused is raised at the end of the block."""
    app = App()
    log: list[Any] = []

    @app.task(queue="q")
    def transfer(job: Job) -> None:
        with pytest.raises(SettleRefused), job.settling():
            pass

    end = Bench(app, store=FakeStore(log, owned=False)).one(claimed("transfer"))
    assert log[1:] == ["rollback", "close"]
    assert not end.acknowledged


def test_a_commit_that_nobody_heard_of_is_in_doubt() -> None:
    """The connection is lost in the commit: the clerk is told what may have been settled, and reads it back."""
    app = App()
    log: list[Any] = []

    @app.task(queue="q")
    def transfer(job: Job) -> None:
        with job.settling():
            pass

    end = Bench(app, store=FakeStore(log, broken_commit=True)).one(claimed("transfer"))
    assert not end.acknowledged
    assert end.doubt is not None
    assert end.doubt.action == Action.COMPLETE
    assert end.outcome.action == Action.RETRY


def test_no_timeout_falls_into_the_commit_of_a_settling() -> None:
    """A timeout that is due during the commit comes after it: a settled job is not taken for a failed one."""
    app = App()
    log: list[Any] = []
    order: list[str] = []
    store = FakeStore(log)

    @contextmanager
    def slow_transaction() -> Iterator[None]:
        yield
        time.sleep(0.4)
        order.append("commit")

    store.connection.transaction = slow_transaction  # type: ignore[method-assign]

    @app.task(queue="q", timeout=0.1)
    def transfer(job: Job) -> None:
        try:
            with job.settling():
                pass
            while True:
                time.sleep(0.001)
        except JobTimeout:
            order.append("timeout")
            raise

    end = Bench(app, store=store).one(claimed("transfer"))
    assert order == ["commit", "timeout"]
    assert end.acknowledged


def test_progress_is_kept_until_the_clerk_takes_the_newest() -> None:
    """Reports are collected, only the newest of a job is told."""
    app = App()
    bench = Bench(app)

    @app.task(queue="q")
    def reports(job: Job) -> None:
        for n in range(10):
            job.progress(n / 10, f"step {n}")

    job = claimed("reports")
    bench.one(job)
    (event,) = bench.executor.reports()
    assert event.job_id == job.id
    assert "step 9" in event.fields
    assert bench.executor.reports() == []


def test_a_job_that_has_ended_leaves_nothing_to_the_collector() -> None:
    """All that was made for a job goes with its last reference: thousands a second would else wait for the collector."""
    app = App()

    @app.task(queue="q")
    def nothing() -> None:
        """Nothing."""

    bench = Bench(app, 4)
    gc.collect()
    gc.disable()
    try:
        ids = {end.outcome.job_id for end in bench.run(claimed("nothing"), claimed("nothing"))}
        bench.finished.clear()
        for thread in threading.enumerate():
            if thread.name.startswith("runner"):  # what it ran last is its own until it ends
                thread.join(10)
        assert [
            each for each in gc.get_objects() if isinstance(each, Attempt) and each.item.claimed.id in ids
        ] == []
    finally:
        gc.enable()
