"""What `pmqd demo` shows while it runs: a live picture on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_SECONDS = 1.0
# Wide enough from the start: columns that grow with their contents make the picture jump.
NAME_WIDTH, NUMBER_WIDTH, DOING_WIDTH = 16, 9, 40


@dataclass(frozen=True, slots=True)
class QueueRow:
    """One queue's jobs by state."""

    name: str
    waiting: int
    in_redis: int
    running: int
    completed: int
    failed: int


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker that has done or does something."""

    name: str
    done: int
    doing: str


@dataclass(frozen=True, slots=True)
class Picture:
    """What is so at one moment."""

    received: int
    queues: Sequence[QueueRow]
    workers: Sequence[WorkerRow]


class View:
    """The display of one campaign; everything that is said goes through it, so that lines and picture do not mix."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("mails received"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("mails", total=total)
        self._total = total
        self._live = (
            Live(console=console, refresh_per_second=10, transient=True) if console.is_terminal else None
        )
        self._said_at = 0.0

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, picture: Picture) -> None:
        """The newest picture; as a line a second where nobody looks at a terminal."""
        self._progress.update(self._task, completed=picture.received)
        if self._live is not None:
            self._live.update(Group(self._progress, _queues(picture.queues), _workers(picture.workers)))
        elif time.monotonic() - self._said_at >= PLAIN_SECONDS:
            self._said_at = time.monotonic()
            self.say(self._line(picture))

    def _line(self, picture: Picture) -> str:
        waiting = sum(row.waiting for row in picture.queues)
        in_redis = sum(row.in_redis for row in picture.queues)
        running = sum(row.running for row in picture.queues)
        return (
            f"{picture.received} of {self._total} mails received; "
            f"{waiting} waiting, {in_redis} in Redis, {running} running"
        )


def _queues(rows: Sequence[QueueRow]) -> Table:
    table = _table("Queues")
    table.add_column("queue", min_width=NAME_WIDTH)
    for title in ("waiting", "in Redis", "running", "completed", "failed"):
        table.add_column(title, justify="right", min_width=NUMBER_WIDTH)
    for row in rows:
        numbers = (row.waiting, row.in_redis, row.running, row.completed, row.failed)
        table.add_row(row.name, *(str(number) for number in numbers))
    return table


def _workers(rows: Sequence[WorkerRow]) -> Table:
    table = _table("Workers")
    table.add_column("worker", min_width=NAME_WIDTH)
    table.add_column("jobs", justify="right", min_width=NUMBER_WIDTH)
    table.add_column("now", min_width=DOING_WIDTH, no_wrap=True)
    for row in rows:
        table.add_row(row.name, str(row.done), row.doing)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD)
