"""What doctor says of standbys, of a pooler, and of rights."""

from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from pmqd import doctor_failover
from pmqd.config import PostgresSettings
from pmqd.embedded import PostgresServer
from pmqd.findings import Level
from tests.fix_postgres_ha import MakePair, MakePgBouncer


def facts(dsn: str) -> dict[str, Any]:
    """What the server says."""
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        found = connection.execute(doctor_failover.FACTS, {"schema": "pmqd"}).fetchone()
    assert found is not None
    return found


def test_rights(database: str, connection: psycopg.Connection) -> None:
    """A stranger may not; the statement that is printed lets it; a superuser is told that less would do."""
    connection.execute("drop role if exists stranger")
    connection.execute("create role stranger login")
    dsn = make_conninfo(database, user="stranger")
    try:
        [finding] = doctor_failover.rights(facts(dsn), "pmqd")
        assert finding.level == Level.WRONG
        connection.execute(finding.do.encode())
        [finding] = doctor_failover.rights(facts(dsn), "pmqd")
        assert (finding.level, finding.found) == (Level.OK, "stranger may do what the daemon does")
        [finding] = doctor_failover.rights(facts(database), "pmqd")
        assert "a role with pmqd_daemon granted would do" in finding.found
    finally:
        connection.execute("drop owned by stranger")
        connection.execute("drop role stranger")


def test_a_synchronous_standby(pair: MakePair) -> None:
    """Told truly, with the hint that no pause is needed; without it connected every commit waits, which is wrong."""
    both = pair("synchronous")
    dsn = both.primary.dsn("pmqd")
    [finding] = doctor_failover.failover(facts(dsn), PostgresSettings(dsn=dsn))
    assert finding.level == Level.OK
    assert finding.found.startswith("1 connected, 1 synchronous; postgres.standby = ")
    both.standby.stop()
    [finding] = doctor_failover.failover(facts(dsn), PostgresSettings(dsn=dsn))
    assert finding.level == Level.WRONG
    with psycopg.connect(both.primary.dsn(), autocommit=True) as connection:
        connection.execute("alter system reset synchronous_standby_names")
        connection.execute("select pg_reload_conf()")


def test_a_promise_that_the_server_does_not_keep(database: str) -> None:
    """postgres.standby = "synchronous" and a server that waits for nobody: jobs could run twice at once."""
    settings = PostgresSettings(dsn=database, standby="synchronous")
    [finding] = doctor_failover.failover(facts(database), settings)
    assert (finding.what, finding.level) == ("standby", Level.WRONG)
    assert finding.do == 'set postgres.standby = "asynchronous"'


@pytest.mark.parametrize(
    ("name", "level"), [("pmqd", Level.OK), ("postgres", Level.WRONG), ("nowhere", Level.UNREACHABLE)]
)
def test_a_pooler(pgbouncer: MakePgBouncer, own_postgres: PostgresServer, name: str, level: Level) -> None:
    """Both ways lead to the same database, or that is said."""
    pooler = pgbouncer(own_postgres)
    settings = PostgresSettings(
        dsn=pooler.dsn(name), direct_dsn=own_postgres.dsn("pmqd"), connect_timeout_seconds=30
    )
    finding = doctor_failover.through_pooler(settings)
    assert finding.level == level, finding.found
