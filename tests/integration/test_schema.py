import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pmqd import schema, sql_files
from pmqd.errors import SchemaError, StoreUnavailable
from pmqd.job import Action
from pmqd.store import Store
from tests.store_tools import WORKER, Bench, open_bench, outcome


@pytest.fixture
def second_schema(empty_database: str) -> Iterator[str]:
    """A database with a schema of another name; its roles are dropped afterwards."""
    schema.apply(empty_database, schema="jobs_2")
    yield empty_database
    with psycopg.connect(empty_database, autocommit=True) as connection:
        for role in sql_files.role_names("jobs_2").values():
            connection.execute(f"drop owned by {role}; drop role {role}")


# --- apply and check


def test_apply_makes_it_once(empty_database: str) -> None:
    """Nothing there: version 0. Applied: the latest, and the same again does nothing."""
    assert schema.version(empty_database) == 0
    with pytest.raises(SchemaError, match="pmqd schema apply"):
        schema.check(empty_database)
    assert "brought" in schema.apply(empty_database)
    assert schema.version(empty_database) == schema.check(empty_database) == sql_files.LATEST
    assert "up to date" in schema.apply(empty_database)


def test_two_that_apply_at_once(empty_database: str) -> None:
    """Four at the same moment: none fails, each file ran once."""
    gate, answers = threading.Barrier(4), list[str]()

    def apply() -> None:
        gate.wait()
        answers.append(schema.apply(empty_database))

    threads = [threading.Thread(target=apply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert schema.check(empty_database) == sql_files.LATEST


def test_another_name_is_as_good(second_schema: str) -> None:
    """Everything hangs on the setting: schema, roles, channel."""
    assert schema.check(second_schema, schema="jobs_2") == sql_files.LATEST
    with psycopg.connect(second_schema, autocommit=True) as connection:
        connection.execute("listen pmqd_jobs_2")
        connection.execute("select jobs_2.enqueue('a', '{}')")
        assert [notify.channel for notify in connection.notifies(timeout=5, stop_after=1)] == ["pmqd_jobs_2"]
        assert connection.execute("select count(*) from jobs_2.jobs").fetchone() == (1,)


DRIFTS = {
    "drop index pmqd.jobs_ready": "index jobs_ready is missing",
    "drop trigger wake_after_insert on pmqd.jobs": "trigger jobs.wake_after_insert is missing",
    "alter table pmqd.jobs disable trigger wake_after_insert": "trigger jobs.wake_after_insert differs",
    "drop function pmqd.mark": "function mark(",
    "alter table pmqd.jobs drop column alone": "column jobs.alone is missing",
    "alter table pmqd.jobs alter column max_attempts set default 7": "column jobs.max_attempts differs",
    "alter table pmqd.jobs drop constraint attempts_bounded": "constraint jobs.attempts_bounded is missing",
    "create index mine on pmqd.jobs (status)": "index mine is not ours",
    "alter domain pmqd.job_payload drop constraint payload_at_most_256_kib": "domain job_payload differs",
    "grant select on pmqd.jobs to pmqd_enqueue": "right SELECT on jobs for pmqd_enqueue is not ours",
    "grant execute on function pmqd.enqueue to public": "for public is not ours",
    "create or replace function pmqd.wake() returns void language sql as 'select null::void'": "function wake() differs",
}


@pytest.mark.parametrize("change", DRIFTS)
def test_check_names_what_differs(database: str, change: str) -> None:
    """What is missing, changed or added is named; what comes and goes (months) is no difference."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("select pmqd.make_partition('jobs', '2031-01-01')")
        assert schema.check(database) == sql_files.LATEST
        connection.execute(change)
    with pytest.raises(SchemaError) as caught:
        schema.check(database)
    assert DRIFTS[change] in str(caught.value)


def test_a_user_named_as_the_schema_sees_no_differences(second_schema: str) -> None:
    """The quickstart's user is `pmqd`: such a user has the schema in its search path, which must not change the reading."""
    with psycopg.connect(second_schema, autocommit=True) as connection:
        connection.execute("create role jobs_2 login superuser")
    try:
        dsn = psycopg.conninfo.make_conninfo(second_schema, user="jobs_2")
        assert schema.check(dsn, schema="jobs_2") == sql_files.LATEST
    finally:
        with psycopg.connect(second_schema, autocommit=True) as connection:
            connection.execute("drop role jobs_2")


def test_check_leaves_nothing_behind(database: str) -> None:
    """The comparison is rolled back."""
    schema.check(database)
    with psycopg.connect(database) as connection:
        found = connection.execute("select nspname from pg_namespace where nspname like 'pmqd%'").fetchall()
    assert found == [("pmqd",)]


@pytest.mark.parametrize(("version", "says"), [(0, "schema apply"), (1, "needs"), (9999, "newer")])
def test_an_unknown_version_is_refused(database: str, version: int, says: str) -> None:
    """Older, newer or none: check and the daemon's first statement say in one line what to do; apply goes back from none."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("delete from pmqd.schema_version where version > %s", [version])
        if version > sql_files.LATEST:
            connection.execute("insert into pmqd.schema_version values (%s, 'x')", [version])
    store = Store(settings(database), "test")
    for call in (lambda: schema.check(database), store.redis_epoch):
        with pytest.raises(SchemaError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    store.close()
    if version > sql_files.LATEST:
        with pytest.raises(SchemaError, match="newer"):
            schema.apply(database)


def settings(dsn: str) -> Any:
    """Settings of a store on a database."""
    from pmqd.config import PostgresSettings

    return PostgresSettings(dsn=dsn)


def test_no_server_is_said_so_without_the_password() -> None:
    """`StoreUnavailable`, no traceback of libpq's, no password."""
    with pytest.raises(StoreUnavailable) as caught:
        schema.apply("postgresql://u:s3cret@127.0.0.1:1/x")
    assert "s3cret" not in str(caught.value)


# --- what the database checks by itself


BAD = [
    ("insert into pmqd.jobs (queue_name, payload) values ('', '1')", "queue_name_form"),
    ("insert into pmqd.jobs (queue_name, payload) values ('-a', '1')", "queue_name_form"),
    ("insert into pmqd.jobs (queue_name, payload) values ('a b', '1')", "queue_name_form"),
    ("insert into pmqd.jobs (queue_name, payload) values (E'a\\n', '1')", "queue_name_form"),
    ("insert into pmqd.jobs (queue_name, payload) values ('mail:high', '1')", "queue_name_form"),
    ("insert into pmqd.jobs (queue_name, payload) values ('mail:low', '1')", "queue_name_form"),
    ("insert into pmqd.jobs (queue_name, payload) values (repeat('a', 101), '1')", "queue_name_form"),
    ("select pmqd.enqueue('mail:low', '1')", "queue_name_form"),
    ("insert into pmqd.job_queues (name) values ('mail:low')", "queue_name_form"),
    ("insert into pmqd.jobs (queue_name, payload) values ('a', to_jsonb(repeat('x', 262143)))", "256_kib"),
    ("insert into pmqd.jobs (queue_name, payload, priority) values ('a', '1', 0)", "priority_range"),
    ("insert into pmqd.jobs (queue_name, payload, priority) values ('a', '1', 32768)", "priority_range"),
    ("insert into pmqd.jobs (queue_name, payload, max_attempts) values ('a', '1', 0)", "attempts_"),
    ("insert into pmqd.jobs (queue_name, payload, status) values ('a', '1', 'odd')", "jobs_"),
    ("insert into pmqd.jobs (queue_name, payload, status) values ('a', '1', 'completed')", "jobs_"),
    (
        "insert into pmqd.jobs (queue_name, payload, status, ready) values ('a', '1', 'running', false)",
        "jobs_",
    ),
    ("insert into pmqd.jobs (queue_name, payload, attempt_count) values ('a', '1', 3)", "attempts_bounded"),
    (
        "insert into pmqd.jobs (queue_name, payload, interruptions) values ('a', '1', 6)",
        "interruptions_bounded",
    ),
]


@pytest.mark.parametrize(("statement", "constraint"), BAD)
def test_what_is_not_allowed_is_refused(database: str, statement: str, constraint: str) -> None:
    """Names, sizes, ranges and states that fit no job never get in, by whatever way; the error names the constraint."""
    with psycopg.connect(database) as connection, pytest.raises(psycopg.errors.CheckViolation) as caught:
        connection.execute(statement)
    assert constraint in (caught.value.diag.constraint_name or "") or constraint in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a", "A9", "email:processing", "email-sending", "a" * 100, "a.b_c:lower", "high"]
)
def test_names_that_are_allowed(database: str, name: str) -> None:
    """The mission's names, the longest, and those that only look like a band."""
    with psycopg.connect(database) as connection:
        connection.execute("select pmqd.enqueue(%s, to_jsonb(repeat('x', 262142)))", [name])


def test_a_bare_insert_is_a_whole_enqueue(database: str) -> None:
    """Queue and payload suffice; all else has the documented default."""
    with psycopg.connect(database) as connection:
        row = connection.execute(
            "insert into pmqd.jobs (queue_name, payload) values ('a', '{}') returning priority, max_attempts, status,"
            " attempt_count, tags, kind, run_at = now(), created_at = now(), ready"
        ).fetchone()
    assert row == (100, 3, "queued", 0, [], None, True, True, True)


def test_enqueue_takes_the_queues_defaults(database: str) -> None:
    """Arguments before the queue's settings before the built-in ones; all by name; the id is returned."""
    job_id = uuid4()
    with psycopg.connect(database) as connection:
        connection.execute(
            "insert into pmqd.job_queues (name, default_priority, max_attempts) values ('tuned', 7, 9)"
        )
        for statement, wanted in (
            ("select pmqd.enqueue('plain', '[1]')", (100, 3)),
            ("select pmqd.enqueue('tuned', '[1]')", (7, 9)),
            (
                "select pmqd.enqueue(payload => '[1]', queue_name => 'tuned', priority => 8, max_attempts => 1)",
                (8, 1),
            ),
        ):
            made = connection.execute(statement).fetchone()
            found = connection.execute(
                "select priority, max_attempts from pmqd.jobs where id = %s", made
            ).fetchone()
            assert found == wanted
        full = connection.execute(
            "select pmqd.enqueue('a', %s, 'k', 5, '2030-01-01Z', 2, '{x,y}', %s)", [Jsonb({"a": 1}), job_id]
        ).fetchone()
        assert full == (job_id,)
        row = connection.execute(
            "select kind, priority, run_at::date::text, max_attempts, tags, payload from pmqd.jobs where id = %s",
            [job_id],
        ).fetchone()
    assert row == ("k", 5, "2030-01-01", 2, ["x", "y"], {"a": 1})


def test_an_enqueue_with_an_id_may_be_repeated(database: str) -> None:
    """Twice, and at the same moment in two transactions: one row, the same answer, the first one's payload."""
    job_id = uuid4()
    statement = "select pmqd.enqueue('a', %s, id => %s)"
    answers = []
    with psycopg.connect(database) as first, psycopg.connect(database) as second:
        answers.append(first.execute(statement, [Jsonb(1), job_id]).fetchone())
        thread = threading.Thread(
            target=lambda: answers.append(second.execute(statement, [Jsonb(2), job_id]).fetchone())
        )
        thread.start()
        first.commit()
        thread.join()
        second.commit()
        assert first.execute(statement, [Jsonb(3), job_id]).fetchone() == (job_id,)
        assert first.execute("select payload from pmqd.jobs").fetchall() == [(1,)]
    assert answers == [(job_id,), (job_id,)]


def test_made_ids_are_uuid7_and_sort_as_they_were_made(database: str) -> None:
    """Version and variant of RFC 9562, the time within, rising from row to row; each month's rows lie in its partition."""
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "insert into pmqd.jobs (queue_name, payload) select 'a', to_jsonb(n) from generate_series(1, 2000) n"
            " returning id, payload, extract(epoch from clock_timestamp())::float8, tableoid::regclass::text"
        ).fetchall()
        portable = connection.execute("select pmqd.id_at('2026-01-01Z')").fetchone()
    ids = [row[0] for row in rows]
    assert portable == (UUID("019b76da-a800-0000-0000-000000000000"),)
    assert {(each.version, each.variant) for each in ids} == {(7, "specified in RFC 4122")}
    assert all(abs((row[0].int >> 80) / 1000 - row[2]) < 5 for row in rows)
    in_order = sum(first < second for first, second in itertools.pairwise(ids))
    assert in_order >= 1990, "two made within a microsecond may stand either way"
    assert not any(row[3].endswith("default") for row in rows)


# --- roles


def as_role(connection: psycopg.Connection, role: str, statement: str) -> str:
    """What a role gets for a statement: "ok" or the SQLSTATE."""
    try:
        with connection.transaction():
            connection.execute(f"set local role pmqd_{role}")
            connection.execute(statement)
    except psycopg.Error as error:
        return error.sqlstate or str(error)
    return "ok"


DENIED = "42501"


@pytest.mark.parametrize(
    ("statement", "enqueue", "daemon"),
    [
        ("select pmqd.enqueue('a', '{}')", "ok", "ok"),
        ("insert into pmqd.jobs (queue_name, payload) values ('a', '{}')", DENIED, "ok"),
        ("select * from pmqd.jobs", DENIED, "ok"),
        ("select * from pmqd.job_queues", DENIED, "ok"),
        ("select pmqd.wake()", DENIED, "ok"),
        ("select * from pmqd.mark_ids(0, '{}', '{}', '{}', '{}', 1)", DENIED, "ok"),
        ("select pmqd.retire_partition('jobs', '2000-01-01', '{}')", DENIED, "42P01"),
        ("delete from pmqd.jobs", DENIED, DENIED),
        ("drop table pmqd.jobs", DENIED, DENIED),
        ("create table pmqd.mine ()", DENIED, DENIED),
        ("update pmqd.schema_version set version = 1", DENIED, DENIED),
    ],
)
def test_roles_may_what_they_need(database: str, statement: str, enqueue: str, daemon: str) -> None:
    """Producers only enqueue; the daemon does its work and changes no table; the public nothing at all."""
    with psycopg.connect(database, autocommit=True) as connection:
        assert as_role(connection, "enqueue", statement) == enqueue
        assert as_role(connection, "daemon", statement) == daemon


def test_the_daemons_role_suffices_for_the_store(database: str) -> None:
    """Every kind of statement, partitions included, as a login that has nothing but that role."""
    user = "pmqd_test_daemon"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"drop role if exists {user}")
        connection.execute(f"create role {user} login in role pmqd_daemon")
        connection.execute(
            "insert into pmqd.jobs (queue_name, payload, id) select 'mail', '1', gen_random_uuid()"
        )
    try:
        use_the_store(psycopg.conninfo.make_conninfo(database, user=user))
    finally:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"drop role {user}")


def use_the_store(dsn: str) -> None:
    """A job's way, what maintenance does, and what people ask."""
    from pmqd.config import MaintenanceSettings
    from pmqd.store import Fate, Room

    with open_bench(dsn) as bench:
        store = bench.store
        assert all(store.meet()), "cluster and timeline are known: an old primary would be refused"
        term = store.lead()
        assert term is not None
        store.listen()
        store.beat(bench.instance_id, holding=False, stalled_tick=None)
        ids = bench.insert(3)
        marked = store.mark(term, [Room("mail", 1, 32767, 9)], full=True)
        won = bench.claim([each.id for each in marked]) + bench.steal(9)
        assert len(won) == 4
        store.settle([outcome(won[0], Action.COMPLETE), outcome(won[1], Action.FAIL)], [])
        assert len(store.rescue(WORKER, fates={}, default=Fate.CHARGED, cause="x")) == 2
        store.stay_awake(term, 1)
        store.new_redis_epoch(term)
        store.depths()
        store.replay(None, None, None, 10)
        store.list_jobs(None, None, 5, None)
        store.show_job(ids[0])
        store.keep_partitions(MaintenanceSettings())
        store.rescue_orphans("x")
        store.rescue_instance(bench.instance_id, "x")
        _frozen_session_is_ended(bench)


def _frozen_session_is_ended(bench: Bench) -> None:
    frozen = bench.another("worker").connection
    frozen.pgconn.enter_pipeline_mode()
    frozen.pgconn.send_query_params(b"select 1", [])
    frozen.pgconn.flush()
    deadline = time.monotonic() + 10
    while not bench.store.end_frozen(0.05):
        assert time.monotonic() < deadline


def test_whoever_may_not_make_roles_is_told_what_to_do(empty_database: str) -> None:
    """Missing roles and no right to make them: one line with the statement for the administrator."""
    user = "pmqd_test_owner"
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(f"drop role if exists {user}")
        connection.execute(f"create role {user} login")
        connection.execute(f"grant create on database {connection.info.dbname} to {user}")
    dsn = psycopg.conninfo.make_conninfo(empty_database, user=user)
    try:
        with pytest.raises(SchemaError, match="create role jobs_3_enqueue") as caught:
            schema.apply(dsn, schema="jobs_3")
        assert "\n" not in str(caught.value)
    finally:
        with psycopg.connect(empty_database, autocommit=True) as connection:
            connection.execute(f"drop owned by {user}; drop role {user}")
