"""The application that the process and fault tests run: honest, slow and hostile handlers.

Every start and end is recorded outside both stores, by one ``O_APPEND`` write to the file named in ``TRIAL_HISTORY``:
``S|E job_id attempt pid monotonic_ns thread``.
"""

import asyncio
import collections
import ctypes
import itertools
import os
import sys
import threading
import time

from pmqd import App, Discard, Job, Retry, Snooze

app = App()


def note(mark: str, job: Job) -> None:
    """Record the start (``S``) or end (``E``) of an attempt."""
    path = os.environ.get("TRIAL_HISTORY")
    if not path:
        return
    line = f"{mark} {job.id} {job.attempt_count} {os.getpid()} {time.monotonic_ns()} {threading.get_native_id()}\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


@app.handler("plain")
def plain(job: Job) -> None:
    """A whole queue of jobs without a kind, as plain SQL makes them."""
    note("S", job)
    note("E", job)


@app.task(queue="trial", name="nothing")
def nothing(job: Job) -> None:
    """Start and end at once."""
    note("S", job)
    note("E", job)


@app.task(queue="trial", name="nap")
def nap(job: Job, seconds: float) -> float:
    """Sleep, as a handler that waits for somebody does."""
    note("S", job)
    time.sleep(seconds)
    note("E", job)
    return seconds


@app.task(queue="trial", name="nap_until")
def nap_until(job: Job, until: float) -> None:
    """Sleep until a point of the wall clock (seconds since 1970), however often it is started."""
    note("S", job)
    time.sleep(max(0.0, until - time.time()))
    note("E", job)


@app.task(queue="trial", name="nap_async")
async def nap_async(job: Job, seconds: float) -> float:
    """Sleep on the event loop."""
    note("S", job)
    await asyncio.sleep(seconds)
    note("E", job)
    return seconds


@app.task(queue="trial", name="parent")
def parent(job: Job, children: int) -> list[str]:
    """Enqueue more jobs, on a connection of the application's own."""
    note("S", job)
    ids = [str(nothing.enqueue()) for _ in range(children)]
    note("E", job)
    return ids


@app.task(queue="trial", name="effect")
def effect(job: Job) -> None:
    """Write a row and end the job in one transaction."""
    note("S", job)
    with job.settling() as connection:
        connection.execute("insert into effects values (%s)", (job.id,))
    note("E", job)


@app.task(queue="trial", name="flaky")
def flaky(job: Job, failures: int) -> str:
    """Fail the first attempts, with a retry at once."""
    note("S", job)
    if job.attempt_count <= failures:
        raise Retry(0.05, f"attempt {job.attempt_count} of {failures} that fail")
    note("E", job)
    return "done"


@app.task(queue="trial", name="snoozer")
def snoozer(job: Job, until: float) -> str:
    """Snooze until a point of the wall clock (seconds since 1970)."""
    note("S", job)
    if time.time() < until:
        raise Snooze(0.2)
    note("E", job)
    return "awake"


@app.task(queue="trial", name="discarded")
def discarded(job: Job) -> None:
    """Give up for good."""
    note("S", job)
    raise Discard("nobody wants this")


@app.task(queue="trial", name="sys_exit", max_attempts=1)
def sys_exit(job: Job) -> None:
    """Ask the interpreter to end."""
    note("S", job)
    sys.exit(3)


@app.task(queue="trial", name="os_exit", max_attempts=2)
def os_exit(job: Job) -> None:
    """End the process without asking anybody."""
    note("S", job)
    os._exit(1)


@app.task(queue="trial", name="segfault", max_attempts=2)
def segfault(job: Job) -> None:
    """Read address zero."""
    note("S", job)
    ctypes.string_at(0)


@app.task(queue="trial", name="endless_python", max_attempts=1, timeout=1)
def endless_python(job: Job) -> None:
    """Loop for ever in Python: the soft timeout ends it."""
    note("S", job)
    while True:
        pass


@app.task(queue="trial", name="endless_c", max_attempts=1, timeout=1)
def endless_c(job: Job) -> None:
    """Loop for ever in C, holding the GIL, deaf to signals: only the master can end it."""
    note("S", job)
    collections.deque(itertools.repeat(None), maxlen=0)


@app.task(queue="trial", name="swallows", max_attempts=1, timeout=1)
def swallows(job: Job) -> None:
    """Swallow the soft timeout: the hard one kills the process."""
    note("S", job)
    while True:
        try:
            time.sleep(0.05)
        except BaseException:  # noqa: BLE001 - this is the fault under test
            pass


@app.task(queue="trial", name="nul_error", max_attempts=1)
def nul_error(job: Job) -> None:
    """Raise a text that PostgreSQL cannot store."""
    note("S", job)
    raise ValueError("before\x00after \ud800 end")


@app.task(queue="trial", name="no_json")
def no_json(job: Job) -> object:
    """Return what JSON cannot say."""
    note("S", job)
    return object()
