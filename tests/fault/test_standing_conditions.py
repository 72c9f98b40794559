"""What must be put right even when nobody was told of it: the message is lost, late, or its sender is dead."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis

from pmqd.embedded import PostgresServer
from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import ends, enqueue, job, log_statuses, settled_once, starts, statuses
from tests.hosts import held_still, later_starts, overlaps, runs, thaw, value, watching
from tests.processes import lives

POOL = {"app": "tests.applications.trial:app", "processes": 2}
PAIR = [
    {**POOL, "name": "careful", "queues": ["careful"], "processes": 1},
    {**POOL, "name": "trial", "queues": ["trial"], "processes": 1},
]
LEASE_SECONDS = 31


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if lives(pid):
            os.kill(pid, signal.SIGCONT)


def is_completed(connection: psycopg.Connection[Any], job_id: UUID) -> bool:
    """Whether the job is."""
    return bool(job(connection, job_id)["status"] == "completed")


def waits_for_a_lock(connection: psycopg.Connection[Any], pid: int) -> bool:
    """Whether a backend does."""
    found = connection.execute(
        "select wait_event_type from pg_stat_activity where pid = %s", [pid]
    ).fetchone()
    return bool(found and found[0] == "Lock")


CLAIMS_SEEN = """
create table claims_seen (job_id uuid, worker_id text);
create function note_claim() returns trigger language plpgsql security definer as $$
  begin insert into public.claims_seen values (new.id, new.worker_id); return null; end $$;
create trigger note_claim after update on pmqd.jobs for each row
  when (new.status = 'running' and old.status <> 'running') execute function note_claim();
"""


def test_a_claim_that_commits_after_its_worker_was_reaped_is_given_back(
    daemon: MakeDaemon, own_postgres: PostgresServer, redis_url: str, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """The claim lies in a stopped backend while its worker is killed, reaped and rescued; then it commits. The job is given back as
    never started, and runs once.
    """
    history, dsn = tmp_path / "history", own_postgres.dsn("pmqd")
    with (
        psycopg.connect(dsn, autocommit=True) as connection,
        psycopg.connect(dsn) as holder,
        redis.Redis.from_url(redis_url) as client,
    ):
        connection.execute(CLAIMS_SEEN)
        running = daemon(
            {"workers": [{**POOL, "processes": 1}], "postgres": {"dsn": dsn}, "redis": {"url": redis_url}},
            environ={"TRIAL_HISTORY": str(history)},
        )
        first = enqueue(connection, "nothing")
        wait_until(partial(is_completed, connection, first), what="the worker's connection is open")
        worker = running.children("worker")[0].pid
        worker_id = job(connection, first)["worker_id"]
        [backend] = [
            row[0]
            for row in connection.execute(
                "select pid from pg_stat_activity where application_name = 'pmqd:worker'"
            )
        ]
        migrator = running.children("migrator")[0].pid
        with stopped(backend):
            late = enqueue(connection, "nothing")
            wait_until(
                lambda: (
                    job(connection, late)["status"] == "migrated_to_redis" and not client.llen("queue:trial")
                ),
                what="the hint is in the worker's hands",
            )
            time.sleep(0.2)  # the claim follows within milliseconds; that it did is seen below
            os.kill(migrator, signal.SIGSTOP)
            holder.execute("select from pmqd.jobs where id = %s for update", [late])
            os.kill(worker, signal.SIGKILL)
            wait_until(
                lambda: "waits for its rescue" not in running.log and _has_successor(running, worker),
                what="the dead worker is reaped and replaced",
            )
            before = value(connection, "select tick from pmqd.ticker")
            wait_until(
                lambda: value(connection, "select tick from pmqd.ticker") > before + 1,
                what="maintenance looked twice",
            )
        wait_until(partial(waits_for_a_lock, connection, backend), what="the claim is executed after all")
        holder.commit()
        wait_until(partial(is_completed, connection, late), timeout=15, what="the job is completed")
        os.kill(migrator, signal.SIGCONT)
        claims = connection.execute("select worker_id from claims_seen where job_id = %s", [late]).fetchall()
        assert claims[0] == (worker_id,), "the dead worker's claim came first"
        assert len(claims) == 2
        assert (job(connection, late)["attempt_count"], job(connection, late)["interruptions"]) == (1, 0)
        assert log_statuses(connection, late) == ["success"]
        wait_until(
            lambda: value(connection, "select count(*) from pmqd.claims") == 0, what="no claim is left"
        )
    assert len(starts(history, late)) == 1


def _has_successor(running: Daemon, old: int) -> bool:
    return any(child.pid != old for child in running.children("worker"))


@pytest.mark.parametrize("how", ["stopped", "killed again and again"])
def test_a_worker_dies_while_maintenance_is_dead(
    how: str,
    daemon: MakeDaemon,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """Nobody hears of the death: maintenance stands still, or dies each time before it has come far. The first that lives
    gives the job back.
    """
    history = tmp_path / "history"
    running = daemon({"workers": [POOL]}, environ={"TRIAL_HISTORY": str(history)})
    job_id = enqueue(connection, "nap", seconds=3)
    first = wait_until(partial(starts, history, job_id), what="the first start")[0]
    keeper = running.children("maintenance")[0].pid
    if how == "stopped":
        os.kill(keeper, signal.SIGSTOP)
    else:
        os.kill(keeper, signal.SIGKILL)
    os.kill(first.pid, signal.SIGKILL)
    _keep_dead(running, keeper, seconds=3.0, kill=how != "stopped")
    assert job(connection, job_id)["status"] == "running", "nobody has given it back yet"
    if how == "stopped":
        os.kill(keeper, signal.SIGKILL)
    released = time.monotonic()
    again = wait_until(partial(later_starts, history, job_id, 1), timeout=40, what="the second start")[0]
    # A service that died several times in a row waits a little longer each time.
    assert again.at - released < (2.0 if how == "stopped" else 35.0)
    wait_until(partial(is_completed, connection, job_id), what="completed")
    assert log_statuses(connection, job_id) == ["crashed", "success"]
    settled_once(connection)


def _keep_dead(running: Daemon, stopped_pid: int, seconds: float, *, kill: bool) -> None:
    """For so long no maintenance works."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for child in running.children("maintenance") if kill else ():
            try:
                os.kill(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.005)
    assert kill or lives(stopped_pid)


@pytest.mark.timeout(180)
def test_a_master_is_stopped_for_longer_than_the_lease(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """A master that stands still for 50 s: its children go on, its lease runs out 46 s after the stop, another instance runs its jobs; one
    result of each counts, and afterwards the instance goes on under a new identity. The job of an "abort" queue is killed before that by
    another child.
    """
    history = tmp_path / "history"
    environ = {"TRIAL_HISTORY": str(history)}
    settings = {"workers": PAIR, "queues": {"careful": {"isolation": "abort"}}}
    one = daemon(settings, environ=environ)
    until = time.time() + 70
    long = enqueue(connection, "nap_until", until=until)
    careful = enqueue(connection, "nap_until", queue="careful", until=until)
    wait_until(lambda: len(starts(history)) == 2, what="both run on the first")
    two = daemon(settings, environ=environ)
    stop_at = time.monotonic()
    with stopped(one.pid), watching(history) as watch:
        time.sleep(LEASE_SECONDS + 2)
        assert len(starts(history, long)) == 1, "maintenance renewed the lease for 15 s: it is not over yet"
        again = wait_until(partial(later_starts, history, long, 1), timeout=30, what="rescued elsewhere")[0]
        assert again.pid in {child.pid for child in two.children("worker")}
        assert 15 + LEASE_SECONDS - 3 < again.at - stop_at < 15 + LEASE_SECONDS + 5
        wait_until(partial(later_starts, history, careful, 1), what="the careful one elsewhere")
        assert not overlaps(runs(history, careful, watch.died))
        killed = watch.died[starts(history, careful)[0].pid] - stop_at
        assert 15 + 24 < killed < 15 + 29, "by another child, a second after the master should have"
    for each in (long, careful):
        wait_until(partial(is_completed, connection, each), timeout=90, what="completed")
    assert 'reason="isolated"} 1.0' in one.get("/metrics").text
    assert log_statuses(connection, long) == ["crashed", "success"]
    row = job(connection, long)
    assert (row["attempt_count"], row["interruptions"]) == (1, 1)
    wait_until(lambda: "going on as instance" in one.log, what="a new identity")
    wait_until(lambda: ends(history)[long] == 2, timeout=70, what="the first run has come to its end, too")
    wait_until(lambda: "was taken from this worker" in one.log, what="its result is refused")
    two.stop()
    last = enqueue(connection, "nothing")
    wait_until(partial(is_completed, connection, last), what="the first instance works on")
    settled_once(connection)


def test_a_worker_that_stands_still_in_a_transaction_holds_its_locks_for_seconds(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], database: str, wait_until: WaitUntil
) -> None:
    """Frozen between two messages of one transaction, before its end: PostgreSQL takes such a session for busy, and waits for ever. Its
    locks would keep everybody else from claiming.
    """
    running = daemon({"workers": [POOL]})
    with closing(psycopg.connect(database, autocommit=True, application_name="pmqd:worker")) as frozen:
        frozen.pgconn.enter_pipeline_mode()
        for statement in (
            b"begin",
            b"lock table pmqd.claims",
        ):  # as a worker settles: one transaction, one pipeline
            frozen.pgconn.send_query_params(statement, [])
        frozen.pgconn.send_flush_request()
        frozen.pgconn.flush()
        backend = frozen.info.backend_pid
        held = f"select count(*) from pg_locks where pid = {backend} and mode = 'AccessExclusiveLock' and granted"
        wait_until(lambda: value(connection, held) == 1, what="the lock")
        seen = f"select state || ', ' || wait_event from pg_stat_activity where pid = {backend}"
        assert value(connection, seen) == "active, ClientRead", "not taken for idle in a transaction"
        job_id = enqueue(connection, "nothing")
        wait_until(partial(is_completed, connection, job_id), timeout=25, what="somebody claims again")
        wait_until(lambda: "stopped in a transaction" in running.log, what="it is told")
    assert "terminating connection" not in running.log, "nobody else's session was ended"


def test_an_instance_restarted_while_its_old_family_still_dies(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Children that cannot act on their master's death (held still as by a debugger) keep the lock of `state_dir`: the next master ends
    them, and gives back at once what the family held.
    """
    history = tmp_path / "history"
    settings = {"workers": [POOL], "state_dir": str(tmp_path / "state")}
    environ = {"TRIAL_HISTORY": str(history)}
    with watching(history) as watch, ExitStack() as stack:
        old = daemon(settings, environ=environ)
        job_id = enqueue(connection, "nap", seconds=4)
        wait_until(partial(starts, history, job_id), what="the first start")
        # Not by SIGSTOP: the kernel wakes stopped children of a parent that dies. All of them: any that lives kills the others.
        for child in old.family():
            if child.pid != old.pid:
                stack.enter_context(held_still(child.pid))
        old.kill()
        wait_until(lambda: not old.children("worker"), what="the kernel ended the workers")
        assert len(old.family()) == 3, "the others stand still, with the lock"
        new = daemon(settings, environ=environ, wait=False)
        wait_until(lambda: not old.family(), timeout=15, what="the new master has ended the old family")
        new.wait_ready()
        ready = time.monotonic()
        again = wait_until(partial(later_starts, history, job_id, 1), what="the second start")[0]
        wait_until(partial(is_completed, connection, job_id), what="completed")
        [(_, first_end), (second_start, _)] = runs(history, job_id, watch.died)
    assert first_end <= second_start
    assert again.at - ready < 5
    assert "is left of a family without a master" in new.log
    assert (job(connection, job_id)["attempt_count"], job(connection, job_id)["interruptions"]) == (1, 1)
    assert log_statuses(connection, job_id) == ["crashed", "success"]


def test_a_second_instance_is_refused_while_the_first_lives(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """A master that merely stands still is not dead: whoever comes with its `state_dir` is refused and kills nobody."""
    settings = {"workers": [POOL], "state_dir": str(tmp_path / "state")}
    first = daemon(settings)
    with stopped(first.pid):
        second = daemon(settings, wait=False)
        assert second.process.wait(20) == 78
        assert "another pmqd runs with it" in second.log
        assert len(first.children("worker")) == 2
    thaw(first)
    done = enqueue(connection, "nothing")
    wait_until(partial(is_completed, connection, done), what="the first works on")
    assert statuses(connection) == {"completed": 1}
