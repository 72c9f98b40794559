"""The schedule of a chaos run's faults, and how it is carried out."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pmqd.chaos import nemesis as nemesis_module
from pmqd.chaos.faults import TOGETHER, Action, Area, Kind, Missed, Scene, always, kinds, never
from pmqd.chaos.faults_crashes import CRASHES, LEFT_OUT
from pmqd.chaos.nemesis import (
    AT_ONCE,
    LONGEST_GAP_SECONDS,
    SHORTEST_GAP_SECONDS,
    Nemesis,
    schedule,
)
from pmqd.chaos.pace import PACE, allowed
from pmqd.chaos.plan import Plan
from pmqd.chaos.world import World
from pmqd.crashpoints import POINTS

KINDS = kinds()
BEFORE_ALL_ARE_TRUE = 20.0


def kind(
    name: str, begin: Callable[[Scene], Action], area: Area = Area.PROCESSES, *, long: bool = False
) -> Kind:
    """A kind for these tests."""
    return Kind(name, area, begin, long=long)


def world(folder: Path) -> World:
    """A world without anything in it."""
    return cast("World", SimpleNamespace(hosts=[], postgres=None, redis=None, folder=folder, wires={}))


def nemesis(folder: Path, *table: Kind, faults: int = 3, seed: int = 1) -> Nemesis:
    """A nemesis with these kinds only."""
    plan = Plan(jobs=1, faults=faults, seed=seed, folder=folder)
    return Nemesis(world(folder), plan, folder / "history" / "nemesis", {each.name: each for each in table})


def lines(folder: Path) -> list[dict[str, Any]]:
    """What the nemesis has written down."""
    return [json.loads(line) for line in (folder / "history" / "nemesis").read_text().splitlines()]


# --- the kinds


def test_there_are_enough_kinds_of_every_area() -> None:
    """The issue asks for 24 kinds; every area has some, and each is named by what it is done to."""
    assert len(KINDS) >= 24
    assert {each.area for each in KINDS.values()} == set(Area)
    subjects = {
        "worker",
        "migrator",
        "maintenance",
        "web",
        "master",
        "host",
        "redis",
        "postgres",
        "wire",
        "clock",
    }
    assert {name.split("_")[0] for name in KINDS} <= subjects


def test_every_crash_point_has_a_fault_or_a_reason() -> None:
    """A new crash point of the product gets its fault here, or a word why not."""
    assert set(CRASHES) | set(LEFT_OUT) == set(POINTS)
    assert set(CRASHES) & set(LEFT_OUT) == set()


# --- the schedule


def test_schedule_is_the_same_for_the_same_seed() -> None:
    """A run can be done again; another seed is another run."""
    assert schedule(7, 200, KINDS) == schedule(7, 200, KINDS)
    assert schedule(7, 200, KINDS) != schedule(8, 200, KINDS)


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_comes_once_before_any_comes_twice(seed: int) -> None:
    """With as many faults as kinds each comes once; with fewer none comes twice."""
    names = [due.kind for due in schedule(seed, len(KINDS), KINDS)]
    assert sorted(names) == sorted(KINDS)
    few = [due.kind for due in schedule(seed, 20, KINDS)]
    assert len(few) == len(set(few)) == 20
    assert set(KINDS) <= {due.kind for due in schedule(seed, 300, KINDS)}


def test_schedule_is_bounded_and_in_order() -> None:
    """Exactly as many as asked for, spread over the load, with gaps within their limits, long ones first."""
    planned = schedule(3, 240, KINDS)
    assert len(planned) == 240
    assert [due.at for due in planned] == sorted(due.at for due in planned)
    assert all(0 <= due.at < 1 for due in planned)
    assert all(due.at < allowed(due.number, 240, 0.6) for due in planned), (
        "the load may come so far before it"
    )
    assert all(SHORTEST_GAP_SECONDS <= due.gap <= LONGEST_GAP_SECONDS for due in planned)
    long = [due.number for due in planned if KINDS[due.kind].long]
    assert long == list(range(len(long)))
    assert len(long) == sum(each.long for each in KINDS.values()), (
        "they come once, however many faults there are"
    )


def test_heavy_kinds_come_more_often() -> None:
    """A kind's weight counts, over many faults."""
    names = [due.kind for due in schedule(1, 5000, KINDS)]
    assert names.count("worker_kill") > 2 * names.count("web_kill")


def test_no_faults_no_schedule() -> None:
    """Zero faults are a run, too."""
    assert schedule(1, 0, KINDS) == []


# --- carrying it out


def test_every_fault_acts_is_healed_and_written_down(tmp_path: Path) -> None:
    """Begin and end of each are one line, in which the processes concerned stand; what was broken is healed."""
    healed: list[int] = []

    def begin(scene: Scene) -> Action:
        scene.undo.callback(healed.append, 1)
        return Action("it", "it was there", always, seconds=0.01, pids=(4, 5), stopped=True)

    one = nemesis(tmp_path, kind("worker_x", begin), faults=3)
    one.run(lambda: 1.0, threading.Event())
    assert len(healed) == 3
    assert [record.hit for record in one.records] == [True] * 3
    assert one.unmet() == []
    written = lines(tmp_path)
    assert [line["phase"] for line in written] == ["begin", "end"] * 3
    assert all(line["fault"] == "worker_x" for line in written)
    assert all(line["detail"]["pids"] == [4, 5] and line["detail"]["stopped"] for line in written)
    assert [line["hit"] for line in written if line["phase"] == "end"] == [True] * 3


def test_missed_windows_are_tried_again_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that hits nothing is tried again a few times; a kind that never hit is unmet: the run proves nothing."""
    monkeypatch.setattr(nemesis_module, "TRIES", 3)
    tries: list[str] = []

    def late(_: Scene) -> Action:
        tries.append("late")
        return Action("it", "", always if len(tries) == 2 else never)

    def hopeless(_: Scene) -> Action:
        raise Missed("nobody there")

    one = nemesis(tmp_path, kind("worker_late", late), kind("worker_hopeless", hopeless), faults=2)
    one.run(lambda: 1.0, threading.Event())
    found = {record.kind: record for record in one.records}
    assert found["worker_late"].hit
    assert found["worker_late"].tries == 2
    assert not found["worker_hopeless"].hit
    assert found["worker_hopeless"].tries == 3
    assert found["worker_hopeless"].window == "nobody there"
    assert one.unmet() == ["worker_hopeless"]


def test_one_that_goes_wrong_is_healed_and_ends_nobody_else(tmp_path: Path) -> None:
    """Whatever happens inside a fault, what it broke is healed and the others go on."""
    healed: list[int] = []

    def wrong(scene: Scene) -> Action:
        scene.undo.callback(healed.append, 1)
        raise RuntimeError("no such thing")

    fine = kind("redis_fine", lambda _: Action("it", "", always), Area.REDIS)
    one = nemesis(tmp_path, kind("worker_wrong", wrong), fine, faults=2)
    one.run(lambda: 1.0, threading.Event())
    assert healed
    assert {record.kind: record.hit for record in one.records} == {"worker_wrong": False, "redis_fine": True}


def test_stop_heals_what_acts(tmp_path: Path) -> None:
    """A run that ends early waits for no fault, and leaves none."""
    began, stop, healed = threading.Event(), threading.Event(), threading.Event()

    def forever(scene: Scene) -> Action:
        scene.undo.callback(healed.set)
        began.set()
        return Action("it", "", always, seconds=600.0, over=never, patience=600.0)

    one = nemesis(tmp_path, kind("host_forever", forever), faults=5)
    thread = threading.Thread(target=one.run, args=(lambda: 1.0, stop))
    thread.start()
    assert began.wait(BEFORE_ALL_ARE_TRUE)
    stop.set()
    thread.join(BEFORE_ALL_ARE_TRUE)
    assert not thread.is_alive()
    assert healed.is_set()


def test_only_what_may_act_together_does(tmp_path: Path) -> None:
    """At most three faults act at once, and only of areas that do not hide each other's hits."""
    active: list[Area] = []
    seen: list[tuple[Area, ...]] = []
    lock = threading.Lock()

    def begin_in(area: Area) -> Callable[[Scene], Action]:
        def begin(scene: Scene) -> Action:
            with lock:
                active.append(area)
                seen.append(tuple(active))

            def end() -> None:
                with lock:
                    active.remove(area)

            scene.undo.callback(end)
            return Action("it", "", always, seconds=0.5)

        return begin

    table = [kind(f"worker_{area.name}", begin_in(area), area) for area in Area]
    one = nemesis(tmp_path, *table, faults=14)
    one.run(lambda: 1.0, threading.Event())
    assert len(one.records) == 14
    assert max(map(len, seen)) <= AT_ONCE
    assert any(len(each) > 1 for each in seen), "pairs find most"
    for each in seen:
        for number, area in enumerate(each):
            assert all(frozenset((area, other)) in TOGETHER for other in each[number + 1 :])


def test_faults_follow_the_load(tmp_path: Path) -> None:
    """Without load there is no fault, until it has stood still for long; then they come by time."""
    began: list[float] = []

    def begin(_: Scene) -> Action:
        began.append(time.monotonic())
        return Action("it", "", always)

    one = nemesis(tmp_path, kind("worker_x", begin), faults=2)
    done = [0.0]
    thread = threading.Thread(target=one.run, args=(lambda: done[0], threading.Event()))
    start = time.monotonic()
    thread.start()
    with contextlib.suppress(AssertionError):
        thread.join(1.0)
    assert thread.is_alive()
    assert not [at for at in began if one.schedule[0].at > 0.01 and at - start < 1.0]
    done[0] = 1.0
    assert float((tmp_path / PACE).read_text()) < 1, "the load must not be over before the faults are"
    thread.join(BEFORE_ALL_ARE_TRUE)
    assert not thread.is_alive()
    assert len(began) == 2
    assert float((tmp_path / PACE).read_text()) == 1


def test_kinds_that_cannot_be_done_here_are_not_planned(tmp_path: Path) -> None:
    """A kind says why it is impossible; on somebody's servers nothing is done that would harm others there."""
    away = Kind(
        "host_x", Area.PROCESSES, lambda _: Action("it", "", always), impossible=lambda _: "no second host"
    )
    own = Kind("redis_x", Area.REDIS, lambda _: Action("it", "", always), own_servers=True)
    one = nemesis(tmp_path, away, own, kind("worker_x", lambda _: Action("it", "", always)), faults=6)
    assert {due.kind for due in one.schedule} == {"worker_x"}
    assert one.refused == {"host_x": "no second host", "redis_x": "only on private servers"}
