"""How far a run is: counted from the history while it grows, shown in one line."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

_ENDS = (b" ok\n", b" kept\n", b" fail\n")
_WINDOW_SECONDS = 3.0
_PIPED_SECONDS = 5.0
_CHUNK = 1 << 22


@dataclass
class Tail:
    """The lines that a growing file has got since the last look."""

    path: Path
    offset: int = 0

    def more(self) -> bytes:
        """Whole lines only; the rest comes with the next look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(_CHUNK)
        except FileNotFoundError:
            return b""
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole


@dataclass
class Tally:
    """Jobs acknowledged and handlers ended for good, by the history.

    A job that runs again counts again, so `finished` is for people; the checker counts for itself.
    """

    folder: Path
    acknowledged: int = 0
    finished: int = 0
    left: int | None = None
    _tails: dict[str, Tail] = field(default_factory=dict)
    _steps: deque[tuple[float, int]] = field(default_factory=deque)

    def look(self) -> None:
        """Read what has come since the last time."""
        for path in sorted(self.folder.glob("producers-*")):
            for lines in self._lines(path):
                self.acknowledged += lines.count(b"\n+ ") + lines.startswith(b"+ ")
        for lines in self._lines(self.folder / "handlers"):
            self.finished += sum(lines.count(end) for end in _ENDS)
        now = time.monotonic()
        self._steps.append((now, self.finished))
        while now - self._steps[0][0] > _WINDOW_SECONDS:
            self._steps.popleft()

    @property
    def rate(self) -> float:
        """Jobs finished per second, over the last seconds."""
        (first, before), (last, now) = self._steps[0], self._steps[-1]
        return (now - before) / (last - first) if last > first else 0.0

    @property
    def backlog(self) -> int:
        """Acknowledged and not finished; what PostgreSQL says of it once it was asked (`left`)."""
        if self.left is not None:
            return self.left
        return max(0, self.acknowledged - self.finished)

    def _lines(self, path: Path) -> list[bytes]:
        tail = self._tails.setdefault(path.name, Tail(path))
        return list(iter(tail.more, b""))


class Line:
    """One line on standard error: rewritten on a terminal, now and then a new one elsewhere."""

    def __init__(self, tally: Tally, jobs: int, faults: int, done: Callable[[], int]) -> None:
        self._tally, self._jobs, self._faults, self._done = tally, jobs, faults, done
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._began = self._last = time.monotonic()
        self._phase = "start"

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own, above."""
        self._console.print(text, markup=False, soft_wrap=True)

    def phase(self, name: str) -> None:
        """From now on the run does this."""
        self._phase, self._last = name, 0.0
        self.show()

    def show(self) -> None:
        """Count and show, as often as the place for it can bear."""
        self._tally.look()
        if self._console.is_terminal:
            self._live.update(Text(self.text(), no_wrap=True, overflow="ellipsis"), refresh=True)
        elif time.monotonic() - self._last >= _PIPED_SECONDS:
            self._last = time.monotonic()
            self.say(self.text())

    def text(self) -> str:
        """Phase, jobs, rate, faults, backlog, time."""
        tally, seconds = self._tally, int(time.monotonic() - self._began)
        return (
            f"{self._phase:<6} {tally.acknowledged:,}/{self._jobs:,} acknowledged, {tally.finished:,} finished,"
            f" {tally.rate:,.0f}/s, faults {self._done()}/{self._faults}, backlog {tally.backlog:,},"
            f" {seconds // 60}:{seconds % 60:02d}"
        )
