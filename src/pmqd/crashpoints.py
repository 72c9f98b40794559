"""The named crash points: places between two steps where a test makes a process die; nothing in production."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pmqd.errors import ConfigError

Checkpoint = Callable[[str], None]

POINTS: Final[dict[str, str]] = {
    # worker, in the order of a job's road
    "worker.popped": "hints are out of Redis, their jobs not claimed",
    "worker.claiming": "the claim's token stands in the arena, the claim is not sent",
    "worker.claimed": "the claim is committed, its jobs are nobody's inside the worker yet",
    "worker.handed_over": "claimed jobs lie on the desk, those with a place are on their way to it",
    "worker.started": "the job's entry stands in the arena, user code has not begun",
    "worker.finished": "user code has ended, its outcome is known to this process alone",
    "worker.noted": "the outcome stands in the arena, the job's entry too",
    "worker.settling": "outcomes are about to be sent",
    "worker.settled": "outcomes are committed and not counted",
    "worker.counting": "what is to be counted stands in the arena, the metric files are as before",
    "worker.counted": "outcomes are counted, their notes not released",
    "worker.telling": "outcomes are settled and counted, the live status says something older",
    "worker.committing": "`job.settling()`: the settle is noted as doubtful, the handler's transaction is not committed",
    "worker.committed": "`job.settling()`: the handler's transaction is committed, the handler has not returned",
    "worker.draining": "told to drain: popped hints are back in Redis, unstarted jobs are still claimed",
    "worker.released": "drain: unstarted jobs are off the desk, their release is not sent",
    "worker.saved": "settles that PostgreSQL could not take stand in a file",
    "worker.drained": "all is settled or saved, the connections are open",
    # maintenance
    "maintenance.registered": "the instance stands in PostgreSQL, the migrator is not told",
    "maintenance.beaten": "the lease is renewed in PostgreSQL, the arena is not told",
    "maintenance.renamed": "the new identity stands in PostgreSQL, the arena has the old one",
    "maintenance.settled": "outcomes of the dead are settled and not counted",
    "maintenance.rescued": "a claim's jobs are given back and not counted",
    "maintenance.counting": "what is to be counted stands in the arena, the metric files are as before",
    "maintenance.counted": "counted; the claim is not closed, the file not removed, the notes not released",
    "maintenance.buried": "all of a dead worker is given back, its slot not free",
    "maintenance.leaving": "a clean stop: everything is given back, the lease not ended",
    # retention
    "retention.made": "a month is built aside and not attached",
    "retention.attached": "a month is attached",
    "retention.retiring": "a month is over and nothing of it moved",
    "retention.retired": "a month is dropped",
    "retention.cleaned": "a batch of the default partition is deleted",
    # a replay of failed jobs
    "replay.replayed": "a batch of failed jobs has a new life, the next one has not",
    # migrator
    "migrator.led": "the new term stands in PostgreSQL, its leader does not listen yet",
    "migrator.epoch": "the new epoch stands in PostgreSQL, Redis has the old one or none",
    "migrator.marked": "rows are marked, their hints not pushed",
    "migrator.pushed": "hints are pushed",
    "migrator.bound": "Redis has a new epoch and no hints, nothing is offered again yet",
    "migrator.reoffered": "some of the missing hints are offered again",
    # master
    "master.reloading": "the new configuration is valid, its first children are not started",
    "master.switched": "the new generation is in force, nobody of the old one was told",
    "master.draining": "the children were told to stop, none has",
}
"""All of them, with what is so at that moment. A test compares this with the calls in the source."""


def checkpoint(name: str) -> None:
    """One crash point is passed.

    `PMQD_CRASHPOINT="name=kill"` (or `stop`, `exit`; several with commas) acts here; with `name=kill@FILE` only when FILE
    exists, which is taken away by the one process that acts on it.
    """
    points = _crash_points()
    if points and name in points:
        _crash(*points[name])


def bound_checkpoint() -> Checkpoint:
    """What the hot path calls instead: `checkpoint` where the variable is set, else something that does nothing at all."""
    return checkpoint if _crash_points() else pass_by


def pass_by(_name: str, /) -> None:
    """A checkpoint where nobody wants a crash."""


@functools.cache
def _crash_points() -> dict[str, tuple[str, str]]:
    points = {}
    for point in filter(None, os.environ.get("PMQD_CRASHPOINT", "").split(",")):
        name, _, action = point.partition("=")
        how, _, flag = action.partition("@")
        if how not in ("kill", "stop", "exit"):
            raise ConfigError(f"PMQD_CRASHPOINT: {point!r} is not name=kill, name=stop or name=exit")
        points[name.strip()] = how, flag
    return points


def _crash(how: str, flag: str) -> None:
    if flag:
        try:
            Path(flag).unlink()  # one process wins
        except FileNotFoundError:
            return
    if how == "exit":
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
