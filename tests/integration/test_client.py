"""Producers against a real PostgreSQL: own and foreign connections, one and many, and what is refused before."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import redis
import sqlalchemy
import sqlalchemy.orm
from psycopg.rows import dict_row

from pmqd import App, EnqueueError, PmqdError, SchemaError, StoreUnavailable
from pmqd.broker import Broker
from pmqd.config import PostgresSettings, RedisSettings, Settings
from pmqd.connections import Connections
from pmqd.embedded import PostgresServer
from pmqd.job import MAX_PAYLOAD_BYTES
from tests.fix_proxy import MakeProxy

Rows = Any


def send(campaign: UUID, to: str, template: str = "welcome") -> None:
    """What the tests' task does not do."""


def app_on(dsn: str, **redis_options: Any) -> App:
    """An application on this database, with one task."""
    app = App(Settings(postgres=PostgresSettings(dsn=dsn), redis=RedisSettings(**redis_options)))
    app.task(queue="mail", name="send", max_attempts=5)(send)
    return app


@pytest.fixture
def app(database: str) -> Iterator[App]:
    """An application on a fresh database."""
    made = app_on(database)
    yield made
    made.close()


@pytest.fixture
def look(database: str) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection that looks."""
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as connection:
        yield connection


def rows(look: Rows) -> list[dict[str, Any]]:
    """All jobs, in the order of their ids."""
    found: list[dict[str, Any]] = look.execute("select * from pmqd.jobs order by id").fetchall()
    return found


ARGUMENTS: dict[str, Any] = {"campaign": UUID(int=5), "to": "ada@example.org"}


def test_a_task_is_enqueued(app: App, look: Rows) -> None:
    """One call is one row with the task's kind, queue, attempts and arguments, due now."""
    job_id = app.registry.tasks["send"].enqueue(**ARGUMENTS)
    (row,) = rows(look)
    assert row["id"] == job_id
    assert job_id.version == 7
    assert (row["queue_name"], row["kind"], row["status"], row["max_attempts"]) == (
        "mail",
        "send",
        "queued",
        5,
    )
    assert (row["priority"], row["tags"]) == (100, [])
    assert row["payload"] == {"campaign": str(UUID(int=5)), "to": "ada@example.org"}
    assert row["run_at"] == row["created_at"]


def test_options_of_one(app: App, look: Rows) -> None:
    """Every option reaches its column."""
    due = datetime(2031, 1, 2, 3, 4, 5, tzinfo=UTC)
    own = uuid4()
    app.enqueue("q", [1], kind="k", priority=7, run_at=due, max_attempts=9, tags=["a", 'b"\\'], id=own)
    app.enqueue("q", None, run_at=timedelta(minutes=5))
    one, other = sorted(rows(look), key=lambda row: row["id"] != own)
    assert (one["id"], one["kind"], one["priority"], one["run_at"]) == (own, "k", 7, due)
    assert (one["max_attempts"], one["tags"], one["payload"]) == (9, ["a", 'b"\\'], [1])
    assert other["run_at"] - other["created_at"] == timedelta(minutes=5)
    assert other["payload"] is None


def test_the_queues_defaults_count(app: App, look: Rows) -> None:
    """What neither call nor task says is the queue's, for one as for many."""
    look.execute("insert into pmqd.job_queues (name, default_priority, max_attempts) values ('mail', 42, 8)")
    app.enqueue("mail", {})
    app.registry.tasks["send"].enqueue(**ARGUMENTS)
    app.registry.tasks["send"].enqueue_many([ARGUMENTS, ARGUMENTS])
    app.copy_many([Spec("mail"), Spec("mail")])
    assert [row["priority"] for row in rows(look)] == [42] * 6
    assert [row["max_attempts"] for row in rows(look)] == [8, 5, 5, 5, 8, 8]


def test_an_own_id_makes_an_enqueue_repeatable(app: App, look: Rows) -> None:
    """The same id twice is one job, the first."""
    own = uuid4()
    assert app.enqueue("q", 1, id=own) == own
    assert app.enqueue("q", 2, id=own) == own
    assert [row["payload"] for row in rows(look)] == [1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"campaign": "no"}, "campaign='no'"),
        ({"colour": 1}, "colour=1"),
        ({"priority": 0}, "priority=0"),
        ({"run_at": datetime(2031, 1, 1)}, "run_at="),  # noqa: DTZ001 - the case
        ({"to": "x" * (MAX_PAYLOAD_BYTES + 1)}, "262,144 bytes"),
        ({"to": "a\0b"}, "to: a NUL"),
        ({"conn": object()}, "conn of type builtins.object is not allowed"),
    ],
)
def test_nothing_wrong_reaches_the_database(app: App, look: Rows, change: dict[str, Any], text: str) -> None:
    """A wrong argument, option or connection is an error at the call, by name, and no row."""
    with pytest.raises(EnqueueError, match=text):
        app.registry.tasks["send"].enqueue(**{**ARGUMENTS, **change})
    assert rows(look) == []


def test_nothing_is_asked_of_the_database_for_a_wrong_call() -> None:
    """The check comes before the connection: without any server the error is the same."""
    app = app_on("host=/nowhere dbname=none")
    with pytest.raises(EnqueueError, match="to is missing"):
        app.registry.tasks["send"].enqueue(campaign=UUID(int=1))
    with pytest.raises(StoreUnavailable, match="PostgreSQL at"):
        app.registry.tasks["send"].enqueue(**ARGUMENTS)


# --- in the caller's transaction


def test_a_callers_connection_decides(app: App, database: str, look: Rows) -> None:
    """Rolled back, the jobs never were; committed, they are. One and many, connection and cursor."""
    task = app.registry.tasks["send"]
    with psycopg.connect(database) as conn:
        task.enqueue(**ARGUMENTS, conn=conn)
        task.enqueue_many([ARGUMENTS, {**ARGUMENTS, "_options": {"id": uuid4()}}], conn=conn)
        conn.rollback()
        assert rows(look) == []
        with conn.cursor(row_factory=dict_row) as cursor:
            task.enqueue(**ARGUMENTS, conn=cursor)
            task.enqueue_many([ARGUMENTS, ARGUMENTS], conn=cursor)
        assert rows(look) == []
        conn.commit()
    assert len(rows(look)) == 3


def test_a_callers_autocommit_connection(app: App, database: str, look: Rows) -> None:
    """Without a transaction of the caller's many are still all or none."""
    task = app.registry.tasks["send"]
    own = uuid4()
    with psycopg.connect(database, autocommit=True) as conn:
        task.enqueue_many([ARGUMENTS, {**ARGUMENTS, "_options": {"id": own}}], conn=conn)
        assert len(rows(look)) == 2
        look.execute("alter table pmqd.jobs add constraint never check (kind <> 'send') not valid")
        with pytest.raises(EnqueueError, match="PostgreSQL refused the job"):
            task.enqueue_many([{**ARGUMENTS, "_options": {"id": uuid4()}}, ARGUMENTS], conn=conn)
        assert len(rows(look)) == 2


def test_inside_a_callers_pipeline(app: App, database: str, look: Rows) -> None:
    """Where COPY is impossible the rows go one by one."""
    with psycopg.connect(database) as conn, conn.pipeline():
        app.registry.tasks["send"].enqueue_many([ARGUMENTS] * 3, conn=conn)
    assert len(rows(look)) == 3


def test_sqlalchemy(app: App, database: str, look: Rows) -> None:
    """A session's or a connection's transaction carries the job."""
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database))
    task = app.registry.tasks["send"]
    with sqlalchemy.orm.Session(engine) as session:
        task.enqueue(**ARGUMENTS, conn=session)
        session.rollback()
        task.enqueue_many([ARGUMENTS, ARGUMENTS], conn=session)
        session.commit()
    with engine.begin() as connection:
        task.enqueue(**ARGUMENTS, conn=connection)
    engine.dispose()
    assert len(rows(look)) == 3


# --- many


@dataclass
class Spec:
    """A job for `copy_many`."""

    queue_name: str
    payload: Any = None
    kind: str | None = None
    priority: int | None = None
    run_at: datetime | timedelta | None = None
    max_attempts: int | None = None
    tags: tuple[str, ...] = ()
    id: UUID | None = None


HARD = ['tab\there "quote" back\\slash', "new\nline\r", "\\N", "\\.", "ünï→😀", "", "{}", "a,b", "null"]


def test_copy_keeps_every_character(app: App, look: Rows) -> None:
    """Whatever COPY, arrays or JSON could read otherwise arrives as it was."""
    ids = app.copy_many([Spec("q", {"x": text}, kind=text or None, tags=(text, "t")) for text in HARD])
    found = {row["id"]: row for row in rows(look)}
    for made, text in zip(ids, HARD, strict=True):
        assert found[made]["payload"] == {"x": text}
        assert found[made]["kind"] == (text or None)
        assert found[made]["tags"] == [text, "t"]


def test_many_keep_their_order_and_options(app: App, look: Rows) -> None:
    """Ids are in the order of the rows, and grow; a row's options are its own."""
    due = datetime(2031, 1, 2, tzinfo=UTC)
    given: list[dict[str, Any]] = [
        {**ARGUMENTS, "to": "0"},
        {**ARGUMENTS, "to": "1", "_options": {"priority": 7, "run_at": due, "tags": ["x"]}},
        {**ARGUMENTS, "to": "2", "_options": {"run_at": timedelta(hours=1), "max_attempts": 2}},
    ]
    ids = app.registry.tasks["send"].enqueue_many(given)
    found = rows(look)
    assert [row["id"] for row in found] == ids
    assert [row["payload"]["to"] for row in found] == ["0", "1", "2"]
    assert [(row["priority"], row["max_attempts"]) for row in found] == [(100, 5), (7, 5), (100, 2)]
    assert found[0]["run_at"] == found[0]["created_at"]
    assert found[1]["run_at"] == due
    assert found[2]["run_at"] - found[2]["created_at"] == timedelta(hours=1)
    assert found[1]["tags"] == ["x"]


def test_many_with_own_ids_are_repeatable(app: App, look: Rows) -> None:
    """Rows with ids that exist, or twice in one call, are left alone; those beside them are written."""
    first, second = uuid4(), uuid4()
    task = app.registry.tasks["send"]

    def given(*ids: UUID | None) -> list[dict[str, Any]]:
        return [{**ARGUMENTS, "_options": {"id": made}} for made in ids]

    assert task.enqueue_many(given(first, second, first))[:2] == [first, second]
    task.enqueue_many(given(None, first, second))
    assert len(rows(look)) == 3


def test_many_name_the_row_that_is_wrong(app: App, look: Rows) -> None:
    """The error says which row and why; none is written. No rows are no error."""
    with pytest.raises(EnqueueError, match="row 3: send: to=7 is not allowed"):
        app.registry.tasks["send"].enqueue_many([ARGUMENTS, ARGUMENTS, {**ARGUMENTS, "to": 7}])
    with pytest.raises(EnqueueError, match="job 2: priority=0"):
        app.copy_many([Spec("q"), Spec("q", priority=0)])
    assert app.registry.tasks["send"].enqueue_many([]) == []
    assert app.copy_many(iter([])) == []
    assert rows(look) == []


def test_rows_of_a_generator(app: App, look: Rows) -> None:
    """Rows may come from a generator."""
    app.registry.tasks["send"].enqueue_many({**ARGUMENTS, "to": str(n)} for n in range(1000))
    assert len(rows(look)) == 1000


def test_a_user_who_may_only_enqueue(app: App, database: str, look: Rows) -> None:
    """With the right to call the function and nothing else, one and many work; without it the error says so."""
    look.execute("drop role if exists only_enqueues")
    look.execute("create role only_enqueues login in role pmqd_enqueue")
    mine = app_on(psycopg.conninfo.make_conninfo(database, user="only_enqueues"))
    mine.registry.tasks["send"].enqueue(**ARGUMENTS)
    mine.registry.tasks["send"].enqueue_many([ARGUMENTS] * 3)
    assert len(rows(look)) == 4
    mine.close()
    look.execute("revoke pmqd_enqueue from only_enqueues")
    with pytest.raises(PmqdError, match="the database user may not enqueue"):
        mine.registry.tasks["send"].enqueue(**ARGUMENTS)
    mine.close()
    look.execute("drop role only_enqueues")


def test_without_the_schema(empty_database: str) -> None:
    """A database without pmqd's schema is one clear error."""
    app = app_on(empty_database)
    with pytest.raises(SchemaError, match="pmqd schema apply"):
        app.enqueue("q", 1)
    with pytest.raises(SchemaError, match="pmqd schema apply"):
        app.copy_many([Spec("q"), Spec("q")])
    app.close()


# --- own connections


def backends(look: Rows) -> int:
    """How many connections the clients of this database hold."""
    found = look.execute(
        "select count(*) from pg_stat_activity where application_name = 'pmqd:client' and datname = current_database()"
    ).fetchone()
    return int(found["count"])


def test_one_connection_is_kept(app: App, look: Rows) -> None:
    """A hundred enqueues use one connection; closing ends it, and a later enqueue opens another."""
    for n in range(100):
        app.enqueue("q", n)
    assert backends(look) == 1
    app.close()
    app.enqueue("q", 1)
    assert len(rows(look)) == 101


@pytest.mark.parametrize("trusted_s", [0, 60])
def test_a_restart_of_the_server_is_not_noticed(
    own_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, trusted_s: float
) -> None:
    """Connections that died while idle are replaced without an error, whether they are looked at before or not."""
    monkeypatch.setattr("pmqd.connections._TRUSTED_SECONDS", trusted_s)
    app = app_on(own_postgres.dsn("pmqd"))
    app.enqueue("q", 1)
    own_postgres.restart("immediate")
    app.enqueue("q", 2)
    app.close()
    with psycopg.connect(own_postgres.dsn("pmqd")) as look:
        assert look.execute("select count(*) from pmqd.jobs").fetchone() == (2,)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("many", [False, True])
def test_a_lost_connection_is_tried_once_more(
    postgres: PostgresServer, database: str, look: Rows, proxy: MakeProxy, when: Any, many: bool
) -> None:
    """Whether the server had committed or not when the wire broke: one row each, no error, no double. Prepared or not."""
    wire = proxy(postgres)
    app = app_on(wire.dsn(database))
    for before in (1, 10):
        for n in range(before):
            app.enqueue("q", n)
        had = len(rows(look))
        wire.break_on(b"COMMIT" if many else b"lost", when)
        ids = app.copy_many([Spec("lost", n) for n in range(5)]) if many else [app.enqueue("lost", 1)]
        assert wire.sprung == (1 if before == 1 else 2)
        assert {row["id"] for row in rows(look)} >= set(ids)
        assert len(rows(look)) == had + len(ids)
    app.close()


def test_what_is_enqueued_often_is_prepared(database: str, look: Rows) -> None:
    """On a connection to PostgreSQL itself the server plans the call once, and not again for each job."""
    app = app_on(database)
    with Connections(PostgresSettings(dsn=database)).one() as own:
        for n in range(20):
            app.enqueue("q", n, conn=own)
        found = own.execute("select count(*) from pg_prepared_statements").fetchone()
    assert found == (1,)
    assert len(rows(look)) == 20


def test_other_encodings(app: App, database: str, look: Rows) -> None:
    """A caller's connection in another encoding than UTF-8 writes the same texts, one and many."""
    with psycopg.connect(database, client_encoding="latin1") as conn:
        app.enqueue("q", {"x": "ünï"}, kind="ü", tags=["ö"], conn=conn)
        app.copy_many([Spec("q", {"x": "ünï"}, kind="ü", tags=("ö",))] * 2, conn=conn)
    assert [(row["payload"], row["kind"], row["tags"]) for row in rows(look)] == [
        ({"x": "ünï"}, "ü", ["ö"])
    ] * 3


def test_a_server_that_stays_away_is_told_with_the_id(
    postgres: PostgresServer, database: str, proxy: MakeProxy
) -> None:
    """If trying again fails too, the error comes at once, names the id for a later try, and no password."""
    wire = proxy(postgres)
    app = app_on(psycopg.conninfo.make_conninfo(wire.dsn(database), password="hush"))
    own = uuid4()
    app.enqueue("q", 1)
    wire.cut()
    started = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        app.enqueue("q", 2, id=own)
    assert time.monotonic() - started < 5
    assert "hush" not in str(caught.value)
    wire.heal()
    app.enqueue("q", 2, id=own)
    app.close()


def test_a_server_that_may_only_be_read_is_as_good_as_away(database: str, look: Rows) -> None:
    """What a demoted primary refuses (25006) is StoreUnavailable like any other absence, and nothing is written."""
    app = app_on(psycopg.conninfo.make_conninfo(database, options="-c default_transaction_read_only=on"))
    with pytest.raises(StoreUnavailable, match="read-only"):
        app.enqueue("q", 1)
    assert rows(look) == []
    app.close()


def test_a_fork_has_its_own_connections(app: App, look: Rows) -> None:
    """Parent and child enqueue at once over connections of their own, and the child's end leaves the parent's be."""
    app.enqueue("q", "parent")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for n in range(20):
                app.enqueue("q", n)
            app.close()
            status = 0
        finally:
            os._exit(status)
    for n in range(20):
        app.enqueue("q", n)
    assert os.waitpid(child, 0)[1] == 0
    app.enqueue("q", "parent again")
    assert len(rows(look)) == 42


# --- the high-priority bypass


def hints_in(url: str) -> list[str]:
    """What stands in the high list of queue q."""
    with redis.Redis.from_url(url) as raw:
        found: Any = raw.lrange("queue:q:high", 0, -1)
        return [member.decode() for member in found]


def test_high_jobs_are_told_to_redis_after_the_commit(database: str, redis_url: str) -> None:
    """An own enqueue in the high band pushes its hint; lower bands, later jobs and foreign transactions do not."""
    app = app_on(database, url=redis_url)
    broker = Broker(RedisSettings(url=redis_url), "test")
    broker.set_epoch(uuid4())
    urgent = app.enqueue("q", 1, priority=10)
    app.enqueue("q", 1)
    app.enqueue("q", 1, priority=10, run_at=timedelta(hours=1))
    with psycopg.connect(database) as conn:
        app.enqueue("q", 1, priority=10, conn=conn)
    many = app.copy_many([Spec("q", priority=50), Spec("q", priority=51)])
    assert hints_in(redis_url) == [str(many[0]), str(urgent)]
    app.close()
    broker.close()


def test_redis_away_costs_nothing(database: str, look: Rows) -> None:
    """With Redis configured and away an urgent enqueue works, and the next ones do not even ask."""
    app = app_on(database, url="redis://127.0.0.1:1/0")
    started = time.monotonic()
    for _ in range(20):
        app.enqueue("q", 1, priority=1)
    assert time.monotonic() - started < 2
    assert len(rows(look)) == 20
    app.close()


def test_settings_are_read_at_the_first_enqueue(
    database: str, look: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module with an App can be imported without any environment; PMQD_POSTGRES__DSN is all a producer needs."""
    app = App()
    app.task(queue="mail")(send)
    monkeypatch.setenv("PMQD_POSTGRES__DSN", database)
    app.registry.tasks["send"].enqueue(**ARGUMENTS)
    assert len(rows(look)) == 1
    app.close()
