"""Faults of processes: killed, or stopped for a while, one, many, or a whole host."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pmqd.chaos.faults import (
    Action,
    Area,
    Held,
    Kind,
    Missed,
    Scene,
    always,
    held_by,
    logged,
    never,
    open_jobs,
    slot_of,
    wait_until,
)
from pmqd.chaos.machine import state_of

if TYPE_CHECKING:
    from pmqd.chaos.family import Host
    from pmqd.chaos.world import World

LEASE_TICKS: Final = 32
"""After so many ticks without a renewal an instance's jobs are taken over."""
LONGEST_PAUSE_SECONDS: Final = 120.0
KNOWN_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 2.0
"""How long a fault waits for somebody to hold jobs."""
LOOKS: Final = 5


def freeze(pid: int) -> None:
    """SIGSTOP, and waits until it has stopped: then nothing of it changes any more.

    Raises:
        Missed: it died first.
    """
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError as error:
        raise Missed("the process was gone") from error
    wait_until(lambda: state_of(pid) in "TtZX", 1.0, 0.001)


def thaw(pid: int) -> None:
    """SIGCONT; to one that is gone it does nothing."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def slay(pid: int) -> None:
    """SIGKILL; to one that is gone it does nothing."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def busy_host(scene: Scene) -> tuple[Host, Held]:
    """A host that holds jobs, as soon as there is one; after a while any, with what it holds then."""
    host = scene.host()
    until = time.monotonic() + LOOK_SECONDS
    while not (held := held_by(scene, host)).ids and time.monotonic() < until:
        time.sleep(0.01)
        host = scene.host()
    return host, held


def paused_host(scene: Scene) -> tuple[Host, Held]:
    """A host that holds jobs, stopped before it was looked at; it goes on when the fault is healed, if it lives then."""
    for left in reversed(range(LOOKS)):
        host, _ = busy_host(scene)
        host.pause()
        held = held_by(scene, host)
        if held.ids or not left:
            scene.undo.callback(host.resume)
            return host, held
        host.resume()
    raise AssertionError("unreachable: the last look returns")


def busy_worker(scene: Scene, host: Host) -> tuple[int, Held, int]:
    """A worker of this host, stopped, that holds jobs, as soon as there is one; what it holds, what it has begun.

    It is stopped before it is looked at, so that what was seen is what the fault hits.

    Raises:
        Missed: the host has no worker.
    """
    until = time.monotonic() + LOOK_SECONDS
    while True:
        pids = host.pids("worker")
        scene.random.shuffle(pids)
        last = time.monotonic() > until
        for pid in pids:
            freeze(pid)
            slot = slot_of(pid)
            held = Held(time.time()) if slot is None else held_by(scene, host, slot)
            begun = open_jobs(scene.world.folder, pid)
            if held.ids or begun or last:
                scene.undo.callback(thaw, pid)
                return pid, held, begun
            thaw(pid)
        if last:
            raise Missed(f"host {host.name} has no worker")
        time.sleep(0.01)


def kill_worker(scene: Scene) -> Action:
    """One worker, with what it holds."""
    host = scene.host()
    pid, held, begun = busy_worker(scene, host)
    slay(pid)
    return Action(
        f"host {host.name}, worker {pid}",
        f"it held {len(held.ids)} jobs, {begun} of them begun",
        always if held.ids or begun else never,
        pids=(pid,),
        watch=held.watch(),
    )


def kill_workers(scene: Scene) -> Action:
    """All workers of a host at once."""
    host, _ = busy_host(scene)
    pids = host.pids("worker")
    for pid in pids:
        freeze(pid)
        scene.undo.callback(thaw, pid)
    held = held_by(scene, host)
    begun = sum(open_jobs(scene.world.folder, pid) for pid in pids)
    for pid in pids:
        slay(pid)
    return Action(
        f"host {host.name}, workers {pids}",
        f"they held {len(held.ids)} jobs, {begun} of them begun",
        always if pids and (held.ids or begun) else never,
        pids=tuple(pids),
        watch=held.watch(),
    )


def leading_migrator(scene: Scene) -> tuple[Host, int]:
    """The migrator that leads, and its host.

    Raises:
        Missed: none does at the moment, as far as can be seen.
    """
    rows = scene.eyes.ask("select holder from {schema}.leader")
    holder = str(rows[0][0] or "") if rows else ""
    for host in scene.hosts():
        for pid in host.pids("migrator"):
            if holder.endswith(f":{pid}"):
                return host, pid
    raise Missed(f"no migrator of ours leads ({holder or 'unknown'})")


def ticking_maintenance(scene: Scene) -> tuple[Host, int]:
    """The maintenance that makes the ticks, and its host.

    Raises:
        Missed: none does at the moment, as far as can be seen.
    """
    rows = scene.eyes.ask("select i.pid from {schema}.ticker t join {schema}.instances i on i.id = t.holder")
    for host in scene.hosts():
        if rows and host.master_pid == rows[0][0]:
            for pid in host.pids("maintenance"):
                return host, pid
    raise Missed("no maintenance of ours makes the ticks")


def some_maintenance(scene: Scene) -> tuple[Host, int]:
    """The maintenance that makes the ticks, or, as often, another one: then its instance's lease grows old.

    Raises:
        Missed: there is none.
    """
    host, pid = ticking_maintenance(scene)
    others = [
        (other, each) for other in scene.hosts() if other is not host for each in other.pids("maintenance")
    ]
    return scene.random.choice(others) if others and scene.random.random() < 0.5 else (host, pid)


def some_web(scene: Scene) -> tuple[Host, int]:
    """Some web child.

    Raises:
        Missed: there is none.
    """
    host = scene.host()
    for pid in host.pids("web"):
        return host, pid
    raise Missed(f"host {host.name} has no web child")


Find = Callable[[Scene], tuple["Host", int]]
_SERVICES: Final[dict[str, tuple[Find, str]]] = {
    "migrator": (leading_migrator, "it led"),
    "maintenance": (some_maintenance, "it kept its instance's lease"),
    "web": (some_web, "it was there"),
}


def _kill_service(scene: Scene, kind: str) -> Action:
    find, window = _SERVICES[kind]
    host, pid = find(scene)
    slay(pid)
    return Action(f"host {host.name}, {kind} {pid}", window, always, pids=(pid,))


def _freeze_service(scene: Scene, kind: str) -> Action:
    find, window = _SERVICES[kind]
    host, pid = find(scene)
    scene.undo.callback(thaw, pid)
    freeze(pid)
    return Action(
        f"host {host.name}, {kind} {pid}",
        window,
        always,
        scene.between(0.5, 4.0),
        pids=(pid,),
        stopped=True,
    )


def freeze_worker(scene: Scene) -> Action:
    """One worker stands still, shorter than anybody would take it for hung."""
    host = scene.host()
    pid, held, begun = busy_worker(scene, host)
    return Action(
        f"host {host.name}, worker {pid}",
        f"it held {len(held.ids)} jobs, {begun} of them begun",
        always if held.ids or begun else never,
        scene.between(0.3, 4.0),
        pids=(pid,),
        stopped=True,
    )


def family_of(host: Host) -> tuple[int, ...]:
    """All processes of a host."""
    kinds = ("master", "worker", "migrator", "maintenance", "web")
    return tuple(pid for kind in kinds for pid in host.pids(kind))


def freeze_host(scene: Scene) -> Action:
    """A whole host stands still, shorter than its lease."""
    host, held = paused_host(scene)
    return Action(
        f"host {host.name}",
        f"it held {len(held.ids)} jobs",
        always if held.ids else never,
        scene.between(0.5, 5.0),
        pids=family_of(host),
        stopped=True,
    )


def outlive_lease(scene: Scene) -> Action:
    """A whole host stands still for longer than its lease; others take its jobs over while it cannot know."""
    host, held = paused_host(scene)
    scene.away.add(host.name)
    scene.undo.callback(_wake, scene, host, logged(host, ("was lost; going on as instance",)))
    taken = functools.partial(_taken_over, scene, host.master_pid)
    return Action(
        f"host {host.name}",
        f"it held {len(held.ids)} jobs, and its lease ran out",
        lambda: bool(held.ids) and taken(),
        over=taken,
        patience=LONGEST_PAUSE_SECONDS,
        pids=family_of(host),
        stopped=True,
        watch=held.watch(),
    )


def _wake(scene: Scene, host: Host, knows: Callable[[], bool]) -> None:
    """It goes on, and is left alone until it has seen that its lease is lost: that is what this fault is about."""
    host.resume()
    wait_until(knows, KNOWN_SECONDS)
    scene.away.discard(host.name)


def lose_host(scene: Scene) -> Action:
    """A whole host dies and stays away until another took over what it held."""
    host, held = paused_host(scene)
    scene.take_away(host)
    pids, taken = family_of(host), functools.partial(_taken_over, scene, host.master_pid)
    scene.undo.callback(host.start)
    host.kill()
    return Action(
        f"host {host.name}",
        f"it held {len(held.ids)} jobs, and did not come back before its lease ran out",
        lambda: bool(held.ids) and taken(),
        over=taken,
        patience=LONGEST_PAUSE_SECONDS,
        pids=pids,
        watch=held.watch(),
    )


def _taken_over(scene: Scene, master: int) -> bool:
    """Whether nothing is left of an instance: its claims are given back, and it is forgotten."""
    rows = scene.eyes.ask(
        "select count(*) from {schema}.instances i"
        " where i.pid = %(pid)s and exists (select from {schema}.claims c where c.instance_id = i.id)"
        " or i.pid = %(pid)s and i.lease_tick > (select t.tick from {schema}.ticker t) - 30",
        {"pid": master},
    )
    return rows is not None and rows[0][0] == 0


def kill_host(scene: Scene) -> Action:
    """SIGKILL to a master; all its children follow. Then it is started again."""
    host, held = paused_host(scene)
    pids = family_of(host)
    scene.undo.callback(host.start)
    host.kill()
    return Action(
        f"host {host.name}",
        f"it held {len(held.ids)} jobs",
        always if held.ids else never,
        scene.between(0.0, 2.0),
        pids=pids,
        watch=held.watch(),
    )


def kill_hosts(scene: Scene) -> Action:
    """Every master at once: for a while nobody is there. A host that another fault keeps away is waited for."""
    wait_until(
        lambda: not scene.away and all(host.alive for host in scene.world.hosts), LONGEST_PAUSE_SECONDS
    )
    first, held = paused_host(scene)
    living, ids = scene.hosts(), held.ids
    pids = tuple(pid for host in living for pid in family_of(host))
    for host in living:
        ids += held_by(scene, host).ids if host is not first else ()
        scene.undo.callback(host.start)
    for host in living:
        host.kill()
    return Action(
        ", ".join(f"host {host.name}" for host in living),
        f"they held {len(ids)} jobs",
        always if ids and len(living) == len(scene.world.hosts) else never,
        scene.between(0.0, 1.5),
        pids=pids,
        watch=Held(held.at, ids).watch(),
    )


def _needs_two(world: World) -> str | None:
    return None if len(world.hosts) > 1 else "one host alone: nobody is there to take over"


_kind = functools.partial(Kind, area=Area.PROCESSES)

KINDS: Final = (
    _kind("worker_kill", begin=kill_worker, weight=4.0),
    _kind("worker_kill_all", begin=kill_workers, weight=2.0),
    _kind("migrator_kill", begin=functools.partial(_kill_service, kind="migrator"), weight=2.0),
    _kind("maintenance_kill", begin=functools.partial(_kill_service, kind="maintenance"), weight=2.0),
    _kind("web_kill", begin=functools.partial(_kill_service, kind="web"), weight=0.5),
    _kind("host_kill", begin=kill_host, weight=1.5),
    _kind("host_kill_all", begin=kill_hosts, weight=1.0),
    Kind("host_lost", Area.ABSENCE, lose_host, weight=0.1, long=True, impossible=_needs_two),
    _kind("worker_freeze", begin=freeze_worker, weight=2.0),
    _kind("migrator_freeze", begin=functools.partial(_freeze_service, kind="migrator"), weight=1.5),
    _kind("maintenance_freeze", begin=functools.partial(_freeze_service, kind="maintenance"), weight=1.5),
    _kind("host_freeze", begin=freeze_host, weight=1.0),
    Kind("host_outlives_lease", Area.ABSENCE, outlive_lease, weight=0.1, long=True, impossible=_needs_two),
)
