"""The schema in PostgreSQL: made and brought up to date by numbered files, and compared with what these would make.

Forward only. Each file is one transaction under one advisory lock, so two that apply at the same time do it once.
An application may keep a schema of its own in the same way: its `SchemaFiles` say whose files are meant.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
from psycopg import sql

from pmqd.config import masked
from pmqd.conninfo import complete, one_line
from pmqd.errors import ConfigError, SchemaError, StoreUnavailable
from pmqd.sql_files import (
    PMQD,
    SchemaFiles,
    check_version,
    role_names,
    schema_files,
    schema_text,
    too_new,
)

__all__ = ["OLDEST_SERVER", "PMQD", "SchemaFiles", "apply", "check", "check_version", "version"]

OLDEST_SERVER: Final = 140000

_CONNECT_SECONDS = 10
_LOCK_SECONDS = 60
_SHOWN_DIFFERENCES = 20

Shape = dict[tuple[str, str], str]
"""What a schema consists of: (what, name) -> definition."""


def apply(dsn: str, *, schema: str = "pmqd", source: SchemaFiles = PMQD) -> str:
    """Makes the schema or brings it up to date; does nothing where it is.

    Args:
        dsn: Where PostgreSQL is; the user must be allowed to create the schema and, where they are missing, its roles.
        schema: The schema's name.
        source: Its files.

    Returns:
        What was done, in words.

    Raises:
        SchemaError: It cannot be made, or is newer than this program.
        StoreUnavailable: PostgreSQL did not answer.
    """
    with _connected(dsn) as connection:
        _check_server(connection)
        found = _live_version(connection, schema)
        if found > source.latest:
            raise too_new(schema, found, source)
        done = [
            number
            for number in schema_files(source)
            if number > found and _apply_file(connection, schema, number, source)
        ]
    return f"brought to version {source.latest}" if done else f"version {source.latest}, up to date"


def version(dsn: str, *, schema: str = "pmqd") -> int:
    """The version of the live schema; 0 where there is none.

    Raises:
        StoreUnavailable: PostgreSQL did not answer.
    """
    with _connected(dsn) as connection:
        return _live_version(connection, schema)


def check(dsn: str, *, schema: str = "pmqd", source: SchemaFiles = PMQD) -> int:
    """Compares the live schema with what the files make.

    They are run in a transaction that is rolled back, under another name, and the two catalogues are compared: so it is
    this server's own reading of both. Monthly partitions are left out: they come and go.

    Returns:
        The version.

    Raises:
        SchemaError: It is missing, of another version, or differs; says in what.
        StoreUnavailable: PostgreSQL did not answer.
    """
    with _connected(dsn) as connection:
        _check_server(connection)
        found = _live_version(connection, schema)
        check_version(schema, found, source)
        differences = _differences(connection, schema, source)
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:_SHOWN_DIFFERENCES])
        more = len(differences) - _SHOWN_DIFFERENCES
        rest = f"\n  and {more} more" if more > 0 else ""
        raise SchemaError(f"schema {schema} is not what version {source.latest} makes:\n{shown}{rest}")
    return found


# --- applying


@contextmanager
def _connected(dsn: str) -> Iterator[psycopg.Connection]:
    try:
        connection = psycopg.connect(
            complete(dsn),
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            application_name="pmqd:schema",
        )
    except psycopg.ProgrammingError as error:  # its message may quote the string, password and all
        raise ConfigError(f"postgres.dsn = {masked(dsn)!r} is not a connection string") from error
    except psycopg.OperationalError as error:
        raise StoreUnavailable(f"PostgreSQL did not answer: {one_line(error)}") from error
    with connection:
        try:
            connection.execute("select set_config('lock_timeout', %s, false)", [f"{_LOCK_SECONDS}s"])
            # A role named as the schema has it in its search path, and would be shown names without it.
            connection.execute("set search_path = pg_catalog")
            yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise StoreUnavailable(f"PostgreSQL went away: {str(error).strip()}") from error


def _check_server(connection: psycopg.Connection) -> None:
    number = connection.info.server_version
    if number < OLDEST_SERVER:
        raise SchemaError(
            f"PostgreSQL {number // 10000} is too old: {OLDEST_SERVER // 10000} or later is needed"
        )


def _live_version(connection: psycopg.Connection, schema: str) -> int:
    table = sql.Identifier(schema, "schema_version")
    # Not to_regclass(): it may answer from a cache that knows nothing of what committed while we waited for the lock.
    known = connection.execute(
        "select from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = %s and c.relname = %s",
        [schema, "schema_version"],
    ).fetchone()
    if known is None:
        return 0
    try:
        row = connection.execute(sql.SQL("select max(version) from {}").format(table)).fetchone()
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"schema {schema}: {_first_line(error)}; grant {schema}_daemon to this user"
        ) from error
    return int(row[0] or 0) if row else 0


def _apply_file(connection: psycopg.Connection, schema: str, number: int, source: SchemaFiles) -> bool:
    """Runs one file unless somebody else has meanwhile; returns whether it did."""
    name = schema_files(source)[number]
    try:
        with connection.transaction():
            connection.execute(
                "select pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"pmqd schema {schema}"]
            )
            if _live_version(connection, schema) >= number:
                return False
            _make_version_table(connection, schema)
            connection.execute(schema_text(number, schema, role_names(schema, source), source))
            connection.execute(
                sql.SQL("insert into {} (version, name) values (%s, %s)").format(
                    sql.Identifier(schema, "schema_version")
                ),
                [number, name],
            )
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
        raise SchemaError(f"schema {schema}, file {name}: {_first_line(error)}{hint}") from error
    return True


def _make_version_table(connection: psycopg.Connection, schema: str) -> None:
    names = {"schema": sql.Identifier(schema)}
    row = connection.execute("select 1 from pg_namespace where nspname = %s", [schema]).fetchone()
    if row is None:  # `if not exists` would need the right to create schemas even where it does nothing
        connection.execute(sql.SQL("create schema {schema}").format(**names))
    connection.execute(
        sql.SQL(
            "create table if not exists {schema}.schema_version"
            " (version integer primary key, name text not null, applied_at timestamptz not null default now())"
        ).format(**names)
    )


def _first_line(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error).strip().partition("\n")[0]


# --- comparing


def _differences(connection: psycopg.Connection, schema: str, source: SchemaFiles) -> list[str]:
    roles = role_names(schema, source)
    known = {
        row[0]
        for row in connection.execute(
            "select rolname from pg_roles where rolname = any(%s)", [[*roles.values()]]
        )
    }
    missing = [f"role {name} is missing" for name in roles.values() if name not in known]
    live = _shape(connection, schema, known)
    wanted = _wanted_shape(connection, schema, known, source) if not missing else {}
    return missing or list(_compare(live, wanted))


def _wanted_shape(connection: psycopg.Connection, schema: str, known: set[str], source: SchemaFiles) -> Shape:
    """What the files make here: they run under another name, and are rolled back."""
    other = f"{schema}_check_{secrets.token_hex(4)}"
    try:
        with connection.transaction(force_rollback=True):
            _make_version_table(connection, other)
            for number in schema_files(source):
                connection.execute(schema_text(number, other, role_names(schema, source), source))
            made = _shape(connection, other, known)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"schema {schema} is at version {source.latest}, but it cannot be compared: {_first_line(error)};"
            " the comparison needs a user who may create schemas in this database"
        ) from error
    return {
        (what, name.replace(other, schema)): text.replace(other, schema)
        for (what, name), text in made.items()
    }


def _compare(live: Shape, wanted: Shape) -> Iterator[str]:
    for key in sorted(live.keys() | wanted.keys()):
        what, name = key
        if key not in live:
            yield f"{what} {name} is missing"
        elif key not in wanted:
            yield f"{what} {name} is not ours"
        elif live[key] != wanted[key]:
            yield f"{what} {name} differs"


def _shape(connection: psycopg.Connection, schema: str, roles: set[str]) -> Shape:
    rows = connection.execute(_SHAPE, {"schema": schema, "roles": sorted(roles)}).fetchall()
    return {(what, name): text.replace(f'"{schema}"', schema) for what, name, text in rows}


# new_id() is made by what the server offers, and a server may have been upgraded since: its text is not compared.
_SHAPE: Final = r"""
with space as (select oid from pg_namespace where nspname = %(schema)s),
tables as (
  select c.* from pg_class c, space s
  where c.relnamespace = s.oid and c.relkind in ('r', 'p', 'v', 'S') and c.relname !~ '^(jobs|job_logs)_[0-9]{4}_[0-9]{2}$'),
functions as (select p.* from pg_proc p, space s where p.pronamespace = s.oid)
select case c.relkind when 'v' then 'view' when 'S' then 'sequence' else 'table' end, c.relname::text,
       case c.relkind when 'v' then pg_get_viewdef(c.oid) when 'p' then pg_get_partkeydef(c.oid)
         else coalesce(pg_get_expr(c.relpartbound, c.oid), '') end
from tables c
union all
select 'column', c.relname || '.' || a.attname, concat_ws(' ', format_type(a.atttypid, a.atttypmod), a.attnotnull::text,
       pg_get_expr(d.adbin, d.adrelid))
from tables c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
where c.relkind <> 'S'
union all
select 'index', i.relname::text, pg_get_indexdef(i.oid) || case when x.indisvalid then '' else ' invalid' end
from tables c join pg_index x on x.indrelid = c.oid join pg_class i on i.oid = x.indexrelid
union all
select 'constraint', c.relname || '.' || k.conname, pg_get_constraintdef(k.oid)
from tables c join pg_constraint k on k.conrelid = c.oid
where k.contype in ('c', 'p', 'u', 'f', 'x') and k.conname !~ '^hold_'
union all
select 'trigger', c.relname || '.' || t.tgname, pg_get_triggerdef(t.oid) || ' ' || t.tgenabled::text
from tables c join pg_trigger t on t.tgrelid = c.oid and not t.tgisinternal
union all
select 'function', p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')',
       case when p.proname = 'new_id' then '' else pg_get_functiondef(p.oid) end
from functions p
union all
select 'domain', t.typname::text, concat_ws(' ', format_type(t.typbasetype, t.typtypmod), (
         select string_agg(pg_get_constraintdef(k.oid), ' ' order by k.conname) from pg_constraint k where k.contypid = t.oid))
from pg_type t join space s on s.oid = t.typnamespace where t.typtype = 'd'
union all
select 'right', concat_ws(' ', g.privilege, 'on', g.name, 'for', g.grantee), ''
from (
  select a.privilege_type as privilege, c.relname::text as name, coalesce(r.rolname, 'public') as grantee
  from tables c cross join aclexplode(coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))) a
  left join pg_roles r on r.oid = a.grantee where a.grantee = 0 or r.rolname = any(%(roles)s)
  union
  select a.privilege_type, p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')', coalesce(r.rolname, 'public')
  from functions p cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
  left join pg_roles r on r.oid = a.grantee where a.grantee = 0 or r.rolname = any(%(roles)s)
) g
"""
