"""penguinmails under a real daemon, with the configuration that is shipped."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from penguinmails.app import QUEUES, send_campaign_mail
from penguinmails.message import delivery_id
from penguinmails.processing import request_inbound
from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_servers import WaitUntil
from tests.raw_mails import ZOE, a_notification
from tests.smtp_servers import Scripted, serving

SHIPPED = tomllib.loads((Path(__file__).parents[2] / "etc" / "penguinmails.toml").read_text())

Start = Callable[[int], Daemon]


@pytest.fixture
def database(mail_database: str) -> str:
    """The database of the daemon and of `connection`."""
    return mail_database


@pytest.fixture
def start(database: str, daemon: MakeDaemon) -> Start:
    """Starts the shipped configuration with one worker, against an SMTP server's port."""

    def run(port: int) -> Daemon:
        pool = SHIPPED["workers"][0] | {"processes": 1}
        environ = {"PENGUINMAILS_SMTP_PORT": str(port), "PENGUINMAILS_HELO_NAME": "test.local"}
        return daemon({**SHIPPED, "workers": [pool]}, environ=environ)

    return run


def enqueue(connection: psycopg.Connection[Any], email: str) -> Any:
    """One mail."""
    arguments: dict[str, Any] = {
        "campaign_id": uuid4(),
        "recipient_id": uuid4(),
        "name": "Ada",
        "template": "welcome",
    }
    return send_campaign_mail.enqueue(conn=connection, email=email, **arguments)


def job(connection: psycopg.Connection[Any], job_id: Any) -> dict[str, Any]:
    """The job's row, and in how many seconds it is due."""
    query = "select *, extract(epoch from run_at - now())::float8 as due_in from pmqd.jobs where id = %s"
    row = connection.cursor(row_factory=dict_row).execute(query, [job_id]).fetchone()
    assert row is not None
    return row


@pytest.mark.timeout(60)
def test_every_answer_has_its_end(
    start: Start, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """Yes completes, later waits for about a minute, never fails and leaves one bounce job, all on one connection."""
    handler = Scripted(rcpt=["250 ok", "450 4.2.1 greylisted", "550 5.1.1 no such user", "250 ok"])
    with serving(handler) as server:
        start(server.port)
        ends = []
        for email, ended in (
            ("yes@example.com", "completed"),
            ("later@example.com", "queued"),
            ("never@example.com", "failed"),
            ("again@example.com", "completed"),
        ):
            made = enqueue(connection, email)

            def settled(made: Any = made, ended: str = ended) -> bool:
                row = job(connection, made)
                return bool(row["status"] == ended and row["attempt_count"] == 1)

            wait_until(settled, 15, f"{email} {ended}")
            ends.append(job(connection, made))
    yes, later, never, again = ends
    assert yes["result"]["answer"] == "250 2.0.0 taken"
    assert "deferred at rcpt: 450 4.2.1 greylisted" in later["last_error_message"]
    assert 40 < later["due_in"] < 76
    assert "rejected at rcpt: 550 5.1.1 no such user" in never["last_error_message"]
    assert again["status"] == "completed"
    bounces = connection.execute(
        "select payload ->> 'email', payload ->> 'job_id', status, attempt_count from pmqd.jobs"
        " where queue_name = 'bounce:process'"
    ).fetchall()
    assert bounces == [("never@example.com", str(never["id"]), "queued", 0)]
    assert (len(handler.received), handler.conversations) == (2, 1)


@pytest.mark.timeout(60)
def test_a_bounce_whose_worker_is_killed_in_the_middle_counts_once(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """The shipped pool takes a notification through both queues; its worker dies with the bounce written and not committed."""
    campaign, recipient = uuid4(), uuid4()
    delivery = delivery_id(campaign, recipient)
    connection.execute(
        "insert into penguinmails.deliveries (id, campaign_id, recipient_id, email, state, attempts, message_id)"
        " values (%s, %s, %s, %s, 'sent', 1, %s)",
        [delivery, campaign, recipient, ZOE, f"<{delivery}@example.org>"],
    )
    (tmp_path / "1.eml").write_bytes(a_notification(f"<{delivery}@example.org>"))
    pools = [pool for pool in SHIPPED["workers"] if "bounce:process" in pool["queues"]]
    running = daemon({**SHIPPED, "workers": pools})
    with psycopg.connect(connection.info.dsn, password=connection.info.password) as lock:
        lock.execute("select from penguinmails.deliveries where id = %s for update", [delivery])
        with connection.transaction():
            request_inbound(connection, path=tmp_path / "1.eml")
        waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%What came back%'"
        wait_until(lambda: connection.execute(waiting).fetchone() != (0,), 15, "the worker in the middle")
        (worker,) = running.children("worker")
        worker.kill()
        wait_until(lambda: not worker.is_running(), 5, "the worker's end")
    done = "select status, attempt_count from pmqd.jobs where queue_name = 'bounce:process'"
    wait_until(lambda: connection.execute(done).fetchone() == ("completed", 2), 20, "the bounce")
    for query, wanted in (
        (
            "select state, deliveries from penguinmails.campaign_totals where deliveries <> 0",
            [("bounced", 1)],
        ),
        ("select kind, source from penguinmails.bounces", [("hard", "notification")]),
        ("select address, reason from penguinmails.suppressions", [(ZOE, "hard_bounce")]),
        ("select status from pmqd.jobs where queue_name = 'email:processing'", [("completed",)]),
    ):
        assert connection.execute(query.encode()).fetchall() == wanted


@pytest.mark.timeout(60)
def test_jobs_of_queues_without_a_handler_wait(
    start: Start, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """While mails go out, the jobs of the other three queues stay queued, untouched and uncharged."""
    with serving(Scripted()) as server:
        start(server.port)
        for queue in QUEUES:
            if queue != "email-sending":
                connection.execute("insert into pmqd.jobs (queue_name, payload) values (%s, '{}')", [queue])
        for number in range(3):
            made = enqueue(connection, f"p{number}@example.com")

            def completed(made: Any = made) -> bool:
                return bool(job(connection, made)["status"] == "completed")

            wait_until(completed, 15, "the mail")
    waiting = connection.execute(
        "select queue_name, status, attempt_count from pmqd.jobs where queue_name <> 'email-sending' order by 1"
    ).fetchall()
    assert waiting == [(queue, "queued", 0) for queue in sorted(QUEUES) if queue != "email-sending"]
