"""What an SMTP server's answer means for a mail: pure.

- accepted: the server has taken responsibility for the mail.
- deferred: trying again later may help. All 4xx, and every trouble that is not about this mail.
- rejected: trying again would not help. A 5xx whose enhanced status code (RFC 2034, RFC 3463), where there is one,
  says so too. The enhanced code goes first because it is more precise: a 5xx with 4.x.x is deferred. A 4xx with 5.x.x
  is deferred as well: RFC 2034 forbids the contradiction, and a mail that is tried once more harms nobody, while one
  that is given up by mistake never comes.
- about the account (login, encryption, a sender's quota), wherever it comes: deferred, never rejected. A wrong password
  must not turn a whole campaign into bounces.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

MAX_ANSWER = 500  # characters of the server's text that are kept
CLOSING = 421  # RFC 5321, 3.8: the server closes the connection after it
GO_ON = 354

# RFC 4954, 6; for the enhanced codes RFC 4954, RFC 3463 and RFC 5248: credentials, mechanism, encryption, the sender's own account.
_ACCOUNT_CODES = frozenset({530, 534, 535, 538})
_ACCOUNT_STATUS = re.compile(r"[45]\.7\.(?:8|9|10|11|12|13|14)")
_STATUS = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}(?=\s|$)")


class Verdict(StrEnum):
    """What the server made of a mail."""

    ACCEPTED = "accepted"
    DEFERRED = "deferred"
    REJECTED = "rejected"


class Stage(StrEnum):
    """How far the conversation came: the step whose answer decided, or did not come."""

    CONNECT = "connect"
    HELO = "helo"
    TLS = "tls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    END_OF_DATA = "end-of-data"


BEFORE_MAIL = frozenset({Stage.CONNECT, Stage.HELO, Stage.TLS, Stage.AUTH})
"""The steps that are about the connection and the account, whatever the mail."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of one conversation.

    Attributes:
        verdict: accepted, deferred or rejected.
        stage: the step that it was an answer to.
        code: the reply code; 0 where the server did not say one.
        text: the server's text on one line, its enhanced status code first if it gave one; or what went wrong.
        ambiguous: the end of the data was sent, or may have been, and no answer came that could be understood: the
            server may have the mail or not. Where this is False, a mail that was not accepted was surely not delivered.
        status: the enhanced status code, such as `5.1.1`; empty where there is none.
    """

    verdict: Verdict
    stage: Stage
    code: int
    text: str
    ambiguous: bool = False
    status: str = ""

    @property
    def is_about_mail(self) -> bool:
        """Whether it is a no or a "later" to this sender, recipient or content: not to the connection (421) or the account."""
        return (
            self.stage not in BEFORE_MAIL
            and 400 <= self.code <= 599
            and self.code != CLOSING
            and not _is_about_account(self.code, self.status)
        )

    def __str__(self) -> str:
        """For people: `rejected at rcpt: 550 5.1.1 no such user`."""
        said = f"{self.code} {self.text}" if self.code else self.text
        return f"{self.verdict} at {self.stage}: {said}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server said to one command; a `code` outside 200 to 599 is no SMTP."""

    code: int
    lines: tuple[bytes, ...]

    @property
    def is_yes(self) -> bool:
        """2xx."""
        return 200 <= self.code <= 299

    @property
    def is_no(self) -> bool:
        """4xx or 5xx: the only other answers that RFC 5321, 4.3.2 knows, beside 354 to DATA."""
        return 400 <= self.code <= 599


def answer_to(stage: Stage, reply: Reply) -> Answer:
    """The answer that a reply to this step is."""
    text, status = spoken(reply.lines)
    code = reply.code if 200 <= reply.code <= 599 else 0
    if stage is Stage.END_OF_DATA and reply.is_yes:
        return Answer(Verdict.ACCEPTED, stage, code, text, status=status)
    ambiguous = stage is Stage.END_OF_DATA and not reply.is_no
    return Answer(_refusal(reply.code, status), stage, code, text, ambiguous, status)


def lost(stage: Stage, text: str, *, ambiguous: bool = False) -> Answer:
    """The answer where there was none: connection refused, cut or too slow."""
    return Answer(Verdict.DEFERRED, stage, 0, text, ambiguous)


def _refusal(code: int, status: str) -> Verdict:
    """The verdict of a reply that is no yes."""
    permanent = 500 <= code <= 599 and not status.startswith("4")
    return Verdict.REJECTED if permanent and not _is_about_account(code, status) else Verdict.DEFERRED


def _is_about_account(code: int, status: str) -> bool:
    """Whether login, encryption or the sender's own account is at fault, at whatever step it was said."""
    return code in _ACCOUNT_CODES or _ACCOUNT_STATUS.fullmatch(status) is not None


def spoken(lines: tuple[bytes, ...]) -> tuple[str, str]:
    """The text of a reply and its enhanced status code, which the server may repeat on each line (RFC 2034, 4).

    Args:
        lines: without their codes; a server may send any bytes.

    Returns:
        The text on one line, bounded, the status code once at its beginning; and the status code or nothing.
    """
    status, words = "", []
    for line in lines:
        plain = line.decode("utf-8", "replace")
        found = _STATUS.match(plain)
        if found:
            status = status or found.group()
            plain = plain[found.end() :] if found.group() == status else plain
        words += [word for word in plain.split() if word.isprintable()]
    return " ".join([status, *words] if status else words)[:MAX_ANSWER], status
