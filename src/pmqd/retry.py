"""How an attempt's end becomes an outcome: retry, snooze, discard, fail. Pure: no I/O, no clock."""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from pmqd import codec
from pmqd.job import MAX_PAYLOAD_BYTES, Action, Claimed, Outcome

ERROR_TEXT_BYTES: Final = 8192
_MESSAGE_BYTES: Final = 2048
_FRAMES: Final = 20
_MAX_DELAY_SECONDS: Final = 10 * 366 * 86400.0
_COMPLETE: Final = Action.COMPLETE  # an enumeration's members are slow to be looked up


def _seconds(name: str, delay: float | timedelta) -> float:
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else float(delay)
    if not 0 <= seconds <= _MAX_DELAY_SECONDS:
        raise ValueError(f"{name}(delay={delay!r}) is not allowed: 0 seconds to 10 years")
    return seconds


class Retry(Exception):  # noqa: N818 - the name is part of the interface
    """Raised by a handler: this attempt did not work, try again. Charged like any failed attempt."""

    def __init__(self, delay: float | timedelta | None = None, reason: str = "") -> None:
        """Takes the delay (seconds or timedelta; None: the backoff of task or queue) and a reason for people."""
        self.delay_seconds = None if delay is None else _seconds("Retry", delay)
        self.reason = str(reason)
        super().__init__(self.reason or "retry asked for by the handler")


class Snooze(Exception):  # noqa: N818 - the name is part of the interface
    """Raised by a handler: not now, come back later. Charges no attempt."""

    def __init__(self, delay: float | timedelta) -> None:
        """Takes the delay: seconds or timedelta."""
        self.delay_seconds = _seconds("Snooze", delay)
        super().__init__(f"snoozed for {self.delay_seconds:g} s")


class Discard(Exception):  # noqa: N818 - the name is part of the interface
    """Raised by a handler: trying again is of no use. The job is failed at once."""

    def __init__(self, reason: str = "") -> None:
        """Takes the reason for people."""
        self.reason = str(reason)
        super().__init__(self.reason or "discarded by the handler")


class PayloadError(Discard):
    """The payload does not fit the handler's signature: failed at once, as no retry could help."""


class JobTimeout(BaseException):
    """Raised inside a handler that runs over its timeout; not caught by `except Exception`."""


class JobCancelled(BaseException):
    """Raised inside a handler whose job is to be cancelled; not caught by `except Exception`."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The growing delay between attempts: `min(max, base * 2^(attempt - 1))` with 25 % jitter each way."""

    base_seconds: float = 2.0
    max_seconds: float = 300.0

    def __post_init__(self) -> None:
        """Refuses figures that no delay can be made of."""
        for name in ("base_seconds", "max_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"RetryPolicy {name}={value!r} is not allowed: a number of seconds from 0")

    def delay(self, attempt: int, random01: float) -> float:
        """Seconds until the next attempt.

        Args:
            attempt: The number of the attempt that has just failed, from 1.
            random01: A random number, 0.0 to 1.0.
        """
        doublings = min(max(attempt, 1) - 1, 60)  # beyond that every base has met its maximum
        return min(self.max_seconds, self.base_seconds * 2.0**doublings) * (0.75 + 0.5 * random01)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the handler's run ended: with a value, or with an exception."""

    worker_id: str
    value: Any = None
    error: BaseException | None = None
    started: float | None = None  # seconds since 1970 on the database's clock
    duration_seconds: float = 0.0


def decide(claimed: Claimed, ending: Ending, policy: RetryPolicy, random01: float) -> Outcome:
    """What becomes of a job whose handler has ended.

    Args:
        claimed: The row as it was claimed.
        ending: How the handler ended.
        policy: The backoff of the task, else of the queue.
        random01: A random number for the jitter, 0.0 to 1.0.

    Returns:
        The outcome to settle. Never raises: whatever a handler throws or returns has an outcome.
    """
    error = ending.error
    match error:
        case None:
            return _completed(claimed, ending)
        case Snooze():
            return _outcome(
                claimed, ending, Action.SNOOZE, error=str(error), delay_seconds=error.delay_seconds
            )
        case Discard():
            return _outcome(claimed, ending, Action.FAIL, error=error_text(error))
        case JobCancelled():
            return _outcome(claimed, ending, Action.CANCEL, error="cancelled while running")
    if claimed.attempt_count >= claimed.max_attempts:
        return _outcome(claimed, ending, Action.FAIL, error=error_text(error))
    delay = policy.delay(claimed.attempt_count, random01)
    if isinstance(error, Retry) and error.delay_seconds is not None:
        delay = error.delay_seconds
    return _outcome(claimed, ending, Action.RETRY, error=error_text(error), delay_seconds=delay)


def completed(claimed: Claimed, worker_id: str, started: float, duration_seconds: float) -> Outcome:
    """What becomes of a job whose handler has returned nothing, as nearly all do: `decide` for that case alone.

    Args:
        claimed: The row as it was claimed.
        worker_id: Who ran it.
        started: When (seconds since 1970 on the database's clock).
        duration_seconds: For how long.
    """
    return Outcome(
        claimed.id,
        claimed.token,
        _COMPLETE,
        claimed.attempt_count,
        claimed.queue_name,
        claimed.kind,
        worker_id,
        None,
        None,
        0.0,
        started,
        duration_seconds,
    )


def release(
    claimed: Claimed, worker_id: str, *, delay_seconds: float = 0.0, reason: str | None = None
) -> Outcome:
    """Gives back a job whose user code did not start.

    Args:
        claimed: The row as it was claimed.
        worker_id: Who held it.
        delay_seconds: When to look again (30 for an unknown kind); 0 is at once.
        reason: Why, for people.
    """
    ending = Ending(worker_id)
    return _outcome(claimed, ending, Action.RELEASE, error=reason, delay_seconds=delay_seconds)


def interrupt(claimed: Claimed, ending: Ending, reason: str) -> Outcome:
    """Gives back a job that was cut by something that was not its fault.

    Args:
        claimed: The row as it was claimed.
        ending: Who ran it, since when, for how long.
        reason: What cut it, for people.
    """
    return _outcome(claimed, ending, Action.INTERRUPT, error=harmless(reason, ERROR_TEXT_BYTES))


def error_text(error: BaseException, limit: int = ERROR_TEXT_BYTES) -> str:
    """What is stored of an exception: "Type: message", then the last frames of its traceback.

    Args:
        error: The exception; its `__str__` may be broken.
        limit: Most bytes of UTF-8 to give.

    Returns:
        Text that PostgreSQL takes: no NUL, no lone surrogate. A `Discard` or `Retry` gives its reason alone.
    """
    headline = harmless(_headline(error), min(limit, _MESSAGE_BYTES))
    if isinstance(error, Discard | Retry) or error.__traceback__ is None:
        return headline
    room = limit - len(headline.encode()) - 1
    return f"{headline}\n{harmless(_trace(error), room, keep_end=True)}" if room > 0 else headline


def harmless(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Text cut to `limit` bytes of UTF-8 in which NUL and lone surrogates are spelled out.

    Args:
        text: Any text.
        limit: Most bytes to give.
        keep_end: Cut at the front instead of at the end (tracebacks end with what matters).
    """
    text = text[-limit:] if keep_end else text[:limit]  # a text of a gigabyte is not encoded as a whole
    raw = text.replace("\0", "\\x00").encode("utf-8", "backslashreplace")
    if len(raw) > limit:
        raw = raw[-limit:] if keep_end else raw[:limit]
    return raw.decode("utf-8", "ignore")


def _completed(claimed: Claimed, ending: Ending) -> Outcome:
    # The work is done, so a result that cannot be stored must not run it again: failed, with the cause.
    if ending.value is None:
        return _outcome(claimed, ending, Action.COMPLETE)
    try:
        result = codec.dumps(ending.value)
    except (TypeError, ValueError) as error:
        text = f"{type(error).__name__}: the handler's result cannot be stored: {error}"
        return _outcome(claimed, ending, Action.FAIL, error=harmless(text, _MESSAGE_BYTES))
    if len(result) > MAX_PAYLOAD_BYTES:
        text = f"the handler's result has {len(result):,} bytes of JSON; at most {MAX_PAYLOAD_BYTES:,} are stored"
        return _outcome(claimed, ending, Action.FAIL, error=f"ValueError: {text}")
    return _outcome(claimed, ending, Action.COMPLETE, result=result)


def _outcome(
    claimed: Claimed,
    ending: Ending,
    action: Action,
    *,
    result: bytes | None = None,
    error: str | None = None,
    delay_seconds: float = 0.0,
) -> Outcome:
    return Outcome(
        job_id=claimed.id,
        token=claimed.token,
        action=action,
        attempt_number=claimed.attempt_count,
        queue_name=claimed.queue_name,
        kind=claimed.kind,
        worker_id=ending.worker_id,
        result=result,
        error=error,
        delay_seconds=delay_seconds,
        started=ending.started,
        duration_seconds=ending.duration_seconds,
    )


def _headline(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - a user's __str__ may raise anything, and the job still needs its end
        message = "<its text cannot be made>"
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def _trace(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error, limit=-_FRAMES)).rstrip()
    except Exception:  # noqa: BLE001 - as above: a broken exception must not cost the settle
        return "<its traceback cannot be made>"
