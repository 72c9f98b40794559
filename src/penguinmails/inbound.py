"""From the bytes of an inbound mail to what is stored and decided on: pure, no network, no clock, no database.

`read_mail` takes anything. What cannot be understood is left out and named in `defects`; the raw bytes are kept by
whoever called. All texts are such that PostgreSQL stores them.

Which kind a mail is, in the order in which it is asked:

- **feedback report**: RFC 5965, or a complaint in the form that Microsoft's junk mail program sends.
- **delivery status notification**: RFC 3464, or a bounce in one of the forms that servers invented for themselves,
  known by who sent it (a mail system) and what its subject says.
- **automatic reply**: RFC 3834 and the fields that older programs set; read receipts (RFC 8098) too.
- **reply**: it names a message that it answers.
- **ordinary**: all else.

Nothing here is proven: anybody can write a mail that looks like a bounce. What is done about a notification must depend
on a delivery that is found by the ids in it.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import getaddresses, parsedate_to_datetime
from enum import StrEnum

from penguinmails.mime import (
    PARSER_ERRORS,
    Part,
    Structure,
    parsed_header,
    read_structure,
    storable,
)

MAX_IDS = 100  # of In-Reply-To and of References
MAX_MESSAGE_ID = 998  # a line of RFC 5322
MAX_ADDRESSES = 500
MAX_FIELDS = 1_000
MAX_SUBJECT = 1_000

MESSAGE_ID = re.compile(r"<([^<>]{1,1200})>")
# The fields that make a mail what it is; those that servers add on the way (Received, Return-Path) are no part of it.
IDENTITY_FIELDS = frozenset(
    {"from", "to", "cc", "date", "subject", "message-id", "in-reply-to", "references"}
)

STATUS_TYPES = frozenset({"message/delivery-status", "message/global-delivery-status"})
FEEDBACK_TYPE = "message/feedback-report"
RECEIPT_TYPES = frozenset({"message/disposition-notification", "message/global-disposition-notification"})

MAIL_SYSTEM = re.compile(
    r"mailer[-_ .]?daemon|mdaemon@|mail delivery|delivery ?(sub)?system|internet mail delivery|"
    r"mail ?system error|jetmail system",
    re.IGNORECASE,
)
POSTMASTER = re.compile(r"(^|\W)(postmaster|system administrator|mail administrator)(\W|$)", re.IGNORECASE)
BOUNCE_SUBJECT = re.compile(
    r"^\W*(undeliver(able|ed)|(mail )?deliver?y (status |failure|failed|notification|report|problem|warning|has failed)|"
    r"(permanent )?delivery failure|returned (e?-?mail|to sender)|failure (notice|delivery)|failed mail|non-?delivery|"
    r"message (delivery failure|delayed|undeliverable)|delayed mail|warning: |"
    r"mail (delivery|system error|not delivered|could not be|failed|failure|error)|processing error|"
    r"\[?postmaster\]?|email delivery failure|your message to .{1,200} could not be delivered|failed delivery)",
    re.IGNORECASE,
)
OLD_AUTOMATIC_FIELDS = ("x-autoreply", "x-autorespond", "x-auto-reply", "x-autoreply-from")
AUTOMATIC_SUBJECT = re.compile(
    r"^\W*(auto(matic)?[ -]?(reply|response)|out of (the )?office)\b", re.IGNORECASE
)
COMPLAINT_SENDERS = frozenset({"staff@hotmail.com"})
COMPLAINT_SUBJECT = "complaint about message from"


class Kind(StrEnum):
    """What a mail is; see the module's text."""

    ORDINARY = "ordinary"
    REPLY = "reply"
    DELIVERY_STATUS = "delivery-status"
    FEEDBACK = "feedback"
    AUTO_REPLY = "auto-reply"


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One address of a header, as it stands there, and the name beside it."""

    address: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that came with a mail; `sha256` (hexadecimal) lets it be stored once. `name` has no folders."""

    name: str
    content_type: str
    size: int
    sha256: str
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class InboundMail:
    """One mail, parsed. Message ids are in angle brackets without space; `date` is aware or None; texts may be empty.

    `sha256` is that of the content: the same for the same mail however it came. `auto_submitted` is the keyword of
    RFC 3834, `no` where none is. `size` is that of the raw mail in bytes.
    """

    kind: Kind
    message_id: str
    in_reply_to: tuple[str, ...]
    references: tuple[str, ...]
    sender: Mailbox | None
    recipients: tuple[Mailbox, ...]
    subject: str
    date: datetime | None
    text: str = field(repr=False)
    html: str = field(repr=False)
    attachments: tuple[Attachment, ...]
    sha256: str
    size: int
    auto_submitted: str
    defects: tuple[str, ...]
    fields: tuple[tuple[str, str], ...] = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)

    @property
    def is_automatic(self) -> bool:
        """A program wrote it, by its own word (RFC 3834, 5): it must never be answered by a program."""
        return self.auto_submitted != "no"

    def header(self, name: str) -> str:
        """The first raw value of a field, unfolded, or an empty text."""
        return _first(self.fields, name)


def read_mail(raw: bytes) -> InboundMail:
    """Parse one mail; never raises for what is in it, and does bounded work (see `penguinmails.mime`).

    Args:
        raw: the message of RFC 5322 as it came, any bytes.
    """
    structure = read_structure(raw)
    defects = set(structure.defects)
    fields = structure.fields[:MAX_FIELDS]
    if len(structure.fields) > MAX_FIELDS:
        defects.add("too-many-header-fields")
    texts, pages, files = _sorted_out(structure.parts)
    senders = _mailboxes(fields, ("from", "sender"), defects)
    return InboundMail(
        kind=_kind(structure, fields),
        message_id=next(iter(message_ids(_first(fields, "message-id"))), ""),
        in_reply_to=message_ids(_first(fields, "in-reply-to")),
        references=message_ids(_first(fields, "references")),
        sender=senders[0] if senders else None,
        recipients=_mailboxes(fields, ("to", "cc"), defects),
        subject=_subject(fields, defects),
        date=_date(_first(fields, "date"), defects),
        text="\n".join(part.text for part in texts),
        html="\n".join(part.text for part in pages),
        attachments=tuple(_attachment(part) for part in files),
        sha256=content_hash(raw, structure),
        size=len(raw),
        auto_submitted=_auto_submitted(fields),
        defects=tuple(sorted(defects)),
        fields=fields,
        parts=structure.parts,
    )


def message_ids(value: str) -> tuple[str, ...]:
    """The message ids in a header value, each `<id>` without space, in order, once; the last `MAX_IDS` of them.

    Where no id is in angle brackets, each word with an @ counts as one, and in a value of one word that word does:
    both happen, and RFC 5322, 3.6.4 has ids compared as a whole.
    """
    found = MESSAGE_ID.findall(value)
    if not found:
        words = re.split(r"[\s<>]+", value.strip("<> \t\r\n"))
        found = [word for word in words if "@" in word] or (words if len(words) == 1 else [])
    ids = ("".join(text.split()) for text in found)
    kept = dict.fromkeys(f"<{text}>" for text in ids if 0 < len(text) <= MAX_MESSAGE_ID - 2)
    return tuple(kept)[-MAX_IDS:]


def content_hash(raw: bytes, structure: Structure) -> str:
    """SHA-256 (hexadecimal) of what the author wrote: identity fields, MIME fields and body.

    Trace fields, the order of fields, folding and line ends do not change it, so two copies of a mail that came by
    different ways are one content; a mail without Message-ID has an identity all the same.
    """
    digest = hashlib.sha256()
    for name, value in sorted(structure.fields):
        if name in IDENTITY_FIELDS or name.startswith("content-"):
            digest.update(f"{name}: {' '.join(value.split())}\n".encode())
    lines = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    _, _, body = (b"\n" + lines).partition(b"\n\n")
    digest.update(b"\n" + body.rstrip(b"\n"))
    return digest.hexdigest()


def _first(fields: Iterable[tuple[str, str]], name: str) -> str:
    value = next((value for key, value in fields if key == name), "")
    return " ".join(value.split())


def _subject(fields: tuple[tuple[str, str], ...], defects: set[str]) -> str:
    raw = _first(fields, "subject")
    parsed = parsed_header("subject", raw)
    if parsed is None:
        defects.add("bad-subject")
    text = storable(str(raw if parsed is None else parsed))
    return " ".join(text.split())[:MAX_SUBJECT]


def _mailboxes(
    fields: tuple[tuple[str, str], ...], names: tuple[str, ...], defects: set[str]
) -> tuple[Mailbox, ...]:
    """The addresses of the fields of these names; by the older, laxer parser where the modern one fails."""
    found: list[Mailbox] = []
    for name, value in fields:
        if name in names and len(found) < MAX_ADDRESSES:
            found.extend(_addresses(name, value, defects))
    return tuple(found[:MAX_ADDRESSES])


def _addresses(name: str, value: str, defects: set[str]) -> list[Mailbox]:
    parsed = parsed_header(name, value)
    try:
        addresses = getattr(parsed, "addresses", None)
        if addresses is None and parsed is not None:
            addresses = (parsed.address,) if getattr(parsed, "address", None) else ()  # type: ignore[attr-defined]
        if addresses is not None:
            return [_mailbox(each.addr_spec, each.display_name) for each in addresses if each.username]
        pairs = getaddresses([value])
    except PARSER_ERRORS:
        pairs = []
    defects.add(f"bad-{name}")
    return [_mailbox(address, shown) for shown, address in pairs if "@" in address]


def _mailbox(address: str, name: str) -> Mailbox:
    return Mailbox(storable(address)[:320], " ".join(storable(name).split())[:320])


def _date(value: str, defects: set[str]) -> datetime | None:
    """The moment that the Date field names; `-0000` means UTC with the sender's zone unknown (RFC 5322, 3.3)."""
    if not value:
        return None
    try:
        date = parsedate_to_datetime(value[:200])
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC)
    except PARSER_ERRORS:
        defects.add("bad-date")
        return None


def _sorted_out(parts: tuple[Part, ...]) -> tuple[list[Part], list[Part], list[Part]]:
    """The parts that are the mail's text, its HTML, and all that came with it."""
    texts: list[Part] = []
    pages: list[Part] = []
    files: list[Part] = []
    for part in parts:
        is_body = not part.is_attachment and not part.name
        if is_body and part.content_type == "text/plain":
            texts.append(part)
        elif is_body and part.content_type == "text/html":
            pages.append(part)
        else:
            files.append(part)
    return texts, pages, files


def _attachment(part: Part) -> Attachment:
    digest = hashlib.sha256(part.content).hexdigest()
    return Attachment(part.name, part.content_type, len(part.content), digest, part.content)


def _auto_submitted(fields: tuple[tuple[str, str], ...]) -> str:
    """The keyword of RFC 3834, 5; without its comments and parameters."""
    value = re.split(r"[;(\s]", _first(fields, "auto-submitted").lower(), maxsplit=1)[0]
    return value[:40] or "no"


def _kind(structure: Structure, fields: tuple[tuple[str, str], ...]) -> Kind:
    types = {part.content_type for part in structure.parts}
    if FEEDBACK_TYPE in types or structure.report_type == "feedback-report" or _is_complaint(fields):
        return Kind.FEEDBACK
    if types & STATUS_TYPES or structure.report_type == "delivery-status" or _is_bounce(fields):
        return Kind.DELIVERY_STATUS
    answers = message_ids(_first(fields, "in-reply-to")) or message_ids(_first(fields, "references"))
    keyword = _auto_submitted(fields)
    old_style = "auto" in _first(fields, "precedence").lower() or any(
        _first(fields, name) for name in OLD_AUTOMATIC_FIELDS
    )
    by_subject = AUTOMATIC_SUBJECT.match(_first(fields, "subject"))
    automatic = types & RECEIPT_TYPES or old_style or by_subject or keyword == "auto-replied"
    if automatic or (keyword != "no" and answers):
        return Kind.AUTO_REPLY
    return Kind.REPLY if answers else Kind.ORDINARY


def _is_complaint(fields: tuple[tuple[str, str], ...]) -> bool:
    """Microsoft's junk mail reporting program: the mail complained of is enclosed as it is, with no report."""
    subject = _first(fields, "subject").lower()
    return subject.startswith(COMPLAINT_SUBJECT) and any(
        sender in _first(fields, "from").lower() for sender in COMPLAINT_SENDERS
    )


def _is_bounce(fields: tuple[tuple[str, str], ...]) -> bool:
    """A mail system wrote it and says that a mail did not arrive; or its subject says so at the very beginning."""
    senders = " ".join((_first(fields, "from"), _first(fields, "return-path")))
    subject = _first(fields, "subject")
    if MAIL_SYSTEM.search(senders):
        return True
    parsed = parsed_header("subject", subject)
    shown = subject if parsed is None else str(parsed)
    null_path = _first(fields, "return-path") == "<>" and _auto_submitted(fields) != "auto-replied"
    if BOUNCE_SUBJECT.match(shown):
        return True
    return bool(POSTMASTER.search(senders) and (null_path or "deliver" in shown.lower()))
