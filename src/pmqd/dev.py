"""`pmqd dev`: private servers, schema and daemon for one application, with a reload whenever its code changes.

Everything lives in one directory and ends with this process, however that ends. Ctrl-C reaches this process alone
(the others have sessions of their own), so that the daemon drains before the stores go.
"""

import contextlib
import fcntl
import importlib.machinery
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psycopg

from pmqd import schema
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.errors import ConfigError, Conflict, PmqdError
from pmqd.programs import dying_with_parent
from pmqd.signals import heard

DEFAULT_DIRECTORY = Path(".pmqd/dev")
DEFAULT_PORT = 9640
WATCH_SECONDS = 0.5
DRAIN_SECONDS = 10
READY_SECONDS = 60.0


@dataclass(frozen=True)
class Stores:
    """Private servers that run, and the database with the schema."""

    postgres: PostgresServer
    redis: RedisServer
    dsn: str


class Daemon:
    """`pmqd run` as a child process on private stores.

    Args:
        config: its configuration file.
        stores: what it works on; given by variables, which stand over the file.
        state_dir: its own folder.
        port: of its web child, on loopback.
        log: where its messages go; None is this process's stderr.
    """

    def __init__(
        self,
        config: Path,
        stores: Stores,
        *,
        state_dir: Path,
        port: int,
        log: Path | None = None,
    ) -> None:
        self.address = f"127.0.0.1:{port}"
        variables = {
            "PMQD_POSTGRES__DSN": stores.dsn,
            "PMQD_REDIS__URL": stores.redis.url,
            "PMQD_STATE_DIR": str(state_dir.absolute()),
            "PMQD_WEB__LISTEN": self.address,
        }
        with log.open("ab") if log else contextlib.nullcontext() as stderr:
            self._process = subprocess.Popen(  # noqa: S603 - this Python and this package, no shell
                [sys.executable, "-m", "pmqd", "run", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **variables},
                start_new_session=True,
                preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prepared call, no lock taken
            )

    @property
    def pid(self) -> int:
        """The master's process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, or None while it runs."""
        return self._process.poll()

    def wait_ready(self, stopped: Callable[[], bool], seconds: float = READY_SECONDS) -> bool:
        """Wait until it can work; False if somebody wanted to stop meanwhile.

        Raises:
            PmqdError: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + seconds
        while not self._ready():
            if stopped():
                return False
            if self.exit_code is not None:
                raise PmqdError(f"the daemon ended with exit code {self.exit_code} before it was ready")
            if time.monotonic() > deadline:
                raise PmqdError(
                    f"the daemon was not ready after {seconds:g} s (http://{self.address}/readyz)"
                )
            time.sleep(0.05)
        return True

    def reload(self) -> None:
        """New workers with the new code; the old ones stay if it cannot be imported."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGHUP)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> int:
        """Drain, end, and wait for that.

        Args:
            hurry: asked again and again; once true, running jobs are cut off.

        Returns:
            Its exit code.
        """
        deadline = time.monotonic() + DRAIN_SECONDS + 20
        hurried = False
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
        while (code := self.exit_code) is None:
            if hurry() and not hurried:
                hurried = True
                for _ in range(2):  # the first is a drain like SIGTERM, the second means now
                    self._process.send_signal(signal.SIGINT)
            if time.monotonic() > deadline:
                self._process.kill()
            time.sleep(0.02)
        return code

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


class Stopping:
    """Counts the signals that ask this process to end; the second one means at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.count = 0

    def asked(self) -> bool:
        """Has somebody asked?"""
        return self.count > 0

    def asked_twice(self) -> bool:
        """Is somebody impatient?"""
        return self.count > 1

    def wait(self, seconds: float) -> bool:
        """Wait that long, or until somebody asks."""
        return self._event.wait(seconds)

    def ask(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """The signal handler."""
        self.count += 1
        self._event.set()


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """SIGINT, SIGTERM and SIGHUP (a closed terminal) as a wish to stop in order."""
    wish = Stopping()
    with heard(wish.ask):
        yield wish


@contextlib.contextmanager
def private_stores(directory: Path) -> Iterator[Stores]:
    """PostgreSQL with the schema applied, and Redis, for as long as the block runs.

    Args:
        directory: holds both servers' data; PostgreSQL's is used again at the next start.

    Raises:
        EmbeddedError: a server cannot be found or started.
    """
    with PostgresServer(directory / "postgres") as postgres, RedisServer(directory / "redis") as redis:
        dsn = _database(postgres)
        schema.apply(dsn, schema="pmqd")
        yield Stores(postgres, redis, dsn)


def run(app: str, directory: Path | None = None) -> int:
    """The command: runs until Ctrl-C.

    Args:
        app: `module:attribute`, importable from the working directory.
        directory: for data, configuration and sockets; made when missing. None is .pmqd/dev.

    Returns:
        The exit code: that of the daemon, 0 after Ctrl-C and a clean end.

    Raises:
        ConfigError: there is no such module.
        Conflict: another `pmqd dev` uses the directory.
        EmbeddedError: a private server cannot be found or started.
    """
    folder = _code_folder(app)
    directory = directory or DEFAULT_DIRECTORY
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with stopping() as wish, _alone_in(directory):
        say("starting PostgreSQL and Redis")
        with private_stores(directory) as stores:
            daemon = Daemon(
                _write_config(directory, app),
                stores,
                state_dir=directory / "state",
                port=free_port(DEFAULT_PORT),
            )
            try:
                if daemon.wait_ready(wish.asked):
                    _greet(directory, stores, daemon, folder)
                    _watch(daemon, folder, wish)
            finally:
                ended = daemon.exit_code
                say("stopping" if ended is None else f"the daemon has ended with exit code {ended}")
                code = daemon.stop(wish.asked_twice)
    return code


def say(text: str) -> None:
    """One line for the person at the terminal."""
    sys.stderr.write(f"pmqd: {text}\n")
    sys.stderr.flush()


def free_port(wanted: int = 0) -> int:
    """A free port on loopback: the wanted one if nobody has it."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise PmqdError("no free port on 127.0.0.1")


def _database(postgres: PostgresServer) -> str:
    """The DSN of the database `pmqd`, made at the first start."""
    with psycopg.connect(postgres.dsn()) as connection:
        found = connection.execute("select 1 from pg_database where datname = 'pmqd'").fetchone()
    return postgres.dsn("pmqd") if found else postgres.create_database("pmqd")


def _code_folder(app: str) -> Path:
    """Where the application's code is: its top package, or the folder of its single file.

    Raises:
        ConfigError: no such module can be found from here.
    """
    if not app.partition(":")[2].isidentifier():
        raise ConfigError(f"--app {app!r} names no attribute; allowed is module:attribute, as greetings:app")
    top = app.partition(":")[0].partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, [str(Path.cwd()), *sys.path])
    if spec is None:
        raise ConfigError(
            f"--app {app!r}: there is no module {top!r} here; allowed is module:attribute, as greetings:app"
        )
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin or "").parent


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another `pmqd dev` runs in {directory}; choose another folder with --directory"
            ) from None
        yield


def _write_config(directory: Path, app: str) -> Path:
    file = directory / "pmqd.toml"
    pool = f'[[workers]]\nname = "dev"\napp = {json.dumps(app)}\n'
    file.write_text(f"# Written by `pmqd dev` at every start.\ndrain_seconds = {DRAIN_SECONDS}\n\n{pool}")
    return file


def _greet(directory: Path, stores: Stores, daemon: Daemon, folder: Path) -> None:
    """What one needs to use it from another shell."""
    variables = {
        "PMQD_POSTGRES__DSN": stores.dsn,
        "PMQD_REDIS__URL": stores.redis.url,
        "PMQD_WEB__LISTEN": daemon.address,
    }
    environment = directory / "env"
    environment.write_text(
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    )
    say(f"ready: http://{daemon.address}/healthz; watching {folder}")
    say(f"in another shell: . {shlex.quote(str(environment))}")
    say("Ctrl-C stops everything")


def _watch(daemon: Daemon, folder: Path, wish: Stopping) -> None:
    """Reload at every change of a Python file, until somebody wants to stop or the daemon has ended."""
    seen = _changes(folder)
    while not wish.wait(WATCH_SECONDS) and daemon.exit_code is None:
        now = _changes(folder)
        if changed := sorted(path.name for path, _ in now ^ seen):
            say(f"{', '.join(dict.fromkeys(changed))} changed: reloading")
            daemon.reload()
        seen = now


def _changes(folder: Path) -> set[tuple[Path, tuple[int, int]]]:
    """Each Python file with its time and size; a file that goes while one looks is not there."""
    found = set()
    for path in folder.rglob("*.py") if (folder / "__init__.py").exists() else folder.glob("*.py"):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.add((path, (status.st_mtime_ns, status.st_size)))
    return found
