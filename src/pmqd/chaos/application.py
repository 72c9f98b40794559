"""The application of a chaos run: quick jobs by the thousand, and a few that are slow, that fail, crash, or will not die."""

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from pmqd import App, Discard, Job, Retry, Snooze
from pmqd.chaos import history
from pmqd.retry import JobCancelled, JobTimeout

app = App()

MAIL: Final = "chaos-mail"
BULK: Final = "chaos-bulk"
PLAIN: Final = "chaos-plain"
MIXED: Final = "chaos-mixed"
ASYNC: Final = "chaos-async"
ROUGH: Final = "chaos-rough"

_RETRIES: Final[dict[str, Any]] = {"retry_base_seconds": 0.1, "retry_max_seconds": 1.0}
QUEUES: Final[dict[str, dict[str, Any]]] = dict.fromkeys((MAIL, BULK, PLAIN, MIXED, ASYNC, ROUGH), _RETRIES)
"""The settings of each queue, as `[queues.NAME]` takes them: retries come soon, so that a run is short."""

QUICK_QUEUES: Final = frozenset({MAIL, BULK, PLAIN})
"""Queues whose pool runs nothing else: where a ready job may not wait for a busy worker."""

_SLICE_SECONDS: Final = 0.05
_TIMEOUT_SECONDS: Final = 0.5
_DEAF_SECONDS: Final = 30.0
_NEVER_SECONDS: Final = 60.0


def pools(workers: int) -> list[dict[str, Any]]:
    """The pools of one host, as `[[workers]]` takes them.

    Args:
        workers: processes for the quick jobs. Jobs that take their time have a process of their own, and those that
            end their process another, so that no neighbour of a quick job is ever the guilty one.
    """
    return [
        {"name": "quick", "queues": [MAIL, BULK, PLAIN], "processes": workers},
        {"name": "mixed", "queues": [MIXED, ASYNC], "processes": 1, "concurrency": 8},
        {"name": "rough", "queues": [ROUGH], "processes": 1, "concurrency": 2},
    ]


@contextmanager
def noted(job: Job) -> Iterator[None]:
    """Records the start of an attempt, and how it ends."""
    end = "error"
    try:
        history.start(job)
        yield
        end = "ok"
    except Retry:
        end = "retry"
        raise
    except Snooze:
        end = "snooze"
        raise
    except Discard:
        end = "fail"
        raise
    except JobTimeout:
        end = "timeout"
        raise
    except (JobCancelled, asyncio.CancelledError):
        end = "cancelled"
        raise
    finally:
        history.end(job, end)


def _rest(seconds: float) -> None:
    """Sleeps in slices: an interruption from another thread strikes between two of them."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _SLICE_SECONDS))


# --- the great mass ------------------------------------------------------------------------------------------


@app.task(queue=MAIL)
def quick(job: Job) -> None:
    """Starts and ends at once."""
    history.start(job)
    history.end(job, "ok")


@app.task(queue=BULK)
def quick_bulk(job: Job) -> None:
    """The same, for what comes in thousands and may wait."""
    history.start(job)
    history.end(job, "ok")


@app.handler(PLAIN)
def plain(job: Job) -> None:
    """The same for jobs without a kind, as plain SQL makes them."""
    history.start(job)
    history.end(job, "ok")


@app.task(queue=ASYNC)
async def quick_async(job: Job) -> None:
    """Starts and ends at once, on an event loop."""
    history.start(job)
    await asyncio.sleep(0)
    history.end(job, "ok")


# --- jobs that take their time, or another turn --------------------------------------------------------------


@app.task(queue=MIXED)
def slow(job: Job, seconds: float) -> float:
    """Runs for a while."""
    with noted(job):
        _rest(seconds)
    return seconds


@app.task(queue=ASYNC)
async def slow_async(job: Job, seconds: float) -> float:
    """Runs for a while on the event loop."""
    with noted(job):
        await asyncio.sleep(seconds)
    return seconds


@app.task(queue=MIXED)
def flaky(job: Job, failures: int, asks: bool = False) -> int:
    """Fails the first attempts, by an exception or by asking for a retry."""
    with noted(job):
        if job.attempt_count <= failures:
            reason = f"attempt {job.attempt_count} of {failures} that fail"
            raise Retry(_SLICE_SECONDS, reason) if asks else RuntimeError(reason)
    return job.attempt_count


@app.task(queue=MIXED, max_attempts=2)
def failing(job: Job, discards: bool = False) -> None:
    """Never works: a dead letter after its attempts, or at once."""
    with noted(job):
        raise Discard("nobody wants this") if discards else ValueError("this never works")


@app.task(queue=MIXED)
def snoozing(job: Job, until: float) -> None:
    """Comes back later until a point of the wall clock (seconds since 1970)."""
    with noted(job):
        if time.time() < until:
            raise Snooze(0.3)


@app.task(queue=MIXED)
def stubborn(job: Job, seconds: float) -> None:
    """Answers a cancel with an error, so that it would be retried if its cancel could be forgotten."""
    with noted(job):
        try:
            _rest(seconds)
        except JobCancelled as asked:
            raise RuntimeError("not now") from asked


@app.task(queue=MIXED, max_attempts=2, timeout=_TIMEOUT_SECONDS)
def timing_out(job: Job, times: int) -> None:
    """Runs into its timeout in the first attempts."""
    with noted(job):
        if job.attempt_count <= times:
            _rest(_NEVER_SECONDS)


@app.task(queue=MIXED)
def settles_itself(job: Job) -> None:
    """Ties a row of its own to its end: exactly one of them, however often the handler runs."""
    history.start(job)
    kept = False
    try:
        with job.settling() as connection:
            connection.execute(history.INSERT_EFFECT, (job.id, job.claim_token))
            history.end(job, "kept")  # before the commit, as every end is recorded before its settle
            kept = True
    finally:
        if not kept:
            history.end(job, "error")


@app.task(queue=MIXED)
def big_result(job: Job, size: int) -> str:
    """Returns a great deal."""
    with noted(job):
        return "x" * size


@app.task(queue=MIXED)
def progress(job: Job, steps: int) -> int:
    """Says how far it is."""
    with noted(job):
        for step in range(steps):
            job.progress(step / steps, f"step {step} of {steps}")
            time.sleep(0.01)
    return steps


# --- jobs that end their process -----------------------------------------------------------------------------


@app.task(queue=ROUGH, max_attempts=2)
def crash_exit(job: Job, times: int) -> None:
    """Ends the process without asking anybody, in the first attempts."""
    history.start(job)
    if job.attempt_count <= times:
        os._exit(1)
    history.end(job, "ok")


@app.task(queue=ROUGH, max_attempts=2)
def crash_segv(job: Job, times: int) -> None:
    """Reads address zero."""
    history.start(job)
    if job.attempt_count <= times:
        ctypes.string_at(0)
    history.end(job, "ok")


@app.task(queue=ROUGH, max_attempts=2)
def crash_kill(job: Job, times: int) -> None:
    """Kills its own process."""
    history.start(job)
    if job.attempt_count <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    history.end(job, "ok")


@app.task(queue=ROUGH, max_attempts=2, timeout=_TIMEOUT_SECONDS)
def slow_to_die(job: Job, times: int) -> None:
    """Swallows the interruption: only the end of its process ends it."""
    history.start(job)
    until = time.monotonic() + (_DEAF_SECONDS if job.attempt_count <= times else 0.0)
    while time.monotonic() < until:
        with suppress(BaseException):  # to be deaf to every request is what this job is for
            time.sleep(_SLICE_SECONDS)
    history.end(job, "ok")
