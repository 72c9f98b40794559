"""What doctor finds on real servers, and what it makes of figures that no test server shows."""

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from pmqd import cli, doctor
from pmqd.config import PoolSettings, PostgresSettings, RedisSettings, Settings
from pmqd.doctor import Finding, Level
from pmqd.embedded import PostgresServer, RedisServer
from tests.fix_servers import WaitUntil

GOOD: dict[str, Any] = {
    "version": "18.1", "number": 180001, "role": "o'neil", "database": "app", "recovering": False, "read_only": False,
    "isolation": "read committed", "fsync": True, "synchronous_commit": "on", "autovacuum": True, "track_counts": True,
    "most": 97, "connections": 10, "role_limit": -1, "role_connections": 5,
}  # fmt: skip
INFO: dict[str, Any] = {
    "redis_version": "7.2.4", "role": "master", "maxmemory": 0, "maxmemory_policy": "noeviction", "used_memory": 1 << 20,
    "connected_clients": 5, "maxclients": 10_000, "rdb_last_bgsave_status": "ok", "aof_enabled": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' servers do not wait for the disk, which doctor would say each time."""
    look = doctor.durability
    monkeypatch.setattr(
        doctor, "durability", lambda facts: look({**facts, "fsync": facts.get("given", True)})
    )


def settings(dsn: str, redis_url: str) -> Settings:
    """A daemon with one pool on these servers."""
    pool = PoolSettings(name="mail", app="a:b", processes=4)
    return Settings(workers=[pool], postgres=PostgresSettings(dsn=dsn), redis=RedisSettings(url=redis_url))


def bad(findings: list[Finding]) -> dict[str, Finding]:
    """What is not well, by its name."""
    return {finding.what: finding for finding in findings if finding.level != Level.OK}


def test_good_servers_are_well(database: str, redis_url: str) -> None:
    """On servers as they should be nothing is wrong, and each of the looks says what it saw."""
    found = doctor.examine(settings(database, redis_url))
    assert bad(found) == {}
    seen = {finding.what for finding in found}
    assert {
        "PostgreSQL version",
        "Redis version",
        "schema",
        "clocks",
        "autovacuum",
        "maxmemory-policy",
    } <= seen
    assert {"connections", "long transactions", "Redis persistence", "durability"} <= seen


def test_what_is_wrong_on_a_live_database_is_found_and_its_cure_works(
    database: str, redis_url: str, connection: psycopg.Connection
) -> None:
    """Drift and switched-off autovacuum are found; the statements that doctor prints mend them."""
    connection.execute("alter table pmqd.jobs_default set (autovacuum_enabled = false)")
    connection.execute("alter role current_user set default_transaction_isolation = 'serializable'")
    try:
        found = bad(doctor.examine(settings(database, redis_url)))
        assert set(found) == {"autovacuum of pmqd.jobs_default", "default_transaction_isolation"}
        for finding in found.values():
            connection.execute(finding.do.encode())
        assert bad(doctor.examine(settings(database, redis_url))) == {}
    finally:
        connection.execute("alter role current_user reset default_transaction_isolation")


def test_a_changed_schema_is_found(database: str, redis_url: str, connection: psycopg.Connection) -> None:
    """A dropped index is named; a missing schema says how to make it."""
    connection.execute("drop index pmqd.jobs_ready")
    assert "jobs_ready" in bad(doctor.examine(settings(database, redis_url)))["schema"].found
    connection.execute("drop schema pmqd cascade")
    found = bad(doctor.examine(settings(database, redis_url)))["schema"]
    assert (found.level, found.do) == (Level.WRONG, "pmqd schema apply")


def test_rights_that_are_missing_are_found(
    database: str, redis_url: str, connection: psycopg.Connection
) -> None:
    """A user without rights is told which role to be granted; the daemon's own user cannot compare, and is told so."""
    connection.execute("create role plain login")
    try:
        as_plain = f"{database}&user=plain" if "?" in database else f"{database}?user=plain"
        found = bad(doctor.examine(settings(as_plain, redis_url)))["schema"]
        assert (found.level, found.do) == (Level.WRONG, 'grant "pmqd_daemon" to plain;')
        connection.execute(found.do.encode())
        found = bad(doctor.examine(settings(as_plain, redis_url)))["schema"]
        assert (found.level, "cannot be compared" in found.found) == (Level.WARNING, True)
    finally:
        connection.execute("drop role plain")


def test_a_long_transaction_is_found_and_its_cure_works(
    database: str,
    redis_url: str,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: WaitUntil,
) -> None:
    """It is named by its process, and the printed statement ends it."""
    monkeypatch.setattr(doctor, "LONG_TRANSACTION_SECONDS", 0)
    with closing(psycopg.connect(database, application_name="forgotten")) as open_one:
        open_one.execute("select 1")
        pid = open_one.info.backend_pid

        def seen() -> list[Finding]:
            found = doctor.examine(settings(database, redis_url))
            return [f for f in found if f.what == "long transaction" and f"pid {pid} " in f.found]

        wait_until(lambda: bool(seen()), 5, "the open transaction")
        assert "forgotten" in seen()[0].found
        connection.execute(seen()[0].do.encode())
        wait_until(lambda: not seen(), 5, "its end")


def test_an_evicting_redis_is_found_and_its_cure_works(database: str, own_redis: RedisServer) -> None:
    """A server that may throw lists away is wrong; without a limit it is a warning; the printed command mends it."""
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert (
            bad(doctor.examine(settings(database, own_redis.url)))["maxmemory-policy"].level == Level.WARNING
        )
        client.config_set("maxmemory", str(100 << 20))
        found = bad(doctor.examine(settings(database, own_redis.url)))["maxmemory-policy"]
        assert found.level == Level.WRONG
        client.execute_command(*found.do.partition("   ")[0].split())
        assert bad(doctor.examine(settings(database, own_redis.url))) == {}


def test_exit_codes(
    own_postgres: PostgresServer, redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 where nothing is wrong, 1 where something is, 69 where a server is away; the table says what to do."""
    dsn = own_postgres.dsn("pmqd")
    file = tmp_path / "pmqd.toml"
    file.write_text(f'[postgres]\ndsn = "{dsn}"\n[redis]\nurl = "{redis_url}"\n')
    assert cli.main(["doctor", "--config", str(file)]) == 0
    assert cli.main(["doctor", "--config", str(file), "--json"]) == 0
    capsys.readouterr()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("drop index pmqd.jobs_ready")
    assert cli.main(["doctor", "--config", str(file)]) == 1
    assert "jobs_ready" in capsys.readouterr().out
    own_postgres.kill()
    assert cli.main(["doctor", "--config", str(file), "--json"]) == 69
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert (found["PostgreSQL"]["level"], found["maxmemory-policy"]["level"]) == ("unreachable", "ok")


# --- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what", "do"),
    [
        ({"number": 130009}, "PostgreSQL version", "upgrade"),
        ({"recovering": True}, "PostgreSQL role", "primary"),
        ({"read_only": True}, "default_transaction_read_only", 'alter role "o\'neil" reset'),
        ({"given": False}, "fsync", "alter system set fsync = on"),
        ({"synchronous_commit": "off"}, "synchronous_commit", "set synchronous_commit = on"),
        ({"autovacuum": False}, "autovacuum", "alter system set autovacuum = on"),
        ({"track_counts": False}, "autovacuum", "track_counts = on"),
        ({"connections": 95}, "connections", "max_connections = "),
        ({"role_limit": 6}, "connection limit of the role", 'alter role "o\'neil" connection limit'),
    ],
)
def test_figures_of_postgres(change: dict[str, Any], what: str, do: str) -> None:
    """Each fault is found by itself, with the statement that mends it."""
    given = settings("", "redis://127.0.0.1")

    def look(facts: dict[str, Any]) -> dict[str, Finding]:
        return bad(
            [
                *doctor.postgres_version(facts),
                *doctor.durability(facts),
                *doctor.headroom(facts, given),
                *doctor.autovacuum(facts, []),
            ]
        )

    assert look(GOOD) == {}
    found = look({**GOOD, **change})
    assert list(found) == [what]
    assert do in found[what].do


@pytest.mark.parametrize(
    ("change", "what", "level"),
    [
        ({"redis_version": "6.2.1"}, "Redis version", Level.WRONG),
        ({"server_name": "valkey", "valkey_version": "7.2.0", "redis_version": "7.2.4"}, "", Level.OK),
        ({"role": "slave"}, "Redis role", Level.WRONG),
        ({"maxmemory": 100 << 20, "maxmemory_policy": "volatile-ttl"}, "maxmemory-policy", Level.WRONG),
        ({"maxmemory": 100 << 20, "used_memory": 90 << 20}, "Redis memory", Level.WARNING),
        ({"rdb_last_bgsave_status": "err"}, "Redis persistence", Level.WRONG),
        ({"connected_clients": 9_500}, "Redis connections", Level.WARNING),
    ],
)
def test_figures_of_redis(change: dict[str, Any], what: str, level: Level) -> None:
    """Each fault is found by itself, as bad as it is."""
    assert bad(list(doctor.redis_server(INFO))) == {}
    found = bad(list(doctor.redis_server({**INFO, **change})))
    assert list(found) == ([what] if what else [])
    assert all(finding.level == level and finding.do for finding in found.values())


def test_a_cluster_needs_a_hash_tag() -> None:
    """Without one the keys lie on several nodes; on a plain server any prefix is fine."""
    assert list(doctor.cluster(INFO, "")) == []
    for prefix, level in (
        ("", Level.WRONG),
        ("{}:", Level.WRONG),
        ("a}{:", Level.WRONG),
        ("x{pmqd}:", Level.OK),
    ):
        [found] = doctor.cluster({**INFO, "cluster_enabled": 1}, prefix)
        assert found.level == level


@pytest.mark.parametrize(
    ("url", "verify", "open_to_all", "expected"),
    [
        ("redis://127.0.0.1,localhost,[::1]", "full", True, {}),
        ("unix:///run/redis", "full", True, {}),
        ("redis://db.example.org", "full", True, {"Redis access", "Redis encryption"}),
        ("redis://:pw@db.example.org", "full", False, {"Redis encryption"}),
        ("rediss://:pw@db.example.org", "ca", False, {"Redis encryption"}),
        ("rediss://:pw@db.example.org", "full", False, set()),
        ("rediss+sentinel://:pw@127.0.0.1,10.0.0.1/m", "full", True, {"Redis access"}),
    ],
)
def test_open_non_local_redis_without_auth_or_tls_is_a_warning(
    url: str, verify: str, open_to_all: bool, expected: set[str]
) -> None:
    """Beyond this machine, a Redis that answers strangers, and traffic that is not encrypted and verified, are told."""
    address = RedisSettings(url=url).address
    found = bad(list(doctor.access(address, verify, open_to_all=open_to_all)))
    assert set(found) == set(expected)
    assert all(finding.level == Level.WARNING and finding.do for finding in found.values())


def test_a_stranger_is_told_from_a_friend(own_redis: RedisServer) -> None:
    """Whether Redis is open to all is tried out, without the password and the certificate of the settings."""
    given = RedisSettings(url=own_redis.url.replace("//", "//default:hush@"))
    assert doctor._open_to_all(RedisSettings(url=own_redis.url))
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("requirepass", "hush")
    assert not doctor._open_to_all(given)
    assert bad(list(doctor.redis_findings(given))) == {}


def test_clocks_transactions_and_dead_rows() -> None:
    """Two seconds of difference, a forgotten prepared transaction and a bloated table are warnings."""
    now = datetime(2026, 1, 31, tzinfo=UTC)
    assert doctor.clock(now, now.timestamp()).level == Level.OK
    behind = doctor.clock(now - timedelta(seconds=3), now.timestamp())
    assert (behind.level, "3.000 s behind" in behind.found) == (Level.WARNING, True)
    [prepared] = doctor.transactions([], [{"gid": "it's", "seconds": 4000.0}])
    assert (prepared.level, prepared.what) == (Level.WARNING, "prepared transaction")
    rows = [{"name": "pmqd.jobs_default", "dead": 900_000, "live": 5, "off": False}]
    assert (
        bad(list(doctor.autovacuum(GOOD, rows)))["dead rows in pmqd.jobs_default"].do
        == "vacuum (analyze) pmqd.jobs_default;"
    )
    assert doctor.ping(0.5).level == Level.WARNING
