"""Signals as a queue: the handler only wakes the loop, which does the work in its own order.

`signal.set_wakeup_fd` writes one byte, the signal's number, for each signal that has a Python handler. The handlers
installed here do nothing; they must exist for that byte to be written.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

MASTER_SIGNALS = (
    signal.SIGCHLD,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a program at a terminal: Ctrl-C, kill, and the terminal's closing."""


@contextlib.contextmanager
def heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """For the block: signals that would end the process call this instead."""
    before = {number: signal.signal(number, handler) for number in END_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Inbox:
    """Signals that arrived, in order. Equal signals that arrive together may be one (the kernel joins them)."""

    def __init__(self, numbers: Iterable[signal.Signals] = MASTER_SIGNALS) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # the command keeps a reload waiting until here

    def fileno(self) -> int:
        """Readable while there are signals to take."""
        return self._read

    def take(self) -> list[signal.Signals]:
        """All signals since the last call, oldest first."""
        taken: list[signal.Signals] = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._read, 4096):
                taken += [signal.Signals(number) for number in data]
        return taken

    def close(self) -> None:
        """Put back the handlers that were there before (in the process that made the inbox)."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.forget()

    def forget(self) -> None:
        """Close the pipe only (in a forked child, which has its own handlers)."""
        os.close(self._read)
        os.close(self._write)


def name_of(exit_code: int) -> str:
    """An exit code of multiprocessing in words: `exit code 3`, `SIGKILL`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
