"""Private PostgreSQL and Redis servers for `pmqd dev`, `pmqd demo` and the tests.

A server lives in a directory of its own, is reached through a Unix socket, belongs to the process (strictly: the
thread) that started it and ends with it, however that ends.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from pmqd.errors import EmbeddedError
from pmqd.folders import short_folder
from pmqd.programs import (
    Prefer,
    as_ordinary_user,
    dying_with_parent,
    environment,
    postgres_programs,
    redis_program,
    run,
)

StopMode = Literal["fast", "immediate"]

SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix socket's path on Linux: `sun_path` has 108 with the closing zero (unix(7))."""

_POLL_SECONDS = 0.01

# Safe against a killed server, not against a power cut: right for data that is thrown away.
_THROWAWAY_POSTGRES = {"fsync": "off", "full_page_writes": "off"}


class _Server:
    """One server process: start, stop, kill, and the folder of its socket."""

    name = "server"
    socket_name = "socket"
    signals: Mapping[StopMode, signal.Signals]
    start_seconds = 30.0
    stop_seconds = 20.0

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log = self.directory / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._short = contextlib.ExitStack()
        self._short_folder: Path | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the running server.

        Raises:
            EmbeddedError: it does not run.
        """
        if self._process is None or not self.running:
            raise EmbeddedError(f"the {self.name} server in {self.directory} does not run")
        return self._process.pid

    @property
    def socket_folder(self) -> Path:
        """Where the socket is: the server's directory, or a short temporary folder where that path is too long."""
        if len(os.fsencode(self.directory / self.socket_name)) <= SOCKET_PATH_LIMIT:
            return self.directory
        if self._short_folder is None:
            self._take_short_folder()
        assert self._short_folder is not None
        return self._short_folder

    def _take_short_folder(self) -> None:
        # After a stop it is made again under the same name, so that addresses given out before stay true.
        self._short_folder = self._short.enter_context(short_folder(self._short_folder))

    def start(self) -> Self:
        """Start the server and return when it takes connections.

        Raises:
            EmbeddedError: it did not; with the end of the server's log.
        """
        if self.running:
            return self
        if self._short_folder is not None and not self._short_folder.exists():
            self._take_short_folder()
        command = self._command()
        self._owner = os.getpid()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a fixed command, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=environment(),
                start_new_session=True,  # the terminal's Ctrl-C must not end the stores before the daemon has drained
                preexec_fn=dying_with_parent(self.signals["fast"]),  # noqa: PLW1509 - one prepared call, no lock taken
            )
        self._wait_until_ready()
        return self

    def stop(self, mode: StopMode = "fast") -> None:
        """End the server and wait for it. `fast` ends it in order, `immediate` like a crash."""
        process, self._process = self._process, None
        # A fork of the starter has a copy of this object, but not the server: only the starter may stop it.
        if process is not None and self._owner == os.getpid():
            _end(process, self.signals[mode], self.stop_seconds)
            self._short.close()

    def kill(self) -> None:
        """End the server as a crash would, at once."""
        self.stop("immediate")

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again, on the same data and address."""
        self.stop(mode)
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _ready(self) -> bool:
        raise NotImplementedError

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while not self._ready():
            ended = not self.running
            if ended or time.monotonic() > deadline:
                reason = "it ended at once" if ended else f"not ready after {self.start_seconds:g} s"
                self.stop("immediate")
                raise EmbeddedError(
                    f"{self.name} did not start in {self.directory}: {reason}. {self._log_end()}"
                )
            time.sleep(_POLL_SECONDS)

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-5:] if self.log.exists() else []
        return "Its log ends: " + " | ".join(lines) if lines else "Its log is empty."

    def _check_socket_path(self) -> Path:
        path = self.socket_folder / self.socket_name
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise EmbeddedError(
                f"the path of the socket {path} has {len(os.fsencode(path))} bytes, allowed are {SOCKET_PATH_LIMIT}:"
                " set TMPDIR to a shorter folder"
            )
        return path


def _end(process: subprocess.Popen[bytes], number: signal.Signals, seconds: float) -> None:
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class PostgresServer(_Server):
    """A private PostgreSQL server; its data stays in `directory` until somebody removes it.

    Args:
        directory: the server's own folder, made when missing.
        prefer: where its programs are looked for first.
        settings: PostgreSQL settings over the ones given here. Without `fsync` among them the data survives a
            killed server, but not a power cut.
    """

    name = "postgres"
    socket_name = ".s.PGSQL.5432"
    # PostgreSQL's "fast" and "immediate" shutdown
    signals: Mapping[StopMode, signal.Signals] = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

    def __init__(
        self, directory: Path, *, prefer: Prefer = "wheel", settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory)
        self.programs = postgres_programs(prefer)
        self.data = self.directory / "data"
        self.settings = _THROWAWAY_POSTGRES | dict(settings or {})

    @property
    def version(self) -> int:
        """The major version of the programs, such as 18."""
        code, text = run([str(self.programs / "postgres"), "--version"], seconds=10)
        found = re.search(r"(\d+)", text)
        if code != 0 or found is None:
            raise EmbeddedError(f"{self.programs / 'postgres'} --version failed: {text}")
        return int(found.group(1))

    def dsn(self, dbname: str = "postgres") -> str:
        """The address of a database, as a URL that libpq and SQLAlchemy understand."""
        return f"postgresql://postgres@/{quote(dbname)}?host={quote(str(self.socket_folder), safe='/')}"

    def create_database(self, name: str, template: str | None = None) -> str:
        """Make a database, as a copy of `template` if given (to which nobody may be connected).

        Returns:
            Its DSN.
        """
        command = sql.SQL("create database {}").format(sql.Identifier(name))
        if template is not None:
            command += sql.SQL(" template {}").format(sql.Identifier(template))
            if self._data_version() != "14":
                command += sql.SQL(
                    " strategy file_copy"
                )  # for small ones half the time of copying through the log
        self._execute(command)
        return self.dsn(name)

    def drop_database(self, name: str) -> None:
        """Remove a database if it is there, and end the sessions that still use it."""
        self._execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def _execute(self, command: sql.Composed) -> None:
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute(command)

    def _command(self) -> list[str]:
        self._check_socket_path()
        self._make_data()
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_folder),
            "unix_socket_permissions": "0700",
            "port": "5432",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "shared_buffers": "64MB",
        } | self.settings
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [*as_ordinary_user(), str(self.programs / "postgres"), "-D", str(self.data), *flags]

    def _make_data(self) -> None:
        if self.data.exists():
            self._check_version()
            return
        # Made aside: a run that was cut in the middle leaves nothing that looks like a finished data folder.
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        code, text = run(
            [
                *(*as_ordinary_user(), str(self.programs / "initdb"), "-D", str(unfinished)),
                *(
                    "-U",
                    "postgres",
                    "-A",
                    "trust",
                    "-E",
                    "UTF8",
                    "--no-locale",
                    "--no-sync",
                    "--no-instructions",
                ),
            ],
            seconds=120,
        )
        if code != 0:
            raise EmbeddedError(f"initdb in {self.directory} failed: {text[-2000:] or code}")
        unfinished.rename(self.data)

    def _check_version(self) -> None:
        there = self._data_version()
        if there != str(self.version):
            raise EmbeddedError(
                f"{self.data} was made by PostgreSQL {there}, the programs in {self.programs} are version"
                f" {self.version}: remove that folder, or install PostgreSQL {there}"
            )

    def _data_version(self) -> str:
        marker = self.data / "PG_VERSION"
        return marker.read_text().strip() if marker.exists() else "unknown"

    def _ready(self) -> bool:
        # The last line of this file is what pg_ctl waits for; asking it needs no connection. The pid in its first
        # line tells it from a file that a crashed server left.
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


class RedisServer(_Server):
    """A private Redis or Valkey server without persistence: what it held is gone when it stops.

    Args:
        directory: the server's own folder, made when missing.
        prefer: where its program is looked for first.
        tcp: listen on a free port of 127.0.0.1 too; the port stays the same over restarts.
        settings: Redis settings over the ones given here.
    """

    name = "redis"
    socket_name = "redis.sock"
    signals: Mapping[StopMode, signal.Signals] = {"fast": signal.SIGTERM, "immediate": signal.SIGKILL}

    def __init__(
        self,
        directory: Path,
        *,
        prefer: Prefer = "wheel",
        tcp: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory)
        self.program = redis_program(prefer)
        self.port = _free_port() if tcp else 0
        self.settings = dict(settings or {})

    @property
    def url(self) -> str:
        """The address of database 0: through TCP where the server listens there, else through its socket."""
        return self.url_of(0)

    def url_of(self, database: int) -> str:
        """The address of one of the 16 numbered databases."""
        if self.port:
            return f"redis://127.0.0.1:{self.port}/{database}"
        return f"unix://{quote(str(self.socket_folder / self.socket_name), safe='/')}?db={database}"

    def _command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self._check_socket_path()),
            "unixsocketperm": "700",
            "dir": str(self.directory),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
        } | self.settings
        return [
            str(self.program),
            *(part for name, value in options.items() for part in (f"--{name}", value)),
        ]

    def _ready(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                probe.connect(str(self.socket_folder / self.socket_name))
                probe.sendall(b"PING\r\n")
                return probe.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
