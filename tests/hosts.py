"""Several instances on the same stores, as on several hosts: on this machine, and in network namespaces that can be cut off."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from pmqd.embedded import PostgresServer, RedisServer
from tests.fix_daemon import Daemon, clean_environ
from tests.fix_servers import apply_schema, prefer, wait_until
from tests.history import Mark, read
from tests.processes import lives

TICKS = "select tick from pmqd.ticker"


# --- a whole host at once


def freeze(running: Daemon) -> None:
    """SIGSTOP to the whole family, the master first, so that it cannot react to the others."""
    _signal_family(running, signal.SIGSTOP)


def thaw(running: Daemon, *, master_last: bool = False) -> None:
    """SIGCONT to the whole family; with `master_last` the worst order for whoever must be stopped by it."""
    _signal_family(running, signal.SIGCONT, master_last=master_last)


def power_off(running: Daemon) -> None:
    """SIGKILL to all processes of the host, with nobody left to say anything."""
    freeze(running)  # so that nobody sees another die
    _signal_family(running, signal.SIGKILL)
    running.process.wait()


def _signal_family(running: Daemon, number: int, *, master_last: bool = False) -> None:
    for process in sorted(running.family(), key=lambda each: (each.pid != running.pid) != master_last):
        with_suppressed(partial(os.kill, process.pid, number))


def with_suppressed(act: Callable[[], None]) -> None:
    """Do something to a process that may be gone."""
    try:
        act()
    except ProcessLookupError:
        pass


@contextmanager
def held_still(pid: int) -> Iterator[None]:
    """All threads of a process stand still, as under a debugger: no signal but SIGKILL gets through, not even SIGCONT."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    seize, interrupt, detach, wall = 0x4206, 0x4207, 17, 0x40000000
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    for thread in threads:
        if ptrace(seize, thread, None, None) or ptrace(interrupt, thread, None, None):
            pytest.skip(f"no right to hold a process still: {os.strerror(ctypes.get_errno())}")
        os.waitpid(thread, wall)
    try:
        yield
    finally:
        for thread in threads:
            ptrace(detach, thread, None, None)


# --- who runs a job, and until when


@dataclass
class Watch:
    """Sees processes die, from a thread: `died[pid]` is the monotonic second at which one was first seen dead."""

    history: Path
    died: dict[int, float] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Look 50 times a second at all pids of the history."""
        known: set[int] = set()
        while not self._over.wait(0.02):
            known |= {mark.pid for mark in read(self.history)}
            for pid in known - self.died.keys():
                if not lives(pid):
                    self.died[pid] = time.monotonic()

    def stop(self) -> None:
        """No more looks."""
        self._over.set()


@contextmanager
def watching(history: Path) -> Iterator[Watch]:
    """A watch over all processes that a history names."""
    watch = Watch(history)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()


def runs(history: Path, job_id: UUID, died: Mapping[int, float]) -> list[tuple[float, float]]:
    """From when to when a job ran, each time; a run that has neither ended nor died lasts until now."""
    marks = [mark for mark in read(history) if mark.job_id == job_id]
    found = []
    for start in (mark for mark in marks if mark.mark == "S"):
        later = [m.at for m in marks if m.mark == "E" and m.pid == start.pid and m.at >= start.at]
        end = min([*later, died.get(start.pid, float("inf")), time.monotonic()])
        found.append((start.at, end))
    return sorted(found)


def overlaps(spans: Sequence[tuple[float, float]]) -> bool:
    """Whether a job ran twice at once."""
    return any(begin < end for (_, end), (begin, _) in pairwise(spans))


def later_starts(history: Path, job_id: UUID, count: int) -> list[Mark]:
    """The starts of a job after its first `count`."""
    return [mark for mark in read(history) if mark.mark == "S" and mark.job_id == job_id][count:]


def value(connection: psycopg.Connection[Any], query: str) -> Any:
    """The one value of a query."""
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


# --- network namespaces


def why_no_namespaces() -> str:
    """Why no network can be made here; empty where it can."""
    name = f"pmqd-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "probe", "type", "bridge")
            _inside(name, "true")
        finally:
            _ip("netns", "del", name)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed (packages iproute2 and util-linux)"
    except subprocess.CalledProcessError as error:
        return f"no right to make network namespaces: {error.stderr.decode().strip()}"
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _inside(name: str, *command: str) -> None:
    subprocess.run([*inside(name), *command], check=True, capture_output=True)


def inside(name: str) -> list[str]:
    """The command in front of another that runs it in a namespace; the process keeps its pid."""
    return ["nsenter", f"--net=/run/netns/{name}", "--"]


class _Postgres(PostgresServer):
    """A PostgreSQL server whose TCP side is in a namespace; its Unix socket is reached from everywhere."""

    namespace = ""

    def _command(self) -> list[str]:
        return [*inside(self.namespace), *super()._command()]


class _Redis(RedisServer):
    """The same for Redis."""

    namespace = ""

    def _command(self) -> list[str]:
        return [*inside(self.namespace), *super()._command()]


class Wire:
    """One host's cable to one store."""

    def __init__(self, hub: str, port: str) -> None:
        self._hub, self._port = hub, port

    def cut(self) -> None:
        """From now on nothing passes, and nobody is told."""
        _ip("-n", self._hub, "link", "set", self._port, "down")

    def heal(self) -> None:
        """Everything passes again."""
        _ip("-n", self._hub, "link", "set", self._port, "up")


@dataclass
class Host:
    """A namespace with one cable to each store, and the daemon in it."""

    name: str
    namespace: str
    postgres: Wire
    redis: Wire
    daemon: Daemon | None = None

    @property
    def running(self) -> Daemon:
        """The daemon, which was started."""
        assert self.daemon is not None
        return self.daemon

    def cut(self) -> None:
        """No store is reached any more."""
        self.postgres.cut()
        self.redis.cut()

    def heal(self) -> None:
        """Both are."""
        self.postgres.heal()
        self.redis.heal()


POSTGRES_IP, REDIS_IP = "10.77.1.1", "10.77.2.1"


class Network:
    """A namespace with both stores, and hosts around it: two cables each, one to PostgreSQL and one to Redis."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub = f"pmqd-{os.getpid()}-{folder.name[-6:]}"
        self.hosts: list[Host] = []
        self._stack = ExitStack()
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise

    def _build(self) -> None:
        folder = self.folder
        self._namespace(self.hub)
        for bridge, address in (("stores-p", POSTGRES_IP), ("stores-r", REDIS_IP)):
            _ip("-n", self.hub, "link", "add", bridge, "type", "bridge")
            _ip("-n", self.hub, "addr", "add", f"{address}/24", "dev", bridge)
            _ip("-n", self.hub, "link", "set", bridge, "up")
        self.postgres = _Postgres(
            folder / "pg",
            prefer=prefer(),
            settings={"listen_addresses": POSTGRES_IP, "hba_file": str(_hba(folder))},
        )
        self.redis = _Redis(
            folder / "redis", settings={"bind": REDIS_IP, "port": "6379", "protected-mode": "no"}
        )
        self.postgres.namespace = self.redis.namespace = self.hub
        self._stack.enter_context(self.postgres)
        self._stack.enter_context(self.redis)
        self.dsn = self.postgres.create_database("pmqd")
        """The database as the test reaches it, whatever is cut."""
        apply_schema(self.dsn)

    def _namespace(self, name: str) -> str:
        _ip("netns", "add", name)
        self._stack.callback(_ip, "netns", "del", name)
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def host(self, settings: Mapping[str, Any], environ: Mapping[str, str]) -> Host:
        """Adds a host and starts a daemon on it.

        Args:
            settings: of the daemon, over what every host of this network has.
            environ: further variables.
        """
        number = len(self.hosts)
        namespace = self._namespace(f"{self.hub}-{number}")
        postgres, redis = (
            self._cable(number, namespace, net, bridge) for net, bridge in ((1, "stores-p"), (2, "stores-r"))
        )
        host = Host("abc"[number], namespace, postgres, redis)
        self.hosts.append(host)
        folder = self.folder / host.name
        folder.mkdir()
        base = {
            "state_dir": str(folder / "state"),
            "drain_seconds": 5.0,
            "postgres": {"dsn": f"postgresql://postgres@{POSTGRES_IP}/pmqd?sslmode=disable"},
            "redis": {"url": f"redis://{REDIS_IP}:6379/0"},
            "log": {"format": "json"},
        }
        host.daemon = Daemon(folder, {**base, **settings}, clean_environ() | dict(environ), inside(namespace))
        self._stack.callback(stop, host.daemon)
        wait_until(lambda: '"ready: ' in host.running.log, timeout=30, what=f"host {host.name} is ready")
        return host

    def _cable(self, number: int, namespace: str, net: int, bridge: str) -> Wire:
        port = f"h{number}n{net}"
        peer = ("peer", "name", f"net{net}", "netns", namespace)
        _ip("-n", self.hub, "link", "add", port, "type", "veth", *peer)
        _ip("-n", self.hub, "link", "set", port, "master", bridge, "up")
        _ip("-n", namespace, "addr", "add", f"10.77.{net}.{10 + number}/24", "dev", f"net{net}")
        _ip("-n", namespace, "link", "set", f"net{net}", "up")
        return Wire(self.hub, port)

    def close(self) -> None:
        """Ends the daemons, the servers and the network."""
        for host in self.hosts:
            host.heal()
        self._stack.close()


def stop(running: Daemon) -> None:
    """End a daemon, whatever state a test left it in."""
    thaw(running)
    running.stop()
    running.check_nothing_left()


def _hba(folder: Path) -> Path:
    path = folder / "pg_hba.conf"
    path.write_text("local all all trust\nhost all all 10.77.1.0/24 trust\n")
    path.chmod(0o644)
    return path
