"""What `redis.url` says: where Redis is, who asks, and whether over TLS. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs, unquote

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379

Place = tuple[str, int]
"""A host and its port."""

_URL: Final = re.compile(
    r"(?P<scheme>rediss?(?:\+sentinel)?|unix)://(?P<netloc>[^/?#]*)(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?"
)
_HOST: Final = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s\[\]:,%]+))(?::(?P<port>[0-9]{1,5}))?"
)
_PATH: Final = re.compile(r"/(?P<database>[0-9]{1,9})?")
_SENTINEL_PATH: Final = re.compile(r"/(?P<master>[A-Za-z0-9._-]{1,100})(?:/(?P<database>[0-9]{1,9})?)?")
_QUERY: Final = {"unix": {"db"}, "sentinel": {"sentinel_user", "sentinel_password"}, "": set[str]()}


@dataclass(frozen=True, slots=True)
class Address:
    """A Redis address, taken apart.

    Attributes:
        places: hosts and ports: of the server, of nodes of a cluster, of the sentinels; none with `path`.
        path: the Unix socket, or "".
        master: the name by which the sentinels know the servers, or "" where there are no sentinels.
        tls: whether all these connections are encrypted.
        database: the numbered database.
        user: who asks; None is Redis's own default.
        password: of that user.
        sentinel_user: who asks the sentinels.
        sentinel_password: of that user.
    """

    places: tuple[Place, ...] = ()
    path: str = ""
    master: str = ""
    tls: bool = False
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_user: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)

    @property
    def local(self) -> bool:
        """Whether only this machine is spoken to."""
        return all(is_loopback(host) for host, _ in self.places)

    def __str__(self) -> str:
        """For messages: without who asks."""
        where = self.path or ",".join(shown(place) for place in self.places)
        return f"{self.master} of the sentinels {where}" if self.master else where


def read(url: str) -> Address:
    """Takes a Redis URL apart.

    Args:
        url: redis[s]://[user:password@]host[:port][,host[:port]…][/database],
            redis[s]+sentinel://[user:password@]host[:port],…/MASTER[/database][?sentinel_user=…&sentinel_password=…], or
            unix://[user:password@]/path[?db=database].

    Raises:
        ValueError: it is none of these. The message does not hold the URL, which may hold a password.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("not a Redis address")
    scheme, path = match["scheme"], match["path"] or ""
    credentials, _, hosts = match["netloc"].rpartition("@")
    user, _, password = credentials.partition(":")
    query = _query(match["query"] or "", "sentinel" if scheme.endswith("+sentinel") else scheme)
    who = {"user": unquote(user) or None, "password": unquote(password) or None}
    if scheme == "unix":
        return _unix(hosts, path, query, who)
    sentinel = scheme.endswith("+sentinel")
    at = (_SENTINEL_PATH if sentinel else _PATH).fullmatch(path or "/")
    if at is None:
        raise ValueError("not a Redis address")
    return Address(
        places=tuple(_place(text, SENTINEL_PORT if sentinel else REDIS_PORT) for text in hosts.split(",")),
        master=at["master"] if sentinel else "",
        tls=scheme.startswith("rediss"),
        database=int(at["database"] or 0),
        **who,  # type: ignore[arg-type]  # texts, all of them
        **query,
    )


def shown(place: Place) -> str:
    """A host and port as people write them."""
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hash_tag(prefix: str) -> str:
    """The part of a key's beginning that alone decides its slot in a cluster; "" where there is none."""
    _, brace, rest = prefix.partition("{")
    tag, end, _ = rest.partition("}")
    return tag if brace and end else ""


def _unix(hosts: str, path: str, query: dict[str, str], who: dict[str, str | None]) -> Address:
    database = query.get("db", "0")
    if hosts or len(path) < 2 or not re.fullmatch("[0-9]{1,9}", database):
        raise ValueError("not a Redis address")
    return Address(path=unquote(path), database=int(database), **who)  # type: ignore[arg-type]  # both are texts


def _query(text: str, kind: str) -> dict[str, str]:
    found = parse_qs(text, keep_blank_values=True)
    if not set(found) <= _QUERY.get(kind, set()):
        raise ValueError("an option that there is not")
    return {name: values[-1] for name, values in found.items()}


def _place(text: str, port: int) -> Place:
    match = _HOST.fullmatch(text)
    if match is None:
        raise ValueError("no host")
    number = int(match["port"] or port)
    if not 1 <= number <= 65535:
        raise ValueError("no such port")
    return match["six"] or match["name"], number
