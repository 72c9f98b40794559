"""The schema `penguinmails`: made, brought up to date and compared as pmqd's own is, in the same database."""

import contextlib
from functools import cache
from importlib.resources import files
from typing import Any, Final

import psycopg

from pmqd import SchemaError
from pmqd import schema as machinery

NAME: Final = "penguinmails"
FILES: Final = machinery.SchemaFiles("penguinmails", "penguinmails", ("enqueue", "daemon", "admin"))


def apply(dsn: str) -> str:
    """Makes the schema or brings it up to date; does nothing where it is.

    Args:
        dsn: the database of pmqd's own schema; the user must be allowed to create schemas, and roles where they are missing.

    Returns:
        What was done, in words.

    Raises:
        pmqd.SchemaError: it cannot be made, or is newer than this program.
        pmqd.StoreUnavailable: PostgreSQL did not answer.
    """
    return machinery.apply(dsn, schema=NAME, source=FILES)


def check(dsn: str) -> int:
    """Compares the live schema with what this version makes; gives the version.

    Raises:
        pmqd.SchemaError: it is missing, of another version, or differs; says in what.
        pmqd.StoreUnavailable: PostgreSQL did not answer.
    """
    return machinery.check(dsn, schema=NAME, source=FILES)


def fault(connection: psycopg.Connection[Any]) -> str | None:
    """What is wrong with the live schema's version, in words; None if it is this program's. For a worker's first job.

    Args:
        connection: in a transaction of its own; a schema that is not there leaves it aborted.
    """
    found = 0
    with contextlib.suppress(psycopg.errors.UndefinedTable):
        row = connection.execute(query("schema_version")).fetchone()
        found = int(row[0] or 0) if row else 0
    try:
        machinery.check_version(NAME, found, FILES)
    except SchemaError as error:
        return str(error)
    return None


@cache
def query(name: str) -> bytes:
    """The statement in `sql/queries/NAME.sql`."""
    return (files("penguinmails") / "sql" / "queries" / f"{name}.sql").read_bytes()
