"""Where connections to Redis lead: to one server, the master that sentinels name, or the node of a cluster with our keys.

To one server without TLS they are redis-py's own. The others ask for their way whenever they are made, so after any
error a new connection is all that is needed to follow a failover or a moved slot.
"""

from __future__ import annotations

import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, UnixDomainSocketConnection
from redis.retry import Retry
from redis.sentinel import Sentinel

from pmqd.address import Place, hash_tag, shown
from pmqd.settings import RedisSettings

_SENTINEL_SECONDS: Final = 0.5  # one that is silent must not hold up the question to the next
_ASK_AGAIN_SECONDS: Final = 5.0
_NO_ANSWER_SECONDS: Final = 30.0
_HOPS: Final = 5

_Connection: Any = Connection  # its methods carry no types


@dataclass(slots=True)
class _Known:
    """What this process knows of the way, by `redis.url`: all its connections lead to the same place.

    Else one would push to a master that another has left, and what lies there would be missed.

    Attributes:
        first: the node or sentinel that was right last, to be asked first.
        master: whom the sentinels named last.
        ask_at: when to ask them again, though nothing is wrong: one that is cut off from them stays a master for a while.
    """

    first: Place | None = None
    master: Place | None = None
    ask_at: float = 0.0


_known: defaultdict[str, _Known] = defaultdict(_Known)


class Route:
    """Makes the connections to Redis of one broker."""

    def __init__(self, settings: RedisSettings, role: str, timeout_seconds: float) -> None:
        """Takes the settings, the child's role (for the server's client list) and the longest wait for a reply."""
        self._settings = settings
        self._address = settings.address
        self._role = role
        self._timeout_seconds = timeout_seconds
        self._epoch_key = f"{settings.prefix}pmqd:epoch"
        self._known = _known[settings.url]
        self._kind, self._options = self._chosen()

    def __str__(self) -> str:
        """For messages; without user and password."""
        return str(self._address)

    @property
    def led(self) -> bool:
        """Whether a connection may have to go elsewhere although it works: `connect` it before each use."""
        return self._lead() is not None

    def connection(self) -> Any:
        """A connection that is not made yet. Its methods carry no types."""
        return self._kind(**self._options)

    def pool(self) -> redis.ConnectionPool:
        """A pool of such connections."""
        return redis.ConnectionPool(connection_class=self._kind, **self._options)

    def _chosen(self) -> tuple[Any, dict[str, Any]]:
        address = self._address
        options = self._common(self._timeout_seconds) | {
            "db": address.database,
            "username": address.user,
            "password": address.password,
        }
        if address.path:
            return UnixDomainSocketConnection, options | {"path": address.path}
        place = {"host": address.places[0][0], "port": address.places[0][1], "socket_keepalive": True}
        lead = self._lead()
        if lead is None and not address.tls:
            return Connection, options | place
        return _Link, options | place | {"lead": lead, "stays": self._stays, "tls": self._tls()}

    def _common(self, timeout_seconds: float) -> dict[str, Any]:
        return {
            "retry": Retry(NoBackoff(), 0),  # its default of ten retries hid a dead link for 40 s
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "health_check_interval": 0,
            "client_name": f"pmqd:{self._role}",
            "protocol": 2,
            "decode_responses": False,
        }

    def _tls(self) -> Callable[[], ssl.SSLContext] | None:
        if not self._address.tls:
            return None
        given = self._settings
        return lambda: _context(given.ca_file, given.cert_file, given.key_file, given.tls_verify)

    def _lead(self) -> Callable[[_Link], None] | None:
        if self._address.master:
            return self._to_master
        # A server that is no cluster takes a prefix with a hash tag as any other: the way ends at its door.
        return self._to_owner if hash_tag(self._settings.prefix) else None

    # --- Sentinel

    def _to_master(self, link: _Link) -> None:
        place = self._named_master()
        link.reach(place)
        link.send_command("INFO", "replication")
        if b"role:master" not in link.read_response():
            raise redis.ConnectionError(f"the sentinels name {shown(place)}, which is no master (yet)")

    def _stays(self, link: _Link) -> bool:
        """Whether a connection still leads to the right place; asked before each use, answered from memory nearly always."""
        if not self._address.master:
            return True  # a node of a cluster says itself that it is the wrong one
        now = time.monotonic()
        if now >= self._known.ask_at:
            try:
                self._named_master()
            except redis.RedisError:  # no reason to leave a master that works
                self._known.ask_at = time.monotonic() + _NO_ANSWER_SECONDS
        return (link.host, link.port) == self._known.master

    def _named_master(self) -> Place:
        """What the first sentinel says that knows a living master."""
        clients = {place: self._sentinel(place) for place in self._places()}
        sentinel = Sentinel([])  # type: ignore[no-untyped-call]
        sentinel.sentinels = list(clients.values())
        try:
            host, port = sentinel.discover_master(self._address.master)  # type: ignore[no-untyped-call]
            self._known.first = next(at for at, each in clients.items() if each is sentinel.sentinels[0])
        finally:
            for client in clients.values():
                client.connection_pool.disconnect()
        self._known.master = str(host), int(port)
        self._known.ask_at = time.monotonic() + _ASK_AGAIN_SECONDS
        return self._known.master

    def _sentinel(self, place: Place) -> redis.Redis:
        options = self._common(min(_SENTINEL_SECONDS, self._timeout_seconds)) | {
            "host": place[0],
            "port": place[1],
            "username": self._address.sentinel_user,
            "password": self._address.sentinel_password,
            "tls": self._tls(),
        }
        return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=_Link, **options))

    # --- Cluster

    def _to_owner(self, link: _Link) -> None:
        """Any node tells which one has a key; all our keys are in one slot, with the epoch's."""
        failed: Exception | None = None
        for place in self._places():
            try:
                return self._follow(link, place)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                link.disconnect()
                failed = error
        assert failed is not None, "there is a place"
        raise failed

    def _follow(self, link: _Link, place: Place) -> None:
        for _ in range(_HOPS):
            link.reach(place)
            link.send_command("EXISTS", self._epoch_key)
            try:
                link.read_response()
            except redis.exceptions.MovedError as moved:
                link.disconnect()
                place = str(moved.host) or place[0], int(moved.port)
            else:
                self._known.first = place
                return
        raise redis.ConnectionError("the nodes of the cluster do not agree which of them has our keys")

    def _places(self) -> Iterable[Place]:
        """Nodes or sentinels, the one that was right last before the others; a node need not be in `redis.url`."""
        first = self._known.first
        return dict.fromkeys([first, *self._address.places] if first else self._address.places)


class _Link(_Connection):  # type: ignore[misc]  # see there
    """A connection that is led to its server each time it is made, and speaks TLS if it has to."""

    def __init__(
        self,
        *,
        lead: Callable[[_Link], None] | None = None,
        stays: Callable[[_Link], bool] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._lead, self._stays = lead, stays
        self._tls = tls

    def connect(self) -> None:
        """Connects, unless it is connected to the right place; redis-py calls this before each use."""
        if self._lead is None or self._stays is None:
            super().connect()
            return
        if self._sock is not None:
            if self._stays(self):
                return
            self.disconnect()
        try:
            self._lead(self)
        except BaseException:
            self.disconnect()
            raise

    def reach(self, place: Place) -> None:
        """Connects to this place."""
        self.host, self.port = place
        super().connect()

    def _connect(self) -> Any:
        context = self._tls() if self._tls is not None else None
        plain = super()._connect()
        if context is None:
            return plain
        try:
            return context.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            with suppress(OSError):
                plain.close()
            raise


@lru_cache(maxsize=8)
def _context(ca_file: str, cert_file: str, key_file: str, verify: str) -> ssl.SSLContext:
    """What a connection checks and shows. Read once per process: a reload reads changed files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = verify == "full"
    context.verify_mode = ssl.CERT_NONE if verify == "none" else ssl.CERT_REQUIRED
    with _naming("redis.ca_file", ca_file):
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs()
    with _naming("redis.cert_file", cert_file):
        if cert_file:
            context.load_cert_chain(cert_file, key_file or None, password=_no_password)
    return context


@contextmanager
def _naming(setting: str, path: str) -> Iterator[None]:
    """OpenSSL tells neither which file it could not read nor what it was for."""
    try:
        yield
    except OSError as error:
        raise redis.ConnectionError(f"{setting} = {path!r} cannot be used: {error}") from error


def _no_password() -> bytes:
    """For a locked key: OpenSSL would ask for its password on the terminal."""
    return b""
