"""The faults that the nemesis can do: what each is made of, and the table of all kinds.

A kind's `begin` strikes and says what it hit; what has to be healed is put on the scene's stack first, so that nothing
stays broken however a fault ends. Evidence that a fault hit its window is asked for before it is healed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal, LiteralString
from uuid import UUID

import psycopg
import redis
from psycopg import sql

if TYPE_CHECKING:
    from pmqd.chaos.family import Host
    from pmqd.chaos.world import World


class Area(StrEnum):
    """What a kind of fault disturbs; decides which faults may act at once."""

    PROCESSES = "processes"
    ABSENCE = "absence"
    SIGNALS = "signals"
    REDIS = "redis"
    POSTGRES = "postgres"
    REDIS_WIRE = "redis wire"
    POSTGRES_WIRE = "postgres wire"


TOGETHER: Final = frozenset(
    frozenset(pair)
    for pair in (
        (Area.PROCESSES, Area.REDIS),
        (Area.PROCESSES, Area.POSTGRES),
        (Area.PROCESSES, Area.REDIS_WIRE),
        (Area.PROCESSES, Area.POSTGRES_WIRE),
        (Area.SIGNALS, Area.REDIS),
        (Area.SIGNALS, Area.POSTGRES),
        (Area.SIGNALS, Area.REDIS_WIRE),
        (Area.SIGNALS, Area.POSTGRES_WIRE),
        (Area.REDIS, Area.POSTGRES),
        (Area.REDIS, Area.POSTGRES_WIRE),
        (Area.POSTGRES, Area.REDIS_WIRE),
        (Area.REDIS_WIRE, Area.POSTGRES_WIRE),
        *((Area.ABSENCE, other) for other in Area if other != Area.ABSENCE),
    )
)
"""Areas whose faults may act at once. Within one area they would hide what each other hit."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What a fault's recovery is measured by, in the recorded transitions, once the run is over.

    Attributes:
        what: "jobs": until one of `ids` is claimed again; "claims": until anything is claimed; "gap": the longest time
            without a claim in the next seconds.
        at: from when on (seconds since 1970); None: from when the fault is healed.
        ids: the jobs that the dead held.
    """

    what: Literal["jobs", "claims", "gap"]
    at: float | None = None
    ids: tuple[UUID, ...] = ()


def _at_once() -> bool:
    return True


@dataclass(slots=True)
class Action:
    """A fault that acts.

    Attributes:
        target: what it was done to.
        window: what it found there, in words: why it counts, or why not.
        hit: whether it hit its window; asked right before it is healed.
        seconds: how long it holds at least.
        over: whether it may be healed then; it is after `patience` more seconds in any case.
        pids: the processes that it killed or stopped.
        stopped: they did not run while the fault held.
        watch: how its recovery is measured.
    """

    target: str
    window: str
    hit: Callable[[], bool]
    seconds: float = 0.0
    over: Callable[[], bool] = _at_once
    patience: float = 0.0
    pids: tuple[int, ...] = ()
    stopped: bool = False
    watch: Watch | None = None


class Missed(Exception):  # noqa: N818 - not an error: the moment was not there
    """There is nothing to hit at the moment."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault is given: the world, its own chance, a look into PostgreSQL, the stack of what it must heal.

    `away` names the hosts that another fault keeps away for long.
    """

    world: World
    random: Random
    eyes: Eyes
    undo: contextlib.ExitStack
    away: set[str] = field(default_factory=set)

    def hosts(self) -> list[Host]:
        """The hosts that are there.

        Raises:
            Missed: none is.
        """
        found = [host for host in self.world.hosts if host.alive and host.name not in self.away]
        if not found:
            raise Missed("no host is there")
        return found

    def host(self) -> Host:
        """Some host that is there.

        Raises:
            Missed: none is.
        """
        return self.random.choice(self.hosts())

    def take_away(self, host: Host) -> None:
        """Other faults leave this host alone until this one is healed."""
        self.away.add(host.name)
        self.undo.callback(self.away.discard, host.name)

    def between(self, low: float, high: float) -> float:
        """Seconds, by chance."""
        return self.random.uniform(low, high)


def _possible(_: World) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
        name: as it stands in records and in `--only`.
        area: what it disturbs.
        begin: strikes.
        weight: how often it is chosen beside the others.
        own_servers: it would harm what else lives on somebody's servers.
        long: it holds for about the time of a lease, so it comes early in the run.
        impossible: why it cannot be done here, or None.
    """

    name: str
    area: Area
    begin: Callable[[Scene], Action]
    weight: float = 1.0
    own_servers: bool = False
    long: bool = False
    impossible: Callable[[World], str | None] = _possible


OURS: Final = sql.SQL(
    "(select * from pg_stat_activity where application_name like 'pmqd%%' and application_name <> 'pmqd:chaos'"
    " and datname = current_database()) ours"
)
"""The sessions of hosts and producers, for a `from`; those of the run itself are not among them."""


class Eyes:
    """A look into PostgreSQL past all wires; answers None while it cannot be asked. Any thread may ask."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None

    def ask(self, query: LiteralString, parameters: Mapping[str, Any] | None = None) -> list[Any] | None:
        """Rows of a statement; `{schema}` stands for the schema's name, `{ours}` for the sessions of pmqd."""
        text = sql.SQL(query).format(schema=sql.Identifier(self._world.schema), ours=OURS)
        with self._lock:
            for _ in range(2):  # the connection kept from the last time may have died since
                try:
                    cursor = self._open().execute(text, parameters or {})
                    return cursor.fetchall() if cursor.description else []
                except (psycopg.Error, OSError):
                    self._drop()
        return None

    def number(self, query: LiteralString, parameters: Mapping[str, Any] | None = None) -> int:
        """The one number that a statement answers; 0 while PostgreSQL cannot be asked."""
        rows = self.ask(query, parameters)
        return int(rows[0][0] or 0) if rows else 0

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            self._drop()

    def _open(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            self._connection = self._world.connect()
            self._connection.execute("set statement_timeout = '3s'")
            self._connection.execute("set session characteristics as transaction read write")
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                connection.close()


@dataclass(slots=True)
class Held:
    """What an instance, or one of its workers, held in PostgreSQL at a moment of the database's clock."""

    at: float
    ids: tuple[UUID, ...] = ()

    def watch(self) -> Watch | None:
        """Recovery is when one of these jobs is claimed again."""
        return Watch("jobs", self.at, self.ids) if self.ids else None


def held_by(scene: Scene, host: Host, slot: int | None = None) -> Held:
    """The jobs that run under claims of a host's instance, or of the worker in one of its slots."""
    rows = scene.eyes.ask(
        "select j.id, extract(epoch from clock_timestamp()) from {schema}.instances i"
        " join {schema}.claims c on c.instance_id = i.id"
        " cross join lateral (select x.id from {schema}.jobs x where x.id = any(c.ids) and x.status = 'running'"
        "   and x.claim_token = c.token) j"
        " where i.pid = %(pid)s and (%(slot)s::text is null or c.worker_id like %(slot)s)",
        {"pid": host.master_pid, "slot": None if slot is None else f"%:w{slot}.%"},
    )
    if not rows:
        return Held(time.time())
    return Held(float(rows[0][1]), tuple(row[0] for row in rows))


def slot_of(pid: int) -> int | None:
    """The arena's slot of a worker, from its process title."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        return int(title.removeprefix("pmqd: worker ").split(" ")[0])
    return None


def open_jobs(folder: Path, pid: int) -> int:
    """How many handlers a process has begun and not ended, by the end of the recorded history."""
    started: set[bytes] = set()
    for line in _tail(folder / "history" / "handlers"):
        words = line.split(b" ")
        if len(words) > 4 and words[4] == b"%d" % pid:
            (started.add if words[0] == b"S" else started.discard)(words[3] + words[1])
    return len(started)


def _tail(path: Path, size: int = 400_000) -> list[bytes]:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().split(b"\n")[1:-1]
    return []


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:
        found.extend(parents.get(each, ()))
    return found


def logged(host: Host, words: tuple[str, ...]) -> Callable[[], bool]:
    """Whether the host's log says one of these from now on."""
    start = host.log_path.stat().st_size

    def said() -> bool:
        with contextlib.suppress(OSError), host.log_path.open("rb") as file:
            file.seek(start)
            found = file.read().decode(errors="replace")
            return any(each in found for each in words)
        return False

    return said


def wait_until(condition: Callable[[], bool], seconds: float, every: float = 0.02) -> bool:
    """Waits until something is so, at most so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def write_line(path: Path, line: str) -> None:
    """Adds one line with one write, as all of the history is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, line.encode() + b"\n")
    finally:
        os.close(handle)


def note(path: Path, **fields: object) -> None:
    """One line of the nemesis' own history."""
    write_line(path, json.dumps({"at": time.monotonic_ns(), **fields}, default=str))


@contextlib.contextmanager
def redis_of(scene: Scene) -> Iterator[redis.Redis]:
    """A client of Redis past all wires.

    Raises:
        Missed: Redis does not answer.
    """
    client = scene.world.redis_client()
    try:
        yield client
    except (redis.RedisError, OSError) as error:
        raise Missed(f"Redis did not answer: {error}") from error
    finally:
        client.close()


@dataclass(slots=True)
class Growth:
    """Whether a number has grown since it was first read; a reader that fails counts as not grown."""

    read: Callable[[], int]
    before: int = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._read()

    def grown(self) -> bool:
        """Whether it has."""
        return self._read() > self.before

    def _read(self) -> int:
        try:
            return self.read()
        except (redis.RedisError, psycopg.Error, OSError):
            return 0


def never() -> bool:
    """For an action whose window was not there."""
    return False


def always() -> bool:
    """For an action that has its evidence when it begins."""
    return True


def kinds() -> dict[str, Kind]:
    """All kinds of faults by name."""
    from pmqd.chaos import (  # noqa: PLC0415 - they import this module
        faults_clock,
        faults_crashes,
        faults_postgres,
        faults_processes,
        faults_redis,
        faults_signals,
        faults_wires,
    )

    tables: Sequence[Sequence[Kind]] = (
        faults_processes.KINDS,
        faults_crashes.KINDS,
        faults_redis.KINDS,
        faults_postgres.KINDS,
        faults_wires.KINDS,
        faults_signals.KINDS,
        faults_clock.KINDS,
    )
    return {kind.name: kind for table in tables for kind in table}


def possible(world: World, table: Mapping[str, Kind]) -> tuple[dict[str, Kind], dict[str, str]]:
    """The kinds that can be done in this world, and why the others cannot."""
    fine, refused = {}, {}
    for kind in table.values():
        own = world.postgres is not None and world.redis is not None
        reason = "only on private servers" if kind.own_servers and not own else kind.impossible(world)
        if reason is None:
            fine[kind.name] = kind
        else:
            refused[kind.name] = reason
    return fine, refused
