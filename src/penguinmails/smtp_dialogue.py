"""The SMTP conversation on one connection: opening it, and one mail over it.

`smtplib` opens the connection (EHLO, STARTTLS, AUTH). From then on this module writes and reads itself, because
`smtplib` knows neither pipelining nor how far a mail came when something cut it.

When may the server have the mail? Only the line with the dot ends the data (RFC 5321, 4.1.1.4), so whatever breaks
before it was written leaves nothing delivered. From the write that holds it until an answer has come nobody knows.
`Handover.ambiguous` is set before that write, not after: a timeout that is raised between the two must not hide it.
"""

import contextlib
import select
import smtplib
import socket
import ssl
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from penguinmails.accounts import Account, Security
from penguinmails.message import Mail
from penguinmails.smtp_answers import CLOSING, GO_ON, Answer, Reply, Stage, Verdict, answer_to, lost, spoken

QUIT_SECONDS = 0.5
PIECE = 65536
MAX_LINE = 8192  # RFC 5321, 4.5.3.1.5 says 512, servers say more
MAX_LINES = 200


@dataclass(slots=True)
class Handover:
    """How far one mail has come; also when an exception that is not about mail (a job's timeout) ended its sending.

    Attributes:
        stage: the step that is under way.
        ambiguous: the server may have the mail and has not answered yet.
        answer: what the server said to the end of the data.
    """

    stage: Stage = Stage.CONNECT
    ambiguous: bool = False
    answer: Answer | None = None

    @property
    def may_be_delivered(self) -> bool:
        """False: the mail was surely not delivered, and may be sent again."""
        return self.ambiguous or (self.answer is not None and self.answer.verdict is Verdict.ACCEPTED)


class ConnectionBrokenError(Exception):
    """The connection is of no more use."""


class NoConnectionError(Exception):
    """The account cannot be used now: network, greeting, certificate or password. Carries the answer that it is."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer))
        self.answer = answer


class Dialogue:
    """One open connection, at the place where a mail may begin. For one thread at a time."""

    def __init__(self, connection: smtplib.SMTP) -> None:
        assert connection.sock is not None
        self._connection = connection
        self._sock: socket.socket = connection.sock
        self._unread = b""
        self.mails = 0
        self.idle_since = time.monotonic()
        self.is_open = True
        self.pipelining = connection.has_extn("pipelining")
        self.takes_utf8 = connection.has_extn("smtputf8")
        self.takes_8bit = connection.has_extn("8bitmime")
        self.takes_size = connection.has_extn("size")
        limit = connection.esmtp_features.get("size", "").strip()
        self.size_limit = int(limit) if limit.isdecimal() else 0  # 0: no limit is known (RFC 1870, 4)

    def is_quiet(self) -> bool:
        """Nothing has come since the last answer. A server that spoke meanwhile has said goodbye, or is out of step."""
        decrypted = isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()
        if self._unread or decrypted or not self.is_open:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def send(self, mail: Mail, handover: Handover) -> Answer:
        """Hand one mail over; afterwards the connection is ready for the next mail, or closed.

        Args:
            mail: its lines end in CR LF.
            handover: is kept up to date at every step.

        Raises:
            ConnectionBrokenError: it broke; `handover` says where, and whether the mail may have been delivered.
        """
        handover.stage = Stage.MAIL
        refusal = self._refusal(mail)
        if refusal:
            return refusal
        self.mails += 1
        try:
            stage, reply = self._envelope(mail, handover)
            if reply.code == GO_ON and stage is Stage.DATA:
                stage, reply = Stage.END_OF_DATA, self._content(mail, handover)
        except OSError as error:
            self.close()
            raise ConnectionBrokenError(_why(error)) from error
        except BaseException:
            self.close()
            raise
        self._end(stage, reply)
        return answer_to(stage, reply)

    def close(self) -> None:
        """Close the connection without a word."""
        self.is_open = False
        self._connection.close()

    def quit(self) -> None:
        """Say goodbye; a server that does not answer must not hold up the end of a worker."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(QUIT_SECONDS)
            self._write(b"QUIT\r\n")
            self._read()
        self.close()

    def _refusal(self, mail: Mail) -> Answer | None:
        """What the server would refuse, by what it said of itself: known before a word is spoken."""
        if mail.needs_utf8 and not (self.takes_utf8 and self.takes_8bit):
            text = (
                f"5.6.7 the server does not take addresses beyond ASCII (SMTPUTF8), such as {mail.recipient}"
            )
            return Answer(Verdict.REJECTED, Stage.MAIL, 553, text, status="5.6.7")
        if self.takes_size and 0 < self.size_limit < len(mail.data):
            text = f"5.3.4 the mail has {len(mail.data)} bytes, the server takes {self.size_limit} (SIZE)"
            return Answer(Verdict.REJECTED, Stage.MAIL, 552, text, status="5.3.4")
        return None

    def _envelope(self, mail: Mail, handover: Handover) -> tuple[Stage, Reply]:
        """MAIL, RCPT, DATA: the first that was refused, or the reply to DATA."""
        commands = (
            (Stage.MAIL, _command(f"MAIL FROM:<{mail.sender}>{self._parameters(mail)}")),
            (Stage.RCPT, _command(f"RCPT TO:<{mail.recipient}>")),
            (Stage.DATA, b"DATA\r\n"),
        )
        if self.pipelining:
            self._write(b"".join(command for _, command in commands))
            return self._group(handover)
        for stage, command in commands:
            handover.stage = stage
            self._write(command)
            reply = self._read()
            if not reply.is_yes:
                break
        return stage, reply

    def _parameters(self, mail: Mail) -> str:
        words = [f"SIZE={len(mail.data)}"] if self.takes_size else []
        if mail.needs_utf8:
            words += ["BODY=8BITMIME", "SMTPUTF8"]
        elif self.takes_8bit and not mail.data.isascii():
            words += ["BODY=8BITMIME"]
        return "".join(f" {word}" for word in words)

    def _group(self, handover: Handover) -> tuple[Stage, Reply]:
        """The replies to MAIL, RCPT and DATA in one write (RFC 2920): all are read, the first refusal counts.

        After a refusal the server may still say 354 to DATA. Then a mail without content is ended, which nobody gets,
        because nobody was accepted (RFC 2920, 3.1). If the recipient was accepted all the same, the connection is
        closed instead: an empty mail would be delivered.
        """
        decided: tuple[Stage, Reply] | None = None  # the first that is no yes
        nobody = True
        for stage in (Stage.MAIL, Stage.RCPT, Stage.DATA):
            try:
                handover.stage = decided[0] if decided else stage
                reply = self._read()
            except OSError:
                if decided is None:
                    raise
                self.close()
                return decided
            if not reply.is_yes:
                decided = decided or (stage, reply)
                if stage is not Stage.DATA and (reply.code == CLOSING or not reply.is_no):
                    self.close()
                    return decided
            elif stage is Stage.RCPT:
                nobody = False
        if decided and decided[0] is not Stage.DATA and reply.code == GO_ON:
            self._end_empty(nobody=nobody)
        return decided or (stage, reply)

    def _end_empty(self, *, nobody: bool) -> None:
        try:
            if nobody:
                self._write(b".\r\n")
                self._read()
                return
        except OSError:
            pass
        self.close()

    def _content(self, mail: Mail, handover: Handover) -> Reply:
        """The message and the dot, and what the server says to it."""
        handover.stage = Stage.DATA
        if self._unread:
            raise ConnectionResetError("the server answered before it had the mail")
        wire = memoryview(_stuffed(mail.data))
        last = max(0, len(wire) - PIECE)
        for start in range(0, last, PIECE):
            self._write(wire[start : min(start + PIECE, last)])
        handover.stage, handover.ambiguous = Stage.END_OF_DATA, True
        try:
            self._write(wire[last:])
        except OSError:
            # A write either takes bytes or fails: the one that failed took none, so the dot was not sent.
            handover.stage, handover.ambiguous = Stage.DATA, False
            raise
        reply = self._read()
        handover.answer = answer_to(Stage.END_OF_DATA, reply)
        handover.ambiguous = handover.answer.ambiguous
        return reply

    def _end(self, stage: Stage, reply: Reply) -> None:
        """Leave the connection where a mail may begin; where it is unclear where it stands, close it."""
        in_step = reply.is_no or (stage is Stage.END_OF_DATA and reply.is_yes)
        if reply.code == CLOSING or not in_step:
            self.close()
        elif stage is not Stage.END_OF_DATA and self.is_open:
            self._reset()
        self.idle_since = time.monotonic()

    def _reset(self) -> None:
        try:
            self._write(b"RSET\r\n")
            if self._read().is_yes:
                return
        except OSError:
            pass
        self.close()

    def _write(self, data: bytes | memoryview) -> None:
        self._sock.sendall(data)

    def _read(self) -> Reply:
        """One reply, of one or several lines.

        Raises:
            OSError: the connection ended, or nothing came in time.
        """
        lines: list[bytes] = []
        while len(lines) < MAX_LINES:
            line = self._line()
            lines.append(line[4:].strip())
            code = int(line[:3]) if line[:3].isdigit() else 0
            if line[3:4] != b"-" or not code:
                return Reply(code, tuple(lines))
        return Reply(0, (b"an answer without an end",))

    def _line(self) -> bytes:
        while b"\n" not in self._unread:
            if len(self._unread) > MAX_LINE:
                self._unread = b""
                return b"a line without an end"
            got = self._sock.recv(PIECE)
            if not got:
                raise ConnectionResetError("the server closed the connection")
            self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def open_dialogue(account: Account, handover: Handover) -> Dialogue:
    """A new connection, ready for MAIL: greeted, encrypted and logged in as the account wants it.

    Raises:
        NoConnectionError: the server is not there, does not let this account in, or cannot prove who it is.
    """
    connection: smtplib.SMTP | None = None
    handover.stage = Stage.CONNECT
    try:
        connection = _connected(account)
        handover.stage = Stage.HELO
        connection.ehlo_or_helo_if_needed()
        if account.security is Security.STARTTLS:
            handover.stage = Stage.TLS
            connection.starttls(context=_tls(account.ca_file))
            connection.ehlo()
        if account.username:
            handover.stage = Stage.AUTH
            connection.login(account.username, account.password)
        return Dialogue(connection)
    except (OSError, smtplib.SMTPException) as error:
        if connection is not None:
            connection.close()
        raise NoConnectionError(_explained(account, handover.stage, error)) from error
    except BaseException:
        if connection is not None:
            connection.close()
        raise


def _connected(account: Account) -> smtplib.SMTP:
    name, seconds = account.helo_name or _own_name(), account.timeout_seconds
    if account.security is Security.TLS:
        context = _tls(account.ca_file)
        connection: smtplib.SMTP = smtplib.SMTP_SSL(
            account.host, account.port, name, timeout=seconds, context=context
        )
    else:
        connection = smtplib.SMTP(account.host, account.port, name, timeout=seconds)
    assert connection.sock is not None
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@lru_cache(maxsize=1)
def _own_name() -> str:
    """This machine's name for EHLO, asked once: a slow name server must not cost seconds per connection."""
    return socket.getfqdn()


@lru_cache(maxsize=8)
def _tls(ca_file: Path | None) -> ssl.SSLContext:
    """Certificate and host name are verified, by `ca_file` or the machine's own authorities."""
    return ssl.create_default_context(cafile=ca_file)


def _explained(account: Account, stage: Stage, error: OSError | smtplib.SMTPException) -> Answer:
    """What a failed connection means, with the server's name: never rejected, it is not about the mail."""
    where = f"{account.host}:{account.port}"
    match error:
        case ssl.SSLCertVerificationError():
            return lost(Stage.TLS, f"{where}: certificate not trusted: {error.verify_message}")
        case ssl.SSLError():
            return lost(Stage.TLS, f"{where}: {_why(error)}")
        case smtplib.SMTPResponseException():
            raw = error.smtp_error
            said, status = spoken(tuple((raw if isinstance(raw, bytes) else raw.encode()).split(b"\n")))
            code = max(error.smtp_code, 0)
            return Answer(Verdict.DEFERRED, stage, code, f"{where}: {said}", status=status)
        case smtplib.SMTPServerDisconnected():
            return lost(stage, f"{where}: {_why(error)}")
        case smtplib.SMTPException():  # what the account needs is not offered: STARTTLS, AUTH or a mechanism of it
            return lost(stage, f"{where}: {error}")
    return lost(stage, f"{where}: {_why(error)}")


def _stuffed(message: bytes) -> bytes:
    """The message as it goes over the wire: leading dots doubled, the line with the dot at its end (RFC 5321, 4.5.2)."""
    stuffed = message.replace(b"\r\n.", b"\r\n..")
    if stuffed.startswith(b"."):
        stuffed = b"." + stuffed
    return stuffed + (b".\r\n" if stuffed.endswith(b"\r\n") else b"\r\n.\r\n")


def _command(line: str) -> bytes:
    """A command's line; what could end it has no place in it, whoever made the mail.

    Raises:
        ValueError: it has a line end or another control in it.
    """
    if not line.isprintable():
        raise ValueError(f"SMTP command {line!r} has a control character in it")
    return f"{line}\r\n".encode()


def _why(error: BaseException) -> str:
    """What broke, in words."""
    if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):
        return "no answer in time"
    return f"connection lost ({error})"
