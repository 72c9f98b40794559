"""The private servers: they start, survive kills, die with their starter, and leave nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from pmqd import programs
from pmqd.embedded import SOCKET_PATH_LIMIT, PostgresServer, RedisServer
from pmqd.errors import EmbeddedError
from pmqd.folders import short_folder
from tests.fix_servers import WaitUntil, prefer
from tests.processes import lives

STARTER = """
import pathlib, sys
from pmqd.embedded import PostgresServer, RedisServer
folder = pathlib.Path(sys.argv[1])
servers = PostgresServer(folder / "pg", prefer=sys.argv[2]).start(), RedisServer(folder / "redis").start()
print(*(server.pid for server in servers), flush=True)
sys.stdin.read()
"""


def version(dsn: str) -> int:
    """The server's version number, such as 180006."""
    with psycopg.connect(dsn) as connection:
        return connection.info.server_version


def test_postgres_answers(postgres: PostgresServer) -> None:
    """A started server takes connections at once and is the version that its programs say."""
    assert version(postgres.dsn()) // 10000 == postgres.version


def test_postgres_listens_on_its_socket_only(postgres: PostgresServer) -> None:
    """No TCP port is open, and no other user can reach the socket's folder."""
    with psycopg.connect(postgres.dsn()) as connection:
        assert connection.execute("show listen_addresses").fetchone() == ("",)
    assert postgres.socket_folder.stat().st_mode & 0o077 == 0


def test_databases_are_copied_and_dropped(postgres: PostgresServer) -> None:
    """`create_database` copies a template; `drop_database` ends the sessions that are still there."""
    source = postgres.create_database("embedded_source")
    with psycopg.connect(source, autocommit=True) as connection:
        connection.execute("create table mark (x int)")
    copy = postgres.create_database("embedded copy", template="embedded_source")
    with psycopg.connect(copy) as connection:
        assert connection.execute("select count(*) from mark").fetchone() == (0,)
        connection.rollback()
        postgres.drop_database("embedded copy")
    postgres.drop_database("embedded_source")


def test_postgres_restarts_after_a_crash(own_postgres: PostgresServer) -> None:
    """What was committed before an immediate shutdown is there after the restart, at the same address."""
    dsn = own_postgres.dsn("pmqd")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table public.kept (x int)")
        connection.execute("insert into public.kept values (1)")
    own_postgres.kill()
    assert not own_postgres.running
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)
    own_postgres.start()
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select x from public.kept").fetchone() == (1,)


def test_redis_answers_on_both_wires(redis_server: RedisServer) -> None:
    """The TCP port and the Unix socket lead to the same server."""
    socket = redis_server.socket_folder / redis_server.socket_name
    with redis.Redis.from_url(redis_server.url) as tcp, redis.Redis(unix_socket_path=str(socket)) as local:
        assert tcp.info("server")["run_id"] == local.info("server")["run_id"]


def test_redis_forgets_over_a_restart(own_redis: RedisServer) -> None:
    """After a kill the server comes back at the same address, empty."""
    with redis.Redis.from_url(own_redis.url) as client:
        client.set("a", 1)
    own_redis.kill()
    own_redis.start()
    with redis.Redis.from_url(own_redis.url) as client:
        assert client.dbsize() == 0


def test_redis_on_its_socket_alone(short_folder: Path) -> None:
    """Without `tcp` the URL names the socket, and databases are numbered in it."""
    with RedisServer(short_folder / "r") as server:
        assert server.url.startswith("unix:///")
        with redis.Redis.from_url(server.url_of(3)) as client:
            client.set("a", 1)
            assert client.info("keyspace")["db3"]["keys"] == 1


def test_servers_die_with_a_killed_starter(short_folder: Path, wait_until: WaitUntil) -> None:
    """SIGKILL of the process that started the servers ends them within seconds."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(short_folder), prefer()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as starter:
        assert starter.stdout is not None
        pids = [int(word) for word in starter.stdout.readline().split()]
        assert len(pids) == 2
        starter.kill()
    wait_until(lambda: not any(lives(pid) for pid in pids), 10, "the servers' end")


def test_a_fork_does_not_stop_the_server(own_redis: RedisServer) -> None:
    """A child that inherited the object and leaves its `with` block leaves the server alone."""
    child = os.fork()
    if child == 0:
        own_redis.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert own_redis.running
    with redis.Redis.from_url(own_redis.url) as client:
        assert client.ping()


def test_long_paths_get_a_short_socket(tmp_path: Path) -> None:
    """Where the directory's path is too long for a socket, a short folder serves, and goes away with the server."""
    server = RedisServer(tmp_path / ("long" * 30))
    with server:
        folder = server.socket_folder
        assert len(os.fsencode(folder / server.socket_name)) <= SOCKET_PATH_LIMIT
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        url = server.url
        server.restart()
        assert server.url == url
    assert not folder.exists()


def test_the_next_owner_removes_what_a_killed_one_left(wait_until: WaitUntil) -> None:
    """A temporary folder goes when its owner is dead, and not before."""
    code = "import sys; from pmqd.folders import short_folder\nwith short_folder() as f: print(f, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        with short_folder() as mine:
            assert left.exists()
            owner.kill()
            owner.wait()
            with short_folder():
                wait_until(lambda: not left.exists(), 5, "the removal")
            assert mine.exists()
    assert not mine.exists()


def test_start_twice_is_one_server(own_redis: RedisServer) -> None:
    """A second `start` of a running server changes nothing."""
    pid = own_redis.pid
    own_redis.start()
    assert own_redis.pid == pid


def test_a_server_that_cannot_start_says_why(short_folder: Path) -> None:
    """The error names the server, its directory and the end of its log."""
    server = PostgresServer(short_folder / "pg", prefer=prefer(), settings={"shared_buffers": "nonsense"})
    with pytest.raises(EmbeddedError, match=r"postgres did not start in .*ended at once.*shared_buffers"):
        server.start()
    assert not server.running


def test_data_of_another_version_is_refused(short_folder: Path) -> None:
    """A folder that another PostgreSQL made is named, with both versions."""
    folder = short_folder / "pg"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedError, match="was made by PostgreSQL 9, the programs in"):
        PostgresServer(folder, prefer=prefer()).start()


def test_an_initdb_cut_short_is_done_again(short_folder: Path) -> None:
    """What a killed initdb left is not taken for a data folder."""
    (short_folder / "pg" / "data.new" / "base").mkdir(parents=True)
    with PostgresServer(short_folder / "pg", prefer=prefer()) as server:
        assert version(server.dsn()) > 0


@pytest.mark.parametrize(
    ("find", "package"), [(programs.postgres_programs, "PostgreSQL"), (programs.redis_program, "Redis")]
)
def test_missing_programs_are_named(
    monkeypatch: pytest.MonkeyPatch, find: Callable[[], Path], package: str, tmp_path: Path
) -> None:
    """Without any programs the error says what to install."""
    monkeypatch.setattr(programs, "_package_folder", lambda name: tmp_path)
    monkeypatch.setattr(programs, "_debian_postgres_folders", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedError, match=rf"no {package} server program.*install pmqd\[embedded\]"):
        find()


@pytest.mark.skipif(os.geteuid() != 0, reason="how root runs PostgreSQL")
def test_root_where_namespaces_are_forbidden(
    monkeypatch: pytest.MonkeyPatch, short_folder: Path, wait_until: WaitUntil
) -> None:
    """Where containers forbid `unshare`, root's server runs as nobody in a closed folder, and dies with its starter."""
    (short_folder / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (short_folder / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{short_folder}:{os.environ['PATH']}")
    programs.as_ordinary_user.cache_clear()
    try:
        assert programs.as_ordinary_user()[0] == "setpriv"
        with PostgresServer(short_folder / "pg", prefer=prefer()) as server:
            assert version(server.dsn()) > 0
            assert psutil.Process(server.pid).uids().effective == 65534
            server.restart("immediate")
            assert version(server.dsn()) > 0
        test_servers_die_with_a_killed_starter(short_folder / "second", wait_until)
    finally:
        programs.as_ordinary_user.cache_clear()


def test_signals_of_the_terminal_do_not_reach_servers(own_redis: RedisServer) -> None:
    """The server is in a session of its own, so that Ctrl-C lets the daemon drain first."""
    assert os.getsid(own_redis.pid) == own_redis.pid
