"""The schema `penguinmails`: made, brought up to date and compared as pmqd's own is, in the same database."""

import contextlib
import logging
from functools import cache
from importlib.resources import files
from typing import Any, Final

import psycopg

from pmqd import Job, SchemaError, Snooze
from pmqd import schema as machinery

NAME: Final = "penguinmails"
FILES: Final = machinery.SchemaFiles("penguinmails", "penguinmails", ("enqueue", "daemon", "admin"))
SNOOZE_SECONDS: Final = 30.0  # until a job is looked at again that found no schema

log = logging.getLogger(__name__)
_seen: set[str] = set()


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


def require(job: Job) -> None:
    """Looks once per process, at its first job, so that no job uses up its attempts where there are no tables.

    Raises:
        Snooze: the schema is missing or of another version; the log says so.
    """
    if NAME in _seen:
        return
    with job.transaction() as conn:
        found = fault(conn)
    if found:
        log.error("no job of %s is run: %s", NAME, found)
        raise Snooze(SNOOZE_SECONDS)
    _seen.add(NAME)


@cache
def query(name: str) -> bytes:
    """The statement in `sql/queries/NAME.sql`."""
    return (files("penguinmails") / "sql" / "queries" / f"{name}.sql").read_bytes()
