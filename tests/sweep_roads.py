"""How somebody is brought to each crash point, which store stands beside it, and which pairs of point and fault cannot hit.

Every point of `pmqd.crashpoints.POINTS` stands here; a test says so. A point that is passed in several places stands here once
for each, with a word after a slash.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.fix_servers import wait_until
from tests.sweep_rig import Rig

Bring = Callable[[Rig], None]

PROCESS_FAULTS: Final = ("kill", "exit", "stop")
"""Of the process that stands at the point: it dies by a signal, ends, or stands still for a second."""
REDIS_FAULTS: Final = ("flush", "redis_killed")
POSTGRES_FAULTS: Final = ("backends", "postgres_killed")
STORE_FAULTS: Final = (*REDIS_FAULTS, *POSTGRES_FAULTS, "reset")
"""Applied while the process stands at the point: Redis flushed; killed and started; the sessions ended; PostgreSQL killed,
and started once the process has gone on; every wire reset."""
FAULTS: Final = (*PROCESS_FAULTS, "orphan", *STORE_FAULTS)
"""`orphan`: the master is killed while the process stands at the point."""


@dataclass(frozen=True)
class Road:
    """One point.

    Attributes:
        bring: what makes a process pass there.
        stores: those to which a command was just sent there, or is about to be: "r" Redis, "p" PostgreSQL.
        ends: the whole instance ends on this road, and is started again.
        every: seconds after which `bring` is done once more, as long as nobody came.
        charged: how many jobs may be charged one attempt more if a process dies there, though no handler of theirs was seen
            to run: it had not written its first line, or had written its last one.
        where: "daemon"; or "keeper", a process of its own.
    """

    bring: Bring
    stores: str = ""
    ends: bool = False
    every: float = 1.0
    charged: int = 0
    where: str = "daemon"


def _quick(rig: Rig) -> None:
    rig.enqueue("nothing", 3)


def _slow(rig: Rig) -> None:
    rig.enqueue("nap", 2, seconds=0.15)


def _effect(rig: Rig) -> None:
    rig.enqueue("effect", 2)


def _reload(rig: Rig) -> None:
    rig.enqueue("nap", 6, seconds=0.1)
    rig.daemon.signal(signal.SIGHUP)


def _reload_idle(rig: Rig) -> None:
    rig.enqueue("nothing", 2)
    rig.daemon.signal(signal.SIGHUP)


def _drain(rig: Rig) -> None:
    rig.enqueue("nap", 6, seconds=0.1)
    rig.daemon.signal(signal.SIGTERM)


def _drain_without_postgres(rig: Rig) -> None:
    """A handler ends after PostgreSQL is gone, in a worker that is to stop."""
    [job_id] = rig.enqueue("nap", seconds=0.5)
    wait_until(lambda: rig.runs(job_id), 20, "a running job")
    rig.servers.postgres.kill()
    rig.daemon.signal(signal.SIGTERM)


def _a_worker_dies(rig: Rig) -> None:
    """With one job that runs and others that wait."""
    [job_id] = rig.enqueue("nap", seconds=0.2)
    rig.enqueue("nothing", 2)
    os.kill(wait_until(lambda: rig.runs(job_id), 20, "a running job"), signal.SIGKILL)


def _a_worker_dies_with_a_note(rig: Rig) -> None:
    """Its job is done, which nobody but the arena knows."""
    rig.arm("worker.settling")
    rig.enqueue("nothing", 2)
    if rig.how == "stop":
        worker = wait_until(rig.halted, 20, "a worker about to settle")
        assert worker is not None
        worker.kill()


def _kill(kind: str) -> Bring:
    def bring(rig: Rig) -> None:
        rig.enqueue("nothing", 2)
        for process in rig.children(kind):
            os.kill(process.pid, signal.SIGKILL)

    return bring


def _lease_runs_out(rig: Rig) -> None:
    rig.enqueue("nothing", 2)
    rig.connection.execute("update pmqd.instances set lease_tick = lease_tick - 100")


def _flush(rig: Rig) -> None:
    rig.enqueue("nothing", 2)
    rig.redis.flushall()


def _lose_hints(rig: Rig) -> None:
    """More than the workers steal before the migrator has seen that Redis lost its data."""
    rig.marked(30)
    rig.redis.flushall()


def _beside(_rig: Rig) -> None:
    """Not on a daemon's road: tests/sweep/test_sweep_keeper.py brings a process of its own there."""


_KEEPER: Final = Road(_beside, "p", where="keeper")

ROADS: Final[dict[str, Road]] = {
    "worker.popped": Road(_quick, "rp"),
    "worker.claiming": Road(_quick, "p"),
    "worker.claimed": Road(_quick, "p"),
    "worker.handed_over": Road(_quick, charged=1),  # a runner may have begun with it beside the clerk
    "worker.started": Road(_quick, charged=1),
    "worker.finished": Road(_quick, charged=1),
    "worker.noted": Road(_quick),
    "worker.settling": Road(_quick, "p"),
    "worker.settled": Road(_quick, "p"),
    "worker.counting": Road(_quick),
    "worker.counted": Road(_quick),
    "worker.telling": Road(_slow, "r"),
    "worker.committing": Road(_effect, "p"),
    "worker.committed": Road(_effect, "p"),
    "worker.draining": Road(_reload, "r", every=15),
    "worker.released": Road(_reload, "p", every=15),
    "worker.saved": Road(_drain_without_postgres, ends=True, every=60),
    "worker.drained": Road(_drain, ends=True, every=60),
    "maintenance.registered": Road(_kill("maintenance"), "p", every=5),
    "maintenance.beaten": Road(_quick, "p", every=5),
    "maintenance.renamed": Road(_lease_runs_out, "p", every=5),
    "maintenance.settled": Road(_a_worker_dies, "p", every=5),
    "maintenance.settled/note": Road(_a_worker_dies_with_a_note, "p", every=5),
    "maintenance.rescued": Road(_a_worker_dies, "p", every=5),
    "maintenance.counting": Road(_a_worker_dies, every=5),
    "maintenance.counting/note": Road(_a_worker_dies_with_a_note, every=5),
    "maintenance.counted": Road(_a_worker_dies, "p", every=5),
    "maintenance.counted/note": Road(_a_worker_dies_with_a_note, "p", every=5),
    "maintenance.buried": Road(_a_worker_dies, every=5),
    "maintenance.leaving": Road(_drain, "p", ends=True, every=60),
    "retention.made": _KEEPER,
    "retention.attached": _KEEPER,
    "retention.retiring": _KEEPER,
    "retention.retired": _KEEPER,
    "retention.cleaned": _KEEPER,
    "replay.replayed": _KEEPER,
    "migrator.led": Road(_kill("migrator"), "p", every=5),
    "migrator.epoch": Road(_flush, "rp", every=5),
    "migrator.marked": Road(_quick, "rp"),
    "migrator.pushed": Road(_quick, "r"),
    "migrator.bound": Road(_flush, "r", every=5),
    "migrator.reoffered": Road(_lose_hints, "r", every=5),
    "master.reloading": Road(_reload_idle, every=15),
    "master.switched": Road(_reload_idle, every=15),
    "master.draining": Road(_drain, ends=True, every=60),
}


def point_of(name: str) -> str:
    """The crash point that a road leads to."""
    return name.partition("/")[0]


def left_out(point: str, fault: str) -> str:
    """Why a fault cannot hit at a point; empty where it can."""
    road = ROADS[point]
    reasons = {
        "the master is that process, or its death ends what knows of no job that runs": (
            fault == "orphan" and not point.startswith("worker.")
        ),
        "it has nothing to do with Redis": road.where == "keeper" and fault in REDIS_FAULTS,
        "the master speaks to no store": point.startswith("master.") and fault in STORE_FAULTS,
        "PostgreSQL is away there already, and Redis is not spoken to": (
            point == "worker.saved" and fault in STORE_FAULTS
        ),
        "nothing was just sent to Redis there, nor is about to be": (
            fault in REDIS_FAULTS and "r" not in road.stores
        ),
        "nothing was just sent to PostgreSQL there, nor is about to be": (
            fault in POSTGRES_FAULTS and "p" not in road.stores
        ),
        "nothing is under way to a store": fault == "reset" and not road.stores,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def pairs(*faults: str, where: str = "daemon") -> list[tuple[str, str]]:
    """The pairs of point and fault that can hit, fault by fault."""
    return [
        (point, fault)
        for fault in faults
        for point, road in ROADS.items()
        if road.where == where and not left_out(point, fault)
    ]
