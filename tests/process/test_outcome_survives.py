"""Work that is done is done: a process killed between a handler's end and the count of its outcome costs nothing twice."""

import os
import signal
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pmqd import metrics
from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import ends, enqueue, enqueue_many, job, log_statuses, read, statuses

Connection = psycopg.Connection[Any]

AFTER_THE_END = [
    "worker.noted",
    "worker.settling",
    "worker.settled",
    "worker.counting",
    "worker.counted",
]
"""Every step from the moment where an outcome is noted."""
MOST_AT_ONCE = 8
OF_MAINTENANCE = [
    "maintenance.settled",
    "maintenance.counting",
    "maintenance.counted",
    "maintenance.rescued",
    "maintenance.buried",
]


class Points:
    """Crash points of a daemon that act once each time they are armed."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    @property
    def environ(self) -> dict[str, str]:
        """For the daemon."""
        return {"PMQD_CRASHPOINT": ",".join(f"{name}=kill@{self.folder / name}" for name in self.names)}

    def arm(self, name: str) -> None:
        """The next process that passes there dies."""
        (self.folder / name).touch()

    def sprung(self, name: str) -> bool:
        """Whether somebody died there."""
        return not (self.folder / name).exists()


@pytest.fixture
def history(short_folder: Path) -> Path:
    """Where the handlers write."""
    return short_folder / "history"


def counted(daemon: Daemon) -> dict[str, float]:
    """Each counter of jobs, over all queues and kinds."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(daemon.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return {
        name: found.get(f"pmqd_{name}_total", 0.0)
        for name in ("jobs_started", "jobs_completed", "jobs_failed", "jobs_retried", "rescued")
    } | {"durations": found.get("pmqd_job_duration_seconds_count", 0.0)}


def logged(connection: Connection) -> dict[str, float]:
    """The same, as the audit trail has it."""
    rows = dict(connection.execute("select status, count(*) from pmqd.job_logs group by 1").fetchall())
    poisoned = connection.execute(
        "select count(*) from pmqd.jobs j where j.status = 'failed' and exists"
        " (select from pmqd.job_logs l where l.job_id = j.id and l.status = 'crashed' and l.attempt_number = j.attempt_count)"
    ).fetchone()
    assert poisoned is not None
    crashed = rows.get("crashed", 0)
    return {
        "jobs_started": sum(rows.values()),
        "jobs_completed": rows.get("success", 0),
        "jobs_failed": rows.get("failed", 0) + poisoned[0],
        "jobs_retried": rows.get("retry", 0),
        "rescued": crashed,
        "durations": sum(rows.values()) - crashed,
    }


def check_counters(daemon: Daemon, connection: Connection) -> None:
    """Each counter equals the audit trail, soon and for good."""
    deadline = time.monotonic() + 5
    while counted(daemon) != logged(connection) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert counted(daemon) == logged(connection)


def all_over(connection: Connection) -> bool:
    """Nothing waits or runs."""
    return statuses(connection).keys() <= {"completed", "failed"}


def again(path: Path, connection: Connection) -> list[UUID]:
    """Jobs that came to their end once more, though the first end had been noted.

    A process that is killed by one of its threads may be killed between a handler's last line and the note, in another thread:
    such a job runs again, as it must. So a first end counts once its thread has gone on to another job; on an event loop,
    where other jobs may go on first, once it has gone on to more than can run at the same time.
    """
    on_loop = {
        row[0] for row in connection.execute("select id from pmqd.jobs where kind = 'nap_async'").fetchall()
    }
    noted, found = set[UUID](), list[UUID]()
    open_ends: dict[int, deque[UUID]] = defaultdict(deque)
    for each in read(path):
        waiting = open_ends[each.thread]
        if each.mark == "E":
            if each.job_id in noted:
                found.append(each.job_id)
            waiting.append(each.job_id)
        else:
            while waiting and (waiting[0] not in on_loop or len(waiting) > MOST_AT_ONCE):
                noted.add(waiting.popleft())
    return found


def load(connection: Connection) -> None:
    """Jobs that end in every way, most of them within microseconds."""
    enqueue_many(connection, 120, "nothing")
    enqueue_many(connection, 10, "nap", seconds=0.005)
    enqueue_many(connection, 10, "nap_async", seconds=0.002)
    enqueue_many(connection, 10, "flaky", failures=1)
    enqueue_many(connection, 10, "discarded")


def pool(**more: Any) -> dict[str, Any]:
    """One pool of the trial application."""
    return {"app": "tests.applications.trial:app", **more}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_is_done_does_not_run_again_wherever_its_worker_dies(
    daemon: MakeDaemon, connection: Connection, history: Path, short_folder: Path, wait_until: WaitUntil,
    concurrency: int,
) -> None:  # fmt: skip
    """Killed at each step after the outcome was noted, under load, several times: no handler that came to its end starts
    again, each outcome is settled as it was, and the counters are exact.
    """
    points = Points(short_folder, AFTER_THE_END)
    one = daemon(
        {"workers": [pool(processes=2, concurrency=concurrency)]},
        environ=points.environ | {"TRIAL_HISTORY": str(history)},
    )
    for name in AFTER_THE_END:
        points.arm(name)
        load(connection)
        wait_until(lambda name=name: points.sprung(name), 20, f"a death at {name}")  # type: ignore[misc]
        wait_until(lambda: all_over(connection), 30, "the end of all jobs")
    assert again(history, connection) == [], one.log[-3000:]
    assert statuses(connection) == {"completed": 750, "failed": 50}
    check_counters(one, connection)


def test_a_neighbours_crash_does_not_repeat_what_is_done(
    daemon: MakeDaemon, connection: Connection, history: Path, short_folder: Path, wait_until: WaitUntil
) -> None:
    """Sixty quick jobs beside one that ends the process: the quick ones that had ended are completed, with their results."""
    one = daemon({"workers": [pool(concurrency=8)]}, environ={"TRIAL_HISTORY": str(history)})
    for _ in range(5):
        enqueue_many(connection, 60, "nap", seconds=0.001)
        enqueue(connection, "segfault", attempts=1)
    wait_until(lambda: all_over(connection), 60, "the end of all jobs")
    assert again(history, connection) == []
    results = connection.execute(
        "select distinct result from pmqd.jobs where kind = 'nap' and status = 'completed'"
    ).fetchall()
    assert results == [(0.001,)]
    check_counters(one, connection)


def test_counters_are_exact_though_maintenance_dies_too(
    daemon: MakeDaemon, connection: Connection, history: Path, short_folder: Path, wait_until: WaitUntil
) -> None:
    """A worker dies with work done and work running, and maintenance at each step of the rescue: the next one goes on,
    nothing runs twice that was done, each counter equals the audit trail.
    """
    points = Points(short_folder, [*AFTER_THE_END, *OF_MAINTENANCE])
    one = daemon(
        {"workers": [pool(processes=1, concurrency=6)]},
        environ=points.environ | {"TRIAL_HISTORY": str(history)},
    )
    for number, name in enumerate(OF_MAINTENANCE):
        death = ("worker.settling", "worker.settled")[number % 2]
        points.arm(name)
        enqueue_many(connection, 3, "nap", seconds=0.4)
        wait_until(lambda: running_naps(connection) == 3, 20, "naps that run")
        points.arm(death)
        load(connection)
        wait_until(lambda name=name: points.sprung(name), 20, f"a death at {name}")  # type: ignore[misc]
        wait_until(lambda: all_over(connection), 40, "the end of all jobs")
        (short_folder / death).unlink(missing_ok=True)
    assert again(history, connection) == []
    check_counters(one, connection)


def running_naps(connection: Connection) -> int:
    """How many naps run, and only those."""
    found = connection.execute(
        "select count(*) from pmqd.jobs where kind = 'nap' and status = 'running'"
    ).fetchone()
    assert found is not None
    return int(found[0])


@pytest.mark.parametrize(
    ("point", "statuses_logged"), [("worker.started", ["crashed"]), ("worker.finished", ["crashed"])]
)
def test_what_is_not_noted_runs_again(
    daemon: MakeDaemon, connection: Connection, history: Path, short_folder: Path, wait_until: WaitUntil,
    point: str, statuses_logged: list[str],
) -> None:  # fmt: skip
    """Before the note nobody can know that the job is done: one that was alone in its process is charged, and runs again."""
    points = Points(short_folder, [point])
    daemon(environ=points.environ | {"TRIAL_HISTORY": str(history)})
    points.arm(point)
    job_id = enqueue(connection, "nothing")
    wait_until(lambda: job(connection, job_id)["status"] == "completed", 20, "the second run")
    assert log_statuses(connection, job_id) == [*statuses_logged, "success"]
    assert job(connection, job_id)["attempt_count"] == 2


def test_postgres_is_away_when_the_worker_dies(
    daemon: MakeDaemon, connection: Connection, history: Path, wait_until: WaitUntil, own_postgres: Any,
) -> None:  # fmt: skip
    """The job ends while PostgreSQL is away, then the worker is killed: when PostgreSQL is back the job is completed, once."""
    dsn = own_postgres.dsn("pmqd")
    one = daemon({"postgres": {"dsn": dsn}}, environ={"TRIAL_HISTORY": str(history)})
    with psycopg.connect(dsn, autocommit=True) as there:
        job_id = enqueue(there, "nap", seconds=1.0)
        wait_until(lambda: job(there, job_id)["status"] == "running", 20, "the job runs")
    own_postgres.kill()
    wait_until(lambda: ends(history)[job_id] == 1, 20, "the handler's end")
    time.sleep(0.1)  # the note follows within microseconds; nothing tells from outside
    os.kill(one.children("worker")[0].pid, signal.SIGKILL)
    own_postgres.start()
    with psycopg.connect(dsn, autocommit=True) as there:
        wait_until(lambda: job(there, job_id)["status"] == "completed", 20, "completed")
        assert (log_statuses(there, job_id), job(there, job_id)["result"]) == (["success"], 1.0)
        check_counters(one, there)
    assert [each.mark for each in read(history)] == ["S", "E"]


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
def test_a_rescue_is_counted_once_though_the_family_ends_while_postgres_is_away(
    daemon: MakeDaemon, short_folder: Path, history: Path, wait_until: WaitUntil, own_postgres: Any, end: str,
) -> None:  # fmt: skip
    """PostgreSQL dies when a rescue is counted and its claim not closed, and pmqd is stopped or killed before it is back: the
    next family closes the claim, and the counters of both lives together have the rescue once.
    """
    dsn, point = own_postgres.dsn("pmqd"), "maintenance.counted"
    settings = {
        "postgres": {"dsn": dsn},
        "state_dir": str(short_folder / "state"),
        "drain_seconds": 1.0,
        "workers": [pool(processes=1)],
    }
    environ = {"PMQD_CRASHPOINT": f"{point}=stop@{short_folder / point}", "TRIAL_HISTORY": str(history)}
    one = daemon(settings, environ=environ)
    (short_folder / point).touch()
    with psycopg.connect(dsn, autocommit=True) as there:
        job_id = enqueue(there, "nap", seconds=30.0)
        wait_until(lambda: read(history), 20, "the handler's start: claimed is not begun")
        there.execute("update pmqd.jobs set payload = '{\"seconds\": 0}' where id = %s", [job_id])
        os.kill(one.children("worker")[0].pid, signal.SIGKILL)
        [maintenance] = one.children("maintenance")
        wait_until(
            lambda: maintenance.status() == psutil.STATUS_STOPPED, 20, f"maintenance stands at {point}"
        )
    own_postgres.kill()
    if end == "SIGKILL":
        one.kill()
    maintenance.resume()
    assert one.stop() == (0 if end == "SIGTERM" else -signal.SIGKILL)
    one.check_nothing_left()
    before = rescued(metrics.render(short_folder / "state" / "metrics").decode())
    own_postgres.start()
    two = daemon(settings)
    with psycopg.connect(dsn, autocommit=True) as there:
        wait_until(lambda: job(there, job_id)["status"] == "completed", 20, "the second run")
        assert log_statuses(there, job_id) == ["crashed", "success"]
        assert there.execute("select count(*) from pmqd.claims").fetchone() == (0,)
    assert (before, rescued(two.get("/metrics").text)) == (1.0, 0.0)


def rescued(page: str) -> float:
    """`pmqd_rescued_total` over all queues."""
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == "pmqd_rescued_total")


@pytest.mark.parametrize(
    ("point", "ends_logged"),
    [("worker.committing", ["crashed", "success"]), ("worker.committed", ["success"])],
)
def test_a_job_that_settles_itself_is_done_with_its_commit(
    daemon: MakeDaemon, connection: Connection, history: Path, short_folder: Path, wait_until: WaitUntil,
    point: str, ends_logged: list[str],
) -> None:  # fmt: skip
    """Killed before the handler's own commit: nothing of it happened, it runs again. After it: the job is completed. The effect
    is there once, and the counters know it.
    """
    connection.execute("create table effects (id uuid)")
    points = Points(short_folder, [point])
    one = daemon(environ=points.environ | {"TRIAL_HISTORY": str(history)})
    points.arm(point)
    job_id = enqueue(connection, "effect")
    wait_until(lambda: points.sprung(point), 20, f"a death at {point}")
    wait_until(lambda: job(connection, job_id)["status"] == "completed", 20, "completed")
    assert log_statuses(connection, job_id) == ends_logged
    assert connection.execute("select id from effects").fetchall() == [(job_id,)]
    check_counters(one, connection)
