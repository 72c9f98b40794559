"""Sizing and order decisions of a worker."""

import pytest

from pmqd import batching
from pmqd.batching import (
    Load,
    Spread,
    ahead,
    is_flood,
    lists,
    p99,
    room,
    rotated,
    settle_wait,
    steal_pause,
    switch_seconds,
    wanted,
)


def load(
    busy: int = 0, waiting: int = 0, *, concurrency: int = 1, since: float = 0.0, held: bool = False
) -> Load:
    """A load; idle unless something else is said."""
    return Load(concurrency, busy, waiting, since, held)


def test_p99_leaves_out_one_outlier_of_a_full_window_but_not_two() -> None:
    """One slow job among fast ones does not end claiming ahead, a second one does."""
    assert p99([0.001] * 127 + [9.0]) == 0.001
    assert p99([0.001] * 126 + [9.0, 9.0]) == 9.0
    assert p99([]) == 0.0


@pytest.mark.parametrize(
    ("durations", "concurrency", "expected"),
    [
        ([], 1, 0),
        ([0.001] * 7, 1, 0),
        ([0.001] * 8, 1, 20),
        ([0.001] * 8, 4, 80),
        ([0.005] * 128, 1, 4),
        ([0.021] * 128, 1, 0),
        ([0.05] * 128, 50, 20),  # a place becomes free each millisecond
        ([30.0] * 128, 100, 0),
        ([0.0] * 128, 1, 999),
        ([0.00001] * 128, 8, 1000),
        ([0.0001] * 126 + [0.004] * 2, 1, 40),  # quick jobs, and two time slices that went elsewhere
        ([0.001] * 126 + [9.0] * 2, 1, 0),
    ],
)
def test_ahead_is_20_ms_of_work_up_to_the_cap(
    durations: list[float], concurrency: int, expected: int
) -> None:
    """Unknown and slow handlers get nothing ahead, fast ones 20 ms of work, never more than the cap."""
    assert ahead(durations, concurrency) == expected


@pytest.mark.parametrize(
    ("now", "most", "expected"),
    [
        (load(), 0, 1),  # idle: one
        (load(busy=1), 0, 0),  # slow handler: none ahead
        (load(busy=3, concurrency=8), 0, 5),  # one per free place
        (load(busy=1), 20, 20),
        (load(busy=1, waiting=11), 20, 0),  # more than half still waits
        (load(busy=1, waiting=10), 20, 10),
        (load(), 1000, 1000),  # never more than the cap
        (load(since=1.0), 20, 21),  # idle is not stalled
        (load(busy=1, since=0.03), 20, 0),  # the job that runs is slow
        (load(busy=1, waiting=5, since=0.03), 20, 0),
        (load(busy=2, concurrency=4, held=True), 20, 0),  # one waits to run alone
    ],
)
def test_wanted_fills_free_places_and_claims_ahead_in_batches(now: Load, most: int, expected: int) -> None:
    """How many jobs are claimed for a load and a room ahead."""
    assert wanted(now, most) == expected


def test_room_shrinks_to_nothing_when_a_slow_job_starts_after_the_pop() -> None:
    """Hints asked for with room for 20 that come while a slow job runs are not claimed: there is room for none."""
    asked_with = load(busy=1, waiting=0, since=0.001)
    assert wanted(asked_with, 20) == 20
    assert room(load(busy=1, waiting=0, since=0.021), 20) == 0
    assert room(load(busy=1, waiting=0, since=0.021, concurrency=4), 20) == 3
    assert (
        room(load(busy=1, waiting=15, since=0.001), 20) == 5
    )  # no batches here: what came is taken as far as it fits


def test_wanted_never_takes_more_than_may_wait() -> None:
    """After any claim, no more waits than the room ahead says."""
    for most in (0, 1, 2, 3, 20, 500):
        for concurrency in (1, 3):
            for busy in range(concurrency + 1):
                for waiting in range(most + 2):
                    count = wanted(load(busy, waiting, concurrency=concurrency), most)
                    assert 0 <= count <= batching.BATCH_CAP
                    if count:
                        assert busy + waiting + count <= concurrency + most


@pytest.mark.parametrize(
    ("age", "popping", "busy", "waiting", "expected"),
    [
        (0.0, None, 1, 0, 0.005),  # company is to be expected
        (0.006, 0.5, 1, 0, -0.001),  # never longer than 5 ms, whatever else runs
        (0.0, None, 1, 3, 0.025),  # more wait behind it, and a claim comes with the next ones
        (0.026, None, 0, 3, -0.001),  # never longer than 25 ms
        (0.0, None, 0, 0, 0.0),  # nothing runs and no claim comes: now
        (0.0, 0.0, 0, 0, 0.002),  # a claim may be about to share the commit
        (0.0, 0.5, 0, 0, -0.498),  # the pop found nothing
    ],
)
def test_settle_wait_is_at_most_5_ms_or_25_in_a_flood(
    age: float, popping: float | None, busy: int, waiting: int, expected: float
) -> None:
    """When the settle of a finished job is sent."""
    assert settle_wait(age, popping, load(busy, waiting)) == pytest.approx(expected)


def test_a_flood_is_many_jobs_and_not_slow_ones() -> None:
    """Nothing waits, what waits is urgent itself, must run alone, or waits behind slow jobs: no flood."""
    flood = load(1, 200)
    assert is_flood(flood)
    others = (
        load(1, 0),
        Load(1, 1, 200, 0.0, urgent=True),
        load(1, 200, held=True),
        load(1, 200, since=0.03),
    )
    assert not any(map(is_flood, others))
    assert switch_seconds(flood, 500) == batching.FLOOD_SWITCH_SECONDS
    assert switch_seconds(flood, 20) == switch_seconds(load(1, 0), 500) == batching.SWITCH_SECONDS


@pytest.mark.parametrize(
    ("claimed", "already", "deep"),
    [
        (0, False, False),
        (199, False, False),
        (200, False, True),
        (1000, True, True),
        (50, True, True),
        (49, True, False),
    ],
)
def test_hundreds_of_jobs_at_once_are_a_deep_queue(claimed: int, already: bool, deep: bool) -> None:
    """Then the next ones are claimed straight from PostgreSQL, until few are left there."""
    assert batching.is_deep(claimed, already=already) is deep


def test_lists_follow_the_order_of_the_pool() -> None:
    """With "bands" a high job of any queue goes before a normal one, with "queues" the first queue before the second."""
    assert lists(["a", "b"], "bands") == [
        ("a", "high"), ("b", "high"), ("a", "normal"), ("b", "normal"), ("a", "low"), ("b", "low"),
    ]  # fmt: skip
    assert lists(["a", "b"], "queues") == [
        ("a", "high"), ("a", "normal"), ("a", "low"), ("b", "high"), ("b", "normal"), ("b", "low"),
    ]  # fmt: skip


def test_every_sixteenth_pop_begins_elsewhere_and_each_list_has_its_turn() -> None:
    """15 of 16 pops keep the order; the others begin at each list in turn, so nothing starves for ever."""
    keys = ["a", "b", "c"]
    pops = [tuple(rotated(keys, number)) for number in range(16 * 6)]
    assert sum(pop == ("a", "b", "c") for pop in pops) >= len(pops) * 15 // 16
    assert {pop[0] for pop in pops} == {"a", "b", "c"}
    assert all(sorted(pop) == keys for pop in pops)
    assert rotated([], 16) == []


def test_pauses_grow_to_their_bounds() -> None:
    """Direct mode asks at least every 0.25 s; a store that is away at most every 1.5 s and not in step."""
    assert [steal_pause(n) for n in (0, 1, 2)] == [0.01, 0.02, 0.04]
    assert steal_pause(1000) == 0.25
    assert batching.away_pause(1, 0.5) == 0.05
    assert batching.away_pause(1000, 1.0) == 1.5
    assert batching.away_pause(3, 0.0) < batching.away_pause(3, 1.0)


def test_quick_handlers_run_one_after_the_other() -> None:
    """Before anything is known, and as long as most take microseconds; a time slice that went elsewhere changes nothing."""
    spread = Spread(8)
    assert spread.places == 1
    spread.observe([2e-6] * 100 + [0.02], 0.0)
    assert spread.places == 1


@pytest.mark.parametrize(
    "durations", [[0.05], [2e-4] * 50, [2e-6] * 60 + [0.05] * 40], ids=["slow", "hardly", "mixed"]
)
def test_others_use_all_places(durations: list[float]) -> None:
    """What takes longer runs side by side, also where only some of the jobs do."""
    spread = Spread(8)
    spread.observe(durations, 0.0)
    assert spread.places == 8


def test_one_place_is_tried_again_where_taking_turns_may_be_what_was_measured() -> None:
    """After a quarter of a second side by side; not for jobs so slow that threads do not explain it."""
    spread = Spread(8)
    spread.observe([1e-3], 0.0)
    spread.observe([1e-3], 0.2)
    assert spread.places == 8
    spread.observe([1e-3], 0.3)
    assert spread.places == 1
    spread.observe([2e-6], 0.31)
    assert spread.places == 1
    spread.observe([0.05], 0.4)
    spread.observe([0.05], 9.0)
    assert spread.places == 8


def test_a_stall_doubles_the_places() -> None:
    """Jobs wait, none has been started for 2 ms: whatever was measured, more of them run side by side."""
    spread = Spread(5)
    spread.stalled(0.0019)
    assert spread.places == 1
    seen = []
    for _ in range(4):
        spread.stalled(0.0021)
        seen.append(spread.places)
    assert seen == [2, 4, 5, 5]
