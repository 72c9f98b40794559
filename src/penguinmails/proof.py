"""`python -m penguinmails.proof`: a campaign while workers are killed at random, and a check of every recipient.

Private PostgreSQL and Redis, the daemon, and an SMTP server that receives. What must be so under `hold`:

- No recipient got two mails.
- Every recipient is sent, held or bounced. The server has taken exactly one mail for each who is sent, none for who bounced.
- The held ones are exactly those whose worker was killed between the intent's commit and the settle: a trigger writes down every
  change of state, so an intent without an outcome of the same attempt is known from elsewhere than from `held`; and pmqd's own log
  of attempts says that its worker died.
- The sums of the report equal the rows.

Under `resend` nobody is held, everybody who is not refused gets a mail, and those who get two are such intents.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from penguinmails import schema
from penguinmails.campaign import Recipient, Recipients, create_campaign, request_campaign
from penguinmails.deliveries import State
from penguinmails.demo.receiver import Receiver, receiving
from penguinmails.report import read_report
from penguinmails.settings import Ambiguous
from pmqd.dev import Daemon, free_port, private_stores
from pmqd.errors import PmqdError

REFUSED_EVERY = 50
STALLED_SECONDS = 60.0
SHOWN = 5
TITLE = re.compile(rb"pmqd: worker \d+ \(mail\)")
ENDED = (State.SENT, State.HELD, State.BOUNCED)

CONFIG = """
drain_seconds = 5

[[workers]]
name = "mail"
app = "penguinmails.app:app"
queues = ["campaign:process", "email-sending"]
processes = {workers}

[queues.email-sending]
isolation = "abort"
timeout_seconds = 30
max_attempts = 5
"""

# An intent without an outcome of the same attempt, and whether pmqd says that the worker of that attempt died.
CUT = """
select s.delivery_id,
       exists (select from pmqd.job_logs l where l.job_id = s.job_id and l.worker_id = s.worker_id and l.status = 'crashed')
  from penguinmails_proof.steps s
 where s.new_state = 'sending'
   and not exists (select from penguinmails_proof.steps e
                    where e.delivery_id = s.delivery_id and e.token = s.token and e.new_state in ('sent', 'deferred', 'bounced'))
"""
ROWS = "select id, email, state from penguinmails.deliveries"
UNFINISHED = "select count(*) from pmqd.jobs where queue_name <> 'bounce:process' and status not in ('completed', 'failed', 'cancelled')"
CRASHES = "select count(*) from pmqd.job_logs where status = 'crashed'"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        mails: recipients; every fiftieth is refused by the server.
        workers: processes.
        kill_seconds: between two kills; 0 kills nobody.
        answer_seconds: how long the server thinks about each mail: the time in which a kill is worst.
        ambiguous: the policy.
        seed: of who is killed.
    """

    mails: int = 5000
    workers: int = 4
    kill_seconds: float = 1.0
    answer_seconds: float = 0.02
    ambiguous: Ambiguous = Ambiguous.HOLD
    seed: int = 1


@dataclass
class Outcome:
    """What was seen.

    Attributes:
        states: of each delivery, by address.
        cut: addresses whose attempt has an intent and no outcome.
        undead: those of them whose worker did not die, as pmqd's log says.
        crashes: attempts that died with their worker, in whatever state.
        sums: the report's figures.
    """

    kills: int = 0
    seconds: float = 0.0
    states: dict[str, State] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    undead: set[str] = field(default_factory=set)
    crashes: int = 0
    sums: dict[State, int] = field(default_factory=dict)

    def of(self, state: State) -> set[str]:
        """Who is in a state."""
        return {email for email, each in self.states.items() if each is state}


def prove(plan: Plan, folder: Path) -> tuple[Outcome, Receiver]:
    """Run it.

    Args:
        plan: what.
        folder: for servers and logs; empty.

    Raises:
        PmqdError: a part does not start, or no mail came for a minute.
    """
    receiver = Receiver(answer_delay_seconds=plan.answer_seconds, refuse=_refusal)
    with receiving(receiver), private_stores(folder) as stores:
        schema.apply(stores.dsn)
        config = folder / "pmqd.toml"
        config.write_text(CONFIG.format(workers=plan.workers))
        with _environment(receiver.port, plan.ambiguous), psycopg.connect(stores.dsn, autocommit=True) as db:
            db.execute((files("penguinmails") / "proof.sql").read_bytes())
            daemon = Daemon(
                config, stores, state_dir=folder / "state", port=free_port(), log=folder / "pmqd.log"
            )
            try:
                daemon.wait_ready(lambda: False)
                outcome = _run(plan, stores.dsn, db, daemon, receiver)
            finally:
                daemon.stop(lambda: True)
    return outcome, receiver


def faults(plan: Plan, outcome: Outcome, receiver: Receiver) -> list[str]:
    """What is not as it must be; nothing if it is proved."""
    sent, held, bounced = (outcome.of(state) for state in ENDED)
    once = {email for email, count in receiver.accepted.items() if count == 1}
    twice = {email for email, count in receiver.accepted.items() if count > 1}
    people = {person.email for person in _people(plan.mails).people}
    resend = plan.ambiguous is Ambiguous.RESEND
    return [
        *_fault("recipients without a delivery, or too many", people ^ set(outcome.states)),
        *_fault("got more than one mail", twice - outcome.cut if resend else twice),
        *_fault("neither sent, held nor bounced", people - sent - held - bounced),
        *_fault("sent, but the server has not taken it once", sent - once - (twice if resend else set())),
        *_fault("bounced, but the server took it", bounced & set(receiver.accepted)),
        *_fault("bounced, but never refused", bounced - set(receiver.refused)),
        *_fault("refused, but neither bounced nor held", set(receiver.refused) - bounced - held),
        *_fault("held and not cut, or cut and not held", held if resend else held ^ outcome.cut),
        *_fault("cut, though the worker did not die", outcome.undead),
        *_fault("counted otherwise than there are", _miscounted(outcome)),
        *(
            ["no worker was killed in the middle of a mail: too few kills"]
            if plan.kill_seconds and not outcome.cut
            else []
        ),
    ]


def lines(outcome: Outcome, receiver: Receiver) -> list[str]:
    """The figures in words."""
    sent, held, bounced = (outcome.of(state) for state in ENDED)
    arrived = sum(email in receiver.accepted for email in held)
    twice = sum(count > 1 for count in receiver.accepted.values())
    return [
        (
            f"mails       {len(outcome.states):,}: {len(sent):,} sent, {len(bounced):,} bounced, {len(held):,} held,"
            f" in {outcome.seconds:.0f} s"
        ),
        (
            f"kills       {outcome.kills} of a random worker (kill -9); {outcome.crashes} died in the middle of a job,"
            f" {len(outcome.cut)} of these between intent and settle"
        ),
        f"twice       {twice} recipients got two mails",
        f"held        of {len(held)} the server had taken {arrived}, and had not {len(held) - arrived}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if it is proved."""
    parser = argparse.ArgumentParser(prog="python -m penguinmails.proof", description=__doc__.splitlines()[0])
    default = Plan()
    parser.add_argument("--mails", type=int, default=default.mails)
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument("--kill-seconds", type=float, default=default.kill_seconds, help="0: kill nobody")
    parser.add_argument("--answer-seconds", type=float, default=default.answer_seconds)
    parser.add_argument(
        "--ambiguous", type=Ambiguous, choices=list(Ambiguous), default=default.ambiguous, help="the policy"
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    plan = Plan(**vars(parser.parse_args(arguments)))
    if plan.mails < 1 or plan.workers < 1 or plan.kill_seconds < 0 or plan.answer_seconds < 0:
        parser.error("--mails and --workers are at least 1, seconds at least 0")
    with tempfile.TemporaryDirectory(prefix="pm-proof-") as folder:
        try:
            outcome, receiver = prove(plan, Path(folder))
        except PmqdError as error:
            sys.stderr.write(f"penguinmails.proof: {error}\n")
            return int(error.exit_code)
    wrong = faults(plan, outcome, receiver)
    for line in [*lines(outcome, receiver), *(f"WRONG       {each}" for each in wrong)]:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write("proved\n" if not wrong else "not proved\n")
    return 1 if wrong else 0


def _run(plan: Plan, dsn: str, db: psycopg.Connection[Any], daemon: Daemon, receiver: Receiver) -> Outcome:
    """The campaign, the kills, and what is so afterwards."""
    outcome, chance, begun = Outcome(), random.Random(plan.seed), time.monotonic()  # noqa: S311 - no secret
    with psycopg.connect(dsn) as conn:
        campaign = create_campaign(conn, _people(plan.mails), template="welcome")
        request_campaign(conn, campaign)
    kill_at = begun + plan.kill_seconds
    seen, at_kill, stalled_at = -1, 0, 0.0
    while _count(db, UNFINISHED):
        now = time.monotonic()
        if receiver.count != seen:
            seen, stalled_at = receiver.count, now + STALLED_SECONDS
        if daemon.exit_code is not None or now > stalled_at:
            raise PmqdError(f"no mail has come for {STALLED_SECONDS:g} s after {seen}, or the daemon ended")
        # Not before the last kill is got over: killed while they start, workers are started later and later.
        if plan.kill_seconds and now >= kill_at and receiver.count > at_kill:
            outcome.kills += _kill_one(daemon.pid, chance)
            kill_at, at_kill = now + plan.kill_seconds, receiver.count
        time.sleep(0.05)
    outcome.seconds = time.monotonic() - begun
    _look(db, campaign, outcome)
    return outcome


def _look(db: psycopg.Connection[Any], campaign: UUID, outcome: Outcome) -> None:
    emails = {}
    for delivery, email, state in db.execute(ROWS):
        emails[delivery], outcome.states[email] = email, State(state)
    for delivery, died in db.execute(CUT):
        outcome.cut.add(emails[delivery])
        if not died:
            outcome.undead.add(emails[delivery])
    outcome.crashes = _count(db, CRASHES)
    report = read_report(db, campaign)
    outcome.sums = dict(report.deliveries) if report else {}


def _miscounted(outcome: Outcome) -> set[str]:
    return {state.value for state in State if outcome.sums.get(state) != len(outcome.of(state))}


def _kill_one(master: int, chance: random.Random) -> bool:
    """SIGKILL to one of the master's workers; whether there was one."""
    found = sorted(_workers(master))
    if found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(found), signal.SIGKILL)
            return True
    return False


def _workers(master: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name in brackets may hold spaces; the parent is the second word after it.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == master and TITLE.match((folder / "cmdline").read_bytes()):
                yield int(folder.name)


@contextlib.contextmanager
def _environment(smtp_port: int, ambiguous: Ambiguous) -> Iterator[None]:
    """Settings for this process and the daemon, and none of the user's own, until the block ends."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("PMQD_", "PENGUINMAILS_"))]:
        del os.environ[name]
    os.environ |= {
        "PENGUINMAILS_SMTP_PORT": str(smtp_port),
        "PENGUINMAILS_HELO_NAME": "proof.localhost",
        "PENGUINMAILS_FROM_ADDRESS": "penguins@example.com",
        "PENGUINMAILS_AMBIGUOUS": ambiguous.value,
        "PENGUINMAILS_RETRY_BASE_SECONDS": "1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _people(mails: int) -> Recipients:
    people = [
        Recipient(f"{'refused' if number % REFUSED_EVERY == 0 else 'p'}{number}@example.com", "", {})
        for number in range(1, mails + 1)
    ]
    return Recipients(people, 0)


def _refusal(recipient: str) -> str | None:
    return "550 5.1.1 no such user" if recipient.startswith("refused") else None


def _count(db: psycopg.Connection[Any], query: str) -> int:
    row = db.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0


def _fault(what: str, found: set[str]) -> Iterator[str]:
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield f"{len(found)} {what}: {', '.join(sorted(found)[:SHOWN])}{more}"


if __name__ == "__main__":
    sys.exit(main())
