"""The queue `bounce:process`: what an undelivered mail means for its delivery and its address.

Three kinds of job: a refusal that sending has met (`smtp`, its payload is from `penguinmails.sending`), and a stored delivery status
notification or feedback report (`notification`, `feedback`: the payload names the message).

Anybody can write a notification. So it counts only if an id in it is the Message-ID of a mail that was handed over, and what is
suppressed is the address of that delivery, never one that the notification names.

| told | the delivery | the address |
|---|---|---|
| hard: the address is at fault for good | bounced | suppressed |
| soft: anything else that failed | bounced | suppressed after `soft_bounces_to_suppress` of them |
| complaint | complained | suppressed |
| delayed, delivered; feedback that is no complaint | as it was | as it was |

Soft bounces are counted by days on which there was one, within `SOFT_DAYS`: not by mails, since five campaigns in one evening meet
one full mailbox once; and not if the reason is the mail or its sender (policy, content, size), which says nothing about the address: else a
week on a provider's block list would suppress all its mailboxes.

A row in `bounces` is made of who told it, so telling it again changes nothing. It, the delivery (whose triggers keep the campaign's sums), the
suppression and the end of the job are one transaction.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, Literal
from uuid import UUID, uuid5

from psycopg import Connection
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penguinmails import deliveries, schema
from penguinmails.bounce_codes import Reason, Verdict
from penguinmails.deliveries import Found, State, Suppression
from penguinmails.inbound import read_mail
from penguinmails.notices import Action, Notice, RecipientNotice, read_notice
from penguinmails.queues import BOUNCE, app
from penguinmails.schema import query
from penguinmails.settings import mail_settings
from pmqd import Discard, Job

SOFT_DAYS = 30
MAX_TEXT = 500

ABOUT_ADDRESS = frozenset(
    {
        Reason.MAILBOX_FULL,
        Reason.MAILBOX_CLOSED,
        Reason.NO_SUCH_ADDRESS,
        Reason.NO_SUCH_DOMAIN,
        Reason.MOVED,
        Reason.ROUTING,
        Reason.EXPIRED,
        Reason.SYSTEM,
        Reason.TEMPORARY,
        Reason.UNKNOWN,
    }
)
"""Reasons that may lie with the mailbox or its server; the others lie with the mail or its sender."""


class Kind(StrEnum):
    """What a bounce says, as it stands in `bounces.kind`."""

    HARD = "hard"
    SOFT = "soft"
    COMPLAINT = "complaint"


KINDS = {Verdict.HARD: Kind.HARD, Verdict.SOFT: Kind.SOFT, Verdict.COMPLAINT: Kind.COMPLAINT}

# A mail that came back was taken before, whatever this side knows of it: also one that is held, or whose yes is just being written.
RETURNED_FROM = {
    Kind.HARD: (State.SENDING, State.SENT, State.HELD),
    Kind.SOFT: (State.SENDING, State.SENT, State.HELD),
    Kind.COMPLAINT: (State.SENDING, State.SENT, State.HELD, State.BOUNCED),
}


class Refusal(BaseModel):
    """The payload of a refusal by the SMTP server: what `penguinmails.sending` writes."""

    model_config = ConfigDict(frozen=True)

    source: Literal["smtp"]
    job_id: UUID
    delivery_id: UUID
    code: int = Field(ge=0, le=599)
    status: str | None = None
    answer: str = ""
    verdict: Verdict
    reason: Reason


class Report(BaseModel):
    """The payload of a notification: the stored message."""

    model_config = ConfigDict(frozen=True)

    source: Literal["notification", "feedback"]
    message: UUID


@dataclass(frozen=True, slots=True)
class Bounce:
    """What is known of one mail that came back: a row of `bounces`, for a delivery that was found."""

    id: UUID
    delivery: Found
    kind: Kind
    reason: Reason
    source: str
    message: UUID | None
    smtp_code: int | None
    enhanced_code: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Effect:
    """What a bounce has changed: the delivery's new state and the suppression, None where it was not changed."""

    state: State | None = None
    suppressed: Suppression | None = None


@app.handler(BOUNCE, timeout=60)
def process_bounce(job: Job) -> None:
    """Take one refusal, notification or complaint to its delivery and its address.

    The job's result says what was done, or why nothing: `{"ignored": …}`.

    Args:
        job: its payload is a `Refusal` or a `Report`.

    Raises:
        Discard: the payload does not fit, or names a message that is not stored.
    """
    schema.require(job)
    told = _payload(job)
    look: Callable[[Connection[Any]], Bounce | str]
    if isinstance(told, Refusal):
        look = partial(_refused, refusal=told)
    else:
        look = partial(_returned, report=told, notice=_notice(job, told))
    result: dict[str, Any] = {}
    with job.settling(result=result) as conn:
        bounce = look(conn)
        if isinstance(bounce, str):
            result["ignored"] = bounce
            return
        effect = record(conn, bounce, soft_limit=mail_settings().soft_bounces_to_suppress)
        result |= {"delivery": bounce.delivery.id, "kind": bounce.kind, "reason": bounce.reason}
        if effect is None:
            result["ignored"] = "it was told before"
        else:
            result |= {"state": effect.state, "suppressed": effect.suppressed}


def record(conn: Connection[Any], bounce: Bounce, *, soft_limit: int) -> Effect | None:
    """Write a bounce and all that follows from it, once.

    Args:
        conn: in a transaction.
        bounce: of a delivery that was found.
        soft_limit: on so many days within `SOFT_DAYS` soft bounces suppress an address; 0: never.

    Returns:
        What was changed; None if it was told before, and nothing is done again.
    """
    row = {
        "id": bounce.id,
        "delivery": bounce.delivery.id,
        "email": bounce.delivery.email,
        "kind": bounce.kind,
        "source": bounce.source,
        "reason": bounce.reason,
        "message": bounce.message,
        "smtp_code": bounce.smtp_code,
        "enhanced_code": bounce.enhanced_code,
        "text": bounce.text[:MAX_TEXT],
    }
    if conn.execute(query("add_bounce"), row).fetchone() is None:
        return None
    state = _mark(conn, bounce) if bounce.source != "smtp" else None
    why = _suppression(conn, bounce, soft_limit)
    if why is not None and not deliveries.suppress(conn, bounce.delivery.email, why, _told_by(bounce)):
        why = None
    return Effect(state, why)


def about_delivery(notice: Notice, email: str) -> RecipientNotice | None:
    """What a notification says about the mail to an address; None if not that it failed, or was complained of.

    A failure at another address (the mail was forwarded, or went through a list) is soft: the address that was written to has
    taken the mail.

    Args:
        notice: from `read_notice`, about one mail.
        email: the address that the mail was sent to.
    """
    own = [each for each in notice.recipients if _is_at(each, email)]
    failed = [each for each in own or notice.recipients if _counts(each)]
    if not failed:
        return None
    worst = next((each for each in failed if each.verdict is not Verdict.SOFT), failed[0])
    if not own and worst.verdict is Verdict.HARD:
        return replace(worst, verdict=Verdict.SOFT)
    return worst


def _payload(job: Job) -> Refusal | Report:
    source = job.payload.get("source") if isinstance(job.payload, dict) else None
    model = Refusal if source == "smtp" else Report
    try:
        return model.model_validate(job.payload)
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc']) or 'payload'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise Discard("; ".join(faults[:5])) from error


def _notice(job: Job, report: Report) -> Notice:
    with job.transaction() as conn:
        row = conn.execute(query("read_message"), {"id": report.message}).fetchone()
    if row is None:
        raise Discard(f"there is no message {report.message} in email_messages")
    return read_notice(read_mail(bytes(row[0])))


def _refused(conn: Connection[Any], refusal: Refusal) -> Bounce | str:
    found = deliveries.find(conn, refusal.delivery_id)
    if found is None:
        return f"there is no delivery {refusal.delivery_id}"
    if refusal.verdict not in KINDS:
        return f"verdict {refusal.verdict} is nothing that failed"
    return Bounce(
        id=uuid5(refusal.job_id, refusal.source),
        delivery=found,
        kind=KINDS[refusal.verdict],
        reason=refusal.reason,
        source=refusal.source,
        message=None,
        smtp_code=refusal.code or None,
        enhanced_code=refusal.status,
        text=refusal.answer,
    )


def _returned(conn: Connection[Any], report: Report, notice: Notice) -> Bounce | str:
    found = deliveries.find_by_message_ids(conn, notice.message_ids)
    if found is None:
        return "no id in it is that of a mail which was sent"
    said = about_delivery(notice, found.email)
    if said is None:
        return f"it does not say that the mail to {found.email} failed"
    return Bounce(
        id=uuid5(report.message, str(found.id)),
        delivery=found,
        kind=KINDS[said.verdict],
        reason=said.reason,
        source=report.source,
        message=report.message,
        smtp_code=said.code,
        enhanced_code=said.status,
        text=said.diagnostic,
    )


def _counts(said: RecipientNotice) -> bool:
    return said.action in (None, Action.FAILED) and said.verdict in KINDS


def _is_at(said: RecipientNotice, email: str) -> bool:
    """Whether it speaks of this address; a report may hide whom it speaks of."""
    named = {each.casefold() for each in (said.address, said.final_address) if each}
    return not named or email.casefold() in named or said.verdict is Verdict.COMPLAINT


def _mark(conn: Connection[Any], bounce: Bounce) -> State | None:
    state = State.COMPLAINED if bounce.kind is Kind.COMPLAINT else State.BOUNCED
    facts = {
        "id": bounce.delivery.id,
        "state": state,
        "why": f"{bounce.source}: {bounce.reason}: {bounce.text[:MAX_TEXT]}".rstrip(": "),
        "seen": [*RETURNED_FROM[bounce.kind]],
    }
    return state if conn.execute(query("mark_returned"), facts).fetchone() else None


def _suppression(conn: Connection[Any], bounce: Bounce, soft_limit: int) -> Suppression | None:
    match bounce.kind:
        case Kind.HARD:
            return Suppression.HARD_BOUNCE
        case Kind.COMPLAINT:
            return Suppression.COMPLAINT
    if soft_limit == 0 or bounce.reason not in ABOUT_ADDRESS:
        return None
    facts = {"email": bounce.delivery.email, "reasons": [*ABOUT_ADDRESS], "days": SOFT_DAYS}
    row = conn.execute(query("soft_bounce_days"), facts).fetchone()
    return Suppression.SOFT_BOUNCES if row is not None and row[0] >= soft_limit else None


def _told_by(bounce: Bounce) -> str:
    return f"bounce {bounce.id} of delivery {bounce.delivery.id}"
