"""A job writes what it likes over its own worker's record in shared memory: master, maintenance and all others live on.

Jobs run in a process that has the shared memory mapped, so nothing keeps them from it. Whoever reads a record takes
nothing in it for granted: a wrong word costs that worker's own jobs at most.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd import books, gauges, process
from pmqd.arena import Arena, Kind, Slot, State
from pmqd.backend import Figures, RedisFigures
from pmqd.notes import unpacked_places
from pmqd.settings import Settings
from tests.fix_daemon import MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import enqueue, job

Noise = Callable[[random.Random, int], bytes]
NOISES: dict[str, Noise] = {
    "random": lambda chance, size: chance.randbytes(size),
    "ones": lambda chance, size: b"\xff" * size,
    "large": lambda chance, size: (b"\xff" * 7 + b"\x7f") * (size // 8),
    "minimum": lambda chance, size: (b"\0" * 7 + b"\x80") * (size // 8),
    "small words": lambda chance, size: b"".join(
        chance.randrange(9).to_bytes(8, "little") for _ in range(size // 8)
    ),
    "mixed": lambda chance, size: b"".join(
        chance.choice([bytes(8), b"\xff" * 8, chance.randbytes(8), (1).to_bytes(8, "little")])
        for _ in range(size // 8)
    ),
}


@pytest.fixture
def arena() -> Arena:
    """Three slots: an honest worker, the vandal, another honest one."""
    made = Arena.create(3, entries=4)
    made.instance_id = uuid4()
    made.beat_master()
    for slot in made.slots:
        slot.open("worker", f"host:12345678:w{slot.index}.1", pool="p", pool_index=0)
        slot.state, slot.ready, slot.pid = State.BUSY, True, os.getpid()
        slot.begin(0, uuid4(), uuid4(), time.monotonic() + 60)
    return made


def spoil(arena: Arena, slot: Slot, noise: Noise, seed: int) -> None:
    """Writes over the record: all of its small parts, and pieces of the rest."""
    chance = random.Random(seed)
    start, size = slot.base * 8, slot.size(arena.entries, arena.tokens) * 8
    arena.memory[start : start + 65536] = noise(chance, 65536)
    for _ in range(20):
        at = start + 8 * chance.randrange(8192, size // 8 - 512)
        arena.memory[at : at + 4096] = noise(chance, 4096)


def look(arena: Arena, slot: Slot) -> None:
    """Reads everything that master, maintenance and the web child read of a record."""
    now = time.monotonic()
    assert isinstance(slot.state, State)
    assert isinstance(slot.kind, Kind)
    assert len(slot.pool) <= 128
    assert len(slot.worker_id) <= 128
    slot.opened_age(now)
    slot.progress_age(now)
    slot.running()
    slot.tokens()
    slot.death()
    slot.noted()
    slot.journal.pending()
    gauges.measure(Settings(), arena, Figures(), RedisFigures(), busy=gauges.BusyRatio(), now=now)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_dos_of_the_master_a_record_may_hold_anything(arena: Arena, noise: Noise) -> None:
    """Whatever the bytes: every reading ends, soon, with a value; the neighbours' records are as they were."""
    vandal, others = arena.slots[1], (arena.slots[0], arena.slots[2])
    before = [(slot.worker_id, slot.running(), slot.tokens(), slot.state) for slot in others]
    started = time.thread_time()
    for seed in range(15):
        spoil(arena, vandal, noise, seed)
        look(arena, vandal)
    assert time.thread_time() - started < 15
    assert [(slot.worker_id, slot.running(), slot.tokens(), slot.state) for slot in others] == before
    vandal.bury(-9, "signal")
    assert vandal.state == State.DEAD
    vandal.open("worker", "host:12345678:w1.2", pool="p", pool_index=0)
    assert (vandal.worker_id, vandal.running(), vandal.noted(), vandal.state) == (
        "host:12345678:w1.2",
        [],
        [],
        State.STARTING,
    )


@pytest.mark.parametrize("length", [0, 8, 16, 24, 1600, 1601, 4096])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_dos_of_the_master_a_forged_journal_writes_nowhere_else(
    tmp_path: Path, arena: Arena, noise: Noise, length: int
) -> None:
    """What it says was being counted is written into that worker's own files, within their size, or not at all."""
    for path in books.paths(tmp_path, "worker-1"):
        path.write_bytes(bytes(4096))
    changes = noise(random.Random(length), (length + 7) // 8 * 8)[:length]
    books.write_again(tmp_path, "worker-1", changes)
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {4096}
    before = [(slot.worker_id, slot.state, slot.running()) for slot in (arena.slots[0], arena.slots[2])]
    arena.slots[1].notes.release(unpacked_places(changes))
    assert [
        (slot.worker_id, slot.state, slot.running()) for slot in (arena.slots[0], arena.slots[2])
    ] == before


def test_dos_of_the_master_an_unknown_state_is_alive_and_of_no_use(arena: Arena) -> None:
    """It must not look free (two would stand there) nor dead (its jobs would be given back while they run)."""
    slot = arena.slots[1]
    for word in (7, 99, -1, 2**62):
        slot._state = word
        assert slot.state == State.DRAINING
        assert slot.live


@pytest.mark.parametrize("pid", [-1, 0, 1, -(2**62), 2**62, 2**31, 2**22 + 1])
def test_dos_of_the_master_a_forged_pid_kills_nobody(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watchers kill when the master dies comes from the records: -1 would be every process of this user."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda number, _: killed.append(number))
    monkeypatch.setattr(os, "killpg", lambda number, _: killed.append(number))
    process.kill_group(pid)
    process.kill_process(pid)
    assert [number for number in killed if number < 2 or number > 2**22] == []


def has_status(connection: psycopg.Connection[Any], job_id: UUID, status: str) -> bool:
    """Whether a job has this status."""
    return bool(job(connection, job_id)["status"] == status)


def has_left(connection: psycopg.Connection[Any], job_id: UUID, statuses: tuple[str, ...]) -> bool:
    """Whether a job has none of these."""
    return job(connection, job_id)["status"] not in statuses


def test_dos_of_the_master_by_vandals_in_a_daemon(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Real vandals, one after the other, some dying at the end: the master's pid stays, honest jobs run beside and after them."""
    running = daemon(
        {
            "timeout_grace_seconds": 0.5,
            "workers": [
                {
                    "name": "vandals",
                    "app": "tests.security.hostile_app:app",
                    "queues": ["hostile"],
                    "processes": 1,
                },
                {
                    "name": "honest",
                    "app": "tests.applications.trial:app",
                    "queues": ["trial"],
                    "processes": 1,
                },
            ],
            "queues": {"hostile": {"timeout_seconds": 2.0}},
        }
    )
    beside: list[UUID] = []
    for seed in range(2):
        vandal = enqueue(connection, "vandal", queue="hostile", seed=seed, seconds=0.5)
        beside = [enqueue(connection, "nap", seconds=0.01) for _ in range(10)]
        for job_id in beside:
            wait_until(
                partial(has_status, connection, job_id, "completed"), 30, f"the neighbour beside {seed}"
            )
        waiting = ("queued", "migrated_to_redis")
        wait_until(partial(has_left, connection, vandal, waiting), 30, "the vandal ran")
        assert "LookupError" not in str(job(connection, vandal)["last_error_message"])
    assert running.process.poll() is None, running.log[-3000:]
    [maintenance] = running.children("maintenance")
    assert maintenance.is_running()
    after = enqueue(connection, "nothing", queue="hostile")
    wait_until(
        lambda: job(connection, after)["status"] == "completed", 40, "an honest job in the vandals' pool"
    )
    assert running.get("/metrics").status_code == 200
    assert all(job(connection, job_id)["attempt_count"] == 1 for job_id in beside)
    assert "Traceback" not in "".join(
        record["message"] + record.get("error", "")
        for record in running.records
        if record["child"] == "master"
    )
    running.signal(signal.SIGTERM)
    running.process.wait(40)
