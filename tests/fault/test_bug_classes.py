"""Eleven kinds of bugs that other job queues had, each with the least that shows it: against real servers and processes.

The numbers and names are those of the catalogue in docs/decisions; where a bug needs an instant, a barrier makes it.
"""

import multiprocessing
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import psycopg
import pytest
import redis

from pmqd.arena import Arena, Kind
from pmqd.embedded import PostgresServer
from pmqd.job import Action
from pmqd.process import Inheritance, enter
from pmqd.store import Fate
from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import ends, enqueue, job, log_statuses, settled_once, starts
from tests.processes import zombies
from tests.store_tools import WORKER, Bench, outcome

ONE = {"app": "tests.applications.trial:app", "processes": 1}
STUBBORN = {"app": "tests.applications.stubborn:app", "processes": 1}


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """Where the applications write down what they start and end."""
    return tmp_path / "history"


def is_over(connection: psycopg.Connection[Any], job_id: UUID, status: str = "completed") -> bool:
    """Whether a job has this status."""
    return bool(job(connection, job_id)["status"] == status)


def run_once(history: Path, job_id: UUID) -> None:
    """The job was started once and came to its end once, by what was recorded outside both stores."""
    assert len(starts(history, job_id)) == 1
    assert ends(history)[job_id] == 1


def test_1_stale_snapshot_rescue(
    bench: Bench, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """A rescue that has chosen a job, and waits for its row while the owner's settle commits, changes nothing."""
    claimed, rescued = bench.running(), []
    settler = bench.another()
    rescuer = bench.another()

    def rescue() -> None:
        rescued.extend(
            rescuer.rescue(WORKER, fates={claimed.id: Fate.CHARGED}, default=Fate.CHARGED, cause="late")
        )

    thread = threading.Thread(target=rescue)
    with settler.connection.transaction():
        assert settler.settle_on(settler.connection, outcome(claimed, Action.COMPLETE, result=b"1"), ())
        thread.start()
        blocked = (
            "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        wait_until(lambda: connection.execute(blocked).fetchone(), 15, "the rescue waits for the row")
    thread.join(10)
    assert not thread.is_alive()
    assert rescued == []
    row = bench.row(claimed.id)
    assert (row["status"], row["result"], row["attempt_count"]) == ("completed", 1, 1)
    assert [log["status"] for log in bench.logs(claimed.id)] == ["success"]


def test_2_completion_without_ownership(bench: Bench) -> None:
    """The zombie of the first attempt settles nothing of the second, in whatever way it ends."""
    first = bench.running()
    bench.store.rescue(WORKER, fates={}, default=Fate.INTERRUPTED, cause="thought dead")
    [second] = bench.claim([first.id], worker_id="host:12345678:w1.1")
    assert second.token != first.token
    for action in (
        Action.COMPLETE,
        Action.RETRY,
        Action.FAIL,
        Action.RELEASE,
        Action.INTERRUPT,
        Action.SNOOZE,
    ):
        assert bench.store.settle([outcome(first, action)], ()) == {}
    row = bench.row(first.id)
    assert (row["status"], row["claim_token"]) == ("running", second.token)
    assert bench.store.settle([outcome(second, Action.COMPLETE, worker_id="host:12345678:w1.1")], ()) == {
        first.id: "completed"
    }


def test_3_liveness_in_the_volatile_store(
    daemon: MakeDaemon,
    connection: psycopg.Connection[Any],
    redis_url: str,
    history: Path,
    wait_until: WaitUntil,
) -> None:
    """Redis forgets everything, twice, while jobs run: none of them looks orphaned, none runs again."""
    daemon({"workers": [{**ONE, "concurrency": 4}]}, environ={"TRIAL_HISTORY": str(history)})
    ids = [enqueue(connection, "nap", seconds=3.5) for _ in range(4)]
    wait_until(lambda: len(starts(history)) == 4, 15, "all run")
    for _ in range(2):
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        later = enqueue(connection, "nothing")
        ids.append(later)
    for job_id in ids:
        wait_until(partial(is_over, connection, job_id), 20, f"the end of {job_id}")
        run_once(history, job_id)
        assert log_statuses(connection, job_id) == ["success"]


def test_4_liveness_proved_by_the_busy(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], history: Path, wait_until: WaitUntil
) -> None:
    """A job that holds the interpreter for seconds stops every thread of its process: the lease is renewed all the same, by
    somebody else, and the job is left alone.
    """
    running = daemon({"workers": [STUBBORN]}, environ={"TRIAL_HISTORY": str(history)})
    [worker] = running.children("worker")
    tick = "select t.tick - i.lease_tick, t.tick from pmqd.instances i, pmqd.ticker t"
    busy = enqueue(connection, "holds", seconds=4.0)
    wait_until(lambda: starts(history, busy), 15, "it runs")
    first = connection.execute(tick).fetchone()
    assert first is not None
    wait_until(
        lambda: (connection.execute(tick).fetchone() or (0, 0))[1] >= first[1] + 2, 15, "the clock goes on"
    )
    late = connection.execute(tick).fetchone()
    assert late is not None
    assert not ends(history)
    assert late[0] <= 3, "the lease is not renewed while a worker is busy"
    wait_until(partial(is_over, connection, busy), 20, "its end")
    run_once(history, busy)
    assert worker.is_running()
    assert job(connection, busy)["interruptions"] == 0


def test_5_identity_reuse(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], history: Path, wait_until: WaitUntil
) -> None:
    """A daemon comes back on the same host with the same name, folder and configuration: it is another instance with other
    workers, and what the old one held does not look alive.
    """
    settings: dict[str, Any] = {"workers": [ONE], "timeout_grace_seconds": 0.5}
    old = daemon(settings, environ={"TRIAL_HISTORY": str(history)})
    held = enqueue(connection, "nap", seconds=2.0)
    wait_until(lambda: starts(history, held), 15, "it runs")
    before = job(connection, held)
    old.kill()
    old.check_nothing_left()
    daemon({**old.settings, **settings}, environ={"TRIAL_HISTORY": str(history)})
    # Long before a lease could run out: the lock of the folder proved that the old family is gone.
    wait_until(lambda: len(starts(history, held)) == 2, 15, "it runs again")
    wait_until(partial(is_over, connection, held), 15, "its end")
    after = job(connection, held)
    assert after["worker_id"] != before["worker_id"]
    assert after["claim_token"] != before["claim_token"]
    assert after["worker_id"].split(":")[0] == before["worker_id"].split(":")[0], "the same host"
    known = connection.execute("select count(distinct id) from pmqd.instances").fetchone()
    assert known == (1,)


def test_6_outage_counted_as_death(
    daemon: MakeDaemon, own_postgres: PostgresServer, history: Path, wait_until: WaitUntil
) -> None:
    """PostgreSQL is away while a job runs and heartbeats cannot be written: nobody is taken for dead when it is back."""
    dsn = own_postgres.dsn("pmqd")
    running = daemon({"postgres": {"dsn": dsn}, "workers": [ONE]}, environ={"TRIAL_HISTORY": str(history)})
    held = enqueue(dsn, "nap", seconds=3.0)
    wait_until(lambda: starts(history, held), 15, "it runs")
    workers = {process.pid for process in running.children("worker")}
    own_postgres.kill()
    wait_until(lambda: ends(history)[held], 15, "it ends while nobody can be told")
    own_postgres.start()
    with psycopg.connect(dsn, autocommit=True) as looking:
        wait_until(partial(is_over, looking, held), 20, "its settle")
        run_once(history, held)
        assert job(looking, held)["interruptions"] == 0
        assert log_statuses(looking, held) == ["success"]
        rescued = looking.execute("select count(*) from pmqd.job_logs where status = 'crashed'").fetchone()
        assert rescued == (0,)
    assert {process.pid for process in running.children("worker")} == workers


def test_7_attempt_charged_at_the_end(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], history: Path, wait_until: WaitUntil
) -> None:
    """A job that ends its process runs as often as it has attempts, and fails: it does not go round for ever."""
    daemon({"workers": [ONE]}, environ={"TRIAL_HISTORY": str(history)})
    deadly = enqueue(connection, "os_exit", attempts=2)
    wait_until(partial(is_over, connection, deadly, "failed"), 30, "the end")
    assert [mark.attempt for mark in starts(history, deadly)] == [1, 2]
    assert job(connection, deadly)["attempt_count"] == 2
    assert log_statuses(connection, deadly).count("crashed") == 2
    honest = enqueue(connection, "nothing")
    wait_until(partial(is_over, connection, honest), 15, "the next job")
    assert len(starts(history, deadly)) == 2


def test_8_consumer_loop_ends_on_one_error(
    daemon: MakeDaemon,
    connection: psycopg.Connection[Any],
    redis_url: str,
    history: Path,
    wait_until: WaitUntil,
) -> None:
    """Each connection is cut, a blocked pop is ended by force, PostgreSQL ends each session: the same workers consume on."""
    running = daemon({"workers": [ONE]}, environ={"TRIAL_HISTORY": str(history)})
    workers = {process.pid for process in running.children("worker")}
    with redis.Redis.from_url(redis_url) as client:
        for number in range(4):
            for found in client.client_list():
                if found["name"].startswith("pmqd"):
                    if number % 2:
                        client.client_unblock(found["id"], error=True)
                    else:
                        client.client_kill_filter(_id=found["id"])
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pmqd:%'"
                " and datname = current_database()"
            )
            after = enqueue(connection, "nothing")
            wait_until(partial(is_over, connection, after), 20, f"a job after round {number}")
            run_once(history, after)
    assert {process.pid for process in running.children("worker")} == workers
    assert not [record for record in running.records if "did not expect" in record["message"]]


def test_9_replacement_hangs_before_boot(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """A worker's replacement hangs in its imports: it is killed at the end of `boot_seconds`, and tried again until one boots."""
    gate = tmp_path / "gate"
    running = daemon({"boot_seconds": 4.0, "workers": [STUBBORN]}, environ={"STUBBORN_GATE": str(gate)})
    [worker] = running.children("worker")
    gate.touch()
    worker.send_signal(signal.SIGKILL)
    wait_until(lambda: "did not become ready within" in running.log, 30, "the one that hangs is killed")
    gate.unlink()
    waiting = enqueue(connection, "holds", seconds=0.0)
    wait_until(partial(is_over, connection, waiting), 30, "one that boots runs the job")


def test_10_term_between_fork_and_handler() -> None:
    """SIGTERM sent to a child between its fork and its first handler: blocked till then, heard then, not lost."""
    fork = multiprocessing.get_context("fork")
    arena = Arena.create(1, entries=1)
    slot = arena.slots[0]
    slot.open("maintenance", "host:12345678:w0.1")
    death_read, death_write = os.pipe()
    go_read, go_write = os.pipe()
    told_read, told_write = os.pipe()

    def child() -> None:
        os.read(go_read, 1)  # the signal has been sent
        inherited = Inheritance(
            master_pid=os.getppid(), title="pmqd: test", death_read=death_read, family_mark="host:12345678:",
            keep=frozenset({death_read, told_write, *arena.bells}), forget=lambda: None, mask=set(),
        )  # fmt: skip
        os.close(death_write)
        stop = enter(Kind.MAINTENANCE, slot, arena, inherited)
        os.write(told_write, b"1" if stop.wait(5.0) else b"0")
        os._exit(0)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        process = fork.Process(target=child)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    os.write(go_write, b"x")
    assert os.read(told_read, 1) == b"1"
    process.join(10)
    assert process.exitcode == 0
    for fd in (death_read, death_write, go_read, go_write, told_read, told_write):
        os.close(fd)


def has_grown_to(running: Daemon, number: int) -> bool:
    """Whether a family has so many processes (or all), and a master that has its handlers."""
    started = "pmqd starts" in running.log
    return started and (len(running.family()) >= number or "ready:" in running.log)


def test_10_term_at_any_moment_of_the_start(daemon: MakeDaemon, wait_until: WaitUntil) -> None:
    """SIGTERM the moment the first, third or fifth process of the family is there: the daemon ends with 0, soon, with all."""
    for number in (1, 3, 5):
        running = daemon(wait=False)
        wait_until(partial(has_grown_to, running, number), 20, f"{number} processes")
        running.signal(signal.SIGTERM)
        assert running.process.wait(25) == 0, running.log[-2000:]
        running.check_nothing_left()


def test_11_waitpid_reaps_strangers(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], history: Path, wait_until: WaitUntil
) -> None:
    """Nobody but a job takes the ends of the programs it started; what their parents left behind the master reaps, as no child of
    its own.
    """
    running = daemon({"workers": [STUBBORN]}, environ={"TRIAL_HISTORY": str(history)})
    workers = {process.pid for process in running.children("worker")}
    asks = enqueue(connection, "exits", times=20)
    wait_until(partial(is_over, connection, asks), 30, "its end")
    assert job(connection, asks)["result"] == [7] * 20
    run_once(history, asks)
    wait_until(
        lambda: not zombies(psutil.Process(running.pid).children()),
        10,
        "no zombie is left",
    )
    assert {process.pid for process in running.children("worker")} == workers
    settled_once(connection)
