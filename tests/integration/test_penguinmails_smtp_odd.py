"""SMTP servers that behave oddly, at every place: what was delivered is told exactly, and connections are kept apart."""

import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from penguinmails.accounts import Account, Security
from penguinmails.message import Mail
from penguinmails.smtp import Connections, Handover, Stage, Verdict
from tests.smtp_servers import Lines, Scripted, interrupted, serving

MAIL = Mail("<1@example.org>", "news@example.org", "ada@example.com", b"Subject: x\r\n\r\n.dot\r\n", False)
PIPELINING = (b"PIPELINING", b"SIZE 1000", b"8BITMIME")

Says = Callable[[bytes], bytes | None]


@pytest.fixture
def connections() -> Iterator[Connections]:
    """Connections of this test, closed at its end."""
    made = Connections()
    yield made
    made.close()


def account(address: tuple[str, int]) -> Account:
    """The account at that address, with little patience."""
    return Account(*address, helo_name="test.local", timeout_seconds=2)


def once(**answers: bytes | None) -> Says:
    """A server that says yes, but these things the first time it hears their verb (`end` is the end of the data)."""

    def says(line: bytes) -> bytes | None:
        verb = "end" if line == b"." else line[:4].decode().lower()
        return answers.pop(verb) if verb in answers else b"yes"

    return says


def test_the_envelope_goes_in_one_write(connections: Connections) -> None:
    """Where the server offers PIPELINING, MAIL, RCPT and DATA go together; else each waits for its answer."""
    for extensions, writes in ((PIPELINING, 1), ((), 3)):
        server = Lines(once(), extensions)
        with server.running() as address:
            handover = Handover()
            assert connections.send(account(address), MAIL, handover).verdict is Verdict.ACCEPTED
            assert (handover.ambiguous, handover.may_be_delivered) == (False, True)
            envelope = [write for write in server.writes if b"ehlo" not in write and b"Subject" not in write]
        size = b" SIZE=20" if extensions else b""
        assert len(envelope) == writes
        assert b"".join(envelope) == (
            b"MAIL FROM:<news@example.org>" + size + b"\r\nRCPT TO:<ada@example.com>\r\nDATA\r\n"
        )
        assert server.messages == [b"Subject: x\r\n\r\n..dot\r\n"]


def test_data_after_a_refused_recipient_is_ended_empty(connections: Connections) -> None:
    """The server says 354 though it took nobody: nothing is sent to it, and the connection carries the next mail."""
    server = Lines(once(rcpt=b"550 5.1.1 no such user", end=b"554 5.5.1 no valid recipients"), PIPELINING)
    with server.running() as address:
        refused = connections.send(account(address), MAIL)
        again = connections.send(account(address), MAIL)
    assert (refused.verdict, refused.stage, refused.status) == (Verdict.REJECTED, Stage.RCPT, "5.1.1")
    assert not refused.ambiguous
    assert again.verdict is Verdict.ACCEPTED
    assert server.messages == [b"", b"Subject: x\r\n\r\n..dot\r\n"]
    assert server.connections == 1


def test_no_empty_mail_is_ended_where_the_recipient_was_taken(connections: Connections) -> None:
    """The sender is refused, the recipient and DATA are not: the connection is cut, and nobody gets an empty mail."""
    server = Lines(once(mail=b"451 4.3.0 later"), PIPELINING)
    with server.running() as address:
        answer = connections.send(account(address), MAIL)
        server.wait_for_ends(1)
    assert (answer.verdict, answer.stage, answer.code) == (Verdict.DEFERRED, Stage.MAIL, 451)
    assert server.messages == []


@pytest.mark.parametrize("extensions", [PIPELINING, ()])
@pytest.mark.parametrize(
    ("answers", "stage", "code"),
    [
        ({"rcpt": b"421 4.3.2 shutting down"}, Stage.RCPT, 421),
        ({"data": b"421 4.3.2 shutting down"}, Stage.DATA, 421),
        ({"data": b"451 4.3.0 no space"}, Stage.DATA, 451),
        ({"data": b"250 what?"}, Stage.DATA, 250),
        ({"mail": b"354 what?"}, Stage.MAIL, 354),
        ({"rcpt": b"HTTP/1.1 400 Bad Request"}, Stage.RCPT, 0),
        ({"end": b"421 4.3.2 shutting down"}, Stage.END_OF_DATA, 421),
        ({"end": b"452 4.3.1 no space"}, Stage.END_OF_DATA, 452),
    ],
)
def test_before_an_accepted_end_nothing_is_ambiguous(
    connections: Connections,
    extensions: tuple[bytes, ...],
    answers: dict[str, bytes],
    stage: Stage,
    code: int,
) -> None:
    """Whatever is said instead of a yes: deferred, surely not delivered; the next mail arrives."""
    server = Lines(once(**answers), extensions)
    with server.running() as address:
        handover = Handover()
        answer = connections.send(account(address), MAIL, handover)
        again = connections.send(account(address), MAIL)
    assert (answer.verdict, answer.stage, answer.code) == (Verdict.DEFERRED, stage, code)
    assert (answer.ambiguous, handover.ambiguous, handover.may_be_delivered) == (False, False, False)
    assert again.verdict is Verdict.ACCEPTED


def test_an_answer_that_comes_before_the_mail_is_none(connections: Connections) -> None:
    """A server that is out of step and says yes too early has accepted nothing: not sent to it, deferred."""
    server = Lines(lambda line: b"354 go on\r\n250 taken" if line == b"DATA" else b"yes", PIPELINING)
    with server.running() as address:
        answer = connections.send(account(address), MAIL)
    assert (answer.verdict, answer.stage, answer.ambiguous) == (Verdict.DEFERRED, Stage.DATA, False)
    assert (server.messages, server.connections) == ([], 2)


@pytest.mark.parametrize("extensions", [PIPELINING, ()])
@pytest.mark.parametrize("verb", ["mail", "rcpt", "data"])
def test_a_connection_that_breaks_before_the_end_is_replaced(
    connections: Connections, extensions: tuple[bytes, ...], verb: str
) -> None:
    """Also right after DATA: nothing was delivered, so the mail goes over a new connection in the same attempt."""
    server = Lines(once(**{verb: None}), extensions)
    with server.running() as address:
        assert connections.send(account(address), MAIL).verdict is Verdict.ACCEPTED
    assert (server.connections, len(server.messages)) == (2, 1)


@pytest.mark.parametrize("end", [None, b"hello", b"99 x", b"250-and so on", b"x" * 20000])
def test_without_an_answer_to_the_end_it_is_ambiguous(connections: Connections, end: bytes | None) -> None:
    """A break, no SMTP, an answer that never ends: nobody knows, it is said, and nothing is sent again."""
    server, handover = Lines(once(end=end), PIPELINING), Handover()
    with server.running() as address:
        answer = connections.send(replace(account(address), timeout_seconds=0.3), MAIL, handover)
    assert (answer.verdict, answer.stage, answer.ambiguous) == (Verdict.DEFERRED, Stage.END_OF_DATA, True)
    assert handover.may_be_delivered
    assert (server.connections, len(server.messages)) == (1, 1)


class OutsideError(Exception):
    """What a job's timeout is here."""


@pytest.mark.parametrize(
    ("verb", "stage", "may_be"),
    [(b"RCPT", Stage.RCPT, False), (b"DATA", Stage.DATA, False), (b".", Stage.END_OF_DATA, True)],
)
def test_an_exception_from_outside_finds_how_far_the_mail_came(
    connections: Connections, verb: bytes, stage: Stage, may_be: bool
) -> None:
    """A timeout of the job passes through as it is, the connection is given up, and Handover knows what it means."""
    handover = Handover()
    with interrupted(OutsideError()) as interrupt:

        def says(line: bytes) -> bytes | None:
            if line[:4] != verb:
                return b"yes"
            interrupt()
            return b""

        server = Lines(says)
        with server.running() as address:
            with pytest.raises(OutsideError):
                connections.send(account(address), MAIL, handover)
            server.wait_for_ends(1)
    assert (handover.stage, handover.ambiguous, handover.may_be_delivered) == (stage, may_be, may_be)


def test_a_slow_greeting_and_a_slow_hello_end_in_time(connections: Connections) -> None:
    """Silence at the beginning is deferred, and told with its step."""
    for verb, stage in ((b"", Stage.CONNECT), (b"EHLO", Stage.HELO)):
        silent = Lines(lambda line, verb=verb: b"" if line[:4] == verb else b"yes")  # type: ignore[misc]
        with silent.running() as address:
            answer = connections.send(replace(account(address), timeout_seconds=0.2), MAIL)
        assert (answer.verdict, answer.stage, answer.ambiguous) == (Verdict.DEFERRED, stage, False)
        assert answer.text == f"127.0.0.1:{address[1]}: no answer in time"


def test_a_goodbye_between_two_mails_is_heard(connections: Connections) -> None:
    """A server that closed the kept connection is not spoken to again: the next mail begins on a new one."""
    server = Lines(once(), PIPELINING)
    with server.running() as address:
        assert connections.send(account(address), MAIL).verdict is Verdict.ACCEPTED
    server = Lines(lambda line: b"250 2.0.0 ok\r\n421 4.4.2 idle" if line == b"." else b"yes", PIPELINING)
    with server.running() as address:
        answers = [connections.send(account(address), MAIL) for _ in range(3)]
    assert [answer.verdict for answer in answers] == [Verdict.ACCEPTED] * 3
    assert server.connections == 3


def test_connections_are_retired(connections: Connections) -> None:
    """After so many mails the connection is ended with QUIT; after too long a rest another one is made."""
    server = Lines(once(), PIPELINING)
    with server.running() as address:
        short = replace(account(address), mails_per_connection=2)
        for _ in range(5):
            assert connections.send(short, MAIL).verdict is Verdict.ACCEPTED
        server.wait_for_ends(2)
        assert (server.connections, server.writes.count(b"QUIT\r\n")) == (3, 2)
        restless = replace(account(address), idle_seconds=0.0, name="restless")
        for _ in range(2):
            assert connections.send(restless, MAIL).verdict is Verdict.ACCEPTED
        assert server.connections == 5


def test_threads_share_the_connections_and_never_one_at_once(connections: Connections) -> None:
    """160 mails of 8 threads over two accounts: all arrive whole, over at most one connection per thread and account."""
    server = Lines(once(), PIPELINING)
    with server.running() as address:
        accounts = [replace(account(address), name=name, timeout_seconds=10) for name in ("one", "two")]

        def send(number: int) -> Verdict:
            mail = replace(MAIL, data=b"Subject: %d\r\n\r\n%s\r\n" % (number, b"x" * 500))
            return connections.send(accounts[number % 2], mail).verdict

        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(send, range(160))) == {Verdict.ACCEPTED}
        connections.close()
        server.wait_for_ends(server.connections)
    assert sorted(server.messages) == sorted(
        b"Subject: %d\r\n\r\n%s\r\n" % (n, b"x" * 500) for n in range(160)
    )
    assert server.connections <= 16


FORKING = """
import os, sys
from penguinmails.accounts import Account
from penguinmails.smtp import Connections
from tests.integration.test_penguinmails_smtp_odd import MAIL

connections, account = Connections(), Account("127.0.0.1", int(sys.argv[1]), helo_name="test.local")
print(connections.send(account, MAIL).verdict, flush=True)
child = os.fork()
print(connections.send(account, MAIL).verdict, flush=True)
if not child:
    os._exit(0)
os.waitpid(child, 0)
print(connections.send(account, MAIL).verdict, flush=True)
connections.close()
"""


def test_a_forked_child_has_connections_of_its_own() -> None:
    """Parent and child send after the fork: the child opens its own, and the parent's goes on to the end."""
    handler = Scripted()
    with serving(handler) as server:
        command = [sys.executable, "-c", FORKING, str(server.port)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["accepted"] * 4
    assert (handler.conversations, len(handler.received)) == (2, 4)


def test_a_certificate_for_another_name_is_refused(connections: Connections, tmp_path: Path) -> None:
    """The authority is trusted, the name is not the server's: nothing is sent, with STARTTLS and with TLS."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("other.example").configure_cert(context)
    for security, options in (
        (Security.STARTTLS, {"tls_context": context}),
        (Security.TLS, {"ssl_context": context}),
    ):
        handler = Scripted()
        # aiosmtpd says hello to itself at its start, over TLS and without our authority
        with serving(handler, **options) as server:
            where = Account(
                "127.0.0.1", server.port, security, ca_file=tmp_path / "ca.pem", helo_name="test.local"
            )
            answer = connections.send(where, MAIL)
        assert (answer.verdict, answer.stage, answer.ambiguous) == (Verdict.DEFERRED, Stage.TLS, False)
        assert "certificate not trusted" in answer.text
        assert handler.received == []


def test_what_the_server_says_of_itself_is_heeded(connections: Connections) -> None:
    """A mail beyond its SIZE, or with an address it does not take, is refused without a word to it."""
    server = Lines(once(), PIPELINING)
    with server.running() as address:
        big = connections.send(account(address), replace(MAIL, data=b"x" * 1001))
        foreign = connections.send(
            account(address), replace(MAIL, recipient="дарья@example.com", needs_utf8=True)
        )
        eight = connections.send(account(address), replace(MAIL, data="Subject: ä\r\n\r\n".encode()))
    assert (big.verdict, big.status, big.ambiguous) == (Verdict.REJECTED, "5.3.4", False)
    assert (foreign.verdict, foreign.status) == (Verdict.REJECTED, "5.6.7")
    assert eight.verdict is Verdict.ACCEPTED
    assert b"".join(server.writes).count(b"MAIL") == 1
    assert b"BODY=8BITMIME" in b"".join(server.writes)


@pytest.mark.parametrize("recipient", ["a@b>\r\nRCPT TO:<c@d", "a@b\n", "a@b\x00"])
def test_no_address_can_be_a_command(connections: Connections, recipient: str) -> None:
    """Whoever made the mail: a line end in an address reaches no server."""
    server = Lines(once(), PIPELINING)
    with server.running() as address, pytest.raises(ValueError, match="control character"):
        connections.send(account(address), replace(MAIL, recipient=recipient))
    assert not any(b"MAIL" in write for write in server.writes)
