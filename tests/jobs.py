"""Claimed rows for tests that need no database."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pmqd.job import Claimed

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def a_claim(**changes: Any) -> Claimed:
    """A row of queue `mail`, claimed for its first of three attempts; `changes` are its other fields."""
    fields: dict[str, Any] = {
        "id": UUID(int=1),
        "queue_name": "mail",
        "kind": "send",
        "priority": 100,
        "payload": b"{}",
        "attempt_count": 1,
        "interruptions": 0,
        "max_attempts": 3,
        "run_at": NOW,
        "created_at": NOW,
        "tags": (),
        "alone": False,
        "token": UUID(int=2),
        "claimed_at": NOW,
    }
    return Claimed(**{**fields, **changes})
