"""What pmqd adds to a connection string of PostgreSQL: verified TLS, and the writable one of several hosts.

What the string or libpq's own variables (PGSSLMODE …) say is never changed. libpq's own defaults are other ones: `prefer`
encrypts without looking at whom, and falls back to plain text when a server, or somebody in between, says no.
"""

import os
import ssl
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Final

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pmqd.address import is_loopback

_ROOTS: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, Red Hat
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",
)

_ADVICE: Final = (
    (
        "does not support SSL",
        "switch TLS on there (ssl = on), or allow plain text with sslmode=disable in postgres.dsn",
    ),
    (
        "does not match host name",
        "use a name of the certificate as host in postgres.dsn (hostaddr may hold the address)",
    ),
    (
        "certificate verify failed",
        "the server's certificate has expired, or sslrootcert in postgres.dsn names another authority than its own",
    ),
    ("root certificate file", "sslrootcert in postgres.dsn names no readable file of authorities"),
    (
        "unsupported startup parameter",
        "postgres.dsn leads to a connection pooler: set postgres.direct_dsn to the way past it",
    ),
)


def complete(dsn: str, environ: Mapping[str, str] = os.environ, *, turn: int = 0) -> str:
    """The connection string with what pmqd adds.

    Args:
        dsn: `postgres.dsn` or `postgres.direct_dsn`, known to be a connection string.
        environ: Where libpq's variables are looked for.
        turn: By how many places a list of hosts is turned round: the first one may be there, and be the wrong one.

    Returns:
        `sslmode=verify-full` and the machine's authorities for servers that are not on this machine;
        `target_session_attrs=read-write` where several hosts are named.
    """
    given = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    added: dict[str, str] = {}
    places = _places(given, environ)
    far = not all(_is_here(each) for place in places for each in place)
    mode = given.get("sslmode") or environ.get("PGSSLMODE")
    if far and not mode:
        mode = added["sslmode"] = "verify-full"
    if mode == "verify-full" and _wants_roots(given, environ):
        added["sslrootcert"] = system_roots(environ)
    if len(places) > 1 and not (given.get("target_session_attrs") or environ.get("PGTARGETSESSIONATTRS")):
        added["target_session_attrs"] = "read-write"
    if turn:
        added |= {
            name: _turned(given[name], turn) for name in ("host", "hostaddr", "port") if given.get(name)
        }
    return make_conninfo(dsn, **added) if added else dsn


def system_roots(environ: Mapping[str, str] = os.environ) -> str:
    """The file of the authorities that this machine trusts; libpq's word for them where none is found.

    psycopg's wheels bring an OpenSSL that looks in a folder of its own, where nothing is.
    """
    candidates = (environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *_ROOTS)
    return next((path for path in candidates if path and Path(path).is_file()), "system")


def one_line(error: Exception | str) -> str:
    """What libpq says, in one line, and what to do about it where a setting of pmqd's is in question."""
    text = " ".join(str(error).split())
    advice = next((advice for sign, advice in _ADVICE if sign in text), None)
    return f"{text}: {advice}" if advice else text


def _places(given: Mapping[str, str], environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Name and address of each server. Neither: libpq's default socket. A name may be the folder of a socket.

    With both the address is where the packets go, perhaps into a tunnel, and the name is whom they are meant for.
    """
    names = (given.get("host") or environ.get("PGHOST") or "").split(",")
    addresses = (given.get("hostaddr") or environ.get("PGHOSTADDR") or "").split(",")
    places = list(zip_longest(names, addresses, fillvalue=""))
    if places == [("", "")] and (given.get("service") or environ.get("PGSERVICE")):
        return [("(as the service file says)", "")]  # not read here: it may be anywhere
    return places


def _turned(listed: str, turn: int) -> str:
    entries = listed.split(",")
    at = turn % len(entries)
    return ",".join(entries[at:] + entries[:at])


def _is_here(place: str) -> bool:
    return not place or place[0] in "/@" or is_loopback(place)


def _wants_roots(given: Mapping[str, str], environ: Mapping[str, str]) -> bool:
    """Whether libpq would look for authorities in a file that is not there, or in psycopg's empty folder."""
    named = given.get("sslrootcert") or environ.get("PGSSLROOTCERT")
    if named:
        return named == "system"
    return not (Path.home() / ".postgresql" / "root.crt").exists()
