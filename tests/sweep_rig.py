"""What the crash-point sweep stands on: one daemon over two private servers, with points at which it can be made to act.

A *rig* is one instance behind two proxies. Its environment names every crash point with one action (kill, exit or stop)
and a flag file; a test arms a point by making that file, and the one process that acts there takes it away. With `stop`
that process stands exactly there until the test, which has applied a fault meanwhile, lets it go on.
"""

import contextlib
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

import httpx
import psutil
import psycopg
import redis
from prometheus_client.parser import text_string_to_metric_families

from pmqd import folders
from pmqd.crashpoints import POINTS
from pmqd.embedded import PostgresServer, RedisServer
from tests import history
from tests.fix_daemon import Daemon, clean_environ, free_port
from tests.fix_proxy import Proxy
from tests.fix_servers import apply_schema, prefer, wait_until

How = Literal["kill", "exit", "stop"]

QUEUE: Final = "trial"
WORKERS: Final = 2
WHOLE: Final = {"worker": WORKERS, "migrator": 1, "maintenance": 1, "web": 1}
"""The children of a rig's daemon when nothing is wrong."""
EXITS_FORGIVEN: Final = 3
"""Ends with exit code 1 after which the restart delay is set back: a SIGKILL from outside counts as nobody's failing."""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Servers:
    """The private servers of one test process; any pair may kill them, and starts them again."""

    folder: Path
    postgres: PostgresServer
    redis: RedisServer


@contextlib.contextmanager
def own_servers() -> Iterator[Servers]:
    """Both servers; a database `template_sweep` with the schema, from which others are copied."""
    with (
        folders.short_folder() as folder,
        PostgresServer(folder / "pg", prefer=prefer()) as postgres,
        RedisServer(folder / "redis", tcp=True) as broker,
    ):
        apply_schema(postgres.create_database("template_sweep"))
        yield Servers(folder, postgres, broker)


class Rig:
    """One instance, its servers, and the jobs of the pair under test."""

    def __init__(self, servers: Servers, how: How) -> None:
        self.servers, self.how = servers, how
        self.name = f"sweep_{next(_numbers)}"
        self.folder = servers.folder / self.name
        self.points = self.folder / "points"
        self.points.mkdir(parents=True)
        self.history = self.folder / "history"
        self.dsn = servers.postgres.create_database(self.name, "template_sweep")
        self.redis = redis.Redis.from_url(servers.redis.url)
        self.redis.flushall()
        self.connection = self._connect()
        self.connection.execute("create table effects (id uuid)")
        self.wires = Proxy(servers.postgres), Proxy(servers.redis)
        self.ids: list[UUID] = []
        self._exits: Counter[str] = Counter()
        self.lives = 0
        self.daemon = self._start()

    def close(self) -> None:
        """The daemon ends in order, and nothing of it is left."""
        try:
            self.disarm()
            self.daemon.stop()
            self.daemon.check_nothing_left()
        finally:
            self.connection.close()
            self.redis.close()
            for wire in self.wires:
                wire.close()
            self.servers.postgres.drop_database(self.name)

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn, autocommit=True, application_name="sweep")

    # --- the daemon

    def _settings(self) -> dict[str, Any]:
        return {
            "state_dir": str(self.folder / "state"),
            "drain_seconds": 3.0,
            "timeout_grace_seconds": 0.5,
            "postgres": {"dsn": self.wires[0].dsn(self.dsn)},
            "redis": {"url": self.wires[1].url},
            "web": {"listen": f"127.0.0.1:{free_port()}"},
            "log": {"format": "json"},
            "queues": {QUEUE: {"retry_base_seconds": 0.05}},
            "workers": [{"app": "tests.applications.trial:app", "processes": WORKERS}],
        }

    def _start(self) -> Daemon:
        actions = ",".join(f"{name}={self.how}@{self.points / name}" for name in POINTS)
        environ = clean_environ() | {"PMQD_CRASHPOINT": actions, "TRIAL_HISTORY": str(self.history)}
        self.lives += 1
        return Daemon(self.folder, self._settings(), environ).wait_ready(40)

    def start_again(self) -> None:
        """The next life of the instance, on the same `state_dir`, once nobody of the last one lives."""
        self.daemon.process.wait(40)
        self.daemon.check_nothing_left(3.0)
        self.daemon = self._start()

    def replace(self) -> None:
        """After a pair that failed: nothing of it is left to the next one."""
        self.disarm()
        self.servers.postgres.start()
        self.servers.redis.start()
        self.reconnect()
        for process in self.daemon.family():
            process.kill()
        self.daemon.process.wait()
        self.daemon.check_nothing_left(3.0)
        for table in ("jobs", "job_logs", "claims", "instances"):
            self.connection.execute(f"delete from pmqd.{table}")
        self.redis.flushall()
        self.daemon = self._start()

    def children(self, kind: str) -> list[psutil.Process]:
        """The living children of a kind."""
        return [process for process, title in self._family() if title.startswith(f"pmqd: {kind}")]

    def whole(self) -> bool:
        """Is every place of the family filled, once, and the instance ready?"""
        titles = [title for _, title in self._family()]
        counts = {kind: sum(title.startswith(f"pmqd: {kind}") for title in titles) for kind in WHOLE}
        return counts == WHOLE and self._says_ready()

    def _says_ready(self) -> bool:
        try:
            return self.daemon.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def _family(self) -> list[tuple[psutil.Process, str]]:
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.daemon.pid).children():
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append((process, " ".join(process.cmdline())))
        return found

    def halted(self) -> psutil.Process | None:
        """The process of the family that stands at a point."""
        with contextlib.suppress(psutil.Error):
            master = psutil.Process(self.daemon.pid)
            for process in [master, *master.children()]:
                with contextlib.suppress(psutil.Error):
                    if process.status() == psutil.STATUS_STOPPED:
                        return process
        return None

    def exited(self, kind: str) -> None:
        """One of a kind ended with exit code 1; now and then its restart delay is set back, by a death that is nobody's failing."""
        self._exits[kind] += 1
        if self._exits[kind] % EXITS_FORGIVEN == 0 and kind in WHOLE:
            wait_until(self.whole, 40, "the whole family")
            old = {process.pid for process in self.children(kind)}
            for pid in old:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not old & {process.pid for process in self.children(kind)}, 20, "their end")

    # --- the points

    def arm(self, point: str) -> None:
        """The next process that passes there acts."""
        (self.points / point).touch()

    def armed(self, point: str) -> bool:
        """Nobody has passed there."""
        return (self.points / point).exists()

    def disarm(self) -> None:
        """Nobody acts anywhere."""
        for flag in self.points.iterdir():
            flag.unlink(missing_ok=True)
        if process := self.halted():
            process.resume()

    # --- jobs

    def enqueue(self, kind: str, count: int = 1, **payload: Any) -> list[UUID]:
        """Jobs of the pair under test, by plain SQL."""
        made = [history.enqueue(self.connection, kind, **payload) for _ in range(count)]
        self.ids += made
        return made

    def marked(self, count: int) -> None:
        """Jobs that look as if their hints were lost: marked, and in no list."""
        rows = self.connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload, status) select %s, 'nap', '{\"seconds\": 0.05}',"
            " 'migrated_to_redis' from generate_series(1, %s) returning id",
            (QUEUE, count),
        ).fetchall()
        self.ids += [row[0] for row in rows]

    def runs(self, job_id: UUID) -> int:
        """The process that runs a job; 0 where none does."""
        marks = [each for each in history.read(self.history) if each.job_id == job_id]
        return marks[-1].pid if marks and marks[-1].mark == "S" else 0

    # --- the servers

    def reconnect(self) -> None:
        """The test's own look at PostgreSQL, after that was away."""
        self.connection.close()
        self.connection = self._connect()

    def end_backends(self) -> int:
        """Ends every session that the instance's processes have."""
        rows = self.connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name like 'pmqd:%' and datname = current_database()"
        ).fetchall()
        return len(rows)

    # --- counters

    def surplus(self) -> dict[str, float]:
        """What the counters say beyond the audit trail: the same before and after a pair, whoever died in between."""
        rows = dict(
            self.connection.execute("select status, count(*) from pmqd.job_logs group by 1").fetchall()
        )
        logged = {
            "jobs_started": sum(rows.values()),
            "jobs_completed": rows.get("success", 0),
            "rescued": rows.get("crashed", 0),
        }
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.daemon.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] += sample.value  # type: ignore[assignment]  # counts of whole jobs
        return {name: found[f"pmqd_{name}_total"] - number for name, number in logged.items()}
