"""SMTP against a real server: what every kind of answer and every broken connection becomes."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from penguinmails.message import Mail
from penguinmails.settings import MailSettings, Security
from penguinmails.smtp import Account, Connections, Stage, Verdict, account_of
from tests.smtp_servers import Scripted, raw_server, serving, speak

MAIL = Mail(
    "<1@example.org>", "news@example.org", "ada@example.com", b"Subject: x\r\n\r\n.dot\r\nend\r\n", False
)


@pytest.fixture
def connections() -> Iterator[Connections]:
    """Connections of this test, closed at its end."""
    made = Connections()
    yield made
    made.close()


def account(controller: Controller, **changes: Any) -> Account:
    """The account on that server."""
    return Account(controller.hostname, controller.port, **{"helo_name": "test.local", **changes})


def test_mails_share_one_connection_and_arrive_as_they_are(connections: Connections) -> None:
    """Three mails: three times accepted, one connection, the bytes unharmed (a leading dot too)."""
    handler = Scripted()
    with serving(handler) as server:
        answers = [connections.send(account(server), MAIL) for _ in range(3)]
        connections.close()
    assert [(a.verdict, a.stage, a.code) for a in answers] == [(Verdict.ACCEPTED, Stage.END_OF_DATA, 250)] * 3
    assert handler.received == [MAIL.data] * 3
    assert handler.conversations == 1


@pytest.mark.parametrize(
    ("verb", "stage"), [("mail", Stage.MAIL), ("rcpt", Stage.RCPT), ("answer", Stage.END_OF_DATA)]
)
@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("450 4.2.1 greylisted", Verdict.DEFERRED),
        ("452 4.2.2 mailbox full", Verdict.DEFERRED),
        ("550 5.1.1 no such user", Verdict.REJECTED),
        ("554 5.7.1 not wanted", Verdict.REJECTED),
        ("530 5.7.0 authentication required", Verdict.DEFERRED),
    ],
)
@pytest.mark.parametrize("pipelining", [False, True])
def test_answers_are_classified_at_every_stage(
    connections: Connections, verb: str, stage: Stage, reply: str, verdict: Verdict, pipelining: bool
) -> None:
    """4xx is deferred, 5xx rejected, a missing login deferred; the next mail uses the same connection and is accepted."""
    handler = Scripted(**{verb: [reply]})
    handler.pipelining = pipelining
    with serving(handler) as server:
        answer = connections.send(account(server), MAIL)
        again = connections.send(account(server), MAIL)
        connections.close()
    assert (answer.verdict, answer.stage, f"{answer.code} {answer.text}") == (verdict, stage, reply)
    assert not answer.ambiguous
    assert again.verdict is Verdict.ACCEPTED
    assert (len(handler.received), handler.conversations) == (1, 1)


@pytest.mark.parametrize("verb", ["mail", "rcpt"])
def test_a_connection_lost_before_the_data_is_replaced_once(connections: Connections, verb: str) -> None:
    """One loss is healed within the attempt; a second one defers the mail; it is never sent twice."""
    handler = Scripted(**{verb: ["drop", "250 ok", "drop", "drop"]})
    with serving(handler) as server:
        first = connections.send(account(server), MAIL)
        second = connections.send(account(server), MAIL)
    assert first.verdict is Verdict.ACCEPTED
    assert (second.verdict, second.ambiguous) == (Verdict.DEFERRED, False)
    assert len(handler.received) == 1


def test_a_server_that_closes_kept_connections_is_met_with_a_new_one(connections: Connections) -> None:
    """421 at the beginning of the next mail is no failure of that mail."""
    handler = Scripted(mail=["250 ok", "421 4.3.2 too many mails on this connection", "250 ok"])
    with serving(handler) as server:
        answers = [connections.send(account(server), MAIL) for _ in range(2)]
    assert [a.verdict for a in answers] == [Verdict.ACCEPTED] * 2
    assert handler.conversations == 2


def test_a_connection_lost_after_the_dot_is_ambiguous_and_not_repeated(connections: Connections) -> None:
    """The server may have the mail: it is deferred to a later attempt and not sent again in this one."""
    handler = Scripted(answer=["drop"])
    with serving(handler) as server:
        answer = connections.send(account(server), MAIL)
    assert (answer.verdict, answer.stage, answer.ambiguous) == (Verdict.DEFERRED, Stage.END_OF_DATA, True)
    assert "after the whole mail was sent" in str(answer)
    assert handler.conversations == 1


def test_421_after_the_dot_is_an_answer(connections: Connections) -> None:
    """A server that says 421 has not accepted: deferred, nothing ambiguous, and the next mail has a new connection."""
    handler = Scripted(answer=["421 4.3.2 shutting down"])
    with serving(handler) as server:
        answer = connections.send(account(server), MAIL)
        again = connections.send(account(server), MAIL)
    assert (answer.verdict, answer.code, answer.ambiguous) == (Verdict.DEFERRED, 421, False)
    assert again.verdict is Verdict.ACCEPTED
    assert handler.conversations == 2


def test_addresses_beyond_ascii_need_a_server_that_takes_them(connections: Connections) -> None:
    """With SMTPUTF8 the mail arrives; without it the recipient is rejected, because no attempt would help."""
    mail = Mail(
        "<1@example.org>", "news@example.org", "дарья@example.com", "To: дарья\r\n\r\nx\r\n".encode(), True
    )
    for offered, verdict in ((True, Verdict.ACCEPTED), (False, Verdict.REJECTED)):
        with serving(Scripted(), enable_SMTPUTF8=offered) as server:
            assert connections.send(account(server), mail).verdict is verdict


def test_a_connection_lost_in_the_middle_of_the_data_is_not_ambiguous(connections: Connections) -> None:
    """Before the dot the server cannot have accepted: tried again once, then deferred as a plain loss."""
    attempts: list[int] = []

    def converse(connection: socket.socket) -> None:
        attempts.append(1)
        speak(connection, b"220 hi", b"250 hi", b"250 ok", b"250 ok", b"354 go on")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset

    big = Mail("<1@example.org>", "a@example.org", "b@example.com", b"x" * 30_000_000 + b"\r\n", False)
    with raw_server(converse) as (host, port):
        answer = connections.send(Account(host, port, helo_name="test.local"), big)
    assert (answer.verdict, answer.stage, answer.ambiguous) == (Verdict.DEFERRED, Stage.DATA, False)
    assert len(attempts) == 2


def test_a_server_without_an_answer_is_given_up_in_time(connections: Connections) -> None:
    """Silence after the dot ends at the timeout and is ambiguous too."""
    release = threading.Event()

    def converse(connection: socket.socket) -> None:
        speak(connection, b"220 hi", b"250 hi", b"250 ok", b"250 ok", b"354 go on")
        release.wait(20)

    with raw_server(converse) as (host, port):
        answer = connections.send(Account(host, port, helo_name="test.local", timeout_seconds=0.3), MAIL)
        release.set()
    assert (answer.verdict, answer.ambiguous) == (Verdict.DEFERRED, True)


@pytest.mark.parametrize("greeting", [b"554 go away", b"421 busy", b"HTTP/1.1 400 Bad Request"])
def test_an_unfriendly_greeting_defers(connections: Connections, greeting: bytes) -> None:
    """Trouble before the mail is never the recipient's fault, even with a 5xx."""
    with raw_server(lambda connection: speak(connection, greeting)) as (host, port):
        answer = connections.send(Account(host, port, helo_name="test.local"), MAIL)
    assert (answer.verdict, answer.stage) == (Verdict.DEFERRED, Stage.CONNECT)


def test_nobody_listens(connections: Connections) -> None:
    """A refused connection defers and names the server."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        answer = connections.send(Account("127.0.0.1", port, helo_name="test.local"), MAIL)
    assert (answer.verdict, answer.stage) == (Verdict.DEFERRED, Stage.CONNECT)
    assert f"127.0.0.1:{port}" in answer.text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-made certificate for 127.0.0.1 and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the command openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    names = ("-subj", "/CN=mx.test", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"))
    command = (openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files)
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return folder / "cert.pem", folder / "key.pem"


def _server_tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_starttls_and_login(connections: Connections, certificate: tuple[Path, Path]) -> None:
    """The mail goes through an encrypted, verified, authenticated connection; a wrong password defers, never rejects."""
    handler = Scripted()

    def check(server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        assert session.ssl is not None
        return AuthResult(success=(data.login, data.password) == (b"penguin", b"fish"), handled=False)

    options = {"tls_context": _server_tls(certificate), "require_starttls": True, "authenticator": check}
    with serving(handler, **options, auth_required=True) as server:
        login = {"security": Security.STARTTLS, "username": "penguin", "ca_file": certificate[0]}
        good = connections.send(account(server, **login, password="fish"), MAIL)
        bad = connections.send(account(server, **login, password="seal"), MAIL)
        connections.close()
    assert good.verdict is Verdict.ACCEPTED
    assert (bad.verdict, bad.stage, bad.code) == (Verdict.DEFERRED, Stage.AUTH, 535)
    assert "seal" not in str(bad)
    assert handler.received == [MAIL.data]


def test_an_unknown_certificate_is_refused(connections: Connections, certificate: tuple[Path, Path]) -> None:
    """Without its authority the certificate is not trusted, nothing is sent, and the answer says why."""
    handler = Scripted()
    with serving(handler, tls_context=_server_tls(certificate)) as server:
        answer = connections.send(account(server, security=Security.STARTTLS), MAIL)
    assert (answer.verdict, answer.stage) == (Verdict.DEFERRED, Stage.TLS)
    assert "certificate not trusted" in answer.text
    assert handler.received == []


def test_a_server_without_starttls_never_gets_the_mail_in_the_clear(connections: Connections) -> None:
    """The settings say STARTTLS: a server (or somebody between) that does not offer it gets nothing."""
    handler = Scripted()
    with serving(handler) as server:
        answer = connections.send(account(server, security=Security.STARTTLS), MAIL)
    assert (answer.verdict, answer.stage) == (Verdict.DEFERRED, Stage.TLS)
    assert "STARTTLS" in answer.text
    assert handler.received == []


def test_implicit_tls(connections: Connections, certificate: tuple[Path, Path]) -> None:
    """`tls` speaks TLS from the first byte."""
    handler = Scripted()
    with serving(handler, ssl_context=_server_tls(certificate)) as server:
        answer = connections.send(account(server, security=Security.TLS, ca_file=certificate[0]), MAIL)
        connections.close()
    assert answer.verdict is Verdict.ACCEPTED
    assert handler.received == [MAIL.data]


def test_settings_become_an_account_and_keep_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are read, the password is shown nowhere, and is not sent in the clear to another machine."""
    for name, value in {
        "SMTP_HOST": "mx.example.org",
        "SMTP_PORT": "587",
        "SMTP_SECURITY": "starttls",
        "SMTP_USERNAME": "penguin",
        "SMTP_PASSWORD": "fish",
        "FROM_ADDRESS": "news@example.org",
    }.items():
        monkeypatch.setenv(f"PENGUINMAILS_{name}", value)
    settings = MailSettings()
    made = account_of(settings)
    assert (made.host, made.port, made.security, made.password) == (
        "mx.example.org",
        587,
        Security.STARTTLS,
        "fish",
    )
    assert "fish" not in f"{settings!r} {made!r}"
    monkeypatch.setenv("PENGUINMAILS_SMTP_SECURITY", "none")
    with pytest.raises(ValueError, match="in the clear"):
        MailSettings()
    monkeypatch.setenv("PENGUINMAILS_SMTP_HOST", "127.0.0.1")
    assert MailSettings().smtp_security is Security.NONE
    monkeypatch.setenv("PENGUINMAILS_FROM_ADDRESS", "nobody")
    with pytest.raises(ValueError, match="'nobody' is not an e-mail address"):
        MailSettings()
