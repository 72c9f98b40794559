"""The HTTP API under `/api/v1`: queues and jobs, read by anyone who reaches the socket, changed with the token.

Fields are the SQL columns, times RFC 3339 in UTC; lists are `{"items": […], "next_cursor": …}`, errors
`{"error": {"code", "message"}}`. On a socket that is not loopback reading needs the token as well.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from hmac import compare_digest
from typing import Any
from uuid import UUID

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pmqd import job
from pmqd.backend import Backend
from pmqd.config import WebSettings, is_loopback, split_listen
from pmqd.errors import BrokerUnavailable, Conflict, NotFound, PmqdError, StoreUnavailable
from pmqd.store import Store

MAX_LIMIT = 500
DEFAULT_LIMIT = 50
LIST_AGE_SECONDS = 1.0
"""How old the depths in `/queue/list` may be."""

_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
}

Handler = Callable[[Request], Awaitable[Response]]


def routes() -> list[Route]:
    """The API's routes; the application's state holds `backend` and `web` (the settings)."""
    queue = "/api/v1/queue/{name}"
    return [
        Route("/api/v1/queue/list", list_queues, methods=["GET"]),
        Route(f"{queue}/jobs", list_jobs, methods=["GET"]),
        Route(f"{queue}/jobs/{{id}}", show_job, methods=["GET"]),
        Route(f"{queue}/jobs/{{id}}/retry", retry_job, methods=["POST"]),
        Route(f"{queue}/pause", pause_queue, methods=["POST"]),
        Route(f"{queue}/resume", resume_queue, methods=["POST"]),
    ]


# --- routes --------------------------------------------------------------------------------------------------


async def list_queues(request: Request) -> Response:
    """Every queue: its row in `job_queues`, its depths, and how many of its hints are in Redis."""
    _may_read(request)
    backend: Backend = request.app.state.backend
    figures = await backend.figures(LIST_AGE_SECONDS)
    redis = await backend.redis_figures(LIST_AGE_SECONDS)
    items = [
        {**row, "in_redis": redis.lengths.get(name, 0) if redis.up else None}
        for name, row in figures.queues.items()
    ]
    return reply({"items": items, "next_cursor": None})


async def list_jobs(request: Request) -> Response:
    """The jobs of a queue, newest first: `status`, `limit` (1 to 500), `cursor` of the page before."""
    _may_read(request)
    name, status, limit = _queue(request), _status(request), _limit(request)
    cursor = request.query_params.get("cursor")

    def read(store: Store) -> tuple[list[dict[str, Any]], str | None]:
        _known(store, name)
        return store.list_jobs(name, status, limit, cursor)

    rows, next_cursor = await request.app.state.backend.call(read)
    now = datetime.now(UTC)
    return reply({"items": [_shown(row, now) for row in rows], "next_cursor": next_cursor})


async def show_job(request: Request) -> Response:
    """One job with its log, and why it waits if it does."""
    _may_read(request)
    name, job_id = _queue(request), _job_id(request)
    row = await request.app.state.backend.call(lambda store: _described(store, name, job_id))
    return reply(_shown(row, datetime.now(UTC)))


async def retry_job(request: Request) -> Response:
    """A failed or cancelled job starts a new life; one that waits for its next attempt starts at once."""
    _may_change(request)
    name, job_id = _queue(request), _job_id(request)

    def retry(store: Store) -> dict[str, Any]:
        _described(store, name, job_id)
        store.retry_job(job_id)
        return _described(store, name, job_id)

    row = await request.app.state.backend.call(retry)
    request.app.state.backend.forget_figures()
    return reply(_shown(row, datetime.now(UTC)))


async def pause_queue(request: Request) -> Response:
    """No job of the queue is claimed any more; running ones finish."""
    return await _switch(request, active=False)


async def resume_queue(request: Request) -> Response:
    """The queue is served again."""
    return await _switch(request, active=True)


async def _switch(request: Request, *, active: bool) -> Response:
    _may_change(request)
    name = _queue(request)

    def switch(store: Store) -> None:
        _known(store, name)
        if active:
            store.resume(name)
        else:
            store.pause(name)

    await request.app.state.backend.call(switch)
    request.app.state.backend.forget_figures()
    return reply({"name": name, "is_active": active})


# --- who may -------------------------------------------------------------------------------------------------


def _may_read(request: Request) -> None:
    web: WebSettings = request.app.state.web
    if not is_loopback(split_listen(web.listen)[0]):
        _check_token(request)


def _may_change(request: Request) -> None:
    _check_token(request)


def _check_token(request: Request) -> None:
    """Lets a request with the right bearer token pass.

    Raises:
        HTTPException: 403 where no token is configured, 401 where it is missing or wrong.
    """
    token: str = request.app.state.web.token
    if not token:
        raise HTTPException(403, "changes need web.token, and none is configured")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = compare_digest(given.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not right:
        raise HTTPException(401, "a valid bearer token is needed", {"www-authenticate": "Bearer"})


# --- reading the request -------------------------------------------------------------------------------------


def _queue(request: Request) -> str:
    name = str(request.path_params["name"])
    if not job.is_queue_name(name):
        raise HTTPException(400, f"queue name {name[:100]!r} is not allowed")
    return name


def _job_id(request: Request) -> UUID:
    text = str(request.path_params["id"])
    try:
        return UUID(text)
    except ValueError:
        raise HTTPException(400, f"job id {text[:100]!r} is not a UUID") from None


def _status(request: Request) -> str | None:
    text = request.query_params.get("status")
    if text is not None and text not in list(job.Status):
        raise HTTPException(400, f"status {text[:100]!r} is not one of {', '.join(job.Status)}")
    return text


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MAX_LIMIT):
        raise HTTPException(400, f"limit {text[:100]!r} is not a number from 1 to {MAX_LIMIT}")
    return int(text)


def _known(store: Store, name: str) -> None:
    """Passes if the queue has a row.

    Raises:
        NotFound: it has none.
    """
    if not any(row["name"] == name for row in store.list_queues()):
        raise NotFound(f"there is no queue {name!r}")


def _described(store: Store, name: str, job_id: UUID) -> dict[str, Any]:
    row = store.show_job(job_id)
    if row is None or row["queue_name"] != name:
        raise NotFound(f"there is no job {job_id} in queue {name!r}")
    return {**row, "reason": store.why(row)}


# --- writing the answer --------------------------------------------------------------------------------------


def reply(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    content = orjson.dumps(
        body, default=_plain, option=orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_NON_STR_KEYS
    )
    return Response(content, status, {**_HEADERS, **(headers or {})}, "application/json")


def refusal(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """An error in the shape that all errors have."""
    return reply(
        {"error": {"code": code or _CODES.get(status, "error"), "message": message}}, status, headers
    )


async def on_http_error(_request: Request, error: Exception) -> Response:
    """Errors of the routes above and of the router itself."""
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, str(error.detail), headers=error.headers)


async def on_pmqd_error(_request: Request, error: Exception) -> Response:
    """Errors of the stores."""
    if isinstance(error, NotFound):
        return refusal(404, str(error))
    if isinstance(error, Conflict):
        return refusal(409, str(error), "conflict")
    if isinstance(error, StoreUnavailable):
        return refusal(503, "PostgreSQL does not answer", "database_down")
    if isinstance(error, BrokerUnavailable):
        return refusal(503, "Redis does not answer", "redis_down")
    status = 400 if isinstance(error, ValueError) else 500
    return refusal(status, str(error), None if status == 400 else "error")


HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: on_http_error,
    PmqdError: on_pmqd_error,
}


def _shown(row: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    shown = job.display_status(row["status"], row["attempt_count"], row["run_at"], now)
    return {**row, "display_status": str(shown)}


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return orjson.Fragment(value)
    return str(value)
