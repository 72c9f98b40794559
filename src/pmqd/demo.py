"""`pmqd demo`: a campaign of 1,000 mails through everything that is real, and a check of what became of each.

Private PostgreSQL and Redis, the daemon with penguinmails, and an SMTP server that receives; all of it ends with the
demo. First some mails one at a time, for the pickup time of an idle system; then the campaign, all at once, of which the server
refuses some and tells others to come later; then what comes back: notifications, complaints and replies.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
from rich.console import Console

from pmqd.dev import Daemon, Stopping, Stores, free_port, private_stores, stopping
from pmqd.errors import PmqdError

if TYPE_CHECKING:
    from penguinmails.campaign import Recipients
    from penguinmails.demo.chaos import Chaos
    from penguinmails.demo.fates import Fates
    from penguinmails.demo.receiver import Receiver
    from penguinmails.demo.view import Picture, View

SINGLES = 50
TEMPLATE = "welcome"
LOOK_SECONDS = 0.1
STALLED_SECONDS = 30.0
LATER_SECONDS = 1.0  # a minute in real life
CHAOS_ANSWER_SECONDS = 0.01  # makes the campaign last long enough for both faults to fall into it
STOPPED = 130  # as a shell says it of a program that ended by Ctrl-C
LOG_LINES = 20
LOG_WIDTH = 300

QUEUES = """
select queue_name,
       count(*) filter (where status = 'queued'),
       count(*) filter (where status = 'migrated_to_redis'),
       count(*) filter (where status = 'running'),
       count(*) filter (where status = 'completed'),
       count(*) filter (where status in ('failed', 'cancelled'))
  from pmqd.jobs group by queue_name order by queue_name
"""
WORKERS = """
select worker_id,
       coalesce(max(ended.done), 0),
       case when bool_or(ended.died) then 'killed' else coalesce(min(running.email), 'idle') end
  from (select worker_id, count(*) filter (where status = 'success') as done, bool_or(status = 'crashed') as died
          from pmqd.job_logs where worker_id is not null group by worker_id) as ended
  full join (select worker_id, payload ->> 'email' as email from pmqd.jobs where status = 'running') as running
       using (worker_id)
 where worker_id is not null
 group by worker_id order by worker_id
"""
OPEN = "select count(*) from pmqd.jobs where status not in ('completed', 'failed', 'cancelled')"


@dataclass(frozen=True)
class Stage:
    """What one demo plays on."""

    stores: Stores
    daemon: Daemon
    receiver: "Receiver"
    db: psycopg.Connection[Any]
    wish: Stopping
    view: "View"
    fates: "Fates"
    inbound: Path


class _StoppedError(Exception):
    """Somebody pressed Ctrl-C."""


def run(chaos: bool = False) -> int:
    """The command.

    Args:
        chaos: kill a worker and the Redis server on the way; see `penguinmails.demo.chaos`.

    Returns:
        0 if every recipient is accounted for and nobody got two mails, 1 if not, 130 after Ctrl-C.

    Raises:
        PmqdError: a part is missing or does not start; says what to install.
    """
    if importlib.util.find_spec("aiosmtpd") is None:
        raise PmqdError("the demo needs aiosmtpd, which receives the mails: pip install 'pmqd[demo]'")
    with stopping() as wish, _folder() as folder:
        try:
            return _play(folder, wish, chaos=chaos)
        except _StoppedError:
            return STOPPED
        except BaseException:
            _tell_log(folder / "pmqd.log")
            raise


def _play(folder: Path, wish: Stopping, *, chaos: bool) -> int:
    """Raise the curtain, play, count."""
    from penguinmails import schema  # noqa: PLC0415 - `pmqd` is not to load them for other commands
    from penguinmails.campaign import read_recipients  # noqa: PLC0415
    from penguinmails.demo.fates import Fate, Fates  # noqa: PLC0415
    from penguinmails.demo.receiver import Receiver, receiving  # noqa: PLC0415
    from penguinmails.demo.view import View  # noqa: PLC0415

    package = Path(str(files("penguinmails.demo")))
    recipients = read_recipients(package / "recipients.csv")
    fates = Fates.of_list(recipients.people)
    receiver = Receiver(answer_delay_seconds=CHAOS_ANSWER_SECONDS if chaos else 0.0, refuse=fates.answer)
    inbound = folder / "inbound"
    inbound.mkdir()
    arriving = SINGLES + len(recipients.people) - len(fates.who(Fate.REFUSED))
    view = View(Console(stderr=True), arriving)
    view.say("starting PostgreSQL, Redis, pmqd with 2 workers, and an SMTP server that receives")
    with receiving(receiver), private_stores(folder) as stores:
        _use_private_settings(package / "pmqd.toml", stores, receiver.port)
        schema.apply(stores.dsn)
        daemon = Daemon(
            package / "pmqd.toml",
            stores,
            state_dir=folder / "state",
            port=free_port(),
            log=folder / "pmqd.log",
        )
        try:
            if not daemon.wait_ready(wish.asked):
                raise _StoppedError
            with psycopg.connect(stores.dsn, autocommit=True) as db:
                stage = Stage(stores, daemon, receiver, db, wish, view, fates, inbound)
                return _perform(stage, recipients, chaos=chaos)
        finally:
            daemon.stop(wish.asked_twice)


def _perform(stage: Stage, recipients: "Recipients", *, chaos: bool) -> int:
    """Send everything, then say what arrived.

    Returns:
        The exit code.
    """
    from penguinmails.demo.balance import balance_faults, balance_lines, read_balance  # noqa: PLC0415 - as above
    from penguinmails.demo.chaos import Chaos  # noqa: PLC0415
    from penguinmails.demo.report import figure_lines, mail_faults, read_figures  # noqa: PLC0415

    singles = _singles()
    plan = (
        Chaos(stage.receiver, stage.stores.redis, stage.db, stage.daemon.pid, stage.view.say)
        if chaos
        else None
    )
    with stage.view:
        first = _send_one_by_one(stage, singles)
        if plan:
            plan.begin()
        campaign = _send_campaign(stage, recipients)
        _watch(stage, plan)
        if plan and plan.release():
            _watch(stage, None)
        _hand_in(stage)
        _watch(stage, None)
    total, alone = len(recipients.people), len(singles.people)
    balance = read_balance(stage.db, campaign)
    figures = figure_lines(read_figures(stage.db, campaign, first), total, alone)
    figures += plan.lines() if plan else []
    stage.daemon.stop(stage.wish.asked_twice)  # after this nothing more can arrive
    receiver, fates = stage.receiver, stage.fates
    wrong = [
        *mail_faults(receiver, recipients, singles, balance.refused),
        *balance_faults(balance, receiver, fates),
        *(plan.faults() if plan else []),
    ]
    for line in [*balance_lines(balance, receiver, fates), *figures, *wrong]:
        sys.stdout.write(f"{line}\n")
    return 1 if wrong else 0


def _singles() -> "Recipients":
    from penguinmails.campaign import Recipient, Recipients  # noqa: PLC0415 - as above

    people = [
        Recipient(f"receipt-{number}@example.com", f"Customer {number}", {})
        for number in range(1, SINGLES + 1)
    ]
    return Recipients(people, 0)


def _send_one_by_one(stage: Stage, singles: "Recipients") -> UUID:
    """Mails each enqueued when the one before has arrived: the pickup time of a system with nothing else to do."""
    from penguinmails.campaign import Recipients, start_campaign  # noqa: PLC0415 - as above

    stage.view.say(f"sending {len(singles.people)} mails one at a time")
    campaign = uuid4()
    patience = _Patience(stage)
    for number, person in enumerate(singles.people, start=1):
        with psycopg.connect(stage.stores.dsn) as conn:
            start_campaign(
                conn, Recipients([person], 0), template=TEMPLATE, campaign_id=campaign, priority=10
            )
        while stage.receiver.count < number:
            patience.check()
            time.sleep(0.002)
    return campaign


def _send_campaign(stage: Stage, recipients: "Recipients") -> UUID:
    from penguinmails.campaign import start_campaign  # noqa: PLC0415 - as above

    begin = time.monotonic()
    with psycopg.connect(stage.stores.dsn) as conn:
        campaign = start_campaign(conn, recipients, template=TEMPLATE)
    took = time.monotonic() - begin
    stage.view.say(
        f"campaign of {len(recipients.people):,} mails enqueued in one transaction, in {took:.2f} s"
    )
    return campaign


def _hand_in(stage: Stage) -> None:
    """What comes back of the campaign: raw mails in files, as a mail server leaves them."""
    from penguinmails.demo.returns import hand_in  # noqa: PLC0415 - as above

    with psycopg.connect(stage.stores.dsn) as conn:
        number = hand_in(conn, stage.receiver.headers, stage.fates, stage.inbound)
    stage.view.say(
        f"{number} mails came back: notifications, complaints and replies, one of them twice, one forged, one no mail"
    )


def _watch(stage: Stage, plan: "Chaos | None") -> None:
    """Show what happens until every job has ended, and break what is to be broken."""
    patience = _Patience(stage)
    while _left(stage.db):
        if plan:
            plan.step()
        stage.view.show(_picture(stage))
        patience.check()
        time.sleep(LOOK_SECONDS)
    stage.view.show(_picture(stage))


class _Patience:
    """Ends the waiting when there is nothing to wait for any more."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._received = -1
        self._deadline = 0.0

    def check(self) -> None:
        """Raise if somebody wants to stop, the daemon is gone, or no mail has come for a long time."""
        stage, now = self._stage, time.monotonic()
        if stage.wish.asked():
            raise _StoppedError
        if stage.daemon.exit_code is not None:
            raise PmqdError(f"the daemon has ended with exit code {stage.daemon.exit_code}")
        if stage.receiver.count != self._received:
            self._received, self._deadline = stage.receiver.count, now + STALLED_SECONDS
        if now > self._deadline:
            raise PmqdError(
                f"no mail has come for {STALLED_SECONDS:g} s; {self._received} have arrived before"
            )


def _left(db: psycopg.Connection[Any]) -> int:
    row = db.execute(OPEN).fetchone()
    return int(row[0]) if row else 0


def _picture(stage: Stage) -> "Picture":
    from penguinmails.demo.chaos import short  # noqa: PLC0415 - as above
    from penguinmails.demo.view import Picture, QueueRow, WorkerRow  # noqa: PLC0415

    queues = [QueueRow(*row) for row in stage.db.execute(QUEUES)]
    workers = [WorkerRow(short(worker), done, doing) for worker, done, doing in stage.db.execute(WORKERS)]
    return Picture(stage.receiver.count, queues, workers)


def _use_private_settings(config: Path, stores: Stores, smtp_port: int) -> None:
    """Settings for this process and the daemon: nothing of the user's own may lead the demo to other servers."""
    for name in [name for name in os.environ if name.startswith(("PMQD_", "PENGUINMAILS_"))]:
        del os.environ[name]
    os.environ |= {
        "PMQD_CONFIG": str(config),
        "PMQD_POSTGRES__DSN": stores.dsn,
        "PMQD_LOG__FORMAT": "console",
        "PENGUINMAILS_SMTP_HOST": "127.0.0.1",
        "PENGUINMAILS_SMTP_PORT": str(smtp_port),
        "PENGUINMAILS_HELO_NAME": "demo.localhost",
        "PENGUINMAILS_FROM_ADDRESS": "penguins@example.com",
        "PENGUINMAILS_FROM_NAME": "The Penguins",
        "PENGUINMAILS_RETRY_BASE_SECONDS": str(LATER_SECONDS),
    }


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is gone afterwards: under the working directory, or where temporary files go."""
    parent = Path(".pmqd")
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="demo-", dir=parent.absolute()))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="pmqd-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()  # only if nothing else is in it


def _tell_log(log: Path) -> None:
    """The end of the daemon's log, before its folder goes."""
    with contextlib.suppress(OSError):
        for line in log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]:
            sys.stderr.write(f"pmqd.log: {line[:LOG_WIDTH]}\n")
