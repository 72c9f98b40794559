"""One connection to PostgreSQL: how it is made, guarded, given up and made again.

Every statement has two ends: the server's `statement_timeout`, and this side's own deadline for a server that does not
answer at all. After either, and after anything else that leaves the state of the connection in doubt, it is dropped.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, TypeVar
from uuid import UUID

import psycopg
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Format
from psycopg.rows import dict_row

from pmqd.config import PostgresSettings, masked
from pmqd.errors import ConfigError, PmqdError, SchemaError, StoreUnavailable
from pmqd.sql_files import check_version, queries

T = TypeVar("T")

LOCK_TIMEOUT_MS: Final = 1500
IDLE_IN_TRANSACTION_MS: Final = 10_000
TCP_USER_TIMEOUT_MS: Final = 3000
ANSWER_MARGIN_SECONDS: Final = 2.0
"""How long after the server's own timeout its answer is still waited for."""

TRANSIENT: Final = ("40001", "40P01", "55P03")
"""Serialization failure, deadlock, lock not available: the same statement succeeds in a moment."""

MISSING: Final = ("3F000", "42703", "42704", "42883", "42P01")
"""Schema, column, type, function or table not there: psycopg's classes for these have no parent of their own."""

_JSONB_OID: Final = 3802
_TEXT_JSONB: Final = 1  # the first byte of a binary jsonb is its version


class LostLead(PmqdError):  # noqa: N818 - the name says what is so
    """Another migrator has a higher term."""


class StoreBusy(StoreUnavailable):
    """PostgreSQL is there, but somebody else held the lock, time and again."""


class _Connection(psycopg.Connection[Any]):
    """A connection whose server must answer in time, frozen hosts and silent proxies included."""

    answer_seconds: float = 10.0

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """Consumes a generator of libpq's; psycopg resumes it ten times a second while nothing comes."""
        return super().wait(_bounded(gen, time.monotonic() + self.answer_seconds), *args, **kwargs)


def _bounded(gen: PQGen[T], deadline: float) -> PQGen[T]:
    """The same generator, which gives up when it is resumed without news after the deadline."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                raise psycopg.OperationalError("no answer in time")
            wanted = gen.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result


class RawJson(Loader):
    """jsonb as the bytes of its text: what passes through need not be parsed."""

    format = Format.BINARY

    def load(self, data: Buffer) -> bytes:
        """The text without the version byte."""
        return bytes(data)[1:]


class Session:
    """One lazily made connection and the statements of `sql/queries`.

    Every method of a store: raises `StoreUnavailable` when PostgreSQL did not answer (the connection is dropped; what was
    sent may or may not have been committed), `SchemaError` when the schema is not the one this program knows.
    """

    tries: ClassVar[int] = 5
    """How often a statement is sent that deadlocks, or waits for a lock in vain."""

    def __init__(
        self, postgres: PostgresSettings, role: str, *, lock_timeout_ms: int = LOCK_TIMEOUT_MS
    ) -> None:
        self._postgres = postgres
        self._role = role
        self._lock_timeout_ms = lock_timeout_ms
        self._queries = queries(postgres.schema_name)
        self._connection: _Connection | None = None
        self._checked = False

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection, made if there is none: autocommit, with the session's guards.

        Raises:
            StoreUnavailable: PostgreSQL did not answer.
            SchemaError: The schema is not the one this program knows.
        """
        if self._connection is not None and self._connection.closed:
            self._connection = None
        if self._connection is None:
            self._connection = self._connect()
            try:
                self._check_schema(self._connection)
            except BaseException:
                self.reset()
                raise
        return self._connection

    def close(self) -> None:
        """Ends the connection; the next call makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error, OSError):
                connection.close()

    def reset(self) -> None:
        """Drops the connection, whatever it is in the middle of: a reply that comes late must not be read as another's."""
        self.close()

    # --- for the methods of a store

    def run(self, name: str, parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """Executes one statement of `sql/queries`; returns its rows as tuples."""
        query = self._queries[name]

        def work(connection: psycopg.Connection[Any]) -> list[Any]:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

        return self.attempt(work)

    def rows(self, name: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Executes one statement of `sql/queries`; returns its rows as dicts keyed by column."""
        query = self._queries[name]

        def work(connection: psycopg.Connection[Any]) -> list[dict[str, Any]]:
            with connection.cursor(row_factory=dict_row) as cursor:
                return cursor.execute(query, parameters).fetchall()

        return self.attempt(work)

    def attempt(self, work: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Does work on the connection, again if the database asks for it, and drops the connection when it is in doubt."""
        for left in reversed(range(self.tries)):
            connection = self.connection
            try:
                return work(connection)
            except psycopg.Error as error:
                if error.sqlstate not in TRANSIENT or left == 0:
                    raise self._translated(error) from error
            time.sleep(random.uniform(0.01, 0.05))  # noqa: S311 - no secret
        raise AssertionError("unreachable: the last try returns or raises")

    def raw_cursor(self, connection: psycopg.Connection[Any]) -> psycopg.Cursor[Any]:
        """A cursor with binary results and jsonb as bytes."""
        cursor = connection.cursor(binary=True)
        cursor.adapters.register_loader(_JSONB_OID, RawJson)
        return cursor

    # --- inside

    def _connect(self) -> _Connection:
        postgres = self._postgres
        try:
            given = conninfo_to_dict(postgres.dsn)
            connection = _Connection.connect(
                postgres.dsn,
                autocommit=True,
                connect_timeout=max(1, round(postgres.connect_timeout_seconds)),
                application_name=f"pmqd:{self._role}",
                options=f"{given.get('options') or ''} {_guards(postgres, self._lock_timeout_ms)}".strip(),
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
                tcp_user_timeout=TCP_USER_TIMEOUT_MS,
            )
        except psycopg.ProgrammingError as error:  # its message may quote the string, password and all
            raise ConfigError(
                f"postgres.dsn = {masked(postgres.dsn)!r} is not a connection string"
            ) from error
        except (psycopg.Error, OSError) as error:
            raise StoreUnavailable(f"PostgreSQL did not answer: {str(error).strip()}") from error
        connection.answer_seconds = postgres.statement_timeout_seconds + ANSWER_MARGIN_SECONDS
        return connection

    def _check_schema(self, connection: psycopg.Connection[Any]) -> None:
        if self._checked:
            return
        try:
            row = connection.execute(self._queries["schema_version"]).fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            row = (0,)
        except psycopg.Error as error:
            raise self._translated(error) from error
        check_version(self._postgres.schema_name, (row and row[0]) or 0)
        self._checked = True

    def _translated(self, error: psycopg.Error) -> PmqdError:
        """What an error of the database means here; drops the connection unless it certainly is as it was."""
        if error.sqlstate == "PMQ01":
            return LostLead(error.diag.message_primary or "the term has ended")
        if error.sqlstate in TRANSIENT:
            self._leave_transaction()
            return StoreBusy(f"PostgreSQL: {_line(error)}")
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            return SchemaError(f"{_line(error)}: grant {self._postgres.schema_name}_daemon to this user")
        if error.sqlstate in MISSING:
            # A table or function that this version needs is not there (any more): look at the version again next time.
            self._checked = False
            self.reset()
            return SchemaError(f"{_line(error)}: run `pmqd schema check`")
        # NotSupportedError: "cached plan must not change result type", after a change of the schema under a session.
        if isinstance(
            error,
            psycopg.OperationalError
            | psycopg.InterfaceError
            | psycopg.InternalError
            | psycopg.NotSupportedError,
        ):
            self.reset()
            return StoreUnavailable(f"PostgreSQL: {_line(error)}")
        self._leave_transaction()
        return StatementError(_line(error), error.sqlstate)

    def _leave_transaction(self) -> None:
        connection = self._connection
        if connection is not None and connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            self.reset()


class StatementError(PmqdError):
    """PostgreSQL refused what was asked of it: a constraint, or a value that does not fit."""

    def __init__(self, message: str, sqlstate: str | None) -> None:
        super().__init__(f"PostgreSQL refused it: {message}")
        self.sqlstate = sqlstate


def _line(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error).strip().partition("\n")[0] or type(error).__name__


def _guards(postgres: PostgresSettings, lock_timeout_ms: int) -> str:
    """Server settings of the session, as `options`.

    enable_seqscan, enable_sort: a plan made while a table was empty would read and sort all of it when it is full; every
    statement here has an index in its order, or a table of a few rows. jit: its compiling costs more than any statement here. client_connection_check_interval: a claim whose worker has died
    ends soon. tcp_*: the server's own ends of the connection; without them the session of a host that lost its power holds the migrator's
    lead and its locks for two hours. Isolation and time zone: whatever the database's own defaults are.
    """
    settings: dict[str, object] = {
        "statement_timeout": round(postgres.statement_timeout_seconds * 1000),
        "lock_timeout": lock_timeout_ms,
        "idle_in_transaction_session_timeout": IDLE_IN_TRANSACTION_MS,
        "client_connection_check_interval": 1000,
        "tcp_keepalives_idle": 10,
        "tcp_keepalives_interval": 5,
        "tcp_keepalives_count": 3,
        "tcp_user_timeout": 20_000,
        "default_transaction_isolation": r"read\ committed",
        "enable_seqscan": "off",
        "enable_sort": "off",
        "jit": "off",
        "timezone": "UTC",
    }
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


def span(ids: Sequence[UUID]) -> dict[str, UUID | None]:
    """The lowest and highest id, for pruning partitions; nothing lies between two nulls."""
    return {"lowest": min(ids, default=None), "highest": max(ids, default=None)}
