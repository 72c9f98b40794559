"""The back-off, without waiting for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd.restart import LONGEST_DELAY, STABLE_SECONDS, Backoff, Ending, after_death, jittered

BOOT = Ending(ready_seconds=None)


def deaths(ending: Ending, count: int, random01: float = 0.5) -> list[Backoff]:
    """So many deaths in a row."""
    seen = [Backoff()]
    for _ in range(count):
        seen.append(after_death(seen[-1], ending, random01))
    return seen[1:]


def test_the_first_restart_is_immediate_and_the_next_ones_double() -> None:
    """0, then 0.1 s, 0.2 s, 0.4 s … up to 30 s."""
    delays = [backoff.delay for backoff in deaths(BOOT, 12)]
    assert delays == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30])


@given(count=st.integers(1, 2000), random01=st.floats(0, 1, exclude_max=True))
def test_no_delay_is_ever_above_the_longest(count: int, random01: float) -> None:
    """However many deaths, and whatever the jitter."""
    last = deaths(BOOT, min(count, 50), random01)[-1]
    assert 0 <= last.delay <= LONGEST_DELAY


def test_jitter_spreads_by_a_quarter() -> None:
    """Two places that die together do not start together."""
    before = Backoff(failures=4)
    assert after_death(before, BOOT, 0.0).delay == pytest.approx(0.6)
    assert after_death(before, BOOT, 0.999999).delay == pytest.approx(1.0, abs=0.01)
    assert after_death(before, BOOT, 0.0).step == after_death(before, BOOT, 0.9).step


@pytest.mark.parametrize(
    "ending",
    [
        Ending(ready_seconds=STABLE_SECONDS),
        Ending(ready_seconds=0.1, in_job=True),
        Ending(ready_seconds=0.1, killed_outside=True),
        Ending(ready_seconds=0.1, clean=True),
    ],
)
def test_what_is_not_the_childs_failing_starts_over(ending: Ending) -> None:
    """A stable run, a death in a job, a kill from outside, an end with 0: the next restart is immediate, however often."""
    failed = deaths(BOOT, 8)[-1]
    assert [after_death(failed, ending, 0.5).delay for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    "ending",
    [Ending(ready_seconds=0.1), Ending(ready_seconds=None, in_job=True, killed_outside=True, clean=True)],
)
def test_a_short_run_counts_as_failing(ending: Ending) -> None:
    """Ready and dead at once, or never ready: the delay grows."""
    assert deaths(ending, 3)[-1].delay == pytest.approx(0.2)


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_recycling_is_spread_by_a_tenth(count: int, random01: float) -> None:
    """Never (0) stays never; all else stays near and above nothing."""
    assert jittered(0, random01) == 0
    assert max(1, 0.9 * count - 1) <= jittered(count, random01) <= 1.1 * count + 1
