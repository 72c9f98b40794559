"""Which changes of a job are written for people, by mode."""

from typing import Any
from uuid import UUID

import pytest

from pmqd.job import Action, Outcome
from pmqd.live import Event, Telling, ended, migrated, processing
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


def told(mode: str, *events: Event) -> list[str]:
    """The keys that a mode writes, in order."""
    return Telling(mode, "p:").operations(events)[0]


def test_off_writes_nothing() -> None:
    """With `off` no key is touched."""
    assert told("off", migrated(ID, "mail", 100, NOW), processing(a_claim(), "w1")) == []


def test_all_writes_every_transition() -> None:
    """With `all` each transition is written, and the offered ids besides."""
    events = [migrated(ID, "mail", 100, NOW), processing(a_claim(), "w1"), ended(an_outcome(), "completed")]
    assert told("all", *events) == [f"p:job:{ID}"] * 3 + ["p:recent_jobs:mail"]


def test_lazy_leaves_quick_jobs_alone() -> None:
    """With `lazy` a job that is quick and succeeds leaves no trace in Redis."""
    assert told("lazy", migrated(ID, "mail", 100, NOW), ended(an_outcome(), "completed")) == []


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (an_outcome(duration_seconds=0.2), "completed"),
        (an_outcome(attempt_number=2), "completed"),
        (an_outcome(Action.RETRY, delay_seconds=4), "queued"),
    ],
)
def test_lazy_writes_what_is_slow_or_retried(outcome: Outcome, status: str) -> None:
    """With `lazy` slow ends, later attempts and waits for a retry are written."""
    assert told("lazy", ended(outcome, status)) == [f"p:job:{ID}"]


def test_lazy_ends_what_it_has_begun() -> None:
    """A quick job that had reported progress does not stay `processing`."""
    telling = Telling("lazy", "")
    assert telling.operations([processing(a_claim(), "w1")])[0]
    assert telling.operations([ended(an_outcome(), "completed")])[0]
    assert not telling.operations([ended(an_outcome(), "completed")])[0]


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


def test_memory_of_what_was_told_is_bounded() -> None:
    """Jobs whose end is never told do not add up in a worker."""
    telling = Telling("lazy", "")
    for n in range(10_001):
        claim = a_claim()
        telling.operations([Event(UUID(int=n), claim.queue_name, "processing")])
    assert len(telling._told) <= 10_000
