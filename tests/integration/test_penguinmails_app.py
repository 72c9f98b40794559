"""The task send_campaign_mail against a real SMTP server and database; and campaigns put into a real database."""

import contextlib
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from penguinmails import app as application
from penguinmails import cli
from penguinmails.campaign import Recipient, Recipients, start_campaign
from penguinmails.demo.receiver import Receiver, receiving
from penguinmails.message import delivery_id
from penguinmails.settings import mail_settings
from pmqd import Retry
from tests.mail_jobs import ARGUMENTS, CAMPAIGN, RECIPIENT, Port, a_job, counted
from tests.smtp_servers import Scripted, serving


@pytest.fixture
def smtp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Points penguinmails to a port, and forgets that afterwards."""

    def use(port: int) -> None:
        for name, value in {
            "SMTP_PORT": str(port),
            "HELO_NAME": "test.local",
            "FROM_ADDRESS": "news@example.org",
        }.items():
            monkeypatch.setenv(f"PENGUINMAILS_{name}", value)
        mail_settings.cache_clear()

    yield use
    application.connections.close()
    mail_settings.cache_clear()


def test_a_mail_is_sent(smtp: Any, mail_database: str) -> None:
    """Payload in, personal mail at the server, Message-ID and answer as the job's result."""
    port = Port(mail_database)
    with receiving(Receiver()) as receiver:
        smtp(receiver.port)
        assert application.send_campaign_mail(job=a_job(port), **ARGUMENTS) is None
        application.connections.close()
    message_id = f"<{delivery_id(CAMPAIGN, RECIPIENT)}@example.org>"
    assert port.ends == [{"message_id": message_id, "answer": "250 2.0.0 taken"}]
    assert receiver.accepted == {"zoe@example.com": 1}
    assert receiver.subjects["zoe@example.com"] == "Welcome aboard, Zoë"


def test_a_mail_carries_what_is_configured(
    smtp: Any, mail_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings of the workers reach the mail: the campaign, one-click unsubscribing, a signature."""
    key = ed25519.Ed25519PrivateKey.generate()
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(key.private_bytes(*pem))
    for name, value in {
        "DKIM_KEYS": orjson.dumps({"s1": str(tmp_path / "key.pem")}).decode(),
        "UNSUBSCRIBE_URL": "https://example.org/u/{token}",
        "UNSUBSCRIBE_KEYS": '["0123456789abcdef"]',
    }.items():
        monkeypatch.setenv(f"PENGUINMAILS_{name}", value)
    handler = Scripted()
    with serving(handler) as server:
        smtp(server.port)
        application.send_campaign_mail(job=a_job(Port(mail_database)), **ARGUMENTS)
        application.connections.close()
    (mail,) = (message_from_bytes(each) for each in handler.received)
    assert mail["Feedback-ID"].startswith(f"{CAMPAIGN}:")
    assert mail["List-Unsubscribe"].startswith("<https://example.org/u/")
    assert mail["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert "d=example.org" in mail["DKIM-Signature"]


def test_later_is_a_retry(smtp: Any, mail_database: str) -> None:
    """A 4xx, and a server that is not there, are retried with the server's words as the reason; the delivery is deferred."""
    running = a_job(Port(mail_database))
    with serving(Scripted(rcpt=["450 4.2.1 greylisted"])) as server:
        smtp(server.port)
        with pytest.raises(Retry, match=r"deferred at rcpt: 450 4\.2\.1 greylisted"):
            application.send_campaign_mail(job=running, **ARGUMENTS)
        application.connections.close()
    with pytest.raises(Retry, match="deferred at connect"):
        application.send_campaign_mail(job=running, **ARGUMENTS)
    with psycopg.connect(mail_database) as conn:
        assert counted(conn) == ({"deferred": 1}, {"deferred": 1})


def test_a_refusal_becomes_a_bounce_in_the_settling_transaction(smtp: Any, mail_database: str) -> None:
    """A 5xx settles the job as discarded and leaves one bounce:process job that says who, what and why."""
    port = Port(mail_database)
    running = a_job(port)
    with serving(Scripted(rcpt=["550 5.1.1 no such user"])) as server:
        smtp(server.port)
        assert application.send_campaign_mail(job=running, **ARGUMENTS) is None
        application.connections.close()
    assert port.ends == ["rejected at rcpt: 550 5.1.1 no such user"]
    with psycopg.connect(mail_database) as conn:
        rows = conn.execute("select queue_name, kind, status, payload from pmqd.jobs").fetchall()
        stands = conn.execute(
            "select state, smtp_code, enhanced_code from penguinmails.deliveries"
        ).fetchall()
    assert stands == [("bounced", 550, "5.1.1")]
    assert [row[:3] for row in rows] == [("bounce:process", None, "queued")]
    assert rows[0][3] == {
        "source": "smtp",
        "job_id": str(running.id),
        "delivery_id": str(delivery_id(CAMPAIGN, RECIPIENT)),
        "campaign_id": str(CAMPAIGN),
        "recipient_id": str(RECIPIENT),
        "email": "zoe@example.com",
        "message_id": f"<{delivery_id(CAMPAIGN, RECIPIENT)}@example.org>",
        "stage": "rcpt",
        "code": 550,
        "status": "5.1.1",
        "answer": "5.1.1 no such user",
        "verdict": "hard",
        "reason": "no such address",
    }


def test_a_mail_that_cannot_be_built_is_skipped(smtp: Any, mail_database: str) -> None:
    """A bad address or an unknown template is nothing that an SMTP server should see, or a retry could heal."""
    smtp(1)
    port = Port(mail_database)
    for change in ({"email": "zoe@example.com\r\nDATA"}, {"template": "../../etc"}, {"template": "nosuch"}):
        application.send_campaign_mail(job=a_job(port), **{**ARGUMENTS, **change})
    assert len(port.ends) == 3
    assert "not an e-mail address" in port.ends[0] or "not printable" in port.ends[0]
    with psycopg.connect(mail_database) as conn:
        rows = conn.execute("select state, reason from penguinmails.deliveries").fetchall()
    assert rows == [("skipped", port.ends[0])]


def test_a_campaign_is_all_or_nothing(mail_database: str) -> None:
    """2,500 jobs exist once the caller commits, none if it does not; progress is told on the way."""
    people = [Recipient(f"p{number}@example.com", f"Nº {number}", {"city": "Oslo"}) for number in range(2500)]
    steps: list[int] = []
    with contextlib.suppress(ZeroDivisionError), psycopg.connect(mail_database) as conn:
        start_campaign(conn, Recipients(people, 0), template="welcome")
        raise ZeroDivisionError
    with psycopg.connect(mail_database) as conn:
        campaign = start_campaign(
            conn, Recipients(people, 0), template="welcome", priority=200, progress=steps.append
        )
    with psycopg.connect(mail_database) as conn:
        rows = conn.execute(
            "select count(*), count(distinct payload ->> 'recipient_id'), min(queue_name), min(kind), min(priority),"
            " min(max_attempts), min(tags[1]), bool_and(payload -> 'variables' = '{\"city\": \"Oslo\"}') from pmqd.jobs"
        ).fetchall()
    expected = (2500, 2500, "email-sending", "send_campaign_mail", 200, 5, f"campaign:{campaign}", True)
    assert rows == [expected]
    assert steps == [1000, 2000, 2500]


def test_the_command_send(
    mail_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`penguinmails send` enqueues what the file says; --dry-run enqueues nothing."""
    monkeypatch.setenv("PMQD_POSTGRES__DSN", mail_database)
    file = tmp_path / "people.csv"
    file.write_text("email,name\na@example.com,Åse\nb@example.com,B\nA@example.com,again\n")
    arguments = ["send", str(file), "--template", "welcome"]
    mail_settings.cache_clear()
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == "2 recipients, 1 repeated lines left out; nothing enqueued\n"
    assert cli.main(arguments) == 0
    assert "2 mails in email-sending, 1 repeated lines left out" in capsys.readouterr().out
    with psycopg.connect(mail_database) as conn:
        assert conn.execute("select count(*) from pmqd.jobs").fetchone() == (2,)


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["send", "nosuch.csv", "-t", "welcome"], {}, 1, "nosuch.csv: No such file"),
        (["send", "people.csv", "-t", "nosuch"], {}, 1, "template 'nosuch' cannot be read"),
        (
            ["send", "people.csv", "-t", "welcome"],
            {"PMQD_POSTGRES__DSN": "host=/nonexistent"},
            69,
            "PostgreSQL: ",
        ),
        (
            ["send", "people.csv", "-t", "welcome"],
            {"PENGUINMAILS_SMTP_PORT": "many"},
            78,
            "PENGUINMAILS_SMTP_PORT: ",
        ),
        (["send", "people.csv", "-t", "welcome", "-p", "0"], {}, 2, "greater than or equal to 1"),
        (["send", "people.csv"], {}, 2, "--template"),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    environment: dict[str, str],
    code: int,
    message: str,
) -> None:
    """Every wrong argument and setting is named, without a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "people.csv").write_text("email\na@example.com\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mail_settings.cache_clear()
    assert cli.main(arguments) == code
    mail_settings.cache_clear()
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1
