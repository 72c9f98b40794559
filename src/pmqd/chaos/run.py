"""One run: load and faults, heal, drain, scrape, stop, check. Each phase ends by what it waits for, or by its deadline."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import redis
from psycopg import Connection, sql

from pmqd.chaos import checker, history, producer
from pmqd.chaos.conditions import Condition, conditions
from pmqd.chaos.family import Host
from pmqd.chaos.machine import facts
from pmqd.chaos.nemesis import FaultRecord, Nemesis
from pmqd.chaos.plan import Plan
from pmqd.chaos.progress import Line, Tally
from pmqd.chaos.world import PRODUCERS, World, open_world
from pmqd.errors import PmqdError
from pmqd.signals import heard

READY_SECONDS = 60.0
DRAIN_SECONDS = 60.0
MUTANT_DRAIN_SECONDS = 15.0  # what is stuck then is stuck for good, and to see that is the point
LONGEST_RETRY_SECONDS = 60.0
LONGEST_DRAIN_SECONDS = 1800.0
QUIET_SECONDS = 5.0
STOP_SECONDS = 40.0

_LOOK_SECONDS = 0.25
_LEAST_RATE = 150.0  # jobs per second that the slowest machine under faults must reach
_SECONDS_A_FAULT = 8.0
_PATIENCE_SECONDS = 180.0

_OPEN = (
    "select count(*), coalesce(extract(epoch from max(run_at) - now()), 0)::float8"
    " from {}.jobs where status not in ('completed', 'failed', 'cancelled')"
)


class Stopped(Exception):  # noqa: N818 - a wish, not an error
    """Somebody pressed Ctrl-C."""


@dataclass
class Outcome:
    """What came out.

    Attributes:
        plan: what was to be done.
        report: what the checker found; None if the run did not come so far.
        records: the faults.
        unmet: kinds of faults that were planned and never hit their window.
        refused: kinds of faults that cannot be done here, and why.
        conditions: interesting states, and whether they were ever seen.
        complaints: what went wrong outside the jobs: a host that did not stop, a process left, an error of the run itself.
        seconds: of each phase.
        facts: the machine and the servers.
    """

    plan: Plan
    report: "checker.Report | None" = None
    records: list[FaultRecord] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def unseen(self) -> list[str]:
        """Conditions that the faults imply, and that never came about."""
        return [each.name for each in self.conditions if each.expected and not each.seen]

    @property
    def exit_code(self) -> int:
        """0 held, 1 something broke, 2 proved nothing."""
        if self.complaints or (self.report is not None and not self.report.held):
            return 1
        return 2 if self.report is None or self.unmet or self.unseen else 0


class Stopping:
    """SIGINT, SIGTERM and SIGHUP as an event; the second one ends the process's patience, too."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def ask(self, *_: object) -> None:
        """The signal handler."""
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()

    def check(self) -> None:
        """Raise if somebody has asked."""
        if self.event.is_set():
            raise Stopped


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """For the block: signals that end a process are a wish to end the run in order."""
    wish = Stopping()
    with heard(wish.ask):
        yield wish


def run(plan: Plan, wish: Stopping) -> Outcome:
    """All phases, on servers and hosts that are there for this run only.

    Raises:
        Stopped: somebody asked to end it.
        PmqdError: a server or a host does not start.
    """
    outcome = Outcome(plan, facts=dict(facts()))
    with _timed(outcome, "all"), open_world(plan) as world:
        outcome.complaints = world.complaints
        outcome.facts |= _versions(world)
        nemesis = Nemesis(world, plan, plan.folder / "history" / "nemesis")
        outcome.records, outcome.refused = nemesis.records, dict(nemesis.refused)
        tally = Tally(plan.folder / "history")
        with Line(tally, plan.jobs, plan.faults, lambda: len(nemesis.records)) as line:
            _Run(plan, world, nemesis, line, tally, wish, outcome).play()
        if outcome.exit_code:
            world.dump()
    return outcome


@dataclass
class _Run:
    """What the phases share."""

    plan: Plan
    world: World
    nemesis: Nemesis
    line: Line
    tally: Tally
    wish: Stopping
    outcome: Outcome

    def play(self) -> None:
        """The phases in their order."""
        metrics: list[str] = []
        for name, act in (
            ("start", self._start),
            ("load", self._load),
            ("heal", self._heal),
            ("drain", self._drain),
            ("scrape", lambda: metrics.extend(self._scrape())),
            ("stop", self._stop),
            ("check", lambda: self._check(metrics)),
        ):
            self.line.phase(name)
            with _timed(self.outcome, name):
                act()

    def _start(self) -> None:
        hosts = self.world.hosts
        for host in hosts:
            host.start()
        if away := self._not_ready():
            raise PmqdError(f"not ready within {READY_SECONDS:g} s: {away}")

    def _load(self) -> None:
        """Producers and nemesis, each in a thread of its own, until both have done what they were to do."""
        plan, stop = self.plan, threading.Event()
        deadline = plan.jobs / _LEAST_RATE + plan.faults * _SECONDS_A_FAULT + _PATIENCE_SECONDS
        threads = [
            _Thread("producers", lambda: self._produce(stop)),
            _Thread("nemesis", lambda: self.nemesis.run(self._progress, stop)),
        ]
        try:
            if not self._wait(lambda: not any(thread.is_alive() for thread in threads), deadline):
                self.world.complaints.append(f"the load did not end within {deadline:.0f} s")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        for thread in threads:
            if thread.error is not None:
                raise PmqdError(
                    f"{thread.name}: {type(thread.error).__name__}: {thread.error}"
                ) from thread.error

    def _produce(self, stop: threading.Event) -> None:
        world = self.world
        producer.run_producers(
            self.plan,
            folder=world.folder,
            dsn_wire=world.dsn_of(PRODUCERS),
            dsn_direct=world.dsn,
            redis_wire=world.redis_url_of(PRODUCERS),
            schema=world.schema,
            prefix=world.prefix,
            stop=stop,
        )

    def _progress(self) -> float:
        return min(1.0, self.tally.acknowledged / self.plan.jobs)

    def _heal(self) -> None:
        self.world.heal()
        if away := self._not_ready():
            self.world.complaints.append(f"healed, and not ready within {READY_SECONDS:g} s: {away}")

    def _not_ready(self) -> str:
        """Wait until every host is ready or one has ended; what those say that are not."""
        hosts = self.world.hosts
        self._wait(
            lambda: all(host.is_ready() for host in hosts) or not all(host.alive for host in hosts),
            READY_SECONDS,
        )
        return " | ".join(host.log_end() for host in hosts if not host.is_ready())

    def _drain(self) -> None:
        """Until every job is terminal, or none has become so for long. What is left is the checker's: stuck, leftovers."""
        still = Standstill(MUTANT_DRAIN_SECONDS if self.plan.mutant else DRAIN_SECONDS)
        with self.world.connect() as connection, self.world.redis_client() as client:
            self._wait(lambda: still.over(*self._left(connection), time.monotonic()), LONGEST_DRAIN_SECONDS)
            history.drained(self.world.folder / "history", connection)
            self._wait(lambda: not _hints(client, self.world.prefix), QUIET_SECONDS)

    def _left(self, connection: Connection[Any]) -> tuple[int, float]:
        """How many jobs are not terminal, and in how many seconds the last of them is due."""
        query = sql.SQL(_OPEN).format(sql.Identifier(self.world.schema))
        row = connection.execute(query).fetchone()
        assert row is not None
        self.tally.left = int(row[0])
        return self.tally.left, float(row[1])

    def _scrape(self) -> list[str]:
        """The last page of each host, once its counters stand still, and what its dead lives had counted."""
        found = []
        for host in self.world.hosts:
            found += [*host.last_metrics(), self._last_page(host)]
        self.outcome.conditions = conditions(
            self.outcome.records, found, [host.log_path for host in self.world.hosts]
        )
        return found

    def _last_page(self, host: Host) -> str:
        pages = [""]

        def still() -> bool:
            with contextlib.suppress(OSError):
                pages.append(host.scrape())
            return len(pages) > 2 and _counters(pages[-1]) == _counters(pages[-2])

        if not self._wait(still, QUIET_SECONDS) and len(pages) == 1:
            self.world.complaints.append(f"host {host.name}: /metrics does not answer")
        return pages[-1]

    def _stop(self) -> None:
        """SIGTERM to all at once. That each leaves nothing is looked at in `Host`."""
        with ThreadPoolExecutor(len(self.world.hosts)) as pool:
            codes = list(pool.map(lambda host: host.stop(STOP_SECONDS), self.world.hosts))
        for host, code in zip(self.world.hosts, codes, strict=True):
            if code is None:
                self.world.complaints.append(
                    f"host {host.name}: not stopped {STOP_SECONDS:g} s after SIGTERM"
                )
            elif code != 0:
                self.world.complaints.append(f"host {host.name}: exit code {code} after SIGTERM")

    def _check(self, metrics: list[str]) -> None:
        world = self.world
        self.nemesis.measure()
        self.outcome.unmet = list(self.nemesis.unmet())
        self.outcome.report = checker.check(
            world.folder,
            world.dsn,
            world.schema,
            world.redis_url,
            world.prefix,
            metrics,
            own_clock=not self.plan.staging,
        )

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Until it is so, or time is up; the line goes on meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.wish.check()
            if time.monotonic() > deadline:
                return False
            self.line.show()
            self.wish.event.wait(_LOOK_SECONDS)
        self.line.show()
        return True


@dataclass
class Standstill:
    """When waiting for the last jobs is over: none is left, or none has ended for `patience` seconds."""

    patience: float
    least: int | None = None
    until: float = 0.0

    def over(self, left: int, later: float, now: float) -> bool:
        """Is it over?

        Args:
            left: jobs that have not ended.
            later: in how many seconds the last of them is due.
            now: `time.monotonic()`.
        """
        if self.least is None or left < self.least:
            self.least = left
            self.until = now + self.patience + min(LONGEST_RETRY_SECONDS, max(0.0, later))
        return left == 0 or now >= self.until


class _Thread(threading.Thread):
    """A thread whose error is kept for whoever joins it."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._act = act
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.error = error


@contextlib.contextmanager
def _timed(outcome: Outcome, phase: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        outcome.seconds[phase] = round(time.monotonic() - began, 3)


def _hints(client: "redis.Redis", prefix: str) -> int:
    lists = list(client.scan_iter(f"{prefix}queue:*", count=1000))
    return sum(int(client.llen(key)) for key in lists)


def _counters(page: str) -> list[str]:
    """The lines of counters that tell of jobs; durations and gauges move for other reasons."""
    return sorted(
        line for line in page.splitlines() if line.startswith("pmqd_") and "_total" in line.split(" ")[0]
    )


def _versions(world: World) -> dict[str, str]:
    with world.connect() as connection:
        row = connection.execute("show server_version").fetchone()
    with world.redis_client() as client:
        info: Any = client.info("server")
    return {
        "postgres": str(row[0]) if row else "",
        "redis": str(info.get("valkey_version") or info.get("redis_version")),
    }
