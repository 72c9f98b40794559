"""What errors of a real PostgreSQL mean: which are tried again, which drop the connection, and that none is a job's fault."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pmqd.config import PostgresSettings
from pmqd.embedded import PostgresServer
from pmqd.errors import StoreUnavailable
from pmqd.job import Action
from pmqd.store import StatementError, Store
from pmqd.store_session import StoreBusy
from tests.fix_servers import apply_schema, prefer, wait_until
from tests.store_tools import Bench, open_bench, outcome


@pytest.fixture
def bench(own_postgres: PostgresServer) -> Iterator[Bench]:
    """A store on this test's own server."""
    with open_bench(own_postgres.dsn("pmqd")) as bench:
        yield bench


def fails(store: Store, *, match: str | None = None) -> None:
    """One statement of the store fails so."""
    with pytest.raises(StoreUnavailable, match=match):
        store.redis_epoch()


def pid_of(store: Store) -> int:
    """The process of the server behind a store's connection."""
    return store.connection.info.backend_pid


def test_53300_too_many_connections(short_folder: Path) -> None:
    """No connection to be had: the store is unavailable, and there again as soon as one is free."""
    limits = {"max_connections": "6", "superuser_reserved_connections": "0", "max_wal_senders": "0"}
    with PostgresServer(short_folder / "pg", prefer=prefer(), settings=limits) as server:
        dsn = server.create_database("pmqd")
        apply_schema(dsn)
        store = Store(PostgresSettings(dsn=dsn), "test")
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    stack.enter_context(psycopg.connect(dsn))
            fails(store, match="too many clients|reserved")
        wait_until(lambda: works(store), 10, "a connection is free")
        store.close()


def works(store: Store) -> bool:
    """Whether a statement gets through now."""
    try:
        store.redis_epoch()
    except StoreUnavailable:
        return False
    return True


def test_57p01_terminated_by_an_administrator(bench: Bench) -> None:
    """pg_terminate_backend: the connection is dropped, the next call makes another."""
    bench.connection.execute("select pg_terminate_backend(%s)", [pid_of(bench.store)])
    fails(bench.store, match="terminating connection|server closed")
    assert works(bench.store)


def test_57p02_another_session_crashed(bench: Bench) -> None:
    """Kill -9 of somebody's session: the server throws out all others and starts anew; afterwards the store works."""
    with psycopg.connect(bench.dsn, autocommit=True) as victim:
        assert works(bench.store)
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        wait_until(lambda: not works(bench.store), 10, "the others are thrown out")
    wait_until(lambda: works(bench.store), 20, "the server is up again")
    bench.connection.close()


def test_57p03_shutting_down(own_postgres: PostgresServer) -> None:
    """A server on its way down or up takes no connection; that is an absence, no fault of the configuration."""
    store = Store(PostgresSettings(dsn=own_postgres.dsn("pmqd")), "test")
    with psycopg.connect(own_postgres.dsn("pmqd")):
        os.kill(own_postgres.pid, signal.SIGTERM)  # smart shutdown: it waits for this session
        wait_until(lambda: not works(store), 10, "it takes nobody in any more")
        fails(store, match="shutting down|No such file|refused")
    own_postgres.stop()
    own_postgres.start()
    assert works(store)
    store.close()


def test_25006_read_only(bench: Bench) -> None:
    """A server that has become read-only: dropped at the first write, so that the next connection can find another."""
    [job] = bench.claim(bench.insert())
    bench.connection.execute("alter system set default_transaction_read_only = on")
    bench.connection.execute("select pg_reload_conf()")
    done = outcome(job, Action.COMPLETE)

    def refused() -> bool:
        try:
            bench.store.settle([done], [])
        except StoreUnavailable as error:
            return "read-only" in str(error)
        return False

    before = pid_of(bench.store)
    wait_until(refused, 10, "it is read-only") if not refused() else None
    bench.connection.execute("set default_transaction_read_only = off")
    bench.connection.execute("alter system reset default_transaction_read_only")
    bench.connection.execute("select pg_reload_conf()")
    wait_until(lambda: not refused(), 10, "it takes writes")
    assert pid_of(bench.store) != before
    assert bench.row(job.id)["attempt_count"] == 1


@pytest.fixture
def small_disk(short_folder: Path) -> Iterator[Path]:
    """A file system of 100 MB for a server's data; mounting one needs root."""
    folder = short_folder / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=100m,mode=0700", "pmqd-test", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_53100_disk_full(small_disk: Path) -> None:
    """No room for new rows: the store is away for whoever writes; with room again, what was claimed is settled as if nothing had happened."""
    settings = {
        "max_wal_size": "32MB",
        "min_wal_size": "32MB",
        "wal_level": "minimal",
        "max_wal_senders": "0",
    }
    with PostgresServer(small_disk / "pg", prefer=prefer(), settings=settings) as server:
        dsn = server.create_database("pmqd")
        apply_schema(dsn)
        with open_bench(dsn) as bench:
            [job] = bench.claim(bench.insert())
            filler = small_disk / "filler"
            free = shutil.disk_usage(small_disk).free
            with filler.open("wb") as file:
                file.write(bytes(max(0, free - (1 << 20))))
            with pytest.raises(
                StoreUnavailable
            ):  # or the server crashes over its log, and starts again by itself
                bench.store.attempt(
                    lambda connection: connection.execute(
                        "insert into pmqd.jobs (queue_name, payload) select 'mail', '{}' from generate_series(1, 100000)"
                    )
                )
            filler.unlink()
            wait_until(lambda: works(bench.store), 30, "the server has room again")
            assert bench.store.settle([outcome(job, Action.COMPLETE)], [job.token]) == {job.id: "completed"}


def test_55p03_lock_not_available(bench: Bench) -> None:
    """Somebody holds the row: tried a few times, then said; the connection stays, and the row is what it was."""
    [job] = bench.claim(bench.insert())
    store = bench.another("impatient")
    store._lock_timeout_ms = 30
    with psycopg.connect(bench.dsn) as other:
        other.execute("select from pmqd.jobs where id = %s for update", [job.id])
        before = pid_of(store)
        with pytest.raises(StoreBusy, match="lock timeout"):
            store.settle([outcome(job, Action.COMPLETE)], [])
        assert pid_of(store) == before
    assert store.settle([outcome(job, Action.COMPLETE)], []) == {job.id: "completed"}


def test_57014_statement_timeout(bench: Bench) -> None:
    """A statement that the server cut off: what became of it is not known, so the connection is dropped."""
    store = Store(PostgresSettings(dsn=bench.dsn, statement_timeout_seconds=0.2), "test")
    before = pid_of(store)
    with pytest.raises(StoreUnavailable, match="statement timeout"):
        store.attempt(lambda connection: connection.execute("select pg_sleep(9)"))
    assert pid_of(store) != before
    store.close()


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_serialization_and_deadlock(bench: Bench, state: str) -> None:
    """Tried again on the same connection, as often as it has tries; then it is said, and nothing is dropped."""
    bench.connection.execute("create sequence public.tries")
    body = f"do $$ begin perform nextval('public.tries'); raise exception 'again' using errcode = '{state}'; end $$"
    before = pid_of(bench.store)
    with pytest.raises(StoreBusy, match="again"):
        bench.store.attempt(lambda connection: connection.execute(body))
    assert bench.count("public.tries where last_value = %s", Store.tries) == 1
    assert pid_of(bench.store) == before


@pytest.mark.parametrize("state", ["53100", "53200", "53400", "58030", "XX000", "08006", "25P02", "25P03"])
def test_the_server_is_in_trouble(bench: Bench, state: str) -> None:
    """No room, no memory, an I/O error, an internal one, a lost wire: the store is away, and nobody's job is at fault."""
    body = f"do $$ begin raise exception 'trouble' using errcode = '{state}'; end $$"
    with pytest.raises(StoreUnavailable, match="trouble"):
        bench.store.attempt(lambda connection: connection.execute(body))
    assert works(bench.store)


@pytest.mark.parametrize("state", ["22P05", "22021", "22P02", "23514"])
def test_data_that_cannot_be_stored(bench: Bench, state: str) -> None:
    """A value that does not fit is told apart: asking again would not help, and the connection is as good as before."""
    body = f"do $$ begin raise exception 'no such value' using errcode = '{state}'; end $$"
    before = pid_of(bench.store)
    with pytest.raises(StatementError) as caught:
        bench.store.attempt(lambda connection: connection.execute(body))
    assert caught.value.sqlstate == state
    assert pid_of(bench.store) == before
