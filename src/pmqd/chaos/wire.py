"""The wires between hosts, producers and stores, as the run holds them: cut, held, slow, sliced, broken at a word.

The bytes pass through one other process (`chaos.switchboard`), so that neither the load nor the faults wait for each
other's interpreter. A method returns when its change is in force there.
"""

import json
import select
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pmqd.errors import PmqdError

Moment = Literal["before", "after"]
"""Break a wire before the server gets what the client sent, or after it got it and before the client hears of it."""

Side = Literal["client", "server"]

_ANSWER_SECONDS = 20.0
_END_SECONDS = 5.0


@dataclass(frozen=True)
class Upstream:
    """Where a server listens: a Unix socket's path, or a host and port."""

    path: str = ""
    host: str = ""
    port: int = 0


class Switchboard:
    """The process that passes the bytes, and the pipe on which it takes orders, one at a time."""

    def __init__(self, log: Path) -> None:
        self._lock = threading.Lock()
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pmqd.chaos.switchboard"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                start_new_session=True,  # the terminal's Ctrl-C is for the run, which ends this in its order
            )

    @property
    def pid(self) -> int:
        """The process that passes the bytes."""
        return self._process.pid

    def add(self, upstream: Upstream) -> "Wire":
        """A new wire to a server; it listens on a port of 127.0.0.1 of its own.

        Raises:
            PmqdError: the process is gone, or refuses.
        """
        answer = self.ask({"do": "add", "path": upstream.path, "host": upstream.host, "port": upstream.port})
        return Wire(self, number=answer["wire"], port=answer["listens"])

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send one order and wait until it is carried out.

        Raises:
            PmqdError: the process is gone, does not answer, or refuses.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
                there, _, _ = select.select([self._process.stdout], [], [], _ANSWER_SECONDS)
                line = self._process.stdout.readline() if there else b""
            except OSError as error:
                raise PmqdError(f"the process of the wires is gone: {error}") from error
        if not line:
            raise PmqdError(f"the process of the wires did not answer {order['do']!r}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PmqdError(f"the process of the wires refuses {order}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process; every wire is reset."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Wire:
    """One listening port in front of one server. What is done to it holds for connections that there are and come."""

    board: Switchboard = field(repr=False)
    number: int
    port: int

    @property
    def sprung(self) -> int:
        """How often `break_on` broke a connection."""
        return int(self._ask("look")["sprung"])

    @property
    def connections(self) -> int:
        """How many connections pass through now."""
        return int(self._ask("look")["connections"])

    def open(self) -> None:
        """Undo everything: what was held goes on where it stood."""
        self._ask("open")

    def cut(self) -> None:
        """Reset every connection, and refuse new ones."""
        self._ask("cut")

    def hold(self) -> None:
        """Nothing passes any more, in either direction, and nobody is told: a pulled cable. New ones wait too."""
        self._ask("hold")

    def deaf(self, side: Side) -> None:
        """What is sent to one side does not arrive; the other direction passes. Nothing is lost: TCP sends it again."""
        self._ask("deaf", side=side)

    def delay(self, seconds: float) -> None:
        """Everything arrives so much later, each way."""
        self._ask("delay", seconds=seconds)

    def slice(self, size: int) -> None:
        """At most so many bytes arrive at once, each way."""
        self._ask("slice", size=size)

    def reset(self) -> None:
        """Reset every connection once; new ones are served."""
        self._ask("reset")

    def break_on(self, words: bytes, when: Moment) -> None:
        """Reset the next connection whose client sends a packet that contains `words`, once.

        Args:
            words: part of a statement or command, such as b"COMMIT".
            when: "before": the server never sees the packet. "after": the server gets it, its answer is lost.
        """
        self._ask("break_on", words=words.decode("latin-1"), when=when)

    def _ask(self, do: str, **more: Any) -> dict[str, Any]:
        return self.board.ask({"do": do, "wire": self.number, **more})
