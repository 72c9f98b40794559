"""Runs one job: binds its payload, calls its handler, turns the end into an outcome.

Whatever a handler does by raising ends here as an outcome, `SystemExit` and `KeyboardInterrupt` too. What ends the
whole process (`os._exit`, a crash in C, a swallowed timeout) is the master's affair: the arena says which job ran.
"""

import asyncio
import contextvars
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import psycopg

from pmqd import codec, live, logs
from pmqd.crashpoints import Checkpoint, pass_by
from pmqd.desk import Desk, Finished, Item
from pmqd.errors import LeaseSpent, SettleRefused, StoreUnavailable
from pmqd.interrupt import INTERRUPTIONS, Target, strike_main, strike_task, strike_thread, watch_main
from pmqd.job import Job, Outcome
from pmqd.notes import Sort
from pmqd.retry import Discard, Ending, completed, decide, interrupt, release
from pmqd.slot import Slot
from pmqd.store import Store

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_SECONDS: Final = 300.0
"""How long an attempt may run where neither the task nor its queue says it."""


class Attempt(Target):
    """One run of one job, and the port that its `Job` speaks through.

    Attributes:
        item: the job.
        over: the handler has ended; what it left running may not settle any more.
        settled: what the job settled itself, committed.
        doubt: what it tried to settle itself, when nobody knows whether that was committed.
        lost: what `settling()` raised because PostgreSQL went away.
        places: where that is noted in the arena.
    """

    __slots__ = ("_executor", "doubt", "item", "lost", "over", "places", "settled")

    def __init__(self, executor: "Executor", item: Item, strike: Callable[[Target], None]) -> None:
        """Takes the executor, the job, and how the attempt is interrupted."""
        super().__init__(strike)
        self._executor = executor
        self.item = item
        self.over = False
        self.settled: Outcome | None = None
        self.doubt: Outcome | None = None
        self.lost: Exception | None = None
        self.places: tuple[int, ...] = ()

    def progress(self, job: Job, fraction: float, note: str) -> None:
        """Notes how far the job is; the clerk tells it with its next round."""
        if not self.over:
            self._executor.report(live.progress(job, fraction, note))

    def settling(
        self, job: Job, outcome: Discard | None, result: Any
    ) -> AbstractContextManager[psycopg.Connection[Any]]:
        """A connection in a transaction that settles the job when it commits."""
        if self.over or self.settled is not None or self.doubt is not None:
            raise SettleRefused(
                f"job {job.id} has settled or ended already: settling() is of no use any more"
            )
        codec.dumps(result)  # refused here, before the handler writes anything beside it
        return self._settling(outcome, result)

    @contextmanager
    def transaction(self, _job: Job) -> Iterator[psycopg.Connection[Any]]:
        """A connection in a transaction that leaves the job as it is."""
        with self._executor.lend_store() as store, ExitStack() as until_committed:
            connection = self._connected(store)
            with self._losing(connection), connection.transaction():
                yield connection
                # A timeout in the commit would leave the handler's own record of what it has done in doubt.
                until_committed.enter_context(self.shielded())

    @contextmanager
    def _settling(self, outcome: Discard | None, result: Any) -> Iterator[psycopg.Connection[Any]]:
        with self._executor.lend_store() as store, ExitStack() as until_committed:
            connection = self._connected(store)
            with self._losing(connection), connection.transaction():
                yield connection
                # No timeout may fall into the commit: the handler would take a settled job for a failed one.
                until_committed.enter_context(self.shielded())
                settled = self._executor.outcome(self.item, result, outcome, time.monotonic())
                if not store.settle_on(connection, settled, ()):
                    raise SettleRefused(
                        f"job {self.item.claimed.id} was taken from this worker; its writes are undone"
                    )
                self.doubt = settled
                self.places = self._executor.note(settled, Sort.DOUBTFUL)
                self._executor.checkpoint("worker.committing")
            self._executor.checkpoint("worker.committed")
            self.settled, self.doubt = settled, None

    def _connected(self, store: Store) -> psycopg.Connection[Any]:
        try:
            return store.connection
        except StoreUnavailable as error:
            self.lost = error
            raise

    @contextmanager
    def _losing(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        """Remembers the error of a connection that went away: it is pmqd's, so the job is not charged for it."""
        try:
            yield
        except psycopg.Error as error:
            if connection.closed:
                self.lost = error
            raise


@dataclass(eq=False)
class Executor:
    """Runs jobs in whatever thread it is called from.

    Attributes:
        desk: where jobs come from and go to.
        slot: the arena's record of this worker.
        worker_id: this worker's name.
        grace_seconds: from the soft timeout to the hard deadline.
        make_store: makes a store for `job.settling()`.
        idle_stores: most connections for `job.settling()` that are kept open while nobody uses them.
        checkpoint: the named crash points.
        may_start: whether a job that must not outlive the lease may be started; is told when its claim was sent.
    """

    desk: Desk
    slot: Slot
    worker_id: str
    grace_seconds: float
    make_store: Callable[[], Store]
    idle_stores: int = 1
    checkpoint: Checkpoint = pass_by
    may_start: Callable[[float], bool] = lambda _asked: True
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stores: list[Store] = field(default_factory=list)
    _reports: dict[Any, live.Event] = field(default_factory=dict)

    def run_in_main(self, item: Item) -> Item | None:
        """Runs a job of a plain handler in the main thread; gives the next one for its place, if there is one."""
        attempt = Attempt(self, item, strike_main)
        watch_main(attempt)
        try:
            return self._run(item, attempt)
        finally:
            watch_main(None)

    def run_in_thread(self, item: Item) -> Item | None:
        """Runs a job of a plain handler in the calling thread, which is not the main one; as `run_in_main`."""
        return self._run(item, Attempt(self, item, strike_thread))

    def run_as_task(
        self, item: Item, loop: asyncio.AbstractEventLoop, then: Callable[[Item | None], None]
    ) -> None:
        """Starts a job of an async handler on the loop; in the loop's thread.

        Args:
            item: the job.
            loop: the loop.
            then: is given the next job for its place, or None, when this one has ended.
        """
        attempt = Attempt(self, item, strike_task)
        if not self._begin(item, attempt):
            then(self.desk.leave(item))
            return
        attempt.arm()
        attempt.task = loop.create_task(self._awaited(item, attempt))
        attempt.task.add_done_callback(lambda task: then(self._end_task(item, attempt, task)))

    def report(self, event: live.Event) -> None:
        """Keeps the newest progress of a job until the clerk tells it."""
        with self._lock:
            self._reports[event.job_id] = event

    def note(self, outcome: Outcome, sort: Sort = Sort.WHOLE) -> tuple[int, ...]:
        """Notes an outcome in the arena, where this process's death does not reach it; the place, if there was one."""
        place = self.slot.notes.put(outcome, sort)
        return (place,) if place >= 0 else ()

    def reports(self) -> list[live.Event]:
        """What jobs have reported since the last call."""
        if not self._reports:
            return []
        with self._lock:
            reports, self._reports = self._reports, {}
        return list(reports.values())

    def forget_reports(self, job_ids: Iterable[UUID]) -> None:
        """Drops what these jobs have reported and nobody was told: they have ended, and must not look as if they ran."""
        if self._reports:
            with self._lock:
                for job_id in job_ids:
                    self._reports.pop(job_id, None)

    def outcome(
        self, item: Item, value: Any, error: BaseException | None, now: float, *, cut: bool = False
    ) -> Outcome:
        """What an end amounts to (now: monotonic seconds; cut: by something that is not the job's fault)."""
        if isinstance(error, LeaseSpent):
            return release(item.claimed, self.worker_id)
        # The start on the database's clock: the claim was made there, the time since then was measured here.
        started = item.claimed.claimed_at + (item.started - item.received)
        if error is None and value is None:
            return completed(item.claimed, self.worker_id, started, now - item.started)
        ending = Ending(self.worker_id, value, error, started, now - item.started)
        if cut:
            return interrupt(
                item.claimed, ending, f"PostgreSQL went away while the job settled itself: {error}"
            )
        return decide(item.claimed, ending, item.policy, random.random())  # noqa: S311 - jitter, no secret

    @contextmanager
    def lend_store(self) -> Iterator[Store]:
        """A store of its own for one transaction of a handler; several handlers may each have one at a time."""
        with self._lock:
            store = self._stores.pop() if self._stores else self.make_store()
        try:
            yield store
        except BaseException:
            store.close()  # whatever state the connection is in, nobody else gets it
            raise
        with self._lock:
            if len(self._stores) < self.idle_stores:
                self._stores.append(store)
                return
        store.close()

    def close(self) -> None:
        """Closes the connections that handlers settled through."""
        with self._lock:
            stores, self._stores = self._stores, []
        for store in stores:
            store.close()

    def _run(self, item: Item, attempt: Attempt) -> Item | None:
        if not self._begin(item, attempt):
            return self.desk.leave(item)
        value, error = contextvars.copy_context().run(self._caught, item, attempt)
        try:
            return self.desk.finish(item, self._finished(item, attempt, value, error))
        finally:
            error = None  # its traceback holds this frame: a cycle that would live until the collector runs

    def _begin(self, item: Item, attempt: Attempt) -> bool:
        now = time.monotonic()
        item.attempt = attempt
        if not self.desk.start(item, now):
            return False
        claimed = item.claimed
        deadline = now + item.timeout + self.grace_seconds
        self.slot.begin(item.entry, claimed.id, claimed.token, deadline, abort=item.abort)
        self.checkpoint("worker.started")
        return True

    def _caught(self, item: Item, attempt: Attempt) -> tuple[Any, BaseException | None]:
        try:
            try:
                attempt.arm()
                return self._call(item, attempt), None
            finally:
                attempt.disarm()
        except BaseException as error:  # noqa: BLE001 - user code may raise anything, and every end has an outcome
            return None, error

    async def _awaited(self, item: Item, attempt: Attempt) -> tuple[Any, BaseException | None]:
        """The end of an async handler as a value: a `SystemExit` that leaves a task would end the loop."""
        try:
            return await self._call(item, attempt), None
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - as in _caught
            return None, error

    def _call(self, item: Item, attempt: Attempt) -> Any:
        claimed = item.claimed
        # Asked after the arena knows of the job: from then on the master kills what is too late.
        if item.abort and not self.may_start(item.asked):
            raise LeaseSpent(f"job {claimed.id} is not started: its lease may be over")
        logs.job_context.set(claimed)
        args, kwargs = item.task.bind(claimed, self.worker_id, attempt)
        return item.task.function(*args, **kwargs)

    def _finished(self, item: Item, attempt: Attempt, value: Any, error: BaseException | None) -> Finished:
        now = time.monotonic()
        attempt.over = True
        if isinstance(error, INTERRUPTIONS) and not error.args:
            error.args = (attempt.message,)  # an exception raised from another thread comes without its text
        if attempt.settled is not None:
            if error is not None:
                log.warning("job %s failed after it had settled itself: %r", item.claimed.id, error)
            return Finished(item, attempt.settled, now, acknowledged=True, places=attempt.places)
        outcome = self.outcome(item, value, error, now, cut=error is not None and error is attempt.lost)
        self.checkpoint("worker.finished")
        places = attempt.places + self.note(outcome)
        self.checkpoint("worker.noted")
        return Finished(item, outcome, now, doubt=attempt.doubt, places=places)

    def _end_task(self, item: Item, attempt: Attempt, task: asyncio.Task[Any]) -> Item | None:
        attempt.disarm()
        value, error = _result_of(task, attempt)
        try:
            return self.desk.finish(item, self._finished(item, attempt, value, error))
        finally:
            error = attempt.task = None


def _result_of(task: asyncio.Task[Any], attempt: Attempt) -> tuple[Any, BaseException | None]:
    try:
        value, error = task.result()
    except asyncio.CancelledError as cancelled:
        if attempt.struck and attempt.wanted is not None:
            return None, attempt.wanted(attempt.message).with_traceback(cancelled.__traceback__)
        return None, cancelled
    return value, error
