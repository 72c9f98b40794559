"""The world of a run: servers, wires and hosts, as the faults and the phases find them.

On own servers everything is the run's. On somebody's staging it works in a schema and under a Redis prefix of its own,
which must not be there before and are gone afterwards.
"""

import contextlib
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit, urlunsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from redis import Redis, RedisError

from pmqd import crashpoints
from pmqd import schema as schemas
from pmqd.chaos import application, history
from pmqd.chaos.deaths import DeathWatch
from pmqd.chaos.family import Host, Surroundings
from pmqd.chaos.machine import free_port
from pmqd.chaos.plan import Plan
from pmqd.chaos.servers import Keeper, KeptPostgres, KeptRedis
from pmqd.chaos.wire import Switchboard, Upstream, Wire
from pmqd.config import masked
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.errors import BrokerUnavailable, Conflict, PmqdError, SchemaError, StoreUnavailable
from pmqd.sql_files import role_names

STAGING_SCHEMA: Final = "pmqd_chaos_run"
HISTORY_SCHEMA: Final = "pmqd_chaos"
PRODUCERS: Final = "producers"
STORES: Final = ("postgres", "redis")

_CONNECT_SECONDS = 5
_SCAN = 1000
_CONNECTIONS_A_HOST = (
    12  # its migrator, maintenance and web child, and jobs that use connections of their own
)
_CONNECTIONS = 36  # producers, the nemesis, people
_DUMPED = {
    "transitions.csv": "select * from {history}.transitions order by seq",
    "effects.csv": "select * from {history}.effects",
    "jobs.csv": "select * from {schema}.jobs order by id",
    "job_logs.csv": "select * from {schema}.job_logs order by id",
}


POINTS: Final = tuple(crashpoints.POINTS)
"""The names of all crash points of the product: every host starts with all of them, and none armed."""


@dataclass
class World:
    """What there is. The addresses are direct ones; hosts and producers are given those of their wires.

    Attributes:
        postgres: the own server; None on staging.
        redis: the same.
        dsn: of somebody who may everything in the database.
        schema: pmqd's.
        prefix: of all keys in Redis.
        complaints: what went wrong with hosts and servers themselves.
    """

    plan: Plan
    folder: Path
    postgres: PostgresServer | None
    redis: RedisServer | None
    dsn: str
    redis_url: str
    schema: str
    prefix: str
    hosts: list[Host] = field(default_factory=list)
    wires: dict[tuple[str, str], Wire] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def connect(self) -> psycopg.Connection[Any]:
        """A connection past all wires, in autocommit mode.

        Raises:
            psycopg.OperationalError: PostgreSQL does not answer.
        """
        return psycopg.connect(
            self.dsn, autocommit=True, connect_timeout=_CONNECT_SECONDS, application_name="pmqd:chaos"
        )

    def redis_client(self) -> Redis:
        """A client past all wires."""
        return Redis.from_url(self.redis_url, socket_timeout=_CONNECT_SECONDS)

    def dsn_of(self, who: str) -> str:
        """PostgreSQL through the wire of a host, or of "producers"."""
        return dsn_through(self.dsn, self.wires[who, "postgres"].port)

    def redis_url_of(self, who: str) -> str:
        """Redis through the wire of a host, or of "producers"."""
        return redis_through(self.redis_url, self.wires[who, "redis"].port)

    def heal(self) -> None:
        """Servers up, wires open, crash points disarmed, nobody stopped, every host started. May be called again."""
        for server in (self.postgres, self.redis):
            if server is not None:
                server.start()
        for wire in self.wires.values():
            wire.open()
        for host in self.hosts:
            for point in POINTS:
                host.disarm(point)
            host.resume()
            host.start()

    def dump(self) -> None:
        """Write the final state of PostgreSQL into the folder, for whoever looks into a run that failed."""
        names = {"history": sql.Identifier(HISTORY_SCHEMA), "schema": sql.Identifier(self.schema)}
        with self.connect() as connection, connection.cursor() as cursor:
            for name, text in _DUMPED.items():
                query = sql.SQL("copy ({}) to stdout with csv header").format(sql.SQL(text).format(**names))
                with (self.folder / name).open("wb") as out, cursor.copy(query) as rows:
                    for part in rows:
                        out.write(part)


@contextlib.contextmanager
def open_world(plan: Plan) -> Iterator[World]:
    """The world with its schema, wires and hosts; the hosts are not started yet. All of it ends with the block.

    Raises:
        PmqdError: a server does not start or answer, or the schema is there already.
    """
    with contextlib.ExitStack() as stack:
        keeper = Keeper("of-the-run")
        stack.callback(keeper.close)
        world = _on_staging(plan, stack) if plan.staging else _on_own_servers(plan, keeper, stack)
        (plan.folder / "history").mkdir()
        _make_schema(world)
        board = stack.enter_context(Switchboard(plan.folder / "wires.log"))
        deaths = DeathWatch(plan.folder / "history" / history.DEATHS)
        stack.callback(deaths.close)
        around = Surroundings(plan.folder, plan.mutant, keeper, deaths, world.complaints.append, POINTS)
        names = string.ascii_lowercase[: plan.hosts]
        upstreams = _upstreams(world)
        for who in (*names, PRODUCERS):
            for store in STORES:
                world.wires[who, store] = board.add(upstreams[store])
        for name in names:
            host = Host(name, free_port(), _settings(world, name), around)
            world.hosts.append(host)
            stack.callback(host.kill)
            stack.callback(host.resume)
        yield world


def _settings(world: World, name: str) -> dict[str, Any]:
    """A host's configuration: the product's defaults, but for what would make a run long."""
    pools = [{"app": "pmqd.chaos.application:app", **pool} for pool in application.pools(world.plan.workers)]
    return {
        "drain_seconds": 3.0,
        "timeout_grace_seconds": 0.5,
        "postgres": {"dsn": make_conninfo(world.dsn_of(name), **_path(world)), "schema": world.schema},
        "redis": {"url": world.redis_url_of(name), "prefix": world.prefix},
        "migrator": {"error_pause_seconds": 1.0},
        "log": {"format": "json"},
        "queues": application.QUEUES,
        "workers": pools,
    }


def _path(world: World) -> dict[str, str]:
    """A place before the built-in functions, where the fault `clock_back` puts a wrong now(); pmqd's own path has none."""
    own = world.postgres is not None
    return {"options": "-c search_path=pmqd_chaos_clock,pg_catalog,public"} if own else {}


# --- servers


def _on_own_servers(plan: Plan, keeper: Keeper, stack: contextlib.ExitStack) -> World:
    connections = _CONNECTIONS + plan.hosts * (_CONNECTIONS_A_HOST + plan.workers)
    settings = {
        "max_connections": str(connections),
        "max_wal_size": "256MB",  # a crash replays at most so much: faults are to be short
        "shared_buffers": "128MB",
    }
    postgres = KeptPostgres(plan.folder / "pg", keeper, settings)
    redis_server = KeptRedis(plan.folder / "redis", keeper)
    stack.enter_context(postgres)
    stack.enter_context(redis_server)
    dsn = postgres.create_database("pmqd")
    return World(plan, plan.folder, postgres, redis_server, dsn, redis_server.url, "pmqd", "")


def _on_staging(plan: Plan, stack: contextlib.ExitStack) -> World:
    assert plan.postgres is not None
    assert plan.redis is not None
    world = World(
        plan, plan.folder, None, None, plan.postgres, plan.redis, STAGING_SCHEMA, f"{STAGING_SCHEMA}:"
    )
    _check_unused(world)
    stack.callback(_clean_up, world)
    return world


def _check_unused(world: World) -> None:
    """Refuse to work where another run does, or did and left its things."""
    try:
        with world.connect() as connection:
            found = connection.execute(
                "select nspname from pg_namespace where nspname = any(%s)", [[world.schema, HISTORY_SCHEMA]]
            ).fetchall()
    except psycopg.Error as error:
        raise StoreUnavailable(f"--postgres {masked(world.dsn)}: {str(error).strip()}") from error
    if found:
        raise Conflict(
            f"--postgres: the schema {found[0][0]} exists: another run works there, or one was killed;"
            f" if none does, `drop schema {found[0][0]} cascade`"
        )
    try:
        with world.redis_client() as client:
            keys = next(iter(client.scan_iter(f"{world.prefix}*", count=_SCAN)), None)
    except RedisError as error:
        raise BrokerUnavailable(f"--redis {masked(world.redis_url)}: {error}") from error
    if keys is not None:
        raise Conflict(
            f"--redis: there are keys that begin with {world.prefix}: another run works there, or one was killed"
        )


def _make_schema(world: World) -> None:
    try:
        schemas.apply(world.dsn, schema=world.schema)
        with world.connect() as connection:
            history.install(connection, world.schema)
    except (SchemaError, psycopg.Error) as error:
        if not world.plan.staging:
            raise PmqdError(f"the schema cannot be made: {error}") from error
        raise SchemaError(
            "a run makes schemas, triggers and roles of its own, and removes them: use a user who may"
            f" ({str(error).strip()})"
        ) from error
    if world.plan.mutant:
        from pmqd.chaos import mutants  # noqa: PLC0415 - only a run with a mutant needs them

        mutants.prepare(world.plan.mutant, world.dsn, world.schema)


def _clean_up(world: World) -> None:
    """Leave staging as it was."""
    try:
        with world.connect() as connection:
            for name in (world.schema, HISTORY_SCHEMA):
                connection.execute(sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(name)))
            for role in role_names(world.schema).values():
                connection.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(role)))
        with world.redis_client() as client:
            for key in client.scan_iter(f"{world.prefix}*", count=_SCAN):
                client.unlink(key)
    except (psycopg.Error, RedisError) as error:
        world.complaints.append(f"staging is not as it was: {str(error).strip()}")


# --- addresses


def _upstreams(world: World) -> Mapping[str, Upstream]:
    """Where the wires lead."""
    if world.postgres is not None and world.redis is not None:
        return {
            "postgres": Upstream(path=str(world.postgres.socket_folder / world.postgres.socket_name)),
            "redis": Upstream(path=str(world.redis.socket_folder / world.redis.socket_name)),
        }
    with world.connect() as connection:  # libpq's own reading of the address, environment and all
        info = connection.info
        host, port = info.hostaddr or info.host, info.port
    unix = host.startswith("/")
    postgres = Upstream(path=f"{host}/.s.PGSQL.{port}") if unix else Upstream(host=host, port=port)
    parts = urlsplit(world.redis_url)
    if parts.scheme == "unix":
        return {"postgres": postgres, "redis": Upstream(path=parts.path)}
    return {
        "postgres": postgres,
        "redis": Upstream(host=parts.hostname or "127.0.0.1", port=parts.port or 6379),
    }


def dsn_through(dsn: str, port: int) -> str:
    """The same database by a port of this machine. The host's name stays where there is one: certificates name it."""
    named = conninfo_to_dict(dsn).get("host")
    if isinstance(named, str) and named and not named.startswith("/"):
        return make_conninfo(dsn, hostaddr="127.0.0.1", port=port)
    return make_conninfo(dsn, host="127.0.0.1", port=port)


def redis_through(url: str, port: int) -> str:
    """The same Redis database by a port of this machine."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"redis://127.0.0.1:{port}/{parse_qs(parts.query).get('db', ['0'])[0]}"
    user, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))
