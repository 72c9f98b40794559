"""Several sending accounts: a campaign goes out over its own one, to real SMTP servers."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import orjson
import psycopg
import pytest
from psycopg.rows import dict_row

from penguinmails import cli, sending
from penguinmails.campaign import process_campaign
from penguinmails.demo.receiver import Receiver, receiving
from penguinmails.sending import send_campaign_mail
from penguinmails.settings import mail_settings
from pmqd import Retry
from tests.mail_jobs import CAMPAIGN, Port, a_job


@pytest.fixture
def servers(mail_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Receiver, Receiver]]:
    """The default account's server and that of the account `bulk`, and settings that lead to them."""
    with receiving(Receiver()) as default, receiving(Receiver()) as bulk:
        account = {"host": "127.0.0.1", "port": bulk.port, "from_address": "hello@bulk.example"}
        for name, value in {
            "PMQD_POSTGRES__DSN": mail_database,
            "PENGUINMAILS_SMTP_PORT": str(default.port),
            "PENGUINMAILS_HELO_NAME": "test.local",
            "PENGUINMAILS_FROM_ADDRESS": "news@example.org",
            "PENGUINMAILS_ACCOUNTS": orjson.dumps({"bulk": account}).decode(),
        }.items():
            monkeypatch.setenv(name, value)
        mail_settings.cache_clear()
        yield default, bulk
        sending.connections.close()
    mail_settings.cache_clear()


def work(dsn: str) -> None:
    """Runs every queued mail's job as a worker would."""
    with psycopg.connect(dsn, row_factory=dict_row) as conn:
        query = "select id, payload from pmqd.jobs where queue_name = 'email-sending' order by payload ->> 'email'"
        jobs: list[dict[str, Any]] = conn.execute(query).fetchall()
    for job in jobs:
        ids = {name: UUID(job["payload"].pop(name)) for name in ("campaign_id", "recipient_id")}
        send_campaign_mail(job=a_job(Port(dsn), id=job["id"]), **job["payload"], **ids)


def test_a_campaign_goes_over_its_account(
    servers: tuple[Receiver, Receiver], mail_database: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--account` its server and sender, by `send` as by `campaign start`; the default one without; and a mail that was
    moved to another account goes over that one. A name that is not configured is refused before anything is written.
    """
    default, bulk = servers
    file = tmp_path / "people.csv"
    file.write_text("email\na@example.com\nb@example.com\n")
    start = ["campaign", "start", str(file), "-t", "welcome"]
    assert cli.main([*start, "--account", "nosuch"]) == 1
    error = "there is no account 'nosuch'; PENGUINMAILS_ACCOUNTS allows: default, bulk"
    assert error in capsys.readouterr().err
    assert cli.main([*start, "--id", str(CAMPAIGN), "--account", "bulk"]) == 0
    process_campaign(job=a_job(Port(mail_database)), campaign_id=CAMPAIGN)
    move = "update penguinmails.deliveries set account = null where email = 'b@example.com'"
    with psycopg.connect(mail_database) as conn:
        assert conn.execute(move).rowcount == 1
    work(mail_database)
    assert (dict(bulk.accepted), dict(default.accepted)) == ({"a@example.com": 1}, {"b@example.com": 1})
    assert {each.partition("@")[2] for each in bulk.message_ids} == {"bulk.example>"}
    assert {each.partition("@")[2] for each in default.message_ids} == {"example.org>"}

    file.write_text("email\nc@example.com\n")
    assert cli.main(["send", str(file), "-t", "welcome", "--account", "bulk"]) == 0
    file.write_text("email\nd@example.com\n")
    assert cli.main(["send", str(file), "-t", "welcome"]) == 0
    work(mail_database)
    assert set(bulk.accepted) == {"a@example.com", "c@example.com"}
    assert set(default.accepted) == {"b@example.com", "d@example.com"}
    assert default.count + bulk.count == 4


def test_a_worker_without_the_account_sends_nothing(
    servers: tuple[Receiver, Receiver], mail_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are behind: the mail is tried again and named, not sent from another account."""
    default, _ = servers
    monkeypatch.setenv("PENGUINMAILS_ACCOUNTS", "{}")
    mail_settings.cache_clear()
    arguments = {"campaign_id": CAMPAIGN, "recipient_id": CAMPAIGN, "email": "a@example.com", "name": ""}
    with pytest.raises(Retry, match="no account 'bulk'; PENGUINMAILS_ACCOUNTS allows: default"):
        send_campaign_mail(job=a_job(Port(mail_database)), template="welcome", account="bulk", **arguments)
    assert default.count == 0
