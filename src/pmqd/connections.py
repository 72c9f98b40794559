"""Connections that an enqueue goes over: the caller's own, or a few kept here per process and per event loop.

A library's pool would bring threads, and a process that forks with them is in trouble; and it waits where a producer
wants to be told at once that PostgreSQL is away.
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Final

import psycopg
from psycopg.pq import TransactionStatus

from pmqd.config import PostgresSettings, masked
from pmqd.conninfo import complete, one_line
from pmqd.errors import EnqueueError, StoreUnavailable

KEPT: Final = 4
"""Idle connections kept open per process, and per event loop."""

AT_ONCE: Final = 16
"""Enqueues of one process, or one event loop, that run at once; others wait for their turn."""

_TRUSTED_SECONDS: Final = 1.0
"""An idle connection is not looked at for so long: with each look another thread goes first. An enqueue over a lost one is done again anyway."""

_WHO: Final = "select pg_catalog.pg_backend_pid()"
_PREPARED_AFTER: Final = 5
"""Executions of a statement on one connection, as everywhere with psycopg: who enqueues once pays for no preparing."""


class Connections:
    """Autocommit connections for synchronous enqueues of all threads of a process. Not to be used after a fork."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._turns: SimpleQueue[None] = SimpleQueue()  # a semaphore's work in a twentieth of its time
        for _ in range(AT_ONCE):
            self._turns.put(None)
        self._kept = _Kept()

    @contextmanager
    def one(self, *, new: bool = False) -> Iterator[psycopg.Connection[Any]]:
        """A connection for a while.

        Args:
            new: Not one that has been idle: after a lost connection the others are probably lost as well.

        Raises:
            StoreUnavailable: PostgreSQL cannot be reached.
        """
        self._turns.get()
        try:
            if new:
                self._kept.close()
            connection = self._kept.take() or self._open()
            try:
                yield connection
            finally:
                self._kept.give(connection)
        finally:
            self._turns.put(None)

    def close(self) -> None:
        """Closes idle connections."""
        self._kept.close()

    def _open(self) -> psycopg.Connection[Any]:
        try:
            connection = psycopg.connect(
                complete(self._settings.dsn), autocommit=True, **_parameters(self._settings)
            )
        except psycopg.OperationalError as error:
            raise unavailable(self._settings, error) from error
        with suppress(psycopg.Error):  # lost already: whoever enqueues over it hears of it, and tries again
            _prepare_if(connection, connection.execute(_WHO).fetchone())
        return connection


class AsyncConnections:
    """The same for event loops; each has its own connections."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._kept: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopKept] = (
            weakref.WeakKeyDictionary()
        )

    @asynccontextmanager
    async def one(self, *, new: bool = False) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection for a while; see `Connections.one`."""
        kept = self._of_this_loop()
        async with kept.turns:
            if new:
                kept.close()
            connection = kept.take() or await self._open()
            try:
                yield connection
            finally:
                kept.give(connection)

    def close(self) -> None:
        """Closes idle connections, those of ended event loops too."""
        for kept in list(self._kept.values()):
            kept.close()

    async def _open(self) -> psycopg.AsyncConnection[Any]:
        try:
            connection = await psycopg.AsyncConnection.connect(
                complete(self._settings.dsn), autocommit=True, **_parameters(self._settings)
            )
        except psycopg.OperationalError as error:
            raise unavailable(self._settings, error) from error
        with suppress(psycopg.Error):
            _prepare_if(connection, await (await connection.execute(_WHO)).fetchone())
        return connection

    def _of_this_loop(self) -> _LoopKept:
        loop = asyncio.get_running_loop()
        kept = self._kept.get(loop)
        if kept is None:
            kept = self._kept[loop] = _LoopKept()
        return kept


class _Kept:
    """Idle connections of one process, or of one event loop."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._idle: list[tuple[Any, float]] = []  # and since when
        # At the end of the process, or of the loop that this hangs on, they are closed, but never by a child.
        weakref.finalize(self, _finish, self._idle, self._pid)

    def take(self) -> Any:
        """An idle connection that the server has not closed meanwhile, as far as one can know; None where there is none."""
        while self._idle:
            connection, since = self._idle.pop()
            if time.monotonic() - since < _TRUSTED_SECONDS or not _ended(connection):
                return connection
            connection.pgconn.finish()
        return None

    def give(self, connection: Any) -> None:
        """Keeps a connection that can be used again, and closes every other."""
        if connection.pgconn.transaction_status == TransactionStatus.IDLE and len(self._idle) < KEPT:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.pgconn.finish()

    def close(self) -> None:
        """Closes all that are idle."""
        _finish(self._idle, self._pid)


class _LoopKept(_Kept):
    def __init__(self) -> None:
        super().__init__()
        self.turns = asyncio.Semaphore(AT_ONCE)


def caller_connection(conn: Any) -> psycopg.Connection[Any]:
    """The psycopg connection behind what the caller passed as `conn`.

    Args:
        conn: A psycopg connection or cursor, an SQLAlchemy session or connection on psycopg.

    Raises:
        EnqueueError: It is something else.
    """
    if isinstance(conn, psycopg.Connection):
        return conn
    if isinstance(conn, psycopg.Cursor):
        return conn.connection
    if isinstance(conn, psycopg.AsyncConnection | psycopg.AsyncCursor) or hasattr(conn, "sync_session"):
        raise _refused(conn, "it is asynchronous: await enqueue_async(...) instead")
    found = getattr(conn, "connection", None)
    if callable(found):  # a session gives the connection of its transaction
        found = found().connection
    driver = getattr(found, "driver_connection", None)
    if isinstance(driver, psycopg.Connection):
        return driver
    raise _refused(conn, "a psycopg connection or cursor, or an SQLAlchemy session or connection on psycopg")


async def caller_connection_async(conn: Any) -> psycopg.AsyncConnection[Any]:
    """The asynchronous psycopg connection behind what the caller passed as `conn`.

    Args:
        conn: A psycopg AsyncConnection or AsyncCursor, an SQLAlchemy AsyncSession or AsyncConnection on psycopg.

    Raises:
        EnqueueError: It is something else.
    """
    if isinstance(conn, psycopg.AsyncConnection):
        return conn
    if isinstance(conn, psycopg.AsyncCursor):
        return conn.connection
    if hasattr(conn, "sync_session"):  # an AsyncSession gives the connection of its transaction
        conn = await conn.connection()
    if hasattr(conn, "get_raw_connection"):
        driver = (await conn.get_raw_connection()).driver_connection
        if isinstance(driver, psycopg.AsyncConnection):
            return driver
    raise _refused(
        conn, "a psycopg AsyncConnection or AsyncCursor, or SQLAlchemy's AsyncSession or AsyncConnection"
    )


def unavailable(settings: PostgresSettings, error: Exception) -> StoreUnavailable:
    """The error of a connection that cannot be made or was lost; without a password, in one line."""
    where = masked(settings.dsn) or "libpq's default address"
    return StoreUnavailable(f"PostgreSQL at {where}: {one_line(error)}")


def _refused(conn: Any, allowed: str) -> EnqueueError:
    kind = f"{type(conn).__module__}.{type(conn).__qualname__}"
    return EnqueueError(f"conn of type {kind} is not allowed: {allowed}")


def _parameters(settings: PostgresSettings) -> dict[str, Any]:
    # Without tcp_user_timeout a session whose wire is cut while a statement is in flight hangs for many minutes.
    return {
        "connect_timeout": math.ceil(settings.connect_timeout_seconds),
        "fallback_application_name": "pmqd:client",
        "tcp_user_timeout": 3000,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "prepare_threshold": None,  # until it is known whom the connection has reached
    }


def _prepare_if(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], answer: Any) -> None:
    """Lets psycopg prepare what is executed often, if the process that answers is the one that was told of at the start.

    Else it is a pooler, and the next transaction may run where nothing was prepared.
    """
    if answer is not None and answer[0] == connection.info.backend_pid:
        connection.prepare_threshold = _PREPARED_AFTER


def _ended(connection: Any) -> bool:
    """Whether an idle connection has something to read: from a healthy server nothing comes unasked."""
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.pgconn.socket, select.POLLIN)
    return bool(poll.poll(0))


def _finish(idle: list[tuple[Any, float]], pid: int) -> None:
    if pid == os.getpid():
        while idle:
            connection, _ = idle.pop()  # held until it is closed: psycopg warns of open ones that vanish
            connection.pgconn.finish()
