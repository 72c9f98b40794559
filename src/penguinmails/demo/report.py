"""The end of `pmqd demo`: what arrived against what was asked for, and how fast it went."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from penguinmails.campaign import Recipients
from penguinmails.demo.receiver import Receiver
from penguinmails.message import clean_name

SHOWN = 5

# From ready to the handler's start, of the jobs that ran once.
PICKUP = """
select percentile_cont(array[0.5, 0.99]) within group (order by extract(epoch from l.started - j.run_at)::float8)
  from pmqd.jobs j join pmqd.job_logs l on l.job_id = j.id
 where j.tags @> array[%(tag)s] and j.attempt_count = 1 and j.interruptions = 0 and l.status = 'success'
"""
# The mails that were sent at once: those that were told to come later wait by plan.
SPAN = """
select count(*), extract(epoch from max(l.finished) - min(l.started))::float8
  from pmqd.jobs j join pmqd.job_logs l on l.job_id = j.id
 where j.tags @> array[%(tag)s] and j.attempt_count = 1 and l.status = 'success'
"""
ENDS = "select status, count(*) from pmqd.jobs group by status order by status"
ATTEMPTS = "select status, count(*) from pmqd.job_logs group by status order by status"


@dataclass(frozen=True, slots=True)
class Figures:
    """What the database says about the campaign and about the mails that were enqueued one at a time."""

    mails: int
    mails_a_second: float
    seconds: float
    campaign_pickup: tuple[float, float]
    single_pickup: tuple[float, float]
    ends: Mapping[str, int]
    attempts: Mapping[str, int]


def read_figures(db: psycopg.Connection[Any], campaign: UUID, singles: UUID) -> Figures:
    """Ask for the figures, once every job has ended."""
    count, seconds = _row(db, SPAN, campaign)
    return Figures(
        mails=count,
        mails_a_second=count / seconds if seconds else 0.0,
        seconds=seconds or 0.0,
        campaign_pickup=tuple(_row(db, PICKUP, campaign)[0] or (0.0, 0.0)),
        single_pickup=tuple(_row(db, PICKUP, singles)[0] or (0.0, 0.0)),
        ends=dict(db.execute(ENDS).fetchall()),
        attempts=dict(db.execute(ATTEMPTS).fetchall()),
    )


def _row(db: psycopg.Connection[Any], query: str, campaign: UUID) -> tuple[Any, ...]:
    row = db.execute(query, {"tag": f"campaign:{campaign}"}).fetchone()
    assert row is not None
    return tuple(row)


def figure_lines(figures: Figures, recipients: int, singles: int) -> list[str]:
    """The figures in words."""
    ends = ", ".join(f"{count} {status}" for status, count in figures.ends.items())
    attempts = ", ".join(f"{count} {status}" for status, count in figures.attempts.items())
    campaign, single = figures.campaign_pickup, figures.single_pickup
    return [
        f"jobs        {ends}; attempts: {attempts}",
        f"throughput  {figures.mails_a_second:,.0f} mails/s ({figures.mails:,} in {figures.seconds:.2f} s, 2 workers)",
        f"pickup      p50 {_ms(single[0])}, p99 {_ms(single[1])} for one mail at a time ({singles}; ready to handler start)",
        f"            p50 {_ms(campaign[0])}, p99 {_ms(campaign[1])} in the campaign ({recipients} at once: mostly the queue ahead)",
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def mail_faults(
    receiver: Receiver, expected: Recipients, singles: Recipients, refused: Collection[str]
) -> list[str]:
    """Everything that is not exactly one personal mail for each recipient who was not refused; nothing if all is well."""
    names = {person.email: person.name for part in (expected, singles) for person in part.people}
    missing = [email for email in names if email not in receiver.accepted and email not in refused]
    twice = [
        f"{email} ({count} times)"
        for email, count in receiver.accepted.items()
        if count > 1 and email in names
    ]
    strangers = [email for email in receiver.accepted if email not in names]
    wrong = [
        email
        for email, subject in receiver.subjects.items()
        if email in names and not _fits(subject, names[email])
    ]
    repeated = [message_id for message_id, count in receiver.message_ids.items() if count > 1]
    return [
        *_fault("without a mail", missing),
        *_fault("with more than one mail", twice),
        *_fault("that nobody asked for", strangers),
        *_fault("with another's name", wrong),
        *_fault("Message-IDs that came again", repeated),
    ]


def _fits(subject: str, name: str) -> bool:
    """The subject names the recipient; spaces may differ where a header was folded."""
    return clean_name(name).replace(" ", "") in subject.replace(" ", "")


def _fault(what: str, found: list[str]) -> Iterator[str]:
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield f"{len(found)} {what}: {', '.join(found[:SHOWN])}{more}"
