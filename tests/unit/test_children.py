"""Decisions about children, without a process: states, causes of death, who starts and who stops."""

import itertools
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd.arena import Arena, Kind, Reason, State
from pmqd.children import SPECS, TRANSITIONS, Child, ChildSpec, ChildState, Place, classify
from pmqd.config import PoolSettings, Settings
from pmqd.reload import kinds_concerned
from pmqd.roster import Roster, moves, places_of, worker_slots, workers_of

S = ChildState


def child(state: ChildState = S.RUNNING, **more: object) -> Child:
    """A worker without a process."""
    return Child(SPECS[Kind.WORKER], Place(Kind.WORKER), Settings(), 1, state=state, **more)  # type: ignore[arg-type]


def pool(name: str, processes: int) -> PoolSettings:
    """A pool."""
    return PoolSettings(name=name, app="module:app", processes=processes)


def test_the_setter_allows_what_the_table_allows() -> None:
    """Every pair of states is either in the table, or refused."""
    for old, new in itertools.product(S, S):
        one = child(old)
        if new in TRANSITIONS[old]:
            one.set_state(new, 5.0)
            assert (one.state, one.deadline) == (new, 5.0)
        else:
            with pytest.raises(ValueError, match="does not become"):
                one.set_state(new)


@pytest.mark.parametrize(
    ("one", "code", "oom", "reason"),
    [
        (child(ready_at=1.0), -signal.SIGSEGV, False, Reason.SIGNAL),
        (child(ready_at=1.0), -signal.SIGKILL, False, Reason.SIGNAL),
        (child(ready_at=1.0), -signal.SIGKILL, True, Reason.OOM),
        (child(ready_at=1.0), 1, True, Reason.ERROR),
        (child(ready_at=1.0), 0, False, Reason.RECYCLED),
        (child(S.STARTING), 1, False, Reason.BOOT),
        (child(S.STARTING), -signal.SIGSEGV, False, Reason.BOOT),
        (child(S.STARTING), -signal.SIGKILL, True, Reason.OOM),
        (child(S.STOPPING, ready_at=1.0), 0, False, Reason.DRAINED),
        (child(S.STOPPING, ready_at=1.0, retiring=Reason.RECYCLED), 0, False, Reason.RECYCLED),
        (child(S.STOPPING, ready_at=1.0), 1, False, Reason.ERROR),
        (child(ready_at=1.0, verdict=Reason.TIMEOUT, killed=True), -signal.SIGKILL, True, Reason.TIMEOUT),
        (child(ready_at=1.0, verdict=Reason.HUNG, killed=True), -signal.SIGABRT, False, Reason.HUNG),
    ],
)
def test_why_it_died(one: Child, code: int, oom: bool, reason: Reason) -> None:
    """The master's own verdict first, then the kernel's, then how far the child had come."""
    assert classify(one, code, oom=oom) == reason


def test_what_children_run_is_read_in_and_not_run() -> None:
    """Before the first fork the master reads in the code of all children: no thread, no socket and no book comes of it."""
    program = """
import os, sys
from pmqd.children import SPECS
for spec in SPECS.values():
    spec.preload()
assert {"pmqd.store", "pmqd.broker", "pmqd.clerk", "pmqd.web", "uvicorn"} <= set(sys.modules)
assert len(os.listdir("/proc/self/task")) == 1
links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.exists(entry.path)]
assert not [link for link in links if link.startswith("socket:") or link.endswith(".db")], links
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_read_in_is_left_to_the_child() -> None:
    """A library that is missing costs the child that needs it, which says so, and not the master."""
    ChildSpec(Kind.WEB, "pmqd.no_such_module:main").preload()
    ChildSpec(Kind.WEB, lambda _: None).preload()


def test_calm_is_a_family_without_work() -> None:
    """The master may take its time only while every child is ready, in its place, and has nothing to do."""
    roster = Roster.__new__(Roster)
    arena = Arena.create(2, entries=1)
    roster.children = [child(slot=arena.slots[0]), child(slot=arena.slots[1])]
    for slot in arena.slots:
        slot.open("worker", f"host:i:w{slot.index}.1")
        assert not roster.calm
        slot.state = State.IDLE
    assert roster.calm
    for state in (State.BUSY, State.DRAINING, State.DEAD):
        arena.slots[1].state = state
        assert not roster.calm
    roster.children = [child(slot=arena.slots[0]), child(S.BACKOFF)]
    assert not roster.calm


def test_moves_by_example() -> None:
    """First start, replacement one by one, scale down, one that may not run beside another."""
    assert moves(4, 0, 0, 0, 0, overlap=True) == (4, 0)
    assert moves(2, 0, 0, 2, 0, overlap=True) == (1, 0)
    assert moves(2, 1, 0, 2, 0, overlap=True) == (0, 0)
    assert moves(2, 1, 1, 2, 0, overlap=True) == (0, 1)
    assert moves(2, 1, 1, 1, 1, overlap=True) == (1, 0)
    assert moves(1, 1, 1, 2, 0, overlap=True) == (0, 2)
    assert moves(1, 0, 0, 1, 0, overlap=False) == (0, 1)
    assert moves(1, 0, 0, 0, 1, overlap=False) == (0, 0)
    assert moves(1, 0, 0, 0, 0, overlap=False) == (1, 0)


@given(wanted=st.integers(0, 6), old=st.integers(0, 6), keep=st.integers(0, 6), late=st.integers(0, 6))
def test_moves_reach_what_is_wanted_and_keep_capacity(wanted: int, old: int, keep: int, late: int) -> None:
    """From any point, replacing ends with exactly the wanted ones, and never has fewer able to work than it must."""
    keep = min(keep, wanted)
    ready = max(0, keep - late)
    capacity = min(wanted, ready + old)
    for _ in range(30):
        starts, stops = moves(wanted, keep, ready, old, 0, overlap=True)
        keep, old = keep + starts, old - stops
        assert keep + old <= max(wanted + 1, keep - starts + old + stops)
        assert ready + old >= capacity
        ready = keep  # in the end all become ready
        capacity = min(wanted, ready + old)
    assert (keep, old) == (wanted, 0)


def test_places_of_a_configuration() -> None:
    """One of each service, each pool by its count; the first pool's changes by signal, never below one."""
    settings = Settings(workers=[pool("a", 2), pool("b", 3)])
    places = places_of(settings)
    assert [place.kind for place in places] == ["maintenance", "migrator", "worker", "worker", "web"]
    assert [place.pool_index for place in places if place.pool] == [0, 1]
    assert workers_of(places) == 5
    assert workers_of(places_of(settings, extra=1)) == 6
    assert workers_of(places_of(settings, extra=-9)) == 4
    assert worker_slots(settings) == 10
    assert worker_slots(Settings()) == 8


def test_which_changes_concern_the_services() -> None:
    """Pools alone concern maintenance, which registers them; anything else concerns all; nothing changed, workers alone."""
    old = Settings(workers=[pool("a", 2)])
    assert kinds_concerned(old, Settings(workers=[pool("a", 2)])) == {Kind.WORKER}
    assert kinds_concerned(old, Settings(workers=[pool("b", 3)])) == {Kind.WORKER, Kind.MAINTENANCE}
    assert kinds_concerned(old, Settings(workers=[pool("a", 2)], drain_seconds=1.0)) == set(Kind)
