"""Requests of other sites, of other names, and what every answer carries: over real HTTP, without stores."""

import socket
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from starlette.datastructures import Headers

from pmqd import guard
from pmqd.settings import WebSettings
from tests.security.site import BEARER, TOKEN, Site, open_site

CHANGES = [
    "/api/v1/queue/mails/pause",
    "/api/v1/queue/mails/resume",
    f"/api/v1/queue/mails/jobs/{UUID(int=7)}/retry",
]
READS = ["/metrics", "/healthz", "/readyz", "/api/v1/queue/list", "/api/v1/queue/mails/jobs", "/nothing"]
HOME = {"host": "127.0.0.1:9640"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A web child whose stores are away: whatever gets past the guard and the token ends with 503."""
    with open_site(tmp_path_factory.mktemp("site"), hosts=["queue.example.org"]) as site:
        yield site


FOREIGN = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "Cross-Site"},
    {"sec-fetch-site": ""},
    {"sec-fetch-site": "none, cross-site"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://127.0.0.1:9641"},
    {"origin": "http://127.0.0.1"},
    {"origin": "http://127.0.0.1:9640.evil.example"},
    {"origin": "http://127.0.0.1:9640/path"},
    {"origin": "http://evil.example@127.0.0.1:9640"},
    {"origin": "file://127.0.0.1:9640"},
    {"origin": "http://[127.0.0.1:9640"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "multipart/form-data; boundary=x"},
    {"content-type": "text/plain"},
    {"content-type": "text/plain; application/json"},
    {"content-type": ""},
    {"content-type": "application/json-seq"},
]
OWN: list[dict[str, str]] = [
    {},
    {"sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none"},
    {"origin": "http://127.0.0.1:9640"},
    {"origin": "https://127.0.0.1:9640"},  # a proxy before us ends TLS
    {"content-type": "application/json"},
    {"content-type": "Application/JSON; charset=utf-8"},
]


def test_csrf_a_change_of_another_site_is_refused(site: Site) -> None:
    """Each foreign mark alone is 403 on every changing route, with the token and without it."""
    for path, marks, token in product(CHANGES, FOREIGN, ({}, BEARER)):
        answer = site.send("POST", path, HOME | marks | token)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), marks


def test_csrf_a_foreign_mark_beside_good_ones_is_refused() -> None:
    """Good marks do not outweigh a foreign one."""
    for good, bad in product(OWN, FOREIGN):
        headers = Headers(headers=HOME | good | bad)
        assert guard.foreign(headers) is not None


def test_csrf_own_requests_pass_and_need_the_token(site: Site) -> None:
    """What says nothing foreign gets to the token: 401 without it, the (absent) store with it."""
    for path, marks in product(CHANGES, OWN):
        assert site.send("POST", path, HOME | marks).status_code == 401, marks
        assert site.send("POST", path, HOME | marks | BEARER).status_code == 503, marks


def test_csrf_nothing_is_changed_by_other_methods(site: Site) -> None:
    """Reading methods change nothing; the token in an address, a cookie or a form counts for nothing."""
    for path in CHANGES:
        for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post"):
            assert site.send(method, path, HOME | BEARER).status_code in (400, 405), method
        for headers in (
            {"cookie": f"token={TOKEN}; authorization=Bearer {TOKEN}"},
            {"x-http-method-override": "POST"},
            {"proxy-authorization": f"Bearer {TOKEN}"},
        ):
            assert site.send("POST", f"{path}?token={TOKEN}", HOME | headers).status_code == 401


# --- DNS rebinding -------------------------------------------------------------------------------------------

KNOWN_HOSTS = [
    "127.0.0.1",
    "127.0.0.1:9640",
    "localhost",
    "LocalHost:80",
    "localhost.",
    "[::1]",
    "[::1]:9640",
    "192.0.2.7:9640",
    "queue.example.org",
    "QUEUE.example.org:443",
]
UNKNOWN_HOSTS = [
    "evil.example",
    "evil.example:9640",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil.example.",
    "queue.example.org.evil.example",
    "xqueue.example.org",
    "127.0.0.1@evil.example",
    "evil.example@127.0.0.1",
    "[::1].evil.example",
    "[::1",
    "127.1",
    "2130706433",
    "0x7f.1",
    "127.0.0.1:9640, evil.example",
    "127.0.0.1/evil.example",
    "evil.example#127.0.0.1",
    "",
]


@pytest.mark.parametrize("host", KNOWN_HOSTS)
def test_csrf_known_hosts_are_heard(site: Site, host: str) -> None:
    """IP addresses, localhost, and the names that `web.hosts` lists, with any port."""
    assert site.send("GET", "/healthz", {"host": host}).status_code == 200


def test_csrf_unknown_hosts_are_refused_on_every_route(site: Site) -> None:
    """A page whose own name was made to point here reads nothing, not even that something is here."""
    for host, path in product(UNKNOWN_HOSTS, READS):
        assert site.send("GET", path, {"host": host} | BEARER).status_code in (400, 403), host
    for host, path in product(UNKNOWN_HOSTS, CHANGES):
        assert site.send("POST", path, {"host": host, "origin": f"http://{host}"} | BEARER).status_code in (
            400,
            403,
        )


def test_csrf_two_hosts_or_none() -> None:
    """Of two Host headers both must be known; a request without one (HTTP/1.0) comes from no browser."""
    allowed = guard.Guard(lambda *_: None, guard.names_of(WebSettings()))  # type: ignore[arg-type]
    twice = Headers(raw=[(b"host", b"127.0.0.1"), (b"host", b"evil.example")])
    assert allowed._unknown_host(twice) is not None
    assert allowed._unknown_host(Headers(raw=[])) is None


def test_csrf_the_name_in_listen_is_known(tmp_path: Path) -> None:
    """A daemon that listens under a name is reached by it."""
    web = WebSettings(listen="worker-7.internal:9640", token=TOKEN)
    names = frozenset(guard.names_of(web))
    assert guard.is_known("worker-7.internal:9640", names)
    assert not guard.is_known("worker-8.internal:9640", names)


# --- what every answer carries -------------------------------------------------------------------------------


def all_answers(site: Site) -> Iterator[httpx.Response]:
    """One answer of each sort: pages, refusals, the router's and uvicorn's own."""
    for path in READS:
        yield site.send("GET", path, HOME)
    yield site.send("POST", CHANGES[0], HOME)
    yield site.send("GET", CHANGES[0], HOME)
    yield site.send("GET", "/healthz", {"host": "evil.example"})
    yield site.send("POST", CHANGES[0], HOME | BEARER)
    yield site.send("HEAD", "/healthz", HOME)
    yield site.send("OPTIONS", CHANGES[0], HOME | {"origin": "https://evil.example"})
    yield site.send("GET", "/healthz", HOME | {"content-length": "no number"})


def test_csrf_every_answer_forbids_sniffing_framing_and_other_sites(site: Site) -> None:
    """nosniff, a policy without frames and scripts of others, no CORS, no server name: on each sort of answer."""
    seen = set()
    for answer in all_answers(site):
        seen.add(answer.status_code)
        assert answer.headers["x-content-type-options"] == "nosniff"
        policies = answer.headers.get_list("content-security-policy")
        assert policies
        assert all("frame-ancestors 'none'" in policy and "default-src" in policy for policy in policies)
        assert not any("unsafe" in policy or "*" in policy for policy in policies)
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert not {"server", "set-cookie", "x-powered-by"} & set(answer.headers)
    assert seen == {200, 400, 401, 403, 404, 405, 503}


def test_csrf_a_full_house_carries_them_too(site: Site) -> None:
    """The answer that there are too many connections is uvicorn's own: it has the same headers."""
    held = [socket.create_connection(site.address) for _ in range(200)]
    try:
        answer = site.send("GET", "/healthz", HOME)
        assert answer.status_code == 503
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    finally:
        for each in held:
            each.close()
