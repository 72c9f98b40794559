"""Claimed rows for tests that need no database."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pmqd import logs
from pmqd.job import Claimed

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def a_claim(**changes: Any) -> Claimed:
    """A row of queue `mail`, claimed for its first of three attempts; `changes` are its other fields."""
    fields: dict[str, Any] = {
        "id": UUID(int=1),
        "queue_name": "mail",
        "kind": "send",
        "priority": 100,
        "payload": "{}",
        "attempt_count": 1,
        "interruptions": 0,
        "max_attempts": 3,
        "run_at": NOW.timestamp(),
        "created_at": NOW.timestamp(),
        "tags": (),
        "alone": False,
        "token": UUID(int=2),
        "claimed_at": NOW.timestamp(),
    }
    return Claimed(**{**fields, **changes})


@contextmanager
def running(claimed: Claimed) -> Iterator[None]:
    """Records made inside are those of a job that runs."""
    token = logs.job_context.set(claimed)
    try:
        yield
    finally:
        logs.job_context.reset(token)
