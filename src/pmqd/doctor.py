"""What `pmqd doctor` looks at on the live servers, and what it says to do.

Each look is one function from what a server said to findings, so that a test needs no broken server; `examine`
asks the servers. The limits stand at the top.
"""

import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from pmqd import schema
from pmqd.address import Address, hash_tag
from pmqd.broker import Broker
from pmqd.config import RedisSettings, Settings, masked
from pmqd.conninfo import complete, one_line
from pmqd.doctor_failover import FACTS, failover, rights, through_pooler
from pmqd.errors import BrokerUnavailable, SchemaError
from pmqd.findings import Finding, Level
from pmqd.sql_files import LATEST, role_names

__all__ = ["Finding", "Level", "examine"]

OLDEST_POSTGRES = 140000
OLDEST_REDIS = (7, 0)
CLOCK_SECONDS = 2.0
LONG_TRANSACTION_SECONDS = 300
DEAD_ROWS = 100_000
SPARE_CONNECTIONS = 3
DIRECT_CONNECTIONS = 2
"""Of those past a pooler: the leading migrator's, and the one that keeps the partitions."""
SERVICE_CONNECTIONS = 7
"""Two of the migrator, two of maintenance, three of the web child."""
SLOW_PING_SECONDS = 0.01
PINGS = 5


def examine(settings: Settings) -> list[Finding]:
    """Looks at both servers.

    Args:
        settings: the configuration of the daemon that is to run on them.

    Returns:
        What was found; a server that is away is a finding too.
    """
    found = [Finding("pmqd", Level.OK, f"{version('pmqd')} on Python {platform.python_version()}")]
    return [*found, *_examine_postgres(settings), *redis_findings(settings.redis)]


# --- PostgreSQL ----------------------------------------------------------------------------------------------

_FACTS = """
select current_setting('server_version') as version, current_setting('server_version_num')::int as number,
       current_user as role, current_database() as database, pg_is_in_recovery() as recovering,
       current_setting('default_transaction_read_only')::bool as read_only,
       current_setting('default_transaction_isolation') as isolation,
       current_setting('fsync')::bool as fsync, current_setting('synchronous_commit') as synchronous_commit,
       current_setting('autovacuum')::bool as autovacuum, current_setting('track_counts')::bool as track_counts,
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int as most,
       (select count(*) from pg_stat_activity where backend_type = 'client backend')::int as connections,
       (select rolconnlimit from pg_roles where rolname = current_user) as role_limit,
       (select count(*) from pg_stat_activity where usename = current_user)::int as role_connections,
       clock_timestamp() as clock
"""
_TRANSACTIONS = """
select pid, coalesce(usename, '') as usename, coalesce(application_name, '') as application_name, state,
       extract(epoch from clock_timestamp() - xact_start)::float8 as seconds
from pg_stat_activity
where xact_start < clock_timestamp() - make_interval(secs => %s) and pid <> pg_backend_pid()
      and backend_type = 'client backend'
order by xact_start limit 5
"""
_PREPARED = "select gid, extract(epoch from now() - prepared)::float8 as seconds from pg_prepared_xacts order by 2 desc"
_TABLES = """
select c.oid::regclass::text as name, coalesce(s.n_dead_tup, 0) as dead, coalesce(s.n_live_tup, 0) as live,
       coalesce('autovacuum_enabled=false' = any(c.reloptions), false) as off
from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_stat_all_tables s on s.relid = c.oid
where n.nspname = %s and c.relkind = 'r'
"""


def _examine_postgres(settings: Settings) -> Iterator[Finding]:
    postgres = settings.postgres
    timeout = max(2, round(postgres.connect_timeout_seconds))
    try:
        with psycopg.connect(
            complete(postgres.direct),
            connect_timeout=timeout,
            application_name="pmqd:doctor",
            autocommit=True,
            row_factory=dict_row,
        ) as connection:
            connection.execute("select set_config('statement_timeout', '5000', false)")
            yield from _look_at_postgres(connection, settings)
    except psycopg.OperationalError as error:
        shown = masked(postgres.direct) or "the places of libpq (PGHOST …)"
        text = f"{shown}: {one_line(error)}"
        yield Finding("PostgreSQL", Level.UNREACHABLE, text, "start it, or set postgres.dsn")
    if postgres.pooled:
        yield through_pooler(postgres)


def _look_at_postgres(connection: psycopg.Connection[DictRow], settings: Settings) -> Iterator[Finding]:
    before = time.time()
    facts = connection.execute(_FACTS).fetchone()
    assert facts is not None
    here = (before + time.time()) / 2
    yield from postgres_version(facts)
    yield from durability(facts)
    yield from headroom(facts, settings)
    yield clock(facts["clock"], here)
    yield _schema(settings)
    more = connection.execute(FACTS, {"schema": settings.postgres.schema_name}).fetchone()
    assert more is not None
    yield from rights(more, settings.postgres.schema_name)
    yield from failover(more, settings.postgres)
    rows = connection.execute(_TABLES, [settings.postgres.schema_name]).fetchall()
    yield from autovacuum(facts, rows)
    prepared = connection.execute(_PREPARED).fetchall()
    yield from transactions(
        connection.execute(_TRANSACTIONS, [LONG_TRANSACTION_SECONDS]).fetchall(), prepared
    )


def postgres_version(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """The version, and whether this server can be written to."""
    good = facts["number"] >= OLDEST_POSTGRES
    yield Finding(
        "PostgreSQL version",
        Level.OK if good else Level.WRONG,
        f"{facts['version']}, database {facts['database']} as {facts['role']}",
        "" if good else "upgrade to PostgreSQL 14 or later",
    )
    if facts["recovering"]:
        do = "set postgres.dsn to the primary, or add target_session_attrs=read-write to it"
        yield Finding("PostgreSQL role", Level.WRONG, "this server is a standby and takes no writes", do)
    if facts["read_only"]:
        do = f"alter role {_quoted(facts['role'])} reset default_transaction_read_only;"
        yield Finding("default_transaction_read_only", Level.WRONG, "on: nothing can be written", do)
    if facts["isolation"] != "read committed":
        do = f"alter role {_quoted(facts['role'])} set default_transaction_isolation = 'read committed';"
        found = f"{facts['isolation']}: claims of several workers would make each other fail"
        yield Finding("default_transaction_isolation", Level.WARNING, found, do)


def durability(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a commit is kept."""
    if not facts["fsync"]:
        do = "alter system set fsync = on; select pg_reload_conf();"
        yield Finding("fsync", Level.WRONG, "off: a crash of the machine can destroy the database", do)
    elif facts["synchronous_commit"] == "off":
        do = f"alter role {_quoted(facts['role'])} set synchronous_commit = on;"
        yield Finding(
            "synchronous_commit", Level.WARNING, "off: a crash can undo a claim and run its job twice", do
        )
    else:
        yield Finding("durability", Level.OK, f"fsync on, synchronous_commit {facts['synchronous_commit']}")


def headroom(facts: Mapping[str, Any], settings: Settings) -> Iterator[Finding]:
    """Whether the daemon's connections fit beside those there are."""
    pooled = (
        settings.postgres.pooled
    )  # then all but the migrator and the partitions' keeper share what the pooler has
    workers = 0 if pooled else sum(pool.processes for pool in settings.workers)
    need = workers + (DIRECT_CONNECTIONS if pooled else SERVICE_CONNECTIONS) + SPARE_CONNECTIONS
    free = facts["most"] - facts["connections"]
    found = f"{free} of {facts['most']} free; one daemon of this configuration needs up to {need}"
    if free >= need:
        yield Finding("connections", Level.OK, found)
    else:
        more = facts["most"] + need - free + 10
        do = f"alter system set max_connections = {more}; (and restart), or fewer processes in [[workers]]"
        yield Finding("connections", Level.WARNING, found, do)
    limit = facts["role_limit"]
    if limit is not None and limit >= 0 and limit - facts["role_connections"] < need:
        found = f"the role {facts['role']} may have {limit}, has {facts['role_connections']}, needs up to {need} more"
        do = f"alter role {_quoted(facts['role'])} connection limit {facts['role_connections'] + need};"
        yield Finding("connection limit of the role", Level.WARNING, found, do)


def clock(theirs: datetime, here: float) -> Finding:
    """The difference between this machine's clock and the database's, which decides when a job is due.

    Args:
        theirs: the database's time.
        here: this machine's, seconds since 1970, of the same moment.
    """
    difference = theirs.timestamp() - here
    found = f"the database's clock is {abs(difference):.3f} s {'ahead' if difference > 0 else 'behind'}"
    if abs(difference) <= CLOCK_SECONDS:
        return Finding("clocks", Level.OK, found)
    return Finding("clocks", Level.WARNING, found, "timedatectl set-ntp true   (on both machines)")


def _schema(settings: Settings) -> Finding:
    where = settings.postgres
    try:
        found = schema.check(where.direct, schema=where.schema_name)
    except (SchemaError, psycopg.errors.InsufficientPrivilege) as error:
        return _bad_schema(settings, error)
    return Finding("schema", Level.OK, f"{settings.postgres.schema_name}, version {found}")


def _bad_schema(settings: Settings, error: Exception) -> Finding:
    where = settings.postgres
    denied = isinstance(error.__cause__ or error, psycopg.errors.InsufficientPrivilege)
    if denied and "cannot be compared" in str(error):
        return Finding("schema", Level.WARNING, str(error), "pmqd schema check   (as the schema's owner)")
    if denied:
        user = psycopg.conninfo.conninfo_to_dict(where.direct).get("user") or "this user"
        do = f"grant {_quoted(role_names(where.schema_name)['daemon'])} to {user};"
        return Finding("schema", Level.WRONG, str(error), do)
    behind = schema.version(where.direct, schema=where.schema_name) < LATEST
    do = (
        "pmqd schema apply"
        if behind
        else "undo what was changed by hand, or ask whoever did; pmqd schema check"
    )
    return Finding("schema", Level.WRONG, str(error), do)


def autovacuum(facts: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Whether dead rows are cleared away: a queue makes many."""
    if not facts["autovacuum"] or not facts["track_counts"]:
        do = "alter system set autovacuum = on; alter system set track_counts = on; select pg_reload_conf();"
        yield Finding("autovacuum", Level.WRONG, "off: the tables will grow without end", do)
    else:
        yield Finding("autovacuum", Level.OK, "on")
    for row in tables:
        if row["off"]:
            do = f"alter table {row['name']} reset (autovacuum_enabled);"
            yield Finding(f"autovacuum of {row['name']}", Level.WRONG, "switched off for this table", do)
        elif row["dead"] > DEAD_ROWS and row["dead"] > row["live"]:
            found = f"{row['dead']:,} dead rows beside {row['live']:,} living ones"
            yield Finding(
                f"dead rows in {row['name']}", Level.WARNING, found, f"vacuum (analyze) {row['name']};"
            )


def transactions(
    open_: Sequence[Mapping[str, Any]], prepared: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Transactions so old that they keep dead rows from being cleared away."""
    for row in open_:
        who = f"pid {row['pid']} ({row['usename']} {row['application_name']})".replace(" )", ")")
        found = f"{who}: {row['state']}, open for {row['seconds'] / 60:.0f} min; no dead row goes while it is"
        yield Finding("long transaction", Level.WARNING, found, f"select pg_terminate_backend({row['pid']});")
    old = [row for row in prepared if row["seconds"] > LONG_TRANSACTION_SECONDS]
    for row in old:
        found = f"prepared {row['seconds'] / 60:.0f} min ago and neither committed nor rolled back"
        yield Finding(
            "prepared transaction", Level.WARNING, found, f"rollback prepared {_literal(row['gid'])};"
        )
    if not open_ and not old:
        yield Finding("long transactions", Level.OK, "none")


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string(None)


def _literal(text: str) -> str:
    return sql.Literal(text).as_string(None)


# --- Redis ---------------------------------------------------------------------------------------------------


def redis_findings(redis: RedisSettings) -> Iterator[Finding]:
    """What is to be said of Redis.

    Args:
        redis: the section of the configuration.
    """
    broker = Broker(redis, "doctor")
    try:
        broker.ping()  # the first opens the connection
        info = broker.info()
        yield from redis_server(info)
        yield from cluster(info, redis.prefix)
        yield from access(redis.address, redis.tls_verify, open_to_all=_open_to_all(redis))
        yield ping(min(broker.ping() for _ in range(PINGS)))
    except BrokerUnavailable as error:
        yield Finding(
            "Redis", Level.UNREACHABLE, str(error), "start it, or set redis.url; jobs run without it, slower"
        )
    finally:
        broker.close()


def redis_server(info: Mapping[str, Any]) -> Iterator[Finding]:
    """What INFO tells: version, role, memory, persistence, clients."""
    yield _redis_version(info)
    if info.get("role") not in ("master", None):
        yield Finding("Redis role", Level.WRONG, "a replica takes no writes", "set redis.url to the primary")
    yield from memory(info)
    yield from persistence(info)
    clients, most = int(info.get("connected_clients", 0)), int(info.get("maxclients", 10_000))
    if clients > most * 0.9:
        do = f"CONFIG SET maxclients {most * 2}"
        yield Finding("Redis connections", Level.WARNING, f"{clients} of {most} in use", do)


def cluster(info: Mapping[str, Any], prefix: str) -> Iterator[Finding]:
    """In a cluster one node must have all keys.

    Args:
        info: INFO of a node.
        prefix: the setting.
    """
    if not info.get("cluster_enabled"):
        return
    if hash_tag(prefix):
        yield Finding("Redis Cluster", Level.OK, f"all keys in the slot of {hash_tag(prefix)}")
    else:
        found = (
            f"the prefix {prefix!r} has no hash tag: the keys lie on different nodes, and Redis is not used"
        )
        yield Finding("Redis Cluster", Level.WRONG, found, 'set redis.prefix = "{pmqd}:"')


def access(address: Address, tls_verify: str, *, open_to_all: bool) -> Iterator[Finding]:
    """Who else can reach Redis. On this machine alone, its own users are the affair of the machine.

    Args:
        address: where it is.
        tls_verify: the setting.
        open_to_all: whether it answers somebody who shows no password.
    """
    if address.local:
        return
    if open_to_all:
        found = "it answers everybody who reaches it: anybody there can read jobs and throw them away"
        do = "ACL SETUSER default off   (after making a user for pmqd: docs/high-availability.md)"
        yield Finding("Redis access", Level.WARNING, found, do)
    else:
        yield Finding("Redis access", Level.OK, "only with a password or certificate")
    if not address.tls:
        found = "no TLS: the network in between can read and change what is sent, passwords among it"
        yield Finding("Redis encryption", Level.WARNING, found, "set redis.url = rediss://…")
    elif tls_verify != "full":
        found = f'redis.tls_verify = "{tls_verify}": somebody in between can pass for Redis'
        yield Finding("Redis encryption", Level.WARNING, found, 'set redis.tls_verify = "full"')
    else:
        yield Finding("Redis encryption", Level.OK, "TLS, certificate and name verified")


def _open_to_all(redis: RedisSettings) -> bool:
    """Asks as a stranger would, who has neither password nor certificate."""
    unknown = {"url": re.sub("//[^/?#]*@", "//", redis.url, count=1), "cert_file": "", "key_file": ""}
    stranger = Broker(redis.model_copy(update=unknown), "doctor")
    try:
        stranger.ping()
    except BrokerUnavailable:
        return False
    finally:
        stranger.close()
    return True


def _redis_version(info: Mapping[str, Any]) -> Finding:
    name = str(info.get("server_name", "redis"))
    text = str(info.get(f"{name}_version") or info.get("redis_version") or "0")
    good = _numbers(text) >= OLDEST_REDIS
    do = "" if good else "upgrade to Redis 7.0 or Valkey 7.2"
    return Finding("Redis version", Level.OK if good else Level.WRONG, f"{name.capitalize()} {text}", do)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split(".")[:2])


def memory(info: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether Redis may throw keys away, or is about to refuse them."""
    most, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    policy = str(info.get("maxmemory_policy", "noeviction"))
    do = "CONFIG SET maxmemory-policy noeviction   (and CONFIG REWRITE)"
    if policy == "noeviction":
        yield Finding("maxmemory-policy", Level.OK, policy)
    elif most:
        found = f"{policy}: full, Redis throws lists of waiting jobs away; they are offered again, late"
        yield Finding("maxmemory-policy", Level.WRONG, found, do)
    else:
        yield Finding("maxmemory-policy", Level.WARNING, f"{policy}: harmless while maxmemory is 0", do)
    if most and used > most * 0.8:
        found = f"{used >> 20} of {most >> 20} MiB used; full, Redis refuses hints and jobs run without it"
        yield Finding("Redis memory", Level.WARNING, found, f"CONFIG SET maxmemory {most * 2}")


def persistence(info: Mapping[str, Any]) -> Iterator[Finding]:
    """Persistence is not needed; one that fails stops writes."""
    kinds = [name for name, key in (("AOF", "aof_enabled"), ("RDB", "rdb_last_save_time")) if info.get(key)]
    failed = [key for key in ("rdb_last_bgsave_status", "aof_last_write_status") if info.get(key) == "err"]
    if failed:
        do = "CONFIG SET stop-writes-on-bgsave-error no   (or make room on its disk)"
        yield Finding("Redis persistence", Level.WRONG, f"{failed[0]} is err: Redis refuses writes", do)
    else:
        yield Finding("Redis persistence", Level.OK, f"{' and '.join(kinds) or 'none'}; pmqd needs none")


def ping(seconds: float) -> Finding:
    """The quickest round trip of some to Redis: one alone may have met a moment in which this machine was busy."""
    found = f"{seconds * 1000:.1f} ms for a round trip"
    if seconds <= SLOW_PING_SECONDS:
        return Finding("Redis latency", Level.OK, found)
    return Finding(
        "Redis latency", Level.WARNING, found, "put Redis nearer to the workers, or look at SLOWLOG GET"
    )
