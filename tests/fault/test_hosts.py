"""Several instances on the same stores: one stands still, one is gone at once, one is cut off from PostgreSQL."""

import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from pmqd.embedded import PostgresServer
from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_proxy import MakeProxy
from tests.fix_servers import WaitUntil
from tests.history import ends, enqueue, enqueue_many, job, log_statuses, settled_once, starts, statuses
from tests.hosts import freeze, later_starts, overlaps, power_off, runs, thaw, value, watching
from tests.processes import lives

APP = "tests.applications.trial:app"
POOL = {"app": APP, "processes": 2}
PAIR = [
    {"name": "careful", "app": APP, "queues": ["careful"], "processes": 1},
    {"name": "trial", "app": APP, "queues": ["trial"], "processes": 1},
]
"""One pool for the queue whose jobs are killed in isolation, one beside it."""
QUEUES = {"careful": {"isolation": "abort"}}
LEAD_SECONDS = 10.5
"""A leader that stands still: 2 s and a beat until another ticks (if it did), then six ticks, then a look each second."""
HOST_SECONDS = 35.0


def leader(connection: psycopg.Connection[Any], daemons: list[Daemon]) -> Daemon:
    """The instance whose migrator leads."""
    pid = int(value(connection, "select holder from pmqd.leader").rpartition(":")[2])
    return next(one for one in daemons if pid in {child.pid for child in one.children("migrator")})


def ticker(connection: psycopg.Connection[Any], daemons: list[Daemon]) -> Daemon:
    """The instance that ticks."""
    pid = value(connection, "select i.pid from pmqd.ticker t join pmqd.instances i on i.id = t.holder")
    return next(one for one in daemons if one.pid == pid)


def other(one: Daemon, daemons: list[Daemon]) -> Daemon:
    """The other of two."""
    return next(each for each in daemons if each is not one)


def is_completed(connection: psycopg.Connection[Any], job_id: UUID) -> bool:
    """Whether the job is."""
    return bool(job(connection, job_id)["status"] == "completed")


def died(pid: int) -> bool:
    """Whether the process is gone."""
    return not lives(pid)


def lock_holders(connection: psycopg.Connection[Any]) -> set[int]:
    """Backends that hold a leader's lock in this database."""
    rows = connection.execute(
        "select l.pid from pg_locks l join pg_database d on d.oid = l.database"
        " where locktype = 'advisory' and granted and d.datname = current_database()"
    )
    return {row[0] for row in rows}


def test_a_leader_whose_host_stands_still_is_succeeded(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """The whole leading family is stopped and keeps its session and the lock: within 10.5 s another marks and pushes. Woken, the
    former leader notices and stands by; every job is done once.
    """
    history = tmp_path / "history"
    daemons = [daemon({"workers": [POOL]}, environ={"TRIAL_HISTORY": str(history)}) for _ in range(2)]
    enqueue_many(connection, 200, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 200}, what="the first jobs")
    wait_until(lambda: ticker(connection, daemons), what="somebody ticks")
    ghost = leader(connection, daemons)
    term = value(connection, "select term from pmqd.leader")
    ghostly = lock_holders(connection)
    assert len(ghostly) == 1
    freeze(ghost)
    frozen = time.monotonic()
    heir = other(ghost, daemons)
    wait_until(
        lambda: value(connection, "select term from pmqd.leader") > term, timeout=20, what="a new term"
    )
    enqueue_many(connection, 200, "nothing")
    wait_until(lambda: "leading, term" in heir.log, what="the other leads")
    taken = time.monotonic() - frozen
    print(f"lead taken over after {taken:.1f} s")  # noqa: T201 - a figure for the docs
    assert taken < LEAD_SECONDS
    assert lock_holders(connection) == ghostly, "the ghost keeps the lock: nobody waits for it"
    wait_until(lambda: statuses(connection) == {"completed": 400}, what="marked, pushed and done")
    assert leader(connection, daemons) is heir
    thaw(ghost)
    wait_until(lambda: "another migrator leads now" in ghost.log, timeout=15, what="the ghost stands by")
    wait_until(
        lambda: lock_holders(connection) and lock_holders(connection).isdisjoint(ghostly),
        what="the lock has a living holder",
    )
    enqueue_many(connection, 200, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 600}, what="all jobs are completed")
    assert max(ends(history).values()) == 1
    settled_once(connection)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ticked", [True, False], ids=["the one that ticked", "another one"])
def test_a_lost_host_costs_its_jobs_at_most_35_seconds(
    ticked: bool,
    daemon: MakeDaemon,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """All processes of a host are killed at once, and nobody starts it again: its jobs run elsewhere within 35 s, uncharged."""
    history = tmp_path / "history"
    daemons = [daemon({"workers": [POOL]}, environ={"TRIAL_HISTORY": str(history)}) for _ in range(2)]
    wait_until(lambda: ticker(connection, daemons), what="somebody ticks")
    lost = ticker(connection, daemons) if ticked else other(ticker(connection, daemons), daemons)
    ids = [enqueue(connection, "nap", seconds=8) for _ in range(4)]
    wait_until(lambda: len(starts(history)) == 4, what="two jobs run on each")
    pids = {child.pid for child in lost.children("worker")}
    held = [mark.job_id for mark in starts(history) if mark.pid in pids]
    assert len(held) == 2
    power_off(lost)
    gone = time.monotonic()
    for job_id in held:
        [again] = wait_until(partial(later_starts, history, job_id, 1), timeout=60, what="the second start")
        print(f"started again {again.at - gone:.1f} s after the loss")  # noqa: T201 - a figure for the docs
        assert 25 < again.at - gone < HOST_SECONDS
    wait_until(lambda: statuses(connection) == {"completed": 4}, timeout=20, what="all completed")
    for job_id in ids:
        row, cut = job(connection, job_id), job_id in held
        assert (row["attempt_count"], row["interruptions"]) == (1, int(cut))
        assert log_statuses(connection, job_id) == ["crashed", "success"][not cut :]
    settled_once(connection)


@pytest.mark.timeout(240)
def test_a_host_that_stood_still_longer_than_its_lease_ends_its_careful_jobs_first(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Both jobs of a frozen host run elsewhere. Woken in the worst order it kills the process of the "abort" queue's job before that job
    gets on, and lets the other finish: its result comes too late. Each is completed once.
    """
    history = tmp_path / "history"
    settings = {"workers": PAIR, "queues": QUEUES}
    environ = {"TRIAL_HISTORY": str(history)}
    with watching(history) as watch:
        frozen = daemon(settings, environ=environ)
        until = time.time() + 55
        careful = enqueue(connection, "nap_until", queue="careful", until=until)
        common = enqueue(connection, "nap_until", until=until)
        wait_until(lambda: len(starts(history)) == 2, what="both run")
        first = {mark.job_id: mark.pid for mark in starts(history)}
        daemon(settings, environ=environ)
        freeze(frozen)
        wait_until(lambda: len(starts(history)) == 4, timeout=60, what="both run elsewhere")
        thaw(frozen, master_last=True)
        woken = time.monotonic()
        wait_until(partial(died, first[careful]), timeout=5, what="the careful one is killed")
        window = watch_died(watch.died, first[careful], wait_until) - woken
        print(f"killed {window * 1000:.0f} ms after the last process was woken")  # noqa: T201 - a figure for the docs
        assert window < 1.0
        assert lives(first[common])
        for job_id in (careful, common):
            wait_until(partial(is_completed, connection, job_id), timeout=90, what="completed")
            assert log_statuses(connection, job_id) == ["crashed", "success"]
        wait_until(lambda: ends(history)[common] == 2, timeout=60, what="the other came to its end twice")
        wait_until(lambda: "was taken from this worker" in frozen.log, what="its result is refused")
    assert ends(history)[careful] == 1
    settled_once(connection)


def watch_died(seen: dict[int, float], pid: int, wait_until: WaitUntil) -> float:
    """When a process was first seen dead."""
    wait_until(lambda: pid in seen, what="the watch has seen it")
    return seen[pid]


@pytest.mark.timeout(180)
def test_careful_jobs_are_killed_when_postgres_does_not_answer_and_no_others(
    daemon: MakeDaemon,
    own_postgres: PostgresServer,
    redis_url: str,
    proxy: MakeProxy,
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """The wire to PostgreSQL is held: 25 to 27 s later the process of the "abort" queue is killed, and nothing else. The wire heals in
    time: the job is given back as interrupted, with the cause, and runs again.
    """
    history, wire = tmp_path / "history", proxy(own_postgres)
    dsn = own_postgres.dsn("pmqd")
    with psycopg.connect(dsn, autocommit=True) as connection, watching(history) as watch:
        running = daemon(
            {
                "workers": PAIR,
                "queues": QUEUES,
                "postgres": {"dsn": wire.dsn(dsn)},
                "redis": {"url": redis_url},
            },
            environ={"TRIAL_HISTORY": str(history)},
        )
        until = time.time() + 36
        careful = enqueue(connection, "nap_until", queue="careful", until=until)
        common = enqueue(connection, "nap_until", until=until)
        wait_until(lambda: len(starts(history)) == 2, what="both run")
        first = {mark.job_id: mark.pid for mark in starts(history)}
        wire.hold()
        held = time.monotonic()
        wait_until(partial(died, first[careful]), timeout=40, what="the careful one is killed")
        after = watch_died(watch.died, first[careful], wait_until) - held
        print(f"killed {after:.1f} s after the wire was held")  # noqa: T201 - a figure for the docs
        assert 23 < after < 28
        assert lives(first[common])
        wire.heal()
        wait_until(partial(later_starts, history, careful, 1), timeout=15, what="the careful one runs again")
        row = job(connection, careful)
        assert "cut off from PostgreSQL" in row["last_error_message"]
        assert (row["attempt_count"], row["interruptions"]) == (1, 1)
        wait_until(partial(is_completed, connection, common), timeout=60, what="the other is completed")
        assert log_statuses(connection, common) == ["success"]
        wait_until(
            partial(is_completed, connection, careful), timeout=60, what="the careful one is completed"
        )
        assert not overlaps(runs(history, careful, watch.died))
        assert 'reason="isolated"} 1.0' in running.get("/metrics").text
        settled_once(connection)


@pytest.mark.timeout(180)
def test_careful_jobs_outlive_an_outage_in_which_postgres_refuses_everybody(
    daemon: MakeDaemon, own_postgres: PostgresServer, redis_url: str, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """PostgreSQL is stopped for 32 s, longer than any lease: nobody can tick, so nothing is killed, and the job ends as if nothing
    had been.
    """
    history, dsn = tmp_path / "history", own_postgres.dsn("pmqd")
    daemon(
        {"workers": PAIR, "queues": QUEUES, "postgres": {"dsn": dsn}, "redis": {"url": redis_url}},
        environ={"TRIAL_HISTORY": str(history)},
    )
    careful = enqueue(dsn, "nap", queue="careful", seconds=36)
    wait_until(partial(starts, history, careful), what="it runs")
    own_postgres.stop("immediate")
    stopped = time.monotonic()
    wait_until(lambda: time.monotonic() - stopped > 32, timeout=40, what="32 seconds")
    assert len(starts(history)) == 1
    own_postgres.start()
    with psycopg.connect(dsn, autocommit=True) as connection:
        wait_until(partial(is_completed, connection, careful), timeout=30, what="completed")
        assert log_statuses(connection, careful) == ["success"]
        assert job(connection, careful)["interruptions"] == 0
    assert len(starts(history)) == 1
