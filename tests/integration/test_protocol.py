"""The protocol, by machine: random steps on real servers and on a model of a page, compared after each."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pmqd.broker import Broker, EpochMismatch
from pmqd.config import RedisSettings
from pmqd.errors import Conflict
from pmqd.job import BAND_RANGES, Action, Claimed, Status, band_of
from pmqd.store import Fate, Room
from tests.protocol_model import Model, Row
from tests.store_tools import QUEUE, Bench, open_bench, outcome

BASE = datetime.now(UTC) - timedelta(days=1)
ACTION_OF = {
    Fate.CHARGED: Action.RETRY,
    Fate.INTERRUPTED: Action.INTERRUPT,
    Fate.UNSTARTED: Action.RELEASE,
}
WORKERS = ("w1", "w2")
EXAMPLES = 100

bands = st.sampled_from(sorted(BAND_RANGES))
few = st.integers(1, 4)
mostly = st.sampled_from([True, True, True, False])


class Protocol(RuleBasedStateMachine):
    """Every step that clients, migrator, workers and maintenance take, in any order, with losses in between."""

    bench: Bench
    broker: Broker
    client: Any
    jobs = Bundle("jobs")
    held = Bundle("held")

    @initialize(target=jobs)
    def anew(self) -> Any:
        """Both stores as new, one leading migrator, one instance with a lease, three jobs."""
        self.model, self.places = Model(), 0
        self.bench.connection.execute("truncate pmqd.jobs, pmqd.claims, pmqd.job_logs")
        self.bench.connection.execute("update pmqd.job_queues set is_active = true")
        self.bench.set_tick(0)
        self.bench.connection.execute("update pmqd.instances set lease_tick = 0")
        self.client.flushall()
        if not self.bench.term:
            self.bench.term = self.bench.store.lead() or 0
        self.epoch = self.bench.store.redis_epoch()
        self.broker.set_epoch(self.epoch)
        return multiple(*(self.enqueue(100, due=True, attempts=3) for _ in range(3)))

    # producers, and people

    @rule(target=jobs, priority=st.sampled_from([10, 50, 100, 101, 200]), due=mostly, attempts=few)
    def add(self, priority: int, due: bool, attempts: int) -> UUID:
        """One more job."""
        return self.enqueue(priority, due=due, attempts=attempts)

    def enqueue(self, priority: int, *, due: bool, attempts: int) -> UUID:
        """A job, due or not for a day."""
        place = self._place()
        run_at = BASE + timedelta(seconds=place) if due else datetime.now(UTC) + timedelta(days=1)
        [job_id] = self.bench.insert(priority=priority, run_at=run_at, max_attempts=attempts)
        self.model.rows[job_id] = Row(priority, place, due, attempts)
        return job_id

    @rule(job_id=jobs)
    def cancel(self, job_id: UUID) -> None:
        """Cancelled at once while it waits, asked for while it runs, a conflict afterwards."""
        row = self.model.rows[job_id]
        if row.waiting:
            row.status = Status.CANCELLED
        elif row.status == Status.RUNNING:
            row.cancel = True
        else:
            with pytest.raises(Conflict):
                self.bench.store.cancel_job(job_id)
            return
        self.bench.store.cancel_job(job_id)

    @rule(job_id=jobs)
    def replay(self, job_id: UUID) -> None:
        """A new life for a dead job; for one that waits for its time, that time is now."""
        row = self.model.rows[job_id]
        dead = row.status in (Status.FAILED, Status.CANCELLED)
        if not (dead or (row.status == Status.QUEUED and not row.due)):
            with pytest.raises(Conflict):
                self.bench.store.retry_job(job_id)
            return
        self.bench.store.retry_job(job_id)
        if dead:
            row.attempts = row.interruptions = 0
        row.status, row.due, row.place, row.token = Status.QUEUED, True, self._now(), None

    @rule(paused=mostly.map(lambda active: not active))
    def pause(self, paused: bool) -> None:
        """A paused queue gives nothing away."""
        (self.bench.store.pause if paused else self.bench.store.resume)(QUEUE)
        self.model.paused = paused

    @rule(leased=mostly)
    def lease(self, leased: bool) -> None:
        """The lease with less than five ticks to spare, or fresh."""
        self.bench.set_tick(0 if leased else 26)
        self.model.leased = leased

    # the migrator, and the losses of Redis

    @rule(band=bands, limit=few, pushed=st.booleans())
    def migrate(self, band: str, limit: int, pushed: bool) -> None:
        """Marks the first due rows, and pushes their hints unless it dies in between."""
        expected = self.model.best(limit, lambda row: row.status == Status.QUEUED, band)
        marked = self.bench.store.mark(self.bench.term, [Room(QUEUE, *BAND_RANGES[band], limit)], full=False)
        assert [each.id for each in marked] == expected
        for job_id in expected:
            self.model.rows[job_id].status = Status.MIGRATED_TO_REDIS
        if pushed and expected:
            self.broker.push(self.epoch, [(self.broker.queue_key(QUEUE, band), [str(i) for i in expected])])
            self.model.lists[band][:0] = reversed(expected)

    @rule(band=bands)
    def reoffer(self, band: str) -> None:
        """Exactly the missing hints of marked rows come back, in order, at the end that pops."""
        ids = self.bench.store.marked(QUEUE, *BAND_RANGES[band])
        paused, self.model.paused = self.model.paused, False
        assert ids == self.model.best(len(ids), lambda row: row.status == Status.MIGRATED_TO_REDIS, band)
        self.model.paused = paused
        missing = [job_id for job_id in ids if job_id not in self.model.lists[band]]
        assert self.broker.reoffer(self.epoch, self.broker.queue_key(QUEUE, band), ids) == len(missing)
        self.model.lists[band].extend(reversed(missing))

    @rule()
    def flush(self) -> None:
        """Redis forgets everything: a push for its old life is refused, a new epoch begins."""
        self.client.flushall()
        with pytest.raises(EpochMismatch):
            self.broker.push(self.epoch, [(self.broker.queue_key(QUEUE, "normal"), [str(uuid4())])])
        self.epoch = self.bench.store.new_redis_epoch(self.bench.term)
        self.broker.set_epoch(self.epoch)
        self.model.lists = {band: [] for band in BAND_RANGES}

    # workers

    @precondition(lambda self: any(self.model.lists.values()))
    @rule(target=held, count=few, worker=st.sampled_from(WORKERS), died=st.booleans())
    def pop_and_claim(self, count: int, worker: str, died: bool) -> Any:
        """Hints of the best list, oldest first; claimed, unless the worker dies with them in its hand."""
        band = next(band for band in BAND_RANGES if self.model.lists[band])
        expected = self.model.lists[band][: -count - 1 : -1]
        del self.model.lists[band][-count:]
        self.broker.pop_start([self.broker.queue_key(QUEUE, band) for band in BAND_RANGES], count, 1.0)
        hints = self.broker.pop_finish()
        assert [hint.id for hint in hints] == expected
        return multiple() if died else multiple(*self._claim(expected, worker))

    @rule(target=held, ids=st.lists(jobs, max_size=4), worker=st.sampled_from(WORKERS))
    def claim_by_any_hint(self, ids: list[UUID], worker: str) -> Any:
        """Stale, doubled and forged hints win nothing that does not wait."""
        return multiple(*self._claim([*ids, uuid4()], worker))

    @rule(target=held, limit=few, worker=st.sampled_from(WORKERS))
    def steal(self, limit: int, worker: str) -> Any:
        """Without a hint: the best waiting rows, marked or not."""
        token = uuid4()
        expected = self.model.best(limit, lambda row: row.waiting) if self.model.leased else []
        claimed = self.bench.steal(limit, worker, token=token)
        assert [each.id for each in claimed] == expected == self.model.claim(expected, token, worker)
        return multiple(*claimed)

    @rule(job=held, action=st.sampled_from(sorted(Action)), close=st.booleans())
    def settle(self, job: Claimed, action: Action, close: bool) -> None:
        """Ends an attempt once; an owner that was robbed, or repeats itself, meets no row."""
        worker, ids = self.model.claims.get(job.token, ("w1", []))
        expected = self.model.end(job.id, job.token, action, self._now())
        over = not any(self._runs(job_id, job.token) for job_id in ids)
        statuses = self.bench.store.settle(
            [outcome(job, action, worker)], [job.token] if over and close else []
        )
        assert statuses == ({} if expected is None else {job.id: expected})
        if over and close:
            self.model.claims.pop(job.token, None)

    @rule(job=consumes(held))
    def forget(self, job: Claimed) -> None:
        """A worker that never settles."""

    # maintenance

    @rule(worker=st.sampled_from(WORKERS), fate=st.sampled_from(sorted(Fate)))
    def rescue(self, worker: str, fate: Fate) -> None:
        """Everything that the dead worker held, and nothing else."""
        expected = {}
        for token in [token for token, (owner, _) in self.model.claims.items() if owner == worker]:
            for job_id in self.model.claims.pop(token)[1]:
                status = self.model.end(job_id, token, ACTION_OF[fate], self.model.rows[job_id].place)
                if status is not None:
                    self.model.rows[job_id].token = None
                    expected[job_id] = status
        rescued = self.bench.store.rescue(worker, fates={}, default=fate, cause="test", alone=False)
        assert {each.job_id: each.status for each in rescued} == expected

    # what holds after every step

    @invariant()
    def stores_equal_the_model(self) -> None:
        """Rows, lists and claims are what the model says."""
        if not hasattr(self, "model"):
            return
        rows = self.bench.connection.execute(
            "select id, status, attempt_count, interruptions, claim_token, cancel_requested from pmqd.jobs"
        ).fetchall()
        assert {row["id"]: _seen(row) for row in rows} == {
            job_id: (row.status, row.attempts, row.interruptions, row.token, row.cancel)
            for job_id, row in self.model.rows.items()
        }
        for band, ids in self.model.lists.items():
            members = self.client.lrange(self.broker.queue_key(QUEUE, band), 0, -1)
            assert [member.decode() for member in members] == [str(job_id) for job_id in ids]
        claims = self.bench.connection.execute("select token, ids from pmqd.claims").fetchall()
        assert {row["token"]: set(row["ids"]) for row in claims} == {
            token: set(ids) for token, (_, ids) in self.model.claims.items()
        }

    @invariant()
    def promises_hold(self) -> None:
        """Attempts and interruptions stay bounded, and every running job has its claim."""
        if not hasattr(self, "model"):
            return
        for job_id, row in self.model.rows.items():
            assert 0 <= row.attempts <= row.max_attempts
            assert row.interruptions <= 5
            if row.status == Status.RUNNING:
                assert row.token is not None
                assert job_id in self.model.claims[row.token][1]
            assert band_of(row.priority) in self.model.lists

    def _claim(self, ids: list[UUID], worker: str) -> list[Claimed]:
        token = uuid4()
        claimed = self.bench.claim(ids, token, worker)
        assert [each.id for each in claimed] == self.model.claim(ids, token, worker)
        return claimed

    def _runs(self, job_id: UUID, token: UUID) -> bool:
        row = self.model.rows[job_id]
        return row.status == Status.RUNNING and row.token == token

    def _place(self) -> int:
        self.places += 1
        return self.places

    def _now(self) -> int:
        return 1_000_000 + self._place()  # after everything that was enqueued as of yesterday


def _seen(row: dict[str, Any]) -> tuple[object, ...]:
    return (
        row["status"],
        row["attempt_count"],
        row["interruptions"],
        row["claim_token"],
        row["cancel_requested"],
    )


@contextmanager
def machine(dsn: str, url: str) -> Iterator[type[Protocol]]:
    """The machine bound to two servers."""
    broker = Broker(RedisSettings(url=url), "test")
    with open_bench(dsn) as opened, redis.Redis.from_url(url) as connected:

        class Bound(Protocol):
            bench = opened
            client = connected

        Bound.broker = broker
        try:
            yield Bound
        finally:
            broker.close()


def test_any_order_of_steps_leaves_the_stores_as_the_model_says(database: str, own_redis: Any) -> None:
    """Store and broker against the model: 100 random histories of up to 40 steps; a failure is shrunk to the shortest."""
    with machine(database, own_redis.url) as bound:
        run_state_machine_as_test(
            bound,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            ),
        )
