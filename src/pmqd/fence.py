"""The self-fence: jobs of queues with `isolation = "abort"` end before another host may run them.

An instance that is cut off from PostgreSQL cannot see its lease run out, but it can count. A lease lasts at least 31
seconds from the moment when its last renewal was asked for; after 25 the master kills the processes that run such jobs,
and after 26, should the master stand still, every other child does. While PostgreSQL itself refuses everybody no tick is
made and no lease ages: that time is not counted.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from itertools import zip_longest
from typing import Final

from psycopg.conninfo import conninfo_to_dict

from pmqd.arena import Arena, Kind, Running, Slot, boottime
from pmqd.settings import Settings

FENCE_SECONDS: Final = 25.0
"""Age of the lease at which the master kills; from the same age on nothing of this sort is started."""
WATCH_SECONDS: Final = 26.0
"""Age of the lease at which the children kill, because the master has not."""
PROOF_SECONDS: Final = 2.0
"""Between two refusals that lie no further apart nobody can have ticked more than once or twice; the margin allows for it."""
PROBE_SECONDS: Final = 1.0

_STARTUP: Final = b"\x00\x00\x00\x17\x00\x03\x00\x00user\x00postgres\x00\x00"
_CANNOT_CONNECT_NOW: Final = b"C57P03\x00"

Address = tuple[str, int]
"""A host and port, or the path of a Unix socket's folder and the port in its name."""


def is_wanted(settings: Settings) -> bool:
    """Whether any queue asks for the fence."""
    return any(queue.isolation == "abort" for queue in settings.queues.values())


def may_start(arena: Arena, asked: float) -> bool:
    """Whether a job that must not outlive the lease may be started.

    Args:
        arena: what maintenance last heard.
        asked: when its claim was sent (monotonic seconds): one under an earlier identity holds nothing any more.
    """
    return arena.lease_spent() < FENCE_SECONDS and asked >= arena.identity_since


def doomed(arena: Arena, slot: Slot, after: float = FENCE_SECONDS) -> list[Running]:
    """The jobs of a worker that must not run any longer.

    Args:
        arena: what maintenance last heard.
        slot: the worker's.
        after: at which age of the lease.
    """
    if not slot.live or slot.kind != Kind.WORKER:
        return []
    expired, since = arena.lease_spent() >= after, arena.identity_since
    return [job for job in slot.running() if job.abort and (expired or job.started < since)]


class Refusals:
    """Maintenance's ear while PostgreSQL is away: does it refuse everybody, or is only this host cut off?"""

    def __init__(self, arena: Arena, dsn: str) -> None:
        """Takes the arena, where the fence's clock is, and the way to PostgreSQL itself."""
        self._arena = arena
        self._addresses = addresses(dsn)
        self._last: float | None = None

    def hear(self) -> None:
        """PostgreSQL did not do what was asked just now. What lies between two refusals is not counted."""
        asked = boottime()
        if not self._addresses or not all(refuses(address) for address in self._addresses):
            self._last = None
            return
        if self._last is not None and asked - self._last <= PROOF_SECONDS:
            self._arena.spare_lease(asked - self._last)
        self._last = asked

    def over(self) -> None:
        """PostgreSQL has answered."""
        self._last = None


def addresses(dsn: str, environ: Mapping[str, str] = os.environ) -> list[Address]:
    """All servers that a connection string names; none where that cannot be known here.

    Args:
        dsn: a connection string.
        environ: where libpq's variables are looked for.
    """
    given = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    if given.get("service") or environ.get("PGSERVICE"):
        return []
    numbers = (given.get("hostaddr") or environ.get("PGHOSTADDR") or "").split(",")
    names = (given.get("host") or environ.get("PGHOST") or "").split(",")
    hosts = [number or name for number, name in zip_longest(numbers, names, fillvalue="")]
    ports = (given.get("port") or environ.get("PGPORT") or "5432").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    known = all(hosts) and len(ports) == len(hosts) and all(port.isdecimal() for port in ports)
    return [(host, int(port)) for host, port in zip(hosts, ports, strict=True)] if known else []


def refuses(address: Address) -> bool:
    """Whether PostgreSQL there says itself that nobody gets in: its port is closed, or it is starting or stopping.

    No answer says nothing: then it may be this host that is cut off. Nor does any other answer.
    """
    host, port = address
    if host.startswith("/"):
        return _refuses(socket.AF_UNIX, f"{host}/.s.PGSQL.{port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(_refuses(family, place) for family, _, _, _, place in found)


def _refuses(family: socket.AddressFamily, place: str | tuple[object, ...]) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(place)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        probe.sendall(_STARTUP)
        return _CANNOT_CONNECT_NOW in probe.recv(1024)
    return False
