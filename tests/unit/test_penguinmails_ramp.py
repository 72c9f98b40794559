"""The ramp and the plan of a day: pure."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguinmails.ramp import Decision, Figures, Hours, Ramp, Thresholds, plan_day, seeds_of_day, step
from penguinmails.settings import MailSettings

LIMITS = Thresholds(0.05, 0.10, 0.001, 0.003)
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata")
ramps = st.builds(
    lambda start, growth, room: Ramp(start, growth, start + room),
    st.integers(1, 500),
    st.floats(1, 3),
    st.integers(0, 5000),
)
figures = st.builds(Figures, st.integers(0, 9999), st.integers(0, 999), st.integers(0, 99))
hours = st.builds(
    lambda zone, first, length: Hours(ZoneInfo(zone), first, min(first + length, 24)),
    st.sampled_from(ZONES),
    st.integers(0, 23),
    st.integers(1, 24),
)
days = st.dates(date(2025, 1, 1), date(2027, 12, 31))
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@given(ramps, st.integers(1, 99999), st.integers(0, 999), figures)
def test_the_volume_keeps_its_bounds_and_follows_the_decision(
    ramp: Ramp, volume: int, planned: int, seen: Figures
) -> None:
    """Whatever comes: between start and ceiling, raised only by clean days, lowered by bad ones."""
    taken = step(ramp, volume, planned, seen, LIMITS)
    volume = max(ramp.start, min(volume, ramp.ceiling))
    assert ramp.start <= taken.volume <= ramp.ceiling
    bad = seen.bounce_rate >= 0.10 or seen.complaint_rate >= 0.003
    assert (taken.decision is Decision.LOWER) == bad
    if taken.decision is Decision.RAISE:
        assert volume < taken.volume <= volume * ramp.growth + 1
        assert seen.bounce_rate < 0.05
        assert seen.complaint_rate < 0.001
    else:
        assert taken.volume <= volume


@pytest.mark.parametrize(
    ("seen", "decision", "volume", "reason"),
    [
        (Figures(100), Decision.RAISE, 110, "bounce rate 0.00%, complaint rate 0.00%"),
        (Figures(95, 5), Decision.HOLD, 100, "bounce rate 5.00%, held from 5.00%"),
        (Figures(90, 10), Decision.LOWER, 50, "bounce rate 10.00%, lowered from 10.00%"),
        (Figures(999, 0, 1), Decision.HOLD, 100, "complaint rate 0.10%, held from 0.10%"),
        (Figures(997, 0, 3), Decision.LOWER, 50, "complaint rate 0.30%, lowered from 0.30%"),
        (Figures(49), Decision.HOLD, 100, "49 sent of 100 planned: too few to tell"),
        (Figures(), Decision.HOLD, 100, "0 sent of 100 planned: too few to tell"),
    ],
)
def test_what_a_day_does(seen: Figures, decision: Decision, volume: int, reason: str) -> None:
    """The thresholds as they are by default, at their edges; 1.1 times 100 is 110, not 111."""
    assert MailSettings().warmup_thresholds == LIMITS
    taken = step(Ramp(20, 1.1, 1000), 100, 100, seen, LIMITS)
    assert (taken.decision, taken.volume, taken.reason) == (decision, volume, reason)


@given(hours, days, st.integers(0, 300), st.floats(0, 1))
def test_a_plan_keeps_the_working_hours(open_hours: Hours, day: date, volume: int, late: float) -> None:
    """All letters of the day, in order, within its hours in that zone, also where clocks change; made late it has its part."""
    begin, end = open_hours.window(day)
    plan = plan_day(open_hours, day, volume, seed="a", now=LONG_AGO)
    assert plan == plan_day(open_hours, day, volume, seed="a", now=LONG_AGO)
    assert len(plan) == (volume if end > begin else 0)
    assert plan == sorted(plan)
    for moment in plan:
        assert begin <= moment <= end
        local = moment.astimezone(open_hours.zone)
        assert local.date() == day or moment == end
        assert open_hours.first <= local.hour + (local.date() > day) * 24 <= open_hours.last
    now = begin + (end - begin) * late
    rest = plan_day(open_hours, day, volume, seed="a", now=now)
    assert all(now <= moment <= end for moment in rest)
    assert volume * (1 - late) - 0.01 <= len(rest) <= volume * (1 - late) + 1.01 or end == begin


def test_the_hours_of_days_on_which_clocks_change() -> None:
    """Berlin, 2026: 23 and 25 hours long; nine o'clock is nine o'clock; an hour that is skipped has no letters."""
    berlin = ZoneInfo("Europe/Berlin")
    spring, autumn = date(2026, 3, 29), date(2026, 10, 25)
    whole = Hours(berlin, 0, 24)
    assert [end - begin for begin, end in map(whole.window, (spring, autumn))] == [
        timedelta(hours=23),
        timedelta(hours=25),
    ]
    office = Hours(berlin, 9, 17)
    assert office.window(spring)[0] == datetime(2026, 3, 29, 7, tzinfo=UTC)
    assert office.window(autumn)[0] == datetime(2026, 10, 25, 8, tzinfo=UTC)
    assert plan_day(Hours(berlin, 2, 3), spring, 9, seed="", now=LONG_AGO) == []
    evening = datetime(2026, 3, 28, 20, tzinfo=UTC)
    assert office.next_plan(evening) == (spring, datetime(2026, 3, 29, 7, tzinfo=UTC))
    noon = datetime(2026, 3, 28, 12, tzinfo=UTC)
    assert office.next_plan(noon) == (date(2026, 3, 28), noon)


def test_each_seed_gets_its_share() -> None:
    """In turn, in another order on another day."""
    seeds = tuple("abcde")
    first, second = (seeds_of_day(seeds, 12, seed=day) for day in ("1", "2"))
    assert {first.count(each) for each in seeds} == {2, 3}
    assert first != second


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1.1, 5), "start is 0"),
        ((5, 0.9, 9), "growth is 0.9"),
        ((5, 1.1, 4), r"ceiling is 4, allowed: start \(5\)"),
    ],
)
def test_what_is_no_ramp(values: tuple[int, float, int], message: str) -> None:
    """The field, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        Ramp(*values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TIME_ZONE", "Mars/Olympus", "no time zone"),
        ("FROM_HOUR", "17", "must be below warmup_to_hour"),
        ("BOUNCE_HOLD", "0.2", "must not be above"),
        ("SEEDS", '["nobody"]', "nobody"),
    ],
)
def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    """Before anything is planned."""
    monkeypatch.setenv(f"PENGUINMAILS_WARMUP_{name}", value)
    with pytest.raises(ValueError, match=message):
        MailSettings()
