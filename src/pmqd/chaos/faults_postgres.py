"""Faults of PostgreSQL: sessions ended, statements cancelled, crashed, frozen, read-only, full, locked."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from pmqd.chaos.faults import (
    OURS,
    Action,
    Area,
    Growth,
    Kind,
    Missed,
    Scene,
    Watch,
    always,
    family,
    never,
    wait_until,
)
from pmqd.embedded import PostgresServer

ROLES: Final = ("worker", "migrator", "maintenance")
FULL_SLOTS: Final = 200
LOCKED_ROWS: Final = 50
CANCEL_EVERY_SECONDS: Final = 0.02


def server_of(scene: Scene) -> PostgresServer:
    """The private server."""
    assert scene.world.postgres is not None, "only on private servers"
    return scene.world.postgres


def connect(scene: Scene) -> psycopg.Connection[Any]:
    """A connection of one's own, past all wires; closed when the fault is healed.

    Raises:
        Missed: PostgreSQL does not answer.
    """
    try:
        connection = scene.world.connect()
        connection.execute("set session characteristics as transaction read write")
    except (psycopg.Error, OSError) as error:
        raise Missed(f"PostgreSQL did not answer: {error}") from error
    scene.undo.callback(connection.close)
    return connection


def text(scene: Scene, query: LiteralString, **names: sql.Composable) -> sql.Composed:
    """A statement with the names of the world put in."""
    return sql.SQL(query).format(schema=sql.Identifier(scene.world.schema), **names)


def sessions(scene: Scene) -> int:
    """How many sessions pmqd has."""
    return scene.eyes.number("select count(*) from {ours}")


def end_sessions(connection: psycopg.Connection[Any]) -> int:
    """Ends all sessions of pmqd; how many there were."""
    query = sql.SQL("select count(*) filter (where pg_terminate_backend(pid)) from {ours}").format(ours=OURS)
    row = connection.execute(query, {}).fetchone()
    return int(row[0]) if row else 0


def _since(scene: Scene) -> Watch:
    rows = scene.eyes.ask("select extract(epoch from clock_timestamp())")
    return Watch("claims", float(rows[0][0]) if rows else time.time())


def terminate(scene: Scene) -> Action:
    """pg_terminate_backend for every session of pmqd."""
    at = _since(scene)
    ended = scene.eyes.number("select count(*) filter (where pg_terminate_backend(pid)) from {ours}")
    return Action("all sessions", f"{ended} sessions of pmqd", always if ended else never, watch=at)


def terminate_role(scene: Scene) -> Action:
    """The same for the sessions of one kind of child."""
    role, at = scene.random.choice(ROLES), _since(scene)
    ended = scene.eyes.number(
        "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity"
        " where application_name = %(name)s and datname = current_database()",
        {"name": f"pmqd:{role}"},
    )
    return Action(f"sessions of {role}", f"{ended} sessions", always if ended else never, watch=at)


def cancel(scene: Scene) -> Action:
    """Every statement that is found running is cancelled, as a statement timeout does it (57014)."""
    connection, stop, cancelled = connect(scene), threading.Event(), [0]
    seconds = scene.between(0.5, 1.5)
    query = sql.SQL(
        "select count(*) filter (where pg_cancel_backend(pid)) from {ours} where state = 'active'"
    ).format(ours=OURS)

    def run() -> None:
        with contextlib.suppress(psycopg.Error):
            while not stop.wait(CANCEL_EVERY_SECONDS):
                row = connection.execute(query, {}).fetchone()
                cancelled[0] += row[0] if row else 0

    thread = threading.Thread(target=run, name="chaos-cancel", daemon=True)
    scene.undo.callback(thread.join)
    scene.undo.callback(stop.set)
    thread.start()
    return Action(
        "running statements",
        "statements were cancelled",
        lambda: cancelled[0] > 0,
        seconds,
        over=lambda: cancelled[0] > 0,
        patience=3.0,
    )


def _claims(scene: Scene) -> int:
    return scene.eyes.number("select count(*) from {schema}.claims")


def crash(scene: Scene) -> Action:
    """Immediate stop, away for a while, start."""
    server, claims, there = server_of(scene), _claims(scene), sessions(scene)
    seconds = scene.between(0.0, 6.0)
    scene.undo.callback(server.start)
    server.kill()
    return Action(
        "PostgreSQL",
        f"{there} sessions of pmqd, {claims} claims",
        always if there and claims else never,
        seconds,
        watch=Watch("claims"),
    )


def kill_backend(scene: Scene) -> Action:
    """SIGKILL of one backend: the server ends all sessions and recovers by itself."""
    at = _since(scene)
    rows = scene.eyes.ask("select pid from {ours} order by state = 'active' desc, random() limit 1")
    there = sessions(scene)
    if not rows:
        raise Missed("no session of pmqd")
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(rows[0][0]), signal.SIGKILL)
    return Action("one backend", f"{there} sessions of pmqd ended with it", always, watch=at)


def freeze(scene: Scene) -> Action:
    """SIGSTOP of the whole server for a while."""
    there, seconds = sessions(scene), scene.between(0.5, 4.0)
    pids = family(server_of(scene).pid)
    scene.undo.callback(_signal, pids, signal.SIGCONT)
    _signal(pids, signal.SIGSTOP)
    return Action(
        "PostgreSQL",
        f"{there} sessions of pmqd",
        always if there else never,
        seconds,
        watch=Watch("claims"),
    )


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def read_only(scene: Scene) -> Action:
    """default_transaction_read_only for everybody, as a demoted primary refuses writes (25006)."""
    connection = connect(scene)

    def writable() -> None:
        connection.execute("alter system reset default_transaction_read_only")
        connection.execute("select pg_reload_conf()")

    errors = _log_growth(scene, b"in a read-only transaction")
    scene.undo.callback(writable)
    connection.execute("alter system set default_transaction_read_only = on")
    connection.execute("select pg_reload_conf()")
    return Action(
        "PostgreSQL",
        "statements were refused",
        errors.grown,
        scene.between(0.5, 3.0),
        over=errors.grown,
        patience=3.0,
        watch=Watch("claims"),
    )


def _log_growth(scene: Scene, words: bytes) -> Growth:
    """Whether the server's log says this more often than before."""
    log = server_of(scene).log
    start = log.stat().st_size if log.exists() else 0

    def read() -> int:
        with log.open("rb") as file:
            file.seek(start)
            return file.read().count(words)

    return Growth(read)


def take_slots(scene: Scene) -> Action:
    """Every connection that the server has is held, the reserved ones too; pmqd's own are ended meanwhile."""
    world, held, refused = scene.world, list[psycopg.Connection[Any]](), [False]
    first = connect(scene)
    stop, seconds = threading.Event(), scene.between(0.5, 2.5)

    def take() -> None:
        while not stop.is_set() and len(held) < FULL_SLOTS:
            try:
                held.append(world.connect())
            except (psycopg.Error, OSError):
                refused[0] = True
                stop.wait(0.02)

    def give_back() -> None:
        stop.set()
        thread.join()
        for each in held:
            each.close()

    errors = _log_growth(scene, b"too many clients already")
    thread = threading.Thread(target=take, name="chaos-slots", daemon=True)
    scene.undo.callback(give_back)
    thread.start()
    wait_until(lambda: refused[0], 10.0)
    before = errors.read()
    with contextlib.suppress(psycopg.Error):
        end_sessions(first)
    return Action(
        "PostgreSQL",
        f"{len(held)} slots held, others were refused",
        lambda: refused[0] and errors.read() > before,
        seconds,
        watch=Watch("claims"),
    )


def _locked(scene: Scene, statement: sql.Composed) -> psycopg.Connection[Any]:
    """A transaction that holds what the statement takes, until the fault is healed."""
    connection = connect(scene)
    connection.autocommit = False
    scene.undo.callback(_leave, connection)
    connection.execute("set local lock_timeout = '3s'")
    connection.execute(statement)
    return connection


def _leave(connection: psycopg.Connection[Any]) -> None:
    with contextlib.suppress(psycopg.Error):
        connection.rollback()


def _waiting(scene: Scene) -> int:
    return scene.eyes.number("select count(*) from {ours} where wait_event_type = 'Lock'")


def lock_jobs(scene: Scene) -> Action:
    """Rows of jobs locked by somebody: those that run, and those that would be next."""
    try:
        _locked(
            scene,
            text(
                scene,
                "with c as (select id from {schema}.jobs where status = 'running' limit {n} for update skip locked),"
                " r as (select id from {schema}.jobs where ready order by run_at limit {n} for update skip locked)"
                " select (select count(*) from c) + (select count(*) from r)",
                n=sql.Literal(LOCKED_ROWS),
            ),
        )
    except psycopg.Error as error:
        raise Missed(f"the rows could not be locked: {error}") from error
    return _lock(scene, "rows of jobs")


def lock_claims(scene: Scene) -> Action:
    """The table of claims locked by somebody."""
    try:
        _locked(scene, text(scene, "lock table {schema}.claims in access exclusive mode"))
    except psycopg.Error as error:
        raise Missed(f"the table could not be locked: {error}") from error
    return _lock(scene, "table claims")


def _lock(scene: Scene, target: str) -> Action:
    seen = [False]

    def waited() -> bool:
        seen[0] = seen[0] or _waiting(scene) > 0
        return seen[0]

    return Action(
        target,
        "statements of pmqd waited for the lock",
        waited,
        scene.between(0.5, 4.0),
        over=waited,
        patience=3.0,
        watch=Watch("claims"),
    )


_SLOW: Final[LiteralString] = """
create or replace function pmqd_chaos.delay() returns trigger language plpgsql as $$
begin
  if random() < 0.5 then perform pg_sleep({seconds}); end if;
  return null;
end $$
"""
_FULL: Final[LiteralString] = """
create or replace function pmqd_chaos.full() returns trigger language plpgsql as $$
begin
  raise exception 'could not extend file: No space left on device' using errcode = '53100';
end $$
"""
TRIGGER_TABLES: Final = ("claims", "job_logs")


def _triggered(scene: Scene, function: sql.Composed, name: LiteralString, tables: tuple[str, ...]) -> None:
    """A statement trigger on tables of pmqd, until the fault is healed."""
    connection = connect(scene)
    connection.execute("set lock_timeout = '5s'")
    connection.execute(function)
    for table in tables:
        names = {"table": sql.Identifier(table), "name": sql.Identifier(f"chaos_{name}")}
        scene.undo.callback(
            _drop_trigger,
            connection,
            text(scene, "drop trigger if exists {name} on {schema}.{table}", **names),
        )
        try:
            connection.execute(
                text(
                    scene,
                    "create trigger {name} before insert on {schema}.{table}"
                    " for each statement execute function pmqd_chaos.{function}()",
                    function=sql.Identifier(name),
                    **names,
                )
            )
        except psycopg.Error as error:
            raise Missed(f"the trigger could not be made: {error}") from error


def _drop_trigger(connection: psycopg.Connection[Any], statement: sql.Composed) -> None:
    """Again and again: somebody may hold the table."""

    def dropped() -> bool:
        try:
            connection.execute(statement)
        except psycopg.errors.LockNotAvailable:
            return False
        return True

    wait_until(dropped, 30.0)


def time_out(scene: Scene) -> Action:
    """Half of all claims take longer than a statement may."""
    errors = _log_growth(scene, b"canceling statement due to statement timeout")
    function = text(scene, _SLOW, seconds=sql.Literal(60))
    _triggered(scene, function, "delay", ("claims",))
    return Action(
        "inserts into claims",
        "statements ran into their timeout",
        errors.grown,
        scene.between(0.5, 1.5),
        over=errors.grown,
        patience=9.0,
        watch=Watch("claims"),
    )


def fill_disk(scene: Scene) -> Action:
    """Whatever makes tables longer is refused with 53100, as a full disk does it while the server stays up."""
    errors = _log_growth(scene, b"No space left on device")
    _triggered(scene, text(scene, _FULL), "full", TRIGGER_TABLES)
    return Action(
        "inserts into claims and job_logs",
        "statements were refused",
        errors.grown,
        scene.between(0.5, 3.0),
        over=errors.grown,
        patience=3.0,
        watch=Watch("claims"),
    )


_kind = functools.partial(Kind, area=Area.POSTGRES)

KINDS: Final = (
    _kind("postgres_terminate", begin=terminate, weight=2.0),
    _kind("postgres_terminate_role", begin=terminate_role, weight=2.0),
    _kind("postgres_cancel", begin=cancel, weight=1.0),
    _kind("postgres_crash", begin=crash, weight=2.0, own_servers=True),
    _kind("postgres_kill_backend", begin=kill_backend, weight=1.0, own_servers=True),
    _kind("postgres_freeze", begin=freeze, weight=1.0, own_servers=True),
    _kind("postgres_readonly", begin=read_only, weight=1.0, own_servers=True),
    _kind("postgres_no_slots", begin=take_slots, weight=0.7, own_servers=True),
    _kind("postgres_lock_jobs", begin=lock_jobs, weight=1.0),
    _kind("postgres_lock_claims", begin=lock_claims, weight=1.0),
    _kind("postgres_timeouts", begin=time_out, weight=0.5, own_servers=True),
    _kind("postgres_disk_full", begin=fill_disk, weight=1.0, own_servers=True),
)
