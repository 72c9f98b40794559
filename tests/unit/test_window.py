"""The migrator's decisions: how much lies in Redis, how it is split into marks, when it looks again."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd.window import (
    WINDOW_CAP,
    Flow,
    Looks,
    Pace,
    Wanted,
    asks,
    busier,
    left_over,
    look_again,
    look_in,
    looked,
    observe,
    room,
    stays_awake,
    window,
)


def drained(rate: float, seconds: float, every: float, length: int = 1000) -> Flow:
    """A flow after workers have taken `rate` hints a second from a list that is kept at `length`."""
    flow, now = Flow(length=length, heard=100.0), 100.0
    while now < 100.0 + seconds:
        now += every
        flow = observe(flow, length - round(rate * every), now)
        flow = observe(flow, length, now)
    return flow


def test_window_of_an_unknown_list_is_two_hints_per_slot() -> None:
    """Before anything was measured a list holds two hints for each job slot that serves it."""
    assert [window(Flow(), slots) for slots in (0, 1, 4, 50)] == [2, 2, 8, 100]


def test_window_is_a_quarter_of_a_second_of_work_and_capped() -> None:
    """The window follows the measured drain rate and ends at the cap."""
    assert window(drained(1000, 1.0, 0.01), slots=2) == pytest.approx(250, abs=5)
    assert window(drained(50_000, 1.0, 0.01), slots=2) == WINDOW_CAP


def test_a_deep_list_holds_a_hint_for_each_slot() -> None:
    """However fast it drains: workers that claim straight from PostgreSQL pass what is marked."""
    flow = replace(drained(50_000, 1.0, 0.01), length=10)
    assert [window(flow, slots, deep=True) for slots in (0, 50, 9000)] == [1, 50, WINDOW_CAP]
    assert room(flow, 50, deep=True) == 40


def test_slow_jobs_keep_a_handful_in_redis() -> None:
    """A queue whose jobs take seconds holds no more than two hints per slot, however large its backlog."""
    assert window(drained(0.5, 20.0, 2.0, length=4), slots=2) == 4


def test_a_list_is_refilled_below_half() -> None:
    """No room while the window is more than half full; then as much as is missing."""
    slots = 10
    assert [room(Flow(length=length), slots) for length in (20, 11, 10, 0)] == [0, 0, 10, 20]


def test_a_list_found_dry_grows_its_window_within_a_few_looks() -> None:
    """A flood into a queue of fast jobs is not throttled by its first small windows."""
    flow, now, looks = Flow(heard=50.0), 50.0, 0
    while window(flow, slots=2) < 1000:
        flow = observe(flow, room(flow, 2), now := now + 0.001, room(flow, 2))
        flow = observe(flow, 0, now := now + 0.003)
        looks += 1
    assert looks <= 8


def test_a_list_found_dry_never_lowers_the_rate_quickly() -> None:
    """An empty list may mean that nobody had anything to offer: its slow sample is no measurement of the workers."""
    fast = drained(4000, 1.0, 0.01, length=0)
    later = observe(Flow(length=0, heard=fast.heard, rate=4000), 0, fast.heard + 1)
    assert later.rate > 3500


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 2000), st.floats(0, 100)), max_size=40),
    slots=st.integers(0, 5000),
)
def test_room_is_never_beyond_the_window(lengths: list[tuple[int, int, float]], slots: int) -> None:
    """Whatever Redis answers, the window stays between 2 and its cap, and what is added keeps the list within it."""
    flow, now = Flow(), 0.0
    for length, added, gap in lengths:
        now += gap
        flow = observe(flow, length, now, added)
        assert math.isfinite(flow.rate)
        assert flow.rate >= 0
        assert 2 <= window(flow, slots) <= WINDOW_CAP
        assert room(flow, slots) == 0 or flow.length + room(flow, slots) == window(flow, slots)
        assert 0 <= look_in(flow, slots, now) <= 0.05


def test_the_next_look_at_a_backlog_is_when_half_the_window_is_gone() -> None:
    """A fast list is looked at again within milliseconds, a list at half its window at once."""
    flow = Flow(length=500, heard=10.0, rate=20_000)
    assert look_in(Flow(length=250, heard=10.0, rate=1000), 1, 10.0) == pytest.approx(0.05)
    assert look_in(Flow(length=1020, heard=10.0, rate=20_000), 1, 10.0) == pytest.approx(0.002)
    assert look_in(flow, 1, 10.0) == 0
    assert look_in(Flow(length=500, heard=10.0), 1, 10.1) == 0, "time passes, the look comes"


def test_a_list_with_a_backlog_is_asked_about_when_it_is_low() -> None:
    """A window that has just been filled is not asked for with each look, one that is about to want a refill is."""
    flow = Flow(length=2000, heard=10.0, rate=40_000, backlog=True)
    assert [asks(flow, 1, 10.0 + later) for later in (0.0005, 0.005, 0.015, 0.019, 0.021)] == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert asks(replace(flow, rate=80_000), 1, 10.011)
    assert not asks(Flow(length=0, heard=10.0), 1, 10.1), "it has room as far as we know"
    assert asks(Flow(length=2, heard=10.0), 1, 10.1), "it was full"


@given(
    counts=st.lists(st.integers(1, 2000), min_size=1, max_size=30),
    batch_size=st.integers(1, 1500),
    ready=st.lists(st.integers(0, 3000), min_size=30, max_size=30),
)
def test_marks_go_on_until_each_list_had_its_turn(
    counts: list[int], batch_size: int, ready: list[int]
) -> None:
    """However small the batch: no list is passed over, and none is left far from what it wanted while it has a backlog."""
    wanted = [Wanted(f"q{number}", "normal", count) for number, count in enumerate(counts)]
    given = {each.queue_name: 0 for each in wanted}
    left = wanted
    while left:
        got, space = [], batch_size
        for each in left:
            got.append(min(each.count, space, ready[int(each.queue_name[1:])] - given[each.queue_name]))
            given[each.queue_name] += got[-1]
            space -= got[-1]
        left = left_over(left, got, batch_size)
    for number, count in enumerate(counts):
        assert min(count, ready[number]) - batch_size // 2 <= given[f"q{number}"] <= min(count, ready[number])


def after_rounds(pace: Pace, seconds: float, gap: float, busy: float, moved: int) -> Pace:
    """The pace after rounds of one kind, one every `gap` seconds."""
    until = pace.at + seconds
    while pace.at < until:
        pace = busier(pace, pace.at + gap, busy, moved)
    return pace


def test_a_flooded_migrator_looks_and_all_others_are_told() -> None:
    """Awake needs a busy migrator and many jobs: neither an insert now and then nor one client that waits for each job."""
    assert not stays_awake(after_rounds(Pace(), 2.0, 0.1, 0.002, 1), awake=False)
    assert not stays_awake(after_rounds(Pace(), 2.0, 0.003, 0.002, 1), awake=False)
    assert stays_awake(after_rounds(Pace(), 1.0, 0.005, 0.0045, 20), awake=False)
    assert stays_awake(after_rounds(Pace(), 1.0, 0.033, 0.025, 1000), awake=False)


def test_awake_ends_when_the_flood_does() -> None:
    """A stream of many jobs keeps an awake migrator awake; without it, it falls asleep within a second."""
    flood = Pace(share=0.9, rate=20_000)
    stream = after_rounds(flood, 2.0, 0.005, 0.001, 4)
    assert stays_awake(stream, awake=True)
    assert not stays_awake(after_rounds(stream, 1.0, 0.005, 0.0, 0), awake=True)


def test_looks_come_at_growing_intervals_and_end() -> None:
    """What commits or falls due without a word is found soon, and the looking ends when a pulse must have come."""
    looks: Looks | None = look_again(None, 0.0)
    times = []
    while looks is not None:
        times.append(looks.next)
        looks = looked(looks, looks.next)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == pytest.approx(0.001)
    assert gaps == pytest.approx(sorted(gaps))
    assert max(gaps) == pytest.approx(0.1)
    assert 1.0 < times[-1] <= 1.2


def test_looks_under_way_are_prolonged_and_not_begun_anew() -> None:
    """A stream of wakes that find nothing does not turn into a look each millisecond."""
    looks: Looks | None = look_again(None, 0.0)
    for moment in (0.001, 0.003, 0.007, 0.015, 0.031):
        looks = looked(looks, moment)
        assert looks is not None
    assert looks is not None
    assert look_again(looks, 0.04).gap == looks.gap
    assert look_again(looks, 0.04).until == pytest.approx(1.24)
