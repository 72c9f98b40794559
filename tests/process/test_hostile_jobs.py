"""Jobs that mean harm: each ends as the design says, with its cause, and never at its neighbours' expense."""

from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.fix_daemon import MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import enqueue, enqueue_many, job, log_statuses, starts

FAST = {"timeout_grace_seconds": 1.0}
POOL = {"app": "tests.applications.trial:app", "processes": 2}

HOSTILE = {
    # kind: (status, attempts, log, words of the cause)
    "sys_exit": ("failed", 1, ["failed"], "SystemExit"),
    "os_exit": ("failed", 2, ["crashed", "crashed"], "exit code 1"),
    "segfault": ("failed", 2, ["crashed", "crashed"], "SIGSEGV"),
    "endless_python": ("failed", 1, ["failed"], "JobTimeout"),
    "endless_c": ("failed", 1, ["crashed"], "timeout"),
    "swallows": ("failed", 1, ["crashed"], "timeout"),
    "nul_error": ("failed", 1, ["failed"], "before"),
    "no_json": ("failed", 1, ["failed"], "JSON"),
    "discarded": ("failed", 1, ["failed"], "nobody wants this"),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_job_ends_with_its_cause_and_leaves_its_neighbours_alone(
    kind: str, daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """One hostile job among a hundred honest ones, two workers: it ends failed with the cause; all others complete, uncharged."""
    daemon(FAST | {"workers": [POOL]})
    status, attempts, log, words = HOSTILE[kind]
    hostile = enqueue(connection, kind, attempts=attempts)
    enqueue_many(connection, 100, "nothing")
    wait_until(lambda: job(connection, hostile)["status"] == status, timeout=15, what=f"{kind} ends {status}")
    row = job(connection, hostile)
    assert row["attempt_count"] == attempts
    assert log_statuses(connection, hostile) == log
    assert words in row["last_error_message"]

    def others() -> list[tuple[Any, ...]]:
        return connection.execute(
            "select status, attempt_count, count(*) from pmqd.jobs where id <> %s group by 1, 2", (hostile,)
        ).fetchall()

    wait_until(lambda: others() == [("completed", 1, 100)], timeout=15, what="the neighbours' completion")


def test_neighbours_in_the_same_process_are_not_lost(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """A segmentation fault in a process with ten threads: the nine neighbours are interrupted, not charged, and complete;
    the guilty one is run alone, shows itself, and ends failed.
    """
    history = tmp_path / "history"
    pool = POOL | {"processes": 1, "concurrency": 10}
    daemon(FAST | {"workers": [pool]}, environ={"TRIAL_HISTORY": str(history)})
    naps = [enqueue(connection, "nap", seconds=1.5) for _ in range(9)]
    wait_until(lambda: len({each.job_id for each in starts(history)}) == 9, what="nine naps running")
    guilty = enqueue(connection, "segfault", attempts=2)
    wait_until(lambda: job(connection, guilty)["status"] == "failed", timeout=40, what="the guilty job's end")
    wait_until(
        lambda: all(job(connection, each)["status"] == "completed" for each in naps),
        timeout=60,
        what="the naps' end",
    )
    for each in naps:
        row = job(connection, each)
        assert (row["attempt_count"], row["interruptions"]) == (1, 1)
    row = job(connection, guilty)
    assert (row["attempt_count"], row["interruptions"]) == (2, 1)


def test_payload_over_the_limit_is_refused(connection: psycopg.Connection[Any]) -> None:
    """300 KiB are refused by the database, in the producer's own transaction, with the limit in the message."""
    with pytest.raises(psycopg.errors.CheckViolation, match="256_kib"):
        connection.execute(
            "insert into pmqd.jobs (queue_name, payload) values ('trial', jsonb_build_object('x', repeat('a', 300 * 1024)))"
        )


def test_unknown_kind_and_unknown_queue_wait_uncharged_with_a_reason(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """Neither fails nor is pumped round: the row stays queued, uncharged, and `jobs show` has the reason."""
    from tests.cli import show

    running = daemon({"workers": [POOL]})
    stranger = enqueue(connection, "not-a-kind")
    nowhere = enqueue(connection, "nothing", "nobody-serves-this")
    later = enqueue(connection, "nothing")
    wait_until(lambda: job(connection, later)["status"] == "completed", what="an honest job")
    wait_until(lambda: job(connection, stranger)["last_error_message"], what="a reason on the row")
    for job_id, words in ((stranger, "not-a-kind"), (nowhere, "nobody-serves-this")):
        row = job(connection, job_id)
        assert row["status"] == "queued", row
        assert (row["attempt_count"], row["interruptions"]) == (0, 0)
        assert words in show(running.config, UUID(str(job_id)))


def test_a_crashing_job_disturbs_its_neighbours_once(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """Once it has shown that it ends its process a job runs alone for the rest of its attempts: of its crashes one at most
    interrupts the honest jobs that run all the time.
    """
    daemon(FAST | {"workers": [POOL | {"processes": 1, "concurrency": 4}]})
    for _ in range(10):  # of two lengths, so that seldom all four places are free at once
        enqueue_many(connection, 8, "nap", seconds=0.2)
        enqueue_many(connection, 7, "nap", seconds=0.31)
    running = "select count(*) from pmqd.jobs where status = 'running'"
    wait_until(lambda: connection.execute(running).fetchone() == (4,), what="four naps running")
    guilty = enqueue(connection, "segfault", attempts=4)
    connection.execute("update pmqd.jobs set priority = 90 where id = %s", (guilty,))
    wait_until(lambda: job(connection, guilty)["status"] == "failed", timeout=60, what="the guilty job's end")
    row = job(connection, guilty)
    assert row["attempt_count"] == 4
    assert row["interruptions"] <= 1, "none, where it happened to run alone at first"
    hit = connection.execute(
        "select count(distinct l.worker_id) from pmqd.job_logs l join pmqd.jobs j on j.id = l.job_id"
        " where j.kind = 'nap' and l.status = 'crashed'"
    ).fetchone()
    assert hit == (row["interruptions"],)
