"""The queue `email:processing`: an inbound mail is read, stored once, and what it is about is found.

A job names the raw message (RFC 5322), it does not carry it: by `path`, a file that the workers can read, or by `content`, the key of
a row in `email_contents` that whoever received the mail has left there (`leave_raw`, or an insert of hash, size and raw bytes).

Everything is one transaction with the job's end: the content and the message, the delivery that the message answers, and for a
delivery status notification or a feedback report one job in `bounce:process`. A message is one by its Message-ID and content, and
all ids are made of these, so the same mail handed in again, in whatever way, changes nothing.

What is wrong with a mail is no reason to fail: it is stored with its `defects`, and as `malformed` if it is no mail at all.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self
from uuid import UUID, uuid5

from psycopg import Connection
from psycopg.types.json import Jsonb
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from penguinmails import deliveries, schema
from penguinmails.deliveries import Suppression
from penguinmails.inbound import InboundMail, Kind, content_hash, read_mail
from penguinmails.mime import MAX_MESSAGE_BYTES, read_structure
from penguinmails.notices import read_notice
from penguinmails.queues import BOUNCE, INBOUND, app
from penguinmails.schema import query
from penguinmails.settings import mail_settings
from penguinmails.unsubscribe import UnsubscribeTokenError, read_unsubscribe_token
from pmqd import Discard, Job

MESSAGES = UUID("6f0f3b0e-5f0c-5d0a-9a53-3d1a1f1a7f10")  # the name space of ids of messages
UNSUBSCRIBE_SUBJECT = re.compile(r"\s*unsubscribe\s+([A-Za-z0-9_-]{1,100})\s*", re.IGNORECASE)

# What trying again does not heal; other errors of a file system (a server that is away) may pass.
NEVER_READABLE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

KINDS = {
    Kind.ORDINARY: "message",
    Kind.REPLY: "reply",
    Kind.AUTO_REPLY: "auto_reply",
    Kind.DELIVERY_STATUS: "notification",
    Kind.FEEDBACK: "feedback",
}
MALFORMED = "malformed"


class RawMailError(ValueError):
    """There is no raw mail where the job says, or one that is not taken: trying again would not help."""


class InboundRequest(BaseModel):
    """The payload of a job: where the raw mail is, one of `path` (absolute) and `content`; and the address that it arrived at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)] | None = None
    content: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    mailbox: Annotated[str, Field(max_length=320)] = ""

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.path is None) == (self.content is None):
            raise ValueError(
                "one of path (of a file) and content (the hash of a row in email_contents) is needed"
            )
        return self


@dataclass(frozen=True, slots=True)
class Stored:
    """A message in the database: whether this made it, and the delivery that it is about."""

    id: UUID
    kind: str
    is_new: bool
    delivery: UUID | None


@app.handler(INBOUND, timeout=60)
def process_inbound(job: Job) -> None:
    """Read, store and follow up one inbound mail.

    Args:
        job: its payload is an `InboundRequest`.

    Raises:
        Discard: the payload does not fit, or the raw mail is not there, not readable, or larger than `MAX_MESSAGE_BYTES`.
        OSError: the file system failed otherwise; tried again.
    """
    schema.require(job)
    try:
        request = InboundRequest.model_validate(job.payload)
        raw = _raw(job, request)
    except (ValidationError, RawMailError) as error:
        raise Discard(_words(error)) from error
    mail = read_mail(raw)
    about = _about(mail)  # before the transaction: a hostile mail may take its time
    told: dict[str, Any] = {}
    with job.settling(result=told) as conn:
        stored = store(conn, mail, raw, about=about, mailbox=request.mailbox, left=request.content)
        told |= {
            "message": stored.id,
            "kind": stored.kind,
            "is_new": stored.is_new,
            "delivery": stored.delivery,
        }
        if mail.kind in (Kind.DELIVERY_STATUS, Kind.FEEDBACK):
            told["bounce_job"] = _hand_on(conn, stored)
        elif stored.is_new and (delivery := _unsubscribed(conn, mail)):
            told["unsubscribed"] = delivery


def request_inbound(
    conn: Connection[Any], *, path: Path | None = None, content: str | None = None, mailbox: str = ""
) -> UUID:
    """Enqueue the job for one raw mail.

    Args:
        conn: in a transaction.
        path: of a file that the workers can read, and that stays until one has.
        content: instead of it, what `leave_raw` gave.
        mailbox: the address at which the mail arrived.

    Returns:
        The job's id.

    Raises:
        RawMailError: not one of `path` and `content`, or one that is not allowed.
    """
    try:
        request = InboundRequest(
            path=str(path.absolute()) if path else None, content=content, mailbox=mailbox
        )
    except ValidationError as error:
        raise RawMailError(_words(error)) from error
    return app.enqueue(INBOUND, request.model_dump(exclude_none=True), conn=conn)


def read_raw(path: Path) -> bytes:
    """The bytes of a raw mail in a file.

    Raises:
        RawMailError: it is not there, not readable, no regular file, or larger than `MAX_MESSAGE_BYTES`.
        OSError: the file system failed.
    """
    try:
        with open(path, "rb", opener=_opened) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RawMailError(f"{path}: not a regular file")
            raw = file.read(MAX_MESSAGE_BYTES + 1)
    except NEVER_READABLE as error:
        raise RawMailError(f"{path}: {error.strerror}") from error
    return checked_size(raw, str(path))


def _opened(path: str, flags: int) -> int:
    """Not to wait for whoever would write into a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def checked_size(raw: bytes, name: str) -> bytes:
    """The same bytes, if they are not too many for a mail.

    Raises:
        RawMailError: names them and the limit.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise RawMailError(
            f"{name}: more than {MAX_MESSAGE_BYTES:,} bytes, which is the largest mail that is taken"
        )
    return raw


def leave_raw(conn: Connection[Any], raw: bytes) -> str:
    """Put a raw mail into the database, for a job that names it by `content`: workers on other hosts have no files of this one.

    Args:
        conn: in the transaction in which the job is enqueued.
        raw: the mail.

    Returns:
        Its key in `email_contents`, hexadecimal: the same for the same mail.

    Raises:
        RawMailError: it is larger than `MAX_MESSAGE_BYTES`.
    """
    key = content_hash(checked_size(raw, "the mail"), read_structure(raw))
    conn.execute(query("leave_content"), {"hash": bytes.fromhex(key), "size": len(raw), "raw": raw})
    return key


def store(
    conn: Connection[Any],
    mail: InboundMail,
    raw: bytes,
    *,
    about: Sequence[str],
    mailbox: str = "",
    left: str | None = None,
) -> Stored:
    """Store a mail, content and message, if that is not done.

    Args:
        conn: in a transaction.
        mail: what `read_mail` made of it.
        raw: the mail as it came.
        about: the Message-IDs that it speaks of, the most reliable first.
        mailbox: the address at which it arrived.
        left: the key under which its raw bytes lie in the database already.
    """
    facts = _content_facts(mail, left or mail.sha256)
    if left is None:
        conn.execute(query("add_content"), {**facts, "size": len(raw), "raw": raw})
    else:
        conn.execute(query("describe_content"), facts)
    found = deliveries.find_by_message_ids(conn, about)
    message, kind = message_key(mail), _row_kind(mail)
    row = {
        "id": message,
        "message_id": mail.message_id,
        "hash": facts["hash"],
        "mailbox": mailbox,
        "kind": kind,
        "sender": mail.sender.address if mail.sender else "",
        "recipients": [box.address for box in mail.recipients],
        "subject": mail.subject,
        "in_reply_to": list(_answered(mail)),
        "delivery": found.id if found else None,
        "sent_at": mail.date,
    }
    is_new = conn.execute(query("add_message"), row).fetchone() is not None
    return Stored(message, kind, is_new, found.id if found else None)


def message_key(mail: InboundMail) -> UUID:
    """The id of a mail in `email_messages`: of its Message-ID and content, so the same whenever and however it comes."""
    return uuid5(MESSAGES, f"{mail.message_id}\n{mail.sha256}")


def _raw(job: Job, request: InboundRequest) -> bytes:
    if request.path is not None:
        return read_raw(Path(request.path))
    assert request.content is not None
    with job.transaction() as conn:
        row = conn.execute(query("read_content"), {"hash": bytes.fromhex(request.content)}).fetchone()
    if row is None:
        raise RawMailError(f"there is no content {request.content} in email_contents")
    return checked_size(bytes(row[0]), f"content {request.content}")


def _content_facts(mail: InboundMail, key: str) -> dict[str, Any]:
    files = [
        {"name": each.name, "type": each.content_type, "size": each.size, "sha256": each.sha256}
        for each in mail.attachments
    ]
    return {
        "hash": bytes.fromhex(key),
        "headers": Jsonb([list(each) for each in mail.fields]),
        "text": mail.text or None,
        "html": mail.html or None,
        "attachments": Jsonb(files),
        "defects": list(mail.defects),
    }


def _row_kind(mail: InboundMail) -> str:
    """RFC 5322, 3.6 asks for a date and an author: what has neither, and is nothing else that is known, is no mail."""
    is_mail = mail.kind is not Kind.ORDINARY or mail.date is not None or mail.sender is not None
    return KINDS[mail.kind] if is_mail else MALFORMED


def _about(mail: InboundMail) -> Sequence[str]:
    """The ids of the mails that it speaks of, the most reliable first."""
    if mail.kind in (Kind.DELIVERY_STATUS, Kind.FEEDBACK):
        return read_notice(mail).message_ids
    return _answered(mail)


def _answered(mail: InboundMail) -> tuple[str, ...]:
    """In-Reply-To, then the thread (References) from its end."""
    return tuple(dict.fromkeys((*mail.in_reply_to, *reversed(mail.references))))


def _hand_on(conn: Connection[Any], stored: Stored) -> UUID:
    """One job for each notification, in the transaction that stores it."""
    payload = {"source": stored.kind, "message": stored.id}
    return app.enqueue(BOUNCE, payload, conn=conn, id=uuid5(stored.id, BOUNCE))


def _unsubscribed(conn: Connection[Any], mail: InboundMail) -> UUID | None:
    """The mail of somebody who unsubscribes by mail, as List-Unsubscribe offers it: its subject has a token of ours."""
    offered, asked = mail_settings().unsubscribe, UNSUBSCRIBE_SUBJECT.fullmatch(mail.subject)
    if offered is None or asked is None:
        return None
    try:
        found = deliveries.find(conn, read_unsubscribe_token(asked[1], offered.keys))
    except UnsubscribeTokenError:
        return None
    if found is None:
        return None
    deliveries.suppress(conn, found.email, Suppression.UNSUBSCRIBE, f"message {message_key(mail)}")
    return found.id


def _words(error: ValidationError | RawMailError) -> str:
    if isinstance(error, RawMailError):
        return str(error)
    faults = [
        f"{'.'.join(str(part) for part in fault['loc']) or 'payload'}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors(include_url=False, include_input=False)
    ]
    return "; ".join(faults[:5])
