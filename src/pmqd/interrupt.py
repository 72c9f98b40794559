"""How user code that runs is interrupted: by a signal in the main thread, an exception in another, a cancellation.

All three are a request: what the handler makes of it is its own affair, and the master's deadline is what ends a
process that does not listen. Each attempt is interrupted at most once, and only while it is *armed*: an exception
must never strike pmqd's own code before or after the handler, nor a commit on its behalf.
"""

import asyncio
import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

from pmqd.retry import JobCancelled, JobTimeout

STRIKE_SIGNAL: Final = signal.SIGUSR2

Interruption = type[JobTimeout] | type[JobCancelled]
INTERRUPTIONS: Final = (JobTimeout, JobCancelled)


class Target:
    """One attempt, as what may be interrupted.

    Attributes:
        wanted: what is to be raised in it, once somebody wants that.
        message: its text.
        struck: whether it was raised (or is certain to be).
        thread: where it runs.
        task: what runs it, on an event loop.
        lock: decides between an interruption from another thread and the attempt's end.
    """

    __slots__ = ("_armed", "_strike", "lock", "message", "struck", "task", "thread", "wanted")

    def __init__(self, strike: "Callable[[Target], None]") -> None:
        """Takes how it is interrupted: `strike_main`, `strike_thread` or `strike_task`."""
        self._strike = strike
        self.lock = threading.Lock()
        self._armed = False
        self.wanted: Interruption | None = None
        self.message = ""
        self.struck = False
        self.thread = threading.get_ident()
        self.task: asyncio.Task[Any] | None = None

    def interrupt(self, wanted: Interruption, message: str) -> None:
        """Asks for the end of the attempt; the first who asks decides with what. Any thread may ask.

        What cannot be interrupted at this moment is with the next `strike`.
        """
        if self.wanted is None:
            self.message, self.wanted = message, wanted
        self.strike()

    def strike(self) -> None:
        """Interrupts, if somebody wants that and it has not been done."""
        if self.wanted is not None and not self.struck:
            self._strike(self)

    def take(self) -> BaseException | None:
        """What to raise now: once, and only while armed."""
        if not self._armed or self.wanted is None:
            return None
        self._armed, self.struck = False, True
        return self.wanted(self.message)

    def arm(self) -> None:
        """From here on the handler runs."""
        self._armed = True

    def disarm(self) -> None:
        """The handler has ended. An interruption that comes at this very moment is too late and is dropped."""
        while True:
            try:
                self._armed = False
                # What is wanted is said before it is asked whether this is armed: else nobody can have found it so.
                if self.wanted is not None:
                    with self.lock:
                        if self.struck and self._strike is strike_thread:
                            _raise_in(self.thread, None)
            except INTERRUPTIONS:
                continue
            return

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Nothing interrupts what is done inside; an interruption that is wanted meanwhile comes afterwards."""
        with self.lock:
            before, self._armed = self._armed, False
        try:
            yield
        finally:
            with self.lock:
                self._armed = before and not self.struck


# the main thread: a signal, whose handler raises

_in_main: Target | None = None


def strike_main(_target: Target) -> None:
    """Sends the signal to the main thread; a blocking call there returns for it."""
    signal.pthread_kill(_main_ident(), STRIKE_SIGNAL)


def watch_main(target: Target | None) -> None:
    """Says which attempt runs in the main thread."""
    global _in_main  # noqa: PLW0603 - a signal handler has nothing else to look at
    _in_main = target


def listen() -> None:
    """Installs the signal's handler; in the main thread."""
    signal.signal(STRIKE_SIGNAL, _on_strike)


def _on_strike(_number: int, _frame: FrameType | None) -> None:
    error = _in_main.take() if _in_main is not None else None
    if error is not None:
        raise error


def _main_ident() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


# another thread: an exception that the interpreter raises there between two of its instructions


def strike_thread(target: Target) -> None:
    """Raises in the attempt's thread; a blocking call there ends first."""
    with target.lock:  # not between the handler's end and `disarm`, nor into a commit
        error = target.take()
        if error is not None:
            _raise_in(target.thread, type(error))


def _raise_in(thread: int, wanted: type[BaseException] | None) -> None:
    exception = None if wanted is None else ctypes.py_object(wanted)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


# an event loop: the cancellation of the task


def strike_task(target: Target) -> None:
    """Cancels the attempt's task at its next `await`."""
    task = target.task
    if task is not None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nothing runs there any more
            task.get_loop().call_soon_threadsafe(_cancel, target)


def _cancel(target: Target) -> None:
    if target.task is not None and target.take() is not None:
        target.task.cancel()
