"""SIGTERM and SIGHUP under load: nothing fails by them, and nothing is charged that did not run."""

import signal
import time
from pathlib import Path
from typing import Any

import psycopg

from tests.fix_daemon import MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import enqueue, enqueue_many, job, settled_once, starts, statuses

POOL = {"app": "tests.applications.trial:app", "processes": 2}


def test_sigterm_under_load_drains_and_charges_nothing_that_did_not_run(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """SIGTERM in the middle of 3,000 jobs: exit 0 within the limit; every job is completed with one attempt or waits with none."""
    history = tmp_path / "history"
    running = daemon({"workers": [POOL]}, environ={"TRIAL_HISTORY": str(history)})
    enqueue_many(connection, 3000, "nap", seconds=0.005)
    wait_until(lambda: len(starts(history)) > 100, what="the load runs")
    told = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - told < 5.0
    rows = connection.execute(
        "select distinct status in ('queued', 'migrated_to_redis'), attempt_count, interruptions from pmqd.jobs"
    ).fetchall()
    assert sorted(rows) == [(False, 1, 0), (True, 0, 0)], rows
    assert connection.execute("select count(*) from pmqd.claims").fetchone() == (0,)
    settled_once(connection)


def test_drain_deadline_interrupts_a_long_job_without_charging_it(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """A job longer than drain_seconds is cut at the deadline: queued again, the attempt given back, one interruption; exit 0."""
    history = tmp_path / "history"
    running = daemon({"workers": [POOL], "drain_seconds": 1.0}, environ={"TRIAL_HISTORY": str(history)})
    job_id = enqueue(connection, "nap", seconds=60)
    wait_until(lambda: starts(history, job_id), what="the job runs")
    assert running.stop() == 0
    row = job(connection, job_id)
    assert (row["status"], row["attempt_count"], row["interruptions"]) == ("queued", 0, 1)
    assert not row["alone"], "it did nothing wrong: it need not run alone"


def test_sighup_with_a_broken_file_keeps_the_old_configuration(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """The error names the setting in the log; the same workers live on and work."""
    running = daemon({"workers": [POOL]})
    before = {each.pid for each in running.children("worker")}
    running.config.write_text(running.config.read_text() + "\n[web]\nlisten = 5\n")
    running.signal(signal.SIGHUP)
    wait_until(
        lambda: any(each["level"] == "error" and "web" in each["message"] for each in running.records),
        what="the error",
    )
    enqueue_many(connection, 10, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 10}, what="jobs go on")
    assert {each.pid for each in running.children("worker")} == before


def test_sighup_while_the_daemon_still_starts_is_heard_later(
    daemon: MakeDaemon, wait_until: WaitUntil
) -> None:
    """It comes while Python still imports: the daemon neither dies of it nor forgets it."""
    running = daemon({"workers": [POOL]}, wait=False)
    status = Path(f"/proc/{running.pid}/status")
    blocked = 1 << (signal.SIGHUP - 1)
    wait_until(
        lambda: int(status.read_text().partition("SigBlk:")[2].split()[0], 16) & blocked,
        what="SIGHUP is held back",
    )
    running.signal(signal.SIGHUP)
    running.wait_ready()
    wait_until(lambda: "reload done" in running.log, what="the reload")


def test_sighup_with_one_worker_more_and_another_log_level(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """Both are in force after the reload, new processes serve, and no job failed or was charged twice by it."""
    running = daemon({"workers": [POOL]})
    before = {each.pid for each in running.children("worker")}
    enqueue_many(connection, 2000, "nap", seconds=0.002)
    running.write_config(
        dict(running.settings)
        | {"workers": [POOL | {"processes": 3}], "log": {"level": "debug", "format": "json"}}
    )
    running.signal(signal.SIGHUP)

    def renewed() -> bool:
        now = {each.pid for each in running.children("worker")}
        return len(now) == 3 and not now & before

    wait_until(renewed, timeout=20, what="three new workers")
    wait_until(lambda: any(each.get("level") == "debug" for each in running.records), what="a debug record")
    wait_until(lambda: statuses(connection) == {"completed": 2000}, timeout=20, what="all jobs completed")
    assert connection.execute("select max(attempt_count), max(interruptions) from pmqd.jobs").fetchone() == (
        1,
        0,
    )
    settled_once(connection)


def test_sighup_with_a_new_pool_has_its_queue_delivered(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """A reload that only adds a pool: the instance's row names its queue, so that the migrator marks for it; no longer
    those of a pool that is gone.
    """
    served = "select queues from pmqd.instances"
    one, other = POOL | {"queues": ["trial"]}, POOL | {"name": "other", "queues": ["plain"], "processes": 1}
    running = daemon({"workers": [one]})
    assert connection.execute(served).fetchall() == [(["trial"],)]
    for pools, queues in (([one, other], ["plain", "trial"]), ([other], ["plain"])):
        running.write_config(dict(running.settings) | {"workers": pools})
        running.signal(signal.SIGHUP)
        wait_until(
            lambda queues=queues: connection.execute(served).fetchall() == [(queues,)],  # type: ignore[misc]
            timeout=20,
            what=f"{queues} are served",
        )


def test_a_hundred_thousand_plain_inserts_are_all_completed(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """One plain insert ... select: a whole queue without kinds goes to its handler; every job is completed once."""
    daemon({"workers": [POOL]})
    connection.execute(
        "insert into pmqd.jobs (queue_name, payload) select 'plain', '{}' from generate_series(1, 100000)"
    )
    wait_until(lambda: statuses(connection) == {"completed": 100_000}, timeout=90, what="all completed")
    settled_once(connection)
