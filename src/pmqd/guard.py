"""Which requests the web child hears: those to a name of its own, and changes that no other site asks for.

A page in somebody's browser can send requests to any address that the browser reaches. So a request must name this
server as it is known (a page that has its own name point here, DNS rebinding, would read the API as its own site), and a change must
neither say that it comes from elsewhere nor look like a form. The token is asked for all the same.
"""

import ipaddress
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pmqd.api import refusal
from pmqd.config import WebSettings, split_listen

READING: Final = ("GET", "HEAD", "OPTIONS")
_HOST: Final = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
OWN_SITES: Final = ("same-origin", "none")
"""What browsers say in Sec-Fetch-Site about requests of our own pages, and of the address bar."""


class Guard:
    """The outermost part of the application: what it refuses, nobody else sees."""

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        """Takes the application, and the names under which it is known besides IP addresses and `localhost`."""
        self._app = app
        self._names = frozenset(map(_bare, names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 403, or passes the request on."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            fault = self._unknown_host(headers)
            if fault is None and scope["method"] not in READING:
                fault = foreign(headers)
            if fault is not None:
                await refusal(403, fault)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _unknown_host(self, headers: Headers) -> str | None:
        """Why the Host is not ours; None where it is, or where none is named: every browser names one."""
        hosts = headers.getlist("host")
        wrong = [host for host in hosts if not is_known(host, self._names)]
        if not wrong:
            return None
        return f"the host {wrong[0][:100]!r} is not known here: web.hosts lists names besides IP addresses and localhost"


def names_of(web: WebSettings) -> list[str]:
    """The names under which the web child is known: of `web.listen`, and those that `web.hosts` adds."""
    return [split_listen(web.listen)[0], *web.hosts]


def is_known(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header names this server. Any IP address does: nobody can have a name of his own look like one.

    Args:
        host: `name`, `name:port`, `[v6]` or `[v6]:port`.
        names: in lower case.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = _bare(found["six"] or found["name"])
    return name == "localhost" or name in names or _is_address(name)


def foreign(headers: Headers) -> str | None:
    """Why a request that changes something is taken for another site's; None if it is not.

    Args:
        headers: of the request.
    """
    site = headers.get("sec-fetch-site", "none")
    if site.lower() not in OWN_SITES:
        return f"a page of another site asks for this (Sec-Fetch-Site: {site[:20]!r})"
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None and _place_of(origin) != host.lower():
        return f"a page of another site asks for this (Origin: {origin[:100]!r})"
    kind = headers.get("content-type")
    if kind is not None and kind.partition(";")[0].strip().lower() != "application/json":
        return f"content type {kind[:100]!r} is not allowed: application/json, or none without a body"
    return None


def _place_of(origin: str) -> str | None:
    """Host and port of an Origin header; None where it is no http origin (`null` is one of these)."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    plain = parts.scheme in ("http", "https") and not (parts.path or parts.query or parts.fragment)
    return parts.netloc.lower() if plain else None


def _bare(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
