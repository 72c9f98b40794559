"""From a job's arguments to a MIME message: pure, no network, no clock."""

import html
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.errors import HeaderParseError
from email.header import Header
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, quote
from functools import lru_cache
from pathlib import Path
from string import Template
from uuid import UUID, uuid5

MAX_ADDRESS = 254  # RFC 5321, 4.5.3.1.3, without the angle brackets
MAX_NAME = 120
MAX_SUBJECT = 400
UTF8_LOCAL_PART = re.compile(
    r'[^\s"(),.:;<>@\[\\\]]+(\.[^\s"(),.:;<>@\[\\\]]+)*'
)  # RFC 6531: atext and all beyond ASCII
TEMPLATE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

LINE = 76
FOLD_END = "\r\n"
PLAIN_PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]+")  # RFC 5322 atoms and space: needs no quotes

# 7bit: quoted-printable or base64 where needed, so that no relay without 8BITMIME can harm the text.
BODY_POLICY = SMTP.clone(cte_type="7bit")

JOINERS = (
    "\u200c\u200d"  # joiners of Persian names and of emoji: the only invisible characters that names need
)


class MessageError(ValueError):
    """This mail can never be built (bad address, unknown template, missing variable): trying again would not help."""


@dataclass(frozen=True, slots=True)
class MailTemplate:
    """The three texts of a template; `$name`, `$email` and the recipient's own columns stand for values."""

    name: str
    subject: Template
    text: Template
    html: Template


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


def checked_address(text: str) -> str:
    """An address as SMTP takes it: one mailbox, its domain in ASCII (IDNA), nothing that could end a line.

    Args:
        text: what a person or a file gave, with or without space around it.

    Raises:
        MessageError: it is not one address; the message names it.
    """
    address = text.strip()
    if not address or len(address) > MAX_ADDRESS or not address.isprintable():
        raise MessageError(
            f"e-mail address {text[:MAX_ADDRESS]!r} is empty, longer than {MAX_ADDRESS} or not printable"
        )
    try:
        parsed = _parsed(address)
        domain = parsed.domain.encode("idna").decode("ascii")
    except (HeaderParseError, ValueError, IndexError) as error:
        raise MessageError(f"{address!r} is not an e-mail address like name@example.com ({error})") from error
    if not parsed.username or not domain:
        raise MessageError(f"{address!r} is not an e-mail address like name@example.com")
    return Address(username=parsed.username, domain=domain).addr_spec


def _parsed(address: str) -> Address:
    """The two halves of an address; a local part beyond ASCII (RFC 6531) is taken without quotes only."""
    local, _, domain = address.rpartition("@")
    if not local.isascii() and UTF8_LOCAL_PART.fullmatch(local):
        return Address(username=local, domain=Address(addr_spec=f"x@{domain}").domain)
    return Address(addr_spec=address)


def clean_name(text: str, longest: int = MAX_NAME) -> str:
    """A name or subject on one line: controls become spaces, invisible and half characters go, space runs become one.

    So nothing that came with a recipient can begin a header of its own or turn the direction of reading.
    """
    return " ".join("".join(_visible(character) for character in text).split())[:longest].rstrip()


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    if category in {"Cc", "Zl", "Zp", "Zs"}:
        return " "
    return "" if category in {"Cf", "Cs"} and character not in JOINERS else character


@lru_cache(maxsize=64)
def load_template(folder: Path, name: str) -> MailTemplate:
    """The template `name`: the files subject.txt, body.txt and body.html of its folder, read once per process.

    Raises:
        MessageError: no such template, or a name that is no plain word (a path, for instance).
    """
    if not TEMPLATE_NAME.fullmatch(name):
        raise MessageError(f"template name {name!r} is not allowed: lower-case letters, digits, - and _ only")
    try:
        parts = [
            (folder / name / file).read_text("utf-8") for file in ("subject.txt", "body.txt", "body.html")
        ]
    except OSError as error:
        raise MessageError(
            f"template {name!r} cannot be read in {folder}: {error.strerror}: {error.filename}"
        ) from error
    return MailTemplate(name, *(Template(part) for part in parts))


def build_mail(
    template: MailTemplate,
    sender: Sender,
    *,
    delivery: UUID,
    email: str,
    name: str,
    variables: Mapping[str, str],
    date: datetime,
) -> Mail:
    """One personalised message with a text and an HTML part.

    Args:
        template: see `load_template`.
        sender: its address must have passed `checked_address`.
        delivery: from `delivery_id`; the Message-ID is made of it, so a receiver can see that a repeat is one.
        email: the recipient's address.
        name: the recipient's name; where it is empty the text says the part of the address before the @.
        variables: the recipient's other columns, for the template.
        date: for the Date header, with a time zone.

    Raises:
        MessageError: this mail can never be built.
    """
    recipient = checked_address(email)
    shown = clean_name(name)
    values = {**variables, "email": recipient, "name": shown or recipient.rpartition("@")[0]}
    body = EmailMessage(policy=BODY_POLICY)
    body.set_content(_fill(template, template.text, values))
    escaped = {key: html.escape(value) for key, value in values.items()}
    body.add_alternative(_fill(template, template.html, escaped), subtype="html")
    message_id = f"<{delivery}@{sender.address.rpartition('@')[2]}>"
    headers = (
        _mailbox("From", clean_name(sender.name), sender.address),
        _mailbox("To", shown, recipient),
        _header("Subject", clean_name(_fill(template, template.subject, values), MAX_SUBJECT)),
        f"Date: {format_datetime(date)}",
        f"Message-ID: {message_id}",
    )
    data = "".join(f"{header}\r\n" for header in headers).encode() + body.as_bytes()
    needs_utf8 = not (recipient.isascii() and sender.address.isascii())
    return Mail(message_id, sender.address, recipient, data, needs_utf8)


def _header(name: str, text: str) -> str:
    """One header field, folded, everything but plain ASCII as encoded words (RFC 2047).

    By `email.header`, not by the newer policies: in Python 3.11 and 3.12 their folding loses the space where two
    encoded words meet. `=?` in a text would be read as the beginning of an encoded word and is therefore encoded.
    """
    plain = text.isascii() and "=?" not in text
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


def _fill(template: MailTemplate, part: Template, values: Mapping[str, str]) -> str:
    """`part` with its values; half characters (lone surrogates) cannot be encoded and become question marks."""
    try:
        filled = part.substitute(values)
    except KeyError as error:
        raise MessageError(
            f"template {template.name!r} uses ${error.args[0]}, which this recipient does not have"
        ) from error
    except ValueError as error:
        raise MessageError(f"template {template.name!r}: {error}") from error
    return filled.encode("utf-8", "replace").decode("utf-8")
