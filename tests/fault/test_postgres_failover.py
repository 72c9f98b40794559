"""A standby of PostgreSQL takes over: what is kept, what can be lost, and that nobody runs a job beside its owner."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd.client import App
from pmqd.config import PostgresSettings, Settings
from pmqd.errors import PmqdError, StoreUnavailable
from pmqd.job import Action
from pmqd.store import Store
from pmqd.store_session import SeenLife
from tests.fix_daemon import MakeDaemon
from tests.fix_postgres_ha import MakePair, Pair
from tests.fix_servers import wait_until
from tests.store_tools import WORKER, Bench, best, open_bench, outcome

LEASE = 30
log = logging.getLogger(__name__)


@contextmanager
def benches(pair: Pair) -> Iterator[tuple[Bench, Store]]:
    """A bench on the primary, and a store that knows both servers, as a daemon does."""
    store = Store(PostgresSettings(dsn=pair.dsn), "test")
    with open_bench(pair.primary.dsn("pmqd")) as bench:
        store.beat(bench.instance_id, holding=True, stalled_tick=None)
        try:
            yield bench, store
        finally:
            store.close()


def beat(store: Store, bench: Bench) -> int:
    """One tick by this instance; the ticks until claims are allowed."""
    found = store.beat(bench.instance_id, holding=True, stalled_tick=None)
    assert not found.lost
    return found.claims_in


def claim(store: Store, bench: Bench, ids: list[UUID]) -> list[UUID]:
    """What a claim wins."""
    won = store.claim(ids, token=uuid4(), worker_id=WORKER, instance_id=bench.instance_id)
    return [job.id for job in won]


def reconnect(store: Store) -> None:
    """The old connection is dead; the next one is made to whoever can be written to."""
    with suppress(StoreUnavailable):
        store.redis_epoch()
    store.redis_epoch()


def test_no_claims_for_one_lease(pair: MakePair) -> None:
    """After a promotion neither claim nor steal wins anything until a beat has seen it and thirty more ticks were made."""
    both = pair("asynchronous")
    with benches(both) as (bench, store):
        ids = bench.insert(3)
        assert claim(store, bench, ids[:1]) == ids[:1]
        wait_for_replay(both)
        both.fail_over()
        reconnect(store)
        assert store.meet()[1] == 2
        assert (
            claim(store, bench, ids) == []
        )  # before anybody's beat: the ticker still knows the old timeline
        for left in range(LEASE - 1, 0, -1):
            assert beat(store, bench) == left
            assert claim(store, bench, ids) == []
            assert steal(store, bench) == []
        assert beat(store, bench) == 0
        assert sorted(claim(store, bench, ids)) == sorted(ids[1:])


def steal(store: Store, bench: Bench) -> list[UUID]:
    """What a steal wins."""
    stolen = store.claim(best(1), token=uuid4(), worker_id=WORKER, instance_id=bench.instance_id)
    return [job.id for job in stolen]


def wait_for_replay(both: Pair) -> None:
    """Wait until the standby has all that the primary has committed."""
    with psycopg.connect(both.primary.dsn(), autocommit=True) as connection:
        wait_until(
            lambda: (
                connection.execute(
                    "select bool_and(replay_lsn >= pg_current_wal_lsn()) from pg_stat_replication"
                ).fetchone()
                == (True,)
            ),
            20,
            "the standby has everything",
        )


def test_a_synchronous_standby_needs_no_pause(pair: MakePair) -> None:
    """postgres.standby = "synchronous": no commit was lost, so the first beat allows claims again."""
    both = pair("synchronous")
    with benches(both) as (bench, _):
        ids = bench.insert(1)
        both.fail_over()
        store = Store(PostgresSettings(dsn=both.dsn, standby="synchronous"), "test")
        assert claim(store, bench, ids) == []
        assert beat(store, bench) == 0
        assert claim(store, bench, ids) == ids
        store.close()


def test_the_timeline_is_right_at_once(pair: MakePair) -> None:
    """pmqd.timeline() names the new timeline right after a promotion; pg_control_checkpoint() may name either."""
    both = pair("asynchronous")
    both.fail_over()
    with psycopg.connect(both.standby.dsn("pmqd"), autocommit=True) as connection:
        control = connection.execute(
            "select timeline_id, pmqd.timeline() from pg_control_checkpoint()"
        ).fetchone()
        assert control is not None
        assert control[0] in (1, 2)
        assert control[1] == 2


def test_what_runs_is_taken_again(pair: MakePair) -> None:
    """A claim that the standby never got: its worker takes the jobs again under the same token, and its settle counts."""
    both = pair("asynchronous")
    with benches(both) as (bench, store):
        ids = bench.insert(2)
        wait_for_replay(both)
        both.hold_replay()
        jobs = bench.claim(ids)
        both.fail_over()
        reconnect(store)
        token = jobs[0].token
        assert (
            store.settle([outcome(jobs[0], Action.COMPLETE)], []) == {}
        )  # the new primary knows of no claim
        taken = store.take_again(
            token,
            {job.id: job.attempt_count for job in jobs},
            worker_id=WORKER,
            instance_id=bench.instance_id,
        )
        assert sorted(taken) == sorted(ids)
        assert [job.id for job in store.claimed(token)] == sorted(ids)
        assert store.settle([outcome(job, Action.COMPLETE) for job in jobs], [token]) == dict.fromkeys(
            ids, "completed"
        )


def test_what_got_on_is_not_taken_again(pair: MakePair) -> None:
    """A row that is done, or another's, or further than that attempt, is no business of a claim that was lost."""
    both = pair("asynchronous")
    with benches(both) as (bench, store):
        done, others, later = bench.running(), bench.running(), bench.running(max_attempts=5)
        bench.store.settle([outcome(done, Action.COMPLETE)], [done.token])
        bench.store.settle([outcome(later, Action.RETRY)], [later.token])
        for job in (done, others, later):
            assert (
                store.take_again(uuid4(), {job.id: 1}, worker_id=WORKER, instance_id=bench.instance_id) == []
            )


def test_a_settle_that_was_lost_is_found(pair: MakePair) -> None:
    """The standby has the claim and not the settle: the job would run for ever. Its worker gives it back, uncharged."""
    both = pair("asynchronous")
    with benches(both) as (bench, store):
        first, second = bench.claim(bench.insert(2))
        wait_for_replay(both)
        both.hold_replay()
        bench.store.settle([outcome(first, Action.COMPLETE)], [])
        both.fail_over()
        reconnect(store)
        held = {second.token: {second.id.int: 1}}
        assert store.settled_ids([outcome(first, Action.COMPLETE)]) == {}
        assert store.give_back_forgotten(WORKER, held, [second.token], "a failover") == []
        [found] = store.give_back_forgotten(WORKER, held, [], "a failover")
        assert (found.job_id, found.status, found.attempt_count) == (first.id, "queued", 0)
        assert [job.id for job in store.claimed(second.token)] == [second.id]
        assert store.give_back_forgotten(WORKER, held, [], "a failover") == []


def test_the_old_primary_is_refused(pair: MakePair) -> None:
    """It comes back as if nothing had happened, and stands first in the string: nobody who saw the new one writes to it."""
    both = pair("asynchronous")
    with benches(both) as (bench, store):
        both.fail_over()
        reconnect(store)
        both.primary.start()
        newest = SeenLife(*store.meet())
        store.close()
        with psycopg.connect(both.primary.dsn("pmqd"), autocommit=True) as old:
            before = old.execute("select tick from pmqd.ticker").fetchone()
            other = Store(PostgresSettings(dsn=both.dsn), "other", newest=newest)
            with pytest.raises(StoreUnavailable, match="it is the old primary"):
                other.redis_epoch()
            assert other.meet()[1] == 2  # the next try begins with the other host
            beat(other, bench)
            assert old.execute("select tick from pmqd.ticker").fetchone() == before
            other.close()


# --- a whole daemon, under load


@dataclass
class Load:
    """Producers that go on, and repeat an enqueue with its id until they are told that it is kept."""

    app: App
    acknowledged: list[UUID] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    """The threads that have met a server which refuses them, or none."""

    def start(self) -> None:
        """Two threads."""
        self.threads = [threading.Thread(target=self._produce) for _ in range(2)]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """No new ones; what is under way is repeated until it is acknowledged."""
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        self.app.close()

    def _produce(self) -> None:
        while not self.stop.is_set():
            self.enqueue("nap", {"seconds": 0.005})
            time.sleep(0.002)

    def enqueue(self, kind: str, payload: dict[str, Any]) -> UUID:
        """One job, acknowledged."""
        job_id = uuid4()
        deadline = time.monotonic() + 60
        while True:
            try:
                self.app.enqueue("trial", payload, kind=kind, id=job_id)
            except PmqdError:
                self.refused.add(threading.get_ident())
                assert time.monotonic() < deadline, "no enqueue was acknowledged for a minute"
                time.sleep(0.05)
            else:
                self.acknowledged.append(job_id)
                return job_id


@contextmanager
def load(dsn: str) -> Iterator[Load]:
    """Producers over both servers, ended with the test."""
    producing = Load(App(Settings(postgres=PostgresSettings(dsn=dsn))))
    try:
        yield producing
    finally:
        producing.end()


def intervals(history: Path) -> dict[UUID, list[tuple[int, int]]]:
    """When handlers ran, from what they wrote themselves: job -> (start, end) in nanoseconds."""
    open_: dict[tuple[str, str], int] = {}
    found: dict[UUID, list[tuple[int, int]]] = {}
    for line in history.read_text().splitlines():
        mark, job_id, _, pid, at, _ = line.split()
        if mark == "S":
            open_[job_id, pid] = int(at)
        else:
            found.setdefault(UUID(job_id), []).append((open_.pop((job_id, pid)), int(at)))
    assert not open_, "a handler never ended"
    return found


def overlaps(runs: dict[UUID, list[tuple[int, int]]]) -> list[UUID]:
    """Jobs that were run twice at once."""
    return [
        job_id
        for job_id, spans in runs.items()
        if any(
            later[0] < earlier[1] for earlier, later in zip(sorted(spans), sorted(spans)[1:], strict=False)
        )
    ]


def statuses(dsn: str) -> dict[UUID, str]:
    """Every job's status."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return dict(connection.execute("select id, status from pmqd.jobs").fetchall())


def successes(dsn: str) -> Counter[UUID]:
    """How often each job's success was written down."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        rows = connection.execute("select job_id from pmqd.job_logs where status = 'success'").fetchall()
    return Counter(row[0] for row in rows)


def settings(both: Pair, redis_url: str, **more: Any) -> dict[str, Any]:
    """A daemon with two workers that knows both servers."""
    pool = {"app": "tests.applications.trial:app", "processes": 2, "concurrency": 3}
    return {
        "postgres": {"dsn": both.dsn, **more},
        "redis": {"url": redis_url},
        "workers": [pool],
        "drain_seconds": 30.0,
    }


def drained(dsn: str, wanted: set[UUID], seconds: float) -> None:
    """Wait until these jobs, as far as they exist, are completed."""

    def done() -> bool:
        found = statuses(dsn)
        return all(found.get(job_id, "completed") == "completed" for job_id in wanted) and set(
            found.values()
        ) <= {"completed"}

    wait_until(done, seconds, "all jobs are done")


@pytest.mark.timeout(240)
def test_synchronous_under_load(pair: MakePair, redis_url: str, daemon: MakeDaemon, tmp_path: Path) -> None:
    """Kill -9 of the primary under load: every acknowledged job is on the new one and done, each success written once."""
    both = pair("synchronous")
    history = tmp_path / "history"
    running = daemon(
        settings(both, redis_url, standby="synchronous"), environ={"TRIAL_HISTORY": str(history)}
    )
    with load(both.dsn) as producing:
        producing.start()
        wait_until(lambda: len(producing.acknowledged) > 300, 60, "a load")
        both.fail_over()
        before = len(producing.acknowledged)
        wait_until(lambda: len(producing.acknowledged) > before + 300, 60, "producers go on")
    dsn = both.standby.dsn("pmqd")
    acknowledged = set(producing.acknowledged)
    drained(dsn, acknowledged, 60)
    found = statuses(dsn)
    assert acknowledged - found.keys() == set()
    assert max(successes(dsn).values()) == 1
    assert running.stop() == 0
    runs = intervals(history)
    assert overlaps(runs) == []
    assert found.keys() <= runs.keys()


@pytest.mark.timeout(300)
def test_asynchronous_under_load(
    pair: MakePair,
    redis_url: str,
    daemon: MakeDaemon,
    tmp_path: Path,
) -> None:
    """The last commits are lost with the primary: which, is known exactly, and all else is kept, done, and never run twice at once."""
    both = pair("asynchronous")
    history = tmp_path / "history"
    running = daemon(settings(both, redis_url), environ={"TRIAL_HISTORY": str(history)})
    with load(both.dsn) as producing:
        kept_long = producing.enqueue("nap", {"seconds": LEASE + 15})
        producing.start()
        wait_until(lambda: len(producing.acknowledged) > 300, 60, "a load")
        wait_for_replay(both)
        both.hold_replay()
        at_risk = len(producing.acknowledged)
        long = producing.enqueue("nap", {"seconds": 1.0})
        wait_until(lambda: len(producing.acknowledged) > at_risk + 200, 60, "commits that will be lost")
        producing.refused.clear()
        both.lose_primary()
        wait_until(
            lambda: len(producing.refused) == 2,
            20,
            "both producers have noticed, and written down their last",
        )
        by_then = set(producing.acknowledged)
        both.standby.promote()
        before = len(producing.acknowledged)
        wait_until(lambda: len(producing.acknowledged) > before + 100, 60, "producers go on")
    dsn = both.standby.dsn("pmqd")
    acknowledged = set(producing.acknowledged)
    lost = acknowledged - statuses(dsn).keys()
    assert long in lost
    assert lost <= by_then
    drained(dsn, acknowledged - lost, 120)
    found = statuses(dsn)
    assert acknowledged - found.keys() == lost
    assert max(successes(dsn).values()) == 1
    assert running.stop() == 0
    runs = intervals(history)
    assert overlaps(runs) == []
    assert found.keys() <= runs.keys(), "completed without having been run"
    assert len(runs[kept_long]) == 1
    again = {job_id for job_id, spans in runs.items() if len(spans) > 1}
    log.info("%d acknowledged, %d lost, %d ran again, none at once", len(acknowledged), len(lost), len(again))
    assert not [record for record in running.records if "unexpected error" in record["message"]]
