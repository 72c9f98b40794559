"""From a job's arguments to a MIME message: pure, no network, no clock."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.header import Header
from email.utils import format_datetime, quote
from uuid import UUID, uuid5

from penguinmails.addresses import MessageError, checked_address, clean_name
from penguinmails.signing import Signer
from penguinmails.templating import UNSUBSCRIBE_VARIABLE, MailTemplate, Texts, load_template, render
from penguinmails.unsubscribe import Unsubscribe

__all__ = [
    "Mail",
    "MailTemplate",
    "MessageError",
    "Sender",
    "build_mail",
    "checked_address",
    "clean_name",
    "delivery_id",
    "load_template",
]

LINE = 76
FOLD_END = "\r\n"
PLAIN_PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]+")  # RFC 5322 atoms and space: needs no quotes

# As senders really make them: no space, nothing that could end the line or the header (RFC 5322, 3.6.4, 2.1.1).
MESSAGE_ID = re.compile(r"<[\x21-\x3b\x3d\x3f-\x7e]{1,450}@[\x21-\x3b\x3d\x3f-\x7e]{1,450}>")

# What goes as it is: printable ASCII and tabs in lines that no program cuts, none of which ends in a space.
PLAIN_BODY = re.compile(r"(?:[\t\x20-\x7e]{0,77}[\x21-\x7e]\n|\n)*")
ASCII = bytes(range(128))
READABLE = 0.2  # quoted-printable up to this part of bytes beyond ASCII, base64 above: about where their lengths meet

SENDER_ID = (
    "penguinmails"  # the last part of Feedback-ID: 5 to 15 characters, the same in all mails of the sender
)


@dataclass(frozen=True, slots=True)
class Sender:
    """Who a mail comes from."""

    address: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Mail:
    """A finished message and its envelope."""

    message_id: str
    sender: str
    recipient: str
    data: bytes
    needs_utf8: bool


def delivery_id(campaign_id: UUID, recipient_id: UUID) -> UUID:
    """The id of one campaign's mail to one recipient: the same at every attempt and in every job that repeats it."""
    return uuid5(campaign_id, str(recipient_id))


def build_mail(
    template: MailTemplate,
    sender: Sender,
    *,
    delivery: UUID,
    email: str,
    name: str,
    variables: Mapping[str, str],
    date: datetime,
    campaign: UUID | None = None,
    in_reply_to: str = "",
    unsubscribe: Unsubscribe | None = None,
    signers: Sequence[Signer] = (),
) -> Mail:
    """One personalised message: text and HTML, or only text where the template has no HTML.

    Every part goes in seven bits, so that no relay without 8BITMIME can harm the text or its signature.

    Args:
        template: see `load_template`.
        sender: its address must have passed `checked_address`.
        delivery: from `delivery_id`; the Message-ID is made of it, so a receiver can see that a repeat is one.
        email: the recipient's address.
        name: the recipient's name; where it is empty the text says the part of the address before the @.
        variables: the recipient's other columns, for the template.
        date: for the Date header and the signatures, with a time zone.
        campaign: marks the mail as one of many: Precedence (so that absence notes stay away), Auto-Submitted
            (RFC 3834) and Feedback-ID, by which large mailbox providers report complaints per campaign. None: a
            single letter, without them.
        in_reply_to: the Message-ID, with its angle brackets, of the mail that this one answers (RFC 5322, 3.6.4).
        unsubscribe: adds List-Unsubscribe and List-Unsubscribe-Post, and `unsubscribe_url` to the variables.
        signers: each adds a DKIM signature.

    Raises:
        MessageError: this mail can never be built.
    """
    recipient = checked_address(email)
    shown = clean_name(name)
    values = {**variables, "email": recipient, "name": shown or recipient.rpartition("@")[0]}
    if unsubscribe is not None:
        values[UNSUBSCRIBE_VARIABLE] = unsubscribe.url_for(delivery)
    texts = render(template, values)
    message_id = f"<{delivery}@{sender.address.rpartition('@')[2]}>"
    headers = (
        _mailbox("From", clean_name(sender.name), sender.address),
        _mailbox("To", shown, recipient),
        _header("Subject", texts.subject),
        f"Date: {format_datetime(date)}",
        f"Message-ID: {message_id}",
        *(_thread_headers(in_reply_to) if in_reply_to else ()),
        *(unsubscribe.headers_for(delivery) if unsubscribe else ()),
        *(_bulk_headers(campaign) if campaign else ()),
        "MIME-Version: 1.0",
    )
    data = "".join(f"{header}\r\n" for header in headers).encode() + _body(texts, delivery)
    signatures = [signer.header_for(data, date) for signer in signers]
    needs_utf8 = not (recipient.isascii() and sender.address.isascii())
    return Mail(message_id, sender.address, recipient, b"".join([*signatures, data]), needs_utf8)


def _bulk_headers(campaign: UUID) -> tuple[str, ...]:
    return (
        "Precedence: bulk",
        "Auto-Submitted: auto-generated",
        f"Feedback-ID: {campaign}:campaign:{SENDER_ID}",
    )


def _thread_headers(answered: str) -> tuple[str, ...]:
    if not MESSAGE_ID.fullmatch(answered):
        raise MessageError(f"not a Message-ID: {answered[:80]!r}; allowed: <LEFT@RIGHT>, printable ASCII")
    return f"In-Reply-To: {answered}", f"References: {answered}"


def _body(texts: Texts, delivery: UUID) -> bytes:
    """The MIME headers of the content, and the content.

    By hand: the standard library's message object parses and folds each of these fixed headers anew, which takes half
    a millisecond a mail, more than all else together.
    """
    if texts.html is None:
        return _part("plain", texts.text)
    boundary = f"=_{delivery.hex}"  # cannot stand in quoted-printable or base64 (RFC 2045, 6.7); in other text by no chance
    head = f'Content-Type: multipart/alternative;\r\n boundary="{boundary}"\r\n\r\n'
    between = f"\r\n--{boundary}"
    return b"".join(
        (
            f"{head}--{boundary}\r\n".encode(),
            _part("plain", texts.text),
            f"{between}\r\n".encode(),
            _part("html", texts.html),
            f"{between}--\r\n".encode(),
        )
    )


def _part(subtype: str, text: str) -> bytes:
    """One text with its MIME headers, in seven bits and short lines, ended by CR LF."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = lines if lines.endswith("\n") else f"{lines}\n"
    if PLAIN_BODY.fullmatch(lines):
        encoding, content = "7bit", lines.encode("ascii")
    else:
        raw = lines.encode("utf-8")
        if len(raw.translate(None, ASCII)) <= len(raw) * READABLE:
            encoding, content = "quoted-printable", binascii.b2a_qp(raw)
        else:
            encoding, content = "base64", base64.encodebytes(raw.replace(b"\n", b"\r\n"))
    head = f'Content-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n'
    return head.encode() + content.replace(b"\n", b"\r\n")


def _header(name: str, text: str) -> str:
    """One header field, folded, everything but plain ASCII as encoded words (RFC 2047).

    By `email.header`, not by the newer policies: in Python 3.11 and 3.12 their folding loses the space where two
    encoded words meet. `=?` in a text would be read as the beginning of an encoded word and is therefore encoded.
    """
    plain = text.isascii() and "=?" not in text
    if plain and len(name) + len(text) + 2 <= LINE:
        return f"{name}: {text}"
    return f"{name}: {Header(text, None if plain else 'utf-8', LINE, name).encode(linesep=FOLD_END)}"


def _mailbox(header: str, name: str, address: str) -> str:
    """A From or To field with one mailbox; the address begins a line of its own where it would not fit."""
    if not name:
        return f"{header}: {address}"
    if name.isascii() and "=?" not in name:
        begin = f"{header}: {name}" if PLAIN_PHRASE.fullmatch(name) else f'{header}: "{quote(name)}"'
    else:
        begin = _header(header, name)
    fits = len(begin.rpartition("\n")[2]) + len(address) + 3 <= LINE
    return f"{begin}{' ' if fits else FOLD_END + ' '}<{address}>"
