"""Redis or PostgreSQL goes away under load: what waits, for how long, and that nothing is lost or done twice."""

import signal
from functools import partial
from pathlib import Path

import psycopg
import pytest
import redis

from pmqd.embedded import PostgresServer, RedisServer
from tests.fix_daemon import MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import ends, enqueue, settled_once, starts, statuses
from tests.load import all_completed, has_grown, load, mode, waits

POOL = {"app": "tests.applications.trial:app", "processes": 2}


@pytest.mark.parametrize("fault", ["kill", "flush"])
def test_redis_gone_under_load_costs_no_job_and_at_most_three_seconds(
    fault: str,
    daemon: MakeDaemon,
    database: str,
    own_redis: RedisServer,
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """200 jobs/s; Redis is killed and comes back (or is flushed twice): no job waits over 3 s, none is lost, none is done twice."""
    history = tmp_path / "history"
    running = daemon(
        {"workers": [POOL], "redis": {"url": own_redis.url}}, environ={"TRIAL_HISTORY": str(history)}
    )
    with load(database) as one:
        wait_until(lambda: len(starts(history)) > 200, what="the load runs")
        if fault == "kill":
            own_redis.kill()
            wait_until(lambda: mode(running) == "degraded", timeout=4, what="degraded")
            before = len(starts(history))
            wait_until(lambda: len(starts(history)) > before + 400, what="jobs run without Redis")
            own_redis.start()
            wait_until(
                lambda: mode(running) == "ok", timeout=3, what="Redis is used again within three seconds"
            )
        else:
            for _ in range(2):
                with redis.Redis.from_url(own_redis.url) as client:
                    client.flushall()
                before = len(starts(history))
                wait_until(partial(has_grown, history, before + 400), what="jobs run on")
    wait_until(all_completed(database, one), timeout=20, what="every job completed")
    slowest = max(waits(history, one.enqueued))
    assert slowest < 3.0
    assert max(ends(history).values()) == 1
    with psycopg.connect(database) as connection:
        settled_once(connection)


def test_postgres_stopped_under_load_finishes_what_runs_and_loses_nothing(
    daemon: MakeDaemon,
    own_postgres: PostgresServer,
    redis_url: str,
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """An immediate stop of PostgreSQL under load, for three seconds: running jobs finish and are settled once it is back; every
    acknowledged job is completed exactly once.
    """
    history = tmp_path / "history"
    dsn = own_postgres.dsn("pmqd")
    running = daemon(
        {"workers": [POOL], "postgres": {"dsn": dsn}, "redis": {"url": redis_url}},
        environ={"TRIAL_HISTORY": str(history)},
    )
    with load(dsn) as one:
        naps = [enqueue(dsn, "nap", seconds=2) for _ in range(2)]
        wait_until(lambda: all(starts(history, each) for each in naps), what="two long jobs run")
        own_postgres.stop("immediate")
        wait_until(lambda: running.get("/readyz").status_code == 503, timeout=5, what="not ready")
        wait_until(lambda: all(ends(history)[each] for each in naps), what="the long jobs finish meanwhile")
        own_postgres.start()
        wait_until(lambda: running.get("/readyz").status_code == 200, timeout=5, what="ready again")
        before = len(starts(history))
        wait_until(lambda: len(starts(history)) > before + 200, what="the load goes on")
    wait_until(all_completed(dsn, one), timeout=20, what="every job completed")
    with psycopg.connect(dsn) as connection:
        settled_once(connection)
    assert max(ends(history).values()) == 1, "nothing ran twice"
    assert len(starts(history, naps[0])) == 1


def test_settles_survive_a_stop_while_postgres_is_away(
    daemon: MakeDaemon,
    own_postgres: PostgresServer,
    redis_url: str,
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """PostgreSQL is away when the daemon is told to stop: what finished is saved in state_dir, and completed by the next start,
    not run again.
    """
    history = tmp_path / "history"
    dsn = own_postgres.dsn("pmqd")
    settings = {
        "workers": [POOL],
        "postgres": {"dsn": dsn},
        "redis": {"url": redis_url},
        "state_dir": str(tmp_path / "state"),
        "drain_seconds": 5.0,
    }
    first = daemon(settings, environ={"TRIAL_HISTORY": str(history)})
    job_id = enqueue(dsn, "nap", seconds=1)
    wait_until(lambda: starts(history, job_id), what="the job runs")
    own_postgres.stop("immediate")
    wait_until(lambda: ends(history)[job_id], what="the job's end")
    first.signal(signal.SIGTERM)
    assert first.process.wait(20) == 0
    assert list((tmp_path / "state" / "settles").glob("*.jsonl"))
    own_postgres.start()
    daemon(settings, environ={"TRIAL_HISTORY": str(history)})

    def completed() -> bool:
        with psycopg.connect(dsn) as connection:
            return statuses(connection) == {"completed": 1}

    wait_until(completed, what="the saved settle is applied")
    assert len(starts(history, job_id)) == 1
