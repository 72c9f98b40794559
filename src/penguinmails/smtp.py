"""SMTP: one mail over a connection that is kept for the next one, and the server's answer as a value.

What an answer means for the job:

- accepted: the server has taken responsibility for the mail.
- deferred (4xx, and every trouble that is not about this mail): try again later.
- rejected (5xx for this sender, recipient or content): trying again would not help.
- account trouble (greeting, TLS, password): deferred, never rejected. A wrong password must not turn a whole campaign
  into bounces.
- a connection that breaks before the mail was handed over completely: the server cannot have accepted it (RFC 5321,
  4.1.1.4: only the line with the dot ends the data). One new connection at once, then deferred.
- **ambiguous**: the connection broke, or the answer did not come in time, after the last dot was sent. The server may
  have accepted the mail or not, and nothing tells which. The mail is **sent again** in a later attempt: until a
  positive answer has come the sender is responsible for it (RFC 5321, 4.2.5 and 6.1), and a mail that comes twice is a
  smaller harm than one that never comes. Both carry the same Message-ID, so a receiver can drop the second. It is
  never sent again within the same attempt.
"""

import contextlib
import os
import smtplib
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from penguinmails.message import Mail
from penguinmails.settings import MailSettings, Security

# Older ones may have been cut by a firewall without a word; servers themselves close after five minutes (RFC 5321, 4.5.3.2.7).
MAX_IDLE_SECONDS = 30.0
QUIT_SECONDS = 0.5
MAX_ANSWER = 500  # characters of the server's text that are kept
AUTHENTICATION_CODES = frozenset({530, 534, 535, 538})  # RFC 4954: about the account, wherever they come


class Verdict(StrEnum):
    """What the server made of a mail."""

    ACCEPTED = "accepted"
    DEFERRED = "deferred"
    REJECTED = "rejected"


class Stage(StrEnum):
    """How far the conversation came."""

    CONNECT = "connect"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Account:
    """Where and as whom mails are handed over: what makes two connections exchangeable."""

    host: str
    port: int
    security: Security = Security.NONE
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: Path | None = None
    timeout_seconds: float = 10.0
    helo_name: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of one conversation; `code` is 0 where the server did not say one."""

    verdict: Verdict
    stage: Stage
    code: int
    text: str
    ambiguous: bool = False

    def __str__(self) -> str:
        """For people: `rejected at rcpt: 550 5.1.1 no such user`."""
        said = f"{self.code} {self.text}" if self.code else self.text
        return f"{self.verdict} at {self.stage}: {said}"


class _BrokenConnectionError(Exception):
    """The connection is gone; says at which stage of the conversation."""

    def __init__(self, stage: Stage, text: str) -> None:
        super().__init__(text)
        self.stage = stage
        self.text = text


class _AccountRefusedError(Exception):
    """The server cannot be used as this account now: greeting, TLS or password."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def account_of(settings: MailSettings) -> Account:
    """The account that the settings describe."""
    return Account(
        host=settings.smtp_host,
        port=settings.smtp_port,
        security=settings.smtp_security,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value(),
        ca_file=settings.smtp_ca_file,
        timeout_seconds=settings.smtp_timeout_seconds,
        helo_name=settings.helo_name,
    )


class Connections:
    """The idle connections of this process, by account. Threads may share it: each takes a connection for itself."""

    def __init__(self) -> None:
        self._idle: dict[Account, deque[tuple[smtplib.SMTP, float]]] = {}
        self._pid = os.getpid()

    def send(self, account: Account, mail: Mail) -> Answer:
        """Hand one mail over; see the module's text for what each end means.

        Args:
            account: the server, and who we are there.
            mail: the message and its envelope.

        Returns:
            The verdict. Trouble with server or network is a verdict too, not an exception.
        """
        for last_try in (False, True):
            try:
                with self._connection(account) as connection:
                    return _converse(connection, mail)
            except _AccountRefusedError as error:
                return Answer(Verdict.DEFERRED, Stage.CONNECT, error.code, error.text)
            except _BrokenConnectionError as error:
                if last_try or error.stage in {Stage.CONNECT, Stage.ANSWER}:
                    ambiguous = error.stage is Stage.ANSWER
                    return Answer(Verdict.DEFERRED, error.stage, 0, error.text, ambiguous)
        raise AssertionError("the loop above always returns")

    def close(self) -> None:
        """Say goodbye on every idle connection, for the end of a worker."""
        for connections in self._idle.values():
            while connections:
                _quit(connections.popleft()[0])

    @contextlib.contextmanager
    def _connection(self, account: Account) -> Iterator[smtplib.SMTP]:
        """A connection of one's own; kept for the next mail only if this conversation came to its regular end.

        Whatever cuts it (a timeout raised into the handler, too) leaves the dialogue at an unknown place: closed.
        """
        connection = self._take(account) or _connect(account)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None:
            self._idle.setdefault(account, deque()).append((connection, time.monotonic()))

    def _take(self, account: Account) -> smtplib.SMTP | None:
        if self._pid != os.getpid():
            # A fork: the sockets belong to the parent's conversations.
            self._idle, self._pid = {}, os.getpid()
        idle = self._idle.get(account, deque())
        with contextlib.suppress(IndexError):
            while True:
                connection, since = idle.pop()
                if time.monotonic() - since <= MAX_IDLE_SECONDS:
                    return connection
                connection.close()
        return None


def _converse(connection: smtplib.SMTP, mail: Mail) -> Answer:
    """MAIL, RCPT, DATA on an open connection; leaves it ready for the next mail, or closed."""
    if mail.needs_utf8 and not connection.has_extn("smtputf8"):
        refusal = (
            f"5.6.7 the server does not take addresses beyond ASCII (SMTPUTF8), such as {mail.recipient}"
        )
        return Answer(Verdict.REJECTED, Stage.MAIL, 553, refusal)
    stage = Stage.MAIL
    try:
        code, text = connection.mail(mail.sender, _mail_options(connection, mail))
        if _fine(code):
            stage = Stage.RCPT
            code, text = connection.rcpt(mail.recipient)
        if stage is Stage.RCPT and _fine(code):
            stage = Stage.DATA
            code, text = connection.docmd("DATA")
            if code == 354:
                connection.send(_data(mail.data))
                stage = Stage.ANSWER
                code, text = connection.getreply()
        return _answered(connection, stage, code, text)
    except (OSError, smtplib.SMTPServerDisconnected, smtplib.SMTPResponseException) as error:
        raise _BrokenConnectionError(stage, _lost(stage, error)) from error


def _mail_options(connection: smtplib.SMTP, mail: Mail) -> list[str]:
    options = [f"size={len(mail.data)}"] if connection.has_extn("size") else []
    return [*options, "SMTPUTF8", "BODY=8BITMIME"] if mail.needs_utf8 else options


def _data(message: bytes) -> bytes:
    """The message as it goes over the wire: leading dots doubled, the line with the dot at its end (RFC 5321, 4.5.2)."""
    stuffed = message.replace(b"\r\n.", b"\r\n..")
    end = b".\r\n" if stuffed.endswith(b"\r\n") else b"\r\n.\r\n"
    return stuffed + end


def _answered(connection: smtplib.SMTP, stage: Stage, code: int, text: bytes) -> Answer:
    """The verdict; a transaction that was refused on the way is reset, so that the next mail finds a clean start."""
    if stage is Stage.MAIL and code == 421:
        # The server has closed a connection that we had kept (idle too long, too many mails): a new one may do.
        raise _BrokenConnectionError(stage, f"server closed the connection: 421 {_decoded(text)}")
    if stage is Stage.ANSWER and _fine(code):
        return Answer(Verdict.ACCEPTED, stage, code, _decoded(text))
    if code == 421 or code < 0:  # below 0: no SMTP at all
        connection.close()
    elif stage is not Stage.ANSWER:
        _reset(connection)
    rejected = 500 <= code <= 599 and code not in AUTHENTICATION_CODES
    return Answer(Verdict.REJECTED if rejected else Verdict.DEFERRED, stage, max(code, 0), _decoded(text))


def _fine(code: int) -> bool:
    return 200 <= code <= 299


def _reset(connection: smtplib.SMTP) -> None:
    try:
        connection.rset()
    except (OSError, smtplib.SMTPException):
        connection.close()


def _connect(account: Account) -> smtplib.SMTP:
    """A new connection, ready for MAIL: greeted, encrypted and logged in as the account wants it.

    Raises:
        _AccountRefusedError: the server does not let this account in, or cannot prove who it is.
        _BrokenConnectionError: no connection came about.
    """
    connection: smtplib.SMTP | None = None
    try:
        connection = _open(account)
        connection.ehlo_or_helo_if_needed()
        if account.security is Security.STARTTLS:
            connection.starttls(context=_tls(account.ca_file))
            connection.ehlo()
        if account.username:
            connection.login(account.username, account.password)
    except BaseException as error:
        if connection is not None:
            connection.close()
        _explain(account, error)
        raise
    return connection


def _open(account: Account) -> smtplib.SMTP:
    name, seconds = account.helo_name or _own_name(), account.timeout_seconds
    if account.security is Security.TLS:
        context = _tls(account.ca_file)
        return smtplib.SMTP_SSL(account.host, account.port, name, timeout=seconds, context=context)
    return smtplib.SMTP(account.host, account.port, name, timeout=seconds)


@lru_cache(maxsize=1)
def _own_name() -> str:
    """This machine's name for EHLO, asked once: a slow name server must not cost seconds per connection."""
    return socket.getfqdn()


def _explain(account: Account, error: BaseException) -> None:
    """Raise what a failed connection means, with the server's name; anything unknown passes."""
    where = f"{account.host}:{account.port}"
    match error:
        case ssl.SSLCertVerificationError():
            raise _AccountRefusedError(
                0, f"{where}: certificate not trusted: {error.verify_message}"
            ) from error
        case smtplib.SMTPNotSupportedError():
            raise _AccountRefusedError(0, f"{where}: {error}") from error
        case smtplib.SMTPResponseException():
            raise _AccountRefusedError(error.smtp_code, f"{where}: {_decoded(error.smtp_error)}") from error
        case smtplib.SMTPException() | OSError():
            raise _BrokenConnectionError(Stage.CONNECT, f"{where}: {error}") from error


@lru_cache(maxsize=8)
def _tls(ca_file: Path | None) -> ssl.SSLContext:
    """Certificate and host name are verified, by `ca_file` or the machine's own authorities."""
    return ssl.create_default_context(cafile=ca_file)


def _quit(connection: smtplib.SMTP) -> None:
    """Say goodbye; a server that does not answer must not hold up the end of a worker."""
    with contextlib.suppress(OSError, smtplib.SMTPException):
        if connection.sock is not None:
            connection.sock.settimeout(QUIT_SECONDS)
        connection.quit()
    connection.close()


def _lost(stage: Stage, error: Exception) -> str:
    what = "no answer in time" if isinstance(error, TimeoutError) else f"connection lost ({error})"
    return f"{what} after the whole mail was sent" if stage is Stage.ANSWER else what


def _decoded(text: bytes | str) -> str:
    """The server's text, on one line, bounded; a server may send any bytes."""
    plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return " ".join(part for part in plain.split() if part.isprintable())[:MAX_ANSWER]
