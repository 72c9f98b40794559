"""A worker process whose stores go away, whose wires break in the worst moment, and whose handlers misbehave."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pmqd import App, Job
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.recovery import load_outcomes, saved_settles
from pmqd.retry import JobTimeout
from pmqd.store import Fate, Store
from tests.fix_proxy import MakeProxy, Proxy
from tests.fix_servers import WaitUntil
from tests.worker_family import Bank, Family, family, open_bank

SETTLE = b"with settled as"
CLAIM = b"with won as"
STEAL = b".steal("


def make_app() -> App:
    """Handlers for these tests; each start is one line in a file, outside both stores."""
    app = App()

    @app.task(queue="q")
    def note(job: Job, file: str, seconds: float = 0.0) -> int:
        with Path(file).open("a") as out:
            out.write(f"{job.id}\n")
        time.sleep(seconds)
        return job.attempt_count

    @app.task(queue="q")
    def swallows(seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                time.sleep(max(0.0, end - time.monotonic()))
            except JobTimeout:
                pass
        return "swallowed"

    @app.task(queue="q")
    def dies() -> None:
        os._exit(3)

    @app.task(queue="q")
    def pays(job: Job, file: str) -> str:
        with Path(file).open("a") as out:
            out.write(f"{job.id}\n")
        with job.settling(result="paid") as connection:
            connection.execute("insert into paid values (%s)", (job.id,))
        return "not stored"

    return app


class Scene(Family):
    """A family with its own look at the stores and the file that the handlers write to."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.file = self.folder / "started"

    def started(self) -> list[str]:
        """Ids of the jobs that were started, in order."""
        return self.file.read_text().split() if self.file.exists() else []

    def payload(self, **more: Any) -> dict[str, Any]:
        """Arguments for `note` and `pays`."""
        return {"file": str(self.file), **more}


@contextmanager
def scene(*args: Any, **settings: Any) -> Iterator[Scene]:
    """A scene whose workers are gone afterwards."""
    made = Scene(*args, **settings)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def bank(database: str, redis_url: str) -> Iterator[Bank]:
    """The test's look at the session's stores."""
    with open_bank(database, redis_url) as made:
        yield made


@pytest.fixture
def wire(postgres: PostgresServer, proxy: MakeProxy) -> Proxy:
    """A wire to the session's PostgreSQL."""
    return proxy(postgres)


@pytest.fixture
def broken(database: str, redis_url: str, short_folder: Path, wire: Proxy, bank: Bank) -> Iterator[Scene]:
    """One worker that speaks to PostgreSQL through `wire`."""
    with scene(wire.dsn(database), redis_url, make_app(), short_folder) as made:
        made.start()
        yield made


def test_redis_killed_and_started_again(
    database: str, own_redis: RedisServer, short_folder: Path, wait_until: WaitUntil
) -> None:
    """Without Redis the worker claims from PostgreSQL within 2 s; 3 s after its return hints are used again."""
    with (
        open_bank(database, own_redis.url) as bank,
        family(database, own_redis.url, make_app(), short_folder) as workers,
    ):
        slot = workers.start()
        file = str(short_folder / "started")
        bank.wait(bank.enqueue("note", {"file": file}))
        own_redis.kill()
        wait_until(lambda: slot.direct, 2.0, "direct mode")
        jobs = [bank.enqueue("note", {"file": file}, hint=False) for _ in range(20)]
        started = time.monotonic()
        for job_id in jobs:
            bank.wait(job_id)
        assert time.monotonic() - started < 2
        own_redis.start()
        wait_until(lambda: not slot.direct, 3.0, "Redis in use again")
        workers.arena.set_pulse([])
        started = time.monotonic()
        bank.wait(bank.enqueue("note", {"file": file}))
        assert time.monotonic() - started < 0.5
        assert [len(workers.records(words)) for words in ("Redis is away", "Redis is back")] == [1, 1]
        assert workers.stop(slot) == 0


def test_redis_behind_a_pulled_cable(
    database: str, redis_server: RedisServer, redis_url: str, bank: Bank, proxy: MakeProxy, short_folder: Path,
    wait_until: WaitUntil,
) -> None:  # fmt: skip
    """A Redis that neither answers nor refuses is given up within 2 s, and holds up nothing while it is probed."""
    wire = proxy(redis_server)
    with family(database, wire.url, make_app(), short_folder) as workers:
        slot = workers.start()
        file = str(short_folder / "started")
        bank.wait(bank.enqueue("note", {"file": file}))
        wire.hold()
        wait_until(lambda: slot.direct, 2.5, "direct mode")
        for _ in range(12):
            started = time.monotonic()
            bank.wait(bank.enqueue("note", {"file": file}, hint=False))
            assert time.monotonic() - started < 0.8
        wire.heal()
        wait_until(lambda: not slot.direct, 4.0, "Redis in use again")
        assert workers.stop(slot) == 0


def test_postgres_crashes_under_a_running_job(
    own_postgres: PostgresServer, redis_url: str, short_folder: Path, wait_until: WaitUntil
) -> None:
    """The job finishes, its settle waits, nothing new starts; when PostgreSQL is back it is settled, once."""
    dsn = own_postgres.dsn("pmqd")
    with open_bank(dsn, redis_url) as bank, scene(dsn, redis_url, make_app(), short_folder) as workers:
        slot = workers.start()
        first = bank.enqueue("note", workers.payload(seconds=1.0))
        bank.wait(first, "running")
        second = bank.enqueue("note", workers.payload())
        own_postgres.kill()
        wait_until(lambda: slot.jobs_done == 1, 15, "the end of the job")
        wait_until(lambda: workers.records("PostgreSQL is away"), 15, "the news")
        time.sleep(0.5)  # nothing new may start in this time: there is no condition to wait for
        assert workers.started() == [str(first)]
        assert [note.outcome.job_id for note in slot.noted()] == [first]
        own_postgres.start()
        bank.reconnect()
        bank.wait(first, timeout=5)
        bank.wait(second, timeout=5)
        assert (bank.logs(first), bank.logs(second)) == (["success"], ["success"])
        assert workers.started() == [str(first), str(second)]
        assert workers.stop(slot) == 0
        assert bank.claims() == 0
        assert len(workers.records("PostgreSQL is back")) == 1


def test_an_idle_worker_waits_for_postgres_without_flapping(
    own_postgres: PostgresServer, redis_url: str, short_folder: Path, wait_until: WaitUntil
) -> None:
    """PostgreSQL away: hints are given back and left alone; one log line each way; work goes on within 3 s of its return."""
    dsn = own_postgres.dsn("pmqd")
    with open_bank(dsn, redis_url) as bank, scene(dsn, redis_url, make_app(), short_folder) as workers:
        slot = workers.start()
        bank.wait(bank.enqueue("note", workers.payload()))
        jobs = [bank.enqueue("note", workers.payload(), hint=False) for _ in range(3)]
        own_postgres.kill()
        for job_id in jobs:
            bank.hint(job_id)
        wait_until(lambda: workers.records("PostgreSQL is away"), 15, "the news")
        wait_until(lambda: bank.redis.llen("queue:q") == 3, 15, "the hints back in Redis")
        time.sleep(1.5)  # several tries: there is no condition to wait for
        assert bank.redis.llen("queue:q") == 3
        assert workers.records("PostgreSQL is back") == []
        own_postgres.start()
        bank.reconnect()
        started = time.monotonic()
        for job_id in jobs:
            assert bank.wait(job_id)["attempt_count"] == 1
        assert time.monotonic() - started < 3
        assert [len(workers.records(words)) for words in ("PostgreSQL is away", "PostgreSQL is back")] == [
            1,
            1,
        ]
        assert workers.stop(slot) == 0
        assert saved_settles(workers.folder) == []


def test_settles_are_kept_in_a_file_when_the_worker_must_end_without_postgres(
    own_postgres: PostgresServer, redis_url: str, short_folder: Path, wait_until: WaitUntil
) -> None:
    """Drained while PostgreSQL is away: exit 0, and the file holds what makes the job completed later."""
    dsn = own_postgres.dsn("pmqd")
    with open_bank(dsn, redis_url) as bank, scene(dsn, redis_url, make_app(), short_folder) as workers:
        slot = workers.start()
        job_id = bank.enqueue("note", workers.payload(seconds=0.7))
        bank.wait(job_id, "running")
        own_postgres.kill()
        assert workers.stop(slot) == 0
        (path,) = saved_settles(workers.folder)
        outcomes, tokens = load_outcomes(path)
        assert [outcome.job_id for outcome in outcomes] == [job_id]
        own_postgres.start()
        store = Store(workers.settings.postgres, "test")
        assert store.settle(outcomes, tokens) == {job_id: "completed"}
        store.close()
        bank.reconnect()
        assert (bank.job(job_id)["result"], bank.logs(job_id), bank.claims()) == (1, ["success"], 0)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_settle_whose_answer_is_lost_counts_once(
    broken: Scene, bank: Bank, wire: Proxy, moment: Any
) -> None:
    """Cut before or after PostgreSQL got the settle: read back or sent again, completed once, never called stale."""
    slot = broken.children[0][0]
    job_id = bank.enqueue("note", broken.payload(seconds=0.3))
    bank.wait(job_id, "running")
    wire.break_on(SETTLE, moment)
    bank.wait(job_id)
    bank.wait(bank.enqueue("note", broken.payload()))
    assert wire.sprung == 1
    assert bank.logs(job_id) == ["success"]
    assert broken.started().count(str(job_id)) == 1
    assert broken.stop(slot) == 0
    assert not broken.records("was taken from this worker")
    assert (slot.noted(), slot.tokens(), bank.claims()) == ([], [], 0)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("words", [CLAIM, STEAL])
def test_a_claim_whose_answer_is_lost_runs_once(
    broken: Scene, bank: Bank, wire: Proxy, words: bytes, moment: Any
) -> None:
    """Cut before or after PostgreSQL got the claim (by hint or by steal): the job runs once and costs one attempt."""
    slot = broken.children[0][0]
    wire.break_on(words, moment)
    job_id = bank.enqueue("note", broken.payload(), hint=words is CLAIM)
    row = bank.wait(job_id, timeout=8)
    assert wire.sprung == 1
    assert (row["result"], row["attempt_count"], bank.logs(job_id)) == (1, 1, ["success"])
    assert broken.started() == [str(job_id)]
    assert broken.stop(slot) == 0
    assert bank.claims() == 0


@pytest.mark.parametrize("moment", ["before", "after"])
def test_settle_and_claim_in_one_commit_are_both_found_again(
    broken: Scene, bank: Bank, wire: Proxy, moment: Any
) -> None:
    """The settle of one job and the claim of the next share a commit that is lost: each counts once."""
    slot = broken.children[0][0]
    first = bank.enqueue("note", broken.payload(seconds=0.3))
    bank.wait(first, "running")
    second = bank.enqueue("note", broken.payload())
    wire.break_on(SETTLE, moment)
    for job_id in (first, second):
        row = bank.wait(job_id, timeout=8)
        assert (row["result"], row["attempt_count"], bank.logs(job_id)) == (1, 1, ["success"])
    assert wire.sprung == 1
    assert broken.started() == [str(first), str(second)]
    assert broken.stop(slot) == 0
    assert bank.claims() == 0


@pytest.mark.parametrize("moment", ["before", "after"])
def test_settling_whose_commit_is_lost_counts_once(
    broken: Scene, bank: Bank, wire: Proxy, moment: Any
) -> None:
    """The handler's transaction is lost in its commit: read back; the money is paid once, whatever happened."""
    bank.connection.execute("create table paid (id uuid)")
    wire.break_on(b"COMMIT", moment)
    job_id = bank.enqueue("pays", broken.payload())
    row = bank.wait(job_id)
    assert wire.sprung == 1
    assert row["result"] == "paid"
    assert bank.connection.execute("select count(*) from paid").fetchone() == {"count": 1}
    assert bank.logs(job_id) == (["success"] if moment == "after" else ["released", "success"])


def test_postgres_behind_a_pulled_cable(broken: Scene, bank: Bank, wire: Proxy) -> None:
    """A PostgreSQL that does not answer at all: given up after the statement's time, and everything ends well."""
    slot = broken.children[0][0]
    job_id = bank.enqueue("note", broken.payload(seconds=0.3))
    bank.wait(job_id, "running")
    wire.hold()
    time.sleep(0.5)  # the settle is on the wire
    wire.cut()
    wire.heal()
    bank.wait(job_id)
    assert bank.logs(job_id) == ["success"]
    assert broken.stop(slot) == 0


def test_a_worker_paused_and_robbed_drops_its_result(
    broken: Scene, bank: Bank, wait_until: WaitUntil
) -> None:
    """Rescued while it was stopped: the settle is refused and dropped, the new owner's result stands."""
    slot = broken.children[0][0]
    job_id = bank.enqueue("note", broken.payload(seconds=0.5))
    bank.wait(job_id, "running")
    os.kill(slot.pid, signal.SIGSTOP)
    store = Store(broken.settings.postgres, "test")
    store.rescue(slot.worker_id, fates={job_id: Fate.CHARGED}, default=Fate.UNSTARTED, cause="test")
    store.close()
    other = broken.start()
    bank.hint(job_id)
    row = bank.wait(job_id)
    os.kill(slot.pid, signal.SIGCONT)
    wait_until(lambda: broken.records("was taken from this worker"), 15, "the refusal")
    assert bank.job(job_id)["worker_id"] == row["worker_id"] == other.worker_id
    assert bank.logs(job_id) == ["crashed", "success"]
    assert [broken.stop(each) for each in (slot, other)] == [0, 0]


def test_a_dead_worker_leaves_what_its_rescue_needs(broken: Scene, bank: Bank, wait_until: WaitUntil) -> None:
    """`os._exit` in a handler: the arena says which job ran, and a rescue by the worker's name gives it back."""
    slot = broken.children[0][0]
    job_id = bank.enqueue("dies")
    assert broken.wait_end(slot) == 3
    assert [entry.job_id for entry in slot.running()] == [job_id]
    assert len(slot.tokens()) == 1
    store = Store(broken.settings.postgres, "test")
    (rescued,) = store.rescue(
        slot.worker_id, fates={job_id: Fate.CHARGED}, default=Fate.UNSTARTED, cause="exit 3"
    )
    store.close()
    assert (rescued.job_id, rescued.attempt_count) == (job_id, 1)


def test_a_swallowed_timeout_leaves_an_overdue_entry(
    database: str, redis_url: str, short_folder: Path, bank: Bank, wait_until: WaitUntil
) -> None:
    """A handler that swallows its soft timeout stays in the arena past its hard deadline, for the master to kill."""
    settings = {"queues": {"q": {"timeout_seconds": 0.2}}, "timeout_grace_seconds": 0.3}
    with family(database, redis_url, make_app(), short_folder, **settings) as workers:
        slot = workers.start()
        job_id = bank.enqueue("swallows", {"seconds": 1.5})
        wait_until(
            lambda: [e for e in slot.running() if e.deadline and e.deadline < time.monotonic()], 15, "overdue"
        )
        assert [entry.job_id for entry in slot.running()] == [job_id]
        assert bank.wait(job_id)["result"] == "swallowed"
        assert slot.running() == []


def test_redis_loses_all_data_under_load(
    database: str, redis_url: str, short_folder: Path, bank: Bank
) -> None:
    """FLUSHALL in the middle: every job is completed once all the same, found by steal."""
    with scene(database, redis_url, make_app(), short_folder, pool={"concurrency": 4}) as workers:
        for _ in range(2):
            workers.start()
        jobs = [bank.enqueue("note", workers.payload(seconds=0.02)) for _ in range(60)]
        bank.wait(jobs[5])
        bank.redis.flushall()
        for job_id in jobs:
            bank.wait(job_id, timeout=40, watch=workers.logged)
        assert sorted(workers.started()) == sorted(map(str, jobs))
        assert [workers.stop(slot) for slot, _ in workers.children] == [0, 0]
