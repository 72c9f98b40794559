"""Everybody accounted for: what the database says of each recipient against what the server saw and what came back."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from penguinmails.deliveries import State
from penguinmails.demo.fates import Fate, Fates
from penguinmails.demo.receiver import Receiver
from penguinmails.report import read_report

SHOWN = 5

# Each delivery; who told first that it bounced, and whether it was answered.
ROWS = """
select d.email, d.state,
       (select b.source from penguinmails.bounces b where b.delivery_id = d.id order by b.occurred_at limit 1),
       exists (select from penguinmails.email_messages m where m.delivery_id = d.id and m.kind = 'reply')
  from penguinmails.deliveries d where d.campaign_id = %(id)s
"""
SUPPRESSED = "select address from penguinmails.suppressions"


@dataclass(frozen=True, slots=True)
class Balance:
    """The campaign's recipients by what the database says of them.

    Attributes:
        states: the delivery's state by address.
        refused: bounced, by the server's answer.
        returned: bounced, by a notification.
        replied: those who have answered.
        suppressed: addresses that are not written to any more.
        sums: the report's figures.
    """

    states: dict[str, State]
    refused: set[str]
    returned: set[str]
    replied: set[str]
    suppressed: set[str]
    sums: dict[State, int]

    def of(self, state: State) -> set[str]:
        """Who is in a state."""
        return {email for email, each in self.states.items() if each is state}


def read_balance(db: psycopg.Connection[Any], campaign: UUID) -> Balance:
    """Ask for it, once every job has ended."""
    rows = db.execute(ROWS, {"id": campaign}).fetchall()
    bounced = [row for row in rows if row[1] == State.BOUNCED]
    report = read_report(db, campaign)
    return Balance(
        states={row[0]: State(row[1]) for row in rows},
        refused={row[0] for row in bounced if row[2] == "smtp"},
        returned={row[0] for row in bounced if row[2] == "notification"},
        replied={row[0] for row in rows if row[3]},
        suppressed={row[0] for row in db.execute(SUPPRESSED)},
        sums=dict(report.deliveries) if report else {},
    )


def refused_for_good(receiver: Receiver, fates: Fates) -> set[str]:
    """Whom of the list the server has refused and never taken."""
    return {email for email in receiver.refused if email in fates.of and email not in receiver.accepted}


def balance_lines(balance: Balance, receiver: Receiver, fates: Fates) -> list[str]:
    """The figures in words."""
    total = len(fates.of)
    good = sum(receiver.accepted[email] == 1 for email in fates.of)
    never, later = refused_for_good(receiver, fates), fates.told_later & set(receiver.accepted)
    parts = {
        "sent": balance.of(State.SENT),
        "bounced by the server's answer": balance.refused,
        "bounced by a notification": balance.returned,
        "complained": balance.of(State.COMPLAINED),
        "held": balance.of(State.HELD),
    }
    told = ", ".join(f"{len(who):,} {what}" for what, who in parts.items())
    accounted = len(set().union(*parts.values()))
    return [
        (
            f"arrived     {good:,} of {total:,} recipients got exactly one mail; {len(never):,} were refused for good,"
            f" {len(later):,} told to come later and taken then"
        ),
        f"accounted   {accounted:,} of {total:,}: {told}",
        f"came back   {len(balance.replied):,} replies matched; {len(balance.suppressed):,} addresses suppressed",
    ]


def balance_faults(balance: Balance, receiver: Receiver, fates: Fates) -> list[str]:
    """Where the database and the server differ; nothing if every recipient is accounted for."""
    taken = {email for email in receiver.accepted if email in fates.of}
    returned = fates.who(Fate.RETURNED_HARD, Fate.RETURNED_SOFT)
    complained = balance.of(State.COMPLAINED)
    unwanted = fates.who(Fate.REFUSED, Fate.RETURNED_HARD, Fate.COMPLAINED)
    miscounted = {state for state in State if balance.sums.get(state, 0) != len(balance.of(state))}
    return [
        *_fault("without a delivery, or strangers with one", set(balance.states) ^ set(fates.of)),
        *_fault(
            "taken by the server and not so in the database, or the other way round",
            taken ^ (balance.of(State.SENT) | balance.returned | complained),
        ),
        *_fault(
            "refused by the server, or bounced by its answer, and not both",
            refused_for_good(receiver, fates) ^ balance.refused,
        ),
        *_fault("told to come later and not taken then", fates.told_later - taken),
        *_fault("returned, or bounced by a notification, and not both", returned ^ balance.returned),
        *_fault("complained at one side only", fates.who(Fate.COMPLAINED) ^ complained),
        *_fault("answered at one side only", fates.who(Fate.ANSWERED) ^ balance.replied),
        *_fault(
            "suppressed, or unwanted, and not both", {each.lower() for each in unwanted} ^ balance.suppressed
        ),
        *_fault("counted otherwise in the report than there are", miscounted),
    ]


def _fault(what: str, found: Collection[str]) -> Iterator[str]:
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield f"{len(found)} {what}: {', '.join(sorted(found)[:SHOWN])}{more}"
