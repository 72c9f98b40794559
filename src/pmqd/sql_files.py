"""The SQL files of the package, with the schema's name put in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from psycopg import sql

from pmqd.errors import SchemaError

ROLES = ("enqueue", "daemon", "admin")
"""The roles of pmqd's schema are named `<schema>_<role>`."""


@dataclass(frozen=True, slots=True)
class SchemaFiles:
    """A schema in numbered files, `sql/schema/0001_….sql` of a package: pmqd's own, or an application's.

    Attributes:
        package: whose files they are.
        program: the command that applies them, for messages.
        roles: what its roles are for; each is named `<schema>_<role>`, and is `{role_role}` and `{role_name}` in the files.
    """

    package: str
    program: str
    roles: tuple[str, ...]

    @property
    def latest(self) -> int:
        """The version that this program knows: the number of the last file."""
        return max(schema_files(self))


PMQD: Final = SchemaFiles("pmqd", "pmqd", ROLES)


def channel(schema: str) -> str:
    """The NOTIFY channel of a schema."""
    return f"pmqd_{schema}"


def role_names(schema: str, source: SchemaFiles = PMQD) -> dict[str, str]:
    """The names of the roles of a schema, by what they are for."""
    return {role: f"{schema}_{role}" for role in source.roles}


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
def schema_files(source: SchemaFiles = PMQD) -> Mapping[int, str]:
    """The names of the files in `sql/schema` by version, in their order."""
    folder = files(source.package) / "sql" / "schema"
    names = sorted(file.name for file in folder.iterdir() if re.fullmatch(r"\d{4}_\w+\.sql", file.name))
    return {int(name[:4]): name for name in names}


def schema_text(version: int, schema: str, roles: Mapping[str, str], source: SchemaFiles = PMQD) -> bytes:
    """One file of `sql/schema`, to be executed as it is.

    Args:
        version: Its number.
        schema: The schema's name.
        roles: The roles' names by what they are for.
        source: Whose files.
    """
    folder = files(source.package) / "sql" / "schema"
    text = (folder / schema_files(source)[version]).read_text(encoding="utf-8")
    names: dict[str, sql.Composable] = {
        "schema": sql.Identifier(schema),
        "channel": sql.Literal(channel(schema)),
    }
    for role, name in roles.items():
        names[f"{role}_role"], names[f"{role}_name"] = sql.Identifier(name), sql.Literal(name)
    return _filled(text, names)


def _filled(text: str, names: Mapping[str, sql.Composable]) -> bytes:
    return sql.SQL(text).format(**names).as_bytes(None)


LATEST: Final = PMQD.latest
"""The version of the schema that this program knows."""


def check_version(schema: str, found: int, source: SchemaFiles = PMQD) -> None:
    """Passes if this program knows the version.

    Raises:
        SchemaError: One line that says what to do.
    """
    program, latest = source.program, source.latest
    if found == 0:
        raise SchemaError(f"there is no schema {schema} in this database: run `{program} schema apply`")
    if found < latest:
        raise SchemaError(
            f"schema {schema} is at version {found}, this {program} needs {latest}: run `{program} schema apply`"
        )
    if found > latest:
        raise too_new(schema, found, source)


def too_new(schema: str, found: int, source: SchemaFiles = PMQD) -> SchemaError:
    """The error about a schema that a later program made."""
    return SchemaError(
        f"schema {schema} is at version {found}, this {source.program} knows versions up to {source.latest}:"
        f" install a newer {source.program}"
    )
