"""pmqd alone, part by part: `python -m benchmarks.parts [--jobs 50000] [--batch 500] [--rounds 3] [--json FILE]`.

One job's road through the product's own modules in this one process, against private servers: what each part costs per job
(wall, and CPU of this process, of the PostgreSQL backend and of Redis). What runs side by side in a daemon runs one after
the other here, so the parts are costs and not a rate.
"""

import argparse
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final
from uuid import UUID, uuid4

from benchmarks import machine, report
from benchmarks.meter import Meter
from benchmarks.peers.arena import TEXT_BYTES, Arena, private
from benchmarks.peers.field import prepare_pmqd
from benchmarks.report import Row
from pmqd import App, interrupt, metrics
from pmqd.arena import Arena as Memory
from pmqd.broker import Broker
from pmqd.desk import Desk, Item
from pmqd.executor import DEFAULT_TIMEOUT_SECONDS, Executor
from pmqd.job import BAND_RANGES, Claimed, Outcome
from pmqd.ledger import Ledger
from pmqd.registry import Task
from pmqd.retry import RetryPolicy
from pmqd.rows import IdMaker, row_of
from pmqd.rows import Row as JobRow
from pmqd.settings import PostgresSettings, RedisSettings, Settings
from pmqd.store import Best, Room, Store
from pmqd.writing import write

QUEUE: Final = "bench"
WORKER: Final = "host:12345678:w0.1"
MARK_BATCH: Final = 1000
ENQUEUE_BATCH: Final = 10_000
_POP_SECONDS: Final = 1.0


class MeteredStore(Store):
    """A store whose larger statements are measured by themselves, within whatever sends them."""

    meter: Meter

    def settle(self, outcomes: Sequence[Outcome], closed_tokens: Any) -> dict[UUID, str]:
        """As the store's."""
        with self.meter.measured("settle: in the store", len(outcomes)):
            return super().settle(outcomes, closed_tokens)

    def claim(self, wanted: Sequence[UUID] | Best, **who: Any) -> list[Claimed]:
        """As the store's."""
        with self.meter.measured("claim: in the store", _most(wanted)):
            return super().claim(wanted, **who)

    def settle_and_claim(
        self, outcomes: Sequence[Outcome], closed_tokens: Any, wanted: Sequence[UUID] | Best, **who: Any
    ) -> Any:
        """As the store's."""
        with self.meter.measured("settle and claim: in the store", _most(wanted)):
            return super().settle_and_claim(outcomes, closed_tokens, wanted, **who)


def _most(wanted: Sequence[UUID] | Best) -> int:
    return wanted.limit if isinstance(wanted, Best) else len(wanted)


class Road:
    """One producer, one migrator and one worker, as objects in this process."""

    def __init__(self, arena: Arena, batch: int) -> None:
        postgres, redis = PostgresSettings(dsn=arena.dsn), RedisSettings(url=arena.redis.url)
        self.batch = batch
        self.app = App(Settings(postgres=postgres, redis=redis))
        self.task = _task(self.app)
        self.store = MeteredStore(postgres, "worker")
        self.meter = Meter({"PostgreSQL": self._backend(), "Redis": arena.redis.pid})
        self.store.meter = self.meter
        self.broker = Broker(redis, "worker")
        self.instance_id = uuid4()
        memory = Memory.create(1, entries=8)
        self.slot = memory.slots[0]
        self.slot.open("worker", WORKER)
        self.desk = Desk(1, self.slot, lambda: None)
        self.inbox: list[Item] = []
        self.desk.dispatch = self.inbox.append
        self.executor = Executor(self.desk, self.slot, WORKER, 5.0, lambda: self.store)
        self.ledger = Ledger(
            self.store, self.desk, self.slot, WORKER, lambda: self.instance_id, lambda _: None
        )
        self.ids = IdMaker()
        self._sign_on()

    def _backend(self) -> int:
        return self.store.connection.info.backend_pid

    def _sign_on(self) -> None:
        """The lease, the lead and the epoch, without which nothing is claimed, marked or pushed."""
        self.store.register(self.instance_id, "host", 1, [QUEUE], [], {})
        self.store.sync_queues({}, [QUEUE])
        term = self.store.lead()
        assert term is not None, "nobody else leads"
        self.term, self.epoch = term, self.store.new_redis_epoch(term)
        self.store.stay_awake(term, 3600)
        self.broker.set_epoch(self.epoch)
        self.key = self.broker.queue_key(QUEUE, "normal")
        interrupt.listen()

    def close(self) -> None:
        """Ends the connections."""
        self.broker.close()
        self.store.close()

    # the parts, in their order

    def enqueue(self, jobs: int) -> None:
        """As `enqueue_many`: arguments checked, then one COPY."""
        for count in _batches(jobs, ENQUEUE_BATCH):
            arguments = [{"number": number, "text": "x" * TEXT_BYTES} for number in range(count)]
            with self.meter.measured("enqueue: check arguments, make rows", count):
                rows = self._rows(arguments)
            with self.meter.measured("enqueue: write", count):
                write(self.store.connection, "pmqd", rows)

    def _rows(self, arguments: Sequence[dict[str, Any]]) -> list[JobRow]:
        made = self.ids.make(len(arguments))
        return [
            row_of(QUEUE, self.task.name, self.task.arguments(**each), {}, new_id)
            for each, new_id in zip(arguments, made, strict=True)
        ]

    def deliver(self, jobs: int, *, full: bool) -> None:
        """As the migrator: marked in PostgreSQL, pushed to Redis."""
        suffix = " (item full)" if full else ""
        low, high = BAND_RANGES["normal"]
        for count in _batches(jobs, MARK_BATCH):
            with self.meter.measured(f"mark{suffix}", count):
                marked = self.store.mark(self.term, [Room(QUEUE, low, high, count)], full=full)
            assert len(marked) == count, f"{len(marked)} of {count} were marked"
            with self.meter.measured(f"push{suffix}", count):
                members = [each.id if each.item is None else each.item for each in marked]
                self.broker.push(self.epoch, [(self.key, members)])

    def pop(self, count: int, *, full: bool = False) -> list[UUID]:
        """As the worker's delivery."""
        with self.meter.measured("pop (item full)" if full else "pop", count):
            self.broker.pop_start([self.key], count, _POP_SECONDS)
            select.select([self.broker.pop_fileno()], [], [])
            hints = self.broker.pop_finish()
        assert len(hints) == count, f"{len(hints)} of {count} hints were popped"
        return [hint.id for hint in hints]

    def work_apart(self, jobs: int) -> None:
        """Claim, run and settle, each by itself."""
        for count in _batches(jobs, self.batch):
            ids = self.pop(count)
            with self.meter.measured("claim", count):
                claimed = self.ledger.claim(ids).claimed
            self._run(claimed)
            with self.meter.measured("settle", count):
                self.ledger.owe(self.desk.collect())
                answer = self.ledger.settle()
            assert len(answer.settled) == count, f"{len(answer.settled)} of {count} were settled"

    def work_on(self, jobs: int) -> None:
        """As a busy worker: the settle of one batch and the claim of the next in one transaction."""
        for number, count in enumerate(_batches(jobs, self.batch)):
            ids = self.pop(count, full=True)
            part = "settle and claim" if number else "claim"
            with self.meter.measured(part, count):
                self.ledger.owe(self.desk.collect())
                claimed = self.ledger.claim(ids).claimed
            self._run(claimed)
        self.ledger.owe(self.desk.collect())
        self.ledger.settle()

    def _run(self, claimed: Sequence[Claimed]) -> None:
        """As the clerk hands jobs over, and as the main thread of a worker runs them."""
        with self.meter.measured("dispatch", len(claimed)):
            received, policy = time.monotonic(), RetryPolicy()
            items = []
            for each in claimed:
                task = self.app.registry.find(each.queue_name, each.kind)
                assert task is not None, "it is known"
                items.append(Item(each, task, DEFAULT_TIMEOUT_SECONDS, policy, received, received))
            self.desk.hand_over(items)
            while self.inbox:
                following: Item | None = self.inbox.pop()
                while following is not None:
                    following = self.executor.run_in_main(following)


def _task(app: App) -> Task:
    @app.task(queue=QUEUE, name="job")
    def job(number: int, text: str) -> None:
        """Nothing."""

    return job


def _batches(jobs: int, size: int) -> Iterator[int]:
    for first in range(0, jobs, size):
        yield min(size, jobs - first)


def measure(jobs: int, batch: int) -> Meter:
    """All parts once, on servers of their own; a tenth of the jobs goes ahead uncounted."""
    with private(1) as arena:
        prepare_pmqd(arena)
        with _counting(arena), closing(Road(arena, batch)) as road:
            with road.meter.warming():
                _go(road, arena, max(batch, jobs // 10))
            _go(road, arena, jobs)
        return road.meter


def _go(road: Road, arena: Arena, jobs: int) -> None:
    for full in (False, True):
        road.enqueue(jobs)
        arena.settled()
        # A list is never longer in a daemon either.
        for count in _batches(jobs, 2 * MARK_BATCH):
            road.deliver(count, full=full)
            if full:
                road.work_on(count)
            else:
                road.work_apart(count)


@contextmanager
def _counting(arena: Arena) -> Iterator[None]:
    """With metrics, as every child has them."""
    metrics.start(arena.folder / "metrics", "worker-0")
    try:
        yield
    finally:
        metrics.stop()


def _table(rows: Sequence[Row]) -> str:
    units = list(dict.fromkeys(row.unit for row in rows))
    parts = list(dict.fromkeys(row.peer for row in rows))
    width = max(map(len, parts))
    lines = [f"{'':<{width}}" + "".join(f"{unit:>26}" for unit in units)]
    for part in parts:
        found = [
            median([row.value for row in rows if (row.peer, row.unit) == (part, unit)]) for unit in units
        ]
        lines.append(f"{part:<{width}}" + "".join(f"{value:>26.2f}" for value in found))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    number = partial(_number, parser)
    parser.add_argument(
        "--jobs", default="50000", help="how many jobs (50000), counted twice: for both forms of items"
    )
    parser.add_argument("--batch", default="500", help="jobs of one claim (500)")
    parser.add_argument("--rounds", default="3", help="how often; medians are shown (3)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args(arguments)
    jobs, batch, rounds = (
        number("--jobs", given.jobs, 10_000_000),
        number("--batch", given.batch, MARK_BATCH),
        number("--rounds", given.rounds, 1000),
    )
    print(machine.describe(peers=False), flush=True)
    rows: list[Row] = []
    for turn in range(1, rounds + 1):
        for part, spent in measure(jobs, batch).parts.items():
            rows += [Row("parts", part, turn, unit, value) for unit, value in spent.figures()]
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
        if given.json:
            report.write_json(given.json, rows)
    print(f"\n{jobs:,} jobs, claims of {batch}, medians of {rounds} rounds\n{_table(rows)}", flush=True)


def _number(parser: argparse.ArgumentParser, option: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= most):
        parser.error(f"{option} {text!r} is not allowed: a whole number from 1 to {most:,}")
    return int(text)


if __name__ == "__main__":
    main()
