"""One connection to PostgreSQL: how it is made, guarded, given up and made again.

Every statement has two ends: the server's `statement_timeout`, and this side's own deadline for a server that does not
answer at all. After either, and after anything else that leaves the state of the connection in doubt, it is dropped.

Through a pooler in transaction mode the next transaction may run in another session: there the guards come with each
transaction, and nothing is prepared.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, TypeVar
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from pmqd.config import PostgresSettings, masked
from pmqd.conninfo import complete, one_line
from pmqd.errors import ConfigError, PmqdError, SchemaError, StoreUnavailable
from pmqd.sql_files import check_version, queries

T = TypeVar("T")

LOCK_TIMEOUT_MS: Final = 1500
IDLE_IN_TRANSACTION_MS: Final = 10_000
SEARCH_PATH: Final = ("pg_catalog", "pg_temp")
"""All that is ours is named with its schema. So nothing that somebody else put into `public`, such as a function that fits better
than the server's own of that name, is ever found."""
HANDLER: Final = "handler"
"""The role of a session that user code is given."""
TCP_USER_TIMEOUT_MS: Final = 3000
ANSWER_MARGIN_SECONDS: Final = 2.0
"""How long after the server's own timeout its answer is still waited for."""

TRANSIENT: Final = ("40001", "40P01", "55P03")
"""Serialization failure, deadlock, lock not available: the same statement succeeds in a moment."""

MISSING: Final = ("3F000", "42703", "42704", "42883", "42P01")
"""Schema, column, type, function or table not there: psycopg's classes for these have no parent of their own."""


class LostLead(PmqdError):  # noqa: N818 - the name says what is so
    """Another migrator has a higher term."""


class StoreBusy(StoreUnavailable):
    """PostgreSQL is there, but somebody else held the lock, time and again."""


class Life(Protocol):
    """Which PostgreSQL this is: the cluster's number, and its timeline, which each promotion of a standby raises; 0 is unknown."""

    cluster: int
    timeline: int


@dataclass(slots=True)
class SeenLife:
    """The newest life that one process has seen."""

    cluster: int = 0
    timeline: int = 0


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


class Session:
    """One lazily made connection and the statements of `sql/queries`.

    Every method of a store: raises `StoreUnavailable` when PostgreSQL did not answer (the connection is dropped; what was
    sent may or may not have been committed), `SchemaError` when the schema is not the one this program knows.
    """

    tries: ClassVar[int] = 5
    """How often a statement is sent that deadlocks, or waits for a lock in vain."""
    retrying: Callable[[], None] | None = None
    """Called before each repetition: who waits for locks, several times in a row, does not stand still."""

    def __init__(
        self,
        postgres: PostgresSettings,
        role: str,
        *,
        lock_timeout_ms: int = LOCK_TIMEOUT_MS,
        direct: bool = False,
        newest: Life | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            postgres: Where PostgreSQL is.
            role: For whom, as `application_name` tells it.
            lock_timeout_ms: How long a statement waits for a lock.
            direct: Past a pooler: for locks and notifications, which belong to a session.
            newest: The newest life of PostgreSQL that whoever shares this object has seen; an older one is refused.
        """
        self._postgres = postgres
        self._role = role
        # In a handler's session its own tables are found by its own path; whoever writes a path into the DSN means it.
        self._pinned = role != HANDLER and "search_path" not in postgres.dsn
        self._lock_timeout_ms = lock_timeout_ms
        self._direct = direct
        self._pooled = postgres.pooled and not direct
        self._newest = SeenLife() if newest is None else newest
        self._turn = 0
        self.life: tuple[int, int] | None = None
        self._queries = queries(postgres.schema_name)
        self._connection: _Connection | None = None
        self._plain: psycopg.Cursor[Any] | None = None
        self._raw: psycopg.Cursor[Any] | None = None
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
                self._check_server(self._connection)
            except BaseException:
                self.reset()
                raise
        return self._connection

    def meet(self) -> tuple[int, int]:
        """The cluster and timeline of the PostgreSQL that this connection has reached, or now reaches."""
        _ = self.connection
        assert self.life is not None
        return self.life

    def close(self) -> None:
        """Ends the connection; the next call makes a new one."""
        connection, self._connection = self._connection, None
        self._plain = self._raw = None
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
            cursor = self.plain_cursor(connection).execute(query, parameters)
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
                return self._guarded(connection, work) if self._pooled else work(connection)
            except psycopg.Error as error:
                if error.sqlstate not in TRANSIENT or left == 0:
                    raise self._translated(error) from error
            if self.retrying is not None:
                self.retrying()
            time.sleep(random.uniform(0.01, 0.05))  # noqa: S311 - no secret
        raise AssertionError("unreachable: the last try returns or raises")

    def plain_cursor(self, connection: psycopg.Connection[Any]) -> psycopg.Cursor[Any]:
        """The cursor for one statement after the other.

        It is kept as long as the connection: a new one would find out again how each parameter is written and each column read.
        """
        if self._plain is None or self._plain.connection is not connection:
            self._plain = connection.cursor()
        return self._plain

    def raw_cursor(self, connection: psycopg.Connection[Any]) -> psycopg.Cursor[Any]:
        """The same with binary results."""
        if self._raw is None or self._raw.connection is not connection:
            self._raw = connection.cursor(binary=True)
        return self._raw

    # --- inside

    def _connect(self) -> _Connection:
        postgres = self._postgres
        dsn = postgres.direct if self._direct else postgres.dsn
        try:
            connection = _Connection.connect(
                complete(dsn, turn=self._turn),
                autocommit=True,
                prepare_threshold=None if self._pooled else 5,
                connect_timeout=max(1, round(postgres.connect_timeout_seconds)),
                application_name=f"pmqd:{self._role}",
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
                tcp_user_timeout=TCP_USER_TIMEOUT_MS,
                **self._options(dsn),
            )
        except psycopg.ProgrammingError as error:  # its message may quote the string, password and all
            raise ConfigError(f"postgres.dsn = {masked(dsn)!r} is not a connection string") from error
        except (psycopg.Error, OSError) as error:
            text = one_line(error)
            if "unsupported startup parameter" in text:  # a pooler, which takes no guards; it always will
                raise ConfigError(f"PostgreSQL at {masked(dsn)}: {text}") from error
            raise StoreUnavailable(f"PostgreSQL did not answer: {text}") from error
        connection.answer_seconds = postgres.statement_timeout_seconds + ANSWER_MARGIN_SECONDS
        return connection

    def _options(self, dsn: str) -> dict[str, Any]:
        """The guards as libpq's `options`; a pooler would refuse them, or give them to others.

        force_generic_plan: left to itself PostgreSQL plans a claim or settle of a few jobs, or over many months, anew each time,
        which costs more than doing it. Not for a handler's own statements.
        """
        if self._pooled:
            return {}
        given = conninfo_to_dict(dsn).get("options") or ""
        guards = _session_guards(self._postgres, self._lock_timeout_ms)
        if self._role != HANDLER:
            guards += " -c plan_cache_mode=force_generic_plan"
        if self._pinned:
            guards += f" -c search_path={','.join(SEARCH_PATH)}"
        return {"options": f"{given} {guards}".strip()}

    def _guarded(
        self, connection: psycopg.Connection[Any], work: Callable[[psycopg.Connection[Any]], T]
    ) -> T:
        """Does work in a transaction that carries its guards: what a pooler's session is set to, nobody knows."""
        connection.execute(_opening(self._postgres, self._lock_timeout_ms, pinned=self._pinned))
        try:
            done = work(connection)
        except BaseException:
            with suppress(psycopg.Error):
                connection.rollback()
            raise
        connection.commit()
        return done

    def _check_server(self, connection: _Connection) -> None:
        """Looks at whom this connection has reached: PostgreSQL itself or a pooler, and which life of the cluster.

        Raises:
            ConfigError: A pooler, where a session is needed.
            StoreUnavailable: A primary that another has taken the place of; the next try begins with another host.
        """
        try:
            row = connection.execute(self._queries["server"], prepare=False).fetchone()
        except psycopg.Error as error:
            raise self._translated(error) from error
        assert row is not None
        pid, cluster, timeline = row
        if pid != connection.info.backend_pid:
            self._meet_pooler(connection)
        newest = self._newest
        if timeline and cluster == newest.cluster and timeline < newest.timeline:
            self._turn += 1
            where = connection.info.host or "its default socket"
            raise StoreUnavailable(
                f"PostgreSQL at {where} is on timeline {timeline}, and {newest.timeline} has been seen: it is the old"
                " primary, and must not be written to any more"
            )
        if timeline and (cluster, timeline) != (newest.cluster, newest.timeline):
            newest.cluster, newest.timeline = cluster, timeline
        self.life = (cluster, timeline)

    def _meet_pooler(self, connection: _Connection) -> None:
        if self._direct:
            raise ConfigError(
                f"PostgreSQL at {masked(self._postgres.direct)} is a connection pooler: the leading migrator needs a session"
                " of its own for its lock and its notifications. Set postgres.direct_dsn to the way past the pooler"
            )
        self._pooled = True
        connection.prepare_threshold = None

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


def _guards(postgres: PostgresSettings, lock_timeout_ms: int) -> dict[str, str]:
    """Server settings for each statement.

    enable_seqscan, enable_sort: a plan made while a table was empty would read and sort all of it when it is full; every
    statement here has an index in its order, or a table of a few rows. jit: its compiling costs more than any statement here.
    """
    return {
        "statement_timeout": str(round(postgres.statement_timeout_seconds * 1000)),
        "lock_timeout": str(lock_timeout_ms),
        "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
        "enable_seqscan": "off",
        "enable_sort": "off",
        "jit": "off",
        "timezone": "UTC",
    }


def _session_guards(postgres: PostgresSettings, lock_timeout_ms: int) -> str:
    """The guards of a session, as `options`, and what only a session can have.

    client_connection_check_interval: a claim whose worker has died ends soon. tcp_*: the server's own ends of the
    connection; without them the session of a host that lost its power holds the migrator's lead and its locks for two
    hours. Isolation: whatever the database's own default is.
    """
    settings = _guards(postgres, lock_timeout_ms) | {
        "client_connection_check_interval": "1000",
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "20000",
        "default_transaction_isolation": r"read\ committed",
    }
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


def _opening(postgres: PostgresSettings, lock_timeout_ms: int, *, pinned: bool) -> sql.Composed:
    """Opens a transaction with its guards, in one round trip. A plain `set` would stay in the pooler's session, for others."""
    guards = (
        sql.SQL("set local {} = {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in _guards(postgres, lock_timeout_ms).items()
    )
    names = sql.SQL(", ").join(map(sql.Identifier, SEARCH_PATH))
    path = [sql.SQL("set local search_path = {}").format(names)] if pinned else []
    return sql.SQL("; ").join([sql.SQL("begin isolation level read committed"), *guards, *path])


def span(ids: Sequence[UUID]) -> dict[str, UUID | None]:
    """The lowest and highest id, for pruning partitions; nothing lies between two nulls."""
    return {"lowest": min(ids, key=_number, default=None), "highest": max(ids, key=_number, default=None)}


def _number(job_id: UUID) -> int:
    return job_id.int  # comparing UUIDs themselves is slow
