"""The web child: `/metrics`, `/healthz`, `/readyz`, and the API of `api.py`.

Health and readiness are read from the arena alone, so they answer at once whatever the stores do. Nothing about a
job's payload or error is in them.
"""

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from pmqd import api, metrics
from pmqd.arena import Arena, Kind, State
from pmqd.backend import Backend
from pmqd.config import Settings
from pmqd.gauges import BusyRatio, exit_counters, measure
from pmqd.guard import Guard, names_of
from pmqd.process import ChildContext

METRICS_AGE_SECONDS = 5.0
"""How old the depths on `/metrics` may be: counting rows is not free, and scrapers come in pairs."""
LEASE_SILENCE_SECONDS = 6.0
"""Without a renewal for so long PostgreSQL counts as away, whatever maintenance had time to say."""
TICK_SECONDS = 1.0
CONNECTIONS = 200
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""On every answer, those of uvicorn itself among them; a route may only add what is stricter."""


def main(context: ChildContext) -> int | None:
    """Serves until the child is told to stop."""
    assert context.web_socket is not None
    asyncio.run(_serve(context))
    return None


async def _serve(context: ChildContext) -> None:
    assert context.web_socket is not None
    server = _Server(_config(build(context)), context)
    stop = context.stop
    asyncio.get_running_loop().add_reader(stop.fileno(), lambda: server.end() if stop.is_set() else None)
    try:
        await server.serve(sockets=[context.web_socket])
    finally:
        asyncio.get_running_loop().remove_reader(stop.fileno())


def build(context: ChildContext) -> Starlette:
    """The application over a child's context."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.backend = Backend(context.settings)
        yield
        app.state.backend.close()

    own = [
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/healthz", show_health, methods=["GET"]),
        Route("/readyz", show_readiness, methods=["GET"]),
    ]
    app = Starlette(
        routes=[*own, *api.routes()],
        middleware=[Middleware(Guard, names_of(context.settings.web))],
        exception_handlers=api.HANDLERS,
        lifespan=lifespan,
    )
    app.state.context = context
    app.state.web = context.settings.web
    app.state.busy = BusyRatio()
    return app


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the child has its own, and they set the stop flag."""

    def __init__(self, config: uvicorn.Config, context: ChildContext) -> None:
        super().__init__(config)
        self._context = context
        self._ended = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Ready is said once requests are answered: in a reload the old child goes at that word."""
        await super().startup(sockets)
        if self.started:
            self._context.report_ready()

    async def main_loop(self) -> None:
        """Once a second the master is told that the loop turns; uvicorn's own wakes ten times for that, to see whether it is to end."""
        while not await self.on_tick(0):
            self._context.slot.progress()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), TICK_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        """Stop accepting, let answers finish, return from serve()."""
        self.should_exit = True
        self._ended.set()


class _Protocol(H11Protocol):
    """uvicorn's HTTP, whose answer to what is no HTTP lacks the headers of all others."""

    def send_400_response(self, msg: str) -> None:
        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        content = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=[*headers, *content], reason=b"Bad Request"),
            h11.Data(data=msg.encode("ascii")),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Protocol,
        headers=list(HEADERS.items()),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )


# --- routes --------------------------------------------------------------------------------------------------


async def show_metrics(request: Request) -> Response:
    """Everything that is counted and measured, for Prometheus."""
    state = request.app.state
    backend: Backend = state.backend
    figures, redis = await backend.both_figures(METRICS_AGE_SECONDS)
    context: ChildContext = state.context
    gauges = measure(context.settings, context.arena, figures, redis, busy=state.busy, now=time.monotonic())
    counters = exit_counters(context.arena)
    page = await asyncio.to_thread(metrics.render, context.state_dir / "metrics", gauges, counters)
    return Response(page, headers={"content-type": metrics.CONTENT_TYPE, "cache-control": "no-store"})


async def show_health(request: Request) -> Response:
    """Am I running? Always 200 while this process lives; `degraded` names what is away."""
    context: ChildContext = request.app.state.context
    now = time.monotonic()
    reasons = [*_database_reasons(context.arena, now), *_redis_reasons(context.arena)]
    body: dict[str, Any] = {"status": "degraded" if reasons else "ok", "reasons": reasons}
    return api.reply({**body, "mode": mode(context.arena), "draining": context.arena.draining})


async def show_readiness(request: Request) -> Response:
    """Can I work? 503 where PostgreSQL is away, no worker is ready, or the instance drains."""
    context: ChildContext = request.app.state.context
    reasons = readiness(context.settings, context.arena, time.monotonic())
    return api.reply(
        {"status": "not_ready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200
    )


# --- what the arena says -------------------------------------------------------------------------------------


def readiness(settings: Settings, arena: Arena, now: float) -> list[str]:
    """Why this instance cannot work just now; empty if it can.

    Args:
        settings: the configuration; an instance without pools needs no worker.
        arena: the shared memory.
        now: `time.monotonic()`.
    """
    reasons = _database_reasons(arena, now)
    states = Counter(
        slot.state for slot in arena.slots if slot.live and slot.kind == Kind.WORKER and slot.ready
    )
    if settings.workers and not states[State.IDLE] + states[State.BUSY]:
        reasons.append("no_worker_ready")
    if arena.draining:
        reasons.append("draining")
    return reasons


def mode(arena: Arena) -> str:
    """How jobs reach the workers: `redis`, or `direct` where any of them works without."""
    direct = any(slot.direct for slot in arena.slots if slot.live and slot.kind == Kind.WORKER)
    return "direct" if arena.redis_down or direct else "redis"


def _database_reasons(arena: Arena, now: float) -> list[str]:
    away = arena.store_down or arena.lease_age(now) > LEASE_SILENCE_SECONDS
    return ["database_down"] if away else []


def _redis_reasons(arena: Arena) -> list[str]:
    return ["redis_down"] if mode(arena) == "direct" else []
