"""`python -m pmqd.chaos` as people run it: a small proof, on own servers and on somebody's, and how it ends early."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.fix_daemon import clean_environ
from tests.fix_servers import wait_until

SURE = "worker_kill,redis_kill,postgres_terminate,wire_postgres_reset,migrator_kill,wire_redis_reset"
"""Kinds whose windows are open all the time."""

pytestmark = pytest.mark.timeout(400)


class Run:
    """One `python -m pmqd.chaos` with a temporary folder of its own."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.temporary = folder
        self._log = folder / "said"
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pmqd.chaos", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=clean_environ() | {"TMPDIR": str(folder), "COLUMNS": "200"},
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    @property
    def left(self) -> list[str]:
        """What is left of it in its temporary folder."""
        return sorted(path.name for path in self.temporary.iterdir() if path != self._log)

    def end(self, timeout: float = 300.0) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout)


@pytest.fixture
def chaos(short_folder: Path) -> Iterator["MakeRun"]:
    """The function `chaos(*arguments)`: a run that is ended with the test."""
    make = MakeRun(short_folder)
    yield make
    for run in make.runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            run.end()


class MakeRun:
    """What the fixture gives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.runs: list[Run] = []

    def __call__(self, *arguments: str) -> Run:
        """Start one."""
        folder = self._folder / str(len(self.runs))
        folder.mkdir()
        self.runs.append(Run(folder, arguments))
        return self.runs[-1]


def test_a_small_run_holds_and_leaves_nothing(chaos: MakeRun, short_folder: Path) -> None:
    """600 jobs, 6 faults of 6 kinds: exit code 0, the table, the JSON, and no file and no process is left."""
    file = short_folder / "report.json"
    run = chaos("--jobs", "600", "--faults", "6", "--seed", "1", "--only", SURE, "--json", str(file))
    assert run.end() == 0, run.said
    assert "held: every invariant, under every fault (exit code 0)" in run.said
    assert "faults that hit" in run.said
    assert "600/600 acknowledged" in run.said
    told = json.loads(file.read_text())
    assert told["report"]["jobs"] == 600
    assert not any(told["report"]["counts"].values())
    assert {record["kind"] for record in told["faults"]} == set(SURE.split(","))
    assert all(record["hit"] for record in told["faults"])
    assert run.left == []
    assert not mentioning(run.temporary)


def test_a_run_on_somebodys_servers_leaves_them_as_they_were(
    chaos: MakeRun, empty_database: str, redis_url: str
) -> None:
    """Own schemas, roles and keys come and go; what was there stays; faults of the servers are left out and named."""
    with (
        psycopg.connect(empty_database, autocommit=True) as connection,
        redis.Redis.from_url(redis_url) as client,
    ):
        connection.execute("create schema pmqd create table pmqd.mine (n integer)")
        client.set("mine", 1)
        run = chaos(
            *(
                "--jobs",
                "300",
                "--faults",
                "2",
                "--seed",
                "2",
                "--only",
                "worker_kill,wire_redis_reset,redis_flush",
            ),
            *("--postgres", empty_database, "--redis", redis_url),
        )
        assert run.end() == 0, run.said
        assert "left out" in run.said
        schemas = connection.execute("select nspname from pg_namespace where nspname like 'pmqd%'").fetchall()
        roles = connection.execute("select rolname from pg_roles where rolname like 'pmqd_chaos%'").fetchall()
        assert (schemas, roles) == ([("pmqd",)], [])
        assert client.keys("*") == [b"mine"]
    assert run.left == []


def test_a_run_refuses_to_work_where_another_one_does(
    chaos: MakeRun, empty_database: str, redis_url: str
) -> None:
    """A schema or keys of another run are not touched: one line, nothing proved."""
    where = ("--jobs", "10", "--faults", "0", "--postgres", empty_database, "--redis", redis_url)
    with (
        psycopg.connect(empty_database, autocommit=True) as connection,
        redis.Redis.from_url(redis_url) as client,
    ):
        client.set("pmqd_chaos_run:pmqd:epoch", "1")
        run = chaos(*where)
        assert run.end() == 2
        assert "keys that begin with pmqd_chaos_run:" in run.said
        client.flushall()
        connection.execute("create schema pmqd_chaos")
        run = chaos(*where)
        assert run.end() == 2
        assert "the schema pmqd_chaos exists" in run.said
        assert connection.execute("select 1 from pg_namespace where nspname = 'pmqd_chaos'").fetchone()
    assert run.left == []


def test_a_server_that_does_not_answer_is_named_without_its_password(chaos: MakeRun, redis_url: str) -> None:
    """Exit code 69, the address, and no secret."""
    run = chaos("--postgres", "postgresql://me:hunter2@127.0.0.1:9/app", "--redis", redis_url)
    assert run.end() == 69
    assert "127.0.0.1" in run.said
    assert "hunter2" not in run.said


def test_ctrl_c_in_the_middle_ends_everything(chaos: MakeRun) -> None:
    """SIGINT under load: exit code 130 within seconds, no process, no file."""
    run = chaos("--jobs", "100000", "--faults", "50", "--seed", "3")
    wait_until(lambda: "load   " in run.said, 120, "the load has begun")
    [folder] = run.temporary.glob("pmqd-chaos-3-*")
    wait_until((folder / "history" / "handlers").exists, 60, "jobs run")
    run.process.send_signal(signal.SIGINT)
    assert run.end(90) == 130
    assert "stopped" in run.said
    assert run.left == []
    assert not mentioning(run.temporary)


def test_a_killed_run_leaves_no_process(chaos: MakeRun) -> None:
    """SIGKILL to the run itself: hosts, servers, wires and producers end with it."""
    run = chaos("--jobs", "100000", "--faults", "0", "--seed", "4")
    wait_until(lambda: "load   " in run.said, 120, "the load has begun")
    assert mentioning(run.temporary)
    run.process.kill()
    run.end()
    wait_until(lambda: not mentioning(run.temporary), 20, "all processes are gone")


def mentioning(folder: Path) -> list[str]:
    """Processes that have the folder in their environment or command line: all that a run starts."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("TMPDIR", "")]
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found += [f"{process.pid} {words}"] if any(str(folder) in word for word in words) else []
    return found
