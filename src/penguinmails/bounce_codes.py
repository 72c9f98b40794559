"""Why a mail did not arrive, and whether the address is to blame: enhanced status codes, SMTP codes and server texts.

**Hard** means that the address is at fault and stays so: no such mailbox, no such domain, a mailbox closed for good.
It is a reason never to write there again. **Soft** is everything else that failed: a full mailbox, a size limit, a
policy, the sender's reputation, a network, and every failure that nothing explains. RFC 3463 calls class 5 permanent,
but permanent is meant of this message in this form; only the code's detail tells about the address.

Three things are asked, the most exact one first:

1. the enhanced status code, by the table `STATUSES`, if its detail says something (`firm`) and the server's words do
   not speak of something else (`CONTRADICTIONS`): a wrong "hard" costs a reader for ever, a wrong "soft" one more mail;
2. the server's words, by the table `PHRASES`, since many servers answer `5.0.0`, `5.7.1` or no enhanced code at all;
3. the code's loose meaning in `STATUSES`, then the SMTP code, by the table `REPLIES`, if it may be about the recipient.

Each row names its source.
"""

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from penguinmails.smtp_answers import BEFORE_MAIL, Stage

MAX_TEXT = 4_000  # characters of a server's words that are looked at

ENHANCED = re.compile(r"(?<![\d.])([45])\.(\d{1,3})\.(\d{1,3})(?!\.?\d)")
NOT_ABOUT_RECIPIENT = re.compile(
    r"end of data|to (end of )?data|>>> data|\(data\)|text command|after content", re.IGNORECASE
)
SMTP_CODE = re.compile(r"(?<![\w.:/-])([45][0-5]\d)(?=[\s:#-])")
ADDRESS = re.compile(r"[^\s<>()\[\]:;,\"']{1,64}@[A-Za-z0-9.-]{1,255}")


BEFORE_RCPT = BEFORE_MAIL | {Stage.MAIL}


class Verdict(StrEnum):
    """What a notification means for the address."""

    HARD = "hard"
    SOFT = "soft"
    DELIVERED = "delivered"
    COMPLAINT = "complaint"
    OTHER = "other"


class Reason(StrEnum):
    """Why; for reports and for people."""

    NO_SUCH_ADDRESS = "no such address"
    NO_SUCH_DOMAIN = "no such domain"
    MAILBOX_CLOSED = "mailbox closed"
    MOVED = "moved"
    MAILBOX_FULL = "mailbox full"
    TOO_BIG = "message too big"
    POLICY = "policy"
    CONTENT = "content"
    SENDER = "sender refused"
    ROUTING = "network or routing"
    EXPIRED = "not delivered in time"
    SYSTEM = "receiving system"
    PROTOCOL = "protocol"
    TEMPORARY = "temporary"
    DELIVERED = "delivered"
    COMPLAINT = "complaint"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Meaning:
    """One row: what a code or a phrase means, and who says so.

    `firm` is false where servers use the code for anything, so that their words count for more.
    """

    verdict: Verdict
    reason: Reason
    source: str
    firm: bool = True


@dataclass(frozen=True, slots=True)
class Classification:
    """The result: `status` is the enhanced status code that was found (`5.1.1`), `code` the SMTP code; each may be None."""

    verdict: Verdict
    reason: Reason
    status: str | None
    code: int | None
    source: str


def _hard(reason: Reason, source: str, *, firm: bool = True) -> Meaning:
    return Meaning(Verdict.HARD, reason, source, firm)


def _soft(reason: Reason, source: str, *, firm: bool = True) -> Meaning:
    return Meaning(Verdict.SOFT, reason, source, firm)


IANA = "IANA SMTP Enhanced Status Codes registry"
EXCHANGE = "Microsoft Learn, NDR error codes of Exchange Online"
GMAIL = "Google Workspace Help, Gmail SMTP errors and codes"

# Subject and detail of class 5. What is not here is looked for under its subject, then under "0".
STATUSES: dict[str, Meaning] = {
    "0": _soft(Reason.UNKNOWN, "RFC 3463, 3.1", firm=False),
    "0.0": _soft(Reason.UNKNOWN, "RFC 3463, 3.1", firm=False),
    "1": _soft(Reason.UNKNOWN, "RFC 3463, 3.2", firm=False),
    "1.0": _hard(Reason.NO_SUCH_ADDRESS, "RFC 3463, 3.2 (X.1.0: something about the address)", firm=False),
    "1.1": _hard(Reason.NO_SUCH_ADDRESS, "RFC 3463, 3.2 (X.1.1)"),
    "1.2": _hard(Reason.NO_SUCH_DOMAIN, "RFC 3463, 3.2 (X.1.2)"),
    "1.3": _hard(Reason.NO_SUCH_ADDRESS, "RFC 3463, 3.2 (X.1.3)"),
    "1.4": _hard(Reason.NO_SUCH_ADDRESS, "RFC 3463, 3.2 (X.1.4)"),
    "1.6": _hard(Reason.MOVED, "RFC 3463, 3.2 (X.1.6)"),
    "1.7": _soft(Reason.SENDER, "RFC 3463, 3.2 (X.1.7: the sender's address)"),
    "1.8": _soft(Reason.SENDER, "RFC 3463, 3.2 (X.1.8: the sender's address)"),
    "1.9": _soft(Reason.SYSTEM, f"{IANA} (X.1.9, RFC 3886)"),
    "1.10": _hard(
        Reason.NO_SUCH_DOMAIN, "RFC 7505, 4.1 (null MX); see PHRASES for Exchange Online", firm=False
    ),
    "2": _soft(Reason.SYSTEM, "RFC 3463, 3.3", firm=False),
    "2.0": _soft(Reason.SYSTEM, "RFC 3463, 3.3 (X.2.0: the mailbox exists)", firm=False),
    "2.1": _hard(Reason.MAILBOX_CLOSED, "RFC 3463, 3.3 (X.2.1: permanent if never enabled again); " + GMAIL),
    "2.2": _soft(Reason.MAILBOX_FULL, "RFC 3463, 3.3 (X.2.2)"),
    "2.3": _soft(Reason.TOO_BIG, "RFC 3463, 3.3 (X.2.3)"),
    "2.4": _soft(Reason.SYSTEM, "RFC 3463, 3.3 (X.2.4)"),
    "3": _soft(Reason.SYSTEM, "RFC 3463, 3.4", firm=False),
    "3.0": _soft(Reason.SYSTEM, "RFC 3463, 3.4 (X.3.0)", firm=False),
    "3.1": _soft(Reason.SYSTEM, "RFC 3463, 3.4 (X.3.1: the system's storage, not the mailbox's)"),
    "3.2": _soft(Reason.SYSTEM, "RFC 3463, 3.4 (X.3.2)"),
    "3.3": _soft(Reason.SYSTEM, "RFC 3463, 3.4 (X.3.3)"),
    "3.4": _soft(Reason.TOO_BIG, "RFC 3463, 3.4 (X.3.4)"),
    "3.5": _soft(Reason.SYSTEM, "RFC 3463, 3.4 (X.3.5)"),
    "4": _soft(Reason.ROUTING, "RFC 3463, 3.5", firm=False),
    "4.0": _soft(Reason.ROUTING, "RFC 3463, 3.5 (X.4.0)", firm=False),
    "4.1": _soft(Reason.ROUTING, "RFC 3463, 3.5 (X.4.1); see PHRASES for Exchange Online", firm=False),
    "4.2": _soft(Reason.ROUTING, "RFC 3463, 3.5 (X.4.2)"),
    "4.3": _soft(Reason.ROUTING, "RFC 3463, 3.5 (X.4.3)"),
    "4.4": _hard(Reason.NO_SUCH_DOMAIN, "RFC 3463, 3.5 (X.4.4: no next hop for the domain)", firm=False),
    "4.5": _soft(Reason.ROUTING, "RFC 3463, 3.5 (X.4.5)"),
    "4.6": _soft(Reason.ROUTING, "RFC 3463, 3.5 (X.4.6: a loop)"),
    "4.7": _soft(Reason.EXPIRED, "RFC 3463, 3.5 (X.4.7)"),
    "4.14": _soft(Reason.ROUTING, f"{EXCHANGE} (5.4.14: a loop)"),
    "4.300": _soft(Reason.EXPIRED, f"{EXCHANGE} (5.4.300)"),
    "4.310": _hard(Reason.NO_SUCH_DOMAIN, f"{EXCHANGE} (5.4.310: the domain does not exist)"),
    "4.316": _soft(Reason.EXPIRED, f"{EXCHANGE} (5.4.316)"),
    "5": _soft(Reason.PROTOCOL, "RFC 3463, 3.6", firm=False),
    "6": _soft(Reason.CONTENT, "RFC 3463, 3.7", firm=False),
    "7": _soft(Reason.POLICY, "RFC 3463, 3.8", firm=False),
    "7.13": _soft(Reason.SENDER, f"{IANA} (X.7.13, RFC 5248: the sender's account)"),
    "7.17": _hard(Reason.MOVED, "RFC 7293, 9.2 (X.7.17: the mailbox has another owner)"),
    "7.18": _hard(Reason.MOVED, "RFC 7293, 9.2 (X.7.18: the domain has another owner)"),
    "7.20": _soft(Reason.POLICY, "RFC 7372, 3.1 (DKIM)"),
    "7.21": _soft(Reason.POLICY, "RFC 7372, 3.1 (DKIM)"),
    "7.22": _soft(Reason.POLICY, "RFC 7372, 3.1 (DKIM)"),
    "7.23": _soft(Reason.POLICY, "RFC 7372, 3.2 (SPF)"),
    "7.24": _soft(Reason.POLICY, "RFC 7372, 3.2 (SPF)"),
    "7.25": _soft(Reason.POLICY, "RFC 7372, 3.3 (reverse DNS)"),
    "7.26": _soft(Reason.POLICY, "RFC 7372, 3.4 (authentication); " + GMAIL),
    "7.27": _soft(Reason.SENDER, "RFC 7505, 4.2 (the sender's domain has a null MX)"),
    "7.28": _soft(Reason.POLICY, f"{IANA} (X.7.28: too many mails)"),
    "7.29": _soft(Reason.POLICY, f"{IANA} (X.7.29, RFC 8617: ARC)"),
    "7.30": _soft(Reason.POLICY, "RFC 8689, 8 (REQUIRETLS)"),
}

# SMTP codes that come without an enhanced code, or with one that says nothing.
REPLIES: dict[int, Meaning] = {
    521: _soft(Reason.POLICY, "RFC 7504, 2 (this server takes no mail)"),
    550: _hard(Reason.NO_SUCH_ADDRESS, "RFC 5321, 4.2.3 (550: mailbox unavailable)"),
    551: _hard(Reason.MOVED, "RFC 5321, 3.4 and 4.2.3 (551: user not local)"),
    552: _soft(Reason.MAILBOX_FULL, "RFC 5321, 4.2.3 (552: exceeded storage allocation)"),
    553: _hard(Reason.NO_SUCH_ADDRESS, "RFC 5321, 4.2.3 (553: mailbox name not allowed)"),
    554: _soft(Reason.UNKNOWN, "RFC 5321, 4.2.3 (554: transaction failed)"),
    556: _hard(Reason.NO_SUCH_DOMAIN, "RFC 7504, 3 (556: the domain takes no mail)"),
}
OTHER_REPLY = _soft(Reason.PROTOCOL, "RFC 5321, 4.2.2 (a permanent negative reply about something else)")
TEMPORARY = _soft(Reason.TEMPORARY, "RFC 3463, 2 (class 4); RFC 5321, 4.2.1 (4yz)")
DELIVERED = Meaning(Verdict.DELIVERED, Reason.DELIVERED, "RFC 3463, 2 (class 2)")
NOTHING = _soft(Reason.UNKNOWN, "nothing in the notification says why")


def _phrase(words: str) -> re.Pattern[str]:
    return re.compile(words, re.IGNORECASE)


# Words that are about something else than the address even where the code is about the address (`550 5.1.1 over quota`).
CONTRADICTIONS: tuple[tuple[re.Pattern[str], Meaning], ...] = (
    (
        _phrase(
            r"(after|reply to|>>>) mail from|sender (address|domain|verif|rejected|denied|unknown)|from: domain|"
            r"unrout\w+ sender|r-?dns|reverse dns"
        ),
        _soft(Reason.SENDER, "RFC 5321, 3.3 (an answer to MAIL is about the sender)"),
    ),
    (
        _phrase(
            r"quota|mail ?(box|folder|drop)( \S+)? (is )?(full|has exceeded)|full mail ?box|too much mail|"
            r"(storage|mail ?box|user|account|mail) (space )?(limit|size limit|is full)|box space not enough|"
            r"(insufficient|out of) (disk|system|mailbox) (space|storage)|exceeded (its )?storage|not enough storage|"
            r"would exceed|mailbox size|552 5\.2\.2|exdiskquota|diskspace|exceeds allowed size|exceeded the local limit"
        ),
        _soft(Reason.MAILBOX_FULL, "RFC 3463, 3.3 (X.2.2) in words"),
    ),
    (
        _phrase(
            r"\bspam|block ?list|black ?list|spamhaus|spamcop|dnsbl|\brbl\b|reputation|banned|unsolicited|dmarc|\bdkim\b|"
            r"rate limit|too (quickly|many)|at a rate|protocol violation|virus|unauthenticated"
        ),
        _soft(Reason.POLICY, "RFC 3463, 3.8 (X.7.0, X.7.1) in words"),
    ),
)

# Other words, the more telling ones first.
PHRASES: tuple[tuple[re.Pattern[str], Meaning], ...] = (
    (
        _phrase(
            r"(message|mail|size)[\w\s]{0,40}(exceeds|exceeded|too (big|large|long)|larger than)|size limit|"
            r"exceed\w* [\w\s]{0,30}(message )?size|(maximum|max) [\w\s]{0,20}size"
        ),
        _soft(Reason.TOO_BIG, "RFC 3463, 3.4 (X.3.4) in words"),
    ),
    (
        _phrase(
            r"recipient address rejected: access denied|recipientnotfound|recipnotfound|adr\.exrecipnotfound|"
            r"directory.based edge blocking"
        ),
        _hard(Reason.NO_SUCH_ADDRESS, f"{EXCHANGE} (5.4.1 and 5.1.10: recipient not found)"),
    ),
    (
        _phrase(
            r"(account|mailbox|user|recipient|address|id)( \S*){0,3}?( is| has been| was|:)? ?(currently |temporarily )?"
            r"(disabled|discontinued|deactivated|inactive|suspended|closed|expired|terminated|not active)|"
            r"(disabled|inactive|deactivated|suspended) (account|mailbox|user|recipient)|"
            r"no longer (in use|active|exists?|available|valid|works?|with|employed|on this)|"
            r"doesn't want|account (is )?locked"
        ),
        _hard(Reason.MAILBOX_CLOSED, f"RFC 3463, 3.3 (X.2.1) in words; {GMAIL}"),
    ),
    (
        _phrase(
            r"(user|recipient|mailbox|address|account|alias|local ?part|addressee|login|email)"
            r"[\w\s'\"()/,:.=<>-]{0,60}?"
            r"(unknown|not (be )?(found|known|exist|listed|recogni[sz]ed|valid|a valid)|does ?n[o']t (have an?|exist)|"
            r"doesn't exist|do not exist|is invalid|no longer|not a known|unavailable|not our customer|"
            r"not in (our|the) |is wrong)|"
            r"(unknown|no such|invalid|bad|illegal|non-?existent|nonexistent|unrout[e]?able|undeliverable|incorrect|"
            r"not a valid|no valid|no mailbox|not a known)"
            r"( or (unknown|illegal|invalid))?( final| local| remote| destination| delivery| virtual| e-?mail| mail| smtp)*"
            r" ?(user|recipient|mail ?box|address|account|name|here|alias|id|person|local)|"
            r"no mailbox (here|by that)|no such (person|user|recipient)|addressee unknown|unknown in (local|virtual|relay)|"
            r"not listed in|no (user|matches|recipient)|not a valid user|user ?unknown|(does|did) not exactly match|"
            r"invalid mailbox|unknown recipient|adresse [\w\s-]{0,60}n'existe pas|destin\w+ inconnu|mailbox unavailable|not our customer|"
            r"final e-?mail delivery point|does not like recipient|account that you tried to reach does not exist|"
            r"unzustellbar|unbekannt|desconocid|not known (here|at this)|cannot find (user|recipient)"
        ),
        _hard(Reason.NO_SUCH_ADDRESS, "RFC 3463, 3.2 (X.1.1) in words"),
    ),
    (
        _phrase(
            r"try (it )?again|temporar|greylist|deferred|not been collected|queue too long|timed? ?out|lookup failure|malformed or unexpected"
        ),
        _soft(Reason.TEMPORARY, "RFC 3463, 2 (class 4) in words"),
    ),
    (
        _phrase(
            r"(host|domain|server|dns)( name)?[\w\s'\"()/,:.=<>*-]{0,60}?"
            r"(unknown|not (be )?found|does ?n[o']t exist|doesn't exist|not exist|nonexistent|no dns|not resolve|"
            r"has no mail|accepts no mail)|indicated no smtp service|"
            r"(unknown|no such|bad|unrouteable|invalid|nonexistent|non-existent) (mail )?(host|domain)|nxdomain|null ?mx|"
            r"unrouteable (mail )?domain|no (mx|mail ?server|mail exchanger|valid mx)|couldn't find any host"
        ),
        _hard(Reason.NO_SUCH_DOMAIN, "RFC 3463, 3.2 (X.1.2) in words"),
    ),
    (
        _phrase(
            r"blocked|blocking|listed (at|in|by)|denied|polic(y|ies)|prohibit|not (permitted|allowed|authori[sz]ed|accepted)|"
            r"relay|\bspf\b|not accept(ing)? (mail|messages?) from|refused|content|rejected|filtered|violation|forbidden|"
            r"authenticat|\bptr\b|administrat|weren't sent|complian"
        ),
        _soft(Reason.POLICY, "RFC 3463, 3.8 (X.7.0, X.7.1) in words"),
    ),
    (
        _phrase(
            r"too many hops|loop|not reachable|no answer|not respond|connection (refused|to mail exchanger|timed)|"
            r"unable to (connect|establish)|can't connect|wasn't able to establish|could not be reached|unreachable"
        ),
        _soft(Reason.ROUTING, "RFC 3463, 3.5 (X.4.1, X.4.6) in words"),
    ),
)


def classify(
    text: str, *, status: str | None = None, code: int | None = None, may_be_about_recipient: bool = True
) -> Classification:
    """What a failure means: from the codes and words that go with it.

    Args:
        text: the server's words (a diagnostic code, an SMTP answer); its first `MAX_TEXT` characters count.
        status: an enhanced status code said beside it (`5.1.1`); of the codes in `text` and this one the most telling
            is taken, and this one where both say as much.
        code: the SMTP code, if it is known otherwise than from the text.
        may_be_about_recipient: whether an SMTP code that says nothing more may be held against the address.

    Returns:
        The classification; `soft` and `unknown` where nothing tells.
    """
    words = text[:MAX_TEXT]
    status = _most_telling(status, words)
    if code is None:
        found = SMTP_CODE.search(words)
        code = int(found[1]) if found else None
    about_recipient = may_be_about_recipient and not NOT_ABOUT_RECIPIENT.search(words)
    meaning = _meaning(status, code, ADDRESS.sub(" ", words), about_recipient=about_recipient)
    return Classification(meaning.verdict, meaning.reason, status, code, meaning.source)


def classify_answer(code: int, text: str, *, stage: str = Stage.RCPT) -> Classification:
    """What the answer to a mail that was handed over means.

    Args:
        code: the SMTP code of the last answer, 0 where the server said none.
        text: its words, with or without an enhanced status code.
        stage: what was answered, as `penguinmails.smtp_answers.Stage` names it. What comes before RCPT is never about
            the recipient.

    Raises:
        ValueError: `code` is no SMTP code and not 0, or `stage` is unknown.
    """
    if code and not 200 <= code <= 599:
        raise ValueError(f"SMTP code {code} is not between 200 and 599")
    if stage not in [*Stage]:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(Stage)}")
    found = classify(text, code=code or None, may_be_about_recipient=stage == Stage.RCPT)
    if found.verdict is Verdict.HARD and stage in BEFORE_RCPT:
        return replace(
            found, verdict=Verdict.SOFT, reason=Reason.SENDER, source="RFC 5321, 3.3 (before RCPT)"
        )
    return found


def _most_telling(status: str | None, text: str) -> str | None:
    """A code with a detail before one without; those in the text must be of the class of the one said beside it."""
    codes = [".".join(str(int(number)) for number in found.groups()) for found in ENHANCED.finditer(text)]
    if status:
        codes = [status, *(code for code in codes if code[0] == status[0])]
    return next((code for code in codes if not code.endswith(".0")), codes[0] if codes else None)


def _meaning(status: str | None, code: int | None, words: str, *, about_recipient: bool) -> Meaning:
    kind = str(code)[0] if code else status[0] if status else ""
    row = _row(status)
    if kind == "4" or (status and status[0] == "4"):
        return _temporary(row)
    if kind == "2":
        return DELIVERED
    if row and row.firm and row.verdict is not Verdict.HARD:
        return row
    firm = row if row and row.firm else None
    said = _said(CONTRADICTIONS, words) or firm or _said(PHRASES, words)
    return said or _by_codes(row, code, about_recipient=about_recipient)


def _by_codes(row: Meaning | None, code: int | None, *, about_recipient: bool) -> Meaning:
    """Where the words say nothing: a loose row of `STATUSES`, unless it says nothing itself; else the SMTP code's."""
    if row and (code is None or row.reason is not Reason.UNKNOWN):
        return row
    if code is None:
        return NOTHING
    reply = REPLIES.get(code, OTHER_REPLY)
    return reply if about_recipient or reply.verdict is not Verdict.HARD else REPLIES[554]


def _said(table: tuple[tuple[re.Pattern[str], Meaning], ...], words: str) -> Meaning | None:
    return next((meaning for pattern, meaning in table if pattern.search(words)), None)


def _temporary(row: Meaning | None) -> Meaning:
    """Class 4: never the address's fault for good; the detail still tells why."""
    if row and row.verdict is Verdict.SOFT and row.reason is not Reason.UNKNOWN:
        return Meaning(Verdict.SOFT, row.reason, f"{TEMPORARY.source}; {row.source}")
    return TEMPORARY


def _row(status: str | None) -> Meaning | None:
    if status is None:
        return None
    _, subject, detail = status.split(".")
    return STATUSES.get(f"{subject}.{detail}") or STATUSES.get(subject) or STATUSES["0"]
