"""The SQL files of the package, with the schema's name put in."""

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Final

from psycopg import sql

from pmqd.errors import SchemaError

ROLES = ("enqueue", "daemon", "admin")
"""The roles of a schema are named `<schema>_<role>`."""


def channel(schema: str) -> str:
    """The NOTIFY channel of a schema."""
    return f"pmqd_{schema}"


def role_names(schema: str) -> dict[str, str]:
    """The names of the three roles of a schema, by what they are for."""
    return {role: f"{schema}_{role}" for role in ROLES}


@cache
def queries(schema: str) -> Mapping[str, bytes]:
    """The statements in `sql/queries`, by file name.

    Args:
        schema: The schema's name.
    """
    folder = files("pmqd") / "sql" / "queries"
    names = {"schema": sql.Identifier(schema)}
    return {
        file.name.removesuffix(".sql"): _filled(file.read_text(encoding="utf-8"), names)
        for file in folder.iterdir()
        if file.name.endswith(".sql")
    }


@cache
def schema_files() -> Mapping[int, str]:
    """The names of the files in `sql/schema` by version, in their order."""
    folder = files("pmqd") / "sql" / "schema"
    names = sorted(file.name for file in folder.iterdir() if re.fullmatch(r"\d{4}_\w+\.sql", file.name))
    return {int(name[:4]): name for name in names}


def schema_text(version: int, schema: str, roles: Mapping[str, str]) -> bytes:
    """One file of `sql/schema`, to be executed as it is.

    Args:
        version: Its number.
        schema: The schema's name.
        roles: The roles' names by what they are for.
    """
    text = (files("pmqd") / "sql" / "schema" / schema_files()[version]).read_text(encoding="utf-8")
    names: dict[str, sql.Composable] = {
        "schema": sql.Identifier(schema),
        "channel": sql.Literal(channel(schema)),
    }
    for role, name in roles.items():
        names[f"{role}_role"], names[f"{role}_name"] = sql.Identifier(name), sql.Literal(name)
    return _filled(text, names)


def _filled(text: str, names: Mapping[str, sql.Composable]) -> bytes:
    return sql.SQL(text).format(**names).as_bytes(None)


LATEST: Final = max(schema_files())
"""The version of the schema that this program knows."""


def check_version(schema: str, found: int) -> None:
    """Passes if this program knows the version.

    Raises:
        SchemaError: One line that says what to do.
    """
    if found == 0:
        raise SchemaError(f"there is no schema {schema} in this database: run `pmqd schema apply`")
    if found < LATEST:
        raise SchemaError(
            f"schema {schema} is at version {found}, this pmqd needs {LATEST}: run `pmqd schema apply`"
        )
    if found > LATEST:
        raise too_new(schema, found)


def too_new(schema: str, found: int) -> SchemaError:
    """The error about a schema that a later program made."""
    return SchemaError(
        f"schema {schema} is at version {found}, this pmqd knows versions up to {LATEST}: install a newer pmqd"
    )
