"""docs/http.md has every route and every error code of the code, and no other."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from starlette.routing import Route

from pmqd import api, web
from pmqd.config import Settings
from pmqd.process import ChildContext
from tests.fix_daemon import ROOT

PAGE = ROOT / "docs" / "http.md"


def test_every_route_is_documented() -> None:
    """The table of routes is that of the application."""
    app = web.build(cast("ChildContext", SimpleNamespace(settings=Settings())))
    known = {
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert len(known) == len(app.routes)
    assert set(re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", PAGE.read_text(), re.MULTILINE)) == known


def test_every_error_code_is_documented() -> None:
    """Each code that the API can answer with has a row, with its status where that is fixed."""
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert {(str(status), code) for status, code in api._CODES.items()} <= set(rows)
    written = re.findall(r'refusal\((\d{3}), [^\n]*"(\w+)"\)', Path(api.__file__).read_text())
    assert {("409", "conflict"), ("503", "database_down"), ("503", "redis_down")} == set(written)
    assert set(rows) == {(str(s), c) for s, c in api._CODES.items()} | set(written) | {("500", "error")}


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    """The page size and its default, the number of connections."""
    text = PAGE.read_text()
    assert f"`limit` (1 to {api.MAX_LIMIT}, default {api.DEFAULT_LIMIT})" in text
    assert f"More than {web.CONNECTIONS} connections" in text


def test_the_reasons_of_health_are_on_the_page() -> None:
    """What `/healthz` and `/readyz` can name."""
    text = PAGE.read_text()
    for reason in re.findall(r'"(\w+_down|no_worker_ready|draining)"', Path(web.__file__).read_text()):
        assert f"`{reason}`" in text or f'"{reason}"' in text
