"""Deliveries in PostgreSQL: the intent before the conversation with the SMTP server, the outcome after it.

A mail is an effect outside PostgreSQL, so no transaction holds both. What can be had is that nobody ever sends on a guess:

- The intent (state `sending`, under the claim token of the attempt) is committed before the first byte goes to the server.
- The outcome is committed together with the job's end.
- An attempt begins only from `queued` or `deferred`. Whoever finds `sending` has found an attempt that was cut in between; the mail
  may be out or not, and nothing here can tell. That is *ambiguous*, and what follows is a setting.

Each function works in the caller's transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from psycopg import Connection

from penguinmails.message import Mail
from penguinmails.schema import query

MAX_MESSAGE_IDS = 200  # that a mail which came back may name


class State(StrEnum):
    """The states of a delivery, as they stand in `deliveries.state`; sql/schema/0001_tables.sql says what each means."""

    QUEUED = "queued"
    SENDING = "sending"
    SENT = "sent"
    DEFERRED = "deferred"
    BOUNCED = "bounced"
    COMPLAINED = "complained"
    HELD = "held"
    SKIPPED = "skipped"


OPEN = (State.QUEUED, State.DEFERRED)
"""States from which an attempt may begin."""


class Suppression(StrEnum):
    """Why an address is not written to any more."""

    HARD_BOUNCE = "hard_bounce"
    SOFT_BOUNCES = "soft_bounces"
    COMPLAINT = "complaint"
    UNSUBSCRIBE = "unsubscribe"
    MANUAL = "manual"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One job's try to send one delivery.

    Attributes:
        id: the delivery's.
        token: the claim's, `job.claim_token`: new with every run of the job.
        email: as the job has it.
        account: over which it is sent; None: the default one.
        message_id: of the mail that is to be handed over; None before it is built.
    """

    id: UUID
    campaign_id: UUID
    recipient_id: UUID
    email: str
    job_id: UUID
    token: UUID
    worker_id: str
    account: str | None = None
    message_id: str | None = None

    def of(self, mail: Mail) -> "Attempt":
        """The same with the mail that was built: its Message-ID and its address as SMTP takes it."""
        return replace(self, email=mail.recipient, message_id=mail.message_id)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a delivery stands that could not be begun; `suppressed` is why its address is not written to, or None.

    `account` is the one over which it is to be sent: another one than the attempt's where somebody has changed it.
    """

    state: State
    job_id: UUID | None
    worker_id: str | None
    attempts: int
    attempted_at: datetime | None
    suppressed: str | None
    account: str | None

    def moved_from(self, attempt: Attempt) -> bool:
        """Whether nothing but the account keeps this attempt from being made."""
        mine = self.job_id == attempt.job_id and self.suppressed is None
        return mine and self.state in OPEN and self.account != attempt.account


@dataclass(frozen=True, slots=True)
class Result:
    """What an attempt came to.

    Attributes:
        state: sent, deferred, bounced or held.
        smtp_code: the server's, 200 to 599; None if it said none.
        enhanced_code: RFC 3463, such as `5.1.1`; None if it said none.
        answer: the server's words.
        reason: for people, where the state alone does not say it.
    """

    state: State
    smtp_code: int | None
    enhanced_code: str | None
    answer: str
    reason: str | None = None


def begin(conn: Connection[Any], attempt: Attempt, *, resend: bool) -> Standing | None:
    """Writes the intent, or says why this attempt must not be made. The delivery is made if nobody has made it.

    Args:
        conn: in a transaction; the mail may be handed over once it is committed.
        attempt: who wants to send what.
        resend: whether an earlier attempt without an outcome is no hindrance.

    Returns:
        None: the intent is written. Else how the delivery stands: not to be sent, or not by this job.
    """
    facts = {
        **_facts(attempt),
        "token": attempt.token,
        "worker_id": attempt.worker_id,
        "message_id": attempt.message_id,
        "resend": resend,
    }
    if conn.execute(query("begin_attempt"), facts).fetchone():
        return None
    # Whoever was faster has committed, or this waits for it: what the second try finds is what stands.
    conn.execute(query("add_delivery"), facts)
    if conn.execute(query("begin_attempt"), facts).fetchone():
        return None
    row = conn.execute(query("standing"), facts).fetchone()
    assert row is not None, f"delivery {attempt.id} was deleted while it was sent"
    return Standing(State(row[0]), *row[1:])


def end(conn: Connection[Any], attempt: Attempt, result: Result) -> bool:
    """Writes what the attempt came to.

    Returns:
        False if the delivery is not this attempt's any more (it was released or sent again): nothing is written then.
    """
    facts = {
        "id": attempt.id,
        "token": attempt.token,
        "state": result.state,
        "smtp_code": result.smtp_code,
        "enhanced_code": result.enhanced_code,
        "answer": result.answer,
        "reason": result.reason,
    }
    return conn.execute(query("end_attempt"), facts).fetchone() is not None


def close(
    conn: Connection[Any], attempt: Attempt, state: State, reason: str, *, seen: Sequence[State]
) -> bool:
    """Ends the delivery of this job without an attempt.

    Args:
        conn: in a transaction.
        attempt: the one that is not made.
        state: held or skipped.
        reason: for people.
        seen: the states in which it is ended; in another one it has gone on meanwhile and is left alone.
    """
    facts = {"id": attempt.id, "job_id": attempt.job_id, "state": state, "reason": reason, "seen": [*seen]}
    return conn.execute(query("close_delivery"), facts).fetchone() is not None


def add(conn: Connection[Any], attempt: Attempt) -> None:
    """Makes the delivery of a producer's own job, if there is none."""
    conn.execute(query("add_delivery"), _facts(attempt))


def _facts(attempt: Attempt) -> dict[str, Any]:
    return {
        "id": attempt.id,
        "campaign_id": attempt.campaign_id,
        "recipient_id": attempt.recipient_id,
        "email": attempt.email,
        "job_id": attempt.job_id,
        "account": attempt.account,
    }


def suppress(conn: Connection[Any], address: str, reason: Suppression, source: str = "") -> bool:
    """Has an address not be written to any more.

    Args:
        conn: in a transaction.
        address: in whatever case.
        reason: why.
        source: what told it: a job, a message, a person.

    Returns:
        False if it was suppressed before: then its first reason stays.
    """
    facts = {"address": address, "reason": reason, "source": source}
    return conn.execute(query("suppress"), facts).fetchone() is not None


def delivery_of(message_id: str) -> UUID | None:
    """The delivery that a Message-ID of ours was made of, such as `<…@example.com>`; None if it is not of that form."""
    try:
        return UUID(message_id.strip().removeprefix("<").partition("@")[0])
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Found:
    """A delivery to which an id has led."""

    id: UUID
    campaign_id: UUID
    email: str
    state: State


def find(conn: Connection[Any], delivery: UUID) -> Found | None:
    """The delivery of this id, or None."""
    row = conn.execute(query("find_deliveries"), {"ids": [delivery]}).fetchone()
    return None if row is None else _found(row)


def find_by_message_ids(conn: Connection[Any], message_ids: Sequence[str]) -> Found | None:
    """The delivery of the first of these ids that is the Message-ID of a mail which was handed over; None if there is none.

    Args:
        conn: any connection.
        message_ids: each `<id>`, the most reliable first; the first `MAX_MESSAGE_IDS` are looked up. A mail of which no attempt
            was made has no Message-ID, so nothing that speaks of it can be true.
    """
    named = {each.casefold(): delivery_of(each) for each in message_ids[:MAX_MESSAGE_IDS]}
    wanted = [each for each in named.values() if each is not None]
    if not wanted:
        return None
    rows = {row[0]: row for row in conn.execute(query("find_deliveries"), {"ids": wanted})}
    for message_id, delivery in named.items():
        row = rows.get(delivery)
        if row is not None and (row[4] or "").casefold() == message_id:
            return _found(row)
    return None


def _found(row: Sequence[Any]) -> Found:
    return Found(row[0], row[1], row[2], State(row[3]))


def unsuppress(conn: Connection[Any], address: str) -> bool:
    """Has an address be written to again; False if it was not suppressed."""
    return conn.execute(query("unsuppress"), {"address": address}).fetchone() is not None


@dataclass(frozen=True, slots=True)
class Suppressed:
    """An address that is not written to: why, and what told it."""

    address: str
    reason: Suppression
    source: str
    created_at: datetime


def suppressed(conn: Connection[Any], reason: Suppression | None, limit: int) -> list[Suppressed]:
    """The newest suppressions, at most `limit`; of one reason, or of all."""
    rows = conn.execute(query("suppressions"), {"reason": reason, "limit": limit})
    return [Suppressed(row[0], Suppression(row[1]), row[2], row[3]) for row in rows]
