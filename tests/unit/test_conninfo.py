"""What is added to a connection string of PostgreSQL."""

from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from pmqd.conninfo import complete, one_line, system_roots

REMOTE = [
    "host=db.example",
    "postgresql://u@db.example/d",
    "hostaddr=10.0.0.1",
    "host=db.example hostaddr=127.0.0.1",
]
LOCAL = [
    "",
    "dbname=d",
    "host=/run/postgresql",
    "host=@abstract",
    "host=localhost",
    "host=127.0.0.1",
    "host=::1",
    "hostaddr=127.0.0.9",
]


def added(dsn: str, environ: dict[str, str] | None = None) -> dict[str, object]:
    """What `complete` adds to it."""
    before = conninfo_to_dict(dsn)
    after = conninfo_to_dict(complete(dsn, environ or {}))
    assert {name: after[name] for name in before} == before
    return {name: value for name, value in after.items() if name not in before}


@pytest.mark.parametrize("dsn", REMOTE)
def test_other_hosts_are_verified(dsn: str) -> None:
    """A server on another host, or meant to be on one: TLS with its certificate verified."""
    assert added(dsn)["sslmode"] == "verify-full"
    assert added(dsn)["sslrootcert"] == system_roots({})


@pytest.mark.parametrize("dsn", LOCAL)
def test_this_machine_is_not_asked_for_tls(dsn: str) -> None:
    """A socket and loopback: nothing is added."""
    assert added(dsn) == {}


def test_one_host_of_several_is_enough() -> None:
    """With one of them elsewhere all are verified; and the one is wanted that can be written to."""
    assert added("host=/run/postgresql,db.example")["sslmode"] == "verify-full"
    assert added("host=/a,/b") == {"target_session_attrs": "read-write"}
    assert added("host=/a,/b target_session_attrs=any") == {}
    assert added("host=/a,/b", {"PGTARGETSESSIONATTRS": "primary"}) == {}


def test_what_is_said_stands() -> None:
    """In the string or in libpq's own variables; an authority that is named is not replaced."""
    assert added("host=db.example sslmode=require") == {}
    assert added("host=db.example", {"PGSSLMODE": "disable"}) == {}
    assert added("host=db.example sslrootcert=/ca.crt") == {"sslmode": "verify-full"}
    assert added("host=db.example", {"PGSSLROOTCERT": "/ca.crt"}) == {"sslmode": "verify-full"}


def test_places_from_elsewhere() -> None:
    """PGHOST names a host as the string does; a service file is not read, so its server may be anywhere."""
    assert added("", {"PGHOST": "db.example"})["sslmode"] == "verify-full"
    assert added("", {"PGHOST": "/run/postgresql"}) == {}
    assert added("service=main")["sslmode"] == "verify-full"


def test_the_machines_authorities(tmp_path: Path) -> None:
    """SSL_CERT_FILE first, as OpenSSL does; the word `system` is replaced, for psycopg's wheels look where nothing is."""
    own = tmp_path / "ca.crt"
    own.touch()
    assert system_roots({"SSL_CERT_FILE": str(own)}) == str(own)
    after = conninfo_to_dict(complete("host=db.example sslrootcert=system", {"SSL_CERT_FILE": str(own)}))
    assert after["sslrootcert"] == str(own)


def test_turned() -> None:
    """Hosts, addresses and ports turn together; one port for all stays."""
    turned = conninfo_to_dict(complete("host=/a,/b,/c port=1,2,3", {}, turn=4))
    assert (turned["host"], turned["port"]) == ("/b,/c,/a", "2,3,1")
    turned = conninfo_to_dict(complete("host=/a,/b port=1", {}, turn=1))
    assert (turned["host"], turned["port"]) == ("/b,/a", "1")


def test_one_line() -> None:
    """Several hosts fail in several lines; what a setting can mend names it."""
    assert one_line("a\n\tb") == "a b"
    assert one_line("server does not support SSL").endswith("sslmode=disable in postgres.dsn")
