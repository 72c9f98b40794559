"""Bounces that are only written for people: who did not get the mail, and what the server said.

Many servers send their notification in a form of their own: qmail (its QSBMF), Exim, older Postfix and sendmail,
Exchange, Yahoo, Gmail, MDaemon, InterScan, mail.ru and more. Nearly all follow one of two plans, and those are read
here, not the servers:

- a sentence that says that a mail did not arrive, and below it the addresses, each at the beginning of a line, with
  the server's words behind or below;
- the address within the sentence.

What follows a line that announces the returned mail is never looked at: its addresses are not those that failed.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_TEXT = 64 * 1024
MAX_LINES = 1_000
MAX_FAILURES = 200
MAX_WORDS = 2_000

ADDRESS = r"[^\s<>()\[\]:;,\"'@*|]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?(?![A-Za-z0-9@-]|\.[A-Za-z0-9])"

RETURNED = re.compile(
    r"original (message|mail)( message| details| headers| follows|\s*-|:|\.|\s*$)|^\W*original[- ]message|"
    r"(returned|undelivered|unsent|forwarded|old|source) (message|mail)( follows| below| headers?|\s*-|:|\s*$)|"
    r"cop(y|ie) of (the|your|this) (original )?(message|mail|first)|headers? of the (original|source|message)|"
    r"(message|mail) (text|body|headers?)(/body)?( part)? (follows?|suppressed)|message headers?:|"
    r"below th(is|e next) line|attachment is a copy|original adjunto|^\W*mail data\W*$|"
    r"(first|top) \d+ (lines|bytes)|summary of the (undelivered|original)|message reads \(in part\)|"
    r"start of returned|unsent message below|^>?(received|return-path): ",
    re.IGNORECASE,
)
NOT_RETURNED = re.compile(
    r"(is|was|be) (attached|returned|enclosed)|delete your own text|relates to|resend|receive a copy",
    re.IGNORECASE,
)
SAYS_FAILED = re.compile(
    r"deliver|recipient|reach|\baddress|undeliver|permanent|failed|fatal errors|not able|unable|rejected|bounced|"
    r"did not receive|not be sent|could not send|delivery|receive (this|your|a copy)|was returned",
    re.IGNORECASE,
)
DELAYED = re.compile(
    r"(has|have) not yet (been|received)|has been (delayed|postponed)|will (be )?(retr|continue)|still being retried|"
    r"warning (message )?only|just a warning|no action is required|attempts will continue|still trying|"
    r"delivery (status notification )?\(delay|not yet been delivered|do not need to resend",
    re.IGNORECASE,
)
ENTRY = re.compile(
    r"^\s*(?:[*>•|-]+\s*)?(?:[45]\d\d\s+(?:[45]\.\d{1,3}\.\d{1,3}\s+)?)?(?:(?:(?:failed |original )?recipient(?: address)?|address|e-?mail|smtp):\s*)*"
    rf"\[?(?:smtp:)?[\"'<\[]*(?P<address>{ADDRESS})[>\"'\]]*(?P<rest>\s*|\s*[:;(.<\[-].*|\s+(?:on\s+[\w/]|invalid|unknown|not|is|was).*)$",
    re.IGNORECASE,
)
ALIAS = re.compile(
    rf"\((?:expanded from|generated from|was addressed to|originally addressed to):?\s*<?({ADDRESS})",
    re.IGNORECASE,
)
PLACE = rf"[<\"'\[]{{0,2}}(?P<address>{ADDRESS})"
IN_SENTENCE = tuple(
    re.compile(pattern.replace("ADDRESS", PLACE), re.IGNORECASE)
    for pattern in (
        r"undeliverable\s+to:?\s+ADDRESS",
        r"delivery failed \d+ attempts:\s?ADDRESS",
        r"(?:unknown|invalid|bad) (?:local )?(?:user|recipient|address|mailbox):\s?ADDRESS",
        r"invalid final delivery userid:\s?ADDRESS",
        r"intended recipient:\s?ADDRESS",
        r"undeliverable address:\s?ADDRESS",
        r"failed recipient:\s?ADDRESS",
        r"(?:original|recipient) address:\s?ADDRESS",
        r"(?:your|the) (?:mail |following )?message,? (?:sent )?(?:addressed )?to:? ADDRESS",
        r"(?:un|not )able to deliver (?:your |the |this )?(?:message|mail) to:? ADDRESS",
        r"(?:could not|cannot|not) be delivered to:? (?:the following address: |address )?ADDRESS",
        r"(?:was|were) not delivered to:? ADDRESS",
        r"did not reach the following recipient:? ADDRESS",
        r"originally addressed to ADDRESS",
        r"error-for: +ADDRESS",
        r"(?:mailbox|user|recipients?|account|address)(?: [a-z ]{1,40})?:\s?ADDRESS",
        r"deliver(?:ing|y of)? (?:your |the |this )?(?:message|e?-?mail) to:? ADDRESS",
        r"deliver the following message\W[^@]{0,300}\bto:\s?ADDRESS",
        r"mailbox ADDRESS is",
        r"dda:smtp=ADDRESS",
        r"generated from ADDRESS",
        r"message was addressed, ADDRESS",
        r"(?:rejected|unknown|invalid) (?:recipient|user|address):? ADDRESS",
        r"rcpt to:\s?ADDRESS",
        r"ADDRESS - no such user",
        r"\* \[ADDRESS\]:",
    )
)
OWN_ADDRESS = re.compile(r"^(postmaster|mailer-daemon|abuse|support|helpdesk)@", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Failure:
    """One address that a text says did not get the mail, and the server's words about it (perhaps none)."""

    address: str
    words: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text says: the failures, whether the mail is still being tried, and the text up to the returned mail."""

    failures: tuple[Failure, ...]
    is_delayed: bool
    words: str


def read_bounce_text(text: str, own: frozenset[str] = frozenset()) -> Reading:
    """Find the addresses that a human-readable notification names.

    Args:
        text: the notification's text; its first `MAX_TEXT` characters count.
        own: addresses (lower case) that are ours: whom the notification was sent to. They have failed only if no
            other address has.

    Returns:
        The failures in order, each address once; none where the text follows no known plan.
    """
    said = _before_returned(text[:MAX_TEXT])
    found: dict[str, Failure] = {}
    for failure in (*_listed(said), *_in_sentences("\n".join(said))):
        key = failure.address.lower()
        known = key in found and (found[key].words or not failure.words)
        if not known and not OWN_ADDRESS.match(key) and len(found) < MAX_FAILURES:
            found[key] = failure
    words = "\n".join(said)
    others = [failure for key, failure in found.items() if key not in own]
    return Reading(tuple(others or found.values()), DELAYED.search(words) is not None, words)


def text_of_html(page: str) -> str:
    """The words of an HTML page with its line breaks; tags are taken out, not understood."""
    text = re.sub(r"<(?:br|/p|/div|/tr|/li|/h\d|hr)\b[^<>]*>", "\n", page[:MAX_TEXT], flags=re.IGNORECASE)
    return html.unescape(re.sub(r"<[^<>]*>", " ", text)).replace("\xa0", " ")


def _before_returned(text: str) -> list[str]:
    """The lines up to the one that announces the returned mail."""
    said: list[str] = []
    for line in text.splitlines()[:MAX_LINES]:
        if said and len(line) < 200 and RETURNED.search(line) and not NOT_RETURNED.search(line):
            break
        said.append(line)
    return said


def _listed(lines: list[str]) -> Iterator[Failure]:
    """Addresses at the beginning of lines, below a sentence that says that something did not arrive."""
    announced = False
    index = 0
    while index < len(lines):
        line = lines[index]
        entry = ENTRY.match(line)
        plain = entry is not None and (entry["rest"].startswith(":") or line.lstrip()[:3].isdigit())
        index += 1
        if entry is None or not (announced or plain):
            announced = announced or SAYS_FAILED.search(line) is not None
            continue
        is_transcript = line.lstrip()[:1].isdigit()
        words, index = _words_below(lines, index, only_indented=is_transcript)
        alias = ALIAS.search(f"{entry['rest']} {words}")
        answer = line.strip() if is_transcript else entry["rest"].strip(" :>")
        said = f"{answer} {words}".strip()
        yield Failure(entry["address"], said[:MAX_WORDS])
        if alias:
            yield Failure(alias[1], said[:MAX_WORDS])


def _words_below(lines: list[str], start: int, *, only_indented: bool) -> tuple[str, int]:
    """The lines after an address up to an empty one or the next address, and where they end."""
    end = start
    while end < len(lines) and lines[end].strip() and not _begins_entry(lines[end]):
        if only_indented and not lines[end][:1].isspace():
            break
        end += 1
    return " ".join(line.strip() for line in lines[start:end]), end


def _begins_entry(line: str) -> bool:
    """Whether a line is about another address; one in the middle of an indented explanation is not."""
    entry = ENTRY.match(line)
    if entry is None:
        return False
    return (
        entry["rest"].strip() in {"", ":", ">:"} or entry["rest"].startswith(":") or not line.startswith("  ")
    )


def _in_sentences(text: str) -> Iterator[Failure]:
    flat = re.sub(r"[ \t]*\r?\n[ \t]*", " ", text)
    for pattern in IN_SENTENCE:
        for found in pattern.finditer(flat):
            yield Failure(found["address"], "")
