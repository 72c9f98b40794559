"""Redis over TLS: whatever is not the server that was meant is refused, and the right one works."""

import ssl
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from pmqd import route
from pmqd.broker import Broker
from pmqd.config import RedisSettings
from pmqd.embedded import RedisServer
from pmqd.errors import BrokerUnavailable
from tests.fix_daemon import MakeDaemon
from tests.fix_redis_ha import Papers, TlsDoor
from tests.fix_servers import WaitUntil
from tests.history import enqueue, statuses

EPOCH = UUID(int=99)


def works(**settings: Any) -> None:
    """Push, pop and live status with these settings; raises BrokerUnavailable where Redis is refused."""
    broker = Broker(RedisSettings(**settings), "test")
    try:
        broker.set_epoch(EPOCH)
        key = broker.queue_key("mail", "normal")
        broker.push(EPOCH, [(key, [UUID(int=n) for n in range(2000)])])
        for number in range(4):  # the connection of the pop is used again
            broker.pop_start([key], 500, 1.0)
            assert [hint.id.int for hint in broker.pop_finish()] == list(
                range(number * 500, number * 500 + 500)
            )
        broker.pop_start([key], 1, 0.01)
        assert broker.pop_finish() == []
    finally:
        broker.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_right_server_works(
    host: str, redis_server: RedisServer, redis_url: str, tls_door: Any, papers: Papers
) -> None:
    """With the authority's certificate the server is trusted under each name that stands in its own, over TLS 1.2 or later."""
    door: TlsDoor = tls_door(redis_server, papers.server)
    works(url=door.url(host), ca_file=str(papers.ca))
    assert door.versions <= {"TLSv1.2", "TLSv1.3"}


@pytest.mark.parametrize(
    ("certificate", "trusted", "reason"),
    [
        ("server", "stranger", "unable to get local issuer|self-signed|self signed|signature failure"),
        ("server", None, "unable to get local issuer|self-signed|self signed"),
        ("elsewhere", "ca", "IP address mismatch"),
        ("expired", "ca", "certificate has expired"),
    ],
    ids=["wrong authority", "authority unknown to the system", "wrong host", "expired"],
)
def test_a_server_that_is_not_the_right_one_is_refused(
    certificate: str,
    trusted: str | None,
    reason: str,
    redis_server: RedisServer,
    redis_url: str,
    tls_door: Any,
    papers: Papers,
) -> None:
    """By default a certificate of another authority, for another host, or out of date ends the connection, and why is told."""
    door = tls_door(redis_server, getattr(papers, certificate))
    with pytest.raises(BrokerUnavailable, match=reason) as caught:
        works(url=door.url(), ca_file=str(getattr(papers, trusted)) if trusted else "")
    assert "redis.ca_file" in str(caught.value)


def test_an_own_authority_shuts_out_those_of_the_system(
    redis_server: RedisServer, redis_url: str, tls_door: Any, papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `redis.ca_file` only that authority counts, also for a server that one of the system's has signed."""
    monkeypatch.setenv("SSL_CERT_FILE", str(papers.ca))
    route._context.cache_clear()
    door = tls_door(redis_server, papers.server)
    works(url=door.url(), tls_verify="full")
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        works(url=door.url(), ca_file=str(papers.stranger))
    route._context.cache_clear()


def test_plaintext_behind_a_tls_address_is_refused(
    redis_server: RedisServer, redis_url: str, papers: Papers
) -> None:
    """A server that does not speak TLS is not spoken to without it, whatever is checked of certificates."""
    plain = redis_url.replace("redis://", "rediss://")
    for verify in ("full", "ca", "none"):
        with pytest.raises(BrokerUnavailable, match=r"SSL|Timeout|closed"):
            works(url=plain, ca_file=str(papers.ca), tls_verify=verify)


def test_less_is_checked_only_where_it_is_said(
    redis_server: RedisServer, redis_url: str, tls_door: Any, papers: Papers
) -> None:
    """The check "ca" leaves out the name but not the authority; "none" takes anything that speaks TLS."""
    elsewhere = tls_door(redis_server, papers.elsewhere)
    works(url=elsewhere.url(), ca_file=str(papers.ca), tls_verify="ca")
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        works(url=elsewhere.url(), ca_file=str(papers.stranger), tls_verify="ca")
    works(url=elsewhere.url(), tls_verify="none")


def test_a_client_certificate_is_shown(
    redis_server: RedisServer, redis_url: str, tls_door: Any, papers: Papers, tmp_path: Path
) -> None:
    """A server that asks for a certificate gets ours, from one file or two; without it the connection is refused."""
    door = tls_door(redis_server, papers.server, papers.ca)
    ca = str(papers.ca)
    works(url=door.url(), ca_file=ca, cert_file=str(papers.client))
    text = papers.client.read_text()
    at = text.index("-----BEGIN CERTIFICATE")
    (tmp_path / "key").write_text(text[:at])
    (tmp_path / "cert").write_text(text[at:])
    works(url=door.url(), ca_file=ca, cert_file=str(tmp_path / "cert"), key_file=str(tmp_path / "key"))
    with pytest.raises(BrokerUnavailable):
        works(url=door.url(), ca_file=ca)


def test_files_that_cannot_be_read_are_named(
    redis_server: RedisServer, redis_url: str, tls_door: Any, papers: Papers, tmp_path: Path
) -> None:
    """A missing or broken file is told by its setting and path, and nothing is sent."""
    door = tls_door(redis_server, papers.server)
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    for name in ("missing.pem", "broken.pem"):
        with pytest.raises(BrokerUnavailable, match=f"redis.ca_file = '.*{name}' cannot be used"):
            works(url=door.url(), ca_file=str(tmp_path / name))
        with pytest.raises(BrokerUnavailable, match=f"redis.cert_file = '.*{name}' cannot be used"):
            works(url=door.url(), ca_file=str(papers.ca), cert_file=str(tmp_path / name))
    assert door.versions == set()


def test_the_daemon_works_over_tls_and_without_a_server_that_it_cannot_trust(
    daemon: MakeDaemon,
    database: str,
    connection: psycopg.Connection[Any],
    redis_server: RedisServer,
    redis_url: str,
    tls_door: Any,
    papers: Papers,
    wait_until: WaitUntil,
) -> None:
    """Over TLS everything is as without; with the wrong authority the work goes on straight from PostgreSQL, and the log says why."""
    door = tls_door(redis_server, papers.server)
    trusting = daemon({"redis": {"url": door.url(), "ca_file": str(papers.ca)}})
    for _ in range(50):
        enqueue(connection, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 50}, what="50 jobs done over TLS")
    assert trusting.get("/healthz").json()["mode"] == "redis"
    trusting.stop()
    doubting = daemon({"redis": {"url": door.url(), "ca_file": str(papers.stranger)}})
    enqueue(connection, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 51}, what="a job done without Redis")
    wait_until(lambda: doubting.get("/healthz").json()["mode"] == "direct", what="direct mode")
    told = [each["message"] for each in doubting.records if "CERTIFICATE_VERIFY_FAILED" in each["message"]]
    assert told
    assert len(told) <= 4, "once for each child"


def test_pythons_default_protocols_are_modern() -> None:
    """What the settings promise of protocol versions holds with this interpreter's own defaults."""
    assert ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).minimum_version >= ssl.TLSVersion.TLSv1_2
