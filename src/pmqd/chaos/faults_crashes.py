"""Faults at an exact place: a process dies at a named crash point between two steps of the protocol."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pmqd.chaos.faults import Action, Area, Kind, Missed, Scene, always, never, redis_of, wait_until
from pmqd.chaos.faults_processes import busy_host, busy_worker, freeze, leading_migrator, slay, thaw
from pmqd.crashpoints import POINTS

if TYPE_CHECKING:
    from pmqd.chaos.family import Host

ARMED_SECONDS: Final = 6.0
"""How long a crash point stays armed for somebody to pass there."""
LONG_ARMED_SECONDS: Final = 12.0
GATHER_SECONDS: Final = 1.5
RELOAD_SECONDS: Final = 20.0
STOP_SECONDS: Final = 20.0

Nudge = Callable[[Scene, "Host"], None]


def _nothing(_scene: Scene, _host: Host) -> None:
    """The load alone brings somebody there."""


def _flush(scene: Scene, _host: Host) -> None:
    """Redis loses everything, so the migrator binds a new life of it."""
    with redis_of(scene) as client:
        client.flushall()


def _kill_a_worker(scene: Scene, host: Host) -> None:
    """A worker dies, so maintenance rescues what it held."""
    pid, _, _ = busy_worker(scene, host)
    slay(pid)


def _kill(_scene: Scene, host: Host, kind: str) -> None:
    """Whoever comes in its place passes there."""
    for pid in host.pids(kind):
        slay(pid)


def _lose_hints(scene: Scene, host: Host) -> None:
    """Hints vanish, and a worker's death has them looked for. Workers take a hint at once: while they stand still, hints gather."""
    with contextlib.ExitStack() as stack, redis_of(scene) as client:
        for pid in [pid for each in scene.hosts() for pid in each.pids("worker")]:
            with contextlib.suppress(Missed):
                freeze(pid)
                stack.callback(thaw, pid)

        def lost() -> bool:
            keys = list(client.scan_iter(f"{scene.world.prefix}queue:*", count=1000))
            return bool(keys) and bool(client.delete(*keys))

        wait_until(lost, GATHER_SECONDS)
    _kill_a_worker(scene, host)


def _reload(_scene: Scene, host: Host) -> None:
    host.reload()


def _stop(_scene: Scene, host: Host) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(host.master_pid, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Crash:
    """How somebody is brought to a crash point.

    Attributes:
        who: where it is armed: at any host, at the one whose migrator leads, or at all.
        nudge: what makes a process pass there, beside the load.
        seconds: how long it stays armed.
        ends_host: the host has ended afterwards, and is started again.
        own_servers: the nudge would harm what else lives there.
        weight: of its kind.
    """

    who: Literal["any", "leader", "all"] = "any"
    nudge: Nudge = _nothing
    seconds: float = ARMED_SECONDS
    ends_host: bool = False
    own_servers: bool = False
    weight: float = 0.5


_RELOAD: Final = Crash(nudge=_reload, seconds=RELOAD_SECONDS, weight=0.3)
_WORKER_DIES: Final = Crash(nudge=_kill_a_worker)

CRASHES: Final[dict[str, Crash]] = {
    "worker.popped": Crash(),
    "worker.claiming": Crash(),
    "worker.claimed": Crash(),
    "worker.handed_over": Crash(),
    "worker.started": Crash(),
    "worker.finished": Crash(),
    "worker.noted": Crash(),
    "worker.settling": Crash(),
    "worker.settled": Crash(),
    "worker.counting": Crash(),
    "worker.counted": Crash(),
    "worker.telling": Crash(seconds=LONG_ARMED_SECONDS, weight=0.3),
    "worker.committing": Crash(seconds=LONG_ARMED_SECONDS, weight=0.3),
    "worker.committed": Crash(seconds=LONG_ARMED_SECONDS, weight=0.3),
    "worker.draining": _RELOAD,
    "worker.drained": _RELOAD,
    "maintenance.registered": Crash(nudge=functools.partial(_kill, kind="maintenance")),
    "maintenance.beaten": Crash(),
    "maintenance.settled": _WORKER_DIES,
    "maintenance.rescued": _WORKER_DIES,
    "maintenance.counting": _WORKER_DIES,
    "maintenance.counted": _WORKER_DIES,
    "maintenance.buried": _WORKER_DIES,
    "maintenance.leaving": Crash(nudge=_stop, seconds=RELOAD_SECONDS, ends_host=True, weight=0.3),
    "migrator.led": Crash("all", functools.partial(_kill, kind="migrator")),
    "migrator.epoch": Crash("leader", _flush, own_servers=True),
    "migrator.bound": Crash("leader", _flush, own_servers=True),
    "migrator.marked": Crash("leader"),
    "migrator.pushed": Crash("leader"),
    "migrator.reoffered": Crash("leader", _lose_hints),
    "master.reloading": Crash(nudge=_reload, ends_host=True),
    "master.switched": Crash(nudge=_reload, seconds=RELOAD_SECONDS, ends_host=True),
    "master.draining": Crash(nudge=_stop, ends_host=True),
}
"""Points that a process is brought to while the load runs."""

_SWEPT: Final = "it takes a state that a run under load seldom has; the tests' sweep of crash points makes it"
LEFT_OUT: Final[dict[str, str]] = dict.fromkeys(
    (
        "worker.released",
        "worker.saved",
        "maintenance.renamed",
        "retention.made",
        "retention.attached",
        "retention.retiring",
        "retention.retired",
        "retention.cleaned",
        "replay.replayed",
    ),
    _SWEPT,
)
"""Points that no fault of a chaos run aims at, and why."""


def _hosts_for(scene: Scene, who: str) -> list[Host]:
    """Where to arm; the first one is nudged."""
    if who == "any":
        return [scene.host()]
    leading, _ = leading_migrator(scene)
    return (
        [leading] if who == "leader" else [leading, *(host for host in scene.hosts() if host is not leading)]
    )


def crash(scene: Scene, point: str) -> Action:
    """Arms a point and waits for the process that dies there."""
    plan = CRASHES[point]
    hosts = _hosts_for(scene, plan.who)
    host = hosts[0]
    if plan.ends_host:
        scene.undo.callback(host.start)
        scene.undo.callback(host.stop, STOP_SECONDS)
    for each in hosts:
        scene.undo.callback(each.disarm, point)
        each.arm(point)
    plan.nudge(scene, host)

    def died() -> bool:
        return not all(each.armed(point) for each in hosts)

    return Action(
        f"host {' or '.join(each.name for each in hosts)}, at {point}",
        POINTS[point],
        died,
        over=died,
        patience=plan.seconds,
    )


def stop_without_store(scene: Scene) -> Action:
    """PostgreSQL goes, then the host is told to stop: its workers save their settles, and its next life applies them."""
    server = scene.world.postgres
    assert server is not None, "only on private servers"
    host, held = busy_host(scene)
    scene.undo.callback(host.start)
    scene.undo.callback(server.start)
    scene.undo.callback(host.stop, STOP_SECONDS)
    server.kill()
    _stop(scene, host)
    return Action(
        f"PostgreSQL, then host {host.name}",
        f"it held {len(held.ids)} jobs",
        always if held.ids else never,
        over=lambda: not host.alive,
        patience=STOP_SECONDS,
        watch=held.watch(),
    )


def kind_name(point: str) -> str:
    """The kind that aims at a crash point."""
    who, _, where = point.partition(".")
    return f"{who}_crash_{where}"


KINDS: Final = (
    *(
        Kind(
            kind_name(point),
            Area.PROCESSES,
            functools.partial(crash, point=point),
            weight=plan.weight,
            own_servers=plan.own_servers,
        )
        for point, plan in CRASHES.items()
    ),
    Kind("host_stop_without_store", Area.POSTGRES, stop_without_store, weight=0.5, own_servers=True),
)
