"""The producers of a chaos run: processes that enqueue by every way there is until enough is acknowledged, whatever breaks meanwhile."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql

from pmqd.chaos import producer_mix
from pmqd.chaos.history import ProducerLog
from pmqd.chaos.pace import PACE
from pmqd.chaos.plan import Plan
from pmqd.chaos.producer_mix import Wish
from pmqd.chaos.producer_ways import Ways
from pmqd.errors import Conflict, NotFound, PmqdError
from pmqd.programs import dying_with_parent
from pmqd.store import Store

SECONDS_PER_FAULT: Final = 0.7
MOST_PER_SECOND: Final = 8_000.0
BACKLOG: Final = 20_000
"""So many ready jobs are enough: with more, the producers wait."""

_PROCESSES: Final = 2
_LOOK_SECONDS: Final = 0.25
_PULSE_SECONDS: Final = 0.5
"""So often a difficult job comes even where the load is held back: a fault may wait for one."""
_STOP_SECONDS: Final = 5.0
_KILL_SIGNAL: Final = 9


@dataclass(frozen=True)
class Order:
    """What one producer process is told, as JSON on its standard input; the end of that input means stop.

    Attributes:
        number: which of them it is.
        of: how many there are.
        jobs: how many it has to get acknowledged.
        all_jobs: all of them together.
        seconds: how long that is to take at least.
        seed: decides what it enqueues, and how.
        history: the folder of the history.
        dsn_wire: PostgreSQL over the wire that is cut.
        dsn_direct: PostgreSQL, to look at the backlog.
        redis_wire: Redis over its wire, for the hints of urgent jobs.
        schema: pmqd's schema.
        prefix: of the keys in Redis.
    """

    number: int
    of: int
    jobs: int
    all_jobs: int
    seconds: float
    seed: int
    history: str
    dsn_wire: str
    dsn_direct: str
    redis_wire: str
    schema: str
    prefix: str


# --- in the coordinator --------------------------------------------------------------------------------------


def run_producers(
    plan: Plan,
    *,
    folder: Path,
    dsn_wire: str,
    dsn_direct: str,
    redis_wire: str,
    schema: str,
    prefix: str,
    stop: threading.Event,
) -> None:
    """Runs the producers until all jobs of the plan are acknowledged, and at least as long as its faults take.

    Args:
        plan: how many jobs and faults, and the seed.
        folder: of the run; the history is in it.
        dsn_wire: PostgreSQL over the producers' wire.
        dsn_direct: PostgreSQL itself.
        redis_wire: Redis over the producers' wire.
        schema: pmqd's.
        prefix: of keys in Redis.
        stop: set: end soon, whatever is acknowledged.

    Raises:
        PmqdError: a producer ended by itself before it was done.
    """
    order = Order(
        number=0,
        of=min(_PROCESSES, plan.jobs),
        jobs=plan.jobs,
        all_jobs=plan.jobs,
        seconds=max(plan.faults * SECONDS_PER_FAULT, plan.jobs / MOST_PER_SECOND),
        seed=plan.seed,
        history=str(folder / "history"),
        dsn_wire=dsn_wire,
        dsn_direct=dsn_direct,
        redis_wire=redis_wire,
        schema=schema,
        prefix=prefix,
    )
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_started(part, folder)) for part in _parts(order)]
        while any(process.poll() is None for process in running) and not stop.wait(0.05):
            _check(running, folder)
        _check(running, folder)


def _parts(order: Order) -> list[Order]:
    """The same order for each of its processes: a part of the jobs for each."""
    share, rest = divmod(order.jobs, order.of)
    return [replace(order, number=number, jobs=share + (number < rest)) for number in range(order.of)]


@contextlib.contextmanager
def _started(order: Order, folder: Path) -> Any:
    """One producer process. Leaving: it is asked to stop, and killed when it does not."""
    log = folder / f"producer-{order.number}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "pmqd.chaos.producer"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=dying_with_parent(_KILL_SIGNAL),  # noqa: PLW1509 - one prepared call, no lock taken
        )
    assert process.stdin is not None
    try:
        # Over its input and not as arguments: passwords stand in no process title.
        process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        process.stdin.flush()
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs on a wire that is held; what it waited for stays unknown
            process.kill()
            process.wait()


def _check(running: "list[subprocess.Popen[bytes]]", folder: Path) -> None:
    for number, process in enumerate(running):
        if process.poll() not in (None, 0):
            end = (folder / f"producer-{number}.log").read_text(errors="replace").strip()[-1000:]
            raise PmqdError(f"producer {number} ended with {process.returncode}: {end}")


# --- in the process ------------------------------------------------------------------------------------------


class Producer:
    """One process's work: how fast, what next, and what is done to jobs that were acknowledged."""

    def __init__(
        self, order: Order, ways: Ways, log: ProducerLog, random: Random, stop: threading.Event
    ) -> None:
        """Takes its order, the ways to enqueue, the log, the dice, and what tells it to stop."""
        self._order = order
        self._ways = ways
        self._log = log
        self._random = random
        self._stop = stop
        self._backlog = Backlog(order.dsn_direct, order.schema)
        self._store = Store(ways.settings.postgres, "chaos")
        every = producer_mix.specials(order.all_jobs, order.seed)
        self._specials = deque(every[order.number :: order.of])
        self._special_every = max(1.0, 0.9 * order.jobs / max(1, len(self._specials)))
        self._batch = max(5, min(500, order.jobs // 40))
        self._to_cancel: deque[tuple[float, UUID]] = deque()
        self._to_replay: deque[tuple[float, UUID]] = deque()
        self.acknowledged = 0

    def run(self) -> None:
        """Enqueues until enough is acknowledged and the time is over, or until told to stop."""
        began = time.monotonic()
        specials_sent, pulse_at = 0, 0.0
        while not self._stop.is_set():
            elapsed = time.monotonic() - began
            if self.acknowledged >= self._order.jobs and elapsed >= self._order.seconds:
                break
            self._tend()
            room = self._room(elapsed)
            if elapsed >= pulse_at:
                pulse_at = elapsed + _PULSE_SECONDS
                self._special(producer_mix.pulse(self._random), again=False)
            elif room <= 0:
                self._stop.wait(0.01)
            elif self._specials and self.acknowledged >= specials_sent * self._special_every:
                specials_sent += 1
                self._special(self._specials.popleft())
            else:
                self._ordinary(room)
        self._tend(now=True)
        self._store.close()
        self._backlog.close()

    def _room(self, elapsed: float) -> int:
        """How many jobs may be enqueued now: so that the load lasts as long as the faults, and the backlog stays bounded."""
        if self._backlog.full(time.monotonic()):
            return 0
        share = min(1.0, (elapsed + 0.2) / self._order.seconds) if self._order.seconds else 1.0
        return int(self._order.jobs * min(share, self._allowed())) - self.acknowledged

    def _allowed(self) -> float:
        """Which part of the load the nemesis lets through by now: its last fault is to meet some of it, too."""
        try:
            return float((Path(self._order.history).parent / PACE).read_text())
        except (OSError, ValueError):
            return 1.0  # there is no nemesis

    def _ordinary(self, room: int) -> None:
        """One step of the great mass; large steps are COPY, so that single ones may be slow."""
        pick = self._random.random()
        if pick < 0.5:
            wishes = self._wishes(self._random.randint(1, max(1, min(room, self._batch))))
            done = self._ways.copy(wishes)
        elif pick < 0.6:
            done = self._ways.client_async(self._wishes(min(room, 8)))
        else:
            [wish] = self._wishes(1)
            way = self._random.choice((self._ways.client, self._ways.insert, self._ways.function))
            done = way(wish)
        self.acknowledged += len(done)

    def _wishes(self, count: int) -> list[Wish]:
        return [producer_mix.quick(self._random) for _ in range(count)]

    def _special(self, wish: Wish, *, again: bool = True) -> None:
        done = self._ways.client(wish) if self._random.random() < 0.7 else self._ways.function(wish)
        if not done:
            if again:
                self._specials.append(wish)  # it is too rare to be left to chance
            return
        self.acknowledged += 1
        due = time.monotonic() + self._random.uniform(0.1, 1.0)
        if wish.cancel:
            self._to_cancel.append((due, done[0]))
        if wish.kind == "failing" and self._random.random() < 0.5:
            self._to_replay.append((due + 2.0, done[0]))

    # cancels and replays

    def _tend(self, *, now: bool = False) -> None:
        """Cancels and replays what is due; each once, whatever comes of it."""
        moment = time.monotonic()
        while self._to_cancel and (now or self._to_cancel[0][0] <= moment):
            self._ask("c", self._to_cancel.popleft()[1])
        while self._to_replay and (now or self._to_replay[0][0] <= moment):
            self._ask("r", self._to_replay.popleft()[1])

    def _ask(self, mark: str, job_id: UUID) -> None:
        with contextlib.suppress(NotFound, Conflict, PmqdError):
            if mark == "r" and (self._store.show_job(job_id) or {}).get("status") != "failed":
                return  # a waiting job would only be hurried: not a new life
            self._log.note(mark, [job_id])
            (self._store.cancel_job if mark == "c" else self._store.retry_job)(job_id)
            self._log.note(mark.upper(), [job_id])


class Backlog:
    """How many jobs are ready, looked at four times a second; while PostgreSQL is away, what was seen last holds."""

    def __init__(self, dsn: str, schema: str) -> None:
        """Takes the direct address, so that no cut wire makes it blind, and pmqd's schema."""
        self._dsn = dsn
        self._statement = sql.SQL(
            "select count(*) from (select from {} where ready and run_at <= now() limit %s) r"
        ).format(sql.Identifier(schema, "jobs"))
        self._connection: psycopg.Connection[Any] | None = None
        self._seen = 0
        self._look_at = 0.0

    def full(self, now: float) -> bool:
        """Whether enough is waiting (now: monotonic seconds)."""
        if now >= self._look_at:
            self._look()
            self._look_at = time.monotonic() + _LOOK_SECONDS
        return self._seen >= BACKLOG

    def close(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _look(self) -> None:
        try:
            if self._connection is None or self._connection.closed:
                self._connection = psycopg.connect(
                    self._dsn, autocommit=True, connect_timeout=2, options="-c statement_timeout=2000"
                )
            row = self._connection.execute(self._statement, [BACKLOG]).fetchone()
            self._seen = row[0] if row else 0
        except psycopg.Error:
            self.close()


def _watch(stop: threading.Event) -> None:
    """The end of the input is the word to stop: it comes too when the coordinator is gone."""
    while os.read(
        sys.stdin.fileno(), 1024
    ):  # not through its buffer, whose lock would hold up the interpreter's end
        pass
    stop.set()


def main() -> None:
    """One producer process, started by `run_producers`."""
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    stop = threading.Event()
    threading.Thread(target=_watch, args=[stop], daemon=True).start()
    random = Random(f"producer {order.seed} {order.number}")  # noqa: S311 - a schedule, no secret
    log = ProducerLog(Path(order.history), order.number)
    ways = Ways(log, random, order.dsn_wire, order.schema, (order.redis_wire, order.prefix))
    try:
        Producer(order, ways, log, random, stop).run()
    finally:
        ways.close()
        log.close()


if __name__ == "__main__":
    main()
