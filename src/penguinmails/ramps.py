"""Ramps in PostgreSQL: started, stopped, planned a day at a time, and read.

A day's letters are a campaign of their own (its id made of account and day) whose deliveries the database counts as it counts all;
so bounces and complaints, whoever learns of them, need no second book. Each function works in the caller's transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5
from zoneinfo import ZoneInfo

from psycopg import Connection

from penguinmails.message import MessageError, load_template
from penguinmails.ramp import CEILING_REACHED, Decision, Figures, Hours, Ramp, step
from penguinmails.schema import query
from penguinmails.settings import MailSettings, given_variables
from penguinmails.smtp import account_named
from penguinmails.templating import missing_variables, shown

NAMESPACE = UUID("6f0b3f52-6a51-5d0c-9a0e-2f6f3a1c7b44")
"""What the ids of plans, of a day's letters and of answers are made in."""

DEFAULT_RAMP = Ramp(20, 1.2, 1000)
PAUSED = "paused"
LETTER_VARIABLES = ("number", "day")
REPLY_VARIABLES = ("subject",)


class WarmupError(ValueError):
    """What was asked for cannot be; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Warming:
    """An account's ramp as it stands, its row locked.

    Attributes:
        volume: of the day that is planned next, or was planned last; letters a day.
        generation: new with each start and stop.
        now: the database's clock.
    """

    account: str
    ramp: Ramp
    volume: int
    state: str
    hours: Hours
    generation: UUID
    now: datetime

    @property
    def today(self) -> date:
        """The day in the ramp's time zone."""
        return self.hours.day_of(self.now)


@dataclass(frozen=True, slots=True)
class Standing:
    """An account as `penguinmails warmup status` shows it: its ramp, its newest day, and the newest decision."""

    account: str
    state: str
    volume: int
    day: date | None
    planned: int | None
    sent: int
    bounced: int
    complained: int
    received: int
    engaged: int
    decision: str | None
    reason: str | None


def letters_id(account: str, day: date) -> UUID:
    """The campaign of the letters that an account sends on a day."""
    return uuid5(NAMESPACE, f"letters/{account}/{day}")


def fault(settings: MailSettings, account: str) -> str | None:
    """Why these settings cannot warm this account up; None if they can."""
    try:
        account_named(settings, account)
        for name, own in (
            (settings.warmup_template, LETTER_VARIABLES),
            (settings.warmup_reply_template, REPLY_VARIABLES),
        ):
            known = {"name", "email", *own, *given_variables(settings)}
            missing = missing_variables(load_template(settings.templates, name), known)
            if missing:
                return f"template {name!r} uses {shown(missing)}; allowed: {', '.join(sorted(known))}"
    except (ValueError, MessageError) as error:
        return str(error)
    if not settings.warmup_seeds:
        return "PENGUINMAILS_WARMUP_SEEDS is empty: it lists the mailboxes that letters go to, as JSON"
    return None


def start(
    conn: Connection[Any],
    settings: MailSettings,
    account: str,
    *,
    first: int | None = None,
    growth: float | None = None,
    ceiling: int | None = None,
) -> Warming:
    """Starts an account's ramp, or goes on with one that was stopped; what is not given stays, or is `DEFAULT_RAMP`'s.

    Args:
        conn: in a transaction.
        settings: the account, the seed mailboxes and the working hours.
        account: its name.
        first: the first day's letters; begins anew from there.
        growth: a day's volume over the day before.
        ceiling: the most letters a day.

    Raises:
        WarmupError: the settings or the figures do not fit.
    """
    wrong = fault(settings, account)
    if wrong:
        raise WarmupError(wrong)
    before = lock(conn, account)
    known = before.ramp if before else DEFAULT_RAMP
    try:
        ramp = Ramp(
            known.start if first is None else first,
            known.growth if growth is None else growth,
            known.ceiling if ceiling is None else ceiling,
        )
    except ValueError as error:
        raise WarmupError(f"the ramp of {account}: {error}") from error
    volume = min(before.volume, ramp.ceiling) if before and first is None else ramp.start
    hours = settings.warmup_hours
    facts = {
        "account": account,
        "start": ramp.start,
        "growth": ramp.growth,
        "ceiling": ramp.ceiling,
        "volume": volume,
        "time_zone": settings.warmup_time_zone,
        "from_hour": hours.first,
        "to_hour": hours.last,
    }
    conn.execute(query("put_ramp"), facts)
    made = lock(conn, account)
    assert made is not None
    return made


def stop(conn: Connection[Any], account: str) -> int:
    """Stops an account's ramp, and skips the letters that have not gone out.

    Returns:
        How many they are.

    Raises:
        WarmupError: the account has no ramp.
    """
    warming = lock(conn, account)
    if warming is None:
        raise WarmupError(f"account {account!r} has no ramp; `penguinmails warmup status` lists them")
    conn.execute(query("pause_ramp"), {"account": account})
    days = (warming.today - timedelta(days=1), warming.today)  # yesterday's: those that are tried again
    campaigns = [letters_id(account, day) for day in days]
    return conn.execute(query("skip_letters"), {"campaigns": campaigns}).rowcount


def lock(conn: Connection[Any], account: str) -> Warming | None:
    """The account's ramp, locked until the transaction ends; None: it has none."""
    row = conn.execute(query("lock_ramp"), {"account": account}).fetchone()
    if row is None:
        return None
    first, growth, ceiling, volume, state, zone, from_hour, to_hour, generation, now = row
    hours = Hours(ZoneInfo(zone), from_hour, to_hour)
    return Warming(account, Ramp(first, growth, ceiling), volume, state, hours, generation, now)


def decide(conn: Connection[Any], settings: MailSettings, warming: Warming, day: date) -> int:
    """Judges the newest day before `day` that nobody has judged: writes its figures, and moves the ramp.

    Returns:
        The volume from now on.
    """
    row = conn.execute(query("undecided_day"), {"account": warming.account, "day": day}).fetchone()
    if row is None:
        return warming.volume
    judged, planned = row
    figures = figures_of(conn, warming.account, warming.hours, judged)
    received, engaged = _noted(conn, warming.account, judged)
    taken = step(warming.ramp, warming.volume, planned, figures, settings.warmup_thresholds)
    facts = {
        "account": warming.account,
        "day": judged,
        "sent": figures.sent,
        "bounced": figures.bounced,
        "complained": figures.complained,
        "received": received,
        "engaged": engaged,
        "decision": taken.decision,
        "reason": taken.reason,
    }
    conn.execute(query("decide_day"), facts)
    at_ceiling = taken.decision is Decision.RAISE and taken.volume == warming.ramp.ceiling
    if at_ceiling or taken.reason == CEILING_REACHED:
        state = "finished"
    else:
        state = "ramping" if taken.decision is Decision.RAISE else "holding"
    conn.execute(query("move_ramp"), {"account": warming.account, "volume": taken.volume, "state": state})
    return taken.volume


def figures_of(conn: Connection[Any], account: str, hours: Hours, day: date) -> Figures:
    """What has become of the account's mails of a day, as far as is known now."""
    begin, end = hours.bounds(day)
    row = conn.execute(query("warmup_figures"), {"account": account, "begin": begin, "end": end}).fetchone()
    assert row is not None
    return Figures(*row)


def note(conn: Connection[Any], warming: Warming, message_id: str, what: str) -> bool:
    """Notes what happened to a letter; False if it is known already. `what` is a step of `warmup_notes`."""
    facts = {"account": warming.account, "message_id": message_id, "step": what, "day": warming.today}
    return conn.execute(query("warmup_note"), facts).fetchone() is not None


def own_letters(conn: Connection[Any], account: str, ids: Sequence[UUID]) -> set[UUID]:
    """Which of these deliveries went out over the account."""
    rows = conn.execute(query("own_letters"), {"account": account, "ids": list(ids)})
    return {row[0] for row in rows}


def standings(conn: Connection[Any]) -> list[Standing]:
    """All ramps, by account."""
    found = []
    for account, state, volume, zone, first, last, day, planned, decision, reason in conn.execute(
        query("warmup_ramps")
    ).fetchall():
        hours = Hours(ZoneInfo(zone), first, last)
        figures = figures_of(conn, account, hours, day) if day else Figures()
        received, engaged = _noted(conn, account, day) if day else (0, 0)
        counts = (figures.sent, figures.bounced, figures.complained, received, engaged)
        found.append(Standing(account, state, volume, day, planned, *counts, decision, reason))
    return found


def _noted(conn: Connection[Any], account: str, day: date) -> tuple[int, int]:
    row = conn.execute(query("warmup_noted"), {"account": account, "day": day}).fetchone()
    assert row is not None
    return row[0], row[1]
