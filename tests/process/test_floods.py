"""A worker that meets more quick jobs than it could ever wait for hints of."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmqd import App
from tests.fix_servers import wait_until
from tests.worker_family import Bank, Family, family, open_bank

HINTED, ALL = 4000, 6000
SECONDS = 30.0


def make_app() -> App:
    """One handler that takes no time."""
    app = App()

    @app.task(queue="q")
    def quick() -> None:
        """Nothing."""

    @app.task(queue="q")
    def slow() -> None:
        time.sleep(0.01)

    return app


@pytest.fixture
def bank(database: str, redis_url: str) -> Iterator[Bank]:
    """The test's look at the stores."""
    with open_bank(database, redis_url) as made:
        yield made


def until(workers: Family, bank: Bank, completed: int) -> None:
    """Wait until so many are completed. The pulse says that nothing is ready: nobody looks for lost hints."""
    deadline = time.monotonic() + SECONDS
    while (found := bank.counts().get("completed", 0)) < completed:
        assert time.monotonic() < deadline, (
            f"{found} of {completed} completed: {bank.counts()}\n{workers.logged()[-3000:]}"
        )
        workers.arena.set_pulse([])
        time.sleep(0.01)


def flood(workers: Family, bank: Bank) -> None:
    """Jobs, and hints of the first of them, for a worker that starts then."""
    workers.arena.set_pulse([])
    ids = bank.enqueue_many("quick", ALL, hint=False)
    for job_id in ids[:HINTED]:
        bank.hint(job_id)
    workers.start()


@pytest.mark.parametrize("settings", [{}, {"item": "full", "job_status": "all"}])
def test_in_a_flood_jobs_are_claimed_straight_from_postgres(
    database: str, redis_url: str, short_folder: Path, bank: Bank, settings: dict[str, str]
) -> None:
    """Hundreds came by their hints at once: what has none yet is claimed too, each once; then hints are used again."""
    with family(database, redis_url, make_app(), short_folder, redis=settings) as workers:
        flood(workers, bank)
        until(workers, bank, ALL)
        assert bank.counts() == {"completed": ALL}
        bank.enqueue("quick", {})
        until(workers, bank, ALL + 1)
        found = bank.connection.execute(
            "select count(*) as n, max(attempt_number) as most from pmqd.job_logs"
        ).fetchone()
        assert found == {"n": ALL + 1, "most": 1}


def test_where_each_step_is_told_a_flood_leaves_each_end(
    database: str, redis_url: str, short_folder: Path, bank: Bank
) -> None:
    """Quick jobs that were never in Redis, too: what each was, who ran it, when, and how it ended."""
    with family(database, redis_url, make_app(), short_folder, redis={"job_status": "all"}) as workers:
        flood(workers, bank)
        until(workers, bank, ALL)
        ids = [row["id"] for row in bank.connection.execute("select id from pmqd.jobs")]
        with bank.redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(f"job:{job_id}")
            wait_until(lambda: {each.get(b"status") for each in pipe.execute()} == {b"completed"}, SECONDS)


def test_after_a_flood_of_quick_jobs_slow_ones_leave_the_worker_at_rest(
    database: str, redis_url: str, short_folder: Path, bank: Bank
) -> None:
    """Where few jobs are wanted at a time hints do, and a worker that has nothing to do sleeps until one comes."""
    with family(database, redis_url, make_app(), short_folder) as workers:
        ids = bank.enqueue_many("quick", 3500, hint=False)
        bank.connection.execute("update pmqd.jobs set kind = 'slow' where id = any(%s)", [ids[2000:]])
        bank.connection.execute(
            "update pmqd.jobs set status = 'migrated_to_redis' where id = any(%s)", [ids[:1500]]
        )
        for job_id in ids[:1500]:
            bank.hint(job_id)
        slot = workers.start()
        wait_until(lambda: bank.counts().get("completed", 0) >= 2000, SECONDS)
        workers.arena.set_pulse([])  # nobody looks for lost hints any more
        wait_until(lambda: not {"running", "migrated_to_redis"} & bank.counts().keys(), SECONDS)
        before, began = slot.progress_count, time.monotonic()
        while (seconds := time.monotonic() - began) < 1.0:
            workers.arena.set_pulse([])
            time.sleep(0.01)
        assert slot.progress_count - before < 200 * seconds, bank.counts()
