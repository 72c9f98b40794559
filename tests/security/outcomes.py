"""An outcome to be saved, for tests of saved settles."""

from typing import Any
from uuid import UUID

from pmqd.job import Action, Outcome


def an_outcome(**changes: Any) -> Outcome:
    """A completed job's outcome; `changes` are its other fields."""
    fields: dict[str, Any] = {
        "job_id": UUID(int=1),
        "token": UUID(int=2),
        "action": Action.COMPLETE,
        "attempt_number": 1,
        "queue_name": "q",
        "kind": "k",
        "worker_id": "h:i:w1.1",
        "result": b'{"a": 1}',
        "error": None,
        "delay_seconds": 0.0,
        "started": 1769817600.0,
        "duration_seconds": 0.5,
    }
    return Outcome(**fields | changes)
