"""What a notification says about each recipient: delivery status notifications, feedback reports and bounces.

`read_notice` takes a mail that `penguinmails.inbound` has parsed and called a delivery status notification or a
feedback report. It answers for whom the mail failed, was delayed or was delivered, whether the address is to blame
(see `penguinmails.bounce_codes`), and the message ids by which the delivery can be found. It never raises for what is
in the mail.

Fields of reports are read leniently: field names and keywords in any case, values with comments, an address type that
is missing (RFC 3464, 2.3.1 asks for one), actions of other names.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from penguinmails.bounce_codes import Classification, Reason, Verdict, classify
from penguinmails.bounce_texts import Reading, read_bounce_text, text_of_html
from penguinmails.inbound import (
    FEEDBACK_TYPE,
    RECEIPT_TYPES,
    STATUS_TYPES,
    InboundMail,
    Kind,
    message_ids,
    read_mail,
)
from penguinmails.mime import REFERENCED, Part, header_fields

MAX_RECIPIENTS = 500
MAX_DIAGNOSTIC = 2_000
MAX_REPORT = 256 * 1024

HEADERS_TYPES = frozenset({"text/rfc822-headers", "message/rfc822-headers", "message/global-headers"})
FIELD = re.compile(r"^([A-Za-z0-9-]{1,100})[ \t]*:[ \t]*(.*)$")
ADDRESS = re.compile(r"[^\s<>;,:\"]{1,64}@[A-Za-z0-9.-]{1,255}")
UTF8_ADDRESS = re.compile(r"\\x\{([0-9A-Fa-f]{1,6})\}")
ID_IN_TEXT = re.compile(r"^[\s>|]*message-id:\s*(<[^<>\s]{1,996}>)", re.IGNORECASE | re.MULTILINE)

# RFC 5965, 7.3 and what came later: reports about other things than a recipient's displeasure are no complaints.
COMPLAINTS = frozenset({"abuse", "fraud", "virus", "other", "opt-out", "opt-out-list"})


class Action(StrEnum):
    """What became of the mail for a recipient: the actions of RFC 3464, 2.3.3."""

    FAILED = "failed"
    DELAYED = "delayed"
    DELIVERED = "delivered"
    RELAYED = "relayed"
    EXPANDED = "expanded"


ACTIONS = {
    "failed": Action.FAILED,
    "failure": Action.FAILED,
    "fail": Action.FAILED,
    "error": Action.FAILED,
    "expired": Action.FAILED,
    "delayed": Action.DELAYED,
    "delivered": Action.DELIVERED,
    "deliverable": Action.DELIVERED,
    "relayed": Action.RELAYED,
    "expanded": Action.EXPANDED,
}
SUCCESSES = frozenset({Action.DELIVERED, Action.RELAYED, Action.EXPANDED})


@dataclass(frozen=True, slots=True)
class RecipientNotice:
    """What a notification says about one recipient.

    `address` is the address that was written to where the notification tells it (`Original-Recipient`), else the one
    at which it ended (`final_address`); None where a report hides it. `action` is None in feedback reports.
    """

    address: str | None
    final_address: str | None
    action: Action | None
    verdict: Verdict
    reason: Reason
    status: str | None
    code: int | None
    diagnostic: str = field(repr=False)
    source: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Notice:
    """A notification: its recipients, and what leads to the delivery it speaks of.

    `message_ids` are those of the mail that it is about, the most reliable first: of the returned mail or its headers,
    of fields that name it, of the text, of what the notification itself refers to. `envelope_id` is the ENVID that the
    sender gave (RFC 3461). `feedback_type` is set in feedback reports only (`abuse`).
    """

    kind: Kind
    recipients: tuple[RecipientNotice, ...]
    message_ids: tuple[str, ...]
    envelope_id: str | None = None
    reporting_mta: str | None = None
    feedback_type: str | None = None


def read_notice(mail: InboundMail) -> Notice:
    """What a mail says about deliveries.

    Args:
        mail: any mail; one that is neither a delivery status notification nor a feedback report has no recipients.
    """
    if mail.kind is Kind.FEEDBACK:
        return _feedback(mail)
    if mail.kind is Kind.DELIVERY_STATUS:
        return _delivery_status(mail)
    return Notice(mail.kind, (), mail.in_reply_to or mail.references)


def _delivery_status(mail: InboundMail, *, may_open: bool = True) -> Notice:
    """A notification by its report, else by its text; some servers wrap it into another mail as a whole."""
    reading = read_bounce_text(_human_text(mail), frozenset(box.address.lower() for box in mail.recipients))
    blocks = [block for part in _parts(mail, STATUS_TYPES) for block in _blocks(part.text)]
    recipients = list(_reported(blocks, reading))
    if not recipients and may_open and (inner := _enclosed_notice(mail)):
        return inner
    if not recipients:
        recipients = list(_told(mail, reading))
    message = blocks[0] if blocks else {}
    return Notice(
        kind=mail.kind,
        recipients=tuple(recipients[:MAX_RECIPIENTS]),
        message_ids=_original_ids(mail),
        envelope_id=message.get("original-envelope-id"),
        reporting_mta=_after_type(message.get("reporting-mta", "")) or None,
    )


def _enclosed_notice(mail: InboundMail) -> Notice | None:
    for part in _parts(mail, REFERENCED):
        inner = read_mail(part.content)
        if inner.kind is Kind.DELIVERY_STATUS and any(_parts(inner, STATUS_TYPES)):
            notice = _delivery_status(inner, may_open=False)
            if notice.recipients:
                return notice
    return None


def _reported(blocks: list[dict[str, str]], reading: Reading) -> Iterator[RecipientNotice]:
    """The recipients of an RFC 3464 report: a block each, after that of the whole message."""
    seen: set[tuple[str | None, Action | None]] = set()
    for block in blocks:
        original = _address(block.get("original-recipient", ""))
        final = _address(block.get("final-recipient", "")) or _address(block.get("x-actual-recipient", ""))
        address = original or final
        if address is None:
            continue
        notice = _recipient(block, address, final or original, reading)
        key = (address.lower(), notice.action)
        if key not in seen:
            seen.add(key)
            yield notice


def _recipient(block: dict[str, str], address: str, final: str | None, reading: Reading) -> RecipientNotice:
    said = block.get("diagnostic-code", "")
    status_field = block.get("status", "")
    known = re.match(r"\s*([245])\.(\d{1,3})\.(\d{1,3})", status_field)
    status = ".".join(str(int(number)) for number in known.groups()) if known else None
    action = ACTIONS.get(re.split(r"[\s(;,]", block.get("action", "").strip().lower())[0]) or _by_class(
        status
    )
    remark = "" if known and known.end() == len(status_field.strip()) else status_field
    diagnostic = " ".join((remark, _after_type(said))).strip()
    found = classify(diagnostic, status=status)
    if found.verdict is Verdict.SOFT and found.reason in {Reason.UNKNOWN, Reason.SYSTEM} and not said:
        found = classify(f"{diagnostic} {_words_about(address, reading)}", status=status)
    return _noted(address, final, action, found, diagnostic or _words_about(address, reading))


def _noted(
    address: str, final: str | None, action: Action, found: Classification, diagnostic: str
) -> RecipientNotice:
    """The action decides first: what is delayed may still arrive, what is delivered has."""
    verdict, reason = found.verdict, found.reason
    if action in SUCCESSES:
        verdict, reason = Verdict.DELIVERED, Reason.DELIVERED
    elif action is Action.DELAYED or verdict is Verdict.DELIVERED:
        reason = reason if verdict is Verdict.SOFT and reason is not Reason.UNKNOWN else Reason.TEMPORARY
        verdict = Verdict.SOFT
    return RecipientNotice(
        address=address,
        final_address=final,
        action=action,
        verdict=verdict,
        reason=reason,
        status=found.status,
        code=found.code,
        diagnostic=diagnostic[:MAX_DIAGNOSTIC],
        source=found.source,
    )


def _by_class(status: str | None) -> Action:
    """The action where none is said that RFC 3464 knows: by the class of the status."""
    return Action.DELIVERED if status and status[0] == "2" else Action.FAILED


def _told(mail: InboundMail, reading: Reading) -> Iterator[RecipientNotice]:
    """The recipients that the text names; X-Failed-Recipients (Exim, Gmail) names them for programs."""
    listed = [address for value in _values(mail, "x-failed-recipients") for address in ADDRESS.findall(value)]
    named = {failure.address.lower(): failure for failure in reading.failures}
    addresses = listed or [failure.address for failure in reading.failures]
    action = Action.DELAYED if reading.is_delayed else Action.FAILED
    for address in dict.fromkeys(addresses):
        failure = named.get(address.lower())
        own = failure.words if failure else ""
        found = classify(own)
        if found.reason is Reason.UNKNOWN:
            found = classify(
                f"{own}\n{_session_about(address, reading)}\n{reading.words}", status=found.status
            )
        yield _noted(address, address, action, found, own or reading.words.strip())


def _words_about(address: str, reading: Reading) -> str:
    own = next((each.words for each in reading.failures if each.address.lower() == address.lower()), "")
    return own or reading.words.strip()


def _session_about(address: str, reading: Reading) -> str:
    """The lines of a session transcript (sendmail, InterScan) that speak of the address."""
    lines = reading.words.splitlines()
    return "\n".join(
        line for line in lines if address.lower() in line.lower() and re.search(r"\b[45]\d\d\b", line)
    )


def _feedback(mail: InboundMail) -> Notice:
    """A feedback report (RFC 5965): who complained, if it says so, and the mail complained of."""
    blocks = [block for part in _parts(mail, {FEEDBACK_TYPE}) for block in _blocks(part.text, merge=True)]
    report = blocks[0] if blocks else {}
    kind = report.get("feedback-type", "abuse").split("\n")[0].strip().lower()
    verdict = Verdict.COMPLAINT if kind in COMPLAINTS else Verdict.OTHER
    reason = Reason.COMPLAINT if verdict is Verdict.COMPLAINT else Reason.UNKNOWN
    said = [report.get(name, "") for name in ("original-rcpt-to", "removal-recipient", "original-recipient")]
    said.extend(
        value for fields in _returned(mail) for name, value in fields if name == "x-hmxmroriginalrecipient"
    )
    addresses = dict.fromkeys(found for value in said for found in ADDRESS.findall(value))
    return Notice(
        kind=mail.kind,
        recipients=tuple(
            RecipientNotice(address, address, None, verdict, reason, None, None, kind, "RFC 5965, 3.1")
            for address in list(addresses)[:MAX_RECIPIENTS] or [None]
        ),
        message_ids=_original_ids(mail),
        envelope_id=report.get("original-envelope-id"),
        reporting_mta=_after_type(report.get("reporting-mta", "")) or None,
        feedback_type=kind,
    )


def _original_ids(mail: InboundMail) -> tuple[str, ...]:
    ids: list[str] = []
    for fields in _returned(mail):
        ids.extend(found for name, value in fields if name == "message-id" for found in message_ids(value))
    for part in _parts(mail, STATUS_TYPES | RECEIPT_TYPES | {FEEDBACK_TYPE}):
        for block in _blocks(part.text):
            ids.extend(message_ids(block.get("original-message-id", "")))
    ids.extend(ID_IN_TEXT.findall(_human_text(mail)[:MAX_REPORT]))
    ids.extend((*mail.in_reply_to, *mail.references))
    return tuple(each for each in dict.fromkeys(ids) if each != mail.message_id)


def _returned(mail: InboundMail) -> list[tuple[tuple[str, str], ...]]:
    """The header fields of each mail, or header of one, that is enclosed."""
    return [header_fields(part.content) for part in _parts(mail, HEADERS_TYPES | set(REFERENCED))]


def _parts(mail: InboundMail, types: Iterable[str]) -> list[Part]:
    return [part for part in mail.parts if part.content_type in types]


def _human_text(mail: InboundMail) -> str:
    """The text for people; of a multipart that could not be taken apart all of it."""
    whole = [part.text for part in mail.parts if part.content_type.startswith("multipart/")]
    return next((text for text in (mail.text, text_of_html(mail.html), *whole) if text.strip()), "")


def _values(mail: InboundMail, name: str) -> list[str]:
    return [value for key, value in mail.fields if key == name]


def _blocks(text: str, *, merge: bool = False) -> list[dict[str, str]]:
    """The groups of fields of a report; names in lower case, values unfolded, of a repeated field all, a line each.

    Args:
        text: the report's content.
        merge: whether empty lines separate nothing, as in a feedback report, which has one group.
    """
    blocks: list[dict[str, str]] = [{}]
    last = ""
    for line in text[:MAX_REPORT].splitlines():
        found = FIELD.match(line)
        block = blocks[-1]
        if found:
            last = found[1].lower()
            block[last] = f"{block[last]}\n{found[2].strip()}" if last in block else found[2].strip()
        elif line[:1].isspace() and line.strip() and last in block:
            block[last] += f" {line.strip()}"
        elif not line.strip() and block and not merge:
            blocks.append({})
    return [block for block in blocks if block]


def _address(value: str) -> str | None:
    """The address of a recipient field: after its type, without angle brackets; of the types of RFC 3464 and RFC 6533."""
    plain = UTF8_ADDRESS.sub(lambda found: _character(found[1]), _after_type(value))
    found = ADDRESS.search(plain)
    return found[0].rstrip(".") if found and not plain.lower().startswith("/") else None


def _character(number: str) -> str:
    point = int(number, 16)
    return chr(point) if 0x20 < point <= 0x10FFFF and not 0xD800 <= point <= 0xDFFF else "\ufffd"


def _after_type(value: str) -> str:
    """What stands after `rfc822;`, `smtp;` or `dns;`."""
    kind, separator, rest = value.partition(";")
    return (rest if separator and len(kind.strip()) <= 20 and " " not in kind.strip() else value).strip()
