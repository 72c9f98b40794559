"""What `pmqd doctor` says of PostgreSQL's standbys, of a pooler before it, and of the rights of pmqd's user."""

from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
from psycopg import sql

from pmqd.config import PostgresSettings, masked
from pmqd.conninfo import complete, one_line
from pmqd.findings import Finding, Level
from pmqd.sql_files import role_names

FACTS = """
with tables as (
  select c.oid, c.relname as name from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where n.nspname = %(schema)s and c.relname in ('jobs', 'claims', 'job_logs'))
select current_user as role, (select rolsuper from pg_roles where rolname = current_user) as superuser,
       exists (select from tables) as there,
       (select has_schema_privilege(oid, 'usage') from pg_namespace where nspname = %(schema)s)
         and (select bool_and(has_table_privilege(oid, 'select') and has_table_privilege(oid, 'insert')) from tables)
         and (select has_table_privilege(oid, 'update') from tables where name = 'jobs')
         and (select has_table_privilege(oid, 'delete') from tables where name = 'claims') as works,
       current_setting('synchronous_standby_names') as synchronous_names, current_setting('synchronous_commit') as synchronous_commit,
       (select count(*) from pg_stat_replication where application_name <> 'pg_basebackup')::int as standbys,
       (select count(*) from pg_stat_replication where sync_state in ('sync', 'quorum'))::int as synchronous_standbys,
       pg_has_role(current_user, 'pg_read_all_stats', 'usage') as sees_standbys
"""
"""For `rights` and `failover`; a standby's state is shown to members of pg_read_all_stats only."""


def rights(facts: Mapping[str, Any], schema: str) -> Iterator[Finding]:
    """Whether the user may do what the daemon does, and whether it may do much more.

    Args:
        facts: The answer to `FACTS`.
        schema: The schema's name.
    """
    role = sql.Identifier(facts["role"]).as_string(None)
    if facts["there"] and not facts["works"]:
        do = f"grant {sql.Identifier(role_names(schema)['daemon']).as_string(None)} to {role};"
        found = f"{facts['role']} may not do what the daemon does in schema {schema}"
        yield Finding("rights", Level.WRONG, found, do)
    elif facts["superuser"]:
        found = f"{facts['role']} is a superuser; a role with {schema}_daemon granted would do"
        yield Finding("rights", Level.OK, found)
    else:
        yield Finding("rights", Level.OK, f"{facts['role']} may do what the daemon does")


def failover(facts: Mapping[str, Any], postgres: PostgresSettings) -> Iterator[Finding]:
    """Whether a standby is there, and whether it is what `postgres.standby` says.

    Args:
        facts: The answer to `FACTS`.
        postgres: The section of the configuration.
    """
    names = facts["synchronous_names"]
    waits = bool(names) and facts["synchronous_commit"] not in ("off", "local")
    if postgres.standby == "synchronous" and not waits:
        why = (
            "synchronous_standby_names is empty"
            if not names
            else f"synchronous_commit is {facts['synchronous_commit']}"
        )
        found = f"{why}: a promoted standby may lack claims, and their jobs would run twice at once"
        yield Finding("standby", Level.WRONG, found, 'set postgres.standby = "asynchronous"')
        return
    if waits and facts["sees_standbys"] and not facts["synchronous_standbys"]:
        found = f"synchronous_standby_names = {names!r}, and none of them is connected: every commit waits for one"
        do = "start the standby, or: alter system reset synchronous_standby_names; select pg_reload_conf();"
        yield Finding("standby", Level.WRONG, found, do)
        return
    yield Finding("standby", Level.OK, _standbys(facts, postgres, waits=waits))


def _standbys(facts: Mapping[str, Any], postgres: PostgresSettings, *, waits: bool) -> str:
    if not facts["sees_standbys"]:
        seen = "not shown to this role"
    else:
        seen = f"{facts['standbys']} connected, {facts['synchronous_standbys']} synchronous"
    if waits and postgres.standby == "asynchronous":
        return f'{seen}; postgres.standby = "synchronous" would spare the pause after a failover'
    return seen


def through_pooler(postgres: PostgresSettings) -> Finding:
    """Whether `postgres.dsn` leads to a pooler, as `postgres.direct_dsn` says, and to the same database."""
    seconds = max(2, round(postgres.connect_timeout_seconds))
    shown = masked(postgres.dsn)
    try:
        with (
            psycopg.connect(
                complete(postgres.dsn), autocommit=True, connect_timeout=seconds, prepare_threshold=None
            ) as pooled,
            psycopg.connect(complete(postgres.direct), autocommit=True, connect_timeout=seconds) as direct,
        ):
            here, there = (_whereabouts(connection) for connection in (pooled, direct))
    except psycopg.Error as error:
        text = f"{shown}: {one_line(error)}"
        return Finding("pooler", Level.UNREACHABLE, text, "start it, or set postgres.dsn")
    if here != there:
        do = "set postgres.dsn and postgres.direct_dsn to the same database of the same server"
        return Finding("pooler", Level.WRONG, f"{shown} is another database than postgres.direct_dsn", do)
    return Finding("pooler", Level.OK, f"{shown} leads to the same database")


def _whereabouts(connection: psycopg.Connection[Any]) -> Any:
    return connection.execute(
        "select current_database(), system_identifier, pg_is_in_recovery() from pg_control_system()"
    ).fetchone()
