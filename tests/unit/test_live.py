"""What is written of a job for people."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from pmqd.job import Action, Outcome
from pmqd.live import Event, commands, ended, processing
from pmqd.resp import bulk
from tests.jobs import NOW, a_claim

ID = UUID(int=1)


def an_outcome(action: Action = Action.COMPLETE, **changes: Any) -> Outcome:
    """A quick first attempt's outcome."""
    fields: dict[str, Any] = {
        "attempt_number": 1,
        "duration_seconds": 0.01,
        "started": NOW.timestamp(),
        **changes,
    }
    return Outcome(
        job_id=ID, token=UUID(int=2), action=action, queue_name="mail", kind=None, worker_id="w1", **fields
    )


def fields_of(event: Event) -> dict[str, str]:
    """The fields that it writes."""
    words = event.fields.split("\r\n")[1::2]
    assert len(words) == 2 * event.count
    return dict(zip(words[::2], words[1::2], strict=True))


def test_a_quick_job_is_told_at_once_with_all_that_is_known() -> None:
    """Where nobody was told that it ran, the end brings what the start would have; where they were, only what is new."""
    first = fields_of(ended(an_outcome(), "completed", a_claim()))
    later = fields_of(ended(an_outcome(), "completed"))
    assert fields_of(processing(a_claim(), "w1")).keys() | later.keys() == first.keys()
    assert first["finished_at"] == datetime.fromtimestamp(NOW.timestamp() + 0.01, UTC).isoformat()
    assert first["worker_id"] == later["worker_id"] == "w1"


@pytest.mark.parametrize("seconds", [0.0, 1.5, 1795413599.999999, 1795413599.9999998, NOW.timestamp()])
def test_times_are_those_of_iso_8601_to_the_microsecond(seconds: float) -> None:
    """Always as long, and read back as the same time."""
    outcome = an_outcome(started=seconds, duration_seconds=0.0)
    told = fields_of(ended(outcome, "completed"))["finished_at"]
    assert len(told) == 32
    assert abs(datetime.fromisoformat(told).timestamp() - seconds) < 1e-6


def test_commands_are_in_the_protocol_of_redis() -> None:
    """One HSET and one EXPIRE, with the lengths in bytes; a job that is forgotten is deleted."""
    events = [Event(ID, "processing", bulk("note") + bulk("é"), 1), Event(ID, None)]
    key = f"$42\r\np:job:{ID}\r\n"
    assert commands(events, "p:")[0].split("*")[1:] == [
        f"6\r\n$4\r\nHSET\r\n{key}$6\r\nstatus\r\n$10\r\nprocessing\r\n$4\r\nnote\r\n$2\r\né\r\n",
        f"3\r\n$6\r\nEXPIRE\r\n{key}$4\r\n3600\r\n",
        f"2\r\n$3\r\nDEL\r\n{key}",
    ]
    assert commands(events, "p:")[1] == 3


def test_ends_are_kept_for_a_minute_and_retries_for_their_wait() -> None:
    """Every hash is gone some time, by itself."""
    assert ended(an_outcome(), "completed").keep_seconds == 60
    waiting = ended(an_outcome(Action.RETRY, delay_seconds=300), "queued")
    assert (waiting.status, waiting.keep_seconds) == ("retry_scheduled", 360)


def test_what_is_given_back_is_forgotten() -> None:
    """A released job is no longer shown as processing."""
    assert ended(an_outcome(Action.RELEASE), "queued").status is None


def test_a_cancelled_retry_is_shown_as_cancelled() -> None:
    """What the settle made of the row counts, not what was asked for."""
    assert ended(an_outcome(Action.RETRY, delay_seconds=9), "cancelled").status == "cancelled"
