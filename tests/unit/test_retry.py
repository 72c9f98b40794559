"""What becomes of an attempt: every ending has one outcome, and no text that PostgreSQL refuses."""

import re
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd.job import Action, Claimed
from pmqd.retry import (
    ERROR_TEXT_BYTES,
    Discard,
    Ending,
    JobCancelled,
    JobTimeout,
    PayloadError,
    Retry,
    RetryPolicy,
    Snooze,
    decide,
    error_text,
    harmless,
    interrupt,
    release,
)
from tests.jobs import NOW, a_claim

POLICY = RetryPolicy()


def claimed(attempt: int = 1) -> Claimed:
    """A row in its n-th of three attempts."""
    return a_claim(attempt_count=attempt)


def end(value: Any = None, error: BaseException | None = None) -> Ending:
    """An ending after 1.5 s."""
    return Ending("w1", value, error, NOW.timestamp(), 1.5)


def test_delays_double_up_to_the_maximum() -> None:
    """2 s, 4 s, 8 s … 300 s, and any number of attempts is fine."""
    assert [POLICY.delay(n, 0.5) for n in (1, 2, 3, 8, 9, 10**6)] == [2, 4, 8, 256, 300, 300]


@given(st.integers(1, 40), st.floats(0, 1))
def test_jitter_is_a_quarter_each_way(attempt: int, random01: float) -> None:
    """No delay is further than 25 % from its middle."""
    middle = POLICY.delay(attempt, 0.5)
    assert middle * 0.75 <= POLICY.delay(attempt, random01) <= middle * 1.25


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_policy_refuses_what_is_no_delay(bad: float) -> None:
    """A bad figure is an error where it is written."""
    with pytest.raises(ValueError, match="base_seconds"):
        RetryPolicy(base_seconds=bad)


def test_a_value_completes() -> None:
    """A returned value completes the job with its JSON, None without a result."""
    outcome = decide(claimed(), end({"sent": 1}), POLICY, 0.5)
    assert (outcome.action, outcome.result, outcome.error) == (Action.COMPLETE, b'{"sent":1}', None)
    assert (outcome.job_id, outcome.token, outcome.attempt_number) == (UUID(int=1), UUID(int=2), 1)
    assert (outcome.queue_name, outcome.kind, outcome.worker_id) == ("mail", "send", "w1")
    assert (outcome.started, outcome.duration_seconds) == (NOW.timestamp(), 1.5)
    assert decide(claimed(), end(), POLICY, 0.5).result is None


@pytest.mark.parametrize("value", [object(), {"a": {1j}}, "a\0b", float("nan"), "\ud800", 2**70])
def test_a_result_that_is_no_json_fails_at_once(value: object) -> None:
    """The work was done, so it is not done again; the cause can be read."""
    outcome = decide(claimed(), end(value), POLICY, 0.5)
    assert outcome.action is Action.FAIL
    assert outcome.error is not None
    assert "the handler's result cannot be stored" in outcome.error


def test_a_result_that_is_too_large_fails_at_once() -> None:
    """300 KiB are not stored, and the error says how many there were."""
    outcome = decide(claimed(), end("x" * 300 * 1024), POLICY, 0.5)
    assert outcome.action is Action.FAIL
    assert "307,202 bytes" in (outcome.error or "")


@pytest.mark.parametrize(
    "error", [ValueError("x"), JobTimeout("30 s"), SystemExit(3), KeyboardInterrupt(), Retry()]
)
def test_failures_retry_with_backoff(error: BaseException) -> None:
    """Any exception retries, `sys.exit` and a timeout too, with the policy's delay."""
    outcome = decide(claimed(2), end(error=error), POLICY, 0.5)
    assert (outcome.action, outcome.delay_seconds) == (Action.RETRY, 4.0)
    assert type(error).__name__ in (outcome.error or "")


@pytest.mark.parametrize("error", [ValueError("x"), JobTimeout(), Retry(1)])
def test_the_last_attempt_fails(error: BaseException) -> None:
    """With its attempts used up a job is failed, also where the handler asks for a retry."""
    assert decide(claimed(3), end(error=error), POLICY, 0.5).action is Action.FAIL


def test_a_handlers_own_delay() -> None:
    """`Retry(delay)` counts instead of the policy; zero is a delay too."""
    assert decide(claimed(), end(error=Retry(7)), POLICY, 0.5).delay_seconds == 7
    assert decide(claimed(), end(error=Retry(0)), POLICY, 0.5).delay_seconds == 0
    assert decide(claimed(), end(error=Retry(timedelta(minutes=1))), POLICY, 0.5).delay_seconds == 60


def test_snooze_discard_cancel() -> None:
    """Each of the handler's own endings has its action, on the last attempt as well."""
    snoozed = decide(claimed(3), end(error=Snooze(5)), POLICY, 0.5)
    assert (snoozed.action, snoozed.delay_seconds) == (Action.SNOOZE, 5)
    assert decide(claimed(), end(error=Discard("gone")), POLICY, 0.5).error == "Discard: gone"
    assert decide(claimed(), end(error=Discard()), POLICY, 0.5).action is Action.FAIL
    assert decide(claimed(), end(error=PayloadError("x")), POLICY, 0.5).action is Action.FAIL
    assert decide(claimed(3), end(error=JobCancelled()), POLICY, 0.5).action is Action.CANCEL


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), timedelta(days=-1), 10**12])
def test_delays_that_cannot_be(delay: Any) -> None:
    """A negative or endless delay is an error where it is written."""
    with pytest.raises(ValueError, match="is not allowed"):
        Retry(delay)
    with pytest.raises(ValueError, match="is not allowed"):
        Snooze(delay)


def test_release_and_interrupt() -> None:
    """A release says when to look again and why; an interruption keeps the time that user code ran."""
    released = release(claimed(), "w1", delay_seconds=30, reason="no worker knows kind send")
    assert (released.action, released.delay_seconds, released.started) == (Action.RELEASE, 30, None)
    assert interrupt(claimed(), end(), "drained").action is Action.INTERRUPT


def raised(error: BaseException) -> BaseException:
    """The exception with a traceback."""
    try:
        raise error  # noqa: TRY301 - its traceback is wanted
    except BaseException as caught:  # noqa: BLE001 - any exception is a case here
        return caught


def test_error_text_names_and_places_the_error() -> None:
    """Type and message first, then the traceback to where it was raised."""
    text = error_text(raised(ValueError("bad thing")))
    assert text.startswith("ValueError: bad thing\n")
    assert "in raised" in text


def test_error_text_is_harmless() -> None:
    """NUL and half surrogates are spelled out, so that a job with such an error can be settled."""
    text = error_text(raised(ValueError("before\0after \ud800 end")))
    text.encode()
    assert "\0" not in text
    assert "before\\x00after \\ud800 end" in text


def test_error_text_is_bounded() -> None:
    """A message of megabytes and a traceback of a thousand frames fit in 8 KiB, the end of the traceback kept."""

    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("é" * 10_000_000)
        deep(n - 1)

    caught = None
    try:
        deep(500)
    except ValueError as error:
        caught = error
    assert caught is not None
    text = error_text(caught)
    assert len(text.encode()) <= ERROR_TEXT_BYTES
    assert text.startswith("ValueError: é")


class Broken(Exception):  # noqa: N818 - it is no error of this project
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def test_error_text_of_a_broken_exception() -> None:
    """An exception that cannot even be printed still ends its job."""
    assert re.match(r"Broken: <its text cannot be made>", error_text(raised(Broken())))


@given(st.text(alphabet=st.characters(), max_size=50), st.integers(1, 60), st.booleans())
def test_harmless_text_fits(text: str, limit: int, keep_end: bool) -> None:
    """Whatever the text, what is left is valid UTF-8 without NUL and not too long."""
    made = harmless(text, limit, keep_end=keep_end)
    assert len(made.encode()) <= limit
    assert "\0" not in made
