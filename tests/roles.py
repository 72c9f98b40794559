"""The migrator or maintenance alone, without a master: in a thread of the test, or as a process that a test may kill.

`python -m tests.roles migrator SETTINGS` runs the process: SETTINGS are JSON, as `Settings` reads them.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import psycopg

from pmqd import maintenance, migrator
from pmqd.arena import Arena, Kind, Slot
from pmqd.config import Settings
from pmqd.job import Claimed
from pmqd.process import ChildContext, StopFlag
from pmqd.programs import dying_with_parent

Connection = psycopg.Connection[Any]
Insert = Callable[..., list[UUID]]
Serve = Callable[..., UUID]
Claim = Callable[..., list[Claimed]]
"""What the fixtures of role_fixtures.py give."""

ROOT = Path(__file__).parent.parent
MODULES: Mapping[str, ModuleType] = {"migrator": migrator, "maintenance": maintenance}


def settings_for(
    dsn: str, redis_url: str, state_dir: Path, serves: tuple[str, ...] = ("q",), **sections: Mapping[str, Any]
) -> Settings:
    """Settings of an instance with one pool of two workers that serves these queues.

    Args:
        dsn: of the database.
        redis_url: of Redis.
        state_dir: the instance's folder.
        serves: the queues that the pool serves.
        sections: further values by section, such as `redis={"item": "full"}`.
    """
    values: dict[str, Any] = {
        "state_dir": str(state_dir),
        "postgres": {"dsn": dsn},
        "redis": {"url": redis_url},
        "workers": [
            {"name": "p", "app": "tests.applications.trial:app", "queues": list(serves), "processes": 2}
        ],
    }
    for section, more in sections.items():
        values[section] = values.get(section, {}) | dict(more)
    return Settings.model_validate(values)


def arena_for(instance_id: UUID | None = None) -> Arena:
    """An arena of eight slots, as a master would have made it."""
    arena = Arena.create(slots=8, entries=4)
    arena.instance_id = instance_id or uuid4()
    arena.beat_master()
    return arena


def context_for(
    kind: str, settings: Settings, arena: Arena | None = None, previous: UUID | None = None
) -> ChildContext:
    """The context of one child of an instance; several children of one instance share its arena."""
    arena = arena or arena_for()
    slot = free_slot(arena)
    worker_id = f"test:{arena.instance_id.hex[-8:]}:w{slot.index}.1"
    slot.open(kind, worker_id)
    return ChildContext(
        settings=settings,
        arena=arena,
        slot=slot,
        worker_id=worker_id,
        kind=Kind(kind),
        pool=None,
        pool_index=-1,
        web_socket=None,
        stop=StopFlag(),
        state_dir=settings.state_dir,
        host="test",
        previous_instances=() if previous is None else (previous,),
    )


def free_slot(arena: Arena) -> Slot:
    """The first slot that nobody uses."""
    return next(slot for slot in arena.slots if not slot.live and slot.death() is None)


def worker_slot(arena: Arena, number: int = 1) -> Slot:
    """A slot opened for a worker process (which the test plays)."""
    slot = free_slot(arena)
    slot.open("worker", f"test:{arena.instance_id.hex[-8:]}:w{slot.index}.{number}", pool="p", pool_index=0)
    return slot


@dataclass
class Failure:
    """What ended a role's thread, if anything did."""

    error: BaseException | None = None


@contextlib.contextmanager
def running(context: ChildContext) -> Iterator[ChildContext]:
    """Runs the context's role in a thread; stops it at the end, and fails if it ended with an error."""
    failure, over = Failure(), threading.Event()
    thread = threading.Thread(target=_run, args=(context, failure))
    # Plays the master's heartbeat, without which maintenance lets the lease run out.
    heart = threading.Thread(target=_beat, args=(context.arena, over))
    thread.start()
    heart.start()
    try:
        yield context
    finally:
        context.stop.set()
        thread.join(20)
        over.set()
        heart.join()
        assert not thread.is_alive(), f"{context.kind} does not stop"
        context.stop.close()
        if failure.error is not None:
            raise failure.error


def _run(context: ChildContext, failure: Failure) -> None:
    try:
        MODULES[context.kind].main(context)
    except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
        failure.error = error


def _beat(arena: Arena, over: threading.Event) -> None:
    while not over.wait(0.2):
        arena.beat_master()


@contextlib.contextmanager
def process(kind: str, settings: Settings, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a role as a process of its own instance; killed at the end."""
    given = json.loads(settings.model_dump_json(by_alias=True))
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.roles", kind, json.dumps(given)],
        cwd=ROOT,
        env=os.environ | environ,
        preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prepared call, no lock taken
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def turn_until(poll: Callable[[float], float], done: Callable[[], object], timeout: float = 10.0) -> None:
    """Turns a role's rounds in the test's own thread until a condition holds."""
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(min(max(poll(time.monotonic()), 0.0), 0.01))


def main() -> None:
    """Runs one role until SIGTERM."""
    settings = Settings.model_validate(json.loads(sys.argv[2]))
    context = context_for(sys.argv[1], settings)
    context.stop.listen()
    with running(replace(context, host=f"test-{os.getpid()}")):
        context.stop.wait(3600)


if __name__ == "__main__":
    main()
