"""TLS to PostgreSQL: verified unless the connection string says otherwise, and closed when anything is wrong with it."""

import pytest

from pmqd import schema
from pmqd.client import App
from pmqd.config import PostgresSettings
from pmqd.embedded import PostgresServer
from pmqd.errors import StoreUnavailable
from pmqd.store import Store
from tests.fix_postgres_ha import SERVER_NAME, Certificates, ServeTls, TlsFront

FAR = f"host={SERVER_NAME} hostaddr=127.0.0.1 user=postgres dbname=pmqd"
"""A server that is not this machine, as far as its name tells."""


def refused(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a worker's store says; the producer and `pmqd schema` are refused in the same words."""
    monkeypatch.setenv("PGGSSENCMODE", "disable")
    store = Store(PostgresSettings(dsn=dsn), "test")
    with pytest.raises(StoreUnavailable) as caught:
        _ = store.connection
    text = str(caught.value)
    with pytest.raises(StoreUnavailable) as caught:
        schema.version(dsn)
    assert str(caught.value) == text
    monkeypatch.setenv("PMQD_POSTGRES__DSN", dsn)
    with pytest.raises(StoreUnavailable) as caught:
        App().enqueue("mail", {})
    assert text.partition(": ")[2] in str(caught.value)
    assert "\n" not in text
    return text


def connects(dsn: str) -> bool:
    """Whether a worker's store connects, and that it is encrypted."""
    store = Store(PostgresSettings(dsn=dsn), "test")
    try:
        return bool(store.connection.pgconn.ssl_in_use)
    finally:
        store.close()


def test_a_verified_server_is_used(serve_tls: ServeTls, certificates: Certificates) -> None:
    """Without a word about TLS in the string but the authority, the connection is encrypted and verified."""
    port = serve_tls(certificates.issue())
    assert connects(f"{FAR} port={port} sslrootcert={certificates.root}")


def test_wrong_authority(
    serve_tls: ServeTls, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that somebody else signed: refused, and the line names the setting."""
    port = serve_tls(certificates.issue(strange=True))
    text = refused(f"{FAR} port={port} sslrootcert={certificates.root}", monkeypatch)
    assert "certificate verify failed" in text
    assert "sslrootcert in postgres.dsn" in text


def test_without_an_authority_the_machines_own_count(
    serve_tls: ServeTls, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sslrootcert: those that the machine trusts, by SSL_CERT_FILE here; the test's own is none of them without it."""
    port = serve_tls(certificates.issue())
    monkeypatch.setenv("HOME", str(certificates.folder))
    assert "certificate verify failed" in refused(f"{FAR} port={port}", monkeypatch)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.root))
    assert connects(f"{FAR} port={port}")
    assert connects(f"{FAR} port={port} sslrootcert=system")


def test_wrong_host(serve_tls: ServeTls, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good certificate of another name: refused, and the line says which name is wanted."""
    port = serve_tls(certificates.issue("elsewhere.pmqd.test"))
    text = refused(f"{FAR} port={port} sslrootcert={certificates.root}", monkeypatch)
    assert f'does not match host name "{SERVER_NAME}"' in text
    assert "as host in postgres.dsn" in text


def test_expired(serve_tls: ServeTls, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of yesterday: refused."""
    port = serve_tls(certificates.issue(expired=True))
    text = refused(f"{FAR} port={port} sslrootcert={certificates.root}", monkeypatch)
    assert "certificate verify failed" in text
    assert "expired" in text


def test_plaintext_downgrade(
    serve_tls: ServeTls, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says no to TLS: refused, and the line names the way to allow it."""
    port = serve_tls(None)
    text = refused(f"{FAR} port={port} sslrootcert={certificates.root}", monkeypatch)
    assert "does not support SSL" in text
    assert "sslmode=disable in postgres.dsn" in text


def test_nothing_is_said_in_plain_text(own_postgres: PostgresServer) -> None:
    """Whoever answers no to TLS hears neither user nor password."""
    front = TlsFront(own_postgres, None)
    store = Store(PostgresSettings(dsn=f"{FAR} port={front.port} password=s3cret"), "test")
    with pytest.raises(StoreUnavailable):
        _ = store.connection
    front.close()
    assert front.heard == b""


def test_an_explicit_word_stands(serve_tls: ServeTls, certificates: Certificates) -> None:
    """sslmode=require encrypts and verifies nobody; disable does not even encrypt. Both have to be written down."""
    port = serve_tls(certificates.issue(strange=True))
    assert connects(f"{FAR} port={port} sslmode=require")


def test_loopback_needs_no_tls(serve_tls: ServeTls) -> None:
    """A server on this machine is reached without TLS, as `pmqd dev` and a sidecar pooler are; no word in the string."""
    port = serve_tls(None)
    assert not connects(f"host=localhost hostaddr=127.0.0.1 port={port} user=postgres dbname=pmqd")
