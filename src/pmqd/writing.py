"""Writes rows into `jobs` over a connection: one by the SQL function, many by COPY; plain and asynchronous."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from pmqd.errors import EnqueueError, PmqdError, SchemaError
from pmqd.rows import COPY_COLUMNS, QueueDefaults, Row, by_copy, copy_data

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TYPES: Final = {
    "kind": sql.SQL("%s::text"),
    "priority": sql.SQL("%s::int"),
    "max_attempts": sql.SQL("%s::int"),
    "tags": sql.SQL("%s::text[]"),
    "id": sql.SQL("%s::uuid"),
}


def write(conn: psycopg.Connection[Any], schema: str, rows: Sequence[Row], *, repeated: bool = False) -> None:
    """Writes rows in the connection's transaction, or in one of its own where none is open.

    Args:
        conn: The connection; a caller's is neither committed nor rolled back.
        schema: The name of pmqd's schema.
        rows: What to write.
        repeated: It may have been written before, so rows that exist are left alone.

    Raises:
        EnqueueError: The database refuses a value.
        SchemaError: The schema is not there.
        psycopg.Error: The connection is lost, or its transaction was in error before.
    """
    with _errors(schema), psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
        if len(rows) == 1:
            cursor.execute(*_enqueue(schema, rows[0]))
            return
        with _transaction(conn):
            new, others = ([], rows) if repeated or _pipelined(conn) else by_copy(rows)
            if new:
                cursor.execute(_facts(schema))
                now, may_copy = _read_facts(cursor.fetchone())
                if may_copy:
                    cursor.execute(_defaults(schema), [_queues(new)])
                    data = copy_data(new, _read_defaults(cursor.fetchall()), now, conn.info.encoding)
                    with cursor.copy(_copy(schema)) as copy:
                        for piece in data:
                            copy.write(piece)
                else:
                    others = rows
            if others:
                with conn.pipeline():
                    for row in others:
                        cursor.execute(*_enqueue(schema, row))


async def write_async(
    conn: psycopg.AsyncConnection[Any], schema: str, rows: Sequence[Row], *, repeated: bool = False
) -> None:
    """Writes rows from an event loop; see `write`."""
    with _errors(schema):
        async with psycopg.AsyncCursor(conn, row_factory=tuple_row) as cursor:
            if len(rows) == 1:
                await cursor.execute(*_enqueue(schema, rows[0]))
                return
            async with _transaction_async(conn):
                new, others = ([], rows) if repeated or _pipelined(conn) else by_copy(rows)
                if new:
                    await cursor.execute(_facts(schema))
                    now, may_copy = _read_facts(await cursor.fetchone())
                    if may_copy:
                        await cursor.execute(_defaults(schema), [_queues(new)])
                        data = copy_data(
                            new, _read_defaults(await cursor.fetchall()), now, conn.info.encoding
                        )
                        async with cursor.copy(_copy(schema)) as copy:
                            for piece in data:
                                await copy.write(piece)
                    else:
                        others = rows
                if others:
                    async with conn.pipeline():
                        for row in others:
                            await cursor.execute(*_enqueue(schema, row))


@contextmanager
def _transaction(conn: psycopg.Connection[Any]) -> Iterator[None]:
    """All or nothing on an autocommit connection; elsewhere the caller commits, and nothing is begun here."""
    if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
        with conn.transaction():
            yield
    else:
        yield


@asynccontextmanager
async def _transaction_async(conn: psycopg.AsyncConnection[Any]) -> AsyncIterator[None]:
    if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
        async with conn.transaction():
            yield
    else:
        yield


@contextmanager
def _errors(schema: str) -> Iterator[None]:
    """Names what the database refuses; a lost connection passes through, as only the caller knows whose it was."""
    try:
        yield
    except (psycopg.errors.DataError, psycopg.errors.IntegrityError) as error:
        raise EnqueueError(f"PostgreSQL refused the job: {_first_line(error)}") from error
    except (
        psycopg.errors.UndefinedTable,
        psycopg.errors.UndefinedFunction,
        psycopg.errors.UndefinedColumn,
        psycopg.errors.InvalidSchemaName,
    ) as error:
        text = f"schema {schema} is not there, or of another version: {_first_line(error)}; pmqd schema apply"
        raise SchemaError(text) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise PmqdError(f"the database user may not enqueue: {_first_line(error)}") from error


def _pipelined(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether the caller is in a pipeline, where COPY is impossible."""
    return conn.pgconn.pipeline_status != PipelineStatus.OFF


def _enqueue(schema: str, row: Row) -> tuple[bytes, list[Any]]:
    """The call of the SQL function; what the caller left open is not passed, so that the function decides it."""
    given: dict[str, Any] = {
        name: value for name in _TYPES if (value := getattr(row, name)) not in (None, ())
    }
    if "tags" in given:
        given["tags"] = list(row.tags)
    values = [row.queue_name, row.payload, *given.values()]
    if row.run_at is None:
        return _enqueue_statement(schema, tuple(given), ""), values
    due = "now() + %s::interval" if isinstance(row.run_at, timedelta) else "%s::timestamptz"
    return _enqueue_statement(schema, tuple(given), due), [*values, row.run_at]


@lru_cache(maxsize=256)
def _enqueue_statement(schema: str, names: tuple[str, ...], due: LiteralString) -> bytes:
    parts: list[sql.Composable] = [sql.SQL("queue_name => %s::text, payload => %s::jsonb")]
    parts += [sql.SQL("{} => {}").format(sql.Identifier(name), _TYPES[name]) for name in names]
    if due:  # a delay counts on the database's clock
        parts.append(sql.SQL("run_at => " + due))
    call = sql.SQL("select {}({})").format(sql.Identifier(schema, "enqueue"), sql.SQL(", ").join(parts))
    return call.as_bytes(None)  # psycopg would put it together anew each time


def _facts(schema: str) -> sql.Composed:
    # A user who may only call the function can neither COPY nor read the queues' defaults.
    return sql.SQL(
        "select (extract(epoch from now()) * 1000000)::bigint,"
        " has_table_privilege({}, 'insert') and has_table_privilege({}, 'select')"
    ).format(_quoted(schema, "jobs"), _quoted(schema, "job_queues"))


def _quoted(schema: str, name: str) -> sql.Literal:
    return sql.Literal(f'"{schema}"."{name}"')


def _read_facts(found: Any) -> tuple[datetime, bool]:
    return _EPOCH + timedelta(microseconds=int(found[0])), bool(found[1])


def _defaults(schema: str) -> sql.Composed:
    return sql.SQL("select name, default_priority, max_attempts from {} where name = any(%s::text[])").format(
        sql.Identifier(schema, "job_queues")
    )


def _read_defaults(found: Sequence[Any]) -> dict[str, QueueDefaults]:
    standard = QueueDefaults()
    return {
        name: QueueDefaults(priority or standard.priority, max_attempts or standard.max_attempts)
        for name, priority, max_attempts in found
    }


def _queues(rows: Sequence[Row]) -> list[str]:
    return list({row.queue_name for row in rows})


def _copy(schema: str) -> sql.Composed:
    columns = sql.SQL(", ").join(map(sql.Identifier, COPY_COLUMNS))
    return sql.SQL("copy {} ({}) from stdin (format binary)").format(sql.Identifier(schema, "jobs"), columns)


def _first_line(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error).partition("\n")[0]
