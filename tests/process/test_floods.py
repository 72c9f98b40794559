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


def test_in_a_flood_jobs_are_claimed_straight_from_postgres(
    database: str, redis_url: str, short_folder: Path, bank: Bank
) -> None:
    """Hundreds came by their hints at once: what has none yet is claimed too, each once; then hints are used again."""
    with family(database, redis_url, make_app(), short_folder) as workers:
        flood(workers, bank)
        until(workers, bank, ALL)
        assert bank.counts() == {"completed": ALL}
        bank.enqueue("quick", {})
        until(workers, bank, ALL + 1)
        found = bank.connection.execute(
            "select count(*) as n, max(attempt_number) as most from pmqd.job_logs"
        ).fetchone()
        assert found == {"n": ALL + 1, "most": 1}


@pytest.mark.parametrize("settings", [{"item": "full"}, {"job_status": "all"}])
def test_where_others_read_along_all_jobs_go_through_redis(
    database: str, redis_url: str, short_folder: Path, bank: Bank, settings: dict[str, str]
) -> None:
    """With whole items in the lists, or each step told, nothing is claimed without its hint."""
    with family(database, redis_url, make_app(), short_folder, redis=settings) as workers:
        flood(workers, bank)
        until(workers, bank, HINTED)
        bank.enqueue("quick", {})
        until(workers, bank, HINTED + 1)
        assert bank.counts() == {"completed": HINTED + 1, "queued": ALL - HINTED}


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
