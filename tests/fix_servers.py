"""Fixtures: real PostgreSQL and Redis servers, private to this test run."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar, cast

import psycopg
import pytest
import redis

from pmqd import folders
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.programs import Prefer

TEMPLATE = "template_pmqd"
MAIL_TEMPLATE = "template_penguinmails"
_numbers = itertools.count(1)

T = TypeVar("T")


class WaitUntil(Protocol):
    """What the fixture `wait_until` gives."""

    def __call__(self, predicate: Callable[[], T], timeout: float = 10.0, what: str = "the condition") -> T:
        """Wait until the predicate is true and return its value."""


def prefer() -> Prefer:
    """PMQD_TEST_POSTGRES=wheel|path chooses the PostgreSQL under test; the wheel's (18) without it."""
    value = os.environ.get("PMQD_TEST_POSTGRES", "wheel")
    if value not in ("wheel", "path"):
        pytest.exit(f"PMQD_TEST_POSTGRES={value!r}: allowed are wheel and path", returncode=2)
    return cast("Prefer", value)


@pytest.fixture(scope="session")
def session_folder() -> Iterator[Path]:
    """A short folder for sockets and data of the whole run (pytest's own paths are too long for sockets)."""
    with folders.short_folder() as folder:
        yield folder


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A short folder for one test, removed after it."""
    with folders.short_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres(session_folder: Path) -> Iterator[PostgresServer]:
    """The session's PostgreSQL server. Tests that stop it take `own_postgres`."""
    with PostgresServer(session_folder / "pg", prefer=prefer()) as server:
        yield server


@pytest.fixture(scope="session")
def template(postgres: PostgresServer) -> str:
    """The name of a database with the schema applied; tests get copies of it."""
    apply_schema(postgres.create_database(TEMPLATE))
    return TEMPLATE


@pytest.fixture
def database(postgres: PostgresServer, template: str) -> Iterator[str]:
    """The DSN of a fresh database with the schema applied."""
    name = f"test_{next(_numbers)}"
    yield postgres.create_database(name, template)
    postgres.drop_database(name)


@pytest.fixture(scope="session")
def mail_template(postgres: PostgresServer, template: str) -> str:
    """The name of a database with the schema of penguinmails beside pmqd's."""
    from penguinmails import schema

    schema.apply(postgres.create_database(MAIL_TEMPLATE, template))
    return MAIL_TEMPLATE


@pytest.fixture
def mail_database(postgres: PostgresServer, mail_template: str) -> Iterator[str]:
    """The DSN of a fresh database with both schemas applied."""
    name = f"test_{next(_numbers)}"
    yield postgres.create_database(name, mail_template)
    postgres.drop_database(name)


@pytest.fixture
def empty_database(postgres: PostgresServer) -> Iterator[str]:
    """The DSN of a fresh database without any schema."""
    name = f"test_{next(_numbers)}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
def own_postgres(short_folder: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server of this test alone, which it may stop and kill; its database `pmqd` has the schema."""
    with PostgresServer(short_folder / "pg", prefer=prefer()) as server:
        apply_schema(server.create_database("pmqd"))
        yield server


@pytest.fixture(scope="session")
def redis_server(session_folder: Path) -> Iterator[RedisServer]:
    """The session's Redis server, on TCP and a Unix socket. Tests that stop it take `own_redis`."""
    with RedisServer(session_folder / "redis", tcp=True) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the session's Redis, emptied."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def own_redis(short_folder: Path) -> Iterator[RedisServer]:
    """A Redis server of this test alone, which it may stop and kill. On TCP too, at the same port after a restart."""
    with RedisServer(short_folder / "redis", tcp=True) as server:
        yield server


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to `database`, for a test that looks."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> WaitUntil:
    """The function `wait_until(predicate, timeout=10.0, what="…")`."""
    return wait_until


def wait_until(predicate: Callable[[], T], timeout: float = 10.0, what: str = "the condition") -> T:
    """Wait until `predicate()` is true and return its value; fail with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout:g} s", pytrace=True)
        time.sleep(0.01)
    return value


def apply_schema(dsn: str) -> None:
    """Apply the current schema, as `pmqd schema apply` does."""
    from pmqd.schema import apply

    apply(dsn, schema="pmqd")
