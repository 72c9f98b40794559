"""Fixtures: PostgreSQL with a standby, behind PgBouncer, and with TLS."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Protocol

import psycopg
import pytest
import trustme
from psycopg.conninfo import make_conninfo

from pmqd.embedded import PostgresServer
from pmqd.errors import EmbeddedError
from pmqd.programs import Prefer, as_ordinary_user, dying_with_parent, environment, run
from tests.fix_servers import apply_schema, prefer, wait_until
from tests.processes import lives

SERVER_NAME = "db.pmqd.test"
"""What the certificates are made for. It has no address: connections give one beside it."""


# --- a standby


class Standby(PostgresServer):
    """A streaming standby: a copy of a running primary, which follows it until it is promoted."""

    def __init__(self, directory: Path, primary: PostgresServer) -> None:
        super().__init__(directory, prefer=prefer(), settings=primary.settings)
        self.primary = primary

    def promote(self) -> None:
        """Make it the primary, and wait until it takes writes."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute("select pg_promote(true, 60)")
            wait_until(
                lambda: connection.execute("select not pg_is_in_recovery()").fetchone() == (True,),
                30,
                "the standby takes writes",
            )

    def _make_data(self) -> None:
        if self.data.exists():
            return
        source = f"host={self.primary.socket_folder} user=postgres application_name=standby"
        command = [str(self.programs / "pg_basebackup"), "-d", source, "-D", str(self.data)]
        code, text = run(
            [*as_ordinary_user(), *command, "-R", "-X", "stream", "-c", "fast", "--no-sync"], seconds=120
        )
        if code != 0:
            raise EmbeddedError(f"pg_basebackup failed: {text}")

    def _ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() in ("ready", "standby")


@dataclass
class Pair:
    """A primary with the schema, and its standby."""

    primary: PostgresServer
    standby: Standby

    @property
    def dsn(self) -> str:
        """Both, the primary first; pmqd itself adds that it wants the one that can be written to."""
        return make_conninfo(
            self.primary.dsn("pmqd"), host=f"{self.primary.socket_folder},{self.standby.socket_folder}"
        )

    def lose_primary(self) -> None:
        """Kill -9 the primary's postmaster, and wait until none of its processes is left."""
        family = _family(self.primary.pid)
        os.kill(self.primary.pid, signal.SIGKILL)
        self.primary.kill()  # reaps it
        wait_until(lambda: not any(lives(pid) for pid in family), 20, "no process of the old primary lives")
        (self.primary.data / "postmaster.pid").unlink(missing_ok=True)

    def fail_over(self) -> None:
        """Lose the primary and promote the standby."""
        self.lose_primary()
        self.standby.promote()

    def hold_replay(self) -> None:
        """From now on the standby gets nothing: what is committed will be lost with the primary."""
        with psycopg.connect(self.standby.dsn(), autocommit=True) as connection:
            connection.execute("alter system set primary_conninfo = ''")
            connection.execute("select pg_reload_conf()")
        with psycopg.connect(self.primary.dsn(), autocommit=True) as connection:
            wait_until(
                lambda: connection.execute("select count(*) from pg_stat_replication").fetchone() == (0,),
                20,
                "the standby is cut off",
            )


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


class MakePair(Protocol):
    """What the fixture `pair` gives."""

    def __call__(self, mode: Literal["synchronous", "asynchronous"]) -> Pair:
        """A primary and a standby that streams; synchronous: a commit is acknowledged when the standby has it on disk."""


@pytest.fixture
def pair(short_folder: Path) -> Iterator[MakePair]:
    """The function `pair(mode)`: a primary and its standby, stopped after the test."""
    with contextlib.ExitStack() as stack:

        def make(mode: Literal["synchronous", "asynchronous"]) -> Pair:
            primary = stack.enter_context(PostgresServer(short_folder / "a", prefer=prefer()))
            if not (primary.programs / "pg_basebackup").is_file():
                pytest.skip(f"no pg_basebackup beside {primary.programs / 'postgres'}")
            apply_schema(primary.create_database("pmqd"))
            standby = stack.enter_context(Standby(short_folder / "b", primary))
            with psycopg.connect(primary.dsn(), autocommit=True) as connection:
                if mode == "synchronous":
                    connection.execute("alter system set synchronous_standby_names = 'standby'")
                    connection.execute("select pg_reload_conf()")
                wanted = "sync" if mode == "synchronous" else "async"
                query = (
                    "select count(*) from pg_stat_replication where state = 'streaming' and sync_state = %s"
                )
                wait_until(
                    lambda: connection.execute(query, [wanted]).fetchone() == (1,), 30, "the standby streams"
                )
            return Pair(primary, standby)

        yield make


# --- PgBouncer


class PgBouncer:
    """PgBouncer in front of a server, on a Unix socket of its own."""

    def __init__(self, folder: Path, server: PostgresServer, options: dict[str, str]) -> None:
        self.folder = folder
        self.server = server
        folder.mkdir(mode=0o700)
        (folder / "users").write_text('"postgres" ""\n')
        settings = (
            {
                "listen_addr": "",
                "listen_port": "6432",
                "unix_socket_dir": str(folder),
                "auth_type": "trust",
                "auth_file": str(folder / "users"),
                "pool_mode": "transaction",
                "max_client_conn": "200",
                "default_pool_size": "8",
                "server_reset_query": "",
                "server_round_robin": "1",  # the next transaction in another session: what leaks between them shows
                "logfile": str(folder / "log"),
            }
            | options
        )
        lines = ["[databases]", f"* = host={server.socket_folder} port=5432", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        (folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        self.process = subprocess.Popen(
            [*as_ordinary_user(), pgbouncer_program(), "-q", str(folder / "pgbouncer.ini")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
            preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prepared call, no lock taken
        )
        wait_until(self._listens, 20, "PgBouncer listens")

    def _listens(self) -> bool:
        """Whether it takes connections: the socket is there as soon as it is bound, and refuses until it listens."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.folder / ".s.PGSQL.6432")) == 0

    def dsn(self, name: str) -> str:
        """A database through the pooler."""
        return make_conninfo(self.server.dsn(name), host=str(self.folder), port=6432)

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def pgbouncer_program() -> str:
    """The program; the test is skipped where there is none."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip("no pgbouncer on this machine (Debian's package pgbouncer)")
    return found


class MakePgBouncer(Protocol):
    """What the fixture `pgbouncer` gives."""

    def __call__(self, server: PostgresServer, **options: str) -> PgBouncer:
        """PgBouncer in transaction mode in front of a server."""


@pytest.fixture
def pgbouncer(short_folder: Path) -> Iterator[MakePgBouncer]:
    """The function `pgbouncer(server, **options)`; stopped after the test, which is skipped where it is not installed."""
    running: list[PgBouncer] = []

    def make(server: PostgresServer, **options: str) -> PgBouncer:
        pgbouncer_program()
        running.append(PgBouncer(short_folder / f"pb{len(running)}", server, options))
        return running[-1]

    yield make
    for each in running:
        each.stop()


# --- TLS


@dataclass(frozen=True)
class Certificates:
    """An authority, another one that nobody trusts, and what they sign."""

    folder: Path
    authority: trustme.CA
    stranger: trustme.CA

    @property
    def root(self) -> Path:
        """The authority's own certificate."""
        path = self.folder / "root.crt"
        self.authority.cert_pem.write_to_path(str(path))
        return path

    def issue(
        self, name: str = SERVER_NAME, *, strange: bool = False, expired: bool = False
    ) -> tuple[Path, Path]:
        """Certificate and key of a server."""
        signer = self.stranger if strange else self.authority
        until = datetime.now(UTC) - timedelta(days=1) if expired else None
        issued = signer.issue_cert(name, not_after=until)
        certificate, key = self.folder / "server.crt", self.folder / "server.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.touch(mode=0o600)
        key.write_bytes(issued.private_key_pem.bytes())
        return certificate, key


@pytest.fixture
def certificates(short_folder: Path) -> Certificates:
    """An authority of this test's own."""
    folder = short_folder / "tls"
    folder.mkdir(mode=0o700)
    return Certificates(folder, trustme.CA(), trustme.CA())


class TlsFront:
    """What stands in front of a PostgreSQL that has no TLS of its own: answers its handshake, and passes bytes on.

    So the client's half is tried with any server. Without a certificate it says no to TLS, as somebody in between would
    who wants to read what is said.
    """

    def __init__(self, server: PostgresServer, files: tuple[Path, Path] | None) -> None:
        self._upstream = str(server.socket_folder / server.socket_name)
        self._context: ssl.SSLContext | None = None
        if files is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.set_alpn_protocols(["postgresql"])
            self._context.load_cert_chain(*files)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heard = b""
        """What clients said in plain text after TLS was refused."""
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """End it; what still passes through ends with its clients."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._greet, args=(client,), daemon=True).start()

    def _greet(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.settimeout(20)
            while client.recv(8, socket.MSG_PEEK)[4:] in _ASKS:
                asked = client.recv(8)[4:]
                if self._context is not None and asked == _ASKS[0]:
                    client.sendall(b"S")
                    with self._context.wrap_socket(client, server_side=True) as inner:
                        self._join(inner)
                    return
                client.sendall(b"N")
            self.heard += client.recv(4096, socket.MSG_PEEK)
            self._join(client)

    def _join(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(self._upstream)
            back = threading.Thread(target=_pass, args=(server, client), daemon=True)
            back.start()
            _pass(client, server)
            back.join(5)


_ASKS = [(80877103).to_bytes(4, "big"), (80877104).to_bytes(4, "big")]
"""SSLRequest and GSSENCRequest."""


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


ServeTls = Callable[[tuple[Path, Path] | None], int]
"""Serves the database `pmqd` with a certificate and key on a port of 127.0.0.1; None: without TLS."""


@pytest.fixture(params=["server", "front"])
def serve_tls(request: pytest.FixtureRequest, short_folder: Path) -> Iterator[ServeTls]:
    """The function `serve_tls(files)`, with PostgreSQL's own TLS where this machine has one built with it, and with a front."""
    with contextlib.ExitStack() as stack:

        def make(files: tuple[Path, Path] | None) -> int:
            if request.param == "front":
                server = stack.enter_context(PostgresServer(short_folder / "pg", prefer=prefer()))
                apply_schema(server.create_database("pmqd"))
                front = TlsFront(server, files)
                stack.callback(front.close)
                return front.port
            return _with_tls(short_folder / "pg", files, stack)

        yield make


class TcpServer(PostgresServer):
    """A server that listens on a port of 127.0.0.1 too."""

    def __init__(self, directory: Path, choice: Prefer, settings: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.socket_name = f".s.PGSQL.{self.port}"
        settings = {"listen_addresses": "127.0.0.1", "port": str(self.port)} | settings
        super().__init__(directory, prefer=choice, settings=settings)

    def dsn(self, dbname: str = "postgres") -> str:
        """The address of a database on the socket, with its port."""
        return make_conninfo(super().dsn(dbname), port=self.port)


def _with_tls(folder: Path, files: tuple[Path, Path] | None, stack: contextlib.ExitStack) -> int:
    settings: dict[str, str] = {}
    if files is not None:
        settings = {"ssl": "on", "ssl_cert_file": str(files[0]), "ssl_key_file": str(files[1])}
    choices: tuple[Prefer, ...] = ("wheel", "path")
    for choice in choices:
        server = TcpServer(folder / choice, choice, settings)
        try:
            stack.enter_context(server)
        except EmbeddedError as error:
            if "SSL" in str(error) or "ssl" in str(error):
                continue
            raise
        apply_schema(server.create_database("pmqd"))
        return server.port
    pytest.skip("no PostgreSQL on this machine that is built with OpenSSL")
