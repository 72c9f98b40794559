"""The wire that fault tests cut: it does what it says."""

import psycopg
import pytest
import redis

from pmqd.embedded import PostgresServer, RedisServer
from tests.fix_proxy import MakeProxy


def client_of(url: str) -> redis.Redis:
    """A Redis client that gives up soon and tries once."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return redis.Redis.from_url(url, socket_timeout=0.3, retry=Retry(NoBackoff(), 0))


def test_bytes_pass(proxy: MakeProxy, redis_server: RedisServer) -> None:
    """An open wire passes large values in both directions."""
    with client_of(proxy(redis_server).url) as client:
        client.set("a", b"x" * 500_000)
        value = client.get("a")
        assert isinstance(value, bytes)
        assert len(value) == 500_000


def test_a_held_wire_is_silent_and_goes_on(proxy: MakeProxy, redis_server: RedisServer) -> None:
    """While held nothing answers, neither old nor new connections; healed, everything does."""
    wire = proxy(redis_server)
    with client_of(wire.url) as client, client_of(wire.url) as late:
        assert client.ping()
        wire.hold()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        with pytest.raises(redis.TimeoutError):
            late.ping()
        wire.heal()
        assert client.ping()
        assert late.ping()


def test_a_cut_wire_refuses(proxy: MakeProxy, redis_server: RedisServer) -> None:
    """Cut, old and new connections fail at once; healed, new ones work."""
    wire = proxy(redis_server)
    with client_of(wire.url) as client:
        assert client.ping()
        wire.cut()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.ping()
        wire.heal()
        assert client.ping()
        first = client.client_id()
        wire.reset()
        assert client.client_id() != first


@pytest.mark.parametrize(("when", "rows"), [("before", 0), ("after", 1)])
def test_a_wire_breaks_at_a_packet(
    proxy: MakeProxy, postgres: PostgresServer, empty_database: str, when: str, rows: int
) -> None:
    """A commit can be lost before the server sees it, or its answer after the server obeyed."""
    wire = proxy(postgres)
    with psycopg.connect(empty_database, autocommit=True) as looking:
        looking.execute("create table t (x int)")
        connection = psycopg.connect(wire.dsn(empty_database))
        connection.execute("insert into t values (1)")
        wire.break_on(b"COMMIT", when)  # type: ignore[arg-type]
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        connection.close()
        assert wire.sprung == 1
        assert looking.execute("select count(*) from t").fetchone() == (rows,)
