"""What all commands of `penguinmails` share: the connection to pmqd's database, and JSON."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import psycopg
import typer

from pmqd.config import producer_settings


@contextmanager
def connected() -> Iterator[psycopg.Connection[Any]]:
    """A transaction in pmqd's database."""
    with psycopg.connect(producer_settings().postgres.dsn, connect_timeout=5) as conn:
        yield conn


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    typer.echo(orjson.dumps(value).decode())
