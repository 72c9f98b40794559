"""Signals in the middle of the load: reloads with a good and a broken file, a drain and a new start, more workers and fewer."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from typing import Final

from pmqd.chaos.faults import Action, Area, Kind, Missed, Scene, always, logged, never
from pmqd.chaos.faults_processes import busy_host

RELOAD_SECONDS: Final = 20.0
STOP_SECONDS: Final = 15.0
BROKEN: Final = 'drain_seconds = "as long as it takes"\n'


def reload(scene: Scene) -> Action:
    """SIGHUP: a new generation takes over."""
    host, held = busy_host(scene)
    done = logged(host, ("takes over",))
    host.reload()
    return Action(
        f"host {host.name}",
        f"it held {len(held.ids)} jobs, and a new generation took over",
        done,
        over=done,
        patience=RELOAD_SECONDS,
    )


def reload_broken(scene: Scene) -> Action:
    """SIGHUP with a configuration that nobody can use: the old generation goes on. A host that still starts would not."""
    host = scene.host()
    if not host.hears():
        raise Missed(f"host {host.name} does not hear")
    good = host.config.read_text()
    scene.undo.callback(host.config.write_text, good)
    refused = logged(host, ("drain_seconds",))
    host.config.write_text(BROKEN)
    host.reload()
    return Action(f"host {host.name}", "the file was refused", refused, over=refused, patience=RELOAD_SECONDS)


def stop(scene: Scene) -> Action:
    """SIGTERM in the middle of the load, then a new start."""
    host, held = busy_host(scene)
    scene.undo.callback(host.start)
    host.stop(STOP_SECONDS)
    return Action(
        f"host {host.name}",
        f"it held {len(held.ids)} jobs",
        always if held.ids else never,
        scene.between(0.0, 1.0),
    )


def stop_in_haste(scene: Scene) -> Action:
    """SIGTERM twice: the second one stops at once, whatever runs."""
    host, held = busy_host(scene)
    scene.undo.callback(host.start)
    with contextlib.suppress(ProcessLookupError):
        os.kill(host.master_pid, signal.SIGTERM)
        os.kill(host.master_pid, signal.SIGTERM)
    host.stop(STOP_SECONDS)
    return Action(
        f"host {host.name}",
        f"it held {len(held.ids)} jobs",
        always if held.ids else never,
        scene.between(0.0, 1.0),
    )


def resize(scene: Scene) -> Action:
    """SIGTTIN, then SIGTTOU: one worker more for a while."""
    host = scene.host()
    more = logged(host, ("workers become",))

    def fewer() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.master_pid, signal.SIGTTOU)

    scene.undo.callback(fewer)
    os.kill(host.master_pid, signal.SIGTTIN)
    return Action(
        f"host {host.name}", "it got one worker more", more, scene.between(0.3, 2.0), over=more, patience=5.0
    )


_kind = functools.partial(Kind, area=Area.SIGNALS)

KINDS: Final = (
    _kind("host_reload", begin=reload, weight=1.0),
    _kind("host_reload_broken", begin=reload_broken, weight=1.0),
    _kind("host_stop", begin=stop, weight=1.5),
    _kind("host_stop_hasty", begin=stop_in_haste, weight=1.0),
    _kind("host_resize", begin=resize, weight=0.5),
)
