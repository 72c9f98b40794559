"""A worker process on real PostgreSQL and Redis: what happens to jobs on the normal road."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pmqd import App, Discard, Job, Retry, Snooze
from tests.fix_servers import WaitUntil
from tests.worker_family import Bank, Family, family

app = App()


@app.task(queue="q")
def nothing() -> None:
    """End at once."""


@app.task(queue="q")
def whoami(job: Job) -> dict[str, Any]:
    """Tell who runs the job."""
    return {"pid": os.getpid(), "worker_id": job.worker_id, "attempt": job.attempt_count}


@app.task(queue="q")
def nap(seconds: float) -> float:
    """Sleep."""
    time.sleep(seconds)
    return seconds


@app.task(queue="q")
async def nap_async(seconds: float) -> float:
    """Sleep on the event loop."""
    await asyncio.sleep(seconds)
    return seconds


@app.task(queue="q")
def flaky(job: Job, failures: int) -> str:
    """Fail the first attempts."""
    if job.attempt_count <= failures:
        raise Retry(0.05, "not yet")
    return "done"


@app.task(queue="q")
def snoozes(job: Job, marker: str) -> str:
    """Snooze once."""
    if not Path(marker).exists():
        Path(marker).touch()
        raise Snooze(0.05)
    return "awake"


@app.task(queue="q")
def discarded() -> None:
    """Give up for good."""
    raise Discard("nobody wants this")


@app.task(queue="q")
def raises() -> None:
    """Raise a text that PostgreSQL cannot store."""
    raise ValueError("before\0after")


@app.task(queue="q")
def no_json() -> object:
    """Return what JSON cannot say."""
    return object()


@app.task(queue="q")
def deep() -> Any:
    """Return 200 lists in each other."""
    value: Any = 0
    for _ in range(200):
        value = [value]
    return value


@app.task(queue="q")
def reports(job: Job) -> None:
    """Report progress, then take time."""
    job.progress(0.5, "half")
    time.sleep(1.5)


@app.task(queue="q")
def reports_twice(job: Job) -> None:
    """Report progress, and again right before the end."""
    job.progress(0.1, "begun")
    time.sleep(0.15)
    job.progress(1.0, "done")


@app.task(queue="q")
def together(job: Job, folder: str, count: int) -> int:
    """Tell how many run at once, itself included."""
    mine = Path(folder) / f"{job.id}"
    mine.touch()
    deadline = time.monotonic() + 5
    while len(list(Path(folder).iterdir())) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    found = len(list(Path(folder).iterdir()))
    time.sleep(0.1)
    mine.unlink()
    return found


@app.task(queue="q")
def pays(job: Job, fail: bool) -> str:
    """Write a row and settle in one transaction."""
    with job.settling(result="paid") as connection:
        connection.execute("create table if not exists paid (id uuid)")
        connection.execute("insert into paid values (%s)", (job.id,))
        if fail:
            raise ValueError("no money")
    return "not stored"


@app.task(queue="q")
def pays_over_a_lost_session(job: Job) -> None:
    """The first time its own session is ended in the middle of the transaction that settles it."""
    with job.settling(result="paid") as connection:
        connection.execute("create table if not exists paid (id uuid)")
        if job.interruptions == 0:
            with psycopg.connect(connection.info.dsn, autocommit=True) as other:
                other.execute("select pg_terminate_backend(%s)", (connection.info.backend_pid,))
        connection.execute("insert into paid values (%s)", (job.id,))


@app.task(queue="q")
def pays_late(job: Job) -> None:
    """Be robbed of the job within the transaction that settles it."""
    with job.settling() as connection:
        connection.execute("create table if not exists paid (id uuid)")
        with psycopg.connect(connection.info.dsn, autocommit=True) as other:
            other.execute("update pmqd.jobs set claim_token = gen_random_uuid() where id = %s", (job.id,))


@app.handler("plain")
def plain(job: Job) -> Any:
    """Give the payload back."""
    return job.payload


def make_app() -> App:
    """The application of these handlers."""
    return app


@pytest.fixture
def bank(database: str, redis_url: str) -> Iterator[Bank]:
    """The test's look at the stores."""
    made = Bank(database, redis_url)
    yield made
    made.close()


@pytest.fixture
def workers(database: str, redis_url: str, short_folder: Path) -> Iterator[Family]:
    """A family of one pool at concurrency 1."""
    with family(database, redis_url, make_app(), short_folder) as made:
        yield made


def test_a_hint_is_popped_claimed_run_and_settled(workers: Family, bank: Bank) -> None:
    """One job by its hint: completed with its result, one line in the audit trail, its claim closed, Redis empty."""
    slot = workers.start()
    job_id = bank.enqueue("whoami")
    row = bank.wait(job_id)
    assert row["result"] == {"pid": slot.pid, "worker_id": slot.worker_id, "attempt": 1}
    assert bank.logs(job_id) == ["success"]
    assert row["started_at"] <= row["completed_at"]
    assert bank.claims() == 0
    assert bank.redis.keys("queue:*") == []
    assert workers.stop(slot) == 0
    assert (slot.jobs_done, slot.running(), slot.tokens(), slot.noted()) == (1, [], [], [])


def test_pickup_takes_milliseconds(workers: Family, bank: Bank) -> None:
    """From the hint to the settled row an idle worker needs a few round trips, not a polling interval."""
    workers.start()
    bank.wait(bank.enqueue("nothing"))
    took = []
    for _ in range(10):
        started = time.monotonic()
        bank.wait(bank.enqueue("nothing"))
        took.append(time.monotonic() - started)
    assert sorted(took)[5] < 0.1, took


def test_thousands_of_quick_jobs_are_claimed_in_batches(workers: Family, bank: Bank) -> None:
    """5,000 jobs by two workers: each completed once, with far fewer claims than jobs, nothing left behind."""
    for _ in range(2):
        workers.start()
    started = time.monotonic()
    bank.enqueue_many("nothing", 5000)
    while bank.counts() != {"completed": 5000}:
        assert time.monotonic() - started < 60, (bank.counts(), workers.logged())
        time.sleep(0.02)
    row = bank.connection.execute(
        "select count(*), count(distinct job_id) as jobs, count(*) filter (where status = 'success') as good"
        " from pmqd.job_logs"
    ).fetchone()
    assert row == {"count": 5000, "jobs": 5000, "good": 5000}
    row = bank.connection.execute("select count(distinct claim_token) as claims from pmqd.jobs").fetchone()
    assert row is not None
    assert row["claims"] < 500
    assert bank.claims() == 0
    assert [workers.stop(slot) for slot, _ in workers.children] == [0, 0]


def test_ends_of_an_attempt(workers: Family, bank: Bank, short_folder: Path) -> None:
    """Retry, snooze, discard, errors, results that cannot be stored: each as the design says, charged or not."""
    workers.start()
    jobs = {
        "flaky": bank.enqueue("flaky", {"failures": 2}),
        "snoozes": bank.enqueue("snoozes", {"marker": str(short_folder / "snoozed")}),
        "discarded": bank.enqueue("discarded"),
        "raises": bank.enqueue("raises", max_attempts=1),
        "no_json": bank.enqueue("no_json"),
        "bad_payload": bank.enqueue("nap", {"seconds": "long"}),
        "plain": bank.enqueue(None, [1, 2], queue="plain"),
        "deep": bank.enqueue("deep"),
    }
    expected = {
        # name: status, attempts charged, audit trail
        "flaky": ("completed", 3, ["retry", "retry", "success"]),
        "snoozes": ("completed", 1, ["released", "success"]),
        "discarded": ("failed", 1, ["failed"]),
        "raises": ("failed", 1, ["failed"]),
        "no_json": ("failed", 1, ["failed"]),
        "bad_payload": ("failed", 1, ["failed"]),
        "plain": ("completed", 1, ["success"]),
        "deep": ("completed", 1, ["success"]),
    }
    rows = {name: bank.wait(job_id, expected[name][0], 15) for name, job_id in jobs.items()}
    for name, (_, attempts, logs) in expected.items():
        assert (name, rows[name]["attempt_count"], bank.logs(jobs[name])) == (name, attempts, logs)
    assert rows["plain"]["result"] == [1, 2]
    assert rows["discarded"]["last_error_message"] == "Discard: nobody wants this"
    assert rows["raises"]["last_error_message"].startswith("ValueError: before\\x00after")
    assert "no JSON form" in rows["no_json"]["last_error_message"]
    assert "seconds='long'" in rows["bad_payload"]["last_error_message"]


def test_an_unknown_kind_goes_back_uncharged_with_a_reason(workers: Family, bank: Bank) -> None:
    """A kind that the application does not know is put back for 30 s, with the reason, and without an attempt."""
    workers.start()
    job_id = bank.enqueue("unheard_of")
    deadline = time.monotonic() + 5
    while not (row := bank.job(job_id))["last_error_message"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (row["status"], row["attempt_count"]) == ("queued", 0)
    assert "does not know kind 'unheard_of'" in row["last_error_message"]
    waits = bank.connection.execute("select run_at - now() as left from pmqd.jobs").fetchone()
    assert waits is not None
    assert 25 < waits["left"].total_seconds() <= 30
    assert bank.logs(job_id) == []


def test_a_timeout_is_retried_and_charged(workers: Family, bank: Bank, database: str, redis_url: str) -> None:
    """A job past its queue's timeout is interrupted: retried with the cause while attempts are left."""
    settings = workers.settings
    queues = {"q": {"timeout_seconds": 0.2, "retry_base_seconds": 0.05}}
    with family(database, redis_url, workers.app, settings.state_dir, queues=queues) as hasty:
        hasty.start()
        job_id = bank.enqueue("nap", {"seconds": 30}, max_attempts=2)
        row = bank.wait(job_id, "failed", 15)
    assert row["last_error_message"].startswith("JobTimeout: ran longer than its timeout of 0.2 s")
    assert bank.logs(job_id) == ["retry", "failed"]


def test_a_lost_hint_is_found_by_steal(workers: Family, bank: Bank) -> None:
    """A job that nobody hints at is claimed within 2.5 s all the same; a paused queue's job is not."""
    slot = workers.start()
    bank.wait(bank.enqueue("nothing"))
    started = time.monotonic()
    bank.wait(bank.enqueue("nothing", hint=False), timeout=2.5)
    assert time.monotonic() - started < 2.5
    bank.connection.execute("insert into pmqd.job_queues (name, is_active) values ('q', false)")
    paused = bank.enqueue("nothing")
    workers.arena.set_pulse([])  # nothing is ready, says the pulse
    assert workers.stop(slot) == 0
    assert bank.job(paused)["attempt_count"] == 0


def test_the_pulse_keeps_idle_workers_off_the_database(workers: Family, bank: Bank) -> None:
    """While a fresh pulse says that nothing is ready, an empty pop leads to no statement."""
    slot = workers.start()
    bank.wait(bank.enqueue("nothing"))
    workers.arena.set_pulse([])
    unseen = bank.enqueue("nothing", hint=False)
    pops = slot.progress_count
    deadline = time.monotonic() + 2.2
    while time.monotonic() < deadline:
        workers.arena.set_pulse([])
        time.sleep(0.1)
    assert slot.progress_count - pops >= 2
    assert bank.status(unseen) == "queued"
    ready = {"queue_name": "q", "ready": True, "served": True, "due_in_seconds": None}
    workers.arena.set_pulse([{**ready, "oldest_ready_seconds": 2.0, "old_marks": False}])
    bank.wait(unseen, timeout=2.5)


def test_forged_stale_and_doubled_hints_are_harmless(workers: Family, bank: Bank) -> None:
    """Hints of finished, unknown and future jobs, doubles and rubbish: nothing runs twice or too early."""
    workers.start()
    done = bank.enqueue("nothing")
    bank.wait(done)
    later = bank.enqueue("nothing", run_at="2999-01-01")
    for member in ("rubbish", "{}", str(done), str(done), "01890000-0000-7000-8000-000000000000", str(later)):
        bank.redis.lpush("queue:q", member)
    good = bank.enqueue("whoami")
    for _ in range(3):
        bank.hint(good)
    bank.wait(good)
    bank.wait(bank.enqueue("nothing"))
    assert (bank.logs(done), bank.logs(good), bank.logs(later)) == (["success"], ["success"], [])
    assert bank.status(later) == "queued"


@pytest.mark.parametrize("kind", ["nap", "nap_async"])
def test_a_short_job_settles_beside_a_long_one(
    database: str, redis_url: str, short_folder: Path, bank: Bank, kind: str
) -> None:
    """At concurrency 3 a settle never waits for a neighbour, and a free place is filled while others run."""
    with family(database, redis_url, make_app(), short_folder, pool={"concurrency": 3}) as workers:
        slot = workers.start()
        long = bank.enqueue(kind, {"seconds": 3})
        bank.wait(long, "running")
        started = time.monotonic()
        for _ in range(5):
            bank.wait(bank.enqueue(kind, {"seconds": 0.01}))
        assert time.monotonic() - started < 2
        assert bank.status(long) == "running"
        assert [entry.job_id for entry in slot.running()] == [long]
        assert bank.wait(long)["result"] == 3


def test_concurrency_runs_so_many_at_once(
    database: str, redis_url: str, short_folder: Path, bank: Bank
) -> None:
    """Four jobs of a pool with four places see each other; a fifth waits in the database."""
    (short_folder / "meet").mkdir()
    with family(database, redis_url, make_app(), short_folder, pool={"concurrency": 4}) as workers:
        workers.start()
        payload = {"folder": str(short_folder / "meet"), "count": 4}
        jobs = [bank.enqueue("together", payload) for _ in range(4)]
        assert [bank.wait(job_id)["result"] for job_id in jobs] == [4] * 4


def test_an_alone_job_meets_nobody(database: str, redis_url: str, short_folder: Path, bank: Bank) -> None:
    """A job that a crash made suspicious runs with nothing beside it, in a pool of four places under load."""
    (short_folder / "meet").mkdir()
    with family(database, redis_url, make_app(), short_folder, pool={"concurrency": 4}) as workers:
        workers.start()
        payload = {"folder": str(short_folder / "meet"), "count": 0}
        before = [bank.enqueue("together", payload) for _ in range(3)]
        suspicious = bank.enqueue("together", payload, alone=True)
        after = [bank.enqueue("together", payload) for _ in range(6)]
        assert bank.wait(suspicious)["result"] == 1
        for job_id in (*before, *after):
            bank.wait(job_id)


def test_claimed_jobs_that_cannot_start_are_given_back(
    database: str, redis_url: str, short_folder: Path, bank: Bank
) -> None:
    """Quick jobs are claimed ahead; when one turns out slow, those behind it go back in time, uncharged, to others."""
    with family(database, redis_url, make_app(), short_folder) as workers:
        first = workers.start()
        bank.enqueue_many("nothing", 300)
        while bank.counts().get("completed") != 300:
            time.sleep(0.01)
        slow = bank.enqueue("nap", {"seconds": 4}, hint=False)
        others = bank.enqueue_many("nothing", 100, hint=False)
        bank.redis.lpush("queue:q", *map(str, [*[slow], *others]))  # popped in this order
        bank.wait(slow, "running")
        deadline = time.monotonic() + 3.5
        while bank.counts() != {"completed": 300, "running": 1, "queued": 100}:
            assert time.monotonic() < deadline, ("given back", bank.counts(), workers.logged())
            time.sleep(0.01)
        second = workers.start()
        bank.redis.lpush("queue:q", *map(str, others))  # as the migrator would
        while bank.counts().get("completed") != 400:
            assert time.monotonic() < deadline, ("run by the other", bank.counts(), workers.logged())
            time.sleep(0.01)
        assert bank.status(slow) == "running"
        attempts = bank.connection.execute(
            "select max(attempt_count), min(attempt_count) from pmqd.jobs"
        ).fetchone()
        assert attempts == {"max": 1, "min": 1}
        bank.wait(slow)
        assert [workers.stop(slot) for slot in (first, second)] == [0, 0]


def test_settling_commits_with_the_handlers_writes(workers: Family, bank: Bank) -> None:
    """The settle and the handler's own rows are one transaction; an error inside undoes both and is retried."""
    slot = workers.start()
    paid = bank.enqueue("pays", {"fail": False})
    failed = bank.enqueue("pays", {"fail": True}, max_attempts=1)
    assert bank.wait(paid)["result"] == "paid"
    assert bank.wait(failed, "failed")["last_error_message"].startswith("ValueError: no money")
    assert bank.connection.execute("select id from paid").fetchall() == [{"id": paid}]
    assert (bank.logs(paid), bank.logs(failed)) == (["success"], ["failed"])
    assert workers.stop(slot) == 0
    assert bank.claims() == 0


def test_a_session_lost_while_settling_is_not_charged_to_the_job(workers: Family, bank: Bank) -> None:
    """PostgreSQL's absence is no fault of the job: it is interrupted, runs again with its last attempt, and pays once."""
    slot = workers.start()
    job_id = bank.enqueue("pays_over_a_lost_session", max_attempts=1)
    row = bank.wait(job_id)
    assert (row["attempt_count"], row["interruptions"], row["result"]) == (1, 1, "paid")
    assert bank.logs(job_id) == ["released", "success"]
    assert bank.connection.execute("select id from paid").fetchall() == [{"id": job_id}]
    assert workers.stop(slot) == 0


def test_settling_is_refused_when_the_job_was_taken(workers: Family, bank: Bank) -> None:
    """Another owner meanwhile: the handler's writes are rolled back, and the worker drops its own settle too."""
    slot = workers.start()
    job_id = bank.enqueue("pays_late")
    deadline = time.monotonic() + 10
    while not workers.records("was taken from this worker before it settled"):
        assert time.monotonic() < deadline, workers.logged()
        time.sleep(0.02)
    assert bank.status(job_id) == "running"
    found = bank.connection.execute("select to_regclass('paid') as paid").fetchone()
    assert found == {"paid": None}
    assert workers.stop(slot) == 0


def test_cancelling_a_running_job_interrupts_it(workers: Family, bank: Bank, wait_until: WaitUntil) -> None:
    """Maintenance shows the request in the arena: the handler is interrupted and the job is cancelled at once."""
    slot = workers.start()
    job_id = bank.enqueue("nap", {"seconds": 30})
    row = bank.wait(job_id, "running")
    wait_until(slot.running, what="the handler's start")  # before it there would be no attempt to write down
    bank.connection.execute("update pmqd.jobs set cancel_requested = true where id = %s", (job_id,))
    workers.arena.cancels = [(job_id, row["claim_token"])]
    bank.wait(job_id, "cancelled", 2)
    assert bank.logs(job_id) == ["cancelled"]


def test_progress_told_late_does_not_bring_a_job_back_to_life(workers: Family, bank: Bank) -> None:
    """What was reported right before the end and not told by then is dropped: `job:ID` says completed, and goes on to."""
    workers.start()
    job_id = bank.enqueue("reports_twice")
    bank.wait(job_id)
    seen, until = [], time.monotonic() + 1.5  # the clerk wakes at least once a second
    while time.monotonic() < until:
        seen.append(bank.redis.hget(f"job:{job_id}", "status"))
        time.sleep(0.01)
    assert seen[-1] == b"completed"
    assert b"processing" not in seen[seen.index(b"completed") :]


def test_progress_and_live_status(workers: Family, bank: Bank, wait_until: WaitUntil) -> None:
    """A slow job and its progress show in `job:ID` while it runs, and its end for a minute; quick ones leave no key."""
    workers.start()
    bank.wait(bank.enqueue("nothing"))
    job_id = bank.enqueue("reports")

    def shown() -> Any:
        return bank.redis.hgetall(f"job:{job_id}")

    wait_until(lambda: shown().get(b"progress") == b"0.5", 2, "the progress")
    assert (shown()[b"status"], shown()[b"note"]) == (b"processing", b"half")
    bank.wait(job_id)
    wait_until(lambda: shown().get(b"status") == b"completed", 2, "the end")
    assert 0 < bank.redis.ttl(f"job:{job_id}") <= 60
    assert bank.redis.keys("job:*") == [f"job:{job_id}".encode()]


def test_drain_finishes_what_runs_and_gives_back_the_rest(workers: Family, bank: Bank) -> None:
    """SIGTERM in the middle: the running job completes, jobs claimed ahead go back uncharged, hints stay, exit 0."""
    slot = workers.start()
    bank.enqueue_many("nothing", 300)
    while bank.counts().get("completed") != 300:
        time.sleep(0.01)
    slow = bank.enqueue("nap", {"seconds": 1}, hint=False)
    others = bank.enqueue_many("nothing", 50, hint=False)
    bank.redis.lpush("queue:q", *map(str, [slow, *others]))
    bank.wait(slow, "running")
    workers.terminate(slot)
    assert workers.wait_end(slot) == 0
    assert bank.status(slow) == "completed"
    left = bank.connection.execute(
        "select status, max(attempt_count) from pmqd.jobs where status <> 'completed' group by 1"
    )
    assert [row["max"] for row in left if row["status"] == "running"] == []
    assert bank.connection.execute(
        "select max(attempt_count) from pmqd.jobs where status = 'queued'"
    ).fetchone() in (
        {"max": 0},
        {"max": None},
    )
    assert bank.claims() == 0


def test_an_idle_worker_stops_at_once(workers: Family, bank: Bank) -> None:
    """The outstanding pop does not hold up the end: an idle worker is gone well within a second."""
    slot = workers.start()
    bank.wait(bank.enqueue("nothing"))
    started = time.monotonic()
    assert workers.stop(slot) == 0
    assert time.monotonic() - started < 0.7
    job_id = bank.enqueue("nothing")
    assert bank.redis.lrange("queue:q", 0, -1) == [str(job_id).encode()]


def test_a_burst_of_low_jobs_does_not_keep_a_high_one_waiting(workers: Family, bank: Bank) -> None:
    """Order "bands": a high job overtakes everything that is not claimed yet."""
    workers.start()
    for _ in range(30):
        bank.enqueue("nap", {"seconds": 0.03})
    high = bank.enqueue("whoami", priority=10, hint=False)
    bank.hint(high, band=":high")
    bank.wait(high, timeout=1.0)
    assert bank.counts().get("completed", 0) < 25


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ("no_such_module:app", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("os:no_such_attribute", "AttributeError"),
        ("os:path", "is a module; a pmqd.App is needed"),
    ],
)
def test_an_application_that_cannot_be_imported_ends_the_worker_in_one_line(
    database: str, redis_url: str, short_folder: Path, app: str, words: str
) -> None:
    """Exit 1 before ready, with one line that names pool, app and cause, and no traceback."""
    with family(database, redis_url, make_app(), short_folder, pool={"app": app}) as workers:
        slot = workers.start(wait=False)
        assert workers.wait_end(slot) == 1
        assert not slot.ready
        (line,) = workers.logged().splitlines()
        assert "pool test" in line
        assert app in line
        assert words in line


def test_hooks_run_around_the_jobs(database: str, redis_url: str, short_folder: Path, bank: Bank) -> None:
    """Start hooks before ready, stop hooks after the drain, async ones on the handlers' loop; a failing one: exit 1."""
    app = App()
    told = short_folder / "told"

    def tell(word: str) -> None:
        with told.open("a") as file:
            file.write(word + "\n")

    loops = []

    @app.on_worker_start
    def start() -> None:
        tell("start")

    @app.on_worker_start
    async def start_async() -> None:
        loops.append(id(asyncio.get_running_loop()))

    @app.task(queue="q")
    async def job_async() -> bool:
        tell("job")
        return loops == [id(asyncio.get_running_loop())]

    @app.on_worker_stop
    async def stop() -> None:
        tell("stop")

    for concurrency in (1, 2):
        with family(database, redis_url, app, short_folder, pool={"concurrency": concurrency}) as workers:
            slot = workers.start()
            assert bank.wait(bank.enqueue("job_async"))["result"] is True
            assert workers.stop(slot) == 0
    assert told.read_text().split() == ["start", "job", "stop"] * 2

    @app.on_worker_start
    def broken() -> None:
        raise RuntimeError("no pool")

    with family(database, redis_url, app, short_folder) as workers:
        assert workers.wait_end(workers.start(wait=False)) == 1
        assert "a start hook of 'worker_test_app:app' failed: RuntimeError: no pool" in workers.logged()


def test_a_database_without_schema_ends_the_worker_with_its_code(
    empty_database: str, database: str, redis_url: str, short_folder: Path
) -> None:
    """Exit code 79 and one line that says what to do: the master ends with it."""
    with family(database, redis_url, make_app(), short_folder) as workers:
        workers.settings = workers.settings.model_copy(
            update={"postgres": workers.settings.postgres.model_copy(update={"dsn": empty_database})}
        )
        slot = workers.start(wait=False)
        assert workers.wait_end(slot) == 79
        assert "pmqd schema apply" in workers.logged()
