"""What a crash of each kind of process costs: seconds, and no job."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import psycopg

from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import Mark, enqueue, enqueue_many, job, log_statuses, settled_once, starts, statuses

POOL = {"app": "tests.applications.trial:app", "processes": 2}


def again(history: Path, job_id: UUID) -> list[Mark]:
    """The starts of a job after its first."""
    return starts(history, job_id)[1:]


def is_cancelled(connection: psycopg.Connection[Any], job_id: UUID) -> bool:
    """Whether the job has ended so."""
    return bool(job(connection, job_id)["status"] == "cancelled")


def successors(running: Daemon, kind: str, old: int) -> list[psutil.Process]:
    """The children of a kind other than the one with that pid."""
    return [each for each in running.children(kind) if each.pid != old]


def test_job_of_a_killed_worker_starts_again_within_a_second(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Kill -9 in the middle of a long job: it starts again elsewhere in under a second, charged once more."""
    history = tmp_path / "history"
    daemon({"workers": [POOL]}, environ={"TRIAL_HISTORY": str(history)})
    for _ in range(3):
        job_id = enqueue(connection, "nap", seconds=10)
        first = wait_until(partial(starts, history, job_id), what="the first start")[0]
        killed = time.monotonic()
        os.kill(first.pid, signal.SIGKILL)
        second = wait_until(partial(again, history, job_id), timeout=3, what="the second start")[0]
        assert second.pid != first.pid
        assert second.at - killed < 1.0
        assert job(connection, job_id)["attempt_count"] == 2
        assert log_statuses(connection, job_id) == ["crashed"]
        connection.execute("update pmqd.jobs set cancel_requested = true where id = %s", (job_id,))
        wait_until(partial(is_cancelled, connection, job_id), what="the cancel")


def test_killed_service_is_replaced_within_a_second_and_nothing_is_lost(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """Kill -9 of migrator, web child and maintenance under load: each is replaced in under a second; all jobs end completed."""
    running = daemon({"workers": [POOL]})
    for kind in ("migrator", "web", "maintenance"):
        enqueue_many(connection, 500, "nothing")
        old = running.children(kind)[0].pid
        os.kill(old, signal.SIGKILL)
        killed = time.monotonic()
        wait_until(
            partial(successors, running, kind, old),
            timeout=3,
            what=f"a new {kind}",
        )
        assert time.monotonic() - killed < 1.0, kind
    wait_until(lambda: statuses(connection) == {"completed": 1500}, timeout=20, what="all jobs completed")
    settled_once(connection)


def test_killed_master_takes_its_family_along_and_a_new_one_gives_back_what_it_held(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Kill -9 of the master: no descendant after a second; started again in the same state_dir, the held job runs within 2 s."""
    history = tmp_path / "history"
    state = {"workers": [POOL], "state_dir": str(tmp_path / "state")}
    environ = {"TRIAL_HISTORY": str(history)}
    first = daemon(state, environ=environ)
    job_id = enqueue(connection, "nap", seconds=60)
    wait_until(lambda: starts(history, job_id), what="the first start")
    first.kill()
    first.check_nothing_left(timeout=1.0)
    daemon(state, environ=environ)
    ready = time.monotonic()
    second = wait_until(partial(again, history, job_id), timeout=5, what="the second start")[0]
    assert second.at - ready < 2.0
    row = job(connection, job_id)
    assert (row["attempt_count"], row["interruptions"]) == (1, 1)
    connection.execute("update pmqd.jobs set cancel_requested = true where id = %s", (job_id,))
    wait_until(partial(is_cancelled, connection, job_id), what="the cancel")
