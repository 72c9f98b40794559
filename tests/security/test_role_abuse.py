"""What the roles of the database may not: looked up in the catalogue for all there is, and tried."""

import secrets
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

TABLE_RIGHTS = ["select", "insert", "update", "delete", "truncate", "references", "trigger"]


@pytest.fixture
def admin(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the owner."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def login(database: str, admin: psycopg.Connection[Any]) -> Iterator[Any]:
    """The function `login("enqueue")`: a connection of a fresh user with that role alone, or none."""
    made: list[tuple[str, psycopg.Connection[Any]]] = []

    def connect(role: str | None) -> psycopg.Connection[Any]:
        name = f"abuse_{secrets.token_hex(4)}"
        admin.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
        if role:
            admin.execute(
                sql.SQL("grant {} to {}").format(sql.Identifier(f"pmqd_{role}"), sql.Identifier(name))
            )
        connection = psycopg.connect(make_conninfo(database, user=name), autocommit=True)
        made.append((name, connection))
        return connection

    yield connect
    for name, connection in made:
        connection.close()
        admin.execute(sql.SQL("drop owned by {0}; drop role {0}").format(sql.Identifier(name)))


def rights(admin: psycopg.Connection[Any], role: str) -> set[str]:
    """Everything that a role may in the schema, as `right on name`."""
    tables = admin.execute(
        "select r || ' on ' || c.relname from pg_class c, unnest(%s::text[]) r where c.relnamespace = 'pmqd'::regnamespace"
        " and c.relkind in ('r', 'p', 'v', 'm') and has_table_privilege(%s, c.oid, r)",
        [TABLE_RIGHTS, role],
    ).fetchall()
    sequences = admin.execute(
        "select r || ' on ' || c.relname from pg_class c, unnest(array['usage', 'select', 'update']) r"
        " where c.relnamespace = 'pmqd'::regnamespace and c.relkind = 'S' and has_sequence_privilege(%s, c.oid, r)",
        [role],
    ).fetchall()
    functions = admin.execute(
        "select 'execute on ' || proname from pg_proc where pronamespace = 'pmqd'::regnamespace"
        " and has_function_privilege(%s, oid, 'execute')",
        [role],
    ).fetchall()
    schema = admin.execute(
        "select r || ' on schema' from unnest(array['usage', 'create']) r where has_schema_privilege(%s, 'pmqd', r)",
        [role],
    ).fetchall()
    return {row[0] for row in (*tables, *sequences, *functions, *schema)}


def test_role_abuse_a_producer_has_one_function(admin: psycopg.Connection[Any]) -> None:
    """The enqueue role may find the schema and call enqueue(): no table, no sequence, no other function, partitions included."""
    assert rights(admin, "pmqd_enqueue") == {"usage on schema", "execute on enqueue"}


def test_role_abuse_the_public_has_nothing(admin: psycopg.Connection[Any], login: Any) -> None:
    """A user of the same database without a role sees neither names nor rows, not even after new months were made."""
    admin.execute(
        "select pmqd.make_partition('jobs', date '2031-01-01'), pmqd.make_partition('job_logs', date '2031-01-01')"
    )
    stranger = login(None)
    assert rights(admin, stranger.info.user) == set()
    for statement in (
        "select pmqd.enqueue('q', '{}')",
        "select from pmqd.jobs",
        "select from pmqd.jobs_2031_01",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            stranger.execute(statement)


def test_role_abuse_the_daemon_owns_nothing(admin: psycopg.Connection[Any], login: Any) -> None:
    """Its role changes rows, not tables, functions or triggers; it is no superuser and no member of another role."""
    rows = admin.execute(
        "select rolname from pg_roles where rolname like 'pmqd\\_%' and (rolsuper or rolcreaterole or rolcreatedb"
        " or rolbypassrls or rolreplication or rolcanlogin)"
    ).fetchall()
    assert rows == []
    memberships = admin.execute(
        "select count(*) from pg_auth_members m join pg_roles r on r.oid = m.member where r.rolname in"
        " ('pmqd_enqueue', 'pmqd_daemon', 'pmqd_admin')"
    ).fetchone()
    assert memberships == (0,)
    owned = admin.execute(
        "select count(*) from pg_class where relnamespace = 'pmqd'::regnamespace"
        " and pg_get_userbyid(relowner) in ('pmqd_enqueue', 'pmqd_daemon', 'pmqd_admin')"
    ).fetchone()
    assert owned == (0,)
    daemon = login("daemon")
    for statement in (
        "create table pmqd.mine (a int)",
        "alter table pmqd.jobs add column mine int",
        "alter table pmqd.jobs disable trigger all",
        "drop table pmqd.job_logs",
        "truncate pmqd.jobs",
        "create trigger mine before insert on pmqd.jobs for each row execute function suppress_redundant_updates_trigger()",
        "create or replace function pmqd.wake() returns void language sql as 'select'",
        "alter function pmqd.enqueue security invoker",
        "delete from pmqd.jobs",
        "update pmqd.job_logs set status = 'success'",
        "update pmqd.schema_version set version = 99",
        "drop schema pmqd cascade",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            daemon.execute(statement)
    daemon.execute("grant select on pmqd.jobs to public")  # a warning: it may not pass on what it has
    assert rights(admin, login(None).info.user) == set()


ATTEMPTS = [
    "select payload from pmqd.jobs",
    "select count(*) from pmqd.jobs",
    "select last_error_message from pmqd.jobs_default",
    "table pmqd.job_logs",
    "table pmqd.instances",
    "table pmqd.claims",
    "table pmqd.schema_version",
    "insert into pmqd.jobs (queue_name, payload, status) values ('q', '{}', 'completed')",
    "insert into pmqd.jobs (queue_name, payload) values ('q', '{}')",
    "update pmqd.jobs set attempt_count = 0",
    "update pmqd.jobs set status = 'queued'",
    "delete from pmqd.jobs",
    "truncate pmqd.jobs",
    "do 'begin lock table pmqd.jobs in access exclusive mode; end'",
    "copy pmqd.jobs to stdout",
    "select nextval('pmqd.job_logs_id')",
    "select pmqd.retire_partition('jobs', date '2026-01-01', '{}')",
    "select pmqd.wake()",
    "select pmqd.pulse()",
    "create table pmqd.mine (a int)",
    "comment on table pmqd.jobs is 'mine'",
    "select * from pmqd.mark_ids(1, '{q}', '{1}', '{50}', '{10}', 10)",
]


def test_role_abuse_a_producer_reads_and_changes_nothing(
    login: Any, admin: psycopg.Connection[Any], database: str
) -> None:
    """Each way to another's payload, to a status, to attempts or to the tables is refused; enqueue works."""
    producer = login("enqueue")
    made = producer.execute("select pmqd.enqueue('q', '{\"mine\": 1}')").fetchone()
    assert made is not None
    for statement in ATTEMPTS:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            producer.execute(statement)
    with pytest.raises(psycopg.errors.UndefinedFunction):
        producer.execute("select pmqd.enqueue('q', '{}', status => 'completed')")
    with pytest.raises(psycopg.errors.UndefinedFunction):
        producer.execute("select pmqd.enqueue('q', '{}', attempt_count => -5)")
    row = admin.execute("select status, attempt_count from pmqd.jobs where id = %s", made).fetchone()
    assert row == ("queued", 0)


def test_role_abuse_an_id_that_exists_tells_and_changes_nothing(
    login: Any, admin: psycopg.Connection[Any]
) -> None:
    """Who guesses another's job id gets the id back, and neither its payload nor a change of it."""
    job_id = uuid4()
    admin.execute("select pmqd.enqueue('secret', '{\"card\": 4111}', id => %s)", [job_id])
    before = admin.execute("select * from pmqd.jobs where id = %s", [job_id]).fetchone()
    producer = login("enqueue")
    answer = producer.execute("select pmqd.enqueue('q', '{\"card\": 1}', priority => 1, id => %s)", [job_id])
    assert answer.fetchall() == [(job_id,)]
    assert admin.execute("select * from pmqd.jobs where id = %s", [job_id]).fetchone() == before


def test_role_abuse_a_producers_errors_hold_no_data_of_others(
    login: Any, admin: psycopg.Connection[Any]
) -> None:
    """Refusals quote what the producer sent, and no row of anybody else's."""
    admin.execute("select pmqd.enqueue('q', '{\"canary\": \"c4n4ry\"}')")
    producer = login("enqueue")
    for arguments in (
        "'q', '{}', priority => 99999999",
        "'q', '{}', max_attempts => -1",
        "'q', null",
        "null, '{}'",
        "'q', '{}', run_at => 'infinity'",
        "'q', '{}', run_at => '-infinity'",
        "'q', '{', priority => 1",
    ):
        with pytest.raises(psycopg.Error) as caught:
            producer.execute(f"select pmqd.enqueue({arguments})")
        assert "c4n4ry" not in str(caught.value)
